"""The layout of an output, known before any tensor is read: its files, headers, and every byte's place.

Owns the names of outputs and the forms of masks. Does no I/O. Made by execution from a checkpoint, carried
out by output.py; copies are independent of each other and of the writing of weights and masks.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint.discovery import INDEX_SUFFIX, MARKED, RESULTS, SUFFIX
from sparseprune.checkpoint.header import MAX_HEADER, Header, lay_out, with_metadata
from sparseprune.checkpoint.remote import RemotePath, beside, is_on_hub
from sparseprune.errors import CheckpointError, size

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Container, Iterable, Iterator, Sequence

    from sparseprune.checkpoint.discovery import OtherFile
    from sparseprune.checkpoint.source import Checkpoint, Shard, StoredTensor

_Known = TypeVar("_Known")
_Placed = TypeVar("_Placed", "Place", "CopyRange")
MaskFormat = Literal["bool", "packed"]
FORMAT_KEY = "sparseprune.mask_format"
SHAPES_KEY = "sparseprune.shapes"
PERMUTATIONS = f"permutations{SUFFIX}"
_LONGEST_NAME = 255  # bytes, on the usual file systems
_Names = tuple[PurePosixPath, PurePosixPath, PurePosixPath | None]  # of masks, report and spec


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the output: its path, its first bytes, its final size, its permissions before the umask.

    `metadata` is that of its header where it is a shard of which only values differ from the input's.
    """

    path: PurePosixPath
    size: int
    begins_with: bytes = field(default=b"", repr=False)
    mode: int = 0o600
    metadata: Mapping[str, str] | None = field(default=None, repr=False)


class Place(Struct, frozen=True):
    """Where a tensor goes: `nbytes` from byte `offset` of a file on; `numel` elements of the weight."""

    file: PurePosixPath
    offset: int
    nbytes: int
    numel: int


class CopyRange(Struct, frozen=True):
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
    write. A `scratch` output, of this kind, never gets the name: another one is made from it. `results_mode`
    are the permissions of the report and the spec; the `card` has its own, and no size before it is written.
    """

    checkpoint: Checkpoint = field(repr=False)
    target: Path
    is_directory: bool
    files: tuple[OutputFile, ...] = field(repr=False)
    report_file: PurePosixPath
    spec_file: PurePosixPath | None
    permutations_file: PurePosixPath | None = None
    copies: tuple[CopyRange, ...] = field(default=(), repr=False)
    weights: Mapping[str, Place] = field(default_factory=dict, repr=False)
    masks: Mapping[str, Place] = field(default_factory=dict, repr=False)
    mask_files: tuple[PurePosixPath, ...] = ()
    mask_format: MaskFormat | None = None
    writes_weights: bool = True
    stale: tuple[PurePosixPath, ...] = ()
    scratch: str = ""
    results_mode: int = 0o600
    card: OutputFile | None = None

    @property
    def results(self) -> Mapping[PurePosixPath, int]:
        """The files that are written when all else is known, with their permissions.

        They are the report, the spec, the permutations and the model card.
        """
        files = (self.report_file, self.spec_file, self.permutations_file)
        modes = {file: self.results_mode for file in files if file is not None}
        return modes if self.card is None else modes | {self.card.path: self.card.mode}

    @property
    def root(self) -> Path:
        """The folder that the output's paths are relative to."""
        return self.target if self.is_directory else self.target.parent

    @property
    def folders(self) -> Mapping[PurePosixPath, int]:
        """Permissions of folders by path, "." among them; who may read a file may enter its folder."""
        if self.checkpoint.is_directory:
            return self.checkpoint.folders
        mode = results_mode(self.checkpoint)
        return {PurePosixPath(): mode | (mode & 0o444) >> 2}

    def places_of(self, files: Container[PurePosixPath]) -> tuple[dict[str, Place], dict[str, Place]]:
        """The places in these files: of weights, and of masks."""
        weights, masks = (
            {name: place for name, place in places.items() if place.file in files}
            for places in (self.weights, self.masks)
        )
        return weights, masks

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
        """Size of all files, without the report, the spec and the card."""
        return sum(file.size for file in self.files)


