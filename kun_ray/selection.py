"""Which finished rows become training data: the first of export's two passes over a generate stage.

`export.export` calls it. It reads every row once but keeps only a few numbers of each ok row (about 60 bytes; a million
rows fit in 60 MB), decides the fate of every row, and never writes anything.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kun_ray.config import KunError, one_of, require
from kun_ray.inspection import masked_kinds
from kun_ray.schema import DOCUMENT, OK, STEP_RESULTS, with_steps
from kun_ray.store import Folder

EXPORTED, EMPTY, BELOW_THRESHOLD, OVER_QUOTA, BEYOND_TOP_K, CONTAMINATED = range(6)
FATES: Final = ("exported", "empty", "below_threshold", "over_quota", "beyond_top_k", "contaminated")
"""What becomes of an ok row. `empty`: its instruction or its reply is blank, so there is nothing to train on.
`contaminated`: it shares words with a question of an examination."""
TRAIN, VALID = 1, 2
SPLITS: Final = {"train": TRAIN, "valid": VALID}

_TYPES: Final = {field.name: field.type for field in with_steps(DOCUMENT, list(STEP_RESULTS))}

Array = np.ndarray[Any, Any]


@dataclasses.dataclass
class SelectionConfig:
    """Which of the ok rows to export: threshold first, then quotas, then top_k."""

    threshold: float | None = None
    """Least score that a row needs (0–1); null takes every ok row."""
    top_k: int | None = None
    """Most rows to export over all sources and both splits; null sets no bound."""
    quotas: dict[str, float] = dataclasses.field(default_factory=dict)
    """Most rows per source: up to 1 is a share of top_k (of all rows over the threshold if top_k is null), above 1 a
    count of rows, 0 leaves the source out; a source that is not named has no bound."""
    select: str = "top"
    """Which rows stay when a quota or top_k cuts: `top` takes the best scores, `random` any (for an ablation)."""
    seed: int = 0
    """Seed of `select=random`: the same seed takes the same rows, whatever their order in the input."""

    def __post_init__(self) -> None:
        one_of("selection.select", self.select, ("top", "random"))
        require(
            self.top_k is None or self.top_k > 0,
            f"`selection.top_k` is {self.top_k}, but must be at least 1 (null: all)",
        )
        for source, quota in self.quotas.items():
            require(quota >= 0, f"`selection.quotas.{source}` is {quota}, but must not be negative")
            require(
                quota <= 1 or quota == int(quota),
                f"`selection.quotas.{source}` is {quota}: give a share up to 1 or a whole number of rows",
            )

    def needs_score(self) -> bool:
        """Whether these settings compare scores at all."""
        return self.threshold is not None or (self.select == "top" and (self.top_k is not None or bool(self.quotas)))


@dataclasses.dataclass(frozen=True)
class Scan:
    """What one pass over a stage keeps: a count of every row, and seven columns of the ok rows."""

    num_rows: int
    counts: Counter[tuple[str, str, str | None]]
    """(source, status, reason) → rows."""
    sources: list[str]
    position: Array
    """int64 [ok rows]: the row's number in the folder, its parts in order."""
    doc_id: Array
    source: Array
    """int32 [ok rows]: index into `sources`."""
    score: Array
    """float32 [ok rows]: NaN where there is none."""
    instruction_chars: Array
    reply_chars: Array
    masked: Array
    """uint8 [ok rows]: kinds of personal data masked in the document (`inspection.masked_kinds`)."""


