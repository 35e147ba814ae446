"""How each reply is read: its columns, which rows it settles and why."""

from __future__ import annotations

import math
from typing import Any

import pytest
from example_replies import ANSWER, chose, said, settled

from kun_ray.prompts import PromptConfig
from kun_ray.replies import (
    Reply,
    parse_choice,
    parse_label,
    parse_perplexity,
    parse_polish,
    parse_verdict,
    repeats,
    tidy,
)
from kun_ray.steps import LabelConfig, PerplexityConfig, PolishConfig, ScoreConfig

SCALE: dict[str, Any] = {"candidates": ["1", "2", "3", "4", "5"], "values": [0.0, 0.25, 0.5, 0.75, 1.0]}
KEYWORDS = "新闻 材料 图片 链接".split()  # noqa: SIM905


@pytest.mark.parametrize(
    ("text", "instruction"),
    [
        ("  请写一首诗。\n", "请写一首诗。"),
        ("请写一首诗。     以下是多余的话", "请写一首诗。"),
        ("请写一首诗。\n\n\n\n\n以下是多余的话", "请写一首诗。"),
        ("请写一首诗。\u3000\u3000\u3000\u3000\u3000多余", "请写一首诗。"),
        ("请写    一首诗。", "请写    一首诗。"),
        ("      \n请写一首诗。", "请写一首诗。"),
        ("请写一首诗。\n请写一首诗。\n 请写一首诗。 ", "请写一首诗。"),
        ("请写诗：\n一、春\n请写诗：\n二、夏", "请写诗：\n一、春\n二、夏"),
        ("\n \n", ""),
    ],
)
def test_tidy(text: str, instruction: str) -> None:
    assert tidy(text) == instruction


def test_label_keeps_a_good_instruction() -> None:
    assert parse_label(said(" 请写一首诗。 "), LabelConfig(reject_words=KEYWORDS)) == {"instruction": "请写一首诗。"}


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (said("写诗"), ("rejected", "instruction_short")),
        (said("请写" + "很" * 30), ("rejected", "instruction_long")),
        (said("请概括上面的材料。"), ("rejected", "keyword:材料")),
        (said("请看图片写新闻。"), ("rejected", "keyword:新闻")),
        (said("请写一首", "length"), ("failed", "truncated")),
        (said("", "length"), ("failed", "truncated")),
        (said(" \n "), ("failed", "unparsable")),
        (said("请写一首诗。"), (None, None)),
        (said("四个字啊"), (None, None)),
        (said("请" + "写" * 19), (None, None)),
        (said("写一首小诗。     图片"), (None, None)),
    ],
)
def test_label_outcomes(reply: Reply, outcome: tuple[str | None, str | None]) -> None:
    found = parse_label(reply, LabelConfig(reject_words=KEYWORDS, min_chars=4, max_chars=20))
    assert settled(found) == outcome
    assert found["instruction"] == (tidy(reply.text) or None), "kept for the reader, null when empty"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (said(ANSWER), (None, None)),
        (said("短" * 19), ("rejected", "answer_short")),
        (said(f"   {'短' * 3}   " + " " * 30), ("rejected", "answer_short")),
        (said(""), ("rejected", "answer_short")),
        (said(ANSWER + "好" * 6), ("rejected", "repetition")),
        (said(ANSWER + "我很好，" * 6), ("rejected", "repetition")),
        (said(ANSWER + "我们都很好。\n" * 6), ("rejected", "repetition")),
        (said(ANSWER + "哈" * 5), (None, None)),
        (said(ANSWER + "圆周长约 1000000000 米，3.3333333333。"), (None, None)),
        (said(ANSWER + "\n------------\n| --- | --- | --- | --- | --- | --- |\n……………………\n======="), (None, None)),
        (said(ANSWER + "作为一名助手"), ("rejected", "keyword:作为")),
        (said(ANSWER + "截至2023年"), ("rejected", "keyword:2023")),
        (said(ANSWER, "length"), ("failed", "truncated")),
    ],
)
def test_polish_outcomes(reply: Reply, outcome: tuple[str | None, str | None]) -> None:
    found = parse_polish(reply, PolishConfig(reject_words=["作为", "根据", "2023"]))
    assert settled(found) == outcome
    assert found["answer"] == (reply.text.strip() or None)


@pytest.mark.parametrize(
    ("text", "most", "found"),
    [
        ("aaaa", 3, True),
        ("aaa", 3, False),
        ("一二三" * 4, 3, True),
        ("一二三" * 3 + "一二", 3, False),
        ("=" * 50 + "好" * 4, 3, True),
        ("1-" * 9 + "甲1-" * 4, 3, True),
        ("x" + "长" * 41 + "y", 40, True),
    ],
)
def test_repeats_counts_units_in_a_row(text: str, most: int, found: bool) -> None:
    assert repeats(text, most) is found


def test_repeats_stays_quick_on_long_answers() -> None:
    assert not repeats("".join(chr(0x4E00 + i % 5000) for i in range(20_000)) + "-" * 5000, 5)


def test_choice_is_a_softmax_over_the_candidates() -> None:
    found = parse_choice(chose(math.log(0.03), math.log(0.01)), ScoreConfig())
    assert found == {"verdict": "好", "score": pytest.approx(0.75)}


