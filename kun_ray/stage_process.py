"""One stage of a pipeline as a process: started, its output passed on and kept, stopped with the pipeline.

Processes, since each stage then is exactly the job that one would run alone, and frees all that it holds when it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyarrow import fs

from kun_ray import store
from kun_ray.graph import Stage

WAITING, RUNNING, DONE, SKIPPED, FAILED = "waiting", "running", "done", "complete already", "failed"
STOP_S = 180.0
"""After Ctrl-C or SIGTERM, how long stages may take to bring what they have in hand to disk."""


@dataclasses.dataclass
class Progress:
    """What became of one stage in this run."""

    stage: Stage
    state: str = WAITING
    process: subprocess.Popen[str] | None = None
    started: float = 0.0
    elapsed_s: float = 0.0
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def start(run: Progress, environment: dict[str, str]) -> None:
    """Starts a stage's job in a session of its own, with its output passed on line by line."""
    stage = run.stage
    script = Path(__file__).parents[1] / "jobs" / f"{stage.job}.py"
    print(f"{stage.name}: {shlex.join(stage.command)}", flush=True)
    run.process = subprocess.Popen(
        [sys.executable, str(script), *stage.args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the stages through this process, once
    )
    run.state, run.started = RUNNING, time.monotonic()
    threading.Thread(target=_relay, args=(run,), name=stage.name, daemon=True).start()


def _relay(run: Progress) -> None:
    """Passes a stage's output on, each line with the stage's name, and keeps it in <output>/logs."""
    assert run.process is not None and run.process.stdout is not None
    folder = store.Folder(run.stage.folder.uri.rpartition("/")[0])
    local = isinstance(folder.filesystem, fs.LocalFileSystem)
    if local:
        (Path(folder.path) / "logs").mkdir(exist_ok=True)
    with open(Path(folder.path) / "logs" / f"{run.stage.name}.log", "a") if local else open(os.devnull, "w") as log:
        for line in run.process.stdout:
            log.write(line)
            log.flush()
            if not line.startswith("# "):  # the resolved configuration: kept in the log and in the manifest
                print(f"{run.stage.name} | {line}", end="", flush=True)


@contextlib.contextmanager
def stop_on_signal(runs: list[Progress]) -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM are passed on to the running stages, which end cleanly; after a second one they are killed."""
    stopped = threading.Event()

    def handle(signum: int, frame: object) -> None:
        running = [run for run in runs if run.state == RUNNING and run.process is not None]
        print(
            f"\nstopping: {', '.join(run.stage.name for run in running) or 'nothing runs'}", file=sys.stderr, flush=True
        )
        for run in running:
            assert run.process is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL) if stopped.is_set() else run.process.send_signal(
                    signal.SIGINT
                )
        stopped.set()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for run in runs:
            if run.process is not None and run.process.poll() is None:  # something went wrong here: leave nobody behind
                run.process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.process.wait(STOP_S)
                run.process.kill()
        for signum, handler in before.items():
            signal.signal(signum, handler)
