"""Where a figure was measured, and the JSON file that keeps it. Every script beside this one may use it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
"""Where results are kept that documents cite."""


def machine() -> dict[str, Any]:
    """The processor's model, the cores that this process may use, GB of memory, system and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package."""
    return {name: importlib.metadata.version(name) for name in packages}


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Median, least, most and number of repeated measurements."""
    rounded = [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]
    return {"median": rounded[0], "least": rounded[1], "most": rounded[2], "runs": len(values)}


def write(out: Path, name: str, result: dict[str, Any]) -> Path:
    """Writes `<out>/<name>.json`: the machine, the date and the result."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}.json"
    whole = {"machine": machine(), "date": time.strftime("%F"), **result}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
    return path
