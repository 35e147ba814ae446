"""What a stage has cost is summed over all its runs, and the progress line spans them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from kun_ray.board import Counters
from kun_ray.counts import count_statuses
from kun_ray.ledger import Ledger
from kun_ray.progress import Monitor, describe
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps
from kun_ray.store import Folder


def stage(path: Path, output_tokens: list[int | None]) -> Folder:
    path.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = [
        {
            "doc_id": doc_id("s", "f", n, ""),
            "source": "s",
            "label_output_tokens": tokens,
            "status": "ok" if tokens else "failed",
        }
        for n, tokens in enumerate(output_tokens)
    ]
    pq.write_table(to_table(rows, with_steps(DOCUMENT, ["label"])), path / "part-0.parquet")
    return Folder(str(path))


def test_runs_add_up(tmp_path: Path) -> None:
    folder = stage(tmp_path, [10, 20, None])
    first = Ledger(folder)
    first.note({"p": {"output_tokens": 5, "restarts": 1, "in_flight": 7, "replicas": 1}})
    first.note({"p": {"output_tokens": 25, "restarts": 1, "hangs": 1, "in_flight": 7}})
    second = Ledger(folder)
    second.note({"p": {"output_tokens": 15, "in_flight": 2}})
    summary = second.summary(folder, ["label"], 3)
    assert {key: summary[key] for key in ("runs", "restarts", "hangs", "output_tokens", "useful_output_tokens")} == {
        "runs": 2,
        "restarts": 1,
        "hangs": 1,
        "output_tokens": 40,
        "useful_output_tokens": 30,
    }
    assert summary["tokens_redone"] == 10 and summary["goodput"] == 0.75
    assert summary["pools"]["p"] == {"output_tokens": 40, "restarts": 1, "hangs": 1, "in_flight": 2}
    assert summary["elapsed_s"] >= 0 and summary["rows_per_s"] > 0


def test_what_a_killed_run_could_not_note_is_in_its_rows(tmp_path: Path) -> None:
    folder = stage(tmp_path, [10, 20, None])
    Ledger(folder).note({"p": {"output_tokens": 12}})  # and killed
    summary = Ledger(folder).summary(folder, ["label"], 3)
    assert (summary["output_tokens"], summary["useful_output_tokens"], summary["tokens_redone"]) == (30, 30, 0)


def test_counters_that_are_0_stay(tmp_path: Path) -> None:
    book = Ledger(stage(tmp_path, [1]))
    book.note({"p": {"answered": 3, "cached_tokens": 0}})
    assert book.summary(Folder(str(tmp_path)), ["label"], 1)["pools"]["p"] == {"answered": 3, "cached_tokens": 0}


def test_a_stage_without_tokens(tmp_path: Path) -> None:
    summary = Ledger(stage(tmp_path, [None])).summary(stage(tmp_path, [None]), ["label"], 1)
    assert (summary["goodput"], summary["tokens_redone"], summary["runs"]) == (1.0, 0, 1)
    assert count_statuses(Folder(str(tmp_path))) == {"ok": 0, "rejected": 0, "failed": 1}
    assert count_statuses(Folder(str(tmp_path / "none"))) == {"ok": 0, "rejected": 0, "failed": 0}


def test_the_progress_line_spans_the_runs(tmp_path: Path) -> None:
    folder = stage(tmp_path, [10])
    Ledger(folder).note({"label": {"rows": 8, "output_tokens": 100}, "chat": {"rows": 6}})
    monitor = Monitor(None, folder, ["label", "chat"], 10, {"ok": 4, "rejected": 2, "failed": 0}, 5.0, Ledger(folder))
    now = {"label": {"rows": 4, "output_tokens": 7}, "chat": {"rows": 2, "ok": 1, "failed": 1, "replicas": 1}}
    monitor._history.append((0.0, {}))
    line = monitor._line(10.0, now)
    assert (line["rows_done"], line["ok"], line["rejected"], line["failed"]) == (8, 5, 2, 1)
    assert line["pools"]["label"] | {"rows": 12, "output_tokens": 107} == line["pools"]["label"]
    assert line["pools"]["label"]["output_tokens_per_s"] == pytest.approx(0.7)
    assert "label finished" in describe(line) and "chat ×1" in describe(line)


def test_a_pool_whose_engines_load_is_not_finished_whatever_earlier_runs_did(tmp_path: Path) -> None:
    """Ten rows, all labelled by a run that was killed when six were written."""
    folder = stage(tmp_path, [10])
    Ledger(folder).note({"label": {"rows": 10}, "chat": {"rows": 7}})
    monitor = Monitor(None, folder, ["label", "chat"], 10, {"ok": 6, "rejected": 0, "failed": 0}, 5.0, Ledger(folder))
    monitor._history.append((0.0, {}))
    assert "label loading | chat loading" in describe(monitor._line(1.0, {}))
    loaded: dict[str, Counters] = {"label": {"rows": 0, "replicas": 1}}
    assert "label ×1" in describe(monitor._line(2.0, loaded)) and "chat loading" in describe(monitor._line(2.0, loaded))
    died = {"label": {"rows": 3, "replicas": 0}, "chat": {"rows": 0, "replicas": 1}}
    assert "label loading | chat ×1" in describe(monitor._line(3.0, died)), "its replica is being replaced"
    assert "label finished" in describe(monitor._line(4.0, {**died, "label": {"rows": 4}}))


def test_no_eta_before_the_pace_is_steady(tmp_path: Path) -> None:
    """Engines load for 55 s; then 10 rows come out each second, after a first block of 64."""
    monitor = Monitor(None, Folder(str(tmp_path)), ["p"], 10_000, {"ok": 0, "rejected": 0, "failed": 0}, 5.0)
    etas = {}
    for now in range(0, 180, 5):
        totals: dict[str, Counters] = {"p": {"rows": 64 + 10 * (now - 55), "replicas": 1}} if now >= 55 else {}
        monitor._history.append((float(now), totals))
        etas[now] = monitor._line(float(now), totals)["eta_s"]
    assert [now for now, eta in etas.items() if eta is None] == list(range(0, 75, 5))
    assert all(eta == pytest.approx((10_000 - 64) / 10 - (now - 55), abs=1) for now, eta in etas.items() if eta)


def test_few_rows_give_no_eta_however_long_they_take(tmp_path: Path) -> None:
    monitor = Monitor(None, Folder(str(tmp_path)), ["p"], 1_000, {"ok": 0, "rejected": 0, "failed": 0}, 5.0)
    found = []
    for now, rows in ((0, 1), (30, 5), (60, 10), (90, 11), (120, 16)):
        monitor._history.append((float(now), {"p": {"rows": rows}}))
        found.append(monitor._line(float(now), {"p": {"rows": rows}})["eta_s"])
    assert found == [None, None, None, 8901, 7872], "1 % of a thousand rows after the first one"
