"""Records as they are handed on, what makes one of its bytes, and JSON lines; splitting.py calls it, and knows arrays."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

import orjson

from kun_ray.archives import ByteStream
from kun_ray.sources import StreamError

MAX_RECORD_BYTES = 64 << 20
MANY = 128
"""Most records that are handed on together: more of them leave the processor's cache before they are looked at again."""


class Record(NamedTuple):
    """One record: its byte offset in the text, and the object, or the reason and message of its failure."""

    offset: int
    value: dict[str, Any] | None
    reason: str | None = None
    error: str = ""


class Records(NamedTuple):
    """Records that were read, in a row: their offsets and objects. Columns cost less than to hand on each alone.

    With `is_utf8`, a text that is bytes is UTF-8: somebody has looked.
    """

    offsets: Sequence[int]
    values: list[dict[str, Any]]
    is_utf8: bool = False


Found = Records | Record
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


def found(record: Record) -> Found:
    """A record as it is handed on."""
    return record if record.value is None else Records([record.offset], [record.value])


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
        while several := [*islice(lines, MANY)]:
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
        yield found(record)
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
            yield found(parse(line.removesuffix(b"\n"), place))


def as_record(value: Any, offset: int) -> Record:
    if type(value) is dict:
        return Record(offset, value)
    return Record(offset, None, "bad_json", f"a JSON object was expected, found {type(value).__name__}")


def too_large(offset: int, num_bytes: int) -> Record:
    return Record(offset, None, "record_too_large", f"{num_bytes} bytes; the limit is {MAX_RECORD_BYTES}")


def short(error: Exception) -> str:
    return str(error)[:200]
