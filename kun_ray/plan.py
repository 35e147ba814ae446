"""What will a run need and cost? Documents, memory, hours, disk and price of every stage, before a GPU is taken.

Counts come from a sample of the real input, cleaned by the real filters with the real tokenizer; sizes from the models'
config.json; speeds from capacity.py. What is assumed is said so. `measured` corrects the speeds by runs that are there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kun_ray import capacity, models, store
from kun_ray.capacity import CARDS, TRAIN_MFU, Card, Traffic
from kun_ray.config import one_of, require, show_config
from kun_ray.cost import Cost, cost_of
from kun_ray.estimate import sample_corpora
from kun_ray.generate import GenerateConfig
from kun_ray.graph import Graph, PipelineConfig
from kun_ray.pool import PoolConfig
from kun_ray.prepare import PrepareConfig
from kun_ray.progress import duration
from kun_ray.train.config import TrainConfig
from kun_ray.train.dry import cheapest_change
from kun_ray.train.memory import memory_of
from kun_ray.workload import Options, Work, count_input, count_seeds, traffic


@dataclasses.dataclass
class PipelinePlan(Options, PipelineConfig):
    """jobs/plan.py: what a whole pipeline needs (also takes the configuration of one generate, train or prepare job)."""

    def __post_init__(self) -> None:
        one_of("card", self.card, tuple(CARDS))
        super().__post_init__()


@dataclasses.dataclass
class GeneratePlan(Options, GenerateConfig):
    """jobs/plan.py: what one generate job needs."""


@dataclasses.dataclass
class TrainPlan(Options, TrainConfig):
    """jobs/plan.py: what one train job needs."""


@dataclasses.dataclass
class PreparePlan(Options, PrepareConfig):
    """jobs/plan.py: what one prepare job needs."""


@dataclasses.dataclass
class Line:
    """One stage of the plan."""

    stage: str
    what: str
    fits: str = ""
    gpus: int = 0
    seconds: float = 0.0
    disk_gb: float = 0.0

    @property
    def runs(self) -> bool:
        return not self.fits.startswith("no")

    @property
    def gpu_hours(self) -> float:
        return self.gpus * self.seconds / 3600


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
    stages = _stages(config)
    work, lines = Work(0.0, 0.0), list[Line]()
    prepares = [stage for _, stage in stages if isinstance(stage, PrepareConfig)]
    if config.num_documents and config.tokens_per_document:
        work = Work(float(config.num_documents), float(config.tokens_per_document))
    elif prepares:
        sampled = sample_corpora(prepares[0], config)
        work = sampled.work
        cores = prepares[0].ray.num_cpus or os.cpu_count() or 1
        documents = f"{work.documents:,.0f} documents of {work.tokens:,.0f} tokens"
        what = f"{sampled.records:,.0f} records, {documents}, {cores} cores"
        lines.append(Line("prepare", what, seconds=sampled.core_seconds / cores, disk_gb=sampled.disk_gb))
    elif any(isinstance(stage, GenerateConfig) for _, stage in stages):
        work = count_input(next(stage.input for _, stage in stages if isinstance(stage, GenerateConfig)), config)
    count_seeds(work, stages)
    factor = _correction(config, work)
    for name, stage in stages:
        if isinstance(stage, GenerateConfig):
            lines += [plan_pool(name, pool, stage, work, config, factor) for pool in stage.pools]
        elif isinstance(stage, TrainConfig):
            lines.append(plan_training(name, stage, work, config))
    show_config()
    show(lines, work, config)
    return lines


def _stages(config: Any) -> list[tuple[str, Any]]:
    if isinstance(config, PipelineConfig):
        return [(stage.name, stage.config) for stage in Graph(config).stages.values()]
    return [({GeneratePlan: "generate", TrainPlan: "train", PreparePlan: "prepare"}[type(config)], config)]


def sizes_of(model: str, options: Options, base: str | None = None, trust_remote_code: bool = False) -> Cost:
    """A model's sizes: its own, those of the base that it will be trained from, or of `model_config`."""
    if options.model_config:
        require(Path(options.model_config).is_file(), f"model_config: there is no file {options.model_config}")
        return _built(options.model_config, False)
    for place in (model, base):
        if place and Path(place, "config.json").is_file():
            return _built(place, trust_remote_code)
    wanted = base or model
    models.require_on_hub(wanted, "the sizes of a model (or give model_config=<a config.json>)")
    return _built(wanted, trust_remote_code)


@functools.lru_cache(maxsize=8)
def _built(path: str, trust_remote_code: bool) -> Cost:
    return cost_of(path, None, trust_remote_code)


