"""The staging folder of an unfinished output: its place, lock, owner and what a killed run left in it.

Owns who may use such a folder and when it is removed. Knows nothing of tensors. Called by output.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import stat
from typing import TYPE_CHECKING

from sparseprune.checkpoint import file_io, publish
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


_LOCK = "lock"
_JOURNAL = "journal"
_ASIDE = "aside"
_ATTEMPTS = 10
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL})
_BLOCK = 512  # the unit of st_blocks, whatever the file system's own is
_USUAL_NAME = 255  # bytes of a name
_PRIVATE = 0o700
_OF_OTHERS = 0o077
_WRITTEN_BY_OTHERS = 0o022


class StagingDir:
    """The staging folder of one target, or another `kind` of one; at most one live run has its lock.

    Nobody but its owner may enter it. Once it is acquired, `can_be_continued` says whether only its owner can
    have put anything there, and `warnings` has a line for each promise that its file system cannot keep. The
    caller turns OSErrors into words, except those of `release` and `discard`.
    """

    def __init__(self, target: Path, kind: str = "partial") -> None:
        self.target = target
        self.path = _hidden(target, kind) if target.name else target
        self.output = self.path / publish.OUTPUT
        self.journal = self.path / _JOURNAL
        self.aside = self.path / _ASIDE
        self.can_be_continued = False
        self.warnings: list[str] = []
        self._owner = -1
        self._lock: int | None = None

    def acquire(self) -> None:
        """Takes the lock and undoes or completes the names that a killed run was giving."""
        self._lock = self._locked()
        try:
            publish.settle(self.path, self.target)
        except BaseException:
            self._unlock()
            raise

    def probe(self) -> None:
        """Finds out, for `warnings`, whether the file system can say when data and names are on disk."""
        lost = "is on disk there, so a crash of the machine may lose the output"
        if not file_io.sync(self.path / _LOCK, data_only=True):
            self._warn(f"nothing tells when data {lost}, and an interrupted run is not continued")
        elif not (file_io.sync(self.path) and file_io.sync(self.path.parent, follow_links=True)):
            self._warn(f"nothing tells when a name {lost}")

    def start_over(self, mode: int) -> None:
        """Removes what a killed run left and makes an empty `output` with the permissions `mode`."""
        if os.path.lexists(self.journal):
            # First, and on disk: it speaks of files that are about to be made anew.
            remove(self.journal)
            file_io.sync(self.path)
        self._remove_all_but(_LOCK)
        self.output.mkdir(mode)

    def resume(self) -> None:
        """Removes what a killed run left, except its output, its journal and what it put aside."""
        self._remove_all_but(_LOCK, _JOURNAL, _ASIDE, publish.OUTPUT)

    def sync_folders(self) -> None:
        """Waits until every name in the folder, and its own, is on disk."""
        for folder, _, _ in os.walk(self.path):
            file_io.sync(self.path / folder)
        file_io.sync(self.path.parent, follow_links=True)

    def sizes(self) -> dict[str, int] | None:
        """Path in `output` -> size of every file there; None where one is somebody else's, or no file."""
        sizes: dict[str, int] = {}
        try:
            for entry in _entries(self.output):
                status = entry.stat(follow_symlinks=False)
                if not self._owns(status):
                    return None
                sizes[os.path.relpath(entry.path, self.output)] = status.st_size
        except OSError:
            return None
        return sizes

    def has(self, path: Path) -> bool:
        """Whether a file is there (`journal`, `aside`) that only the owner of the folder can have written."""
        try:
            return self.can_be_continued and self._owns(path.lstat())
        except OSError:
            return False

    def held_bytes(self) -> int:
        """The folder's bytes on disk: free once it is emptied, or in place already when it is continued."""
        held = 0
        with contextlib.suppress(OSError):  # no folder; a count that is too low refuses too much at worst
            for entry in _entries(self.path):
                status = entry.stat(follow_symlinks=False)
                held += min(status.st_size, status.st_blocks * _BLOCK)
        return held

    def release(self) -> None:
        """Unlocks the folder if a later run can continue it, else discards it."""
        self._leave(keep=self._lock is not None and self.has(self.journal) and bool(self.sizes()))

    def discard(self) -> None:
        """Removes and unlocks the folder; keeps it if it holds the only copy of the target."""
        self._leave(keep=False)

    def _leave(self, *, keep: bool) -> None:
        if self._lock is None:
            return
        try:
            publish.settle(self.path, self.target)
        except OSError as error:
            raise MachineError(
                f"{self.target}: could not be put back ({error.strerror}); what it was is in {self.path}"
            ) from error
        else:
            if not keep:
                self._remove()
        finally:
            self._unlock()

    def _remove(self) -> None:
        # The next run removes what cannot be removed now.
        with contextlib.suppress(OSError):
            # First, so that no run continues an output of which a part is gone.
            remove(self.journal)
            self._remove_all_but(_LOCK)
            # Last: a run that makes the lock anew finds nothing that is still being removed.
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int:
        for _ in range(_ATTEMPTS):
            try:
                self.path.mkdir(_PRIVATE)
                made = True
            except FileExistsError:
                made = False
            lock = self.path / _LOCK
            try:
                self._make_private(made=made)
                if os.path.lexists(lock) and not self._owns(lock.lstat()):
                    remove(lock)
                descriptor = os.open(lock, _LOCK_FLAGS, 0o600)
            except FileNotFoundError:  # another run ended between the two calls
                continue
            if self._held(descriptor, lock):
                return descriptor
        raise MachineError(f"{self.path}: cannot be locked, other runs come and go there; try again")

    def _make_private(self, *, made: bool) -> None:
        """Refuses a folder of somebody else, and closes one that others may enter.

        A folder that was just `made` is ours, whoever its file system says owns it.
        """
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{self.path}: is in the way of the unfinished output; remove it")
        self._owner = status.st_uid
        owned = status.st_uid == os.geteuid()
        if not owned and not made:
            raise CheckpointError(
                f"{self.path}: belongs to another user, number {status.st_uid}, whose run may be at work "
                "there; give another name with -o, or remove it"
            )
        if stat.S_IMODE(status.st_mode) & 0o777 != _PRIVATE:
            self._close()
        private = owned and not self.path.lstat().st_mode & _OF_OTHERS
        if not private:
            self._warn("owners and permissions are not kept there, so an interrupted run is not continued")
        entered = not made and bool(status.st_mode & _WRITTEN_BY_OTHERS)
        if entered and publish.is_at_work(self.path):
            raise CheckpointError(
                f"{self.path}: others could write there while an output got its name; take out what is "
                "yours, then remove it"
            )
        if entered and os.path.lexists(self.journal):
            self.warnings.append(
                f"{self.path}: others could write there, so the run that left it is not continued"
            )
        self.can_be_continued = private and not entered

    def _close(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # the caller looks at the mode afterwards
                inherited = os.fstat(descriptor).st_mode & stat.S_ISGID
                os.fchmod(descriptor, _PRIVATE | inherited)
        finally:
            os.close(descriptor)

    def _owns(self, status: os.stat_result) -> bool:
        """Whether it is a plain file of the folder's owner, with no other name."""
        return stat.S_ISREG(status.st_mode) and status.st_uid == self._owner and status.st_nlink == 1

    def _warn(self, fact: str) -> None:
        text = f"{self.path.parent}: {fact}"
        if text not in self.warnings:
            self.warnings.append(text)

    def _held(self, descriptor: int, lock: Path) -> bool:
        """Whether the lock is held and still in the folder; closed if not."""
        held = False
        try:
            self._flock(descriptor)
            held = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
        except BlockingIOError as error:
            raise CheckpointError(
                f"{self.target}: another run is writing this output; wait, or give another name with -o"
            ) from error
        finally:
            if not held:
                os.close(descriptor)
        return held

    def _flock(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            self._warn(
                "there are no locks, so two runs to one output are not told apart; start one at a time"
            )

    def _remove_all_but(self, *kept: str) -> None:
        for path in sorted(self.path.iterdir()):
            if path.name not in kept:
                remove(path)


def left_behind(target: Path) -> Path | None:
    """The staging folder of a target, where a run of this user left it and none is at work there."""
    if not target.name:
        return None
    folder = _hidden(target, "partial")
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        descriptor = os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:  # not there, not readable, or in use
        return None
    return folder


def _hidden(target: Path, kind: str) -> Path:
    """The name of a target's staging folder: cut, with a digest of it, where it would be too long."""
    name, end = os.fsencode(target.name), f".sparseprune-{kind}"
    room = name_bytes(target.parent) - 1 - len(end)
    if len(name) > room:
        end = f".{hashlib.sha256(name).hexdigest()[:16]}{end}"
        cut = max(0, room - 17)
        while cut and name[cut] & 0xC0 == 0x80:  # not inside a character
            cut -= 1
        name = name[:cut]
    return target.with_name(f".{os.fsdecode(name)}{end}")


def name_bytes(folder: Path) -> int:
    """How many bytes a name in a folder may have."""
    try:
        most = os.pathconf(folder, "PC_NAME_MAX")
    except (OSError, ValueError):
        most = -1
    return most if most > 0 else _USUAL_NAME


def remove(path: Path) -> None:
    """Removes a file, a link (never what it points to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Everything in a folder and below, except the folders themselves; links are not followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)
            else:
                yield entry
