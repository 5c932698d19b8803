"""From a staging folder to the final name: who may use the folder, and what its output may replace.

Owns its place, lock and owner, what a killed run left in it, renames, and what `--force` may replace. Knows
nothing of tensors. Called by output.py before work begins and when it is complete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX, is_folder
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.remote import RemotePath, is_on_hub
from sparseprune.errors import CheckpointError, MachineError, enough, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sparseprune.checkpoint.layout import OutputLayout


# Names in a staging folder: the output and the files of its run; then those of an output that gets its name.
OUTPUT, _LOCK, _JOURNAL = "output", "lock", "journal"
_REPLACED, _EXCHANGED, _NAMES, _FORMER = "replaced", "exchanged", "names", "former"
_HERE = -100  # AT_FDCWD of <fcntl.h>
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_OTHER = "give another name with -o"
_MARGIN = 1 << 20  # bytes for the report, the spec and the folders, whose sizes are not known beforehand


def name_directory(folder: Path, target: Path, given: Callable[[], None]) -> None:
    """Gives the directory `output` the target's name; the old target is moved to `replaced`.

    `given` is called as soon as the target is the new one and nothing can be undone.
    """
    output, replaced = folder / OUTPUT, folder / _REPLACED
    if not os.path.lexists(target):
        output.rename(target)
        given()
        return
    # If this run is killed here, the next one finds two directories and must know which one is new.
    _write(folder / _EXCHANGED, [output.lstat().st_ino])
    file_io.sync(folder)
    if swap(output, target):
        given()
        with contextlib.suppress(OSError):  # it is removed later anyway
            output.rename(replaced)
    else:
        target.rename(replaced)
        output.rename(target)
        given()


def name_files(folder: Path, finals: Sequence[Path], given: Callable[[], None]) -> None:
    """Gives the files of `output` their names; old files under names that have no new file are removed.

    The last name is the target, the weights. A new target comes last, so that its masks and its report are
    there when it appears. An old target is replaced after its masks and report are gone, and before the new
    ones come, so that they never lie beside the wrong weights. `given` as in `name_directory`.
    """
    *others, target = finals
    staged = [final for final in finals if os.path.lexists(folder / OUTPUT / final.name)]
    _write(folder / _NAMES, {final.name: _mark(folder / OUTPUT / final.name) for final in staged})
    (folder / _FORMER).mkdir(mode=0o700, exist_ok=True)
    file_io.sync(folder)
    for final in reversed(others):
        if os.path.lexists(final):
            final.rename(folder / _FORMER / final.name)
    replaces = os.path.lexists(target)
    for final in sorted(staged, key=lambda final: (final == target) != replaces):
        (folder / OUTPUT / final.name).rename(final)
        if final == target:
            given()


def settle(folder: Path, target: Path) -> None:
    """Undoes names that a killed run was giving, or completes them where the target is new already.

    May itself be cut short and called again.
    """
    output, replaced = folder / OUTPUT, folder / _REPLACED
    if (folder / _NAMES).is_file():
        marks = _read(folder / _NAMES)
        if os.path.lexists(output / target.name):
            _undo_files(folder, target, marks)
        else:
            _complete_files(folder, target, marks)
    elif not os.path.lexists(output):
        return
    elif os.path.lexists(replaced):
        if not os.path.lexists(target):
            replaced.rename(target)
    elif (folder / _EXCHANGED).is_file() and _read(folder / _EXCHANGED) not in ({}, [output.lstat().st_ino]):
        output.rename(replaced)


def is_at_work(folder: Path) -> bool:
    """Whether names may have been given or taken away there."""
    return any(os.path.lexists(folder / name) for name in (_NAMES, _FORMER, _REPLACED, _EXCHANGED))


def swap(one: Path, other: Path) -> bool:
    """Exchanges two names at one moment; False where the kernel or the file system does not."""
    import ctypes  # noqa: PLC0415  (only where an output is replaced)

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return bool(rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


def _undo_files(folder: Path, target: Path, marks: dict[str, list[int]]) -> None:
    for name, mark in marks.items():
        final, staged = target.with_name(name), folder / OUTPUT / name
        # The mark differs for a file that somebody else put there since.
        if not os.path.lexists(staged) and os.path.lexists(final) and _mark(final) == mark:
            final.rename(staged)
    if (folder / _FORMER).is_dir():
        for old in sorted((folder / _FORMER).iterdir()):
            if not os.path.lexists(target.with_name(old.name)):
                old.rename(target.with_name(old.name))


def _complete_files(folder: Path, target: Path, marks: dict[str, list[int]]) -> None:
    """Gives the other names, unless the target is gone or was replaced since."""
    if not os.path.lexists(target) or _mark(target) != marks.get(target.name):
        return
    for name in marks:
        final, staged = target.with_name(name), folder / OUTPUT / name
        if os.path.lexists(staged) and not os.path.lexists(final):
            staged.rename(final)


def _mark(path: Path) -> list[int]:
    """Facts of a file that a rename keeps."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def _write(path: Path, value: object) -> None:
    path.unlink(missing_ok=True)  # of an earlier attempt
    text = json.dumps(value).encode() + b"\n"
    file_io.create(path, len(text), text)
    file_io.sync(path)


