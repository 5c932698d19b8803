"""Writes at places of many files, from any thread, without opening a file for every write.

Knows paths and no tensors; raises bare OSErrors. Called by staging.py.
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from sparseprune.checkpoint import transfer
from sparseprune.checkpoint.descriptors import OpenFiles

if TYPE_CHECKING:
    from sparseprune.checkpoint.transfer import Bytes


class FileWriter:
    """Writes to files that exist; also after `close`, but then none stays open."""

    def __init__(self) -> None:
        self._merging = threading.Lock()
        self._files = OpenFiles(transfer.open_to_write)

    def write(self, path: str, data: Bytes, offset: int) -> None:
        """Writes all of `data` at `offset` of a file that is no link."""
        with self._files.use(path) as descriptor:
            transfer.write_at(descriptor, data, offset)

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        """Gives one byte of a file those bits of `value` that `bits` has; the others stay.

        Calls wait for each other, so that several threads may share a byte.
        """
        with self._merging, self._files.use(path) as descriptor:
            (byte,) = os.pread(descriptor, 1, offset)
            transfer.write_at(descriptor, bytes([(byte & ~bits) | (value & bits)]), offset)

    def close(self) -> None:
        """Closes what is open; a write that is under way closes its file itself."""
        self._files.close()
