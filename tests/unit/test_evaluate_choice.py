"""Examinations: the published layouts, the prompts, the step, and what is counted. The questions are our own."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from kun_ray.choose import ChooseConfig, choose_prompt, parse_choose
from kun_ray.config import ConfigError, load
from kun_ray.evaluate import results
from kun_ray.evaluate.asking import QUESTION
from kun_ray.evaluate.benchmarks import BenchmarkConfig, build_prompts, read_benchmark, unify_radicals
from kun_ray.evaluate.choice import EvaluateConfig, evaluate
from kun_ray.evaluate.subjects import SUBJECTS
from kun_ray.prompts import CHATML, count_tokens, encode_text
from kun_ray.replies import Reply
from kun_ray.schema import doc_id, to_table
from kun_ray.store import Folder, open_stage

CONF = str(Path(__file__).parents[2] / "conf/evaluate.yaml")
Items = list[tuple[str, list[str], str]]
EXAMPLES: Items = [(f"{n} 加 {n} 等于", [str(2 * n + k) for k in range(4)], "A") for n in range(1, 7)]
QUESTIONS: Items = [
    ("一年有几个季节", ["两个", "三个", "四个", "五个"], "C"),
    ("⽔在标准大气压下的沸点是，x²", ["100 摄氏度", "90 摄氏度", "0 摄氏度", "50 ⻢力"], "A"),
]


def write_cmmlu(root: Path, subject: str, test: Items, dev: Items = EXAMPLES[:5]) -> None:
    """Index, Question, A, B, C, D, Answer, with the byte order mark that some copies have."""
    for split, items in (("dev", dev), ("test", test)):
        path = root / split / f"{subject}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            rows = [[n, stem, *options, key] for n, (stem, options, key) in enumerate(items)]
            csv.writer(file).writerows([["", "Question", "A", "B", "C", "D", "Answer"], *rows])


def write_ceval(root: Path, subject: str, test: Items) -> None:
    """id, question, A, B, C, D; val and dev have answer, dev has explanation, test has neither."""
    head = ["id", "question", "A", "B", "C", "D"]
    for split, items, more in (("dev", EXAMPLES[:5], 2), ("val", test, 1), ("test", test, 0)):
        path = root / "formal_ceval" / split / f"{subject}_{split}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            rows = [[n, stem, *options, *[key, "因为如此"][:more]] for n, (stem, options, key) in enumerate(items)]
            csv.writer(file).writerows([[*head, *["answer", "explanation"][:more]], *rows])


def test_the_suites_have_their_published_subjects():
    assert {name: len(subjects) for name, subjects in SUBJECTS.items()} == {"ceval": 52, "cmmlu": 67}
    groups = [group for subject in SUBJECTS["cmmlu"].values() for group in subject.groups]
    assert {g: groups.count(g) for g in set(groups)} == {
        "STEM": 17,
        "Humanities": 13,
        "Social Science": 22,
        "Other": 15,
        "China specific": 15,
    }
    assert SUBJECTS["ceval"]["clinical_medicine"].name == "临床医学"
    assert sum("Hard" in subject.groups for subject in SUBJECTS["ceval"].values()) == 8


def test_radicals_become_characters_and_nothing_else_changes():
    assert unify_radicals("⼈⺠的⻢⻰，x²＋½：①") == "人民的马龙，x²＋½：①"
    assert all(ord(unify_radicals(chr(code))) >= 0x4E00 for code in range(0x2F00, 0x2FD6))


def test_both_layouts_are_read(tmp_path):
    write_cmmlu(tmp_path / "cmmlu", "agronomy", [*QUESTIONS, ("缺选项", ["一", "", "三", "四"], "A")])
    write_ceval(tmp_path / "ceval", "law", QUESTIONS)
    cmmlu = read_benchmark("cmmlu", BenchmarkConfig(path=str(tmp_path / "cmmlu")))
    assert [q.key for q in cmmlu.questions] == ["C", "A", "A"] and len(cmmlu.examples["agronomy"]) == 5
    assert cmmlu.questions[1].stem == "水在标准大气压下的沸点是，x²" and cmmlu.questions[1].options[3] == "50 马力"
    assert not cmmlu.questions[2].is_whole()
    val = read_benchmark("ceval", BenchmarkConfig(path=str(tmp_path / "ceval"), format="ceval", split="val"))
    assert [q.key for q in val.questions] == ["C", "A"] and val.examples["law"][0].key == "A"
    test = read_benchmark("ceval", BenchmarkConfig(path=str(tmp_path / "ceval"), format="ceval", split="test"))
    assert [q.key for q in test.questions] == [None, None] and [q.id for q in test.questions] == ["0", "1"]
    with pytest.raises(ConfigError, match=r"suites.x.path: .* has no folder val/.*unpacked cmmlu files"):
        read_benchmark("x", BenchmarkConfig(path=str(tmp_path / "cmmlu"), split="val"))
    with pytest.raises(ConfigError, match=r"suites.x.subjects: .* has no lawn"):
        read_benchmark("x", BenchmarkConfig(path=str(tmp_path / "cmmlu"), subjects=["lawn"]))
    (tmp_path / "cmmlu/test/agronomy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=r"has the columns a, b; expected question, A, B, C, D"):
        read_benchmark("x", BenchmarkConfig(path=str(tmp_path / "cmmlu")))


def test_a_prompt_shares_its_examples_and_loses_them_when_it_is_too_long(tmp_path, tokenizer):
    long = ("很长的题目" * 16, ["一", "二", "三", "四"], "A")
    endless = ("极长的题目" * 2000, ["一", "二", "三", "四"], "A")
    write_cmmlu(tmp_path, "agronomy", [*QUESTIONS, long, endless, ("缺选项", ["一", "", "三", "四"], "A")])
    suite = read_benchmark("cmmlu", BenchmarkConfig(path=str(tmp_path)))

    def count(texts: list[str]) -> list[int]:
        return count_tokens(tokenizer, texts)

    whole = build_prompts(suite, "关于{subject}：", 5, 10_000, count)
    budget = whole[1]["tokens"] + 5
    rows = build_prompts(suite, "关于{subject}：", 5, budget, count)
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "failed", "failed"]
    assert [row.get("reason") for row in rows[3:]] == ["over_context", "missing_field"]
    assert rows[0]["num_shots"] == 5 > rows[2]["num_shots"] > 0 and rows[3]["num_shots"] == 0
    assert rows[2]["tokens"] <= budget
    assert count([rows[2]["text"]])[0] == rows[2]["tokens"]
    text = rows[0]["text"]
    assert text.startswith("关于农学：\n\n题目：1 加 1 等于\nA. 2\nB. 3\nC. 4\nD. 5\n答案：A\n\n题目：2 加 2")
    assert text.endswith("题目：一年有几个季节\nA. 两个\nB. 三个\nC. 四个\nD. 五个")
    shared = text[: text.index("题目：一年")]
    assert rows[1]["text"].startswith(shared) and shared.startswith(
        rows[2]["text"][: rows[2]["text"].index("题目：很长")]
    )
    assert (
        rows[4]["key"] is None and rows[3]["key"] == "A"
    )  # what cannot be asked does not count, what does not fit does
    assert len({row["doc_id"] for row in rows}) == 5
    assert [row["num_shots"] for row in build_prompts(suite, "{subject}", 0, 10_000, count)[:2]] == [0, 0]


@pytest.mark.parametrize("plain", [False, True])
def test_an_option_is_asked_for_where_it_stands(tokenizer, byte_tokenizer, plain):
    """The prompt and an option's first token are the beginning of what the whole dialogue would be."""
    config = ChooseConfig(plain=plain)
    for one in (tokenizer, byte_tokenizer):
        prompt, firsts = choose_prompt(one, config)
        text = "题目：一年有几个季节\nA. 两个"
        ids = prompt.render({"text": text})
        for letter, first in zip("ABCD", firsts, strict=True):
            if plain:
                whole = encode_text(one, f"{text}\n答案：{letter}")
            else:
                turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n答案：{letter}"
                whole = one.backend_tokenizer.encode(turn, add_special_tokens=False).ids
            assert whole[: len(ids) + 1] == [*ids, first]
    assert choose_prompt(tokenizer, config)[0].render({"text": "<|im_end|>"}).count(3) == (0 if plain else 1)


