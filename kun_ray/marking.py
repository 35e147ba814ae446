"""The last phase of prepare: the filtered documents as the stage's files, with the duplicates marked.

prepare.py calls `write_marked`. The duplicates are sorted arrays of 33 bytes each, which the tasks of a node share; no task
holds more rows than one file has.
"""

from __future__ import annotations

import functools
import json
import uuid
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pyarrow import fs

from kun_ray.dedup import RunParallel
from kun_ray.scan import U64, Bools, doc_ids, to_hex
from kun_ray.schema import DOCUMENT, REJECTED, to_table
from kun_ray.store import Folder

Keys = npt.NDArray[np.bytes_]


class Duplicates(NamedTuple):
    """What to mark, sorted by id. Shapes: [duplicates], [duplicates, 2], [duplicates]."""

    dropped: Keys
    kept: U64
    near: Bools


def read_duplicates(filesystem: fs.FileSystem, path: str) -> Duplicates:
    """The table of `dedup.find_duplicates`, which is sorted by doc_id, read batch by batch."""
    dropped, kept, near = [np.empty(0, "S16")], [np.empty((0, 2), np.uint64)], [np.empty(0, bool)]
    with filesystem.open_input_file(path) as source:
        for batch in pq.ParquetFile(source).iter_batches():
            table = pa.Table.from_batches([batch])
            dropped.append(_keys(table["doc_id"]))
            kept.append(doc_ids(table["duplicate_of"]))
            near.append(np.asarray(pc.equal(table["reason"], pa.scalar("near_duplicate"))))
    return Duplicates(np.concatenate(dropped), np.concatenate(kept), np.concatenate(near))


def write_marked(folder: Folder, clean: Folder, duplicates: Duplicates, run_parallel: RunParallel) -> None:
    """Writes each part of `clean` as a part of the stage; parts that are there already are kept.

    Tasks of an earlier attempt may still be at work: they write the same parts, each under a temporary name of its own.
    """
    for info in folder.filesystem.get_file_info(fs.FileSelector(folder.path)):
        if info.base_name.startswith("_part-") and info.base_name.endswith(".tmp"):
            folder.filesystem.delete_file(info.path)
    shared = ray.put(tuple(duplicates))
    done = {path.rsplit("/", 1)[-1] for path in folder.parts()}
    wanted = [path for path in clean.parts() if path.rsplit("/", 1)[-1] not in done]
    list(run_parallel(functools.partial(_write_part, folder.filesystem, folder.path, shared), wanted))


def _write_part(filesystem: fs.FileSystem, target: str, shared: Any, path: str) -> None:
    """Writes one part of the stage under its final name once it is whole."""
    table = pq.read_table(path, filesystem=filesystem, columns=DOCUMENT.names)
    name = path.rsplit("/", 1)[-1]
    marked = mark_duplicates(table, Duplicates(*ray.get(shared)))
    temporary = f"{target}/_{name}.{uuid.uuid4().hex[:8]}.tmp"
    pq.write_table(marked, temporary, filesystem=filesystem)
    filesystem.move(temporary, f"{target}/{name}")


def mark_duplicates(table: pa.Table, duplicates: Duplicates) -> pa.Table:
    """Documents with the duplicates among them rejected: without text, and with `duplicate_of` in meta."""
    places, found = _find(_keys(table["doc_id"]), duplicates.dropped)
    rows = table.to_pylist()
    originals = to_hex(duplicates.kept[places[found]]).to_pylist()
    for index, original, near in zip(np.flatnonzero(found), originals, duplicates.near[places[found]], strict=True):
        row = rows[index]
        meta = json.dumps({**json.loads(row["meta"]), "duplicate_of": original}, ensure_ascii=False)
        row.update(status=REJECTED, reason="near_duplicate" if near else "duplicate", text=None, meta=meta)
    return to_table(rows, DOCUMENT)


def _keys(column: Any) -> Keys:
    """doc_ids as 16 bytes each, which sort as the hex strings do."""
    keys: Keys = doc_ids(column).astype(">u8").view("S16").ravel()
    return keys


def _find(wanted: Keys, keys: Keys) -> tuple[npt.NDArray[np.int64], Bools]:
    """For each of `wanted` its place in the sorted `keys`, and whether it is there."""
    places = np.searchsorted(keys, wanted).astype(np.int64)
    if len(keys) == 0:
        return places, np.zeros(len(wanted), bool)
    found: Bools = keys[np.minimum(places, len(keys) - 1)] == wanted
    return places, found
