"""Where the driver's core goes: its threads and their stacks, while the job of bench/rows.py runs.

    python bench/driver_profile.py                           blocks that a user gets without asking
    python bench/driver_profile.py --rows 1000000 --rows-per-block 512 --at 0.05 0.75
    python bench/driver_profile.py --short

Looks at the driver in windows that begin when that part of the rows (--at) is written. The CPU seconds of each thread are the
kernel's; those of a thread of Python are parted by its stacks (py-spy, 50 times a second, which slows the run a little). Ray's
own threads of C++ have names alone. Costs are microseconds of a core for each row that was written in the window.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import re
import signal
import subprocess
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import machine
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import rows
import stacks

METER = "the benchmark's own meter"
PARTS = {
    METER: r"Meter\._watch",
    "waits for the end": r"get_output_blocking",
    "kun_ray": r"\(kun_ray/(?!.*\(ray/)",
    "usages of all operators (update_usages)": r"update_usages",
    "dispatch of tasks": r"dispatch_next_task",
    "results (ray.wait)": r";wait \(ray/_private/worker",
    "results (blocks and their metadata)": r"process_completed_tasks|metadata_fetcher",
    "choice of the next operator": r"select_operator_to_run",
    "other of the scheduling loop": r"streaming_executor",
}
"""A stack is of the first part whose pattern it has; kun_ray's own has no frame of Ray below kun_ray's last."""
SHOWN = 8
"""Threads of C++ that are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rows-per-block", type=int)
    parser.add_argument("--at", type=float, nargs="+", default=[0.2])
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="length of a window; the run must not end within it"
    )
    parser.add_argument("--short", action="store_true", help="20,000 rows and three seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.short:
        options.rows, options.seconds = 20_000, 3.0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the job and takes its rows away
    with tempfile.TemporaryDirectory() as name:
        config = rows.write_input(Path(name), options.rows, rows_per_block=options.rows_per_block)
        job = subprocess.Popen([*rows.COMMAND, str(config)], stdout=subprocess.DEVNULL)
        try:
            windows = [window(job, Path(name, "out"), at * options.rows, options.seconds) for at in options.at]
        finally:
            rows.end(job)
    result = {
        "rows": options.rows,
        "rows_per_block": options.rows_per_block,
        "windows": windows,
        "versions": machine.versions("ray", "py-spy"),
    }
    out = options.out or (machine.PASSING if options.short else machine.RESULTS)
    path = machine.write(out, f"driver_profile-{options.rows_per_block or 'default'}", result)
    print(json.dumps(result, indent=2), f"\n{path}")


def window(job: subprocess.Popen[bytes], output: Path, begin: float, seconds: float) -> dict[str, Any]:
    """Microseconds of a row in each thread and part, from the moment that `begin` rows are written.

    Raises:
        RuntimeError: the job ended too early, or wrote nothing.
    """
    while (before := written(output)) < begin and job.poll() is None:
        time.sleep(1.0)
    require_running(job, f"after {before} rows, before its window")
    process, started = psutil.Process(job.pid), time.monotonic()
    before_s, threads_before = cpu_s(process), threads(job.pid)
    with stacks.sampled(job.pid) as seen:
        time.sleep(seconds)
        require_running(job, f"within the window that began at {before} rows: give it more rows or less time")
        spent, threads_now = cpu_s(process) - before_s, threads(job.pid)
        num_rows, lasted = written(output) - before, time.monotonic() - started
    if not num_rows:
        raise RuntimeError(f"no rows were written in {seconds:g} s from row {before}")
    of_threads = {
        number: (name, s - threads_before.get(number, ("", 0.0))[1]) for number, (name, s) in threads_now.items()
    }
    python, native = by_part(of_threads, seen)
    meter = python.pop(METER, 0.0)
    gone = spent - meter - sum(python.values()) - sum(native.values())
    each = 1e6 / num_rows
    return {
        "from_row": before,
        "rows": num_rows,
        "rows_per_s": round(num_rows / lasted),
        "driver_cores": round((spent - meter) / lasted, 3),
        "driver_us_per_row": round((spent - meter) * each, 1),
        "python_us_per_row": in_order(python, each),
        "native_us_per_row": in_order(native, each, SHOWN),
        "threads_that_ended_us_per_row": round(gone * each, 2),
        "samples": seen.total(),
    }


def require_running(job: subprocess.Popen[bytes], where: str) -> None:
    """Raises RuntimeError if the job has ended."""
    if job.poll() is not None:
        raise RuntimeError(f"the job ended with status {job.returncode} {where}; see the log above")


def by_part(of_threads: dict[int, tuple[str, float]], seen: stacks.Stacks) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds of the parts of Python's threads, and of each thread that has no stack of Python, by its name."""
    of_thread: dict[int, stacks.Stacks] = defaultdict(stacks.Stacks)
    for stack, count in seen.items():
        of_thread[int(re.findall(r"thread \((\d+)\)", stack)[0])][stack] += count
    python: dict[str, float] = defaultdict(float)
    native: dict[str, float] = defaultdict(float)
    for number, (name, cpu) in of_threads.items():
        if number not in of_thread:
            native[name] += cpu
            continue
        for part, share in stacks.shares(of_thread[number], PARTS).items():
            python[part] += share * cpu
    return python, native


def in_order(seconds: dict[str, float], each: float, shown: int | None = None) -> dict[str, float]:
    """Microseconds a row, the largest first; beyond `shown` of them together."""
    order = sorted(seconds.items(), key=lambda item: -item[1])
    found = {name: round(s * each, 2) for name, s in order[:shown]}
    return found if shown is None else {**found, "others": round(sum(s for _, s in order[shown:]) * each, 2)}


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def threads(pid: int) -> dict[int, tuple[str, float]]:
    """Name and CPU seconds so far of each thread, by its number."""
    names: dict[int, str] = defaultdict(lambda: "?")
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names[int(path.name)] = (path / "comm").read_text().strip()
    return {t.id: (names[t.id], t.user_time + t.system_time) for t in psutil.Process(pid).threads()}


def written(output: Path) -> int:
    """Rows in the files so far; a file that is being written has none yet."""
    num_rows = 0
    for path in output.glob("part-*.parquet"):
        with contextlib.suppress(pa.ArrowInvalid):
            num_rows += rows_of(path)
    return num_rows


@functools.cache
def rows_of(path: Path) -> int:
    return int(pq.read_metadata(path).num_rows)


if __name__ == "__main__":
    main()
