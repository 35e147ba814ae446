"""Texts → one model's choices among options, as a generate run: what choice.py and pairwise.py have in common.

A model's texts are a finished stage (`questions`), generate answers them with the step `choose` (`answers`). So a run continues,
refuses another model, stops cleanly and proves its counts as every other.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from kun_ray import models, store
from kun_ray.choose import ChooseConfig, choose_prompt
from kun_ray.config import ConfigError, RayConfig
from kun_ray.counts import prove_counts
from kun_ray.generate import GenerateConfig
from kun_ray.pool import PoolConfig
from kun_ray.preflight import preflight
from kun_ray.prompts import load_tokenizer
from kun_ray.schema import DOCUMENT, to_table
from kun_ray.steps import StepsConfig

if TYPE_CHECKING:  # transformers takes seconds to import, and most processes never need it
    from transformers import PreTrainedTokenizerFast

Row = dict[str, object]
QUESTION = pa.schema(
    [
        *DOCUMENT,
        pa.field("subject", pa.string(), nullable=False),
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("key", pa.string()),
        pa.field("num_shots", pa.int32()),
    ]
)
"""A question as generate reads it: `source` is the suite, `text` the whole prompt, `key` the right option if it is known."""


class Running(Protocol):
    """What evaluate's and pairwise's configurations say about how a run goes."""

    rows_per_file: int
    stop_grace_s: float
    ray: RayConfig


@dataclasses.dataclass(frozen=True)
class Asked:
    """One model that can be asked: its pool, its tokenizer, and the most tokens that a text may have."""

    pool: PoolConfig
    choose: ChooseConfig
    tokenizer: PreTrainedTokenizerFast
    budget: int


def local_files(model: str, key: str) -> str:
    """Where a model's tokenizer and configuration are. Raises ConfigError, naming the key, when the model cannot be had."""
    if models.is_missing_folder(model):
        raise ConfigError(f"{key}: there is no folder {model}; give a folder with a model in it, or a hub id")
    models.require_on_hub(model, key)
    return models.fetch_model(model, weights=False)


def open_model(pool: PoolConfig, choose: ChooseConfig, key: str) -> Asked:
    """Everything about a model that is known without loading it. Raises ConfigError."""
    path = local_files(pool.model, key)
    if choose.plain and pool.chat_template is None:
        pool = dataclasses.replace(pool, chat_template="chatml")  # pools ask for one, though plain texts use none
    tokenizer = load_tokenizer(path, pool.chat_template, pool.trust_remote_code)
    context = min(pool.max_model_len or math.inf, models.context_length(path, key))
    if pool.max_model_len:  # one value stands for models of several contexts
        pool = dataclasses.replace(pool, max_model_len=int(context))
    fixed = choose_prompt(tokenizer, choose)[0].num_fixed_tokens() + 1
    return Asked(pool, choose, tokenizer, int(min(context, 2**31)) - fixed)


def prepare_run(asked: Asked, rows: list[Row], folder: store.Folder, fingerprint: Row, how: Running) -> GenerateConfig:
    """Writes `questions` below `folder` and returns the checked generate run from there to `answers`.

    Raises:
        ConfigError: the run cannot work.
        KunError: the folder holds another run's data.
    """
    fingerprint = {**fingerprint, "model": asked.pool.model, "budget": asked.budget}
    begun = folder.below("questions").exists(store.MANIFEST)
    questions = _write(folder.below("questions").uri, rows, fingerprint)
    run = GenerateConfig(
        input=questions.uri,
        output=folder.below("answers").uri,
        pools={"model": asked.pool},
        steps=StepsConfig(choose=asked.choose),
        rows_per_file=how.rows_per_file,
        stop_grace_s=how.stop_grace_s,
        ray=how.ray,
    )
    try:
        preflight(run, questions)
    except ConfigError:
        if not begun:  # what cannot run leaves nothing that the corrected command would have to agree with
            questions.filesystem.delete_dir(questions.path)
        raise
    return run


def _write(uri: str, rows: list[Row], fingerprint: Row) -> store.Folder:
    folder = store.open_stage(uri, fingerprint, {})
    if not folder.is_complete():
        for part, start in enumerate(range(0, len(rows), 2000)):
            table = to_table(rows[start : start + 2000], QUESTION)
            pq.write_table(table, folder.child(f"part-{part:06d}.parquet"), filesystem=folder.filesystem)
        folder.finish({"stage": "questions", **prove_counts(folder, len(rows))})
    return folder
