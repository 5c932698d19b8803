"""The output of a removal: the same shards with fewer, smaller and renamed tensors; its scratch folder.

Owns the new headers, the index, the names of shards, and where masks, rebuilt weights or decisions wait
meanwhile. Reads no data of tensors. Called by the command line; output.py writes the layouts.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.checkpoint.discovery import NUMBERED, RESULTS, SUFFIX
from sparseprune.checkpoint.documents import read_object
from sparseprune.checkpoint.header import lay_out
from sparseprune.checkpoint.layout import (
    OutputFile,
    OutputLayout,
    lay_out_masks,
    marked,
    merge_copies,
    numbered,
    other_files,
    output_target,
    places_in,
    results_mode,
)
from sparseprune.checkpoint.masks import open_masks
from sparseprune.checkpoint.source import StoredTensor, open_shard
from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from sparseprune.checkpoint.layout import CopyRange, Place
    from sparseprune.checkpoint.masks import StoredMask
    from sparseprune.checkpoint.output import Output
    from sparseprune.checkpoint.source import Checkpoint, Shard

CONFIG = PurePosixPath("config.json")


class ResizedTensor(Struct, frozen=True):
    """A tensor of the smaller output: its new name and shape; `whole` if it keeps all of its bytes."""

    name: str
    shape: tuple[int, ...]
    whole: bool


def lay_out_removal(
    checkpoint: Checkpoint,
    target: Path | None,
    tensors: Mapping[str, ResizedTensor] | None,
    config: Mapping[str, Any] | None,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    mark: Mapping[str, str] = MappingProxyType({}),
) -> OutputLayout:
    """The output with these tensors of a directory, in the order of the input; None keeps all as they are.

    `tensors` and the layout's `weights`, which has those that are not whole, go by the old names. Shards that
    lose all their tensors are left out, and so are tensors that the index has in another shard: their shapes
    would be the old ones. `config` None keeps config.json as it is; `beside` are new texts of other files.
    The headers of shards that change get the `mark`.

    Raises:
        CheckpointError: the checkpoint is a single file.
    """
    if not checkpoint.is_directory:
        raise CheckpointError(
            f"{checkpoint.path}: what becomes smaller is said in config.json; give the directory of a "
            "checkpoint, or use apply, which keeps all shapes"
        )
    if tensors is None:
        whole = checkpoint.tensors.items()
        tensors = {name: ResizedTensor(name, stored.shape, whole=True) for name, stored in whole}
    names = _names(checkpoint, tensors)
    files, copies, places = _resized(checkpoint, tensors, names, mark)
    new_config = None if config is None else _document(config)
    written: dict[PurePosixPath | None, bytes | None] = {
        **{PurePosixPath(file): _document(each) for file, each in beside.items()},
        CONFIG: new_config,
        checkpoint.index: _index(checkpoint, tensors, names),
    }
    others, copied = other_files(checkpoint, written)
    return OutputLayout(
        checkpoint=checkpoint,
        target=output_target(checkpoint, target, "smaller"),
        is_directory=True,
        files=(*files, *others),
        copies=(*copies, *copied),
        weights=MappingProxyType(places),
        report_file=PurePosixPath(RESULTS, "report.json"),
        spec_file=PurePosixPath(RESULTS, "spec.toml"),
        results_mode=results_mode(checkpoint),
    )


def lay_out_folded(
    checkpoint: Checkpoint,
    folded: Checkpoint,
    weights: Mapping[str, str],
    layout: OutputLayout,
) -> OutputLayout:
    """The `layout` that prunes a folded checkpoint, with its tensors alone and under their names.

    `weights` has the new names by those in the checkpoint; what the folded one lacks is left out.
    """
    named = {name: weights.get(name, name) for name in checkpoint.tensors}
    tensors = {
        name: ResizedTensor(new, checkpoint.tensors[name].shape, whole=new not in layout.weights)
        for name, new in named.items()
        if new in folded.tensors
    }
    names = _names(checkpoint, tensors)
    if not checkpoint.is_directory:
        names = dict.fromkeys(names, PurePosixPath(layout.target.name))
    files, copies, places = _resized(checkpoint, tensors, names)
    others, copied = other_files(checkpoint, {checkpoint.index: _index(checkpoint, tensors, names)})
    masks = frozenset(layout.mask_files)
    return dataclasses.replace(
        layout,
        checkpoint=checkpoint,
        files=(*files, *others, *(file for file in layout.files if file.path in masks)),
        copies=(*copies, *copied),
        weights=MappingProxyType({tensors[name].name: place for name, place in places.items()}),
    )


def lay_out_decisions(final: OutputLayout) -> OutputLayout:
    """The scratch output of a run that decides in memory: a journal alone."""
    # A journal without files beside it is not continued.
    files = (OutputFile(PurePosixPath("decisions"), 0),)
    return dataclasses.replace(
        final, files=files, copies=(), weights={}, writes_weights=False, scratch="choice"
    )


def lay_out_choice(
    checkpoint: Checkpoint,
    final: OutputLayout,
    reached: Collection[str],
    *,
    rebuilt: bool,
    kind: str = "choice",
) -> OutputLayout:
    """The scratch output of a run on the way to its `final` one: packed masks, and weights if `rebuilt`."""
    masks = dataclasses.replace(lay_out_masks(checkpoint, final.target, reached, "packed"), scratch=kind)
    if not rebuilt:
        return masks
    files: list[OutputFile] = []
    places: dict[str, Place] = {}
    for number, shard in enumerate(checkpoint.shards):
        entries = [entry for entry in checkpoint.counted(shard) if entry.name in reached]
        header = lay_out(((entry.name, entry.dtype, entry.shape) for entry in entries), {"format": "pt"})
        path = PurePosixPath(f"weights-{number:05d}{SUFFIX}")
        files.append(OutputFile(path, header.file_size, header.raw))
        places |= places_in(path, header)
    return dataclasses.replace(
        masks, files=(*masks.files, *files), weights=MappingProxyType(places), writes_weights=True
    )


def open_choice(output: Output) -> tuple[list[StoredMask], dict[str, StoredTensor]]:
    """The masks of a complete scratch output, and the rebuilt weights by name."""
    masks = list(open_masks(output.staged_path).masks.values())
    files = dict.fromkeys(place.file for place in output.layout.weights.values())
    opened = [open_shard(output.staged_path / file, file) for file in files]
    weights = {entry.name: StoredTensor(entry, shard) for shard, header in opened for entry in header.entries}
    return masks, weights


def _resized(
    checkpoint: Checkpoint,
    tensors: Mapping[str, ResizedTensor],
    names: Mapping[Shard, PurePosixPath],
    mark: Mapping[str, str] = MappingProxyType({}),
) -> tuple[list[OutputFile], list[CopyRange], dict[str, Place]]:
    """Files of shards with these tensors, copies of what is whole, places of the rest by their old names."""
    files: list[OutputFile] = []
    copies: list[CopyRange] = []
    places: dict[str, Place] = {}
    for shard, path in names.items():
        left = [entry for entry in checkpoint.counted(shard) if entry.name in tensors]
        old = checkpoint.headers[shard]
        resized = [(one, tensors[one.name]) for one in left]
        header = old
        if len(left) < len(old.entries) or any(not to.whole or to.name != one.name for one, to in resized):
            shapes = ((to.name, one.dtype, to.shape) for one, to in resized)
            header = lay_out(shapes, marked(old.metadata, mark))
        files.append(OutputFile(path, header.file_size, header.raw, shard.mode))
        new = dict(zip([entry.name for entry in left], places_in(path, header).values(), strict=True))
        places |= {name: place for name, place in new.items() if not tensors[name].whole}
        kept = (entry for entry in left if tensors[entry.name].whole)
        pieces = ((shard.data_begin + one.begin, new[one.name].offset, one.nbytes) for one in kept)
        copies += merge_copies(shard.path, path, pieces)
    return files, copies, places


def _names(checkpoint: Checkpoint, tensors: Collection[str]) -> dict[Shard, PurePosixPath]:
    """The names of shards that keep some of their tensors, if they had any.

    They are the old ones, but numbered anew where some of a numbered series are gone.
    """
    shards = [
        shard
        for shard, header in checkpoint.headers.items()
        if not header.entries or any(entry.name in tensors for entry in checkpoint.counted(shard))
    ]
    old = {shard: shard.relative for shard in shards}
    found = [NUMBERED.fullmatch(str(shard.relative)) for shard in checkpoint.shards]
    rows = {match and (match["stem"], len(match["count"]), int(match["count"])) for match in found}
    row = rows.pop() if len(rows) == 1 else None
    if len(shards) == len(checkpoint.shards) or row is None or row[2] != len(checkpoint.shards):
        return old
    stem, digits, _ = row
    new = dict(zip(shards, numbered(stem, len(shards), digits), strict=True))
    others = {other.path for other in checkpoint.others}
    return old if others & set(new.values()) else new


def _index(
    checkpoint: Checkpoint, tensors: Mapping[str, ResizedTensor], names: Mapping[Shard, PurePosixPath]
) -> bytes | None:
    """The new index: the tensors that stay in the old order, new sizes; None where it stays as it is."""
    stored = checkpoint.tensors
    same = all(one.name == name and one.shape == stored[name].shape for name, one in tensors.items())
    same = same and all(shard.relative == path for shard, path in names.items())
    if checkpoint.index is None or (same and len(tensors) == len(stored)):
        return None
    document = read_object(checkpoint.path / checkpoint.index)
    left = [name for name in document["weight_map"] if name in tensors]
    metadata = document.get("metadata")
    metadata = dict(metadata) if isinstance(metadata, dict) else {}
    numel = {name: prod(tensors[name].shape) for name in left}
    sizes = [numel[name] * stored[name].nbytes // max(1, stored[name].numel) for name in left]
    metadata["total_size"] = sum(sizes)
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
