"""What packing gains, what the training loop costs beside plain PyTorch, and how near a card's limit it comes.

    python bench/training.py                         on CPUs; --data FILE takes the lengths of an Alpaca file of yours
    python bench/training.py --loops                 only what the loop costs: more steps of fewer contestants
    python bench/training.py --short                 the same with fewer steps and a smaller model, for CI
    python bench/training.py --gpu --out DIR         MFU of 0.5B–3B random-weight Llamas at 4,096 tokens, on one GPU
    python bench/training.py --gpu --smoke           the same path with a tiny model on CPUs

Every step of kun_ray is the loop's own (`kun_ray.train.loop`), on one rank without Ray Train, with ZeRO-3, the driver's
Line and metrics.jsonl. Contestants take the same steps of the same data in turn (A B C, C B A, B C A, A C B, …); the first step warms up.
`packed` and `padded` are the configuration's two values; `arrival` pads without sorting, in the order in which samples come,
as trainers do whose batches are drawn at random. `torch`, `deepspeed` (on the loop's own engine) and `deepspeed_stage_0`, which
shards nothing, get the packed tensors ready-made (plain_loop.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from plain_loop import PlainTorch, arrival, plain_deepspeed, synchronize, torchs_linear, without_zero
from shapes import SHAPES, card_limits, drawn, save_random

from kun_ray import execution
from kun_ray.config import RayConfig, load
from kun_ray.cost import cost_of
from kun_ray.demo import tiny
from kun_ray.prompts import load_tokenizer
from kun_ray.store import Folder
from kun_ray.train import data, loop, packing
from kun_ray.train.batch import collate, learning_rate
from kun_ray.train.config import DataConfig, TrainConfig
from kun_ray.train.launch import QUIET, Line
from kun_ray.train.model import attention

ON_CPU = ["accelerator=cpu", "dtype=float32", "max_tokens=2048", "tokens_per_micro_batch=2048", "batch_size=32"]
ON_CPU += ["gradient_checkpointing=false", "lr=1e-4"]
GPU_TURNS = [
    ("1.5b", "auto"),
    ("1.5b", "packed"),
    ("0.5b", "packed"),
    ("3b", "packed"),
    ("1.5b", "flex_attention"),
    ("0.5b", "auto"),
    ("3b", "auto"),
]
"""Shape and attention, the most telling first."""
GPU_BUDGET_S = 70.0
"""After so long no further one begins."""


@dataclasses.dataclass
class Turn:
    """What one process measures. `names`: contestants, in their first order."""

    shape: str
    names: list[str]
    steps: int
    pairs: dict[str, str]
    """Name of a set of lengths → its Alpaca file."""
    settings: list[str]
    peak_flops: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--data", type=Path, help="Alpaca .json or .jsonl whose lengths stand for real ones")
    parser.add_argument("--loops", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="with --gpu: tiny shapes on CPUs")
    parser.add_argument("--steps", type=int, help="optimizer steps of each contestant that count")
    options = parser.parse_args()
    kind = "-gpu" if options.gpu else "-loops" if options.loops else ""
    options.name = f"training{kind}{'-short' if options.short or options.smoke else ''}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # or its folder would stay
    os.environ |= {**QUIET, "DS_ACCELERATOR": "cuda" if options.gpu and not options.smoke else "cpu"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    with tempfile.TemporaryDirectory() as folder:
        result = (on_gpu if options.gpu else on_cpu)(options, Path(folder))
    result["versions"] = machine.versions("torch", "transformers", "deepspeed", "ray")
    print(json.dumps({**result, "turns": None}, indent=2))
    machine.write(options.out, options.name, result)


def on_cpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Packing and overhead with a model of tens of millions of parameters, float32, one rank on all cores."""
    files = {}
    if options.short or not options.loops:
        files["seeds"] = write_pairs(folder / "seeds.jsonl", tiny.seeds())
    if not options.short:
        files["alpaca_zh"] = str(options.data) if options.data else write_pairs(folder / "alpaca.jsonl", drawn(600))
    steps = options.steps or (2 if options.short else 24 if options.loops else 9)
    shape = "tiny" if options.short else "29m"
    names = ["packed", *([] if options.loops else ["padded", "arrival"])]
    names += PLAIN if options.loops or options.short else []
    found = in_process(measure, Turn(shape, names, steps, files, ON_CPU), folder)
    return {"shape": shape, "sources": {name: Path(file).name for name, file in files.items()}, **found}


