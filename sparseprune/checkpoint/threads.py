"""Threads, as many of them as the system gives: where it gives none, the work is done without.

Owns starting and waiting. Knows nothing of what is done, nor whose failure is told. Called by whatever works
side by side, or beside something else.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_PAUSE, _PAUSES = 0.001, 500  # seconds, and how many of them a thread has to begin


def started(thread: threading.Thread) -> bool:
    """Start it; False where the system has no thread left to give."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def side_by_side(work: Callable[[], None], count: int, stop: Callable[[], None]) -> None:
    """Call `work`, which raises nothing, in so many threads or fewer, and wait for all; else in this one.

    `stop` tells it to begin nothing more: when all is done, and where Ctrl-C comes.
    """
    threads: list[threading.Thread] = []
    try:
        for number in range(count):
            threads.append(threading.Thread(target=work, name=f"sparseprune-{number}"))
            if not started(threads[-1]):
                threads.pop()
                break
        if not threads:
            work()
        _join(threads)
    finally:
        stop()
        _join(threads)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        # Ctrl-C may have come while it was started: it then begins a moment later, or never.
        for _ in range(_PAUSES):
            if thread.ident is not None:
                thread.join()
                break
            time.sleep(_PAUSE)
