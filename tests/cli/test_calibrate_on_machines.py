"""`calibrate --on`: machines that share the work write the bytes of one, whatever is lost meanwhile."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseprune.execution.cluster import Cluster
from tests.calibration.models import albert, made, save
from tests.commands import Said, run
from tests.execution.clusters import Machines, machines

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("quiet_transformers", "one_thread")

SIZES = ("--length", 12, "--sequences", 6)
SOME_MATRICES = 4 * 4 * 48 * 48  # bytes of moments: not enough for all of a block
FEW_MATRICES = 4 * 64 * 64  # not enough for all in one sweep


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a mixtral and an albert; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("machines"), "mixtral")
    save(albert(), folder / "albert")
    return folder


@pytest.fixture(scope="module")
def two() -> Iterator[Machines]:
    with machines(2) as found:
        yield found


@pytest.fixture(scope="module")
def joined(two: Machines) -> Iterator[Cluster]:
    with Cluster(two.address) as found:
        yield found


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As each of the machines has."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.fixture(scope="module")
def local(home: Path) -> Callable[..., tuple[Any, bytes]]:
    """What one process says and writes, each made once."""

    @cache
    def done(model: str, *words: object) -> tuple[Any, bytes]:
        out = home / "-".join(("local", model, *map(str, words)))
        said = calibrate(home / model, out, "--json", "-q", *words)
        assert said.code == 0, said.err
        return told(said.out), statistics(out)

    return done


def calibrate(model: Path, out: Path, *words: object) -> Said:
    return run("calibrate", model, "--text", model.parent / "words.txt", *SIZES, "-o", out, *words)


def statistics(folder: Path) -> bytes:
    return (folder / "statistics.safetensors").read_bytes()


def told(text: str) -> Any:
    found = json.loads(text)
    del found["seconds"], found["output"]
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ("mixtral",),
        ("mixtral", "--kind", "norm"),
        ("mixtral", "--gradients", "--memory", SOME_MATRICES),
        ("albert", "--gradients", "--memory", FEW_MATRICES),
    ],
)
def test_two_machines_write_and_say_what_one_process_does(
    arguments: tuple[Any, ...],
    home: Path,
    local: Callable[..., tuple[Any, bytes]],
    joined: Cluster,
    tmp_path: Path,
) -> None:
    model, *words = arguments
    said = calibrate(home / model, tmp_path / "stats", "--on", joined.address, "--json", "-q", *words)
    assert said.code == 0, said.err
    facts, data = local(*arguments)
    assert told(said.out) == facts
    assert statistics(tmp_path / "stats") == data
    assert not list(Path(tempfile.gettempdir()).glob("sparseprune-states-*"))
