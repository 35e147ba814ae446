"""The error that an engine's processes have printed is found behind the one that vLLM raises."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from kun_ray.lastwords import Tail

LOG = """\
(Worker pid=17953) ERROR 11-21 12:26:14 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=17953) ERROR 11-21 12:26:14 [multiproc_executor.py:953]   File "weight_utils.py", line 1, in load
(Worker pid=17953) ERROR 11-21 12:26:14 [multiproc_executor.py:953] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB
(EngineCore pid=17932) ERROR 11-21 12:26:16 [core.py:1510] Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
[rank0]: a note about errors: nothing to see here
"""


def said_by_a_child(text: str, stream: str) -> tuple[Tail, str]:
    """What a grandchild writes reaches the tail and, through it, the stderr or stdout that was there before."""
    tail = Tail()
    script = f"import sys; sys.{stream}.write({text!r})"
    with tail.listening():
        subprocess.run([sys.executable, "-c", script], check=True)
    deadline = time.monotonic() + 20
    while tail.cause() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return tail, tail.cause() or ""


def test_the_cause_is_found_in_what_the_processes_wrote(capfd) -> None:
    for stream in ("stdout", "stderr"):
        _, cause = said_by_a_child(LOG, stream)
        assert cause == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
    time.sleep(0.2)
    out, err = capfd.readouterr()
    assert out == LOG and err == LOG


def test_a_child_is_heard_after_the_block(capfd) -> None:
    tail = Tail()
    with tail.listening():
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read(); raise ValueError('died later')"],
            stdin=subprocess.PIPE,
        )
    os.write(2, b"KeyError: not ours\n")
    child.communicate()
    deadline = time.monotonic() + 20
    while tail.cause() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tail.cause() == "ValueError: died later"


def test_no_error_is_no_cause() -> None:
    assert Tail().cause() is None
