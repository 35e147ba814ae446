"""A finished stage as input, and a generate configuration over it: what preflight and headroom look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.config import load
from kun_ray.generate import GenerateConfig
from kun_ray.schema import DOCUMENT, doc_id, to_table
from kun_ray.store import Folder, open_stage, require_complete

PROMPTS = str(Path(__file__).parents[1] / "conf/prompts.yaml")
SHORT = ["steps.label.sampling.max_tokens=64", "steps.polish.sampling.max_tokens=64"]


def row(number: int, tokens: int | None = 100, status: str = "ok", **more: Any) -> dict[str, Any]:
    found = {"doc_id": doc_id("s", "f", number, ""), "source": "s", "text": "文", "tokens": tokens, "status": status}
    return {**found, "reason": None if status == "ok" else "too_long", **more}


def finished(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema = DOCUMENT) -> Folder:
    """A finished stage with the given rows."""
    stage = open_stage(str(folder / "in"), {}, {})
    pq.write_table(to_table(rows, schema), folder / "in/part-0.parquet")
    stage.finish({})
    return require_complete(stage.uri)


def configured(source: Folder, model: str, steps: str, *more: str) -> GenerateConfig:
    argv = [
        PROMPTS,
        f"input={source.uri}",
        "output=out",
        f"pools.p.model={model}",
        f"pools.p.steps=[{steps}]",
        *SHORT,
        *more,
    ]
    return load(GenerateConfig, argv)
