"""Fingerprints of inputs: whether files are still the ones that a run began with.

Owns what identifies an input in a journal and in a report. Called by the command line.
"""

from __future__ import annotations

import hashlib
import json
from itertools import chain
from typing import TYPE_CHECKING

from sparseprune.checkpoint.file_io import ChangedInputError, machine_errors, replaced, stamp_of
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sparseprune.checkpoint.file_io import Stamp
    from sparseprune.checkpoint.source import Checkpoint, Shard


_ADVICE = "run again when nothing writes there"


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

    Size and time alone may be the same for other bytes: who copies a file over another can keep both.
    """
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(_line(shard.path, shard.size, shard.stamp, shard.digest.hex()))
    return digest.hexdigest()


def _line(path: Path, *facts: object) -> bytes:
    return json.dumps([str(path.absolute()), *facts]).encode() + b"\n"


def changed_since(shards: Iterable[Shard]) -> str | None:
    """What became of the first shard that is not as it was when its header was read; None if all are."""
    try:
        refuse_changed_shards(shards)
    except MachineError as error:
        return str(error)
    return None


def refuse_changed_shards(shards: Iterable[Shard]) -> None:
    """As `refuse_changed`, for these shards alone."""
    _refuse((shard.path, shard.size, shard.stamp) for shard in {id(one): one for one in shards}.values())


def refuse_changed(checkpoint: Checkpoint, further: Iterable[Shard] = ()) -> None:
    """ChangedInputError naming the first file that changed since its checkpoint was opened.

    Files of the checkpoint, and `further` shards that were read beside it. MachineError where one cannot
    be found any more.
    """
    shards = ((shard.path, shard.size, shard.stamp) for shard in (*checkpoint.shards, *further))
    others = ((checkpoint.path / other.path, other.nbytes, other.stamp) for other in checkpoint.others)
    _refuse(chain(shards, others))


def _refuse(files: Iterable[tuple[Path, int, Stamp]]) -> None:
    """As `refuse_changed`, for files with the sizes and stamps that they had."""
    for path, size, stamp in files:
        with machine_errors(path, "cannot be read any more"):
            status = path.stat()
        if status.st_size != size:
            raise ChangedInputError(
                f"{path}: changed while it was read, from {size} bytes to {status.st_size}; {_ADVICE}"
            )
        if replaced(stamp, stamp_of(status)):
            raise ChangedInputError(
                f"{path}: changed while it was read: another file has taken its place; {_ADVICE}"
            )
        if status.st_mtime_ns != stamp.mtime_ns:
            raise ChangedInputError(
                f"{path}: changed while it was read: it was written to after the run began; {_ADVICE}"
            )
