"""The memory that a training run takes, on each GPU and of its host: the one formula behind profiles, dry runs and jobs/plan.py."""

from __future__ import annotations

from kun_ray.cost import GB, Cost
from kun_ray.train.config import TrainConfig

RESERVED_GB = 2.0
"""CUDA context, NCCL buffers and what the allocator cannot use, per GPU."""


def memory_of(cost: Cost, config: TrainConfig) -> dict[str, float]:
    """GB on one GPU by use, its sum as `gpu`, and GB of one node-independent rank in host memory as `host`.

    Sharded over ranks: weights and gradients in the training dtype, 12 bytes of float32 master, mean and variance for
    each trained parameter (arXiv 1910.02054 §3.1). An offloaded optimizer takes the gradients with it, and a float32
    copy of them: 12 + 4 + 2 bytes (DeepSpeed 0.19's stage3.py). Kept layer inputs with checkpointing: L·t·h; working set of one layer:
    t·(18·h + 4·i) elements; logits and their gradient: t·V·(w + 8) bytes for a micro-batch in which every token counts.
    """
    width = 2 if config.dtype == "bfloat16" else 4
    ranks, tokens = config.num_workers, config.tokens_per_micro_batch
    optimizer = 12 * cost.num_trained / ranks
    weights = width * cost.num_parameters / ranks
    kept = cost.num_layers * tokens * cost.hidden * width
    layer = tokens * (18 * cost.hidden + 4 * cost.intermediate) * width
    if not config.gradient_checkpointing:
        layer *= cost.num_layers
    live = min(config.zero.max_live_parameters, cost.num_parameters) * width if ranks > 1 else 0
    parts = {
        "weights": 0.0 if config.zero.offload_parameters == "cpu" else weights,
        "gradients": 0.0 if config.zero.offload_optimizer != "none" else width * cost.num_trained / ranks,
        "optimizer": 0.0 if config.zero.offload_optimizer != "none" else optimizer,
        "hpz_copy": width * cost.num_parameters / config.zero.hpz_partition_size
        if config.zero.hpz_partition_size > 1
        else 0.0,
        "gathered": float(live) + 3.0 * config.zero.bucket_elements * width,
        "activations": float(kept + layer),
        "logits": float(tokens * cost.vocabulary * (width + 8)),
    }
    in_gb = {name: value / GB for name, value in parts.items()}
    gradients = (4 + width) * cost.num_trained / ranks if config.zero.offload_optimizer != "none" else 0.0
    host = (
        (optimizer if config.zero.offload_optimizer == "cpu" else 0.0)
        + gradients
        + (weights if config.zero.offload_parameters == "cpu" else 0.0)
    )
    return {**in_gb, "reserved": RESERVED_GB, "gpu": sum(in_gb.values()) + RESERVED_GB, "host": host / GB}
