"""What generate and train will have to do: how many documents and pairs, how long, before anything runs.

Counted from finished stages and seed pairs with the real tokenizer (from raw corpora: estimate.py), else from what the
user says; what is assumed is noted. plan.py makes hours of it, headroom.py memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from kun_ray import store
from kun_ray.capacity import Traffic
from kun_ray.config import ConfigError, KunError
from kun_ray.pool import PoolConfig
from kun_ray.prompts import build_prompt, count_tokens, load_tokenizer
from kun_ray.schema import OK
from kun_ray.train import data
from kun_ray.train.config import TrainConfig

if TYPE_CHECKING:
    from kun_ray.generate import GenerateConfig

TOKENS_PER_CHAR = 0.65
"""Of Chinese text in Yi's vocabulary, about; used only without a tokenizer."""
PAIRS, INSTRUCTION_TOKENS, ANSWER_TOKENS = 10_000, 60.0, 350.0
"""Seed pairs and their mean lengths where there are none to count: about Kun's number, and lengths that we assume."""
TEMPLATE_TOKENS = 20.0
"""Of the chat template around a sample: assumed."""
MEASURED_PAIRS = 10_000
"""Most pairs that are read for their mean lengths."""


@dataclasses.dataclass
class Options:
    """jobs/plan.py's own keys, beside those of the configuration that it plans."""

    card: str = "A100-80"
    """GPU to plan for: A100-40, A100-80, H100, H200, L40S, or CPU."""
    price_per_gpu_hour: float | None = None
    """Price of one GPU-hour, for a total in the same currency."""
    num_documents: float | None = None
    """Documents to label; null counts them in the input."""
    tokens_per_document: float | None = None
    """Their mean length; null counts a sample."""
    good_share: float = 0.5
    """Part of the instructions that scoring accepts: assumed, until a run has shown it."""
    sample_records: int = 1000
    """Records of the corpora that are read and cleaned to estimate the rest."""
    model_config: str | None = None
    """A config.json to take all models' sizes from, such as conf/shapes/yi-34b.json: for models that are not at hand."""
    measured: list[str] = dataclasses.field(default_factory=list)
    """Finished generate stages, run on this card: the time that they took over the planned one corrects the plan."""


@dataclasses.dataclass
class Work:
    """Means over the rows that generate will see."""

    documents: float
    tokens: float
    instruction: float = INSTRUCTION_TOKENS
    answer: float = ANSWER_TOKENS
    longest: float = 0.0
    """Tokens of the longest document, as far as it is known."""
    notes: list[str] = dataclasses.field(default_factory=list)


def count_input(source: str, options: Options) -> Work:
    """Documents of a finished prepare stage; their mean length is 0 where their tokens were not counted."""
    try:
        table = store.require_complete(source).dataset().to_table(columns=["status", "tokens"])
    except KunError as error:
        raise ConfigError(f"{error}; or give num_documents= and tokens_per_document=") from None
    ok = table.filter(pc.equal(table["status"], OK))
    mean, longest = pc.mean(ok["tokens"]).as_py() or 0.0, pc.max(ok["tokens"]).as_py() or 0.0
    documents = options.num_documents or float(ok.num_rows)
    return Work(documents, options.tokens_per_document or mean, longest=longest)


def measure_pairs(work: Work, stages: list[tuple[str, Any]]) -> None:
    """Mean lengths of instructions and answers, from the first data of a training stage that is there."""
    trainings = [stage for _, stage in stages if isinstance(stage, TrainConfig)]
    places = [entry.path for stage in trainings for entry in stage.data if _is_there(entry.path)]
    found = list(itertools.islice(data.pairs(places[0]), MEASURED_PAIRS)) if places else []
    if not found:
        work.notes.append(
            f"assumed: {INSTRUCTION_TOKENS:.0f} tokens of an instruction, {ANSWER_TOKENS:.0f} of an answer"
        )
        return
    count = _counter(trainings[0])
    asked, said = count([q for q, _ in found]), count([a for _, a in found])
    work.instruction, work.answer = sum(asked) / len(found), sum(said) / len(found)
    first = "" if len(found) < MEASURED_PAIRS else "the first "
    work.notes.append(f"{places[0]}: {first}{len(found):,} pairs of {work.instruction:.0f} + {work.answer:.0f} tokens")


