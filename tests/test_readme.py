"""The README keeps its word: its commands run, its output is real, its specs bind."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sparseprune.checkpoint import open_checkpoint
from sparseprune.cli.app import app
from sparseprune.cli.demo_checkpoint import write_decoder
from sparseprune.pipeline import make_plan
from sparseprune.spec import list_specs, parse_spec
from tests.samples import run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def same(line: str) -> str:
    """A line without what differs from run to run: times, rates, spaces at the end."""
    return re.sub(r"\d+\.\d s, [\d.]+ \w+/s", "T", line.rstrip())


def shows(shown: list[str], real: list[str]) -> bool:
    """Whether the shown lines are the real ones, where `...` stands for any number of lines.

    >>> shows(["a", "...", "d"], ["a", "b", "c", "d"]), shows(["a", "c"], ["a", "b", "c"])
    (True, False)
    """
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(same(line)) + r"\n" for line in shown)
    return re.fullmatch(pattern, "".join(same(line) + "\n" for line in real)) is not None


def real_output(words: list[str], folder: Path) -> list[str]:
    """Both streams of a command, as they come where no terminal is."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )
    return done.stdout.splitlines()


def test_first_command_shows_its_real_output(tmp_path: Path) -> None:
    command, *shown = blocks("console")[0].splitlines()
    assert command.startswith("$ python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/")
    words = shlex.split(command.rpartition(".venv/bin/")[2])
    assert words[0] == "sparseprune"
    real = real_output(words, tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_plan_shows_its_real_output(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    command, *shown = blocks("console")[1].splitlines()
    real = real_output(shlex.split(command.removeprefix("$ ")), tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_a_wrong_line_of_output_is_noticed() -> None:
    assert not shows(["pruned 1", "..."], ["pruned 2", "more"])
    assert not shows(["pruned 1"], ["pruned 1", "more"])


def test_second_command_is_the_checks_that_ci_runs() -> None:
    (command,) = blocks("console")[2].splitlines()
    assert command == "$ bash .ci/run"
    script = (ROOT / ".ci/run").read_text()
    for check in ("ruff check", "ruff format --check", "mypy", "lint-imports", "pytest"):
        assert check in script


@pytest.mark.parametrize("number", range(len(blocks("toml"))))
def test_every_spec_of_the_readme_prunes_a_decoder(tmp_path: Path, number: int) -> None:
    write_decoder(tmp_path / "decoder")
    text = blocks("toml")[number]
    plan = make_plan(open_checkpoint(tmp_path / "decoder"), parse_spec(text, "README.md"))
    assert plan.units
    (tmp_path / "spec.toml").write_text(text)
    assert run("apply", tmp_path / "decoder", tmp_path / "spec.toml", "-q").code == 0


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_runs(number: int) -> None:
    subprocess.run([sys.executable, "-c", blocks("python")[number]], check=True)


def test_commands_and_shipped_specs_are_all_named() -> None:
    listed = "".join(blocks("text"))
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^sparseprune (\w+)", listed, flags=re.MULTILINE)) == commands - {"demo"}
    for name in list_specs():
        assert f"`{name}`" in README