def lay_out_apply(
    checkpoint: Checkpoint,
    target: Path | None,
    masked: Collection[str],
    mask_format: MaskFormat | None,
    read: Iterable[Shard] = (),
    moved: Collection[str] = (),
) -> OutputLayout:
    """The output of pruning `masked`: the same checkpoint, with masks (unless None) and a report.

    Tensors that are `moved` are written, too, with masks only where they are masked. `target` None is the
    default name beside the input. KeyError for a name that is not stored. Only who may read all shards, and
    all shards `read` beside them, may read masks and report.
    """
    final = output_target(checkpoint, target, "pruned")
    is_directory = checkpoint.is_directory
    names = _names(checkpoint, final, RESULTS)
    chosen = {name: checkpoint.tensors[name] for name in masked}
    layout = _lay_out_masks(checkpoint, final, names, chosen, mask_format, read)
    if moved:
        chosen = {**chosen, **{name: checkpoint.tensors[name] for name in moved}}
    files: list[OutputFile] = []
    copies: list[CopyRange] = []
    for shard, header in checkpoint.headers.items():
        path = shard.relative if is_directory else PurePosixPath(final.name)
        at = header.data_begin
        written = {entry.name for entry in checkpoint.counted(shard) if entry.name in chosen}
        metadata = header.metadata if written else None
        files.append(OutputFile(path, shard.size, header.raw, shard.mode, metadata))
        untouched = (entry for entry in header.entries if entry.name not in written)
        pieces = ((at + one.begin, at + one.begin, one.nbytes) for one in untouched)
        copies += merge_copies(shard.path, path, pieces)
    others, copied = other_files(checkpoint, {})

    def place(stored: StoredTensor) -> Place:
        path = stored.shard.relative if is_directory else PurePosixPath(final.name)
        return Place(path, stored.offset, stored.nbytes, stored.numel)

    stem = final.name.removesuffix(SUFFIX)
    permutations = (
        PurePosixPath(RESULTS, PERMUTATIONS) if is_directory else PurePosixPath(f"{stem}.{PERMUTATIONS}")
    )
    # A longer name no earlier output can have left.
    left = () if moved or len(os.fsencode(permutations.name)) > _LONGEST_NAME else (permutations,)
    stale = (*(names[:1] if mask_format is None else ()), *left)

    return dataclasses.replace(
        layout,
        files=(*files, *others, *layout.files),
        copies=(*copies, *copied),
        weights=_Places(chosen, place),
        writes_weights=True,
        permutations_file=permutations if moved else None,
        stale=() if is_directory else stale,
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
    masks, report, spec = _names(checkpoint, final, "")
    names = (masks if checkpoint.is_directory else PurePosixPath(final.name), report, spec)
    chosen = {name: checkpoint.tensors[name] for name in masked}
    return _lay_out_masks(checkpoint, final, names, chosen, mask_format, read)


def with_texts(
    layout: OutputLayout, texts: Mapping[PurePosixPath, bytes], card: PurePosixPath | None
) -> OutputLayout:
    """The layout with these texts in place of copies, and a model card in place of the one that it copies.

    A text is for a file that the layout has. Who may not read the old card, or all weights, may not read the
    new one.
    """
    files = [file for file in layout.files if file.path != card]
    old = next((file.mode for file in layout.files if file.path == card), layout.results_mode)
    written = [
        OutputFile(file.path, len(text), text, file.mode) if (text := texts.get(file.path)) else file
        for file in files
    ]
    return dataclasses.replace(
        layout,
        files=tuple(written),
        copies=tuple([part for part in layout.copies if part.file != card and part.file not in texts]),
        card=None if card is None else OutputFile(card, 0, mode=old & layout.results_mode),
    )


def with_mark(layout: OutputLayout, mark: Mapping[str, str]) -> OutputLayout:
    """The layout with a mark, by the keys of `MARKED`, in the header of every shard with new values.

    Where a header becomes longer, by whole pages, all tensors of its file begin later. Shards of a removal
    are laid out with the mark.
    """
    files: list[OutputFile] = []
    longer: dict[PurePosixPath, int] = {}
    for file in layout.files:
        if file.metadata is None:
            files.append(file)
            continue
        metadata = marked(file.metadata, mark)
        head = with_metadata(file.begins_with, file.metadata, metadata)
        longer[file.path] = more = len(head) - len(file.begins_with)
        files.append(OutputFile(file.path, file.size + more, head, file.mode, metadata))

    def moved(old: _Placed) -> _Placed:
        return replace(old, offset=old.offset + longer.get(old.file, 0))

    return dataclasses.replace(
        layout,
        files=tuple(files),
        copies=tuple([moved(part) for part in layout.copies]),
        weights=_Places(layout.weights, moved),
    )


def marked(metadata: Mapping[str, str], mark: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a header with a mark in place of an earlier one."""
    kept = {key: text for key, text in metadata.items() if key not in MARKED}
    return kept | {key: mark[of] for key, of in MARKED.items() if of in mark}


def permutations_path(checkpoint: Checkpoint) -> Path:
    """Where the orders of a checkpoint are told if it was permuted before it was pruned."""
    path = checkpoint.path
    if checkpoint.is_directory:
        return path / RESULTS / PERMUTATIONS
    return path.with_name(f"{path.name.removesuffix(SUFFIX)}.{PERMUTATIONS}")


def results_mode(checkpoint: Checkpoint, read: Iterable[Shard] = ()) -> int:
    """The permissions that all shards, and those `read` beside them, have: of files made from them."""
    mode = 0o666
    for shard in (*checkpoint.shards, *read):
        mode &= shard.mode
    return mode


class _Places(Mapping[str, Place], Generic[_Known]):
    """Where the bytes of some tensors go, by what is known of each; makes each place on demand."""

    def __init__(self, tensors: Mapping[str, _Known], place: Callable[[_Known], Place]) -> None:
        self._tensors = tensors
        self._place = place

    def __getitem__(self, name: str) -> Place:
        return self._place(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def output_target(checkpoint: Checkpoint, target: Path | None, word: str) -> Path:
    """The absolute path of the output; links are not resolved, so that it lies where the user wants it."""
    if target is None:
        source = beside(absolute(checkpoint.path))
        if isinstance(source, RemotePath) and not source.key:
            raise CheckpointError(f"{source}: the output cannot lie beside a bucket; give a place with -o")
        if checkpoint.is_directory:
            return source.parent / f"{source.name}-{word}"
        return source.parent / f"{source.name.removesuffix(SUFFIX)}.{word}{SUFFIX}"
    refuse_read_only(target)
    final = absolute(target)
    if checkpoint.is_directory and final.name.endswith(SUFFIX):
        raise CheckpointError(
            f"{target}: the output of the directory {checkpoint.path} is a directory; "
            f"give a name without {SUFFIX}"
        )
    return final


def refuse_read_only(target: Path) -> None:
    """CheckpointError for an output on the hub."""
    if is_on_hub(target):
        raise CheckpointError(
            f"{target}: the hub is only read; write to a folder, then `hf upload ORGANIZATION/MODEL FOLDER`"
        )


def absolute(path: Path) -> Path:
    """An absolute path that ends in a name: only a `..` at the end is resolved."""
    path = path.absolute()
    return path.resolve() if path.name == ".." else path


def _names(checkpoint: Checkpoint, final: Path, folder: str) -> _Names:
    """The paths of masks, report and spec: in a folder of a directory, or beside a file, without a spec."""
    if checkpoint.is_directory:
        home = PurePosixPath(folder)
        return home / f"masks{SUFFIX}", home / "report.json", home / "spec.toml"
    stem = final.name.removesuffix(SUFFIX)
    return PurePosixPath(f"{stem}.masks{SUFFIX}"), PurePosixPath(f"{stem}.report.json"), None


def numbered(stem: str, count: int, digits: int = 5) -> list[PurePosixPath]:
    """The names of `count` safetensors files in a row."""
    of = f"of-{count:0{digits}d}{SUFFIX}"
    return [PurePosixPath(f"{stem}-{number:0{digits}d}-{of}") for number in range(1, count + 1)]


def places_in(path: PurePosixPath, header: Header) -> dict[str, Place]:
    """The places of all tensors of a file with this header."""
    at = header.data_begin
    return {one.name: Place(path, at + one.begin, one.nbytes, one.numel) for one in header.entries}


def other_files(
    checkpoint: Checkpoint, written: Mapping[PurePosixPath | None, bytes | None]
) -> tuple[list[OutputFile], list[CopyRange]]:
    """All files beside the shards: copied, or `written` with a new text."""
    files, copies = [], []
    for other in checkpoint.others:
        text = written.get(other.path)
        size = other.nbytes if text is None else len(text)
        files.append(OutputFile(other.path, size, text or b"", other.mode))
        if text is None:
            copies.append(CopyRange(checkpoint.path / other.path, other.path, 0, 0, other.nbytes))
    return files, copies


def merge_copies(source: Path, file: PurePosixPath, parts: Iterable[tuple[int, int, int]]) -> list[CopyRange]:
    """Copies of parts (offset in the source, offset in the file, bytes), neighbours merged."""
    ranges: list[list[int]] = []
    for begin, offset, nbytes in parts:
        if ranges and ranges[-1][0] + ranges[-1][2] == begin:
            ranges[-1][2] += nbytes
        elif nbytes:
            ranges.append([begin, offset, nbytes])
    return [CopyRange(source, file, *one) for one in ranges]


def _lay_out_masks(
    checkpoint: Checkpoint,
    final: Path,
    names: _Names,
    masked: Mapping[str, StoredTensor],
    mask_format: MaskFormat | None,
    read: Iterable[Shard],
) -> OutputLayout:
    path, report, spec = names
    mode = results_mode(checkpoint, read)
    files, places = _mask_files(checkpoint, masked, mask_format, path, mode) if mask_format else ([], {})
    return OutputLayout(
        checkpoint=checkpoint,
        target=final,
        is_directory=checkpoint.is_directory,
        files=tuple(files),
        report_file=report,
        spec_file=spec,
        masks=places,
        mask_files=tuple([file.path for file in files]),
        mask_format=mask_format,
        writes_weights=False,
        results_mode=mode,
    )


def _mask_files(
    checkpoint: Checkpoint,
    masked: Mapping[str, StoredTensor],
    mask_format: MaskFormat,
    path: PurePosixPath,
    mode: int,
) -> tuple[list[OutputFile], Mapping[str, Place]]:
    """Mask files like the weight files: one for an unsharded checkpoint, else one a shard, with an index."""
    groups = [
        [masked[entry.name] for entry in checkpoint.counted(shard) if entry.name in masked]
        for shard in checkpoint.shards
    ]
    groups = [group for group in groups if group]
    is_sharded = len(checkpoint.shards) > 1 and len(groups) > 0
    stem = str(path).removesuffix(SUFFIX)
    paths = numbered(stem, len(groups)) if is_sharded else [path]
    groups = groups if is_sharded else [[stored for group in groups for stored in group]]
    files: list[OutputFile] = []
    offsets: dict[str, int] = {}
    homes: dict[Path, PurePosixPath] = {}
    for group, file in zip(groups, paths, strict=True):
        header = mask_header({stored.name: stored.shape for stored in group}, mask_format)
        if header.data_begin - 8 > MAX_HEADER:
            raise CheckpointError(
                f"{group[0].shard.path}: with names as long as these, a {mask_format} mask file has a header "
                f"of more than {size(MAX_HEADER)}; give --mask-format bool or --no-masks"
            )
        files.append(OutputFile(file, header.file_size, header.raw, mode))
        offsets.update([(entry.name, header.data_begin + entry.begin) for entry in header.entries])
        homes |= {stored.shard.path: file for stored in group[:1]}

    def place(stored: StoredTensor) -> Place:
        nbytes = stored.numel if mask_format == "bool" else packed_bytes(stored.shape)
        return Place(homes[stored.shard.path], offsets[stored.name], nbytes, stored.numel)

    if is_sharded:
        in_files = _Places({name: masked[name] for name in offsets}, place)
        files.append(index_file(PurePosixPath(stem + INDEX_SUFFIX), in_files, mode))
    return files, _Places(masked, place)


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


def index_file(path: PurePosixPath, places: Mapping[str, Place], mode: int) -> OutputFile:
    """The index of sharded files: which tensor is in which file."""
    document = {
        "metadata": {"total_size": sum(place.nbytes for place in places.values())},
        "weight_map": {name: place.file.name for name, place in places.items()},
    }
    text = (json.dumps(document, ensure_ascii=False, indent=2) + "\n").encode()
    return OutputFile(path, len(text), text, mode)
