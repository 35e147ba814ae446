"""One Ray for all tests of this folder, stages to run over, and a chain of fake engines to run on them."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import pytest
import ray
from chains import HERE, Chain, write_chain, write_documents
from transformers import LlamaConfig, PreTrainedTokenizerFast

import kun_ray.generate
from kun_ray import store


@pytest.fixture(scope="package")
def cluster() -> Iterator[None]:
    """A local Ray of eight logical CPUs whose workers find the fake engine."""
    folder = tempfile.mkdtemp(prefix="kr", dir="/tmp")  # short: Ray's sockets lie below it
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *([before] if before else [])])
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

    return functools.partial(write_documents, tmp_path / "prepare")


@pytest.fixture
def chain(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Chain]:
    """Makes a Chain over a finished stage and lets kun_ray.generate build its fake pools. Keywords are Plan's fields."""

    def make(source: store.Folder, pools: dict[str, list[str]] | None = None, **plan: Any) -> Chain:
        behaviour = fake.Plan(journal=str(tmp_path / "journal"), **plan)
        monkeypatch.setattr(kun_ray.generate, "Pool", fake.pool_class(behaviour))
        return write_chain(tmp_path, source, model, behaviour, pools)

    return make
