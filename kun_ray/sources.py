"""A corpus file as bytes, wherever pyarrow.fs reaches. Errors that may pass are waited out, and a change is noticed.

documents.py opens every file here. A store that hiccups costs seconds, never the rest of a file: reading goes on at the
byte where it stopped. What cannot pass (no such file, no permission) is the file's failed row at once.
"""

from __future__ import annotations

import errno
import sys
import time
from typing import Any, Final, NamedTuple

from pyarrow import fs

from kun_ray.config import KunError, without_credentials
from kun_ray.store import resolve

RETRY_WAITS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Waits before the second, third, … try; Arrow has tried S3 several times itself before it reports an error."""
ON_READ_ERROR: Final = ("stop", "skip")
_LASTING: Final = {
    errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EPERM
}  # fmt: skip


class StreamError(Exception):
    """The stream cannot be read further: `reason` is that of the failed row, the message is for its `error`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class CorpusFile(NamedTuple):
    """One file of a corpus. `name` is its path below the folder, or the part of the glob before the first wildcard."""

    path: str
    name: str
    size_bytes: int
    mtime_ns: int | None = None
    """When it was changed last, as the listing said; None where the file system does not say."""


class Source:
    """One file, read in order or by place, for one thread. pyarrow takes it as a file object.

    Raises (from `read`):
        StreamError: `unreadable_file`; the file is not there, may not be read, or `on_error` is `skip`.
        KunError: reading has failed at the same byte for half a minute, and `on_error` is `stop`.
    """

    closed = False

    def __init__(self, path: str, on_error: str = "stop") -> None:
        self.place = 0
        self._filesystem, self._path = resolve(path)
        self._shown = without_credentials(path)
        self._on_error = on_error
        self._file: Any = None

    def read(self, num_bytes: int = -1) -> bytes:
        for wait_s in (*RETRY_WAITS_S, None):
            try:
                if self._file is None:
                    self._file = self._filesystem.open_input_file(self._path)
                    self._file.seek(self.place)
                data: bytes = self._file.read(num_bytes if num_bytes >= 0 else None)
                self.place += len(data)
                return data
            except OSError as error:
                self._file = None
                found = f"{without_credentials(str(error))[:120]} (at byte {self.place})"
                if isinstance(error, FileNotFoundError | PermissionError) or error.errno in _LASTING:
                    raise StreamError("unreadable_file", found) from None
                if wait_s is not None:
                    print(f"{self._shown}: {found}; next try in {wait_s:g} s", file=sys.stderr, flush=True)
                    time.sleep(wait_s)
        tries = f"{found}, {len(RETRY_WAITS_S) + 1} tries in {sum(RETRY_WAITS_S):g} s"
        if self._on_error == "skip":
            raise StreamError("unreadable_file", tries)
        raise KunError(
            f"{self._shown} cannot be read: {tries}. If the file itself is damaged, fetch it again, or set "
            "on_read_error: skip in its corpus to make its rest one failed row; if its storage is down, wait"
        )

    def seek(self, offset: int, whence: int = 0) -> int:
        """As of any file object; `whence` 2 asks the file system for the size."""
        base = 0 if whence == 0 else self.place if whence == 1 else (self._info().size or 0)
        self.place = base + offset
        if self._file is not None:
            self._file.seek(self.place)
        return self.place

    def tell(self) -> int:
        return self.place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        """Lets go of the file; Python's own file objects may be closed twice, and so may this one."""
        self.closed = True
        if self._file is not None:
            self._file.close()
            self._file = None

    def change(self, listed: CorpusFile) -> str | None:
        """What is other about the file than when it was listed, which is also what its rows were read from."""
        now = self._info()
        if now.type == fs.FileType.NotFound:
            return "the file was deleted while it was read"
        if now.size is not None and now.size != listed.size_bytes:
            return f"{listed.size_bytes} bytes when listed, {now.size} after reading"
        if listed.mtime_ns is not None and now.mtime_ns not in (None, listed.mtime_ns):
            return "the file was written again after it was listed"
        return None

    def _info(self) -> Any:
        try:
            return self._filesystem.get_file_info(self._path)
        except OSError as error:
            raise StreamError("unreadable_file", without_credentials(str(error))[:200]) from None
