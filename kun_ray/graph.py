"""The Kun loop as a graph of stages: which job runs with which arguments, after which others. It starts nothing.

    prepare ─┐
    train_label ── label ─┐
    train_chat ─────────── curate (score, polish) ── export ── train_final
                              └─ again with train_final's model, `iterations` times

Source: Kun (arXiv 2401.06477) Figure 1; repeating the curation is Humpback's (arXiv 2308.06259 §2.3). pipeline.py runs it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from typing import Any

from omegaconf import MISSING

from kun_ray import export, fingerprint, generate, lease, prepare, store
from kun_ray.config import ConfigError, RayConfig, load, merge, require, to_dict
from kun_ray.corpora import CorpusConfig, list_corpora
from kun_ray.models import is_missing_folder
from kun_ray.train import fingerprint as trained
from kun_ray.train.config import TrainConfig

STAGES = ("prepare", "train_label", "label", "train_chat", "curate", "export", "train_final")


@dataclasses.dataclass
class ModelsConfig:
    """Models that are there already. Each is a folder (local, s3://…, hdfs://…) or a hub id."""

    base: str | None = None
    """What the label, chat and final models are trained from."""
    label: str | None = None
    """Label model to use in place of training one."""
    score: str | None = None
    """Scoring model to use in place of training the chat model."""
    polish: str | None = None
    """Polishing model to use in place of training the chat model."""

    def require_folders(self, keys: Iterable[str]) -> None:
        """Raises ConfigError, naming the pipeline's key, when one of these models is a folder that is not there."""
        for key in keys:
            model = getattr(self, key)
            if model and is_missing_folder(model):
                raise ConfigError(
                    f"models.{key}: there is no folder {model}; give a folder with a model in it, or a hub id"
                )


@dataclasses.dataclass
class PipelineConfig:
    """jobs/pipeline.py: the whole Kun loop over one corpus."""

    output: str = MISSING
    """Folder of the run; each stage has a folder in it. On storage that all nodes share."""
    corpora: list[CorpusConfig] = dataclasses.field(default_factory=list)
    """The raw text; empty leaves it to stages.prepare."""
    documents: str | None = None
    """Folder of a finished prepare stage, in place of preparing corpora."""
    seeds: str | None = None
    """Seed pairs (Alpaca or ShareGPT) that the label and chat models learn from."""
    held_out: str | None = None
    """Seed pairs that no model learns from, to measure each model's loss on."""
    models: ModelsConfig = dataclasses.field(default_factory=ModelsConfig)
    """The base model, and models to use in place of training."""
    stages: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """What stands behind `python jobs/<job>.py` for each stage: YAML files and key=value. Stages: prepare, train_label,
    label, train_chat, curate (score and polish), export, train_final. Inputs, outputs and models are filled in.
    Without train_final the loop ends with the dataset."""
    iterations: int = 1
    """How often to score, polish and train: each time after the first with the final model of the time before."""
    overlap: bool = False
    """Runs one training and one inference stage side by side where the graph allows: they must then ask for GPUs that are
    there for both, such as by `resources` or `accelerator_type`. Off, they follow each other, each with all GPUs."""
    dry_run: bool = False
    """Prints every stage, whether it would run and why, and ends."""
    lease_s: float = lease.LEASE_S
    """A run that gave no sign of life for so many seconds counts as dead: another one may go on in its output."""
    ray: RayConfig = dataclasses.field(default_factory=RayConfig)
    """The Ray cluster that all stages join; its other settings are for one that starts here."""

    def __post_init__(self) -> None:
        for name in self.stages:
            require(name in STAGES, f"there is no stage `{name}`; stages are {', '.join(STAGES)}")
        require(self.iterations >= 1, "iterations must be at least 1")
        final = "train_final" in self.stages
        require(
            final or self.iterations == 1, "iterations above 1 need stages.train_final, whose model the next one uses"
        )


@dataclasses.dataclass(frozen=True)
class Job:
    """One script under jobs/ and how its output is identified."""

    schema: type
    fingerprint: Callable[[Any], dict[str, Any]]
    """What decides the output. Needs complete inputs; raises KunError without them."""
    exclusive: bool
    """Whether it holds GPUs, so that without `overlap` no other such job runs beside it."""


JOBS = {
    "prepare": Job(prepare.PrepareConfig, lambda c: prepare.fingerprint(c, list_corpora(c.corpora)), False),
    "generate": Job(generate.GenerateConfig, fingerprint.identity, True),
    "export": Job(export.ExportConfig, lambda c: export.fingerprint(c, store.require_complete(c.input)), False),
    "train": Job(TrainConfig, trained.fingerprint, True),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One node of the graph."""

    name: str
    job: str
    args: list[str]
    needs: tuple[str, ...]
    config: Any

    @property
    def folder(self) -> store.Folder:
        return store.Folder(self.config.output)

    @property
    def command(self) -> list[str]:
        """What runs this stage alone."""
        return ["python", f"jobs/{self.job}.py", *self.args]


class Graph:
    """The stages of one run, in an order in which they can run, each with its whole configuration checked.

    Raises:
        ConfigError: a stage, model or path that is needed is not given, or a stage's own configuration is wrong.
    """

    def __init__(self, config: PipelineConfig) -> None:
        self.config = config
        self.stages: dict[str, Stage] = {}
        given = config.models
        documents = config.documents or self._prepare()
        label = given.label or self._train("train_label", "label")
        labelled = self._generate("label", documents, {"label": label})
        both = given.score and given.polish
        chat = None if both else self._train("train_chat", "chat")
        roles = {"score": given.score or chat, "polish": given.polish or chat}
        for number in range(1, config.iterations + 1):
            end = "" if number == 1 else f"-{number}"
            curated = self._generate(f"curate{end}", labelled, roles)
            exported = self._add(f"export{end}", "export", [f"input={curated}"], [curated])
            if "train_final" in config.stages:
                chat = self._train(f"train_final{end}", "chat", exported)
                roles = {"score": chat, "polish": chat}

    def _prepare(self) -> str:
        config, more = self.config, list[str]()
        if config.corpora:
            more.append(f"corpora={json.dumps([to_dict(corpus) for corpus in config.corpora], ensure_ascii=False)}")
        tokenizer = config.models.label or config.models.base
        if tokenizer:
            more.append(f"tokenizer={tokenizer}")
        return self._add("prepare", "prepare", more, [])

    def _train(self, name: str, task: str, exported: str | None = None) -> str:
        """Adds a training stage on the seed pairs, or on an export and the seed pairs; returns its model's folder."""
        config = self.config
        require(bool(config.models.base), f"models.base is not given: {name} has nothing to train from")
        merged = self._peek(name, "train")
        places = [path for path in (exported, config.seeds) if path][: len(merged.data)]
        require(bool(places), f"seeds is not given: {name} learns from seed pairs")
        more = [f"model={config.models.base}", *(f"data.{n}.path={path}" for n, path in enumerate(places))]
        if config.held_out and not merged.valid:
            more.append(f"valid=[{{path: {json.dumps(config.held_out, ensure_ascii=False)}, task: {task}}}]")
        return f"{self._add(name, 'train', more, [exported] if exported else [])}/model"

    def _generate(self, name: str, source: str, models: dict[str, str | None]) -> str:
        """Adds a generate stage whose steps run on `models`."""
        more, used = [f"input={source}"], []
        for pool, settings in self._peek(name, "generate").pools.items():
            roles = {str(models[step]): step for step in settings.steps if models.get(step)}
            require(
                len(roles) <= 1,
                f"stages.{name}: pool `{pool}` runs {' and '.join(settings.steps)}, which have different models: give each a pool",
            )
            for model in roles:
                base = self._base_of(model)
                more.append(f"pools.{pool}.model={base or model}")
                more += [f"steps.{step}.adapter={model}" for step in settings.steps if base and step in models]
                if base and (template := self._template_of(model)):
                    more.append(f"pools.{pool}.chat_template={template}")
                used.append(model)
        return self._add(name, "generate", more, [source, *used])

    def _base_of(self, model: str) -> str | None:
        """The base model, if `model` is a LoRA adapter that a stage of this graph will publish."""
        for stage in self.stages.values():
            if stage.job == "train" and model == f"{stage.config.output}/model":
                lora = stage.config.lora
                return str(stage.config.model) if lora is not None and not lora.merge else None
        return None

    def _template_of(self, model: str) -> str | None:
        """The chat template that the stage which publishes `model` was told to train with."""
        stages = [s for s in self.stages.values() if s.job == "train" and model == f"{s.config.output}/model"]
        return stages[0].config.chat_template if stages else None

    def _add(self, name: str, job: str, more: list[str], inputs: list[str]) -> str:
        """Adds a stage that reads `inputs`, folders of other stages or of none; returns its own folder."""
        output = store.Folder(self.config.output).below(name).uri
        args = [*self._args(name), *more, f"output={output}"]
        try:
            config: Any = load(JOBS[job].schema, args)
        except ConfigError as error:
            raise ConfigError(f"stages.{name.partition('-')[0]}: {error}") from None
        makers = {stage.config.output: stage.name for stage in self.stages.values()}
        needs = [makers.get(place.removesuffix("/model"), "") for place in inputs]
        self.stages[name] = Stage(name, job, args, tuple(filter(None, needs)), config)
        return output

    def _peek(self, name: str, job: str) -> Any:
        """A stage's configuration before its inputs, output and models are filled in."""
        try:
            return merge(JOBS[job].schema, self._args(name))
        except ConfigError as error:
            raise ConfigError(f"stages.{name.partition('-')[0]}: {error}") from None

    def _args(self, name: str) -> list[str]:
        key = name.partition("-")[0]
        require(
            key in self.config.stages,
            f"stages.{key} is not given: the YAML files of that stage, such as stages.{key}=[conf/{key}.yaml]",
        )
        return self.config.stages[key]
