"""Threads that do the same work, and a thread that works beside them.

Owns how threads start and end, also after a signal. Knows nothing of the work. Called by every room that
works in parallel.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE, _PAUSES = 0.001, 500  # seconds, and how many of them a thread has to begin


class Worker(threading.Thread):
    """A thread that does `work`; one can wait for it again after a signal interrupted the wait.

    Up to Python 3.12 a `join` that a signal handler's exception interrupted counts as the end of the thread.
    The interpreter then exits while the thread runs, and one that is inside of torch aborts the process
    ("terminate called without an active exception").
    """

    def __init__(self, work: Callable[[], None], name: str, *, daemon: bool = False) -> None:
        super().__init__(name=name, daemon=daemon)
        self._work = work
        self._over = threading.Event()
        self._refused = False

    def run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()

    def begin(self) -> bool:
        """Start it; False where the system has no thread left."""
        try:
            self.start()
        except RuntimeError:
            self._refused = True
        return not self._refused

    def wait(self) -> None:
        """Wait until it has ended; may be called again after a signal, and where it never began."""
        # After a Ctrl-C during its start it begins a moment later, or never.
        for _ in range(0 if self._refused else _PAUSES):
            if self.ident is not None:
                self._over.wait()
                self.join()  # a moment, if at all
                break
            time.sleep(_PAUSE)


def side_by_side(work: Callable[[], None], count: int, stop: Callable[[], None]) -> None:
    """Call `work`, which raises nothing, in up to `count` threads, or in this one, and wait for all.

    `stop` is called when all is done and after a signal: `work` must begin nothing more then, and end soon.
    """
    threads: list[Worker] = []
    try:
        for number in range(count):
            threads.append(Worker(work, f"sparseprune-{number}"))
            if not threads[-1].begin():
                threads.pop()
                break
        if not threads:
            work()
        for thread in threads:
            thread.wait()
    finally:
        stop()
        for thread in threads:
            thread.wait()