def on_gpu(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """MFU against the card's measured matmul rate. Each shape has a process of its own, and its own end."""
    limits = in_process(card_limits, options.smoke)
    peak = limits["matmul_flops_per_s"]
    files = {"alpaca_zh deciles": write_pairs(folder / "pairs.jsonl", drawn(2000))}
    settings = ["max_tokens=2048", "tokens_per_micro_batch=4096", "batch_size=64", "gradient_checkpointing=false"]
    settings.append(f"accelerator={'cpu' if options.smoke else 'gpu'}")
    steps = options.steps or (2 if options.smoke else 8)
    found, started = dict[str, Any](), time.monotonic()
    for shape, kind in [("tiny", "auto"), ("tiny", "packed")] if options.smoke else GPU_TURNS:
        if time.monotonic() - started > GPU_BUDGET_S:
            found[f"{shape} {kind}"] = "left out: the time is over"
            continue
        names = ["packed", "torch", "deepspeed"]
        if not options.smoke and 2 * 16 * SHAPES[shape].num_parameters() > 0.75 * limits["memory_bytes"]:
            names.remove("torch")  # both optimizers must lie on the card
        turn = Turn(shape, names, steps, files, [*settings, f"attention={kind}"], peak)
        try:
            found[f"{shape} {kind}"] = in_process(measure, turn, folder)
        except Exception as error:  # the other shapes still count
            found[f"{shape} {kind}"] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps({f"{shape} {kind}": found[f"{shape} {kind}"]}), flush=True)
        result = {"card": limits, "mark": "packed MFU of measured peak ≥ 0.45 at ≥ 1B", "turns": found}
        machine.write(options.out, options.name, result)  # kept at once: the time may end any moment
    failed = [name for name, turn in found.items() if "error" in turn]
    if failed and (options.smoke or len(failed) == len(found)):
        raise SystemExit(f"no figure of {', '.join(failed)}: {found[failed[0]]['error']}")
    return result


