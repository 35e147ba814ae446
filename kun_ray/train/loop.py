"""The training loop, as one rank runs it: load, steps, evaluation, checkpoints, publish. launch.py starts it under Ray Train.

The loss of a step is Σ nll ÷ T over all ranks and micro-batches, T being the supervised tokens of the whole step; a mean of
means would weigh tokens by the company they keep. DeepSpeed averages gradients over ranks, hence the factor `world`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kun_ray import models
from kun_ray.store import Folder
from kun_ray.train import checkpoint, model, packing
from kun_ray.train.config import TrainConfig
from kun_ray.train.data import Samples, read_samples
from kun_ray.train.memory import Cost, cost_of
from kun_ray.train.zero import Zero3Notice, deepspeed_config

WINDOW = 1024
"""Held-out samples that are spread over the ranks at a time."""

LOOK_EVERY_S = 15.0
"""Between two questions whether a node is about to go; clouds give notice of 30 to 120 seconds."""


@dataclasses.dataclass
class Run:
    """What a rank holds while it trains."""

    config: TrainConfig
    folder: Folder
    path: str
    """The base model's folder on this node."""
    engine: Any
    device: torch.device
    rank: int
    world: int
    looked_at: float = 0.0
    """When this rank last asked whether its node is about to go."""

    def log(self, **line: Any) -> None:
        """A line of metrics.jsonl, from rank 0."""
        if self.rank == 0:
            self.folder.append_metrics(line)


