"""Do the weights fit the cards that the cluster has? A line for each pool or training, before anything is loaded.

generate and train call it once they have joined Ray: a part of jobs/plan.py as their preflight, in seconds. Of what
is not known (a card without an entry here, a model whose files are not at hand, or quantized) nothing is said.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Final

from huggingface_hub import try_to_load_from_cache

from kun_ray.capacity import CARDS, Card, Traffic, capacity, smallest_change
from kun_ray.config import ConfigError
from kun_ray.cost import Cost, cost_of_files
from kun_ray.pool import PoolConfig
from kun_ray.train.config import TrainConfig
from kun_ray.train.dry import cheapest_change
from kun_ray.train.memory import memory_of
from kun_ray.workload import Options, count_input, traffic

if TYPE_CHECKING:
    from kun_ray.generate import GenerateConfig

NAMES: Final = {
    "A100-40G": CARDS["A100-40"],
    "A100-80G": CARDS["A100-80"],
    "A100": CARDS["A100-80"],
    "H100": dataclasses.replace(CARDS["H100"], memory_gb=94),  # the H100 NVL has 94 GB and Ray gives it the same name
    "H200": CARDS["H200"],
    "L40S": CARDS["L40S"],
}
"""Ray's accelerator types, each as the card of this name with the most memory: only what fits none of them is refused."""
_GIB: Final = 1.074
"""What a maker calls a GB of a card may be a GiB; a refusal allows for it."""
_STATES: Final = ("weights", "gradients", "optimizer", "hpz_copy")
"""What each rank of a training holds from beginning to end, to the byte; the rest is less certain."""


def check_pools(config: GenerateConfig, accelerators: set[str]) -> None:
    """Prints what one replica of each pool will hold.

    Args:
        config: of the generate job.
        accelerators: Ray's names of the cards of all nodes with GPUs; empty if one has no name.
    Raises:
        ConfigError: a pool's weights are larger than the memory that its engine may take of a card.
    """
    costs = {name: _cost(pool.model) for name, pool in config.pools.items()}
    work = count_input(config.input, Options()) if any(costs.values()) else None
    for name, pool in config.pools.items():
        cost = costs[name]
        if cost is not None and work is not None:
            card = CARDS["CPU"] if pool.accelerator == "cpu" else _largest(accelerators, pool.accelerator_type)
            _check_pool(name, pool, cost, card, traffic(pool, config, work, Options().good_share))


def check_training(config: TrainConfig, accelerators: set[str]) -> None:
    """Prints what one rank will hold on its GPU. `gpu_memory_gb` takes the place of the card's memory.

    Raises:
        ConfigError: weights, gradients and optimizer alone are larger than the card.
    """
    cost = _cost(config.model, config)
    card = _largest(accelerators, config.accelerator_type)
    if config.accelerator != "gpu" or cost is None or not (card or config.gpu_memory_gb):
        return
    limit = config.gpu_memory_gb or card.memory_gb * _GIB  # type: ignore[union-attr]
    memory = memory_of(cost, config)
    states = sum(memory[name] for name in _STATES)
    print(
        f"memory: {memory['gpu']:.1f} GB on each GPU, of these {states:.1f} of weights, gradients and optimizer (computed)"
    )
    if states > limit:
        raise ConfigError(
            f"weights, gradients and optimizer take {states:.1f} GB on each GPU, of {limit:.0f}: {cheapest_change(config, cost, limit)}"
        )
    if memory["gpu"] > limit:
        print(
            f"note: a GPU has {limit:.0f} GB; if this runs out of memory: {cheapest_change(config, cost, limit)}",
            flush=True,
        )


def _check_pool(name: str, pool: PoolConfig, cost: Cost, card: Card | None, asked: Traffic) -> None:
    found = capacity(pool, cost, card or CARDS["H200"], asked)
    each = f"pool {name}: {cost.num_parameters / 1e9:.3g} billion parameters, {found.weights_gb:.3g} GB of weights per "
    if card is None:
        print(f"{each}GPU", flush=True)
        return
    print(
        f"{each}{'engine' if pool.accelerator == 'cpu' else 'GPU'}, {found.kv_tokens:,} tokens of KV cache, "
        f"{found.num_sequences} rows at once (computed)",
        flush=True,
    )
    if pool.accelerator == "cpu" or found.fits or {"cpu_offload_gb", "quantization"} & set(pool.engine):
        return
    change = smallest_change(pool, cost, card, asked)
    advice = f"set pools.{name}.{change}" if "=" in change else f"take {change}"
    share = float(pool.engine.get("gpu_memory_utilization", 0.9))
    if found.weights_gb > card.memory_gb * _GIB * share:
        raise ConfigError(
            f"pools.{name}: its weights take {found.weights_gb:.1f} GB on each GPU, but an engine may take {share:.0%} of the "
            f"{card.memory_gb:g} GB that a card here has: {advice}"
        )
    print(f"note: pool {name} has hardly room for one row of max_model_len; if it does not start, {advice}", flush=True)


def _largest(accelerators: set[str], wanted: str | None) -> Card | None:
    """The card with the most memory of those that may be given; None if one of them is not known."""
    cards = [NAMES.get(name) for name in ({wanted} if wanted else accelerators)]
    known = [card for card in cards if card is not None]
    return max(known, key=lambda card: card.memory_gb) if known and len(known) == len(cards) else None


def _cost(model: str, config: TrainConfig | None = None) -> Cost | None:
    """A model's sizes from its files on this machine, in a folder or in the hub's cache; None where they are not here."""
    if Path(model).expanduser().is_dir():
        return cost_of_files(str(Path(model).expanduser()), config.lora if config else None)
    cached = try_to_load_from_cache(model, "config.json") if model.count("/") == 1 and "://" not in model else None
    return cost_of_files(str(Path(cached).parent), config.lora if config else None) if isinstance(cached, str) else None
