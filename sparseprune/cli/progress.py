"""How far a run is: a line of rich.progress on a terminal, now and then a log line elsewhere.

Owns the rate and what is shown when; knows nothing of the work. Workers only set the latest step; a thread
of its own reads and shows it. Called by command.py.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.cli.console import stderr_console
from sparseprune.errors import printable
from sparseprune.report.wording import SIZES, unit_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.console import Console, OverflowMethod
    from rich.progress import Progress as Line
    from rich.progress import Task
    from rich.table import Table

    from sparseprune.api.run import Progress

_SHOW_CURSOR = "\x1b[?25h"
_REDRAWS = 5  # a second
_TICK = 1.0  # seconds between two looks where log lines are written
_FIRST_LINE, _LONGEST_PAUSE = 5.0, 60.0  # seconds
_WINDOW, _SETTLED = 30.0, 0.5  # seconds that a rate is taken over at first, and at least
_COUNTS = {"bytes": SIZES, "tokens": ("tokens", "k tokens", "M tokens", "G tokens")}
_SPARE = 2  # columns that stay free, for the ^C that a terminal echoes
_WIDE = 60  # columns of the narrowest terminal that shows the unit


@contextmanager
def shown(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """Gives a function that shows a step on stderr until that step ends; None where `quiet`."""
    if quiet:
        yield None
        return
    latest: Latest | None = None

    def hear(step: Progress) -> None:
        nonlocal latest
        if latest is None:
            latest = Latest(step)
            console = stderr_console() if sys.stderr.isatty() else None
            stack.enter_context(
                _redrawn(latest, console)
                if console and console.is_interactive
                else _repeated(_log_lines(latest), _TICK)
            )
        latest.step = step
        if step.ended:
            latest = None
            stack.close()

    with ExitStack() as stack:
        yield hear


class Reading(Struct, frozen=True):
    """A step with its bytes per second and the seconds that are left, None while these are not known."""

    step: Progress
    rate: float | None = None
    left: float | None = None


class Latest:
    """The latest step, set by any thread and read by one."""

    def __init__(self, step: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        self.step = step
        self._clock = clock
        self._began = self._grew = clock()
        self._done = step.done
        self._bytes = self._seconds = self._pause = 0.0

    def read(self) -> Reading:
        """How far the step is; the more often it is read, the better the estimate gets.

        The rate begins with the first bytes that this run does, and is a mean over the last half of the time,
        or 30 seconds: work comes in large pieces, and a shorter one would jump with each of them. Between two
        pieces the time left counts down, while no pause is longer than those before.
        """
        now, step = self._clock(), self.step
        new, passed = step.done - self._done, now - self._grew
        if new > 0 and self._done == step.already and not self._seconds:
            self._began = self._grew = now  # how long these took is not known: reading, or loading torch
            self._done, passed = step.done, 0.0
        elif new > 0:
            fades = math.exp(-passed / max(_WINDOW, (now - self._began) / 2))
            self._bytes, self._seconds = self._bytes * fades + new, self._seconds * fades + passed
            self._pause = max(self._pause * fades, passed)
            self._done, self._grew, passed = step.done, now, 0.0
        if self._seconds < _SETTLED:
            return Reading(step)
        rate = self._bytes / (self._seconds + max(0.0, passed - self._pause))
        left = max(step.total - self._done, 0) / rate
        return Reading(step, rate, max(left - min(passed, self._pause), left / 2))


def log_line(reading: Reading) -> str:
    """A step as a line of a log.

    >>> from sparseprune.api.run import Progress
    >>> step = Progress("pruning", 750_000_000, 2_200_000_000, unit="model.layers.7.mlp")
    >>> log_line(Reading(step, 1.1e9, 1.3))
    'sparseprune: pruning 34%, 0.75 of 2.20 GB, 1.1 GB/s, 1 s left, model.layers.7.mlp'
    """
    step, rate, left = reading.step, reading.rate, reading.left
    percent = int(min(step.done / step.total, 1) * 100) if step.total else 100
    parts = [f"sparseprune: {step.what} {percent}%", " of ".join(_amounts(step)).lstrip()]
    if rate is not None:
        parts.append(_speed(step, rate))
    if left is not None:
        parts.append(f"{_time_text(left)} left")
    if step.unit:
        parts.append(printable(step.unit))
    return ", ".join(parts)


def terminal_line(latest: Latest, console: Console) -> tuple[Line, Callable[[], None]]:
    """A line that never wraps, and the function that draws the latest step on it.

    The bar keeps its length when the next unit begins: what it gets does not depend on the unit.
    """
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Line
    from rich.table import Column

    class ShortLine(Line):
        def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
            table = super().make_tasks_table(tasks)
            table.width = max(console.width - _SPARE, 1)
            return table

    encoding = console.encoding
    overflow: OverflowMethod = "ellipsis" if encoding.startswith("utf") else "crop"

    def text(field: str, style: str = "none", ratio: int | None = None) -> TextColumn:
        column = Column(no_wrap=True, overflow=overflow, ratio=ratio)
        return TextColumn(f"{{task.{field}}}", style, markup=False, table_column=column)

    bar = BarColumn(None, table_column=Column(ratio=1))
    columns = text("description"), bar, text("fields[facts]"), text("fields[unit]", "dim", ratio=4)
    line = ShortLine(
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # elsewhere it would end up on stderr
    )
    task = line.add_task(latest.step.what, total=latest.step.total)

    def draw() -> None:
        reading = latest.read()
        step = reading.step
        speed = "?" if reading.rate is None else _speed(step, reading.rate)
        left = "?" if reading.left is None else _time_text(reading.left)
        facts = f"{'/'.join(_amounts(step))} {speed:>8} {left:>6}"
        unit = printable(step.unit).encode(encoding, "replace").decode(encoding)
        line.columns = columns if console.width >= _WIDE else columns[:-1]
        line.update(task, completed=step.done, refresh=True, facts=facts, unit=unit)

    return line, draw


@contextmanager
def _redrawn(latest: Latest, console: Console) -> Iterator[None]:
    line, draw = terminal_line(latest, console)
    draw()  # fills the line; it is seen once the line starts
    try:
        with line:
            with _repeated(draw, 1 / _REDRAWS):
                yield
            draw()
    except BaseException:
        # A signal while the line starts leaves the cursor hidden: rich does not show it then.
        print(_SHOW_CURSOR, end="", file=console.file, flush=True)
        raise


def _log_lines(latest: Latest) -> Callable[[], None]:
    """A function that writes a line after 5 seconds, then after twice the time, at last one a minute."""
    began, due = time.monotonic(), _FIRST_LINE

    def look() -> None:
        nonlocal due
        reading = latest.read()
        passed = time.monotonic() - began
        if passed >= due:
            due = passed + min(passed, _LONGEST_PAUSE)
            print(log_line(reading), file=sys.stderr, flush=True)

    return look


@contextmanager
def _repeated(look: Callable[[], None], pause: float) -> Iterator[None]:
    """Calls `look` again and again inside the block, in a thread of its own.

    Without a thread, memory or a reader nothing is shown; the run goes on.
    """
    from sparseprune.checkpoint.threads import Worker  # --help does not need it

    stop = threading.Event()

    def repeat() -> None:
        with suppress(OSError, MemoryError):
            while not stop.wait(pause):
                look()

    thread = Worker(repeat, "sparseprune-progress", daemon=True)
    try:
        thread.begin()
        yield
    finally:
        stop.set()
        thread.wait()


def _amounts(step: Progress) -> tuple[str, str]:
    """What is done and the whole, in one unit of size and equally long: ' 7.5' and '12.3 MB'."""
    size, name = unit_of(step.total, _COUNTS[step.counts])
    whole = step.total / size
    digits = 0 if size == 1 or whole >= 99.95 else 1 if whole >= 9.995 else 2
    text = f"{whole:.{digits}f}"
    return f"{step.done / size:{len(text)}.{digits}f}", f"{text} {name}"


def _speed(step: Progress, rate: float) -> str:
    """Bytes per second in at most eight columns: '1.1 GB/s', '12 MB/s', '0 B/s'."""
    size, name = unit_of(rate, _COUNTS[step.counts])
    return f"{rate / size:.{int(size > 1 and rate / size < 9.95)}f} {name}/s"


def _time_text(seconds: float) -> str:
    """A time as exact as it is known: '12 s', '13 min', '10.3 h'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
