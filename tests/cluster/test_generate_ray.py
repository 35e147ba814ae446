"""The generate stage on a real Ray with fake engines: the chain, its bounds, its errors row by row."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import Any

import fake
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
from chains import Chain, ids

import kun_ray.generate
from kun_ray.board import new_board
from kun_ray.config import ConfigError, KunError
from kun_ray.generate import generate
from kun_ray.schema import DOCUMENT, with_steps


def test_the_full_chain_gives_every_row_once(cluster, documents, chain, capsys):
    """Two pools, rows of every fate. An accident in one row is that row's alone."""
    marks = {7: "bad", 8: "bad", 11: "cut", 12: "empty", 13: "error", 14: "void", 15: "nothing"}
    source = documents(600, marks, rejected=range(0, 600, 10), long=[16, 17])
    job = chain(source)
    summary = generate(job.config())

    assert ids(job.folder()) == ids(source)
    assert summary == job.folder().read_json("summary.json")
    assert summary["rows"] == summary["rows_in"] == 600 and summary["repeated_ids"] == 0
    for pool in ("label", "chat"):
        parts = summary["startup"]["pools"][pool]
        assert list(parts) == ["actor_s", "engine_s", "first_token_s", "first_row_s"] and min(parts.values()) >= 0
        assert sum(parts.values()) < summary["elapsed_s"]
    assert (summary["ok"], summary["rejected"], summary["failed"]) == (531, 62, 7)
    assert summary["reasons"] == {
        "rejected/too_short": 60,
        "rejected/verdict_bad": 2,
        "failed/engine_error": 2,
        "failed/unparsable": 2,
        "failed/over_context": 2,
        "failed/truncated": 1,
    }
    reasons = {int(row["title"]): row["reason"] for row in job.rows() if row["status"] == "failed"}
    assert [reasons[n] for n in range(11, 18)] == [
        "truncated",
        "unparsable",
        "engine_error",
        "engine_error",
        "unparsable",
        "over_context",
        "over_context",
    ]
    for row in job.rows():
        n = int(row["title"])
        if row["status"] == "ok":
            assert row["text"].startswith(f"第{n:04d}篇")
            assert row["instruction"] == f"请写出第{n:04d}篇的主要内容" and row["answer"].startswith(f"第{n:04d}篇")
            assert row["verdict"] == "好" and row["score"] == pytest.approx(0.75)
            assert row["polish_output_tokens"] == 7 and row["polish_finish_reason"] == "stop"
        else:
            assert row["text"] is None and row["answer"] is None
        if n % 10 == 0:
            assert (row["status"], row["reason"]) == ("rejected", "too_short") and row["label_prompt_tokens"] is None
        if n in (16, 17):
            assert row["label_prompt_tokens"] >= job.plan.context and row["label_output_tokens"] is None
    table = job.folder().dataset().to_table()
    assert table.schema.equals(with_steps(DOCUMENT, ["label", "score", "polish"]))
    sizes = sorted(pq.read_metadata(path).num_rows for path in job.folder().parts())
    assert all(32 <= size < 32 + 16 for size in sizes[1:]), "whole blocks of 16 rows at most; the last takes the rest"

    check_progress(job, capsys.readouterr().err)

    before = {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()}
    assert generate(job.config()) == summary
    assert "complete already; nothing to do" in capsys.readouterr().out
    assert {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()} == before


def check_progress(job: Chain, log: str) -> None:
    """metrics.jsonl and the lines of the log say how the run went."""
    lines = [json.loads(line) for line in Path(job.output, "metrics.jsonl").read_text().splitlines()]
    last = lines[-1]
    assert (last["rows_done"], last["rows_total"]) == (600, 600)
    assert (last["ok"], last["rejected"], last["failed"]) == (531, 62, 7)
    assert [line["rows_done"] for line in lines] == sorted(line["rows_done"] for line in lines)
    for name in ("label", "chat"):
        assert max(line["pools"][name]["prompt_tokens_per_s"] for line in lines) > 0
        assert max(line["pools"][name]["output_tokens_per_s"] for line in lines) > 0
        assert last["pools"][name]["rows"] == 600 and last["pools"][name]["in_flight"] == 0
    shown = [line for line in log.splitlines() if " rows (" in line]
    assert len(shown) == len(lines)
    assert re.match(r"0/600 rows \(0\.0%\) \| .*label loading \| chat loading \| ETA –$", shown[0]), shown[0]
    assert re.match(
        r"600/600 rows \(100\.0%\) \| ok 531 rejected 62 failed 7 \| [\d.,]+ rows/s \| label ×1: .* tok/s each",
        shown[-1],
    ), shown[-1]


