"""The generate stage: documents → instructions, verdicts and answers, in one streaming Ray Data execution.

read → pool → pool → … → write. Each pool is the replicas of one model; rows flow through them one by one, and rows that
an earlier step has settled pass untouched. Source: Kun (arXiv 2401.06477) §3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import ray
import ray.data
from omegaconf import MISSING

from kun_ray import execution, lease, ledger, models, placement, retry, shrink, store
from kun_ray.adapters import with_absolute_adapters
from kun_ray.board import new_board
from kun_ray.config import KunError, RayConfig, require, show_config, to_dict
from kun_ray.counts import count_statuses, prove_counts, warn_if_none_ok
from kun_ray.fingerprint import fingerprint
from kun_ray.headroom import check_pools
from kun_ray.lease import LEASE_S
from kun_ray.metrics import shown_as
from kun_ray.pool import Pool, PoolConfig
from kun_ray.preflight import preflight
from kun_ray.progress import Monitor, duration
from kun_ray.room import accelerators, require_local_cores, require_local_gpus, wait_for_room
from kun_ray.schema import FAILED, OK, without_deferred
from kun_ray.startup import Startup
from kun_ray.steps import COLUMNS_READ, StepsConfig
from kun_ray.suspects import SUSPECTS

READS = "generate reads what jobs/prepare.py writes: give its output=, or an earlier generate's"


@dataclasses.dataclass
class GenerateConfig:
    """jobs/generate.py: runs steps over a finished stage's rows."""

    input: str = MISSING
    """Folder of a finished stage: prepare's, or an earlier generate's."""
    output: str = MISSING
    """Folder of this stage. The same command continues a run that was stopped or killed."""
    pools: dict[str, PoolConfig] = dataclasses.field(default_factory=dict)
    """The pools in the order in which rows pass them."""
    steps: StepsConfig = dataclasses.field(default_factory=StepsConfig)
    """Prompts, sampling and limits of the steps."""
    rows_per_file: int = 512
    """Rows of one output file, which is also what a kill can lose besides the rows in flight."""
    max_waiting_rows: int | None = None
    """Rows that may wait between two pools; null is two blocks for each replica of the pool behind, and at least 1024."""
    retry: str | None = None
    """`failed` runs the failed rows once more, whatever had failed in them, and puts the new ones in their place."""
    wait_for_resources_s: float = 600.0
    """How long to wait for GPUs that others hold, before giving up and naming them."""
    wait_for_nodes_s: float = 120.0
    """When nodes are lost and nothing moves for want of their replicas: how long to wait for them, before going on with the
    replicas that still fit. A cluster that grows (ray.autoscaling) waits for new nodes without end."""
    stop_grace_s: float = 120.0
    """After Ctrl-C or SIGTERM, seconds for the rows in flight to finish."""
    lease_s: float = LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        require(len(self.pools) > 0, "pools: give one, such as pools.label.model=… and pools.label.steps=[label]")
        for name, pool in self.pools.items():
            others = [other for other in self.pools if self.pools[other].steps]
            require(
                len(pool.steps) > 0,
                f"pools.{name} runs no step: give it steps=[…] of {', '.join(COLUMNS_READ)}"
                + (f", or did you mean one of the pools {', '.join(others)}?" if others else ""),
            )
        steps = [step for pool in self.pools.values() for step in pool.steps]
        require(len(steps) == len(set(steps)), f"a step runs in two pools: {', '.join(steps)}")
        require(self.retry in (None, FAILED), f"retry is {self.retry!r}, but must be `{FAILED}` or null")
        require(self.rows_per_file >= 1, "rows_per_file must be at least 1")
        block = max((pool.num_rows_per_block() for pool in list(self.pools.values())[1:]), default=0)
        waiting = f"max_waiting_rows ({self.max_waiting_rows}) must hold one block of each pool behind the first"
        require(self.num_waiting_rows() >= block, f"{waiting}: at least {block} (rows_per_block)")
        require(self.wait_for_nodes_s > 0, "wait_for_nodes_s must be above 0")

    def num_waiting_rows(self) -> int:
        """max_waiting_rows, or what stands for null."""
        behind = list(self.pools.values())[1:]
        room = [2 * pool.num_rows_per_block() * (pool.max_replicas or pool.replicas) for pool in behind]
        return self.max_waiting_rows if self.max_waiting_rows is not None else max([1024, *room])


