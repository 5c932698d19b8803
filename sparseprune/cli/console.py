"""The streams: results on stdout, everything else on stderr; errors as lines with an exit code.

Progress bars and colour only where stderr is a terminal.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console, RenderableType

INTERRUPTED = 130
_UNFOLDED = 10_000  # columns; tables are no wider than their content


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn what a user or the machine caused into a line on stderr and an exit code.

    A bug keeps its traceback; `debug` shows the traceback of everything.
    """
    try:
        yield
    except SparsepruneError as error:
        _fail(str(error), error.exit_code, debug=debug)
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing more can be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail(f"{place}{error.strerror or error}", MachineError.exit_code, debug=debug)
    except KeyboardInterrupt:
        _fail("interrupted: there is no output; run the same command again", INTERRUPTED, debug=debug)


def _fail(message: str, code: int, *, debug: bool) -> None:
    if debug:
        sys.stderr.flush()
        raise  # noqa: PLE0704  (called from except clauses alone)
    for line in message.splitlines():
        print(f"sparseprune: {line}", file=sys.stderr)
    raise typer.Exit(code) from None


def stderr_console() -> Console:
    """A rich console on stderr: width and colour as the terminal has them."""
    return _console(stderr=True)


def print_result(text: str) -> None:
    """The result of a command, alone on stdout."""
    print(text)


def print_json(document: Mapping[str, Any]) -> None:
    """A document on stdout."""
    print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


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


@contextmanager
def progress_bar(what: str, total: int, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on a terminal, nothing elsewhere; gives the function that advances it."""
    console = stderr_console()
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
