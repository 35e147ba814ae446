"""Benchmarks run to their end in their short form and leave a result; what it measures then is none.

Those that take minutes even so (rivals, rows, training, planner, the way to a card), and those that look at a process that is
not their own child, which Linux may forbid (engine_profile, driver_profile), run by `make bench SHORT=1` and
`make bench-gpu SMOKE=1` alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name",
    [
        "engine",
        "verdicts",
        "replicas",
        "ingest",
        "near_duplicates",
        "reader_pieces",
        "training_profile",
        "padding",
        "startup",
        "startup_profile",
    ],
)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "bench/all.py", "--short", "--only", name, "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = [json.loads(path.read_text()) for path in tmp_path.glob(f"{name}*.json")]
    assert results and all("date" in result for result in results)
