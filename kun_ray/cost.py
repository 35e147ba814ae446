"""What a model costs by its sizes: parameters, FLOPs, seconds. Engines (capacity.py) and trainings (train/memory.py) count with it.

Nothing here touches a GPU.
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
    from kun_ray.train.config import LoraConfig

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
