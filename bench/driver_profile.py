"""Where the driver's core goes: its threads and their stacks, while the job of bench/rows.py runs.

    python bench/driver_profile.py [--rows 1000000] [--rows-per-block 512] [--at 0.05 0.8] [--seconds 60]

Looks at the driver in windows that begin when that part of the rows is written. The CPU seconds of each thread are the
kernel's; those of a thread of Python are parted by its stacks (py-spy, 50 times a second). Ray's own threads of C++ have names
alone. All figures are microseconds of a core for each row that was written in the window.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
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
    "kun_ray": r"\(kun_ray/",
    "usages of all operators (update_usages)": r"update_usages",
    "dispatch of tasks": r"dispatch_next_task",
    "results (ray.wait)": r"^wait \(ray/_private/worker",
    "results (blocks and their metadata)": r"process_completed_tasks|metadata_fetcher",
    "choice of the next operator": r"select_operator_to_run",
    "other of the scheduling loop": r"streaming_executor",
}
"""A stack is of the first part whose pattern one of its frames has."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-block", type=int, help="default: what a user gets without asking")
    parser.add_argument("--at", type=float, nargs="+", default=[0.05, 0.8])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=machine.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = rows.write_input(Path(name), options.rows, rows_per_block=options.rows_per_block)
        process = subprocess.Popen([*rows.COMMAND, str(config)], stdout=subprocess.DEVNULL)
        try:
            windows = [window(process.pid, Path(name, "out"), at * options.rows, options.seconds) for at in options.at]
        finally:
            rows.end(process)
    result = {
        "rows": options.rows,
        "rows_per_block": options.rows_per_block,
        "windows": windows,
        "versions": machine.versions("ray", "py-spy"),
    }
    blocks = options.rows_per_block or "default"
    print(json.dumps(result, indent=2), f"\n{machine.write(options.out, f'driver_profile-{blocks}', result)}")


def window(pid: int, output: Path, begin: float, seconds: float) -> dict[str, Any]:
    """Microseconds of a row in each thread and part, from the moment that `begin` rows are written."""
    while (before := written(output)) < begin:
        if not psutil.pid_exists(pid):
            raise RuntimeError("the run ended early; see the log above")
        time.sleep(1.0)
    cpu, started = threads(pid), time.monotonic()
    with stacks.sampled(pid) as seen:
        time.sleep(seconds)
        spent = {thread: s - cpu.get(thread, 0.0) for thread, s in threads(pid).items()}
        num_rows, lasted = written(output) - before, time.monotonic() - started
    of_thread: dict[int, stacks.Stacks] = {}
    for stack, count in seen.items():
        of_thread.setdefault(int(stack[0].partition("(")[2].partition(")")[0]), stacks.Stacks())[stack[1:]] += count
    python: dict[str, float] = defaultdict(float)
    native: dict[str, float] = defaultdict(float)
    for (thread, name), cpu_s in spent.items():
        if thread in of_thread:
            for part, share in stacks.shares(of_thread[thread], PARTS).items():
                python[part] += share * cpu_s
        else:
            native[name] += cpu_s
    total, each = sum(spent.values()) - python.pop(METER, 0.0), 1e6 / max(1, num_rows)
    return {
        "from_row": before,
        "rows": num_rows,
        "rows_per_s": round(num_rows / lasted),
        "driver_cores": round(total / lasted, 3),
        "driver_us_per_row": round(total * each, 1),
        "python_us_per_row": {part: round(s * each, 2) for part, s in largest(python)},
        "native_us_per_row": {name: round(s * each, 2) for name, s in largest(native)},
        "samples": seen.total(),
    }


def largest(seconds: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda item: -item[1])[:12]


def threads(pid: int) -> dict[tuple[int, str], float]:
    """CPU seconds of each thread so far, by its number and name."""
    names = {int(path.name): (path / "comm").read_text().strip() for path in Path(f"/proc/{pid}/task").iterdir()}
    return {(t.id, names.get(t.id, "?")): t.user_time + t.system_time for t in psutil.Process(pid).threads()}


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
