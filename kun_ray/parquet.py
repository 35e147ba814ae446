"""A Parquet file as records, one per row, however damaged or strangely typed: documents.py calls it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.records import Record
from kun_ray.sources import Source, StreamError

BATCH_ROWS = 256


def split_parquet(source: Source) -> Iterator[Record]:
    """Every row of a Parquet file; the offset of a record is its row number.

    A row group that cannot be read leaves one failed record per row, and the next one is read. A value that Python
    cannot hold (a string that is no UTF-8, a date in the year 300000) is an exception in its place.
    """
    row = 0
    try:
        parquet = pq.ParquetFile(pa.PythonFile(source, mode="r"))
    except (pa.ArrowException, OSError) as error:
        yield Record(0, None, "bad_parquet", str(error)[:200])
        return
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group]):
                for value in _values(batch):
                    yield Record(row, value)
                    row += 1
        except StreamError as error:
            yield Record(row, None, error.reason, str(error)[:200])
            return
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, end):
                yield Record(lost, None, "bad_parquet", str(error)[:200])
        row = end


def _values(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    try:
        columns = [_plain(column) for column in batch.columns]
        names = batch.schema.names
        yield from (
            [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)] if names else batch.to_pylist()
        )
    except Exception:  # Arrow checks neither what a file calls a string nor what a date of Python can hold
        for index in range(batch.num_rows):
            yield {name: _value(batch.column(place)[index]) for place, name in enumerate(batch.schema.names)}


def _plain(column: Any) -> list[Any]:
    """A column as Python's values. Of strings numpy makes them in a tenth of the time."""
    return list(column.to_numpy(zero_copy_only=False) if pa.types.is_string(column.type) else column.to_pylist())


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except Exception as error:
        return error