def _read(path: Path) -> Any:  # noqa: ANN401
    """What `_write` wrote; an empty object where it was killed meanwhile, before anything was moved."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {}


def check_target(layout: OutputLayout, *, force: bool, held: int = 0) -> None:
    """CheckpointError where the output may not be written, MachineError where the system does not allow it.

    An unfinished run left `held` bytes of those that are needed, which are in place or will be freed.
    """
    check_place(layout)
    check_existing(layout, force=force)
    parent, needed = layout.target.parent, needed_bytes(layout, held)
    with machine_errors(parent, "cannot be examined"):
        free = free_bytes(parent)
    if free < needed:
        room = f"not enough free space: {size(needed)} needed, {size(free)} free"
        more = f"free {enough(needed - free)} more, or give another place with -o"
        raise MachineError(f"{parent}: {room}; {more}")


def check_place(layout: OutputLayout) -> None:
    """As `check_target`, without looking at what exists there and how much room there is."""
    target, parent = layout.target, layout.target.parent
    if not target.name:
        raise CheckpointError(f"{target}: is no name for an output; give one with -o")
    if any(one.name == "snapshots" and (one.parent / "blobs").is_dir() for one in target.parents):
        raise CheckpointError(
            f"{target}: lies in a download cache, which would take it for a part of what it downloaded; give "
            "another place with -o"
        )
    if not is_folder(parent):
        raise CheckpointError(f"{target}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent}: cannot be written to; give another place with -o")
    # Renaming would find it after all work.
    most = name_bytes(parent)
    for path in final_paths(layout):
        length = len(os.fsencode(path.name))
        if length > most:
            too_long = f"{path}: a name of {length} bytes, at most {most} can be"
            raise CheckpointError(f"{too_long}; give a shorter one with -o")
    check_apart(layout)


def check_existing(layout: OutputLayout, *, force: bool) -> None:
    """CheckpointError if one of the output's names is taken, or taken by what `force` may not replace."""
    for path in () if layout.scratch else final_paths(layout):
        if not os.path.lexists(path):
            continue
        if path.is_symlink() and not path.exists() and (layout.is_directory or not force):
            link = f"{path}: is a link to {path.readlink()}, which is not there"
            raise CheckpointError(f"{link}; remove the link, or {_OTHER}")
        if path.is_dir() != layout.is_directory:
            found, wanted = ("a file", "directory") if layout.is_directory else ("a directory", "file")
            raise CheckpointError(f"{path}: is {found}, the output is a {wanted}; {_OTHER}")
        if not force:
            raise CheckpointError(f"{path}: already exists; {_OTHER}, or --force to replace it")
        if not layout.is_directory or path.is_symlink():
            continue
        if not _is_ours(path):
            raise CheckpointError(
                f"{path}: --force replaces what sparseprune wrote, and this directory has no report of it; "
                f"remove it yourself, or {_OTHER}"
            )
        if not os.access(path, os.W_OK | os.X_OK):
            raise MachineError(f"{path}: cannot be written to, so --force cannot replace it; {_OTHER}")


def refuse_replacing(layout: OutputLayout, read: Iterable[Path], what: str) -> None:
    """CheckpointError where the output would replace a file of `what` that is read beside the checkpoint."""
    for final in map(_real, final_paths(layout)):
        inside = next((path for path in read if final == _real(path) or final in _real(path).parents), None)
        if inside is not None:
            raise CheckpointError(f"{final}: the output would replace the {what} in {inside}; {_OTHER}")


def final_paths(layout: OutputLayout) -> tuple[Path, ...]:
    """Every name that belongs to an output, the target last."""
    if layout.is_directory:
        return (layout.target,)
    names = dict.fromkeys((*layout.stale, *layout.mask_files, *layout.results))
    return (*(layout.root / path for path in names if path.name != layout.target.name), layout.target)


def _is_ours(directory: Path) -> bool:
    """Whether a directory is an earlier output, of weights or of masks, or empty: nobody's work is in it."""
    # A report at the top may be anybody's; beside masks it is ours.
    masks = (directory / f"masks{end}" for end in (SUFFIX, INDEX_SUFFIX))
    return (
        (directory / RESULTS / "report.json").is_file()
        or ((directory / "report.json").is_file() and any(one.is_file() for one in masks))
        or not any(directory.iterdir())
    )


