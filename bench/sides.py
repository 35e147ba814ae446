"""The two sides of bench/engine.py: a kun_ray pool under Ray Data whose rows arrive turn by turn, and `vllm.LLM`.

Both decode replies of the same lengths. Ray ships neither by value: workers import this file beside engine.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import statistics
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

import kun_ray.generate as stage
from kun_ray.board import new_board
from kun_ray.engine import Engine, engine_arguments
from kun_ray.generate import GenerateConfig, build_dataset
from kun_ray.pool import Pool, PoolConfig
from kun_ray.prompts import build_prompt, load_tokenizer
from kun_ray.replies import Reply
from kun_ray.schema import DOCUMENT, to_table
from kun_ray.steps import Sampling, Step

KUN = {"temperature": 0.5, "top_p": 0.95, "repetition_penalty": 1.2, "ignore_eos": True}
"""The sampling of the decoded verdict in Kun's script, but for its length."""
SCORING: dict[str, dict[str, Any]] = {
    "choose": {"max_tokens": 1, "temperature": 0.0, "logprob_token_ids": [100, 200], "detokenize": False},
    **{f"decode_{length}": {"max_tokens": length, **KUN} for length in (8, 64, 256)},
}
"""Ways to score. Eight tokens are more than a bare verdict has, 64 the most that conf/prompts.yaml allows it, 256 one with its reasons."""
CORES = sorted(os.sched_getaffinity(0))
"""What this process may run on when it begins."""


@dataclasses.dataclass
class WholeReplies(Sampling):
    """Sampling that no end token cuts short: random weights draw one now and then."""

    ignore_eos: bool = True


class BenchPool(Pool):
    """The package's Pool whose replies have the lengths of `reply_tokens`, which random weights would not end at."""

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return super()._build_engine(path, [])

    def __init__(self, name: str, config: PoolConfig, steps: Any, board: Any = None) -> None:
        self._mean_tokens = steps.label.max_chars  # where the bench keeps it; no reply may be too long for it
        steps = dataclasses.replace(steps, label=dataclasses.replace(steps.label, max_chars=10**6))
        super().__init__(name, config, steps, board)

    async def _ask(self, step: Step, prompt: list[int]) -> Reply:
        return dataclasses.replace(
            await super()._ask(step, prompt), finish_reason="stop"
        )  # cut short is no failure here

    async def _step(self, step: Step, row: dict[str, Any]) -> dict[str, Any]:
        assert step.sampling is not None
        most = reply_tokens(row["text"], self._mean_tokens, step.sampling.max_tokens)
        whole = WholeReplies(**{**dataclasses.asdict(step.sampling), "max_tokens": most})
        one = dataclasses.replace(step, sampling=whole)
        turn = int(row["doc_id"][:8], 16)
        began = self._counters.setdefault(f"began_{turn}", time.time())  # type: ignore[arg-type]
        found = await super()._step(one, row)
        if self._engine.stats is not None:
            self._counters["steps"] = self._engine.stats.num_steps
        self._counters[f"lasted_{turn}"] = time.time() - began  # type: ignore[assignment]
        return found


