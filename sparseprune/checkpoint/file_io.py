"""File I/O: bytes at places, copies, syncs, a bounded number of open files, and fingerprints of inputs.

Owns system calls on files and their errors, and what identifies a file in memory, in a journal and in a
report. Called by the rest of this room; by api for fingerprints.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from sparseprune.checkpoint.remote import RemotePath
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from _typeshed import ReadableBuffer, WriteableBuffer

    from sparseprune.checkpoint.source import Checkpoint, Shard

    Bytes = ReadableBuffer | np.ndarray[Any, Any]
    WritableBytes = WriteableBuffer | np.ndarray[Any, Any]

# After any other error of the kernel's copy a plain copy does it, or finds what is wrong.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Errors of a file system that cannot sync such a file or folder at all.
_NO_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF})
OWNER = stat.S_IRUSR | stat.S_IWUSR
"""What it takes to write a file, whatever its permissions are in the end."""
_BUFFER = 1 << 20
_IDLE = 16  # files that stay open between uses
_KERNEL_STEP = 1 << 30
_REMOTE_PART, _REMOTE_PARTS = 4 << 20, 4  # bytes of a part that is copied from a store, and parts at a time
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC

Key = TypeVar("Key")


class ChangedInputError(MachineError):
    """An input changed while it was read: what was made of it is useless and not continued."""


@contextmanager
def machine_errors(path: Path | str, doing: str = "cannot be written") -> Iterator[None]:
    """Turns an OSError into a MachineError that names the path and the cause."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: {doing}: {error.strerror or error}") from error


@contextmanager
def named_errors() -> Iterator[None]:
    """MachineErrors say which machine they come from."""
    try:
        yield
    except MachineError as error:
        host = socket.gethostname()
        raise type(error)(*(f"{line} (on machine {host})" for line in error.args)) from error


@contextmanager
def remote_errors(path: Path) -> Iterator[None]:
    """As `machine_errors`, for reading from a store; ChangedInputError where a file is another one now."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ESTALE:
            raise ChangedInputError(
                f"{path}: changed while it was read: another file has taken its place; run again when "
                "nothing writes there"
            ) from error
        raise MachineError(f"{path}: cannot be read: {error.strerror or error}") from error


def create(path: Path | str, size: int, begins_with: Bytes = b"", mode: int = 0o600) -> None:
    """A new file of these bytes, then zeros, and of `mode` less the umask; OSError if it exists."""
    with opened(os.open(path, CREATE, mode)) as descriptor:
        write_at(descriptor, begins_with, 0)
        os.ftruncate(descriptor, size)


def make_writable(path: Path | str) -> None:
    """Allows the owner of a file to read and write it, whatever its final permissions are."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    if mode & OWNER != OWNER:
        os.chmod(path, mode | OWNER)  # noqa: PTH101  (a str is faster)


def restrict(path: Path | str, mode: int) -> None:
    """Takes from the owner of a file what `mode` does not allow; others never had it."""
    if mode & OWNER != OWNER:
        with contextlib.suppress(OSError):  # a file system without permissions
            os.chmod(path, stat.S_IMODE(os.lstat(path).st_mode) & ~(OWNER & ~mode))  # noqa: PTH101


def open_to_write(path: Path | str) -> int:
    """A descriptor of a file that exists and is no link, for writing at places of it."""
    return os.open(path, _WRITE)


def overwrite(path: Path | str, data: Bytes, offset: int) -> None:
    """Writes all of `data` at `offset` of a file that exists and is no link."""
    with opened(open_to_write(path)) as descriptor:
        write_at(descriptor, data, offset)


def as_bytes(data: Bytes) -> memoryview:
    """The memory of a contiguous buffer as bytes; nothing is copied."""
    view = memoryview(cast("ReadableBuffer", data))
    return view.cast("B") if view.nbytes else memoryview(b"")  # no item: a shape that no cast takes


def write_at(descriptor: int, data: Bytes, offset: int) -> None:
    """Writes all of `data`, in as many steps as the system needs."""
    rest = as_bytes(data)
    done = 0
    while done < len(rest):
        done += os.pwrite(descriptor, rest[done:], offset + done)


def write_pieces(path: Path | str, pieces: Iterable[Bytes]) -> None:
    """Writes pieces one after the other, from the beginning of a file that exists; small ones together."""
    with opened(open_to_write(path)) as descriptor:
        waiting, offset = bytearray(), 0
        for piece in pieces:
            part = as_bytes(piece)
            if len(waiting) + len(part) <= _BUFFER:
                waiting += part
                continue
            for one in (waiting, part):
                write_at(descriptor, one, offset)
                offset += len(one)
            waiting = bytearray()
        write_at(descriptor, waiting, offset)


