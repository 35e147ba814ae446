"""The Ray Data actor: a block of rows in, the same rows out, each through one engine and its steps.

One block in is one block out, rows in the same order, always. Ray Data replays a task whose actor died and skips the
outputs it already has; a replay must therefore hand out the same rows in the same outputs, or rows get lost and doubled.
The engine still never waits on a block: rows of many blocks are in flight at once and enter and leave it one by one.
Only the row boundary in this file turns an exception into a row.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import math
import os
import time
import uuid
from typing import Any

import pyarrow as pa
import ray

from kun_ray.config import require
from kun_ray.engine import Engine, EngineConfig, EngineDead, VllmEngine
from kun_ray.models import fetch_model
from kun_ray.prompts import load_tokenizer, stop_token_ids
from kun_ray.schema import FAILED, OK, to_table, with_steps
from kun_ray.steps import STEPS, Reply, Step, StepsConfig, build_step

logger = logging.getLogger(__name__)

DEFERRED = "deferred"
"""Status of a row that a stopping run did not start; such rows are dropped before the write, so the next run does them."""


@dataclasses.dataclass
class PoolConfig(EngineConfig):
    """The replicas of one model, and the steps that they run."""

    steps: list[str] = dataclasses.field(default_factory=list)
    """perplexity, label, score, polish: in the order in which a row passes them."""
    replicas: int = 1
    """Engines of this pool; with max_replicas set, the number it starts with."""
    max_replicas: int | None = None
    """Upper end to which the pool grows while rows queue up and the cluster has room; null keeps it fixed."""
    num_cpus: float = 1.0
    """CPUs that one replica reserves on its node."""
    resources: dict[str, float] = dataclasses.field(default_factory=dict)
    """Custom Ray resources that one replica reserves."""
    accelerator_type: str | None = None
    """Only GPUs of this Ray accelerator type, such as A100-80G."""
    rows_per_block: int = 64
    """Rows that travel together between pools. Smaller ones lose less at a kill; larger ones cost less to move."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in self.steps:
            require(step in STEPS, f"there is no step `{step}`; steps are {', '.join(STEPS)}")
        require(self.replicas >= 1, "replicas must be at least 1")
        require(
            self.max_replicas is None or self.max_replicas >= self.replicas, "max_replicas must not be below replicas"
        )
        require(self.rows_per_block >= 1, "rows_per_block must be at least 1")

    def max_in_flight(self) -> int:
        """Requests handed to one engine at once: 10 % more than it decodes, so that it never runs dry."""
        return math.ceil(1.1 * self.max_num_seqs * self.pipeline_parallel_size)

    def num_concurrent_blocks(self, busy_share: float = 1.0) -> int:
        """Blocks that one replica works on at once: enough for a full engine while each waits for its slowest row.

        Args:
            busy_share: part of the rows that meet the engine at all; rows that an earlier step has settled pass by.
        """
        return 2 + math.ceil(2 * self.max_in_flight() / (self.rows_per_block * max(busy_share, 0.1)))


class Pool:
    """One replica. Ray Data builds it in an actor and calls it with Arrow tables."""

    def __init__(self, name: str, config: PoolConfig, steps: StepsConfig, board: Any = None) -> None:
        started = time.monotonic()
        path = fetch_model(config.model)
        tokenizer = load_tokenizer(path, config.chat_template, config.trust_remote_code)
        self._name, self._config, self._board = name, config, board
        self._steps = [build_step(step, steps, tokenizer) for step in config.steps]
        self._engine: Engine = self._build_engine(path, stop_token_ids(tokenizer))
        self._replica = uuid.uuid4().hex[:8]
        self._counters: collections.Counter[str] = collections.Counter(load_s=int(time.monotonic() - started))
        self._slots = asyncio.Semaphore(config.max_in_flight())
        self._stop = False
        self._reporter: asyncio.Task[None] | None = None
        self._warned: set[str] = set()

    async def __call__(self, block: pa.Table) -> pa.Table:
        """All rows of `block`, in order, with this pool's columns filled in."""
        if self._reporter is None and self._board is not None:
            self._reporter = asyncio.get_running_loop().create_task(self._report_forever())
        rows: list[dict[str, Any]] = block.to_pylist()
        await asyncio.gather(*(self._settle(row) for row in rows))
        if self._board is not None and not self._counters["in_flight"]:
            self._board.report.remote(self._name, self._replica, dict(self._counters))
        return to_table(rows, with_steps(block.schema, self._config.steps))

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return VllmEngine(self._config, path, stop_ids)

    async def _settle(self, row: dict[str, Any]) -> None:
        if row["status"] == OK:
            await self._row(row)
        if row["status"] != OK:
            row["text"] = None  # rejected documents keep id and reason; their text stays in the corpus
        self._counters["rows"] += 1
        self._counters[row["status"]] += 1

    async def _row(self, row: dict[str, Any]) -> None:
        """Runs the steps on one row until one of them settles it; never raises for the row's own sake."""
        for step in self._steps:
            async with self._slots:
                if self._stop and step is self._steps[0]:
                    row["status"] = DEFERRED
                    return
                self._counters["in_flight"] += 1
                try:
                    row.update(await self._step(step, row))
                except EngineDead as error:
                    # Ray restarts an actor that exits and retries its blocks elsewhere; an exception would be retried
                    # on this same actor, for ever.
                    logger.error("pool %s: %s; replacing this replica", self._name, error)
                    os._exit(1)
                except Exception as error:
                    self._warn(step, row, error)
                    row.update(status=FAILED, reason="engine_error")
                finally:
                    self._counters["in_flight"] -= 1
            if row["status"] != OK:
                return

    async def _step(self, step: Step, row: dict[str, Any]) -> dict[str, Any]:
        prompt = step.prompt.render(row)
        if len(prompt) >= self._engine.max_model_len:
            return {"status": FAILED, "reason": "over_context", f"{step.name}_prompt_tokens": len(prompt)}
        reply = await self._ask(step, prompt)
        self._counters["prompt_tokens"] += reply.num_prompt_tokens
        self._counters["output_tokens"] += reply.num_output_tokens
        return {
            f"{step.name}_prompt_tokens": reply.num_prompt_tokens,
            f"{step.name}_output_tokens": reply.num_output_tokens,
            f"{step.name}_finish_reason": reply.finish_reason,
            **step.parse(reply),
        }

    async def _ask(self, step: Step, prompt: list[int]) -> Reply:
        if step.sampling is not None:
            return await self._engine.generate(prompt, step.sampling)
        if step.candidates:
            return await self._engine.choose(prompt, step.candidates)
        return await self._engine.perplexity(prompt)

    async def _report_forever(self) -> None:
        while True:
            with contextlib.suppress(ray.exceptions.RayError):  # the board may be moving to another node
                self._stop = await self._board.report.remote(self._name, self._replica, dict(self._counters))
            await asyncio.sleep(1.0)

    def _warn(self, step: Step, row: dict[str, Any], error: Exception) -> None:
        kind = f"{step.name}: {type(error).__name__}"
        if kind not in self._warned:  # one log line per kind of error; the rows carry the count
            self._warned.add(kind)
            logger.warning(
                "pool %s, step %s, row %s: %s: %s", self._name, step.name, row["doc_id"], type(error).__name__, error
            )
