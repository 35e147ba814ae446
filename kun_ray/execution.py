"""Ray, as every stage uses it: joining a cluster, Ray Data's settings, checkpointed writing, stopping on a signal."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data
from pyarrow import fs
from ray.data import ExecutionResources
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import FilenameProvider

from kun_ray.config import PARENT, ConfigError, KunError, RayConfig, without_credentials
from kun_ray.store import CHECKPOINT, SUBMITTED, Folder, is_local

if TYPE_CHECKING:
    from ray.data._internal.execution.interfaces.physical_operator import PhysicalOperator

PENDING = ".pending.parquet"
"""Ray Data's record of a write that has begun; it loses this suffix when the file is whole."""
_KUN_ERROR = re.compile(r"^kun_ray\.config\.KunError: (.+)$", re.MULTILINE)
LOCAL_CODE = "KUN_RAY_LOCAL_CODE"
"""Environment variable of a stage whose Ray runs on this machine, started by a pipeline: its workers import this code."""
SAME_STOP_S = 3.0
"""Signals to a pipeline's stage within this time are one wish to stop."""
SHARE_EXPIRES_S, SHARE_RENEWED_S = 15, 5
"""How long a killed driver keeps its share of the cluster. Ray Data's 180 s left none to write what the next run's engines did."""
LOCAL_MIN_CPUS = 4
"""Logical CPUs of a local Ray: reading, filtering and writing each want one beside the engines'."""


def connect(config: RayConfig, min_cpus: int = LOCAL_MIN_CPUS, dashboard: bool = False) -> None:
    """Joins the cluster that the configuration or RAY_ADDRESS names, else starts a local Ray. Safe to call twice.

    `dashboard` starts a local Ray with its dashboard, on loopback: Ray Train and lists of actors ask it.
    """
    os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", str(SHARE_EXPIRES_S))
    os.environ.setdefault("RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS", str(SHARE_RENEWED_S))
    if ray.is_initialized():
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": True}
    try:
        if address:
            has_code = SUBMITTED in os.environ or LOCAL_CODE in os.environ  # `ray job submit` ships the code itself
            runtime_env = None if has_code else {"py_modules": [str(Path(__file__).parent)]}
            ray.init(address=address, runtime_env=runtime_env, **quiet)
        else:
            store = int(config.object_store_gb * 1e9) if config.object_store_gb else None
            num_cpus = config.num_cpus or max(min_cpus, os.cpu_count() or 1)
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(num_cpus))
            ray.init("local", num_cpus=num_cpus, object_store_memory=store, include_dashboard=dashboard, **quiet)
    except Exception as error:  # Ray raises plain ones too
        why = " ".join(str(error).split()) or type(error).__name__
        if address is None:
            raise KunError(
                f"Ray does not start here: {why}; on a busy machine run the same command again (logs: /tmp/ray/session_latest)"
            ) from error
        raise ConfigError(
            f"no Ray cluster answers at {address}: {why}; start one with `ray start --head`, or unset ray.address"
        ) from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stage that is told to end does so as on Ctrl-C


def require_resources(
    needs: dict[str, float], what: str, lower: str = "replicas, num_workers or tensor_parallel_size"
) -> None:
    """Raises ConfigError, with what the cluster has, when it could never hold `needs` (resource name → amount)."""
    have = ray.cluster_resources()
    for name, amount in needs.items():
        if amount > have.get(name, 0.0) + 1e-9:
            held = {key: round(value, 1) for key, value in have.items() if key in ("CPU", "GPU") or key in needs}
            raise ConfigError(
                f"{what} needs {amount:g} {name}, but the cluster has {have.get(name, 0.0):g} (all nodes: {held}): "
                f"lower {lower}, set accelerator: cpu, or join a larger cluster (ray.address; ray.autoscaling=true if it grows on demand)"
            )


def warn_if_not_shared(uris: list[str]) -> None:
    """Says so when a cluster of several nodes is given folders that only one of them may see."""
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    local = [uri for uri in uris if is_local(uri)]
    if nodes > 1 and local:
        print(
            f"note: {nodes} nodes; {', '.join(local)} must lie on storage that all of them share",
            file=sys.stderr,
            flush=True,
        )


