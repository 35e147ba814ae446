"""A corpus file → rows of schema.DOCUMENT: every record in it, readable or not, leaves exactly one.

corpora.py calls read_documents in its read tasks; contents.py knows what a record of each corpus holds. No exception about
a file's content leaves this module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from kun_ray import schema
from kun_ray.archives import ByteStream, texts
from kun_ray.contents import Content, Extract, ExtractFields, as_columns, one_by_one
from kun_ray.parquet import split_parquet
from kun_ray.records import MAX_TABLE_ROWS, Columns, Found, Record
from kun_ray.sources import CorpusFile, Source, StreamError
from kun_ray.splitting import split

MAX_BLOCK_BYTES = 16 << 20
_TITLES = {str, type(None)}


def read_documents(
    file: CorpusFile, source: str, extract: Extract, as_objects: bool = False, on_read_error: str = "stop"
) -> Iterator[pa.Table]:
    """The documents of one file, as tables of schema.DOCUMENT of at most 2,000 rows and about 16 MB.

    Args:
        file: where the file is; its name, relative to the corpus root, is part of every doc_id and `file` in meta.
        source: the corpus's name.
        extract: finds the content of a record.
        as_objects: read text as an array of objects, whatever it looks like.
        on_read_error: `stop` or `skip`, see Source.
    Raises:
        KunError: the file's storage has failed for half a minute, and `on_read_error` is `stop`.
    """
    block = _Block(source)
    for name, found in _records(file, extract, as_objects, on_read_error):
        path = f"{file.path}!{name}"
        num_found = 1 if isinstance(found, Record) else len(found.offsets)
        if block.num_rows() and block.num_rows() + num_found > MAX_TABLE_ROWS:
            yield block.take()
        if isinstance(found, Record):
            block.fail(name, found)
        else:
            columns = found if isinstance(found, Columns) else as_columns(extract, found, path)
            rows = None if columns is None else _rows(name, columns)
            if rows is not None and rows.num_bytes <= MAX_BLOCK_BYTES:
                if block.num_bytes + rows.num_bytes > MAX_BLOCK_BYTES:
                    yield block.take()
                block.extend(name, rows)
            else:
                for offset, read in one_by_one(extract, found if columns is None else columns, path):
                    block.add(name, offset, read)
                    if block.num_bytes >= MAX_BLOCK_BYTES:
                        yield block.take()
        if block.num_bytes >= MAX_BLOCK_BYTES:
            yield block.take()
    if block.num_rows():
        yield block.take()


def _records(file: CorpusFile, extract: Extract, as_objects: bool, on_read_error: str) -> Iterator[tuple[str, Found]]:
    name = file.name
    found: Iterator[tuple[str, Found]]
    source = Source(file.path, on_read_error)
    try:
        stream = ByteStream(source)
        if stream.peek(4) == b"PAR1" or (name.endswith(".parquet") and stream.peek(1) != b""):
            source.seek(0)
            wanted = extract if isinstance(extract, ExtractFields) else None
            found = zip(repeat(name), split_parquet(source, wanted), strict=False)
        else:
            found = _text_records(stream, name, as_objects)
        last = None
        for last in found:
            yield last
        readable = last is None or not isinstance(last[1], Record) or last[1].reason != "unreadable_file"
        change = source.change(file) if readable else None
        if change is not None:
            yield name, Record(source.place, None, "file_changed", change)
        elif last is None:
            yield name, Record(0, None, "empty_file", "no record in it")
    except StreamError as error:
        yield name, Record(source.place, None, error.reason, str(error)[:200])
    finally:
        source.close()


def _text_records(stream: ByteStream, name: str, as_objects: bool) -> Iterator[tuple[str, Found]]:
    for text in texts(stream, name):
        if text.error is not None:
            yield text.name, Record(text.offset, None, text.error.reason, str(text.error)[:200])
        elif text.stream is not None:
            records = split(text.stream, as_objects)
            first = next(records, Record(0, None, "empty_file", "no record in it"))
            yield from zip(repeat(text.name), chain([first], records), strict=False)


class _Rows(NamedTuple):
    """Columns of which every row is as it should be: their texts in UTF-8, their meta as JSON, and their size."""

    columns: Columns
    texts: Sequence[bytes]
    meta: list[bytes]
    num_bytes: int


def _rows(file: str, columns: Columns) -> _Rows | None:
    """None if one is not as it should be."""
    texts, titles = columns.texts, columns.titles
    if set(map(type, texts)) != {str if columns.strings is None else bytes} or not _TITLES.issuperset(
        map(type, titles)
    ):
        return None
    try:
        meta = _meta_lines(columns, _place(file))
    except TypeError:
        return None
    encoded = [*map(str.encode, texts)] if columns.strings is None else texts
    num_bytes = sum(map(len, encoded)) + sum(map(len, meta)) + 3 * sum(map(len, filter(None, titles)))
    return _Rows(columns, encoded, meta, num_bytes + 64 * len(meta))


class _Block:
    """Columns of the next block. Texts and meta are kept in UTF-8: it is needed for the doc_id, and Arrow takes it as it is."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._clear()

    def _clear(self) -> None:
        self.doc_id: list[str] = []
        self.strings: list[pa.Array] = []  # the texts before those of `text`
        self.text: list[bytes | None] = []
        self.title: list[str | None] = []
        self.meta: list[bytes] = []
        self.reason: list[str | None] = []
        self.num_bytes = 0

    def num_rows(self) -> int:
        return len(self.doc_id)

    def extend(self, file: str, rows: _Rows) -> None:
        """Rows of records that are all as they should be."""
        self.doc_id += schema.doc_ids(self.source, file, rows.columns.offsets, rows.texts)
        if rows.columns.strings is None:
            self.text += rows.texts
        else:
            self._gather()
            self.strings.append(rows.columns.strings)
        self.title += rows.columns.titles
        self.meta += rows.meta
        self.reason += repeat(None, len(rows.meta))
        self.num_bytes += rows.num_bytes

    def add(self, file: str, offset: int, read: Callable[[], Content]) -> None:
        """One row of a record that was read, whatever is wrong with what it holds."""
        text, title, meta = None, None, {}
        reason, error = None, ""
        try:
            content = read()
            meta = content.meta
            text, title = _as_utf8(content.text), _as_text(content.title)
            if text is None:
                found = "null or missing" if content.text is None else f"of type {type(content.text).__name__}"
                reason, error = "missing_field", f"`{content.text_field}` is {found}"
        except RecursionError:
            reason, error = "bad_json", "nested too deep"
        except UnicodeDecodeError as problem:
            text, title, reason, error = None, None, "bad_encoding", str(problem)[:200]
        self._put(file, offset, text, title, meta if reason is None else {**meta, "error": error}, reason)

    def fail(self, file: str, record: Record) -> None:
        """One row of a record that could not be read."""
        self._put(file, record.offset, None, None, {"error": record.error}, record.reason)

    def _put(
        self, file: str, offset: int, text: bytes | None, title: str | None, meta: dict[str, Any], reason: str | None
    ) -> None:
        # A failed row has no text; its reason behind a NUL keeps its id apart from that of any document there.
        self.doc_id += schema.doc_ids(self.source, file, [offset], [f"\0{reason}".encode() if text is None else text])
        self.text.append(text)
        self.title.append(title)
        self.meta.append(_meta_line(_meta_json(meta), _place(file), offset))
        self.reason.append(reason)
        self.num_bytes += len(text or b"") + 3 * len(title or "") + len(self.meta[-1]) + 64

    def _gather(self) -> None:
        if self.text:
            self.strings.append(_strings(self.text))
            self.text = []

    def take(self) -> pa.Table:
        """The rows so far as a table; the next block begins."""
        self._gather()
        num_rows, reasons = len(self.doc_id), pa.array(self.reason, pa.string())
        columns: dict[str, Any] = {
            "doc_id": self.doc_id, "source": pa.repeat(self.source, num_rows),
            "text": self.strings[0] if len(self.strings) == 1 else pa.concat_arrays(self.strings),
            "title": self.title, "meta": _strings(self.meta), "reason": reasons,
            "status": pc.if_else(reasons.is_null(), schema.OK, schema.FAILED),
        }  # fmt: skip
        filled = {
            field.name: columns[field.name] if field.name in columns else pa.nulls(num_rows, field.type)
            for field in schema.DOCUMENT
        }
        table = pa.Table.from_pydict(filled, schema=schema.DOCUMENT)
        self._clear()
        return table


