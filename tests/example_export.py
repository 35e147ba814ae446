"""A finished generate stage to export, and what an export has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray.export import ExportConfig, export
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps
from kun_ray.store import open_stage

SCHEMA = with_steps(DOCUMENT, ["label", "score", "polish"])
FINGERPRINT = {
    "models": {"label": "/models/label|6b", "primary": "/models/primary"},
    "prompts": {"label": "写出这段文字最可能回答的指令：\n```\n{text}\n```"},
    "sampling": {"temperature": 0.5, "top_p": 0.95},
}


def row(number: int, source: str = "wudao", score: float | None = 0.9, **changes: Any) -> dict[str, Any]:
    text = f"第{number}篇文章。"
    return {
        "doc_id": doc_id(source, "part-0", number, text),
        "source": source,
        "text": text,
        "title": "标题",
        "meta": json.dumps({"file": "part-0", "offset": number}),
        "instruction": f"请介绍主题{number}",
        "verdict": "好",
        "score": score,
        "answer": f"关于主题{number}的回答。",
        "status": "ok",
        "reason": None,
        **changes,
    }


def stage(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA, num_parts: int = 2) -> str:
    """A finished generate stage, as the pool leaves it."""
    stage_folder = open_stage(str(folder), FINGERPRINT, {"steps": ["label", "score", "polish"]})
    for part in range(num_parts):
        pq.write_table(to_table(rows[part::num_parts], schema), folder / f"part-{part:04}.parquet", row_group_size=7)
    stage_folder.finish({"rows": len(rows)})
    return str(folder)


def run(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    changes.setdefault("input", stage(tmp_path / "generate", rows) if not (tmp_path / "generate").exists() else "")
    changes["input"] = changes["input"] or str(tmp_path / "generate")
    changes.setdefault("output", str(tmp_path / "export"))
    export(ExportConfig(**changes))
    return Path(changes["output"])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def summary_of(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def exported(folder: Path) -> set[str]:
    return {entry["id"] for path in (folder / "sharegpt").iterdir() for entry in lines(path)}


def ids(rows: list[dict[str, Any]]) -> set[str]:
    return {entry["doc_id"] for entry in rows}
