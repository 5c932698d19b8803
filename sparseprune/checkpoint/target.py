"""May an output be written where it was asked for? Every refusal that needs no byte written.

Owns the rules that keep the input and what already lies at the target safe. Changes nothing on disk.
Called by staging.py before it begins, and once more when it has the staging folder for itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sparseprune.checkpoint.folder import INDEX_SUFFIX, RESULTS, SUFFIX, is_folder
from sparseprune.checkpoint.partial import name_bytes
from sparseprune.checkpoint.transfer import machine_errors
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sparseprune.checkpoint.layout import OutputLayout

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