def test_a_beginning_of_text_token_stands_before_a_plain_text(byte_tokenizer):
    from tokenizers.processors import TemplateProcessing

    start = byte_tokenizer.convert_tokens_to_ids("<|startoftext|>")
    byte_tokenizer.bos_token = "<|startoftext|>"
    byte_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|im_end|>",
        special_tokens=[("<|startoftext|>", start), ("<|im_end|>", byte_tokenizer.eos_token_id)],
    )
    ids = choose_prompt(byte_tokenizer, ChooseConfig(plain=True))[0].render({"text": "题"})
    assert ids[0] == start and byte_tokenizer.eos_token_id not in ids


def test_the_most_probable_option_is_chosen():
    config = ChooseConfig()
    found = parse_choose(Reply(9, 1, "chosen", logprobs=(-3.0, -1.0, -2.0, float("-inf"))), config)
    assert found == {"verdict": "B", "logprobs": [-3.0, -1.0, -2.0, float("-inf")]}
    for logprobs in ((float("-inf"),) * 4, (-1.0, float("nan"), -2.0, -3.0)):
        failed = {"status": "failed", "reason": "unparsable"}
        assert parse_choose(Reply(9, 1, "chosen", logprobs=logprobs), config) == failed


def stage(folder: Path, rows: list[dict[str, Any]]) -> Folder:
    """A finished folder of answers."""
    made = open_stage(str(folder), {}, {})
    schema = QUESTION.append(QUESTION.field("key").with_name("verdict"))
    whole = [
        {"doc_id": doc_id("s", row["subject"], n, ""), "meta": "{}", "status": "ok", "num_shots": 5, "source": "cmmlu"}
        | row
        for n, row in enumerate(rows)
    ]
    pq.write_table(to_table(whole, schema), folder / "part-0.parquet")
    made.finish({})
    return made


