"""Where a pool's replicas go: the Ray options of one engine's actor, and whether the cluster can hold them all.

generate calls it. Tensor-parallel engines stay within one node; pipeline stages may span nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import ray

from kun_ray import execution
from kun_ray.config import ConfigError
from kun_ray.engine import environment
from kun_ray.pool import PoolConfig


def spans_nodes(pool: PoolConfig) -> bool:
    """Whether an engine's GPUs may lie in several nodes, where vLLM places its workers through Ray."""
    return bool(pool.engine.get("distributed_executor_backend") == "ray")


@contextlib.contextmanager
def groups() -> Iterator[list[Any]]:
    """A list for placement groups, which are removed at the end: Ray keeps them until the job is over."""
    made: list[Any] = []
    try:
        yield made
    finally:
        for group in made:
            ray.util.remove_placement_group(group)


def num_cpu_engines(pools: Iterable[PoolConfig]) -> int:
    """Engines that compute on CPUs and share a machine's cores: more threads than cores would wait for each other."""
    return sum(pool.max_replicas or pool.replicas for pool in pools if pool.accelerator == "cpu")


def actor_options(pool: PoolConfig, groups: list[Any], num_engines: int = 1) -> dict[str, Any]:
    """Ray options of one replica: its CPUs, its GPUs on one node, its environment. `num_engines` is the stage's num_cpu_engines.

    Pipeline stages that do not fit one node get a placement group, one bundle a GPU, packed
    onto as few nodes as can be; vLLM then places its workers in it through Ray. They are added to `groups`, for the
    caller to remove.
    """
    options: dict[str, Any] = {
        "num_cpus": pool.num_cpus,
        "resources": dict(pool.resources),
        "runtime_env": {"env_vars": environment(pool, num_engines)},
    }
    if pool.accelerator_type:
        options["accelerator_type"] = pool.accelerator_type
    if not spans_nodes(
        pool
    ):  # packed, as wait_for_room has proved; Ray Data would spread them and may leave no whole node
        return {**options, "num_gpus": pool.num_gpus(), "scheduling_strategy": "DEFAULT"}

    def in_group() -> dict[str, Any]:
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        kind = {f"accelerator_type:{pool.accelerator_type}": 0.001} if pool.accelerator_type else {}
        bundles: list[dict[str, float]] = [{"GPU": 1, **kind} for _ in range(int(pool.num_gpus()))]
        bundles[0] |= {"CPU": pool.num_cpus, **pool.resources}
        group = placement_group(bundles, strategy="PACK")  # vLLM takes bundles of one GPU and sorts them by node
        groups.append(group)
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        return {"scheduling_strategy": strategy}

    options.pop("accelerator_type", None)  # it is in the bundles
    return {**options, "num_gpus": 0, "ray_remote_args_fn": in_group}


def bundles(pools: dict[str, PoolConfig]) -> list[dict[str, float]]:
    """What each replica that the pools start with holds: one bundle for each, or for each GPU of engines that span nodes."""
    found: list[dict[str, float]] = []
    for pool in pools.values():
        kind = {f"accelerator_type:{pool.accelerator_type}": 0.001} if pool.accelerator_type else {}
        own = {"CPU": pool.num_cpus, **pool.resources, **kind}
        gpus = pool.num_gpus()
        if spans_nodes(pool):
            one = [{"GPU": 1.0, **kind} for _ in range(int(gpus))]
            one[0] |= own
        else:
            one = [{**own, **({"GPU": gpus} if gpus else {})}]
        found += [dict(bundle) for _ in range(pool.replicas) for bundle in one]
    return [bundle for bundle in ({k: v for k, v in b.items() if v} for b in found) if bundle]


def require_placement(pools_by_name: dict[str, PoolConfig], what: str) -> None:
    """Raises ConfigError when the cluster could never hold all pools at once, or no node holds a replica's GPUs."""
    pools = pools_by_name.values()
    needs = {
        "CPU": sum(p.replicas * p.num_cpus for p in pools) + 1,
        "GPU": sum(p.replicas * p.num_gpus() for p in pools),
    }
    for pool in pools:
        for resource, amount in pool.resources.items():
            needs[resource] = needs.get(resource, 0) + amount * pool.replicas
    execution.require_resources(
        {k: float(v) for k, v in needs.items() if v},
        f"{what}: {' + '.join(pools_by_name)}",
        "replicas or tensor_parallel_size",
    )
    largest = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
    for name, pool in pools_by_name.items():
        in_one_node = pool.tensor_parallel_size if spans_nodes(pool) else pool.num_gpus()
        if pool.accelerator == "gpu" and in_one_node > largest:
            raise ConfigError(
                f"pools.{name}: a replica wants {in_one_node} GPUs in one node, but the largest node has {largest:g}: lower "
                "tensor_parallel_size, or spread pipeline stages over nodes with engine.distributed_executor_backend=ray"
            )