def count_training(
    config: TrainConfig, work: Work, good_share: float, exports: Mapping[str, float]
) -> tuple[float, float]:
    """(samples, tokens) that one training stage sees in an epoch: those of each entry of its data times its weight.

    Args:
        exports: folders of exports that the same run makes, and the most rows that each takes.
    """
    samples = tokens = 0.0
    for entry in config.data:
        rows = pairs = float(min(PAIRS, entry.max_samples or PAIRS))
        if _is_there(entry.path):
            rows, pairs = data.count(entry)
        elif entry.path in exports:  # the rows that scoring accepts
            rows = pairs = min(work.documents * good_share, exports[entry.path], entry.max_samples or math.inf)
        elif (note := f"assumed: {PAIRS:,} pairs in {entry.path}, which is not there") not in work.notes:
            work.notes.append(note)
        samples += entry.weight * rows
        tokens += entry.weight * (pairs * (work.instruction + work.answer) + rows * TEMPLATE_TOKENS)
    return samples, tokens


def _is_there(path: str) -> bool:
    """Whether it is a file, or an export's folder that is more than begun."""
    folder = store.Folder(path)
    return data.is_export(folder) or bool(folder.filesystem.get_file_info(folder.path).is_file)


def _counter(training: TrainConfig) -> Any:
    """Tokens of texts by the model's tokenizer; by their characters when it is not at hand."""
    if Path(training.model).is_dir():
        tokenizer = load_tokenizer(training.model, training.chat_template or "chatml", training.trust_remote_code)
        return lambda texts: count_tokens(tokenizer, texts)
    return lambda texts: [len(text) * TOKENS_PER_CHAR for text in texts]


def traffic(pool: PoolConfig, config: GenerateConfig, work: Work, good_share: float) -> Traffic:
    """Mean tokens that one row asks of a pool. Of a prompt, what stands before the row's own text is cached."""
    lengths = {"text": work.tokens, "instruction": work.instruction, "title": 10.0}
    replies = {"label": work.instruction, "score": 1.0, "polish": work.answer, "perplexity": 0.0}
    texts = lengths | {"text": max(work.tokens, work.longest)}
    prefill = output = context = longest = 0.0
    for name in pool.steps:
        share = good_share if name == "polish" else 1.0
        chosen: Any = getattr(config.steps, name)
        prompt: Any = getattr(chosen, "prompt", None)  # perplexity and choose have none
        if prompt is None:
            fixed, fields = 0.0, ["text"]
        elif Path(pool.model).is_dir():
            tokenizer = load_tokenizer(pool.model, pool.chat_template or "chatml", pool.trust_remote_code)
            pieces = build_prompt(tokenizer, prompt).pieces
            fields = [piece for piece in pieces if isinstance(piece, str)]
            fixed = float(sum(len(piece) for piece in pieces[1:] if not isinstance(piece, str)))
        else:
            fields = prompt.fields()
            fixed = len(prompt.user.partition("}")[2]) * TOKENS_PER_CHAR + 8
        own = fixed + sum(lengths.get(field, 0.0) for field in fields)
        prefill, output = prefill + share * own, output + share * replies.get(name, 1.0)
        shared = len(prompt.user) * TOKENS_PER_CHAR if prompt else 0
        reply = replies.get(name, 1.0)
        context = max(context, own + reply / 2 + shared)
        decodes = name in ("label", "polish") or getattr(chosen, "mode", None) == "generate"
        most = chosen.sampling.max_tokens if decodes else reply
        longest = max(longest, fixed + sum(texts.get(field, 0.0) for field in fields) + shared + most)
    return Traffic(prefill, output, context, longest)
