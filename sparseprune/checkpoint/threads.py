"""Threads: several that do the same work, one that works beside them, pieces taken in order.

Owns starting, ending and signals. Knows nothing of the work. Called by whatever works side by side.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


_PAUSE, _PAUSES = 0.001, 500  # seconds, and how many of them a thread has to begin


class Worker(threading.Thread):
    """A thread that does `work`, and that a signal does not hide from whoever waits for it.

    Python up to 3.12 takes a `join` that an exception of a signal handler interrupted for the end of the
    thread. Nobody waits for that thread any more, the interpreter goes down around it, and a thread that is
    inside of torch then aborts the process ("terminate called without an active exception").
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
        """Start it; False where the system has no thread left to give."""
        try:
            self.start()
        except RuntimeError:
            self._refused = True
        return not self._refused

    def wait(self) -> None:
        """Until it has ended; may be called again where a signal interrupted it, and where it never began."""
        # Ctrl-C may have come while it was started: it then begins a moment later, or never.
        for _ in range(0 if self._refused else _PAUSES):
            if self.ident is not None:
                self._over.wait()
                self.join()  # a moment, if at all
                break
            time.sleep(_PAUSE)


def side_by_side(work: Callable[[], None], count: int, stop: Callable[[], None]) -> None:
    """Call `work`, which raises nothing, in so many threads or fewer, and wait for all; else in this one.

    `stop` tells it to begin nothing more, and to end what takes long: when all is done, and after a signal.
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


Piece = TypeVar("Piece")


def work_through(pieces: Iterable[Piece], worker: Callable[[], Callable[[Piece], None]], jobs: int) -> None:
    """Do the work of every piece, on so many threads; each makes a `worker` of its own, with its buffers.

    Pieces are begun in their order, and what was begun is ended. Of several failures the one of the
    earliest piece is raised; nothing is begun after a failure, or after Ctrl-C.
    """
    _Threads(pieces, worker).run(jobs)


class _Threads(Generic[Piece]):
    def __init__(self, pieces: Iterable[Piece], worker: Callable[[], Callable[[Piece], None]]) -> None:
        self._pieces = enumerate(pieces)
        self._worker = worker
        self._failures: dict[int, BaseException] = {}
        self._lock = threading.Lock()

    def run(self, jobs: int) -> None:
        side_by_side(self._work, jobs, self._stop)
        if self._failures:
            # Pieces are begun in order and what is begun is ended: nothing earlier can have failed unseen.
            raise self._failures[min(self._failures)]

    def _stop(self) -> None:
        with self._lock:
            self._pieces = enumerate(())

    def _take(self) -> tuple[int, Piece] | None:
        with self._lock:
            return next(self._pieces, None)

    def _work(self) -> None:
        number = -1
        try:
            work = self._worker()
            while (taken := self._take()) is not None:
                number, piece = taken
                work(piece)
        except BaseException as failure:  # noqa: BLE001  (raised by `run`, in the thread that waits)
            with self._lock:
                self._failures[number] = failure
            self._stop()
