"""Records of each corpus → rows of schema.DOCUMENT: the text, title and meta of a WuDao, WanJuan or other record.

corpora.py calls read_documents in its read tasks. Every record, readable or not, leaves exactly one row; no exception
about a file's content leaves this module.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, NamedTuple

import orjson
import pyarrow as pa

from kun_ray import schema
from kun_ray.archives import ByteStream, texts
from kun_ray.parquet import split_parquet
from kun_ray.records import Record, split
from kun_ray.sources import CorpusFile, Source, StreamError

MAX_BLOCK_ROWS = 2000
MAX_BLOCK_BYTES = 16 << 20
WANJUAN_SUBSETS = ("WebText-cn", "Law-cn", "Patent-cn", "ChinaNews-cn", "TextBook-cn", "Wiki-cn", "Exam-cn")


class Content(NamedTuple):
    """What a record holds. `text` is whatever stands in its place: only a string makes a readable document."""

    text: object
    title: object
    meta: dict[str, object]
    text_field: str


Extract = Callable[[dict[str, Any], str], Content]
"""Finds the content of a record; the second argument is the full path of its file."""


def extract_fields(text_field: str, title_field: str | None, meta_fields: list[str]) -> Extract:
    """Records whose text stands in a named field: SkyPile, plain jsonl and Parquet."""

    def extract(value: dict[str, Any], path: str) -> Content:
        title = value.get(title_field) if title_field is not None else None
        return Content(value.get(text_field), title, _pick(value, meta_fields), text_field)

    return extract


def extract_wudao(meta_fields: list[str]) -> Extract:
    """WuDaoCorpora 2.0: id, uniqueKey, titleUkey, dataType, title, content. A title that content repeats is cut off."""
    fields = list(dict.fromkeys(["id", "uniqueKey", "titleUkey", "dataType", *meta_fields]))

    def extract(value: dict[str, Any], path: str) -> Content:
        text, title = value.get("content"), value.get("title")
        if isinstance(text, str) and isinstance(title, str):
            text = without_title(text, title)
        return Content(text, title, _pick(value, fields), "content")

    return extract


def extract_wanjuan(meta_fields: list[str]) -> Extract:
    """WanJuan 1.0 (CN): id, content; Exam-cn is rendered as text. The subset is the record's own, else the path's."""
    fields = list(dict.fromkeys(["id", "q_type", "grade", "major", "keypoint", *meta_fields]))

    def extract(value: dict[str, Any], path: str) -> Content:
        own_subset = value.get("subset")
        subset = own_subset if isinstance(own_subset, str) else wanjuan_subset(path)
        meta = {"subset": subset, **_pick(value, fields)}
        if value.get("content") is None and (subset == "Exam-cn" or "q_main" in value):
            return Content(render_exam(value), None, meta, "q_main")
        return Content(value.get("content"), value.get("title"), meta, "content")

    return extract


@functools.lru_cache(maxsize=64)
def wanjuan_subset(path: str) -> str | None:
    """The WanJuan subset that a path names; the last one counts."""
    lowered = path.lower()
    places = {subset: lowered.rfind(subset.lower()) for subset in WANJUAN_SUBSETS}
    last = max(WANJUAN_SUBSETS, key=lambda subset: places[subset])
    return last if places[last] >= 0 else None


def render_exam(value: dict[str, Any]) -> str | None:
    """An exam question as text: 题目, 选项, 答案, 解析, less what it lacks; None without a question."""
    question = _plain(value.get("q_main"))
    if not question:
        return None
    options = [f"{letter.upper()}. {option}" for letter in "abcde" if (option := _plain(value.get(f"option_{letter}")))]
    answer = _plain(value.get("std_ans")) or _plain(value.get("answer"))
    explanation = _plain(value.get("answer_detail"))
    lines = [f"题目：{question}"]
    lines += ["选项：", *options] if options else []
    lines += [f"答案：{answer}"] if answer else []
    lines += [f"解析：{explanation}"] if explanation else []
    return "\n".join(lines)


def without_title(text: str, title: str) -> str:
    """`text` less the title that it opens with.

    WuDao has lost its newlines, so a heading and a sentence that begins with the same words look alike. The title goes
    if a blank or the end of a sentence follows or closes it, or if it is 10 characters or longer and the text goes on
    as no sentence about it would (是, 的, a comma, …). Nothing is cut that would leave no text.
    """
    title = title.strip()
    opening = text.lstrip()
    if not title or not opening.startswith(title):
        return text
    rest = opening[len(title) :]
    body = rest.lstrip(" \t\r\n\u3000。！？!?：:|-—_")
    separate = body != rest or title[-1] in "。！？!?…"
    if body and (separate or (len(title) >= 10 and rest[0] not in "是为的在位由于有将被与和及，、,（(《》”」")):
        return body
    return text


def _pick(value: dict[str, Any], fields: list[str]) -> dict[str, object]:
    return {field: value[field] for field in fields if value.get(field) is not None} if fields else {}


def _plain(value: object) -> str:
    if isinstance(value, list):
        return "；".join(part for part in map(_plain, value) if part)
    return str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""


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
    rows = _Rows(source)
    last_name, path = "", ""
    for name, record in _records(file, as_objects, on_read_error):
        content = None
        if name != last_name:
            last_name, path = name, f"{file.path}!{name}"
        if record.value is not None:
            try:
                content = extract(record.value, path)
            except RecursionError:
                record = Record(record.offset, None, "bad_json", "nested too deep")
        rows.add(name, record, content)
        if len(rows.doc_id) >= MAX_BLOCK_ROWS or rows.num_bytes >= MAX_BLOCK_BYTES:
            yield rows.take()
    if rows.doc_id:
        yield rows.take()


def _records(file: CorpusFile, as_objects: bool, on_read_error: str) -> Iterator[tuple[str, Record]]:
    name = file.name
    found: Iterator[tuple[str, Record]]
    source = Source(file.path, on_read_error)
    try:
        stream = ByteStream(source)
        if stream.peek(4) == b"PAR1" or (name.endswith(".parquet") and stream.peek(1) != b""):
            source.seek(0)
            found = ((name, record) for record in split_parquet(source))
        else:
            found = _text_records(stream, name, as_objects)
        last = None
        for last in found:
            yield last
        readable = last is None or last[1].reason != "unreadable_file"
        change = source.change(file) if readable else None
        if change is not None:
            yield name, Record(source.place, None, "file_changed", change)
        elif last is None:
            yield name, Record(0, None, "empty_file", "no record in it")
    except StreamError as error:
        yield name, Record(source.place, None, error.reason, str(error)[:200])
    finally:
        source.close()


def _text_records(stream: ByteStream, name: str, as_objects: bool) -> Iterator[tuple[str, Record]]:
    for text in texts(stream, name):
        if text.error is not None:
            yield text.name, Record(text.offset, None, text.error.reason, str(text.error)[:200])
        elif text.stream is not None:
            records = split(text.stream, as_objects)
            first = next(records, Record(0, None, "empty_file", "no record in it"))
            yield from zip(repeat(text.name), chain([first], records))  # no Python runs here for each record


class _Rows:
    """Columns of the next block. Texts and meta are kept in UTF-8: it is needed for the doc_id, and Arrow takes it as it is."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._file: str | None = None
        self._place = b""  # what the meta of that file's rows ends with, before the offset
        self._clear()

    def _clear(self) -> None:
        self.doc_id: list[str] = []
        self.text: list[bytes | None] = []
        self.title: list[str | None] = []
        self.meta: list[bytes] = []
        self.reason: list[str | None] = []
        self.num_bytes = 0

    def add(self, file: str, record: Record, content: Content | None) -> None:
        offset, _, reason, error = record
        text, title = None, None
        meta: dict[str, object] = {}
        if content is not None:
            meta = content.meta
            try:
                text = content.text.encode() if isinstance(content.text, str) else _as_utf8(content.text)
                title = None if content.title is None else _as_text(content.title)
            except UnicodeDecodeError as problem:
                reason, error = "bad_encoding", str(problem)[:200]
            else:
                if text is None:
                    found = "null or missing" if content.text is None else f"of type {type(content.text).__name__}"
                    reason, error = "missing_field", f"`{content.text_field}` is {found}"
        if reason is not None:
            text, meta = None, {**meta, "error": error}
        if file != self._file:
            self._file, self._place = file, _meta_json({"file": file})[1:-1] + b',"offset":'
        place = b"%b%d}" % (self._place, offset)
        meta_json = b"%b,%b" % (_meta_json(meta)[:-1], place) if meta else b"{" + place
        self.text.append(text)
        self.title.append(title)
        self.meta.append(meta_json)
        self.reason.append(reason)
        # A failed row has no text; its reason behind a NUL keeps its id apart from that of any document there.
        self.doc_id.append(schema.doc_id(self.source, file, offset, f"\0{reason}" if text is None else text))
        self.num_bytes += len(text or b"") + len(meta_json) + 64

    def take(self) -> pa.Table:
        """The rows so far as a table; the next block begins."""
        num_rows = len(self.doc_id)
        columns: dict[str, Any] = {
            "doc_id": self.doc_id, "source": pa.repeat(self.source, num_rows), "text": _strings(self.text),
            "title": self.title, "meta": _strings(self.meta), "reason": self.reason,
            "status": [schema.OK if reason is None else schema.FAILED for reason in self.reason],
        }  # fmt: skip
        filled = {
            field.name: columns[field.name] if field.name in columns else pa.nulls(num_rows, field.type)
            for field in schema.DOCUMENT
        }
        table = pa.Table.from_pydict(filled, schema=schema.DOCUMENT)
        self._clear()
        return table


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
        return orjson.dumps(meta, default=_repr)
    except TypeError:
        return json.dumps({key: _repr(value) for key, value in meta.items()}, ensure_ascii=False).encode()


def _repr(value: object) -> str:
    try:
        return repr(value)[:1000]
    except RecursionError:
        return f"{type(value).__name__} nested too deep"
