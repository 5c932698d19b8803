"""The output of a removal: the same shards with fewer, smaller and renamed tensors; its scratch folder.

Owns the new headers, the index, the names of shards, and where masks, rebuilt weights or decisions wait
meanwhile. Reads no data of tensors. Called by the command line; output.py writes the layouts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint.discovery import NUMBERED, RESULTS, SUFFIX
from sparseprune.checkpoint.documents import read_object
from sparseprune.checkpoint.header import Header, lay_out
from sparseprune.checkpoint.layout import (
    CopyRange,
    OutputFile,
    OutputLayout,
    Place,
    folder_modes,
    lay_out_masks,
    output_target,
    results_mode,
)
from sparseprune.checkpoint.masks import open_masks
from sparseprune.checkpoint.source import StoredTensor, open_shard
from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from sparseprune.checkpoint.masks import StoredMask
    from sparseprune.checkpoint.output import StagedOutput
    from sparseprune.checkpoint.source import Checkpoint, Shard

CONFIG = PurePosixPath("config.json")


@dataclass(frozen=True, slots=True)
class ResizedTensor:
    """A tensor of the smaller output: its new name and shape; `whole` if it keeps all of its bytes."""

    name: str
    shape: tuple[int, ...]
    whole: bool


def lay_out_removal(
    checkpoint: Checkpoint,
    target: Path | None,
    tensors: Mapping[str, ResizedTensor] | None,
    config: Mapping[str, Any] | None,
) -> OutputLayout:
    """The output with these tensors of a directory, in the order of the input; None keeps all as they are.

    `tensors` and the layout's `weights`, which has those that are not whole, go by the old names. Shards that
    lose all their tensors are left out. `config` None keeps config.json as it is.

    Raises:
        CheckpointError: the checkpoint is a single file.
    """
    if not checkpoint.is_directory:
        raise CheckpointError(
            f"{checkpoint.path}: what becomes smaller is said in config.json; give the directory of a "
            "checkpoint, or use apply, which keeps all shapes"
        )
    if tensors is None:
        tensors = {
            name: ResizedTensor(name, stored.shape, whole=True) for name, stored in checkpoint.tensors.items()
        }
    shards = [
        shard
        for shard, header in checkpoint.headers.items()
        if not header.entries or any(entry.name in tensors for entry in header.entries)
    ]
    names = _names(checkpoint, shards)
    files: list[OutputFile] = []
    copies: list[CopyRange] = []
    places: dict[str, Place] = {}
    for shard in shards:
        old = checkpoint.headers[shard]
        header = _header(old, tensors)
        path = names[shard]
        files.append(OutputFile(path, header.file_size, header.raw, shard.mode))
        left = [StoredTensor(entry, shard) for entry in old.entries if entry.name in tensors]
        more, same = _moved(left, header, path, tensors)
        places.update(more)
        copies += same
    more_files, more_copies = _others(
        checkpoint,
        {
            CONFIG: None if config is None else _document(config),
            checkpoint.index: _index(checkpoint, tensors, names),
        },
    )
    return OutputLayout(
        checkpoint=checkpoint,
        target=output_target(checkpoint, target, "smaller"),
        is_directory=True,
        files=(*files, *more_files),
        copies=(*copies, *more_copies),
        weights=MappingProxyType(places),
        report_file=PurePosixPath(RESULTS, "report.json"),
        spec_file=PurePosixPath(RESULTS, "spec.toml"),
        results_mode=results_mode(checkpoint),
        folders=folder_modes(checkpoint),
    )


def lay_out_decisions(final: OutputLayout) -> OutputLayout:
    """The scratch output of a run that decides in memory: a journal alone."""
    # A journal without files beside it is not continued.
    files = (OutputFile(PurePosixPath("decisions"), 0),)
    return replace(
        final, files=files, copies=(), weights=MappingProxyType({}), writes_weights=False, is_scratch=True
    )


def lay_out_choice(
    checkpoint: Checkpoint, final: OutputLayout, reached: Collection[str], *, rebuilt: bool
) -> OutputLayout:
    """The scratch output of a run on the way to its `final` one: packed masks, and weights if `rebuilt`."""
    masks = replace(lay_out_masks(checkpoint, final.target, reached, "packed"), is_scratch=True)
    if not rebuilt:
        return masks
    files: list[OutputFile] = []
    places: dict[str, Place] = {}
    for number, old in enumerate(checkpoint.headers.values()):
        entries = [entry for entry in old.entries if entry.name in reached]
        header = lay_out(((entry.name, entry.dtype, entry.shape) for entry in entries), {"format": "pt"})
        path = PurePosixPath(f"weights-{number:05d}{SUFFIX}")
        files.append(OutputFile(path, header.file_size, header.raw))
        places |= {entry.name: _place(path, header, number) for number, entry in enumerate(header.entries)}
    return replace(masks, files=(*masks.files, *files), weights=MappingProxyType(places), writes_weights=True)


def open_choice(output: StagedOutput) -> tuple[list[StoredMask], dict[str, StoredTensor]]:
    """The masks of a complete scratch output, and the rebuilt weights by name."""
    masks = list(open_masks(output.staged_path).masks.values())
    files = dict.fromkeys(place.file for place in output.layout.weights.values())
    opened = [open_shard(output.staged_path / file, file) for file in files]
    weights = {entry.name: StoredTensor(entry, shard) for shard, header in opened for entry in header.entries}
    return masks, weights


def _others(
    checkpoint: Checkpoint, written: Mapping[PurePosixPath | None, bytes | None]
) -> tuple[list[OutputFile], list[CopyRange]]:
    """All other files: copied, or `written` with a new text."""
    files, copies = [], []
    for other in checkpoint.others:
        text = written.get(other.path)
        size = other.nbytes if text is None else len(text)
        files.append(OutputFile(other.path, size, text or b"", other.mode))
        if text is None:
            copies.append(CopyRange(checkpoint.path / other.path, other.path, 0, 0, other.nbytes))
    return files, copies


def _names(checkpoint: Checkpoint, shards: Sequence[Shard]) -> dict[Shard, PurePosixPath]:
    """The names of shards: the old ones, but numbered anew where some of a numbered series are gone."""
    old = {shard: shard.relative for shard in shards}
    found = [NUMBERED.fullmatch(str(shard.relative)) for shard in checkpoint.shards]
    rows = {match and (match["stem"], len(match["count"]), int(match["count"])) for match in found}
    row = rows.pop() if len(rows) == 1 else None
    if len(shards) == len(checkpoint.shards) or row is None or row[2] != len(checkpoint.shards):
        return old
    stem, digits, _ = row
    new = {
        shard: PurePosixPath(f"{stem}-{number:0{digits}d}-of-{len(shards):0{digits}d}{SUFFIX}")
        for number, shard in enumerate(shards, 1)
    }
    others = {other.path for other in checkpoint.others}
    return old if others & set(new.values()) else new


def _header(old: Header, tensors: Mapping[str, ResizedTensor]) -> Header:
    """The new header of a shard; the input's own bytes where nothing changes."""
    left = [(tensors[entry.name], entry) for entry in old.entries if entry.name in tensors]
    if len(left) == len(old.entries) and all(one.whole and one.name == entry.name for one, entry in left):
        return old
    return lay_out(((one.name, entry.dtype, one.shape) for one, entry in left), old.metadata)


