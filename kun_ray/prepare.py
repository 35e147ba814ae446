"""The prepare stage: raw corpora → documents that are clean, short enough and not twice there.

Three phases, each of which a rerun continues: read and filter every record (Ray Data, row-level checkpoints), find
duplicates over the whole input (signatures only), write the documents with the duplicates marked.
Source: Kun (arXiv 2401.06477) keeps documents of at most 512 tokens whose perplexity passes; the other filters are ours.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from omegaconf import MISSING

from kun_ray import cleaning, execution, lease, models, quality, store
from kun_ray.board import new_board
from kun_ray.config import ConfigError, KunError, RayConfig, require, show_config, to_dict, without_credentials
from kun_ray.corpora import CorpusConfig, list_corpora, num_rows_read, read_corpora
from kun_ray.counts import count_statuses, prove_counts, totals, warn_if_none_ok
from kun_ray.dedup import find_duplicates
from kun_ray.filters import FilterConfig, build_filters, filter_texts
from kun_ray.lease import LEASE_S
from kun_ray.marking import Duplicates, read_duplicates, write_marked
from kun_ray.progress import Monitor, duration
from kun_ray.prompts import count_tokens, load_tokenizer
from kun_ray.schema import DOCUMENT, FAILED, OK, REJECTED, to_table
from kun_ray.signatures import SIGNATURE_VERSION, DedupConfig, signature_fields, signatures
from kun_ray.sources import CorpusFile

CLEAN = "_clean"
DUPLICATES = "_duplicates.parquet"
MAX_BATCH_BYTES = 64 << 20
ONE_CORE = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
"""Environment of the filters' tasks, of which there is one for each core."""


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
    max_cpus: float | None = None
    """Most CPUs of the cluster to take at once; null takes all that are free, which leaves none to a training that is to
    start beside it."""
    batch_rows: int = 1024
    """Rows that one filter task takes at a time."""
    rows_per_file: int = 20_000
    """Rows of one output file."""
    lease_s: float = LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        require(self.max_cpus is None or self.max_cpus > 0, "max_cpus must be above 0")
        require(len(self.corpora) > 0, "corpora: give at least one, with name, format and paths")
        require(self.rows_per_file >= 1 and self.batch_rows >= 1, "rows_per_file and batch_rows must be at least 1")


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Runs the stage to its end and returns its summary.

    Raises:
        ConfigError: no files, an unreadable tokenizer or KenLM model; before anything starts.
        KunError: the output holds another run's data, the storage fails, or the counts do not add up.
        KeyboardInterrupt: stopped by a signal; what was finished is kept.
    """
    files = list_corpora(config.corpora)
    check_models(config)
    with lease.opened(config.output, fingerprint(config, files), to_dict(config), config.lease_s) as folder:
        if folder.is_complete():
            _delete(folder.below(CLEAN))  # a kill may have come just before
            print(f"{without_credentials(config.output)} is complete already; nothing to do")
            return dict(folder.read_json(store.SUMMARY))
        return _run(config, folder, files)


def _run(config: PrepareConfig, folder: store.Folder, files: list[tuple[CorpusConfig, CorpusFile]]) -> dict[str, Any]:
    shown, clean = without_credentials(config.output), folder.below(CLEAN)
    execution.connect(config.ray)
    paths = [path for corpus in config.corpora for path in corpus.paths]
    execution.warn_if_not_shared([without_credentials(path) for path in (config.output, *paths)])

    show_config()
    started = time.monotonic()
    size_gb = sum(file.size_bytes for _, file in files) / 1e9
    print(f"reading {len(files):,} files, {size_gb:.3f} GB", flush=True)
    with _explained():
        num_read = _clean(config, files, folder, clean)
        duplicates = _duplicates(config, folder, clean)
        print(f"{len(duplicates.near):,} duplicates among {num_read:,} records; writing documents", flush=True)
        write_marked(folder, clean, duplicates, _run_parallel(config))
    counts = prove_counts(folder, num_read)
    elapsed = time.monotonic() - started
    summary = {
        "stage": "prepare",
        **counts,
        "rows_in": num_read,
        "files": len(files),
        **totals(folder, ["tokens"]),
        "elapsed_s": round(elapsed, 1),
    }
    folder.finish(summary)
    _delete(clean)
    print(
        f"{counts['rows']:,} records: {counts[OK]:,} ok, {counts[REJECTED]:,} rejected, {counts[FAILED]:,} failed, in {duration(elapsed)}"
    )
    print(f"written to {shown}")
    warn_if_none_ok(counts)
    return summary


def clean_block(table: pa.Table, config: PrepareConfig, board: Any = None) -> Iterator[pa.Table]:
    """A block of records, filtered a few at a time: at most `batch_rows` rows and about 64 MB, since a record may have
    64 MB itself."""
    ends = np.cumsum(pc.fill_null(pc.binary_length(table["text"]), 0).to_numpy())
    start = 0
    while start < table.num_rows:
        before = ends[start - 1] if start else 0
        num_rows = int(np.searchsorted(ends[start : start + config.batch_rows], before + MAX_BATCH_BYTES, "right"))
        yield clean_batch(table.slice(start, max(1, num_rows)), config, board)
        start += max(1, num_rows)


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


def _clean(
    config: PrepareConfig, files: list[tuple[CorpusConfig, CorpusFile]], folder: store.Folder, clean: store.Folder
) -> int:
    """Phase 1: every record read and filtered into `_clean`. Returns how many were read, by the readers' own count."""
    if not clean.is_complete():
        counts = clean.below(f"_read-{uuid.uuid4().hex}")  # an earlier run may have shared out the files otherwise
        counts.filesystem.create_dir(counts.path, recursive=True)
        board = new_board()
        execution.configure(clean, max_cpus=config.max_cpus)
        local = _absolute(config)
        monitor = Monitor(board, folder, ["filter"], None, count_statuses(clean), config.ray.log_every_s)
        with monitor:
            documents = read_corpora(files, config.read_tasks, counts).map_batches(
                clean_block,
                fn_kwargs={"config": local, "board": board},
                batch_size=None,
                batch_format="pyarrow",
                runtime_env={"env_vars": ONE_CORE},
            )
            blocks = documents.repartition(target_num_rows_per_block=config.rows_per_file, strict=True)
            execution.write(blocks, clean, config.rows_per_file)
        num_read, num_written = num_rows_read(counts, len(files)), clean.num_rows()
        if num_read != num_written:
            raise KunError(
                f"{num_read:,} records were read, but {num_written:,} were written to {clean.uri}. Did a file of the corpora "
                "change since the run began, or was one deleted there? Delete the output folder and run the command again"
            )
        clean.finish({"read": num_read})
    return int(clean.read_json(store.SUMMARY)["read"])