def generate(config: GenerateConfig, accelerator: str = "pools.*.accelerator") -> dict[str, Any]:
    """Runs the stage to its end and returns its summary; `accelerator` is the key to name where GPUs are missing.

    Raises:
        ConfigError: before any engine starts, when the configuration cannot work.
        KunError: the output holds another run's data, or the counts do not add up.
        KeyboardInterrupt: stopped by a signal; what was finished is kept.
    """
    startup = Startup()
    source = store.require_complete(config.input, READS)
    for pool in config.pools.values():
        pool.chat_template = models.read_chat_template(pool.chat_template)
    preflight(config, source)
    num_gpus = sum(pool.replicas * pool.num_gpus() for pool in config.pools.values())
    num_cpu_engines = sum(pool.replicas for pool in config.pools.values() if pool.accelerator == "cpu")
    if not store.Folder(config.output).is_complete() or config.retry:  # before the folder is taken
        require_local_cores(config.ray, num_cpu_engines, config.output)
        require_local_gpus(config.ray, num_gpus, f"{config.output}: {' + '.join(config.pools)}", key=accelerator)
    with lease.opened(
        config.output, fingerprint(config, source), to_dict(config), config.lease_s, reopen=bool(config.retry)
    ) as folder:
        if config.retry or not folder.is_complete():
            execution.drop_unfinished(folder)
            retry.finish_withdrawal(folder)
        if config.retry:
            print(f"{config.output}: {retry.withdraw_failed(folder):,} failed rows will run again", flush=True)
        if folder.is_complete():
            print(f"{config.output} is complete already; nothing to do")
            return dict(folder.read_json(store.SUMMARY))
        return _complete(config, source, folder, startup)


def _complete(config: GenerateConfig, source: store.Folder, folder: store.Folder, startup: Startup) -> dict[str, Any]:
    """Runs the rows that are not written yet, proves the counts and publishes the stage."""
    book, num_rows = ledger.Ledger(folder, startup), source.num_rows()
    while folder.num_rows() < num_rows:
        try:
            _run(config, source, folder, num_rows, book)
            break
        except shrink.ReplicasLost:
            config, book = dataclasses.replace(config, pools=shrink.shrunk(config.pools)), ledger.Ledger(folder)
            left = ", ".join(f"{pool.replicas} of pool {name}" for name, pool in config.pools.items())
            print(f"nodes are lost; going on with the replicas that fit: {left}", file=sys.stderr, flush=True)
    counts = prove_counts(folder, num_rows)
    steps = [step for pool in config.pools.values() for step in pool.steps]
    summary = {"stage": "generate", **counts, "rows_in": num_rows, **book.summary(folder, steps, num_rows)}
    folder.finish(summary)
    if folder.exists(SUSPECTS):
        folder.filesystem.delete_file(folder.child(SUSPECTS))
    print(
        f"{counts['rows']:,} rows: {counts[OK]:,} ok, {counts['rejected']:,} rejected, {counts[FAILED]:,} failed, in "
        f"{duration(summary['elapsed_s'])}" + (f" of {book.runs} runs" if book.runs > 1 else "")
    )
    print(f"written to {config.output}")
    warn_if_none_ok(counts)
    return summary


