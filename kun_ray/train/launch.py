"""The train stage on the driver: check, tokenise, start the ranks under Ray Train, admit, finish.

Ray Train restarts the ranks when one is lost; each time they take the newest whole checkpoint themselves (loop.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from kun_ray import execution, lease, models, store
from kun_ray.config import ConfigError, KunError, require, show_config, to_dict
from kun_ray.cost import peak_flops
from kun_ray.engine import EngineConfig
from kun_ray.engine_checks import check_engine_arguments, check_engine_installed
from kun_ray.headroom import check_training
from kun_ray.prompts import load_tokenizer
from kun_ray.room import accelerators, holders, require_local_gpus, wait_for_room
from kun_ray.train import checkpoint, curve, data
from kun_ray.train.admission import admit_on_cluster
from kun_ray.train.config import CARD, STAGING, TrainConfig
from kun_ray.train.fingerprint import fingerprint

QUIET = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
"""Environment of the ranks."""


@ray.remote(num_cpus=0)
class Line:
    """Between the driver and the ranks: the wish to stop one way, what failed before the first step the other way."""

    def __init__(self) -> None:
        self._asked = False
        self._failed: tuple[str, str] | None = None

    def ask(self) -> None:
        self._asked = True

    def asked(self) -> bool:
        return self._asked

    def report(self, error: str, trace: str) -> None:
        self._failed = self._failed or (error, trace)

    def failed(self) -> tuple[str, str] | None:
        return self._failed


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs the stage to its end and returns its summary; the model is then in `<output>/model`.

    Raises:
        ConfigError: before any rank starts, when the configuration cannot work.
        KunError: another run's folder, ranks that keep failing, no room on the cluster, or a model that is not admitted.
        KeyboardInterrupt: stopped by a signal, after a checkpoint.
    """
    if config.dry_run:
        from kun_ray.train.dry import dry_run

        return dry_run(config)
    config = dataclasses.replace(config, chat_template=models.read_chat_template(config.chat_template))
    tokenizer = preflight(config)
    if not store.Folder(config.output).is_complete():
        require_local_gpus(config.ray, _num_gpus(config), config.output, "num_workers")
    with lease.opened(config.output, fingerprint(config), to_dict(config), config.lease_s) as folder:
        if folder.is_complete():
            _drop_checkpoints(config, folder)  # a kill may have come just before
            print(f"{config.output} is complete already; nothing to do")
            return dict(folder.read_json(store.SUMMARY))
        return _run(config, folder, tokenizer)


def _run(config: TrainConfig, folder: store.Folder, tokenizer: Any) -> dict[str, Any]:
    started = time.monotonic()
    splits = {"train": config.data, **({"valid": config.valid} if config.valid else {})}
    counts = {
        name: data.tokenize(of, config.steps, tokenizer, config.max_tokens, folder, name) for name, of in splits.items()
    }
    for name, found in counts.items():
        left_out = ", ".join(
            f"{n} {reason} ({found['first_left_out'][reason]})" for reason, n in found["left_out"].items()
        )
        print(
            f"{name}: {found['samples']:,} samples, {found['tokens']:,} tokens, {found['supervised_tokens']:,} supervised"
            + (f"; left out: {left_out}" if left_out else ""),
            flush=True,
        )
    execution.connect(config.ray, execution.local_cpus(config.num_workers * config.cpus_per_worker), dashboard=True)
    check_training(config, set() if config.ray.autoscaling else accelerators())
    execution.warn_if_not_shared([config.output, *([config.model] if Path(config.model).is_dir() else [])])
    staging = Path(folder.path) / STAGING
    restarts = 0
    if not _is_written(staging, config):
        restarts = _fit(config, folder)
    figures = admit_on_cluster(_absolute(config), staging) if config.publish.admission else None
    shutil.rmtree(Path(folder.path) / "model", ignore_errors=True)
    staging.rename(Path(folder.path) / "model")
    steps = curve.read_steps(folder)
    curve.draw(folder, steps, Path(config.output).name)
    summary = {
        "stage": "train",
        "model": f"{config.output.rstrip('/')}/model",
        "steps": len(steps["loss"]),
        "restarts": restarts,
        "loss": steps["loss"][max(steps["loss"])] if steps["loss"] else None,
        "valid_loss_before": steps["valid_loss"].get(0),
        "valid_loss": steps["valid_loss"][max(steps["valid_loss"])] if steps["valid_loss"] else None,
        "data": counts,
        "admission": figures,
        "elapsed_s": round(time.monotonic() - started, 1),
    }
    folder.finish(summary)
    _drop_checkpoints(config, folder)
    print(
        f"{summary['steps']} steps, loss {summary['loss']}, held out {summary['valid_loss_before']} → {summary['valid_loss']}"
    )
    print(f"model: {summary['model']}")
    return summary


def _is_written(staging: Path, config: TrainConfig) -> bool:
    """Whether the last step's weights lie there, in the type that is asked for."""
    card = staging / CARD
    return card.is_file() and json.loads(card.read_text())["dtype"] == config.publish.dtype


def _drop_checkpoints(config: TrainConfig, folder: store.Folder) -> None:
    if not config.publish.keep_checkpoints:
        shutil.rmtree(Path(folder.path) / "checkpoints", ignore_errors=True)


