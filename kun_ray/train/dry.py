"""`dry_run=true`: everything that can be known of a training run without a GPU, in seconds.

The configuration goes through DeepSpeed's own validation, the model is built on the meta device, memory and time follow from
memory.py. Nothing is written.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kun_ray import models
from kun_ray.config import ConfigError
from kun_ray.cost import Cost, cost_of
from kun_ray.train.config import TrainConfig
from kun_ray.train.memory import memory_of
from kun_ray.train.zero import deepspeed_config


def dry_run(config: TrainConfig) -> dict[str, Any]:
    """Checks a configuration and prints what it needs; returns the figures.

    Raises:
        ConfigError: DeepSpeed refuses it, the model is not to be had, or it does not fit the card.
    """
    validate(config)
    source = config.model_config or config.model
    if config.model_config is None:
        if models.is_missing_folder(config.model):
            raise ConfigError(f"model: there is no folder {config.model}")
        models.require_on_hub(
            config.model, "model (or give its sizes: model_config=conf/shapes/yi-34b.json, or another config.json)"
        )
        source = models.fetch_model(config.model, weights=False)
    elif not Path(source).exists():
        raise ConfigError(f"model_config: there is no file {source}")
    cost = cost_of(source, config.lora, config.trust_remote_code)
    memory = memory_of(cost, config)
    show(config, cost, memory)
    limit = config.gpu_memory_gb
    if limit is not None and memory["gpu"] <= limit:
        print(f"fits: {memory['gpu']:.1f} of {limit:g} GB on each GPU")
    if limit is not None and memory["gpu"] > limit:
        raise ConfigError(
            f"this needs {memory['gpu']:.1f} GB on each GPU, of {limit:g}: {cheapest_change(config, cost, limit)}"
        )
    on_node = memory["host"] * min(config.gpus_per_node, config.num_workers)
    if config.host_memory_gb is not None and on_node > config.host_memory_gb:
        raise ConfigError(
            f"this needs {on_node:.0f} GB of host memory on each node, of {config.host_memory_gb:g}: take nodes with more, more "
            "num_workers on more nodes, or zero.offload_optimizer=nvme"
        )
    return {"parameters": cost.num_parameters, "memory_gb": memory, "checkpoint_gb": cost.checkpoint_gb()}


def validate(config: TrainConfig) -> None:
    """Lets DeepSpeed read what it would be given. Raises ConfigError with its objection."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = deepspeed_config(config)
    try:
        zero = DeepSpeedZeroConfig(**settings["zero_optimization"])
    except (ValueError, TypeError) as error:
        raise ConfigError(f"DeepSpeed refuses this configuration: {error}") from None
    unknown = set(zero.model_extra or {})
    if unknown:
        raise ConfigError(f"this DeepSpeed does not know {', '.join(sorted(unknown))}: install the version in the lock")
    if config.num_workers % config.zero.hpz_partition_size:
        raise ConfigError(f"zero.hpz_partition_size must divide num_workers ({config.num_workers})")


def cheapest_change(config: TrainConfig, cost: Cost, limit: float) -> str:
    """The first of a list of changes, least costly first, that makes the run fit `limit` GB."""
    import dataclasses

    def fits(**changes: Any) -> bool:
        zero = {k.removeprefix("zero_"): v for k, v in changes.items() if k.startswith("zero_")}
        plain = {k: v for k, v in changes.items() if not k.startswith("zero_")}
        changed = dataclasses.replace(config, **plain, zero=dataclasses.replace(config.zero, **zero))
        return memory_of(cost, changed)["gpu"] <= limit

    half = max(config.max_tokens, config.tokens_per_micro_batch // 2)
    if not config.gradient_checkpointing and fits(gradient_checkpointing=True):
        return "set gradient_checkpointing=true"
    if half < config.tokens_per_micro_batch and fits(tokens_per_micro_batch=half):
        return f"set tokens_per_micro_batch={half}"
    if config.zero.offload_optimizer == "none" and fits(zero_offload_optimizer="cpu"):
        return "set zero.offload_optimizer=cpu"
    if fits(zero_offload_optimizer="cpu", zero_offload_parameters="cpu"):
        both = "zero.offload_optimizer=cpu and " if config.zero.offload_optimizer == "none" else ""
        return f"set {both}zero.offload_parameters=cpu"
    for factor in (2, 4, 8):
        if fits(num_workers=config.num_workers * factor):
            return f"take num_workers={config.num_workers * factor}"
    return "take more GPUs, a smaller model, or lora"


def show(config: TrainConfig, cost: Cost, memory: dict[str, float]) -> None:
    """Prints the figures as a table."""
    table = Table(
        title=f"{cost.num_parameters / 1e9:.2f} billion parameters on {config.num_workers} × {config.accelerator}",
        box=None,
    )
    table.add_column("GB per GPU")
    table.add_column("", justify="right")
    for name, value in memory.items():
        if name not in ("gpu", "host") and value:
            table.add_row(name, f"{value:.2f}")
    table.add_row("[bold]sum", f"[bold]{memory['gpu']:.2f}")
    if memory["host"]:
        table.add_row("host memory per rank", f"{memory['host']:.2f}")
        ranks = min(config.gpus_per_node, config.num_workers)
        table.add_row(f"host memory per node of {ranks} ranks", f"{memory['host'] * ranks:.1f}")
    table.add_row("one checkpoint (disk)", f"{cost.checkpoint_gb():.1f}")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120).print(table)
