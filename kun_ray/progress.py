"""What a run shows while it runs: counters from every replica → bars in a terminal, lines in a log, metrics.jsonl.

The driver's Monitor thread reads the Board (board.py). It never touches rows.
"""

from __future__ import annotations

import collections
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import ray
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from kun_ray.board import Counters
from kun_ray.schema import FAILED, OK, REJECTED, STATUSES
from kun_ray.store import Folder

if TYPE_CHECKING:
    from kun_ray.ledger import Ledger

STEADY_S, STEADY_ROWS = 20.0, 100
"""An ETA needs so many seconds since this run's first finished rows, and so many rows since then, or 1 % of the run's:
before, the rate is that of loading engines and of the short rows, which come out first."""
LEDGER_S = 2.0
"""Most seconds between two notes in the ledger: what is done in between is not counted when the driver is killed."""


class Monitor:
    """Shows a run's progress from a thread of the driver: `with Monitor(…):` around the execution."""

    def __init__(
        self,
        board: Any,
        folder: Folder,
        pools: list[str],
        num_rows: int | None,
        before: dict[str, int],
        every_s: float,
        ledger: Ledger | None = None,
    ) -> None:
        """
        Args:
            board: handle of the Board.
            folder: the stage; each interval adds a line to its metrics.jsonl.
            pools: names, in the order in which rows pass them; the last one's rows are finished rows.
            num_rows: rows of the whole stage; None while nobody knows.
            before: rows by status that earlier runs have finished.
            every_s: seconds between two lines.
            ledger: keeps this run's totals and knows those of earlier runs.
        """
        self._board, self._folder, self._pools = board, folder, pools
        self._num_rows, self._before, self._every_s, self._ledger = num_rows, before, every_s, ledger
        self._start = time.monotonic()
        self._first: tuple[float, int] | None = None
        """When this run had its first finished rows, and how many."""
        self._history: collections.deque[tuple[float, dict[str, Counters]]] = collections.deque(maxlen=13)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)
        self._live = Live(console=Console(stderr=True), transient=False) if sys.stderr.isatty() else None

    def __enter__(self) -> Monitor:
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=10)
        self._show()
        if self._live:
            self._live.stop()

    def totals(self) -> dict[str, Counters]:
        """Each pool's counters, summed over its replicas, and how many of them are alive."""
        try:
            snapshot = ray.get(self._board.snapshot.remote(), timeout=10)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return self._history[-1][1] if self._history else {}
        totals: dict[str, Counters] = {}
        for pool, replicas in snapshot.items():
            summed: collections.Counter[str] = collections.Counter()
            for counters in replicas.values():
                summed.update(counters)
            totals[pool] = {**summed, "replicas": summed["alive"]}
        if self._ledger is not None:
            self._ledger.note(totals)
        return totals

    def _run(self) -> None:
        shown = time.monotonic()
        while not self._done.wait(min(self._every_s, LEDGER_S)):
            if time.monotonic() - shown >= self._every_s:
                shown = time.monotonic()
                self._show()
            elif self._ledger is not None:
                self.totals()

    def _show(self) -> None:
        now, totals = time.monotonic(), self.totals()
        self._history.append((now, totals))
        line = self._line(now, totals)
        try:
            self._folder.append_metrics(line)
        except OSError as error:  # a full disk ends the run through the write of the rows, with a better message
            print(f"metrics.jsonl: {error}", file=sys.stderr, flush=True)
        if self._live:
            self._live.update(_bars(line))
        else:
            print(describe(line), file=sys.stderr, flush=True)

    def _line(self, now: float, totals: dict[str, Counters]) -> dict[str, Any]:
        then, before = self._history[0]
        elapsed = max(now - then, 1e-9)

        def rate(pool: str, name: str) -> float:
            return max(0.0, totals.get(pool, {}).get(name, 0) - before.get(pool, {}).get(name, 0)) / elapsed

        last = totals.get(self._pools[-1], {})
        done = {status: self._before[status] + int(last.get(status, 0)) for status in STATUSES}
        ever = self._ledger.with_earlier(totals) if self._ledger else totals
        rows_per_s = rate(self._pools[-1], "rows")
        rows_to_do = None if self._num_rows is None else self._num_rows - sum(self._before.values())
        pools = {
            pool: {
                "state": _state(totals.get(pool, {}), rows_to_do),
                "replicas": int(counters.get("replicas", 0)),
                "rows": int(counters.get("rows", 0)),
                "in_flight": int(counters.get("in_flight", 0)),
                "prompt_tokens": int(counters.get("prompt_tokens", 0)),
                "output_tokens": int(counters.get("output_tokens", 0)),
                "prompt_tokens_per_s": round(rate(pool, "prompt_tokens"), 1),
                "output_tokens_per_s": round(rate(pool, "output_tokens"), 1),
            }
            for pool in self._pools
            if (counters := ever.get(pool, {})) is not None
        }
        return {
            "elapsed_s": round(now - self._start, 1),
            "rows_total": self._num_rows,
            "rows_done": sum(done.values()),
            **done,
            "rows_per_s": round(rows_per_s, 2),
            "eta_s": self._eta_s(now, int(last.get("rows", 0)), rows_to_do),
            "pools": pools,
        }

    def _eta_s(self, now: float, rows: int, rows_to_do: int | None) -> int | None:
        """Seconds to the end at the pace of the last minute; None while this run has done too little to tell."""
        if self._first is None and rows:
            self._first = now, rows
        if self._first is None or rows_to_do is None:
            return None
        since, rows_since = self._first
        if now - since < STEADY_S or rows - rows_since < min(STEADY_ROWS, rows_to_do / 100):
            return None
        then, before = self._history[0]
        if then > since:
            since, rows_since = then, int(before.get(self._pools[-1], {}).get("rows", 0))
        pace = (rows - rows_since) / max(now - since, 1e-9)
        return round(max(0, rows_to_do - rows) / pace) if pace > 0 else None


