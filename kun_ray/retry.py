"""`retry=failed`: takes the failed rows out of a generate stage, so that a run does them again as rows that are missing.

Ray Data runs the rows that its checkpoint does not hold. So a part is rewritten without its failed rows, and then the
record of its ids without theirs. The intent is written first and carried out again after a kill; doing it twice changes
nothing, and no new row is written before it is done.
"""

from __future__ import annotations

import re
import uuid

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kun_ray.counts import count_statuses
from kun_ray.schema import FAILED
from kun_ray.store import CHECKPOINT, SUCCESS, Folder
from kun_ray.suspects import SUSPECTS

WITHDRAWAL = "_withdrawal.json"
"""Names of the checkpoint records whose parts lose their failed rows."""


def withdraw_failed(folder: Folder) -> int:
    """Takes the failed rows out of a stage; returns how many. With one or more, the stage is incomplete from then on."""
    num_failed = count_statuses(folder)[FAILED]
    if num_failed:
        holding = [path for path in folder.parts() if _num_failed(folder, path)]
        folder.write_json(WITHDRAWAL, sorted({_record_of(path) for path in holding}))
        finish_withdrawal(folder)
    return num_failed


def finish_withdrawal(folder: Folder) -> None:
    """Carries out the withdrawal that was begun in this folder, if there is one."""
    if not folder.exists(WITHDRAWAL):
        return
    if folder.exists(SUCCESS):
        folder.filesystem.delete_file(folder.child(SUCCESS))
    for record in folder.read_json(WITHDRAWAL):
        _withdraw(folder, record)
    for name in (SUSPECTS, WITHDRAWAL):  # what was quarantined gets another chance
        if folder.exists(name):
            folder.filesystem.delete_file(folder.child(name))


def _withdraw(folder: Folder, record: str) -> None:
    """The parts of one record without their failed rows, then the record with the ids that are left."""
    left: list[pa.ChunkedArray] = []
    for path in folder.parts():
        if _record_of(path) != record:
            continue
        table = pq.read_table(path, filesystem=folder.filesystem)
        kept = table.filter(pc.not_equal(table["status"], FAILED))
        if kept.num_rows == 0:
            folder.filesystem.delete_file(path)
        elif kept.num_rows < table.num_rows:
            _replace(folder, path, kept)
        left += [kept["doc_id"]] if kept.num_rows else []
    name = f"{CHECKPOINT}/{record}"
    if not folder.exists(name):
        return
    if not left:
        folder.filesystem.delete_file(folder.child(name))
        return
    ids = pq.read_table(folder.child(name), filesystem=folder.filesystem)
    there = pa.concat_arrays([chunk for column in left for chunk in column.chunks])
    _replace(folder, folder.child(name), ids.filter(pc.is_in(ids["doc_id"], value_set=there)))


def _replace(folder: Folder, path: str, table: pa.Table) -> None:
    temporary = folder.child(f"_{uuid.uuid4().hex}.tmp")  # beside the parts: Ray reads every file among the records
    pq.write_table(table, temporary, filesystem=folder.filesystem)
    folder.filesystem.move(temporary, path)


def _record_of(path: str) -> str:
    """The name of Ray Data's record of a part: part-<run>-<task>-<file>.parquet is in part-<run>-<task>.parquet."""
    return re.sub(r"-\d+\.parquet$", ".parquet", path.rsplit("/", 1)[-1])


def _num_failed(folder: Folder, path: str) -> int:
    statuses = pq.read_table(path, filesystem=folder.filesystem, columns=["status"])["status"]
    return int(pc.sum(pc.equal(statuses, FAILED)).as_py() or 0)
