"""Numpy's view of the columns that deduplication reads: doc_ids and hashes as numbers, file after file, batch after batch.

dedup.py calls it inside its tasks. Arrow's arrays are `Any` here, because pyarrow-stubs refuses most of its compute.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from kun_ray.config import KunError
from kun_ray.schema import OK
from kun_ray.signatures import DedupConfig, signature_fields

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

NO_IDS: Final[U64] = np.empty((0, 2), np.uint64)


@dataclasses.dataclass(frozen=True)
class Scan:
    """The input of the search: row `starts[i] + j` is the j-th row of `paths[i]`."""

    paths: list[str]
    starts: I64
    filesystem: pafs.FileSystem
    config: DedupConfig

    def rows(self, columns: list[str]) -> Iterator[tuple[I64, pa.Table]]:
        """Row numbers and values of all rows with status ok, batch by batch."""
        for path, start in zip(self.paths, self.starts.tolist(), strict=False):
            with self.filesystem.open_input_file(path) as source:
                for batch in pq.ParquetFile(source, pre_buffer=True).iter_batches(columns=["status", *columns]):
                    keep = pc.equal(batch["status"], pa.scalar(OK))
                    numbers = start + np.flatnonzero(keep)
                    start += len(batch)
                    if len(numbers):
                        yield numbers, pa.Table.from_batches([batch]).filter(keep)


def count_rows(path: str, filesystem: pafs.FileSystem, config: DedupConfig) -> int:
    """Rows of one file. Raises KunError if it lacks a column that the search reads."""
    hashes = [field for field, used in zip(signature_fields(config), (config.exact, config.near), strict=True) if used]
    with filesystem.open_input_file(path) as source:
        file = pq.ParquetFile(source)
        schema = file.schema_arrow
        for name in ("doc_id", "status", *(field.name for field in hashes)):
            if name not in schema.names:
                raise KunError(f"{path} has no column `{name}`: only what prepare wrote can be deduplicated")
        for field in hashes:
            if schema.field(field.name).type != field.type:
                raise KunError(
                    f"`{field.name}` in {path} was made with other `dedup` settings: prepare the corpus again"
                )
        return int(file.metadata.num_rows)


def fixed_bytes(column: Any, width: int) -> npt.NDArray[np.uint8]:
    """A column of binary(width) without nulls as (rows, width) bytes."""
    if len(column) == 0:
        return np.empty((0, width), np.uint8)
    array = pa.concat_arrays(column.chunks)
    data = np.frombuffer(array.buffers()[1], np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
_NIBBLES = np.full(256, 255, np.uint8)
_NIBBLES[_HEX] = np.arange(16)


def doc_ids(column: Any) -> U64:
    """doc_ids as (rows, 2) numbers that sort as the hex strings do."""
    if len(column) == 0:
        return NO_IDS
    strings: Any = pa.concat_arrays(column.cast(pa.string()).chunks)
    ends = np.frombuffer(strings.buffers()[1], np.int32)[strings.offset : strings.offset + len(strings) + 1]
    digits = _NIBBLES[np.frombuffer(strings.buffers()[2], np.uint8)[ends[0] : ends[-1]]]
    if np.any(np.diff(ends) != 32) or digits.max() > 15:
        raise KunError("a doc_id is not 32 lower-case hex digits: kun_ray.schema.doc_id makes them")
    digits = digits.reshape(-1, 2)
    numbers: U64 = (digits[:, 0] << 4 | digits[:, 1]).view(">u8").astype(np.uint64).reshape(-1, 2)
    return numbers


def to_binary(ids: U64) -> Any:
    """Ids as an Arrow array of 16 bytes each."""
    return pa.Array.from_buffers(pa.binary(16), len(ids), [None, pa.py_buffer(ids.astype(">u8").tobytes())])


def to_hex(ids: U64) -> Any:
    """Ids as an Arrow array of 32 hex digits each: what `doc_ids` read."""
    data = np.ascontiguousarray(ids.astype(">u8")).view(np.uint8)
    text = np.stack([_HEX[data >> 4], _HEX[data & 15]], axis=-1).tobytes()
    fixed: Any = pa.Array.from_buffers(pa.binary(32), len(ids), [None, pa.py_buffer(text)])
    return fixed.cast(pa.binary()).cast(pa.string())
