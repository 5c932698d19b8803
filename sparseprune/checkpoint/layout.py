"""What an output will be, known before any tensor is read: its files, their headers, who goes where.

Owns the names of outputs and the forms of masks. Pure: no I/O, nothing is checked on disk. Made by
execution from a checkpoint, carried out by output.py; the copies are independent items that may run in
any order beside the writing of weights and masks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX
from sparseprune.checkpoint.header import MAX_HEADER, Header, lay_out
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from sparseprune.checkpoint.discovery import OtherFile
    from sparseprune.checkpoint.source import Checkpoint, Shard, StoredTensor

MaskFormat = Literal["bool", "packed"]
FORMAT_KEY = "sparseprune.mask_format"
SHAPES_KEY = "sparseprune.shapes"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the output: its path in the staging folder, its first bytes and its final size.

    `mode` are its permissions, of which the umask takes some.
    """

    path: PurePosixPath
    size: int
    begins_with: bytes = field(default=b"", repr=False)
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of one tensor go: `nbytes` from `offset` on, counted from the file's beginning.

    `numel` is the number of elements, of the weight for a mask.
    """

    file: PurePosixPath
    offset: int
    nbytes: int
    numel: int


@dataclass(frozen=True, slots=True)
class CopyRange:
    """Bytes that the output takes over as they are: `length` of them, from `source` into `file`."""

    source: Path
    file: PurePosixPath
    source_offset: int
    offset: int
    length: int


@dataclass(frozen=True)
class OutputLayout:
    """Every file of an output and every byte's place; `weights` and `masks` and `copies` do not overlap.

    Paths of files are relative to the staging folder, and to `root` once the output has its name.
    `stale` names what an earlier output under the same target may have left and this one does not write.
    `is_scratch`: it never gets the name, which is for another output that is made of it. `results_mode` are
    the permissions of the report and the spec, `folders` those of the folders that the input has, at least of
    its own, as in `OutputFile`.
    """

    checkpoint: Checkpoint = field(repr=False)
    target: Path
    is_directory: bool
    files: tuple[OutputFile, ...] = field(repr=False)
    copies: tuple[CopyRange, ...] = field(repr=False)
    weights: Mapping[str, Place] = field(repr=False)
    masks: Mapping[str, Place] = field(repr=False)
    mask_files: tuple[PurePosixPath, ...]
    mask_format: MaskFormat | None
    writes_weights: bool
    report_file: PurePosixPath
    spec_file: PurePosixPath | None
    stale: tuple[PurePosixPath, ...] = ()
    is_scratch: bool = False
    results_mode: int = 0o600
    folders: Mapping[PurePosixPath, int] = field(default_factory=lambda: {PurePosixPath(): 0o700}, repr=False)

    @property
    def root(self) -> Path:
        """The folder that the output's paths are relative to."""
        return self.target if self.is_directory else self.target.parent

    @property
    def left_out(self) -> tuple[OtherFile, ...]:
        """Files of the input that the output would have, but that they hold the dense weights once more."""
        return self.checkpoint.left_out if self.writes_weights else ()

    @property
    def input_bytes(self) -> int:
        """Size of the input's shards."""
        return sum(shard.size for shard in self.checkpoint.shards)

    @property
    def output_bytes(self) -> int:
        """Size of all files, without the report and the spec."""
        return sum(file.size for file in self.files)


def lay_out_apply(
    checkpoint: Checkpoint,
    target: Path | None,
    masked: Collection[str],
    mask_format: MaskFormat | None,
    read: Iterable[Shard] = (),
) -> OutputLayout:
    """The output of pruning `masked`: the same checkpoint, with masks (unless None) and a report.

    `target` None stands for the default name beside the input. KeyError for a name that is not stored. Masks
    and report are for nobody who may not read all shards, and all that is `read` beside them.
    """
    final = output_target(checkpoint, target, "pruned")
    names = _Names.of_directory(f"{RESULTS}/") if checkpoint.is_directory else _Names.of_file(final)
    chosen = {name: checkpoint.tensors[name] for name in masked}
    moved = (
        shard.relative if checkpoint.is_directory else PurePosixPath(final.name)
        for shard in checkpoint.shards
    )
    places = dict(zip((shard.path for shard in checkpoint.shards), moved, strict=True))
    files = [
        OutputFile(places[shard.path], shard.size, header.raw, shard.mode)
        for shard, header in checkpoint.headers.items()
    ]
    files += [OutputFile(other.path, other.nbytes, mode=other.mode) for other in checkpoint.others]
    copies = [
        part
        for shard, header in checkpoint.headers.items()
        for part in _untouched(shard, header, places[shard.path], chosen.keys())
    ]
    copies += [
        CopyRange(checkpoint.path / other.path, other.path, 0, 0, other.nbytes) for other in checkpoint.others
    ]
    weights = _Places(
        chosen,
        lambda stored: Place(places[stored.shard.path], stored.offset, stored.nbytes, stored.numel),
    )
    mode = results_mode(checkpoint, read)
    plan = _plan_masks(checkpoint, chosen, mask_format, names, mode)
    return OutputLayout(
        checkpoint=checkpoint,
        target=final,
        is_directory=checkpoint.is_directory,
        files=(*files, *plan.files),
        copies=tuple(copies),
        weights=weights,
        masks=plan.places,
        mask_files=plan.paths,
        mask_format=mask_format,
        writes_weights=True,
        report_file=names.report,
        spec_file=names.spec,
        stale=() if checkpoint.is_directory or mask_format is not None else (names.masks,),
        results_mode=mode,
        folders=folder_modes(checkpoint),
    )


