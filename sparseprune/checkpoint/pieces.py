"""Pieces of tensors, read side by side: threads that take them in order, as they become free.

Owns who takes what, and which failure is told. Knows nothing of what is done with a piece. Called by whatever
measures a checkpoint without writing one.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

from sparseprune.checkpoint.threads import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
