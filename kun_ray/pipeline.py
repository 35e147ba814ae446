"""Runs the graph of graph.py: each stage as a process of its own, on one Ray cluster that all of them share.

A stage is skipped when its folder is complete and holds what the configuration asks for. One that holds something else,
or whose inputs have just been made anew, is set aside (renamed, never deleted) and runs again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import ray
from pyarrow import fs
from rich.console import Console
from rich.table import Table

from kun_ray import execution, lease, store
from kun_ray.config import ConfigError, KunError, show_config
from kun_ray.corpora import list_corpora
from kun_ray.graph import JOBS, Graph, PipelineConfig, Stage
from kun_ray.progress import duration
from kun_ray.room import require_local_gpus
from kun_ray.stage_process import (
    DONE,
    FAILED,
    RUNNING,
    SKIPPED,
    STOPPED,
    WAITING,
    Progress,
    start,
    stop_on_signal,
    tell_to_stop,
)

RECORD = "pipeline.json"


def pipeline(config: PipelineConfig) -> list[Progress]:
    """Runs what is not there yet, and prints a table of all stages.

    Raises:
        ConfigError: before anything starts, when the configuration of any stage cannot work.
        KunError: a stage failed; those that do not need it have run.
        KeyboardInterrupt: stopped by a signal, after the running stages have ended.
    """
    graph = Graph(config)
    stages = list(graph.stages.values())
    if config.dry_run:
        _print_plan(stages)
        return [Progress(stage) for stage in stages]
    _check(config, stages)
    folder = store.Folder(config.output)
    try:
        folder.filesystem.create_dir(folder.path, recursive=True)
    except OSError as error:
        raise KunError(f"cannot write to {config.output}: {error}; choose another output=") from None
    with lease.held(folder, config.lease_s):
        show_config()
        runs = [Progress(stage) for stage in stages]
        try:
            run_stages(config, runs)
        finally:
            _record(folder, runs)
            _print_table(runs)
        if all(run.state == SKIPPED for run in runs):
            print(f"{config.output}: every stage is complete already; nothing to do")
    return runs


def verdict(stage: Stage, made_anew: set[str]) -> tuple[str, str]:
    """Whether a stage would run: (`skip`, `run`, `continue` or `redo`, why).

    Args:
        stage: its inputs are complete, or named in `made_anew`.
        made_anew: stages that this run makes, or has made.
    Raises:
        KunError: an input that is no stage's, such as a corpus, cannot be read.
    """
    folder = stage.folder
    inputs = [name for name in stage.needs if name in made_anew]
    if not folder.exists(store.MANIFEST):
        return "run", "not there yet"
    if inputs:
        return "redo", f"{' and '.join(inputs)} {'runs' if len(inputs) == 1 else 'run'} anew"
    found = store.differences(folder, JOBS[stage.job].fingerprint(stage.config))
    if folder.is_complete():  # a library's new version does not unmake what an older one has made
        found = [line for line in found if not line.startswith("versions.")]
    if found:
        return "redo", found[0] + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    return ("skip", "complete, unchanged") if folder.is_complete() else ("continue", "stopped before its end")


def _check(config: PipelineConfig, stages: list[Stage]) -> None:
    """What would only come to light hours later: models that are not there, GPUs that this machine has not."""
    config.models.require_folders(dataclasses.asdict(config.models))
    for key in ("seeds", "held_out", "documents"):
        path = getattr(config, key)
        if path and not store.Folder(path).exists():
            raise ConfigError(f"{key}: there is no file or folder {path}")
    for stage in stages:
        if stage.job == "prepare":
            list_corpora(stage.config.corpora)
        require_local_gpus(config.ray, _gpus(stage), stage.name)


def _gpus(stage: Stage) -> float:
    if stage.job == "train":
        return float(stage.config.num_workers) if stage.config.accelerator == "gpu" else 0.0
    return (
        float(sum(p.replicas * p.num_gpus() for p in stage.config.pools.values())) if stage.job == "generate" else 0.0
    )


def _cpus(stage: Stage) -> float:
    if stage.job == "train":
        return float(stage.config.num_workers * stage.config.cpus_per_worker)
    return float(sum(p.replicas * p.num_cpus for p in stage.config.pools.values())) if stage.job == "generate" else 0.0


def run_stages(config: PipelineConfig, runs: list[Progress]) -> None:
    """Runs the stages that are not there yet, in the order of their needs. Raises as `pipeline` does."""
    by_name = {run.stage.name: run for run in runs}
    made_anew: set[str] = set()
    environment: dict[str, str] | None = None
    with stop_on_signal(runs) as stopped:
        while True:
            for run in runs:
                if run.state == RUNNING and run.process is not None and run.process.poll() is not None:
                    _end(run, made_anew)
                before = [by_name[name].state for name in run.stage.needs]
                if run.state == WAITING and all(state in (DONE, SKIPPED) for state in before):
                    _decide(run, made_anew)
                if stopped.is_set() or run.state != WAITING or run.verdict is None or _must_wait(config, run, runs):
                    continue
                environment = environment or _connect(config, runs)
                if not stopped.is_set() and _set_aside(run):
                    start(run, environment)
            if stopped.is_set():
                tell_to_stop(runs)
            if not any(run.state == RUNNING or (run.verdict and run.state == WAITING) for run in runs):
                break
            if stopped.is_set() and not any(run.state == RUNNING for run in runs):
                break
            time.sleep(0.2)
    if stopped.is_set():
        raise KeyboardInterrupt
    failed = [run.stage for run in runs if run.state == FAILED]
    if failed:
        commands = "\n".join(f"  {shlex.join(stage.command)}" for stage in failed)
        raise KunError(
            f"{', '.join(stage.name for stage in failed)} failed; what it said stands above and in "
            f"{config.output}/logs. The same command goes on from here; alone it runs as\n{commands}"
        )


def _decide(run: Progress, made_anew: set[str]) -> None:
    """Settles a stage whose inputs are there: skipped, or with a verdict that waits to be carried out."""
    if run.verdict is not None:
        return
    try:
        run.verdict = verdict(run.stage, made_anew)
    except KunError as error:
        run.state = FAILED
        print(f"{run.stage.name}: {error}", flush=True)
        return
    if run.verdict[0] == "skip":
        run.state, run.summary = SKIPPED, run.stage.folder.read_json(store.SUMMARY)


def _must_wait(config: PipelineConfig, run: Progress, runs: list[Progress]) -> bool:
    """Whether a running stage holds the GPUs that this one wants: any exclusive one, or with `overlap` one of its kind."""
    return JOBS[run.stage.job].exclusive and any(
        other.state == RUNNING
        and JOBS[other.stage.job].exclusive
        and (not config.overlap or other.stage.job == run.stage.job)
        for other in runs
    )


def _connect(config: PipelineConfig, runs: list[Progress]) -> dict[str, str]:
    """The stages' environment: the address of the cluster that all of them join, which may be one that starts here."""
    address, local = config.ray.address or os.environ.get("RAY_ADDRESS"), {}
    if address is None:
        most = {job: max((_cpus(run.stage) for run in runs if run.stage.job == job), default=0.0) for job in JOBS}
        num_cpus = execution.local_cpus(sum(most.values()) if config.overlap else max(most.values()))
        on_term = signal.getsignal(signal.SIGTERM)
        execution.connect(config.ray, num_cpus + execution.LOCAL_MIN_CPUS, dashboard=True)
        signal.signal(signal.SIGTERM, on_term)  # connect has put a stage's handler in the place of the pipeline's
        address, local = ray.get_runtime_context().gcs_address, {execution.LOCAL_CODE: "1"}
    # A Ray that starts here puts its authentication mode into this process's environment: read after that.
    return {**os.environ, "PYTHONUNBUFFERED": "1", **local, "RAY_ADDRESS": address}


