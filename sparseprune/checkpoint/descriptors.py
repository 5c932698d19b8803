"""Files that stay open between two uses, a bounded number of them whatever the checkpoint has.

Owns the descriptors. Knows neither how a file is opened nor what is done with it. Called by whatever reads
or writes at places of many files, from any thread.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Key = TypeVar("Key")

_IDLE = 16


class OpenFiles(Generic[Key]):
    """At most 16 files stay open, and one more for every use under way; after `close` only the latter."""

    def __init__(self, opened: Callable[[Key], int]) -> None:
        self._opened = opened
        self._lock = threading.Lock()
        self._idle: list[tuple[Key, int]] = []
        self._closed = False

    @contextmanager
    def use(self, key: Key) -> Iterator[int]:
        """The descriptor of a file, which nobody else has meanwhile."""
        descriptor = self._taken(key)
        try:
            yield descriptor
        finally:
            self._put_away(key, descriptor)

    def close(self) -> None:
        """Closes what is open; what is in use is closed by its user."""
        with self._lock:
            self._closed = True
            while self._idle:
                os.close(self._idle.pop()[1])

    def _taken(self, key: Key) -> int:
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                other = self._idle[place][0]
                if other is key or other == key:  # to compare paths takes its time
                    return self._idle.pop(place)[1]
        return self._opened(key)

    def _put_away(self, key: Key, descriptor: int) -> None:
        with self._lock:
            surplus = descriptor if self._closed else None
            if surplus is None:
                self._idle.append((key, descriptor))
                if len(self._idle) > _IDLE:
                    surplus = self._idle.pop(0)[1]
        if surplus is not None:
            os.close(surplus)