def configure(
    folder: Folder,
    id_column: str = "doc_id",
    max_waiting_rows: int | None = None,
    max_cpus: float | None = None,
    actor_retries: int = 2,
) -> None:
    """Ray Data's settings for one execution that ends in `write(…, folder)`.

    Args:
        folder: the output; row-level checkpoints live in its `_checkpoint`.
        id_column: column whose values identify rows across runs; must come out of the read.
        max_waiting_rows: bound on the rows that wait between two pools; null leaves Ray's own bound, which is in bytes
            and lets a fast first pool run far ahead of a slow second one with short texts.
        max_cpus: most CPUs of the cluster that this execution takes; None takes all that are free.
        actor_retries: how many replicas in a row may fail to start before the run ends.
    """
    from ray.data._internal.execution.backpressure_policy import (
        ENABLED_BACKPRESSURE_POLICIES,
        ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY,
    )

    drop_unfinished(folder)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.use_datasource_v2 = False  # that reader starts 32 processes to read the footers of even one file
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=folder.child(CHECKPOINT),
        override_filesystem=folder.filesystem,
        delete_checkpoint_on_success=False,
    )
    context.execution_no_progress_timeout_s = -1  # loading a 34B model over a slow disk is not a hang
    context.max_consecutive_actor_init_deaths = actor_retries
    policies = [policy for policy in ENABLED_BACKPRESSURE_POLICIES if policy is not RowBackpressure]
    context.set_config("max_waiting_rows", max_waiting_rows)
    if max_cpus is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(cpu=max_cpus)
    context.set_config(ENABLED_BACKPRESSURE_POLICIES_CONFIG_KEY, [*policies, RowBackpressure])


def drop_unfinished(folder: Folder) -> None:
    """Deletes files whose write was cut off by a kill: they may be half a file, and their rows run again.

    Ray Data does so too, but only once it runs, when readers have stumbled over half a file; and it may delete the
    record of a write before the file, so that a second kill would leave rows twice. A worker that outlives its driver
    for a moment may even write its file when that record is gone: files without any record go as well.

    Raises:
        KunError: there are files, but no record of any: somebody has deleted them.
    """
    filesystem, parts = folder.filesystem, folder.parts()
    records = filesystem.get_file_info(fs.FileSelector(folder.child(CHECKPOINT), allow_not_found=True))
    by_name = {record.base_name: record.path for record in records}
    if parts and not by_name:
        raise KunError(
            f"{without_credentials(folder.uri)} holds {len(parts)} parts, but its {CHECKPOINT} is gone, which says whose rows "
            "they are: put it back, or move the parts away and run the same command again"
        )
    known = {name.removesuffix(".parquet") for name in by_name if not name.endswith(PENDING)}
    for name in [name for name in by_name if name.endswith(PENDING)]:
        written = name.removesuffix(PENDING)
        unfinished = [p for p in parts if p.rsplit("/", 1)[-1].startswith((f"{written}-", f"{written}."))]
        repeated = [by_name[other] for other in (f"{written}.parquet",) if other in by_name]
        for path in [*unfinished, *repeated, by_name[name]]:  # the record last: a kill in between changes nothing
            filesystem.delete_file(path)
    for path in folder.parts():
        name = path.rsplit("/", 1)[-1].removesuffix(".parquet")
        if name not in known and name.rpartition("-")[0] not in known:
            filesystem.delete_file(path)


def write(dataset: ray.data.Dataset, folder: Folder, rows_per_file: int) -> None:
    """Runs the dataset and writes `part-*.parquet`; a written file's rows never run again.

    Blocks are written whole: a file takes them until it has `rows_per_file` rows, and the last file what is left.
    """
    dataset.write_parquet(
        folder.path, filesystem=folder.filesystem, filename_provider=PartNames(), min_rows_per_file=rows_per_file
    )


class PartNames(FilenameProvider):
    """part-<id of this run>-<task>.parquet"""

    def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
        return f"part-{write_uuid}-{task_index:06d}.parquet"