def _end(run: Progress, made_anew: set[str]) -> None:
    assert run.process is not None and run.relay is not None
    run.relay.join(5)  # its last words first
    run.elapsed_s = time.monotonic() - run.started
    whole = run.process.returncode == 0 and run.stage.folder.is_complete()
    run.state = DONE if whole else STOPPED if run.told else FAILED
    if whole:
        made_anew.add(run.stage.name)
        run.summary = run.stage.folder.read_json(store.SUMMARY)
    print(f"{run.stage.name}: {run.state} after {duration(run.elapsed_s)}", flush=True)


def _set_aside(run: Progress) -> bool:
    """Makes room for a stage that must be made anew; False, and the stage has failed, when that cannot be."""
    folder, (what, why) = run.stage.folder, run.verdict or ("", "")
    if what != "redo":
        return True
    holder = lease.holder(folder, run.stage.config.lease_s)
    if holder is not None or not isinstance(folder.filesystem, fs.LocalFileSystem):
        wanted = f"let {holder} end" if holder else "move it away or delete it"
        print(
            f"{run.stage.name}: {folder.uri} must be made anew ({why}): {wanted}, then run the same command", flush=True
        )
        run.state = FAILED
        return False
    aside = Path(folder.path).parent / "_old" / f"{run.stage.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.parent.mkdir(exist_ok=True)
    os.rename(folder.path, aside)
    print(f"{run.stage.name}: made anew, since {why}; what was there is now {aside}", flush=True)
    return True


def _print_plan(stages: list[Stage]) -> None:
    table = Table("stage", "after", "would", "why", box=None, padding=(0, 2))
    made_anew: set[str] = set()
    for stage in stages:
        try:
            what, why = verdict(stage, made_anew)
        except KunError as error:
            what, why = "fail", str(error)
        if what != "skip":
            made_anew.add(stage.name)
        table.add_row(stage.name, ", ".join(stage.needs), what, why)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print("\nEach alone, once the stages before it are complete:")
    for stage in stages:
        print(f"  {shlex.join(stage.command)}")


def _print_table(runs: list[Progress]) -> None:
    table = Table("stage", "", "time", "result", box=None, padding=(0, 2))
    for run in runs:
        table.add_row(run.stage.name, run.state, duration(run.elapsed_s) if run.elapsed_s else "", _result(run))
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _result(run: Progress) -> str:
    """One line of a stage's summary."""
    found = run.summary
    if not found:
        return ""
    if run.stage.job == "train":
        before, after = found["valid_loss_before"], found["valid_loss"]
        held_out = "" if None in (before, after) else f", held out {before:.3f} → {after:.3f} nats/token"
        return f"{found['steps']} steps, loss {found['loss']}{held_out}"
    if run.stage.job == "export":
        return f"{found['train']:,} train and {found['valid']:,} valid rows"
    return f"{found['rows']:,} rows: {found['ok']:,} ok, {found['rejected']:,} rejected, {found['failed']:,} failed"


def _record(folder: store.Folder, runs: list[Progress]) -> None:
    """Keeps in pipeline.json which stages there are, what runs each alone, and what became of it."""
    stages = {
        run.stage.name: {
            "state": run.state,
            "needs": run.stage.needs,
            "elapsed_s": round(run.elapsed_s, 1),
            "command": shlex.join(run.stage.command),
        }
        for run in runs
    }
    with contextlib.suppress(OSError):
        folder.write_json(RECORD, {"ended": time.strftime("%FT%T%z"), "stages": stages})
