"""What will a run need and cost? Documents, memory, hours, disk and price of every stage, before a GPU is taken.

Counts come from a sample of the real input, cleaned by the real filters with the real tokenizer; sizes from the models'
config.json; speeds from capacity.py. What is assumed is said so. `measured` corrects the speeds by runs that are there.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from kun_ray import capacity, models, store
from kun_ray.bill import Line, hold_together, parameters, show
from kun_ray.capacity import CARDS, TRAIN_MFU, Card, Traffic
from kun_ray.config import ConfigError, one_of, require
from kun_ray.cost import Cost, cost_of
from kun_ray.estimate import COMPRESSION, sample_corpora
from kun_ray.export import ExportConfig
from kun_ray.generate import GenerateConfig
from kun_ray.graph import Graph, PipelineConfig
from kun_ray.pool import PoolConfig
from kun_ray.prepare import PrepareConfig
from kun_ray.train.config import TrainConfig
from kun_ray.train.dry import cheapest_change
from kun_ray.train.memory import memory_of
from kun_ray.workload import Options, Work, count_input, count_training, measure_pairs, traffic

BYTES_PER_TOKEN = 4.5
"""Of Chinese text in UTF-8, about: three bytes a character, and TOKENS_PER_CHAR."""


@dataclasses.dataclass
class PipelinePlan(Options, PipelineConfig):
    """jobs/plan.py: what a whole pipeline needs (also takes the configuration of one generate, train or prepare job)."""

    seeds: str = "seeds.jsonl"
    """Seed pairs; those that are not there yet are assumed, and the plan says so."""
    held_out: str | None = "held_out.jsonl"
    """Seed pairs that no model sees."""


@dataclasses.dataclass
class GeneratePlan(Options, GenerateConfig):
    """jobs/plan.py: what one generate job needs."""


@dataclasses.dataclass
class TrainPlan(Options, TrainConfig):
    """jobs/plan.py: what one train job needs."""


@dataclasses.dataclass
class PreparePlan(Options, PrepareConfig):
    """jobs/plan.py: what one prepare job needs."""


def schema_of(keys: set[str]) -> type:
    """The plan's schema for a configuration with these top-level keys."""
    if "stages" in keys or not keys & {"pools", "epochs", "corpora", "filters"}:
        return PipelinePlan
    return GeneratePlan if "pools" in keys else TrainPlan if "epochs" in keys else PreparePlan


def plan(config: Any) -> list[Line]:
    """Prints the plan and returns its lines.

    Raises:
        ConfigError: an input, a model's sizes or a card is not known; the message says which key to give.
    """
    one_of("card", config.card, tuple(CARDS))
    stages, work = _stages(config), Work(0.0, 0.0)
    lines, missing = list[Line](), list[str]()
    prepare = next((stage for _, stage in stages if isinstance(stage, PrepareConfig)), None)
    generate = next((stage for _, stage in stages if isinstance(stage, GenerateConfig)), None)
    given = bool(config.num_documents and config.tokens_per_document)
    if isinstance(config, PipelineConfig):
        _require_models(config, sampling=prepare is not None and not given)
    if given:
        work = Work(float(config.num_documents), float(config.tokens_per_document))
        missing += ["prepare (num_documents and tokens_per_document are given)"] if prepare else []
    elif prepare:
        line, work = plan_prepare(prepare, config)
        lines.append(line)
    elif generate:
        work = count_input(generate.input, config)
        counted = work.tokens > 0 or not work.documents
        require(counted, f"{generate.input} was prepared without a tokenizer: give tokens_per_document=")
    measure_pairs(work, stages)
    factor = _correction(config, work)
    trained = {f"{stage.output}/model": stage.model for _, stage in stages if isinstance(stage, TrainConfig)}
    exports = {
        stage.output: stage.selection.top_k or math.inf for _, stage in stages if isinstance(stage, ExportConfig)
    }
    for name, stage in stages:
        if isinstance(stage, GenerateConfig):
            lines += plan_generate(name, stage, work, config, factor, trained)
        elif isinstance(stage, TrainConfig):
            lines.append(plan_training(name, stage, work, config, exports))
    card = f"{config.card}'s" if any(line.gpus for line in lines) else "two x86 cores'"  # those of CARDS["CPU"]
    assumed = f"{capacity.PREFILL_EFFICIENCY:.0%} of {card} FLOPs in prefill, {capacity.DECODE_EFFICIENCY:.0%} of the bandwidth in decoding, {TRAIN_MFU:.0%} MFU"
    notes = [
        *work.notes,
        f"assumed: {assumed}; {config.good_share:.0%} of the instructions are accepted",
        "memory is computed, speeds are estimates until `measured` gives a run",
        "starting Ray, loading models, checkpoints and a model's admission are not counted",
    ]
    show(lines, missing, notes, config.card, config.price_per_gpu_hour)
    return lines


