"""Three Ray nodes on this machine, which tests can kill one by one. They belong to a process of their own: nothing in the test's
own process, which may have a Ray too, is connected to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil


@dataclasses.dataclass
class Nodes:
    """What runs where: node id → its raylet."""

    address: str
    head: str
    raylets: dict[str, psutil.Process]
    head_server: psutil.Process

    def workers_of(self, node: str) -> list[psutil.Process]:
        """The processes that this node's raylet has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return self.raylets[node].children(recursive=True)
        return []

    def kill(self, node: str) -> None:
        """SIGKILL to all of a node, as when its power is cut."""
        mine = [self.raylets[node], *self.workers_of(node), *([self.head_server] if node == self.head else [])]
        for process in mine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def three_nodes(**each: Any) -> Iterator[Nodes]:
    """A head and two more nodes with the same resources; those two have one `worker` as well."""
    folder = tempfile.mkdtemp(prefix="kn", dir="/tmp")  # short: Ray's sockets lie below it
    process = subprocess.Popen(
        [sys.executable, __file__, folder, json.dumps({"object_store_memory": 150_000_000, **each})],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    found = {"address": ""}
    try:
        assert process.stdout is not None
        found = json.loads(process.stdout.readline())
        raylets = {node: psutil.Process(pid) for node, pid in found["raylets"].items()}
        yield Nodes(found["address"], found["head"], raylets, psutil.Process(found["head_server"]))
    finally:
        rest = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in rest:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        shutil.rmtree(folder, ignore_errors=True)
        _forget(found["address"])


def _forget(address: str) -> None:
    """The head has noted its address for every Ray of this machine; a clean end would have taken the note away."""
    note = Path("/tmp/ray/ray_current_cluster")
    with contextlib.suppress(OSError):
        if note.read_text().strip() == address:
            note.unlink()


def main(folder: str, each: dict[str, Any]) -> None:
    """Starts the nodes, says where they are, and waits for the end of its input."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False, "temp_dir": folder})
    for _ in range(2):
        cluster.add_node(**{**each, "resources": {**each.get("resources", {}), "worker": 1}})
    cluster.wait_for_nodes()
    nodes = [cluster.head_node, *cluster.worker_nodes]
    found = {
        "address": cluster.address,
        "head": cluster.head_node.node_id,
        "raylets": {node.node_id: node.all_processes["raylet"][0].process.pid for node in nodes},
        "head_server": cluster.head_node.all_processes["gcs_server"][0].process.pid,
    }
    print(json.dumps(found), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
