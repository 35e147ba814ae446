"""Every benchmark runs to its end in its short form and leaves a result; what it measures then is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = (
    "engine",
    "verdicts",
    "rivals",
    "rows",
    "replicas",
    "ingest",
    "near_duplicates",
    "training",
    "startup",
    "planner",
)


@pytest.mark.parametrize("name", NAMES)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "bench/all.py", "--short", "--only", name, "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    results = [json.loads(path.read_text()) for path in tmp_path.glob(f"{name}*.json")]
    assert results and all("date" in result for result in results)


def test_the_way_to_a_card_runs_on_cpus(tmp_path: Path) -> None:
    """`make bench-gpu SMOKE=1`: the same scripts and options, a tiny model."""
    command = [sys.executable, "bench/all.py", "--gpu", "--smoke", "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    label, alone = (json.loads((tmp_path / f"engine-tiny-label-like{how}.json").read_text()) for how in ("", "-alone"))
    assert label["scoring"]["choose_over_decode_256"] > 0 and not alone["in_turn"]
    assert set(json.loads((tmp_path / "training-gpu.json").read_text())["turns"]) == {"tiny auto", "tiny packed"}


def test_no_benchmark_is_left_out() -> None:
    listed = subprocess.run([sys.executable, "bench/all.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    choices = listed.stdout.split("{", 1)[1].split("}", 1)[0].split(",")
    assert sorted(choices) == sorted(NAMES)
