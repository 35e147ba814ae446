"""gzip and tar as streams: cut, damaged, hostile archives give one failed row each and keep what could be read."""

import contextlib
import gzip
import io
import json
import os
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_files import special, tar
from zlib_ng import zlib_ng

from kun_ray import archives
from kun_ray.archives import ByteStream, GunzipStream
from kun_ray.contents import ExtractWanjuan
from kun_ray.documents import read_documents
from kun_ray.sources import CorpusFile, StreamError

DOCS = [os.urandom(300).hex() for _ in range(400)]
LINES = b"\n".join(json.dumps({"id": str(i), "content": text}).encode() for i, text in enumerate(DOCS)) + b"\n"


def read(path, data: bytes) -> list[dict]:
    path.write_bytes(data)
    file = CorpusFile(str(path), path.name, len(data))
    return [row for table in read_documents(file, "w", ExtractWanjuan([])) for row in table.to_pylist()]


def outcome(rows: list[dict]) -> list[tuple[str, str | None]]:
    return [(json.loads(row["meta"])["file"], row["reason"]) for row in rows]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "gzipped-all-the-same.jsonl"])
def test_gzip_is_known_by_its_bytes_and_may_have_several_members(tmp_path, name):
    half = LINES.index(b"\n", len(LINES) // 2) + 10
    rows = read(tmp_path / name, gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]) + b"\0" * 700)
    assert [row["text"] for row in rows] == DOCS
    assert LINES[json.loads(rows[7]["meta"])["offset"] :].startswith(b'{"id": "7"')  # of the decompressed text


def test_gzip_is_read_in_large_pieces():
    """On an object store every read is a request."""
    asked = []

    class Store(io.BytesIO):
        def read(self, num_bytes: int | None = -1, /) -> bytes:
            asked.append(num_bytes)
            return super().read(num_bytes)

    stream, found = ByteStream(GunzipStream(Store(gzip.compress(os.urandom(3 << 20))))), 0
    while chunk := stream.read():
        found += len(chunk)
    assert found == 3 << 20 and len(asked) <= 5 and min(asked) >= 1 << 20


def test_text_called_gz_is_read_as_text(tmp_path):
    assert [row["text"] for row in read(tmp_path / "a.jsonl.gz", LINES)] == DOCS


@pytest.mark.parametrize("share", [0.3, 0.9, 0.9999])
def test_cut_gzip_keeps_what_precedes_the_cut(tmp_path, share):
    data = gzip.compress(LINES)
    rows = read(tmp_path / "a.jsonl.gz", data[: int(len(data) * share)])
    *good, last = rows
    assert last["reason"] == "truncated_archive" and last["text"] is None
    assert [row["text"] for row in good] == DOCS[: len(good)] and len(good) >= 400 * share - 3


def test_damaged_gzip_says_so_and_keeps_what_came_before(tmp_path):
    data = bytearray(gzip.compress(LINES))
    data[-8:-4] = b"\0\0\0\0"  # the checksum
    rows = read(tmp_path / "a.jsonl.gz", bytes(data))
    assert rows[-1]["reason"] == "bad_archive" and len(rows) > 200
    assert read(tmp_path / "b.jsonl.gz", gzip.compress(LINES) + b"rubbish")[-1]["reason"] == "bad_archive"


@pytest.mark.parametrize("share", [0.3, 0.9, 1])
@pytest.mark.parametrize("num_bytes", [1, 7, 4096])
def test_small_reads_give_all_that_a_gzip_file_holds_before_its_cut(share, num_bytes):
    packed = gzip.compress(LINES)
    packed = packed[: int(len(packed) * share)]
    expected = zlib.decompressobj(wbits=31).decompress(packed)
    stream, found = GunzipStream(io.BytesIO(packed)), b""
    with pytest.raises(StreamError, match="ends after") if share < 1 else contextlib.nullcontext():
        while content := stream.read(num_bytes):
            found += content
    assert expected.startswith(found) and len(expected) - len(found) <= 258, "zlib holds back no more than one match"
    assert share < 1 or found == LINES


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([0, 1, 6, 9]), st.sampled_from(["", "name", "checksum"]), st.integers(1, 5000),
    st.sampled_from(["whole", "cut", "flipped"]), st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_zlib_ng_unpacks_what_zlib_would_of_whole_cut_and_damaged_files(level, extra, num_bytes, state, place):
    compressed = zlib.compress(LINES[:40_000], level)[2:-4]
    head = b"\x1f\x8b\x08%b\0\0\0\0\0\x03" % bytes([{"": 0, "name": 8, "checksum": 2}[extra]])
    head += {"": b"", "name": b"a.jsonl\0", "checksum": (zlib.crc32(head) & 0xFFFF).to_bytes(2, "little")}[extra]
    tail = zlib.crc32(LINES[:40_000]).to_bytes(4, "little") + (40_000).to_bytes(4, "little")
    packed = bytearray(head + compressed + tail)
    if state == "cut":
        del packed[int(len(packed) * place) :]
    if state == "flipped":
        packed[int(len(packed) * place)] ^= 1 << num_bytes % 8
    found = []
    for library in (zlib_ng, zlib):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(archives, "zlib_ng", library)
            found.append(unpacked(bytes(packed), num_bytes))
    assert found[0] == found[1]
    assert state != "whole" or found[0] == (LINES[:40_000], None)


def unpacked(packed: bytes, num_bytes: int) -> tuple[bytes, str | None]:
    """What a gzip file gives, and the reason why it gives no more."""
    stream, found = GunzipStream(io.BytesIO(packed)), b""
    try:
        while content := stream.read(num_bytes):
            found += content
    except StreamError as error:
        return found, error.reason
    return found, None