@pytest.mark.parametrize(
    ("logprobs", "verdict", "score", "outcome"),
    [
        ((-0.1, -5.0), "好", 1 / (1 + math.exp(-4.9)), (None, None)),
        ((-5.0, -0.1), "差", 1 / (1 + math.exp(4.9)), ("rejected", "verdict_bad")),
        ((-1.0, -math.inf), "好", 1.0, (None, None)),
        ((-math.inf, -1.0), "差", 0.0, ("rejected", "verdict_bad")),
        ((-2000.0, -2001.0), "好", 1 / (1 + math.exp(-1)), (None, None)),
        ((-1.0, -1.2), "好", 1 / (1 + math.exp(-0.2)), ("rejected", "below_threshold")),
    ],
)
def test_choice_outcomes(
    logprobs: tuple[float, ...], verdict: str, score: float, outcome: tuple[str | None, str | None]
) -> None:
    found = parse_choice(chose(*logprobs), ScoreConfig(threshold=0.6))
    assert found["verdict"] == verdict and found["score"] == pytest.approx(score)
    assert settled(found) == outcome


@pytest.mark.parametrize("logprobs", [(-math.inf, -math.inf), (math.nan, -1.0), (-1.0, math.nan), (math.nan, math.nan)])
def test_choice_without_probabilities_is_unparsable(logprobs: tuple[float, ...]) -> None:
    assert parse_choice(chose(*logprobs), ScoreConfig()) == {"status": "failed", "reason": "unparsable"}


def test_choice_at_the_threshold_is_accepted() -> None:
    assert settled(parse_choice(chose(-1.0, -1.0), ScoreConfig(threshold=0.5))) == (None, None)


@pytest.mark.parametrize(
    ("probabilities", "verdict", "score", "outcome"),
    [
        ((0.0, 0.0, 0.1, 0.2, 0.7), "5", 0.9, (None, None)),
        ((0.0, 0.1, 0.5, 0.2, 0.2), "3", 0.625, ("rejected", "below_threshold")),
        ((0.1, 0.6, 0.1, 0.1, 0.1), "2", 0.375, ("rejected", "verdict_bad")),
    ],
)
def test_scale_of_five_with_the_pair(
    probabilities: tuple[float, ...], verdict: str, score: float, outcome: tuple[str | None, str | None]
) -> None:
    """Humpback's way: the score is the mean over the scale, not the most likely grade."""
    prompt = PromptConfig(user="指令：{instruction}\n回复：{text}")
    config = ScoreConfig(prompt=prompt, input="pair", threshold=0.7, **SCALE)
    found = parse_choice(chose(*(math.log(p) if p else -math.inf for p in probabilities)), config)
    assert found["verdict"] == verdict and found["score"] == pytest.approx(score)
    assert settled(found) == outcome


@pytest.mark.parametrize(
    ("reply", "verdict", "outcome"),
    [
        (said("判断：【好】"), "好", (None, None)),
        (said("【差】因为含糊"), "差", ("rejected", "verdict_bad")),
        (said("【好】……不，【差】"), "差", ("rejected", "verdict_bad")),
        (said("【差】……不，【好】"), "差", ("rejected", "verdict_bad")),
        (said("这条很好"), None, ("failed", "unparsable")),
        (said(""), None, ("failed", "unparsable")),
        (said("让我想一想", "length"), None, ("failed", "truncated")),
        (said("【好】因为它", "length"), "好", (None, None)),
    ],
)
def test_generated_verdicts(reply: Reply, verdict: str | None, outcome: tuple[str | None, str | None]) -> None:
    found = parse_verdict(reply, ScoreConfig(mode="generate"))
    assert found.get("verdict") == verdict
    assert settled(found) == outcome


def test_generated_verdict_in_a_tag_with_braces() -> None:
    config = ScoreConfig(mode="generate", tag='{"判断": "{}"}')
    assert parse_verdict(said('{"判断": "好"}'), config) == {"verdict": "好", "score": 1.0}


def test_generated_grade_is_below_threshold() -> None:
    config = ScoreConfig(mode="generate", threshold=0.8, tag="{}分", **SCALE)
    assert parse_verdict(said("4分"), config) == {
        "verdict": "4",
        "score": 0.75,
        "status": "rejected",
        "reason": "below_threshold",
    }


@pytest.mark.parametrize(
    ("perplexity", "outcome"),
    [
        (50.0, (None, None)),
        (100.0, (None, None)),
        (100.1, ("rejected", "perplexity")),
        (10.0, (None, None)),
        (9.9, ("rejected", "perplexity")),
        (None, ("failed", "unparsable")),
        (math.inf, ("failed", "unparsable")),
        (math.nan, ("failed", "unparsable")),
    ],
)
def test_perplexity_limits(perplexity: float | None, outcome: tuple[str | None, str | None]) -> None:
    found = parse_perplexity(Reply(9, 0, "measured", perplexity=perplexity), PerplexityConfig(max=100.0, min=10.0))
    assert settled(found) == outcome
    assert found["perplexity"] == (None if outcome[0] == "failed" else perplexity)


def test_perplexity_without_limits_only_records() -> None:
    assert parse_perplexity(Reply(9, 0, "measured", perplexity=1e9), PerplexityConfig()) == {"perplexity": 1e9}
