"""Giving a complete output its names, so that a death at any moment leaves the old output or the new one.

A directory is exchanged for the one that has its name, where the system can, else it takes two renames. Of
files the last one, the target, is replaced at one moment: what belongs to the old one goes away before, what
belongs to the new one comes after. What was cut short is undone or completed by `settle`, in this run or the
next. Owns these entries of the staging folder. Called by staging.py and partial.py.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

OUTPUT = "output"
_REPLACED = "replaced"
_EXCHANGED = "exchanged"
_NAMES = "names"
_FORMER = "former"
_HERE = -100  # AT_FDCWD of <fcntl.h>
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>


def name_directory(folder: Path, target: Path, given: Callable[[], None]) -> None:
    """Gives the directory `output` the target's name; what had it waits in `replaced`.

    `given` is called as soon as nothing can be undone any more: the target is the new one.
    """
    output, replaced = folder / OUTPUT, folder / _REPLACED
    if not os.path.lexists(target):
        output.rename(target)
        given()
        return
    # Whoever finds two directories after a death has to know which one is new.
    _write(folder / _EXCHANGED, [output.lstat().st_ino])
    transfer.sync(folder)
    if swap(output, target):
        given()
        with contextlib.suppress(OSError):  # it is only to be removed
            output.rename(replaced)
    else:
        target.rename(replaced)
        output.rename(target)
        given()


def name_files(folder: Path, finals: Sequence[Path], given: Callable[[], None]) -> None:
    """Gives the files of `output` their names; names without a file become free.

    The last one is the target, the weights. Where it is new, it comes last: whoever sees it sees what belongs
    to it. Where it replaces an old one, that is alone when it is replaced, and so is the new one just after.
    `given` as in `name_directory`.
    """
    *others, target = finals
    staged = [final for final in finals if os.path.lexists(folder / OUTPUT / final.name)]
    _write(folder / _NAMES, {final.name: _mark(folder / OUTPUT / final.name) for final in staged})
    (folder / _FORMER).mkdir(mode=0o700, exist_ok=True)
    transfer.sync(folder)
    for final in reversed(others):
        if os.path.lexists(final):
            final.rename(folder / _FORMER / final.name)
    replaces = os.path.lexists(target)
    for final in sorted(staged, key=lambda final: (final == target) != replaces):
        (folder / OUTPUT / final.name).rename(final)
        if final == target:
            given()


def settle(folder: Path, target: Path) -> None:
    """Undoes what was begun, or completes it where the target is given already.

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
        # The mark tells our file from one that somebody else put there since.
        if not os.path.lexists(staged) and os.path.lexists(final) and _mark(final) == mark:
            final.rename(staged)
    if (folder / _FORMER).is_dir():
        for old in sorted((folder / _FORMER).iterdir()):
            if not os.path.lexists(target.with_name(old.name)):
                old.rename(target.with_name(old.name))


def _complete_files(folder: Path, target: Path, marks: dict[str, list[int]]) -> None:
    """The rest of the names, unless the target is gone or another one since."""
    if not os.path.lexists(target) or _mark(target) != marks.get(target.name):
        return
    for name in marks:
        final, staged = target.with_name(name), folder / OUTPUT / name
        if os.path.lexists(staged) and not os.path.lexists(final):
            staged.rename(final)


def _mark(path: Path) -> list[int]:
    """What a file keeps when it gets another name."""
    status = path.lstat()
    return [status.st_size, status.st_mtime_ns]


def _write(path: Path, value: object) -> None:
    path.unlink(missing_ok=True)  # of an earlier attempt
    text = json.dumps(value).encode() + b"\n"
    transfer.create(path, len(text), text)
    transfer.sync(path)


def _read(path: Path) -> Any:  # noqa: ANN401
    """What `_write` wrote; an empty object where it was still at it and nothing had been moved."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {}
