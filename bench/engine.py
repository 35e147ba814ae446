"""Engine efficiency and scoring speed, each beside its rival in the same run.

    python bench/engine.py --shape 7b --out build/bench            on one GPU
    python bench/engine.py --shape tiny --cpu --rows 64 --pairs 2  the same path on a laptop

Efficiency: output tokens/s of a kun_ray pool under Ray Data ÷ those of `vllm.LLM.generate` given all prompts at once; the
same random-weight model, prompts, sampling and engine arguments, in turn (A B B A …), from opening the input to the last
row. Lengths are skewed: replies end at one of many stop tokens, so they are geometric. Tokenising counts against kun_ray
only. Scoring: prompts that share a rubric, one prefill (`choose`) ÷ decoding.
Model shapes are real, weights are vLLM's `load_format: dummy`. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask
from shapes import SHAPES, card_limits, save_shape, texts

import kun_ray.generate as stage
from kun_ray import execution
from kun_ray.board import new_board
from kun_ray.config import RayConfig, load
from kun_ray.engine import Engine, VllmEngine, engine_arguments, environment
from kun_ray.generate import GenerateConfig, build_dataset
from kun_ray.pool import Pool, PoolConfig
from kun_ray.prompts import build_prompt, load_tokenizer
from kun_ray.schema import DOCUMENT, OK, to_table

WORKLOADS = {"label-like": (48, 256), "polish-like": (300, 1024)}
"""Mean and largest number of output tokens."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--workload", choices=WORKLOADS, default="label-like")
    parser.add_argument("--rows", type=int, default=1024, help="rows of one turn, a multiple of 64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--memory", type=float, default=0.44, help="gpu_memory_utilization of each engine")
    parser.add_argument("--one-engine-at-a-time", action="store_true", help="for models of which a card holds only one")
    parser.add_argument("--scoring", action="store_true", help="also compare choose with decoding")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"engine-{options.shape}-{options.workload}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "turns"}, indent=2))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs all turns and returns the result."""
    save_shape(options.shape, folder / "model")
    config = bench_config(options, folder)
    pool = config.pools["label"]
    execution.connect(RayConfig(num_cpus=16))
    limits = ray.get(ray.remote(num_gpus=0 if options.cpu else 0.1, max_calls=1)(card_limits).remote(options.cpu))
    rows = documents(options.rows, options.pairs + 1)
    share = 0 if options.cpu else (1.0 if options.one_engine_at_a_time else 0.5)
    raw_options = {"num_gpus": share, "runtime_env": {"env_vars": environment(pool, 2)}}
    turns: list[dict[str, Any]] = []
    if options.one_engine_at_a_time:
        ours = OurRun(config, rows, folder)
        for index in range(options.pairs + 1):
            turns.append({"who": "kun_ray", "pair": index, **ours.turn(index)})
        ours.finish()
        raw = new_raw(raw_options, pool, config)
        for index in range(options.pairs + 1):
            turns.append({"who": "vllm.LLM", "pair": index, **ray.get(raw.turn.remote(rows[index]))})
    else:
        raw = new_raw(raw_options, pool, config)
        ray.get(raw.turn.remote(rows[0][:8]))  # loads and warms up before the other engine asks for memory
        ours = OurRun(config, rows, folder)
        for index in range(options.pairs + 1):
            ours_first = index % 2 == 0
            for who in ("kun_ray", "vllm.LLM") if ours_first else ("vllm.LLM", "kun_ray"):
                found = ours.turn(index) if who == "kun_ray" else ray.get(raw.turn.remote(rows[index]))
                turns.append({"who": who, "pair": index, **found})
                print(json.dumps(turns[-1]), flush=True)
        ours.finish()
    scoring = ray.get(raw.score.remote(rows[0])) if options.scoring else None
    return summarise(options, turns, limits, scoring)


