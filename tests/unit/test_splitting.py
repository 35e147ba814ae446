"""Splitting JSON lines and arrays: a broken record fails alone, whatever is broken in it."""

import io
import json
import random
import re
import tracemalloc
from collections.abc import Iterator
from itertools import chain

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kun_ray import records, splitting
from kun_ray.archives import ByteStream
from kun_ray.records import Record

ROWS = [
    {"id": i, "title": f"标题{i}", "content": f'正文 "引" {{花}}}},{{ \\frac{{}}{{}} \n {i}', "k": None}
    for i in range(8)
]

PIECES = [
    b'{"id": 1}', b'{"id": 2, "of": [{"id": 3}, {"id": 4}]}', b'{ "text": "a } , { \\"b\\": 1 }"}', b'{"id": {"id": 5}}', b",", b", ",
    b"\n", b"\f", b" ", b"]", b"}", b"{", b'"', b'{"id": ', b'{"cut": "', b"7", b'{"' + b"k" * 130 + b'": 1}', b" " * 70, b'{"\xff": 1}',
]  # fmt: skip
"""What arrays are made of, whole and broken."""


class Dribble(io.BytesIO):
    """Hands out a few bytes at a time, as a network does."""

    def read(self, num_bytes: int | None = -1, /) -> bytes:
        return super().read(7)


def split(stream: ByteStream, as_objects: bool = False) -> list[Record]:
    """The records one by one."""
    found = splitting.split(stream, as_objects)
    return [
        one
        for some in found
        for one in ([some] if isinstance(some, Record) else map(Record, some.offsets, some.values))
    ]


def read(data: bytes, as_objects: bool = False) -> list[Record]:
    return split(ByteStream(io.BytesIO(data)), as_objects)


def array(rows: list[dict]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


@pytest.mark.parametrize("wrap", ["%s", '{"RECORDS": %s}', '\ufeff{ "RECORDS":\n%s\n}\n', "\ufeff \n%s"])
def test_arrays_and_the_records_wrapper_are_read(wrap):
    data = (wrap % array(ROWS).decode()).encode()
    found = read(data)
    assert [record.value for record in found] == ROWS
    assert all(json.loads(data[record.offset :].decode().split('", "k": null}')[0] + '"}') for record in found)


def test_indented_array_lines_and_objects_in_a_row_are_read():
    lines = b"\r\n".join(json.dumps(row).encode() for row in ROWS)
    assert [record.value for record in read(json.dumps(ROWS, indent=2).encode())] == ROWS
    assert [record.value for record in read(lines)] == ROWS
    assert [record.value for record in read(lines, as_objects=True)] == ROWS
    assert [record.value for record in read(b"".join(json.dumps(row, indent=1).encode() for row in ROWS))] == ROWS


def test_offsets_are_bytes_of_the_record():
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in ROWS]
    for record, line in zip(read(b"\n\n".join(lines)), lines, strict=True):
        assert b"\n\n".join(lines)[record.offset :].startswith(line)
    data = array(ROWS)
    assert [data.index(b'{"id": %d' % i) for i in range(8)] == [record.offset for record in read(data)]


def test_nested_objects_are_one_record():
    rows = [{"id": i, "tags": [{"a": j, "b": [{"c": "}, {"}]} for j in range(40)], "content": "x"} for i in range(5)]
    assert [record.value for record in read(array(rows))] == rows


@pytest.mark.parametrize("damage", [b'"', b"{", b"}", b",", b"\xff", b"\0", b"\\", b""])
def test_a_damaged_byte_anywhere_in_an_array_costs_its_own_record_only(damage):
    data = array(ROWS)
    starts = [*(record.offset for record in read(data)), len(data)]
    for place in range(1, len(data) - 1):
        found = read(data[:place] + damage + data[place + 1 :], as_objects=True)
        hit = {i for i in range(8) if starts[i] <= place <= starts[i + 1]}
        untouched = [row for i, row in enumerate(ROWS) if i not in hit]
        assert [record.value for record in found if record.value in untouched] == untouched, place
        assert len(ROWS) <= len(found) <= len(ROWS) + 1, place
        assert len({record.offset for record in found}) == len(found), place


def test_an_array_cut_anywhere_keeps_what_is_whole_and_says_that_it_is_cut():
    data = array(ROWS)
    ends = [record.offset for record in read(data)][1:] + [len(data) + 1]
    for cut in range(1, len(data)):
        found = read(data[:cut], as_objects=True)
        whole = sum(end - 2 <= cut for end in ends)
        assert [record.value for record in found if record.value] == ROWS[:whole], cut
        assert [record.reason for record in found if record.reason] == ["bad_json"], cut


def test_a_record_cut_off_in_the_middle_of_an_array_does_not_take_the_next_with_it():
    data = array(ROWS)
    start, end = (data.index(b'{"id": %d' % i) for i in (3, 4))
    found = read(data[: start + 40] + data[end:])  # record 3 loses its end and the comma
    assert [record.value for record in found if record.value] == [*ROWS[:3], *ROWS[4:]]
    assert [(record.offset, record.reason) for record in found if record.reason] == [(start, "bad_json")]


