"""A Parquet file as records, one per row, however damaged or strangely typed: documents.py calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.records import Found, Record, Records
from kun_ray.sources import Source, StreamError

BATCH_ROWS = 256
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def split_parquet(source: Source, fields: Sequence[str] = ()) -> Iterator[Found]:
    """Every row of a Parquet file; the offset of a record is its row number.

    A row group that cannot be read leaves one failed record per row, and the next one is read. A value that Python
    cannot hold (a string that is no UTF-8, a date in the year 300000) is an exception in its place.

    Args:
        source: the file.
        fields: the columns that are wanted, that of the text first; no other is read if this one is there. Texts are then
            handed on as the UTF-8 that they are in the file. Without `fields` every column is read.
    """
    row = 0
    try:
        parquet = pq.ParquetFile(pa.PythonFile(source, mode="r"))
    except (pa.ArrowException, OSError) as error:
        yield Record(0, None, "bad_parquet", str(error)[:200])
        return
    names = parquet.schema_arrow.names
    columns = [field for field in fields if field in names] if fields and fields[0] in names else None
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        try:
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                if batch.num_rows:
                    yield _records(row, batch, columns[0] if columns else None)
                row += batch.num_rows
        except StreamError as error:
            yield Record(row, None, error.reason, str(error)[:200])
            return
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, end):
                yield Record(lost, None, "bad_parquet", str(error)[:200])
        row = end


def _records(first: int, batch: pa.RecordBatch, text_field: str | None) -> Records:
    offsets, names = range(first, first + batch.num_rows), batch.schema.names
    if not names:
        return Records(offsets, batch.to_pylist())
    try:
        columns = [
            _bytes(column) if name == text_field else _plain(column)
            for name, column in zip(names, batch.columns, strict=True)
        ]
        return Records(
            offsets, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)], text_field is not None
        )
    except Exception:  # Arrow checks neither what a file calls a string nor what a date of Python can hold
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
    return Records(offsets, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])


def _plain(column: Any) -> list[Any]:
    """A column as Python's values. Of strings numpy makes them in a tenth of the time."""
    by_numpy = any(is_type(column.type) for is_type in _TEXT_TYPES)
    return list(column.to_numpy(zero_copy_only=False) if by_numpy else column.to_pylist())


def _bytes(column: Any) -> list[Any]:
    """A column of strings in UTF-8, which Arrow has looked at; any other as `_plain` does. Raises pa.ArrowInvalid."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if any(is_type(column.type) for is_type in _TEXT_TYPES):
        column = column.cast(pa.large_string())
        column.validate(full=True)
        column = column.view(pa.large_binary())
    return _plain(column)


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except Exception as error:
        return error
