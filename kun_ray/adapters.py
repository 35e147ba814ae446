"""LoRA adapters of a pool's steps: what vLLM must be told to serve them beside one base model, and whether they fit it.

Source: LoRA (arXiv 2106.09685). An adapter is a folder as peft writes it: adapter_config.json, adapter_model.safetensors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from kun_ray import models
from kun_ray.config import ConfigError, require
from kun_ray.engine import EngineConfig
from kun_ray.steps import Step, StepsConfig

Config = TypeVar("Config", bound=EngineConfig)
CONFIG = "adapter_config.json"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of max_lora_rank that vLLM has kernels for."""


def with_absolute_adapters(steps: StepsConfig) -> StepsConfig:
    """The steps with the paths of their adapters as every node can use them."""
    chosen = {field.name: getattr(steps, field.name) for field in dataclasses.fields(steps)}
    return StepsConfig(
        **{
            name: dataclasses.replace(step, adapter=models.absolute(step.adapter))
            if getattr(step, "adapter", None)
            else step
            for name, step in chosen.items()
        }
    )


def with_local_adapter(step: Step) -> Step:
    """The step with its adapter copied to this node, if it lies in an object store."""
    return dataclasses.replace(step, adapter=models.local_folder(step.adapter)) if step.adapter else step


def with_adapters(config: Config, folders: Sequence[str | None]) -> Config:
    """An engine's configuration that serves these adapters (None: the model as it is); what `engine:` says itself stays.

    Args:
        config: of the engine.
        folders: one per step, on this node.
    """
    distinct = {folder for folder in folders if folder}
    if not distinct:
        return config
    rank = max(_settings(folder)["r"] for folder in distinct)
    extra = {"enable_lora": True, "max_loras": len(distinct), "max_lora_rank": served_rank(rank)}
    return dataclasses.replace(config, engine={**extra, **config.engine})


def served_rank(rank: int) -> int:
    """The least max_lora_rank that vLLM has kernels for and that holds an adapter of this rank."""
    return next(served for served in RANKS if served >= rank)


def check_adapter(folder: str, key: str) -> None:
    """Raises ConfigError unless `folder` holds an adapter whose rank vLLM can serve."""
    require(not models.is_missing_folder(folder), f"{key}: there is no folder {folder}")
    models.require_on_hub(folder, key)
    path = models.fetch_model(folder, weights=False)
    if Path(path).is_dir():
        settings = _settings(path)
        require(settings["r"] <= RANKS[-1], f"{key}: rank {settings['r']} of {folder} is above vLLM's {RANKS[-1]}")


def _settings(folder: str) -> dict[str, Any]:
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no {CONFIG}: it is not a LoRA adapter (a whole model belongs into pools.….model)"
        )
    found: dict[str, Any] = json.loads(path.read_text())
    return found
