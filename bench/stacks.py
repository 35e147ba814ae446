"""What a process does, by its stacks: py-spy looks at it from outside many times a second."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

Stacks = Counter[str]
"""How often each stack was seen: `thread (its number)` with its name if it has one, and the frames `function (file)` from
root to leaf, parted by semicolons."""


@contextlib.contextmanager
def sampled(pid: int, rate: int = 50) -> Iterator[Stacks]:
    """Looks at the busy threads of a process until the block ends; the yielded counter then has their stacks.

    The process stops for each look, for a millisecond or so.

    Raises:
        RuntimeError: py-spy cannot look, with its own words.
    """
    found: Stacks = Counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "stacks")
        command = [*_record(rate, out), "--pid", str(pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as spy:
            assert spy.stdout is not None
            said = ""
            for line in spy.stdout:  # to its end if it does not begin
                said += line
                if "Sampling" in line:
                    break
            else:
                hint = "where Linux lets only root look: sysctl kernel.yama.ptrace_scope=0"
                raise RuntimeError(f"py-spy cannot look at process {pid}: {said[:300]}\n({hint})")
            try:
                yield found
            finally:
                spy.send_signal(signal.SIGINT)
                try:
                    said += spy.communicate(timeout=60)[0]
                finally:
                    spy.kill()
        found.update(_read(out, said))


def of_command(command: list[str], environment: dict[str, str], rate: int = 50) -> tuple[Stacks, str]:
    """Runs a Python program to its end; the stacks of all threads of it and of its children, idle or not, and what was said.

    Looks that fail are missing: the last lines that were said, py-spy's own, count them. How the program ends, they do not tell.

    Raises:
        RuntimeError: it could not be run or looked at, with the last that was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "stacks")
        # it must not stop processes for a look: of one that is just starting others it may leave some stopped for ever
        spy = [*_record(rate, out), "--subprocesses", "--idle", "--nonblocking", "--", *command]
        ran = subprocess.run(spy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return _read(out, ran.stdout), ran.stdout


def _record(rate: int, out: Path) -> list[str]:
    spy = Path(sys.executable).with_name("py-spy")
    if not spy.exists():
        raise RuntimeError(f"there is no {spy}: run `make venv`")
    return [str(spy), "record", "--rate", str(rate), "--format", "raw", "--nolineno", "--threads", "--output", str(out)]


def _read(out: Path, said: str) -> Stacks:
    """The stacks that py-spy has written."""
    if not out.exists():
        raise RuntimeError(f"py-spy saw nothing: {said[-500:]}")
    found: Stacks = Counter()
    for line in out.read_text().splitlines():
        _, thread, rest = line.partition("thread (")  # a process's command line may stand before it
        stack, _, count = rest.rpartition(" ")
        found[thread + stack] += int(count)
    return found


def shares(stacks: Stacks, parts: Mapping[str, str]) -> dict[str, float]:
    """The share of each part in the stacks, and of `rest`; nothing where there are no stacks."""
    counts: Counter[str] = Counter()
    for stack, count in stacks.items():
        counts[part_of(stack, parts)] += count
    return {part: round(counts[part] / counts.total(), 4) for part in [*parts, "rest"]} if counts else {}


def part_of(stack: str, parts: Mapping[str, str]) -> str:
    """The first part whose pattern the stack has; else `rest`."""
    return next((part for part, pattern in parts.items() if re.search(pattern, stack)), "rest")