def _run(
    config: GenerateConfig, source: store.Folder, folder: store.Folder, num_rows: int, book: ledger.Ledger
) -> None:
    """The Ray Data execution. Raises KeyboardInterrupt when it was asked to stop before every row was written."""
    book.startup.reached("preflight")
    execution.connect(config.ray, execution.local_cpus(sum(p.replicas * p.num_cpus for p in config.pools.values())))
    book.startup.reached("ray")
    check_pools(config, set() if config.ray.autoscaling else accelerators())
    if not config.ray.autoscaling:
        placement.require_placement(config.pools, config.output)
        wait_for_room(placement.bundles(config.pools), config.wait_for_resources_s, config.output)
    show_config()
    local_models = [pool.model for pool in config.pools.values() if Path(pool.model).is_dir()]
    execution.warn_if_not_shared([config.input, config.output, *local_models])
    spanning = any(map(placement.spans_nodes, config.pools.values()))
    retries = 0 if spanning else 2  # a new actor's placement group would wait for the dead one's
    execution.configure(folder, max_waiting_rows=config.num_waiting_rows(), actor_retries=retries)
    num_ok = count_statuses(source)[OK]
    board = new_board(folder.uri)
    names = list(config.pools)
    before = count_statuses(folder)
    with (
        placement.groups() as groups,
        execution.stopping(lambda: board.request_stop.remote(names[:1]), config.stop_grace_s) as stopped,
        Monitor(board, folder, names, num_rows, before, config.ray.log_every_s, book) as monitor,
    ):
        try:
            documents = ray.data.read_parquet(source.parts(), filesystem=source.filesystem)
            dataset = build_dataset(config, documents, board, num_ok / max(1, num_rows), groups)
            after_s = math.inf if config.ray.autoscaling else config.wait_for_nodes_s
            with shrink.watching(config.pools, monitor.totals, after_s):
                execution.write(dataset, folder, config.rows_per_file)
            book.moments = ray.get(board.moments.remote())
        except shrink.ReplicasLost:
            if stopped.is_set():
                raise KeyboardInterrupt from None
            raise
        except (ray.exceptions.RayError, OSError) as error:
            with contextlib.suppress(OSError):
                execution.drop_unfinished(folder)
            raise KunError(
                f"the run ended early: {execution.root_cause(error)}\nWhat was finished is kept; run the same command again to continue."
            ) from error
    if stopped.is_set() and folder.num_rows() < num_rows:
        raise KeyboardInterrupt


def build_dataset(
    config: GenerateConfig, documents: ray.data.Dataset, board: Any, ok_share: float = 1.0, groups: Any = None
) -> ray.data.Dataset:
    """The lazy dataset: one actor pool after the other, without the rows that a stopping run deferred. `groups` is for placement.

    Args:
        config: pools and steps.
        documents, board: rows as prepare writes them; handle of the Board.
        ok_share: part of the documents with status ok.
    """
    dataset, busy_share, rows_per_block = documents, ok_share, 0
    num_engines = placement.num_cpu_engines(config.pools.values())
    steps = with_absolute_adapters(config.steps)
    for name, pool in config.pools.items():
        pool = dataclasses.replace(pool, model=models.absolute(pool.model))
        concurrent = pool.num_concurrent_blocks(busy_share)
        busy_share /= 2  # about as many rows as a step settles in Kun; too low a guess only costs a few idle blocks
        if pool.num_rows_per_block() != rows_per_block:  # a task for each block; pools hand out blocks as they came
            rows_per_block = pool.num_rows_per_block()
            dataset = dataset.repartition(target_num_rows_per_block=rows_per_block)
        # not map_batches, which wants a batch size when there are GPUs; a pool takes a block as it is
        dataset = dataset.map_batches_internal(
            shown_as(Pool, name, pool.steps),
            fn_constructor_args=(name, pool, steps, board),
            batch_size=None,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=ray.data.ActorPoolStrategy(
                min_size=pool.replicas,
                max_size=pool.max_replicas or pool.replicas,
                max_tasks_in_flight_per_actor=math.ceil(1.75 * concurrent),
                max_concurrent_calls_per_actor=concurrent,
            ),
            **placement.actor_options(pool, [] if groups is None else groups, num_engines),
        )
    # not filter, which Ray Data does not run in one task with the write: that is one more task for each block
    return dataset.map_batches(without_deferred, batch_size=None, batch_format="pyarrow", zero_copy_batch=True)
