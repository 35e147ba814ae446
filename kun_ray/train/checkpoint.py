"""Checkpoints of a run: where they are, which one is whole, how one fits another number of ranks, which may go.

Every rank writes its own shards straight to the run's folder. `_COMPLETE.json` comes last and lists every file with its
size, so that a torn checkpoint is never chosen. DeepSpeed writes files, so the folder must be a path that all nodes share.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

COMPLETE = "_COMPLETE.json"
UNIVERSAL = "universal"


def tag(step: int) -> str:
    """Name of the checkpoint that holds the state after `step` optimizer steps."""
    return f"step-{step:07d}"


def mark_complete(folder: Path, step: int, num_ranks: int) -> None:
    """Says that every rank has written its part of `folder`. Call on one rank, after a barrier."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    staging = folder / f"{COMPLETE}.tmp"
    staging.write_text(json.dumps({"step": step, "num_ranks": num_ranks, "files": files}, indent=1))
    staging.rename(folder / COMPLETE)


def newest(checkpoints: Path) -> dict[str, Any] | None:
    """`step`, `num_ranks` and `path` of the newest checkpoint that is whole; None if there is none."""
    for folder in sorted(checkpoints.glob("step-???????"), reverse=True):
        try:
            state = json.loads((folder / COMPLETE).read_text())
            whole = all((folder / name).stat().st_size == size for name, size in state["files"].items())
        except (OSError, ValueError, KeyError):
            continue
        if whole:
            return {"step": int(state["step"]), "num_ranks": int(state["num_ranks"]), "path": folder}
    return None


def prune(checkpoints: Path, keep_last: int) -> None:
    """Deletes all but the newest whole checkpoints, and torn ones that are older. Call on one rank."""
    whole = [folder for folder in sorted(checkpoints.glob("step-???????")) if (folder / COMPLETE).is_file()]
    for folder in sorted(checkpoints.glob("step-???????")):
        if whole and folder < whole[-1] and folder not in whole[-keep_last:]:
            (folder / COMPLETE).unlink(missing_ok=True)  # first: what is half deleted must not look whole
            shutil.rmtree(folder, ignore_errors=True)


def available_memory() -> int:
    """Bytes of memory that this machine can give now (MemAvailable of /proc/meminfo)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def to_universal(folder: Path) -> None:
    """Rewrites a checkpoint so that any number of ranks can load it; a second call finds it done.

    DeepSpeed's own conversion. It reads and writes the whole state once: 12 bytes per parameter.
    """
    target = folder / UNIVERSAL
    if (target / COMPLETE).is_file():
        return
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    shutil.rmtree(target, ignore_errors=True)
    largest = max(file.stat().st_size for file in folder.iterdir() if file.is_file())
    workers = int(
        max(1, min(8, os.cpu_count() or 1, available_memory() / (1.5 * largest)))
    )  # each holds one rank's shard
    main(
        Namespace(
            input_folder=str(folder),
            output_folder=str(target),
            num_extract_workers=workers,
            num_merge_workers=workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    (target / COMPLETE).write_text("{}")
