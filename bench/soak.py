"""Kills generate again and again and counts what is lost or doubled → bench/results/soak.json. `make soak` runs it.

python bench/soak.py [--kills 200] [--rows 100000] [--real 20] [--real-rows 2000]

The long run has the tests' fake engine; `--real` kills come on top of it, with vLLM on a tiny model. Every kill is a
SIGKILL of the driver: half of them after a random time, half once a random number of rows is written.
The same command then goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO / "tests/cluster"))

import chains  # noqa: E402
import fake  # noqa: E402

from kun_ray import store  # noqa: E402
from kun_ray.demo import tiny  # noqa: E402

END_S = 3600.0


def start(job: chains.Chain, log: Path, real: bool, address: str) -> subprocess.Popen[bytes]:
    """One run of the job in a process group of its own."""
    if not real:
        started: subprocess.Popen[bytes] = job.start(log, address)
        return started
    command = [sys.executable, str(REPO / "jobs/generate.py"), str(job.yaml), address]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True)


def soak(folder: Path, kills: int, rows: int, real: bool, rng: random.Random) -> dict[str, Any]:
    """So many kills over one stage, a last run to the end, and what it left."""
    model, rows_per_file = folder / "model", 32 if real else 128
    tokenizer = tiny.build_tokenizer([seed["output"] for seed in tiny.seeds()])
    tiny.save(tiny.build_model(), tokenizer, model)
    source = chains.write_documents(folder / "prepare", rows, rows_per_part=5000)
    plan = fake.Plan(journal=str(folder / "journal"), service_s=(0.0, 0.05))
    Path(plan.journal).mkdir()
    job = chains.write_chain(
        folder,
        source,
        str(model),
        plan,
        {"all": ["label", "score", "polish"]},
        rows_per_file=rows_per_file,
        ray={"log_every_s": 5.0},
    )
    if real:  # a model that has learnt nothing decodes to the limit, which is short here
        text = job.yaml.read_text().replace("max_tokens: 64", "max_tokens: 8")
        job.yaml.write_text(text.replace("num_cpus: 1", "num_cpus: 1\n    max_model_len: 256\n    cpu_threads: 1"))
    address = chains.address()
    began, done, written = time.monotonic(), 0, 0
    while done < kills:
        process = start(job, folder / "log", real, address)
        try:
            if done % 2:  # from the start of the driver to well into its work
                process.wait(rng.uniform(1.0, 60.0 if real else 25.0))
            else:  # while it writes, however long this machine takes to start; the rows are to last for all kills
                share = min(rng.uniform(0.0, 3.0) / (kills - done), 0.5) * (rows - written)
                await_parts(job.folder(), len(job.folder().parts()) + int(share) // rows_per_file, process)
                process.wait(rng.uniform(0.0, 1.0))
        except subprocess.TimeoutExpired:
            pass
        finally:
            done += process.poll() is None
            chains.kill_session(process)
        if process.returncode == 0:
            break  # every row is written
        if process.returncode != -9:
            raise SystemExit(f"a run failed by itself:\n{(folder / 'log').read_text()[-4000:]}")
        written = sum(map(num_rows, job.folder().parts()))
        print(f"{done} of {kills} kills, {written:,} of {rows:,} rows", flush=True)
    process = start(job, folder / "log", real, address)
    if process.wait(END_S):
        raise SystemExit(f"the last run failed:\n{(folder / 'log').read_text()[-4000:]}")
    summary = job.folder().read_json(store.SUMMARY)
    wanted, found = chains.ids(source), chains.ids(job.folder())
    return {
        "engine": "vllm" if real else "fake",
        "date": time.strftime("%F"),
        "kills": done,
        "rows": rows,
        "rows_written": len(found),
        "duplicates": len(found) - len(set(found)),
        "lost": len(set(wanted) - set(found)),
        "wall_s": round(time.monotonic() - began, 1),
        **{key: summary[key] for key in ("runs", "restarts", "tokens_redone", "output_tokens", "goodput")},
    }


def await_parts(folder: store.Folder, wanted: int, process: subprocess.Popen[bytes]) -> None:
    """Waits until so many files are written, the process has ended, or five minutes are over."""
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end and len(folder.parts()) < wanted:
        time.sleep(0.1)


def num_rows(path: str) -> int:
    """Rows of a part; 0 for one that is being written."""
    import pyarrow.parquet as pq

    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:  # half a file, or one that the next run has just deleted
        return 0


def main() -> None:
    """Runs both soaks on one Ray and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--real", type=int, default=20, help="kills with vLLM; 0 leaves them out")
    parser.add_argument("--real-rows", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPO / "bench/results/soak.json")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests/cluster")])
    ray.init(
        "local",
        num_cpus=8,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
        _temp_dir=f"{folder}/r",
    )
    lost = 0
    try:
        for name, kills, rows in (("fake", args.kills, args.rows), ("real", args.real, args.real_rows)):
            if kills:
                (folder / name).mkdir()
                result = soak(folder / name, kills, rows, name == "real", rng)
                print(json.dumps(result, indent=2), flush=True)
                write(args.out, result)
                lost += result["duplicates"] + result["lost"]
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    if lost:
        raise SystemExit("rows were lost or doubled")


def write(path: Path, result: dict[str, Any]) -> None:
    """Puts one soak's result in the place of its engine's last one, so that either can be run without the other."""
    before = json.loads(path.read_text())["soaks"] if path.exists() else []
    soaks = [other for other in before if other["engine"] != result["engine"]]
    path.parent.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine()}
    machine["note"] = (
        "tokens_redone is at least so many: what a killed run did in its last two or three seconds is in no file"
    )
    path.write_text(json.dumps({**machine, "soaks": [*soaks, result]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
