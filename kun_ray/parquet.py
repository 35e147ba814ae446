"""A Parquet file as records, one per row, however damaged or strangely typed: documents.py calls it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.records import MAX_TOGETHER, Found, Record, Records
from kun_ray.sources import Source, StreamError

_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def split_parquet(source: Source, text_field: str | None = None, fields: Sequence[str] = ()) -> Iterator[Found]:
    """Every row of a Parquet file; the offset of a record is its row number.

    A row group whose columns cannot be read leaves one failed record per row, and the next one is read. A value that
    Python cannot hold (a string that is no UTF-8, a date in the year 300000) is an exception in its place.

    Args:
        source: the file.
        text_field: the column of the texts. If it is there, only it and those of `fields` are read, and texts are handed on
            as the UTF-8 that they are in the file, which spares two conversions. None reads every column.
        fields: the other columns that are wanted.
    """
    row = 0
    try:
        parquet = pq.ParquetFile(pa.PythonFile(source, mode="r"))
    except (pa.ArrowException, OSError) as error:
        yield Record(0, None, "bad_parquet", str(error)[:200])
        return
    names = parquet.schema_arrow.names
    columns = None if text_field not in names else [name for name in (text_field, *fields) if name in names]
    as_bytes = None if columns is None or text_field in fields else text_field
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        try:
            for batch in parquet.iter_batches(MAX_TOGETHER, row_groups=[group], columns=columns):
                if batch.num_rows:
                    yield _records(row, batch, as_bytes)
                row += batch.num_rows
        except StreamError as error:
            yield Record(row, None, error.reason, str(error)[:200])
            return
        except (pa.ArrowException, OSError) as error:
            for lost in range(row, end):
                yield Record(lost, None, "bad_parquet", str(error)[:200])
        row = end


def _records(first: int, batch: pa.RecordBatch, as_bytes: str | None) -> Records:
    """Rows as objects; the strings of the column `as_bytes` in UTF-8."""
    offsets, names = range(first, first + batch.num_rows), batch.schema.names
    if not names:
        return Records(offsets, batch.to_pylist())
    columns, is_utf8 = [], False
    try:
        for name, column in zip(names, batch.columns, strict=True):
            utf8 = _utf8(column) if name == as_bytes else None
            columns.append(_plain(column if utf8 is None else utf8))
            is_utf8 |= utf8 is not None
    except Exception:  # Arrow checks neither what a file calls a string nor what a date of Python can hold
        columns, is_utf8 = [[_value(scalar) for scalar in column] for column in batch.columns], False
    return Records(offsets, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)], is_utf8)


def _utf8(column: Any) -> Any:
    """A column of text as bytes that Arrow has found to be UTF-8; None for any other. Raises pa.ArrowInvalid."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not any(is_type(column.type) for is_type in _TEXT_TYPES):
        return None
    column = column.cast(pa.large_string())
    column.validate(full=True)
    return column.view(pa.large_binary())


def _plain(column: Any) -> list[Any]:
    """A column as Python's values. Of strings numpy makes them in a tenth of the time."""
    by_numpy = any(is_type(column.type) for is_type in _TEXT_TYPES)
    return list(column.to_numpy(zero_copy_only=False) if by_numpy else column.to_pylist())


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except Exception as error:
        return error
