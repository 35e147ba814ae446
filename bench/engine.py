"""Engine efficiency and scoring speed, each beside its rival in the same run.

    python bench/engine.py --shape 7b --out build/bench            on one GPU
    python bench/engine.py --shape tiny --cpu --rows 64 --pairs 2  the same path on a laptop

Efficiency: output tokens/s of a kun_ray pool under Ray Data ÷ those of `vllm.LLM.generate` given all prompts at once; the
same random-weight model, prompts, sampling, lengths and engine arguments, in turn (A B B A …), from the first row in the
engine to the last one out; `efficiency_from_opening` begins where a reader is told that there are rows. Lengths are skewed
(exponential). Tokenising counts against kun_ray only. On CPUs the processes of both engines have the machine's last
--threads cores to themselves, as they would a card, and all else the first ones.
Scoring: prompts that share a rubric, one prefill (`choose`) ÷ decoding.
Model shapes are real, weights are vLLM's `load_format: dummy`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.data
from machine import PASSING, median_interval, write
from shapes import SHAPES, card_limits, save_shape, texts
from sides import CORES, OurRun, engines_cpu_s, give_engines_their_cores, new_raw

from kun_ray import execution
from kun_ray.config import RayConfig, load
from kun_ray.engine import environment
from kun_ray.generate import GenerateConfig
from kun_ray.schema import OK

WORKLOADS = {"label-like": (48, 256), "polish-like": (300, 1024)}
"""Mean and largest number of output tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--workload", choices=WORKLOADS, default="label-like")
    parser.add_argument("--rows", type=int, default=1024, help="rows of one turn, a multiple of 64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--fresh", type=int, default=1, help="how many times both engines are built; --pairs each time")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.44, help="gpu_memory_utilization of each engine")
    parser.add_argument("--one-engine-at-a-time", action="store_true", help="for models of which a card holds only one")
    parser.add_argument("--scoring", action="store_true", help="also compare choose with decoding")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="with --cpu: OpenMP threads of each engine")
    parser.add_argument("--out", type=Path, default=PASSING, help="a folder; what documents cite lies in bench/results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name, result in measure(options, Path(folder)):  # kept at once: on a lent card the time may end any moment
            write(options.out, name, result)
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=2))


