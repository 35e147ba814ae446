"""Tiny Llama-architecture models for the demo and the tests: a tokenizer, a base model, a label model and a chat model.

The base model reads the demo's documents for a minute; the label model then learns the seed pairs inverted, the chat model
learns to answer, to score and to polish. They speak broken Chinese and prove the mechanics, not the method's quality.
Called by kun_ray/demo/__main__.py and by tests; prompts are rendered by kun_ray.prompts, as in inference.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from kun_ray.prompts import CHATML, PromptConfig, build_prompt, encode_text, turn_end
from kun_ray.steps import StepsConfig

CONTEXT = 2048
VOCABULARY = 4096
SPECIAL = ["<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Sample = tuple[list[int], list[int]]
"""Prompt ids and reply ids; the loss counts the reply's."""


def seeds() -> list[dict[str, str]]:
    """The embedded seed pairs: instruction, output."""
    return [json.loads(line) for line in read("seeds.jsonl")]


def read(name: str) -> list[str]:
    """Lines of one of the demo's own files."""
    return (resources.files("kun_ray.demo") / name).read_text(encoding="utf-8").splitlines()


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the ChatML control tokens."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[3],
        pad_token=SPECIAL[1],
        model_max_length=CONTEXT,
    )
    wrapped.chat_template = CHATML
    return wrapped


def build_model(seed: int = 0, hidden: int = 128, layers: int = 3) -> LlamaForCausalLM:
    """A random Llama of about 1 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config)


def fit(
    model: LlamaForCausalLM, samples: list[Sample], epochs: int, lr: float = 4e-3, budget: int = 1024, seed: int = 0
) -> float:
    """Plain PyTorch AdamW on padded batches of at most `budget` tokens; returns the last mean loss (nats/token)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    rng = random.Random(seed)
    batches = [batch for _ in range(epochs) for batch in _batches(samples, budget, rng)]
    losses: list[float] = []
    model.train()
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * max(0.05, 1 - step / len(batches))
        ids, labels = _padded(batch)
        hidden = model.model(input_ids=ids, attention_mask=(ids != 1).long(), use_cache=False).last_hidden_state
        counted = labels[:, 1:] != -100  # the head is most of a tiny model's cost: only where the loss counts
        logits = model.lm_head(hidden[:, :-1][counted])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    recent = losses[-20:]
    return sum(recent, 0.0) / max(1, len(recent))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Writes a model folder (safetensors, bf16) under a temporary name and renames it."""
    staging = path.with_name(path.name + ".tmp")
    disable_progress_bar()
    model.to(torch.bfloat16).save_pretrained(staging)
    GenerationConfig(bos_token_id=0, eos_token_id=[3, 1], pad_token_id=1).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    staging.rename(path)
    model.to(torch.float32)


def build_models(folder: Path, texts: list[str], steps: StepsConfig, effort: float = 1.0, say: Any = print) -> None:
    """Writes folder/{base,label,chat}; models that are there already are kept.

    Args:
        folder: where the three model folders go.
        texts: documents that the tokenizer and the base model learn from.
        steps: the prompts that label and chat learn to follow.
        effort: multiplies the epochs of all three fits; 1 takes about two and a half minutes on two cores.
    """
    if all((folder / name / "config.json").is_file() for name in ("base", "label", "chat")):
        say(f"models in {folder} are there already")
        return
    folder.mkdir(parents=True, exist_ok=True)
    pairs = seeds()
    everything = [*texts, *(pair["instruction"] + "\n" + pair["output"] for pair in pairs)]
    prompts = [config.prompt.user for config in (steps.label, steps.score, steps.polish) if config]
    tokenizer = build_tokenizer([*everything, *prompts * 4])
    model = build_model()
    base: list[Sample] = [([], encode_text(tokenizer, text)[: CONTEXT - 1] + [1]) for text in everything]
    plan = [
        ("base", base, 3),
        ("label", label_samples(tokenizer, pairs, steps), 24),
        ("chat", chat_samples(tokenizer, pairs, texts, steps), 12),
    ]
    learned: dict[str, torch.Tensor] = {}
    for name, samples, epochs in plan:
        started = time.monotonic()
        if learned:
            model.load_state_dict(learned)  # label and chat both start from the base model
        loss = fit(model, samples, max(1, round(epochs * effort)))
        if name == "base":
            learned = {key: value.clone() for key, value in model.state_dict().items()}
        if not (folder / name).exists():
            save(model, tokenizer, folder / name)
        say(f"{name}: {len(samples)} samples, {time.monotonic() - started:.0f} s, loss {loss:.2f} nats/token")


def label_samples(tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, str]], steps: StepsConfig) -> list[Sample]:
    """Seed pairs inverted: the beginning of the answer in label's prompt, the instruction as the reply."""
    assert steps.label is not None
    prompt, end = build_prompt(tokenizer, steps.label.prompt), turn_end(tokenizer)
    return [
        (prompt.render({"text": pair["output"][:length]}), encode_text(tokenizer, pair["instruction"]) + end)
        for pair in pairs
        for length in (40, 80)
    ]


