"""Room on the cluster for a stage: a finite wait for the resources that others hold, and who holds what when it ends."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from kun_ray import execution
from kun_ray.config import ConfigError, KunError, RayConfig

ACCELERATOR = "accelerator_type:"
"""Beginning of the resource by which Ray names a node's cards."""


def wait_for_room(
    bundles: list[dict[str, float]],
    wait_s: float,
    what: str,
    accelerator_type: str | None = None,
    grows: bool = False,
) -> None:
    """Returns once the cluster has room for all `bundles` at once; one that `grows` need not have it yet.

    Raises:
        ConfigError: it could never have.
        KunError: it had none for `wait_s` seconds; the message says who holds the resources.
    """
    if not bundles:
        return
    if accelerator_type:
        bundles = [{**bundle, f"accelerator_type:{accelerator_type}": 0.001} for bundle in bundles]
    needs: dict[str, float] = {}
    for bundle in bundles:
        for name, amount in bundle.items():
            needs[name] = needs.get(name, 0.0) + amount
    if not grows:
        execution.require_resources(needs, what)
    group = placement_group(bundles, strategy="PACK", name=f"waiting: {what}")
    try:
        ready, _ = ray.wait([group.ready()], timeout=10)
        if not ready:
            print(f"{what} waits for {_shown(needs)}; {holders()}", flush=True)
            ready, _ = ray.wait([group.ready()], timeout=max(0.0, wait_s - 10))
        if not ready:
            raise KunError(
                f"{what} needs {_shown(needs)}, which were not free within {wait_s:g} s; {holders()}. End that, wait longer "
                "(wait_for_resources_s), or ask for less (fewer replicas or num_workers)"
            )
    finally:
        remove_placement_group(group)


def accelerators() -> set[str]:
    """Ray's names of the cards of all nodes that have GPUs, such as A100; empty if a node does not name its own."""
    found: set[str] = set()
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("GPU"):
            own = {n.removeprefix(ACCELERATOR) for n in node["Resources"] if n.startswith(ACCELERATOR)}
            if not own:
                return set()
            found |= own
    return found


def holders() -> str:
    """What is taken on the cluster, and by which placement groups and actors."""
    total, free = ray.cluster_resources(), ray.available_resources()
    taken = {name: total[name] - free.get(name, 0.0) for name in ("GPU", "CPU") if total.get(name)}
    groups = [
        f"{entry['name'] or 'a placement group'} ({_shown(_sum(entry['bundles'].values()))})"
        for entry in placement_group_table().values()
        if entry["state"] == "CREATED"
    ]
    takers = groups + _actors()
    return f"taken now: {_shown(taken)}" + (f", by {', '.join(takers)}" if takers else "")


def _actors() -> list[str]:
    """Living actors and what they hold; needs the cluster's dashboard, and is silent without it."""
    from ray.util.state import list_actors

    try:
        found: list[Any] = list_actors(filters=[("state", "=", "ALIVE")], detail=True, timeout=5)
    except Exception:  # a local Ray without a dashboard has no state API; the wait itself does not need it
        return []
    return [f"{a.class_name} ({_shown(a.required_resources or {})})" for a in found if (a.required_resources or {})]


def _sum(parts: Any) -> dict[str, float]:
    whole: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            whole[name] = whole.get(name, 0.0) + amount
    return whole


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"


def require_local_gpus(
    config: RayConfig,
    num_gpus: float,
    what: str,
    lower: str = "replicas or tensor_parallel_size",
    key: str = "accelerator",
) -> None:
    """Raises ConfigError when no cluster is joined and this machine has too few GPUs, before Ray is started; `key` does without."""
    if ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS") or not num_gpus:
        return
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    found = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators()
    if num_gpus > found:
        raise ConfigError(
            f"{what} needs {num_gpus:g} GPUs, but this machine has {found}: lower {lower}, set "
            f"{key}=cpu, or join a cluster (ray.address)"
        )


def require_local_cores(config: RayConfig, num_engines: int, what: str) -> None:
    """Raises ConfigError when far more engines than cores would start on this machine and nobody has asked for it."""
    joined = ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS")
    cores = os.cpu_count() or 1
    if not joined and config.num_cpus is None and num_engines > 2 * cores:
        raise ConfigError(
            f"{what} starts {num_engines} engines with accelerator: cpu, but this machine has {cores} cores: lower replicas, join "
            "a cluster (ray.address), or set ray.num_cpus to insist"
        )
