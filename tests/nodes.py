"""Three Ray nodes on this machine, which tests can kill one by one. Nothing in the test's own process is connected to them."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import psutil
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def three_nodes(**each: Any) -> Iterator[Cluster]:
    """A head and two more nodes with the same resources; those two have one `worker` as well."""
    folder = tempfile.mkdtemp(prefix="kn", dir="/tmp")  # short: Ray's sockets lie below it
    each = {"object_store_memory": 150_000_000, **each}
    found = Cluster(initialize_head=True, head_node_args={**each, "include_dashboard": False, "temp_dir": folder})
    try:
        for _ in range(2):
            found.add_node(**{**each, "resources": {**each.get("resources", {}), "worker": 1}})
        found.wait_for_nodes()
        yield found
    finally:
        with contextlib.suppress(Exception):
            found.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def workers_of(node: Any) -> list[psutil.Process]:
    """The processes that this node's raylet has started."""
    (raylet,) = node.all_processes["raylet"]
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(raylet.process.pid).children(recursive=True)
    return []
