"""File I/O: bytes at places, whole JSON files, a bounded number of open files, file identities.

Owns system calls on open files and their errors. Knows no safetensors. Called by the rest of this room.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import reprlib
import stat
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar, cast

from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    import numpy as np
    from _typeshed import ReadableBuffer, WriteableBuffer

    Bytes = ReadableBuffer | np.ndarray[Any, Any]
    WritableBytes = WriteableBuffer | np.ndarray[Any, Any]

# Plain writes would meet these too. After any other answer a plain copy does it, or finds what is wrong.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# What a file system answers that cannot sync such a file or folder at all.
_NO_SYNC = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EBADF})
OWNER = stat.S_IRUSR | stat.S_IWUSR
"""What it takes to write a file, whatever its permissions are in the end."""
_BUFFER = 1 << 20
_KERNEL_STEP = 1 << 30
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC


class ChangedInputError(MachineError):
    """An input is no longer what it was: what was made of it is worth nothing, and not continued."""


@contextlib.contextmanager
def machine_errors(path: Path, doing: str = "cannot be written") -> Iterator[None]:
    """Turns an OSError into a MachineError that names the path and the cause."""
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: {doing}: {error.strerror or error}") from error


def create(path: Path | str, size: int, begins_with: Bytes = b"", mode: int = 0o600) -> None:
    """A new file of this size that begins with these bytes and is zero after them; OSError if it exists.

    Its permissions are `mode`, without what the umask forbids.
    """
    descriptor = os.open(path, _CREATE, mode)
    try:
        write_at(descriptor, begins_with, 0)
        os.ftruncate(descriptor, size)
    finally:
        os.close(descriptor)


def make_writable(path: Path | str) -> None:
    """Lets the owner of a file read and write it, whatever its final permissions are."""
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
    descriptor = open_to_write(path)
    try:
        write_at(descriptor, data, offset)
    finally:
        os.close(descriptor)


def as_bytes(data: Bytes) -> memoryview:
    """The memory of a contiguous buffer, seen as bytes; nothing is copied."""
    view = memoryview(cast("ReadableBuffer", data))
    return view.cast("B") if view.nbytes else memoryview(b"")  # no item: a shape that no cast takes


def write_at(descriptor: int, data: Bytes, offset: int) -> None:
    """Writes all of `data`, in as many steps as the system takes."""
    rest = as_bytes(data)
    done = 0
    while done < len(rest):
        done += os.pwrite(descriptor, rest[done:], offset + done)


def write_pieces(path: Path | str, pieces: Iterable[Bytes]) -> None:
    """Writes pieces one after the other, from the beginning of a file that exists; small ones together."""
    descriptor = open_to_write(path)
    try:
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
    finally:
        os.close(descriptor)


def read_into(descriptor: int, buffer: WritableBytes, offset: int) -> int:
    """Fills `buffer` from `offset` on, in as many steps as the system takes; how much of it the file had."""
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

    Errors of either file are MachineErrors for the source and OSErrors for the written file.
    """
    with machine_errors(source, "cannot be read"):
        reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        writing = open_to_write(file)
        try:
            done = _kernel_copy(reading, source_offset, writing, offset, length)
            _plain_copy(source, reading, source_offset + done, writing, offset + done, length - done)
        finally:
            os.close(writing)
    finally:
        os.close(reading)


