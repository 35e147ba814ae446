"""Two orders, one verdict; what the judge reads; and whose answers are compared."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from kun_ray import formats
from kun_ray.config import ConfigError, KunError, load
from kun_ray.evaluate.pairwise import PairwiseConfig, _prepare, combine, describe_judge, fill, pairwise
from kun_ray.evaluate.rows import Pair, folder_name, paired, read_rows, reply, source_names
from kun_ray.names import short_names
from kun_ray.store import Folder

CONF = str(Path(__file__).parents[2] / "conf/pairwise.yaml")
OPTIONS = ["A", "B", "C"]


def verdicts(*said: str) -> dict[tuple[str, str], str | None]:
    """`AB`: the judge answers A in the first order and B in the second; `-` stands for no verdict."""
    return {
        (str(n), order): None if letter == "-" else letter
        for n, both in enumerate(said)
        for order, letter in zip(("01", "10"), both, strict=True)
    }


def test_a_pair_is_won_only_in_both_orders():
    said = ["AB", "BA", "AA", "BB", "CC", "AC", "A-"]
    pairs = [Pair(str(n), f"问题{n}", ("甲", "乙")) for n in range(len(said))] + [Pair("7", "问题", ("同", "同 "))]
    found = combine(pairs, verdicts(*said), ["old", "new"], OPTIONS)
    assert [line["winner"] for line in found["lines"]] == ["old", "new", "tie", "tie", "tie", "tie", None, "tie"]
    assert (found["wins"], found["losses"], found["ties"]) == (1, 1, 5) and found["pairs"] == 7
    assert found["rate"] == pytest.approx(0.5) and found["unjudged"] == 1
    assert (found["judged"], found["consistent"]) == (6, 3)  # AB, BA and CC
    assert (found["decided"], found["first_place"]) == (10, 6)  # C twice and once, and the one that is missing


def test_the_rate_is_the_second_models():
    pairs = [Pair(str(n), f"问题{n}", ("甲", "乙")) for n in range(40)]
    found = combine(pairs, verdicts(*["BA"] * 30, *["AB"] * 10), ["old", "new"], OPTIONS)
    assert found["rate"] == 0.75 and found["interval"][0] > 0.58 and found["interval"][1] < 0.9
    assert found["p"] == pytest.approx(0.0022, abs=2e-4)


def test_a_judge_that_never_decides_is_warned_of():
    pairs = [Pair(str(n), f"问题{n}", ("甲", "乙")) for n in range(3)]
    for said, warned in ((["CC"] * 3, True), (["CC", "CC", "AC"], False), (["--"] * 3, False)):
        shown = describe_judge(combine(pairs, verdicts(*said), ["old", "new"], OPTIONS))
        assert ("warning: the judge called every pair equal" in shown) == warned


def test_the_judge_sees_both_orders_and_braces_in_answers_stay():
    pair = Pair("1", "写出{first}的用法", ("甲{second}", "乙{instruction}"))
    prompt = "问{instruction}一{first}二{second}"
    assert fill(prompt, pair, turned=False) == "问写出{first}的用法一甲{second}二乙{instruction}"
    assert fill(prompt, pair, turned=True) == "问写出{first}的用法一乙{instruction}二甲{second}"


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def test_answers_are_paired_by_instruction(tmp_path):
    one = write(
        tmp_path / "a.jsonl",
        [{"instruction": "问一", "output": "甲一"}, {"instruction": "问二", "output": "甲二"}, {"instruction": "问三"}],
    )
    chat = [{"from": "human", "value": " 问二 "}, {"from": "gpt", "value": "乙二"}]
    two = write(tmp_path / "b.jsonl", [{"conversations": chat, "id": "x"}, {"instruction": "问三", "answer": "乙三"}])
    assert paired([one, two]) == [Pair("a.jsonl:2", "问二", ("甲二", "乙二"))]
    alpaca = write(tmp_path / "c.jsonl", [{"instruction": "问", "input": "材料", "output": "答"}])
    with pytest.raises(ConfigError, match=r"a.jsonl \(2 instructions.*c.jsonl \(1\) have no instruction in common"):
        paired([one, alpaca])
    (tmp_path / "d.jsonl").write_text("[1, 2]\n")
    with pytest.raises(KunError, match=r"d.jsonl, line 1: not a JSON object"):
        list(read_rows(str(tmp_path / "d.jsonl")))
    with pytest.raises(ConfigError, match="neither a finished generate stage"):
        list(read_rows(str(tmp_path)))


def test_conversations_are_told_apart_by_all_that_is_asked(tmp_path):
    said = [("system", "你是助手"), ("human", "问一"), ("gpt", "答一"), ("human", "问二"), ("gpt", "答二")]
    turns = [{"from": who, "value": text} for who, text in said]
    short = {"conversations": turns[:3]}
    rows = list(read_rows(write(tmp_path / "a.jsonl", [short, {"conversations": turns}])))
    assert [(row["instruction"], row["output"]) for row in rows] == [("问一", "答一"), ("问一\n答一\n问二", "答二")]


@pytest.mark.parametrize("column", ["text", "answer"])
def test_an_exports_answers_are_those_that_it_teaches(tmp_path, column):
    """Its Parquet keeps every column, whichever of them is the response."""
    columns = {"doc_id": ["x"], "instruction": ["问"], "text": ["原文"], "answer": ["润色"], "source": ["s"]}
    batch = pa.RecordBatch.from_pydict(columns)
    with formats._output(
        Folder(str(tmp_path)), "parquet", "parquet/train.parquet", batch.schema, column, False, {}
    ) as out:
        out(batch)
    (row,) = read_rows(str(tmp_path))
    assert (row["id"], reply(row)) == ("x", {"text": "原文", "answer": "润色"}[column]) and "answer" not in row


def test_a_models_folder_is_called_the_same_whatever_stands_beside_it(tmp_path):
    first, second = (str(tmp_path / name / "train_final/model") for name in "ab")
    assert short_names([first]) == ["train_final"] and short_names([first, second]) == [
        "a-train_final",
        "b-train_final",
    ]
    assert folder_name(first) != folder_name(second) and folder_name(first).startswith("train_final-")
    assert folder_name("org/yi") == folder_name("org/yi/")


def test_names_are_as_short_as_tells_them_apart():
    assert short_names(["runs/a/answers", "runs/b/answers", "hub/yi"]) == ["a-answers", "b-answers", "yi"]
    assert short_names(["s3://bucket/models/yi?region=x", "/models/kun/"]) == ["yi", "kun"]
    assert source_names(["x", "y"], ["旧", "新"]) == ["旧", "新"]
    with pytest.raises(ConfigError, match="two are the same"):
        source_names(["x", "x"], [])
    with pytest.raises(ConfigError, match="2 are needed"):
        source_names(["x", "y"], ["旧"])


def test_each_pair_becomes_two_rows_and_a_long_one_fails_alone(tmp_path, model_folder):
    model = model_folder(context=700)
    answers = [f"answers=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]", f"output={tmp_path}/out", f"judge.model={model}"]
    config = load(PairwiseConfig, [CONF, *answers, "judge.accelerator=cpu", "judge.max_model_len=700"])
    pairs = [
        Pair("1", "说说春天", ("春天来了。", "花开了。")),
        Pair("2", "说说夏天", ("热。", "热。")),
        Pair("3", "说说秋天", ("叶子落了。" * 300, "凉了。")),
    ]
    run = _prepare(config, pairs)
    from kun_ray.store import Folder

    rows = Folder(run.input).dataset().to_table().to_pylist()
    assert [(row["question_id"], row["subject"], row["status"]) for row in rows] == [
        ("0", "01", "ok"),
        ("0", "10", "ok"),
        ("2", "01", "failed"),
        ("2", "10", "failed"),
    ]
    first, second = rows[0]["text"], rows[1]["text"]
    assert first.index("春天来了") < first.index("花开了") and second.index("花开了") < second.index("春天来了")
    assert rows[2]["reason"] == "over_context" and len({row["doc_id"] for row in rows}) == 4


def test_without_a_gpu_the_judges_own_key_is_named(tmp_path, model_folder, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gpus = "ray._private.accelerators.NvidiaGPUAcceleratorManager.get_current_node_num_accelerators"
    monkeypatch.setattr(gpus, lambda: 0)
    answers = [
        write(tmp_path / f"{name}.jsonl", [{"instruction": "说说春天", "output": name}]) for name in ("first", "second")
    ]
    argv = [f"answers=[{','.join(answers)}]", f"output={tmp_path}/out", f"judge.model={model_folder()}"]
    with pytest.raises(ConfigError, match=r"needs 1 GPUs, but this machine has 0: .* set judge\.accelerator=cpu"):
        pairwise(load(PairwiseConfig, [CONF, *argv]))


def test_the_demos_judge_reads_its_pairs(tmp_path, model_folder):
    """conf/demo/pairwise.yaml, over a model that is like the demo's in its context."""
    conf = str(Path(CONF).parent / "demo/pairwise.yaml")
    config = load(PairwiseConfig, [conf, f"judge.model={model_folder(context=2048)}", f"output={tmp_path}/out"])
    run = _prepare(config, [Pair("1", "说说春天", ("春天来了。" * 25, "花开了。" * 30))])
    assert run.pools["model"].accelerator == "cpu"
    assert Folder(run.input).dataset().to_table()["status"].to_pylist() == ["ok", "ok"]
