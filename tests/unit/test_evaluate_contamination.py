"""Questions found in training data: what counts as the same, what is a phrase, and which rows are listed."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from kun_ray.config import ConfigError
from kun_ray.contents import render_exam
from kun_ray.evaluate.benchmarks import Benchmark, Question
from kun_ray.evaluate.contamination import (
    ContaminationConfig,
    build_index,
    check,
    dirty_questions,
    matches,
    require_text,
    units,
)
from kun_ray.inspection import read_contamination
from kun_ray.schema import DOCUMENT, doc_id, to_table, with_steps
from kun_ray.store import Folder, open_stage

STEM = "下列哪一种作物最适合在干旱地区种植并且能够固定空气中的氮"
OPTIONS = ("大豆", "水稻", "莲藕", "慈姑")


def suite(*stems: str) -> Benchmark:
    return Benchmark("cmmlu", "cmmlu", [Question("agronomy", str(n), s, OPTIONS, "A") for n, s in enumerate(stems)], {})


def test_units_are_characters_and_words():
    assert len(units("在2023年，ＧＰＴ-3 出现！")) == len(["在", "2023", "年", "gpt", "3", "出", "现"])
    assert units("⼈⺠") == "人民" and units("ＡＢＣ abc") == units("abc ABC")
    assert units("abc中文def") == units("ABC 中文 DEF") != units("abd中文def")
    assert unicodedata.category(units("word")) == "Co"


@pytest.mark.parametrize(
    "text",
    [
        STEM,
        f"问：{STEM}？答：大豆。",
        STEM.replace("干旱", "干　旱，").replace("种", "種")
        + "大豆水稻莲藕慈姑",  # blanks, marks and one other character
        STEM.replace("氮", "氮").replace("作物", "作⽤").replace("下列", ""),
    ],
)
def test_a_question_is_found_through_small_changes(text):
    assert 0 in matches(build_index([suite(STEM)], 13, 10), text)


def test_letters_before_options_hide_no_question():
    """A stem that is shorter than an n-gram, with its options as examinations print them and as WanJuan's records become text."""
    question = Question("geography", "0", "法国的首都是哪座城", ("巴黎城", "里昂城", "马赛城", "南特城"), "A")
    index = build_index([Benchmark("cmmlu", "cmmlu", [question], {})], 13, 10)
    assert matches(index, question.block() + "\n答案：A")[0][0] == 1.0
    options = {f"option_{letter}": option for letter, option in zip("abcd", question.options, strict=True)}
    exam = render_exam({"q_main": question.stem + "？", **options, "std_ans": "A"})
    assert exam is not None and matches(index, exam)[0][0] == 1.0


def test_share_is_that_of_the_questions_ngrams():
    index = build_index([suite(STEM)], 13, 10)
    assert matches(index, STEM + "".join(OPTIONS))[0][0] == 1.0
    share, gram = matches(index, f"有人问{STEM[:15]}，不知道。")[0]
    assert share == pytest.approx(3 / index.sizes[0]) and gram == STEM[:13]
    assert matches(index, STEM[:12]) == {} and matches(index, "") == {}


def test_a_phrase_of_many_questions_is_no_question():
    phrase = "根据上述材料可以得出的正确结论有以下几项"
    index = build_index([suite(*(f"第{n}题讲的是各不相同的事情，{phrase}" for n in "甲乙丙丁戊"))], 13, 3)
    assert matches(index, phrase) == {} and set(matches(index, f"第丙题讲的是各不相同的事情，{phrase}")) == {2}
    short = build_index(
        [Benchmark("c", "cmmlu", [Question("arts", "0", "短题", ("一", "二", "三", "四"), "A")], {})], 13, 10
    )
    assert short.sizes == [0]


def generate_stage(folder: Path, answers: list[str]) -> str:
    made = open_stage(str(folder), {}, {})
    rows = [
        {"doc_id": doc_id("s", "f", n, ""), "source": "wudao", "text": "文", "meta": "{}", "status": "ok"}
        | {"instruction": f"问题{n}", "answer": answer}
        for n, answer in enumerate(answers)
    ]
    rows[0] |= {"status": "rejected", "reason": "too_short"}
    pq.write_table(to_table(rows, with_steps(DOCUMENT, ["label", "polish"])), folder / "part-0.parquet")
    made.finish({})
    return made.uri


def test_a_generate_stage_is_searched_and_its_rows_are_listed(tmp_path, capsys):
    data = generate_stage(tmp_path / "generate", [STEM, "好天气", f"答案在这里：{STEM}，{''.join(OPTIONS)}", STEM[:14]])
    output = Folder(str(tmp_path / "out"))
    found = check(
        ContaminationConfig(data=data), [suite(STEM, "另外一道完全没有出现过的题目，问的是天上有几颗星")], output
    )
    assert (found["rows"], found["rows_with_questions"]) == (3, 2)  # the rejected row is no data
    assert found["suites"]["cmmlu"] == {"questions": 2, "unusable": 0, "found": 1, "nearly_whole": 1}
    for given in ("out", "out/contamination"):  # as an export reads it
        read = read_contamination(str(tmp_path / given), data, 3)
        assert sorted(read.doc_ids.tolist()) == sorted(doc_id("s", "f", n, "").encode() for n in (2, 3))
    lines = [json.loads(line) for line in (tmp_path / "out/contamination/rows.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [doc_id("s", "f", n, "") for n in (2, 3)]
    assert [line["share"] for line in lines] == [1.0, pytest.approx(0.083, abs=0.02)]
    assert lines[0] | {"row": "", "match": ""} == {
        "row": "",
        "source": "wudao",
        "suite": "cmmlu",
        "subject": "agronomy",
        "question": "0",
        "share": 1.0,
        "match": "",
    }
    asked = suite(STEM, "另外一道完全没有出现过的题目，问的是天上有几颗星")
    checked, dirty = dirty_questions(output, [asked])
    assert checked is not None and checked["data"] == data and dirty == {("cmmlu", "agronomy", "0")}
    assert dirty_questions(Folder(str(tmp_path)), [asked]) == (None, set())
    assert "2 of 3 rows share 13 units in a row with a question" in capsys.readouterr().out
    assert dirty_questions(output, [suite("与上次检查时不同的一道题目，编号却是一样的")]) == (None, set())
    assert "its check was of other questions of cmmlu" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "parquet"])
def test_an_export_is_searched_in_whichever_format_it_has(tmp_path, form):
    (tmp_path / form).mkdir()
    rows = [{"instruction": "问", "input": "", "output": STEM}, {"instruction": "问", "input": "", "output": "别的"}]
    if form == "parquet":
        pq.write_table(
            to_table(
                [{"doc_id": "x", "source": "s", "status": "ok", "answer": STEM}], with_steps(DOCUMENT, ["polish"])
            ),
            tmp_path / form / "train.parquet",
        )
    elif form == "sharegpt":
        rows = [{"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": STEM}], "id": "x"}]
    if form != "parquet":
        for split in ("train", "valid"):
            (tmp_path / form / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check(ContaminationConfig(data=str(tmp_path)), [suite(STEM)], Folder(str(tmp_path / "out")))
    assert found["rows_with_questions"] == (1 if form == "parquet" else 2)


def test_data_without_the_columns_are_refused(tmp_path):
    data = generate_stage(tmp_path / "generate", ["一", "二"])
    with pytest.raises(ConfigError, match="has no row with text in output"):
        require_text(ContaminationConfig(data=data, columns=["output"]))
    require_text(ContaminationConfig(data=data))
