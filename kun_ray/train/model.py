"""A causal language model whose parameters are sharded over the ranks from the first moment, and its loss.

No rank ever holds the whole model: it is built empty under zero.Init, then rank 0 reads one tensor after the other from the
safetensors and DeepSpeed hands each rank its part. transformers' own loader reads everything on every rank, and has in
some versions loaded nothing without a word; here every parameter is either loaded or named in an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from kun_ray.config import ConfigError
from kun_ray.train.attention import NAME, register
from kun_ray.train.config import LoraConfig, TrainConfig

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INDEX = "model.safetensors.index.json"


class NextTokenLoss(torch.nn.Module):
    """Σ −log p(token | tokens before it in its sample) over the counted tokens, in nats. What DeepSpeed wraps."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: torch.Tensor,
        targets: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        total: bool = True,
    ) -> torch.Tensor:
        """The summed loss, or the loss of each counted token.

        Args:
            ids: token ids, int64 [rows, tokens]; one row when packed.
            targets: the next token where it counts, else −100, int64 [rows, tokens].
            positions: position of each token in its sample, int64 [rows, tokens]. Packed samples see only themselves
                because transformers reads the borders from here; that holds only without a mask and without a cache.
            mask: None when packed; 1 for tokens and 0 for padding, int64 [rows, tokens].
            total: sums up; off, returns float32 [counted tokens].
        """
        counted = (targets != -100).any(dim=0).nonzero().squeeze(1)
        keep = counted if len(counted) else torch.zeros(1, dtype=torch.int64, device=ids.device)
        logits = self.model(
            input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, logits_to_keep=keep
        ).logits
        wanted = targets[:, keep]
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none")
        if not total:
            return losses[wanted.flatten() != -100]
        return losses.sum()  # 0 for a rank without tokens, which takes part in the backward pass all the same


def build_model(path: str, config: TrainConfig) -> PreTrainedModel:
    """The base model with its weights, sharded if Zero3Notice is on. Raises ConfigError for a model that cannot be trained."""
    from transformers.initialization import no_init_weights

    register()
    hf_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            hf_config,
            dtype=DTYPES[config.dtype],
            attn_implementation=attention(config),
            trust_remote_code=config.trust_remote_code,
        )
    model.tie_weights()
    restore_rotary(model)
    load_weights(model, path)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model  # type: ignore[no-any-return]


def attention(config: TrainConfig) -> str:
    """The attention that transformers shall use. `packed` is kun_ray's own (attention.py)."""
    if config.attention != "auto":
        return config.attention
    if config.accelerator == "cpu":
        return NAME if config.packing else "sdpa"
    return "flash_attention_2" if config.accelerator == "gpu" and is_flash_attn_2_available() else "sdpa"


def load_weights(model: PreTrainedModel, path: str) -> None:
    """Fills every parameter from the safetensors of a folder. Raises ConfigError naming what is missing or of another shape."""
    parameters = dict(model.named_parameters())
    files = weight_files(Path(path))
    missing = sorted(set(parameters) - set(files))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    unknown = sorted(name for name in set(files) - tied if not name.endswith("inv_freq"))
    if missing or unknown:
        raise ConfigError(
            f"{path}: the weights do not fit the model: "
            + "; ".join(
                f"{what} {', '.join(names[:3])} ({len(names)})"
                for what, names in (("lacks", missing), ("also has", unknown))
                if names
            )
        )
    rank = dist.get_rank() if dist.is_initialized() else 0
    reader = Reader(files) if rank == 0 else None
    for name, parameter in parameters.items():
        with gathered([parameter], modifier_rank=0), torch.no_grad():
            if reader is not None:
                tensor = reader.read(name)
                if tensor.shape != parameter.shape:
                    raise ConfigError(
                        f"{path}: {name} has the shape {list(tensor.shape)}, the model wants {list(parameter.shape)}"
                    )
                parameter.copy_(tensor)
    _compare_samples(parameters, reader, path)


class Reader:
    """Tensors of safetensors files by name, one open file at a time."""

    def __init__(self, files: dict[str, Path]) -> None:
        self._files = files
        self._open: Path | None = None
        self._handle: Any = None

    def read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        if self._open != self._files[name]:
            self._open = self._files[name]
            self._handle = safe_open(str(self._open), framework="pt")
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → safetensors file of a model folder. Raises ConfigError when there are none, or one is missing."""
    from safetensors import safe_open

    if (folder / INDEX).is_file():
        names: dict[str, Path] = {
            name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
        }
        absent = sorted({file.name for file in names.values() if not file.is_file()})
        if absent:
            raise ConfigError(f"{folder}: {INDEX} names {', '.join(absent)}, which are not there")
        return names
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{folder} holds no *.safetensors: convert the model first; pickled weights are never loaded")
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as handle:
            found |= dict.fromkeys(handle.keys(), file)
    return found


def gathered(parameters: list[torch.nn.Parameter], modifier_rank: int | None = None) -> Any:
    """A context in which sharded parameters are whole; with `modifier_rank`, that rank's changes are kept by all."""
    import contextlib

    import deepspeed

    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)
    return contextlib.nullcontext()


def restore_rotary(model: torch.nn.Module) -> None:
    """Computes RoPE's frequencies anew in float32: zero.Init and casts turn them into bf16 (up to radians of error)."""
    for module in list(model.modules()):
        buffer = getattr(module, "inv_freq", None)
        if isinstance(buffer, torch.Tensor):
            reference = rotary_reference(module)
            module.inv_freq = reference.to(buffer.device)
            if hasattr(module, "original_inv_freq"):
                module.original_inv_freq = module.inv_freq.clone()


def rotary_reference(module: Any) -> torch.Tensor:
    """inv_freq of a rotary embedding as its configuration defines it, float32 [head_dim / 2]."""
    return type(module)(module.config).inv_freq.float()  # type: ignore[no-any-return]


def require_rotary(model: torch.nn.Module) -> None:
    """Raises RuntimeError unless every inv_freq is float32 and what its configuration says."""
    for name, module in model.named_modules():
        buffer = getattr(module, "inv_freq", None)
        if isinstance(buffer, torch.Tensor):
            exact = buffer.dtype == torch.float32 and torch.equal(buffer.cpu(), rotary_reference(module))
            if not exact:
                raise RuntimeError(f"{name}.inv_freq is {buffer.dtype} or changed: positions would be wrong by radians")


def add_lora(model: PreTrainedModel, lora: LoraConfig, seed: int) -> Any:
    """The model with adapters; only they are trained. Raises ConfigError if no layer has one of the names."""
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            PeftConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM"),
            autocast_adapter_dtype=False,
        )
    except ValueError as error:
        raise ConfigError(f"lora.targets: {error}") from None


def _compare_samples(parameters: dict[str, torch.nn.Parameter], reader: Reader | None, path: str) -> None:
    """Reads a few tensors back from the ranks: a loader that loads nothing must not go unnoticed."""
    names = list(parameters)
    for name in dict.fromkeys([names[0], names[len(names) // 2], names[-1]]):  # a set's order differs between ranks
        with gathered([parameters[name]]):
            if reader is not None:
                wanted = reader.read(name).to(parameters[name].dtype)
                if not torch.equal(wanted, parameters[name].detach().cpu()):
                    raise RuntimeError(f"{name} does not hold what {path} says after loading")
