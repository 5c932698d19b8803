"""Fingerprints of inputs: whether files are still the ones that a run began with.

Owns what identifies a file in memory, in a journal and in a report. Called by source.py and discovery.py for
stamps, by the command line for the rest.
"""

from __future__ import annotations

import hashlib
import json
import stat
from typing import TYPE_CHECKING, NamedTuple

from sparseprune.checkpoint.file_io import ChangedInputError, machine_errors
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from sparseprune.checkpoint.source import Checkpoint, Shard

_ADVICE = "run again when nothing writes there"


class Stamp(NamedTuple):
    """The times of a file's last write and of the last change of anything about it, and its inode."""

    mtime_ns: int
    ctime_ns: int
    inode: int


NO_STAMP = Stamp(0, 0, 0)
"""Of a file that could not be examined, or need not be."""


def stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


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
    """A SHA-256 of all shards, as `shards_identity`, and of path, size and stamp of other files.

    MachineError where another file is gone.
    """
    digest = hashlib.sha256(shards_identity(checkpoint.shards).encode())
    for other in checkpoint.others:
        path = checkpoint.path / other.path
        with machine_errors(path, "cannot be examined"):
            status = path.stat()
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


def changed_since(shards: Iterable[Shard]) -> str | None:
    """How the first changed shard differs from when its header was read; None where none changed."""
    try:
        refuse_changed_shards(shards)
    except MachineError as error:
        return str(error)
    return None


def refuse_changed(checkpoint: Checkpoint, further: Iterable[Shard] = ()) -> None:
    """ChangedInputError naming the first file that changed since its checkpoint was opened.

    Looks at all files of the checkpoint and at `further` shards. MachineError for a file that is gone.
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
        status = path.stat()
    if status.st_size != size:
        change = f", from {size} bytes to {status.st_size}"
    elif replaced(stamp, stamp_of(status)):
        change = ": another file has taken its place"
    elif status.st_mtime_ns != stamp.mtime_ns:
        change = ": it was written to after the run began"
    else:
        return
    raise ChangedInputError(f"{path}: changed while it was read{change}; {_ADVICE}")


def _line(path: Path, *facts: object) -> bytes:
    return json.dumps([str(path.absolute()), *facts]).encode() + b"\n"
