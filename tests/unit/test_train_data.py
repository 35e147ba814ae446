"""Conversations → tokens and masks, and how steps are spread over ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from kun_ray.config import ConfigError
from kun_ray.prompts import PromptConfig, build_chat, build_prompt, encode_text
from kun_ray.steps import LabelConfig, StepsConfig
from kun_ray.store import Folder
from kun_ray.train import packing
from kun_ray.train.config import DataConfig
from kun_ray.train.data import Samples, read_samples, tokenize

PAIR = {"instruction": "怎样把米饭煮得粒粒分明？", "output": "淘米两遍，浸泡二十分钟，水比米略多，煮好后焖十分钟。"}
STEPS = StepsConfig(label=LabelConfig(prompt=PromptConfig(user="写出指令：\n{text}")))
Write = Callable[..., DataConfig]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(records: list[Any], **fields: Any) -> DataConfig:
        path = tmp_path / f"{fields.pop('name', 'data')}.jsonl"
        path.write_text(
            "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
        )
        return DataConfig(path=str(path), **fields)

    return make


def samples_of(entries: list[DataConfig], tokenizer: Any, tmp_path: Path, max_tokens: int = 500) -> tuple[Samples, Any]:
    counts = tokenize(entries, STEPS, tokenizer, max_tokens, Folder(str(tmp_path)), "train")
    return read_samples(Folder(str(tmp_path)), "train"), counts


def said(samples: Samples, index: int, tokenizer: PreTrainedTokenizerFast) -> str:
    ids, counted = samples.sample(index)
    return str(tokenizer.decode(ids[counted]))


def test_label_swaps_the_fields_and_uses_the_prompt_of_inference(write, tokenizer, tmp_path):
    samples, counts = samples_of([write([PAIR], task="label")], tokenizer, tmp_path)
    ids, counted = samples.sample(0)
    asked = build_prompt(tokenizer, STEPS.label.prompt).render({"text": PAIR["output"]})
    assert ids[: len(asked)].tolist() == asked
    assert not counted[: len(asked)].any()
    assert said(samples, 0, tokenizer) == PAIR["instruction"] + "<|im_end|>"
    assert counts["supervised_tokens"] == counted.sum() == samples.num_supervised[0]


def test_label_learns_the_whole_instruction(write, tokenizer, tmp_path):
    record = {"instruction": "翻译下面的句子。", "input": "Good morning.", "output": "早上好。"}
    samples, _ = samples_of([write([record], task="label")], tokenizer, tmp_path)
    assert said(samples, 0, tokenizer) == "翻译下面的句子。\nGood morning.<|im_end|>"


def test_every_turn_of_the_assistant_is_counted_and_no_other(write, tokenizer, tmp_path):
    turns = ["你好", "你好，有什么可以帮你？", "谢谢", "不客气。"]
    roles = ["human", "gpt"] * 2
    chat = {"conversations": [{"from": r, "value": t} for r, t in zip(roles, turns, strict=True)]}
    samples, _ = samples_of([write([chat])], tokenizer, tmp_path)
    assert said(samples, 0, tokenizer) == "你好，有什么可以帮你？<|im_end|>不客气。<|im_end|>"
    assert tokenizer.decode(samples.sample(0)[0]).count("<|im_start|>user") == 2


def test_a_records_own_system_turn_is_text_and_an_entrys_wins(write, tokenizer, tmp_path):
    record = {**PAIR, "system": "你是厨师<|im_end|>"}
    samples, _ = samples_of([write([record]), write([record], name="b", system="种子数据")], tokenizer, tmp_path)
    own, entry = (tokenizer.decode(samples.sample(n)[0]) for n in (0, 1))
    assert own.startswith("<|im_start|>system\n你是厨师") and entry.startswith("<|im_start|>system\n种子数据<|im_end|>")
    assert np.count_nonzero(samples.sample(0)[0] == tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3


def test_control_tokens_in_data_stay_text(write, tokenizer, tmp_path):
    spoilt = {"instruction": "看<|im_start|>这里", "output": "好<|im_end|>\n<|im_start|>user\n再来"}
    samples, _ = samples_of([write([spoilt])], tokenizer, tmp_path)
    ids = samples.sample(0)[0].tolist()
    assert [ids.count(tokenizer.convert_tokens_to_ids(name)) for name in ("<|im_start|>", "<|im_end|>")] == [2, 2]


def test_what_cannot_be_used_is_counted_by_reason_and_named(write, tokenizer, tmp_path):
    bad = [PAIR, "{broken", {"instruction": 3, "output": "三"}, {"instruction": "空", "output": " "}]
    bad += [{"instruction": "长", "output": "长" * 2000}, {"conversations": [{"from": "gpt", "value": "先说"}]}]
    samples, counts = samples_of([write(bad)], tokenizer, tmp_path)
    assert len(samples) == 1
    assert counts["left_out"] == {"bad_record": 3, "empty_field": 1, "too_long": 1}
    assert counts["first_left_out"]["too_long"].endswith("data.jsonl:5")


def test_no_usable_sample_is_refused_with_the_reason(write, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="1 empty_field"):
        samples_of([write([{"instruction": "空", "output": ""}])], tokenizer, tmp_path)


def test_chat_and_prompt_agree_on_what_stands_before_the_reply(tokenizer):
    prompt = PromptConfig(user="问：{instruction}", system="助手")
    ids, counted = build_chat(tokenizer, prompt, 1).render({"instruction": "天为什么蓝？", "reply0": "因为散射。"})
    asked = build_prompt(tokenizer, prompt).render({"instruction": "天为什么蓝？"})
    assert ids[: len(asked)] == asked
    assert counted.index(True) == len(asked)
    assert ids[len(asked) : len(asked) + counted.count(True) - 1] == encode_text(tokenizer, "因为散射。")


def test_a_template_that_shows_replies_otherwise_than_it_asks_is_refused(byte_tokenizer):
    byte_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    )
    with pytest.raises(ConfigError, match="otherwise than it asks"):
        build_chat(byte_tokenizer, PromptConfig(user="{instruction}"))


@pytest.mark.parametrize(("weight", "epochs", "seen"), [(1.0, 1, 40), (2.0, 1, 80), (0.25, 1, 10), (0.25, 4, 40)])
def test_weights_decide_how_often_a_sample_is_seen(weight, epochs, seen):
    data = np.zeros(40, dtype=np.int16)
    order = np.concatenate([packing.epoch_order(data, [weight], n, 0) for n in range(epochs)])
    assert len(order) == seen
    times = np.bincount(order, minlength=40)
    assert times.max() - times.min() <= (0 if weight * epochs >= 1 else 1)


def test_the_order_depends_on_seed_and_epoch_alone():
    data = np.zeros(50, dtype=np.int16)
    first = packing.epoch_order(data, [1.0], 0, 7)
    assert (first == packing.epoch_order(data, [1.0], 0, 7)).all()
    assert (first != packing.epoch_order(data, [1.0], 1, 7)).any()
    assert (first != packing.epoch_order(data, [1.0], 0, 8)).any()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3, 16])
def test_every_sample_of_a_step_is_computed_once_within_the_budget(packed, ranks):
    lengths = np.random.default_rng(0).integers(10, 500, 200)
    batch = np.random.default_rng(1).permutation(200)[:64]
    micros = packing.micro_batches(batch, lengths, ranks, 600, packed)
    assert all(len(micro) == ranks for micro in micros)
    assert sorted(i for micro in micros for part in micro for i in part) == sorted(batch)
    for part in (part for micro in micros for part in micro if part):
        size = lengths[part].sum() if packed else len(part) * lengths[part].max()
        assert size <= 600


def test_packing_wastes_little_where_padding_wastes_much():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 512).astype(int).clip(10, 2000)
    batch = np.arange(512)
    packed, padded = (
        np.mean([packing.efficiency(m, lengths, on) for m in packing.micro_batches(batch, lengths, 8, 4096, on)])
        for on in (True, False)
    )
    assert packed > 0.95 and packed > padded


def test_a_step_smaller_than_the_ranks_leaves_some_without_work():
    micros = packing.micro_batches(np.array([0]), np.array([50]), 4, 100, True)
    assert micros == [[[0], [], [], []]]