def summarise(
    options: argparse.Namespace, turns: list[dict[str, Any]], limits: dict[str, Any], scoring: dict[str, Any] | None
) -> dict[str, Any]:
    """Medians over the pairs (the first pair warms up and is not counted) and the distance to the card's limits."""
    counted = [turn for turn in turns if turn["pair"] > 0]
    rate = {
        who: [t["output_tokens"] / t["seconds"] for t in counted if t["who"] == who] for who in ("kun_ray", "vllm.LLM")
    }
    ratios = [a / b for a, b in zip(rate["kun_ray"], rate["vllm.LLM"], strict=True)]
    ours = [turn for turn in counted if turn["who"] == "kun_ray"]
    floors = [
        SHAPES[options.shape].floor_seconds(turn, options.max_num_seqs, limits) / turn["seconds"] for turn in ours
    ]
    cached = [t["cached_tokens"] / t["prompt_tokens"] for t in counted if t["who"] == "vllm.LLM"]
    return {
        "shape": options.shape,
        "parameters": SHAPES[options.shape].num_parameters(),
        "workload": options.workload,
        "rows_per_turn": options.rows,
        "pairs": options.pairs,
        "max_num_seqs": options.max_num_seqs,
        "in_turn": not options.one_engine_at_a_time,
        "machine": limits,
        "date": time.strftime("%F"),
        "kun_ray_output_tokens_per_s": round(statistics.median(rate["kun_ray"]), 1),
        "vllm_output_tokens_per_s": round(statistics.median(rate["vllm.LLM"]), 1),
        "kun_ray_rows_per_s": round(statistics.median([t["rows"] / t["seconds"] for t in ours]), 2),
        "efficiency": round(statistics.median(ratios), 4),
        "efficiency_min_max": [round(min(ratios), 4), round(max(ratios), 4)],
        "fraction_of_card_limit": round(statistics.median(floors), 4),
        "prefix_cache_hit_rate": round(statistics.median(cached), 4),
        "scoring": scoring,
        "turns": turns,
    }


def bench_config(options: argparse.Namespace, folder: Path) -> GenerateConfig:
    """One pool that runs `label` with the chosen workload's lengths, on the shipped prompts."""
    mean, most = WORKLOADS[options.workload]
    if options.shape == "tiny":
        mean, most = mean // 4, most // 4
    share = 1.0 if options.one_engine_at_a_time else 0.5
    engine: dict[str, Any] = {"dtype": "bfloat16", "load_format": "dummy"}
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
            f"pools.label.max_num_seqs={options.max_num_seqs}",
            "pools.label.max_model_len=2048",
            *(f"pools.label.engine.{key}={value}" for key, value in engine.items()),
            f"steps.label.sampling.max_tokens={most}",
            f"steps.label.max_chars={mean}",  # how BenchPool and Raw learn the mean length
        ],
    )


class BenchPool(Pool):
    """The package's Pool whose replies end at one of many stop tokens: on random weights, geometric lengths."""

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return VllmEngine(self._config, path, stop_tokens(path, self._mean_tokens))

    def __init__(self, name: str, config: PoolConfig, steps: Any, board: Any = None) -> None:
        self._mean_tokens = steps.label.max_chars  # the bench has no other use for this limit
        super().__init__(name, config, steps, board)


