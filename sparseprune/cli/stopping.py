"""Signals that ask a process to end, heard once: Ctrl-C, a terminal that hangs up, a polite kill.

Owns which signals these are, their words and exit codes, and that the second one changes nothing. Knows
nothing of what is being done. Called by console.py.
"""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType
    from typing import Any

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):
    _WORDS[signal.SIGHUP] = "hung up"
_PAUSE = 0.01  # seconds until a signal that could not be raised comes again


class Stopped(KeyboardInterrupt):
    """A signal asks for the end of the process; `args` may say what there is by now."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stopped_text(interrupt: KeyboardInterrupt) -> str:
    """What is said of it.

    >>> stopped_text(KeyboardInterrupt("there is no output")), stopped_text(Stopped(signal.SIGTERM))
    ('interrupted: there is no output', 'terminated: nothing was written')
    """
    return f"{_WORDS[_signal_of(interrupt)]}: {str(interrupt) or 'nothing was written'}"


def stopped_code(interrupt: KeyboardInterrupt) -> int:
    """The exit code, which is what a shell gives a process that the signal killed.

    >>> stopped_code(KeyboardInterrupt()), stopped_code(Stopped(signal.SIGTERM))
    (130, 143)
    """
    return 128 + _signal_of(interrupt)


@contextmanager
def stopped_once() -> Iterator[None]:
    """One Stopped at the most: a second one would leave threads at work on what is given up.

    A signal that is ignored from outside (nohup) or is somebody else's stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in _WORDS}
    ours = [one for one, what in usual.items() if what in (signal.default_int_handler, signal.SIG_DFL)]
    delay = _Delay()

    def stop(number: int, frame: FrameType | None) -> None:
        if _loads_another_library(frame):
            delay.again(number, stop)
            return
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for each in ours:
        signal.signal(each, stop)
    try:
        with _lost(lambda stopped: delay.again(stopped.number, stop)):
            yield
    finally:
        delay.end()
        for each in ours:
            signal.signal(each, usual[each])


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


def _loads_another_library(frame: FrameType | None) -> bool:
    """Whether a module that is not ours is being made: some abort the process where they are interrupted."""
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            room = str(frame.f_globals.get("__name__")).partition(".")[0]
            if room not in {"__main__", "sparseprune"}:
                return True
        frame = frame.f_back
    return False


def _signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    return signal.Signals(interrupt.number) if isinstance(interrupt, Stopped) else signal.SIGINT