def test_engines_stay_full_and_the_queue_between_pools_is_bounded(cluster, documents, chain, monkeypatch):
    """A fast label pool before a slow score pool in whose every block of four one row takes ten times as long."""
    source = documents(400, marks=dict.fromkeys(range(0, 400, 4), "slow"))
    job = chain(source, {"label": ["label"], "score": ["score"]}, by_step_s={"score": (0.06, 0.14)}, slow_s=1.0)
    small = [f"pools.{name}.{key}=4" for name in ("label", "score") for key in ("max_num_seqs", "rows_per_block")]
    config = job.config(*small, "max_waiting_rows=32")
    boards = []
    monkeypatch.setattr(kun_ray.generate, "new_board", lambda uri: boards.append(new_board(uri)) or boards[0])
    generate(config)
    assert ids(job.folder()) == ids(source)

    events = fake.read_journal(job.plan)
    pool = config.pools["score"]
    scored = [event for event in events if event["step"] == "score"]
    assert max(event["in_flight"] for event in scored) == pool.max_in_flight() == 5
    starts = [event["t"] for event in scored if event["event"] == "start"]
    assert mean_in_flight(scored, starts[100], starts[380]) > 0.75 * pool.max_in_flight()  # once workers have started

    # rows of label's tasks, rows that wait, rows of score's tasks, none of which need be in its engine yet
    blocks = (config.pools["label"].num_concurrent_blocks(), pool.num_concurrent_blocks(0.5))
    taken_in = sum(math.ceil(1.75 * concurrent) for concurrent in blocks) * pool.rows_per_block
    assert 32 < most_ahead(events) <= config.max_waiting_rows + taken_in < 150
    totals = ray.get(boards[0].snapshot.remote())
    assert [sum(replica.get("rows", 0) for replica in totals[name].values()) for name in ("label", "score")] == [
        400,
        400,
    ]


def mean_in_flight(events: list[dict[str, Any]], start: float, end: float) -> float:
    """Requests in the engine, averaged over time."""
    inside = [event for event in events if start <= event["t"] <= end]
    return sum(a["in_flight"] * (b["t"] - a["t"]) for a, b in itertools.pairwise(inside)) / (
        inside[-1]["t"] - inside[0]["t"]
    )


def most_ahead(events: list[dict[str, Any]]) -> int:
    """Most rows that were labelled but not yet being scored, at any moment."""
    steps = {("label", "end"): 1, ("score", "start"): -1}
    return max(itertools.accumulate(steps.get((event["step"], event["event"]), 0) for event in events))


def test_what_cannot_work_is_refused_before_anything_starts(cluster, documents, chain, monkeypatch):
    source = documents(20)
    job = chain(source)
    monkeypatch.setattr(kun_ray.generate, "new_board", lambda uri: pytest.fail("the run has begun"))
    started = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"needs 2 GPU, but the cluster has 0 .*set accelerator: cpu, or join a larger"
    ):
        generate(job.config("pools.label.accelerator=gpu", "pools.label.replicas=2"))
    with pytest.raises(ConfigError, match=r"needs 41 CPU, but the cluster has 8 .*lower replicas"):
        generate(job.config("pools.label.replicas=39"))
    with pytest.raises(KunError, match=r"another run's data:\n  steps.label.sampling.temperature: was 0.5, now 0.7"):
        generate(job.config("steps.label.sampling.temperature=0.7"))

    part = source.parts()[0]
    table = pq.read_table(part)
    strange = pc.if_else(pc.equal(table["title"], "3"), "dubious", table["status"])
    pq.write_table(table.set_column(table.schema.get_field_index("status"), "status", strange), part)
    with pytest.raises(ConfigError, match="rows of status {'dubious'}; kun_ray knows ok, rejected, failed"):
        generate(job.config())
    pq.write_table(pa.table({"text": ["文"], "doc_id": ["a"]}), part)
    with pytest.raises(ConfigError, match="has no column status, tokens"):
        generate(job.config())
    assert time.monotonic() - started < 120  # half a second on an idle machine
