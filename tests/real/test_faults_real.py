"""Real engines that cannot start, whose core is killed, whose actor is killed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from kun_ray import store
from kun_ray.config import KunError, load
from kun_ray.generate import GenerateConfig, generate
from kun_ray.schema import DOCUMENT, doc_id, to_table


def configured(tmp_path: Path, steps_yaml: Path, model: str, texts: list[str], *overrides: str) -> GenerateConfig:
    """A label stage over 400 rows."""
    source = store.open_stage(str(tmp_path / "prepare"), {}, {})
    rows = [
        {"doc_id": doc_id("s", "f", n, ""), "source": "s", "text": text, "meta": "{}", "tokens": 40, "status": "ok"}
        for n, text in enumerate(texts * 20)
    ]
    pq.write_table(to_table(rows, DOCUMENT), source.child("part-0.parquet"))
    source.finish({})
    engine = ["accelerator=cpu", "max_num_seqs=4", "max_model_len=512", "rows_per_block=8", "engine.dtype=float32"]
    pool = [f"pools.p.{key}" for key in (*engine, "steps=[label]", f"model={model}")]
    return load(
        GenerateConfig, [str(steps_yaml), f"input={source.uri}", f"output={tmp_path}/generate", *pool, *overrides]
    )


def engine_processes() -> dict[psutil.Process, str]:
    """vLLM's living processes below this test's own Ray, and their names."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since it was listed
            if process.status() != psutil.STATUS_ZOMBIE and "VLLM" in process.name():
                found[process] = process.name()
    return found


def test_broken_weights_end_the_run_with_the_engines_own_error(local_ray, model, steps_yaml, texts, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    config = configured(tmp_path, steps_yaml, str(broken), texts)
    with pytest.raises(KunError, match=r"pool p: its engine cannot start: .*SafetensorError: .*"):
        generate(config)
    assert not engine_processes()


def test_a_killed_core_and_a_killed_actor_are_replaced_and_leave_nothing(local_ray, model, steps_yaml, texts, tmp_path):
    config = configured(tmp_path, steps_yaml, model, texts, "ray.log_every_s=0.5")
    seen: set[psutil.Process] = set()
    ended = threading.Event()

    def kill(what: str) -> None:
        while not ended.wait(0.05):
            cores = [p for p, name in engine_processes().items() if name == "VLLM::EngineCore" and p not in seen]
            if cores and progressed(tmp_path, len(seen)):
                seen.add(cores[0])
                os.kill(cores[0].pid if what == "core" else cores[0].ppid(), signal.SIGKILL)
                return
        pytest.fail(f"the {what} was not killed: no new engine answered anything")

    with ThreadPoolExecutor(1) as executor:
        killed = executor.submit(lambda: [kill("core"), kill("actor")])
        try:
            summary = generate(config)
        finally:
            ended.set()
        killed.result()  # or what went wrong in it
    assert summary["restarts"] == 2
    assert summary["rows"] == 400 and summary["repeated_ids"] == 0 and "failed/quarantined" not in summary["reasons"]
    deadline = time.monotonic() + 60
    while engine_processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not engine_processes()


def progressed(tmp_path: Path, kills: int) -> bool:
    """Whether the engine has answered something since the last kill."""
    import json

    runs = list((tmp_path / "generate/_runs").glob("*.json"))
    answered = json.loads(runs[0].read_text())["pools"].get("p", {}).get("answered", 0) if runs else 0
    return bool(answered > 8 * (1 + 4 * kills))
