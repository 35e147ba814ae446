"""What a pool of engines holds and how fast it can be, from a model's sizes and a card's limits. Touches no GPU.

The memory is arithmetic; the speed is a roofline times an efficiency, and must be corrected by measured runs (plan.py).
"""

from __future__ import annotations

import dataclasses
import math

from kun_ray.cost import GB, PEAK_FLOPS, Cost
from kun_ray.pool import PoolConfig


@dataclasses.dataclass(frozen=True)
class Card:
    """Limits of one GPU (or of a machine's CPUs), from its maker's data sheet."""

    memory_gb: float
    bytes_per_s: float
    """Memory bandwidth."""
    flops: float
    """Dense bf16 operations per second."""


CARDS = {
    "A100-40": Card(40, 1.555e12, PEAK_FLOPS["A100"]),  # NVIDIA A100 data sheet, SXM4 40 GB
    "A100-80": Card(80, 2.039e12, PEAK_FLOPS["A100"]),  # the same, SXM4 80 GB
    "H100": Card(80, 3.35e12, PEAK_FLOPS["H100"]),  # NVIDIA H100 data sheet, SXM5
    "H200": Card(141, 4.8e12, PEAK_FLOPS["H200"]),  # NVIDIA H200 data sheet, SXM5
    "L40S": Card(48, 0.864e12, PEAK_FLOPS["L40S"]),  # NVIDIA L40S data sheet, without sparsity
    # two virtual x86 cores, 2026-11-22: copy and float32 matmul of bench/shapes.py's card_limits; in bf16 it is 1e9
    "CPU": Card(16, 35e9, 130e9),
}
PREFILL_EFFICIENCY, DECODE_EFFICIENCY, TRAIN_MFU = 0.5, 0.6, 0.4
"""Parts of a card's FLOPs and bandwidth that engines and trainings usually reach: assumed, until a run is measured."""
RESERVED_GB = 4.0
"""Activations of a prefill, logits, CUDA graphs and context of an engine: assumed."""
WIDTHS = {
    "auto": 2, "bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1
}  # fmt: skip
"""Bytes of one element, by vLLM's names."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a pool's rows ask of it: means over all rows, in tokens."""

    prefill: float
    """Prompt tokens that are not in the prefix cache, all steps together."""
    output: float
    """Tokens decoded, all steps together."""
    context: float
    """Tokens in the KV cache halfway through the longest step's reply."""
    longest: float = 0.0
    """Tokens of the longest prompt and of the longest reply to it that sampling allows, as far as they are known."""


@dataclasses.dataclass(frozen=True)
class Capacity:
    """What one replica of a pool can do."""

    weights_gb: float
    """On each GPU."""
    kv_gb: float
    """Left for the KV cache on each GPU; below zero the weights do not fit."""
    kv_tokens: int
    """Tokens whose keys and values fit."""
    num_sequences: int
    """Rows inside at once: what fits at the rows' mean length, at most max_num_seqs."""
    rows_per_s: float
    """Of one replica, at the assumed efficiencies."""
    fits: bool
    """Whether one sequence of max_model_len fits, without which vLLM does not start."""


def capacity(pool: PoolConfig, cost: Cost, card: Card, traffic: Traffic) -> Capacity:
    """Memory and speed of one replica.

    Each decode step reads the weights once for all sequences and every sequence's keys and values:
    t_step = max((w + B·c·kv) / (0.6·bandwidth), 2·N·B / (0.5·FLOPs)); a row takes 2·N·prefill / (0.5·FLOPs) + output·t_step / B.
    """
    gpus = pool.tensor_parallel_size * pool.pipeline_parallel_size
    dtype = pool.engine.get("quantization") or pool.engine.get("dtype", "auto")
    weights = WIDTHS.get(str(dtype), 1 if "quantization" in pool.engine else 2) * cost.num_parameters / gpus
    memory = (
        card.memory_gb * GB * float(pool.engine.get("gpu_memory_utilization", 0.9))
    )  # of the whole card, also where it is shared
    if pool.accelerator == "cpu":
        memory = weights + (pool.cpu_kv_cache_gb + RESERVED_GB) * GB
    kv_heads = max(1, math.ceil(cost.num_kv_heads / pool.tensor_parallel_size))
    kept = pool.engine.get("kv_cache_dtype", "auto")
    width = WIDTHS.get(str(pool.engine.get("dtype", "auto") if kept == "auto" else kept), 2)
    kv = 2 * cost.num_layers / pool.pipeline_parallel_size * kv_heads * cost.head_dim * width
    room = memory - weights - RESERVED_GB * GB
    kv_tokens = max(0, int(room / kv))
    batch = max(1, min(pool.max_num_seqs, int(kv_tokens / max(traffic.context, 1.0))))
    speed = card.flops * PREFILL_EFFICIENCY * gpus
    step = max(
        (weights + batch * traffic.context * kv) / (card.bytes_per_s * DECODE_EFFICIENCY),
        2 * cost.num_matmul_parameters * batch / speed,
    )
    seconds = 2 * cost.num_matmul_parameters * traffic.prefill / speed + traffic.output * step / batch
    longest = min(pool.max_model_len or cost.context, cost.context)
    return Capacity(
        weights / GB, room / GB, kv_tokens, batch, 1 / max(seconds, 1e-12), room > 0 and kv_tokens >= longest
    )


def smallest_change(pool: PoolConfig, cost: Cost, card: Card, traffic: Traffic) -> str:
    """The first of a list of changes, least costly first, with which the pool fits the card."""

    def fits(**changes: object) -> bool:
        return capacity(dataclasses.replace(pool, **changes), cost, card, traffic).fits  # type: ignore[arg-type]

    longest = pool.max_model_len or int(cost.context)
    for length in (longest // 2, longest // 4):
        if length >= max(1024, traffic.longest) and fits(max_model_len=length):
            return f"max_model_len={length}"
    if fits(engine={**pool.engine, "kv_cache_dtype": "fp8"}):
        return "engine.kv_cache_dtype=fp8"
    for size in (2, 4, 8, 16):
        if size > pool.tensor_parallel_size and cost.num_heads % size == 0 and fits(tensor_parallel_size=size):
            return f"tensor_parallel_size={size}"
    if fits(engine={**pool.engine, "quantization": "fp8"}):
        return "engine.quantization=fp8"
    return "a larger card or a smaller model"
