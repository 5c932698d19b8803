"""Writes at places of many files, from any thread, without opening a file for every write.

Owns the descriptors that stay open between writes. Knows paths and no tensors; raises bare OSErrors.
Called by staging.py.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from sparseprune.checkpoint import transfer

if TYPE_CHECKING:
    from sparseprune.checkpoint.transfer import Bytes

_IDLE = 16


class FileWriter:
    """Writes to files that exist; at most 16 stay open, and one more for every write under way.

    Also after `close`, but then none stays open.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._merging = threading.Lock()
        self._idle: list[tuple[str, int]] = []
        self._closed = False

    def write(self, path: str, data: Bytes, offset: int) -> None:
        """Writes all of `data` at `offset` of a file that is no link."""
        descriptor = self._taken(path)
        try:
            transfer.write_at(descriptor, data, offset)
        finally:
            self._put_away(path, descriptor)

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        """Gives one byte of a file those bits of `value` that `bits` has; the others stay.

        Calls wait for each other, so that several threads may share a byte.
        """
        with self._merging:
            descriptor = self._taken(path)
            try:
                (byte,) = os.pread(descriptor, 1, offset)
                transfer.write_at(descriptor, bytes([(byte & ~bits) | (value & bits)]), offset)
            finally:
                self._put_away(path, descriptor)

    def close(self) -> None:
        """Closes what is open; a write that is under way closes its file itself."""
        with self._lock:
            self._closed = True
            while self._idle:
                os.close(self._idle.pop()[1])

    def _taken(self, path: str) -> int:
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                if self._idle[place][0] == path:
                    return self._idle.pop(place)[1]
        return transfer.open_to_write(path)

    def _put_away(self, path: str, descriptor: int) -> None:
        with self._lock:
            surplus = descriptor if self._closed else None
            if surplus is None:
                self._idle.append((path, descriptor))
                if len(self._idle) > _IDLE:
                    surplus = self._idle.pop(0)[1]
        if surplus is not None:
            os.close(surplus)