def _moved(
    left: Sequence[StoredTensor], header: Header, path: PurePosixPath, tensors: Mapping[str, ResizedTensor]
) -> tuple[dict[str, Place], list[CopyRange]]:
    """The places of cut tensors, by old names, and the ranges to copy, neighbours merged."""
    places: dict[str, Place] = {}
    copies: list[CopyRange] = []
    for number, stored in enumerate(left):
        place = _place(path, header, number)
        if not tensors[stored.name].whole:
            places[stored.name] = place
        elif stored.nbytes:
            copies.append(CopyRange(stored.shard.path, path, stored.offset, place.offset, stored.nbytes))
    return places, _merged(copies)


def _merged(copies: Iterable[CopyRange]) -> list[CopyRange]:
    """Ranges that follow each other in the input as one: they do so in the output too."""
    merged: list[CopyRange] = []
    for copy in copies:
        if merged and merged[-1].source_offset + merged[-1].length == copy.source_offset:
            merged[-1] = replace(merged[-1], length=merged[-1].length + copy.length)
        else:
            merged.append(copy)
    return merged


def _place(path: PurePosixPath, header: Header, number: int) -> Place:
    entry = header.entries[number]
    return Place(path, header.data_begin + entry.begin, entry.nbytes, entry.numel)


def _index(
    checkpoint: Checkpoint, tensors: Mapping[str, ResizedTensor], names: Mapping[Shard, PurePosixPath]
) -> bytes | None:
    """The new index: the tensors that stay in the old order, new sizes; None where it stays as it is."""
    stored = checkpoint.tensors
    same = all(one.name == name and one.shape == stored[name].shape for name, one in tensors.items())
    if checkpoint.index is None or (same and len(tensors) == len(stored)):
        return None
    document = read_object(checkpoint.path / checkpoint.index)
    left = [name for name in document["weight_map"] if name in tensors]
    metadata = document.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    numel = {name: prod(tensors[name].shape) for name in left}
    metadata["total_size"] = sum(
        numel[name] * stored[name].nbytes // max(1, stored[name].numel) for name in left
    )
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(numel.values())
    weight_map = {tensors[name].name: str(names[stored[name].shard]) for name in left}
    return _document({**document, "metadata": metadata, "weight_map": weight_map})


def _document(value: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(value, ensure_ascii=False, indent=2)
    except RecursionError as error:
        raise CheckpointError(f"{CONFIG}: lists and objects lie too deep in each other") from error
    # Surrogates, which are no UTF-8, become the escapes that they were.
    return f"{text}\n".encode(errors="backslashreplace")
