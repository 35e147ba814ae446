"""The export stage on small finished generate stages: what it takes, what it writes, and that the counts are proved."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from example_export import SCHEMA, exported, lines, row, run, stage, summary_of

import kun_ray
from kun_ray import formats, selection
from kun_ray.config import ConfigError, KunError, load
from kun_ray.export import ExportConfig, export, prove
from kun_ray.schema import DOCUMENT, with_steps
from kun_ray.selection import SelectionConfig


def test_counts_add_up_and_every_file_holds_its_rows(tmp_path: Path) -> None:
    rows = [row(n, source=("wudao", "skypile")[n % 2], score=n / 100) for n in range(100)]
    rows += [row(n, status="rejected", reason="too_long", text=None, score=None) for n in range(100, 107)]
    rows += [row(n, source="wanjuan", status="failed", reason="truncated") for n in range(107, 110)]
    rows += [row(110, answer=" \n　"), row(111, instruction=None)]
    out = run(
        tmp_path,
        rows,
        valid_fraction=0.3,
        selection=SelectionConfig(threshold=0.2, top_k=50, quotas={"wudao": 20}),
    )
    summary = summary_of(out)
    assert summary["not_selected"] == {
        "not_ok": 10,
        "empty": 2,
        "below_threshold": 20,
        "over_quota": 20,
        "beyond_top_k": 10,
        "contaminated": 0,
    }
    assert (summary["rows"], summary["ok"], summary["rejected"], summary["failed"]) == (112, 102, 7, 3)
    assert summary["reasons"] == {"rejected/too_long": 7, "failed/truncated": 3}
    assert summary["train"] + summary["valid"] == 50 and summary["valid"] > 0
    assert summary["sources"]["wudao"] == {"rows": 59, "exported": 20}
    assert summary["sources"]["wanjuan"] == {"rows": 3, "exported": 0}
    assert len(summary["files"]) == 6
    for file in summary["files"]:
        content = (out / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"] and len(content) == file["bytes"]
        assert file["rows"] == summary[file["split"]]
    assert len(exported(out)) == 50
    assert not list(out.rglob("*.tmp"))


def test_prove_refuses_counts_that_do_not_add_up(tmp_path: Path) -> None:
    summary = summary_of(run(tmp_path, [row(n) for n in range(5)]))
    prove(summary)
    with pytest.raises(KunError, match="do not add up"):
        prove({**summary, "rows": 6})
    summary["files"][0]["rows"] = 4
    with pytest.raises(KunError, match="alpaca/train.jsonl holds 4 rows, but 5"):
        prove(summary)


def test_a_file_that_lost_rows_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        formats, "json_line", lambda value: b"" if "主题3" in str(value) else json.dumps(value).encode() + b"\n"
    )
    with pytest.raises(KunError, match="holds 4 rows, but 5 were chosen"):
        run(tmp_path, [row(n) for n in range(5)])
    assert not (tmp_path / "export" / "_SUCCESS").exists()


def test_text_as_input_or_as_reply(tmp_path: Path) -> None:
    rows = [row(0)]
    out = run(tmp_path, rows, with_text_as_input=True, output=str(tmp_path / "a"), formats=["alpaca", "sharegpt"])
    assert lines(out / "alpaca/train.jsonl")[0]["input"] == rows[0]["text"]
    human = lines(out / "sharegpt/train.jsonl")[0]["conversations"][0]["value"]
    assert human == f"{rows[0]['instruction']}\n{rows[0]['text']}"
    out = run(tmp_path, rows, reply="text", output=str(tmp_path / "b"), formats=["alpaca"])
    assert lines(out / "alpaca/train.jsonl")[0]["output"] == rows[0]["text"]


def test_a_run_without_score_or_answer_exports_what_it_can(tmp_path: Path) -> None:
    given = stage(tmp_path / "label-only", [row(n) for n in range(4)], with_steps(DOCUMENT, ["label"]))
    with pytest.raises(KunError, match="no `answer` column"):
        run(tmp_path, [], input=given)
    with pytest.raises(KunError, match="no `score` column"):
        run(tmp_path, [], input=given, reply="text", selection=SelectionConfig(threshold=0.5))
    assert summary_of(run(tmp_path, [], input=given, reply="text"))["train"] == 4


def test_a_part_whose_column_is_null_throughout_is_read_in_the_contract_types(tmp_path: Path) -> None:
    given = stage(tmp_path / "generate", [row(0)], num_parts=1)
    untyped = pa.Table.from_pylist([{name: row(1, score=None).get(name) for name in SCHEMA.names}])
    assert untyped.schema.field("score").type == pa.null()
    pq.write_table(untyped, tmp_path / "generate" / "part-9.parquet")
    assert pq.read_table(run(tmp_path, [], input=given) / "parquet/train.parquet")["score"].to_pylist() == [
        pytest.approx(0.9),
        None,
    ]


def test_nothing_to_export_says_why_and_writes_nothing(tmp_path: Path) -> None:
    rows = [row(0, score=0.3), row(1, status="rejected", reason="too_long")]
    with pytest.raises(
        KunError, match=r"2 rows read.*1 not_ok, 1 below_threshold; the best score is 0\.3.*1 rejected/too_long"
    ):
        run(tmp_path, rows, selection=SelectionConfig(threshold=0.9))
    assert not (tmp_path / "export").exists()
    out = run(tmp_path, rows, selection=SelectionConfig(threshold=0.2))
    assert summary_of(out)["train"] == 1


def test_all_rows_in_the_validation_split_is_refused(tmp_path: Path) -> None:
    number = next(n for n in range(99) if selection.in_valid(row(n)["doc_id"].encode(), 0.5))
    with pytest.raises(KunError, match="none is left to train on"):
        run(tmp_path, [row(number)], valid_fraction=0.5)


def test_an_incomplete_input_is_refused(tmp_path: Path) -> None:
    given = stage(tmp_path / "generate", [row(0)])
    (tmp_path / "generate" / "_SUCCESS").unlink()
    with pytest.raises(KunError, match="not complete"):
        run(tmp_path, [], input=given)
    assert not (tmp_path / "export").exists()


def test_a_doc_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KunError, match=f"more than once, such as {row(0)['doc_id']}"):
        run(tmp_path, [row(0), row(1), row(0)])


def test_the_same_export_again_does_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(n) for n in range(5)]
    out = run(tmp_path, rows)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    run(tmp_path, rows)
    assert "is complete (5 train, 0 valid rows): nothing to do" in capsys.readouterr().out
    assert before == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    with pytest.raises(KunError, match="selection.top_k: was null, now 2"):
        run(tmp_path, rows, selection=SelectionConfig(top_k=2))


def test_an_interrupted_export_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(n) for n in range(5000)]
    given = stage(tmp_path / "generate", rows)

    def cut(value: dict[str, Any]) -> bytes:
        if "主题4321" in str(value):
            raise KeyboardInterrupt
        return json.dumps(value).encode() + b"\n"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(formats, "json_line", cut)
        run(tmp_path, [], input=given)
    out = tmp_path / "export"
    assert not (out / "_SUCCESS").exists() and not (out / "README.md").exists()
    assert not list(out.rglob("train.*[!p]")), "a half file must not carry its final name"
    (out / "alpaca").mkdir(exist_ok=True)
    (out / "alpaca" / "valid.jsonl").write_text("stale\n")
    run(tmp_path, [], input=given)
    assert (out / "_SUCCESS").exists() and not (out / "alpaca" / "valid.jsonl").exists()
    assert summary_of(out)["train"] == 5000 == len(lines(out / "alpaca/train.jsonl"))


def test_files_of_others_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "README.md").write_text("mine")
    with pytest.raises(KunError, match=r"has no manifest.json.*\(README.md\); choose another output="):
        run(tmp_path, [row(0)])
    assert (tmp_path / "export" / "README.md").read_text() == "mine"
    with pytest.raises(ConfigError, match="lies in the input"):
        run(tmp_path, [], output=str(tmp_path / "generate" / "export"))


def test_rows_that_vanish_between_the_passes_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = stage(tmp_path / "generate", [row(n) for n in range(10)])
    split = selection.split

    def split_then_lose_a_part(*args: Any) -> Any:
        (tmp_path / "generate" / "part-0001.parquet").unlink()
        return split(*args)

    monkeypatch.setattr(selection, "split", split_then_lose_a_part)
    with pytest.raises(KunError, match="held 10 rows a moment ago"):
        run(tmp_path, [], input=given)
    assert not (tmp_path / "export" / "_SUCCESS").exists()


def test_data_card_states_sources_selection_and_prompts(tmp_path: Path) -> None:
    rows = [row(0), row(1, source="skypile-2023"), row(2, source="intranet"), row(3, source="wiki")]
    config = load(
        ExportConfig,
        [
            f"input={stage(tmp_path / 'generate', rows)}",
            f"output={tmp_path / 'export'}",
            "sources.intranet.licence=ours",
            "licence=cc-by-4.0",
            "selection.top_k=4",
        ],
    )
    export(config)
    card = (tmp_path / "export" / "README.md").read_text("utf-8")
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["language"] == ["zh"] and header["license"] == "cc-by-4.0" and header["size_categories"] == ["n<1K"]
    assert [entry["config_name"] for entry in header["configs"]] == ["alpaca", "sharegpt"]
    for expected in (
        "| wudao | WuDaoCorpora 2.0 base (BAAI) |",
        "| skypile-2023 | SkyPile-150B",
        "| intranet | intranet | ours |",
        "| wiki | wiki | not stated: fill it in |",
        "Check each corpus's current licence",
        "| selection.top_k | 4 |",
        "| models.label | /models/label\\|6b |",
        "````text\n写出这段文字",
        "| sampling.temperature | 0.5 |",
        summary_of(tmp_path / "export")["files"][0]["sha256"],
    ):
        assert expected in card


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("formats=[alpaca,csv]", "csv"),
        ("formats=[]", "empty"),
        ("selection.select=best", "top, random"),
        ("selection.top_k=0", "at least 1"),
        ("selection.quotas.wudao=2.5", "whole number"),
        ("selection.quotas.wudao=-1", "negative"),
        ("valid_fraction=1", "below 1"),
        ("dataset_name=a/b", "letters"),
        ("selection.treshold=1", "threshold"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(ExportConfig, ["input=nowhere", "output=nowhere", setting])


def test_the_job_runs_from_the_command_line(tmp_path: Path) -> None:
    given = stage(tmp_path / "generate", [row(n) for n in range(3)])
    root = Path(kun_ray.__file__).parent.parent
    command = [sys.executable, "jobs/export.py", "conf/export.yaml", f"input={given}", f"output={tmp_path / 'out'}"]
    done = subprocess.run(command, check=False, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "_SUCCESS").exists() and f"# input: {given}\n" in done.stdout
    other = subprocess.run([*command, "valid_fraction=0.5"], check=False, cwd=root, capture_output=True, text=True)
    assert other.returncode == 1 and "valid_fraction: was" in other.stderr and not other.stdout
