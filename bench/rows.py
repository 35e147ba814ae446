"""What a row costs besides the model: the whole generate job with an engine that answers at once.

    python bench/rows.py [--rows 10000 100000 1000000] [--rows-per-block 512] [--out DIR]

For each number of rows: seconds, CPU seconds of the driver and of all processes, the driver's memory, bytes spilled; then a
resume: the job is stopped halfway by SIGKILL and the time from the same command to its first new file is taken. The cost of a
row is the difference between two sizes over the difference of their rows, so that starting Ray does not count. The driver is
the one process of which a cluster has no more than a laptop; all others grow with the replicas. The first two sizes run once
more with the blocks that a user gets without asking.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from machine import RESULTS, versions, write
from ray._private import internal_api
from transformers import LlamaConfig

import kun_ray.generate as stage
from kun_ray import store
from kun_ray.config import load
from kun_ray.demo import tiny
from kun_ray.engine import Engine
from kun_ray.generate import GenerateConfig
from kun_ray.pool import Pool
from kun_ray.replies import Reply
from kun_ray.schema import DOCUMENT

TEXT = "第{n}篇：讲的是一件很平常的小事，写得清楚而且完整，读来令人愉快，也有几句值得记下的话。"
PART = 50_000
ROWS_PER_FILE = 2000


class FreeEngine:
    """Answers at once, and the same to everybody."""

    max_model_len = 2048
    num_events = 0
    first_token_at: float | None = None
    stats = None

    def kill(self) -> None:
        """It has no processes."""

    async def generate(self, prompt: list[int], sampling: Any, adapter: str | None = None) -> Reply:
        return Reply(len(prompt), 20, "stop", "请写一段话，说说这件平常的小事为什么值得记下来。")

    async def choose(self, prompt: list[int], candidates: tuple[int, ...], adapter: str | None = None) -> Reply:
        return Reply(len(prompt), 1, "chosen", logprobs=(math.log(0.75), math.log(0.25)))

    async def perplexity(self, prompt: list[int], adapter: str | None = None) -> Reply:
        return Reply(len(prompt), 0, "measured", perplexity=10.0)


class FreePool(Pool):
    """The package's Pool with an engine that costs nothing."""

    def _build_engine(self, path: str, stop_ids: list[int]) -> Engine:
        return FreeEngine()


class Meter:
    """CPU seconds of this process and of its tree, without its own, and the largest memory of this process.

    It looks every two seconds: a shorter peak, or what a process did in its last two seconds, may be missing.
    """

    def __init__(self) -> None:
        self.memory_mb = 0.0
        self._own = 0.0
        self._seconds: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> tuple[float, float]:
        """Stops measuring; returns the CPU seconds of this process and of all."""
        self._ended.set()
        self._thread.join()
        root = psutil.Process()
        driver = self._seconds[root.pid, root.create_time()] - self._own
        return driver, sum(self._seconds.values()) - self._own

    def _watch(self) -> None:
        root = psutil.Process()
        while True:
            self.memory_mb = max(self.memory_mb, root.memory_info().rss / 1e6)
            for process in [root, *root.children(recursive=True)]:
                try:
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system
                except psutil.Error:
                    continue
            self._own = time.thread_time()
            if self._ended.is_set():
                return
            self._ended.wait(2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rows-per-block", type=int, default=512)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the run that it waits for
    if options.run:
        print(json.dumps(run(options.run)), flush=True)
        return
    if min(options.rows) < 4 * ROWS_PER_FILE:
        parser.error(f"--rows: at least {4 * ROWS_PER_FILE}, so that something is left to do after half of the files")
    found = []
    for num_rows in options.rows:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(Path(folder), num_rows, options.rows_per_block))
        print(json.dumps(found[-1]), flush=True)
    small, large = found[0], found[-1]
    default = []
    for size in found[:2]:
        with tempfile.TemporaryDirectory() as folder:
            default.append({"rows": size["rows"], **whole_run(write_input(Path(folder), size["rows"]))})
    result = {
        "steps": "label, score, polish",
        "rows_per_block": options.rows_per_block,
        "sizes": found,
        **costs(small, large),
        "driver_memory_growth": round(large["memory_mb"] / found[max(0, len(found) - 2)]["memory_mb"] - 1, 3),
        "blocks_by_default": {"sizes": default, **costs(default[0], default[-1])},
        "mark": {"driver_us_per_row": 100, "driver_memory_growth": 0.1, "spilled_bytes": 0, "resume_s": 60},
        "versions": versions("ray", "pyarrow"),
    }
    print(json.dumps(result, indent=2), f"\n{write(options.out, 'rows', result)}")


def costs(small: dict[str, Any], large: dict[str, Any]) -> dict[str, float | None]:
    """Microseconds of each further row: of the clock, of the driver's core, of all cores together."""
    keys = {"us_per_row": "seconds", "driver_us_per_row": "driver_cpu_s", "cpu_us_per_row": "cpu_s"}
    return {name: cost(small, large, key) for name, key in keys.items()}