def preflight(config: TrainConfig) -> Any:
    """What can be checked without Ray or a GPU, in seconds; returns the tokenizer. Raises ConfigError."""
    if models.is_missing_folder(config.model):
        raise ConfigError(f"model: there is no folder {config.model}; give a folder with a model in it, or a hub id")
    models.require_on_hub(config.model, "model")
    filesystem, _ = store.resolve(config.output)
    require(
        filesystem.type_name == "local",
        f"output: DeepSpeed writes checkpoints as files, so {config.output} must be a path on storage that all nodes mount",
    )
    for entry in [*config.data, *config.valid]:
        require(store.Folder(entry.path).exists(), f"data.path: there is no file or folder {entry.path}")
    if config.publish.admission:  # what is wrong with its engine would come out after the last step
        engine = EngineConfig(model=config.model, accelerator=config.accelerator, engine=config.publish.engine)
        check_engine_installed(engine)
        check_engine_arguments(engine)
    ranks, share = config.num_workers, config.zero.hpz_partition_size
    require(ranks % share == 0, f"zero.hpz_partition_size ({share}) must divide num_workers ({ranks})")
    return load_tokenizer(
        models.fetch_model(config.model, weights=False), config.chat_template, config.trust_remote_code
    )


def _fit(config: TrainConfig, folder: store.Folder) -> int:
    """Trains to the last step and writes `model.tmp`. Returns how often the ranks were started again."""
    from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from kun_ray.train.loop import train_rank

    gpu = config.accelerator == "gpu"
    each = {"CPU": config.cpus_per_worker, **({"GPU": 1.0} if gpu else {}), **config.resources}
    wait_for_room(
        [each] * config.num_workers,
        config.wait_for_resources_s,
        config.output,
        config.accelerator_type,
        config.ray.autoscaling,
    )
    show_config()
    _fit_checkpoint(config, folder)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    line = Line.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    starts = len(curve.read_starts(folder))
    job = {"config": _absolute(config), "peak_flops": _peak(config), "line": line, "starts": starts}
    internal = Path(folder.path) / "_ray_train"
    trainer = TorchTrainer(
        train_rank,
        train_loop_config=job,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=3600),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=gpu,
            resources_per_worker=each,
            accelerator_type=config.accelerator_type,
        ),
        run_config=RunConfig(
            name=str(int(time.time())),
            storage_path=str(internal),
            failure_config=FailureConfig(
                max_failures=config.max_failures,
                controller_failure_limit=math.ceil(config.wait_for_resources_s / 60),  # it waits a minute each time
            ),
            logging_config=LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": {**QUIET, "DS_ACCELERATOR": "cuda" if gpu else "cpu"}},
        ),
    )
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            errors.append(error)

    with (
        execution.stopping(lambda: ray.get(line.ask.remote()), 3600.0) as stopped,
        curve.follow(folder, config.ray.log_every_s),
    ):
        # In the main thread, Ray Train would put its own handler in the place of ours, which ends without a checkpoint.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(0.2)
    shutil.rmtree(internal, ignore_errors=True)
    failed = ray.get(line.failed.remote())
    if failed is not None:
        error, trace = failed
        kind, _, message = error.partition(": ")
        if kind in ("ConfigError", "FloatingPointError"):
            raise (ConfigError if kind == "ConfigError" else KunError)(message)
        raise KunError(f"the ranks could not start: {error}\n{trace}")
    if errors:
        raise KunError(
            f"training ended early: {execution.root_cause(errors[0])}\n"
            f"Whole checkpoints are kept; run the same command again to continue from the newest. {holders()}"
        ) from errors[0]
    if stopped.is_set() and not (Path(folder.path) / STAGING / CARD).is_file():
        raise KeyboardInterrupt
    return max(0, len(curve.read_starts(folder)) - starts - 1)


def _fit_checkpoint(config: TrainConfig, folder: store.Folder) -> None:
    """Rewrites the newest checkpoint for this number of ranks, before they start: minutes to an hour in which they would
    hold GPUs for nothing."""
    found = checkpoint.newest(Path(folder.path) / "checkpoints")
    if found is not None and found["num_ranks"] != config.num_workers:
        print(
            f"{found['path']}: rewriting {found['num_ranks']} ranks' checkpoint for {config.num_workers}; it needs as much disk again",
            flush=True,
        )
        task = ray.remote(  # where ranks run, for the driver's machine may be small
            num_cpus=config.cpus_per_worker,
            resources=config.resources or None,
            accelerator_type=config.accelerator_type,
            num_gpus=0.01 if config.accelerator == "gpu" else 0,
            runtime_env={"env_vars": {**QUIET, "DS_ACCELERATOR": "cpu"}},
        )(checkpoint.to_universal)
        try:
            ray.get(task.remote(found["path"]))
        except ray.exceptions.RayError as error:
            raise KunError(
                f"{found['path']} cannot be rewritten for {config.num_workers} ranks: {execution.root_cause(error)}; make "
                f"room, or go on with num_workers={found['num_ranks']}"
            ) from error


def _absolute(config: TrainConfig) -> TrainConfig:
    """The configuration as ranks can use it, which Ray Train runs in a working folder of their own."""
    output = store.resolve(config.output)[1]
    return dataclasses.replace(config, model=models.absolute(config.model), output=output)


def _num_gpus(config: TrainConfig) -> float:
    return config.num_workers if config.accelerator == "gpu" else 0


def _peak(config: TrainConfig) -> float | None:
    if config.accelerator != "gpu":
        return None
    kinds = [config.accelerator_type] if config.accelerator_type else sorted(accelerators())
    return peak_flops(kinds[0] if len(kinds) == 1 else "")
