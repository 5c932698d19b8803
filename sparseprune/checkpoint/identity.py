"""Is an input still the one whose headers were read? Told by names, sizes and times, not by its data.

Owns what a run remembers of its input: for its own end, and for the run that continues it. Reads no
file. Called by the pipeline.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from sparseprune.checkpoint.transfer import machine_errors
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sparseprune.checkpoint.source import Checkpoint, Shard


def checkpoint_identity(checkpoint: Checkpoint) -> str:
    """A SHA-256 over path, size, time and header of every shard and path, size and time of other files.

    Shards as they were when their headers were read. MachineError where another file is gone.
    """
    digest = hashlib.sha256()

    def add(path: Path, size: int, mtime_ns: int, raw: bytes = b"") -> None:
        digest.update(json.dumps([str(path.absolute()), size, mtime_ns, len(raw)]).encode() + b"\n" + raw)

    for shard in checkpoint.shards:
        add(shard.path, shard.header.file_size, shard.mtime_ns, shard.header.raw)
    for other in checkpoint.others:
        path = checkpoint.path / other.path
        with machine_errors(path, "cannot be examined"):
            status = path.stat()
        add(path, status.st_size, status.st_mtime_ns)
    return digest.hexdigest()


def changed_since(shards: Iterable[Shard]) -> str | None:
    """What became of the first shard that is not as it was when its header was read; None if all are."""
    for shard in shards:
        try:
            status = shard.path.stat()
        except OSError as error:
            return f"{shard.path}: cannot be read any more: {error.strerror}"
        if status.st_size != shard.header.file_size:
            return (
                f"{shard.path}: changed while it was read, from {shard.header.file_size} bytes to "
                f"{status.st_size}"
            )
        if status.st_mtime_ns != shard.mtime_ns:
            return f"{shard.path}: changed while it was read: it was written to after its header was read"
    return None


def refuse_changed(checkpoint: Checkpoint) -> None:
    """MachineError naming the first shard that changed, or went away, since its header was read."""
    fact = changed_since(checkpoint.shards)
    if fact is not None:
        raise MachineError(f"{fact}; run again when nothing writes there")
