"""SHA256SUMS, as `sha256sum -c` reads it: what an export writes, and what publishing checks before and after it copies."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from typing import Final

from kun_ray.config import KunError
from kun_ray.store import Folder

CHECKSUMS: Final = "SHA256SUMS"
_LINE: Final = re.compile(r"([0-9a-f]{64}) [ *](.+)")


@dataclasses.dataclass(frozen=True)
class Digests:
    """One file as it was read."""

    num_bytes: int
    sha256: str
    blake2b: str
    """16 bytes of BLAKE2b in hex, as the card of a trained model holds them (`train.publish.digests`)."""


def digests(folder: Folder, name: str) -> Digests:
    """Reads a file once. Raises OSError when it cannot be read."""
    sha256, blake2b, num_bytes = hashlib.sha256(), hashlib.blake2b(digest_size=16), 0
    with folder.filesystem.open_input_stream(folder.child(name)) as stream:
        while chunk := stream.read(8 << 20):
            sha256.update(chunk)
            blake2b.update(chunk)
            num_bytes += len(chunk)
    return Digests(num_bytes, sha256.hexdigest(), blake2b.hexdigest())


def write(sums: dict[str, str]) -> str:
    """The file's text for path → SHA-256, in the order of the paths."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def read(folder: Folder) -> dict[str, str]:
    """Path → SHA-256 of a folder's SHA256SUMS; empty if it has none. Raises KunError when it is no such file."""
    if not folder.exists(CHECKSUMS):
        return {}
    with folder.filesystem.open_input_stream(folder.child(CHECKSUMS)) as stream:
        text = stream.read().decode(errors="replace")
    found = read_text(text)
    if len(found) < len(text.splitlines()):
        raise KunError(f"{folder.uri}/{CHECKSUMS} is not what sha256sum writes")
    return found


def read_text(text: str) -> dict[str, str]:
    """Path → SHA-256 of a SHA256SUMS' text; lines that are none are left out."""
    return {match[2]: match[1] for line in text.splitlines() if (match := _LINE.fullmatch(line))}


def sha256(text: str) -> str:
    """SHA-256 of a text as it is written."""
    return hashlib.sha256(text.encode()).hexdigest()
