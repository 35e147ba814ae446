"""The prepare stage: raw corpora → documents that are clean, short enough and not twice there.

Three phases, each of which a rerun continues: read and filter every record (Ray Data, row-level checkpoints), find
duplicates over the whole input (signatures only), write the documents with the duplicates marked.
Source: Kun (arXiv 2401.06477) keeps documents of at most 512 tokens whose perplexity passes; the other filters are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from omegaconf import MISSING
from pyarrow import fs

from kun_ray import cleaning, execution, lease, models, quality, store
from kun_ray.board import new_board
from kun_ray.config import ConfigError, KunError, RayConfig, require, to_dict
from kun_ray.corpora import CorporaDatasource, CorpusConfig, CorpusFile, read_corpora
from kun_ray.dedup import SIGNATURE_VERSION, DedupConfig, find_duplicates, signature_fields, signatures
from kun_ray.filters import FilterConfig, build_filters, filter_texts
from kun_ray.lease import LEASE_S
from kun_ray.ledger import count_statuses
from kun_ray.progress import Monitor, duration
from kun_ray.prompts import count_tokens, load_tokenizer
from kun_ray.schema import DOCUMENT, FAILED, OK, REJECTED, to_table

CLEAN = "_clean"
DUPLICATES = "_duplicates.parquet"


@dataclasses.dataclass
class PrepareConfig:
    """jobs/prepare.py: cleans corpora into documents."""

    corpora: list[CorpusConfig] = dataclasses.field(default_factory=list)
    """The corpora to read."""
    output: str = MISSING
    """Folder of this stage. The same command continues a run that was stopped or killed."""
    tokenizer: str | None = None
    """Model whose tokens are counted: the label model. null leaves tokens uncounted: filters.max_tokens then only
    bounds characters, by four times as many."""
    filters: FilterConfig = dataclasses.field(default_factory=FilterConfig)
    """What is kept."""
    dedup: DedupConfig = dataclasses.field(default_factory=DedupConfig)
    """Duplicates over the whole input."""
    read_tasks: int | None = None
    """Tasks that read files; null lets Ray choose. A file is never split."""
    batch_rows: int = 1024
    """Rows that one filter task takes at a time."""
    rows_per_file: int = 20_000
    """Rows of one output file."""
    lease_s: float = LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        require(len(self.corpora) > 0, "corpora: give at least one, with name, format and paths")
        require(self.rows_per_file >= 1 and self.batch_rows >= 1, "rows_per_file and batch_rows must be at least 1")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Runs the stage to its end and returns its summary.

    Raises:
        ConfigError: no files, an unreadable tokenizer or KenLM model; before anything starts.
        KunError: the output holds another run's data, or the counts do not add up.
        KeyboardInterrupt: stopped by a signal; what was finished is kept.
    """
    files = CorporaDatasource(config.corpora).files
    if config.tokenizer is not None:
        if models.is_missing_folder(config.tokenizer):
            raise ConfigError(
                f"tokenizer: there is no folder {config.tokenizer}; give the label model, or tokenizer=null"
            )
        models.require_on_hub(config.tokenizer, "tokenizer")
        _tokenizer(config.tokenizer)
    if config.filters.kenlm_path is not None:
        quality.perplexity("测试", config.filters.kenlm_path, config.filters.kenlm_units)
    listing = "\n".join(f"{corpus.name} {file.name} {file.size_bytes}" for corpus, file in files)
    with lease.opened(config.output, _fingerprint(config, listing), to_dict(config), config.lease_s) as folder:
        if folder.is_complete():
            print(f"{config.output} is complete already; nothing to do")
            return dict(folder.read_json(store.SUMMARY))
        return _run(config, folder, files)


def _run(config: PrepareConfig, folder: store.Folder, files: list[tuple[CorpusConfig, CorpusFile]]) -> dict[str, Any]:
    execution.connect(config.ray)
    execution.warn_if_not_shared([config.output, *(path for corpus in config.corpora for path in corpus.paths)])

    started = time.monotonic()
    size_gb = sum(file.size_bytes for _, file in files) / 1e9
    print(f"reading {len(files):,} files, {size_gb:.3f} GB", flush=True)
    clean = folder.below(CLEAN)
    num_read = _clean(config, clean)
    duplicates = _duplicates(config, folder, clean)
    print(f"{duplicates.num_rows:,} duplicates among {num_read:,} records; writing documents", flush=True)
    _publish(config, folder, clean, duplicates)
    counts = store.prove_counts(folder, num_read)
    elapsed = time.monotonic() - started
    tokens = _total(folder, "tokens")
    summary = {
        "stage": "prepare",
        **counts,
        "rows_in": num_read,
        "files": len(files),
        "tokens": tokens,
        "elapsed_s": round(elapsed, 1),
    }
    folder.finish(summary)
    folder.filesystem.delete_dir(clean.path)
    print(
        f"{counts['rows']:,} records: {counts[OK]:,} ok, {counts[REJECTED]:,} rejected, {counts[FAILED]:,} failed, in {duration(elapsed)}"
    )
    print(f"written to {config.output}")
    return summary


