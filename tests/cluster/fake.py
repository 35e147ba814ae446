"""A fake engine for faults that must be timed: it reads the test's wishes out of the row's text and keeps a journal.

Workers import this module by name, so `tests/cluster` is on their PYTHONPATH (conftest.py and driver.py see to it).
Replies depend on the prompt alone. A row's text may hold one of these marks.
  In label: 〔exit〕 the process dies on the first call   〔dead〕 the engine dies on the first call   〔error〕 every call raises
            〔crash〕 the process dies on every call   〔fatal〕 the engine dies on every call   〔hang〕 no answer on the first call
            〔flaky〕 the first call raises
            〔empty〕 empty reply   〔cut〕 reply cut by max_tokens   〔void〕 a reply without its text
  In score: 〔bad〕 verdict 差   〔nothing〕 no candidate has a log-probability   〔slow〕 takes Plan.slow_s
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import random
import re
import time
import uuid
from pathlib import Path
from typing import Any

import ray

from kun_ray.engine import EngineDead
from kun_ray.pool import Pool
from kun_ray.prompts import load_tokenizer
from kun_ray.replies import Reply

IN_SCORE = ("bad", "nothing", "slow")
MARKS = ("exit", "dead", "error", "crash", "fatal", "hang", "flaky", "empty", "cut", "void", *IN_SCORE)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the fake engines of one test behave."""

    journal: str
    """Folder for the journal of calls and for the marks of what happened once."""
    service_s: tuple[float, float] = (0.0, 0.01)
    """Shortest and longest time of a call, drawn anew at each: a replay finishes in another order."""
    by_step_s: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """The same for single steps."""
    slow_s: float = 2.0
    """Time of a call with 〔slow〕."""
    start_error: str = ""
    """Set: no engine starts, and this is why."""
    context: int = 400
    """max_model_len of the fake engine."""


class FakeEngine:
    """Answers like a model that has learnt Kun's prompts by heart."""

    def __init__(self, plan: Plan, tokenizer: Any) -> None:
        self.max_model_len = plan.context
        self.num_events = 0
        self.first_token_at: float | None = None
        self.stats = None
        self._plan, self._tokenizer = plan, tokenizer
        self._in_flight = 0
        self._node = ray.get_runtime_context().get_node_id()
        self._journal = open(Path(plan.journal) / f"{uuid.uuid4().hex}.jsonl", "a", buffering=1)  # noqa: SIM115

    def kill(self) -> None:
        """It has no processes."""

    async def generate(self, prompt: list[int], sampling: Any, adapter: str | None = None) -> Reply:
        step, row, marks = self._read(prompt)
        await self._serve(step, row, marks)
        count = len(prompt)
        if step == "label":
            kept = "".join(f"〔{mark}〕" for mark in marks if mark in IN_SCORE)
            text = f"请写出第{row:04d}篇的主要内容{kept}"
        else:
            text = f"第{row:04d}篇讲的是一件很平常的小事，写得清楚而且完整，读来令人愉快。"
        if "void" in marks:
            text = None
        if "empty" in marks:
            text = ""
        return Reply(count, 7, "length" if "cut" in marks else "stop", text)

    async def choose(self, prompt: list[int], candidates: tuple[int, ...], adapter: str | None = None) -> Reply:
        step, row, marks = self._read(prompt)
        await self._serve(step, row, marks)
        good = math.log(0.25 if "bad" in marks else 0.75)
        logprobs = (-math.inf, -math.inf) if "nothing" in marks else (good, math.log(1 - math.exp(good)))
        return Reply(len(prompt), 1, "chosen", logprobs=logprobs)

    async def perplexity(self, prompt: list[int], adapter: str | None = None) -> Reply:
        return Reply(len(prompt), 0, "measured", perplexity=10.0)

    def _read(self, prompt: list[int]) -> tuple[str, int, list[str]]:
        text = self._tokenizer.decode(prompt)
        step = re.search(r"(label|score|polish):", text).group(1)
        row = int(re.search(r"第(\d{4,})篇", text).group(1))
        return step, row, [mark for mark in MARKS if f"〔{mark}〕" in text]

    async def _serve(self, step: str, row: int, marks: list[str]) -> None:
        self._in_flight += 1
        self._note(step, row, "start")
        try:
            if step == "label":
                if "exit" in marks and self._first(f"exit-{row}"):
                    await asyncio.sleep(0.3)  # others of its block and of other blocks are done by now
                    os._exit(1)
                if "dead" in marks and self._first(f"dead-{row}"):
                    await asyncio.sleep(0.3)
                    raise EngineDead(f"as row {row} wished")
                if "crash" in marks:
                    await asyncio.sleep(0.1)
                    os._exit(1)
                if "fatal" in marks:
                    await asyncio.sleep(0.1)
                    raise EngineDead(f"row {row} killed it")
                if "hang" in marks and self._first(f"hang-{row}"):
                    await asyncio.sleep(3600)
                if "flaky" in marks and self._first(f"flaky-{row}"):
                    raise ValueError(f"row {row} is out of luck")
                if "error" in marks:
                    raise ValueError(f"row {row} cannot be served")
            low, high = self._plan.by_step_s.get(step, self._plan.service_s)
            slow = step == "score" and "slow" in marks
            await asyncio.sleep(self._plan.slow_s if slow else random.uniform(low, high))
        finally:
            self._in_flight -= 1
            self.num_events += 1
            self.first_token_at = self.first_token_at or time.time()
            self._note(step, row, "end")

    def _first(self, name: str) -> bool:
        try:
            (Path(self._plan.journal) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _note(self, step: str, row: int, event: str) -> None:
        note = {"t": time.monotonic(), "step": step, "row": row, "event": event, "in_flight": self._in_flight}
        note |= {"pid": os.getpid(), "node": self._node}
        self._journal.write(json.dumps(note) + "\n")


class FakePool(Pool):
    """A Pool whose engine is a FakeEngine; `plan` is set by `pool_class`."""

    plan: Plan

    def _build_engine(self, path: str, stop_ids: list[int]) -> FakeEngine:
        if self.plan.start_error:
            (Path(self.plan.journal) / f"started-{uuid.uuid4().hex}").touch()
            raise RuntimeError(self.plan.start_error)
        return FakeEngine(self.plan, load_tokenizer(path))


def pool_class(plan: Plan) -> type[FakePool]:
    """The class that stands in for kun_ray.generate.Pool; it travels to the workers by value, its plan with it."""
    Path(plan.journal).mkdir(parents=True, exist_ok=True)
    return type("FakePoolWithPlan", (FakePool,), {"plan": plan})


def read_journal(plan: Plan) -> list[dict[str, Any]]:
    """Every event of every engine, by time; the last line of an engine that was killed may be half a line."""
    events = []
    for file in Path(plan.journal).glob("*.jsonl"):
        for line in file.read_text().splitlines():
            try:
                events.append({**json.loads(line), "engine": file.stem})
            except ValueError:
                continue
    return sorted(events, key=lambda event: event["t"])
