"""Trained shards → a model folder in safetensors. Collective: every rank calls it, rank 0 writes and holds one file's worth.

It writes `model.tmp` with everything that admission needs to know; launch.py renames it to `model` once a vLLM engine has
agreed with the trainer. Pools take published paths only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from kun_ray import __version__
from kun_ray.train import model
from kun_ray.train.config import CARD, STAGING
from kun_ray.train.data import Samples

if TYPE_CHECKING:
    from kun_ray.train.loop import Run


def publish(run: Run, samples: Samples) -> None:
    """Writes `model.tmp` below the run's folder, with probes from `samples`."""
    folder = Path(run.folder.path) / STAGING
    if run.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    adapter_only = run.config.lora is not None and not run.config.lora.merge
    dtype = model.DTYPES[run.config.publish.dtype]
    tensors = _adapter_tensors(run) if adapter_only else _tensors(run, dtype)
    shapes = write_safetensors(tensors, folder, run.config.publish.max_shard_gb, run.rank, adapter_only)
    probes = probe(run, samples)
    if run.rank == 0:
        _write_beside(run, folder, adapter_only)
        card = {
            "kun_ray": __version__,
            "base": run.config.model,
            "kind": "adapter" if adapter_only else "model",
            "dtype": run.config.publish.dtype,
            "tensors": shapes,
            "inv_freq_dtype": _rotary_dtype(run.engine.module),
            "probes": probes,
            "files": digests(folder),
        }
        unfinished = folder / f"{CARD}.tmp"
        unfinished.write_text(json.dumps(card, ensure_ascii=False))
        for file in folder.iterdir():
            os.chmod(file, 0o644)  # safetensors writes 0600, which the pools' users may not read
        os.replace(unfinished, folder / CARD)  # last: where it is, everything is
    dist.barrier()


def write_safetensors(
    tensors: Iterator[tuple[str, torch.Tensor | None]], folder: Path, max_shard_gb: float, rank: int, adapter: bool
) -> dict[str, list[int]]:
    """Streams tensors into files of at most `max_shard_gb`; returns name → shape. Ranks other than 0 only take part."""
    from safetensors.torch import save_file

    shapes: dict[str, list[int]] = {}
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        if held:
            save_file(held, str(folder / f"part-{len(shards):05d}"), metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for name, tensor in tensors:
        if rank != 0 or tensor is None:
            continue
        num_bytes = tensor.numel() * tensor.element_size()
        if size + num_bytes > max_shard_gb * 1e9:
            flush()
            size = 0
        held[name], shapes[name] = tensor, list(tensor.shape)
        size, total = size + num_bytes, total + num_bytes
    if rank != 0:
        return {}
    flush()
    if adapter:
        (folder / "part-00000").rename(folder / "adapter_model.safetensors")
        return shapes
    files = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    )
    for n, file in enumerate(files):
        (folder / f"part-{n:05d}").rename(folder / file)
    if len(files) > 1:
        index = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        (folder / model.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}))
    return shapes


def probe(run: Run, samples: Samples) -> list[dict[str, Any]]:
    """The trainer's own log-probabilities on a few samples: `ids` and `logprobs` of every token after the first."""
    longest_first = np.argsort(-samples.lengths, kind="stable")[
        : run.config.publish.num_probes
    ]  # positions matter most far out
    found = []
    run.engine.eval()
    for index in longest_first:
        ids = torch.from_numpy(samples.sample(int(index))[0].astype(np.int64)).to(run.device)[None]
        targets = torch.full_like(ids, -100)
        targets[:, :-1] = ids[:, 1:]
        positions = torch.arange(ids.shape[1], device=run.device)[None]
        with torch.no_grad():
            losses = run.engine(ids=ids, targets=targets, positions=positions, mask=None, total=False)
        found.append({"ids": ids[0].tolist(), "logprobs": [round(-float(loss), 5) for loss in losses]})
    run.engine.train()
    return found


def digests(folder: Path) -> dict[str, str]:
    """BLAKE2 of every file in a model folder but the card itself."""
    return {
        file.name: hashlib.file_digest(file.open("rb"), lambda: hashlib.blake2b(digest_size=16)).hexdigest()
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name != CARD
    }


def _tensors(run: Run, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every parameter of the base model in turn, gathered, with the adapters' updates added where there are some."""
    network = run.engine.module.model
    if run.config.lora is None:
        for name, parameter in network.named_parameters():
            yield name, _whole([parameter], run.rank, lambda p=parameter: p.detach().to("cpu", dtype).contiguous())
        return
    scale = run.config.lora.alpha / run.config.lora.rank
    layers = {name: module for name, module in network.base_model.model.named_modules() if hasattr(module, "lora_A")}
    adapted = {id(layer.base_layer.weight): layer for layer in layers.values()}
    for name, parameter in network.base_model.model.named_parameters():
        if "lora_" in name:
            continue
        layer = adapted.get(id(parameter))
        parts = (
            [parameter]
            if layer is None
            else [parameter, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        )

        def merged(parts: list[Any] = parts) -> torch.Tensor:
            weight = parts[0].detach().float()
            if len(parts) == 3:
                weight = weight + scale * (parts[2].detach().float() @ parts[1].detach().float())
            return weight.to("cpu", dtype).contiguous()

        yield name.replace(".base_layer.", "."), _whole(parts, run.rank, merged)


def _adapter_tensors(run: Run) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The adapters alone, under the names that peft and vLLM read."""
    for name, parameter in run.engine.module.model.named_parameters():
        if "lora_" in name:
            tensor = _whole([parameter], run.rank, lambda p=parameter: p.detach().to("cpu", torch.float32).contiguous())
            yield name.replace(".default.", "."), tensor


def _whole(parameters: list[Any], rank: int, take: Any) -> torch.Tensor | None:
    with model.gathered(parameters):
        return take().clone() if rank == 0 else None


def _write_beside(run: Run, folder: Path, adapter_only: bool) -> None:
    """Configuration, generation defaults and tokenizer."""
    from transformers import GenerationConfig

    from kun_ray.prompts import load_tokenizer, stop_token_ids

    network = run.engine.module.model
    tokenizer = load_tokenizer(run.path, run.config.chat_template, run.config.trust_remote_code)
    if adapter_only:
        settings = network.peft_config["default"]
        settings.base_model_name_or_path = run.config.model
        settings.inference_mode = True
        settings.save_pretrained(str(folder))
    else:
        plain = network.base_model.model if run.config.lora is not None else network
        plain.config.architectures = [type(plain).__name__]
        plain.config.dtype = run.config.publish.dtype
        plain.config.use_cache = True
        plain.config.save_pretrained(str(folder))
        generation = GenerationConfig.from_model_config(plain.config)
        if (Path(run.path) / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(run.path)
        ends = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
        generation.eos_token_id = list(dict.fromkeys([*stop_token_ids(tokenizer), *(e for e in ends if e is not None)]))
        generation.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _rotary_dtype(network: torch.nn.Module) -> str:
    dtypes = {
        str(m.inv_freq.dtype) for m in network.modules() if isinstance(getattr(m, "inv_freq", None), torch.Tensor)
    }
    return ", ".join(sorted(dtypes)).replace("torch.", "")
