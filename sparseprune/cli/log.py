"""`--log FILE`: a plain text log of a command, with times, which has also what `--quiet` keeps from stderr.

Knows no command. Called by command.py.
"""

from __future__ import annotations

import io
import shlex
import time
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Self, TextIO

from sparseprune import __version__
from sparseprune.cli.console import lines_of
from sparseprune.errors import SparsepruneError, printable

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from types import TracebackType

    from rich.console import RenderableType

    from sparseprune.api.run import Progress

_WIDTH = 160  # columns of the tables in a log


class Log:
    """A file to which lines are appended at once, or, without a path, nothing at all.

    SparsepruneError where the file cannot be written. What fails later, such as a full disk, ends no run.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: TextIO | None = None
        self._stage = ""
        self._began = time.perf_counter()
        if path is None:
            return
        try:
            self._file = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            shown = printable(str(path))
            raise SparsepruneError(
                f"--log {shown}: cannot be written: {reason}; name a file in a folder that you may write to"
            ) from error

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def begin(self, typed: Iterable[str]) -> None:
        """The version, and the command as it was typed."""
        self.lines(f"sparseprune {__version__}: sparseprune {shlex.join(typed)}")

    def lines(self, *lines: str) -> None:
        """Append lines, each with the time."""
        if self._file is None:
            return
        with suppress(OSError):
            for line in lines:
                stamp = datetime.now().astimezone().isoformat(timespec="seconds")
                self._file.write(f"{stamp} {printable(line)}\n")

    def parts(self, parts: Iterable[RenderableType]) -> None:
        """Append lines and tables as plain text."""
        if self._file is None:
            return
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=_WIDTH, highlight=False, color_system=None)
        for part in parts:
            if isinstance(part, str):
                self.lines(*_rendered(text))
                self.lines(part)
            else:
                console.print(part)
        self.lines(*_rendered(text))

    def stage(self, step: Progress) -> None:
        """Append when a step of the work begins and when it ends."""
        from sparseprune.report.wording import size

        if step.what != self._stage:
            self._stage, self._began = step.what, time.perf_counter()
            amount = size(step.total) if step.counts == "bytes" else f"{step.total:,} {step.counts}"
            already = f", {step.already / max(step.total, 1):.0%} done before" if step.already else ""
            self.lines(f"{step.what}: {amount}{already}")
        if step.ended:
            self._stage = ""
            ended = "done in" if step.done >= step.total else "stopped after"
            self.lines(f"{step.what}: {ended} {time.perf_counter() - self._began:.1f} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self.lines(*(["done"] if error is None else lines_of(error)))
        with suppress(OSError):
            self._file.close()


def _rendered(text: io.StringIO) -> list[str]:
    """The lines of what was printed so far, which is taken away."""
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    text.seek(0)
    text.truncate()
    return lines
