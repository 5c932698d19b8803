"""The streams: results on stdout, everything else on stderr; errors as lines with an exit code.

Owns colour, which only a terminal gets, and streams that fail: one that was closed before the process began,
a stderr that nobody reads, a stdout that takes no more.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import sys
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

import typer

from sparseprune.cli.signals import stopped, stopped_once
from sparseprune.errors import CheckFailedError, MachineError, SparsepruneError, is_out_of_memory, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from _typeshed import ReadableBuffer
    from rich.console import Console, RenderableType

    from sparseprune.results import Reapplication, Removal, Report, Statistics
    from sparseprune.results.fields import Document


class UnwrittenError(MachineError):
    """The result cannot be written to stdout."""


def open_streams() -> None:
    """Streams that were closed lead to nowhere; failures of stdout raise, those of stderr do not.

    A descriptor that stayed closed would be given to the next file, and what is printed would end in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _text(sys.stdout, _Result(1, "w", closefd=False))
    sys.stderr = _text(sys.stderr, _Unheard(2, "w", closefd=False))


def _text(usual: TextIO | None, raw: io.FileIO) -> TextIO:
    """A stream like the usual one; names may hold what it cannot say, and are said somehow."""
    encoding, lines = "utf-8", True
    if isinstance(usual, io.TextIOWrapper):
        usual.flush()
        encoding, lines = usual.encoding, usual.line_buffering or usual.write_through
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines)


class _Result(io.FileIO):
    def write(self, data: ReadableBuffer, /) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except BrokenPipeError:  # whoever reads has seen enough, which is no failure
            raise
        except OSError as error:
            raise UnwrittenError(f"the result cannot be written to stdout: {error.strerror}") from error


class _Unheard(io.FileIO):
    """The work goes on where stderr fails: the disk of a log is full, a terminal has hung up."""

    def write(self, data: ReadableBuffer, /) -> int:
        written = None
        with suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written


_LIBRARIES = 96 << 20  # bytes of addresses that numpy and what it loads take, measured
_BUG = 70  # EX_SOFTWARE of sysexits.h
_UNFOLDED = 10_000  # columns; tables are no wider than their content


def ended(app: Callable[[], object], *, debug: bool) -> str | int | None:
    """Run it to its SystemExit; the code of that, or of the error when the last of stdout is written.

    A bug ends in a code of its own: Python's would say that a check failed.
    """
    try:
        with reported_errors(debug):
            try:
                app()
            except SystemExit as end:
                sys.stdout.flush()
                return end.code
    except typer.Exit as end:
        return end.exit_code
    except Exception:  # noqa: BLE001  (what else there is ends the process as well)
        traceback.print_exc()
        return _BUG
    return 0