def _absolute(config: PrepareConfig) -> PrepareConfig:
    """The configuration with the paths that tasks use as other processes can use them."""
    kenlm = config.filters.kenlm_path and models.absolute(config.filters.kenlm_path)
    tokenizer = config.tokenizer and models.absolute(config.tokenizer)
    return dataclasses.replace(
        config, tokenizer=tokenizer, filters=dataclasses.replace(config.filters, kenlm_path=kenlm)
    )


def _duplicates(config: PrepareConfig, folder: store.Folder, clean: store.Folder) -> Duplicates:
    """Phase 2: the documents to drop, kept in one file so that a rerun need not search again."""
    if not folder.exists(DUPLICATES):
        found = find_duplicates(clean.parts(), clean.filesystem, config.dedup, _run_parallel(config))
        pq.write_table(found, folder.child(f"{DUPLICATES}.tmp"), filesystem=folder.filesystem)
        folder.filesystem.move(folder.child(f"{DUPLICATES}.tmp"), folder.child(DUPLICATES))
    return read_duplicates(folder.filesystem, folder.child(DUPLICATES))


def _run_parallel(config: PrepareConfig) -> Any:
    return functools.partial(execution.run_parallel, max_cpus=config.max_cpus)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turns what Ray or the storage raises into one message. Ray's own errors hold the traceback of a worker."""
    try:
        yield
    except (ray.exceptions.RayError, OSError) as error:
        raise KunError(
            f"the run ended early: {execution.root_cause(error)}\nWhat was finished is kept; run the same command again to continue."
        ) from error


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


def check_models(config: PrepareConfig) -> None:
    """Loads the tokenizer and the KenLM model. Raises ConfigError when one cannot be read."""
    if config.tokenizer is not None:
        if models.is_missing_folder(config.tokenizer):
            raise ConfigError(
                f"tokenizer: there is no folder {config.tokenizer}; give the label model, or tokenizer=null"
            )
        models.require_on_hub(config.tokenizer, "tokenizer")
        _tokenizer(config.tokenizer)
    if config.filters.kenlm_path is not None:
        try:
            quality.perplexity("测试", config.filters.kenlm_path, config.filters.kenlm_units)
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"filters.kenlm_path: {config.filters.kenlm_path} cannot be read: {error}") from None


def fingerprint(config: PrepareConfig, files: list[tuple[CorpusConfig, CorpusFile]]) -> dict[str, Any]:
    """What decides this stage's output; `files` as list_corpora gives them."""
    plain = to_dict(config)
    listing = "\n".join(f"{corpus.name} {file.name} {file.size_bytes}" for corpus, file in files)
    corpora: dict[str, list[dict[str, Any]]] = {}
    for corpus in plain["corpora"]:  # several may have one name
        settings = {key: corpus[key] for key in ("format", "text_field", "title_field", "meta_fields")}
        corpora.setdefault(corpus["name"], []).append(settings)
    kenlm = config.filters.kenlm_path and models.file_digest(config.filters.kenlm_path)
    return {
        "corpora": {name: sorted(settings, key=json.dumps) for name, settings in corpora.items()},
        "input": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
        "tokenizer": config.tokenizer and models.model_digest(config.tokenizer),
        "filters": {**plain["filters"], "kenlm_path": kenlm},
        "dedup": {**plain["dedup"], "rows_per_task": None, "signatures": SIGNATURE_VERSION},  # memory, not result
    }


def _delete(folder: store.Folder) -> None:
    if folder.exists():
        folder.filesystem.delete_dir(folder.path)
