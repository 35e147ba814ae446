"""A tiny Llama-architecture base model with its tokenizer, and the seed files, for the demo and the tests.

The base model reads the demo's documents for half a minute; the pipeline then trains the label, chat and final models from
it. They speak broken Chinese and prove the mechanics, not the method's quality. Called by kun_ray/demo/__main__.py.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from kun_ray.prompts import CHATML, encode_text
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
    said = time.monotonic()
    model.train()
    for step, batch in enumerate(batches):
        if time.monotonic() > said + 10:
            said = time.monotonic()
            print(f"  {step} of {len(batches)} steps, loss {losses[-1]:.2f}", flush=True)
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


def build_base(
    folder: Path, texts: list[str], pairs: list[dict[str, str]], steps: StepsConfig, epochs: int = 3
) -> None:
    """Writes the model folder that the label, chat and final models are trained from, unless it is there.

    Args:
        folder: where it goes.
        texts: documents that the tokenizer and the model learn from.
        pairs: seed pairs, likewise; held-out ones must not be among them.
        steps: the prompts, whose words the tokenizer should know.
        epochs: passes over the texts; three take half a minute on two cores.
    """
    if (folder / "config.json").is_file():
        print(f"base model: {folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print("base model: a million parameters from scratch, half a minute on two idle cores …", flush=True)
    everything = [*texts, *(pair["instruction"] + "\n" + pair["output"] for pair in pairs)]
    prompts = [config.prompt.user for config in (steps.label, steps.score, steps.polish) if config]
    tokenizer = build_tokenizer([*everything, *prompts * 4])
    model = build_model()
    loss = fit(model, [([], encode_text(tokenizer, text)[: CONTEXT - 1] + [1]) for text in everything], epochs)
    save(model, tokenizer, folder)
    print(
        f"base model: {len(everything)} texts, {time.monotonic() - started:.0f} s, loss {loss:.2f} nats/token: {folder}"
    )


def write_seeds(folder: Path, texts: list[str], steps: StepsConfig, num_held_out: int = 20) -> list[dict[str, str]]:
    """Writes what the demo's models are trained on, as Alpaca files; returns the pairs that are not held out.

    `seeds.jsonl` and `held_out.jsonl` share out the seed pairs. `polish.jsonl` gives a roughened answer as the material,
    `score.jsonl` sets good instructions against spoilt ones: a model this small must be shown these steps.

    Args:
        folder: where they go.
        texts: documents that spoilt instructions are torn from.
        steps: for how a verdict is written.
        num_held_out: pairs that no model learns from.
    """
    assert steps.score is not None
    folder.mkdir(parents=True, exist_ok=True)
    rng, score = random.Random(0), steps.score
    shuffled = rng.sample(seeds(), len(seeds()))
    held_out, pairs = shuffled[:num_held_out], shuffled[num_held_out:]
    polish = [{**pair, "input": _roughened(pair["output"], rng)[:80]} for pair in pairs]
    verdicts = [
        {"instruction": instruction, "output": score.tag.format(score.candidates[verdict])}
        for number, pair in enumerate(pairs)
        for instruction, verdict in ((pair["instruction"], 0), (_spoilt(pair["instruction"], texts, rng), 1))
        if not (number % 2 and verdict)  # two good ones for each bad one: where it cannot tell, it lets pass
    ]
    for name, rows in (("seeds", pairs), ("held_out", held_out), ("polish", polish), ("score", verdicts)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return pairs


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
