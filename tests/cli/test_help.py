"""Options of all commands in one table, help in groups, usage errors, and what shells complete."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseprune.spec import list_specs
from tests.commands import COMMAND, imported, ok, refused, run

COMMANDS: dict[str, Any] = COMMAND.commands  # type: ignore[attr-defined]
OPTIONS = {
    name: {max(one.opts, key=len): one for one in command.params if one.param_type_name == "option"}
    for name, command in COMMANDS.items()
}
SHORT = {"--output": "-o", "--jobs": "-j", "--quiet": "-q", "--verbose": "-v"}

# An option -> those that every command has beside it, but for the commands that have no use for one.
TOGETHER = {
    "--debug": ("--json", "--quiet", "--log"),
    "--output": ("--force",),
    "--force": ("--output",),
    "--text": ("--sequences", "--length", "--field", "--seed", "--special", "--device", "--memory"),
    "--jobs": ("--memory",),
    "--stats": ("--text",),
    "--mask-format": ("--no-masks", "--dry-run"),
    "--no-masks": ("--mask-format",),
    "--csv": ("--markdown", "--match", "--sort", "--reverse", "--summary", "--plot", "--require"),
    "--match": ("--exclude",),
    "--masks": ("--zeros-of", "--match", "--exclude", "--rename", "--partial", "--set"),
    "--zeros-of": ("--partial", "--rename", "--match", "--exclude", "--strict"),
    "--target": ("--set", "--reconstruct", "--stats", "--strict", "--device", "--jobs", "--memory"),
    "--spec": ("--set",),
    "--reconstruct": ("--stats",),
}
# What is missing, and why.
WITHOUT = {
    ("demo", "--json"): "shows how commands are used",
    ("demo", "--quiet"): "shows how commands are used",
    ("demo", "--log"): "shows how commands are used",
    ("specs", "--quiet"): "prints its result alone",
    ("specs", "--log"): "prints its result alone",
    ("plan", "--force"): "writes nothing: its --output is the one that would be written",
    ("plan", "--dry-run"): "is one",
    ("mask", "--text"): "rebuilds no weights, which a sweep is for",
    ("mask", "--no-masks"): "writes masks alone",
    ("compare", "--text"): "runs no model",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_all_options_of_a_group_or_says_why_not(command: str) -> None:
    there = OPTIONS[command]
    wanted = {one for option in there for one in TOGETHER.get(option, ())}
    excused = {option for name, option in WITHOUT if name == command}
    assert wanted - there.keys() == excused
    assert excused <= wanted


@pytest.mark.parametrize("option", sorted({option for there in OPTIONS.values() for option in there}))
def test_an_option_is_the_same_in_every_command(option: str) -> None:
    found = [there[option] for there in OPTIONS.values() if option in there]
    assert len({tuple(sorted(one.opts)) for one in found}) == 1
    assert {SHORT.get(option)} == {next((flag for flag in one.opts if len(flag) == 2), None) for one in found}
    metavars = {one.metavar for one in found}
    assert len(metavars) == 1 or option == "--for", metavars
    assert all(one.help.endswith(".") for one in found)
    takes_a_value = {not one.is_flag for one in found}
    assert takes_a_value == {metavars != {None}}


def test_an_option_is_under_one_heading_in_every_command() -> None:
    headings: dict[str, set[str]] = {}
    for there in OPTIONS.values():
        for option, one in there.items():
            headings.setdefault(option, set()).add(one.rich_help_panel)
    several = {option for option, found in headings.items() if len(found) > 1}
    assert several == {"--stats", "--for"}  # to rebuild by or to report; a checkpoint or runtimes
    assert None not in set().union(*headings.values())


@pytest.mark.parametrize("columns", [80, 100, 140])
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_as_wide_as_the_terminal_up_to_120_columns(
    monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    root = COMMAND.make_context("sparseprune", [], resilient_parsing=True)
    context = root
    if command:
        context = COMMANDS[command].make_context(command, [], parent=root, resilient_parsing=True)
    lines = context.get_help().splitlines()
    longest = max(map(len, lines))
    assert longest <= min(columns, 120)
    assert longest > min(columns, 120) - 25 or command in {"", "demo", "specs"}
    assert not re.search(r"<\w+( range)?>|\{[A-Z]|\.\.\.$", "\n".join(lines))


def test_help_of_the_tool_has_commands_in_groups_with_their_whole_summaries() -> None:
    said = ok("--help").out
    for heading in ("Prune:", "Look:", "Use data:", "Try out:", "Options:"):
        assert f"\n{heading}\n" in said
    folded = " ".join(said.split())
    for name, command in COMMANDS.items():
        assert f" {name} {command.help.partition(chr(10))[0]}" in folded


def test_help_has_options_under_headings_in_one_order() -> None:
    found = re.findall(r"^(\w+):$", ok("apply", "--help").out, re.MULTILINE)
    assert found == "Arguments Pruning Rebuilding Text Checks Output Resources Messages".split()
    # Help goes with what is said, also where no other option is there.
    assert re.findall(r"^(\w+):$", ok("demo", "--help").out, re.MULTILINE) == ["Arguments", "Messages"]


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_has_a_short_flag(flag: str) -> None:
    assert re.fullmatch(r"sparseprune \d+\.\d+\.\d+\n", ok(flag).out)


# What is typed -> the one line that is said.
WRONG = {
    "aply": 'no such command aply; did you mean "apply"? see `sparseprune --help`',
    "apply a 2of4 --frce": 'no such option --frce; did you mean "--force"? see `sparseprune apply --help`',
    "apply a": "the argument SPEC is missing; see `sparseprune apply --help`",
    "calibrate a": "the option --text is missing; see `sparseprune calibrate --help`",
    "apply a 2of4 -j 0": "--jobs: must be greater than or equal to 1; see `sparseprune apply --help`",
    "apply a 2of4 b": "got unexpected extra argument(s) (b); see `sparseprune apply --help`",
    "apply a 2of4 --output": "option '--output' requires an argument; see `sparseprune --help`",
}


@pytest.mark.parametrize("typed", WRONG)
def test_what_is_typed_wrongly_is_one_line_like_other_errors(typed: str) -> None:
    assert refused(*typed.split()).err == f"sparseprune: {WRONG[typed]}\n"


def test_a_choice_that_is_none_names_those_that_are(tmp_path: Path) -> None:
    (line,) = refused("inspect", tmp_path, "--by", "foo").err.splitlines()
    assert line.startswith("sparseprune: --by: 'foo' is not one of 'tensor', 'layer', 'module', 'rule'")


def test_without_a_command_help_is_on_stderr() -> None:
    said = refused()
    assert "Prune:" in said.err


@pytest.mark.parametrize(
    "words",
    ["--length 8", "--sequences 3", "--seed 1", "--field x", "--no-special", "--gradients", "--tune 3"],
)
@pytest.mark.parametrize("command", ["apply", "plan", "remove"])
def test_options_of_a_text_are_refused_without_one(command: str, words: str) -> None:
    option = words.split(maxsplit=1)[0]
    said = refused(command, "absent", "2of4", *words.split())
    assert said.err == f"sparseprune: {option}: goes with --text FILE, which is not given\n"


def completed(shell: str, *words: str) -> list[str]:
    """What a shell offers for the last of the words, asked as its script asks."""
    typed = ["sparseprune", *words]
    asked = {"_SPARSEPRUNE_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": " ".join(typed)}
    asked |= {"COMP_WORDS": "\n".join(typed), "COMP_CWORD": str(len(words))}
    asked |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [Path(sys.executable).with_name("sparseprune")],
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == ""
    if shell == "zsh":
        return re.findall(r'^"([^":]+)', done.stdout.replace("_arguments '*: :((", ""), re.MULTILINE)
    return [line.partition("\t")[0] for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_flags_choices_specs_and_variables(shell: str) -> None:
    assert completed(shell, "re") == ["remove", "reapply"]
    assert completed(shell, "apply", "ckpt", "2of4", "--mask") == ["--mask-format"]
    assert completed(shell, "inspect", "ckpt", "--by", "m") == ["module"]
    assert completed(shell, "apply", "ckpt", "2of4", "--device", "c") == ["cpu", "cuda"]
    assert completed(shell, "apply", "ckpt", "2of4") == [
        one for one in list_specs() if one.startswith("2of4")
    ]
    assert completed(shell, "apply", "ckpt", "nofm", "--set", "per") == ["permute="]


def test_files_are_left_to_the_shell() -> None:
    assert completed("bash", "apply", "") == []


def test_completion_loads_no_large_library() -> None:
    code = "import sparseprune.cli.app; from sparseprune.spec import list_specs, find_spec; list_specs()"
    assert not imported(code) & {"torch", "numpy", "numba", "transformers", "pydantic_core._torch"}
    began = time.perf_counter()
    completed("bash", "apply", "ckpt", "2of4")
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_is_printed(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = subprocess.run(
        [Path(sys.executable).with_name("sparseprune"), "--show-completion", shell],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert "_SPARSEPRUNE_COMPLETE=complete_" in done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_quiet_means_the_same_in_every_command(command: str) -> None:
    said = " ".join(run(command, "--help").out.split())
    says_so = "Print no table, summary, progress, note or warning" in said
    assert says_so == (command not in {"specs", "demo"})