def train_rank(job: dict[str, Any]) -> None:
    """One rank's whole run. `job`: `config`, `peak_flops` (None if unknown) and `line` to the driver (actor or None)."""
    config: TrainConfig = job["config"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    try:
        run = set_up(config, models.local_folder(config.model))
    except Exception as error:
        if job["line"] is None:
            raise
        # What fails before the first step fails again: the driver is told, and Ray Train does not start over.
        job["line"].report.remote(f"{type(error).__name__}: {error}", traceback.format_exc())
        time.sleep(
            2
        )  # the other ranks may be about to say the same; ending first would hide it behind a lost connection
        return
    train, valid = read_samples(run.folder, "train"), _valid(run.folder, config)
    job = {**job, "cost": cost_of(run.path, config)}
    orders = [
        packing.epoch_order(train.data, [e.weight for e in config.data], n, config.seed) for n in range(config.epochs)
    ]
    plan = [
        (epoch, batch) for epoch, order in enumerate(orders) for batch in packing.steps_of(order, config.batch_size)
    ]
    plan = plan[: config.max_steps]
    start = resume(run)
    run.log(event="start", step=start, steps=len(plan), ranks=run.world, host=socket.gethostname(), pid=os.getpid())
    if start == 0 and valid is not None:
        run.log(step=0, valid_loss=round(evaluate(run, valid), 6))
    warned = False
    for step in range(start, len(plan)):
        epoch, batch = plan[step]
        last_of_epoch = step + 1 == len(plan) or plan[step + 1][0] != epoch
        line, stop, preempted = _step(run, train, batch, step, len(plan), job)
        run.log(epoch=epoch + 1, **line)
        if valid is not None and (
            last_of_epoch if not config.eval_every_steps else (step + 1) % config.eval_every_steps == 0
        ):
            run.log(step=step + 1, valid_loss=round(evaluate(run, valid), 6))
        due = last_of_epoch if not config.save_every_steps else (step + 1) % config.save_every_steps == 0
        if due or stop or (preempted and not warned) or step + 1 == len(plan):
            save(run, step + 1)
        warned = warned or preempted  # a node that goes stays up for minutes: one checkpoint is enough
        if stop and step + 1 < len(plan):
            run.log(event="stopped", step=step + 1)
            return
    from kun_ray.train.publish import publish

    publish(run, train if valid is None else valid)


def set_up(config: TrainConfig, path: str) -> Run:
    """Process group, model, optimizer and DeepSpeed engine of this rank."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo" if config.accelerator == "cpu" else "nccl", auto_mpi_discovery=False)
    device = torch.device("cpu" if config.accelerator == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    torch.manual_seed(config.seed)
    settings = deepspeed_config(config)
    folder = Folder(config.output)
    found = checkpoint.newest(Path(folder.path) / "checkpoints")
    settings["checkpoint"] = {"load_universal": found is not None and found["num_ranks"] != dist.get_world_size()}
    notice = Zero3Notice(settings)
    try:
        network: Any = model.build_model(path, config)
        if config.lora is not None:
            network = model.add_lora(network, config.lora, config.seed)
        wrapped = model.NextTokenLoss(network)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        engine, *_ = deepspeed.initialize(model=wrapped, optimizer=_optimizer(config, trained), config=settings)
    finally:
        notice.close()
    model.restore_rotary(engine.module)
    model.require_rotary(engine.module)
    return Run(config, folder, path, engine, device, dist.get_rank(), dist.get_world_size())


def resume(run: Run) -> int:
    """Loads the newest whole checkpoint; returns the steps that it holds, 0 for none."""
    checkpoints = Path(run.folder.path) / "checkpoints"
    found = checkpoint.newest(checkpoints)
    if found is None:
        return 0
    name = checkpoint.tag(found["step"])
    if found["num_ranks"] != run.world:
        if run.rank == 0:
            checkpoint.to_universal(found["path"])
        dist.barrier()
        name = f"{name}/{checkpoint.UNIVERSAL}"
    loaded, state = run.engine.load_checkpoint(str(checkpoints), tag=name)
    if loaded is None or state["step"] != found["step"]:
        raise RuntimeError(f"DeepSpeed did not load {found['path']}")
    return int(state["step"])


def save(run: Run, step: int) -> None:
    """Every rank writes its shards; the checkpoint counts once all have."""
    checkpoints = Path(run.folder.path) / "checkpoints"
    run.engine.save_checkpoint(
        str(checkpoints),
        tag=checkpoint.tag(step),
        client_state={"step": step},
        save_latest=False,
        exclude_frozen_parameters=run.config.lora is not None,
    )
    dist.barrier()
    if run.rank == 0:
        checkpoint.mark_complete(checkpoints / checkpoint.tag(step), step, run.world)
        checkpoint.prune(checkpoints, run.config.keep_last)


def evaluate(run: Run, samples: Samples) -> float:
    """Mean −log p per supervised token over all samples, nats."""
    total = torch.zeros(2, dtype=torch.float64, device=run.device)
    run.engine.eval()
    with torch.no_grad():
        for start in range(0, len(samples), WINDOW):
            window = np.arange(start, min(start + WINDOW, len(samples)))
            for micro in _micros(run, window, samples):
                total[0] += run.engine(**collate(samples, micro[run.rank], run.config.packing, run.device)).double()
            if run.rank == 0:
                total[1] += float(samples.num_supervised[window].sum())
    run.engine.train()
    dist.all_reduce(total)
    return float(total[0] / total[1])


def collate(samples: Samples, part: list[int], packing: bool, device: torch.device) -> dict[str, Any]:
    """The tensors of one rank's part of a micro-batch: one row of samples end to end, or one padded row for each."""
    if not part:  # this rank has nothing left: two tokens that count for nothing
        blank = torch.zeros((1, 2), dtype=torch.int64, device=device)
        return {"ids": blank, "targets": blank - 100, "positions": torch.arange(2, device=device)[None], "mask": None}
    pieces = [samples.sample(index) for index in part]
    longest = max(len(ids) for ids, _ in pieces)
    rows = []
    for ids, said in pieces:
        targets = np.full(len(ids), -100, dtype=np.int64)
        targets[:-1][said[1:]] = ids[1:][said[1:]]
        rows.append((ids.astype(np.int64), targets, np.arange(len(ids)), np.ones(len(ids), dtype=np.int64)))
    if packing:
        joined = [np.concatenate(column)[None] for column in zip(*rows, strict=True)]
    else:
        fill = (0, -100, 0, 0)
        joined = [
            np.stack([np.pad(row[n], (0, longest - len(row[n])), constant_values=fill[n]) for row in rows])
            for n in range(4)
        ]
    ids, targets, positions, mask = (torch.from_numpy(array).to(device) for array in joined)
    return {"ids": ids, "targets": targets, "positions": positions, "mask": None if packing else mask}


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Rate of step `step` (from 0) out of `num_steps`: linear warm-up, then cosine, linear or constant."""
    warm = math.ceil(config.warmup * num_steps)
    if step < warm:
        return config.lr * (step + 1) / warm
    left = 1 - (step - warm) / max(1, num_steps - warm)
    share = {"cosine": 0.5 - 0.5 * math.cos(math.pi * left), "linear": left, "constant": 1.0}[config.schedule]
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def _step(
    run: Run, samples: Samples, batch: np.ndarray[Any, Any], step: int, num_steps: int, job: dict[str, Any]
) -> tuple[dict[str, Any], bool, bool]:
    """One optimizer step: its line for metrics.jsonl, whether the driver asks to stop, whether a node is about to go."""
    started = time.monotonic()
    num_supervised = int(samples.num_supervised[batch].sum())
    micros = _micros(run, batch, samples)
    figures = torch.zeros(3, dtype=torch.float64, device=run.device)
    for micro in micros:
        loss = run.engine(**collate(samples, micro[run.rank], run.config.packing, run.device))
        run.engine.backward(loss * (run.world / num_supervised))
        figures[0] += loss.detach().double()
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step, num_steps)
    run.engine.step()
    if run.rank == 0:
        figures[1] = float(_asked_to_stop(job))
        figures[2] = float(time.monotonic() - run.looked_at > LOOK_EVERY_S)
    dist.all_reduce(figures)
    preempted = bool(figures[2]) and _loses_its_node(run)
    elapsed = time.monotonic() - started
    lengths = samples.lengths[batch]
    norm = run.engine.get_global_grad_norm()
    cost: Cost = job["cost"]
    line = {
        "step": step + 1,
        "steps": num_steps,
        "loss": round(float(figures[0]) / num_supervised, 6),
        "grad_norm": None if norm is None else round(float(norm), 6),
        "lr": learning_rate(run.config, step, num_steps),
        "tokens": int(lengths.sum()),
        "supervised_tokens": num_supervised,
        "tokens_per_s": round(float(lengths.sum()) / elapsed, 1),
        "supervised_tokens_per_s": round(num_supervised / elapsed, 1),
        "mfu": cost.mfu(lengths, elapsed, run.world, job["peak_flops"]),
        "packing_efficiency": round(
            float(np.mean([packing.efficiency(m, samples.lengths, run.config.packing) for m in micros])), 4
        ),
        "memory_gb": round(torch.cuda.max_memory_allocated(run.device) / 1e9, 2) if run.device.type == "cuda" else None,
        "elapsed_s": round(elapsed, 4),
    }
    return line, bool(figures[1]), preempted


def _micros(run: Run, batch: np.ndarray[Any, Any], samples: Samples) -> list[packing.Micro]:
    config = run.config
    return packing.micro_batches(batch, samples.lengths, run.world, config.tokens_per_micro_batch, config.packing)


def _optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter]) -> Any:
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if config.zero.offload_optimizer != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(parameters, adamw_mode=True, **settings)
    return torch.optim.AdamW(parameters, fused=config.accelerator == "gpu", **settings)


def _asked_to_stop(job: dict[str, Any]) -> bool:
    import ray

    return bool(job["line"] is not None and ray.get(job["line"].asked.remote()))


def _loses_its_node(run: Run) -> bool:
    """Whether Ray has been told that a node of these ranks will go (a spot machine's notice). All ranks ask together."""
    from ray import train

    run.looked_at = time.monotonic()
    try:
        return train.get_preemption_info() is not None
    except RuntimeError:  # not under Ray Train
        return False


def _valid(folder: Folder, config: TrainConfig) -> Samples | None:
    return read_samples(folder, "valid") if config.valid else None
