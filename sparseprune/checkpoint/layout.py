"""The layout of an output, known before any tensor is read: its files, headers, and every byte's place.

Owns the names of outputs and the forms of masks. Does no I/O. Made by execution from a checkpoint, carried
out by output.py; copies are independent of each other and of the writing of weights and masks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
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
    """A file of the output: its path in the staging folder, its first bytes, its final size.

    `mode` are its permissions, before the umask takes some.
    """

    path: PurePosixPath
    size: int
    begins_with: bytes = field(default=b"", repr=False)
    mode: int = 0o600


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of one tensor go: `nbytes` from byte `offset` of a file on.

    `numel` counts elements: of the weight, also for its mask.
    """

    file: PurePosixPath
    offset: int
    nbytes: int
    numel: int


@dataclass(frozen=True, slots=True)
class CopyRange:
    """`length` bytes that the output copies from `source` into `file`."""

    source: Path
    file: PurePosixPath
    source_offset: int
    offset: int
    length: int


@dataclass(frozen=True)
class OutputLayout:
    """Every file of an output and every byte's place; `weights` and `masks` and `copies` do not overlap.

    Paths of files are relative to the staging folder, and to `root` once the output has its name.
    `stale` names files that an earlier output under the same target may have left and this one does not
    write. An output that `is_scratch` never gets the name: another one is made from it. `results_mode` are
    the permissions of the report and the spec, `folders` those of folders by path, "." always among them.
    """

    checkpoint: Checkpoint = field(repr=False)
    target: Path
    is_directory: bool
    files: tuple[OutputFile, ...] = field(repr=False)
    report_file: PurePosixPath
    spec_file: PurePosixPath | None
    copies: tuple[CopyRange, ...] = field(default=(), repr=False)
    weights: Mapping[str, Place] = field(default_factory=dict, repr=False)
    masks: Mapping[str, Place] = field(default_factory=dict, repr=False)
    mask_files: tuple[PurePosixPath, ...] = ()
    mask_format: MaskFormat | None = None
    writes_weights: bool = True
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
        """Files that the output leaves out, since they hold the dense weights in another form."""
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

    `target` None is the default name beside the input. KeyError for a name that is not stored. Only who may
    read all shards, and all shards `read` beside them, may read masks and report.
    """
    final = output_target(checkpoint, target, "pruned")
    names = _Names.of_directory(f"{RESULTS}/") if checkpoint.is_directory else _Names.of_file(final)
    chosen = {name: checkpoint.tensors[name] for name in masked}
    files: list[OutputFile] = []
    copies: list[CopyRange] = []
    for shard, header in checkpoint.headers.items():
        path = shard.relative if checkpoint.is_directory else PurePosixPath(final.name)
        files.append(OutputFile(path, shard.size, header.raw, shard.mode))
        copies += _untouched(shard, header, path, chosen.keys())
    for other in checkpoint.others:
        files.append(OutputFile(other.path, other.nbytes, mode=other.mode))
        copies.append(CopyRange(checkpoint.path / other.path, other.path, 0, 0, other.nbytes))

    def place(stored: StoredTensor) -> Place:
        path = stored.shard.relative if checkpoint.is_directory else PurePosixPath(final.name)
        return Place(path, stored.offset, stored.nbytes, stored.numel)

    mode = results_mode(checkpoint, read)
    plan = _plan_masks(checkpoint, chosen, mask_format, names, mode)
    return OutputLayout(
        checkpoint=checkpoint,
        target=final,
        is_directory=checkpoint.is_directory,
        files=(*files, *plan.files),
        report_file=names.report,
        spec_file=names.spec,
        copies=tuple(copies),
        weights=_Places(chosen, place),
        masks=plan.places,
        mask_files=plan.paths,
        mask_format=mask_format,
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
        report_file=names.report,
        spec_file=names.spec,
        masks=plan.places,
        mask_files=plan.paths,
        mask_format=mask_format,
        writes_weights=False,
        results_mode=mode,
        folders=folder_modes(checkpoint),
    )


def results_mode(checkpoint: Checkpoint, read: Iterable[Shard] = ()) -> int:
    """The permissions that all shards, and those `read` beside them, have: of files made from them."""
    mode = 0o666
    for shard in (*checkpoint.shards, *read):
        mode &= shard.mode
    return mode


def folder_modes(checkpoint: Checkpoint) -> Mapping[PurePosixPath, int]:
    """Permissions of the folders of an output: who may read a file may enter its folder."""
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
    """Where the bytes of some tensors go; makes each place on demand."""

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
    """The absolute path of the output; links are not resolved, so that it lies where the user wants it."""
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
    """An absolute path that ends in a name: only a `..` at the end is resolved."""
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
        return _MaskPlan((), {})
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
        files.append(index_file(names.masks.with_name(stem + INDEX_SUFFIX), in_files))
    return _MaskPlan(tuple([replace(file, mode=mode) for file in files]), _Places(masked, place))


def _mask_file(
    group: Sequence[StoredTensor], mask_format: MaskFormat, path: PurePosixPath, offsets: dict[str, int]
) -> OutputFile:
    """The mask file of some tensors; adds the offset of each mask to `offsets`."""
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


def index_file(path: PurePosixPath, places: Mapping[str, Place], mode: int = 0o600) -> OutputFile:
    """The index of sharded files: which tensor is in which file."""
    document = {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: place.file.name for name, place in places.items()},
    }
    text = (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
    return OutputFile(path, len(text), text, mode)
