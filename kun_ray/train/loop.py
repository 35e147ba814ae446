"""The training loop, as one rank runs it: load, steps, evaluation, checkpoints, publish. launch.py starts it under Ray Train.

The loss of a step is Σ nll ÷ T over all ranks and micro-batches, T being the supervised tokens of the whole step; a mean of
means would weigh tokens by the company they keep. DeepSpeed averages gradients over ranks, hence the factor `world`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
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
from kun_ray.config import ConfigError
from kun_ray.cost import Cost, cost_of
from kun_ray.store import Folder
from kun_ray.train import checkpoint, curve, model, packing
from kun_ray.train.batch import collate, learning_rate
from kun_ray.train.config import TrainConfig
from kun_ray.train.data import Samples, read_samples
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
    found: dict[str, Any] | None = None
    """The checkpoint to go on from, as checkpoint.newest describes it: rank 0's view, for file systems may differ by seconds."""
    board: Any = None
    """TensorBoard's writer on rank 0, if it is installed."""
    looked_at: float = 0.0
    """When this rank last asked whether its node is about to go."""

    def log(self, **line: Any) -> None:
        """A line of metrics.jsonl, and of TensorBoard, from rank 0."""
        if self.rank == 0:
            self.folder.append_metrics(line)
            if self.board is not None:
                curve.to_tensorboard(self.board, line)


def train_rank(job: dict[str, Any]) -> None:
    """One rank's whole run. `job`: `config`, `peak_flops` (None if unknown) and `line` to the driver (actor or None)."""
    import ray

    config, line = job["config"], job["line"]
    if line is not None and ray.get(line.failed.remote()) is not None:
        return  # Ray Train starts the ranks again after any error; after this one it would be in vain
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # DeepSpeed compiles with ninja
    try:
        _train(job)
    except Exception as error:
        begun = (
            len(curve.read_starts(Folder(config.output))) > job["starts"]
        )  # what fails before the first step fails again
        if line is not None and (isinstance(error, ConfigError | FloatingPointError) or not begun):
            ray.get(line.report.remote(f"{type(error).__name__}: {error}", traceback.format_exc()))
        raise


def _train(job: dict[str, Any]) -> None:
    config: TrainConfig = job["config"]
    run = set_up(config, models.local_folder(config.model))
    job = {**job, "cost": cost_of(run.path, config.lora, config.trust_remote_code)}
    train, valid = read_samples(run.folder, "train"), _valid(run.folder, config)
    orders = [
        packing.epoch_order(train.data, [e.weight for e in config.data], n, config.seed) for n in range(config.epochs)
    ]
    plan = [
        (epoch, batch) for epoch, order in enumerate(orders) for batch in packing.steps_of(order, config.batch_size)
    ]
    plan = plan[: config.max_steps]
    start = resume(run)
    where = {"ranks": run.world, "host": socket.gethostname(), "pid": os.getpid(), "attention": model.attention(config)}
    run.log(event="start", step=start, steps=len(plan), **where)
    if start == 0 and valid is not None:
        run.log(step=0, valid_loss=round(evaluate(run, valid), 6))
    warned = False
    for step in range(start, len(plan)):
        epoch, batch = plan[step]
        last_of_epoch = step + 1 == len(plan) or plan[step + 1][0] != epoch
        line, stop, preempted = _step(run, train, batch, step, len(plan), job)
        run.log(epoch=epoch + 1, **line)
        looks = last_of_epoch if not config.eval_every_steps else (step + 1) % config.eval_every_steps == 0
        if valid is not None and (looks or step + 1 == len(plan)):
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
    # Shared-memory collectives for inference on CPUs, which training never calls, would be compiled for half a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo" if config.accelerator == "cpu" else "nccl", auto_mpi_discovery=False)
    device = torch.device("cpu" if config.accelerator == "cpu" else f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    torch.manual_seed(config.seed)
    settings = deepspeed_config(config)
    folder, rank = Folder(config.output), dist.get_rank()
    agreed = [checkpoint.newest(Path(folder.path) / "checkpoints") if rank == 0 else None]
    dist.broadcast_object_list(agreed, device=device)
    found = agreed[0]
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
    board = curve.open_tensorboard(folder) if rank == 0 else None
    return Run(config, folder, path, engine, device, rank, dist.get_world_size(), found, board)


def resume(run: Run) -> int:
    """Loads the newest whole checkpoint; returns the steps that it holds, 0 for none."""
    checkpoints, found = Path(run.folder.path) / "checkpoints", run.found
    if found is None:
        return 0
    name = checkpoint.tag(found["step"])
    if found["num_ranks"] != run.world:
        name = f"{name}/{checkpoint.UNIVERSAL}"  # launch.py has made it
    # Without the base's frozen weights, which a LoRA run does not save.
    loaded, state = run.engine.load_checkpoint(str(checkpoints), tag=name, load_module_strict=run.config.lora is None)
    if loaded is None or state["step"] != found["step"]:
        raise RuntimeError(f"DeepSpeed did not load {found['path']}")
    _mend_steps(run)
    return int(state["step"])


def _mend_steps(run: Run) -> None:
    """The optimizer's step counts as its kind wants them: a universal checkpoint brings one CPU tensor for all parameters,
    which fused AdamW refuses and several of them would count up together; DeepSpeed's CPU Adam takes an int."""
    on_host = run.config.zero.offload_optimizer != "none"
    for state in run.engine.optimizer.optimizer.state.values():
        if "step" in state:
            step = float(state["step"])
            state["step"] = int(step) if on_host else torch.tensor(step, device=run.device)


def save(run: Run, step: int) -> None:
    """Every rank writes its shards; the checkpoint counts once all have."""
    checkpoints = Path(run.folder.path) / "checkpoints"
    if run.rank == 0:  # a torn one of the same step, with other ranks' shards perhaps
        shutil.rmtree(checkpoints / checkpoint.tag(step), ignore_errors=True)
    dist.barrier()
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
    if not math.isfinite(float(figures[0])):
        raise FloatingPointError(
            f"the loss of step {step + 1} is {float(figures[0])}: lower lr, or look at the data; checkpoints from before are kept"
        )
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