def plan_pool(name: str, pool_name: str, config: GenerateConfig, work: Work, options: Any, factor: float) -> Line:
    """One pool of a generate stage."""
    pool = config.pools[pool_name]
    base = options.models.base if isinstance(options, PipelineConfig) else None
    cost = sizes_of(pool.model, options, base, pool.trust_remote_code)
    card = CARDS["CPU" if pool.accelerator == "cpu" else options.card]
    asked = traffic(pool, config, work, options.good_share)
    found = capacity.capacity(pool, cost, card, asked)
    gpus = round(pool.replicas * pool.num_gpus())
    what = (
        f"{' + '.join(pool.steps)}: {pool.replicas} × {cost.num_parameters / 1e9:.2f}B, {found.weights_gb:.1f} GB weights and "
        f"{max(0.0, found.kv_gb):.1f} GB KV per GPU, {found.num_sequences} rows at once, {found.rows_per_s * pool.replicas / factor:,.2f} rows/s"
    )
    fits = "yes" if found.fits else f"no: {capacity.smallest_change(pool, cost, card, asked)}"
    stage = name if len(config.pools) == 1 else f"{name}.{pool_name}"
    disk = work.documents * (work.instruction + work.answer * options.good_share) * 4.5 / 1e9 / 2
    return Line(stage, what, fits, gpus, work.documents / (found.rows_per_s * pool.replicas) * factor, disk)


def plan_training(name: str, config: TrainConfig, work: Work, options: Any) -> Line:
    """One training stage. The final model's is on the rows that scoring accepts, at most export's top_k."""
    base = sizes_of(config.model, options, None, config.trust_remote_code)
    cost = base if config.lora is None else cost_of(config.model, config.lora, config.trust_remote_code)
    rows = float(work.pairs)
    if name.startswith("train_final"):
        rows += min(work.documents * options.good_share, _top_k(options))
    mean = work.instruction + work.answer + 20
    card: Card = CARDS["CPU" if config.accelerator == "cpu" else options.card]
    seconds = cost.seconds(rows * config.epochs * mean, mean, config.num_workers, card.flops, TRAIN_MFU)
    fits, what = "yes", f"{rows:,.0f} samples × {config.epochs} epochs, {cost.num_parameters / 1e9:.2f}B"
    if config.accelerator == "gpu":
        memory = memory_of(cost, config)
        what += f", {memory['gpu']:.1f} GB per GPU" + (
            f", {memory['host']:.0f} GB host per rank" if memory["host"] else ""
        )
        if memory["gpu"] > card.memory_gb:
            fits = f"no: {cheapest_change(config, cost, card.memory_gb)}"
    disk = (config.keep_last + 1) * cost.checkpoint_gb() + 2 * cost.num_parameters / 1e9
    return Line(name, what, fits, config.num_workers if config.accelerator == "gpu" else 0, seconds, disk)


def _top_k(options: Any) -> float:
    if isinstance(options, PipelineConfig):
        exports = [stage.config for stage in Graph(options).stages.values() if stage.job == "export"]
        if exports and exports[0].selection.top_k:
            return float(exports[0].selection.top_k)
    return float("inf")


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
            found = capacity.capacity(pool, sizes_of(pool.model, options), card, asked)
            planned += rows / found.rows_per_s
            measured += max(1.0, counters["busy_s"])
    if planned:
        work.notes.append(
            f"speeds corrected by {len(options.measured)} measured runs: {measured / planned:.2f} × the planned time"
        )
    return measured / planned if planned else 1.0


def show(lines: list[Line], work: Work, options: Any) -> None:
    """Prints the plan as a table, with what it rests on below."""
    table = Table("stage", "what", "fits", "GPUs", "time", "GPU-hours", "disk GB", box=None, padding=(0, 2))
    for line in lines:
        hours = f"{line.gpu_hours:,.1f}" if line.gpus and line.runs else ""
        table.add_row(
            line.stage,
            line.what,
            line.fits,
            str(line.gpus or ""),
            duration(line.seconds) if line.runs else "–",
            hours,
            f"{line.disk_gb:,.1f}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    lines = [line for line in lines if line.runs]
    total = sum(line.gpu_hours for line in lines)
    cost = (
        f", {total * options.price_per_gpu_hour:,.0f} at {options.price_per_gpu_hour:g} a GPU-hour"
        if options.price_per_gpu_hour
        else ""
    )
    print(
        f"\ntotal: {duration(sum(line.seconds for line in lines))} if stages follow each other, {total:,.1f} GPU-hours on {options.card}{cost}, {sum(line.disk_gb for line in lines):,.0f} GB of disk"
    )
    assumed = f"{capacity.PREFILL_EFFICIENCY:.0%} of {options.card}'s FLOPs in prefill, {capacity.DECODE_EFFICIENCY:.0%} of its bandwidth in decoding, {TRAIN_MFU:.0%} MFU"
    notes = [
        *work.notes,
        f"assumed: {assumed}; {options.good_share:.0%} of the instructions are accepted",
        "memory is computed, speeds are estimates until `measured` gives a run",
    ]
    print("\n".join(f"- {note}" for note in notes))
