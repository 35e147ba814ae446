"""Seconds from the command to the first row, and where they go: `jobs/generate.py` with a real engine on CPUs.

    python bench/startup.py [--runs 3] [--short] [--out DIR]

The job is started as a user starts it, on a tiny random-weight model and 256 documents. It leaves the moments itself
(`startup` in summary.json, kun_ray/startup.py); the bench adds when it gave the command and when the first file was there.
Medians of the runs; a first run, which fills the disk's cache, is not counted. `joined` runs the same command against a Ray
that is up already, as on a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import pyarrow.parquet as pq
from shapes import save_random, texts

from kun_ray import store
from kun_ray.schema import DOCUMENT, OK, doc_id, to_table

PARTS = ("imports", "preflight", "ray", "actor", "engine", "first_token", "first_row", "first_file")
"""Seconds of each, one after the other, up to: the configuration is read; it is checked; Ray is there; Ray Data has planned
and the pool's actor runs; its engine is loaded; a first token; a first row; a first file of rows."""
JOB = Path(__file__).parents[1] / "jobs/generate.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--short", action="store_true", help="one run, cold, with a Ray of its own")
    parser.add_argument("--out", type=Path, help="default: bench/results; build/bench with --short")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        source = write_input(path)
        if options.short:
            ways = {"local": [timed(path, source, "short", {})]}
        else:
            timed(path, source, "warm-up", {})
            ways = {"local": [timed(path, source, f"local-{n}", {}) for n in range(options.runs)]}
            ways["joined"] = joined(path, source, options.runs)
    found = {way: {part: machine.spread([run[part] for run in runs]) for part in runs[0]} for way, runs in ways.items()}
    largest = max(PARTS, key=lambda part: found["local"][f"{part}_s"]["median"])
    result = {
        "model": "tiny (1.6M parameters, random)",
        "largest_part": largest,
        "ways": found,
        "versions": machine.versions("ray", "torch", "transformers"),
    }
    out = options.out or (machine.PASSING if options.short else machine.RESULTS)
    print(json.dumps(result, indent=2), f"\n{machine.write(out, 'startup', result)}")


def write_input(folder: Path) -> str:
    """A model with random weights and a finished prepare stage; returns the stage's folder."""
    save_random("tiny", folder / "model", "cpu")
    source = store.open_stage(str(folder / "prepare"), {}, {})
    rows = [
        {"doc_id": doc_id("b", "f", n, text), "source": "b", "text": text, "meta": "{}", "tokens": 200, "status": OK}
        for n, text in enumerate(texts(256, seed=0))
    ]
    pq.write_table(to_table(rows, DOCUMENT), source.child("part-0.parquet"))
    source.finish({"rows": len(rows)})
    return source.uri


def joined(folder: Path, source: str, runs: int) -> list[dict[str, float]]:
    """The same against a Ray that was started before."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR")
    try:
        address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        timed(folder, source, "joined-warm-up", address)
        return [timed(folder, source, f"joined-{n}", address) for n in range(runs)]
    finally:
        ray.shutdown()


def timed(folder: Path, source: str, name: str, environment: dict[str, str]) -> dict[str, float]:
    """One run of the job to its end: seconds of each part and of all."""
    output = folder / name
    command = [sys.executable, str(JOB), "conf/demo/label.yaml", f"input={source}", f"output={output}"]
    command += [f"pools.label.model={folder}/model"]
    with (folder / "log").open("w+") as log:
        given = time.time()
        process = subprocess.Popen(
            command, cwd=JOB.parents[1], env={**os.environ, **environment}, stdout=log, stderr=log
        )
        first_file = None
        while process.poll() is None:
            if first_file is None and any(output.glob("part-*.parquet")):
                first_file = time.time()
            time.sleep(0.02)
        ended = time.time()
        if process.returncode or first_file is None:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{log.read()[-3000:]}")
    startup: dict[str, Any] = json.loads((output / "summary.json").read_text())["startup"]
    began, pool = startup["began"], startup["pools"]["label"]
    parts = {"imports_s": began - given, **{f"{n}_s": startup[f"{n}_s"] for n in ("preflight", "ray")}}
    parts |= {f"{n}_s": pool[f"{n}_s"] for n in ("actor", "engine", "first_token", "first_row")}
    to_row = sum(parts.values())
    parts["first_file_s"] = first_file - given - to_row
    print(name, {part: round(seconds, 2) for part, seconds in parts.items()}, file=sys.stderr, flush=True)
    return {**parts, "command_to_first_row_s": to_row, "command_to_end_s": ended - given}


if __name__ == "__main__":
    main()