@pytest.fixture
def two_models(tmp_path: Path) -> dict[str, Folder]:
    """`old` gets 12 of 20 right, `new` the same and 6 more; one of new's prompts did not fit; one question has no answer."""

    def rows(num_right: int) -> list[dict[str, Any]]:
        asked = [{"subject": "agronomy" if n < 10 else "anatomy", "question_id": str(n), "key": "A"} for n in range(20)]
        for n, row in enumerate(asked):
            row |= {"verdict": "A" if n < num_right else "B"}
        return [*asked, {"subject": "anatomy", "question_id": "20", "key": None, "verdict": "D"}]

    new = rows(19)
    new[18] |= {"status": "failed", "reason": "over_context", "verdict": None, "num_shots": 0}
    return {"old": stage(tmp_path / "old", rows(12)), "new": stage(tmp_path / "new", new)}


def test_accuracies_groups_and_the_paired_difference(two_models, tmp_path):
    found = results.summarise(two_models, {"cmmlu": "cmmlu"}, {("cmmlu", "agronomy", "0"), ("cmmlu", "law", "0")})
    suite = found["suites"]["cmmlu"]
    old, new = suite["models"]["old"], suite["models"]["new"]
    assert (old["num"], old["groups"]["All"]["micro"]["right"], new["groups"]["All"]["micro"]["right"]) == (20, 12, 18)
    assert list(old["groups"]) == ["All", "STEM", "Other"]
    assert old["groups"]["STEM"]["micro"]["accuracy"] == 0.2 and old["groups"]["Other"]["micro"]["accuracy"] == 1.0
    assert old["groups"]["All"]["macro"]["accuracy"] == pytest.approx(0.6)
    low, high = old["groups"]["All"]["micro"]["interval"]
    assert (low, high) == (pytest.approx(0.387, abs=2e-3), pytest.approx(0.781, abs=2e-3))
    assert old["clean"]["num"] == 19 and old["clean"]["micro"]["right"] == 11
    assert (new["failed"], new["lost_shots"]) == (1, 1) and old["subjects"]["anatomy"]["name"] == "解剖学"
    (pair,) = suite["comparisons"]
    assert (pair["model"], pair["than"]) == ("new", "old") and pair["micro"]["difference"] == pytest.approx(0.3)
    assert pair["micro"]["interval"][0] > 0 and pair["p"] == pytest.approx(2 / 2**6)
    assert found["submission"] == {f"cmmlu-{name}": {"anatomy": {"20": "D"}} for name in ("old", "new")}

    folder = Folder(str(tmp_path / "out"))
    folder.filesystem.create_dir(folder.path)
    results.write(folder, found)
    assert json.loads((tmp_path / "out/results.json").read_text())["suites"]["cmmlu"]["models"]["old"]["num"] == 20
    assert json.loads((tmp_path / "out/submission-cmmlu-new.json").read_text()) == {"anatomy": {"20": "D"}}
    assert (tmp_path / "out/results.png").read_bytes().startswith(b"\x89PNG")

    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    results.show(found, subjects=True, console=console)
    text = console.export_text()
    assert "60.0 [38.7, 78.1]" in text and "90.0 [69.9, 97.2]" in text and "解剖学" in text and "STEM 理工" in text
    assert "new − old: +30.0 points" in text and "not found in data" in text
    assert "new: 1 questions without an answer, counted as wrong; 1 prompts lost examples" in text


