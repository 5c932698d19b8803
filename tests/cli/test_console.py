"""Errors at the edge: whole lines on stderr and the exit code, notes after the message."""

import errno
import json
import os
import signal
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import typer

from sparseprune.cli import signals
from sparseprune.cli.app import app
from sparseprune.cli.console import ended, print_json, print_result, reported, tell, tell_parts
from sparseprune.errors import MachineError, SparsepruneError, SpecError
from sparseprune.results.fields import Document
from tests.commands import run

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
    capsys: pytest.CaptureFixture[str], error: BaseException, lines: list[str], code: int, notes: list[str]
) -> None:
    error.__notes__ = notes
    with pytest.raises(typer.Exit) as ended, reported():
        raise error
    assert ended.value.exit_code == code
    wanted = [*lines, *(line for note in notes for line in note.split("\n"))]
    assert capsys.readouterr() == ("", "".join(f"sparseprune: {line}\n" for line in wanted))


@pytest.mark.parametrize(("error", "lines", "code"), CASES, ids=lambda value: type(value).__name__)
def test_debug_adds_a_traceback_and_changes_nothing_else(
    capsys: pytest.CaptureFixture[str], error: BaseException, lines: list[str], code: int
) -> None:
    def fail() -> None:
        with reported(debug=True):
            raise error

    assert ended(fail, debug=True) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("Traceback (most recent call last):\n") == 1
    *traceback, last = err.split("sparseprune: ", 1)
    assert traceback[0].startswith("Traceback")
    assert type(error).__name__ in traceback[0]
    assert f"sparseprune: {last}".startswith("".join(f"sparseprune: {line}\n" for line in lines))


@pytest.mark.parametrize("debug", [False, True])
def test_a_bug_keeps_its_traceback_and_has_a_code_of_its_own(
    capsys: pytest.CaptureFixture[str], debug: bool
) -> None:
    def fail() -> None:
        with reported(debug):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr() == ("", "")
    assert ended(fail, debug=debug) == 70  # 1 would say that a check failed
    out, err = capsys.readouterr()
    assert (out, err.count("Traceback"), err.splitlines()[-1]) == ("", 1, "ZeroDivisionError")


# A command with what it cannot do without, though nothing of it is there.
WORDS = {
    "apply": "apply absent 2of4",
    "mask": "mask absent 2of4",
    "plan": "plan absent 2of4",
    "remove": "remove absent 2of4",
    "calibrate": "calibrate absent --text absent.txt",
    "eval": "eval absent --text absent.txt",
    "specs": "specs absent",
    "inspect": "inspect absent",
    "verify": "verify absent 2of4",
    "reapply": "reapply absent absent",
    "compare": "compare absent absent",
    "demo": "demo .",
}


def test_every_command_is_tried() -> None:
    assert {command.callback.__name__ for command in app.registered_commands if command.callback} == set(
        WORDS
    )


@pytest.mark.parametrize("command", WORDS)
def test_debug_changes_no_exit_code_of_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, debug = run(*WORDS[command].split()), run(*WORDS[command].split(), "--debug")
    assert plain.code == debug.code == 2
    assert "Traceback" not in plain.err
    assert debug.err.startswith("Traceback")
    assert debug.err.endswith(plain.err)


@pytest.mark.parametrize("words", ["apply absent 2of4 --memory much", "apply absent 2of4 --set vars"])
def test_debug_changes_no_exit_code_of_options_that_are_wrong(words: str) -> None:
    plain, debug = run(*words.split()), run(*words.split(), "--debug")
    assert plain.code == debug.code == 2
    assert debug.err.endswith(plain.err)


@pytest.mark.parametrize("command", WORDS)
@pytest.mark.parametrize(("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
@pytest.mark.parametrize("debug", [False, True])
def test_every_command_hears_signals(
    monkeypatch: pytest.MonkeyPatch, command: str, number: signal.Signals, said: str, debug: bool
) -> None:
    usual = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert signal.set_wakeup_fd(-1) == -1
    threads = set(threading.enumerate())

    def twice(*_: object) -> None:
        """Both come before the first one is heard, and to no other thread, which would let it be heard."""
        signal.pthread_sigmask(signal.SIG_BLOCK, (number, signal.SIGTERM))
        try:
            signal.pthread_kill(threading.get_ident(), number)
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, (number, signal.SIGTERM))

    monkeypatch.setattr(signals, "_GRACE", 60.0)
    monkeypatch.setattr("sparseprune.cli.console.mmap.mmap", twice)
    heard = run(*WORDS[command].split(), *["--debug"] * debug)
    assert (heard.code, heard.out) == (128 + number, "")
    assert heard.err.endswith(f"sparseprune: {said}: nothing was written\n")
    assert heard.err.startswith("Traceback") == debug
    assert {one: signal.getsignal(one) for one in usual} == usual
    assert signal.set_wakeup_fd(-1) == -1
    assert threads.issuperset(threading.enumerate())


@pytest.mark.parametrize("text", [None, "there is no output"])
def test_a_process_that_cannot_end_in_time_ends_with_what_there_is_to_say(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str | None
) -> None:
    """The thread that waits, up to the end of the process."""
    ended: list[tuple[int, list[Path]]] = []
    over = threading.Event()

    def end(code: int) -> None:
        ended.append((code, [*tmp_path.iterdir()]))
        over.set()

    def work() -> None:
        with signals.stopped_once(), signals.temporary_folder("part-"), ExitStack() as stack:
            if text is not None:
                stack.enter_context(signals.text_when_stopped(lambda: text))
            stack.callback(over.wait, 10)
            assert [*tmp_path.iterdir()]
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signals, "_GRACE", 0.01)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    usual = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(signals.Stopped):
            work()
    finally:
        signal.signal(signal.SIGTERM, usual)
    assert ended == [(143, [])]
    assert capfd.readouterr().err == f"sparseprune: terminated: {text or 'nothing was written'}\n"


ODD = "a\x1b[2J\x07\x7f\x9b\u202e\nb"
SHOWN = r"a\x1b[2J\x07\x7f\x9b\u202e\nb"


def test_lines_on_stderr_have_nothing_that_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    tell(ODD)
    tell_parts([ODD, "[red]x[/red]"])
    assert capsys.readouterr() == ("", f"sparseprune: {SHOWN}\n{SHOWN}\n[red]x[/red]\n")
    error = SparsepruneError("wrong")
    error.add_note("kept in a\x1b[2J")
    with pytest.raises(typer.Exit), reported():
        raise error
    assert capsys.readouterr().err == "sparseprune: wrong\nsparseprune: kept in a\\x1b[2J\n"


class Odd(Document):
    texts: tuple[str, ...]


def test_json_says_by_escapes_what_a_terminal_obeys(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(Odd(schema="odd", texts=(ODD, "é", "\udcff", "\U000e0001")))
    text = capsys.readouterr().out
    assert all(line.isprintable() for line in text.split("\n"))
    assert "é" in text
    assert json.loads(text)["texts"] == [ODD, "é", "\udcff", "\U000e0001"]


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_result_is_exact_but_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    print_result("a\x1b[2J\nb")
    assert capsys.readouterr().out == ("a\\x1b[2J\nb\n" if is_terminal else "a\x1b[2J\nb\n")
