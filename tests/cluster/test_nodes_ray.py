"""Three nodes: where replicas go, and what becomes of the rows when a node or the head is lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake
import pytest
from chains import HERE, WAIT_S, Chain, ids, kill_session, wait_until
from nodes import Nodes, three_nodes

GPUS = ["accelerator=gpu", "tensor_parallel_size=2"]


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Each with two (pretended) GPUs."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "10")  # instead of a minute
    with three_nodes(num_cpus=4, num_gpus=2) as found:
        yield found


@pytest.fixture
def start(nodes: Nodes, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a job on the three nodes."""
    with contextlib.ExitStack() as stack:

        def start(job: Chain, *more: str) -> Any:
            pools = [f"pools.{name}.{setting}" for name in job.config().pools for setting in GPUS]
            process = job.start(tmp_path / "log", f"ray.address={nodes.address}", *pools, *more)
            stack.callback(kill_session, process)
            return process

        yield start


def starts(job: Chain) -> list[dict[str, Any]]:
    return [event for event in fake.read_journal(job.plan) if event["event"] == "start"]


def where(events: list[dict[str, Any]]) -> set[str]:
    return {event["node"] for event in events}


def lose(nodes: Nodes, where: set[str]) -> str:
    """Kills one of these nodes, but not the head."""
    node = next(node for node in where if node != nodes.head)
    nodes.kill(node)
    return node


def test_replicas_spread_and_a_lost_nodes_rows_run_elsewhere(nodes, start, documents, chain, tmp_path):
    """Each replica's two GPUs lie in one node, so there is one replica a node. The third node is killed and stays away:
    its rows wait until one of the others has nothing more to do, and then run in its place."""
    source = documents(600)  # enough for the third replica, however late a busy machine starts it
    job = chain(source, {"all": ["label", "score", "polish"]}, service_s=(0.1, 0.3))
    process = start(job, "pools.all.replicas=3")
    wait_until(lambda: len(where(starts(job))) == 3 or process.poll() is not None, "three replicas")
    assert process.poll() is None, (tmp_path / "log").read_text()
    lost = lose(nodes, where(starts(job)))

    assert process.wait(WAIT_S) == 0, (tmp_path / "log").read_text()
    assert ids(job.folder()) == ids(source)
    summary = job.folder().read_json("summary.json")
    assert (summary["ok"], summary["repeated_ids"]) == (600, 0)
    events = fake.read_journal(job.plan)
    begun = {event["row"] for event in events if event["node"] == lost}
    ended = {
        event["row"] for event in events if (event["node"], event["step"], event["event"]) == (lost, "polish", "end")
    }
    elsewhere = {event["row"] for event in events if event["node"] != lost}
    assert begun - ended and begun - ended <= elsewhere


def test_a_run_goes_on_with_the_replicas_that_still_fit(nodes, start, documents, chain, tmp_path):
    """The label pool's only node is killed, and the chat pool holds the others: nothing can go on as it was."""
    source = documents(240)
    job = chain(source, by_step_s={"label": (0.5, 0.6), "score": (0.1, 0.2), "polish": (0.1, 0.2)})
    pools = ["pools.label.replicas=1", "pools.label.resources={worker: 1}", "pools.chat.replicas=2"]
    process = start(job, *pools, "wait_for_nodes_s=10")
    wait_until(lambda: len(job.folder().parts()) >= 1 or process.poll() is not None, "a file")
    assert process.poll() is None, (tmp_path / "log").read_text()
    lose(nodes, where([event for event in starts(job) if event["step"] == "label"]))

    assert process.wait(WAIT_S) == 0, (tmp_path / "log").read_text()
    assert ids(job.folder()) == ids(source) and job.folder().read_json("summary.json")["ok"] == 240
    assert "going on with the replicas that fit: 1 of pool label, 1 of pool chat" in (tmp_path / "log").read_text()


def test_a_lost_head_ends_the_job_and_another_cluster_goes_on(nodes, start, documents, chain, tmp_path):
    source = documents(300)
    job = chain(source, {"all": ["label", "score", "polish"]}, service_s=(0.1, 0.3))
    process = start(job, "pools.all.replicas=3")
    wait_until(lambda: len(job.folder().parts()) >= 2 or process.poll() is not None, "files")
    assert process.poll() is None, (tmp_path / "log").read_text()
    nodes.kill(nodes.head)
    assert process.wait(WAIT_S) not in (0, None)

    assert not job.folder().is_complete()
    again = job.start(tmp_path / "again")  # on a Ray of its own
    try:
        assert again.wait(WAIT_S) == 0, (tmp_path / "again").read_text()
    finally:
        kill_session(again)
    assert ids(job.folder()) == ids(source)


def test_pipeline_stages_span_nodes(nodes, start, documents, chain, tmp_path):
    """One engine of six GPUs, two in each node: its placement group takes all three."""
    source = documents(100)
    job = chain(source, {"all": ["label", "score", "polish"]})
    spanning = ["replicas=1", "pipeline_parallel_size=3", "engine.distributed_executor_backend=ray"]
    process = start(job, *(f"pools.all.{setting}" for setting in spanning))
    assert process.wait(WAIT_S) == 0, (tmp_path / "log").read_text()
    assert ids(job.folder()) == ids(source) and job.folder().read_json("summary.json")["ok"] == 100
