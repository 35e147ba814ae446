"""Personal data and contamination, counted for the data card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from example_export import FINGERPRINT, SCHEMA, exported, row, run, stage, summary_of

from kun_ray.config import ConfigError, KunError
from kun_ray.export import ExportConfig
from kun_ray.schema import DOCUMENT, to_table
from kun_ray.selection import SelectionConfig
from kun_ray.store import Folder, input_fingerprint, open_stage


def prepared(folder: Path, filters: dict[str, Any]) -> str:
    """A finished prepare stage; what matters of it is what its manifest says about personal data."""
    made = open_stage(str(folder), {"corpora": {}, "filters": filters}, {})
    pq.write_table(to_table([row(0)], DOCUMENT), folder / "part-0.parquet")
    made.finish({})
    return str(folder)


def card_of(out: Path) -> str:
    text = (out / "README.md").read_text("utf-8")
    return text.split("## Personal data and contamination\n\n")[1].split("## Lengths")[0]


def test_the_card_counts_personal_data_of_what_is_exported(tmp_path: Path) -> None:
    def masked(number: int, kinds: dict[str, int], score: float = 0.9) -> dict[str, Any]:
        return row(number, score=score, meta=json.dumps({"file": "f", "masked": kinds}))

    rows = [masked(0, {"phone": 3}), masked(1, {"phone": 1, "email": 1}), masked(2, {"email": 1}, score=0.1), row(3)]
    rows += [row(n, status="rejected", reason="pii_id_card", text=None) for n in (4, 5)]
    rows += [row(6, meta=json.dumps({"title": 'so-called "masked" balls'}))]
    before = prepared(tmp_path / "prepare", {"pii": "mask", "pii_kinds": {"id_card": "reject", "ip": "keep"}})
    for name, given in (("known", before), ("moved", str(tmp_path / "gone/prepare")), ("unknown", "/gone")):
        stage = open_stage(
            str(tmp_path / name), {**FINGERPRINT, "input": input_fingerprint(Folder(before))}, {"input": given}
        )
        pq.write_table(to_table(rows, SCHEMA), tmp_path / name / "part-0.parquet")
        stage.finish({"rows": len(rows)})
        out = run(
            tmp_path,
            [],
            input=stage.uri,
            output=str(tmp_path / f"{name}-out"),
            selection=SelectionConfig(threshold=0.5),
        )
        assert summary_of(out)["personal_data"]["masked"] == {
            "email": 1,
            "id_card": 0,
            "bank_card": 0,
            "phone": 2,
            "ip": 0,
        }
        lines = set(card_of(out).splitlines())
        if name == "unknown":
            assert {"| phone | not known | 0 | 2 |", "| ip | not known | not checked | not checked |"} <= lines
        else:
            assert "| phone | masked | 0 | 2 |" in lines and "| id_card | document rejected | 2 | 0 |" in lines
            assert "| bank_card | masked | 0 | 0 |" in lines and "| ip | kept | not checked | not checked |" in lines


def test_the_card_shows_every_stage_that_wrote_the_rows(tmp_path: Path) -> None:
    """Label in a folder of its own, then score and polish, as the pipeline does."""

    def generated(name: str, before: str, steps: dict[str, Any]) -> str:
        own = {"input": input_fingerprint(Folder(before)), "pools": {"p": {"model": f"/m/{name}"}}, "steps": steps}
        made = open_stage(str(tmp_path / name), own, {"input": before})
        pq.write_table(to_table([row(0)], SCHEMA), tmp_path / name / "part-0.parquet")
        made.finish({"rows": 1})
        return made.uri

    before = prepared(tmp_path / "prepare", {"pii": "keep"})
    label = generated("label", before, {"label": {"prompt": "写出指令：\n{text}", "temperature": 0.25}})
    curate = generated("curate", label, {"score": {"temperature": 0.75}, "polish": {"prompt": "润色"}})
    text = (run(tmp_path, [], input=curate, output=str(tmp_path / "out")) / "README.md").read_text("utf-8")
    own = text.split("## Models, prompts and sampling\n")[1].split("## Checksums")[0]
    first, second = own.split("### score + polish\n")
    assert "### label\n" in first and "| pools.p.model | /m/label |" in first and "写出指令：\n{text}" in first
    assert "| steps.label.temperature | 0.25 |" in first and "digest" not in first
    assert "| pools.p.model | /m/curate |" in second and "| steps.score.temperature | 0.75 |" in second
    assert summary_of(tmp_path / "out")["generate_digest"] in second and "not known" not in own
    (tmp_path / "label/manifest.json").unlink()
    lost = run(tmp_path, [], input=curate, output=str(tmp_path / "lost")) / "README.md"
    assert "is not known: its folder is no longer there" in lost.read_text("utf-8")


def contamination(folder: Path, data: str, num_rows: int, held: list[str]) -> str:
    """The result of a check, as evaluate/contamination.py leaves it below jobs/evaluate.py's output."""
    (folder / "contamination").mkdir(parents=True)
    lines = [{"row": doc, "suite": "cmmlu", "question": str(n)} for n, doc in enumerate([*held, *held[:1]])]
    (folder / "contamination/rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    suites = {"cmmlu": {"questions": 50, "unusable": 4, "found": 3, "nearly_whole": 1}}
    counts = {"data": data, "ngram": 13, "rows": num_rows, "rows_with_questions": len(held), "suites": suites}
    (folder / "contamination/summary.json").write_text(json.dumps(counts))
    return str(folder)


def test_rows_with_questions_are_counted_or_left_out(tmp_path: Path) -> None:
    rows = [row(n, score=n / 10) for n in range(8)] + [row(8, status="rejected", reason="too_long")]
    given, held = stage(tmp_path / "generate", rows), [rows[n]["doc_id"] for n in (1, 6, 7)]
    check = contamination(tmp_path / "evaluate", given, 8, held)
    chosen = {"input": given, "contamination": check, "selection": SelectionConfig(threshold=0.5)}
    counted = run(tmp_path, [], **chosen)
    assert summary_of(counted)["contamination"]["exported"] == 2 and summary_of(counted)["train"] == 3
    text = card_of(counted)
    assert (
        "Of the 8 rows that were ok, 3 share 13 characters or words" in text
        and "; 2 of them are in this export" in text
    )
    assert "| cmmlu | 50 | 4 | 3 | 1 |" in text and "not checked" in text.split("Of the 8")[0]
    clean = run(tmp_path, [], **chosen, drop_contaminated=True, output=str(tmp_path / "clean"))
    assert exported(clean) == {rows[5]["doc_id"]} and "; 0 of them are in this export" in card_of(clean)
    assert summary_of(clean)["not_selected"] == {
        **{"not_ok": 1, "empty": 0, "below_threshold": 4, "over_quota": 0, "beyond_top_k": 0},
        "contaminated": 3,
    }
    assert "Questions of examinations in these rows: not checked." in card_of(
        run(tmp_path, [], input=given, output=f"{clean}2")
    )
    run(tmp_path, [], **chosen)  # complete: nothing to do
    with (tmp_path / "evaluate/contamination/rows.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(KunError, match="contamination: was"):
        run(tmp_path, [], **chosen)


def test_a_check_of_other_data_is_refused(tmp_path: Path) -> None:
    rows = [row(n) for n in range(4)]
    given = stage(tmp_path / "generate", rows)
    with pytest.raises(ConfigError, match=r"holds no contamination/rows\.jsonl"):
        run(tmp_path, [], input=given, contamination=str(tmp_path))
    for name, data, num_rows in (("a", "/other/generate", 4), ("b", given, 5)):
        check = contamination(tmp_path / name, data, num_rows, [])
        with pytest.raises(ConfigError, match=r"jobs/evaluate\.py with contamination\.data="):
            run(tmp_path, [], input=given, contamination=check)
    check = contamination(tmp_path / "c", given, 4, [rows[0]["doc_id"], "f" * 32])
    with pytest.raises(KunError, match="the input was made anew"):
        run(tmp_path, [], input=given, contamination=check)
    with pytest.raises(ConfigError, match="needs contamination="):
        ExportConfig(given, "out", drop_contaminated=True)
    assert not (tmp_path / "export").exists()