def needed_bytes(layout: OutputLayout, held: int = 0) -> int:
    """Bytes that must be free, beside `held`: the output is complete before what it replaces is removed."""
    return max(0, layout.output_bytes - held) + _MARGIN


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still write on the file system of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def check_apart(layout: OutputLayout) -> None:
    """Refuses an output that is, lies in, or would replace any part of the input."""
    checkpoint = layout.checkpoint
    source = _real(checkpoint.path)
    others = [checkpoint.path / other.path for other in (*checkpoint.others, *checkpoint.left_out)]
    parts = [source, *map(_real, (*[shard.path for shard in checkpoint.shards], *others))]
    for path in final_paths(layout):
        final = _real(path)
        if final == source:
            raise CheckpointError(f"{path}: output and input are the same; {_OTHER}")
        if checkpoint.is_directory and source in final.parents:
            raise CheckpointError(
                f"{path}: the output lies inside the input {checkpoint.path}; give another place with -o"
            )
        held = next((part for part in parts if part == final or final in part.parents), None)
        if held is not None:
            raise CheckpointError(f"{path}: the output would replace the input, which holds {held}; {_OTHER}")


def _real(path: Path) -> Path:
    """Where a path leads; unlike resolve(), a circle of links is no error."""
    return path if isinstance(path, RemotePath) else Path(os.path.realpath(path))


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
        self.output = self.path / OUTPUT
        self.journal = self.path / _JOURNAL
        self.can_be_continued = False
        self.warnings: list[str] = []
        self._owner = -1
        self._lock: int | None = None

    def acquire(self) -> None:
        """Takes the lock and undoes or completes the names that a killed run was giving."""
        self._lock = self._locked()
        try:
            settle(self.path, self.target)
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
        """Removes what a killed run left, except its output and its journal."""
        self._remove_all_but(_LOCK, _JOURNAL, OUTPUT)

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

    def has_journal(self) -> bool:
        """Whether there is a journal that only the owner of the folder can have written."""
        try:
            return self.can_be_continued and self._owns(self.journal.lstat())
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
        self._leave(keep=self._lock is not None and self.has_journal() and bool(self.sizes()))

    def discard(self) -> None:
        """Removes and unlocks the folder; keeps it if it holds the only copy of the target."""
        self._leave(keep=False)

    def _leave(self, *, keep: bool) -> None:
        if self._lock is None:
            return
        try:
            settle(self.path, self.target)
        except OSError as error:
            raise MachineError(
                f"{self.target}: could not be put back ({error.strerror}); what it was is in {self.path}"
            ) from error
        else:
            if not keep:
                with contextlib.suppress(OSError):  # the next run removes what cannot be removed now
                    self._remove()
        finally:
            self._unlock()

    def _remove(self) -> None:
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
            made = False
            with contextlib.suppress(FileExistsError):
                self.path.mkdir(_PRIVATE)
                made = True
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
        """Refuses a folder of others, unless it was just `made`; closes one that others may enter."""
        status = self.path.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise CheckpointError(f"{self.path}: is in the way of the unfinished output; remove it")
        self._owner = status.st_uid
        owned = status.st_uid == os.geteuid()
        if not owned and not made:
            raise CheckpointError(
                f"{self.path}: belongs to another user, number {status.st_uid}, whose run may be at work "
                f"there; {_OTHER}, or remove it"
            )
        if stat.S_IMODE(status.st_mode) & 0o777 != _PRIVATE:
            self._close()
        private = owned and not self.path.lstat().st_mode & _OF_OTHERS
        if not private:
            self._warn("owners and permissions are not kept there, so an interrupted run is not continued")
        entered = not made and bool(status.st_mode & _WRITTEN_BY_OTHERS)
        if entered and is_at_work(self.path):
            raise CheckpointError(
                f"{self.path}: others could write there while an output got its name; take out what is "
                "yours, then remove it"
            )
        if entered and os.path.lexists(self.journal):
            fact = "others could write there, so the run that left it is not continued"
            self.warnings.append(f"{self.path}: {fact}")
        self.can_be_continued = private and not entered

    def _close(self) -> None:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        # Where this fails the caller finds the old mode.
        with file_io.opened(os.open(self.path, flags)) as folder, contextlib.suppress(OSError):
            os.fchmod(folder, _PRIVATE | os.fstat(folder).st_mode & stat.S_ISGID)

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
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                busy = f"{self.target}: another run is writing this output; wait, or {_OTHER}"
                raise CheckpointError(busy) from error
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                unlocked = "there are no locks, so two runs to one output are not told apart"
                self._warn(f"{unlocked}; start one at a time")
            held = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
        finally:
            if not held:
                os.close(descriptor)
        return held

    def _remove_all_but(self, *kept: str) -> None:
        for path in sorted(self.path.iterdir()):
            if path.name not in kept:
                remove(path)


def left_behind(target: Path) -> Path | None:
    """The staging folder of a target, where a run of this user left it and none is at work there."""
    if not target.name or is_on_hub(target):
        return None
    folder = _hidden(target, "partial")
    try:
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return None
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with file_io.opened(os.open(folder / _LOCK, flags)) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
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