def test_elements_that_are_no_objects_are_failed_rows():
    found = read(b'[{"id": 1}, null, {"id": 2}, 17, "x", {"id": 3}]')
    assert [record.value for record in found] == [{"id": 1}, None, {"id": 2}, None, {"id": 3}]


def test_an_array_that_lost_its_head_is_read_from_the_next_record():
    found = read(array(ROWS)[20:], as_objects=True)
    assert found[0].reason == "bad_json" and [record.value for record in found[1:]] == ROWS[1:]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "bad_json"),
        (b"\x00\x01garbage", "bad_json"),
        (b"[1, 2]", "bad_json"),
        (b'"text"', "bad_json"),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json"),
        (b'{"text": "\xff\xfe"}', "bad_encoding"),
        ('{"text": "中文"}'.encode("gbk"), "bad_encoding"),
        (b'{"text": "\\ud800"}', "bad_encoding"),
        (b'{"text": "\xed\xa0\x80"}', "bad_encoding"),
    ],
)
def test_a_bad_line_fails_alone(line, reason):
    found = read(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert [record.value for record in found] == [{"text": "a"}, None, {"text": "b"}]
    assert (found[1].reason, found[1].offset) == (reason, 14) and len(found[1].error) <= 200


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"text": "a\tb\x0b\x00c"}', "a\tb\x0b\x00c"),  # control characters that strict JSON refuses
        (b'{"text": "\\ud83d\\ude00"}', "😀"),
        (b'\xef\xbb\xbf{"text": "bom"}', "bom"),
        (b'{"text": "n", "x": NaN}', "n"),
    ],
)
def test_a_strange_line_is_read(line, text):
    assert [record.value["text"] for record in read(line + b'\n{"text": "b"}') if record.value] == [text, "b"]


def test_control_characters_in_an_array_are_read():
    assert [record.value for record in read(b'[{"content": "a\nb\x01"}, {"content": "c"}]')] == [
        {"content": "a\nb\x01"},
        {"content": "c"},
    ]


def test_records_are_whole_over_the_edges_of_chunks(monkeypatch):
    rows = ROWS * 40
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    monkeypatch.setattr(splitting, "CHUNK_BYTES", 600)
    for data in (array(rows), lines):
        assert [record.value for record in split(ByteStream(Dribble(data)))] == rows


@settings(max_examples=300, deadline=None)
@example(b'{"id": 1}\f,{"id": 2}', True)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join), st.booleans())
def test_whole_objects_in_a_row_are_read_as_one_by_one(data, bracketed):
    data = b"[" + data + b"]" if bracketed else data
    at_once = read(data, as_objects=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "_BETWEEN", re.compile(rb"(?!)"))
        assert at_once == read(data, as_objects=True)


def test_damage_over_the_edges_of_chunks_is_found_as_without_them(monkeypatch):
    data = bytearray(array(ROWS * 40))
    for place in random.Random(0).sample(range(1, len(data)), 40):
        data[place] = ord('"')
    expected = read(bytes(data), as_objects=True)
    monkeypatch.setattr(splitting, "CHUNK_BYTES", 600)
    assert split(ByteStream(Dribble(bytes(data))), as_objects=True) == expected
    assert 20 < sum(record.value is not None for record in expected) < 320


class Endless:
    """A 300 MB record that nobody has to hold."""

    def __init__(self, head: bytes, num_mb: int, tail: bytes) -> None:
        self.parts: Iterator[bytes] = chain([head], (bytes(1 << 20) for _ in range(num_mb)), [tail])

    def read(self, num_bytes: int, /) -> bytes:
        return next(self.parts, b"")


@pytest.mark.parametrize(
    ("head", "tail", "as_objects"),
    [
        (b'{"id": 1}\n{"id": 2, "text": "', b'"}\n{"id": 3}', False),
        (b'[{"id": 1},{"id": 2, "text": "', b'"},{"id": 3}]', True),
    ],
)
def test_a_record_over_64_mb_is_skipped_without_holding_it(head, tail, as_objects):
    tracemalloc.start()
    found = split(ByteStream(Endless(head, 300, tail)), as_objects)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [record.value for record in found] == [{"id": 1}, None, {"id": 3}]
    assert (found[1].reason, found[1].offset) == ("record_too_large", head.index(b'{"id": 2'))
    assert peak < 200 << 20


def test_a_record_just_under_the_limit_is_read(monkeypatch):
    for module in (records, splitting):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 2000)
    fits, over = ({"text": "x" * n} for n in (1900, 2100))
    for data in (array([fits, over, fits]), b"\n".join(json.dumps(row).encode() for row in (fits, over, fits))):
        assert [record.reason for record in read(data)] == [None, "record_too_large", None]
