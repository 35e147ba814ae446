"""Bytes of a corpus file as a stream that can be peeked at: gunzipped, and its tar members one by one.

documents.py reads through this module; sources.py opens. Nothing is ever extracted to disk, no member's name is ever used as a path, and
at most a few MB of a file are held. Everything that can go wrong is a StreamError with the reason of a failed row.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any, NamedTuple, Protocol, Self, cast

from zlib_ng import zlib_ng

from kun_ray.sources import StreamError

CHUNK_BYTES = 1 << 20
"""Read at once: on an object store each read is a request."""
GUNZIP_BYTES = 1 << 16
"""Gunzipped at once, from one multiple of it to the next: so much may be lost before damage. Before bytes that cannot be
read at all it is CHUNK_BYTES."""
BOMB_RATIO = 200
"""Text compresses 3 to 20 times; JSON never 200 times."""
BOMB_FLOOR_BYTES = 100 << 20
TEXT_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_GZIP = b"\x1f\x8b"
_PACKED = {
    b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"7z\xbc\xaf": "7z",
    b"Rar!": "rar", b"ARROW1": "Arrow", _GZIP: "gzip inside gzip",
}  # fmt: skip


class Readable(Protocol):
    def read(self, num_bytes: int, /) -> bytes: ...


class ByteStream:
    """A forward-only stream that can be peeked at. `error` holds the StreamError that ended it, if one did."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._head = b""
        self.error: StreamError | None = None

    def peek(self, num_bytes: int) -> bytes:
        """The next `num_bytes` (fewer at the end, or before an error, which the read that reaches it raises)."""
        while len(self._head) < num_bytes and self.error is None:
            try:
                chunk = self._fetch(num_bytes - len(self._head))
            except StreamError:
                break
            if not chunk:
                break
            self._head += chunk
        return self._head[:num_bytes]

    def read(self, num_bytes: int = CHUNK_BYTES) -> bytes:
        """Up to `num_bytes`; empty at the end. Raises StreamError, and then again on every later call."""
        if self._head:
            head, self._head = self._head[:num_bytes], self._head[num_bytes:]
            return head
        if self.error is not None:
            raise self.error
        return self._fetch(num_bytes)

    def _fetch(self, num_bytes: int) -> bytes:
        try:
            return self._raw.read(num_bytes)
        except StreamError as error:
            self.error = error
            raise


class GunzipStream:
    """gzip, several members in a row included. gzip.GzipFile counts nothing, so it cannot tell a bomb."""

    def __init__(self, raw: Readable) -> None:
        self._raw = raw
        self._decompressor = zlib_ng.decompressobj(wbits=31)
        self._data, self._place = b"", 0  # what was read, and where in it reading goes on
        self._in_member = False
        self._num_in = self._num_out = 0

    def read(self, num_bytes: int) -> bytes:
        while True:
            if self._place == len(self._data):
                self._data, self._place = self._raw.read(CHUNK_BYTES), 0
                if not self._data:
                    if self._in_member:
                        raise StreamError("truncated_archive", f"gzip data ends after {self._num_out} bytes of content")
                    return b""
            piece = self._data[self._place : (self._place // GUNZIP_BYTES + 1) * GUNZIP_BYTES]
            if not self._in_member:  # zero padding may follow a member
                self._place += len(piece) - len(piece.lstrip(b"\0"))
                piece = piece.lstrip(b"\0")
                if not piece:
                    continue
                self._in_member = True
            try:
                content = self._decompressor.decompress(piece, num_bytes)
            except zlib_ng.error as error:  # type: ignore[misc]  # its stub says int
                raise StreamError("bad_archive", f"gzip data is damaged after {self._num_out} bytes: {error}") from None
            done = self._decompressor.eof
            num_used = len(piece) - len(self._decompressor.unused_data if done else self._decompressor.unconsumed_tail)
            self._place += num_used
            self._num_in += num_used
            if done:
                self._decompressor = zlib_ng.decompressobj(wbits=31)
                self._in_member = False
            self._num_out += len(content)
            if self._num_out > BOMB_FLOOR_BYTES and self._num_out > BOMB_RATIO * self._num_in:
                raise StreamError("bad_archive", f"{self._num_out} bytes out of {self._num_in}: a decompression bomb")
            if content:
                return content


class Text(NamedTuple):
    """One text file found in a corpus file: itself or a tar member (`archive!member`), or why there is none."""

    name: str
    stream: ByteStream | None
    error: StreamError | None = None
    offset: int = 0
    """Of the last member that could be found, if the archive itself is damaged."""


def texts(stream: ByteStream, name: str) -> Iterator[Text]:
    """The text files in a corpus file, by what its bytes are and not by what it is called.

    The caller reads each stream to its end, or to its error, before it asks for the next.
    """
    if stream.peek(2) == _GZIP:
        stream = ByteStream(GunzipStream(stream))
    if _is_tar(stream, name):
        yield from _members(stream, name)
    else:
        yield _text(name, stream)


def _text(name: str, stream: ByteStream) -> Text:
    """What is packed in a way that is not read here is one failed row, not one per line of rubbish."""
    found = next((label for magic, label in _PACKED.items() if stream.peek(len(magic)) == magic), None)
    if found is None:
        return Text(name, stream)
    return Text(
        name, None, StreamError("bad_archive", f"{found} data: unpack it first; gzip and tar are read as they are")
    )


def _is_tar(stream: ByteStream, name: str) -> bool:
    head = stream.peek(512)
    named_tar = name.endswith(TAR_SUFFIXES) and not head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"{", b"["))
    return head[257:262] == b"ustar" or (named_tar and bool(head))


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged header in the middle for the end: the rest would be lost without a word."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tarfile)
        except _tar_error("TruncatedHeaderError") as error:
            raise StreamError("truncated_archive", f"tar header: {error}") from None
        except _tar_error("InvalidHeaderError") as error:
            raise StreamError("bad_archive", f"tar header: {error}") from None