def read_into(descriptor: int, buffer: WritableBytes, offset: int) -> int:
    """Fills `buffer` from `offset` on, in as many steps as the system needs; how much of it the file had."""
    rest = as_bytes(buffer)
    done = 0
    while done < len(rest):
        count = os.preadv(descriptor, [rest[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def copy_range(source: Path, source_offset: int, file: Path | str, offset: int, length: int) -> None:
    """Copies bytes between two files that exist; ChangedInputError where the source ends too early.

    Errors of the source are MachineErrors, those of the written file OSErrors.
    """
    if isinstance(source, RemotePath):
        with remote_errors(source):
            copy = source.local()
        if copy is None:
            _copy_remote(source, source_offset, file, offset, length)
            return
        source = copy
    with machine_errors(source, "cannot be read"):
        descriptor = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    with opened(descriptor) as reading, opened(open_to_write(file)) as writing:
        done, in_kernel = 0, hasattr(os, "copy_file_range")
        while done < length:
            begin, end, rest = source_offset + done, offset + done, length - done
            if in_kernel:
                count = _kernel_copy(reading, begin, writing, end, min(rest, _KERNEL_STEP))
                in_kernel = count > 0
            else:
                with machine_errors(source, "cannot be read"):
                    data = os.pread(reading, min(rest, _BUFFER), begin)
                if not data:
                    raise ChangedInputError(
                        f"{source}: file was truncated while it was read: it ends at byte {begin}, wanted "
                        f"{source_offset + length}"
                    )
                write_at(writing, data, end)
                count = len(data)
            done += count


def _copy_remote(source: RemotePath, source_offset: int, file: Path | str, offset: int, length: int) -> None:
    """As `copy_range`, from a store: some parts side by side."""
    parts = [(done, min(_REMOTE_PART, length - done)) for done in range(0, length, _REMOTE_PART)]

    def copied(part: tuple[int, int]) -> None:
        done, count = part
        data = memoryview(bytearray(count))
        read_input(source, data, source_offset + done)
        write_at(writing, data, offset + done)

    with opened(open_to_write(file)) as writing:
        if len(parts) == 1:
            copied(parts[0])
        else:
            with ThreadPoolExecutor(_REMOTE_PARTS) as pool:
                list(pool.map(copied, parts))


@contextmanager
def opened(descriptor: int) -> Iterator[int]:
    """A descriptor, which is closed in the end."""
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync(
    path: Path | str, *, data_only: bool = False, drop_cache: bool = False, follow_links: bool = False
) -> bool:
    """Waits until a file or folder is on disk, or only the data of a file; may drop its cached pages.

    False where its file system cannot tell. `follow_links` is for the folder of an output: it may be a link,
    and one that the user may write to and not read, which gives False, too.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        if follow_links:  # a folder that one may write to and not list
            return False
        raise
    with opened(descriptor):
        synced = sync_open(descriptor, data_only=data_only)
        if drop_cache and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return synced


def sync_open(descriptor: int, *, data_only: bool) -> bool:
    """As `sync`, for an open file."""
    try:
        (getattr(os, "fdatasync", os.fsync) if data_only else os.fsync)(descriptor)
    except OSError as error:
        if error.errno in _NO_SYNC:
            return False
        raise
    return True


def _kernel_copy(reading: int, source_offset: int, writing: int, offset: int, length: int) -> int:
    """How many bytes the kernel copied: 0 where it cannot, and on some file systems where there is data."""
    try:
        return os.copy_file_range(reading, writing, length, source_offset, offset)
    except OSError as error:
        if error.errno in _FULL:
            raise
        return 0


class OpenFiles(Generic[Key]):
    """Keeps at most 16 files open, and one more for every use under way; after `close` only the latter."""

    def __init__(self, opened: Callable[[Key], int]) -> None:
        self._opened = opened
        self._lock = threading.Lock()
        self._idle: list[tuple[Key, int]] = []
        self._closed = False

    @contextmanager
    def use(self, key: Key) -> Iterator[int]:
        """The descriptor of a file, which nobody else uses meanwhile."""
        descriptor = self._taken(key)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._idle.append((key, descriptor))
                surplus = self._idle.pop(0)[1] if self._closed or len(self._idle) > _IDLE else None
            if surplus is not None:
                os.close(surplus)

    def close(self) -> None:
        """Closes idle files; a file in use is closed after its use."""
        with self._lock:
            self._closed = True
            while self._idle:
                os.close(self._idle.pop()[1])

    def _taken(self, key: Key) -> int:
        with self._lock:
            for place in range(len(self._idle) - 1, -1, -1):
                other = self._idle[place][0]
                if other is key or other == key:  # comparing paths is slow
                    return self._idle.pop(place)[1]
        return self._opened(key)


class Stamp(NamedTuple):
    """The times of a file's last write and of the last change of anything about it, and its inode."""

    mtime_ns: int
    ctime_ns: int
    inode: int


NO_STAMP = Stamp(0, 0, 0)
"""Of a file that could not be examined, or need not be."""


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def read_input(source: Path, buffer: memoryview, offset: int) -> None:
    """Fills a buffer from a file, wherever that is; ChangedInputError where it ends too early or changed."""
    done, copy = -1, source
    if isinstance(source, RemotePath):
        with remote_errors(source):
            found = source.local()
            if found is None:
                data = as_bytes(source.read_part(offset, offset + len(buffer), source.facts().etag))
                done = len(data)
                buffer[:done] = data
        copy = found or source
    if done < 0:
        with machine_errors(source, "cannot be read"), opened(os.open(copy, _READ)) as descriptor:
            done = read_into(descriptor, buffer, offset)
    if done < len(buffer):
        raise ChangedInputError(
            f"{source}: file was truncated while it was read: it ends at byte {offset + done}, wanted "
            f"{offset + len(buffer)}"
        )


def status_now(path: Path) -> os.stat_result:
    """The status of a file, for which a store is asked anew."""
    return path.stat(fresh=True) if isinstance(path, RemotePath) else path.stat()


def permissions(status: os.stat_result) -> int:
    """What the owner of a file or a folder, its group and all others may do with it."""
    return stat.S_IMODE(status.st_mode) & 0o777


def replaced(before: Stamp, after: Stamp) -> bool:
    """Whether it is another file. One number alone may change: by a new link, on a network's file system.

    >>> replaced(Stamp(1, 2, 3), Stamp(1, 5, 3)), replaced(Stamp(1, 2, 3), Stamp(1, 5, 4))
    (False, True)
    """
    if NO_STAMP in (before, after):
        return False
    return before.inode != after.inode and before.ctime_ns != after.ctime_ns


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """A SHA-256 of all shards, as `shards_identity`, and of other files; MachineError where one is gone."""
    digest = hashlib.sha256(shards_identity(checkpoint.shards).encode())
    for other in checkpoint.others:
        path = checkpoint.path / other.path
        with machine_errors(path, "cannot be examined"):
            status = status_now(path)
        digest.update(_line(path, status.st_size, stamp_of(status)))
    return digest.hexdigest()


def shards_identity(shards: Iterable[Shard]) -> str:
    """A SHA-256 over path, size, stamp and header of every shard, as they were when their headers were read.

    The header counts because a copy over a file can keep its size and its time.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(_line(shard.path, shard.size, shard.stamp, shard.digest.hex()))
    return digest.hexdigest()


def refuse_changed(checkpoint: Checkpoint, further: Iterable[Shard] = ()) -> None:
    """ChangedInputError naming the first file that changed since it was opened, MachineError if it is gone.

    Looks at all files of the checkpoint and at `further` shards.
    """
    refuse_changed_shards((*checkpoint.shards, *further))
    for other in checkpoint.others:
        _refuse(checkpoint.path / other.path, other.nbytes, other.stamp)


def refuse_changed_shards(shards: Iterable[Shard]) -> None:
    """As `refuse_changed`, for these shards, each once."""
    for shard in {id(one): one for one in shards}.values():
        _refuse(shard.path, shard.size, shard.stamp)


def _refuse(path: Path, size: int, stamp: Stamp) -> None:
    with machine_errors(path, "cannot be read any more"):
        status = status_now(path)
    if status.st_size != size:
        change = f", from {size} bytes to {status.st_size}"
    elif replaced(stamp, stamp_of(status)):
        change = ": another file has taken its place"
    elif status.st_mtime_ns != stamp.mtime_ns:
        change = ": it was written to after the run began"
    else:
        return
    raise ChangedInputError(f"{path}: changed while it was read{change}; run again when nothing writes there")


def _line(path: Path, *facts: object) -> bytes:
    return json.dumps([str(path.absolute()), *facts]).encode() + b"\n"
