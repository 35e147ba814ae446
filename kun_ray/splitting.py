"""A byte stream, split into the JSON records in it: lines, and arrays of objects.

documents.py calls it. A broken record is a Record with a reason, and reading goes on behind it: a parser that reads the
whole array (ijson too) cannot do that. At most one record (MAX_RECORD_BYTES) and a few chunks are held.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from itertools import accumulate, islice
from typing import Any

import orjson

from kun_ray.archives import CHUNK_BYTES, ByteStream
from kun_ray.records import (
    MAX_RECORD_BYTES,
    MAX_TOGETHER,
    Found,
    Record,
    Records,
    as_found,
    as_record,
    parse,
    short,
    too_large,
)
from kun_ray.sources import StreamError

_START = re.compile(rb'\{\s{0,64}+("[^"\\]{0,128}+")\s{0,64}+:')
_BOUNDARY = re.compile(rb'\}\s{0,64}+,?\s{0,64}+\{\s{0,64}+"[^"\\]{0,128}+"\s{0,64}+:')
"""The end of one object and the start of the next. Inside a valid JSON string a quote is escaped, so this cannot match
there: it finds the next record without knowing where strings begin, however broken the one before it is."""
_BETWEEN = re.compile(rb'\}[ \t\r\n]{0,64}+,?[ \t\r\n]{0,64}+(?=\{\s{0,64}+"[^"\\]{0,128}+"\s{0,64}+:)')
"""From the end of one object to the start of the next, with nothing else in between."""
_BOUNDARY_BYTES = 512
_HEADER = re.compile(rb'\s*+(?:\{\s*+"RECORDS"\s*+:\s*+)?\[')
_ARRAY = re.compile(rb'\s*+(?:\{\s*+"RECORDS"\s*+:\s*+\[|\[\s*+(?:[{\]]|\Z)|\{[ \t\r]*+\n)')
_BOM = b"\xef\xbb\xbf"
_SEPARATORS = b" \t\r\n,[]}" + _BOM
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}"]', re.DOTALL)


def split(stream: ByteStream, as_objects: bool = False) -> Iterator[Found]:
    """Every record of a text: JSON lines, or an array, `{"RECORDS": […]}` or indented objects if it begins so.

    With `as_objects` it is read as objects in a row, array or not, whatever its head looks like.
    """
    begin = len(stream.read(3)) if stream.peek(3) == _BOM else 0
    if as_objects or _ARRAY.match(stream.peek(4096)):
        return split_objects(stream, begin)
    return split_lines(stream, begin)


def split_lines(stream: ByteStream, offset: int = 0) -> Iterator[Found]:
    """JSON lines, the first at byte `offset`. Blank lines are no records."""
    held: list[bytes] = []
    num_held = 0
    ended: StreamError | None = None
    while True:
        try:
            chunk = stream.read()
        except StreamError as error:
            chunk, ended = b"", error
        if not chunk:
            break
        lines = io.BytesIO(chunk)
        while several := [*islice(lines, MAX_TOGETHER)]:
            rest = b"" if several[-1].endswith(b"\n") else several.pop()
            if several and num_held > MAX_RECORD_BYTES:
                yield too_large(offset, num_held + len(several[0]) - 1)
                offset += num_held + len(several.pop(0))
                held, num_held = [], 0
            if several:
                several[0] = b"".join([*held, several[0]])
                yield from _parse_lines(several, offset)
                offset += sum(map(len, several))
                held, num_held = [], 0
            num_held += len(rest)
            held = [*held, rest] if num_held <= MAX_RECORD_BYTES else []
    last = b"".join(held)
    record = None
    if num_held > MAX_RECORD_BYTES:
        record = too_large(offset, num_held)
    elif last and not last.isspace():
        record = parse(last, offset)
    if record is not None and (ended is None or record.value is not None):
        yield as_found(record)
        offset += num_held
    if ended is not None:
        yield Record(offset, None, ended.reason, short(ended))


def _parse_lines(lines: list[bytes], offset: int) -> Iterator[Found]:
    """Records of whole lines, of which the first begins at `offset`: all at once, or one by one if one is not as usual."""
    offsets = [*accumulate(map(len, lines[:-1]), initial=offset)]
    with contextlib.suppress(orjson.JSONDecodeError):
        if max(map(len, lines)) <= MAX_RECORD_BYTES:
            values = [*map(orjson.loads, lines)]
            if set(map(type, values)) == {dict}:
                yield Records(offsets, values)
                return
    for place, line in zip(offsets, lines, strict=True):
        if len(line) > MAX_RECORD_BYTES + 1:
            yield too_large(place, len(line) - 1)
        elif not line.isspace():
            yield as_found(parse(line.removesuffix(b"\n"), place))


class _Window:
    """The part of a stream that is held: `data`, which begins at byte `base` of the text."""

    def __init__(self, stream: ByteStream, base: int) -> None:
        self._stream = stream
        self.data = b""
        self.base = base
        self.at_end = False
        self.error: StreamError | None = None

    def more(self, keep_from: int) -> None:
        """Forgets what is before `keep_from` and reads on: more for a longer record, so that cost stays linear."""
        chunks = [self.data[keep_from:]]
        self.base += keep_from
        num_wanted = min(max(CHUNK_BYTES, len(chunks[0])), 16 * CHUNK_BYTES)
        try:
            while num_wanted > 0 and not self.at_end:
                chunks.append(self._stream.read())
                num_wanted -= len(chunks[-1])
                self.at_end = not chunks[-1]
        except StreamError as error:
            self.at_end, self.error = True, error
        self.data = b"".join(chunks)


def split_objects(stream: ByteStream, offset: int = 0) -> Iterator[Found]:
    """Objects of a JSON array, or in a row. Behind a broken one, reading goes on at the next boundary."""
    window = _Window(stream, offset)
    window.more(0)
    header = _HEADER.match(window.data)
    position = header.end() if header else 0
    cut = False
    while True:
        start, stray, closed = _next_start(window, position)
        if stray is not None:
            cut = start is None and window.error is not None
            yield _cut(window, stray) if cut else Record(stray, None, "bad_json", "not a JSON object")
        if start is None:
            break
        offsets: list[int] = []
        values: list[dict[str, Any]] = []
        for boundary in _BETWEEN.finditer(window.data, start + 1):  # most objects are whole, and follow one another
            try:
                value = orjson.loads(window.data[start : boundary.start() + 1])
            except orjson.JSONDecodeError:
                break
            if boundary.start() - start >= MAX_RECORD_BYTES:
                break
            offsets.append(window.base + start)
            values.append(value)
            start = boundary.end()
            if len(values) == MAX_TOGETHER:
                yield Records(offsets, values)
                offsets, values = [], []
        if values:
            yield Records(offsets, values)
        record, position = _take(window, start)
        cut = record.value is None and window.at_end and position == len(window.data)
        yield _cut(window, record.offset) if cut and window.error is not None else as_found(record)
    if not cut and stray is None and (window.error is not None or (header is not None and not closed)):
        yield _cut(window, window.base + len(window.data))


def _cut(window: _Window, offset: int) -> Record:
    if window.error is not None:
        return Record(offset, None, window.error.reason, short(window.error))
    return Record(offset, None, "bad_json", "the array is not closed: the file is cut off")


def _next_start(window: _Window, position: int) -> tuple[int | None, int | None, bool]:
    """Where the next object begins, the offset of anything else before it, and whether a `]` stands before it."""
    stray: int | None = None
    closed = False
    while True:
        found = _START.search(window.data, position)
        held_back = 0 if window.at_end else _BOUNDARY_BYTES
        stop = found.start() if found else max(position, len(window.data) - held_back)
        between = window.data[position:stop]
        closed |= b"]" in between
        if stray is None and (rest := between.lstrip(_SEPARATORS)):
            stray = window.base + stop - len(rest)
        if found or window.at_end:
            return found.start() if found else None, stray, closed
        window.more(stop)
        position = 0


def _take(window: _Window, start: int) -> tuple[Record, int]:
    """The object at `start` and the place behind it, which for a broken one is where the next begins."""
    search_from = start + 1
    first_end: int | None = None
    while True:
        boundary = _BOUNDARY.search(window.data, search_from)
        if boundary is None and not window.at_end:
            if len(window.data) - start > MAX_RECORD_BYTES:
                return _skip(window, start)
            shift, search_from = start, max(search_from, len(window.data) - _BOUNDARY_BYTES)
            window.more(start)
            start, search_from = 0, search_from - shift
            first_end = None if first_end is None else first_end - shift
            continue
        end = boundary.start() + 1 if boundary else len(window.data)
        first_end = end if first_end is None else first_end
        offset = window.base + start
        if first_end - start > MAX_RECORD_BYTES:
            return too_large(offset, first_end - start), first_end
        raw = window.data[start:end]
        try:
            return as_record(orjson.loads(raw), offset), end
        except orjson.JSONDecodeError:
            object_end = _object_end(raw)
        if object_end:
            record = parse(raw[:object_end], offset)
            if record.value is not None:
                return record, start + object_end
        elif boundary is not None and end - start < MAX_RECORD_BYTES and _is_beginning(raw):
            search_from = start + 2 * len(raw)  # the boundary is between objects inside this one
            continue
        return _broken(window, start, first_end)


def _broken(window: _Window, start: int, end: int) -> tuple[Record, int]:
    """The failed record at `start`: it ends at the boundary `end`, or where an object with its first key begins."""
    first = _START.match(window.data, start)
    same_key = (
        other.start() for other in _START.finditer(window.data, start + 1, end) if first and other[1] == first[1]
    )
    end = next(same_key, end)
    return parse(window.data[start:end].rstrip(b" \t\r\n,"), window.base + start), end


def _skip(window: _Window, start: int) -> tuple[Record, int]:
    """Reads past a record that is too large to hold."""
    offset = window.base + start
    while (boundary := _BOUNDARY.search(window.data, start)) is None and not window.at_end:
        window.more(max(start, len(window.data) - _BOUNDARY_BYTES))
        start = 0
    end = boundary.start() + 1 if boundary else len(window.data)
    return too_large(offset, window.base + end - offset), end


def _object_end(raw: bytes) -> int:
    """Where the braces that open `raw` are closed; 0 if they are not."""
    depth = 0
    for token in _TOKEN.finditer(raw):
        if token[0] == b"{":
            depth += 1
        elif token[0] == b"}":
            depth -= 1
            if depth == 0:
                return token.end()
        elif token[0] == b'"':  # a string without an end
            return 0
    return 0


def _is_beginning(raw: bytes) -> bool:
    """Whether `raw` is valid JSON as far as it goes."""
    try:
        json.loads(text := raw.decode("utf-8", "replace"), strict=False)
    except json.JSONDecodeError as error:
        return error.msg.startswith("Unterminated string") or error.pos >= len(text)
    except (RecursionError, ValueError):
        pass
    return False
