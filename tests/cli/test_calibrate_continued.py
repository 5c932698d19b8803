"""`calibrate` that was interrupted: the same command continues inside of a pass, to the same bytes."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sparseprune.calibration import collecting, loading
from sparseprune.checkpoint import StagedOutput
from tests.calibration.models import albert, made, save, text
from tests.commands import Said, run
from tests.faults import failing

SEQUENCES, LENGTH = 5, 12
SOME_MATRICES = 8 * 4 * 48 * 48  # bytes of moments: not enough for all in one pass
CONTINUED = "sparseprune: an unfinished run is continued\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a mixtral and an albert; nothing in it is changed by tests."""
    folder = made(tmp_path_factory.mktemp("continued"), "mixtral")
    save(albert(), folder / "albert")
    return folder


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sequence at a time; SIGINT is heard also where a shell let it be ignored."""
    monkeypatch.setattr(collecting, "_BATCH_TOKENS", LENGTH)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)


def calibrate(home: Path, model: str, out: Path, *words: object) -> Said:
    sizes = ("--length", LENGTH, "--sequences", SEQUENCES)
    return run("calibrate", home / model, "--text", home / "words.txt", *sizes, "-o", out, *words)


def statistics(folder: Path) -> bytes:
    return (folder / "statistics.safetensors").read_bytes()


def hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.sparseprune-partial")


@pytest.fixture(scope="module")
def whole(home: Path) -> Callable[..., bytes]:
    """The statistics of a run that nothing interrupts, each made once."""

    @cache
    def made(model: str, *words: object) -> bytes:
        out = home / "-".join(("whole", model, *map(str, words)))
        assert calibrate(home, model, out, "-q", *words).code == 0
        return statistics(out)

    return made


class Runs:
    """Counts forward passes that begin."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        usual = loading.LoadedModel.run

        def counted(loaded: Any, ids: Tensor, *back: Any) -> None:
            self.count += 1
            usual(loaded, ids, *back)

        patch.setattr(loading.LoadedModel, "run", counted)


def interrupt_at(patch: pytest.MonkeyPatch, addition: int, number: signal.Signals) -> None:
    """The signal comes when rows are about to be added for this time, and is heard before they are.

    Nothing is put aside while they are.
    """
    usual, pieces = collecting._Collector._add, collecting._Collector.pieces
    left = iter(range(addition - 1))
    adding = threading.Lock()

    def add(collector: Any, unit: Any, *rest: Any) -> None:
        with adding:
            if next(left, None) is None and not collector.stop.is_set():
                os.kill(os.getpid(), number)
                assert collector.stop.wait(20)
                time.sleep(0.05)
            usual(collector, unit, *rest)

    def pieces_of_what_rests(collector: Any, head: Any) -> Any:
        assert not adding.locked()
        return pieces(collector, head)

    patch.setattr(collecting._Collector, "_add", add)
    patch.setattr(collecting._Collector, "pieces", pieces_of_what_rests)


@pytest.mark.parametrize(
    ("arguments", "addition", "number"),
    [
        (("albert",), 1, signal.SIGINT),
        (("albert", "--stats", "norm"), 45, signal.SIGTERM),
        (("mixtral",), 90, signal.SIGHUP),
        (("mixtral", "--memory", SOME_MATRICES), 100, signal.SIGINT),
        (("albert", "--gradients"), 60, signal.SIGTERM),  # on the way there
        (("mixtral", "--gradients", "--memory", SOME_MATRICES), 95, signal.SIGINT),
        (("mixtral", "--gradients"), 140, signal.SIGINT),  # on the way back
    ],
)
def test_a_signal_keeps_the_sums_and_the_same_command_ends_in_the_same_bytes(
    arguments: tuple[Any, ...],
    addition: int,
    number: signal.Signals,
    home: Path,
    whole: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    model, *words = arguments
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, addition, number)
        said = calibrate(home, model, tmp_path / "stats", *words)
    assert said.code == 128 + number
    assert f"what is finished is kept in {hidden(tmp_path / 'stats')}: the same command continues" in said.err
    assert not (tmp_path / "stats").exists()
    said = calibrate(home, model, tmp_path / "stats", *words)
    assert said.code == 0, said.err
    assert CONTINUED in said.err
    assert statistics(tmp_path / "stats") == whole(*arguments)
    assert not hidden(tmp_path / "stats").exists()


