"""The hidden folder beside a target in which its output grows: locked, recovered, exchanged, removed.

It holds `lock`, held by the run that writes; `output`, which gets the target's name or whose files get
theirs; and `replaced`, which bore the name before, while names are exchanged. A journal of finished work
has its place beside them. Knows names and no contents. Called by staging.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from typing import TYPE_CHECKING

from sparseprune.checkpoint.transfer import machine_errors
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from pathlib import Path

_LOCK = "lock"
_ATTEMPTS = 10
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class PartialFolder:
    """The staging folder of one target; at most one live run holds it."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.path = target.with_name(f".{target.name}.sparseprune-partial") if target.name else target
        self.output = self.path / "output"
        self._replaced = self.path / "replaced"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Takes the lock, undoes what a killed run left, and makes an empty `output`."""
        with machine_errors(self.path):
            self._lock = self._locked()
        try:
            with machine_errors(self.path):
                self._put_back()
                self._empty()
                self.output.mkdir()
        except BaseException:
            self.discard()
            raise

    def exchange(self) -> None:
        """Gives `output` the target's name; what had it waits in `replaced`, and comes back on an error."""
        try:
            if os.path.lexists(self.target):
                self.target.rename(self._replaced)
            self.output.rename(self.target)
        except BaseException:
            self._put_back()
            raise

    def discard(self) -> None:
        """Removes the folder and lets go of the lock; keeps it if it holds the only copy of the target."""
        if self._lock is None:
            return
        try:
            self._put_back()
        except OSError as error:
            raise MachineError(
                f"{self.target}: could not be put back ({error.strerror}); it is in {self._replaced}"
            ) from error
        else:
            # What cannot be removed now is stale from here on, and removed by the next run.
            with contextlib.suppress(OSError):
                self._empty()
                # The lock goes last: whoever makes it anew finds nothing that is still being removed.
                (self.path / _LOCK).unlink()
                self.path.rmdir()
        finally:
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

    def _put_back(self) -> None:
        """Between the two renames the target is in `replaced` alone: it gets its name again."""
        if os.path.lexists(self._replaced) and not os.path.lexists(self.target):
            self._replaced.rename(self.target)

    def _empty(self) -> None:
        for path in self.path.iterdir():
            if path.name != _LOCK:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, a link (never what it points to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
