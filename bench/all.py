"""Runs the benchmarks one after the other, each in a process of its own: `make bench`, `make bench-gpu OUT=folder`.

    python bench/all.py [--short] [--only rows ingest]
    python bench/all.py --gpu --out folder [--smoke]

--short shows in half an hour that each of them runs. --gpu takes those that measure a card, most telling ones first, all within
--seconds: one that has less than half of its time left is not begun; --smoke runs their whole path on CPUs with tiny shapes. A benchmark that
fails does not stop the others, but makes the exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import table
from machine import PASSING, RESULTS

HERE = Path(__file__).parent
OF_CORPORA = {"ingest", "near_duplicates", "reader_pieces"}
"""Those that take the text of `make corpora`."""
END_S = 25.0
"""A benchmark that is given up may take so long to end."""
NEEDED = ("vllm", "ray", "deepspeed", "transformers", "omegaconf", "orjson")
"""All that the benchmarks for a card import, on a machine without `make gpu`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One command."""

    script: str
    arguments: str = ""
    short: str | None = ""
    """Arguments of the short form; None has none."""
    seconds: float = 900.0
    """It is given up after this time."""
    memory_gb: float = 0.0
    """A card with less leaves it out."""


ON_CPU = [
    Run("engine", "--cpu --scoring --rows 512 --pairs 5 --fresh 4", "--cpu --rows 64 --pairs 1", seconds=2400),
    Run("engine", "--cpu --workload polish-like --rows 512 --pairs 3 --fresh 3", None, seconds=1800),
    Run("engine_profile", "", "--short"),
    Run("engine_profile", "--workload polish-like --rows 512", None),
    Run("engine_profile", "--scoring", None),
    Run("engine_profile", "--scoring --block-size 32", None),
    Run("engine_profile", "--shape 29m --rows 128 --rounds 1 --way at_once", None),
    Run("verdicts", "", "--rows 32 --epochs 1"),
    Run("rivals", "--cpu --rounds 6", "--cpu --rows 128 --rounds 1", seconds=2100),
    Run("rivals", "--cpu --workload polish-like --rows 512 --rounds 6", None, seconds=2400),
    Run("rows", "", "--rows 8000 12000", seconds=3600),
    Run("driver_profile", "--rows 1000000 --rows-per-block 512 --at 0.05 0.75", "--short", seconds=1800),
    Run("driver_profile", "", None),
    Run("replicas", "", "--replicas 1 2 --seconds 10", seconds=1800),
    Run("ingest", "--mb 20 --chain-mb 0.5 --readings 21 --pairs 3", "--short", seconds=1800),
    Run("reader_pieces", "", "--short"),
    Run("near_duplicates", "", "--short", seconds=1800),
    Run("training", "--steps 6", "--short", seconds=2400),
    Run("training", "--loops", None, seconds=2400),
    Run("training_profile", "--steps 5", "--short --steps 1"),
    Run("padding"),
    Run("startup", "", "--short"),
    Run("startup_profile", "", "--short"),
    Run("planner", "", "--short"),
]
ON_GPU = [
    Run("engine", "--shape 1.5b --scoring --pairs 3", seconds=170),
    Run("training", "--gpu", seconds=150),
    Run(
        "engine",
        "--shape 34b --one-engine-at-a-time --memory 0.9 --rows 256 --pairs 1 --scoring",
        seconds=240,
        memory_gb=130,
    ),
    Run("engine", "--shape 7b --workload polish-like --pairs 3 --scoring", seconds=200, memory_gb=70),
    Run("rivals", "--shape 0.5b --rounds 3", seconds=300),
]
SMOKE = [
    Run("engine", "--cpu --scoring --rows 64 --pairs 1"),
    Run("training", "--gpu --smoke"),
    Run("engine", "--cpu --one-engine-at-a-time --rows 64 --pairs 1 --scoring"),
    Run("engine", "--cpu --workload polish-like --rows 64 --pairs 1"),
    Run("rivals", "--cpu --rows 128 --rounds 1"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=sorted({run.script for run in ON_CPU}))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=530.0, help="with --gpu: time for all together")
    options = parser.parse_args()
    if (options.short or options.smoke) and options.out == RESULTS:
        options.out = PASSING  # what these measure is no result
    runs = (SMOKE if options.smoke else ON_GPU) if options.gpu else ON_CPU
    chosen = {run.script for run in runs if not options.only or run.script in options.only}
    if not chosen:
        raise SystemExit(f"{', '.join(options.only)}: not among {', '.join(sorted({run.script for run in runs}))}")
    whole = not (options.gpu or options.short)
    if whole and chosen & OF_CORPORA and not Path("build/corpora/truth.json").exists():
        raise SystemExit(f"no build/corpora, whose text {' and '.join(sorted(OF_CORPORA))} take: run `make corpora`")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"{sys.executable} has no {', '.join(missing)}: run `make {'gpu' if options.gpu else 'venv'}`")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    deadline = time.monotonic() + options.seconds - END_S if options.gpu and not options.smoke else float("inf")
    failed = []
    for run in runs:
        arguments = run.short if options.short else run.arguments
        if arguments is None or (options.only and run.script not in options.only):
            continue
        words = [run.script, *arguments.split()]
        if run.memory_gb > (card_gb() if run.memory_gb else 0.0):
            print(f"== {' '.join(words)}: needs a card of {run.memory_gb:g} GB", flush=True)
            continue
        limit = min(run.seconds, deadline - time.monotonic())
        if limit < run.seconds / 2:
            print(f"== {' '.join(words)}: no time left", flush=True)
            continue
        print(f"== {' '.join(words)}", flush=True)
        if not ran(words, options.out, limit):
            failed.append(run.script)
    if failed:
        raise SystemExit(f"did not end well: {', '.join(failed)}")
    if whole and options.out == RESULTS:
        table.main()


def ran(words: list[str], out: Path, limit: float) -> bool:
    """Whether the benchmark ended well within the time."""
    started = time.monotonic()
    command = [sys.executable, str(HERE / f"{words[0]}.py"), *words[1:], "--out", str(out)]
    path = os.pathsep.join([str(HERE.parent.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}  # a lent machine has the packages, but not kun_ray
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    try:
        status = process.wait(None if limit == float("inf") else limit)
    except subprocess.TimeoutExpired:
        print(f"   given up after {limit:.0f} s", flush=True)
        return False
    finally:  # also at Ctrl-C, which a session of its own does not hear
        for signum in (signal.SIGTERM, signal.SIGKILL):  # to all that it has started: they would keep the card's memory
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signum)
                process.wait(20)
    print(f"   {time.monotonic() - started:.0f} s, exit status {status}", flush=True)
    return status == 0


def card_gb() -> float:
    """Memory of the first GPU; 0 without one."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]) / 1024
    except (OSError, subprocess.CalledProcessError):
        return 0.0


if __name__ == "__main__":
    main()
