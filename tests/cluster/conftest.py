"""One Ray for all tests of this folder, stages to run over, and a chain of fake engines to run on them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from chains import HERE, Chain
from transformers import LlamaConfig, PreTrainedTokenizerFast

import kun_ray.generate
from kun_ray import store
from kun_ray.schema import DOCUMENT, doc_id, to_table


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """A local Ray of eight logical CPUs whose workers find the fake engine."""
    folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")  # short: Ray's sockets lie below it
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), before]))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    for attempt in range(3):
        try:
            ray.init(
                "local",
                num_cpus=8,
                object_store_memory=300_000_000,
                include_dashboard=False,
                logging_level="ERROR",
                log_to_driver=False,
                _temp_dir=folder,
            )
            break
        except Exception:  # on a loaded machine Ray may not start within its own 30 s
            ray.shutdown()
            if attempt == 2:
                raise
    yield
    ray.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A model folder with a tokenizer and no weights: all that a fake engine needs."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=2048).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def documents(tmp_path: Path) -> Callable[..., store.Folder]:
    """Writes a finished prepare stage: row n says 第n篇; `marks` gives rows a mark (see fake.py).
    `rejected` rows are settled already; `long` ones exceed the engine's context."""

    def make(
        num_rows: int,
        marks: dict[int, str] | None = None,
        rejected: Any = (),
        long: Any = (),
        rows_per_part: int = 100,
    ) -> store.Folder:
        folder = store.open_stage(str(tmp_path / "prepare"), {"rows": num_rows}, {})
        rows = []
        for n in range(num_rows):
            mark = (marks or {}).get(n, "")
            text = (
                f"第{n:04d}篇"
                + (f"〔{mark}〕" if mark else "")
                + "讲的是一件很平常的小事。" * (100 if n in long else 1)
            )
            row = {"doc_id": doc_id("test", "file", n, text), "source": "test", "text": text, "meta": "{}"}
            row |= {"title": f"{n}", "tokens": 30, "status": "ok"}
            if n in rejected:
                row |= {"text": None, "status": "rejected", "reason": "too_short"}
            rows.append(row)
        for start in range(0, num_rows, rows_per_part):
            table = to_table(rows[start : start + rows_per_part], DOCUMENT)
            pq.write_table(table, folder.child(f"part-{start:06d}.parquet"))
        folder.finish(store.prove_counts(folder, num_rows))
        return folder

    return make


@pytest.fixture
def chain(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Chain]:
    """Makes a Chain over a finished stage and lets kun_ray.generate build its fake pools. Keywords are Plan's fields."""

    def make(source: store.Folder, pools: dict[str, list[str]] | None = None, **plan: Any) -> Chain:
        behaviour = fake.Plan(journal=str(tmp_path / "journal"), **plan)
        monkeypatch.setattr(kun_ray.generate, "Pool", fake.pool_class(behaviour))
        each = {"model": model, "accelerator": "cpu", "max_num_seqs": 16, "rows_per_block": 16, "num_cpus": 1}
        steps = pools or {"label": ["label"], "chat": ["score", "polish"]}
        config = {
            "input": source.uri,
            "output": str(tmp_path / "generate"),
            "pools": {name: {**each, "steps": of_pool} for name, of_pool in steps.items()},
            "steps": {
                "label": {"prompt": {"user": "label:{text}"}, "sampling": {"max_tokens": 64}},
                "score": {"prompt": {"user": "score:{instruction}"}},
                "polish": {"prompt": {"user": "polish:{instruction}|{text}"}, "sampling": {"max_tokens": 64}},
            },
            "rows_per_file": 32,
            "max_waiting_rows": 64,
            "ray": {"log_every_s": 0.5},
        }
        path = tmp_path / "generate.yaml"
        path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False))
        return Chain(behaviour, path, source.uri, config["output"])

    return make
