"""Which rows were in an engine when it died, and what follows: suspects run apart, a row that kills engines is quarantined.

A replica notes each row in a small memory-mapped file before the engine sees it. The file outlives the process, however
it ends; the actor's next process reads it. A replica that sees its engine die reports the rows itself. The Board
(board.py) keeps the counts in a `Deaths`, and the stage folder keeps them for later runs.
"""

from __future__ import annotations

import collections
import contextlib
import mmap
import os
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

SUSPECTS = "_suspects.json"
"""In a stage folder: pool → doc_id → deaths that the row was part of."""
QUARANTINED = "quarantined"
DEATHS = 2
"""A row that was in an engine at so many deaths, at the last one alone, is quarantined."""
DEATHS_IN_A_ROW = 6
"""So many replicas of a pool in succession that died without having answered anything end the run."""
OLD_S = 7 * 24 * 3600.0
"""A Flight that nobody has written for so long belongs to no living run."""
_SLOT_BYTES = 64


class Flight:
    """The rows inside one engine, in a file that is there after this process has died. An entry costs a microsecond."""

    def __init__(self, path: Path | None, num_slots: int) -> None:
        """
        Args:
            path: the file, made anew; None keeps the rows in memory alone.
            num_slots: most rows at once.
        Raises:
            OSError: no room for the file.
        """
        self._path, self._size = path, num_slots * _SLOT_BYTES
        self._free = list(range(num_slots))
        self._rows: dict[int, str] = {}
        descriptor = -1
        if path is not None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            os.posix_fallocate(descriptor, 0, self._size)  # a page that finds no room later would be a SIGBUS
        self._map = mmap.mmap(descriptor, self._size)
        if descriptor >= 0:
            os.close(descriptor)

    def enter(self, row: str) -> int:
        """Notes a row; returns its slot."""
        slot = self._free.pop()
        self._rows[slot] = row
        encoded = row.encode()[:_SLOT_BYTES]
        start = slot * _SLOT_BYTES
        self._map[start : start + _SLOT_BYTES] = encoded.ljust(_SLOT_BYTES, b"\0")
        return slot

    def leave(self, slot: int) -> None:
        """The row in this slot has left the engine."""
        start = slot * _SLOT_BYTES
        self._map[start : start + _SLOT_BYTES] = bytes(_SLOT_BYTES)
        del self._rows[slot]
        self._free.append(slot)

    def rows(self) -> list[str]:
        """The rows inside the engine now."""
        return list(self._rows.values())

    def remove(self) -> None:
        """Deletes the file: nobody need read it."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def left_behind(path: Path | None) -> list[str]:
    """The rows in a dead process's Flight; none where there is no file, as on another node."""
    try:
        content = path.read_bytes() if path is not None else b""
    except OSError:
        return []
    slots = (content[start : start + _SLOT_BYTES].rstrip(b"\0") for start in range(0, len(content), _SLOT_BYTES))
    return [slot.decode(errors="replace") for slot in slots if slot]


def flight_path(actor: str) -> Path | None:
    """Where the processes of one actor keep their Flight on this node; None if this user cannot have a folder there."""
    folder = Path(tempfile.gettempdir()) / f"kun_ray-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    _forget_old(folder)
    return folder / f"flight-{actor}" if found.st_uid == os.getuid() and not folder.is_symlink() else None


def _forget_old(folder: Path) -> None:
    """Deletes the Flights of runs that have ended: Ray ends an actor without a word, so none can do it for its own."""
    for path in folder.glob("flight-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > OLD_S:
                path.unlink()


class Deaths:
    """Deaths of a run's engines: how often, of what, and which rows were inside."""

    def __init__(self, kept: dict[str, dict[str, int]] | None = None) -> None:
        """
        Args:
            kept: `suspects` of an earlier run over the same folder.
        """
        self.suspects: dict[str, dict[str, int]] = collections.defaultdict(dict, kept or {})
        """Pool → doc_id → deaths; of a quarantined row the negative of it."""
        self.counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        """Pool → `restarts`, `hangs`."""
        self._in_a_row: collections.Counter[str] = collections.Counter()
        self._causes: dict[str, str] = {}

    def add(self, pool: str, rows: Sequence[str], cause: str, hung: bool, answered: bool) -> None:
        """One death.

        Args:
            pool: whose engine died.
            rows: doc_ids that were inside it.
            cause: what the engine said last.
            hung: it was killed for having made no progress.
            answered: whether it had answered any request.
        """
        self.counts[pool]["restarts"] += 1
        self.counts[pool]["hangs"] += hung
        self._in_a_row[pool] = 1 if answered else self._in_a_row[pool] + 1
        self._causes[pool] = cause
        suspects = self.suspects[pool]
        for row in rows:
            deaths = abs(suspects.get(row, 0)) + 1
            suspects[row] = -deaths if len(rows) == 1 and deaths >= DEATHS else deaths

    def answered(self, pool: str) -> None:
        """An engine of this pool has answered: the pool can do something, whatever dies elsewhere."""
        self._in_a_row[pool] = 0

    def clear(self, pool: str, rows: Sequence[str]) -> None:
        """These rows have passed an engine without killing it."""
        for row in rows:
            self.suspects[pool].pop(row, None)

    def fatal(self, pool: str) -> str | None:
        """Why this pool can do nothing but die, or None."""
        if self._in_a_row[pool] < DEATHS_IN_A_ROW:
            return None
        return (
            f"pool {pool}: {self._in_a_row[pool]} engines in a row died before they answered anything; "
            f"the last one said: {self._causes[pool]}"
        )


class Breaker:
    """Tells accidents of single rows from an engine that fails at everything."""

    FIRST, WINDOW, SHARE = 20, 200, 0.5

    def __init__(self) -> None:
        self._num_requests = self._num_failed = 0
        self._recent: collections.deque[bool] = collections.deque(maxlen=self.WINDOW)

    def note(self, failed: bool) -> str | None:
        """Counts one request; the answer says why no more should be sent, if so."""
        self._num_requests += 1
        self._num_failed += failed
        self._recent.append(failed)
        if failed and self._num_requests == self._num_failed == self.FIRST:
            return f"the first {self.FIRST} requests all failed"
        if failed and len(self._recent) == self.WINDOW and sum(self._recent) > self.SHARE * self.WINDOW:
            return f"{sum(self._recent)} of the last {self.WINDOW} requests failed"
        return None


def groups(rows: list[dict[str, Any]], deaths: dict[str, int], together: int) -> list[list[dict[str, Any]]]:
    """Suspect rows in the groups in which they run: `together` at a time, and alone from the second death on."""
    fresh = [row for row in rows if deaths[row["doc_id"]] < DEATHS]
    singles = [[row] for row in rows if deaths[row["doc_id"]] >= DEATHS]
    return [fresh[start : start + together] for start in range(0, len(fresh), together)] + singles


def identity() -> tuple[str, bool]:
    """The name of the actor that this process runs, and whether an earlier process of it has died."""
    if not ray.is_initialized() or (actor := ray.get_runtime_context().get_actor_id()) is None:
        return uuid.uuid4().hex, False
    return actor, bool(ray.get_runtime_context().was_current_actor_reconstructed)
