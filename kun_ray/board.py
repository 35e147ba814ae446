"""The Board: the one actor that every replica of a run reports to. Counters, the wish to stop, and deaths.

Replicas push their counters each second and learn from the answer whether to stop. The driver's Monitor (progress.py)
reads them. If Ray must restart the Board on another node, replicas and driver tell it again what it forgot, and deaths
lie in the stage folder.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray

from kun_ray.store import Folder
from kun_ray.suspects import SUSPECTS, Deaths

SILENT_S = 15.0
"""A replica that has not reported for so long is taken for dead; living ones report each second."""
Counters = dict[str, float]
"""One replica's totals since it started: `rows`, `ok`, `rejected`, `failed`, `deferred`, `answered` (requests, of which a row
may need several), `prompt_tokens`, `cached_tokens` (of these), `output_tokens`, `in_flight` (now), `load_s`, `busy_s` (with
rows inside); of a pool also `restarts`, `hangs`."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Board:
    """Holds the newest counters of every replica and the wish to stop. A restarted replica counts anew, as another one."""

    def __init__(self, uri: str | None = None) -> None:
        """
        Args:
            uri: the stage folder, where suspects are kept; None keeps none.
        """
        self._folder = None if uri is None else Folder(uri)
        self._replicas: dict[str, dict[str, Counters]] = collections.defaultdict(dict)
        self._heard: dict[tuple[str, str], float] = {}
        self._stopped: set[str] = set()
        self._deaths = Deaths(read_suspects(self._folder))
        self._told: set[str] = set()
        self._answered: dict[str, bool] = {}
        self._moments: dict[str, dict[str, float]] = collections.defaultdict(dict)

    def report(self, pool: str, replica: str, counters: Counters, actor: str = "", cleared: Sequence[str] = ()) -> bool:
        """Stores one replica's counters; the answer is whether it should take no more rows.

        Args:
            replica: name of the process.
            actor: name of the actor, which outlives its processes.
            cleared: suspects that have passed the engine since the last report.
        """
        before = self._replicas[pool].get(replica, {}).get("answered", 0)
        self._replicas[pool][replica] = {**counters, "alive": 1}
        self._answered[actor] = counters.get("answered", 0) > 0
        if counters.get("answered", 0) > before:
            self._deaths.answered(pool)
        self._heard[pool, replica] = time.monotonic()
        if cleared:
            self._deaths.clear(pool, cleared)
            self._keep()
        return pool in self._stopped

    def add(self, pool: str, counters: Counters) -> None:
        """Adds to the totals of a stage that runs as tasks, which have no replicas."""
        totals = self._replicas[pool].setdefault("tasks", {})
        for name, value in counters.items():
            totals[name] = totals.get(name, 0) + value

    def died(self, pool: str, actor: str, rows: list[str], cause: str, hung: bool, answered: bool) -> None:
        """The last words of a process of this actor: which rows were in its engine."""
        self._told.add(actor)
        self._count(pool, rows, cause, hung, answered)

    def started(self, pool: str, actor: str, again: bool, rows: list[str]) -> tuple[dict[str, int], str | None]:
        """A process of this actor begins.

        Args:
            again: it takes the place of one that has died.
            rows: what that one left behind, unless it has said so itself.
        Returns:
            (suspects with their deaths, negative for quarantined rows; why the pool should not go on, or None)
        """
        if again and actor not in self._told:
            answered = self._answered.get(actor, False)
            self._count(pool, rows, "its process ended without a word (killed, or out of memory?)", False, answered)
        self._told.discard(actor)
        self._moments[pool].setdefault("actor", time.time())
        self._answered[actor] = False
        return dict(self._deaths.suspects[pool]), self._deaths.fatal(pool)

    def reached(self, pool: str, moments: dict[str, float]) -> None:
        """When a replica came so far; of several, the first counts (startup.py)."""
        for moment, at in moments.items():
            self._moments[pool][moment] = min(at, self._moments[pool].get(moment, at))

    def moments(self) -> dict[str, dict[str, float]]:
        """Pool → moment → seconds since the epoch."""
        return {pool: dict(moments) for pool, moments in self._moments.items()}

    def request_stop(self, pools: list[str]) -> None:
        """From now on the replicas of these pools start no more rows."""
        self._stopped |= set(pools)

    def snapshot(self) -> dict[str, dict[str, Counters]]:
        """Pool → replica → counters; of a replica that has been silent, only what it did counts."""
        for (pool, replica), heard in self._heard.items():
            if time.monotonic() - heard > SILENT_S:
                self._replicas[pool][replica] |= {"alive": 0, "in_flight": 0}
        return {
            pool: {**replicas, "deaths": dict(self._deaths.counts[pool])} for pool, replicas in self._replicas.items()
        }

    def _count(self, pool: str, rows: list[str], cause: str, hung: bool, answered: bool) -> None:
        self._deaths.add(pool, rows, cause, hung, answered)
        self._keep()

    def _keep(self) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):  # a full disk ends the run through the write of the rows
                self._folder.write_json(SUSPECTS, self._deaths.suspects)


def new_board(uri: str | None = None) -> Any:
    """Starts a Board and returns its handle."""
    return Board.remote(uri)  # type: ignore[attr-defined]


def read_suspects(folder: Folder | None) -> dict[str, dict[str, int]]:
    """The suspects that an earlier run of this folder has left."""
    if folder is None or not folder.exists(SUSPECTS):
        return {}
    try:
        return dict(folder.read_json(SUSPECTS))
    except (OSError, ValueError):
        return {}