class OurRun:
    """One streaming execution of kun_ray over rows that arrive turn by turn: each turn's read waits for its gate."""

    def __init__(self, config: GenerateConfig, rows: list[list[dict[str, Any]]], folder: Path) -> None:
        setattr(stage, "Pool", BenchPool)  # noqa: B010 - build_dataset names the class; the bench's differs in stop tokens only
        self._gates = [folder / f"gate-{index}" for index in range(len(rows))]
        self._num_rows = len(rows[0])
        self._board = new_board()
        self._before = {"rows": 0.0, "prompt_tokens": 0.0, "output_tokens": 0.0}
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        source = Gated(rows, self._gates)
        dataset = build_dataset(config, ray.data.read_datasource(source, override_num_blocks=len(rows)), self._board)
        self._thread = threading.Thread(target=lambda: list(dataset.iter_internal_ref_bundles()), daemon=True)
        self._thread.start()

    def turn(self, index: int) -> dict[str, Any]:
        """Opens the gate of one turn and waits for its last row."""
        started = time.perf_counter()
        self._gates[index].touch()
        wanted = self._before["rows"] + self._num_rows
        while (now := self._counters()).get("rows", 0) < wanted:
            if not self._thread.is_alive():
                raise RuntimeError("the pipeline ended early; see the log above")
            time.sleep(0.01)
        seconds = time.perf_counter() - started
        found = {key: int(now[key] - self._before[key]) for key in self._before}
        self._before = {key: now[key] for key in self._before}
        return {"seconds": round(seconds, 4), **found}

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
        def task(table: pa.Table, gate: Path) -> ReadTask:
            def read() -> Iterator[pa.Table]:
                while not gate.exists():
                    time.sleep(0.01)
                yield table

            metadata = BlockMetadata(num_rows=len(table), size_bytes=table.nbytes, input_files=None, exec_stats=None)
            return ReadTask(read, metadata, schema=DOCUMENT)

        return [task(table, gate) for table, gate in zip(self._tables, self._gates, strict=True)]


class Raw:
    """`vllm.LLM`, given all prompts of a turn at once, already tokenised."""

    def __init__(self, pool: PoolConfig, config: GenerateConfig) -> None:
        from vllm import LLM

        assert config.steps.label is not None
        self._label = config.steps.label
        self._llm = LLM(**{k: v for k, v in engine_arguments(pool, pool.model).items() if k != "enable_log_requests"})
        self._tokenizer = load_tokenizer(pool.model)
        self._prompt = build_prompt(self._tokenizer, self._label.prompt)
        assert config.steps.score is not None
        self._rubric = build_prompt(self._tokenizer, config.steps.score.prompt)

    def turn(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import dataclasses

        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = [{"prompt_token_ids": self._prompt.render(row)} for row in rows]
        params = SamplingParams(
            **dataclasses.asdict(self._label.sampling),
            stop_token_ids=stop_tokens(str(self._llm.llm_engine.model_config.model), self._label.max_chars),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        started = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 4),
            "rows": len(outputs),
            "prompt_tokens": sum(len(prompt["prompt_token_ids"]) for prompt in prompts),
            "output_tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
            "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        }

    def score(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows/s of one prefill per row against decoding 8 and 256 tokens; all share the rubric as prefix."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": self._rubric.render({"instruction": row["text"][:60]})} for row in rows]
        kun: dict[str, Any] = {"temperature": 0.5, "top_p": 0.95, "repetition_penalty": 1.2, "ignore_eos": True}
        ways = {
            "choose": SamplingParams(max_tokens=1, temperature=0.0, logprob_token_ids=[100, 200], detokenize=False),
            "decode_8": SamplingParams(max_tokens=8, **kun),
            "decode_256": SamplingParams(max_tokens=256, **kun),
        }
        found: dict[str, Any] = {"rows": len(prompts), "prompt_tokens_each": len(prompts[0]["prompt_token_ids"])}
        for repeat in range(3):
            for name, params in ways.items():
                started = time.perf_counter()
                self._llm.generate(prompts, params, use_tqdm=False)  # type: ignore[arg-type]
                if repeat:  # the first round warms up
                    found.setdefault(name, []).append(len(prompts) / (time.perf_counter() - started))
        rates = {name: statistics.median(found.pop(name)) for name in ways}
        return {
            **found,
            **{f"{name}_rows_per_s": round(rate, 1) for name, rate in rates.items()},
            "choose_over_decode_8": round(rates["choose"] / rates["decode_8"], 2),
            "choose_over_decode_256": round(rates["choose"] / rates["decode_256"], 2),
        }


def new_raw(options: dict[str, Any], pool: PoolConfig, config: GenerateConfig) -> Any:
    return ray.remote(**options)(Raw).remote(pool, config)


def stop_tokens(model: str, mean: int) -> list[int]:
    """Token ids, one in `mean` of the vocabulary: where weights are random, a reply ends at each token with 1/mean."""
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    return list(range(7, vocabulary, mean))


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
