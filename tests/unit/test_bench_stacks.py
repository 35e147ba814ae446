"""bench/stacks.py on a process that spends three quarters of its time in one of two functions."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PARTS = {"much": r";much ", "little": r";little "}
PROGRAM = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # on most laptops only a parent may look at a process
def spend(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
def much():
    spend(0.03)
def little():
    spend(0.01)
print("on", flush=True)
end = time.time() + float(sys.argv[1])
while time.time() < end:
    much()
    little()
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    return importlib.import_module("stacks")


def test_shares_of_a_running_process(stacks: Any, program: str) -> None:
    with subprocess.Popen([sys.executable, program, "60"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            with stacks.sampled(process.pid, rate=100) as seen:
                assert not seen
                time.sleep(6)
        finally:
            process.kill()
    check(stacks, seen)


def test_shares_of_a_whole_command(stacks: Any, program: str) -> None:
    seen, said = stacks.of_command([sys.executable, program, "6"], dict(os.environ), rate=100)
    assert "on\n" in said
    assert all(stack.startswith("thread (") for stack in seen)
    check(stacks, seen)


def check(stacks: Any, seen: Any) -> None:
    shares = stacks.shares(seen, PARTS)
    assert seen.total() > 200 and sum(shares.values()) == pytest.approx(1.0, abs=1e-3)
    assert 2 < shares["much"] / shares["little"] < 4.5 and shares["rest"] < 0.2


def test_what_cannot_be_looked_at_says_why(stacks: Any) -> None:
    with pytest.raises(RuntimeError, match=r"py-spy cannot look at process \d+: .*Error"), stacks.sampled(2**22 - 1):
        pass
    with pytest.raises(RuntimeError, match="py-spy saw nothing"):
        stacks.of_command(["/nowhere/python"], {})
    assert stacks.shares(stacks.Stacks(), PARTS) == {}
