"""Work that is spread over the machines of a cluster: two nodes of one CPU, and a head without any."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparseprune.errors import CheckpointError, MachineError, NanScoreError, SparsepruneError
from sparseprune.execution import cluster as clusters
from sparseprune.execution.cluster import Cluster, Node, Shared
from sparseprune.execution.regions import Resources
from sparseprune.execution.spreading import share_of
from tests.commands import python
from tests.execution.clusters import Machines, kill_worker, machines

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def two() -> Iterator[Machines]:
    with machines(2) as found:
        yield found


@pytest.fixture(scope="module")
def cluster(two: Machines) -> Iterator[Cluster]:
    with Cluster(two.address) as joined:
        yield joined


def square(number: int) -> int:
    return number * number


def whose(batch: tuple[Shared[list[int]], int]) -> tuple[int, int]:
    shared, place = batch
    return shared.get()[place], id(shared.get())


def fails(number: int) -> int:
    if number == 2:
        raise NanScoreError("w", (1, 2))
    return number


def ends(path: Path) -> str:
    """The first process that does it is killed."""
    if not path.exists():
        path.write_text(str(os.getpid()))
        kill_worker(os.getpid())
    return path.read_text()


def always_ends(path: Path) -> None:
    with path.open("a") as file:
        file.write("x")
    kill_worker(os.getpid())


def counts(batch: tuple[int, Path | None]) -> Iterator[int]:
    """Up to 5; the process ends at 3 where a path says so."""
    first, path = batch
    for number in range(first, 6):
        if number == 3 and path is not None:
            kill_worker(os.getpid())
        yield number
        time.sleep(0.2)


def test_every_batch_gives_its_result_with_its_number(cluster: Cluster) -> None:
    assert [(node.cpus, node.gpus) for node in cluster.nodes] == [(1, 0), (1, 0)]
    assert sorted(cluster.run(square, range(20))) == [(number, number * number) for number in range(20)]
    assert list(cluster.run(square, [])) == []


def test_a_shared_value_is_made_once_in_a_process(cluster: Cluster) -> None:
    shared = cluster.share([10, 11, 12, 13])
    found = dict(cluster.run(whose, [(shared, place) for place in range(4)]))
    assert [value for value, _ in (found[place] for place in range(4))] == [10, 11, 12, 13]
    assert len({place for _, place in found.values()}) <= 2


def test_an_error_of_the_work_is_raised_as_it_is(cluster: Cluster) -> None:
    with pytest.raises(NanScoreError, match=r"w: NaN at \[1, 2\]") as found:
        list(cluster.run(fails, range(40)))
    assert (found.value.tensor, found.value.place) == ("w", (1, 2))


def test_a_worker_that_is_killed_is_replaced(cluster: Cluster, tmp_path: Path) -> None:
    ((_, killed),) = cluster.run(ends, [tmp_path / "first"])
    assert int(killed) != os.getpid()


def test_what_is_lost_four_times_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="lost 4 times"):
        list(cluster.run(always_ends, [tmp_path / "tries"]))
    assert (tmp_path / "tries").read_text() == "xxxx"


def test_after_a_loss_only_the_rest_is_done_again(cluster: Cluster, tmp_path: Path) -> None:
    heard: list[int] = []
    todo: list[tuple[int, Path | None]] = [(0, tmp_path)]

    def rest(_: int) -> tuple[int, Path | None]:
        return heard[-1] + 1, None

    for _, number in cluster.stream(counts, todo, rest):
        heard.append(number)
    assert heard == [0, 1, 2, 3, 4, 5]


def test_every_machine_is_asked(cluster: Cluster) -> None:
    assert list(cluster.on_each(square, 3).values()) == [9, 9]


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("ray://there:10001", "not meant for long runs"),
        ("there", "wanted auto or HOST:PORT"),
        (":6379", "wanted auto or HOST:PORT"),
        ("", "wanted auto or HOST:PORT"),
    ],
)
def test_an_address_that_cannot_be_joined_is_refused(address: str, line: str) -> None:
    with pytest.raises(SparsepruneError, match=line):
        Cluster(address)


def test_an_address_where_nothing_listens_is_one_line() -> None:
    """In a process of its own: this one may have joined a cluster."""
    said = python("-m", "sparseprune", "inspect", "model", "--on", "127.0.0.1:1")
    assert (said.returncode, said.stdout) == (3, "")
    assert said.stderr == (
        "sparseprune: --on 127.0.0.1:1: there is no cluster at 127.0.0.1:1: Connection refused; `ray start "
        "--head` begins one\n"
    )


def test_errors_are_the_same_after_a_pickle() -> None:
    import pickle

    for error in (NanScoreError("w", (1,)), CheckpointError("a", "b"), MachineError("c")):
        error.add_note("noted")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args, again.__dict__) == (type(error), error.args, error.__dict__)


def test_work_ends_where_no_machine_is_left_for_it(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ALONE", 0.5)
    with pytest.raises(MachineError, match="no machine of the cluster is left for the work"):
        list(cluster.run(square, [1], cpus=64))


def nodes_of(*sizes: tuple[int, int]) -> Any:
    """A cluster of machines with so many CPUs and GPUs."""
    return SimpleNamespace(nodes=tuple(Node(str(at), "m", *one) for at, one in enumerate(sizes)))


GIB = 1 << 30


def test_tasks_of_a_machine_divide_its_cpus_and_memory() -> None:
    def share(cluster: Any, most: int, memory: int = 8 * GIB) -> tuple[int, bool]:
        found = share_of(cluster, Resources(1, memory), most)
        return found.cpus, found.memory <= memory

    one, alike, unlike = nodes_of((16, 0)), nodes_of((8, 0), (8, 0)), nodes_of((2, 0), (8, 0))
    assert [share(one, most) for most in (1, 2, 3, 100)] == [(16, True), (8, True), (5, True), (4, True)]
    assert [share(alike, most) for most in (1, 2, 3, 100)] == [(8, True), (8, True), (4, True), (2, True)]
    assert share(unlike, 100) == (1, True)
    assert share(one, 100, GIB // 8)[0] == 16  # there is no room for a second interpreter


def test_each_task_on_cuda_has_a_gpu_of_its_own() -> None:
    def share(cluster: Any, device: str = "cuda") -> tuple[int, int]:
        found = share_of(cluster, Resources(1, 8 * GIB), 100, device)
        return found.cpus, found.gpus

    assert share(nodes_of((16, 4), (16, 0))) == (4, 1)
    assert share(nodes_of((2, 4))) == (1, 1)
    assert share(nodes_of((16, 4)), "cpu") == (4, 0)
    with pytest.raises(SparsepruneError, match="no machine of the cluster has a GPU"):
        share(nodes_of((16, 0)))
    with pytest.raises(SparsepruneError, match="say --device cuda with --on"):
        share(nodes_of((16, 4)), "cuda:1")
