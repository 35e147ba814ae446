"""The evaluate stage: C-Eval and CMMLU, few-shot, by the options' log-probabilities, one generate run per model.

jobs/evaluate.py calls `evaluate`. benchmarks.py reads the suites and builds the prompts, asking.py makes them a generate run,
results.py does the arithmetic.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoTokenizer

from kun_ray import generate, store
from kun_ray.choose import ChooseConfig
from kun_ray.config import ConfigError, RayConfig, one_of, require, show_config
from kun_ray.evaluate import asking, contamination, results
from kun_ray.evaluate.benchmarks import (
    LETTERS,
    Benchmark,
    BenchmarkConfig,
    build_prompts,
    read_benchmark,
)
from kun_ray.evaluate.contamination import ContaminationConfig
from kun_ray.evaluate.rows import folder_name
from kun_ray.generate import GenerateConfig
from kun_ray.names import short_names
from kun_ray.pool import PoolConfig
from kun_ray.prompts import count_tokens


@dataclasses.dataclass
class ModelConfig:
    """What one model has of its own."""

    format: str | None = None
    """`chat` or `plain`; null takes the job's."""
    pool: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of `pool` that differ for this model, such as {tensor_parallel_size: 2}."""


@dataclasses.dataclass
class EvaluateConfig:
    """jobs/evaluate.py: models on examinations, and data against the examinations' questions."""

    suites: dict[str, BenchmarkConfig] = MISSING
    """Where suites of questions lie, by name."""
    benchmarks: list[str] = dataclasses.field(default_factory=list)
    """Which of the suites to use; empty takes all."""
    output: str = MISSING
    """Folder of the results; each model has a folder in it. The same command continues a run that was stopped."""
    models: list[str] = dataclasses.field(default_factory=list)
    """Folders or hub ids. The first is the one that the others are compared with. Models that were evaluated before are not
    run again."""
    shots: int = 5
    """Worked examples before each question."""
    format: str = "auto"
    """`chat` asks through the chat template, `plain` gives the text to be continued (base models); `auto` takes chat where
    the model has a template."""
    header: str = "下面是“{subject}”科目的单项选择题，每题只有一个选项是正确的，请选出它。"
    """First line of a prompt; {subject} stands for the subject's Chinese name."""
    pool: PoolConfig = dataclasses.field(default_factory=lambda: PoolConfig(model=""))
    """How engines run: as in generate; `steps` stays empty, and `models` gives `model`, required or not."""
    per_model: dict[str, ModelConfig] = dataclasses.field(default_factory=dict)
    """What single models have of their own, by the name of their folder."""
    contamination: ContaminationConfig = dataclasses.field(default_factory=ContaminationConfig)
    """Looks for the questions in training data."""
    show_subjects: bool = False
    """Whether the table has a line for each subject; results.json always has them."""
    rows_per_file: int = 512
    """Rows of one output file."""
    stop_grace_s: float = 120.0
    """After Ctrl-C or SIGTERM, seconds for the rows in flight to finish."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster."""

    def __post_init__(self) -> None:
        one_of("format", self.format, ("auto", "chat", "plain"))
        require(self.shots >= 0, "shots must not be negative")
        require(len(self.suites) > 0, "suites: give at least one, such as suites.cmmlu.path=…")
        for name in self.benchmarks:
            one_of("benchmarks", name, tuple(self.suites))
        require(bool(self.models or self.contamination.data), "nothing to do: give models=[…], or contamination.data=…")
        require("{subject}" in self.header, "header must name {subject}")
        require(not self.pool.steps, "pool.steps stays empty: evaluate runs a step of its own")
        names = short_names(self.models)
        require(len(set(names)) == len(names), f"models: two are the same ({', '.join(self.models)})")
        unknown = sorted(set(self.per_model) - set(names))
        require(not unknown, f"per_model names {', '.join(unknown)}; the models are {', '.join(names)}")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Runs what was asked for and returns the results that were written.

    Raises:
        ConfigError: before any engine starts, when a suite, a model or the data cannot be used.
        KunError: the output holds another run's data, or counts do not add up.
    """
    suites = [read_benchmark(name, config.suites[name]) for name in config.benchmarks or config.suites]
    for suite in suites:
        print(describe(suite), flush=True)
    if config.contamination.data:
        contamination.require_text(config.contamination)
    names = short_names(config.models)
    runs = {name: _prepare(config, path, name, suites) for path, name in zip(config.models, names, strict=True)}
    found: dict[str, Any] = {}
    if config.contamination.data:
        show_config()
        found["contamination"] = contamination.check(config.contamination, suites, store.Folder(config.output))
    if runs:
        for run in runs.values():
            print(f"{run.pools['model'].model} → {run.output}", flush=True)
            generate.generate(run, "pool.accelerator")
        answers = {name: store.Folder(run.output) for name, run in runs.items()}
        folder = store.Folder(config.output)
        checked, dirty = contamination.dirty_questions(folder, suites)
        found |= results.summarise(answers, {suite.name: suite.format for suite in suites}, dirty)
        if checked:
            found["contamination"] = checked
            print(f"not found in data: by the check of {checked['data']}, {checked['ngram']} units in a row")
        results.write(folder, found)
        results.show(found, config.show_subjects)
        print(f"written to {config.output}: results.json and what it names")
    return found


def describe(suite: Benchmark) -> str:
    """One line: how many questions, subjects and examples there are."""
    subjects = sorted(suite.examples)
    few = [one for one in subjects if len(suite.examples[one]) == 0]
    without_key = sum(question.key is None for question in suite.questions)
    return (
        f"{suite.name}: {len(suite.questions):,} questions of {len(subjects)} subjects"
        + (f"; {without_key:,} without a published answer" if without_key else "")
        + (f"; no examples for {', '.join(few)}" if few else "")
    )


def _prepare(config: EvaluateConfig, path: str, name: str, suites: list[Benchmark]) -> GenerateConfig:
    """One model's questions as a finished stage, and the generate run over it, checked. Raises ConfigError."""
    own = config.per_model.get(name, ModelConfig())
    try:
        merged = OmegaConf.merge(OmegaConf.structured(config.pool), own.pool, {"model": path, "steps": ["choose"]})
        pool: PoolConfig = cast(PoolConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"per_model.{name}.pool: {str(error).splitlines()[0]}") from None
    plain = _is_plain(own.format or config.format, asking.local_files(path, "models"), pool)
    asked = asking.open_model(pool, ChooseConfig(options=list(LETTERS), plain=plain), "models")
    rows = [
        row
        for suite in suites
        for row in build_prompts(
            suite, config.header, config.shots, asked.budget, lambda texts: count_tokens(asked.tokenizer, texts)
        )
    ]
    fingerprint: dict[str, object] = {
        "benchmarks": {suite.name: suite.digest() for suite in suites},
        "prompt": {"header": config.header, "shots": config.shots, "format": "plain" if plain else "chat"},
    }
    folder = store.Folder(config.output).below(folder_name(path))
    return asking.prepare_run(asked, rows, folder, fingerprint, config)


def _is_plain(format: str, path: str, pool: PoolConfig) -> bool:
    if format != "auto":
        return format == "plain"
    if pool.chat_template is not None:
        return False
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=pool.trust_remote_code)
    return not tokenizer.chat_template
