"""The hidden folder beside a target in which its output grows: locked, recovered, kept or removed.

It holds `lock`, held by the run that writes; `output`, which gets the target's name or whose files get
theirs; `journal`, by which a later run continues, and `aside`, by which it does so inside a piece of work;
and, while names are given, what naming.py keeps there.
Knows names and no contents. Called by staging.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from typing import TYPE_CHECKING

from sparseprune.checkpoint import naming, transfer
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_LOCK = "lock"
_JOURNAL = "journal"
_ASIDE = "aside"
_ATTEMPTS = 10
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_BLOCK = 512  # the unit of st_blocks, whatever the file system's own is


class PartialFolder:
    """The staging folder of one target, or another `kind` of one; at most one live run holds it.

    OSErrors are the caller's to put into words, but for those of `release` and `discard`.
    """

    def __init__(self, target: Path, kind: str = "partial") -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.sparseprune-{kind}") if target.name else target
        self.output = self.path / naming.OUTPUT
        self.journal = self.path / _JOURNAL
        self.aside = self.path / _ASIDE
        self._lock: int | None = None

    def acquire(self) -> None:
        """Takes the lock and takes back the names that a killed run was giving."""
        self._lock = self._locked()
        try:
            naming.take_back(self.path, self.target)
        except BaseException:
            self._unlock()
            raise

    def start_over(self) -> None:
        """Removes what a killed run left and makes an empty `output`."""
        if os.path.lexists(self.journal):
            # Gone for good before anything else: it would vouch for files that are about to be made anew.
            remove(self.journal)
            transfer.sync(self.path)
        self._remove_all_but(_LOCK)
        self.output.mkdir()

    def resume(self) -> None:
        """Removes what a killed run left, but for its output, its journal and what it put aside."""
        self._remove_all_but(_LOCK, _JOURNAL, _ASIDE, naming.OUTPUT)

    def sync_folders(self) -> None:
        """Waits until every name in the folder, and its own, is on disk."""
        for folder, _, _ in os.walk(self.path):
            transfer.sync(self.path / folder)
        transfer.sync(self.path.parent)

    def sizes(self) -> dict[str, int] | None:
        """Path in `output` -> size of every file there; None where that is anything but plain files."""
        sizes: dict[str, int] = {}
        try:
            for entry in _entries(self.output):
                status = entry.stat(follow_symlinks=False)
                if not stat.S_ISREG(status.st_mode):
                    return None
                sizes[os.path.relpath(entry.path, self.output)] = status.st_size
        except OSError:
            return None
        return sizes

    def held_bytes(self) -> int:
        """What the folder takes on disk: free once it is emptied, or there already when it is continued."""
        held = 0
        with contextlib.suppress(OSError):  # no folder; a count that is too low refuses too much at worst
            for entry in _entries(self.path):
                status = entry.stat(follow_symlinks=False)
                held += min(status.st_size, status.st_blocks * _BLOCK)
        return held

    def release(self) -> None:
        """Lets go of the lock; keeps the folder if a later run can continue it, else removes it."""
        if self._lock is not None and self.journal.is_file() and self.sizes():
            self._let_go(remove_it=False)
        else:
            self.discard()

    def discard(self) -> None:
        """Removes the folder and lets go of the lock; keeps it if it holds the only copy of the target."""
        self._let_go(remove_it=True)

    def _let_go(self, *, remove_it: bool) -> None:
        if self._lock is None:
            return
        try:
            naming.take_back(self.path, self.target)
        except OSError as error:
            raise MachineError(
                f"{self.target}: could not be put back ({error.strerror}); what it was is in {self.path}"
            ) from error
        else:
            if remove_it:
                self._remove()
        finally:
            self._unlock()

    def _remove(self) -> None:
        # What cannot be removed now is stale from here on, and removed by the next run.
        with contextlib.suppress(OSError):
            # First, so that nothing is continued of which a part is gone.
            remove(self.journal)
            self._remove_all_but(_LOCK)
            # The lock goes last: whoever makes it anew finds nothing that is still being removed.
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileExistsError):
                self.path.mkdir()
            if self.path.is_symlink() or not self.path.is_dir():
                raise CheckpointError(f"{self.path}: is in the way of the unfinished output; remove it")
            lock = self.path / _LOCK
            try:
                descriptor = os.open(lock, _LOCK_FLAGS, 0o666)
            except FileNotFoundError:  # another run ended between the two calls
                continue
            if self._owned(descriptor, lock):
                return descriptor
        raise MachineError(f"{self.path}: cannot be locked, other runs come and go there; try again")

    def _owned(self, descriptor: int, lock: Path) -> bool:
        """Whether the lock is held and still stands in the folder; closed if not."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat()):
                return True
        except BlockingIOError as error:
            os.close(descriptor)
            raise CheckpointError(
                f"{self.target}: another run is writing this output; wait, or give another name with -o"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return False

    def _remove_all_but(self, *kept: str) -> None:
        for path in sorted(self.path.iterdir()):
            if path.name not in kept:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link (never what it points to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """All that lies in a folder and below, but for the folders themselves; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            else:
                yield entry
