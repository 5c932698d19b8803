"""Giving an output its name: which targets may be replaced, and the exchange of the new for the old.

Owns renames and what `--force` may replace. Called when an output is complete, and before work begins.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX, is_folder
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.staging_dir import name_bytes
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from sparseprune.checkpoint.layout import OutputLayout


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
    file_io.sync(folder)
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
    file_io.create(path, len(text), text)
    file_io.sync(path)


def _read(path: Path) -> Any:  # noqa: ANN401
    """What `_write` wrote; an empty object where it was still at it and nothing had been moved."""
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return {}


# For the report, the spec and the folders, whose sizes are not known beforehand.
_MARGIN = 1 << 20


def check_target(layout: OutputLayout, *, force: bool, held: int = 0) -> None:
    """CheckpointError where the output may not be written, MachineError where the system will not have it.

    `held` bytes of what is needed are there already, or will be free: what an unfinished run has left.
    """
    check_place(layout)
    check_existing(layout, force=force)
    _check_room(layout, held)


def check_place(layout: OutputLayout) -> None:
    """As `check_target`, whatever exists there and however little room there is."""
    _check_parent(layout.target)
    _check_names(layout)
    _check_apart(layout)


def check_existing(layout: OutputLayout, *, force: bool) -> None:
    """CheckpointError if one of the output's names is taken, or taken by what `force` may not replace."""
    for path in () if layout.is_scratch else final_paths(layout):
        if not os.path.lexists(path):
            continue
        if path.is_symlink() and not path.exists() and (layout.is_directory or not force):
            raise CheckpointError(
                f"{path}: is a link to {path.readlink()}, which is not there; remove the link, or give "
                "another name with -o"
            )
        if path.is_dir() != layout.is_directory:
            found, wanted = ("a file", "directory") if layout.is_directory else ("a directory", "file")
            raise CheckpointError(f"{path}: is {found}, the output is a {wanted}; give another name with -o")
        if not force:
            raise CheckpointError(
                f"{path}: already exists; give another name with -o, or --force to replace it"
            )
        if layout.is_directory and not path.is_symlink() and not _is_ours(path):
            raise CheckpointError(
                f"{path}: --force replaces what sparseprune wrote, and this directory has no report of it; "
                "remove it yourself, or give another name with -o"
            )
        if layout.is_directory and not path.is_symlink() and not os.access(path, os.W_OK | os.X_OK):
            raise MachineError(
                f"{path}: cannot be written to, so --force cannot replace it; give another name with -o"
            )


def refuse_replacing(layout: OutputLayout, read: Iterable[Path], what: str) -> None:
    """CheckpointError where the output would take the place of a file that is read beside the checkpoint.

    `what` says what these files hold.
    """
    for final in map(_real, final_paths(layout)):
        inside = next((path for path in read if final == _real(path) or final in _real(path).parents), None)
        if inside is not None:
            raise CheckpointError(
                f"{final}: the output would replace the {what} in {inside}; give another name with -o"
            )


def final_paths(layout: OutputLayout) -> tuple[Path, ...]:
    """Every name that belongs to an output, in the order in which the names are given: the target last."""
    if layout.is_directory:
        return (layout.target,)
    names = dict.fromkeys((*layout.stale, *layout.mask_files, layout.report_file))
    return (*(layout.root / path for path in names if path.name != layout.target.name), layout.target)


def _is_ours(directory: Path) -> bool:
    """Whether a directory is an earlier output, of weights or of masks, or empty: nobody's work is in it."""
    if (directory / RESULTS / "report.json").is_file():
        return True
    # A report at the top may be anybody's; beside masks it is ours.
    masks = (directory / f"masks{end}" for end in (SUFFIX, INDEX_SUFFIX))
    if (directory / "report.json").is_file() and any(one.is_file() for one in masks):
        return True
    return not any(directory.iterdir())


def needed_bytes(layout: OutputLayout, held: int = 0) -> int:
    """What must be free: the output is complete before anything that it replaces goes away.

    `held` as in `check_target`.
    """
    return max(0, layout.output_bytes - held) + _MARGIN


def free_bytes(folder: Path) -> int:
    """What a user may still write on the file system of a folder."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _check_parent(target: Path) -> None:
    parent = target.parent
    if not target.name:
        raise CheckpointError(f"{target}: is no name for an output; give one with -o")
    if _is_in_cache(parent):
        raise CheckpointError(
            f"{target}: lies in a download cache, which would take it for a part of what it downloaded; give "
            "another place with -o"
        )
    if not is_folder(parent):
        raise CheckpointError(f"{target}: the folder {parent} does not exist; make it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise MachineError(f"{parent}: cannot be written to; give another place with -o")


def _check_names(layout: OutputLayout) -> None:
    """No name is longer than the file system takes: that would be found when all of the work is done."""
    most = name_bytes(layout.target.parent)
    for path in final_paths(layout):
        length = len(os.fsencode(path.name))
        if length > most:
            raise CheckpointError(
                f"{path}: a name of {length} bytes, at most {most} can be; give a shorter one with -o"
            )


def _is_in_cache(folder: Path) -> bool:
    """Whether a folder is one of the snapshots of a download cache, the folder of all of them, or below."""
    return any(
        home.name == "snapshots" and (home.parent / "blobs").is_dir() for home in (folder, *folder.parents)
    )


def _check_apart(layout: OutputLayout) -> None:
    """The output neither is, nor lies in, nor would replace any part of the input."""
    checkpoint = layout.checkpoint
    source = _real(checkpoint.path)
    parts = [source, *(_real(shard.path) for shard in checkpoint.shards)]
    others = (*checkpoint.others, *checkpoint.left_out)
    parts += [_real(checkpoint.path / other.path) for other in others]
    for path in final_paths(layout):
        final = _real(path)
        if final == source:
            raise CheckpointError(f"{path}: output and input are the same; give another name with -o")
        if checkpoint.is_directory and source in final.parents:
            raise CheckpointError(
                f"{path}: the output lies inside the input {checkpoint.path}; give another place with -o"
            )
        inside = next((part for part in parts if part == final or final in part.parents), None)
        if inside is not None:
            raise CheckpointError(
                f"{path}: the output would replace the input, which holds {inside}; give another name with -o"
            )


def _check_room(layout: OutputLayout, held: int) -> None:
    parent = layout.target.parent
    with machine_errors(parent, "cannot be examined"):
        free = free_bytes(parent)
    needed = needed_bytes(layout, held)
    if free < needed:
        raise MachineError(
            f"{parent}: not enough free space: {needed} bytes needed, {free} free; free some or give another "
            "place with -o"
        )


def _real(path: Path) -> Path:
    """Where a path leads; unlike resolve(), a circle of links is no error."""
    return Path(os.path.realpath(path))