def sync(
    path: Path | str, *, data_only: bool = False, let_go: bool = False, follow_links: bool = False
) -> bool:
    """Waits until a file or folder is on disk, or only the data of a file; may let go of its cached pages.

    False where its file system cannot tell. `follow_links` is for the folder in which an output lies: it may
    be a link, and one in which the user may write and not read; then the answer is False, too.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:
        if follow_links:  # a folder that one may write to and not list
            return False
        raise
    try:
        synced = sync_data(descriptor) if data_only else _synced(os.fsync, descriptor)
        if let_go and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):  # advice
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return synced


def sync_data(descriptor: int) -> bool:
    """Waits until the data of an open file is on disk, and of the rest what reading it takes.

    False where its file system cannot tell.
    """
    return _synced(os.fdatasync if hasattr(os, "fdatasync") else os.fsync, descriptor)


def _synced(call: Callable[[int], None], descriptor: int) -> bool:
    try:
        call(descriptor)
    except OSError as error:
        if error.errno in _NO_SYNC:
            return False
        raise
    return True


def _kernel_copy(reading: int, source_offset: int, writing: int, offset: int, length: int) -> int:
    """Copies without passing through this process; how many bytes it got done before the kernel gave up.

    A count of 0 is left to the plain copy to judge: some file systems give it where there is data.
    """
    done = 0
    while done < length and hasattr(os, "copy_file_range"):
        step = min(length - done, _KERNEL_STEP)
        try:
            count = os.copy_file_range(reading, writing, step, source_offset + done, offset + done)
        except OSError as error:
            if error.errno in _FULL:
                raise
            return done
        if count == 0:
            return done
        done += count
    return done


def _plain_copy(
    source: Path, reading: int, source_offset: int, writing: int, offset: int, length: int
) -> None:
    done = 0
    while done < length:
        with machine_errors(source, "cannot be read"):
            data = os.pread(reading, min(length - done, _BUFFER), source_offset + done)
        if not data:
            raise ChangedInputError(
                f"{source}: file was truncated while it was read: it ends at byte {source_offset + done}, "
                f"wanted {source_offset + length}"
            )
        write_at(writing, data, offset + done)
        done += len(data)


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


class Stamp(NamedTuple):
    """When it was last written to, when anything about it last changed, and which file it is."""

    mtime_ns: int
    ctime_ns: int
    inode: int


NO_STAMP = Stamp(0, 0, 0)
"""Of a file that could not be looked at, or need not be."""


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file that was looked at."""
    return Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


def permissions(status: os.stat_result) -> int:
    """What its owner, its group and all others may do with a file or a folder."""
    return stat.S_IMODE(status.st_mode) & 0o777


def replaced(before: Stamp, after: Stamp) -> bool:
    """Whether it is another file. One number alone may change: by a new link, on a network's file system.

    >>> replaced(Stamp(1, 2, 3), Stamp(1, 5, 3)), replaced(Stamp(1, 2, 3), Stamp(1, 5, 4))
    (False, True)
    """
    if NO_STAMP in (before, after):
        return False
    return before.inode != after.inode and before.ctime_ns != after.ctime_ns


# serde_json, the parser of the safetensors package, gives up at 128 levels.
MAX_DEPTH = 127
# Longer than any 64-bit integer; int() of a very long text is slow, then refused by Python.
_LONG = 21
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200
_SHOWN.maxlist = _SHOWN.maxdict = 8
_SHOWN.maxlevel = 2


def shown(value: object) -> str:
    r"""What was found, as one line of bounded length for an error text: a stranger's file can hold anything.

    >>> shown("a\nb"), len(shown("a" * 1000))
    ("'a\\nb'", 200)
    """
    return _SHOWN.repr(value)


def strict_json(text: str) -> Any:  # noqa: ANN401  (JSON can be anything; callers check)
    """The value of a JSON text; ValueError with the fact where it is not acceptable.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands twice in one object
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if "\\ud" in text or "\\uD" in text:
            _refuse_lone_surrogates(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    return value


def nested_deeper_than(value: object, levels: int) -> bool:
    """Whether lists and objects stand in each other more than `levels` deep.

    >>> nested_deeper_than([[1]], 2), nested_deeper_than([[1]], 1)
    (False, True)
    """
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return any(isinstance(inner, dict | list) for inner in layer)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands twice in one object")
            seen.add(key)
    return members


def _integer(text: str) -> int | float:
    if text == "-0" or len(text) > _LONG:
        return _number(text)
    value = int(text)
    return value if _SMALLEST <= value <= _LARGEST else float(value)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("not JSON: a number is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"not JSON: {text} is no JSON value")


def _refuse_lone_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("not JSON: a lone surrogate stands in a string") from error
