"""generate() with real engines: three steps in one pool on one engine, both ways of scoring."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from kun_ray import store
from kun_ray.config import load
from kun_ray.generate import GenerateConfig, generate
from kun_ray.schema import DOCUMENT, STATUSES, doc_id, to_table, with_steps


@pytest.mark.parametrize(("mode", "given"), [("choose", "instruction"), ("generate", "pair")])
def test_three_steps_on_one_engine(local_ray, model, steps_yaml, pair_prompt, texts, tmp_path, mode, given):
    source = store.open_stage(str(tmp_path / "prepare"), {}, {})
    rows = [
        {"doc_id": doc_id("s", "f", n, text), "source": "s", "text": text, "meta": "{}", "tokens": 40, "status": "ok"}
        for n, text in enumerate(texts)
    ]
    rows[3] |= {"status": "failed", "reason": "bad_json", "text": None}
    rows[4] |= {"text": texts[4] * 20}  # longer than the context
    pq.write_table(to_table(rows, DOCUMENT), source.child("part-0.parquet"))
    source.finish({})
    config = load(
        GenerateConfig,
        [
            str(steps_yaml),
            f"input={source.uri}",
            f"output={tmp_path}/generate",
            "pools.p.steps=[label,score,polish]",
            f"pools.p.model={model}",
            "pools.p.accelerator=cpu",
            "pools.p.max_num_seqs=8",
            "pools.p.max_model_len=512",
            "pools.p.rows_per_block=8",
            "pools.p.engine.dtype=float32",
            f"steps.score.mode={mode}",
            f"steps.score.input={given}",
            *([f"steps.score.prompt.user={pair_prompt}"] if given == "pair" else []),
        ],
    )
    summary = generate(config)

    table = store.Folder(config.output).dataset().to_table()
    found = {row["doc_id"]: row for row in table.to_pylist()}
    assert len(found) == table.num_rows == summary["rows"] == len(rows)
    assert sum(summary[status] for status in STATUSES) == len(rows)
    assert table.schema.equals(with_steps(DOCUMENT, ["label", "score", "polish"]))
    assert found[rows[3]["doc_id"]]["reason"] == "bad_json" and found[rows[4]["doc_id"]]["reason"] == "over_context"
    assert "failed/engine_error" not in summary["reasons"]
    labelled = [row for row in found.values() if row["instruction"]]
    scored = [row for row in found.values() if row["score_output_tokens"]]
    assert len(labelled) > 10 and len(scored) > 5 and any(row["answer"] for row in found.values()), summary["reasons"]
    for row in scored:
        assert (row["score_finish_reason"] == "chosen") == (mode == "choose")
        assert row["verdict"] is None or 0 <= row["score"] <= 1
    assert summary["pools"]["p"]["output_tokens"] == sum(
        row[f"{step}_output_tokens"] or 0 for row in found.values() for step in ("label", "score", "polish")
    )
