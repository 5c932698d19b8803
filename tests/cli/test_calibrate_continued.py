"""`calibrate` that was interrupted: the same command continues at the next block, to the same bytes."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from sparseprune.calibration import collecting
from sparseprune.checkpoint import StagedOutput
from tests.calibration.models import albert, made, save, text
from tests.commands import Said, run

SEQUENCES, LENGTH = 5, 12
SOME_MATRICES = 4 * 4 * 48 * 48  # bytes of moments: not enough for all of a block
FEW_MATRICES = 4 * 64 * 64  # not enough for all in one sweep
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


class Sums:
    """Counts the units whose sums are written."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        usual = collecting.Summing._written

        def counted(this: Any, *arguments: Any) -> Any:
            self.count += 1
            return usual(this, *arguments)

        patch.setattr(collecting.Summing, "_written", counted)


def interrupt_after(patch: pytest.MonkeyPatch, notes: int, products: int, number: signal.Signals) -> None:
    """The signal comes in front of this product after so many notes, and is heard before it is computed."""
    usual, note = collecting._Collector.product, collecting.Summing._note
    left = iter(range(products - 1))
    noted: list[str] = []

    def product(collector: Any, one: Any) -> None:
        if len(noted) == notes and next(left, None) is None and not collector._stop.is_set():
            os.kill(os.getpid(), number)
            assert collector._stop.wait(20)
            time.sleep(0.05)
        usual(collector, one)

    def kept(this: Any, key: str, counts: Any) -> None:
        note(this, key, counts)
        noted.append(key)

    patch.setattr(collecting._Collector, "product", product)
    patch.setattr(collecting.Summing, "_note", kept)


@pytest.mark.parametrize(
    ("arguments", "place", "number"),  # in front of a product, after some notes
    [
        (("mixtral",), (1, 1), signal.SIGINT),
        (("mixtral", "--kind", "norm"), (1, 45), signal.SIGTERM),
        (("mixtral",), (1, 60), signal.SIGHUP),
        (("mixtral", "--memory", SOME_MATRICES), (1, 30), signal.SIGINT),
        (("albert", "--gradients", "--memory", FEW_MATRICES), (1, 60), signal.SIGTERM),
        (("mixtral", "--gradients", "--memory", SOME_MATRICES), (1, 80), signal.SIGINT),
        (("mixtral", "--gradients"), (3, 30), signal.SIGINT),  # on the way back
    ],
)
def test_a_signal_keeps_finished_blocks_and_the_same_command_ends_in_the_same_bytes(
    arguments: tuple[Any, ...],
    place: tuple[int, int],
    number: signal.Signals,
    home: Path,
    whole: Callable[..., bytes],
    tmp_path: Path,
) -> None:
    model, *words = arguments
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, *place, number)
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
    """Each time one block later."""
    for _ in range(3):
        with pytest.MonkeyPatch.context() as patch:
            interrupt_after(patch, 1, 1, signal.SIGINT)
            assert calibrate(home, "mixtral", tmp_path / "stats", "-q", "--gradients").code == 130
    assert calibrate(home, "mixtral", tmp_path / "stats", "-q", "--gradients").code == 0
    assert statistics(tmp_path / "stats") == whole("mixtral", "--gradients")


@pytest.mark.parametrize("words", [("--gradients",), ("--gradients", "--memory", SOME_MATRICES)])
@pytest.mark.parametrize("notes", [1, 2, 3, 4])
def test_blocks_that_were_finished_before_a_kill_are_not_summed_again(
    notes: int, words: tuple[object, ...], home: Path, whole: Callable[..., bytes], tmp_path: Path
) -> None:
    """What a killed run has on disk is what it has there when it has noted a block."""
    left, usual, before = tmp_path / "left", StagedOutput.flush, []

    def flush(output: StagedOutput) -> None:
        usual(output)
        before.append(sums.count)
        if len(before) == notes:
            shutil.copytree(output.partial_path, left)

    with pytest.MonkeyPatch.context() as patch:
        sums = Sums(patch)
        patch.setattr(StagedOutput, "flush", flush)
        assert calibrate(home, "mixtral", tmp_path / "whole", "-q", *words).code == 0
        left.rename(hidden(tmp_path / "stats"))
        all_of_them, sums.count = sums.count, 0
        assert CONTINUED in calibrate(home, "mixtral", tmp_path / "stats", *words).err
    assert 0 < before[notes - 1] < all_of_them
    assert sums.count == all_of_them - before[notes - 1]
    assert statistics(tmp_path / "stats") == whole("mixtral", *words)


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
        interrupt_after(patch, 1, 1, signal.SIGINT)
        calibrate(home, "mixtral", tmp_path / "stats", "-q")
    said = calibrate(home, "mixtral", tmp_path / "stats", *words)
    assert said.code == 0
    assert f"sparseprune: an unfinished run is not continued, since {changed}\n" in said.err
    assert statistics(tmp_path / "stats") == whole("mixtral", *words)


def test_a_text_that_was_written_to_is_another_one(home: Path, tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    arguments = (home / "mixtral", "--text", words, "--length", LENGTH, "--sequences", SEQUENCES)
    words.write_text(text())
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 1, 1, signal.SIGINT)
        run("calibrate", *arguments, "-o", tmp_path / "stats", "-q")
    words.write_text(text(seed=4))
    said = run("calibrate", *arguments, "-o", tmp_path / "stats")
    assert "an unfinished run is not continued, since the text changed" in said.err
