"""An export to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from kun_ray import export as exporting
from kun_ray import store
from kun_ray.card import SourceConfig
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps

TERMS = {"wudao": SourceConfig("Web pages of ours", "ours")}


def exported(folder: Path, answer: str = "回答", **settings: Any) -> Path:
    """An export of three rows; `licence` and `sources` as a user would give them."""
    stage = store.open_stage(str(folder / "generate"), {"prompts": {"label": "写"}}, {})
    rows = [
        {"doc_id": doc_id("wudao", "f", n, ""), "source": "wudao", "text": "文", "meta": "{}", "status": "ok"}
        | {"instruction": f"问题{n}", "answer": answer}
        for n in range(3)
    ]
    pq.write_table(to_table(rows, with_steps(DOCUMENT, ["label", "polish"])), folder / "generate/part-0.parquet")
    stage.finish({"rows": 3})
    given = {"licence": "cc-by-4.0", "sources": TERMS, **settings}
    exporting.export(exporting.ExportConfig(str(folder / "generate"), str(folder / "export"), **given))
    return folder / "export"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