def read_batches(folder: Folder, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The stage's rows in a fixed order, a few thousand at a time: no more than one row group is in memory.

    Known columns come in the types of the row contract, whatever type a part gave a column that is null throughout.
    """
    for part in folder.parts():
        with folder.filesystem.open_input_file(part) as file, pq.ParquetFile(file) as parquet:
            missing = set(columns) - set(parquet.schema_arrow.names)
            if missing:
                raise KunError(
                    f"{part} has no column {', '.join(sorted(missing))}, which the other parts have: run generate again"
                )
            schema = pa.schema(
                [pa.field(name, _TYPES.get(name, parquet.schema_arrow.field(name).type)) for name in columns]
            )
            for batch in parquet.iter_batches(batch_size=2048, columns=columns):
                yield batch.select(columns).cast(schema)


def column_names(folder: Folder) -> list[str]:
    """The columns of the stage's first part."""
    with folder.filesystem.open_input_file(folder.parts()[0]) as file:
        return list(pq.read_schema(file).names)


def scan(folder: Folder, reply: str, has_score: bool) -> Scan:
    """Counts every row and keeps what `choose` needs of the ok rows; `reply` names the column that holds the reply.

    Raises:
        KunError: a doc_id occurs twice among the ok rows, so the input is not a stage that kun_ray finished.
    """
    columns = ["doc_id", "source", "status", "reason", "instruction", reply, "meta", *(["score"] if has_score else [])]
    counts: Counter[tuple[str, str, str | None]] = Counter()
    codes: dict[str, int] = {}
    kept: list[tuple[Array, ...]] = []
    num_rows = 0
    for batch in read_batches(folder, columns):
        for group in (
            pa.table(batch).group_by(["source", "status", "reason"]).aggregate([([], "count_all")]).to_pylist()
        ):
            counts[group["source"], group["status"], group["reason"]] += group["count_all"]
            codes.setdefault(group["source"], len(codes))
        is_ok = pc.equal(batch["status"], pa.scalar(OK))
        rows = batch.filter(is_ok)
        ids: list[Any] = rows["doc_id"].to_pylist()
        of: list[Any] = rows["source"].to_pylist()
        score = rows["score"] if has_score else pa.nulls(rows.num_rows, pa.float32())
        kept.append(
            (
                num_rows + np.flatnonzero(is_ok.to_numpy(zero_copy_only=False)),
                np.array([doc_id.encode() for doc_id in ids], dtype=np.bytes_),
                np.array([codes[source] for source in of], dtype=np.int32),
                np.array(score.to_numpy(zero_copy_only=False), dtype=np.float32),
                _num_chars(rows["instruction"]),
                _num_chars(rows[reply]),
                masked_kinds(rows["meta"]),
            )
        )
        num_rows += batch.num_rows
    found = [np.concatenate(column) for column in zip(*kept, strict=True)] if kept else [np.empty(0)] * 7
    _refuse_twice(folder, found[1])
    return Scan(num_rows, counts, list(codes), *found)


def choose(rows: Scan, config: SelectionConfig, contaminated: Array | None = None) -> Array:
    """The fate of every ok row: an index into FATES, uint8 [ok rows].

    Deterministic and independent of the order of rows: equal scores are ordered by doc_id, a missing score comes last.

    Args:
        contaminated: rows to leave out before quotas and top_k, bool [ok rows].
    Raises:
        KunError: a quota names a source that the input does not have.
    """
    unknown = sorted(set(config.quotas) - set(rows.sources))
    if unknown:
        known = ", ".join(sorted(rows.sources))
        raise KunError(f"selection.quotas names {', '.join(unknown)}, but the sources of the input are {known}")
    fates = np.full(len(rows.doc_id), EXPORTED, dtype=np.uint8)
    if config.threshold is not None:
        # a float32 score of 0.9 is less than Python's 0.9: compare as the scores were stored
        fates[~(rows.score >= np.float32(config.threshold))] = BELOW_THRESHOLD
    fates[(rows.instruction_chars == 0) | (rows.reply_chars == 0)] = EMPTY
    if contaminated is not None:
        fates[contaminated] = CONTAMINATED
    if config.top_k is None and not config.quotas:
        return fates
    order = _best_first(rows, config)
    order = order[fates[order] == EXPORTED]
    whole = len(order) if config.top_k is None else config.top_k
    for source, quota in config.quotas.items():
        mine = order[rows.source[order] == rows.sources.index(source)]
        fates[mine[math.ceil(quota * whole - 1e-9) if quota <= 1 else int(quota) :]] = OVER_QUOTA
    order = order[fates[order] == EXPORTED]
    fates[order[config.top_k :] if config.top_k is not None else []] = BEYOND_TOP_K
    return fates


def split(rows: Scan, fates: Array, valid_fraction: float) -> Array:
    """The split of every row of the input, int8 [rows]: TRAIN, VALID, or 0 for a row that is not exported."""
    splits = np.zeros(rows.num_rows, dtype=np.int8)
    exported = np.flatnonzero(fates == EXPORTED)
    is_valid = [in_valid(doc_id, valid_fraction) for doc_id in rows.doc_id[exported]]
    splits[rows.position[exported]] = np.where(is_valid, VALID, TRAIN)
    return splits


def in_valid(doc_id: bytes, valid_fraction: float) -> bool:
    """Whether a document is in the validation split: its id alone decides, so no other export moves it to train."""
    return _hash(b"kun_ray.valid", doc_id) < valid_fraction * 2**64


def not_exported(rows: Scan, fates: Array) -> dict[str, int]:
    """Rows that stay behind, by reason: `not_ok` (rejected or failed in generate) and the fates of ok rows."""
    counts = np.bincount(fates, minlength=len(FATES))
    return {"not_ok": rows.num_rows - len(fates), **{FATES[code]: int(counts[code]) for code in range(1, len(FATES))}}


def _best_first(rows: Scan, config: SelectionConfig) -> Array:
    if config.select == "random":
        salt = f"kun_ray.{config.seed}".encode()
        rank: Array = np.fromiter((_hash(salt, doc_id) for doc_id in rows.doc_id), np.uint64, len(rows.doc_id))
    else:
        rank = -np.nan_to_num(rows.score, nan=-np.inf)
    order: Array = np.lexsort((rows.doc_id, rank))
    return order


def _hash(salt: bytes, doc_id: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(doc_id, digest_size=8, key=salt).digest(), "big")


def _num_chars(column: Any) -> Array:
    lengths = pc.fill_null(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
    return np.array(lengths.to_numpy(zero_copy_only=False), dtype=np.int32)


def _refuse_twice(folder: Folder, doc_id: Array) -> None:
    ids, counts = np.unique(doc_id, return_counts=True)
    if len(ids) < len(doc_id):
        twice = ids[counts > 1]
        raise KunError(
            f"{folder.uri}: {len(twice)} documents occur more than once, such as {twice[0].decode()}: "
            "a finished stage holds each once; was a part copied into the folder? Run generate again into a new folder"
        )
