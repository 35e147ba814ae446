"""Where the CPU time of a reader goes, piece by piece: why the ratios of bench/ingest.py are no larger.

    python bench/reader_pieces.py [--mb 20] [--readings 25] [--out bench/results]
    python bench/reader_pieces.py --short

Microseconds of a document. `records` and `contents` are loops that find no more than that (of Parquet both are one, the
proof of UTF-8 in it); `id`, `meta` and `table` are what read_file takes less without them, a constant in their place
(`meta`: file, offset and the fields of a record as JSON); `rest` is what is left of it: the text as UTF-8, checks,
counting. All take turns, reading by reading, on one core; medians, and of differences within a reading. Beside them: the
reader of same_rows.py, which checks nothing, and hashing a text by a bare call of the library.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
from ingest import num_bytes, repeated, write_layouts
from kun_ray_side import read, read_same_rows, timed
from machine import PASSING, RESULTS, material, versions, write

from kun_ray import documents, schema
from kun_ray.contents import as_columns
from kun_ray.corpora import CorpusConfig, extract_of, list_files
from kun_ray.records import Records


def take_nothing(block: Any) -> pa.Table:
    block._clear()
    return pa.table({})


LAYOUTS = ("wudao, array", "wanjuan, jsonl.tar.gz", "wanjuan, jsonl", "skypile, jsonl", "skypile, parquet")
WITHOUT: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "id": [(schema, "doc_ids", lambda source, file, offsets, texts: ["0" * 32] * len(texts))],
    "meta": [(documents, "_meta_lines", lambda columns, place: [b"{}"] * len(columns.offsets))],
    "table": [(documents._Block, "take", take_nothing)],
}
"""What stands in the place of each piece."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=Path("build/corpora"))
    parser.add_argument("--mb", type=float, default=20, help="text in each layout")
    parser.add_argument("--readings", type=int, default=25)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench with --short")
    options = parser.parse_args()
    if options.short:
        options.mb, options.readings = 0.5, 1
    source, texts = material(options.corpora)
    texts = repeated(texts, options.mb)
    with tempfile.TemporaryDirectory() as folder:
        layouts, _ = write_layouts(Path(folder), texts)
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        found = {name: pieces(layouts[name]["config"], options.readings, texts) for name in LAYOUTS}
    result = {
        "unit": "microseconds of CPU time of a document",
        "text": {"source": source, "documents": len(texts), "mean_bytes": round(num_bytes(texts) / len(texts))},
        "readings": options.readings,
        "layouts": found,
        "versions": versions("pyarrow", "orjson", "zlib-ng"),
    }
    path = write(options.out or (PASSING if options.short else RESULTS), "reader_pieces", result)
    print(json.dumps(found, indent=2))
    print(f"written to {path}")


def pieces(config: dict[str, Any], readings: int, texts: list[str]) -> dict[str, float]:
    """Microseconds a document of each piece of a layout's reader."""
    corpus = CorpusConfig(**config)
    encoded = [text.encode() for text in texts]
    whole = functools.partial(read, corpus)
    loops: dict[str, Callable[[], object]] = {
        "whole": whole,
        "records": lambda: deque(found_in(corpus), maxlen=0),
        "contents": lambda: deque(contents_in(corpus), maxlen=0),
        **{piece: functools.partial(without, piece, whole) for piece in WITHOUT},
        "same rows": functools.partial(read_same_rows, corpus),
        "bare hash": lambda: deque((hashlib.blake2b(text, digest_size=16).hexdigest() for text in encoded), maxlen=0),
    }
    took: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(readings):
        for name, loop in loops.items():
            took[name].append(timed(loop) / len(texts) * 1e6)

    def beyond(name: str, other: str) -> float:
        return statistics.median(one - two for one, two in zip(took[name], took[other], strict=True))

    parts = {
        "records": statistics.median(took["records"]),
        "contents": beyond("contents", "records"),
        **{piece: beyond("whole", piece) for piece in WITHOUT},
    }
    rest = statistics.median(took["whole"]) - sum(parts.values())
    row = {
        **parts,
        "rest": rest,
        **{name: statistics.median(took[name]) for name in ("whole", "same rows", "bare hash")},
    }
    return {name: round(value, 2) for name, value in row.items()}


def without(piece: str, whole: Callable[[], object]) -> None:
    """`whole` with a constant for one piece."""
    with contextlib.ExitStack() as stack:
        for place, name, constant in WITHOUT[piece]:
            stack.enter_context(patch.object(place, name, constant))
        whole()


def found_in(corpus: CorpusConfig) -> Iterator[Any]:
    """The records of a corpus's files, as read_documents gets them."""
    for file in list_files(corpus):
        yield from documents._records(file, extract_of(corpus), corpus.format == "wudao", "stop")


def contents_in(corpus: CorpusConfig) -> Iterator[Any]:
    """What they hold, column by column."""
    extract = extract_of(corpus)
    for name, found in found_in(corpus):
        yield as_columns(extract, found, name) if isinstance(found, Records) else found


if __name__ == "__main__":
    main()
