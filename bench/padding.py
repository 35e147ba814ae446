"""How many tokens each way of batching computes for the same samples: arithmetic on their lengths, without any training.

    python bench/padding.py [--out DIR]

The lengths are those of the demo's seed pairs and of alpaca_zh's deciles, as in bench/training.py. Shares are useful ÷
computed tokens over the whole steps of one epoch; with several ranks, computed are the tokens that all could have
computed in the time of the busiest. `packed, at most` is what no way of sharing a step out can exceed: the busiest rank has its
longest sample or the mean of all ranks, whichever is more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import RESULTS, write
from plain_loop import in_order
from shapes import drawn, save_shape

from kun_ray.demo import tiny
from kun_ray.prompts import load_tokenizer
from kun_ray.steps import StepsConfig
from kun_ray.store import Folder
from kun_ray.train import data, packing
from kun_ray.train.config import DataConfig

MAX_TOKENS = 2048
"""Of one micro-batch, and of one sample."""
STEPS = [(1, 32), (2, 32), (8, 64), (16, 64), (16, 128), (16, 256)]
"""Ranks, and samples a step; steps grow with the ranks, as in the shipped profiles."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sources = {"seeds": tiny.seeds(), "alpaca_zh": drawn(600)}
    with tempfile.TemporaryDirectory() as folder:
        found = {name: measure(Path(folder), name, pairs) for name, pairs in sources.items()}
    result = {"max_tokens": MAX_TOKENS, "useful_share_of_computed_tokens": found}
    print(json.dumps(result, indent=2), f"\n{write(options.out, 'padding', result)}")


def measure(folder: Path, name: str, pairs: list[dict[str, str]]) -> dict[str, Any]:
    """The shares of each way of batching for one set of pairs."""
    save_shape("tiny", folder / "model")
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    of = [DataConfig(path=str(folder / f"{name}.jsonl"))]
    data.tokenize(of, StepsConfig(), load_tokenizer(str(folder / "model")), MAX_TOKENS, Folder(str(folder)), name)
    samples = data.read_samples(Folder(str(folder)), name)
    return {
        "samples": len(samples),
        "packed": {f"{ranks} ranks, {size} a step": share(samples, "packed", ranks, size) for ranks, size in STEPS},
        "packed, at most": {f"{ranks} ranks, {size} a step": at_most(samples, ranks, size) for ranks, size in STEPS},
        "padded": share(samples, "padded"),
        "padded, in the order of arrival": share(samples, "arrival"),
        "padded, eight at a time as they come": share(samples, "eights"),
    }


def share(samples: data.Samples, way: str, ranks: int = 1, size: int = 32) -> float | None:
    """Useful ÷ computed tokens; None where the samples do not fill a step."""
    useful, computed = 0, 0.0
    for step in whole_steps(samples, size):
        for micro in batched(way, step, samples.lengths, ranks):
            tokens = sum(int(samples.lengths[part].sum()) for part in micro)
            useful += tokens
            computed += tokens / packing.efficiency(micro, samples.lengths, way == "packed")
    return round(useful / computed, 4) if computed else None


def at_most(samples: data.Samples, ranks: int, size: int) -> float | None:
    """The largest share that any way of sharing whole samples out to the ranks could reach; None as in `share`."""
    lengths = [samples.lengths[step] for step in whole_steps(samples, size)]
    computed = sum(max(ranks * int(step.max()), int(step.sum())) for step in lengths)
    return round(sum(int(step.sum()) for step in lengths) / computed, 4) if computed else None


def whole_steps(samples: data.Samples, size: int) -> list[Any]:
    """The samples of each step of one epoch, less the last if it is not full."""
    steps = packing.steps_of(packing.epoch_order(samples.data, [1.0], 0, 0), size)
    return [step for step in steps if len(step) == size]


def batched(way: str, step: Any, lengths: Any, ranks: int) -> list[packing.Micro]:
    """One step's micro-batches."""
    if way == "arrival":
        return [[part] for part in in_order(step, lengths, MAX_TOKENS)]
    if way == "eights":  # whatever their lengths, as trainers do that are told a batch size
        return [[[int(sample) for sample in step[first : first + 8]]] for first in range(0, len(step), 8)]
    return packing.micro_batches(step, lengths, ranks, MAX_TOKENS, way == "packed")


if __name__ == "__main__":
    main()
