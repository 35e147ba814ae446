"""A pool's counters as Ray metrics, which every node of a cluster offers to Prometheus (docs/operations.md, "Metrics").

A Pool holds one Meters and hands it, once a second, the counters that it reports to the Board anyway. What happens
inside an engine (KV cache, preemptions, prefix cache, waiting requests) vLLM tells EngineStats. Neither touches rows.
"""

from __future__ import annotations

import collections
import time
from typing import Any, Final

from ray.util.metrics import Counter, Gauge, Histogram

from kun_ray.schema import FAILED, OK, REJECTED

TOTALS: Final = {
    "prompt_tokens": ("kun_ray_prompt_tokens", "Prompt tokens of this pool's requests, cached ones too."),
    "output_tokens": ("kun_ray_output_tokens", "Tokens that this pool's engines have decoded."),
    "preemptions": ("kun_ray_preemptions", "Requests that an engine put back because its KV cache was full."),
    "prefix_cache_queries": ("kun_ray_prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."),
    "prefix_cache_hits": ("kun_ray_prefix_cache_hits", "Prompt tokens that were found in the prefix cache."),
}
"""Counters of a replica that only grow: its name → the metric's name and description."""
CURRENT: Final = {
    "in_flight": ("kun_ray_rows_in_flight", "Rows that this replica has given to its engine."),
    "load_s": ("kun_ray_load_seconds", "Seconds that this replica took to load its engine."),
    "running": ("kun_ray_requests_running", "Requests that the engine decodes now."),
    "waiting": ("kun_ray_requests_waiting", "Requests that wait inside the engine."),
    "kv_cache_usage": ("kun_ray_kv_cache_usage", "Part of the engine's KV cache that is in use, 0 to 1."),
}
"""Counters of a replica that say how things are now."""
ROWS: Final = ("kun_ray_rows", "Rows that have left this pool, by status.")
REQUEST_SECONDS: Final = ("kun_ray_request_seconds", "Seconds from a request's arrival in the engine to its end.")
REQUEST_TOKENS: Final = ("kun_ray_request_output_tokens", "Tokens decoded for one request.")
SECONDS_BOUNDARIES: Final = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0]
TOKENS_BOUNDARIES: Final = [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0]
TAGS: Final = ("pool", "replica")
MAX_FINISHED: Final = 100_000
"""Ended requests that EngineStats keeps for a Meters."""


class EngineStats:
    """What one vLLM engine says of itself, collected between two updates of a Meters.

    Give `stat_logger` to AsyncLLM (`stat_loggers=[stats.stat_logger]`); vLLM then calls record() after every step. vLLM
    has a logger for Ray of its own, but that one needs all of Ray Serve.
    """

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        """Those of TOTALS and CURRENT that vLLM knows."""
        self.num_steps = 0
        """Steps that the engine has told of, but for those in which it had nothing to run."""
        self.first_token_at: float | None = None
        """When its first token came out, seconds since the epoch."""
        self._finished: collections.deque[tuple[float, int]] = collections.deque(maxlen=MAX_FINISHED)

    def stat_logger(self, vllm_config: Any, engine_index: int = 0) -> EngineStats:
        """vLLM's factory of a logger for one engine."""
        return self

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """Takes vLLM's SchedulerStats and IterationStats of one step; either may be None."""
        self.num_steps += iteration_stats is not None or bool(scheduler_stats and scheduler_stats.num_running_reqs)
        if scheduler_stats is not None:
            cache = scheduler_stats.prefix_cache_stats
            waiting = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
            self.counters |= {
                "running": scheduler_stats.num_running_reqs,
                "waiting": waiting,
                "kv_cache_usage": scheduler_stats.kv_cache_usage,
            }
            if cache is not None:
                self._add("prefix_cache_queries", cache.queries)
                self._add("prefix_cache_hits", cache.hits)
        if iteration_stats is not None:
            self._add("preemptions", iteration_stats.num_preempted_reqs)
            if self.first_token_at is None and iteration_stats.num_generation_tokens:
                self.first_token_at = time.time()
            self._finished += [
                (one.e2e_latency, one.num_generation_tokens) for one in iteration_stats.finished_requests
            ]

    def take_finished(self) -> list[tuple[float, int]]:
        """(seconds, output tokens) of the requests that have ended since the last call."""
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def log(self) -> None:
        """vLLM calls these two on every logger."""

    def log_engine_initialized(self) -> None:
        pass

    def _add(self, key: str, growth: int) -> None:
        self.counters[key] = self.counters.get(key, 0) + growth


class Meters:
    """The metrics of one replica. Build it in the replica's own process."""

    def __init__(self, pool: str, replica: str) -> None:
        self._tags = {"pool": pool, "replica": replica}
        self._before: dict[str, float] = {}
        self._rows = Counter(*ROWS, tag_keys=(*TAGS, "status"))
        self._totals = {key: Counter(*named, tag_keys=TAGS) for key, named in TOTALS.items()}
        self._current = {key: Gauge(*named, tag_keys=TAGS) for key, named in CURRENT.items()}
        self._seconds = Histogram(*REQUEST_SECONDS, boundaries=SECONDS_BOUNDARIES, tag_keys=TAGS)
        self._tokens = Histogram(*REQUEST_TOKENS, boundaries=TOKENS_BOUNDARIES, tag_keys=TAGS)

    def update(self, counters: dict[str, float], engine: EngineStats | None = None) -> None:
        """Takes the replica's totals since it started, as the Board gets them; call it about once a second.

        Args:
            counters: `ok`, `rejected`, `failed`, `prompt_tokens`, `output_tokens`, `in_flight`, `load_s`; what is missing
                leaves its metric alone, and so does what else is there.
            engine: the replica's EngineStats, if its engine has one.
        """
        if engine is not None:
            counters = {**counters, **engine.counters}
            for seconds, tokens in engine.take_finished():
                self._seconds.observe(seconds, tags=self._tags)
                self._tokens.observe(tokens, tags=self._tags)
        for status in (OK, REJECTED, FAILED):
            self._add(self._rows, counters, status, {**self._tags, "status": status})
        for key, counter in self._totals.items():
            self._add(counter, counters, key, self._tags)
        for key, gauge in self._current.items():
            if key in counters:
                gauge.set(counters[key], tags=self._tags)
        self._before = dict(counters)

    def _add(self, counter: Counter, counters: dict[str, float], key: str, tags: dict[str, str]) -> None:
        growth = counters.get(key, 0) - self._before.get(key, 0)
        if growth > 0:  # Ray's counters refuse 0
            counter.inc(growth, tags=tags)


def shown_as(pool_class: type, name: str, steps: list[str]) -> type:
    """`pool_class` under the name that Ray's dashboard, its metrics and its logs show: `label`, `chat: score, polish`.

    Ray Data names an operator after the class that it is given, and all pools are of one class.
    """
    shown = name if steps == [name] else f"{name}: {', '.join(steps)}"
    return type(shown, (pool_class,), {"__doc__": pool_class.__doc__, "__module__": pool_class.__module__})
