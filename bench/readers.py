"""Both sides' readers in turn, file by file: bench/ingest.py calls. Each side is a process that answers lines.

A machine may be half as fast from one second to the next, so what is compared has to stand side by side.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from machine import spread

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def read_in_turn(
    sides: dict[str, list[str]], turn: dict[str, Any], folder: Path, number: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every reading of each layout: by kun_ray, datatrove, and the reader of same_rows.py."""
    path = folder / "readers.json"
    path.write_text(json.dumps(turn))
    with contextlib.ExitStack() as stack:
        started = {
            side: stack.enter_context(start([*command, str(path), "--readers"])) for side, command in sides.items()
        }
        ways = {
            "kun_ray": ("kun_ray", "read"),
            "datatrove": ("datatrove", "read"),
            "same_rows": ("kun_ray", "same_rows"),
        }
        ways = {way: asked for way, asked in ways.items() if asked[0] in started}
        seconds: dict[str, dict[str, list[float]]] = {name: {way: [] for way in ways} for name in turn["layouts"]}
        for reading in range(-1, number):  # the first warms up
            for name in turn["layouts"]:
                for way in list(ways)[:: 1 if reading % 2 else -1]:
                    side, kind = ways[way]
                    taken = ask(started[side], f"{kind} {name}")
                    if reading >= 0:
                        seconds[name][way].append(round(taken, 5))
        for process in started.values():
            assert process.stdin is not None
            process.stdin.close()
    return seconds


def start(command: list[str]) -> subprocess.Popen[str]:
    """A side's process, which answers lines."""
    environment = {**os.environ, **ONE_THREAD}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def ask(process: subprocess.Popen[str], what: str) -> float:
    """The answer of a side's process. Raises RuntimeError if it has none."""
    assert process.stdin is not None and process.stdout is not None
    print(what, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"no answer to `{what}`")
    return float(answer)


def of_readers(readings: dict[str, dict[str, list[float]]], mb: float) -> dict[str, Any]:
    """Rates and ratios of each layout's readers: medians over readings that stood side by side."""
    found: dict[str, Any] = {}
    for name, seconds in readings.items():
        found[name] = {side: spread([mb / each for each in taken]) for side, taken in seconds.items()}
        if "datatrove" in seconds:
            for ratio, side in (("ratio", "kun_ray"), ("same_rows_ratio", "same_rows")):
                pairs = zip(seconds["datatrove"], seconds[side], strict=True)
                found[name][ratio] = spread([theirs / ours for theirs, ours in pairs])
            found[name]["ratio_of_fastest"] = round(min(seconds["datatrove"]) / min(seconds["kun_ray"]), 3)
    return found