def _stages(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, PipelineConfig):
        return [(stage.name, stage.config) for stage in Graph(config).stages.values()]
    return [({GeneratePlan: "generate", TrainPlan: "train", PreparePlan: "prepare"}[type(config)], config)]


def _require_models(config: Any, sampling: bool) -> None:
    """Raises ConfigError for a model that is not there by the pipeline's key: its stages know it as `model` or `tokenizer`."""
    keys = [] if config.model_config else [field.name for field in dataclasses.fields(config.models)]
    if sampling:
        keys.append("label" if config.models.label else "base")
    config.models.require_folders(keys)


def sizes_at(model: str, model_config: str | None, base: str | None = None) -> str:
    """Where a model's sizes are to be read: in `model_config`, else in the model's own folder or hub repository, else in
    those of `base`, which this run will train it from.

    Raises:
        ConfigError: they are not to be had.
    """
    if model_config:
        require(Path(model_config).is_file(), f"model_config: there is no file {model_config}")
        return model_config
    place = model if base is None or Path(model, "config.json").is_file() else base
    require(
        not models.is_missing_folder(place),
        f"there is no folder {place}; mend it, or give model_config=<a config.json>",
    )
    models.require_on_hub(place, "the sizes of a model (or give model_config=<a config.json>)")
    return models.fetch_model(place, weights=False)


@functools.lru_cache(maxsize=8)
def _built(path: str, trust_remote_code: bool) -> Cost:
    return cost_of(path, None, trust_remote_code)


def plan_prepare(config: PrepareConfig, options: Any) -> tuple[Line, Work]:
    """The prepare stage, and what it leaves to the stages behind it, from a sample of the corpora."""
    found, work = sample_corpora(config, options)
    cores = config.ray.num_cpus or os.cpu_count() or 1
    documents = f"{work.documents:,.0f} documents of {work.tokens:,.0f} tokens"
    what = f"{found.records:,.0f} records, {documents}, {cores} cores"
    return Line("prepare", what, seconds=found.core_seconds / cores, disk_gb=found.disk_bytes / 1e9), work


def plan_generate(
    name: str, config: GenerateConfig, work: Work, options: Any, factor: float, trained: dict[str, str]
) -> list[Line]:
    """The pools of a generate stage.

    Args:
        factor: how much slower than planned measured runs were.
        trained: models that the same run trains, each with its base.
    """
    lines = [plan_pool(name, pool, config, work, options, factor, trained) for pool in config.pools]
    work.notes += hold_together(lines, [pool.replicas for pool in config.pools.values()])
    steps = {step for pool in config.pools.values() for step in pool.steps}
    text = work.tokens * (options.good_share if "score" in steps else 1.0)  # rejected rows lose theirs
    answer = work.answer * options.good_share if "polish" in steps else 0.0
    num_bytes = work.documents * (text + work.instruction + answer) * BYTES_PER_TOKEN
    lines[-1].disk_gb = num_bytes / COMPRESSION / 1e9
    return lines


