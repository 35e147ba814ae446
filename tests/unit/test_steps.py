"""Steps: what each asks of an engine, and which configurations contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest
from example_replies import ANSWER, chose, said, settled
from transformers import PreTrainedTokenizerFast

from kun_ray.config import ConfigError
from kun_ray.prompts import PromptConfig, encode_text
from kun_ray.replies import Reply
from kun_ray.steps import LabelConfig, PolishConfig, Sampling, ScoreConfig, StepsConfig, build_step

STEPS = StepsConfig(
    label=LabelConfig(prompt=PromptConfig(user="回复：{text}\n指令："), sampling=Sampling(max_tokens=64)),
    score=ScoreConfig(prompt=PromptConfig(user="指令：{instruction}")),
    polish=PolishConfig(prompt=PromptConfig(user="知道：{text}\n请答：{instruction}")),
)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"input": "both"}, "`score.input` is 'both', but must be one of instruction, pair"),
        ({"mode": "guess"}, "`score.mode` is 'guess'"),
        ({"candidates": ["好"], "values": [1.0]}, "at least two"),
        ({"candidates": ["好", "中", "差"]}, "one value per candidate"),
        ({"values": [5.0, 1.0]}, "score.values must lie between 0 and 1"),
        ({"threshold": 3.5}, "score.threshold must lie between 0 and 1"),
        ({"tag": "好"}, "score.tag needs {}"),
        ({"prompt": PromptConfig(user="指令：")}, "must name {instruction}"),
        ({"prompt": PromptConfig(user="{{instruction}}")}, "must name {instruction}"),
        ({"prompt": PromptConfig(user="{instruction}{text}")}, "must not name {text} when score.input is instruction"),
        ({"prompt": PromptConfig(user="{instruction}", system="{text}")}, "must not name {text}"),
        ({"prompt": PromptConfig(user="{instruction}"), "input": "pair"}, "must name {text} when score.input is pair"),
        ({"prompt": PromptConfig(user="{instruction}{answer}")}, "must not name {answer}"),
    ],
)
def test_score_config_that_contradicts_itself(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ScoreConfig(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LabelConfig(prompt=PromptConfig(user="写一条指令")), "steps.label.prompt must name {text}"),
        (lambda: LabelConfig(prompt=PromptConfig(user="{text}{answer}")), "must not name {answer}"),
        (lambda: PolishConfig(prompt=PromptConfig(user="{text}")), "steps.polish.prompt must name {instruction}"),
        (lambda: Sampling(temperature=-0.1), "temperature"),
        (lambda: Sampling(top_p=0.0), "top_p"),
        (lambda: Sampling(top_p=1.1), "top_p"),
        (lambda: Sampling(max_tokens=0), "max_tokens"),
        (lambda: Sampling(repetition_penalty=0.0), "repetition_penalty"),
    ],
)
def test_other_configs_that_cannot_work(build: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build()
    assert words in str(caught.value)


def test_a_step_that_is_not_configured(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"a pool runs `label`, but steps\.label is not configured"):
        build_step("label", StepsConfig(), tokenizer)


def test_built_steps_generate_choose_or_measure(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"text": "爬山很好", "instruction": "写爬山"}
    label, score, polish, perplexity = (
        build_step(n, STEPS, tokenizer) for n in ("label", "score", "polish", "perplexity")
    )
    assert label.sampling is not None and polish.sampling is not None and label.sampling.max_tokens == 64
    assert score.sampling is None and len(score.candidates) == 2
    assert perplexity.sampling is None and not perplexity.candidates
    assert perplexity.prompt.render(row) == encode_text(tokenizer, "爬山很好"), "no chat template: the document itself"
    assert tokenizer.decode(score.prompt.render(row)).endswith("assistant\n【"), "the tag is begun in the prompt"
    assert label.parse(said("请写一段话"))["instruction"] == "请写一段话"
    assert score.parse(chose(-0.1, -3.0))["verdict"] == "好"
    assert polish.parse(said(ANSWER))["answer"] == ANSWER
    assert perplexity.parse(Reply(9, 0, "measured", perplexity=2.0)) == {"perplexity": 2.0}


def test_each_step_parses_with_its_own_config(tokenizer: PreTrainedTokenizerFast) -> None:
    strict = StepsConfig(label=LabelConfig(prompt=PromptConfig(user="{text}"), min_chars=9))
    steps = [build_step("label", config, tokenizer) for config in (STEPS, strict)]
    assert [settled(step.parse(said("请写一段话")))[1] for step in steps] == [None, "instruction_short"]


def test_score_that_generates_has_no_candidates(tokenizer: PreTrainedTokenizerFast) -> None:
    config = StepsConfig(score=ScoreConfig(prompt=PromptConfig(user="指令：{instruction}"), mode="generate"))
    step = build_step("score", config, tokenizer)
    assert step.sampling is not None and not step.candidates
    assert tokenizer.decode(step.prompt.render({"instruction": "写"})).endswith("assistant\n")
    assert step.parse(said("【差】"))["reason"] == "verdict_bad"


def test_common_first_byte_of_the_verdicts_goes_into_the_prompt(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    step = build_step("score", STEPS, byte_tokenizer)
    good, bad = (encode_text(byte_tokenizer, word) for word in ("好", "差"))
    ids = step.prompt.render({"instruction": "写"})
    assert ids[-1] == good[0] == bad[0]
    assert step.candidates == (good[1], bad[1])


@pytest.mark.parametrize(("name", "reply"), [("label", 64), ("polish", 1024), ("score", 1), ("perplexity", 1)])
def test_reserved_tokens_are_the_fixed_prompt_and_the_reply(
    tokenizer: PreTrainedTokenizerFast, name: str, reply: int
) -> None:
    step = build_step(name, STEPS, tokenizer)
    row = {"text": "爬山很好", "instruction": "写爬山"}
    used = sum(len(encode_text(tokenizer, row[piece])) for piece in step.prompt.pieces if isinstance(piece, str))
    assert step.num_reserved_tokens() == len(step.prompt.render(row)) - used + reply
