"""What decides a trained model's weights, for the manifest: base model, data, prompts, schedule."""

from __future__ import annotations

import hashlib
from typing import Any

from kun_ray import models, store
from kun_ray.config import to_dict
from kun_ray.train import data
from kun_ray.train.config import TrainConfig

FREE = (
    "output", "valid", "data", "model", "steps", "zero", "accelerator", "num_workers", "cpus_per_worker", "accelerator_type", "resources",
    "wait_for_resources_s", "tokens_per_micro_batch", "packing", "attention", "gradient_checkpointing", "save_every_steps",
    "keep_last", "eval_every_steps", "max_failures", "publish", "dry_run", "model_config", "gpu_memory_gb", "host_memory_gb", "gpus_per_node", "lease_s", "ray",
)  # fmt: skip
"""Fields that do not change what is learnt, or that the fingerprint holds in another form."""


def fingerprint(config: TrainConfig) -> dict[str, Any]:
    """What decides the weights, for the manifest. Ranks, sharding and packing do not."""
    plain = to_dict(config) | {"chat_template": models.read_chat_template(config.chat_template)}
    return {
        "model": {"path": config.model, "weights": models.model_digest(config.model)},
        "data": [{**entry, "content": _content(entry["path"])} for entry in plain["data"]],
        "prompts": {e.task: to_dict(getattr(config.steps, e.task).prompt) for e in config.data if e.task != "chat"},
        "training": {name: value for name, value in plain.items() if name not in FREE},
    }


def _content(path: str) -> str:
    """Identity of a data file or of an export's files."""
    folder = store.Folder(path)
    digest = hashlib.blake2b(digest_size=16)
    names = [form.format(split) for form in data.EXPORTED for split in ("train", "valid")]
    for place in map(folder.below, names) if data.is_export(folder) else [folder]:
        if place.filesystem.get_file_info(place.path).is_file:
            with place.filesystem.open_input_stream(place.path) as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()
