"""Which cluster is joined or started, with a stand-in for ray; what it raises is one line."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from sparseprune.errors import MachineError, SparsepruneError
from sparseprune.execution import cluster as clusters
from sparseprune.execution.cluster import Cluster, Node

NODE = {"Alive": True, "NodeID": "1", "NodeName": "here", "Resources": {"CPU": 8.0, "GPU": 1.0}}
GONE = NODE | {"Alive": False}
HEAD = NODE | {"Resources": {}}


class Ray:
    """`asked` has the addresses of `init`; those in `running` can be joined."""

    def __init__(self, *running: str, nodes: tuple[Any, ...] = (NODE,)) -> None:
        self.running, self.asked, self._nodes = running, list[str](), nodes
        self.joined = ""
        self._private = SimpleNamespace(worker=SimpleNamespace())
        self.left = 0

    def init(self, address: str, **_: object) -> None:
        self.asked.append(address)
        if address not in self.running:
            raise ConnectionError("Could not find any running Ray instance.\nMore.")
        self.joined = address

    def is_initialized(self) -> bool:
        return bool(self.joined)

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(gcs_address=self.joined)

    def nodes(self) -> tuple[Any, ...]:
        return self._nodes

    def shutdown(self) -> None:
        self.left += 1
        self.joined = ""


@pytest.fixture
def stands_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ray], Ray]:
    """Lets clusters find this ray."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(clusters, "_refuse_silent", lambda _: None)

    def put(ray: Ray) -> Ray:
        monkeypatch.setattr(clusters, "_ray", lambda: ray)
        return ray

    return put


@pytest.mark.parametrize(
    ("environment", "running", "asked"),
    [
        (None, ["auto", "local"], ["auto"]),
        (None, ["local"], ["auto", "local"]),
        ("local", ["auto", "local"], ["local"]),
        ("10.0.0.1:6379", ["auto"], ["auto"]),
    ],
)
def test_auto_joins_what_runs_and_else_starts_a_cluster(
    environment: str | None,
    running: list[str],
    asked: list[str],
    stands_in: Callable[[Ray], Ray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ray = stands_in(Ray(*running))
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with Cluster("auto", 2) as found:
        assert found.nodes == (Node("1", "here", 2, 1),)
        assert (found.cpus, found.gpus) == (2, 1)
    assert (ray.asked, ray.left) == (asked, 1)


@pytest.mark.parametrize(
    ("address", "environment", "line"),
    [
        (
            "10.0.0.2:1",
            None,
            "--on 10.0.0.2:1: there is no cluster at 10.0.0.2:1: Could not find any running",
        ),
        ("auto", "10.0.0.1:6379", "--on auto: there is no cluster at 10.0.0.1:6379: Could not find any"),
        ("auto", None, "--on auto: no cluster could be started: Could not find any running Ray instance"),
    ],
)
def test_no_cluster_is_one_line(
    address: str,
    environment: str | None,
    line: str,
    stands_in: Callable[[Ray], Ray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stands_in(Ray())
    if environment is not None:
        monkeypatch.setenv("RAY_ADDRESS", environment)
    with pytest.raises(MachineError) as said, Cluster(address):
        pass
    assert str(said.value).startswith(line)
    assert "More" not in str(said.value)


def test_machines_that_are_gone_or_have_no_cpu_do_no_work(stands_in: Callable[[Ray], Ray]) -> None:
    ray = stands_in(Ray("auto", nodes=(GONE, HEAD)))
    with (
        pytest.raises(MachineError, match="--on auto: no machine of this cluster has a CPU for work"),
        Cluster("auto"),
    ):
        pass
    assert ray.left == 1


def test_a_cluster_that_the_process_has_joined_is_used_and_left_as_it_is(
    stands_in: Callable[[Ray], Ray],
) -> None:
    ray = stands_in(Ray())
    ray.joined = "10.0.0.1:6379"
    for address in ("auto", "10.0.0.1:6379"):
        with Cluster(address) as found:
            assert found.cpus == 8
    with pytest.raises(SparsepruneError, match=r"has joined the cluster at 10\.0\.0\.1:6379"):
        Cluster("10.0.0.2:1").__enter__()
    assert (ray.asked, ray.left) == ([], 0)


def test_a_thread_joins_without_touching_signals(stands_in: Callable[[Ray], Ray]) -> None:
    stands_in(Ray("auto"))
    found: list[int] = []

    def join() -> None:
        with Cluster("auto") as cluster:
            found.append(cluster.cpus)

    thread = threading.Thread(target=join)
    thread.start()
    thread.join()
    assert found == [8]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            type("OutOfMemoryError", (Exception,), {})("x"),
            "its machine ran out of memory; give a smaller --memory",
        ),
        (RuntimeError("The worker died.\nMore."), "a machine or its worker ended (The worker died)"),
        (
            ConnectionRefusedError(111, "Connection refused"),
            "a machine or its worker ended (Connection refused)",
        ),
        (RuntimeError(), "a machine or its worker ended (RuntimeError)"),
    ],
)
def test_a_loss_is_told_in_a_line(error: Exception, line: str) -> None:
    assert clusters._lost_text(error).startswith(line)
