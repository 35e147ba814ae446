"""Stopping a pipeline's processes: asked once, killed at the second signal, and never left behind by a pipeline that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

from kun_ray.config import PARENT
from kun_ray.graph import JOBS, Stage
from kun_ray.stage_process import RUNNING, Progress, stop_on_signal, tell_to_stop

DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = "import time\ntry:\n    print('up', flush=True)\n    time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(130)"
REPO = Path(__file__).parents[2]


def running(code: str) -> Progress:
    """A stage that runs `code`, once it has said that it is up."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    config = JOBS["export"].schema(input="in", output="out")
    return Progress(Stage("export", "export", [], (), config), RUNNING, process=process)


def test_the_first_signal_asks_and_the_second_kills() -> None:
    polite, deaf = running(POLITE), running(DEAF)
    assert polite.process is not None and deaf.process is not None
    with stop_on_signal([polite, deaf]) as stopped:
        signal.raise_signal(signal.SIGINT)
        assert stopped.is_set()
        tell_to_stop([polite, deaf])
        assert polite.process.wait(20) == 130 and polite.told
        time.sleep(0.5)
        assert deaf.process.poll() is None
        signal.raise_signal(signal.SIGTERM)
        assert deaf.process.wait(20) == -signal.SIGKILL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nobody_is_left_behind_by_an_error() -> None:
    polite = running(POLITE)
    assert polite.process is not None
    try:
        with stop_on_signal([polite]):
            raise OSError("disk full")
    except OSError:
        pass
    assert polite.process.returncode == 130


def test_a_job_ends_with_the_pipeline_that_started_it() -> None:
    """The parent is killed; the job, which would sleep, ends as on Ctrl-C."""
    job = (
        "import dataclasses, time\nfrom kun_ray.config import run_job\n@dataclasses.dataclass\nclass C: pass\n"
        "def main(config):\n    print('up', flush=True)\n    time.sleep(60)\nrun_job(C, main, '')"
    )
    parent = (
        f"import os, subprocess, sys, time\nenv = {{**os.environ, {PARENT!r}: str(os.getpid())}}\n"
        f"child = subprocess.Popen([sys.executable, '-c', {job!r}], env=env, stdout=subprocess.PIPE, text=True)\n"
        "while child.stdout.readline() != 'up\\n': pass\nprint(child.pid, flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=REPO)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
