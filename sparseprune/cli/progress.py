"""How far a run is: a line that redraws itself on a terminal, now and then a log line elsewhere.

Owns the rate and the layout of the line; knows nothing of the work. Workers only set a number;
a thread of its own reads it and draws. Called by command.py.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.cli.console import stderr_console
from sparseprune.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console, ConsoleOptions, RenderResult

    from sparseprune.api.run import Progress

_SHOW_CURSOR = "\x1b[?25h"
_REDRAWS = 5  # a second
_TICK = 1.0  # seconds between two looks where log lines are written
_FIRST_LINE, _LONGEST_PAUSE = 5.0, 60.0  # seconds
_WINDOW, _SETTLED = 30.0, 0.5  # seconds that a rate is taken over at most, and at least
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")
_TOKENS = ("tokens", "k tokens", "M tokens", "G tokens")
_SPARE = 2  # columns that stay free, for the ^C that a terminal echoes
_SHORTEST_BAR, _LONGEST_BAR, _SHORTEST_UNIT = 5, 40, 6  # columns


@contextmanager
def shown(*, quiet: bool) -> Iterator[Callable[[Progress], None] | None]:
    """A function that shows on stderr how far a run is, until the end; None where `quiet`."""
    if quiet:
        yield None
        return
    with ExitStack() as stack:
        yield _Shown(stack)


class _Shown:
    """Shows one step after the other; what shows the present one ends with it, or with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._tally: Tally | None = None

    def __call__(self, step: Progress) -> None:
        if self._tally is None:
            sizes = _TOKENS if step.counts == "tokens" else _SIZES
            self._tally = tally = Tally(step.total, step.already, sizes=sizes)
            console = stderr_console() if sys.stderr.isatty() else None
            self._stack.enter_context(
                _bar(step.what, tally, console)
                if console and console.is_interactive
                else _looking(_log_lines(step.what, tally), _TICK)
            )
        self._tally.done, self._tally.unit = step.done, step.unit
        if step.ended:
            self._tally = None
            self._stack.close()


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run is at one moment; `rate` is bytes per second, None until it is known.

    Bytes, or what else `sizes` names by powers of a thousand.
    """

    done: int
    total: int
    rate: float | None = None
    unit: str = ""
    sizes: tuple[str, ...] = _SIZES

    @property
    def share(self) -> float:
        """What is done of the whole, 0 to 1."""
        return min(self.done / self.total, 1.0) if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """At this rate; None where there is none."""
        return max(self.total - self.done, 0) / self.rate if self.rate else None


class Tally:
    """Bytes done, set by any thread, read by one.

    The rate is that of the last 30 seconds, and starts with the first byte: what is loaded before is none.
    """

    def __init__(
        self,
        total: int,
        already: int = 0,
        clock: Callable[[], float] = time.monotonic,
        sizes: tuple[str, ...] = _SIZES,
    ) -> None:
        self._sizes = sizes
        self._total, self._already = total, already
        self.done, self.unit = already, ""  # the label of a unit stays until another one is given
        self._clock = clock
        self._samples = deque([(clock(), already)])

    def standing(self) -> Standing:
        """How far it is; the rate gets better the more often it is asked for."""
        now, done, samples = self._clock(), self.done, self._samples
        if done == self._already:
            samples.clear()
        samples.append((now, done))
        while len(samples) > 2 and samples[1][0] <= now - _WINDOW:
            samples.popleft()
        since, before = samples[0]
        rate = (done - before) / (now - since) if now - since >= _SETTLED else None
        return Standing(done, self._total, rate, self.unit, self._sizes)


def log_line(what: str, standing: Standing) -> str:
    """A standing as a line of a log.

    >>> log_line("pruning", Standing(750_000_000, 2_200_000_000, 1.1e9, "proj[layer=7]"))
    'sparseprune: pruning 34%, 0.75 of 2.20 GB, 1.1 GB/s, 1 s left, proj[layer=7]'
    >>> log_line("pruning", Standing(0, 2_200_000_000))
    'sparseprune: pruning 0%, 0.00 of 2.20 GB'
    """
    parts = [f"sparseprune: {what} {int(standing.share * 100)}%", " of ".join(_amounts(standing)).lstrip()]
    if standing.rate is not None:
        parts.append(_speed(standing.rate, standing.sizes))
    if standing.seconds_left is not None:
        parts.append(f"{_duration(standing.seconds_left)} left")
    if standing.unit:
        parts.append(printable(standing.unit))
    return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Line:
    """A standing as one line of a terminal, for rich: bar, bytes, rate, time left, unit.

    Never longer than the terminal is wide. The unit gives way first, then the bar.
    """

    what: str
    standing: Standing

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.progress_bar import ProgressBar
        from rich.segment import Segment
        from rich.text import Text

        standing = self.standing
        speed = "?" if standing.rate is None else _speed(standing.rate, standing.sizes)
        facts = f" {'/'.join(_amounts(standing))} {speed:>8} {_clock_face(standing.seconds_left)}"
        unit = Text(printable(f" {standing.unit}".rstrip()), style="dim", no_wrap=True, end="")
        free = options.max_width - _SPARE - len(self.what) - 1 - len(facts)
        bar, columns = _divided(free, unit.cell_len)
        yield Text(f"{self.what} ", no_wrap=True, end="")
        if bar:
            drawn = ProgressBar(total=1.0, completed=standing.share, width=bar)
            yield from Segment.adjust_line_length(list(console.render(drawn, options)), bar)
        yield Text(facts, no_wrap=True, end="")
        if columns:
            unit.truncate(columns, overflow="ellipsis")
            unit.plain = unit.plain.encode(options.encoding, "replace").decode(options.encoding)
            yield unit


@contextmanager
def _bar(what: str, tally: Tally, console: Console) -> Iterator[None]:
    """The line is there while it lasts, and gone after it, whatever happens."""
    from rich.live import Live

    live = Live(
        get_renderable=lambda: Line(what, tally.standing()),
        console=console,
        auto_refresh=False,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),  # elsewhere it would end up on stderr
    )
    try:
        with live, _looking(live.refresh, 1 / _REDRAWS):
            yield
    except BaseException:
        # Where a signal came while the line was begun, nobody but us knows that the cursor is hidden.
        console.file.write(_SHOW_CURSOR)
        console.file.flush()
        raise


def _log_lines(what: str, tally: Tally) -> Callable[[], None]:
    """Writes a line after five seconds, then each time after twice the time, at last one a minute."""
    began, due = time.monotonic(), _FIRST_LINE

    def look() -> None:
        nonlocal due
        standing = tally.standing()
        passed = time.monotonic() - began
        if passed >= due:
            due = passed + min(passed, _LONGEST_PAUSE)
            print(log_line(what, standing), file=sys.stderr, flush=True)

    return look


@contextmanager
def _looking(look: Callable[[], None], pause: float) -> Iterator[None]:
    """Look again and again while it lasts, in a thread of its own.

    Where no thread, no memory or nobody who reads can be had, nothing is shown; the run goes on.
    """
    from sparseprune.checkpoint.threads import Worker  # which --help has no use for

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


def _divided(free: int, wanted: int) -> tuple[int, int]:
    """The columns of the bar and of the unit out of `free` ones; the unit would have `wanted`.

    The bar does not depend on the unit's length: it stays as long when the next unit begins.

    >>> _divided(3, 33), _divided(43, 33), _divided(43, 0)
    ((3, 0), (10, 33), (40, 0))
    """
    if not wanted or free < _SHORTEST_BAR + _SHORTEST_UNIT:
        return min(max(free, 0), _LONGEST_BAR), 0
    bar = min(max(free // 4, _SHORTEST_BAR), _LONGEST_BAR)
    return bar, min(wanted, free - bar)


def _amounts(standing: Standing) -> tuple[str, str]:
    """What is done and the whole, in one unit of size and equally long.

    >>> _amounts(Standing(750_000_000, 2_200_000_000)), _amounts(Standing(7_500_000, 12_300_000))
    (('0.75', '2.20 GB'), (' 7.5', '12.3 MB'))
    """
    step, name = _scale(standing.total, standing.sizes)
    whole = standing.total / step
    digits = 0 if step == 1 or whole >= 99.95 else 1 if whole >= 9.995 else 2
    text = f"{whole:.{digits}f}"
    return f"{standing.done / step:{len(text)}.{digits}f}", f"{text} {name}"


def _speed(rate: float, sizes: tuple[str, ...] = _SIZES) -> str:
    """Bytes per second in at most eight columns.

    >>> _speed(1.13e9), _speed(12_345_678), _speed(999_999), _speed(0)
    ('1.1 GB/s', '12 MB/s', '1.0 MB/s', '0 B/s')
    """
    step, name = _scale(rate, sizes)
    return f"{rate / step:.{int(step > 1 and rate / step < 9.95)}f} {name}/s"


def _scale(nbytes: float, sizes: tuple[str, ...]) -> tuple[int, str]:
    """The unit of size in which the bytes have at most three digits before the point."""
    power = 0
    while nbytes >= 999.5 * 1000**power and power < len(sizes) - 1:
        power += 1
    return 1000**power, sizes[power]


def _clock_face(seconds: float | None) -> str:
    """Time left as on a clock.

    >>> _clock_face(12.3), _clock_face(754), _clock_face(3723), _clock_face(None)
    ('0:12', '12:34', '1:02:03', '-:--')
    """
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _duration(seconds: float) -> str:
    """Time left in words, as exact as it is known.

    >>> _duration(12.3), _duration(754), _duration(37230)
    ('12 s', '13 min', '10.3 h')
    """
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