def measure(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs all turns; yields a file's name and what it is to hold: after each pair that counts, and after the scoring."""
    save_shape(options.shape, folder / "model")
    config = bench_config(options, folder)
    pool = config.pools["label"]
    execution.connect(RayConfig(num_cpus=16))
    limits = ray.get(ray.remote(num_gpus=0 if options.cpu else 0.1, max_calls=1)(card_limits).remote(options.cpu))
    rows = documents(options.rows, options.pairs + 1)
    gated = [*rows, rows[0][:1]]  # an execution at its end would take its engine down within the last turn
    share = 0 if options.cpu else (1.0 if options.one_engine_at_a_time else 0.5)
    raw_options = {"num_gpus": share, "runtime_env": {"env_vars": environment(pool, 2)}}
    turns: list[dict[str, Any]] = []
    name = f"engine-{options.shape}-{options.workload}{'-alone' if options.one_engine_at_a_time else ''}"

    def take(engines: int, index: int, who: str, turn: Callable[[], dict[str, Any]]) -> None:
        if options.cpu and index:
            give_engines_their_cores(options.threads)
        before = engines_cpu_s()
        found = turn()
        spent = round(engines_cpu_s() - before, 2)
        turns.append({"who": who, "engines": engines, "pair": index, **found, "engine_cpu_s": spent})
        print(json.dumps(turns[-1]), flush=True)

    for engines in range(options.fresh):  # two engines of a kind are not equally fast
        own = folder / f"engines-{engines}"
        own.mkdir()
        give_engines_their_cores(len(CORES))  # all of them, to load
        raw: Any = None
        if not options.one_engine_at_a_time:
            raw = new_raw(raw_options, pool, config)
            ray.get(raw.turn.remote(rows[0][:8]))  # loads and warms up before the other engine asks for memory
        ours = OurRun(config, gated, own)
        if options.one_engine_at_a_time:
            for index in range(options.pairs + 1):
                take(engines, index, "kun_ray", functools.partial(ours.turn, index))
            ours.finish()
            yield name, summarise(options, turns, limits)
            raw = new_raw(raw_options, pool, config)
        for index in range(options.pairs + 1):
            sides = {"vllm.LLM": functools.partial(turn_of, raw, rows[index])}
            if not options.one_engine_at_a_time:
                mine = {"kun_ray": functools.partial(ours.turn, index)}
                sides = {**sides, **mine} if (index + engines) % 2 else {**mine, **sides}
            for who, turn in sides.items():
                take(engines, index, who, turn)
            if index:
                yield name, summarise(options, turns, limits)
        if not options.one_engine_at_a_time:
            ours.finish()
        if options.scoring and engines == options.fresh - 1:
            yield (
                f"scoring-{options.shape}",
                {"shape": options.shape, "card": limits, **ray.get(raw.score.remote(rows[0]))},
            )
        ray.kill(raw)


def turn_of(raw: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One turn of `vllm.LLM`, in its actor."""
    return dict(ray.get(raw.turn.remote(rows)))


def summarise(options: argparse.Namespace, turns: list[dict[str, Any]], limits: dict[str, Any]) -> dict[str, Any]:
    """Medians over the pairs (each engine's first pair warms it up and is not counted) and the distance to the card's limits.

    While only kun_ray has had its turns there are no ratios.
    """
    done = {
        who: [(t["engines"], t["pair"]) for t in turns if t["who"] == who and t["pair"]]
        for who in ("kun_ray", "vllm.LLM")
    }
    pairs = sorted(set(done["kun_ray"]) & set(done["vllm.LLM"]) or set(done["kun_ray"]))
    counted = [turn for turn in turns if (turn["engines"], turn["pair"]) in pairs]
    rate = {who: [t["output_tokens"] / t["seconds"] for t in counted if t["who"] == who] for who in done}
    ours = [turn for turn in counted if turn["who"] == "kun_ray"]
    floors = [
        SHAPES[options.shape].floor_seconds(turn, options.max_num_seqs, limits, 4 if options.cpu else 2)
        / turn["seconds"]
        for turn in ours
    ]
    cached = [turn["cached_tokens"] / turn["prompt_tokens"] for turn in ours]
    busy = {who: [t["engine_cpu_s"] / t["seconds"] for t in counted if t["who"] == who] for who in rate if rate[who]}
    mean, most = lengths(options)
    return {
        "shape": options.shape,
        "parameters": SHAPES[options.shape].num_parameters(),
        "workload": options.workload,
        "output_tokens": {"mean": mean, "most": most},
        "rows_per_turn": options.rows,
        "pairs": len(pairs),
        "engines_built": 1 + max(turn["engines"] for turn in turns),
        "max_num_seqs": options.max_num_seqs,
        "threads": options.threads if options.cpu else None,
        "in_turn": not options.one_engine_at_a_time,
        "card": limits,
        "output_tokens_per_s": {who: round(statistics.median(rates), 1) for who, rates in rate.items() if rates},
        "kun_ray_rows_per_s": round(statistics.median([t["rows"] / t["seconds"] for t in ours]), 2),
        **efficiency(counted),
        "steps_of_a_turn": {
            who: statistics.median(t["steps"] for t in counted if t["who"] == who) for who in rate if rate[who]
        },
        "engine_busy": {who: round(statistics.median(shares), 3) for who, shares in busy.items()},
        "fraction_of_card_limit": round(statistics.median(floors), 4),
        "prefix_cache_hit_rate": round(statistics.median(cached), 4),
        "turns": turns,
    }


def efficiency(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the pairs of kun_ray's tokens/s ÷ vllm.LLM's, also since the opening of the input."""
    of_engines: dict[int, list[float]] = {}
    opening: list[float] = []
    theirs = {(t["engines"], t["pair"]): t for t in turns if t["who"] == "vllm.LLM"}
    if not theirs:
        return {}
    for ours in (turn for turn in turns if turn["who"] == "kun_ray"):
        rival = theirs[ours["engines"], ours["pair"]]
        ratio = ours["output_tokens"] / ours["seconds"] * rival["seconds"] / rival["output_tokens"]
        of_engines.setdefault(ours["engines"], []).append(ratio)
        opening.append(ratio * ours["seconds"] / ours["from_opening_s"])
    groups = list(of_engines.values())
    ratios = [ratio for group in groups for ratio in group]
    total = {
        who: sum(t["output_tokens"] for t in turns if t["who"] == who)
        / sum(t["seconds"] for t in turns if t["who"] == who)
        for who in ("kun_ray", "vllm.LLM")
    }
    interval = {"efficiency_90_percent": median_interval(groups)} if len(ratios) > 2 else {}
    return {
        "efficiency": round(statistics.median(ratios), 4),
        **interval,
        "efficiency_of_totals": round(total["kun_ray"] / total["vllm.LLM"], 4),
        "efficiency_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
        "efficiency_of_engines": [round(statistics.median(group), 4) for group in groups],
        "efficiency_from_opening": round(statistics.median(opening), 4),
    }


def lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Mean and largest number of output tokens; a quarter of them for the tiny model."""
    mean, most = WORKLOADS[options.workload]
    return (mean // 4, most // 4) if options.shape == "tiny" else (mean, most)


def bench_config(options: argparse.Namespace, folder: Path) -> GenerateConfig:
    """One pool that runs `label` with the chosen workload's lengths, on the shipped prompts."""
    mean, most = lengths(options)
    share = 1.0 if options.one_engine_at_a_time else 0.5
    engine: dict[str, Any] = {"dtype": "float32" if options.cpu else "bfloat16", "load_format": "dummy"}
    if not options.cpu:
        engine |= {"gpu_memory_utilization": options.memory}
    return load(
        GenerateConfig,
        [
            "conf/prompts.yaml",
            f"input={folder}",
            f"output={folder}/out",
            "pools.label.steps=[label]",
            f"pools.label.model={folder}/model",
            f"pools.label.accelerator={'cpu' if options.cpu else 'gpu'}",
            f"pools.label.gpu_share={share}",
            f"pools.label.cpu_threads={options.threads}",
            f"pools.label.max_num_seqs={options.max_num_seqs}",
            "pools.label.max_model_len=2048",
            *(f"pools.label.engine.{key}={value}" for key, value in engine.items()),
            f"steps.label.sampling.max_tokens={most}",
            f"steps.label.max_chars={mean}",  # how BenchPool and Raw learn the mean length; it limits nothing
        ],
    )


def documents(num_rows: int, num_turns: int) -> list[list[dict[str, Any]]]:
    """Turns of distinct documents of about 300 characters."""
    return [
        [
            {"doc_id": f"{turn:08x}{row:024x}", "source": "bench", "text": text, "meta": "{}", "status": OK}
            for row, text in enumerate(texts(num_rows, seed=turn))
        ]
        for turn in range(num_turns)
    ]


if __name__ == "__main__":
    main()
