"""The text of rejected documents, read from the corpus again: a stage does not write it, but says where it stands.

`report` calls read_excerpts for the rows of its sample. It is best effort: a corpus that has moved, or lies on another
machine or deep in a large archive, leaves rows without an excerpt. Personal data is masked as prepare masks it.
"""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import IO, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.archives import CHUNK_BYTES, ByteStream, texts
from kun_ray.cleaning import find_personal, mask_personal
from kun_ray.config import KunError
from kun_ray.contents import Extract
from kun_ray.records import Records
from kun_ray.report.runs import Stage
from kun_ray.sources import StreamError
from kun_ray.splitting import split
from kun_ray.store import is_local

MAX_CHARS: Final = 2000
RECORD_BYTES: Final = 1 << 20
"""Read at a record's offset: a larger record is shown as it stands in the file."""
MAX_READ_BYTES: Final = 512 << 20
"""Read from all files together: offsets deep in large archives can only be reached by unpacking all before them."""

Places = dict[str, dict[int, str]]
"""File in meta (`archive!member`) → offset → doc_id."""


def read_excerpts(prepare: Stage, rows: list[dict[str, Any]]) -> dict[str, str]:
    """The beginning of each row's text in the corpus, by doc_id, as far as its file can be read here.

    Args:
        prepare: the stage that read the corpora; its configuration says where they are.
        rows: with `doc_id`, `source` and `meta`.
    """
    wanted: dict[str, Places] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        meta = json.loads(row["meta"] or "{}")
        if isinstance(meta.get("file"), str) and isinstance(meta.get("offset"), int):
            wanted[row["source"]][meta["file"]][meta["offset"]] = row["doc_id"]
    found: dict[str, str] = {}
    budget = _Budget(MAX_READ_BYTES)
    for _source, path, extract, places in _files(prepare, wanted):
        try:
            for doc_id, text in _read_file(path, places, extract, budget):
                found[doc_id] = mask_personal(text, find_personal(text))[:MAX_CHARS]
        except (OSError, StreamError, pa.ArrowException, _Spent):
            continue
    return found


class _Spent(Exception):
    """The budget is used up."""


class _Budget:
    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def spend(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left < 0:
            raise _Spent


def _files(prepare: Stage, wanted: dict[str, Places]) -> Iterator[tuple[str, str, Extract, Places]]:
    """(source, path, how its records are read, what is wanted of it) of every corpus file on this machine."""
    from kun_ray.corpora import CorpusConfig, extract_of, list_files  # imports Ray Data, which takes a second

    for given in prepare.config.get("corpora", []):
        if given["name"] not in wanted or not all(is_local(path) for path in given["paths"]):
            continue
        try:
            corpus = CorpusConfig(**given)
            files = list_files(corpus)
        except (KunError, OSError, TypeError):  # moved, or written by another version
            continue
        names = wanted[corpus.name]
        for file in files:
            places = {name: names[name] for name in names if name == file.name or name.startswith(f"{file.name}!")}
            if places:
                yield corpus.name, file.path, extract_of(corpus), places


def _read_file(path: str, places: Places, extract: Extract, budget: _Budget) -> Iterator[tuple[str, str]]:
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(0)
        if head.startswith(b"PAR1"):
            yield from _parquet_rows(file, next(iter(places.values())), path, extract)
        elif head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
            yield from _streamed(file, path, places, extract, budget)
        else:
            for offset, doc_id in next(iter(places.values())).items():
                file.seek(offset)
                yield doc_id, _text_at(file.read(RECORD_BYTES), path, extract)


def _parquet_rows(file: IO[bytes], offsets: dict[int, str], path: str, extract: Extract) -> Iterator[tuple[str, str]]:
    parquet, first = pq.ParquetFile(file), 0
    for group in range(parquet.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        inside = {offset: doc_id for offset, doc_id in offsets.items() if first <= offset < first + num_rows}
        if inside:
            table = parquet.read_row_group(group)
            for offset, doc_id in inside.items():
                value = table.slice(offset - first, 1).to_pylist()[0]
                yield doc_id, str(extract(value, path).text or value)
        first += num_rows


def _streamed(
    file: IO[bytes], path: str, places: Places, extract: Extract, budget: _Budget
) -> Iterator[tuple[str, str]]:
    name = next(iter(places)).partition("!")[0]
    for text in texts(ByteStream(file), name):
        if text.stream is None:
            continue
        position = 0
        for offset, doc_id in sorted(places.get(text.name, {}).items()):
            position += _skip(text.stream, offset - position, budget)
            if position == offset:
                yield doc_id, _text_at(text.stream.peek(RECORD_BYTES), f"{path}!{text.name}", extract)
        while _skip(text.stream, CHUNK_BYTES, budget):
            pass


def _skip(stream: ByteStream, num_bytes: int, budget: _Budget) -> int:
    left = num_bytes
    while left > 0 and (chunk := stream.read(min(left, CHUNK_BYTES))):
        left -= len(chunk)
        budget.spend(len(chunk))
    return num_bytes - left


def _text_at(raw: bytes, path: str, extract: Extract) -> str:
    """The text of the record that `raw` begins with, or the raw line where there is none."""
    found = next(split(ByteStream(io.BytesIO(raw)), as_objects=True), None)
    if isinstance(found, Records) and found.offsets[0] == 0:
        text = extract(found.values[0], path).text
        if isinstance(text, str) and text.strip():
            return text
    return raw[: 8 * MAX_CHARS].split(b"\n", 1)[0].decode("utf-8", "replace")
