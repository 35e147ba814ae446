"""What an entry of a corpus's `paths` stands for: a file, all below a folder, or what a glob matches, on any file system.

corpora.py calls it on the driver. It follows links but no folder twice, and opens nothing.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections import deque
from collections.abc import Iterator
from typing import Final

import pyarrow.fs as pafs

from kun_ray.archives import TAR_SUFFIXES, TEXT_SUFFIXES
from kun_ray.config import KunError
from kun_ray.sources import CorpusFile
from kun_ray.store import resolve

DATA_SUFFIXES: Final = (*TEXT_SUFFIXES, *TAR_SUFFIXES, ".parquet")


def expand(pattern: str) -> list[tuple[str, CorpusFile]]:
    """Files of one entry of `paths`, each with what identifies it however it is reached; none if nothing matches.

    Raises:
        KunError: a folder cannot be listed, or the entry is a pipe or a device.
    """
    base, options = pattern, ""
    if "://" in pattern:
        base, mark, rest = pattern.partition("?")  # behind ? stand the options of a URI: no wildcard there
        options = mark + rest
    try:
        filesystem, inner = resolve(base + options)
        root, glob = base.rstrip("/") or "/", None
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound and not os.path.islink(inner):
            root, glob = _split_glob(base)
            filesystem, inner = resolve(root + options)
            info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound and glob is not None:
            return []
        if info.type != pafs.FileType.Directory:
            if glob is not None or (info.type == pafs.FileType.NotFound and not os.path.islink(inner)):
                return []
            if info.type == pafs.FileType.Unknown:  # reading a pipe would hang, reading a device would never end
                raise KunError(f"{pattern} is neither a file nor a folder")
            return [(_identity(filesystem, inner), CorpusFile(pattern, info.base_name, info.size or 0, info.mtime_ns))]
        matches = _glob_regex(glob or "**").fullmatch
        max_depth = None if glob is None or "**" in glob else glob.count("/")
        found: dict[str, CorpusFile] = {}
        for file in _walk(filesystem, inner, max_depth):
            name = file.path[len(inner.rstrip("/")) + 1 :]
            # Without a suffix (Hadoop's part-00000) a file is data only if the glob names it.
            named = glob is not None and glob.rsplit("/", 1)[-1] not in ("*", "**") and "." not in file.base_name
            if matches(name) and (named or name.endswith(DATA_SUFFIXES)):
                quoted = urllib.parse.quote(name) if "://" in root else name
                path = f"{root.rstrip('/')}/{quoted}{options}"
                found.setdefault(
                    _identity(filesystem, file.path), CorpusFile(path, name, file.size or 0, file.mtime_ns)
                )
        return list(found.items())
    except UnicodeDecodeError as error:
        raise KunError(
            f"{pattern} holds a file whose name is not UTF-8 ({error.object!r}): rename it, as `convmv -f gbk -t utf8` does"
        ) from None
    except (OSError, ValueError, re.error) as error:
        raise KunError(f"{pattern} cannot be listed: {error}") from None


def _split_glob(pattern: str) -> tuple[str, str | None]:
    parts = pattern.split("/")
    first = next((index for index, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if first is None:
        return pattern, None
    return "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "."), "/".join(parts[first:])


def _glob_regex(glob: str) -> re.Pattern[str]:
    regex = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", glob, re.DOTALL):
        if token.startswith("[") and len(token) > 1:
            regex += "[" + token[1:-1].replace("\\", "\\\\").replace("!", "^", 1 if token[1] == "!" else 0) + "]"
        else:
            regex += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token, re.escape(token))
    return re.compile(regex, re.DOTALL)


def _identity(filesystem: pafs.FileSystem, inner: str) -> str:
    return (
        os.path.realpath(inner) if isinstance(filesystem, pafs.LocalFileSystem) else f"{filesystem.type_name}:{inner}"
    )


def _walk(filesystem: pafs.FileSystem, root: str, max_depth: int | None) -> Iterator[pafs.FileInfo]:
    """Every visible file below `root`: what is real first, then links; no folder twice, so a loop of links ends."""
    folders, linked = deque([(root, 0)]), deque[tuple[str, int]]()
    links: list[pafs.FileInfo] = []
    seen: set[str] = set()
    while folders or linked:
        folder, depth = folders.popleft() if folders else linked.popleft()
        identity = _identity(filesystem, folder)
        if identity in seen:
            continue
        seen.add(identity)
        infos = filesystem.get_file_info(pafs.FileSelector(folder))
        if isinstance(
            filesystem, pafs.LocalFileSystem
        ):  # which leaves out dangling links: listed, they become unreadable_file
            dangling = [
                entry.path for entry in os.scandir(folder) if entry.is_symlink() and not os.path.exists(entry.path)
            ]
            infos = [*infos, *filesystem.get_file_info(dangling)]
        for info in sorted(infos, key=lambda info: info.path):
            is_link = isinstance(filesystem, pafs.LocalFileSystem) and os.path.islink(info.path)
            if info.base_name.startswith((".", "_")):
                continue
            if info.type == pafs.FileType.Directory:
                if max_depth is None or depth < max_depth:
                    (linked if is_link else folders).append((info.path, depth + 1))
            elif is_link and info.type != pafs.FileType.Unknown:  # not to /dev/zero
                links.append(info)
            elif info.type == pafs.FileType.File:
                yield info
    yield from links
