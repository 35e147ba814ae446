"""What an engine's processes say before they die. vLLM's own errors only point to "the stack trace above"; this finds it.

engine.py starts its engine inside `Tail.listening()`: what the engine's processes write then goes through a pipe of this
process, which passes it on and keeps the end of it.
"""

from __future__ import annotations

import collections
import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

KEPT_LINES = 500
_EXCEPTION = re.compile(r"(?:^|[\]\s])((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (?P<said>.+)$")
_POINTERS = ("see stack trace", "see root cause", "for the root cause")
"""An error that says this is not the cause."""


class Tail:
    """The last lines that processes started inside `listening` have written to stdout and stderr."""

    def __init__(self) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Until the end of the block, what this process writes is kept too; what it has started, for ever."""
        sys.stdout.flush()
        sys.stderr.flush()
        before = os.dup(1), os.dup(2)
        for target in (1, 2):
            source, sink = os.pipe()
            os.dup2(sink, target)
            os.close(sink)
            threading.Thread(target=self._pass_on, args=(source, before[target - 1]), daemon=True).start()
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target in (1, 2):
                os.dup2(before[target - 1], target)

    def cause(self) -> str | None:
        """The last exception that does not merely point to another one, as `Type: message`."""
        found = None
        for line in list(self._lines):
            match = _EXCEPTION.search(line.rstrip())
            if match and not any(pointer in line.lower() for pointer in _POINTERS):
                found = f"{match[1].rpartition('.')[2]}: {match['said']}"
        return found

    def _pass_on(self, source: int, target: int) -> None:
        with open(source, "rb", closefd=True) as stream:
            for line in stream:
                self._lines.append(line.decode(errors="replace"))
                with contextlib.suppress(OSError):  # the actor's own log is gone
                    os.write(target, line)
        os.close(target)