def lay_out_masks(
    checkpoint: Checkpoint,
    target: Path | None,
    masked: Collection[str],
    mask_format: MaskFormat,
    read: Iterable[Shard] = (),
) -> OutputLayout:
    """The output that holds only the masks of `masked` and a report; otherwise as `lay_out_apply`."""
    final = output_target(checkpoint, target, "masks")
    names = _Names.of_directory("") if checkpoint.is_directory else _Names.of_file(final)
    if not checkpoint.is_directory:
        names = _Names(PurePosixPath(final.name), names.report, None)
    mode = results_mode(checkpoint, read)
    chosen = {name: checkpoint.tensors[name] for name in masked}
    plan = _plan_masks(checkpoint, chosen, mask_format, names, mode)
    return OutputLayout(
        checkpoint=checkpoint,
        target=final,
        is_directory=checkpoint.is_directory,
        files=plan.files,
        copies=(),
        weights=MappingProxyType({}),
        masks=plan.places,
        mask_files=plan.paths,
        mask_format=mask_format,
        writes_weights=False,
        report_file=names.report,
        spec_file=names.spec,
        results_mode=mode,
        folders=folder_modes(checkpoint),
    )


def results_mode(checkpoint: Checkpoint, read: Iterable[Shard] = ()) -> int:
    """The permissions of what is made of all shards and of what is `read` beside them: those of all."""
    mode = 0o666
    for shard in (*checkpoint.shards, *read):
        mode &= shard.mode
    return mode


def folder_modes(checkpoint: Checkpoint) -> Mapping[PurePosixPath, int]:
    """The permissions of the folders of an output; those who may read a file may look into its folder."""
    if checkpoint.is_directory:
        return checkpoint.folders
    mode = results_mode(checkpoint)
    return {PurePosixPath(): mode | (mode & 0o444) >> 2}


@dataclass(frozen=True, slots=True)
class _Names:
    masks: PurePosixPath
    report: PurePosixPath
    spec: PurePosixPath | None

    @staticmethod
    def of_directory(prefix: str) -> _Names:
        masks, report, spec = (
            PurePosixPath(prefix + name) for name in ("masks" + SUFFIX, "report.json", "spec.toml")
        )
        return _Names(masks, report, spec)

    @staticmethod
    def of_file(target: Path) -> _Names:
        stem = target.name.removesuffix(SUFFIX)
        return _Names(PurePosixPath(f"{stem}.masks{SUFFIX}"), PurePosixPath(f"{stem}.report.json"), None)


