"""Time and memory of the report over a run of N rows, in a process of its own.

    python bench/report_scale.py --rows 1000000 --out build/bench

The run is made up (seeded): prepare's reasons and generate's, texts of the demo's documents, files of 512 rows in row
groups of 64, as generate writes them. Memory is the largest resident size, less what importing took.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kun_ray.demo import tiny
from kun_ray.report import write_report
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps
from kun_ray.store import open_stage

FATES = [
    (0.40, "ok", None, 3),
    (0.15, "rejected", "near_duplicate", 0),
    (0.10, "rejected", "not_chinese", 0),
    (0.05, "failed", "bad_json", 0),
    (0.05, "rejected", "keyword:图片", 1),
    (0.15, "rejected", "verdict_bad", 2),
    (0.10, "rejected", "answer_short", 3),
]
"""Share, status, reason, and how many steps the row passed."""
STEPS = ["label", "score", "polish"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options.run)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), options.rows)
        command = [sys.executable, __file__, "--run", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = {"rows": options.rows, **json.loads(done.stdout.splitlines()[-1]), "machine": platform.processor()}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report-scale.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def measure(run: str) -> dict[str, Any]:
    """Writes the report of a run and returns what it took."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    path = write_report([run])
    elapsed = time.monotonic() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"elapsed_s": round(elapsed, 1), "memory_mb": grown // 1024, "page_bytes": Path(path).stat().st_size}


def make_run(folder: Path, num_rows: int) -> None:
    """A generate stage of `num_rows` rows."""
    rng, seeds = random.Random(0), tiny.seeds()
    stage = open_stage(str(folder / "generate"), {"pools": {"one": {"steps": STEPS}}}, {})
    weights = [share for share, *_ in FATES]
    for start in range(0, num_rows, 512):
        rows: list[dict[str, object]] = []
        for n in range(start, min(start + 512, num_rows)):
            _, status, reason, reached = rng.choices(FATES, weights)[0]
            seed = rng.choice(seeds)
            row: dict[str, object] = {
                "doc_id": doc_id("bench", "f", n, ""),
                "source": f"source{n % 3}",
                "status": status,
                "reason": reason,
            }
            row |= {"meta": f'{{"file":"part-{n // 10000}.json","offset":{n}}}', "tokens": rng.randrange(20, 512)}
            row |= {"text": seed["output"] if status == "ok" else None}
            row |= {"instruction": seed["instruction"]} if reached > 0 else {}
            row |= {"verdict": "好", "score": rng.random()} if reached > 1 else {}
            row |= {"answer": seed["output"]} if reached > 2 else {}
            rows.append(row | {f"{step}_prompt_tokens": 200 for step in STEPS[:reached]})
        table = to_table(rows, with_steps(DOCUMENT, STEPS))
        pq.write_table(table, stage.child(f"part-{start:09d}.parquet"), row_group_size=64)


if __name__ == "__main__":
    main()
