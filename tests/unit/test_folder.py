"""A folder on any file system: its path, its parts, and files that are written whole or not at all."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from kun_ray import store
from kun_ray.config import KunError
from kun_ray.store import Folder


def test_parts_are_sorted_and_nothing_else(tmp_path: Path) -> None:
    for name in ("part-2.parquet", "part-10.parquet", "other.parquet", "part-1.parquet.tmp", "_part-3.parquet"):
        (tmp_path / name).write_text("")
    (tmp_path / "part-dir.parquet").mkdir()
    assert [os.path.basename(path) for path in Folder(str(tmp_path)).parts()] == ["part-10.parquet", "part-2.parquet"]
    assert Folder(str(tmp_path / "gone")).parts() == []


@pytest.mark.parametrize("remote", [False, True])
def test_batches_come_in_the_order_of_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool) -> None:
    for number in range(20):
        rows = pa.table({"n": [number, -number], "wide": ["长" * 1000] * 2})
        pq.write_table(rows, tmp_path / f"part-{number:02}.parquet")
    if remote:
        object_store = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))
        monkeypatch.setattr(store, "resolve", lambda uri: (object_store, uri))
    folder = Folder(str(tmp_path))
    batches = list(folder.batches(["n"]))
    assert [n for batch in batches for n in batch["n"].to_pylist()] == [m for n in range(20) for m in (n, -n)]
    assert {name for batch in batches for name in batch.schema.names} == {"n"} and folder.num_rows() == 40
    assert list(Folder(str(tmp_path / "gone")).batches(["n"])) == [] and Folder(str(tmp_path / "gone")).num_rows() == 0
    (tmp_path / "part-07.parquet").write_bytes(b"PAR1 and no more")
    for read in (folder.num_rows, lambda: list(folder.batches(["n"]))):
        with pytest.raises(KunError, match=r"part-07\.parquet cannot be read"):
            read()


@pytest.mark.parametrize(("remote", "most"), [(False, 1), (True, store.REMOTE_READS)])
def test_what_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool, most: int) -> None:
    """Where each part waits for a network several are read at once; else one, for what waits is memory."""
    lock, open_now, seen = threading.Lock(), 0, list[int]()

    def read_table(path: str, **_: Any) -> pa.Table:
        nonlocal open_now
        with lock:
            open_now += 1
            seen.append(open_now)
        time.sleep(0.02)
        with lock:
            open_now -= 1
        return pa.table({"n": [1]})

    monkeypatch.setattr(store.pq, "read_table", read_table)
    monkeypatch.setattr(Folder, "parts", lambda self: [f"part-{number}" for number in range(40)])
    if remote:
        object_store = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("file")))
        monkeypatch.setattr(store, "resolve", lambda uri: (object_store, uri))
    batches = Folder(str(tmp_path)).batches(["n"])
    next(batches)
    batches.close()  # nobody wants the rest
    while open_now:
        time.sleep(0.01)
    assert len(seen) <= most
    assert len(list(Folder(str(tmp_path)).batches(["n"]))) == 40 and max(seen) == most


def test_success_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    original = Folder.write_text

    def noted(self: Folder, name: str, text: str) -> None:
        written.append(name)
        original(self, name, text)

    monkeypatch.setattr(Folder, "write_text", noted)
    folder = Folder(str(tmp_path))
    folder.finish({"rows": 3})
    assert written == ["summary.json", "_SUCCESS"] and folder.is_complete()
    assert folder.read_json("summary.json") == {"rows": 3}


def test_no_success_when_the_summary_fails(tmp_path: Path) -> None:
    (tmp_path / "summary.json").mkdir()
    (tmp_path / "summary.json/x").write_text("")
    with pytest.raises(OSError):
        Folder(str(tmp_path)).finish({})
    assert not Folder(str(tmp_path)).is_complete()


@pytest.mark.parametrize("failing", ["write", "move"])
def test_write_text_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """The file system fails half-way: in the middle of the stream, or at the rename."""

    class Failing(fs.FSSpecHandler):
        def open_output_stream(self, path: str, metadata: Any) -> Any:
            stream = super().open_output_stream(path, metadata)
            if failing == "write":
                Path(path).write_text("ha")
                raise OSError("no space left")
            return stream

        def move(self, source: str, target: str) -> None:
            raise OSError("connection lost")

    folder = Folder(str(tmp_path))
    folder.write_text("notes.json", "old and whole")
    broken = fs.PyFileSystem(Failing(fsspec.filesystem("file")))
    monkeypatch.setattr(store, "resolve", lambda uri: (broken, uri))
    with pytest.raises(OSError):
        folder.write_text("notes.json", "new and half")
    assert (tmp_path / "notes.json").read_text() == "old and whole"


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    folder.write_text("a.txt", "一" * 1000)
    folder.write_text("a.txt", "二")
    assert (tmp_path / "a.txt").read_text() == "二" and os.listdir(tmp_path) == ["a.txt"]


def test_metrics_are_appended(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for number in range(3):
        folder.append_metrics({"rows": number, "pool": "标签"})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines] == [0, 1, 2] and all(line["time"] > 1.7e9 for line in lines)


def test_metrics_where_files_cannot_grow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on S3."""

    class NoAppend(fs.FSSpecHandler):
        def open_append_stream(self, path: str, metadata: Any) -> Any:
            raise NotImplementedError

    object_store = fs.PyFileSystem(NoAppend(fsspec.filesystem("file", auto_mkdir=True)))
    monkeypatch.setattr(store, "resolve", lambda uri: (object_store, uri))
    folder = Folder(str(tmp_path))
    folder.append_metrics({"rows": 1})
    folder.append_metrics({"rows": 2})
    files = sorted((tmp_path / "_metrics").iterdir())
    assert [json.loads(file.read_text())["rows"] for file in files] == [1, 2]


def test_resolve_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri, path in {"a/b/": "a/b", "./a/../c": "c", "~/x": "home/x", f"file://{tmp_path}/d/": "d"}.items():
        filesystem, found = store.resolve(uri)
        assert isinstance(filesystem, fs.LocalFileSystem) and found == str(tmp_path / path)
    assert store.resolve("/")[1] == "/"
    assert store.is_local("a/b") and store.is_local("file:///a") and not store.is_local("s3://a/b")


@pytest.mark.parametrize(
    "uri", ["foo://key:SECRET@bucket/x", "s3://key:SEC/RET@bucket/x", "s3://key:SECRET@bucket/x?wrong=1&region=r"]
)
def test_resolve_never_shows_credentials(uri: str) -> None:
    with pytest.raises(KunError) as caught:
        store.resolve(uri)
    assert "bucket/x" in str(caught.value)
    assert "SEC" not in str(caught.value) and "RET" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "below"),
    [
        ("/runs/a/", "/runs/a/_clean"),
        (
            "s3://bucket/run?endpoint_override=h:9000&scheme=http",
            "s3://bucket/run/_clean?endpoint_override=h:9000&scheme=http",
        ),
    ],
)
def test_a_folder_below_keeps_the_options_of_a_uri_at_its_end(uri: str, below: str) -> None:
    assert Folder(uri).below("_clean").uri == below
