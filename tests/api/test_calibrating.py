"""Which machines of a cluster run a model: its GPUs, where there are some."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparseprune.api.calibrating import machines_for
from sparseprune.api.run import Run
from sparseprune.calibration import LoadedModel, load_model
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.errors import MachineError
from sparseprune.execution.cluster import Node
from tests.calibration.models import made

pytestmark = pytest.mark.usefixtures("quiet_transformers")
_LARGE = 1 << 34


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    home = made(tmp_path_factory.mktemp("model"), "llama")
    return load_model(open_checkpoint(home / "llama"), "cpu", TensorReader())


def cluster(*nodes: Node, gpus: dict[str, list[tuple[str, int]]] | None = None) -> Any:
    """Machines, and what each of them says of its GPUs."""
    return SimpleNamespace(
        nodes=nodes,
        gpus=sum(node.gpus for node in nodes),
        on_each=lambda _: {node: (gpus or {}).get(node.name, []) for node in nodes},
        share=None,
        stream=lambda **options: options,
    )


def test_without_gpus_every_machine_runs_the_model(loaded: LoadedModel) -> None:
    two = cluster(Node("1", "a", 8), Node("2", "b", 4))
    there, machines = machines_for(Run(None), two, "auto", loaded)
    assert (machines.many, machines.threads, machines.device) == (2, 4, "cpu")
    assert there.elsewhere is not None
    asked: Any = machines.stream
    assert asked() == {"cpus": 4}


def test_each_gpu_runs_the_model_and_machines_without_are_left_out(loaded: LoadedModel) -> None:
    gpus = {"a": [("H", _LARGE), ("H", _LARGE)]}
    run = Run(None)
    there, machines = machines_for(
        run, cluster(Node("1", "a", 8, 2), Node("2", "b", 4), gpus=gpus), "auto", loaded
    )
    assert (machines.many, machines.threads, machines.device) == (2, 4, "cuda")
    assert there.elsewhere is not None
    assert there.elsewhere.machine == "cuda:0 H"
    asked: Any = machines.stream
    assert asked() == {"cpus": 4, "gpus": 1}
    assert not run.warnings


def test_unlike_gpus_are_warned_of(loaded: LoadedModel) -> None:
    run = Run(None)
    two = cluster(
        Node("1", "a", 8, 1), Node("2", "b", 8, 1), gpus={"a": [("H", _LARGE)], "b": [("A", _LARGE)]}
    )
    machines_for(run, two, "cuda", loaded)
    assert run.warnings[0].startswith("the machines have unlike GPUs (A, H): statistics may differ")


@pytest.mark.parametrize(
    ("node", "device", "line"),
    [
        (Node("1", "a", 8), "cuda", "--device cuda: no machine of this cluster has a GPU; leave it out"),
        (Node("1", "a", 8, 1), "auto", "--on: the cluster says that it has GPUs, and torch finds none there"),
    ],
)
def test_gpus_that_are_not_there_are_one_line(
    loaded: LoadedModel, node: Node, device: str, line: str, tmp_path: Path
) -> None:
    with pytest.raises(MachineError) as said:
        machines_for(Run(None), cluster(node), device, loaded)
    assert str(said.value).startswith(line)
