"""Where a figure was measured, the JSON file that keeps it, and the real text that several scripts beside this one take."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
"""Where results are kept that documents cite."""
PASSING = Path("build/bench")
"""Where those go that are none: of short forms, or of a machine that is passing by."""


def machine() -> dict[str, Any]:
    """The processor's model, its cores, GB of memory, system and Python."""
    import psutil  # all.py says what is missing; so it must be able to import this file

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, mean, least, most and number of repeated measurements."""
    found = {"median": statistics.median(values), "mean": statistics.fmean(values)}
    found |= {"least": min(values), "most": max(values)}
    return {**{name: float(f"{value:.4g}") for name, value in found.items()}, "runs": len(values)}


def median_interval(groups: Sequence[Sequence[float]]) -> list[float]:
    """Holds 90% of the medians of values drawn again, groups first, then values of each (a bootstrap of both)."""
    draw, again = random.Random(0), []
    for _ in range(2000):
        drawn = [draw.choices(group, k=len(group)) for group in draw.choices(groups, k=len(groups))]
        again.append(statistics.median(value for group in drawn for value in group))
    edges = statistics.quantiles(again, n=20)
    return [round(edges[0], 4), round(edges[-1], 4)]


def in_turn(names: list[str], number: int) -> list[str]:
    """The order of round 1, 2, …: in twice as many rounds as there are names each is first, and last, equally often."""
    first = (number - 1) // 2 % len(names)
    order = names[first:] + names[:first]
    return order if number % 2 else order[::-1]


def write(out: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes `<out>/<name>.json`, whole or not at all: the machine, the date and the result."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    whole = {"machine": machine(), "date": time.strftime("%F"), **result}
    unfinished = out / f".{name}.json"
    unfinished.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return unfinished.replace(path)


def material(corpora: Path) -> tuple[str, list[str]]:
    """Where the text is from, and the documents of `make corpora` in a fixed random order; the demo's if nobody made them."""
    from kun_ray.demo import layout

    if not (corpora / "truth.json").exists():
        return "the demo's documents", layout.clean_texts()
    from kun_ray.corpora import (
        CorpusConfig,
        list_files,
        read_file,
    )  # imports Ray: seconds that other scripts need not wait

    texts: list[str] = []
    for name in ("wudao", "wanjuan", "skypile"):
        corpus = CorpusConfig(name, name, [str(corpora / name)])
        for file in list_files(corpus):
            texts += [text for table in read_file(corpus, file) for text in table["text"].to_pylist() if text]
    random.Random(2401_06477).shuffle(texts)
    return "make corpora", texts