def _state(counters: Counters, rows_to_do: int | None) -> str:
    """A pool by its counters of this run: earlier runs' rows do not tell whether its engines have been loaded now."""
    if counters.get("replicas"):
        return "running"
    return "finished" if rows_to_do is not None and counters.get("rows", 0) >= max(1, rows_to_do) else "loading"


def describe(line: dict[str, Any]) -> str:
    """One line of metrics.jsonl as one line of a log."""
    parts = [
        _share(line),
        f"ok {line[OK]:,} rejected {line[REJECTED]:,} failed {line[FAILED]:,}",
        f"{line['rows_per_s']:.1f} rows/s",
        *(f"{name} {_pool_text(pool)}" for name, pool in line["pools"].items() if line["rows_total"]),
        *([f"ETA {duration(line['eta_s'])}"] if line["rows_total"] else []),
    ]
    return " | ".join(parts)


def _share(line: dict[str, Any]) -> str:
    if not line["rows_total"]:
        return f"{line['rows_done']:,} rows"
    return f"{line['rows_done']:,}/{line['rows_total']:,} rows ({100 * line['rows_done'] / line['rows_total']:.1f}%)"


def duration(seconds: float | None) -> str:
    """Seconds as people read them: 42s, 3m12s, 5h07m."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _pool_text(pool: dict[str, Any]) -> str:
    each = pool["replicas"]
    if not each:
        return str(pool["state"])
    prompt, output = pool["prompt_tokens_per_s"] / each, pool["output_tokens_per_s"] / each
    return f"×{each}: {prompt:,.0f} + {output:,.0f} tok/s each, {pool['in_flight']} in flight"


def _bars(line: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    total = max(1, line["rows_total"] or 1)
    table.add_row(
        "rows",
        ProgressBar(total=total, completed=line["rows_done"], width=24),
        f"{_share(line)}  [green]ok {line[OK]:,}[/] [yellow]rejected {line[REJECTED]:,}[/] [red]failed {line[FAILED]:,}[/]  "
        f"{line['rows_per_s']:.1f} rows/s  ETA {duration(line['eta_s'])}",
    )
    if line["rows_total"]:
        for name, pool in line["pools"].items():
            table.add_row(name, ProgressBar(total=total, completed=pool["rows"], width=24), _pool_text(pool))
    return table