class OurRun:
    """One streaming execution of kun_ray over rows that arrive turn by turn: each turn's read waits for its gate."""

    def __init__(self, config: GenerateConfig, rows: list[list[dict[str, Any]]], folder: Path) -> None:
        setattr(stage, "Pool", BenchPool)  # noqa: B010 - build_dataset names the class; the bench's differs in its replies' lengths only
        self._gates = [folder / f"gate-{index}" for index in range(len(rows))]
        self._num_rows = len(rows[0])
        self._board = new_board()
        self._before = dict.fromkeys(("rows", "prompt_tokens", "cached_tokens", "output_tokens", "steps"), 0.0)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        dataset = build_dataset(config, read_gated(rows, self._gates), self._board)
        self._thread = threading.Thread(target=lambda: list(dataset.iter_internal_ref_bundles()), daemon=True)
        self._thread.start()

    def turn(self, index: int) -> dict[str, Any]:
        """Opens the gate of one turn and waits for its last row.

        `seconds` are those from its first row in the engine to its last one out; `from_opening_s` begin with the gate.
        """
        started = time.perf_counter()
        self._gates[index].touch()
        wanted = self._before["rows"] + self._num_rows
        while (now := self._counters()).get("rows", 0) < wanted:
            if not self._thread.is_alive():
                raise RuntimeError("the pipeline ended early; see the log above")
            time.sleep(0.05)  # each look costs the driver and the board a millisecond of a core
        whole = time.perf_counter() - started
        found = {key: int(now.get(key, 0) - self._before[key]) for key in self._before}
        self._before = {key: now.get(key, 0) for key in self._before}
        return {"seconds": round(now[f"lasted_{index}"], 4), "from_opening_s": round(whole, 4), **found}

    def finish(self) -> None:
        """Ends the execution, which frees its GPU."""
        for gate in self._gates:
            gate.touch()
        self._thread.join()

    def _counters(self) -> dict[str, float]:
        replicas = ray.get(self._board.snapshot.remote()).get("label", {})
        return dict(next(iter(replicas.values()), {}))


class Gated(Datasource):
    """Turns of rows, each handed out once its gate file exists."""

    def __init__(self, rows: list[list[dict[str, Any]]], gates: list[Path]) -> None:
        super().__init__()
        self._tables = [to_table(turn, DOCUMENT) for turn in rows]
        self._gates = gates

    def estimate_inmemory_data_size(self) -> int:
        return sum(table.nbytes for table in self._tables)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        def task(table: pa.Table, before: Path | None, gate: Path) -> ReadTask:
            def read() -> Iterator[pa.Table]:
                while not gate.exists():  # a dozen that look often would take a third of the core from all the rest
                    time.sleep(0.01 if before is None or before.exists() else 0.5)
                yield table

            metadata = BlockMetadata(num_rows=len(table), size_bytes=table.nbytes, input_files=None, exec_stats=None)
            return ReadTask(read, metadata, schema=DOCUMENT)

        return [task(*turn) for turn in zip(self._tables, [None, *self._gates], self._gates, strict=False)]


def read_gated(rows: list[list[dict[str, Any]]], gates: list[Path]) -> ray.data.Dataset:
    """The turns' rows. A turn that waits for its gate is a task, and holds next to nothing of a CPU."""
    few = {"num_cpus": 0.01}
    return ray.data.read_datasource(Gated(rows, gates), override_num_blocks=len(rows), ray_remote_args=few)


def llm_arguments(pool: PoolConfig) -> dict[str, Any]:
    """What `vllm.LLM` and `ray.data.llm` take of a pool's engine arguments."""
    return {k: v for k, v in engine_arguments(pool, pool.model).items() if k != "enable_log_requests"}


def new_llm(pool: PoolConfig) -> tuple[Any, Callable[[], int]]:
    """A `vllm.LLM` with a pool's engine arguments, and how many steps it has taken so far."""
    from vllm import LLM

    llm = LLM(**llm_arguments(pool))
    num_steps, step = 0, llm.llm_engine.step

    def counted() -> Any:
        nonlocal num_steps
        num_steps += 1
        return step()

    setattr(llm.llm_engine, "step", counted)  # noqa: B010 - its type is a method's
    return llm, lambda: num_steps


