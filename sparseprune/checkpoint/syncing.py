"""What has been written and is not yet on disk, and the notes that wait until it is.

Owns the order that a journal relies on: bytes first, then the note of them. Knows files and lines, and
neither tensors nor records. Called by staging.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from sparseprune.checkpoint import transfer
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from sparseprune.checkpoint.journal import Journal


class Unsynced:
    """Files written to and notes of them, from any thread, until `flush` has them on disk.

    A note was made after the writes it tells of were: it reaches the journal, if there is one, after they
    have reached the disk, and never if they could not. `writing` gives the context in which a file is
    touched, where an OSError becomes a MachineError. `let_go` frees the cache of what is on disk. `unsure`
    once the file system could not tell whether bytes are on disk: from then on nothing reaches the journal.
    """

    def __init__(
        self, writing: Callable[[str], AbstractContextManager[None]], *, let_go: bool = False
    ) -> None:
        self.journal: Journal | None = None
        self.unsure = False
        self._let_go = let_go
        self._writing = writing
        self._lock = threading.Lock()
        self._paths: set[str] = set()
        self._notes: list[bytes] = []
        self._one_flush = threading.Lock()
        self._failure: MachineError | None = None

    def written(self, path: str) -> None:
        with self._lock:
            self._paths.add(path)

    def noted(self, note: bytes) -> None:
        with self._lock:
            self._notes.append(note)

    def flush(self) -> None:
        """Waits until the files are on disk, then until the notes are; MachineError, also from then on."""
        # One at a time: the bytes of a note may be in the hands of the flush before.
        with self._one_flush:
            if self._failure is not None:
                # The system tells it once: the next sync of the same file would call it well.
                raise MachineError(str(self._failure)) from self._failure
            with self._lock:
                paths, self._paths = self._paths, set()
                notes, self._notes = self._notes, []
            try:
                self._sync(paths, notes)
            except MachineError as failure:
                self._failure = failure
                raise
            except BaseException:  # interrupted: the next flush does it again
                with self._lock:
                    self._paths |= paths
                    self._notes[:0] = notes
                raise

    def _sync(self, paths: set[str], notes: list[bytes]) -> None:
        for path in sorted(paths):
            with self._writing(path):
                self.unsure |= not transfer.sync(path, data_only=True, let_go=self._let_go)
        if notes and self.journal is not None and not self.unsure:
            with self._writing(self.journal.path):
                self.journal.append(notes)
