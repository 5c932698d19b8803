"""Giving an output its name: which targets may be replaced, and the exchange of the new for the old.

Owns renames and what `--force` may replace. Called by output.py before work begins and when it is complete,
by staging_dir.py to undo names that a killed run was giving.
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
        raise MachineError(
            f"{parent}: not enough free space: {needed} bytes needed, {free} free; free some or give another "
            "place with -o"
        )


def check_place(layout: OutputLayout) -> None:
    """As `check_target`, without looking at what exists there and how much room there is."""
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
    """CheckpointError where the output would replace a file of `what` that is read beside the checkpoint."""
    for final in map(_real, final_paths(layout)):
        inside = next((path for path in read if final == _real(path) or final in _real(path).parents), None)
        if inside is not None:
            raise CheckpointError(
                f"{final}: the output would replace the {what} in {inside}; give another name with -o"
            )


def final_paths(layout: OutputLayout) -> tuple[Path, ...]:
    """Every name that belongs to an output, the target last."""
    if layout.is_directory:
        return (layout.target,)
    names = dict.fromkeys((*layout.stale, *layout.mask_files, layout.report_file))
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
    """Bytes that must be free: the output is complete before what it replaces is removed.

    `held` as in `check_target`.
    """
    return max(0, layout.output_bytes - held) + _MARGIN


def free_bytes(folder: Path) -> int:
    """Bytes that a user may still write on the file system of a folder."""
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
    """Refuses names that are too long for the file system, which renaming would find after all work."""
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
    """Refuses an output that is, lies in, or would replace any part of the input."""
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


def _real(path: Path) -> Path:
    """Where a path leads; unlike resolve(), a circle of links is no error."""
    return Path(os.path.realpath(path))
