"""Where the seconds go between the command and the first row: `startup` in a generate stage's summary.json.

The driver keeps its own moments; the first replica of each pool tells the Board the rest (board.py). All are wall clocks,
so between machines they are as exact as those agree.
"""

from __future__ import annotations

import time
from typing import Any

MOMENTS = ("actor", "engine", "first_token", "first_row")
"""What a pool passes: its actor begins, its engine is loaded, a first token comes out, a first row is settled."""


class Startup:
    """Begins when the job's imports are done and its configuration is read."""

    def __init__(self) -> None:
        self.began = time.time()
        self._driver: dict[str, float] = {}

    def reached(self, moment: str) -> None:
        """The driver is here."""
        self._driver[moment] = time.time()

    def summary(self, pools: dict[str, dict[str, float]]) -> dict[str, object]:
        """Seconds of each part, one after the other; of the parts after Ray's start, for each pool.

        Args:
            pools: the moments of each pool as the Board has them, seconds since the epoch.
        """
        last = max(self._driver.values(), default=self.began)
        return {
            "began": round(self.began, 2),
            **_between(self.began, self._driver),
            "pools": {name: _between(last, {m: at[m] for m in MOMENTS if m in at}) for name, at in pools.items()},
        }


def tell(board: Any, pool: str, loaded_at: float, first_token_at: float | None) -> None:
    """A replica's first row is settled: tells the Board, if there is one, when this one came so far."""
    if board is not None:
        now = time.time()
        moments = {"engine": loaded_at, "first_token": first_token_at or now, "first_row": now}
        board.reached.remote(pool, moments)


def _between(start: float, moments: dict[str, float]) -> dict[str, float]:
    """Seconds up to each moment from the one before."""
    before = [start, *moments.values()]
    return {f"{name}_s": round(at - then, 2) for (name, at), then in zip(moments.items(), before, strict=False)}