@functools.lru_cache(maxsize=64)
def _place(file: str) -> bytes:
    """What the meta of that file's rows ends with, before the offset."""
    return _meta_json({"file": file})[1:-1] + b',"offset":'


def _meta_lines(columns: Columns, place: bytes) -> list[bytes]:
    """The meta of every row as JSON: all of a field in one go, or row by row. Raises TypeError as orjson does."""
    if not columns.meta:
        return [b"{%b%d}" % (place, offset) for offset in columns.offsets]
    pieces = [pieces for values in columns.meta.values() if (pieces := _pieces(values))]
    if len(pieces) < len(columns.meta):
        found = zip(columns.metas(), columns.offsets, strict=True)
        return [_meta_line(_fast_json(meta), place, offset) for meta, offset in found]
    names = (_fast_json(field).replace(b"%", b"%%") + b":%b," for field in columns.meta)
    line = b"{%b%%b%%d}" % b"".join(names)
    return [*map(line.__mod__, zip(*pieces, [place] * len(columns.offsets), columns.offsets, strict=True))]


def _pieces(values: list[Any]) -> list[bytes] | None:
    """Each value as JSON, found by the newlines between them, which none holds; None unless all are strings or numbers."""
    if not {str, int, float, bool}.issuperset(map(type, values)):
        return None
    return orjson.dumps(values, option=orjson.OPT_INDENT_2)[4:-2].split(b",\n  ")


def _meta_line(meta: bytes, place: bytes, offset: int) -> bytes:
    return b"%b%b%b%d}" % (meta[:-1], b"," if len(meta) > 2 else b"", place, offset)


def _strings(values: Sequence[bytes | None]) -> Any:
    """UTF-8 as an Arrow array of strings, which is not looked at again."""
    return pa.array(values, pa.binary()).view(pa.string())


def _as_utf8(value: object) -> bytes | None:
    text = _as_text(value)
    return None if text is None else text.encode()


def _as_text(value: object) -> str | None:
    if isinstance(value, UnicodeDecodeError):  # from parquet.py
        raise value
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value if isinstance(value, str) else None


def _meta_json(meta: dict[str, Any]) -> bytes:
    """`meta` as JSON. orjson knows no integers over 64 bits and no deep nesting, which real records hold."""
    try:
        return _fast_json(meta)
    except TypeError:
        return _fast_json({key: value if _is_plain(value) else _repr(value) for key, value in meta.items()})


def _is_plain(value: object) -> bool:
    try:
        return bool(orjson.dumps(value, default=_repr))
    except TypeError:
        return False


def _fast_json(meta: object) -> bytes:
    return orjson.dumps(meta, default=_repr)


def _repr(value: object) -> str:
    try:
        return repr(value)[:1000]
    except RecursionError:
        return f"{type(value).__name__} nested too deep"
