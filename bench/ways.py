"""The three ways of bench/rivals.py to label the same rows: kun_ray, `ray.data.llm`, and one `LLM.generate` per file.

Ray ships none of it by value: workers import this file beside rivals.py.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.data.block import BlockAccessor
from sides import BenchPool, llm_arguments, new_llm, read_gated, reply_tokens

import kun_ray.generate as stage
from kun_ray import execution
from kun_ray.board import new_board
from kun_ray.config import RayConfig
from kun_ray.engine import environment
from kun_ray.generate import GenerateConfig, build_dataset
from kun_ray.prompts import load_tokenizer

Rows = list[list[dict[str, Any]]]
"""The documents of each turn."""
Turn = Callable[[int], dict[str, Any]]
"""Runs one turn; returns its seconds, its rows, and what else the way can tell."""
FILE_ROWS = 128
"""Rows of one input file."""
NUM_CPUS = 16
"""Logical ones of each Ray."""


def new_turn(name: str, config: GenerateConfig, rows: Rows, folder: Path) -> Turn:
    """Prepares one way in this process; its first turn loads the engine."""
    if name == "per_file":
        return PerFile(config, rows).turn
    execution.connect(RayConfig(num_cpus=NUM_CPUS, object_store_gb=1.0))
    if name == "ray_data_llm":
        return Stream(rows, folder, functools.partial(ray_data_llm, config)).turn
    setattr(stage, "Pool", BenchPool)  # noqa: B010 - its replies have lengths that random weights do not give them
    board = new_board()
    return with_steps(Stream(rows, folder, functools.partial(build_dataset, config, board=board)).turn, board)


def with_steps(turn: Turn, board: Any) -> Turn:
    """`turn`, which also tells how many steps its engine took."""

    def steps() -> int:
        replicas = ray.get(board.snapshot.remote()).get("label", {})
        return int(sum(counters.get("steps", 0) for counters in replicas.values()))

    def counted(index: int) -> dict[str, Any]:
        before = steps()
        return {**turn(index), "steps": steps() - before}

    return counted


class Stream:
    """One streaming execution over rows that arrive turn by turn: each turn's read waits for its gate."""

    def __init__(self, rows: Rows, folder: Path, transform: Callable[[Any], Any]) -> None:
        self._gates = [folder / f"gate-{index}" for index in range(len(rows))]
        self._num_rows, self._done, self._wanted = [len(turn) for turn in rows], 0, 0
        self._failed = 0
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
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


def ray_data_llm(config: GenerateConfig, documents: ray.data.Dataset) -> ray.data.Dataset:
    """Ray's own batch inference with the same model, prompt, sampling and engine arguments."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    pool, turns, params = config.pools["label"], messages(config), sampling(config)
    bundle = {"CPU": 1, **({"GPU": 1} if pool.accelerator == "gpu" else {})}
    processor = build_processor(
        vLLMEngineProcessorConfig(
            model_source=pool.model,
            engine_kwargs={k: v for k, v in llm_arguments(pool).items() if k != "model"},
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

    def __init__(self, config: GenerateConfig, rows: Rows) -> None:
        from vllm import SamplingParams

        self._rows = rows
        self._llm, self._num_steps = new_llm(config.pools["label"])
        self._new_params, self._sampling = SamplingParams, sampling(config)
        self._tokenizer = load_tokenizer(config.pools["label"].model)
        self._messages = messages(config)

    def turn(self, index: int) -> dict[str, Any]:
        """Seconds, rows, tokens and steps of one turn."""
        rows = self._rows[index]
        started, tokens, steps = time.perf_counter(), 0, self._num_steps()
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
        return {"seconds": seconds, "rows": len(rows), "output_tokens": tokens, "steps": self._num_steps() - steps}


def batched(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [rows[start : start + FILE_ROWS] for start in range(0, len(rows), FILE_ROWS)]


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
