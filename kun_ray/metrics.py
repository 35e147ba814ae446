"""A pool's counters as Ray metrics, which every node of a cluster offers to Prometheus (docs/operations.md, "Metrics").

A Pool holds one Meters and hands it the counters that it reports to the Board anyway. What happens inside an engine (KV
cache, preemptions, prefix cache, latencies) vLLM measures itself; engine_stat_loggers() lets it use the same endpoint.
"""

from __future__ import annotations

from typing import Any, Final

from ray.util.metrics import Counter, Gauge

from kun_ray.schema import FAILED, OK, REJECTED

TOTALS: Final = {
    "prompt_tokens": ("kun_ray_prompt_tokens", "Prompt tokens of this pool's requests, cached ones too."),
    "output_tokens": ("kun_ray_output_tokens", "Tokens that this pool's engines have decoded."),
}
"""Counters of a replica that only grow: its name → the metric's name and description."""
CURRENT: Final = {
    "in_flight": ("kun_ray_rows_in_flight", "Rows that this replica's engine works on now."),
    "load_s": ("kun_ray_load_seconds", "Seconds that this replica took to load its engine."),
}
"""Counters of a replica that say how things are now."""
ROWS: Final = ("kun_ray_rows", "Rows that have left this pool, by status.")
TAGS: Final = ("pool", "replica")


class Meters:
    """The metrics of one replica. Build it in the replica's own process."""

    def __init__(self, pool: str, replica: str) -> None:
        self._tags = {"pool": pool, "replica": replica}
        self._before: dict[str, float] = {}
        self._rows = Counter(*ROWS, tag_keys=(*TAGS, "status"))
        self._totals = {key: Counter(*named, tag_keys=TAGS) for key, named in TOTALS.items()}
        self._current = {key: Gauge(*named, tag_keys=TAGS) for key, named in CURRENT.items()}

    def update(self, counters: dict[str, float]) -> None:
        """Takes the replica's totals since it started, as the Board gets them; call it about once a second.

        Args:
            counters: `ok`, `rejected`, `failed`, `prompt_tokens`, `output_tokens`, `in_flight`, `load_s`; what is missing
                counts as 0, what else is there is left alone.
        """
        for status in (OK, REJECTED, FAILED):
            self._add(self._rows, counters, status, {**self._tags, "status": status})
        for key, counter in self._totals.items():
            self._add(counter, counters, key, self._tags)
        for key, gauge in self._current.items():
            gauge.set(counters.get(key, 0), tags=self._tags)
        self._before = dict(counters)

    def _add(self, counter: Counter, counters: dict[str, float], key: str, tags: dict[str, str]) -> None:
        growth = counters.get(key, 0) - self._before.get(key, 0)
        if growth > 0:  # Ray's counters refuse 0
            counter.inc(growth, tags=tags)


def engine_stat_loggers() -> list[Any]:
    """`stat_loggers` for vLLM's AsyncLLM: its own metrics, through Ray. Their label `model_name` is the engine argument
    `served_model_name`: give it the pool's name."""
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    return [RayPrometheusStatLogger]


def shown_as(pool_class: type, name: str, steps: list[str]) -> type:
    """`pool_class` under the name that Ray's dashboard, its metrics and its logs show: `label`, `chat: score, polish`.

    Ray Data names an operator after the class that it is given, and all pools are of one class.
    """
    shown = name if steps == [name] else f"{name}: {', '.join(steps)}"
    return type(shown, (pool_class,), {"__doc__": pool_class.__doc__, "__module__": pool_class.__module__})
