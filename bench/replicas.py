"""Do more replicas give as many more rows? The whole generate job with engines whose every request takes the same time.

    python bench/replicas.py [--replicas 1 2 4 8 16 32]

Each engine serves `max_num_seqs` requests at once and takes SERVICE_S for each, so R replicas can do R · max_num_seqs /
SERVICE_S rows/s. The rate is that between the moment at which every replica has answered its first batch and the moment at which 99 % of
the rows are done; `tail_s` is the time of the last 1 %, of which one SERVICE_S cannot be avoided. The job itself (Ray,
tokenising, writing) is the real one, and all of its processes share this machine's cores.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from machine import RESULTS, versions, write
from rows import FreeEngine, write_input

import kun_ray.generate as stage
from kun_ray.config import load
from kun_ray.engine import Engine
from kun_ray.generate import GenerateConfig
from kun_ray.pool import Pool
from kun_ray.replies import Reply

SERVICE_S, MAX_NUM_SEQS = 2.0, 16
SECONDS = 60.0
"""How long each size should run."""
MARK = 0.95


class FixedEngine(FreeEngine):
    """Answers each request SERVICE_S seconds after one of its places is free."""

    def __init__(self, journal: Path) -> None:
        self._places = asyncio.Semaphore(MAX_NUM_SEQS)
        self._journal = (journal / uuid.uuid4().hex).open("a", buffering=1)

    async def generate(self, prompt: list[int], sampling: Any, adapter: str | None = None) -> Reply:
        async with self._places:
            await asyncio.sleep(SERVICE_S)
        self.num_events += 1
        self._journal.write(f"{time.time():.3f}\n")
        return await super().generate(prompt, sampling, adapter)


class FixedPool(Pool):
    """The package's Pool with such an engine; `journal` is set by `run`."""

    journal = Path()

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return FixedEngine(self.journal)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="about how long each size runs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run[0], int(options.run[1]))
        return
    found = []
    for replicas in options.replicas:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), replicas, options.seconds))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "service_s": SERVICE_S,
        "max_num_seqs": MAX_NUM_SEQS,
        "least_of_linear": min(size["of_linear"] for size in found),
        "mark": MARK,
        "sizes": found,
        "versions": versions("ray"),
    }
    write(options.out, "replicas", result)


def measure(folder: Path, replicas: int, seconds: float) -> dict[str, Any]:
    """One run, in a process of its own, and what its engines noted."""
    ideal = replicas * MAX_NUM_SEQS / SERVICE_S
    config = write_input(folder, int(ideal * seconds), ["label"])
    (folder / "journal").mkdir()
    ran = subprocess.run(
        [sys.executable, __file__, "--run", str(config), str(replicas)], capture_output=True, text=True
    )
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    engines = [[float(line) for line in path.read_text().split()] for path in (folder / "journal").iterdir()]
    ends = sorted(end for engine in engines for end in engine)
    # the last of its first replies: all of these took one SERVICE_S, which is not in the window
    first, last = max(sorted(engine)[:MAX_NUM_SEQS][-1] for engine in engines), ends[int(0.99 * len(ends))]
    steady = [end for end in ends if first < end <= last]
    rate = len(steady) / (last - first)
    return {
        "replicas": replicas,
        "rows": len(ends),
        "engines": len(engines),
        "rows_per_s": round(rate, 2),
        "ideal_rows_per_s": ideal,
        "of_linear": round(rate / ideal, 4),
        "steady_s": round(last - first, 1),
        "tail_s": round(ends[-1] - last, 2),
    }


def run(path: str, replicas: int) -> None:
    """The job in this process."""
    FixedPool.journal = Path(path).parent / "journal"
    setattr(stage, "Pool", FixedPool)  # noqa: B010 - build_dataset names the class; this one's engine is not vLLM
    pool = [f"pools.label.{name}={value}" for name, value in (("replicas", replicas), ("max_num_seqs", MAX_NUM_SEQS))]
    summary = stage.generate(load(GenerateConfig, [path, *pool, f"ray.num_cpus={replicas + 8}"]))
    assert summary["ok"] == summary["rows_in"], summary


if __name__ == "__main__":
    main()
