"""Errors at the edge: whole lines on stderr and the exit code, notes after the message."""

from __future__ import annotations

import errno

import pytest
import typer

from sparseprune.cli.console import Warnings, reported
from sparseprune.errors import MachineError, SparsepruneError, SpecError

# What is raised -> the lines that are said and the exit code.
CASES: list[tuple[BaseException, list[str], int]] = [
    (SparsepruneError("m: this is wrong"), ["m: this is wrong"], 2),
    (SpecError("one", "two"), ["one", "two"], 2),
    (MachineError("disk: no space left"), ["disk: no space left"], 3),
    (OSError(errno.EIO, "Input/output error", "m.safetensors"), ["m.safetensors: Input/output error"], 3),
    (OSError("just so"), ["just so"], 3),
    (MemoryError(), ["out of memory; give a smaller --memory, or fewer --jobs"], 3),
    (MemoryError("Unable to allocate"), ["out of memory; give a smaller --memory, or fewer --jobs"], 3),
    (KeyboardInterrupt(), ["interrupted: nothing was written"], 130),
    (KeyboardInterrupt("the output is complete"), ["interrupted: the output is complete"], 130),
]


@pytest.mark.parametrize("notes", [[], ["1.2 of 2.2 GB are kept", "in two\nlines"]], ids=["plain", "notes"])
@pytest.mark.parametrize(("error", "lines", "code"), CASES, ids=lambda value: type(value).__name__)
def test_an_error_is_its_lines_its_notes_and_its_exit_code(
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    lines: list[str],
    code: int,
    notes: list[str],
) -> None:
    error.__notes__ = notes
    with pytest.raises(typer.Exit) as ended, reported():
        raise error
    assert ended.value.exit_code == code
    wanted = [*lines, *(line for note in notes for line in note.split("\n"))]
    assert capsys.readouterr() == ("", "".join(f"sparseprune: {line}\n" for line in wanted))


@pytest.mark.parametrize(("error", "lines", "code"), CASES, ids=lambda value: type(value).__name__)
def test_debug_lets_every_error_through(error: BaseException, lines: list[str], code: int) -> None:
    with pytest.raises(type(error)) as raised, reported(debug=True):
        raise error
    assert raised.value is error


def test_a_bug_is_let_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ZeroDivisionError), reported():
        raise ZeroDivisionError
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_a_line_on_stderr_and_is_kept_once(capsys: pytest.CaptureFixture[str]) -> None:
    warnings = Warnings()
    warnings.add("one\tfact", "another")
    warnings.add("another")
    warnings.add()
    assert warnings.lines == ["one\\tfact", "another"]
    told = "sparseprune: warning: one\\tfact\nsparseprune: warning: another\n"
    assert capsys.readouterr() == ("", told)


def test_a_quiet_command_keeps_its_warnings_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    warnings = Warnings(quiet=True)
    warnings.add("one")
    assert (warnings.lines, capsys.readouterr()) == (["one"], ("", ""))


@pytest.mark.parametrize("quiet", [False, True])
def test_a_strict_command_ends_with_all_that_it_would_warn_of(
    capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    warnings = Warnings(strict=True, quiet=quiet)
    warnings.add()
    with pytest.raises(typer.Exit) as ended, reported():
        warnings.add("one", "two")
    assert ended.value.exit_code == 2
    assert capsys.readouterr() == ("", "sparseprune: --strict: one\nsparseprune: --strict: two\n")
