"""Meters through a real Ray: what a replica counts arrives at the node's Prometheus endpoint, under the dashboard's names."""

from __future__ import annotations

import json
import re
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import ray
import ray.data

from kun_ray import metrics
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


class Replica:
    """A replica's process: two reports, with what an engine says in between."""

    def __init__(self, name: str) -> None:
        self._meters, self._stats = Meters("label", name), EngineStats()

    def work(self) -> None:
        cache = types.SimpleNamespace(queries=100, hits=75)
        step = types.SimpleNamespace(
            num_running_reqs=4, num_waiting_reqs=2, kv_cache_usage=0.5, prefix_cache_stats=cache
        )
        done = types.SimpleNamespace(e2e_latency=3.0, num_generation_tokens=40)
        logger = self._stats.stat_logger(None)
        logger.record(step, types.SimpleNamespace(num_preempted_reqs=1, finished_requests=[done]), engine_idx=0)
        self._meters.update({"ok": 3, "prompt_tokens": 100, "in_flight": 6, "load_s": 20}, self._stats)
        logger.record(step, None)
        self._meters.update({"ok": 10, "failed": 1, "prompt_tokens": 150, "in_flight": 5, "load_s": 20}, self._stats)


def test_what_replicas_count_arrives_at_the_prometheus_endpoint(cluster: None) -> None:
    replicas = [ray.remote(Replica).options(num_cpus=0).remote(name) for name in ("a", "b")]
    ray.get([replica.work.remote() for replica in replicas])
    expected = {
        ("ray_kun_ray_rows_total", "label", "ok"): 20, ("ray_kun_ray_rows_total", "label", "failed"): 2,
        ("ray_kun_ray_prompt_tokens_total", "label", ""): 300, ("ray_kun_ray_rows_in_flight", "label", ""): 10,
        ("ray_kun_ray_prefix_cache_queries_total", "label", ""): 400, ("ray_kun_ray_prefix_cache_hits_total", "label", ""): 300,
        ("ray_kun_ray_preemptions_total", "label", ""): 2, ("ray_kun_ray_kv_cache_usage", "label", ""): 1.0,
        ("ray_kun_ray_requests_waiting", "label", ""): 4, ("ray_kun_ray_request_seconds_bucket", "label", "2.5"): 0,
        ("ray_kun_ray_request_seconds_bucket", "label", "5.0"): 2,
    }  # fmt: skip
    found: dict[Any, float] = {}
    deadline = time.monotonic() + 60  # Ray exports every ten seconds
    while time.monotonic() < deadline and any(found.get(key) != value for key, value in expected.items()):
        time.sleep(1)
        found = scrape()
    assert {key: found.get(key) for key in expected} == expected


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
