"""Signals that ask a process to end, heard once: Ctrl-C, a terminal that hangs up, a polite kill.

Owns which signals these are, their words and exit codes, that the second one changes nothing, and that the
process ends soon after the first, whatever a library is doing. Knows nothing of the work. Called by
console.py, and by commands that have something to say of what a signal leaves.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from tempfile import TemporaryDirectory
    from types import FrameType
    from typing import Any


_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "hung up"
_PAUSE = 0.01  # seconds until a signal that could not be raised comes again
_GRACE = 1.5  # seconds from a signal until the process ends, however far its orderly end is
_CLEAN_LINE = b"\r\x1b[K\x1b[?25h"  # no progress bar, and a cursor
_NOTHING = "nothing was written"

# Signals are the process's own, and so is what has to be known where one ends it: the innermost comes last.
_texts: list[Callable[[], str]] = []
_folders: list[TemporaryDirectory[str]] = []
_ears: list[Callable[[str], None]] = []


class Stopped(KeyboardInterrupt):
    """A signal asks for the end of the process; `args` may say what there is by now."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stopped(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """What to say of it, and the exit code, which a shell gives a process that the signal killed.

    >>> stopped(KeyboardInterrupt("there is no output")), stopped(Stopped(signal.SIGTERM))
    (('interrupted: there is no output', 130), ('terminated: nothing was written', 143))
    """
    number = signal.Signals(interrupt.number) if isinstance(interrupt, Stopped) else signal.SIGINT
    return f"{_WORDS[number]}: {str(interrupt) or _NOTHING}", 128 + number


@contextmanager
def text_when_stopped(text: Callable[[], str]) -> Iterator[None]:
    """After a signal inside, `text` says what there is by then; "" for nothing."""
    _texts.append(text)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        interrupt.args = (text(),)
        raise
    finally:
        _texts.pop()


@contextmanager
def heard_at_the_end(hear: Callable[[str], None]) -> Iterator[None]:
    """Where a signal ends the process from inside, `hear` gets the line that stderr gets."""
    _ears.append(hear)
    try:
        yield
    finally:
        _ears.pop()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[str]:
    """A folder that is gone afterwards, also where a signal ends the process."""
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
    with folder as path:
        _folders.append(folder)
        try:
            yield path
        finally:
            _folders.pop()


@contextmanager
def stopped_once() -> Iterator[None]:
    """One Stopped at the most: a second one would leave threads at work on what is given up.

    Where it does not lead out of here within a moment the process ends, as by SIGKILL but for its exit code
    and a line on stderr. A signal that is ignored from outside (nohup) or is somebody else's stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in _WORDS}
    ours = [one for one, what in usual.items() if what in (signal.default_int_handler, signal.SIG_DFL)]
    delay = _Delay()
    around = _modules_being_made(sys._getframe())  # noqa: SLF001  (by whoever calls: nothing inside)
    raised = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised:  # to ignore signals from here on would have Python report one that came meanwhile
            return
        if _modules_being_made(frame) > around:
            delay.again(number, stop)
            return
        raised = True
        raise Stopped(number)

    def lost(stopped: Stopped) -> None:
        nonlocal raised
        raised = False
        delay.again(stopped.number, stop)

    def end() -> None:
        delay.end()
        for each in ours:
            signal.signal(each, usual[each])

    for each in ours:
        signal.signal(each, stop)
    try:
        with _lost(lost), _deadline(ours):
            try:
                yield
            finally:
                end()
    finally:
        end()  # where a signal came before the work began


class _Delay:
    """A signal that comes at the wrong moment comes once more, a moment later."""

    def __init__(self) -> None:
        self._waits = False

    def again(self, number: int, stop: Callable[[int, FrameType | None], None]) -> None:
        self._waits = True
        signal.signal(signal.SIGALRM, lambda _, frame: stop(number, frame))
        signal.setitimer(signal.ITIMER_REAL, _PAUSE)

    def end(self) -> None:
        if self._waits:
            signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def _lost(caught: Callable[[Stopped], None]) -> Iterator[None]:
    """Hears of what the interpreter cannot raise: in a destructor, or while it locks a module."""
    usual = sys.unraisablehook

    def unraisable(what: Any) -> None:  # noqa: ANN401  (its type has no name)
        if isinstance(what.exc_value, Stopped):
            caught(what.exc_value)
        else:
            usual(what)

    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = usual


@contextmanager
def _deadline(numbers: Container[int]) -> Iterator[None]:
    """The first of these signals leaves a moment to get out of here; then the process ends.

    Python calls handlers in the main thread, between its own steps: not while that one is inside of a call
    of a library, or waits for a thread that is. A thread of its own hears of signals through a pipe, into
    which the system's handler writes their numbers.
    """
    from sparseprune.checkpoint.threads import Worker  # which --help has no use for

    try:
        reading, writing = os.pipe()
    except OSError:  # no descriptor is left: the orderly way has to do
        yield
        return
    os.set_blocking(writing, False)
    watch = Worker(lambda: _watch(reading, numbers), "sparseprune-signals", daemon=True)
    usual = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        watch.begin()
        yield
    finally:
        signal.set_wakeup_fd(usual)
        os.close(writing)
        watch.wait()
        os.close(reading)


def _watch(pipe: int, numbers: Container[int]) -> None:
    """Until the other end of the pipe is closed, or for a moment after a signal: then end the process."""
    ready = select.poll()
    ready.register(pipe, select.POLLIN)
    heard, end = 0, 0.0
    while not heard or time.monotonic() < end:
        if ready.poll(1000 * max(0.0, end - time.monotonic()) if heard else None):
            found = os.read(pipe, 1)
            if not found:
                return
            if not heard and found[0] in numbers:
                heard, end = found[0], time.monotonic() + _GRACE
    _end(heard)


def _end(number: int) -> None:
    """End the process now, as by SIGKILL: what it has written is what the next run finds.

    What is in its buffers is lost, and threads end wherever they are. To let the interpreter go down around
    threads inside of libraries would abort.
    """
    for folder in _folders:
        folder.cleanup()
    text = (_texts[-1]() if _texts else "") or _NOTHING
    ended = f"{_WORDS[signal.Signals(number)]}: {text}"
    line = f"sparseprune: {ended}\n".encode(errors="backslashreplace")
    for hear in _ears:
        hear(ended)
    with suppress(OSError):
        if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb":
            line = _CLEAN_LINE + line
        ready = select.poll()
        ready.register(2, select.POLLOUT)
        if ready.poll(0):  # who does not read is not waited for
            os.write(2, line)
    os._exit(128 + number)


def _modules_being_made(frame: FrameType | None) -> int:
    """How many modules that are not ours are being made: some abort the process where one is interrupted."""
    count = 0
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            room = str(frame.f_globals.get("__name__")).partition(".")[0]
            count += room not in {"__main__", "sparseprune"}
        frame = frame.f_back
    return count
