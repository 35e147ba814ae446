"""retry=failed: failed rows leave parts and records; a kill at any step leaves a folder that the next start mends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from kun_ray import retry, store
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.store import Folder

FATES = {
    "part-a-000000": ["ok", "failed", "ok", "rejected"],
    "part-a-000001": ["ok", "ok"],
    "part-b-000000": ["failed", "failed"],
}


def finished(path: Path) -> Folder:
    """A complete stage of three parts, as Ray Data and generate leave it."""
    (path / "_checkpoint").mkdir(parents=True)
    n = 0
    for name, fates in FATES.items():
        rows: list[dict[str, Any]] = []
        for status in fates:
            rows.append({"doc_id": doc_id("s", "f", n, ""), "source": "s", "title": str(n), "status": status})
            n += 1
        pq.write_table(to_table(rows, DOCUMENT), path / f"{name}-0.parquet")
        pq.write_table(pa.table({"doc_id": [row["doc_id"] for row in rows]}), path / f"_checkpoint/{name}.parquet")
    folder = Folder(str(path))
    folder.finish({})
    return folder


def held(folder: Folder) -> dict[str, list[str]]:
    """Record → ids, of parts and of checkpoint records; the two must agree."""
    parts = {retry._record_of(path): pq.read_table(path)["doc_id"].to_pylist() for path in folder.parts()}
    records = {
        path.name: pq.read_table(path)["doc_id"].to_pylist() for path in Path(folder.child("_checkpoint")).iterdir()
    }
    assert parts == records
    return parts


def test_failed_rows_are_taken_out_of_parts_and_records(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    untouched = (tmp_path / "part-a-000001-0.parquet").read_bytes()
    (tmp_path / "_suspects.json").write_text("{}")
    assert retry.withdraw_failed(folder) == 3
    ids = held(folder)
    assert sorted(ids) == ["part-a-000000.parquet", "part-a-000001.parquet"], "a part of failed rows alone is gone"
    assert ids["part-a-000000.parquet"] == [doc_id("s", "f", n, "") for n in (0, 2, 3)]
    assert (tmp_path / "part-a-000001-0.parquet").read_bytes() == untouched
    assert not folder.is_complete() and not folder.exists("_withdrawal.json") and not folder.exists("_suspects.json")


def test_nothing_failed_changes_nothing(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    retry.withdraw_failed(folder)
    folder.finish({})
    assert retry.withdraw_failed(folder) == 0 and folder.is_complete()


@pytest.mark.parametrize("num_changes", range(7))
def test_a_withdrawal_that_was_cut_off_is_mended_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_changes: int
) -> None:
    folder = finished(tmp_path)
    left = num_changes

    class CutOff(fs.FSSpecHandler):
        """Lets so many changes through, then none."""

        def _change(self) -> None:
            nonlocal left
            if left == 0:
                raise OSError("killed")
            left -= 1

        def delete_file(self, path: str) -> None:
            self._change()
            super().delete_file(path)

        def move(self, source: str, target: str) -> None:
            self._change()
            super().move(source, target)

    with monkeypatch.context() as patch:
        cut_off = fs.PyFileSystem(CutOff(fsspec.filesystem("file")))
        patch.setattr(store, "resolve", lambda uri: (cut_off, uri))
        with pytest.raises(OSError, match="killed"):
            retry.withdraw_failed(folder)
    retry.finish_withdrawal(folder)
    if num_changes == 0:  # not even the intent was written
        assert folder.is_complete() and sum(map(len, held(folder).values())) == 8
    else:
        assert not folder.is_complete() and sum(map(len, held(folder).values())) == 5
