"""What can be checked of a generate stage in seconds, before Ray, a GPU or an engine is there.

generate and evaluate call it first: a run that cannot work ends here, with what to do about it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pyarrow.compute as pc

from kun_ray import models, store
from kun_ray.adapters import check_adapter
from kun_ray.config import ConfigError, require
from kun_ray.engine_checks import check_engine_arguments, check_engine_installed
from kun_ray.pool import PoolConfig
from kun_ray.prompts import load_tokenizer
from kun_ray.schema import OK, STATUSES, STEP_RESULTS
from kun_ray.steps import COLUMNS_READ, StepsConfig, build_step

if TYPE_CHECKING:
    from kun_ray.generate import GenerateConfig


def preflight(config: GenerateConfig, source: store.Folder) -> None:
    """Raises ConfigError, with what to do, when `config` cannot work on the rows of `source`."""
    columns = set(source.dataset().schema.names)
    lacking = [name for name in ("doc_id", "status", "tokens") if name not in columns]
    require(not lacking, f"{config.input} has no column {', '.join(lacking)}: it is not a stage that kun_ray wrote")
    statuses, longest = Counter[str](), 0
    for batch in source.batches(["status", "tokens"]):
        statuses.update({item["values"]: item["counts"] for item in pc.value_counts(batch["status"]).to_pylist()})
        longest = max(longest, pc.max(batch["tokens"].filter(pc.equal(batch["status"], OK))).as_py() or 0)
    unknown = set(statuses) - set(STATUSES)
    require(not unknown, f"{config.input} has rows of status {unknown}; kun_ray knows {', '.join(STATUSES)}")
    require(bool(statuses[OK]), f"{config.input} has {statuses.total()} rows, but none with status ok: nothing to do")
    for name, pool in config.pools.items():
        check_engine_installed(pool)
        check_engine_arguments(pool)
        for step in pool.steps:
            needs = [
                *COLUMNS_READ[step],
                *(["text"] if step == "score" and config.steps.score and config.steps.score.input == "pair" else []),
            ]
            missing = [column for column in needs if column not in columns]
            what = f"pools.{name} runs `{step}`, which reads {', '.join(missing)}"
            require(not missing, f"{what}: run the step that writes it first")
            columns |= {field.name for field in STEP_RESULTS[step]}
        _check_model(name, pool, config.steps, longest)


def _check_model(name: str, pool: PoolConfig, steps: StepsConfig, longest: int) -> None:
    if models.is_missing_folder(pool.model):
        raise ConfigError(
            f"pools.{name}.model: there is no folder {pool.model}; give a folder with a model in it, or a hub id"
        )
    models.refuse_other_files(pool.engine, f"pools.{name}.engine")
    models.require_on_hub(pool.model, f"pools.{name}.model")
    path = models.fetch_model(pool.model, weights=False)
    tokenizer = load_tokenizer(path, pool.chat_template, pool.trust_remote_code)
    most = models.context_length(path, f"pools.{name}.model")
    context = pool.max_model_len or most
    if context > most:
        raise ConfigError(f"lower pools.{name}.max_model_len={context}: {pool.model} has a context of {most} tokens")
    for step_name in pool.steps:
        step = build_step(step_name, steps, tokenizer)
        if step.adapter:
            check_adapter(step.adapter, f"steps.{step_name}.adapter")
        text = longest if "text" in step.prompt.pieces else 0
        instruction = steps.label.sampling.max_tokens if steps.label and "instruction" in step.prompt.pieces else 0
        needed = step.num_reserved_tokens() + text + instruction
        if needed > context:
            has = (
                f"pools.{name}.max_model_len is {context}: raise it"
                if context < most
                else f"{pool.model} has {context}: take a model with more"
            )
            raise ConfigError(
                f"pools.{name}: `{step_name}` needs a context of {needed} tokens ({step.prompt.num_fixed_tokens()} of prompt, up to {text} of text "
                f"and {instruction} of instruction, {step.sampling.max_tokens if step.sampling else 1} of reply), but {has}, lower "
                f"steps.{step_name}.sampling.max_tokens, or prepare with a lower filters.max_tokens"
            )
