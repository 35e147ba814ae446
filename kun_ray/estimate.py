"""What a sample of the corpora, read through prepare's own filters, says of all of them: documents, tokens, time, disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from kun_ray.corpora import CorpusConfig, list_corpora, read_file
from kun_ray.prepare import ONE_CORE, PrepareConfig, check_models, clean_batch
from kun_ray.schema import OK
from kun_ray.sources import CorpusFile
from kun_ray.workload import TOKENS_PER_CHAR, Options, Work

MOST_FILES = 8
"""Of each corpus."""
COMPRESSION = 2
"""Bytes of text in one of Parquet, about."""


@dataclasses.dataclass
class Sampled:
    """What a sample says of all that it was taken from; estimates of several files or corpora add up."""

    records: float = 0.0
    ok: float = 0.0
    """Records that pass the filters."""
    tokens: float = 0.0
    """Of the records that pass, all together."""
    longest: float = 0.0
    """Tokens of the longest record of the sample that passes."""
    core_seconds: float = 0.0
    """To read and filter every record, on this machine."""
    disk_bytes: float = 0.0
    """Of the documents that pass, and of the copy of them, with all records' signatures, that prepare keeps until it ends."""

    def add(self, other: Sampled, weight: float = 1.0) -> None:
        """Counts what `other` was taken from `weight` times."""
        for field in dataclasses.fields(self):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(mine, its) if field.name == "longest" else mine + weight * its)


def sample_corpora(config: PrepareConfig, options: Options) -> tuple[Sampled, Work]:
    """Reads the beginning of some files of each corpus through the real filters: documents and tokens to expect.

    Duplicates across files are not seen, so the documents are an upper bound.
    """
    listed, each = list_corpora(config.corpora), max(1, options.sample_records // len(config.corpora))
    total, shown, num_read = Sampled(), list[str](), 0
    with _one_core():
        check_models(config)
        for corpus in config.corpora:
            files = [file for owner, file in listed if owner is corpus]
            found, read = _sample_corpus(corpus, files, each, config)
            total.add(found)
            num_read += read
            shown.append(f"{corpus.name} {found.records:,.0f}")
    work = Work(options.num_documents or total.ok, options.tokens_per_document or total.tokens / max(1.0, total.ok))
    work.longest = total.longest
    work.notes.append(
        f"sample: {num_read:,} of about {total.records:,.0f} records{' (' + ', '.join(shown) + ')' if len(shown) > 1 else ''}; "
        f"{total.ok / max(1.0, total.records):.0%} pass the filters (duplicates not looked for)"
    )
    return total, work


def _sample_corpus(
    corpus: CorpusConfig, files: list[CorpusFile], num_rows: int, config: PrepareConfig
) -> tuple[Sampled, int]:
    """The estimate of one corpus, and how many of its records it rests on."""
    some = files[:: -(-len(files) // MOST_FILES)]
    scale = sum(file.size_bytes for file in files) / max(1, sum(file.size_bytes for file in some))
    found, read = Sampled(), 0
    for file in some:
        started = time.monotonic()
        table, num_passed, share = _beginning(corpus, file, max(1, num_rows // len(some)))
        reading_s = (time.monotonic() - started) * table.num_rows / max(1, num_passed)
        if file is some[0]:  # the tokenizer and the models of filters are loaded but once: not within the measured time
            clean_batch(table.slice(0, 8), config)
        found.add(_clean(table, config, reading_s), scale / share)
        read += table.num_rows
    return found, read


def _clean(table: pa.Table, config: PrepareConfig, reading_s: float) -> Sampled:
    """What the filters make of some records of one file, and the time that this and reading them takes."""
    started = time.monotonic()
    cleaned = clean_batch(table, config)
    seconds = time.monotonic() - started + reading_s
    ok = cleaned.filter(pc.equal(cleaned["status"], OK))
    tokens = ok["tokens"] if config.tokenizer else pc.multiply(pc.utf8_length(ok["text"]), TOKENS_PER_CHAR)
    signed = [cleaned[name].drop_null() for name in ("exact", "minhash")[: 1 + config.dedup.near]]
    return Sampled(
        records=table.num_rows,
        ok=ok.num_rows,
        tokens=pc.sum(tokens).as_py() or 0,
        longest=pc.max(tokens).as_py() or 0,
        core_seconds=seconds,
        disk_bytes=2 * (pc.sum(pc.binary_length(ok["text"])).as_py() or 0) / COMPRESSION
        + sum(column.nbytes for column in signed),
    )


def _beginning(corpus: CorpusConfig, file: CorpusFile, num_rows: int) -> tuple[pa.Table, int, float]:
    """The first rows of a file, how many were read for them, and which part of all its rows they are.

    That part is known of a file that was read to its end; of plain text it follows from where the next row begins. Of a
    packed file it is a guess by the bytes of the texts, of which it is taken to hold three for each of its own.
    """
    tables, rows = list[pa.Table](), 0
    reader: Iterator[pa.Table] = read_file(corpus, file)
    for table in reader:
        tables.append(table)
        rows += table.num_rows
        if rows > num_rows:
            break
    following = next(reader, None)
    read = pa.concat_tables(tables)
    some = read.slice(0, num_rows)
    if following is None:
        return some, rows, some.num_rows / max(1, rows)
    if file.name.endswith((".json", ".jsonl")):
        num_bytes = float(json.loads(read["meta"][num_rows].as_py())["offset"])
    else:
        text = (pc.sum(pc.binary_length(some["text"])).as_py() or 0) * 1.15  # keys and quotes beside the text
        num_bytes = text / (3.0 if file.name.endswith((".gz", ".tgz", ".parquet")) else 1.0)
    return some, rows + following.num_rows, min(1.0, max(1.0, num_bytes) / max(1, file.size_bytes))


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """Libraries use one core, as in prepare's tasks, so that seconds here are seconds of a core."""
    before = {name: os.environ.get(name) for name in ONE_CORE}
    os.environ.update(ONE_CORE)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
