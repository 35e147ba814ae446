"""Raw corpora → documents: the files of WuDao, WanJuan, SkyPile, jsonl and Parquet, read with Ray Data.

jobs/prepare.py starts here. listing.py finds files, sources.py opens them, archives.py unpacks, splitting.py and parquet.py
find records, contents.py their texts, documents.py makes rows; filters.py judges a text, nothing here does. Listing happens
once, on the driver; tasks stream, and never hold a whole file.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.fs as pafs
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from kun_ray import schema
from kun_ray.config import KunError, one_of, require, without_credentials
from kun_ray.contents import Extract, ExtractFields, ExtractWanjuan, ExtractWudao
from kun_ray.documents import read_documents
from kun_ray.listing import DATA_SUFFIXES, expand
from kun_ray.sources import ON_READ_ERROR, CorpusFile
from kun_ray.store import Folder

if TYPE_CHECKING:
    from ray.data.context import DataContext

FORMATS = ("wudao", "wanjuan", "skypile", "jsonl", "parquet")


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
    on_read_error: str = "stop"
    """What to do when the storage fails for half a minute in the middle of a file: `stop` ends the run, and the same
    command continues it; `skip` makes the rest of the file one failed row (`unreadable_file`)."""

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
        one_of(f"on_read_error of corpus {self.name}", self.on_read_error, ON_READ_ERROR)
        require(bool(self.text_field), f"`text_field` of corpus {self.name} is empty")
        reserved = {"file", "offset", "error"}.intersection(self.meta_fields)
        require(
            not reserved, f"`meta_fields` of corpus {self.name}: kun_ray writes {', '.join(sorted(reserved))} itself"
        )


def list_files(config: CorpusConfig) -> list[CorpusFile]:
    """The files of a corpus, sorted by name; a file reached twice (overlapping paths, links) counts once.

    Raises:
        KunError: nothing matches one of `paths`, a folder cannot be listed, or two files have the same relative name.
    """
    files: dict[str, CorpusFile] = {}
    for pattern in config.paths:
        found = expand(pattern)
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


def list_corpora(configs: list[CorpusConfig]) -> list[tuple[CorpusConfig, CorpusFile]]:
    """The files of all corpora. Raises KunError as `list_files` does, and if two files would have the same ids."""
    files = [(config, file) for config in configs for file in list_files(config)]
    by_id: dict[tuple[str, str], CorpusFile] = {}
    for config, file in files:
        other = by_id.setdefault((config.name, file.name), file)
        if other is not file:
            raise KunError(f"two corpora are called {config.name}, and both hold {file.name}: give each its own name")
    return files


def read_corpora(
    files: list[tuple[CorpusConfig, CorpusFile]], num_tasks: int | None = None, counts: Folder | None = None
) -> ray.data.Dataset:
    """Every record of the corpora as one row of schema.DOCUMENT; `failed` rows say what could not be read.

    Args:
        files: from `list_corpora`.
        num_tasks: number of read tasks; None lets Ray choose. A file is never split between tasks.
        counts: a folder into which each task writes how many rows it has read, for `num_rows_read`.
    """
    source = CorporaDatasource(files, counts)
    documents: ray.data.Dataset = ray.data.read_datasource(source, override_num_blocks=num_tasks)
    return documents


def num_rows_read(counts: Folder, num_files: int) -> int:
    """Rows that read tasks have yielded, as they counted themselves: what the written rows are checked against.

    Raises:
        KunError: not all `num_files` files were read to their end.
    """
    infos = counts.filesystem.get_file_info(pafs.FileSelector(counts.path))
    found = [counts.read_json(info.base_name) for info in infos if info.base_name.endswith(".json")]
    read = sum(task["files"] for task in found)
    if read != num_files:
        raise KunError(f"{read} of {num_files} files were read to their end; run the same command again to continue")
    return sum(task["rows"] for task in found)


class CorporaDatasource(Datasource):
    """The files of the corpora, grouped into read tasks of about the same size."""

    def __init__(self, files: list[tuple[CorpusConfig, CorpusFile]], counts: Folder | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.files = files
        self.counts = counts

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
        return [_read_task(index, group, self.counts, per_task_row_limit) for index, group in enumerate(groups)]


def _memory_bytes(item: tuple[CorpusConfig, CorpusFile]) -> int:
    _, file = item
    return file.size_bytes * (4 if file.name.endswith((".gz", ".tgz", ".parquet")) else 1)


def _read_task(
    index: int, items: list[tuple[CorpusConfig, CorpusFile]], counts: Folder | None, row_limit: int | None
) -> ReadTask:
    def read() -> Iterator[pa.Table]:
        num_rows = 0
        for config, file in items:
            for table in read_file(config, file):
                num_rows += table.num_rows
                yield table
        if counts is not None:  # a task that Ray runs again writes the same file again
            counts.write_json(f"{index:06d}.json", {"files": len(items), "rows": num_rows})

    metadata = BlockMetadata(
        num_rows=None,
        size_bytes=sum(map(_memory_bytes, items)),
        input_files=tuple(without_credentials(file.path) for _, file in items),
        exec_stats=None,
    )
    return ReadTask(read, metadata, schema=schema.DOCUMENT, per_task_row_limit=row_limit)


def read_file(config: CorpusConfig, file: CorpusFile) -> Iterator[pa.Table]:
    """The documents of one file of a corpus, as tables of schema.DOCUMENT."""
    return read_documents(file, config.name, extract_of(config), config.format == "wudao", config.on_read_error)


def extract_of(config: CorpusConfig) -> Extract:
    if config.format == "wudao":
        return ExtractWudao(config.meta_fields)
    if config.format == "wanjuan":
        return ExtractWanjuan(config.meta_fields)
    return ExtractFields(config.text_field, config.title_field, config.meta_fields)
