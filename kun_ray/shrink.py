"""A cluster that has lost nodes: notices that a run stands still for want of a replica, and which replicas still fit.

Ray restarts a lost replica where there is room, and its blocks wait for it. Where there is none, they would wait for ever:
generate then ends this execution and begins another one, over the rows that are not written, with fewer replicas.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import ray

from kun_ray.board import Counters
from kun_ray.config import KunError
from kun_ray.placement import bundles
from kun_ray.pool import PoolConfig

Pools = dict[str, PoolConfig]


class ReplicasLost(BaseException):
    """Nothing moves any more, and the cluster cannot hold all replicas. No Exception: what handles those must let it pass."""


@contextlib.contextmanager
def watching(pools: Pools, totals: Callable[[], dict[str, Counters]], after_s: float) -> Iterator[None]:
    """Raises ReplicasLost in the main thread when no pool has done anything for `after_s` seconds and a node is missing.

    While some replicas still work they go on: to begin anew costs the loading of all engines, so it is done once, at the end.

    Args:
        pools: as they were started.
        totals: each pool's counters now.
        after_s: patience; a node may come back.
    """
    ended, at_start = threading.Event(), _living()

    def watch() -> None:
        seen, since, missing = None, time.monotonic(), False
        while not ended.wait(min(5.0, after_s / 4)):
            with contextlib.suppress(ray.exceptions.RayError):  # a head that moves; the next look will tell
                missing = not at_start <= _living() and not fits(pools, num_free_cpus=1)
            now = totals()
            work = [(c.get("rows"), c.get("prompt_tokens"), c.get("in_flight", 0)) for c in now.values()]
            if work != seen or any(in_flight for *_, in_flight in work):
                seen, since = work, time.monotonic()
            elif time.monotonic() - since > after_s and missing and not ended.is_set():
                os.kill(os.getpid(), signal.SIGUSR1)  # until it is heard

    def lost(signum: int, frame: object) -> None:
        raise ReplicasLost

    signal.signal(signal.SIGUSR1, lost)
    threading.Thread(target=watch, name="lost nodes", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # one may still be under way


def fits(pools: Pools, num_free_cpus: float) -> bool:
    """Whether the living nodes could hold all replicas at once, and reading and writing beside them, if nobody else were there."""
    nodes: list[dict[str, float]] = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    wanted = sorted(bundles(pools), key=_scarcity, reverse=True)
    placed = all(any(_take(node, bundle) for node in nodes) for bundle in wanted)
    return placed and sum(node.get("CPU", 0.0) for node in nodes) >= num_free_cpus


def _scarcity(bundle: dict[str, float]) -> tuple[int, float, float]:
    """What only few nodes can hold is placed first: kinds of cards and resources of the cluster's own, GPUs, many CPUs."""
    return sum(name not in ("CPU", "GPU") for name in bundle), bundle.get("GPU", 0.0), bundle.get("CPU", 0.0)


def _living() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _take(node: dict[str, Any], bundle: dict[str, float]) -> bool:
    if any(node.get(name, 0.0) < amount for name, amount in bundle.items()):
        return False
    for name, amount in bundle.items():
        node[name] -= amount
    return True


def shrunk(pools: Pools) -> Pools:
    """As many replicas as the living nodes hold: always one less of the pool that has most.

    Raises:
        KunError: not one replica of each pool fits any more.
    """
    found = dict(pools)
    while not fits(found, num_free_cpus=1):
        name = max(found, key=lambda name: found[name].replicas)
        if found[name].replicas == 1:
            raise KunError(
                "the cluster has lost nodes, and what is left cannot hold one replica of each pool. What was finished is "
                "kept; run the same command again when the nodes are back, or on another cluster"
            )
        found[name] = dataclasses.replace(found[name], replicas=found[name].replicas - 1)
    return found
