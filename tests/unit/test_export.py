"""The export stage on small finished generate stages: what it takes, what it writes, and that the counts are proved."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import kun_ray
from kun_ray import formats, selection
from kun_ray.config import ConfigError, KunError, load
from kun_ray.export import ExportConfig, export, prove
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps
from kun_ray.selection import SelectionConfig
from kun_ray.store import Folder, input_fingerprint, open_stage

SCHEMA = with_steps(DOCUMENT, ["label", "score", "polish"])
FINGERPRINT = {
    "models": {"label": "/models/label|6b", "primary": "/models/primary"},
    "prompts": {"label": "写出这段文字最可能回答的指令：\n```\n{text}\n```"},
    "sampling": {"temperature": 0.5, "top_p": 0.95},
}
ODD = 'a\u2028b\u2029c\u0085d\x00e"\\f\ud83d\ude00 \x1b[31m</s>|\ufeff\r\n尾'.encode("utf-16", "surrogatepass").decode(
    "utf-16"
)


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


def test_formats_have_the_keys_that_trainers_read(tmp_path: Path) -> None:
    rows = [row(n) for n in range(3)]
    out = run(tmp_path, rows)
    first = rows[0]
    assert lines(out / "alpaca/train.jsonl")[0] == {
        "instruction": first["instruction"],
        "input": "",
        "output": first["answer"],
    }
    assert lines(out / "sharegpt/train.jsonl")[0] == {
        "conversations": [{"from": "human", "value": first["instruction"]}, {"from": "gpt", "value": first["answer"]}],
        "id": first["doc_id"],
    }
    info = json.loads((out / "dataset_info.json").read_text())
    assert info["kun_alpaca"] == {
        "file_name": "alpaca/train.jsonl",
        "formatting": "alpaca",
        "columns": {"prompt": "instruction", "query": "input", "response": "output"},
    }
    assert info["kun_sharegpt"]["columns"] == {"messages": "conversations"}
    assert info["kun_sharegpt"]["tags"]["assistant_tag"] == "gpt"
    assert set(info) == {"kun_alpaca", "kun_sharegpt"}
    assert all((out / entry["file_name"]).is_file() for entry in info.values())


def test_parquet_keeps_the_lineage(tmp_path: Path) -> None:
    rows = [row(n) for n in range(30)]
    out = run(tmp_path, rows, formats=["parquet"])
    table = pq.read_table(out / "parquet/train.parquet")
    kept = {entry["doc_id"]: entry for entry in table.to_pylist()}
    for given in rows:
        found = kept[given["doc_id"]]
        for name in ("source", "title", "meta", "text", "instruction", "answer", "verdict"):
            assert found[name] == given[name]
        assert found["generate_digest"] == summary_of(out)["generate_digest"]
    generate = json.loads((table.schema.metadata or {})[b"kun_ray.generate_fingerprint"])
    assert generate["prompts"] == FINGERPRINT["prompts"]
    assert json.loads((out / "dataset_info.json").read_text()) == {}


def test_datasets_loads_every_config_offline(tmp_path: Path) -> None:
    rows = [row(n, answer=ODD if n == 7 else f"回答{n}") for n in range(60)]
    out = run(tmp_path, rows, valid_fraction=0.2)
    run(tmp_path, rows, valid_fraction=0.2, formats=["parquet"], output=f"{out}-parquet")
    script = (
        "import sys, json\nfrom datasets import load_dataset\n"
        "found = {}\n"
        "for place in (['', 'alpaca'], ['', 'sharegpt'], ['/parquet'], ['-parquet', 'parquet']):\n"
        "    data = load_dataset(sys.argv[1] + place[0], *place[1:])\n"
        "    found[place[-1]] = {s: [d.num_rows, sorted(d.column_names)] for s, d in data.items()}\n"
        "answers = [a for s in load_dataset(sys.argv[1]).values() for a in s['output']]\n"
        "print(json.dumps([found, answers]))\n"
    )
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_DATASETS_CACHE": str(tmp_path / "c"),
    }
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, answers = json.loads(done.stdout)
    summary = summary_of(out)
    for name, columns in {"alpaca": ["input", "instruction", "output"], "sharegpt": ["conversations", "id"]}.items():
        assert found[name] == {"train": [summary["train"], columns], "validation": [summary["valid"], columns]}
    for place in ("/parquet", "parquet"):
        assert {split: content[0] for split, content in found[place].items()} == {
            "train": summary["train"],
            "validation": summary["valid"],
        }
        assert {"doc_id", "text", "generate_digest"} <= set(found[place]["train"][1])
    assert ODD in answers


def test_odd_characters_stay_on_one_line(tmp_path: Path) -> None:
    out = run(tmp_path, [row(0, instruction=ODD, answer=ODD), row(1)])
    for name in ("alpaca", "sharegpt"):
        text = (out / name / "train.jsonl").read_bytes().decode("utf-8")
        assert len(text.splitlines()) == 2 == text.count("\n")
    assert lines(out / "alpaca/train.jsonl")[0]["output"] == ODD
    assert "尾" in (out / "alpaca/train.jsonl").read_text("utf-8")


def test_threshold_keeps_scores_equal_to_it(tmp_path: Path) -> None:
    rows = [row(0, score=0.9), row(1, score=0.8999), row(2, score=None), row(3, score=float("nan"))]
    out = run(tmp_path, rows, selection=SelectionConfig(threshold=0.9))
    assert exported(out) == ids(rows[:1])


def test_top_k_takes_the_best_and_breaks_ties_by_doc_id_whatever_the_order(tmp_path: Path) -> None:
    rows = [row(n, score=0.9 if n < 3 else 0.5) for n in range(20)]
    expected = ids(rows[:3]) | set(sorted(ids(rows[3:]))[:4])
    for name, ordered, num_parts in (("a", rows, 2), ("b", rows[::-1], 3)):
        given = stage(tmp_path / f"generate-{name}", ordered, num_parts=num_parts)
        config = {"input": given, "output": str(tmp_path / name), "selection": SelectionConfig(top_k=7)}
        assert exported(run(tmp_path, [], **config)) == expected


def test_random_selection_depends_on_the_seed_and_not_on_the_score(tmp_path: Path) -> None:
    rows = [row(n, score=n / 200) for n in range(200)]
    taken = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        config = SelectionConfig(top_k=50, select="random", seed=seed)
        taken[name] = exported(run(tmp_path, rows, output=str(tmp_path / name), selection=config))
    assert taken["a"] == taken["b"] != taken["c"]
    assert 0.25 < sum(entry["score"] for entry in rows if entry["doc_id"] in taken["a"]) / 50 < 0.75


@pytest.mark.parametrize(
    ("quotas", "top_k", "expected"),
    [
        ({"wudao": 0.25}, 40, {"wudao": 10, "skypile": 30}),
        ({"wudao": 0.25}, None, {"wudao": 25, "skypile": 50}),
        ({"wudao": 3, "skypile": 0}, None, {"wudao": 3, "skypile": 0}),
        ({"wudao": 1}, None, {"wudao": 50, "skypile": 50}),
    ],
)
def test_quotas_are_shares_or_counts(
    tmp_path: Path, quotas: dict[str, float], top_k: int | None, expected: dict[str, int]
) -> None:
    rows = [row(n, source=("wudao", "skypile")[n % 2], score=n / 100) for n in range(100)]
    out = run(tmp_path, rows, selection=SelectionConfig(quotas=quotas, top_k=top_k))
    assert {source: counts["exported"] for source, counts in summary_of(out)["sources"].items()} == expected
    best_wudao = [entry for entry in rows if entry["source"] == "wudao"][50 - expected["wudao"] :]
    assert {i for i in exported(out) if i in ids([r for r in rows if r["source"] == "wudao"])} == ids(best_wudao)


def test_a_quota_for_an_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KunError, match="wanjun.*the input are wudao"):
        run(tmp_path, [row(0)], selection=SelectionConfig(quotas={"wanjun": 5}))


def test_a_document_never_changes_its_split(tmp_path: Path) -> None:
    rows = [row(n, score=n / 300) for n in range(300)]
    valid = {}
    for name, top_k, fraction in (("all", None, 0.2), ("some", 100, 0.2), ("more", None, 0.5)):
        out = run(
            tmp_path, rows, output=str(tmp_path / name), valid_fraction=fraction, selection=SelectionConfig(top_k=top_k)
        )
        valid[name] = {entry["id"] for entry in lines(out / "sharegpt/valid.jsonl")}
    assert 30 < len(valid["all"]) < 90
    assert valid["some"] == valid["all"] & ids(rows[200:])
    assert valid["all"] < valid["more"]


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
    with pytest.raises(KunError, match="already holds README.md"):
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
    assert (tmp_path / "out" / "_SUCCESS").exists()
