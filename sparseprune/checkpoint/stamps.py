"""What tells a file from another one that took its place under its name, or was written to since.

Owns which of a file's numbers count, and which permissions an output takes over. Reads nothing. Called
where inputs are found, opened and checked.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import os


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
