"""A generate job over fake engines, and what tests ask of it: start it, wait for it, kill it, read what it wrote."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake
import pyarrow.parquet as pq
import ray
import yaml

from kun_ray import store
from kun_ray.config import load
from kun_ray.counts import prove_counts
from kun_ray.generate import GenerateConfig
from kun_ray.schema import DOCUMENT, doc_id, to_table

HERE = Path(__file__).parent
WAIT_S = 400.0
"""Longest wait for anything: the machine may be slow and shared."""


@dataclasses.dataclass
class Chain:
    """A generate job over fake engines: label in one pool, score and polish in another."""

    plan: fake.Plan
    yaml: Path
    input: str
    output: str

    def config(self, *overrides: str) -> GenerateConfig:
        return load(GenerateConfig, [str(self.yaml), *overrides])

    def folder(self) -> store.Folder:
        return store.Folder(self.output)

    def rows(self) -> list[dict[str, Any]]:
        return self.folder().dataset().to_table().to_pylist()

    def start(self, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """The job as a process of its own, on a Ray of its own."""
        plan = self.yaml.with_name("plan.json")
        plan.write_text(json.dumps(dataclasses.asdict(self.plan)))
        command = [sys.executable, str(HERE / "driver.py"), str(plan), str(self.yaml), "ray.num_cpus=8"]
        environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("ab") as stream:
            return subprocess.Popen(
                [*command, "ray.object_store_gb=0.3", *overrides],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environ,
                start_new_session=True,
            )


def write_documents(
    folder: Path,
    num_rows: int,
    marks: dict[int, str] | None = None,
    rejected: Any = (),
    long: Any = (),
    rows_per_part: int = 100,
) -> store.Folder:
    """Writes a finished prepare stage: row n says 第n篇; `marks` gives rows a mark (see fake.py).
    `rejected` rows are settled already; `long` ones exceed the engine's context."""
    stage = store.open_stage(str(folder), {"rows": num_rows}, {})
    rows = []
    for n in range(num_rows):
        mark = (marks or {}).get(n, "")
        text = f"第{n:04d}篇" + (f"〔{mark}〕" if mark else "") + "讲的是一件很平常的小事。" * (100 if n in long else 1)
        row = {"doc_id": doc_id("test", "file", n, text), "source": "test", "text": text, "meta": "{}"}
        row |= {"title": f"{n}", "tokens": 30, "status": "ok"}
        if n in rejected:
            row |= {"text": None, "status": "rejected", "reason": "too_short"}
        rows.append(row)
    for start in range(0, num_rows, rows_per_part):
        table = to_table(rows[start : start + rows_per_part], DOCUMENT)
        pq.write_table(table, stage.child(f"part-{start:06d}.parquet"))
    stage.finish(prove_counts(stage, num_rows))
    return stage


def write_chain(
    folder: Path,
    source: store.Folder,
    model: str,
    plan: fake.Plan,
    pools: dict[str, list[str]] | None = None,
    **changed: Any,
) -> Chain:
    """Writes generate.yaml for a chain over `source` into `folder`; `changed` replaces keys of it."""
    each = {"model": model, "accelerator": "cpu", "max_num_seqs": 16, "rows_per_block": 16, "num_cpus": 1}
    steps = pools or {"label": ["label"], "chat": ["score", "polish"]}
    config = {
        "input": source.uri,
        "output": str(folder / "generate"),
        "pools": {name: {**each, "steps": of_pool} for name, of_pool in steps.items()},
        "steps": {
            "label": {"prompt": {"user": "label:{text}"}, "sampling": {"max_tokens": 64}},
            "score": {"prompt": {"user": "score:{instruction}"}},
            "polish": {"prompt": {"user": "polish:{instruction}|{text}"}, "sampling": {"max_tokens": 64}},
        },
        "rows_per_file": 32,
        "max_waiting_rows": 64,
        "ray": {"log_every_s": 0.5},
        **changed,
    }
    path = folder / "generate.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
    return Chain(plan, path, source.uri, str(config["output"]))


def ids(folder: store.Folder) -> list[str]:
    """Every doc_id of a stage, sorted: equal lists mean that each row is there exactly once."""
    return sorted(folder.dataset().to_table(columns=["doc_id"])["doc_id"].to_pylist())


def address() -> str:
    """The argument that lets a job join this folder's Ray."""
    return f"ray.address={ray.get_runtime_context().gcs_address}"


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Polls until `condition()` holds, and returns its value."""
    started = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() - started < WAIT_S, f"waited {WAIT_S:g} s in vain for {what}"
        time.sleep(0.05)
    return value


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """SIGKILLs a job and then the Ray processes that it leaves, by the session which `Chain.start` gave it."""
    process.kill()
    process.wait(WAIT_S)
    with_session = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _session(p) == process.pid]
    for pid in with_session:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _session(process: Path) -> int | None:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError, ValueError):
        return None
