"""metrics.jsonl of a stage as curves over its running time, with restarts and lost replicas marked.

`report` calls read_throughput for each stage. Time in which nothing ran between two attempts is left out, so runs that
were stopped can be compared with others.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from typing import Any, Final

import numpy as np
from pyarrow import fs

from kun_ray.store import METRICS, Folder

MAX_POINTS: Final = 300
"""Points of one curve: more would only make the page larger."""

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One start of the job, up to its end or its death."""

    started: str
    elapsed_s: float
    rows: int


@dataclasses.dataclass(frozen=True)
class Throughput:
    """A stage's curves; `seconds` counts running time over all attempts."""

    seconds: Array
    curves: dict[str, Array]
    """`rows_per_s`, and per pool `<pool> tokens_per_s` and `<pool> in_flight`."""
    attempts: list[Attempt]
    restarts_s: list[float]
    """Where a later attempt began."""
    losses_s: list[float]
    """Where a pool had fewer replicas than before: an engine or its node had died."""


def read_throughput(folder: Folder) -> Throughput | None:
    """The curves of a stage; None if it kept no metrics or only one line of them."""
    lines = _read_lines(folder)
    if len(lines) < 2:
        return None
    starts = [0] + [n for n in range(1, len(lines)) if _is_restart(lines[n - 1], lines[n])]
    seconds, attempts, restarts, losses, before = [], [], [], [], 0.0
    num_done = 0
    for first, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        part = lines[first:end]
        if first:
            restarts.append(before)
        seconds += [before + line["elapsed_s"] for line in part]
        for line, following in itertools.pairwise(part):
            if _lost_replica(line, following):
                losses.append(before + following["elapsed_s"])
        began = time.strftime("%F %T", time.localtime(part[0].get("time", 0) - part[0]["elapsed_s"]))
        attempts.append(Attempt(began, part[-1]["elapsed_s"], part[-1]["rows_done"] - num_done))
        num_done = part[-1]["rows_done"]
        before = seconds[-1]
    return Throughput(*_thin(np.array(seconds), _curves(lines)), attempts, restarts, losses)


def _curves(lines: list[dict[str, Any]]) -> dict[str, Array]:
    curves = {"rows_per_s": np.array([line.get("rows_per_s") or 0.0 for line in lines])}
    for pool in dict.fromkeys(name for line in lines for name in line.get("pools", {})):
        values = [line.get("pools", {}).get(pool, {}) for line in lines]
        tokens = [v.get("prompt_tokens_per_s", 0) + v.get("output_tokens_per_s", 0) for v in values]
        in_flight = [v.get("in_flight", 0) for v in values]
        curves |= {f"{pool} tokens_per_s": np.array(tokens)} if any(tokens) else {}
        curves |= {f"{pool} in_flight": np.array(in_flight)} if any(in_flight) else {}
    return curves


def _thin(seconds: Array, curves: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Means over neighbouring points, so that at most MAX_POINTS are left."""
    group = -(-len(seconds) // MAX_POINTS)
    if group == 1:
        return seconds, curves
    first = np.arange(0, len(seconds), group)
    sizes = np.diff([*first, len(seconds)])
    return (np.add.reduceat(seconds, first) / sizes, {n: np.add.reduceat(c, first) / sizes for n, c in curves.items()})  # type: ignore[return-value]


def _is_restart(line: dict[str, Any], following: dict[str, Any]) -> bool:
    """Whether `following` is another attempt's: its time runs from the start, or it began after `line` was written."""
    began = following.get("time", 0) - following["elapsed_s"]
    return bool(following["elapsed_s"] < line["elapsed_s"] or began > line.get("time", 0))


def _lost_replica(line: dict[str, Any], following: dict[str, Any]) -> bool:
    now = following.get("pools", {})
    return any(
        name in now and now[name].get("replicas", 0) < pool.get("replicas", 0) and not _is_over(now[name], following)
        for name, pool in line.get("pools", {}).items()
    )


def _is_over(pool: dict[str, Any], line: dict[str, Any]) -> bool:
    """Whether a pool has done all rows: then Ray ends its replicas because there is no more work, pools before others."""
    rows = max(pool.get("rows", 0), line.get("rows_done", 0))
    return pool.get("state") == "finished" or (bool(line.get("rows_total")) and rows >= line["rows_total"])


def _read_lines(folder: Folder) -> list[dict[str, Any]]:
    paths = [folder.child(METRICS)] if folder.exists(METRICS) else []
    if folder.exists("_metrics"):  # where a file system cannot append
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.child("_metrics")))
        paths += sorted(info.path for info in infos if info.is_file)
    lines = []
    for path in paths:
        with folder.filesystem.open_input_stream(path) as stream:
            for raw in stream.read().splitlines():
                try:
                    line = json.loads(raw)
                except ValueError:  # the last line of a run that was killed while writing it
                    continue
                if isinstance(line, dict) and {"elapsed_s", "rows_done"} <= line.keys():
                    lines.append(line)
    return lines