def _tar_error(name: str) -> type[Exception]:
    return cast(type[Exception], getattr(tarfile, name))


class _Quiet:
    """`stream` for tarfile, which on an exception would throw away what it has read: an error looks like the end."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream

    def read(self, num_bytes: int) -> bytes:
        try:
            return self._stream.read(num_bytes)
        except StreamError:
            return b""


class _Member:
    """The bytes of one tar member, straight from tarfile's stream: extractfile() would not notice that it is cut."""

    def __init__(self, tar_stream: Readable, num_bytes: int, archive: ByteStream) -> None:
        self._tar_stream = tar_stream
        self._num_left = num_bytes
        self._archive = archive

    def read(self, num_bytes: int) -> bytes:
        chunk = self._tar_stream.read(min(num_bytes, self._num_left))
        if not chunk and self._num_left:
            raise self._archive.error or StreamError(
                "truncated_archive", f"the member lacks its last {self._num_left} bytes"
            )
        self._num_left -= len(chunk)
        return chunk


def _members(stream: ByteStream, archive: str) -> Iterator[Text]:
    seen: dict[str, int] = {}
    error: StreamError | None = None
    offset = 0
    try:
        quiet = cast(IO[bytes], _Quiet(stream))
        with tarfile.open(fileobj=quiet, mode="r|", bufsize=CHUNK_BYTES, tarinfo=_StrictTarInfo) as tar:
            while (member := tar.next()) is not None:
                offset = member.offset
                cast(Any, tar).members.clear()  # tarfile remembers every member: millions would add up
                plain_name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                path = PurePosixPath(plain_name)
                if member.isdir() or path.name.startswith("."):
                    continue
                seen[plain_name] = seen.get(plain_name, 0) + 1
                name = f"{archive}!{plain_name}" + (f"#{seen[plain_name]}" if seen[plain_name] > 1 else "")
                problem = _problem(member, path)
                if problem:
                    yield Text(name, None, StreamError("bad_archive_member", problem))
                    continue
                content = ByteStream(_Member(cast(Readable, tar.fileobj), member.size, stream))
                zipped = content.peek(2) == _GZIP
                yield _text(name, ByteStream(GunzipStream(content)) if zipped else content)
                if content.error is not None:
                    return
        error = stream.error
    except StreamError as problem_found:
        error = stream.error or problem_found
    except tarfile.TarError as problem_found:
        error = stream.error or StreamError("truncated_archive", str(problem_found))
    if error is not None:
        yield Text(archive, None, error, offset)


def _problem(member: tarfile.TarInfo, path: PurePosixPath) -> str | None:
    if path.is_absolute() or ".." in path.parts:
        return "its name leaves the archive"
    if not member.isreg() or member.issparse():
        return f"not a regular file (tar type {member.type!r})"
    if member.size < 0:
        return "its size is negative"
    if not path.name.endswith(TEXT_SUFFIXES):
        return f"not a data file: {', '.join(TEXT_SUFFIXES)} are"
    return None