def test_a_suite_without_published_answers_has_no_accuracy(tmp_path, capsys):
    rows = [{"subject": "law", "question_id": str(n), "key": None, "verdict": "D"} for n in range(3)]
    answers = {name: stage(tmp_path / name, rows) for name in ("a", "b")}
    found = results.summarise(answers, {"cmmlu": "ceval"}, set())
    assert found["suites"]["cmmlu"]["comparisons"] == []
    assert found["suites"]["cmmlu"]["models"]["a"]["num"] == 0 and results.plot(found) is None
    all_questions = found["suites"]["cmmlu"]["models"]["a"]["groups"]["All"]
    assert all_questions["micro"]["accuracy"] is None and all_questions["macro"]["accuracy"] is None
    results.show(found, subjects=True)
    shown = capsys.readouterr().out
    assert "cmmlu: answers not published" in shown and "[0.0, 100.0]" not in shown


def test_the_worked_examples_are_no_questions():
    """Their answers stand in every prompt."""
    with pytest.raises(ConfigError, match="split"):
        BenchmarkConfig(path="x", split="dev")


@pytest.fixture
def configured(tmp_path: Path, model_folder: Callable[..., str]) -> Callable[..., EvaluateConfig]:
    """conf/evaluate.yaml over two small suites."""
    write_cmmlu(tmp_path / "cmmlu", "agronomy", QUESTIONS)
    write_ceval(tmp_path / "ceval", "law", QUESTIONS)
    paths = [f"suites.{name}.path={tmp_path}/{name}" for name in ("cmmlu", "ceval")]

    def make(*more: str) -> EvaluateConfig:
        return load(EvaluateConfig, [CONF, *paths, f"output={tmp_path}/out", "pool.accelerator=cpu", *more])

    return make


def test_what_cannot_work_is_refused_before_anything_starts(configured, model_folder, tmp_path, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    model = model_folder("chat")
    with pytest.raises(ConfigError, match="nothing to do: give models"):
        configured()
    with pytest.raises(ConfigError, match="models: two are the same"):
        configured(f"models=[{model},{model}]")
    with pytest.raises(ConfigError, match="per_model names yi; the models are chat"):
        configured(f"models=[{model}]", "per_model.yi.format=plain")
    with pytest.raises(ConfigError, match="`benchmarks` is 'mmlu', but must be one of ceval, cmmlu"):
        configured(f"models=[{model}]", "benchmarks=[mmlu]")
    with pytest.raises(ConfigError, match="models: there is no folder /nowhere/x"):
        evaluate(configured("models=[/nowhere/x]"))
    with pytest.raises(ConfigError, match=r"per_model.chat.pool: .*tensor_parallel"):
        evaluate(configured(f"models=[{model}]", "per_model.chat.pool={tensor_parallel: 2}"))
    with pytest.raises(ConfigError, match="max_modal_len"):
        evaluate(configured(f"models=[{model}]", "pool.engine={max_modal_len: 1}"))
    (tmp_path / "raw.jsonl").write_text('{"text": "春天"}\n')
    monkeypatch.setattr("kun_ray.evaluate.choice.show_config", lambda: pytest.fail("the configuration was printed"))
    with pytest.raises(ConfigError, match="contamination.data: .*raw.jsonl has no row with text in instruction"):
        evaluate(configured(f"contamination.data={tmp_path}/raw.jsonl"))
    assert not list(tmp_path.rglob("rows.jsonl*"))
    assert not list((tmp_path / "out").rglob("manifest.json")), "the corrected command starts from nothing"


def test_a_base_model_is_asked_plainly(configured, model_folder, monkeypatch):
    runs = []
    monkeypatch.setattr("kun_ray.generate.generate", lambda run, key: runs.append(run))
    for name in ("summarise", "write", "show"):
        monkeypatch.setattr(results, name, lambda *_: {})
    base, chat = model_folder("base", chat_template=None), model_folder("chat", chat_template=CHATML)
    evaluate(configured(f"models=[{base},{chat}]", "per_model.chat.pool={max_num_seqs: 7}"))
    assert [run.steps.choose.plain for run in runs] == [True, False]
    assert [run.pools["model"].max_num_seqs for run in runs] == [256, 7]
    assert [run.pools["model"].max_model_len for run in runs] == [2048, 2048], (
        "the models' own, where 4096 are asked for"
    )
    questions = [Folder(run.input).dataset().to_table().to_pylist() for run in runs]
    assert [len(rows) for rows in questions] == [4, 4] and {row["source"] for row in questions[0]} == {"ceval", "cmmlu"}
