"""Meters through a real Ray: what a replica counts arrives at the node's Prometheus endpoint, under the dashboard's names."""

from __future__ import annotations

import json
import re
import threading
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data

from kun_ray import metrics
from kun_ray.generate import generate
from kun_ray.metrics import EngineStats, Meters, shown_as

DASHBOARD = Path(__file__).parents[2] / "docs/grafana/kun_ray.json"


def scrape() -> dict[tuple[str, str, str], float]:
    """(metric, pool, status or bucket) → value, summed over replicas, as Prometheus would read it here."""
    port = ray.nodes()[0]["MetricsExportPort"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str, str], float] = {}
    for name, labels, value in re.findall(r"^(ray_kun_ray\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        key = (name, tags["pool"], tags.get("status", tags.get("le", "")))
        found[key] = found.get(key, 0) + float(value)
    return found


def test_a_runs_pools_are_at_the_prometheus_endpoint(cluster: None, documents: Any, chain: Any) -> None:
    """While it runs, under names that no other test's pools have: a node keeps those of processes that have just gone."""
    job = chain(documents(300), {"asking": ["label"], "judging": ["score", "polish"]}, service_s=(0.8, 1.0))
    seen: dict[Any, float] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1.0):
            seen.update({key: max(value, seen.get(key, 0)) for key, value in scrape().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        generate(job.config())
    finally:
        ended.set()
        watcher.join()
    for pool in ("asking", "judging"):
        assert 0 < seen["ray_kun_ray_rows_total", pool, "ok"] <= 300
        assert 0 < seen["ray_kun_ray_rows_in_flight", pool, ""] <= 18
        assert seen["ray_kun_ray_output_tokens_total", pool, ""] >= 7


def test_what_an_engine_says_becomes_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float]] = []
    for kind, call in ((metrics.Counter, "inc"), (metrics.Gauge, "set"), (metrics.Histogram, "observe")):
        monkeypatch.setattr(kind, call, lambda self, value, tags: told.append((self.info["name"], value)))
    stats, meters = EngineStats(), Meters("label", "a")
    cache = types.SimpleNamespace(queries=100, hits=75)
    step = types.SimpleNamespace(num_running_reqs=4, num_waiting_reqs=2, kv_cache_usage=0.5, prefix_cache_stats=cache)
    done = types.SimpleNamespace(e2e_latency=3.0, num_generation_tokens=40)
    logger = stats.stat_logger(None)
    prefill = types.SimpleNamespace(num_preempted_reqs=0, finished_requests=[], num_generation_tokens=0)
    logger.record(None, prefill)
    assert (stats.num_steps, stats.first_token_at) == (1, None)
    decoded = types.SimpleNamespace(num_preempted_reqs=1, finished_requests=[done], num_generation_tokens=4)
    logger.record(step, decoded, engine_idx=0)
    assert stats.num_steps == 2 and stats.first_token_at is not None
    meters.update({"ok": 3, "prompt_tokens": 100, "in_flight": 6}, stats)
    logger.record(step, None)
    idle = types.SimpleNamespace(**{**vars(step), "num_running_reqs": 0, "prefix_cache_stats": None})
    logger.record(idle, None)
    assert stats.num_steps == 3, "an engine that has requests and runs none of them shows no life"
    meters.update({"ok": 10, "failed": 1, "prompt_tokens": 150, "in_flight": 5}, stats)
    sums = {name: sum(value for of, value in told if of == name) for name, _ in told}
    assert (sums["kun_ray_rows"], sums["kun_ray_prompt_tokens"], sums["kun_ray_preemptions"]) == (11, 150, 1)
    assert (sums["kun_ray_prefix_cache_queries"], sums["kun_ray_prefix_cache_hits"]) == (200, 150)
    assert (sums["kun_ray_request_seconds"], sums["kun_ray_request_output_tokens"]) == (3.0, 40)
    assert ("kun_ray_kv_cache_usage", 0.5) in told and ("kun_ray_requests_waiting", 2) in told


def test_a_pool_is_shown_by_its_name_and_steps(cluster: None) -> None:
    class AnyPool:
        async def __call__(self, block: Any) -> Any:
            yield block

    for name, steps, shown in (("label", ["label"], "label"), ("chat", ["score", "polish"], "chat: score, polish")):
        dataset = ray.data.range(4).map_batches(shown_as(AnyPool, name, steps), concurrency=1, batch_format="pyarrow")
        assert f"MapBatches({shown})" in repr(dataset.explain()) + str(dataset._logical_plan.dag)


def test_the_dashboard_shows_every_metric_and_asks_for_no_other() -> None:
    asked = set(re.findall(r"ray_kun_ray_\w+", DASHBOARD.read_text()))
    counters = [metrics.ROWS, *metrics.TOTALS.values()]
    exist = {f"ray_{name}_total" for name, _ in counters} | {f"ray_{name}" for name, _ in metrics.CURRENT.values()}
    exist |= {f"ray_{name}_bucket" for name, _ in (metrics.REQUEST_SECONDS, metrics.REQUEST_TOKENS)}
    assert asked == exist


def test_every_panel_of_the_dashboard_has_a_title_a_query_and_a_place_of_its_own() -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert all(panel["title"] and panel["description"] and panel["targets"] for panel in panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
