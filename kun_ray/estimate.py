"""What a sample of the corpora, read through prepare's own filters, says of all of them: documents, tokens, time, disk."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from kun_ray.corpora import CorpusConfig, list_corpora, read_file
from kun_ray.prepare import PrepareConfig, clean_batch
from kun_ray.schema import OK
from kun_ray.sources import CorpusFile
from kun_ray.workload import TOKENS_PER_CHAR, Options, Work


@dataclasses.dataclass
class Sampled:
    """What a sample of the corpora says of all of them."""

    records: float
    core_seconds: float
    """To read and filter every record, on this machine."""
    disk_gb: float
    """Of the documents that pass, compressed about twofold."""
    work: Work


def sample_corpora(config: PrepareConfig, options: Options) -> Sampled:
    """Reads the beginning of some files of each corpus through the real filters: documents and tokens to expect.

    Duplicates across files are not seen, so the documents are an upper bound.
    """
    files = list_corpora(config.corpora)
    some = files[:: max(1, len(files) // 8)]
    started, found, share_read = time.monotonic(), list[pa.Table](), 0.0
    for corpus, file in some:
        table, share = _beginning(corpus, file, max(1, options.sample_records // len(some)))
        found.append(clean_batch(table, config))
        share_read += share * file.size_bytes
    elapsed, table = time.monotonic() - started, pa.concat_tables(found)
    scale = sum(file.size_bytes for _, file in files) / max(share_read, 1.0)
    ok = table.filter(pc.equal(table["status"], OK))
    tokens = pc.mean(ok["tokens"]).as_py() if config.tokenizer else None
    tokens = tokens or (pc.mean(pc.utf8_length(ok["text"])).as_py() or 0) * TOKENS_PER_CHAR
    records = table.num_rows * scale
    work = Work(options.num_documents or ok.num_rows * scale, options.tokens_per_document or tokens)
    work.notes.append(
        f"sample: {table.num_rows:,} of about {records:,.0f} records in {len(some)} of {len(files):,} files; "
        f"{ok.num_rows / max(1, table.num_rows):.0%} pass the filters (duplicates not looked for)"
    )
    disk = pc.sum(pc.binary_length(ok["text"])).as_py() or 0
    return Sampled(records, elapsed / max(1, table.num_rows) * records, disk * scale / 1e9 / 2, work)


def _beginning(corpus: CorpusConfig, file: CorpusFile, num_rows: int) -> tuple[pa.Table, float]:
    """The first rows of a file, and about which part of the file they are: by the bytes of their texts, of which packed files
    are taken to hold three for each of their own."""
    tables, rows = list[pa.Table](), 0
    reader: Iterator[pa.Table] = read_file(corpus, file)
    for table in reader:
        tables.append(table)
        rows += table.num_rows
        if rows >= num_rows:
            break
    whole = next(reader, None) is None
    read = pa.concat_tables(tables).slice(0, None if whole else num_rows)
    if whole:
        return read, 1.0
    num_bytes = (pc.sum(pc.binary_length(read["text"])).as_py() or 0) * 1.15  # keys and quotes beside the text
    packed = 3.0 if file.name.endswith((".gz", ".tgz", ".parquet")) else 1.0
    return read, min(1.0, max(1.0, num_bytes / packed) / max(1, file.size_bytes))
