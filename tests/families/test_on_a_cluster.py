"""Every shipped spec on the machines of a cluster: the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sparseprune.execution.cluster import Cluster
from tests.commands import ok, run, silent
from tests.execution.clusters import machines
from tests.families.checkpoints import Checkpoint, write_statistics
from tests.families.test_library import OPTIONS, SERVED
from tests.families.test_passes import contents
from tests.limits import narrow

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("untraced")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Joined once: each run of its own would wait for new processes."""
    with machines(2) as two, Cluster(two.address) as joined:
        yield joined


@pytest.mark.parametrize("spec", SERVED)
def test_a_cluster_writes_the_same_output(
    spec: str,
    checkpoint_of: Callable[[str], Checkpoint],
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = checkpoint_of(SERVED[spec][0])
    monkeypatch.chdir(tmp_path)
    write_statistics(dense, tmp_path)
    narrow(monkeypatch, 4096, 1024)  # several chunks a pass
    words = ("apply", dense.folder, spec, "-q", "--mask-format", "packed", *OPTIONS.get(spec, ()))
    ok(*words, "-o", tmp_path / "here")
    silent(*words, "-o", tmp_path / "there", "--on", cluster.address)
    here, there = (contents(tmp_path / name) for name in ("here", "there"))
    assert here == there
    checked = [run("verify", tmp_path / "there", "--json", *on) for on in ((), ("--on", cluster.address))]
    assert [(one.code, one.out) for one in checked] == [(0, checked[0].out)] * 2
