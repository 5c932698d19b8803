"""`apply --text` that was interrupted or killed: the same command goes on at the next block."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseprune.calibration.sweeping import Sweep
from sparseprune.execution.reconstruct import RebuildMatrices
from tests.calibration.models import made, text
from tests.commands import Said, run

pytestmark = pytest.mark.usefixtures("quiet_transformers")

CONTINUED = "an unfinished run is continued"
SIZES = ("--length", "12", "--sequences", "8", "--jobs", "1")
PLACES = {  # what is called last, and how often: q, k, v, o, gate, up and down are rebuilt in four stages
    "within a stage": (RebuildMatrices, "work", 2),
    "between stages": (Sweep, "gather", 3),
    "between layers": (Sweep, "go", 1),
    "within the last layer": (RebuildMatrices, "work", 12),
    "at the end": (Sweep, "go", 2),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama and two texts; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("continued"), "llama")
    (folder / "other.txt").write_text(text(seed=4))
    return folder


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """SIGINT is heard also where a shell let it be ignored."""
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def words(home: Path, out: Path, file: str = "words.txt") -> list[str]:
    return ["apply", str(home / "llama"), "2of4-admm", "--text", str(home / file), *SIZES, "-o", str(out)]


def swept(home: Path, out: Path, file: str = "words.txt") -> Said:
    return run(*words(home, out, file))


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells the time."""
    files = (one for one in folder.rglob("*") if one.is_file() and "report" not in one.name)
    return {str(one.relative_to(folder)): one.read_bytes() for one in files}


def hidden(out: Path) -> Path:
    return out.with_name(f".{out.name}.sparseprune-partial")


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[str, bytes]:
    """What a run writes that nothing interrupts."""
    assert swept(home, home / "whole").code == 0
    return contents(home / "whole")


def interrupt(patch: pytest.MonkeyPatch, place: str) -> None:
    """Ctrl-C comes at a place."""
    kind, method, count = PLACES[place]
    usual: Any = getattr(kind, method)
    left = iter(range(count - 1))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return usual(*arguments, **named)

    patch.setattr(kind, method, called)


def test_an_interrupted_sweep_is_continued_to_the_same_bytes_wherever_it_ends(
    home: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for place in PLACES:
        out = tmp_path / place.replace(" ", "-")
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, place)
            said = swept(home, out)
        assert said.code == 130, (place, said.err)
        assert not out.exists()
        assert hidden(out).exists()
        said = swept(home, out)
        assert said.code == 0, (place, said.err)
        assert CONTINUED in said.err
        assert contents(out) == whole, place
        assert not hidden(out).exists()


def test_finished_blocks_are_not_rebuilt_again(home: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "within the last layer")
        assert swept(home, tmp_path / "out").code == 130
    again = []
    with pytest.MonkeyPatch.context() as patch:
        usual = RebuildMatrices.work

        def work(*arguments: Any) -> Any:
            again.append(arguments[0].task.instance.label)
            return usual(*arguments)

        patch.setattr(RebuildMatrices, "work", work)
        assert swept(home, tmp_path / "out").code == 0
    assert contents(tmp_path / "out") == whole
    assert 0 < len(again) <= 7


_KILLED = """
import os, signal, sys
from sparseprune.calibration.sweeping import Sweep
from sparseprune.execution.reconstruct import RebuildMatrices
from sparseprune.cli import main
kind, method, count = {"Sweep": Sweep, "RebuildMatrices": RebuildMatrices}[sys.argv[1]], *sys.argv[2:4]
usual, left = getattr(kind, method), iter(range(int(count) - 1))
def called(*arguments, **named):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return usual(*arguments, **named)
setattr(kind, method, called)
sys.argv = ["sparseprune", *sys.argv[4:]]
main()
"""


def test_a_killed_sweep_is_continued_to_the_same_bytes(
    home: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for kind, method, count in (PLACES["between layers"], PLACES["within the last layer"]):
        where = (kind.__name__, method, str(count if method == "go" else count - 7))
        command = [sys.executable, "-c", _KILLED, *where, *words(home, out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr
    said = swept(home, out)
    assert said.code == 0, said.err
    assert CONTINUED in said.err
    assert contents(out) == whole


def test_a_sweep_over_other_text_is_not_continued(
    home: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, "between layers")
        assert swept(home, out, "other.txt").code == 130
    said = swept(home, out)
    assert said.code == 0, said.err
    assert CONTINUED not in said.err
    assert "the text" in said.err
    assert contents(out) == whole
