"""Files that change while they are read, and storage that fails: nothing is lost without a word."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import good, neighbour

from kun_ray import sources
from kun_ray.config import KunError
from kun_ray.corpora import CorpusConfig, list_files, read_file


def reasons(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["reason"] for row in rows]


def error(row: dict[str, Any]) -> str:
    return str(json.loads(row["meta"])["error"])


@pytest.fixture
def listed(tmp_path: Path) -> tuple[CorpusConfig, sources.CorpusFile]:
    """A file of 3,000 documents that has just been listed."""
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(neighbour() for _ in range(3000)) + b"\n")
    corpus = CorpusConfig("c", "jsonl", [str(tmp_path / "x.jsonl")])
    return corpus, list_files(corpus)[0]


def read(corpus: CorpusConfig, file: sources.CorpusFile, meanwhile: Callable[[Path], Any]) -> list[dict[str, Any]]:
    """The rows of a file to which something happens once its first block has been read."""
    tables = read_file(corpus, file)
    rows = next(tables).to_pylist()
    meanwhile(Path(file.path))
    return [*rows, *(row for table in tables for row in table.to_pylist())]


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(neighbour() + b"\n")


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[::-1])
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: os.truncate(path, 1000), "bytes when listed, 1000 after reading"),
        (append, "bytes when listed"),
        (replace, "written again"),
        (Path.unlink, "deleted"),
    ],
)
def test_a_file_that_changes_while_it_is_read_says_so(
    listed: tuple[CorpusConfig, sources.CorpusFile], change: Callable[[Path], Any], words: str
) -> None:
    rows = read(*listed, change)
    assert rows[-1]["reason"] == "file_changed" and words in error(rows[-1])
    assert len({row["doc_id"] for row in rows}) == len(rows) > 2000


def test_a_file_that_shrank_at_a_line_end_before_it_was_read_says_so(
    listed: tuple[CorpusConfig, sources.CorpusFile],
) -> None:
    corpus, file = listed
    lines = Path(file.path).read_bytes().splitlines(keepends=True)
    Path(file.path).write_bytes(b"".join(lines[:1500]))
    rows = [row for table in read_file(corpus, file) for row in table.to_pylist()]
    assert reasons(rows) == [None] * 1500 + ["file_changed"], (
        "without the check, 1,500 documents would be gone in silence"
    )


def test_an_unchanged_file_leaves_no_such_row(listed: tuple[CorpusConfig, sources.CorpusFile]) -> None:
    assert reasons(read(*listed, lambda path: None)) == [None] * 3000


class Flaky:
    """A file system whose reads fail now and then: every `period`-th one, or all from byte `broken_from` on."""

    def __init__(
        self, inner: Any, period: int = 0, broken_from: int | None = None, error: OSError | None = None
    ) -> None:
        self.inner, self.period, self.broken_from, self.num_reads, self.num_errors = inner, period, broken_from, 0, 0
        self.error = error or OSError("AWS Error NETWORK_CONNECTION during GetObject: timed out")

    def get_file_info(self, path: str) -> Any:
        return self.inner.get_file_info(path)

    def open_input_file(self, path: str) -> Any:
        if self.broken_from == 0:
            self.num_errors += 1
            raise self.error
        file, outer = self.inner.open_input_file(path), self

        class File:
            def seek(self, place: int) -> None:
                file.seek(place)

            def close(self) -> None:
                file.close()

            def read(self, num_bytes: int | None) -> bytes:
                outer.num_reads += 1
                broken = outer.broken_from is not None and file.tell() + (num_bytes or 0) > outer.broken_from
                if broken or (outer.period and outer.num_reads % outer.period == 0):
                    outer.num_errors += 1
                    raise outer.error
                return file.read(num_bytes)  # type: ignore[no-any-return]

        return File()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Flaky]:
    """Puts a Flaky between the readers and the local file system, and spares the waiting."""

    def make(**how: Any) -> Flaky:
        from kun_ray.store import resolve

        filesystem, _ = resolve("/")
        broken = Flaky(filesystem, **how)
        monkeypatch.setattr(sources, "resolve", lambda uri: (broken, resolve(uri)[1]))
        monkeypatch.setattr(sources, "RETRY_WAITS_S", (0.0,) * 6)
        return broken

    return make


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_storage_that_fails_now_and_then_loses_nothing(
    suffix: str, tmp_path: Path, flaky: Callable[..., Flaky]
) -> None:
    path, texts = tmp_path / f"x{suffix}", [f"{good()}{os.urandom(2000).hex()}" for _ in range(1500)]
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=100)
    else:
        data = b"\n".join(hostile.line(text=text) for text in texts)
        path.write_bytes(hostile.zipped(data) if suffix.endswith("gz") else data)
    corpus = CorpusConfig("c", "parquet" if suffix == ".parquet" else "jsonl", [str(path)])
    file = list_files(corpus)[0]
    before = [table.to_pylist() for table in read_file(corpus, file)]
    broken = flaky(period=2)
    assert [table.to_pylist() for table in read_file(corpus, file)] == before
    assert broken.num_errors > 2 and sum(len(rows) for rows in before) == 1500


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".tar", ".parquet"])
def test_storage_that_stays_down_ends_the_run_and_never_loses_the_rest_in_silence(
    suffix: str, tmp_path: Path, flaky: Callable[..., Flaky]
) -> None:
    path = tmp_path / f"x{suffix}"
    data = b"\n".join(hostile.line(text=good() + os.urandom(1000).hex()) for _ in range(3000)) + b"\n"
    if suffix == ".parquet":
        rows = [json.loads(line)["text"] for line in data.splitlines()]
        pq.write_table(pa.table({"text": rows}), path, row_group_size=100)
    else:
        path.write_bytes(
            {".jsonl": data, ".jsonl.gz": hostile.zipped(data), ".tar": hostile.tar(("a.jsonl", data))}[suffix]
        )
    format = "parquet" if suffix == ".parquet" else "jsonl"
    corpus, skipping = (CorpusConfig("c", format, [str(path)], on_read_error=how) for how in ("stop", "skip"))
    file = list_files(corpus)[0]
    # The footer of a Parquet file stands at its end.
    broken = flaky(broken_from=path.stat().st_size // 2) if suffix != ".parquet" else flaky(broken_from=0)
    with pytest.raises(KunError, match=r"cannot be read: AWS Error .*at byte \d+.*7 tries.*on_read_error: skip"):
        list(read_file(corpus, file))
    assert broken.num_errors == 7
    *rest, last = [row for table in read_file(skipping, file) for row in table.to_pylist()]
    assert last["reason"] == "unreadable_file" and "at byte" in error(last) and str(file.name) in last["meta"]
    assert reasons(rest) == [None] * len(rest) and (rest or suffix == ".parquet")


def test_what_cannot_pass_is_not_tried_again(tmp_path: Path, flaky: Callable[..., Flaky]) -> None:
    (tmp_path / "x.jsonl").write_bytes(neighbour())
    broken = flaky(broken_from=0, error=PermissionError(13, "Permission denied"))
    corpus = CorpusConfig("c", "jsonl", [str(tmp_path)])
    rows = [row for table in read_file(corpus, list_files(corpus)[0]) for row in table.to_pylist()]
    assert reasons(rows) == ["unreadable_file"] and broken.num_errors == 1


def test_credentials_of_a_failing_store_are_shown_nowhere(
    capfd: pytest.CaptureFixture[str], flaky: Callable[..., Flaky]
) -> None:
    flaky(broken_from=0, error=OSError("s3://AKIA:SECRET@bucket/x.jsonl is gone"))
    source = sources.Source("s3://AKIA:SECRET@bucket/x.jsonl?region=r")
    with pytest.raises(KunError) as caught:
        source.read(10)
    shown = str(caught.value) + "".join(capfd.readouterr())
    assert "bucket/x.jsonl" in shown and "SECRET" not in shown and "AKIA" not in shown