def in_process(work: Any, *arguments: Any) -> Any:
    """Calls `work` in a new process, so that its memory and DeepSpeed's globals end with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def measure(turn: Turn, folder: Path) -> dict[str, Any]:
    """All contestants of one shape over all sets of lengths."""
    path, output = folder / f"model-{turn.shape}", tempfile.mkdtemp(dir=folder)
    entries = {name: [DataConfig(path=file)] for name, file in turn.pairs.items()}
    config = load(
        TrainConfig,
        [f"model={path}", f"output={output}", f"data=[{{path: {next(iter(turn.pairs.values()))}}}]", *turn.settings],
    )
    save_random(turn.shape, path, "cuda" if config.accelerator == "gpu" else "cpu")
    tokenizer = load_tokenizer(str(path))
    store = Folder(output)
    samples = {}
    for name, of in entries.items():
        data.tokenize(of, config.steps, tokenizer, config.max_tokens, store, name)
        samples[name] = data.read_samples(store, name)
    execution.connect(RayConfig(num_cpus=1))
    with socket.socket() as free:  # once Ray has taken its own ports
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    run = loop.set_up(config, str(path))
    run.engine.train()
    job = {"config": config, "peak_flops": turn.peak_flops, "line": Line.remote(), "cost": cost_of(str(path))}  # type: ignore[attr-defined]
    contest = Contest(turn, run, job)
    found = {name: contest.over(these) for name, these in samples.items()}
    return {
        "parameters": job["cost"].num_parameters,
        "settings": turn.settings,
        "attention": attention(config),
        "threads": torch.get_num_threads(),
        "memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if config.accelerator == "gpu" else None,
        "lengths": found,
    }


class Contest:
    """The contestants, and whose turn it is."""

    def __init__(self, turn: Turn, run: loop.Run, job: dict[str, Any]) -> None:
        self._turn, self._run, self._job = turn, run, job
        self._unpacked = dataclasses.replace(run, config=dataclasses.replace(run.config, packing=False))
        self._torch = PlainTorch(run.path, run.config, run.device) if "torch" in turn.names else None
        self._stage_0 = without_zero(run.path, run.config, run.device) if "deepspeed_stage_0" in turn.names else None
        self._micros = loop._micros

    def over(self, samples: data.Samples) -> dict[str, Any]:
        """Seconds of each contestant's steps on these samples, and what follows from them."""
        times: dict[str, list[float]] = {name: [] for name in self._turn.names}
        useful: list[int] = []
        batches = self._batches(samples)
        losses: dict[str, float] = {}
        for number in range(self._turn.steps + 1):
            batch = next(batches)
            useful.append(int(samples.num_supervised[batch].sum()))
            for name in machine.in_turn(self._turn.names, number):
                gc.collect()
                seconds, loss = self._timed(name, samples, batch, number)
                times[name].append(seconds)
                losses.setdefault(name, loss)
            print(f"step {number}:", {n: round(t[-1], 3) for n, t in times.items()}, file=sys.stderr, flush=True)
        if not np.isfinite(list(losses.values())).all():
            raise FloatingPointError(f"losses of the first step: {losses}")
        counted = {name: seconds[1:] for name, seconds in times.items()}
        rates = {n: [u / s for u, s in zip(useful[1:], t, strict=True)] for n, t in counted.items()}
        ratios = {
            f"packed_over_{name}": machine.spread(
                [b / a for a, b in zip(counted["packed"], counted[name], strict=True)]
            )
            for name in counted
            if name != "packed"
        }
        plain = [name for name in PLAIN if name in counted]

        def beyond(longer: str, shorter: str) -> tuple[float, list[float]]:
            shares = [a / b - 1 for a, b in zip(counted[longer], counted[shorter], strict=True)]
            return round(statistics.median(shares), 4), machine.median_interval([shares])

        overheads = {name: beyond("packed", name) for name in plain}
        return {
            "samples": len(samples),
            "tokens_min_median_max": [int(v) for v in np.percentile(samples.lengths, [0, 50, 100])],
            "supervised_tokens_per_s": {name: machine.spread(rate) for name, rate in rates.items()},
            "seconds_per_step": {name: machine.spread(seconds) for name, seconds in counted.items()},
            "speed_ratios": ratios,
            "loop_overhead": {name: median for name, (median, _) in overheads.items()},
            "loop_overhead_90_percent": {name: interval for name, (_, interval) in overheads.items()},
            "beyond_torch": {name: beyond(name, "torch") for name in plain if name != "torch"},
            "seconds_of_each_step": {name: [round(s, 3) for s in seconds] for name, seconds in counted.items()},
            "mfu": self._mfu(counted, samples),
            "first_losses": losses,
        }

    def _timed(self, name: str, samples: data.Samples, batch: Any, number: int) -> tuple[float, float]:
        """Seconds and loss of one step of one contestant. Ready-made tensors are made before the clock starts."""
        run, total = self._run, self._turn.steps + 1
        num_supervised = int(samples.num_supervised[batch].sum())
        micros = self._micros(run, batch, samples)
        lr = learning_rate(run.config, number, total)
        ready = [collate(samples, micro[0], True, run.device) for micro in micros] if name in PLAIN else []
        synchronize(run.device)
        started = time.perf_counter()
        if name == "torch":
            assert self._torch is not None
            loss = self._torch.step(ready, num_supervised, lr)
        elif name == "deepspeed":
            loss = plain_deepspeed(run.engine, ready, num_supervised, lr)
        elif name == "deepspeed_stage_0":
            with torchs_linear():
                loss = plain_deepspeed(self._stage_0, ready, num_supervised, lr)
        else:
            setattr(loop, "_micros", arrival if name == "arrival" else self._micros)  # noqa: B010 - the loop never pads so
            ours = run if name == "packed" else self._unpacked
            line, _, _ = loop._step(ours, samples, batch, number, total, self._job)
            ours.log(epoch=1, **line)
            loss = line["loss"]
        synchronize(run.device)
        return time.perf_counter() - started, float(loss)

    def _batches(self, samples: data.Samples) -> Iterator[Any]:
        """Whole steps in the loop's own order, epoch after epoch."""
        for epoch in range(10**6):
            order = packing.epoch_order(samples.data, [1.0], epoch, self._run.config.seed)
            size = self._run.config.batch_size
            yield from (batch for batch in packing.steps_of(order, size) if len(batch) == size)

    def _mfu(self, counted: dict[str, list[float]], samples: data.Samples) -> dict[str, Any] | None:
        if self._turn.peak_flops is None:
            return None
        batches = self._batches(samples)
        next(batches)
        steps = [next(batches) for _ in range(self._turn.steps)]
        flops = [self._job["cost"].flops(samples.lengths[batch]) / self._turn.peak_flops for batch in steps]
        return {n: machine.spread([f / s for f, s in zip(flops, t, strict=True)]) for n, t in counted.items()}


PLAIN = ("torch", "deepspeed", "deepspeed_stage_0")


def write_pairs(path: Path, pairs: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
    return str(path)


if __name__ == "__main__":
    main()
