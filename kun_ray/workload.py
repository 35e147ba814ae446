"""What generate and train will have to do: how many documents and pairs, how long, before anything runs.

Counted from finished stages and seed pairs with the real tokenizer (from raw corpora: estimate.py), else from what the
user says; what is assumed is noted. plan.py makes hours of it, headroom.py memory.
"""

from __future__ import annotations

import dataclasses
import itertools
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
    pairs: int = PAIRS
    notes: list[str] = dataclasses.field(default_factory=list)


def count_input(source: str, options: Options) -> Work:
    """Documents of a finished prepare stage."""
    try:
        table = store.require_complete(source).dataset().to_table(columns=["status", "tokens"])
    except KunError as error:
        raise ConfigError(f"{error}; or give num_documents= and tokens_per_document=") from None
    ok = table.filter(pc.equal(table["status"], OK))
    mean = pc.mean(ok["tokens"]).as_py() or 0.0
    return Work(options.num_documents or float(ok.num_rows), options.tokens_per_document or mean)


def count_seeds(work: Work, stages: list[tuple[str, Any]]) -> None:
    """Mean lengths of instructions and answers, from the seed pairs that the first training stage learns from."""
    trainings = [stage for _, stage in stages if isinstance(stage, TrainConfig)]
    places = [entry.path for stage in trainings for entry in stage.data if store.Folder(entry.path).exists()]
    if not places:
        work.notes.append(
            f"assumed: {PAIRS:,} pairs of {INSTRUCTION_TOKENS:.0f} + {ANSWER_TOKENS:.0f} tokens, as no seed pairs are there"
        )
        return
    found = list(itertools.islice(data.pairs(places[0]), 100_000))
    count = _counter(trainings[0])
    asked, said = count([q for q, _ in found]), count([a for _, a in found])
    work.pairs = max(1, len(found))
    work.instruction, work.answer = sum(asked) / work.pairs, sum(said) / work.pairs
    work.notes.append(f"{places[0]}: {len(found):,} pairs of {work.instruction:.0f} + {work.answer:.0f} tokens")


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
    prefill = output = longest = 0.0
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
        longest = max(longest, own + replies.get(name, 1.0) / 2 + (len(prompt.user) * TOKENS_PER_CHAR if prompt else 0))
    return Traffic(prefill, output, longest)