def clean_batch(table: pa.Table, config: PrepareConfig, board: Any = None) -> pa.Table:
    """One batch of records read → the same rows, filtered, with signatures. Columns: schema.DOCUMENT, exact, minhash."""
    rows: list[dict[str, Any]] = table.to_pylist()
    readable = [row for row in rows if row["status"] == OK]
    counter = functools.partial(count_tokens, _tokenizer(config.tokenizer)) if config.tokenizer else None
    filtered = filter_texts([row["text"] for row in readable], build_filters(config.filters), config.filters, counter)
    for row, result in zip(readable, filtered, strict=True):
        tokens = result.measures.get("tokens")
        row.update(
            text=result.text,
            tokens=None if tokens is None else int(tokens),
            perplexity=result.measures.get("perplexity"),
        )
        row["title"] = _clean_title(row["title"], config.filters)
        masked = {
            name.removeprefix("masked_"): int(n) for name, n in result.measures.items() if name.startswith("masked_")
        }
        if masked:
            row["meta"] = json.dumps({**json.loads(row["meta"]), "masked": masked}, ensure_ascii=False)
        if result.reason is not None:
            row.update(status=REJECTED, reason=result.reason, text=None)
    if board is not None:
        board.add.remote("filter", {"rows": len(rows), **Counter(row["status"] for row in rows)})
    documents = to_table(rows, DOCUMENT)
    signed = signatures([row["text"] for row in rows], config.dedup)
    for field in signature_fields(config.dedup):
        documents = documents.append_column(field, signed[field.name])
    return documents


def _clean(config: PrepareConfig, clean: store.Folder) -> int:
    """Phase 1: every record read and filtered into `_clean`. Returns the number of records."""
    if not clean.is_complete():
        clean.filesystem.create_dir(clean.path, recursive=True)
        board = new_board()
        execution.configure(clean)
        monitor = Monitor(
            board, store.Folder(config.output), ["filter"], None, count_statuses(clean), config.ray.log_every_s
        )
        with monitor:
            documents = read_corpora(config.corpora, config.read_tasks).map_batches(
                clean_batch,
                fn_kwargs={"config": config, "board": board},
                batch_size=config.batch_rows,
                batch_format="pyarrow",
                runtime_env={"env_vars": {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
            )
            try:
                execution.write(documents, clean, config.rows_per_file)
            except ray.exceptions.RayError as error:
                raise KunError(
                    f"the run ended early: {execution.root_cause(error)}\nRun the same command again to continue."
                ) from error
        if not clean.parts():
            raise KunError("the corpora hold no records at all: nothing to prepare")
        clean.finish({"rows": _count(clean)})
    return int(clean.read_json(store.SUMMARY)["rows"])


def _duplicates(config: PrepareConfig, folder: store.Folder, clean: store.Folder) -> pa.Table:
    """Phase 2: the documents to drop, kept in one file so that a rerun need not search again."""
    if not folder.exists(DUPLICATES):
        found = find_duplicates(clean.parts(), clean.filesystem, config.dedup, run_parallel)
        pq.write_table(found, folder.child(f"{DUPLICATES}.tmp"), filesystem=folder.filesystem)
        folder.filesystem.move(folder.child(f"{DUPLICATES}.tmp"), folder.child(DUPLICATES))
    return pq.read_table(folder.child(DUPLICATES), filesystem=folder.filesystem)


def _publish(config: PrepareConfig, folder: store.Folder, clean: store.Folder, duplicates: pa.Table) -> None:
    """Phase 3: each part of `_clean` as a part of the stage, duplicates marked; parts that are there already are kept."""
    by_id = {row["doc_id"]: (row["reason"], row["duplicate_of"]) for row in duplicates.to_pylist()}
    shared = ray.put(by_id)
    done = {path.rsplit("/", 1)[-1] for path in folder.parts()}
    wanted = [path for path in clean.parts() if path.rsplit("/", 1)[-1] not in done]
    list(run_parallel(functools.partial(publish_part, folder.filesystem, folder.path, shared), wanted))


def publish_part(filesystem: fs.FileSystem, target: str, duplicates: Any, path: str) -> str:
    """Writes one part of the stage under its final name once it is whole."""
    by_id = ray.get(duplicates)
    rows = pq.read_table(path, filesystem=filesystem, columns=DOCUMENT.names).to_pylist()
    for row in rows:
        if row["doc_id"] in by_id:
            reason, kept = by_id[row["doc_id"]]
            meta = json.dumps({**json.loads(row["meta"]), "duplicate_of": kept}, ensure_ascii=False)
            row.update(status=REJECTED, reason=reason, text=None, meta=meta)
    name = path.rsplit("/", 1)[-1]
    pq.write_table(to_table(rows, DOCUMENT), f"{target}/_{name}.tmp", filesystem=filesystem)
    filesystem.move(f"{target}/_{name}.tmp", f"{target}/{name}")
    return name


def run_parallel(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """function over items as Ray tasks, results in the order of the items."""
    task: Any = ray.remote(num_cpus=1)(
        function if not isinstance(function, functools.partial) else lambda item: function(item)
    )
    yield from ray.get([task.remote(item) for item in items])


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> Any:
    return load_tokenizer(
        models.fetch_model(path, weights=False), chat_template="chatml"
    )  # the template is not used here


def _clean_title(title: str | None, config: FilterConfig) -> str | None:
    if not title:
        return title
    cleaned = cleaning.clean(title)
    found = [item for item in cleaning.find_personal(cleaned) if config.pii_action(item.kind) != "keep"]
    return cleaning.mask_personal(cleaned, found)


def _fingerprint(config: PrepareConfig, listing: str) -> dict[str, Any]:
    plain = to_dict(config)
    return {
        "corpora": {
            corpus["name"]: {key: corpus[key] for key in ("format", "text_field", "title_field", "meta_fields")}
            for corpus in plain["corpora"]
        },
        "input": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
        "tokenizer": config.tokenizer and models.model_digest(config.tokenizer),
        "filters": plain["filters"],
        "dedup": {**plain["dedup"], "rows_per_task": None, "signatures": SIGNATURE_VERSION},  # memory, not result
    }


def _count(folder: store.Folder) -> int:
    return folder.dataset().count_rows() if folder.parts() else 0


def _total(folder: store.Folder, column: str) -> int:
    return int(sum(pc.sum(batch[column]).as_py() or 0 for batch in folder.dataset().to_batches(columns=[column])))