class RowBackpressure:
    """A Ray Data backpressure policy: a pool takes no block while too many rows wait for the pool behind it."""

    name = "Rows"

    def __init__(self, data_context: ray.data.DataContext, topology: Any, resource_manager: Any) -> None:
        self._max_waiting_rows = data_context.get_config("max_waiting_rows", None)

    def can_add_input(self, op: PhysicalOperator) -> bool:
        waiting = self._waiting_rows(op)
        return waiting is None or waiting <= self._max_waiting_rows

    def max_task_output_bytes_to_read(self, op: PhysicalOperator) -> int | None:
        return None

    def _waiting_rows(self, op: PhysicalOperator) -> int | None:
        from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

        if self._max_waiting_rows is None or not isinstance(op, ActorPoolMapOperator):
            return None
        downstream = next(iter(op.output_dependencies), None)
        while downstream is not None and not isinstance(downstream, ActorPoolMapOperator):
            downstream = next(iter(downstream.output_dependencies), None)  # past the repartition between two pools
        if downstream is None:
            return None
        return int(op.metrics.rows_task_outputs_generated - downstream.metrics.rows_inputs_of_submitted_tasks)


@contextlib.contextmanager
def stopping(on_stop: Callable[[], None], grace_s: float) -> Iterator[threading.Event]:
    """Turns Ctrl-C and SIGTERM into a clean end.

    Two signals at the same time are one: `ray job stop` sends SIGTERM to a pipeline and to its stages, and the pipeline
    then tells its stages too. The first signal calls `on_stop` each second (from a thread; a Board that Ray has restarted knows nothing) and sets the yielded event: the run takes no new rows and finishes
    those in flight. A second signal, or `grace_s` seconds, raises KeyboardInterrupt in the main thread.
    """
    asked, ended, over, first = threading.Event(), threading.Event(), threading.Event(), [math.inf]

    def handle(signum: int, frame: object) -> None:
        if asked.is_set():
            if PARENT in os.environ and time.monotonic() < first[0] + SAME_STOP_S and not over.is_set():
                return
            raise KeyboardInterrupt
        first[0] = time.monotonic()
        asked.set()
        print(
            f"\nstopping: finishing the rows in flight (at most {grace_s:g} s; once more to stop at once)",
            file=sys.stderr,
            flush=True,
        )

    def watch() -> None:
        while not asked.wait(0.2):
            if ended.is_set():
                return
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # whatever ails Ray, the time must not run longer
                on_stop()
            if ended.wait(min(1.0, grace_s)):
                return
        over.set()
        os.kill(os.getpid(), signal.SIGINT)

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    threading.Thread(target=watch, name="stop", daemon=True).start()
    try:
        yield asked
    finally:
        ended.set()
        for signum, handler in before.items():
            signal.signal(signum, handler)


def local_cpus(needed: float) -> int:
    """Logical CPUs that a local Ray needs when the pools reserve `needed`."""
    return LOCAL_MIN_CPUS + math.ceil(needed)


def run_parallel(function: Callable[[Any], Any], items: Sequence[Any], max_cpus: float | None = None) -> Iterator[Any]:
    """function over items as Ray tasks, results in the order of the items. With `max_cpus`, no more tasks at once."""
    task: Any = ray.remote(num_cpus=1)(
        function if not isinstance(function, functools.partial) else lambda item: function(item)
    )
    refs: list[Any] = []
    for item in items:
        if max_cpus is not None and len(refs) >= max_cpus:  # all but max_cpus - 1 of them have ended
            ray.wait(refs, num_returns=len(refs) - math.ceil(max_cpus) + 1, fetch_local=False)
        refs.append(task.remote(item))
    yield from ray.get(refs)


def root_cause(error: BaseException) -> str:
    """What a KunError said that Ray has wrapped; else the innermost message."""
    found: list[str] = []
    while True:
        found += _KUN_ERROR.findall(str(error))
        inner = getattr(error, "cause", None) or error.__cause__
        if inner is None or inner is error:
            break
        error = inner
    if isinstance(error, KunError) or found:
        return str(error) if isinstance(error, KunError) else found[-1]
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
