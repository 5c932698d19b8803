"""Giving a complete output its names, so that a death at any moment leaves the old output or the new one.

A directory takes two renames. Files take one each: they are listed in `names` first, and what bore their
names waits in `aside`. Until the last one, the target, has its name, all of it can be taken back, by this
run or the next. Owns these entries of the staging folder. Called by staging.py and partial.py.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from sparseprune.checkpoint import transfer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OUTPUT = "output"
_REPLACED = "replaced"
_NAMES = "names"
_ASIDE = "aside"


def exchange(folder: Path, target: Path) -> None:
    """Gives the directory `output` the target's name; what had it waits in `replaced`."""
    if os.path.lexists(target):
        target.rename(folder / _REPLACED)
    (folder / OUTPUT).rename(target)


def name_files(folder: Path, finals: Sequence[Path]) -> None:
    """Gives the files of `output` their names, the last one last; names without a file become free.

    Whoever sees the last one, the weights, sees what belongs to it: old names go in the reverse order.
    """
    staged = [final for final in finals if os.path.lexists(folder / OUTPUT / final.name)]
    marks = {final.name: _mark(folder / OUTPUT / final.name) for final in staged}
    text = json.dumps(marks).encode() + b"\n"
    transfer.create(folder / _NAMES, len(text), text)
    transfer.sync(folder / _NAMES)
    (folder / _ASIDE).mkdir(exist_ok=True)
    transfer.sync(folder)
    for final in reversed(finals):
        if os.path.lexists(final):
            final.rename(folder / _ASIDE / final.name)
    for final in staged:
        (folder / OUTPUT / final.name).rename(final)


def take_back(folder: Path, target: Path) -> None:
    """Undoes what was begun and not completed; nothing where all names were given or none was.

    May itself be cut short and called again.
    """
    if (folder / _NAMES).is_file():
        if os.path.lexists(folder / OUTPUT / target.name):
            _take_back_files(folder, target)
    elif os.path.lexists(folder / _REPLACED) and not os.path.lexists(target):
        (folder / _REPLACED).rename(target)


def _take_back_files(folder: Path, target: Path) -> None:
    for name, mark in _marks(folder / _NAMES).items():
        final, staged = target.with_name(name), folder / OUTPUT / name
        # The mark tells our file from one that somebody else put there since.
        if not os.path.lexists(staged) and os.path.lexists(final) and _mark(final) == mark:
            final.rename(staged)
    if (folder / _ASIDE).is_dir():
        for old in sorted((folder / _ASIDE).iterdir(), key=lambda path: path.name == target.name):
            if not os.path.lexists(target.with_name(old.name)):
                old.rename(target.with_name(old.name))


def _mark(path: Path) -> list[int]:
    """What a file keeps when it gets another name."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def _marks(names: Path) -> dict[str, list[int]]:
    """Marks by file name, as `name_files` wrote them; none where it was still at it and had moved nothing."""
    try:
        marks: dict[str, list[int]] = json.loads(names.read_bytes())
    except ValueError:
        return {}
    return marks