def plan_pool(
    name: str, pool_name: str, config: GenerateConfig, work: Work, options: Any, factor: float, trained: dict[str, str]
) -> Line:
    """One pool of a generate stage, with the time that it would take alone."""
    pool = config.pools[pool_name]
    cost = _built(sizes_at(pool.model, options.model_config, trained.get(pool.model)), pool.trust_remote_code)
    card = CARDS["CPU" if pool.accelerator == "cpu" else options.card]
    asked = traffic(pool, config, work, options.good_share)
    found = capacity.capacity(pool, cost, card, asked)
    gpus = round(pool.replicas * pool.num_gpus())
    what = f"{' + '.join(pool.steps)}: {pool.replicas} × {parameters(cost.num_parameters)}, {decimal(int(found.weights_gb * 1e9))} weights"
    if found.fits:
        speed = f"{found.rows_per_s * pool.replicas / factor:,.2f} rows/s"
        each = "" if pool.accelerator == "cpu" else " per GPU"
        what += f" and {found.kv_gb:.1f} GB KV{each},\n{found.num_sequences} rows at once, {speed}"
    change = "" if found.fits else capacity.smallest_change(pool, cost, card, asked)
    fits = "yes" if found.fits else f"no: pools.{pool_name}.{change}" if "=" in change else f"no: {change}"
    if change.startswith("tensor_parallel_size=") and (fewer := gpus // int(change.split("=")[1])):
        fits += f" pools.{pool_name}.replicas={fewer}" if fewer < pool.replicas else ""
    seconds = work.documents / (found.rows_per_s * pool.replicas) * factor
    return Line(name, what, fits, gpus, seconds, pool=pool_name if len(config.pools) > 1 else "")


def plan_training(name: str, config: TrainConfig, work: Work, options: Any, exports: dict[str, float]) -> Line:
    """One training stage; `exports` are those of the same run, as `count_training` takes them."""
    place = sizes_at(config.model, options.model_config)
    cost = (
        cost_of(place, config.lora, config.trust_remote_code)
        if config.lora
        else _built(place, config.trust_remote_code)
    )
    samples, tokens = count_training(config, work, options.good_share, exports)
    epochs = float(config.epochs)
    if config.max_steps is not None:
        epochs = min(epochs, config.max_steps * config.batch_size / max(1.0, samples))
    card: Card = CARDS["CPU" if config.accelerator == "cpu" else options.card]
    mean = tokens / samples if samples else 1.0
    seconds = cost.seconds(tokens * epochs, mean, config.num_workers, card.flops, TRAIN_MFU)
    fits, what = "yes", f"{samples:,.0f} samples × {epochs:.3g} epochs, {parameters(cost.num_parameters)}"
    if config.accelerator == "gpu":
        memory = memory_of(cost, config)
        what += f", {memory['gpu']:.1f} GB per GPU" + (
            f", {memory['host']:.0f} GB host per rank" if memory["host"] else ""
        )
        if memory["gpu"] > card.memory_gb:
            fits = f"no: {cheapest_change(config, cost, card.memory_gb)}"
    disk = (config.keep_last + 1) * cost.checkpoint_gb() + 2 * cost.num_parameters / 1e9
    return Line(name, what, fits, config.num_workers if config.accelerator == "gpu" else 0, seconds, disk)


def _correction(options: Any, work: Work) -> float:
    """Measured over planned seconds of the finished stages in `measured`, 1 without any."""
    planned = measured = 0.0
    for place in options.measured:
        folder = store.require_complete(place)
        summary, manifest = folder.read_json(store.SUMMARY), folder.read_json(store.MANIFEST)
        require("pools" in summary, f"measured: {place} is no generate stage")
        for name, counters in summary["pools"].items():
            if not counters.get("answered") or not counters.get("busy_s"):
                continue
            pool = PoolConfig(**manifest["config"]["pools"][name])
            card = CARDS["CPU" if pool.accelerator == "cpu" else options.card]
            rows = counters["answered"]
            prompt, output = counters["prompt_tokens"] / rows, counters["output_tokens"] / rows
            asked = Traffic(prompt - counters.get("cached_tokens", 0) / rows, output, prompt + output / 2)
            found = capacity.capacity(pool, _measured_sizes(place, pool), card, asked)
            planned += rows / found.rows_per_s
            measured += max(1.0, counters["busy_s"])
    if planned:
        work.notes.append(
            f"speeds corrected by {len(options.measured)} measured runs: {measured / planned:.2f} × the planned time"
        )
    return measured / planned if planned else 1.0


def _measured_sizes(place: str, pool: PoolConfig) -> Cost:
    """Of the model that a measured run used, which need not be that of `model_config`."""
    try:
        return _built(sizes_at(pool.model, None), pool.trust_remote_code)
    except (ConfigError, OSError, ValueError) as error:
        found = str(error).splitlines()[0].partition(" (or give")[0]
        raise ConfigError(f"measured: {place} ran {pool.model}, and must be compared with its sizes: {found}") from None
