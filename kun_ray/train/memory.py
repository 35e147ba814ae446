"""What a training run costs: bytes on each GPU, FLOPs, seconds. The one formula behind profiles, dry runs and jobs/plan.py.

Everything follows from a model's sizes; nothing here touches a GPU. Constants that were measured say so.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from kun_ray.train.config import LoraConfig, TrainConfig

GB = 1e9
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
}
"""Dense bf16 FLOPs per second of a card, from its maker's data sheet; the first name that a device's own name contains."""
RESERVED_GB = 2.0
"""CUDA context, NCCL buffers and what the allocator cannot use, per GPU."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """Sizes of a Llama-like decoder, and what one step of it costs."""

    num_parameters: int
    num_matmul_parameters: int
    """Parameters that each token is multiplied with: all but the input embedding (a tied head counts)."""
    num_layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    num_trained: int
    """Parameters that have an optimizer: all, or the adapters'."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context: int
    """Longest input in tokens."""

    def flops(self, lengths: Any) -> float:
        """FLOPs of forward and backward over samples of these lengths: Σ 6·N·s + 12·L·h·s² (PaLM, arXiv 2204.02311, app. B).

        Recomputation by gradient checkpointing is not counted: it is no useful work.
        """
        sizes = np.asarray(lengths, dtype=np.float64)
        return float(
            6 * self.num_matmul_parameters * sizes.sum() + 12 * self.num_layers * self.hidden * (sizes**2).sum()
        )

    def mfu(self, lengths: Any, elapsed_s: float, num_gpus: int, peak_flops: float | None) -> float | None:
        """Model FLOPs utilisation: flops(lengths) ÷ (elapsed · GPUs · peak). None when the peak is not known."""
        return round(self.flops(lengths) / (elapsed_s * num_gpus * peak_flops), 4) if peak_flops else None

    def memory(self, config: TrainConfig) -> dict[str, float]:
        """GB on one GPU by use, its sum as `gpu`, and GB of one node-independent rank in host memory as `host`.

        Sharded over ranks: weights and gradients in the training dtype, 12 bytes of float32 master, mean and variance for
        each trained parameter (arXiv 1910.02054 §3.1). An offloaded optimizer takes the gradients with it, and a float32
        copy of them: 12 + 4 + 2 bytes (DeepSpeed 0.19's stage3.py). Kept layer inputs with checkpointing: L·t·h; working set of one layer:
        t·(18·h + 4·i) elements; logits and their gradient: t·V·(w + 8) bytes for a micro-batch in which every token counts.
        """
        width = 2 if config.dtype == "bfloat16" else 4
        ranks, tokens = config.num_workers, config.tokens_per_micro_batch
        optimizer = 12 * self.num_trained / ranks
        weights = width * self.num_parameters / ranks
        kept = self.num_layers * tokens * self.hidden * width
        layer = tokens * (18 * self.hidden + 4 * self.intermediate) * width
        if not config.gradient_checkpointing:
            layer *= self.num_layers
        live = min(config.zero.max_live_parameters, self.num_parameters) * width if ranks > 1 else 0
        parts = {
            "weights": 0.0 if config.zero.offload_parameters == "cpu" else weights,
            "gradients": 0.0 if config.zero.offload_optimizer != "none" else width * self.num_trained / ranks,
            "optimizer": 0.0 if config.zero.offload_optimizer != "none" else optimizer,
            "hpz_copy": width * self.num_parameters / config.zero.hpz_partition_size
            if config.zero.hpz_partition_size > 1
            else 0.0,
            "gathered": float(live) + 3.0 * config.zero.bucket_elements * width,
            "activations": float(kept + layer),
            "logits": float(tokens * self.vocabulary * (width + 8)),
        }
        in_gb = {name: value / GB for name, value in parts.items()}
        gradients = (4 + width) * self.num_trained / ranks if config.zero.offload_optimizer != "none" else 0.0
        host = (
            (optimizer if config.zero.offload_optimizer == "cpu" else 0.0)
            + gradients
            + (weights if config.zero.offload_parameters == "cpu" else 0.0)
        )
        return {**in_gb, "reserved": RESERVED_GB, "gpu": sum(in_gb.values()) + RESERVED_GB, "host": host / GB}

    def seconds(self, num_tokens: float, mean_length: float, num_gpus: int, peak_flops: float, mfu: float) -> float:
        """Seconds to train on so many tokens at a given utilisation."""
        samples = num_tokens / mean_length
        return self.flops([mean_length]) * samples / (num_gpus * peak_flops * mfu)

    def checkpoint_gb(self) -> float:
        """Disk that one checkpoint takes: float32 master, mean and variance of what is trained."""
        return 12 * self.num_trained / GB


def cost_of(path: str, lora: LoraConfig | None = None, trust_remote_code: bool = False) -> Cost:
    """The cost of the model whose config.json lies in `path` (or is that file), built on the meta device: no memory, no weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, trust_remote_code=trust_remote_code)
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    trained = total
    if lora is not None:
        layers = [m for n, m in model.named_modules() if n.rpartition(".")[2] in lora.targets]
        trained = sum(lora.rank * (m.in_features + m.out_features) for m in layers)
    return Cost(
        num_parameters=total,
        num_matmul_parameters=total - (0 if tied else embedding.numel()),
        num_layers=hf_config.num_hidden_layers,
        hidden=hf_config.hidden_size,
        intermediate=hf_config.intermediate_size,
        vocabulary=hf_config.vocab_size,
        num_trained=trained,
        num_heads=hf_config.num_attention_heads,
        num_kv_heads=getattr(hf_config, "num_key_value_heads", None) or hf_config.num_attention_heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads,
        context=hf_config.max_position_embeddings,
    )


def cost_of_files(folder: str, lora: LoraConfig | None = None) -> Cost | None:
    """The same from config.json and the heads of the safetensors files, in milliseconds and without torch.

    None where these are not those of a plain, unquantized decoder.
    """
    shapes: dict[str, list[int]] = {}
    try:
        config = json.loads(Path(folder, "config.json").read_text())
        for file in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError):
        return None
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads")
    embedding = [shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
    if "quantization_config" in config or len(embedding) != 1 or any(name not in config for name in needed):
        return None
    total = sum(math.prod(shape) for shape in shapes.values())
    tied = not any(name.endswith("lm_head.weight") for name in shapes)
    trained = total
    if lora is not None:
        adapted = [
            shape for name, shape in shapes.items() if name.removesuffix(".weight").rpartition(".")[2] in lora.targets
        ]
        trained = sum(lora.rank * sum(shape) for shape in adapted)
    heads = config["num_attention_heads"]
    return Cost(
        num_parameters=total,
        num_matmul_parameters=total - (0 if tied else math.prod(embedding[0])),
        num_layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        num_trained=trained,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        context=config.get("max_position_embeddings") or 2048,
    )


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a card by its name; None for one that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)
