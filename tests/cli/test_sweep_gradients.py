"""`apply --text --gradients`: gradients of the dense model that a sweep takes first."""

import json
from pathlib import Path
from typing import Any

import pytest

import sparseprune
from sparseprune.api.sweeping import Sweeper
from tests.calibration.models import made
from tests.commands import ok

pytestmark = pytest.mark.usefixtures("quiet_transformers")

SIZES = ("--length", 12, "--sequences", 50)  # all that there are, whatever the seed


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and a llama; nothing in it is changed by tests."""
    return made(tmp_path_factory.mktemp("gradients"), "llama")


def waiting(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.glob(".*.sparseprune-gradients-*"))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_gradients_of_the_same_run_are_those_that_calibrate_takes(home: Path, tmp_path: Path) -> None:
    text = ("--text", home / "words.txt", *SIZES)
    ok("calibrate", home / "llama", *text, "--gradients", "-o", tmp_path / "stats", "-q")
    ok("apply", home / "llama", "2of4", *text, "--stats", tmp_path / "stats", "-o", tmp_path / "by", "-q")
    ok("apply", home / "llama", "2of4", *text, "--gradients", "-o", tmp_path / "first", "-q")
    assert weights(tmp_path / "first") == weights(tmp_path / "by")
    report = json.loads((tmp_path / "first/sparseprune/report.json").read_text())
    assert {one["metric"] for one in report["tensors"]} == {"loss"}
    assert waiting(tmp_path) == []
    ok("apply", home / "llama", "2of4", *text, "-o", tmp_path / "without", "-q")
    assert weights(tmp_path / "without") != weights(tmp_path / "first")


def test_gradients_wait_for_a_run_that_continues_and_for_no_other_seed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = ("--text", home / "words.txt", *SIZES)
    ok("apply", home / "llama", "2of4", *text, "--gradients", "-o", tmp_path / "whole", "-q")
    arguments: dict[str, Any] = {
        "text": [home / "words.txt"],
        "length": 12,
        "sequences": 50,
        "gradients": True,
    }

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    def interrupted(seed: int) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(Sweeper, "execute", stopped)
            with pytest.raises(KeyboardInterrupt):
                sparseprune.apply(home / "llama", "2of4", tmp_path / "out", seed=seed, **arguments)
        return waiting(tmp_path)

    (of_seed_0,) = interrupted(0)
    marked = tmp_path / of_seed_0 / "marked"
    marked.touch()
    assert interrupted(0) == [of_seed_0]
    assert marked.exists()  # they were not taken again
    (of_seed_1,) = interrupted(1)
    assert of_seed_1 != of_seed_0
    sparseprune.apply(home / "llama", "2of4", tmp_path / "out", **arguments)
    assert waiting(tmp_path) == []
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
