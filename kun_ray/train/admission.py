"""Admission: a published model becomes usable only when a vLLM engine agrees with the trainer on held-out samples.

Files first (digests, tensor names, shapes, RoPE), then log-probabilities. Each refusal names what is wrong. Called by
launch.py; it runs in a process of its own with the resources of an engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import ray

from kun_ray import execution
from kun_ray.adapters import served_rank
from kun_ray.config import KunError
from kun_ray.engine import EngineConfig, environment
from kun_ray.room import wait_for_room
from kun_ray.train.config import CARD, TrainConfig


def check_files(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The card of a published folder, once every file and tensor is what it says. Raises KunError naming what is not."""
    from kun_ray.train.publish import digests

    card: dict[str, Any] = json.loads((folder / CARD).read_text())
    found = digests(folder)
    for name, digest in card["files"].items():
        if name not in found:
            raise KunError(f"{folder / name} is missing: publish the model again")
        if found[name] != digest:
            raise KunError(
                f"{folder / name} is not what the trainer wrote: its digest differs; publish the model again"
            )
    if card["inv_freq_dtype"] not in ("float32", ""):
        raise KunError(
            f"{folder}: the trainer ran with rotary inv_freq in {card['inv_freq_dtype']}: its positions were wrong, and "
            "no engine will agree with it; train again (DeepSpeed ≥ 0.19.8 keeps inv_freq in float32)"
        )
    if card["kind"] == "model":
        _check_tensors(folder, card["tensors"], trust_remote_code)
    return card


def engine_config(folder: Path, card: dict[str, Any], config: TrainConfig) -> EngineConfig:
    """The engine that admission loads."""
    longest = max(len(probe["ids"]) for probe in card["probes"])
    extra: dict[str, Any] = {"dtype": card["dtype"] if card["kind"] == "model" else config.dtype}
    if card["kind"] == "adapter":
        extra |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": served_rank(config.lora.rank if config.lora else 8),
        }
    return EngineConfig(
        model=str(folder) if card["kind"] == "model" else config.model,
        accelerator=config.accelerator,
        tensor_parallel_size=config.publish.tensor_parallel_size,
        max_num_seqs=4,
        max_model_len=longest + 1,
        trust_remote_code=config.trust_remote_code,
        engine={**extra, **config.publish.engine},
    )


def admit_on_cluster(config: TrainConfig, staging: Path) -> dict[str, float]:
    """Runs `admit` where an engine's resources are.

    Raises:
        KunError: no room, no engine that can load the model, or one that does not agree with the trainer.
    """
    settings = engine_config(staging, json.loads((staging / CARD).read_text()), config)
    needs = {"CPU": min(1.0, config.cpus_per_worker), "GPU": float(settings.num_gpus()), **config.resources}
    needs = {name: amount for name, amount in needs.items() if amount}
    wait_for_room(
        [needs],
        config.wait_for_resources_s,
        f"{config.output}, admission,",
        config.accelerator_type,
        config.ray.autoscaling,
    )
    remote = ray.remote(
        num_cpus=min(1.0, config.cpus_per_worker),
        num_gpus=settings.num_gpus(),
        resources=config.resources or None,
        accelerator_type=config.accelerator_type,
        max_retries=0,
        runtime_env={"env_vars": environment(settings, 1)},
    )(admit)
    print("admission: comparing a vLLM engine with the trainer …", flush=True)
    try:
        figures: dict[str, float] = ray.get(remote.remote(str(staging), config))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, KunError):
            (staging / CARD).unlink(missing_ok=True)
            raise KunError(
                f"{error.cause}\nThe checkpoints are kept: the same command publishes once more from the newest."
            ) from None
        raise KunError(f"admission: no vLLM engine could load {staging}: {execution.root_cause(error)}") from error
    except ray.exceptions.RayError as error:
        raise KunError(f"admission: the engine's process died ({execution.root_cause(error)})") from error
    print(f"admitted: mean |Δ log p| {figures['mean_abs_diff']:.4f} nats over {figures['num_tokens']:.0f} tokens")
    return figures


def admit(folder: str, config: TrainConfig) -> dict[str, float]:
    """Compares a published folder with its trainer; returns `mean_abs_diff`, `max_abs_diff` and `num_tokens`.

    Raises:
        KunError: a file, tensor or log-probability is not what the trainer had.
    """
    import asyncio

    from kun_ray.engine import VllmEngine
    from kun_ray.models import local_folder

    card = check_files(Path(folder), config.trust_remote_code)
    settings = engine_config(Path(folder), card, config)
    engine = VllmEngine(settings, local_folder(settings.model), [])
    adapter = folder if card["kind"] == "adapter" else None

    async def measure() -> list[Any]:
        return [np.array((await engine.perplexity(probe["ids"], adapter)).logprobs) for probe in card["probes"]]

    try:
        measured = asyncio.run(measure())
    finally:
        engine.shutdown()
    return compare(
        folder, [np.array(probe["logprobs"]) for probe in card["probes"]], measured, config.publish.tolerance
    )


def compare(folder: str, trained: list[Any], served: list[Any], tolerance: float) -> dict[str, float]:
    """Checks two sets of per-token log-probabilities, one array a probe. Raises KunError beyond `tolerance` nats per token."""
    differences = [np.abs(a - b) for a, b in zip(trained, served, strict=True)]
    every = np.concatenate(differences)
    figures = {
        "mean_abs_diff": float(every.mean()),
        "max_abs_diff": float(every.max()),
        "num_tokens": float(len(every)),
    }
    if not figures["mean_abs_diff"] <= tolerance:
        first, last = (
            float(
                np.mean(
                    [
                        part[int(len(part) * at) : int(len(part) * at) + max(1, len(part) // 4)].mean()
                        for part in differences
                    ]
                )
            )
            for at in (0, 0.75)
        )
        shape = (
            f"it grows along the text (first quarter {first:.3f}, last quarter {last:.3f}): look at RoPE (inv_freq, rope_theta)"
            if last > 3 * first
            else "it is the same all along the text: look at the weights (a shard of another model, a tensor left at its start)"
        )
        raise KunError(
            f"{folder} is not admitted: the engine's log-probabilities differ from the trainer's by {figures['mean_abs_diff']:.3f} "
            f"nats per token in the mean (allowed: {tolerance}); {shape}"
        )
    return figures


def _check_tensors(folder: Path, written: dict[str, list[int]], trust: bool) -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    from kun_ray.train.model import weight_files

    with torch.device("meta"):
        wanted = {
            name: list(parameter.shape)
            for name, parameter in AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(folder, trust_remote_code=trust), trust_remote_code=trust
            ).named_parameters()
        }
    found = weight_files(folder)
    for name, shape in wanted.items():
        if name not in found:
            raise KunError(f"{folder}: the tensor {name} is missing; publish the model again")
        with safe_open(str(found[name]), framework="pt") as handle:
            if name not in handle.keys():  # noqa: SIM118
                raise KunError(
                    f"{folder}: {found[name].name} does not hold the tensor {name} that the index names there"
                )
            if handle.get_slice(name).get_shape() != shape or written.get(name) != shape:
                raise KunError(f"{folder}: the tensor {name} has not the shape {shape} that config.json asks for")
