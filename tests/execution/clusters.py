"""A Ray cluster on this machine: a head without CPUs and nodes of one CPU that can be killed."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sparseprune.execution.cluster import check_address


class Machines:
    """The nodes of a cluster at `address`; their workers import this package from its checkout."""

    def __init__(self) -> None:
        check_address("auto")  # imports ray with our settings
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster()
        self.head = self._cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=1 << 27)
        self.address: str = self._cluster.address
        self.nodes: list[Any] = []

    def add(self, cpus: int = 1, gpus: int = 0) -> Any:
        node = self._cluster.add_node(num_cpus=cpus, num_gpus=gpus, object_store_memory=1 << 27)
        self.nodes.append(node)
        return node

    def kill(self, node: Any) -> None:
        """Every process of a node ends at once."""
        self.nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@contextmanager
def machines(count: int = 2) -> Iterator[Machines]:
    """A cluster with so many nodes, until the end of the context."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="ray-")  # a short one: paths of sockets have 107 bytes at the most
        usual = signal.getsignal(signal.SIGTERM)  # nodes take it for themselves
        patch.setenv("RAY_TMPDIR", folder)  # `auto` of others must not find this one
        found = Machines()
        try:
            for _ in range(count):
                found.add()
            yield found
        finally:
            found.shutdown()
            signal.signal(signal.SIGTERM, usual)
            shutil.rmtree(folder, ignore_errors=True)


def kill_worker(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
