"""Raw corpora → documents: finds the files of WuDao, WanJuan, SkyPile, jsonl and Parquet and reads them with Ray Data.

jobs/prepare.py starts here. archives.py opens files, records.py splits them, documents.py makes rows; filters.py judges
a text, nothing here does. Listing happens once, on the driver; tasks stream, and never hold a whole file.
"""

from __future__ import annotations

import dataclasses
import heapq
import os
import re
import urllib.parse
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from kun_ray import schema
from kun_ray.archives import TAR_SUFFIXES, TEXT_SUFFIXES
from kun_ray.config import KunError, one_of, require
from kun_ray.documents import Extract, extract_fields, extract_wanjuan, extract_wudao, read_documents
from kun_ray.store import resolve

if TYPE_CHECKING:
    from ray.data.context import DataContext

FORMATS = ("wudao", "wanjuan", "skypile", "jsonl", "parquet")
DATA_SUFFIXES = (*TEXT_SUFFIXES, *TAR_SUFFIXES, ".parquet")


@dataclasses.dataclass
class CorpusConfig:
    """One corpus: where its files are and how its records look."""

    name: str
    """The `source` of its rows; part of every doc_id, so renaming a corpus makes other documents of it."""
    format: str
    """`wudao`, `wanjuan`, `skypile`, or plain `jsonl` or `parquet` with a named text column."""
    paths: list[str]
    """Files, folders (with all below them) and globs (`**` too): local, `s3://…` or `hdfs://…`. Inside a folder, names
    that begin with `.` or `_` are skipped."""
    text_field: str = "text"
    """Field that holds the text; wudao and wanjuan know their own."""
    title_field: str | None = None
    """Field that holds the title, if there is one; wudao knows its own."""
    meta_fields: list[str] = dataclasses.field(default_factory=list)
    """Further fields, such as `id` or `url`, that are kept in `meta`."""

    def __post_init__(self) -> None:
        require(
            bool(self.name) and self.name == self.name.strip(),
            f"`name` of a corpus is {self.name!r}: give it a plain name",
        )
        one_of(f"format of corpus {self.name}", self.format, FORMATS)
        require(
            bool(self.paths) and all(self.paths),
            f"`paths` of corpus {self.name} must name at least one file, folder or glob",
        )
        require(bool(self.text_field), f"`text_field` of corpus {self.name} is empty")
        reserved = {"file", "offset", "error"}.intersection(self.meta_fields)
        require(
            not reserved, f"`meta_fields` of corpus {self.name}: kun_ray writes {', '.join(sorted(reserved))} itself"
        )


@dataclasses.dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus. `name` is its path below the folder, or the part of the glob before the first wildcard."""

    path: str
    name: str
    size_bytes: int


def list_files(config: CorpusConfig) -> list[CorpusFile]:
    """The files of a corpus, sorted by name; a file reached twice (overlapping paths, links) counts once.

    Raises:
        KunError: nothing matches one of `paths`, a folder cannot be listed, or two files have the same relative name.
    """
    files: dict[str, CorpusFile] = {}
    for pattern in config.paths:
        found = _expand(pattern)
        if not found:
            raise KunError(
                f"corpus {config.name}: nothing matches {pattern} (data files end in {' '.join(DATA_SUFFIXES)})"
            )
        for identity, file in found:
            files.setdefault(identity, file)
    by_name: dict[str, CorpusFile] = {}
    for file in files.values():
        other = by_name.setdefault(file.name, file)
        if other is not file:
            raise KunError(
                f"corpus {config.name}: {other.path} and {file.path} would both be called {file.name}. "
                "Name the folder above both in `paths`, or make two corpora of them."
            )
    return sorted(by_name.values(), key=lambda file: file.name)


def _expand(pattern: str) -> list[tuple[str, CorpusFile]]:
    """Files of one entry of `paths`, each with what identifies it however it is reached."""
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
            return [(_identity(filesystem, inner), CorpusFile(pattern, info.base_name, info.size or 0))]
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
                found.setdefault(_identity(filesystem, file.path), CorpusFile(path, name, file.size or 0))
        return list(found.items())
    except (OSError, ValueError) as error:
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
            elif is_link:
                links.append(info)
            elif info.type == pafs.FileType.File:
                yield info
    yield from links


def read_corpora(configs: list[CorpusConfig], num_tasks: int | None = None) -> ray.data.Dataset:
    """Every record of the corpora as one row of schema.DOCUMENT; `failed` rows say what could not be read.

    Args:
        configs: the corpora; files of corpora with the same name must differ in their relative names.
        num_tasks: number of read tasks; None lets Ray choose. A file is never split between tasks.
    Raises:
        KunError: see list_files.
    """
    documents: ray.data.Dataset = ray.data.read_datasource(CorporaDatasource(configs), override_num_blocks=num_tasks)
    return documents


class CorporaDatasource(Datasource):
    """The files of the corpora, grouped into read tasks of about the same size."""

    def __init__(self, configs: list[CorpusConfig]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.files = [(config, file) for config in configs for file in list_files(config)]
        by_id: dict[tuple[str, str], CorpusFile] = {}
        for config, file in self.files:
            other = by_id.setdefault((config.name, file.name), file)
            if other is not file:
                raise KunError(
                    f"two corpora are called {config.name}, and both hold {file.name}: give each its own name"
                )

    def get_name(self) -> str:
        return "Corpora"

    def estimate_inmemory_data_size(self) -> int:
        return sum(map(_memory_bytes, self.files))

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        """At most `parallelism` tasks; the largest file goes to the task with the least to read."""
        num_tasks = max(1, min(parallelism, len(self.files)))
        loads = [(0, index) for index in range(num_tasks)]
        groups: list[list[tuple[CorpusConfig, CorpusFile]]] = [[] for _ in range(num_tasks)]
        for item in sorted(self.files, key=_memory_bytes, reverse=True):
            num_bytes, index = heapq.heappop(loads)
            groups[index].append(item)
            heapq.heappush(loads, (num_bytes + _memory_bytes(item) + 1, index))
        return [_read_task(group, per_task_row_limit) for group in groups]


def _memory_bytes(item: tuple[CorpusConfig, CorpusFile]) -> int:
    _, file = item
    return file.size_bytes * (4 if file.name.endswith((".gz", ".tgz", ".parquet")) else 1)


def _read_task(items: list[tuple[CorpusConfig, CorpusFile]], row_limit: int | None) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        for config, file in items:
            yield from read_file(config, file)

    metadata = BlockMetadata(
        num_rows=None,
        size_bytes=sum(map(_memory_bytes, items)),
        input_files=tuple(file.path for _, file in items),
        exec_stats=None,
    )
    return ReadTask(read, metadata, schema=schema.DOCUMENT, per_task_row_limit=row_limit)


def read_file(config: CorpusConfig, file: CorpusFile) -> Iterator[pa.Table]:
    """The documents of one file of a corpus, as tables of schema.DOCUMENT."""
    return read_documents(file.path, file.name, config.name, extract_of(config), as_objects=config.format == "wudao")


def extract_of(config: CorpusConfig) -> Extract:
    if config.format == "wudao":
        return extract_wudao(config.meta_fields)
    if config.format == "wanjuan":
        return extract_wanjuan(config.meta_fields)
    return extract_fields(config.text_field, config.title_field, config.meta_fields)
