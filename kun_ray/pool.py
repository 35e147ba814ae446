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
import threading
import time
import uuid
from typing import Any

import pyarrow as pa
import ray

from kun_ray import startup
from kun_ray.adapters import with_adapters, with_local_adapter
from kun_ray.config import KunError, require
from kun_ray.engine import Engine, EngineConfig, EngineDead, VllmEngine
from kun_ray.metrics import Meters
from kun_ray.models import fetch_model
from kun_ray.prompts import load_tokenizer, stop_token_ids
from kun_ray.replies import Reply
from kun_ray.schema import DEFERRED, FAILED, OK, changed, step_fields, with_steps
from kun_ray.steps import STEPS, Step, StepsConfig, build_step
from kun_ray.suspects import QUARANTINED, Breaker, Flight, flight_path, groups, identity, left_behind

logger = logging.getLogger(__name__)

RESTART_TRIES, RESTART_PAUSE_S = 3, 10.0


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
    """Only GPUs of this Ray accelerator type, such as A100: Ray does not tell cards of 40 and 80 GB apart."""
    hang_timeout_s: float = 600.0
    """Seconds without a single token from an engine that has requests inside, after which it is killed and replaced."""
    suspects_together: int = 1
    """Rows that were in an engine when it died run again apart from all others, so many at a time. 1 finds a row that
    kills engines by its second death. More lose less time after a death that no row is to blame for, and cost a row that
    is to blame one more death."""
    rows_per_block: int | None = None
    """Rows that travel together between pools; null is half of max_num_seqs, at most 512. Smaller ones lose less at a
    kill and end together; larger ones cost less to move, and pools that agree on them move them for less."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for step in self.steps:
            require(step in STEPS, f"there is no step `{step}`; steps are {', '.join(STEPS)}")
        require(self.replicas >= 1, "replicas must be at least 1")
        require((self.max_replicas or self.replicas) >= self.replicas, "max_replicas must not be below replicas")
        require(self.suspects_together >= 1, "suspects_together must be at least 1")
        require(self.rows_per_block is None or self.rows_per_block >= 1, "rows_per_block must be at least 1")
        require(self.hang_timeout_s > 0, "hang_timeout_s must be above 0")

    def max_in_flight(self) -> int:
        """Requests handed to one engine at once: 10 % more than it decodes, so that it never runs dry."""
        return math.ceil(1.1 * self.max_num_seqs * self.pipeline_parallel_size)

    def num_rows_per_block(self) -> int:
        """rows_per_block, or what stands for null."""
        return self.rows_per_block or min(512, max(1, self.max_num_seqs * self.pipeline_parallel_size // 2))

    def num_concurrent_blocks(self, busy_share: float = 1.0) -> int:
        """Blocks that one replica works on at once: enough for a full engine while each waits for its slowest row.

        Args:
            busy_share: part of the rows that meet the engine at all; rows that an earlier step has settled pass by.
        """
        return 2 + math.ceil(2 * self.max_in_flight() / (self.num_rows_per_block() * max(busy_share, 0.1)))


class Pool:
    """One replica. Ray Data builds it in an actor and calls it with Arrow tables."""

    def __init__(self, name: str, config: PoolConfig, steps: StepsConfig, board: Any = None) -> None:
        started = time.monotonic()
        self._name, self._config, self._board = name, config, board
        self._actor, again = identity()
        path = flight_path(self._actor)
        self._deaths: dict[str, int] = {}
        self._fatal: str | None = None
        if board is not None:
            told = board.started.remote(name, self._actor, again, left_behind(path))
            self._deaths, self._fatal = ray.get(told)
        if self._fatal:
            return  # __call__ ends the run; to load the model once more would be in vain
        try:
            self._flight = Flight(path, config.max_in_flight())
        except OSError as error:  # no room in /tmp: the rows are still known when the engine dies and not the process
            logger.warning("pool %s: rows in flight are not kept in %s: %s", name, path, error)
            self._flight = Flight(None, config.max_in_flight())
        model = fetch_model(config.model)
        tokenizer = load_tokenizer(model, config.chat_template, config.trust_remote_code)
        self._steps = [with_local_adapter(build_step(step, steps, tokenizer)) for step in config.steps]
        self._writes = {"status", "reason", "text", *(f.name for step in config.steps for f in step_fields(step))}
        self._reads = {
            "doc_id",
            *self._writes,
            *(p for s in self._steps for p in s.prompt.pieces if isinstance(p, str)),
        }
        self._engine: Engine = self._start_engine(model, stop_token_ids(tokenizer), RESTART_TRIES if again else 1)
        self._loaded_at = time.time()
        self._replica = f"{self._actor}.{uuid.uuid4().hex[:8]}"
        self._counters: collections.Counter[str] = collections.Counter(load_s=int(time.monotonic() - started))
        self._meters = None if board is None else Meters(name, self._replica)
        self._slots = asyncio.Semaphore(config.max_in_flight())
        self._apart = asyncio.Lock()
        self._breaker = Breaker()
        self._cleared: list[str] = []
        self._reporter: asyncio.Task[None] | None = None
        self._ending, self._stop = threading.Lock(), False
        self._warned: set[str] = set()

    async def __call__(self, block: pa.Table) -> pa.Table:
        """All rows of `block`, in order, with this pool's columns filled in."""
        if self._fatal:
            raise KunError(self._fatal)
        if self._reporter is None:
            self._reporter = asyncio.get_running_loop().create_task(self._report_forever())
            threading.Thread(target=self._watch_forever, name="watch", daemon=True).start()
        rows: list[dict[str, Any]] = block.select([n for n in block.schema.names if n in self._reads]).to_pylist()
        for row in rows:
            if row["status"] == OK and self._deaths.get(row["doc_id"], 0) < 0:
                row.update(status=FAILED, reason=QUARANTINED)
        suspects = [row for row in rows if row["status"] == OK and row["doc_id"] in self._deaths]
        others = [row for row in rows if row["status"] == OK and row["doc_id"] not in self._deaths]
        await asyncio.gather(self._isolate(suspects), *map(self._row, others))
        for row in rows:
            if row["status"] != OK:
                row["text"] = None  # rejected documents keep id and reason; their text stays in the corpus
            self._counters["rows"] += 1
            self._counters[row["status"]] += 1
        if self._board is not None and not self._counters["in_flight"]:
            self._report()
        return changed(block, rows, with_steps(block.schema, self._config.steps), self._writes)

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return VllmEngine(with_adapters(self._config, [step.adapter for step in self._steps]), path, stop_ids)

    def _start_engine(self, path: str, stop_ids: list[int], tries: int) -> Engine:
        """An engine. Ray replaces an actor that cannot start a few times; but for one that has run and died, and whose
        GPU may not be free yet, it gives up the whole run: that one tries again by itself."""
        for left in reversed(range(tries)):
            try:
                return self._build_engine(path, stop_ids)
            except Exception as error:
                if not left:
                    raise KunError(f"pool {self._name}: its engine cannot start: {one_line(error)}") from error
                logger.warning("pool %s: its engine does not start again yet: %s", self._name, one_line(error))
                time.sleep(RESTART_PAUSE_S)
        raise AssertionError("tries is at least 1")

    async def _isolate(self, suspects: list[dict[str, Any]]) -> None:
        """Rows that were in an engine when it died, with no other row inside this one."""
        if not suspects:
            return
        async with self._apart:
            for _ in range(self._config.max_in_flight()):
                await self._slots.acquire()
            try:
                together = min(self._config.suspects_together, self._config.max_in_flight())
                for group in groups(suspects, self._deaths, together):
                    await asyncio.gather(*(self._row(row, has_slot=True) for row in group))
                    self._cleared += [row["doc_id"] for row in group if row["status"] != DEFERRED]
            finally:
                for _ in range(self._config.max_in_flight()):
                    self._slots.release()

    async def _row(self, row: dict[str, Any], has_slot: bool = False) -> None:
        """Runs the steps on one row until one of them settles it; raises only when the engine fails at everything."""
        for step in self._steps:
            async with contextlib.nullcontext() if has_slot else self._slots:
                if self._fatal:
                    raise KunError(self._fatal)
                if self._stop and step is self._steps[0]:
                    row["status"] = DEFERRED
                    return
                slot = self._flight.enter(row["doc_id"])
                self._counters["in_flight"] += 1
                try:
                    row.update(await self._step(step, row))
                    self._breaker.note(failed=False)
                    self._counters["answered"] += 1
                except EngineDead as error:
                    # Ray restarts an actor that exits and gives it its blocks again; an exception would be retried on
                    # this same dead engine, for ever. What is inside must be known before the others' errors arrive.
                    await asyncio.to_thread(self._end, self._flight.rows(), str(error))
                except Exception as error:
                    self._failed(step, row, error)
                finally:
                    self._counters["in_flight"] -= 1
                    self._flight.leave(slot)
            if row["status"] != OK:
                break
        if self._loaded_at:
            startup.tell(self._board, self._name, self._loaded_at, self._engine.first_token_at)
            self._loaded_at = 0.0

    def _failed(self, step: Step, row: dict[str, Any], error: Exception) -> None:
        row.update(status=FAILED, reason="engine_error")
        kind = f"{step.name}: {type(error).__name__}"
        if kind not in self._warned:  # one log line per kind of error; the rows carry the count
            self._warned.add(kind)
            logger.warning("pool %s, step %s, row %s: %s", self._name, step.name, row["doc_id"], one_line(error))
        if broken := self._breaker.note(failed=True):
            self._fatal = f"pool {self._name}, step {step.name}: {broken}; the last error: {one_line(error)}"
            raise KunError(self._fatal) from error

    async def _step(self, step: Step, row: dict[str, Any]) -> dict[str, Any]:
        prompt = step.prompt.render(row)
        if len(prompt) >= self._engine.max_model_len:
            return {"status": FAILED, "reason": "over_context", f"{step.name}_prompt_tokens": len(prompt)}
        reply = await self._ask(step, prompt)
        self._counters["prompt_tokens"] += reply.num_prompt_tokens
        self._counters["cached_tokens"] += reply.num_cached_tokens
        self._counters["output_tokens"] += reply.num_output_tokens
        return {
            f"{step.name}_prompt_tokens": reply.num_prompt_tokens,
            f"{step.name}_output_tokens": reply.num_output_tokens,
            f"{step.name}_finish_reason": reply.finish_reason,
            **step.parse(reply),
        }

    async def _ask(self, step: Step, prompt: list[int]) -> Reply:
        if step.sampling is not None:
            return await self._engine.generate(prompt, step.sampling, step.adapter)
        if step.candidates:
            return await self._engine.choose(prompt, step.candidates, step.adapter)
        return await self._engine.perplexity(prompt, step.adapter)

    async def _report_forever(self) -> None:
        since = time.monotonic()
        while self._board is not None:
            with contextlib.suppress(ray.exceptions.RayError):  # the board may be moving to another node
                self._stop = await self._report()
            await asyncio.sleep(1.0)
            since, before = time.monotonic(), since
            self._counters["busy_s"] += since - before if self._counters["in_flight"] else 0.0  # type: ignore[assignment]

    def _report(self) -> Any:
        if self._meters is not None:
            self._meters.update(dict(self._counters), self._engine.stats)
        cleared, self._cleared = self._cleared, []
        return self._board.report.remote(self._name, self._replica, dict(self._counters), self._actor, cleared)

    def _watch_forever(self) -> None:
        """Ends this process when its engine has requests inside and nothing comes out: a thread, for the loop may hang."""
        seen, since = -1, time.monotonic()
        while True:
            time.sleep(min(1.0, self._config.hang_timeout_s / 4))
            if self._engine.num_events != seen or not self._counters["in_flight"]:
                seen, since = self._engine.num_events, time.monotonic()
            elif time.monotonic() - since > self._config.hang_timeout_s:
                rows = self._flight.rows()
                cause = f"no token for {self._config.hang_timeout_s:g} s with {len(rows)} rows inside"
                self._end(rows, cause, hung=True)

    def _end(self, rows: list[str], cause: str, hung: bool = False) -> None:
        """Ends this process, once the Board knows what was in the engine. Never returns."""
        self._ending.acquire()  # never released: there is one end
        logger.error("pool %s: %s; replacing this replica", self._name, cause)
        if self._board is not None:
            answered = self._counters["answered"] > 0
            try:
                ray.get(self._board.died.remote(self._name, self._actor, rows, cause, hung, answered), timeout=30)
                self._flight.remove()
            except ray.exceptions.RayError:
                pass  # the next process of this actor finds the rows in the file
        self._engine.kill()
        os._exit(1)


def one_line(error: BaseException) -> str:
    """An error of any library, short enough to stand in a message."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 600 else f"{text[:300]} … {text[-300:]}"