def test_damaged_gzip_costs_no_more_than_64_kb_before_the_damage(tmp_path):
    line = b'{"content": "%s"}\n' % (b"x" * 483)
    data = bytearray(gzip.compress(line * 1600, compresslevel=0))
    place = 10
    for _ in range(6):  # blocks that are stored as they are: a wrong length of the seventh is noticed where it stands
        place += 5 + int.from_bytes(data[place + 1 : place + 3], "little")
    data[place + 1] ^= 0xFF
    rows = read(tmp_path / "a.jsonl.gz", bytes(data))
    assert rows[-1]["reason"] == "bad_archive"
    assert (place - (64 << 10)) // len(line) - 2 <= len(rows) - 1 <= place // len(line)


def test_a_gzip_bomb_is_stopped(tmp_path):
    bomb = gzip.compress(b'{"id": "0", "content": "x"}\n') + gzip.compress(b" " * (10 << 20)) * 20
    rows = read(tmp_path / "a.jsonl.gz", bomb)
    assert [row["reason"] for row in rows] == [None, "bad_archive"]
    assert "bomb" in rows[1]["meta"]
    stream = ByteStream(GunzipStream(io.BytesIO(bomb)))
    num_read = 0
    with pytest.raises(StreamError, match="bomb"):
        while chunk := stream.read():
            num_read += len(chunk)
    assert num_read < 110 << 20


@pytest.mark.parametrize("name", ["x.jsonl.tar.gz", "x.tgz", "x.tar", "tar-under-another-name.jsonl.gz"])
def test_members_are_streamed_and_named(tmp_path, name):
    data = tar(
        special("d", tarfile.DIRTYPE),
        ("d/a.jsonl", LINES),
        ("d/._a.jsonl", b"mac"),
        ("d/b.jsonl.gz", gzip.compress(LINES)),
    )
    rows = read(tmp_path / name, data if name.endswith("tar") else gzip.compress(data))
    assert outcome(rows) == [(f"{name}!d/a.jsonl", None)] * 400 + [(f"{name}!d/b.jsonl.gz", None)] * 400
    assert len({row["doc_id"] for row in rows}) == 800
    assert os.listdir(tmp_path) == [name]


def test_hostile_members_are_failed_rows_and_written_nowhere(tmp_path):
    here = os.listdir(tmp_path.parent)
    data = tar(
        ("/etc/kun.jsonl", LINES),
        ("../up.jsonl", LINES),
        special("link.jsonl", tarfile.SYMTYPE),
        special("hard.jsonl", tarfile.LNKTYPE),
        special("pipe.jsonl", tarfile.FIFOTYPE),
        ("README.txt", b"read me"),
        ("\udcff.jsonl", LINES),
        ("good.jsonl", LINES),
        ("good.jsonl", LINES),
    )
    rows = read(tmp_path / "x.tar.gz", gzip.compress(data))
    assert [reason for _, reason in outcome(rows)] == ["bad_archive_member"] * 6 + [None] * 1200
    assert {file for file, _ in outcome(rows[6:])} == {
        "x.tar.gz!\\xff.jsonl",
        "x.tar.gz!good.jsonl",
        "x.tar.gz!good.jsonl#2",
    }
    assert len({row["doc_id"] for row in rows}) == 1206
    assert os.listdir(tmp_path) == ["x.tar.gz"] and os.listdir(tmp_path.parent) == here


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_tar_keeps_what_precedes_the_cut(tmp_path, zipped):
    data = tar(("a.jsonl", LINES), ("b.jsonl", LINES))
    cut = len(data) * 3 // 4
    data = gzip.compress(data)[: int(len(gzip.compress(data)) * 0.75)] if zipped else data[:cut]
    *good, last = read(tmp_path / "x.tar.gz", data)
    assert outcome([last]) == [("x.tar.gz!b.jsonl", "truncated_archive")]
    assert len(good) > 550 and all(row["status"] == "ok" for row in good)


def test_a_damaged_tar_header_does_not_end_the_archive_in_silence(tmp_path):
    data = bytearray(tar(("a.jsonl", LINES), ("b.jsonl", LINES)))
    second = data.index(b"b.jsonl")
    data[second : second + 20] = b"?" * 20
    rows = read(tmp_path / "x.tar", bytes(data))
    assert outcome(rows) == [("x.tar!a.jsonl", None)] * 400 + [("x.tar", "bad_archive")]
    assert outcome(read(tmp_path / "y.tar.gz", gzip.compress(b"no tar at all" * 100))) == [("y.tar.gz", "bad_archive")]


def test_a_damaged_member_does_not_cost_the_next(tmp_path):
    inner = gzip.compress(LINES)
    rows = read(tmp_path / "x.tar", tar(("a.jsonl.gz", inner[: len(inner) // 2]), ("b.jsonl", LINES)))
    assert outcome(rows)[-401:] == [("x.tar!a.jsonl.gz", "truncated_archive")] + [("x.tar!b.jsonl", None)] * 400


def test_archives_without_data_are_empty_files(tmp_path):
    assert outcome(read(tmp_path / "x.tar", tar())) == [("x.tar", "empty_file")]
    assert outcome(read(tmp_path / "y.tar", tar(("a.jsonl", b"")))) == [("y.tar!a.jsonl", "empty_file")]
    assert outcome(read(tmp_path / "z.jsonl.gz", gzip.compress(b""))) == [("z.jsonl.gz", "empty_file")]
