"""The streams: results on stdout, everything else on stderr; errors as lines with an exit code.

Colour only where the stream is a terminal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sparseprune.errors import CheckFailedError, MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import FrameType

    from rich.console import Console, RenderableType


INTERRUPTED = 130
_UNFOLDED = 10_000  # columns; tables are no wider than their content


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn what a user or the machine caused into lines on stderr and an exit code.

    The notes of an error (`add_note`) are further lines. A bug keeps its traceback; `debug` shows the
    traceback of everything. After the first Ctrl-C no other one is heard: what is being ended is ended.
    """
    with _interrupted_once():
        try:
            yield
        except BrokenPipeError:
            # Whoever read our output has seen enough; nothing more can be told.
            _silence_stdout()
            raise typer.Exit(0) from None
        except (SparsepruneError, OSError, MemoryError, KeyboardInterrupt) as error:
            if debug:
                sys.stderr.flush()
                raise
            message, code = _told(error)
            for text in (message, *getattr(error, "__notes__", ())):
                for line in text.splitlines():
                    print(f"sparseprune: {line}", file=sys.stderr)
            raise typer.Exit(code) from None


def _silence_stdout() -> None:
    """What is still to be flushed goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _interrupted_once() -> Iterator[None]:
    """One KeyboardInterrupt at the most: a second one would leave threads at work on what is given up."""

    def interrupt(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT)
    on_main = threading.current_thread() is threading.main_thread()
    if not on_main or usual not in (signal.default_int_handler, signal.SIG_DFL):
        yield  # it is somebody else's, or not to be heard at all
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _told(error: BaseException) -> tuple[str, int]:
    """What is said of an error that is no bug, and the exit code that it ends in."""
    if isinstance(error, SparsepruneError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        what = str(error) or "nothing was written"
        return f"interrupted: {what}", INTERRUPTED
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}", MachineError.exit_code
    return "out of memory; give a smaller --memory, or fewer --jobs", MachineError.exit_code


@contextmanager
def checked(*failures: str) -> Iterator[None]:
    """Print inside; then CheckFailedError with a line for each failure, if there are some.

    Also where whoever reads the result has seen enough of it: a check that failed does not pass by that.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not failures:
            raise
        _silence_stdout()
    if failures:
        raise CheckFailedError("\n".join(failures))


def stderr_console() -> Console:
    """A rich console on stderr: width and colour as the terminal has them."""
    return _console(stderr=True)


def tell(text: str) -> None:
    """A line for people, on stderr."""
    print(f"sparseprune: {text}", file=sys.stderr)


def print_result(text: str) -> None:
    """The result of a command, alone on stdout."""
    print(text)


def print_text(text: str) -> None:
    """Lines that are complete, on stdout."""
    sys.stdout.write(text)


def print_json(document: Mapping[str, Any]) -> None:
    """A document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # JSON has escapes of its own for what the stream cannot say
        text = json.dumps(document, indent=2, allow_nan=False)
    print(text)


def print_table(*parts: RenderableType) -> None:
    """Tables and the like on stdout, an empty line between them; without spaces at the ends of lines."""
    console = _console(stderr=False)
    with console.capture() as captured:
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(part)
    for line in captured.get().splitlines():
        print(line.rstrip())


def on_terminal() -> bool:
    """Whether what is printed on stdout is read by a human."""
    return _console(stderr=False).is_terminal


def _console(*, stderr: bool) -> Console:
    """As wide as the terminal; what is no terminal gets lines as long as they are, unless COLUMNS is set."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(stderr=stderr, highlight=False, width=_UNFOLDED)
