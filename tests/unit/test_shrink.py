"""Which replicas the nodes that are left can hold, and when a run is told."""

from __future__ import annotations

import time
from typing import Any

import pytest

from kun_ray import shrink
from kun_ray.config import KunError
from kun_ray.pool import PoolConfig
from kun_ray.shrink import ReplicasLost, fits, shrunk, watching


def pools(**replicas: int) -> dict[str, PoolConfig]:
    two_gpus: dict[str, Any] = {"model": "m", "steps": ["label"], "tensor_parallel_size": 2}
    return {name: PoolConfig(**two_gpus, replicas=number) for name, number in replicas.items()}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"NodeID": f"n{n}", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 2.0}} for n in range(3)
    ]
    monkeypatch.setattr(shrink.ray, "nodes", lambda: found)
    return found


def test_a_replica_needs_all_of_its_gpus_in_one_node(nodes: list[dict[str, Any]]) -> None:
    assert fits(pools(label=1, chat=2), num_free_cpus=1)
    nodes[0]["Resources"]["GPU"] = 1.0
    nodes[1]["Resources"]["GPU"] = 3.0
    assert not fits(pools(label=1, chat=2), num_free_cpus=1), "six GPUs, but only two pairs"


def test_reading_and_writing_need_a_cpu(nodes: list[dict[str, Any]]) -> None:
    for node in nodes:
        node["Resources"]["CPU"] = 1.0
    assert not fits(pools(label=1, chat=2), num_free_cpus=1) and fits(pools(label=1, chat=2), num_free_cpus=0)


def test_the_largest_pool_gives_way(nodes: list[dict[str, Any]]) -> None:
    nodes[2]["Alive"] = False
    assert {name: pool.replicas for name, pool in shrunk(pools(label=1, chat=2)).items()} == {"label": 1, "chat": 1}
    nodes[1]["Alive"] = False
    with pytest.raises(KunError, match="cannot hold one replica of each pool.*run the same command again"):
        shrunk(pools(label=1, chat=2))


def test_what_few_nodes_can_hold_is_placed_first(nodes: list[dict[str, Any]]) -> None:
    nodes[:] = [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": 8.0}}, {"Alive": True, "Resources": {"CPU": 64.0}}]
    on_cpus = PoolConfig("m", steps=["label"], accelerator="cpu", num_cpus=4)
    assert fits({"label": on_cpus, "chat": PoolConfig("m", steps=["score"], replicas=8)}, num_free_cpus=1)
    cards = [{"GPU": 8.0, "CPU": 64.0, f"accelerator_type:{name}": 1.0} for name in ("H100", "L40S")]
    nodes[:] = [{"Alive": True, "Resources": card} for card in cards]
    any_card = PoolConfig("m", steps=["label"], replicas=8)
    h100 = PoolConfig("m", steps=["score"], replicas=8, accelerator_type="H100")
    assert fits({"label": any_card, "chat": h100}, num_free_cpus=1)


@pytest.mark.parametrize(
    ("alive", "lost", "in_flight", "told"), [(3, 1, 0, True), (3, 0, 0, False), (2, 0, 0, False), (3, 1, 1, False)]
)
def test_a_run_is_told_when_nothing_moves_and_a_node_has_gone(
    nodes: list[dict[str, Any]], alive: int, lost: int, in_flight: int, told: bool
) -> None:
    nodes[2]["Alive"] = alive == 3
    began, heard = time.monotonic(), False
    try:
        with watching(pools(label=1, chat=2), lambda: {"label": {"rows": 7, "in_flight": in_flight}}, after_s=0.4):
            nodes[2]["Alive"] = alive - lost == 3
            time.sleep(1.5)
    except ReplicasLost:
        heard = True
    assert heard == told and (time.monotonic() - began < 1.4) == told