class _Places(Mapping[str, Place]):
    """Where the bytes of some tensors go; each place is made when it is asked for."""

    def __init__(self, tensors: Mapping[str, StoredTensor], place: Callable[[StoredTensor], Place]) -> None:
        self._tensors = tensors
        self._place = place

    def __getitem__(self, name: str) -> Place:
        return self._place(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class _MaskPlan:
    files: tuple[OutputFile, ...]
    places: Mapping[str, Place]

    @property
    def paths(self) -> tuple[PurePosixPath, ...]:
        return tuple(file.path for file in self.files)


def output_target(checkpoint: Checkpoint, target: Path | None, word: str) -> Path:
    """Where the output goes, absolute; its links are not resolved, so that it lies where it was asked for."""
    if target is None:
        source = _absolute(checkpoint.path)
        if checkpoint.is_directory:
            return source.parent / f"{source.name}-{word}"
        return source.parent / f"{source.name.removesuffix(SUFFIX)}.{word}{SUFFIX}"
    final = _absolute(target)
    if checkpoint.is_directory and final.name.endswith(SUFFIX):
        raise CheckpointError(
            f"{target}: the output of the directory {checkpoint.path} is a directory; "
            f"give a name without {SUFFIX}"
        )
    return final


def _absolute(path: Path) -> Path:
    """Absolute and with a name of its own: `..` is resolved at the end and left to the system elsewhere."""
    absolute = path.absolute()
    return absolute.resolve() if absolute.name == ".." else absolute


def _untouched(shard: Shard, header: Header, file: PurePosixPath, masked: Collection[str]) -> list[CopyRange]:
    """The byte ranges of a shard's data that hold no masked tensor, neighbours merged."""
    begin = shard.data_begin
    ranges: list[CopyRange] = []
    first = last = 0
    for entry in (*header.entries, None):
        if entry is None or entry.name in masked:
            if last > first:
                ranges.append(CopyRange(shard.path, file, begin + first, begin + first, last - first))
            first = last = 0 if entry is None else entry.end
        else:
            last = entry.end
    return ranges


def _plan_masks(
    checkpoint: Checkpoint,
    masked: Mapping[str, StoredTensor],
    mask_format: MaskFormat | None,
    names: _Names,
    mode: int,
) -> _MaskPlan:
    """Mask files like the weight files: one for an unsharded checkpoint, else one a shard, with an index."""
    if mask_format is None:
        return _MaskPlan((), MappingProxyType({}))
    groups = [
        [masked[entry.name] for entry in header.entries if entry.name in masked]
        for header in checkpoint.headers.values()
    ]
    groups = [group for group in groups if group]
    stem = names.masks.name.removesuffix(SUFFIX)
    is_sharded = len(checkpoint.shards) > 1 and len(groups) > 0
    if is_sharded:
        paths = {
            group[0].shard.path: names.masks.with_name(f"{stem}-{number:05d}-of-{len(groups):05d}{SUFFIX}")
            for number, group in enumerate(groups, 1)
        }
    else:
        groups = [[stored for group in groups for stored in group]]
        paths = {checkpoint.shards[0].path: names.masks}
    offsets: dict[str, int] = {}
    files = [
        _mask_file(group, mask_format, path, offsets)
        for group, path in zip(groups, paths.values(), strict=True)
    ]

    def place(stored: StoredTensor) -> Place:
        nbytes = stored.numel if mask_format == "bool" else packed_bytes(stored.shape)
        return Place(paths[stored.shard.path], offsets[stored.name], nbytes, stored.numel)

    if is_sharded:
        in_files = _Places({name: masked[name] for name in offsets}, place)
        files.append(_mask_index(names.masks.with_name(stem + INDEX_SUFFIX), in_files))
    return _MaskPlan(tuple([replace(file, mode=mode) for file in files]), _Places(masked, place))


def _mask_file(
    group: Sequence[StoredTensor], mask_format: MaskFormat, path: PurePosixPath, offsets: dict[str, int]
) -> OutputFile:
    """The file of the masks of some tensors; adds to `offsets` where each mask begins."""
    header = mask_header({stored.name: stored.shape for stored in group}, mask_format)
    if header.data_begin - 8 > MAX_HEADER:
        raise CheckpointError(
            f"{group[0].shard.path}: with names as long as these, a {mask_format} mask file has a header of "
            f"more than {MAX_HEADER} bytes; give --mask-format bool or --no-masks"
        )
    offsets.update([(entry.name, header.data_begin + entry.begin) for entry in header.entries])
    return OutputFile(path, header.file_size, header.raw)


def mask_header(shapes: Mapping[str, tuple[int, ...]], mask_format: MaskFormat) -> Header:
    """The header of a mask file for weights of these shapes, in this order.

    >>> mask_header({"w": (3, 5)}, "packed").entries[0].shape
    (2,)
    """
    metadata = {"format": "pt", FORMAT_KEY: mask_format}
    if mask_format == "bool":
        return lay_out(((name, "BOOL", shape) for name, shape in shapes.items()), metadata)
    metadata[SHAPES_KEY] = json.dumps(shapes, ensure_ascii=False, separators=(",", ":"))
    return lay_out(((name, "U8", (packed_bytes(shape),)) for name, shape in shapes.items()), metadata)


def packed_bytes(shape: Sequence[int]) -> int:
    """Bytes of a packed mask: one bit an element, the last byte filled up.

    >>> packed_bytes((3, 5)), packed_bytes(()), packed_bytes((0, 4))
    (2, 1, 0)
    """
    return -(-prod(shape) // 8)


def _mask_index(path: PurePosixPath, places: Mapping[str, Place]) -> OutputFile:
    document = {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: place.file.name for name, place in places.items()},
    }
    text = (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
    return OutputFile(path, len(text), text)
