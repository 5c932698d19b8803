"""Every shipped spec on the machines of a cluster: the same bytes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparseprune.execution.cluster import Cluster
from tests.commands import run, silent
from tests.execution.clusters import machines
from tests.families.conftest import Applied
from tests.families.test_library import SERVED
from tests.families.test_passes import contents

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("untraced")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Joined once: each run of its own would wait for new processes."""
    with machines(2) as two, Cluster(two.address) as joined:
        yield joined


@pytest.mark.parametrize("spec", SERVED)
def test_a_cluster_writes_the_same_output(
    spec: str, applied: Applied, cluster: Cluster, tmp_path: Path
) -> None:
    there, on = tmp_path / "there", ("--on", cluster.address)
    silent("apply", applied.dense, *applied.words, "-o", there, *on)
    assert contents(there) == contents(applied.folder)
    checked = [run("verify", there, "--json", *where) for where in ((), on)]
    assert [(one.code, one.out) for one in checked] == [(0, checked[0].out)] * 2
