"""Where a training step goes: CPU seconds of PyTorch's operators in our loop, in plain DeepSpeed and in plain PyTorch, in turn.

    python bench/training_profile.py [--steps 3] [--out bench/results]

The same steps as those of bench/training.py over alpaca_zh's lengths, under PyTorch's profiler. What plain PyTorch does
without is what ZeRO-3 costs; what plain DeepSpeed does without is what kun_ray costs. A step's time that no operator has is
Python's, hooks above all (and the profiler's own, by the operator).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import machine
import torch
import training
from shapes import drawn

from kun_ray.train.launch import QUIET

NAMES = ["packed", "deepspeed", "torch"]
SHOWN = 25


class Profiled(training.Contest):
    """A contest whose counted steps are profiled."""

    seconds: dict[str, Counter[str]]

    def _timed(self, name: str, samples: Any, batch: Any, number: int) -> tuple[float, float]:
        if number == 0:
            self.seconds = {name: Counter() for name in NAMES}
            return super()._timed(name, samples, batch, number)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            timed = super()._timed(name, samples, batch, number)
        for event in found.key_averages():
            self.seconds[name][event.key] += event.self_cpu_time_total / 1e6 / self._turn.steps
        return timed

    def over(self, samples: Any) -> dict[str, Any]:
        wall = super().over(samples)["seconds_per_step"]
        ops = set().union(*self.seconds.values())
        most = sorted(ops, key=lambda op: -max(each[op] for each in self.seconds.values()))[:SHOWN]
        extra = sorted(ops, key=lambda op: self.seconds["torch"][op] - self.seconds["deepspeed"][op])[:SHOWN]
        shown = {op: {name: round(self.seconds[name][op], 3) for name in NAMES} for op in dict.fromkeys(most + extra)}
        whole = {name: round(sum(self.seconds[name].values()), 3) for name in NAMES}
        rest = {name: round(whole[name] - self.seconds[name]["aten::mm"], 3) for name in NAMES}
        between = {name: round(wall[name]["mean"] - whole[name], 3) for name in NAMES}
        return {
            "cpu_s_of_a_step": whole,
            "without_matrix_products": rest,
            "between_operators_s": between,
            "operators": shown,
        }


def profiled(turn: training.Turn, folder: Path) -> dict[str, Any]:
    """`training.measure` with Profiled for its contest."""
    training.Contest = Profiled  # type: ignore[misc]
    return training.measure(turn, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="a tiny model, for CI")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= {**QUIET, "DS_ACCELERATOR": "cpu"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    with tempfile.TemporaryDirectory() as folder:
        files = {"alpaca_zh": training.write_pairs(Path(folder) / "pairs.jsonl", drawn(600))}
        shape = "tiny" if options.short else "29m"
        turn = training.Turn(shape, NAMES, options.steps, files, training.ON_CPU)
        result = training.in_process(profiled, turn, Path(folder))
    result |= {"steps": options.steps, "versions": machine.versions("torch", "deepspeed")}
    path = machine.write(
        options.out or (machine.PASSING if options.short else machine.RESULTS), "training_profile", result
    )
    print(json.dumps(result["lengths"], indent=2))
    print(f"written to {path}")


if __name__ == "__main__":
    main()
