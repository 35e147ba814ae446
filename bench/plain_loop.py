"""What bench/training.py measures the training loop against: plain PyTorch, plain DeepSpeed, plain padding.

The two loops are given tensors that are ready on the device, and report nothing: they do the least that training can do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kun_ray.train import loop, packing
from kun_ray.train.config import TrainConfig
from kun_ray.train.data import Samples
from kun_ray.train.model import DTYPES, NextTokenLoss, attention
from kun_ray.train.zero import deepspeed_config

Tensors = dict[str, Any]
LINEAR = torch.nn.functional.linear


def whole_model(path: str, config: TrainConfig, device: torch.device) -> NextTokenLoss:
    """The model on one device, not sharded."""
    network = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES[config.dtype], attn_implementation=attention(config)
    ).to(device)
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return NextTokenLoss(network.train())


@contextlib.contextmanager
def torchs_linear() -> Iterator[None]:
    """PyTorch's own `linear`, while it lasts; ZeRO-3 puts another in its place, for the whole process."""
    zero_linear, torch.nn.functional.linear = torch.nn.functional.linear, LINEAR
    try:
        yield
    finally:
        torch.nn.functional.linear = zero_linear


class PlainTorch:
    """AdamW on float32 weights; with a bf16 model these are a copy, as in every mixed-precision loop."""

    def __init__(self, path: str, config: TrainConfig, device: torch.device) -> None:
        self._loss_of = network = whole_model(path, config, device)
        self._weights = list(network.parameters())
        self._master = [w if w.dtype == torch.float32 else w.detach().float().requires_grad_() for w in self._weights]
        self._max_norm = config.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._master,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )

    @torchs_linear()
    def step(self, micros: list[Tensors], num_supervised: int, lr: float) -> float:
        """One optimizer step over these micro-batches; returns the loss."""
        total = 0.0
        for tensors in micros:
            loss = self._loss_of(**tensors) / num_supervised
            loss.backward()
            total += loss.detach()
        for weight, master in zip(self._weights, self._master, strict=True):
            if master is not weight and weight.grad is not None:
                master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self._master, self._max_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._master[0] is not self._weights[0]:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, self._master)
        return float(total)


def without_zero(path: str, config: TrainConfig, device: torch.device) -> Any:
    """A DeepSpeed engine that shards nothing (stage 0), otherwise as the loop's."""
    import deepspeed

    network = whole_model(path, config, device)
    optimizer = torch.optim.AdamW(
        network.parameters(),
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=device.type == "cuda",
    )
    settings = {**deepspeed_config(config), "zero_optimization": {"stage": 0}}
    with torchs_linear():
        return deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]


def plain_deepspeed(engine: Any, micros: list[Tensors], num_supervised: int, lr: float) -> float:
    """One step of a DeepSpeed engine on one rank, and nothing else; returns the loss."""
    total = 0.0
    for tensors in micros:
        loss = engine(**tensors) / num_supervised
        engine.backward(loss)
        total += loss.detach()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    engine.step()
    return float(total)


def arrival(run: loop.Run, batch: Any, samples: Samples) -> list[packing.Micro]:
    """Micro-batches of the same token budget, padded, in the order of the samples."""
    return [[part] for part in in_order(batch, samples.lengths, run.config.tokens_per_micro_batch)]


def in_order(batch: Any, lengths: Any, max_tokens: int) -> list[list[int]]:
    """The samples of each micro-batch, filled as they come; each counts as the longest beside it."""
    parts: list[list[int]] = [[]]
    for sample in map(int, batch):
        longest = max(int(lengths[i]) for i in [*parts[-1], sample])
        if parts[-1] and longest * (len(parts[-1]) + 1) > max_tokens:
            parts.append([])
        parts[-1].append(sample)
    return parts


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
