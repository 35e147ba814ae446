"""A record of a corpus, read or not, and the bytes of one as JSON. splitting.py and parquet.py find them in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

MAX_RECORD_BYTES = 64 << 20
MAX_TABLE_ROWS = 2000
"""Most rows of a table of documents, and most of a Parquet file that are read together."""
MAX_TOGETHER = 128
"""Most records that are handed on together: more of them leave the processor's cache before they are looked at again."""


class Record(NamedTuple):
    """One record: its byte offset in the text, and the object, or the reason and message of its failure."""

    offset: int
    value: dict[str, Any] | None
    reason: str | None = None
    error: str = ""


class Records(NamedTuple):
    """Records that were read, in a row: their offsets and objects. To hand on each alone would cost as much as to parse it."""

    offsets: Sequence[int]
    values: list[dict[str, Any]]


class Columns(NamedTuple):
    """What records in a row hold, column by column: the texts are what stands there."""

    offsets: Sequence[int]
    texts: Sequence[Any]
    titles: Sequence[Any]
    meta: dict[str, list[Any]]
    """By field; None where a record lacks it."""
    text_fields: Sequence[str]
    strings: pa.Array | None = None
    """The texts as Arrow's strings, if that is how they came; `texts` are their UTF-8 then."""

    def metas(self) -> list[dict[str, Any]]:
        """The meta of each record."""
        if not self.meta:
            return [{}] * len(self.offsets)
        rows = zip(*self.meta.values(), strict=True)
        return [
            {field: value for field, value in zip(self.meta, row, strict=True) if value is not None} for row in rows
        ]


Found = Columns | Records | Record
"""Some records that were read, or one that could not be."""


def parse(raw: bytes, offset: int) -> Record:
    """One JSON object. orjson first; what it refuses is read again tolerantly (control characters, NaN, a BOM)."""
    try:
        value = orjson.loads(raw)
        return Record(offset, value) if type(value) is dict else as_record(value, offset)
    except orjson.JSONDecodeError:
        pass
    try:
        value = json.loads(raw.decode("utf-8-sig"), strict=False)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode()  # lone surrogates such as "\ud800" fail here
    except UnicodeError as error:
        cut_off = isinstance(error, UnicodeDecodeError) and error.reason == "unexpected end of data"
        return Record(offset, None, "bad_json" if cut_off else "bad_encoding", short(error))
    except RecursionError:
        return Record(offset, None, "bad_json", "nested too deep")
    except ValueError as error:
        return Record(offset, None, "bad_json", short(error))
    return as_record(value, offset)


def as_found(record: Record) -> Found:
    """A single record as it is handed on."""
    return record if record.value is None else Records([record.offset], [record.value])


def as_record(value: Any, offset: int) -> Record:
    if type(value) is dict:
        return Record(offset, value)
    return Record(offset, None, "bad_json", f"a JSON object was expected, found {type(value).__name__}")


def too_large(offset: int, num_bytes: int) -> Record:
    return Record(offset, None, "record_too_large", f"{num_bytes} bytes; the limit is {MAX_RECORD_BYTES}")


def short(error: Exception) -> str:
    return str(error)[:200]