def test_a_run_that_is_interrupted_again_and_again_gets_there(
    home: Path, whole: Callable[..., bytes], tmp_path: Path
) -> None:
    """Each time inside of a batch that was begun before."""
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_at(patch, 20, signal.SIGINT)
            assert calibrate(home, "albert", tmp_path / "stats", "-q").code == 130
    assert calibrate(home, "albert", tmp_path / "stats", "-q").code == 0
    assert statistics(tmp_path / "stats") == whole("albert")


@pytest.mark.parametrize(("words", "batches"), [((), 3), (("--memory", SOME_MATRICES), SEQUENCES + 2)])
def test_what_was_put_aside_before_a_kill_is_not_done_again(
    words: tuple[object, ...], batches: int, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed run has on disk is what it has there at that moment."""
    monkeypatch.setattr(collecting, "_PAUSE", 0.0)
    monkeypatch.setattr(collecting, "_PAUSE_SHARE", 0)
    left, usual = tmp_path / "left", StagedOutput.put_aside

    def put_aside(output: StagedOutput, pieces: Any) -> None:
        usual(output, pieces)
        if runs.count > batches and not left.exists():
            output.flush()
            shutil.copytree(output.partial_path, left)
            (left / "aside.new").write_bytes(b"torn")

    with pytest.MonkeyPatch.context() as patch:
        runs = Runs(patch)
        patch.setattr(StagedOutput, "put_aside", put_aside)
        assert calibrate(home, "mixtral", tmp_path / "whole", "-q", *words).code == 0
        left.rename(hidden(tmp_path / "stats"))
        whole, runs.count = runs.count, 0
        assert CONTINUED in calibrate(home, "mixtral", tmp_path / "stats", *words).err
    assert runs.count == whole - batches
    assert statistics(tmp_path / "stats") == statistics(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["cut", "changed", "other"])
def test_sums_that_are_not_what_was_put_aside_are_collected_again(
    harm: str, home: Path, whole: Callable[..., bytes], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 40, signal.SIGINT)
        calibrate(home, "albert", tmp_path / "stats", "-q")
    aside = hidden(tmp_path / "stats") / "aside"
    data = bytearray(aside.read_bytes())
    data[-100] ^= 1
    harmed = {"cut": bytes(data[:-50]), "changed": bytes(data), "other": b"[1]\n"}
    aside.write_bytes(harmed[harm])
    assert calibrate(home, "albert", tmp_path / "stats", "-q").code == 0
    assert statistics(tmp_path / "stats") == whole("albert")


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (("--seed", 1), "the options and the text changed"),
        (("--memory", 2 * 4 * 48 * 48), "--memory changed"),
    ],
)
def test_a_run_of_something_else_is_not_continued_and_it_is_told_why(
    words: tuple[object, ...], changed: str, home: Path, whole: Callable[..., bytes], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 40, signal.SIGINT)
        calibrate(home, "albert", tmp_path / "stats", "-q")
    said = calibrate(home, "albert", tmp_path / "stats", *words)
    assert said.code == 0
    assert f"sparseprune: an unfinished run is not continued, since {changed}\n" in said.err
    assert statistics(tmp_path / "stats") == whole("albert", *words)


def test_a_text_that_was_written_to_is_another_one(home: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    arguments = (home / "albert", "--text", words, "--length", LENGTH, "--sequences", SEQUENCES)
    words.write_text(text())
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 40, signal.SIGINT)
        run("calibrate", *arguments, "-o", tmp_path / "stats", "-q")
    words.write_text(text(seed=4))
    said = run("calibrate", *arguments, "-o", tmp_path / "stats")
    assert "an unfinished run is not continued, since the text changed" in said.err


def test_without_room_for_the_sums_the_run_ends_as_it_does_with_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.api import calibrating
    from sparseprune.errors import MachineError

    monkeypatch.setattr(collecting, "_PAUSE", 0.0)
    monkeypatch.setattr(StagedOutput, "put_aside", failing(MachineError, "no space left on device"))
    monkeypatch.setattr(calibrating, "free_bytes", lambda _: 1000)
    said = calibrate(home, "albert", tmp_path / "stats")
    assert said.code == 0
    assert f"warning: {tmp_path}: 1000 bytes are free, " in said.err
    assert statistics(tmp_path / "stats")