def chat_samples(
    tokenizer: PreTrainedTokenizerFast, pairs: list[dict[str, str]], texts: list[str], steps: StepsConfig
) -> list[Sample]:
    """What the primary chat model learns: to answer, to score (good seeds against spoilt ones) and to polish."""
    assert steps.score is not None and steps.polish is not None
    rng, end = random.Random(0), turn_end(tokenizer)
    plain = build_prompt(tokenizer, PromptConfig(user="{instruction}"))
    score, polish = build_prompt(tokenizer, steps.score.prompt), build_prompt(tokenizer, steps.polish.prompt)
    samples: list[Sample] = []
    for index, pair in enumerate(pairs):
        answer = encode_text(tokenizer, pair["output"]) + end
        samples.append((plain.render(pair), answer))
        samples.append((polish.render({**pair, "text": _roughened(pair["output"], rng)[:80]}), answer))
        if index % 2:
            continue  # a verdict is soon learnt, an answer is not
        for instruction, verdict in ((pair["instruction"], 0), (_spoilt(pair["instruction"], texts, rng), 1)):
            reply = steps.score.tag.format(steps.score.candidates[verdict])
            samples.append(
                (
                    score.render({"instruction": instruction, "text": pair["output"]}),
                    encode_text(tokenizer, reply) + end,
                )
            )
    return samples


def _spoilt(instruction: str, texts: list[str], rng: random.Random) -> str:
    """A bad instruction: torn, shuffled, a scrap of a page, or one that needs what is not there."""
    kind = rng.randrange(4)
    if kind == 0:
        return instruction[: max(2, len(instruction) // 3)]
    if kind == 1:
        return "".join(rng.sample(instruction, len(instruction)))
    if kind == 2:
        text = rng.choice(texts)
        start = rng.randrange(max(1, len(text) - 30))
        return text[start : start + 24]
    return rng.choice(["看上面的表格，", "请参照附件，", "打开那个网页以后，"]) + instruction[: len(instruction) // 2]


def _roughened(text: str, rng: random.Random) -> str:
    """A text as a web page might hold it: some punctuation lost, a sentence doubled or moved."""
    sentences = [sentence for sentence in text.replace("\n", "").split("。") if sentence]
    if len(sentences) > 2 and rng.random() < 0.5:
        sentences.insert(0, sentences.pop(rng.randrange(len(sentences))))
    return rng.choice(["。", "，", " "]).join(sentences)


def _batches(samples: list[Sample], budget: int, rng: random.Random) -> Iterator[list[Sample]]:
    """Batches of similar lengths, in random order, at most `budget` tokens with their padding."""
    order = sorted(samples, key=lambda sample: len(sample[0]) + len(sample[1]) + rng.random() * 40)
    batches: list[list[Sample]] = [[]]
    for sample in order:
        if batches[-1] and (len(batches[-1]) + 1) * (len(sample[0]) + len(sample[1])) > budget:
            batches.append([])
        batches[-1].append(sample)
    rng.shuffle(batches)
    yield from batches


def _padded(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), shape [batch, longest]; labels are −100 outside the replies."""
    longest = min(CONTEXT, max(len(prompt) + len(reply) for prompt, reply in batch))
    ids = torch.full((len(batch), longest), 1)
    labels = torch.full((len(batch), longest), -100)
    for row, (prompt, reply) in enumerate(batch):
        whole = (prompt + reply)[:longest]
        ids[row, : len(whole)] = torch.tensor(whole)
        labels[row, len(prompt) : len(whole)] = torch.tensor(whole[len(prompt) :])
    return ids, labels
