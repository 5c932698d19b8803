"""The three standard streams of a process, always open, and never a reason to fail.

Owns what happens where one was closed before the process began, where nobody can read what goes to stderr,
and where the result cannot be written. Called once, before anything else is opened.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


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
