"""The evaluate stage on a real Ray with fake engines: every question once, a kill in between, two models, a judge."""

from __future__ import annotations

import collections
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import exam
import pytest
from chains import HERE, ids, kill_session, wait_until
from transformers import LlamaConfig, PreTrainedTokenizerFast

import kun_ray.generate
from kun_ray.config import KunError, load
from kun_ray.evaluate.choice import EvaluateConfig, evaluate
from kun_ray.evaluate.pairwise import PairwiseConfig, pairwise
from kun_ray.evaluate.rows import folder_name
from kun_ray.store import Folder

CONF = Path(__file__).parents[2] / "conf"
PER_SUBJECT = 90
SUBJECTS = ("agronomy", "anatomy", "arts")


@pytest.fixture
def setting(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """CMMLU's layout with 270 questions, two models without weights, and the arguments of the job."""
    for number, subject in enumerate(SUBJECTS):
        for split, count in (("dev", 5), ("test", PER_SUBJECT)):
            path = tmp_path / "cmmlu" / split / f"{subject}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                start = number * PER_SUBJECT
                rows = [
                    [n, f"第{n}题问的是什么", "甲", "乙", "丙", "丁", "ABCD"[n % 4]]
                    for n in range(start, start + count)
                ]
                csv.writer(file).writerows([["", "Question", "A", "B", "C", "D", "Answer"], *rows])
    for name in ("weak", "good"):
        LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=2048).save_pretrained(
            tmp_path / name
        )
        tokenizer.save_pretrained(tmp_path / name)
    yaml = tmp_path / "evaluate.yaml"
    yaml.write_text(
        f"suites: {{cmmlu: {{path: {tmp_path}/cmmlu}}}}\noutput: {tmp_path}/out\nmodels: [{tmp_path}/weak, {tmp_path}/good]\n"
        "pool: {accelerator: cpu, max_num_seqs: 8, rows_per_block: 8, num_cpus: 1}\nrows_per_file: 16\nray: {log_every_s: 0.5}\n"
    )
    return [str(yaml)]


def asked(journal: Path, model: str) -> collections.Counter[int]:
    """How often each question was put to a model."""
    files = journal.glob(f"{model}-*")
    return collections.Counter(int(line) for file in files for line in file.read_text().split())


def test_two_models_side_by_side_and_a_kill_in_between(cluster, setting, tmp_path, monkeypatch, capsys):
    journal = tmp_path / "journal"
    journal.mkdir()
    command = [
        sys.executable,
        str(HERE / "exam.py"),
        str(journal),
        *setting,
        "ray.num_cpus=6",
        "ray.object_store_gb=0.2",
    ]
    environ = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    answers = Folder(str(tmp_path / "out" / folder_name(str(tmp_path / "weak")) / "answers"))
    with (tmp_path / "log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env=environ, start_new_session=True)
        try:
            wait_until(lambda: len(answers.parts()) >= 3 or job.poll() is not None, "three files of answers")
        finally:
            kill_session(job)
    assert not answers.is_complete(), (tmp_path / "log").read_text()
    written = answers.dataset().count_rows()

    monkeypatch.setattr(kun_ray.generate, "Pool", exam.pool_class(journal))
    found = evaluate(load(EvaluateConfig, setting))
    for name in ("weak", "good"):
        folder = Folder(str(tmp_path / "out" / folder_name(str(tmp_path / name)) / "answers"))
        assert len(set(ids(folder))) == len(ids(folder)) == 270 and folder.is_complete()
        assert ids(folder) == ids(Folder(str(tmp_path / "out" / folder_name(str(tmp_path / name)) / "questions")))
        assert folder.read_json("summary.json")["ok"] == 270
    times = asked(journal, "weak")
    assert set(times) == set(range(270)) and 48 <= written <= sum(count == 1 for count in times.values())
    assert set(asked(journal, "good").values()) == {1}

    rows: list[dict[str, Any]] = answers.dataset().to_table().to_pylist()
    row = next(row for row in rows if "第7题" in row["text"].rsplit("题目：")[-1])
    assert (row["subject"], row["question_id"], row["key"], row["verdict"]) == ("agronomy", "7", "D", "A")
    assert row["logprobs"] == pytest.approx([-0.3567, -2.3026, -2.3026, -2.3026], abs=1e-3)
    assert row["num_shots"] == 5 and row["choose_finish_reason"] == "chosen" and row["choose_prompt_tokens"] > 100

    suite = found["suites"]["cmmlu"]
    right = {name: model["groups"]["All"]["micro"]["right"] for name, model in suite["models"].items()}
    assert right == {"weak": 90, "good": 270}
    assert suite["comparisons"][0]["micro"]["difference"] == pytest.approx(2 / 3)
    assert (tmp_path / "out/results.png").exists()
    assert json.loads((tmp_path / "out/results.json").read_text())["suites"]["cmmlu"]["models"]["good"]["num"] == 270
    shown = capsys.readouterr().out
    assert "good − weak: +66.7 points" in shown and "270 questions of 3 subjects" in shown

    before = sum(asked(journal, "weak").values())
    assert evaluate(load(EvaluateConfig, setting))["suites"]["cmmlu"]["models"].keys() == {"weak", "good"}
    assert sum(asked(journal, "weak").values()) == before, "a second run asks nothing"
    with pytest.raises(KunError, match=r"another run's data:\n  prompt.shots: was 5, now 2"):
        evaluate(load(EvaluateConfig, [*setting, "shots=2"]))


def test_a_judge_reads_each_pair_in_both_orders(cluster, setting, tmp_path, monkeypatch):
    for name, mark in (("old", lambda n: n < 2), ("new", lambda n: n % 2 == 0)):
        lines = [
            {"instruction": f"请说说这一件事之{n}", "output": f"{name}的回答{n}" + ("，妙。" if mark(n) else "。")}
            for n in range(20)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(kun_ray.generate, "Pool", exam.pool_class(tmp_path / "journal"))
    judge = [
        f"judge.model={tmp_path}/good",
        "judge.accelerator=cpu",
        "judge.max_model_len=2048",
        "judge.rows_per_block=8",
    ]
    places = [f"answers=[{tmp_path}/old.jsonl,{tmp_path}/new.jsonl]", f"output={tmp_path}/judged", "names=[old,new]"]
    found = pairwise(load(PairwiseConfig, [str(CONF / "pairwise.yaml"), *judge, *places]))
    assert (found["wins"], found["losses"], found["ties"]) == (
        9,
        1,
        10,
    )  # 妙: 2, 4 … 18 in new alone, 1 in old, 0 in both
    assert (found["judged"], found["consistent"], found["unjudged"]) == (20, 20, 0)
    assert found["decided"] == 20 and found["first_place"] == 10 and found["rate"] == pytest.approx(0.7)
    rows = Folder(str(tmp_path / "judged/answers")).dataset().to_table().to_pylist()
    assert len(rows) == 40 and {row["verdict"] for row in rows} == {"A", "B", "C"}
    lines = [json.loads(line) for line in (tmp_path / "judged/pairs.jsonl").read_text().splitlines()]
    assert sum(line["winner"] == "new" for line in lines) == 9
