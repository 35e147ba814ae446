"""Every kind of bad input at once through prepare on a real Ray; and what prepare does when its own files are damaged."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile
import pytest
from hostile import KINDS, line

import kun_ray.prepare
from kun_ray import execution
from kun_ray.config import KunError
from kun_ray.corpora import CorpusConfig
from kun_ray.prepare import CLEAN, PrepareConfig, prepare
from kun_ray.signatures import DedupConfig
from kun_ray.store import Folder


def test_all_hostile_input_at_once_and_every_count_proven(cluster: None, tmp_path: Path) -> None:
    folders = hostile.write_all(tmp_path / "corpora")
    hostile.one_long_line(tmp_path / "corpora/jsonl/one_long_line.jsonl", 100 << 20)
    config = PrepareConfig(
        corpora=[CorpusConfig(format, format, paths, meta_fields=["id"]) for format, paths in folders.items()],
        output=str(tmp_path / "prepare"),
        read_tasks=8,
        batch_rows=50,
        rows_per_file=100,
    )
    summary = prepare(config)

    expected = {f"{name}{kind.suffix}": kind.outcome for name, kind in KINDS.items()}
    expected["one_long_line.jsonl"] = [None, "record_too_large", None]
    rows = Folder(config.output).dataset().to_table().to_pylist()
    found: dict[str, list[str | None]] = defaultdict(list)
    for row in rows:
        found[json.loads(row["meta"])["file"].partition("!")[0]].append(row["reason"])
        assert (row["text"] is None) == (row["status"] != "ok")
    for file, outcome in expected.items():  # the good neighbours are alike on purpose
        here = [None if reason in ("duplicate", "near_duplicate") else reason for reason in found.pop(file)]
        assert sorted(map(str, here)) == sorted(map(str, outcome)), file
    assert not found
    num_rows = sum(map(len, expected.values()))
    assert summary["rows_in"] == summary["rows"] == len(rows) == num_rows
    assert summary["ok"] + summary["rejected"] + summary["failed"] == num_rows
    assert summary["failed"] == sum(n for reason, n in summary["reasons"].items() if reason.startswith("failed/"))
    assert summary["repeated_ids"] == 0 and summary["ok"] > 0


@pytest.fixture
def small(tmp_path: Path) -> PrepareConfig:
    """Two files of 30 documents, five of which stand in both."""
    texts = [hostile.good() for _ in range(55)]
    for name, own in (("a", texts[:30]), ("b", texts[25:])):
        (tmp_path / f"{name}.jsonl").write_bytes(b"\n".join(line(text=text) for text in own))
    corpus = CorpusConfig("c", "jsonl", [str(tmp_path / "*.jsonl")])
    output = str(tmp_path / "prepare")
    return PrepareConfig(corpora=[corpus], output=output, rows_per_file=10, dedup=DedupConfig(near=False))


def stop_before(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    """Makes prepare end, as a signal would, where it calls `name`; the result undoes that."""
    real = getattr(kun_ray.prepare, name)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(kun_ray.prepare, name, stop)
    return lambda: monkeypatch.setattr(kun_ray.prepare, name, real)


def test_an_error_of_a_late_phase_is_one_message_and_the_same_command_goes_on(
    cluster: None, small: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = stop_before(monkeypatch, "write_marked")
    with pytest.raises(KeyboardInterrupt):
        prepare(small)
    undo()
    part = Path(Folder(small.output).below(CLEAN).parts()[2])
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KunError, match="the run ended early: .*\n.*run the same command again") as caught:
        prepare(small)
    assert "Traceback" not in str(caught.value) and "ray::" not in str(caught.value)
    part.write_bytes(whole)
    summary = prepare(small)
    assert (summary["rows_in"], summary["ok"], summary["reasons"]) == (60, 55, {"rejected/duplicate": 5})


def test_a_run_without_a_single_ok_document_says_what_took_them(
    cluster: None, small: PrepareConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a", b""), ("b", line(text="短")), ("c", b"")):
        (tmp_path / f"{name}.jsonl").write_bytes(content)
    summary = prepare(small)
    assert summary["ok"] == 0 and Folder(small.output).is_complete()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "warning: no row is ok, so no later stage has anything to do: 2 failed/empty_file, 1 rejected/too_short"
    )


def test_rows_lost_between_reading_and_writing_are_noticed(
    cluster: None, small: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read is counted by the readers; the files that were written cannot vouch for themselves."""
    real = execution.write

    def lose_one(dataset: Any, folder: Folder, rows_per_file: int) -> None:
        real(dataset, folder, rows_per_file)
        Path(folder.parts()[0]).unlink()

    monkeypatch.setattr(execution, "write", lose_one)
    with pytest.raises(KunError, match="60 records were read, but 50 were written"):
        prepare(small)
    assert not Folder(small.output).is_complete()


def test_what_a_kill_at_the_very_end_leaves_is_cleared(
    cluster: None, small: PrepareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    undo = stop_before(monkeypatch, "_delete")
    with pytest.raises(KeyboardInterrupt):
        prepare(small)
    undo()
    clean = Folder(small.output).below(CLEAN)
    assert Folder(small.output).is_complete() and clean.exists()
    assert prepare(small)["rows"] == 60 and not clean.exists()
