"""One pass over a stage's rows: what became of them, distributions, openings of instructions, and a sample of ids.

`report` calls survey() once a run. It streams: a batch of 4,096 rows, counters, histograms of fixed size and the sample's
ids are all that is ever held, so a folder of 10 M rows needs no more memory than one of 10 k.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kun_ray.report.openings import count_openings
from kun_ray.report.runs import Stage
from kun_ray.report.sample import StratifiedSample, hex_ids
from kun_ray.scan import U64, doc_ids
from kun_ray.schema import DOCUMENT, FAILED, OK, STEP_RESULTS, with_steps

BATCH_ROWS: Final = 4096
MAX_TAGGED: Final = 500_000
"""Instructions whose openings are counted, spread evenly over the folder; more would only grow the counter."""
MAX_FOUND: Final = 50
"""Rows that one `find` adds to the sample."""
READ, FILTER, DEDUP = "read", "filter", "dedup"
PREPARE_STEPS: Final = (READ, FILTER, DEDUP)
RAISED: Final = ("engine_error", "quarantined")
"""Reasons of a step that wrote nothing: it is the one behind the last that wrote its token counts."""

_TYPES: Final = {field.name: field.type for field in with_steps(DOCUMENT, list(STEP_RESULTS))}
_COLUMNS: Final = ("doc_id", "source", "status", "reason", "tokens", "perplexity", "score", "instruction", "answer")
_SEARCHED: Final = ("doc_id", "title", "meta", "text", "instruction", "answer")

Array = np.ndarray[Any, Any]


class Histogram:
    """Counts in fixed bins; values outside fall into the first or last one."""

    def __init__(self, edges: Array) -> None:
        self.edges = edges
        self.counts = np.zeros(len(edges) - 1, np.int64)

    def add(self, values: Array) -> None:
        inside = np.clip(values[np.isfinite(values)], self.edges[0], self.edges[-1])
        self.counts += np.histogram(inside, self.edges)[0]

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def percentile(self, percent: float) -> float:
        """The lower edge of the bin that holds it: exact for whole numbers in bins of width 1."""
        if not self.total:
            return float("nan")
        reached = np.searchsorted(np.cumsum(self.counts), max(1, np.ceil(percent / 100 * self.total)))
        return float(self.edges[reached])


def new_histograms() -> dict[str, Histogram]:
    """tokens and characters in bins of 1 up to 16,384; score in thousandths; perplexity in bins of 1.4 %."""
    whole = np.arange(16_386, dtype=np.float64)
    return {
        "tokens": Histogram(whole),
        "perplexity": Histogram(np.geomspace(1, 1e9, 1501)),
        "score": Histogram(np.linspace(0, 1, 1001)),
        "instruction": Histogram(whole),
        "answer": Histogram(whole),
    }


@dataclasses.dataclass
class Survey:
    """What one pass over a stage's rows keeps."""

    counts: Counter[tuple[str, str, str, str]]
    """(source, status, reason, step) → rows. `step` is what settled the row: read, filter, dedup, or an engine's step;
    "" for ok rows."""
    steps: list[str]
    """Every step of the chain, in the order in which rows passed them: read, filter, dedup, label, score, …"""
    histograms: dict[str, Histogram]
    """`tokens` and `perplexity` of every row where they were measured, `score` of every scored one; characters of
    `instruction` and `answer` of ok rows."""
    openings: Counter[tuple[str, str]]
    sample: StratifiedSample
    found: list[str]
    """doc_ids of rows that hold one of the texts looked for."""

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def num(self, status: str | None = None, source: str | None = None) -> int:
        """Rows of a status, of a source, or both."""
        return sum(n for (s, t, _, _), n in self.counts.items() if status in (None, t) and source in (None, s))