class Raw:
    """`vllm.LLM`, given all prompts of a turn at once, already tokenised."""

    def __init__(self, pool: PoolConfig, config: GenerateConfig) -> None:
        assert config.steps.label is not None
        self._label = config.steps.label
        self._llm, self._num_steps = new_llm(pool)
        self._tokenizer = load_tokenizer(pool.model)
        self._prompt = build_prompt(self._tokenizer, self._label.prompt)
        assert config.steps.score is not None
        self._rubric = build_prompt(self._tokenizer, config.steps.score.prompt)

    def turn(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = [{"prompt_token_ids": self._prompt.render(row)} for row in rows]
        given, most = dataclasses.asdict(self._label.sampling), self._label.sampling.max_tokens
        lengths = [reply_tokens(row["text"], self._label.max_chars, most) for row in rows]
        params = [
            SamplingParams(
                **{**given, "max_tokens": length, "ignore_eos": True}, output_kind=RequestOutputKind.FINAL_ONLY
            )
            for length in lengths
        ]
        started, steps = time.perf_counter(), self._num_steps()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 4),
            "rows": len(outputs),
            "prompt_tokens": sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
            "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
            "steps": self._num_steps() - steps,
        }

    def score_turn(self, rows: list[dict[str, Any]], number: int, way: str) -> dict[str, Any]:
        """Judges part of each text in one of SCORING's ways; all share the rubric as prefix, and nothing else.

        Each number takes another part, or a turn would find the words of the one before in the cache.
        """
        from vllm import SamplingParams

        instructions = [row["text"][14 * number : 14 * number + 60] for row in rows]
        assert all(len(instruction) == 60 for instruction in instructions), "texts are too short for so many turns"
        prompts = [{"prompt_token_ids": self._rubric.render({"instruction": text})} for text in instructions]
        started, steps = time.perf_counter(), self._num_steps()
        outputs = self._llm.generate(prompts, SamplingParams(**SCORING[way]), use_tqdm=False)  # type: ignore[arg-type]
        return {
            "seconds": time.perf_counter() - started,
            "rows": len(prompts),
            "prompt_tokens": sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
            "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
            "steps": self._num_steps() - steps,
        }

    def score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows/s of one prefill per row against decoding, in turn."""
        forth, back = [*SCORING], [*SCORING][::-1]
        order = [*forth, *back, *forth, *back]
        turns = [(way, self.score_turn(rows, number, way)) for number, way in enumerate(order)]
        counted = {way: [turn for name, turn in turns[len(forth) :] if name == way] for way in forth}  # first: warm-up
        rates = {way: statistics.median(t["rows"] / t["seconds"] for t in found) for way, found in counted.items()}
        cached = {
            way: statistics.median(t["cached_tokens"] / t["prompt_tokens"] for t in found)
            for way, found in counted.items()
        }
        lengths = [turn["prompt_tokens"] / turn["rows"] for _, turn in turns]
        return {
            "rows": len(rows),
            "prompt_tokens_mean": round(statistics.mean(lengths), 1),
            **{f"{way}_rows_per_s": round(rate, 1) for way, rate in rates.items()},
            **{f"choose_over_{way}": round(rates["choose"] / rates[way], 2) for way in forth[1:]},
            "prefix_cache_hit_rate": {way: round(share, 4) for way, share in cached.items()},
        }


def new_raw(options: dict[str, Any], pool: PoolConfig, config: GenerateConfig) -> Any:
    return ray.remote(**options)(Raw).remote(pool, config)


def give_engines_their_cores(threads: int) -> None:
    """Engines' processes get the machine's last cores to themselves, as they would a card; all others of this tree the first.

    Both sides' engines get the same ones, for only one of them works at a time.
    """
    engines, others = CORES[-threads:], CORES[:-threads] or CORES
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            mine = engines if process.name().startswith("VLLM::") else others
            for thread in process.threads():
                os.sched_setaffinity(thread.id, mine)


def engines_cpu_s() -> float:
    """CPU seconds that the engines' processes of this tree have had so far."""
    found = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("VLLM::"):
                times = process.cpu_times()
                found += times.user + times.system
    return found


def reply_tokens(text: str, mean: int, most: int) -> int:
    """How many tokens the reply to a text has: drawn from its hash, exponentially about `mean`, at most `most`.

    Skewed, as replies are, and the same to whoever is asked, so that a ratio of speeds has no luck in it.
    """
    part = (zlib.crc32(text.encode()) + 1) / 2**32
    return min(most, 1 + int(-mean * math.log(part)))