@contextmanager
def reported(debug: bool = False) -> Iterator[None]:
    """Turn what a user, a signal or the machine caused into lines on stderr and an exit code.

    Signals after the first one change nothing.
    """
    # The outer one is for a signal that comes while the handlers are set: typer would call each a Ctrl-C.
    with reported_errors(debug), stopped_once(), reported_errors(debug):
        # Where there is no room for numpy its own libraries end the process, with the code of a failed check.
        mmap.mmap(-1, _LIBRARIES, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
        yield


@contextmanager
def reported_errors(debug: bool = False) -> Iterator[None]:
    """Turn errors that are no bugs into lines on stderr and an exit code.

    The notes of an error (`add_note`) are further lines. A bug keeps its traceback; `debug` shows the
    traceback of everything, and changes nothing else.
    """
    try:
        yield
    except typer.Exit:
        raise
    except BrokenPipeError:
        # The reader of our output has closed it: nothing more can be printed.
        _silence_stdout()
        raise typer.Exit(0) from None
    except BaseException as error:
        described = _described(error)
        if isinstance(error, UnwrittenError):
            _silence_stdout()
        if described is None:
            sys.stderr.flush()
            raise
        if debug:
            traceback.print_exc()
        for line in lines_of(error):
            tell(line)
        raise typer.Exit(described[1]) from None


def _silence_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def lines_of(error: BaseException) -> list[str]:
    """What is said of an error, line by line, its notes at the end."""
    described = _described(error)
    message = f"{type(error).__name__}: {error}" if described is None else described[0]
    return [line for text in (message, *getattr(error, "__notes__", ())) for line in text.splitlines()]


def _described(error: BaseException) -> tuple[str, int] | None:
    """What is said of an error, and the exit code that it ends in; None for a bug."""
    if isinstance(error, SparsepruneError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return stopped(error)
    if is_out_of_memory(error):
        return "out of memory; give a smaller --memory, or fewer --jobs", MachineError.exit_code
    if isinstance(error, FileNotFoundError) and not error.filename:
        return "the folder that this runs in is gone; change to one that exists", MachineError.exit_code
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return printable(f"{place}{error.strerror or error}"), MachineError.exit_code
    return None


@contextmanager
def checked(*failures: str) -> Iterator[None]:
    """Print inside; then CheckFailedError with a line for each failure, if there are some.

    Also where the reader of the result has closed it: the check fails all the same.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        if not failures:
            raise
        _silence_stdout()
    if failures:
        raise CheckFailedError(*failures)


def stderr_console() -> Console:
    """A rich console on stderr: width and colour as the terminal has them."""
    return _console(stderr=True)


def tell(text: str) -> None:
    """A line for people, on stderr; nothing in it that a terminal would obey."""
    print(f"sparseprune: {printable(text)}", file=sys.stderr)


def tell_parts(parts: Iterable[RenderableType]) -> None:
    """Lines and tables of a summary, on stderr; likewise. Lines of text are not folded."""
    console = stderr_console()
    for part in parts:
        if isinstance(part, str):
            console.print(printable(part), markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(part)


def print_outcome(result: Report | Reapplication | Removal | Statistics, *, json: bool) -> None:
    """What a command wrote: its report as JSON, or the path of the output."""
    if json:
        print_json(result)
    else:
        print_result(result.output)


def print_result(text: str) -> None:
    """The result of a command, alone on stdout; a path that is not UTF-8 as the bytes that it is.

    A terminal gets nothing that it would obey.
    """
    if sys.stdout.isatty():
        text = "\n".join(map(printable, text.split("\n")))
    try:
        text.encode()
    except UnicodeEncodeError:
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(text) + b"\n")
        sys.stdout.flush()
    else:
        print(text, flush=True)


def print_text(text: str) -> None:
    """Lines that are complete, on stdout; a terminal gets nothing that it would obey."""
    if sys.stdout.isatty():
        text = "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))
    _write(text)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(document: Document) -> None:
    """A result on stdout; JSON has escapes of its own for what a terminal would obey.

    Piece by piece, as all of its text may be larger than all else in memory.
    """
    ensure_ascii = False
    try:
        for line in document.json_lines():
            _escaped(line).encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # and for what the stream cannot say
        ensure_ascii = True
    for piece in document.json_pieces(ensure_ascii=ensure_ascii):
        sys.stdout.write("\n".join(map(_escaped, piece.split("\n"))))
    print(flush=True)


def _escaped(line: str) -> str:
    if line.isprintable():
        return line
    return "".join([letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in line])


def print_table(*parts: RenderableType) -> None:
    """Tables and the like on stdout, an empty line between them; without spaces at the ends of lines."""
    console = _console(stderr=False)
    with console.capture() as captured:
        for number, part in enumerate(parts):
            if number:
                console.print()
            console.print(part)
    _write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def on_terminal() -> bool:
    """Whether stdout is a terminal."""
    return _console(stderr=False).is_terminal


def _console(*, stderr: bool) -> Console:
    """As wide as the terminal; elsewhere lines are never folded, unless COLUMNS is set."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(stderr=stderr, highlight=False, width=_UNFOLDED)
