"""What a stage has cost so far, over all runs that worked on it: one small file a run, `_runs/<start>.json`.

The Monitor writes it every few seconds, so what a run did in its last seconds before a SIGKILL is not in it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import time
from typing import Any

from pyarrow import fs

from kun_ray.board import Counters
from kun_ray.counts import totals
from kun_ray.startup import Startup
from kun_ray.store import Folder

RUNS = "_runs"
_NOW = ("in_flight", "alive", "replicas")
"""Counters that say how things stand, not what was done."""


class Ledger:
    """Totals of the runs before this one, and the file of this one."""

    def __init__(self, folder: Folder, startup: Startup | None = None) -> None:
        self._folder, self._name = folder, f"{RUNS}/{time.time_ns()}.json"
        self._started = time.monotonic()
        self._pools: dict[str, Counters] = {}
        self.startup, self.moments = startup or Startup(), dict[str, dict[str, float]]()
        self._before: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._before_s, self.runs = 0.0, 1
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.child(RUNS), allow_not_found=True))
        for info in infos:
            if info.base_name.endswith(".json"):
                run = folder.read_json(f"{RUNS}/{info.base_name}")
                self.runs += 1
                self._before_s += run["elapsed_s"]
                for pool, counters in run["pools"].items():
                    self._before[pool].update(counters)

    def note(self, pools: dict[str, Counters]) -> None:
        """Keeps this run's totals of each pool."""
        self._pools = pools
        done = {pool: {k: v for k, v in counters.items() if k not in _NOW} for pool, counters in pools.items()}
        with contextlib.suppress(OSError):  # a full disk ends the run through the write of the rows
            self._folder.filesystem.create_dir(self._folder.child(RUNS), recursive=True)
            self._folder.write_text(self._name, json.dumps({"elapsed_s": self._elapsed_s(), "pools": done}))

    def with_earlier(self, pools: dict[str, Counters]) -> dict[str, Counters]:
        """Each pool's totals with those of the runs before."""
        names = [*pools, *(name for name in self._before if name not in pools)]
        return {name: dict(_both(pools.get(name, {}), self._before[name])) for name in names}

    def summary(self, folder: Folder, steps: list[str], num_rows: int) -> dict[str, Any]:
        """What the whole stage has cost, for summary.json.

        `output_tokens` were decoded, `useful_output_tokens` stand in the rows, `tokens_redone` is the rest: replies that
        a kill lost or that `retry` replaced: at least so many, for a killed run's last seconds are in no file. Tokens of
        replies that were cut off unfinished are not counted.
        """
        pools = self.with_earlier(self._pools)
        decoded = int(sum(counters.get("output_tokens", 0) for counters in pools.values()))
        useful = sum(totals(folder, [f"{step}_output_tokens" for step in steps]).values())
        decoded = max(decoded, useful)  # runs that were killed had done more than they could note
        elapsed = self._before_s + self._elapsed_s()
        return {
            "runs": self.runs,
            "restarts": int(sum(counters.get("restarts", 0) for counters in pools.values())),
            "hangs": int(sum(counters.get("hangs", 0) for counters in pools.values())),
            "elapsed_s": round(elapsed, 1),
            "rows_per_s": round(num_rows / max(elapsed, 1e-9), 3),
            "output_tokens": decoded,
            "useful_output_tokens": useful,
            "tokens_redone": decoded - useful,
            "goodput": round(useful / decoded, 4) if decoded else 1.0,
            "startup": self.startup.summary(self.moments) if self.moments else None,
            "pools": pools,
        }

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started


def _both(now: Counters, before: collections.Counter[str]) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    found.update(now)  # type: ignore[arg-type]
    found.update(before)  # not `+`, which leaves out what is 0
    return found
