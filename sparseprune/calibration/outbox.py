"""What a machine sends of its share of a calibration, and where it keeps hidden states meanwhile.

Owns the queue between the thread that sums and the one that sends, so that memory is bounded, and folders
that a killed process leaves behind. Knows no models. Called by shares.
"""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import tempfile
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint.file_io import as_bytes
from sparseprune.checkpoint.threads import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint.file_io import Bytes

_PIECE = 8 << 20  # bytes of sums that are sent at once
_WAITING = 4  # items that wait until they are sent
_REPORT_SECONDS = 0.5  # between reports, at most
_PREFIX = "sparseprune-states-"
_LOCK = "lock"


class Piece(Struct, frozen=True, eq=False):
    """Bytes of a tensor of statistics, from its byte `begin` on."""

    name: str
    begin: int
    data: NDArray[np.uint8]


class Note(Struct, frozen=True):
    """What a sweep notes of a block, once its sums are on their way."""

    key: str
    record: Any


class Report(Struct, frozen=True, eq=False):
    """What is new: pieces and notes in their order, and how often blocks ran, with their labels."""

    items: tuple[Piece | Note, ...]
    passed: tuple[tuple[float, str], ...]


class Outbox:
    """A sink for sums whose bytes and notes are sent elsewhere; who writes waits until some are sent."""

    def __init__(self) -> None:
        self.finished: Mapping[str, Any] = MappingProxyType({})
        self._items: queue.Queue[Piece | Note] = queue.Queue(_WAITING)
        self._lock = threading.Lock()
        self._passed: dict[str, float] = {}

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        view = as_bytes(data)
        for at in range(0, len(view), _PIECE):
            # A copy, so that a piece does not keep all of its matrix in memory.
            self._items.put(Piece(name, begin + at, np.array(view[at : at + _PIECE], dtype=np.uint8)))

    def note(self, key: str, record: object) -> None:
        self._items.put(Note(key, record))

    def flush(self) -> None:
        """Nothing: who gets the notes waits for the disk."""

    def passed(self, runs: float, label: str) -> None:
        with self._lock:
            self._passed[label] = self._passed.get(label, 0) + runs

    def sent(self, work: Callable[[], None]) -> Iterator[Report]:
        """Do work in another thread, and give what it writes and notes; at the end its error, if any."""
        failures: list[BaseException] = []

        def caught() -> None:
            try:
                work()
            except BaseException as failure:  # noqa: BLE001  (raised below)
                failures.append(failure)

        thread = Worker(caught, "sparseprune-share", daemon=True)
        if not thread.begin():
            raise MemoryError("the system has no thread left")
        while thread.is_alive():
            yield self._news(_REPORT_SECONDS)
        while not self._items.empty():
            yield self._news(0)
        if failures:
            raise failures[0]

    def _news(self, seconds: float) -> Report:
        """What there is after so long, up to a piece of full size."""
        items: list[Piece | Note] = []
        nbytes = 0
        with suppress(queue.Empty):
            item = self._items.get(timeout=seconds) if seconds else self._items.get_nowait()
            while True:
                items.append(item)
                nbytes += item.data.nbytes if isinstance(item, Piece) else 0
                if nbytes >= _PIECE:
                    break
                item = self._items.get_nowait()
        with self._lock:
            passed, self._passed = self._passed, {}
        return Report(tuple(items), tuple((runs, label) for label, runs in passed.items()))


@contextmanager
def states_folder() -> Iterator[Path]:
    """A temporary folder that is gone afterwards; those that killed processes left are removed first."""
    _remove_left()
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as name:
        folder = Path(name)
        with (folder / "new").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "new").rename(folder / _LOCK)  # so that nobody finds it unlocked
            yield folder


def _remove_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