def survey(stage: Stage, sample_size: int, find: list[str]) -> Survey:
    """Reads every row of a stage once.

    Args:
        stage: prepare or generate; the last of its chain, for all that became of a row is in it.
        sample_size: ids kept per stratum (status, reason, step, source).
        find: texts; rows that hold one of them anywhere are listed in `found`.
    """
    paths = stage.folder.parts()
    steps: dict[str, None] = dict.fromkeys(PREPARE_STEPS)
    histograms = new_histograms()
    result = Survey(Counter(), [], histograms, Counter(), StratifiedSample(sample_size), [])
    share = min(1.0, MAX_TAGGED / max(1, _count_rows(stage, paths)))
    tagged_below = np.uint64(min(int(share * 2**64), 2**64 - 1))
    hits: Counter[str] = Counter()
    for path in paths:
        with stage.folder.filesystem.open_input_file(path) as file, pq.ParquetFile(file) as parquet:
            names = parquet.schema_arrow.names
            engine_steps = [name.removesuffix("_prompt_tokens") for name in names if name.endswith("_prompt_tokens")]
            steps |= dict.fromkeys(engine_steps)
            columns = [*_COLUMNS, *(f"{step}_prompt_tokens" for step in engine_steps), *(_SEARCHED if find else ())]
            columns = [name for name in dict.fromkeys(columns) if name in names]
            for batch in parquet.iter_batches(BATCH_ROWS, columns=columns):
                rows = _typed(batch)
                ids = doc_ids(pa.chunked_array([rows["doc_id"]]))
                _count(result, rows, ids, engine_steps)
                _measure(histograms, rows)
                is_tagged = pa.array(ids[:, 0] <= tagged_below)
                chosen = pc.and_(pc.equal(rows["status"], pa.scalar(OK)), is_tagged)
                if "instruction" in rows.schema.names:
                    result.openings += count_openings(rows["instruction"].filter(chosen).drop_null().to_pylist())
                _find(result, rows, ids, find, hits)
    result.steps.extend(steps)
    return result


def prepare_step(status: str, reason: str) -> str:
    """Which part of prepare gives a row this reason."""
    if status == FAILED:
        return READ
    return DEDUP if reason in ("duplicate", "near_duplicate") else FILTER


def _count_rows(stage: Stage, paths: list[str]) -> int:
    total = 0
    for path in paths:
        with stage.folder.filesystem.open_input_file(path) as file:
            total += pq.read_metadata(file).num_rows
    return total


def _typed(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The batch in the types of the row contract: a column that is null throughout a file may have lost its own."""
    columns = [
        column.cast(_TYPES[name]) if name in _TYPES and column.type != _TYPES[name] else column
        for name, column in zip(batch.schema.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _count(result: Survey, rows: pa.RecordBatch, ids: U64, engine_steps: list[str]) -> None:
    reached = np.full(len(rows), -1)
    for number, step in enumerate(engine_steps):
        reached[np.asarray(pc.is_valid(rows[f"{step}_prompt_tokens"]))] = number
    reached[np.asarray(pc.is_in(rows["reason"], value_set=pa.array(RAISED)))] += 1
    keys = pa.table(
        {
            "source": rows["source"],
            "status": rows["status"],
            "reason": pc.fill_null(rows["reason"], ""),
            "reached": np.minimum(reached, len(engine_steps) - 1),
            "row": np.arange(len(rows)),
        }
    )
    groups = keys.group_by(["source", "status", "reason", "reached"]).aggregate([("row", "list")])
    for group in groups.to_pylist():
        source, status, reason, number = (group[name] for name in ("source", "status", "reason", "reached"))
        step = engine_steps[number] if number >= 0 else prepare_step(status, reason)
        step = "" if status == OK else step
        result.counts[source, status, reason, step] += len(group["row_list"])
        result.sample.add((status, reason, step, source), ids[group["row_list"]])


def _measure(histograms: dict[str, Histogram], rows: pa.RecordBatch) -> None:
    is_ok = pc.equal(rows["status"], pa.scalar(OK))
    for name, histogram in histograms.items():
        if name not in rows.schema.names:
            continue
        column = rows[name]
        if pa.types.is_string(column.type):
            column = pc.utf8_length(column.filter(is_ok))
        histogram.add(column.drop_null().to_numpy(zero_copy_only=False).astype(np.float64))


def _find(result: Survey, rows: pa.RecordBatch, ids: U64, find: list[str], hits: Counter[str]) -> None:
    for text in find:
        if hits[text] >= MAX_FOUND:
            continue
        matches = np.zeros(len(rows), bool)
        for name in _SEARCHED:
            if name in rows.schema.names:
                matches |= np.asarray(pc.fill_null(pc.match_substring(rows[name], text), False))
        numbers = np.flatnonzero(matches)[: MAX_FOUND - hits[text]]
        hits[text] += len(numbers)
        result.found.extend(hex_ids(ids[numbers]))