def cost(small: dict[str, Any], large: dict[str, Any], key: str) -> float | None:
    """Microseconds for each further row."""
    rows = large["rows"] - small["rows"]
    return round((large[key] - small[key]) / rows * 1e6, 1) if rows else None


COMMAND = [sys.executable, __file__, "--run"]


def measure(folder: Path, num_rows: int, rows_per_block: int) -> dict[str, Any]:
    """One whole run, and one that is killed halfway and resumed."""
    config = write_input(folder, num_rows, rows_per_block=rows_per_block)
    figures = whole_run(config)
    again = folder / "again.yaml"
    again.write_text(config.read_text().replace("/out", "/resumed"))
    return {"rows": num_rows, **figures, "resume_s": resume(again, folder / "resumed", num_rows, COMMAND)}


def whole_run(config: Path) -> dict[str, Any]:
    """What a run in a process of its own has cost."""
    whole = subprocess.run([*COMMAND, str(config)], capture_output=True, text=True)
    if whole.returncode:
        raise RuntimeError(whole.stderr[-2000:])
    figures: dict[str, Any] = json.loads(whole.stdout.splitlines()[-1])
    return figures


def resume(config: Path, output: Path, num_rows: int, command: list[str]) -> float:
    """Seconds from the command to the first new file after a SIGKILL at half of the rows."""

    def written() -> int:
        return len(list(output.glob("part-*.parquet")))

    wanted = max(1, num_rows // 2 // ROWS_PER_FILE)
    for goal in (wanted, None):
        started, before = time.monotonic(), written()
        target = before + 1 if goal is None else goal
        process = subprocess.Popen([*command, str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            while process.poll() is None and written() < target:
                time.sleep(0.05)
            elapsed = time.monotonic() - started
        finally:
            end(process)
        if written() < target:
            raise RuntimeError(f"the run ended with status {process.returncode} and {written()} files, not {target}")
    return round(elapsed, 1)


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the driver and to the Ray that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGKILL)
    process.wait()


def run(config: str) -> dict[str, Any]:
    """The job in this process."""
    setattr(stage, "Pool", FreePool)  # noqa: B010 - build_dataset names the class; this one's engine costs nothing
    meter, started = Meter(), time.monotonic()
    summary = stage.generate(load(GenerateConfig, [config]))
    elapsed = time.monotonic() - started
    driver, cpu = meter.end()
    assert summary["ok"] == summary["rows_in"], summary
    address = ray.get_runtime_context().gcs_address
    stored = internal_api.get_memory_info_reply(internal_api.get_state_from_address(address)).store_stats
    return {
        "seconds": round(elapsed, 2),
        "driver_cpu_s": round(driver, 2),
        "cpu_s": round(cpu, 2),
        "memory_mb": round(meter.memory_mb),
        "spilled_bytes": stored.spilled_bytes_total,
    }


def write_input(
    folder: Path,
    num_rows: int,
    steps: Sequence[str] = ("label", "score", "polish"),
    rows_per_block: int | None = None,
) -> Path:
    """A finished prepare stage of so many documents, and the YAML of a job that runs `steps` on them."""
    source = store.open_stage(str(folder / "prepare"), {}, {})
    for start in range(0, num_rows, PART):
        numbers = range(start, min(start + PART, num_rows))
        columns: dict[str, Any] = {field.name: pa.nulls(len(numbers), field.type) for field in DOCUMENT}
        columns["doc_id"] = pa.array([f"{n:032x}" for n in numbers])
        columns["text"] = pa.array([TEXT.format(n=n) for n in numbers])
        columns["source"] = pa.array(["bench"] * len(numbers))
        columns["meta"] = pa.array(["{}"] * len(numbers))
        columns["tokens"] = pa.array([40] * len(numbers))
        columns["status"] = pa.array(["ok"] * len(numbers))
        table = pa.table(columns).cast(DOCUMENT)
        pq.write_table(table, source.child(f"part-{start:09d}.parquet"), row_group_size=5000)
    source.finish({"rows": num_rows})
    tokenizer = tiny.build_tokenizer([seed["output"] for seed in tiny.seeds()])
    LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    pool = {"model": str(folder / "model"), "accelerator": "cpu", "max_model_len": 2048, "num_cpus": 1}
    pool |= {"rows_per_block": rows_per_block}
    config = {
        "extends": str(Path("conf/prompts.yaml").resolve()),
        "input": source.uri,
        "output": str(folder / "out"),
        "pools": {
            name: {**pool, "steps": list(of_pool)}
            for name, of_pool in (("label", steps[:1]), ("chat", steps[1:]))
            if of_pool
        },
        "rows_per_file": ROWS_PER_FILE,
        "ray": {"num_cpus": 8, "log_every_s": 5},
    }
    path = folder / "rows.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    return path


if __name__ == "__main__":
    main()
