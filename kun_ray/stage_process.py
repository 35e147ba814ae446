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
from typing import Any, TextIO

from pyarrow import fs

from kun_ray.config import PARENT
from kun_ray.graph import Stage

WAITING, RUNNING, DONE, SKIPPED = "waiting", "running", "done", "complete already"
STOPPED, FAILED = "stopped", "failed"

ONLY_LOGGED = ("github.com/ray-project/ray/issues/53727", "has constructor arguments in the object store")
"""Lines of Ray's about how Ray Data and Ray Train call it, which nobody here can act on; like the resolved configuration
(`# …`, which is in the manifest too) they stand in the log alone."""


@dataclasses.dataclass
class Progress:
    """What became of one stage in this run."""

    stage: Stage
    state: str = WAITING
    verdict: tuple[str, str] | None = None
    """What is to be done and why, once the stages before it are there."""
    process: subprocess.Popen[str] | None = None
    relay: threading.Thread | None = None
    told: bool = False
    """Whether it has been asked to stop."""
    started: float = 0.0
    elapsed_s: float = 0.0
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)


def start(run: Progress, environment: dict[str, str]) -> None:
    """Starts a stage's job in a session of its own, with its output passed on line by line."""
    stage = run.stage
    script = Path(__file__).parents[1] / "jobs" / f"{stage.job}.py"
    print(f"{stage.name}: {shlex.join(stage.command)}", flush=True)
    run.state, run.started = RUNNING, time.monotonic()
    run.process = subprocess.Popen(
        [sys.executable, str(script), *stage.args],
        env={**environment, PARENT: str(os.getpid())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches the stages through this process, once
    )
    run.relay = threading.Thread(target=_relay, args=(stage, run.process.stdout), name=stage.name, daemon=True)
    run.relay.start()


def tell_to_stop(runs: list[Progress]) -> None:
    """Asks every running stage once to bring what it has in hand to disk and to end."""
    for run in runs:
        if run.state == RUNNING and run.process is not None and not run.told:
            run.told = True
            with contextlib.suppress(ProcessLookupError):
                run.process.send_signal(signal.SIGINT)


@contextlib.contextmanager
def stop_on_signal(runs: list[Progress]) -> Iterator[threading.Event]:
    """Sets the yielded event on Ctrl-C or SIGTERM; a second one kills the running stages. None is left behind at the end."""
    stopped = threading.Event()

    def handle(signum: int, frame: object) -> None:
        names = ", ".join(run.stage.name for run in runs if run.state == RUNNING)
        if stopped.is_set():
            _kill(runs)
        elif names:
            print(f"\nstopping {names} (once more to kill)", file=sys.stderr, flush=True)
        stopped.set()

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        tell_to_stop(runs)
        for run in runs:
            if run.process is not None:
                run.process.wait()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _kill(runs: list[Progress]) -> None:
    for run in runs:
        if run.process is not None and run.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.process.pid, signal.SIGKILL)


def _relay(stage: Stage, output: TextIO) -> None:
    """Passes a stage's output on, each line with the stage's name, and keeps it in <output>/logs. Reads on whatever
    happens to the log or the terminal: a stage that nobody listens to would stand still."""
    log: TextIO | None = None
    with contextlib.suppress(OSError):
        if isinstance(stage.folder.filesystem, fs.LocalFileSystem):
            folder = Path(stage.folder.path).parent / "logs"
            folder.mkdir(exist_ok=True)
            log = (folder / f"{stage.name}.log").open("a", encoding="utf-8")
    for line in output:
        with contextlib.suppress(OSError, ValueError):
            if log is not None:
                log.write(line)
                log.flush()
        with contextlib.suppress(OSError, ValueError):
            if not line.startswith("# ") and not any(words in line for words in ONLY_LOGGED):
                print(f"{stage.name} | {line}", end="", flush=True)
    with contextlib.suppress(OSError):
        if log is not None:
            log.close()
