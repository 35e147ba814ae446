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

Stacks = Counter[tuple[str, ...]]
"""How often each stack was seen: `thread (its number)` with its name if it has one, and the frames `function (file)` from root to leaf."""


@contextlib.contextmanager
def sampled(pid: int, rate: int = 50) -> Iterator[Stacks]:
    """Looks at the busy threads of a process until the block ends; the yielded counter then has their stacks.

    Raises:
        RuntimeError: py-spy could not look, with its own words.
    """
    found: Stacks = Counter()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "stacks")
        command = [*_record(rate, out), "--pid", str(pid)]
        spy = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert spy.stdout is not None
        said = spy.stdout.readline()  # it looks on from here, or says why not
        try:
            yield found
        finally:
            spy.send_signal(signal.SIGINT)
            said += spy.communicate(timeout=60)[0]
        found.update(_read(out, said))


def of_command(command: list[str], environment: dict[str, str], rate: int = 50) -> Stacks:
    """Runs a Python program to its end; the stacks of all threads of it and of its children, idle or not.

    Raises:
        RuntimeError: it could not be run or looked at, with the last that was said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "stacks")
        # it must not stop processes for a look: of one that is just starting others it may leave some stopped for ever
        spy = [*_record(rate, out), "--subprocesses", "--idle", "--nonblocking", "--", *command]
        ran = subprocess.run(spy, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return _read(out, ran.stdout)


def _record(rate: int, out: Path) -> list[str]:
    spy = str(Path(sys.executable).with_name("py-spy"))
    return [spy, "record", "--rate", str(rate), "--format", "raw", "--nolineno", "--threads", "--output", str(out)]


def _read(out: Path, said: str) -> Stacks:
    """The stacks that py-spy has written."""
    if not out.exists():
        raise RuntimeError(f"py-spy saw nothing: {said[-500:]}")
    found: Stacks = Counter()
    for line in out.read_text().splitlines():
        stack, _, count = line[line.find("thread (") :].rpartition(" ")  # a process's command line may stand before it
        found[tuple(stack.split(";"))] += int(count)
    return found


def shares(stacks: Stacks, parts: Mapping[str, str]) -> dict[str, float]:
    """The share of each part: a stack is of the first part whose pattern is found in any of its frames; else `rest`."""
    counts = Counter(part_of(stack, parts) for stack in stacks.elements())
    return {part: round(counts[part] / counts.total(), 4) for part in [*parts, "rest"]} if counts else {}


def part_of(stack: tuple[str, ...], parts: Mapping[str, str]) -> str:
    """The first part of which a frame of the stack is."""
    return next((part for part, pattern in parts.items() if any(re.search(pattern, frame) for frame in stack)), "rest")
