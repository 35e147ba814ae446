"""The generate stage on a real Ray with fake engines: the chain, its bounds, its errors row by row."""

from __future__ import annotations

import itertools
import math
from typing import Any

import fake
import pytest
import ray
from conftest import ids

import kun_ray.generate
from kun_ray.generate import generate
from kun_ray.progress import new_board
from kun_ray.schema import DOCUMENT, with_steps


def test_the_full_chain_gives_every_row_once(cluster, documents, chain, capsys):
    source = documents(600, marks={7: "bad", 8: "bad", 9: "cut"}, rejected=range(0, 600, 10))
    job = chain(source)
    summary = generate(job.config())

    assert ids(job.folder()) == ids(source)
    assert summary == job.folder().read_json("summary.json")
    assert summary["rows"] == summary["rows_in"] == 600 and summary["duplicates"] == 0
    assert (summary["ok"], summary["rejected"], summary["failed"]) == (537, 62, 1)
    assert summary["reasons"] == {"rejected/too_short": 60, "rejected/verdict_bad": 2, "failed/truncated": 1}
    for row in job.rows():
        n = int(row["title"])
        if row["status"] == "ok":
            assert row["text"].startswith(f"第{n:04d}篇")
            assert row["instruction"] == f"请写出第{n:04d}篇的主要内容" and row["answer"].startswith(f"第{n:04d}篇")
            assert row["verdict"] == "好" and row["score"] == pytest.approx(0.75)
            assert row["polish_output_tokens"] == 7 and row["polish_finish_reason"] == "stop"
        else:
            assert row["text"] is None and row["answer"] is None
    table = job.folder().dataset().to_table()
    assert table.schema.equals(with_steps(DOCUMENT, ["label", "score", "polish"]))
    assert (job.folder().exists("_SUCCESS"), job.folder().exists("_checkpoint")) == (True, True)

    before = {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()}
    assert generate(job.config()) == summary
    assert "complete already; nothing to do" in capsys.readouterr().out
    assert {path: job.folder().filesystem.get_file_info(path).mtime for path in job.folder().parts()} == before


def test_engines_stay_full_and_the_queue_between_pools_is_bounded(cluster, documents, chain, monkeypatch):
    """A fast label pool before a slow score pool in whose every block of four one row takes ten times as long."""
    source = documents(400, marks=dict.fromkeys(range(0, 400, 4), "slow"))
    job = chain(source, {"label": ["label"], "score": ["score"]}, by_step_s={"score": (0.03, 0.07)}, slow_s=0.5)
    small = [f"pools.{name}.{key}=4" for name in ("label", "score") for key in ("max_num_seqs", "rows_per_block")]
    config = job.config(*small, "max_waiting_rows=32")
    boards = []
    monkeypatch.setattr(kun_ray.generate, "new_board", lambda: boards.append(new_board()) or boards[0])
    generate(config)
    assert ids(job.folder()) == ids(source)

    events = fake.read_journal(job.plan)
    pool = config.pools["score"]
    scored = [event for event in events if event["step"] == "score"]
    assert max(event["in_flight"] for event in scored) == pool.max_in_flight() == 5
    starts = [event["t"] for event in scored if event["event"] == "start"]
    print("MEAN", mean_in_flight(scored, starts[100], starts[380]), "AHEAD", most_ahead(events))
    assert mean_in_flight(scored, starts[100], starts[380]) > 0.75 * pool.max_in_flight()  # once workers have started

    queued_tasks = math.ceil(1.75 * pool.num_concurrent_blocks())  # what a pool may have taken in, each way
    limit = config.max_waiting_rows + 2 * queued_tasks * pool.rows_per_block
    assert 32 < most_ahead(events) <= limit < 150
    totals = ray.get(boards[0].snapshot.remote())
    assert [sum(replica["rows"] for replica in totals[name].values()) for name in ("label", "score")] == [400, 400]


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
