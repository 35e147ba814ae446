"""A Parquet file as records, one per row, however damaged or strangely typed: documents.py calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kun_ray.contents import ExtractFields
from kun_ray.records import MAX_TABLE_ROWS, Columns, Found, Record, Records, short
from kun_ray.sources import Source, StreamError

BYTES_TOGETHER = 8 << 20
"""About so many bytes of rows are read together, by the mean of their row group and the longest text of its dictionaries."""
SALVAGE_ROWS = 128
"""Rows that are read together up to damage: so many may be lost before it."""
MAX_LOST_ROWS = 1 << 20
"""Most rows of a row group that fail one by one, as many as writers put into one. More are lost as one: a damaged file may
claim any number."""
_TEXT_TYPES = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


def split_parquet(source: Source, wanted: ExtractFields | None = None) -> Iterator[Found]:
    """Every row of a Parquet file; the offset of a record is its row number.

    A row group whose columns cannot be read leaves one failed record per row (one for all if they are more than a million),
    and the next one is read. A value that Python cannot hold (a string that is no UTF-8, a date in the year 300000) is an
    exception in its place.

    Args:
        source: the file.
        wanted: the fields that are wanted: no others are read if that of the text is there, and a text is handed on as the
            UTF-8 that it is in the file. None reads every column.
    """
    row = 0
    try:
        parquet = pq.ParquetFile(pa.PythonFile(source, mode="r"))
        names = parquet.schema_arrow.names
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Record(0, None, "bad_parquet", short(error))
        return
    plain = wanted if wanted is not None and wanted.text_field in names else None
    columns = None if plain is None else [name for name in plain.fields() if name in names]
    for group in range(parquet.num_row_groups):
        end = row + parquet.metadata.row_group(group).num_rows
        try:
            num_together = _rows_together(source, parquet, group, names if columns is None else columns)
            for batch in _batches(parquet, group, columns, num_together):
                if batch.num_rows:
                    yield (None if plain is None else _columns(row, batch, plain)) or _records(row, batch)
                row += batch.num_rows
        except StreamError as error:
            yield Record(row, None, error.reason, short(error))
            return
        except (pa.ArrowException, OSError) as error:
            lost, what = range(row, end), short(error)
            if len(lost) > MAX_LOST_ROWS:
                lost, what = range(row, row + 1), f"{len(lost)} rows: {what}"
            for place in lost:
                yield Record(place, None, "bad_parquet", what)
        row = end


def _rows_together(source: Source, parquet: Any, group: int, names: list[str]) -> int:
    """How many rows of a row group may be read at once, by its size and by what its dictionaries hold.

    A file of some kilobytes may give one long text to all of its rows: only its dictionary tells before they are read.
    """
    about = parquet.metadata.row_group(group)
    largest: int = about.total_byte_size // max(about.num_rows, 1)
    with contextlib.suppress(pa.ArrowException, OSError, ValueError):  # what is wrong, the reading itself will say
        chunks = [about.column(number) for number in range(about.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.has_dictionary_page and chunk.physical_type == "BYTE_ARRAY"]
        texts = [chunk.path_in_schema for chunk in chunks if chunk.path_in_schema in names]
        if texts:
            file = pq.ParquetFile(pa.PythonFile(source, mode="r"), metadata=parquet.metadata, read_dictionary=texts)
            for column in next(file.iter_batches(1, row_groups=[group], columns=texts), ()):
                if pa.types.is_dictionary(column.type):
                    largest += pc.max(pc.binary_length(column.dictionary)).as_py() or 0
    return max(1, min(MAX_TABLE_ROWS, BYTES_TOGETHER // max(largest, 1)))


def _batches(parquet: Any, group: int, columns: list[str] | None, num_together: int) -> Iterator[Any]:
    """The rows of a row group, `num_together` at a time, and fewer if that does not go."""
    num_read = 0
    try:
        for batch in parquet.iter_batches(num_together, row_groups=[group], columns=columns):
            yield batch
            num_read += batch.num_rows
        return
    except (pa.ArrowException, OSError):
        if num_together <= SALVAGE_ROWS:
            raise
    for batch in parquet.iter_batches(SALVAGE_ROWS, row_groups=[group], columns=columns):
        if num_read < batch.num_rows:
            yield batch.slice(num_read)
        num_read -= min(num_read, batch.num_rows)


def _columns(first: int, batch: pa.RecordBatch, wanted: ExtractFields) -> Columns | None:
    """The rows of a batch; None if the text's column is of another type, or any holds what Python cannot."""
    try:
        texts = _utf8(batch.column(wanted.text_field))
        if texts is None:
            return None
        found = {name: _plain(batch.column(name)) for name in wanted.fields()[1:] if name in batch.schema.names}
        meta = {name: found[name] for name in wanted.meta_fields if name in found}
        nothing, title = [None] * batch.num_rows, wanted.title_field
        titles = nothing if title is None else found.get(title, nothing)
        offsets = range(first, first + batch.num_rows)
        text_fields = [wanted.text_field] * batch.num_rows
        strings = texts.cast(pa.binary()).view(pa.string())
        return Columns(offsets, _plain(texts), titles, meta, text_fields, strings)
    except Exception:  # Arrow checks neither what a file calls a string nor what a date of Python can hold
        return None


def _records(first: int, batch: pa.RecordBatch) -> Records:
    offsets, names = range(first, first + batch.num_rows), batch.schema.names
    if not names:
        return Records(offsets, batch.to_pylist())
    try:
        columns = [_plain(column) for column in batch.columns]
    except Exception:  # as above
        columns = [[_value(scalar) for scalar in column] for column in batch.columns]
    return Records(offsets, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])


def _utf8(column: Any) -> Any:
    """A column of text as bytes that Arrow has found to be UTF-8; None for any other. Raises pa.ArrowInvalid."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column.validate(full=True)
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        column = column.cast(pa.large_string())  # looks at every byte
    else:
        return None
    return column.view(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())


def _plain(column: Any) -> list[Any]:
    """A column as Python's values. Of strings numpy makes them in a tenth of the time."""
    by_numpy = any(is_type(column.type) for is_type in _TEXT_TYPES)
    values: list[Any] = column.to_numpy(zero_copy_only=False).tolist() if by_numpy else column.to_pylist()
    return values


def _value(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except Exception as error:
        return error
