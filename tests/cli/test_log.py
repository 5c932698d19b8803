"""`--log FILE`: what a command says, with times, also where stderr is to be quiet."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune import __version__
from sparseprune.cli import signals
from sparseprune.cli.log import Log
from tests.commands import ok, refused, run, silent

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save_file({"layers.0.attn.q_proj.weight": torch.randn(8, 8)}, tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def logged(path: Path) -> list[str]:
    """The lines of a log, without their times, which all of them have."""
    lines = path.read_text().splitlines()
    assert all(STAMP.match(line) for line in lines)
    return [STAMP.sub("", line, count=1) for line in lines]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_has_the_command_its_stages_its_summary_and_its_end(
    checkpoint: Path, tmp_path: Path, quiet: bool
) -> None:
    log = tmp_path / "a log.txt"
    words = ("apply", checkpoint, "2of4", "--log", log, *["-q"] * quiet)
    said = silent(*words) if quiet else ok(*words)
    first, *rest, last = logged(log)
    assert (
        first
        == f"sparseprune {__version__}: sparseprune apply {checkpoint} 2of4 --log '{log}'{' -q' * quiet}"
    )
    assert last == "done"
    assert any(re.fullmatch(r"pruning: \d+ B", line) for line in rest)
    assert any(re.fullmatch(r"pruning: done in \d+\.\d s", line) for line in rest)
    assert "pruned 32 of 64 parameters (50.00%)" in rest
    assert any(line.startswith("scope.") for line in rest)
    assert "\x1b" not in log.read_text()
    if not quiet:
        assert set(said.err.splitlines()) <= {*rest, *said.err.splitlines()[:3]} | {*map(str.rstrip, rest)}


def test_a_log_is_appended_and_has_errors_as_stderr_has(checkpoint: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    ok("inspect", checkpoint, "--log", log)
    before = log.read_text()
    said = refused("apply", checkpoint, "absent", "--log", log)
    assert log.read_text().startswith(before)
    assert said.err.splitlines() == [
        f"sparseprune: {line}" for line in logged(log)[-len(said.err.splitlines()) :]
    ]


def test_a_check_that_fails_is_logged(checkpoint: Path, tmp_path: Path) -> None:
    said = run("verify", checkpoint, "2of4", "-q", "--log", tmp_path / "log")
    assert said.code == 1
    assert said.err == "".join(f"sparseprune: {line}\n" for line in logged(tmp_path / "log")[-1:])


@pytest.mark.parametrize("place", ["absent/log", "."])
def test_a_log_that_cannot_be_written_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (line,) = refused("apply", checkpoint, "2of4", "--log", place).err.splitlines()
    assert line.startswith(f"sparseprune: --log {place}: cannot be written: ")
    assert sorted(tmp_path.iterdir()) == [checkpoint]


def test_a_log_ends_with_what_ended_the_process_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Log(tmp_path / "log") as log, signals.heard_at_the_end(log.lines):
        with signals.text_when_stopped(lambda: "there is no output"):
            signals._end(signal.SIGTERM)
        lines = logged(tmp_path / "log")
    assert (ended, lines) == ([143], ["terminated: there is no output"])
    assert capfd.readouterr().err == "sparseprune: terminated: there is no output\n"
