"""Mask files: tensors of the names and shapes of weights, True where one is kept; packed bits or bytes.

Owns both forms, how masks are found beside an output, and the report of the run that wrote them. Imports
numpy when masks are read, torch in `load_masks` alone. Called by execution and by users.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeGuard

from msgspec import Struct
from msgspec import field as struct_field

from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX, is_folder, read_weight_map
from sparseprune.checkpoint.documents import LARGEST_DOCUMENT, read_object, shown, strict_json
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.layout import FORMAT_KEY, SHAPES_KEY, packed_bytes
from sparseprune.checkpoint.source import StoredTensor, TensorReader, open_shard
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from sparseprune.checkpoint.header import Header
    from sparseprune.checkpoint.source import Shard, Source

    _Files = tuple[Mapping[Shard, Header], Mapping[str, PurePosixPath]]  # headers, and the weight map if any

_INDEX = "masks" + INDEX_SUFFIX
_SINGLE = "masks" + SUFFIX
_REPORT = "report.json"
_LARGEST = 2**63 - 1  # elements that torch can count
_WANTED = "give a mask file, its folder or index, or the output of sparseprune that has masks"


class StoredMask(Struct, frozen=True):
    """A mask of a weight of this shape, and the stored tensor: one bool or one bit for an element."""

    stored: StoredTensor
    shape: tuple[int, ...]
    packed: bool

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class MaskSet:
    """The masks of some files, of which all headers were read and no data; each is in one file.

    `missing` has names that an index lists and the file that should hold them.
    """

    path: Path
    shards: tuple[Shard, ...]
    masks: Mapping[str, StoredMask] = field(repr=False)
    missing: Mapping[str, PurePosixPath] = field(repr=False)


def open_masks(path: Path) -> MaskSet:
    """The masks under a path; reads headers alone.

    `path` is a mask file (bool or packed), an index of mask files, a folder with either or with mask files
    and no index, a pruned directory, or a pruned file with its masks beside it.

    Raises:
        CheckpointError: there are no masks, or they contradict themselves.
    """
    headers, weight_map = _find(path)
    masks: dict[str, StoredMask] = {}
    for shard, header in headers.items():
        shapes = _mask_shapes(shard.path, header)
        packed = header.metadata.get(FORMAT_KEY) == "packed"
        for entry in header.entries:
            if entry.name in masks:
                twice = f"mask {shown(entry.name)} is also in {masks[entry.name].stored.shard.path}"
                raise CheckpointError(f"{shard.path}: {twice}; a mask may stand in one file only")
            masks[entry.name] = StoredMask(StoredTensor(entry, shard), shapes[entry.name], packed)
    missing = {name: place for name, place in weight_map.items() if name not in masks}
    return MaskSet(path, tuple(headers), MappingProxyType(masks), MappingProxyType(missing))


def read_kept(reader: Source, mask: StoredMask, first: int, count: int) -> NDArray[np.uint8]:
    """One byte for each of the elements [first, first + count), row-major: 1 where it is kept, else 0.

    ValueError outside of the mask.
    """
    import numpy as np  # noqa: PLC0415  (headers are read without numpy)

    from sparseprune.engine.kernels.selecting import unpack  # noqa: PLC0415

    if not 0 <= first <= first + count <= mask.numel:
        raise ValueError(f"elements {first} to {first + count} of mask {mask.name!r}, which has {mask.numel}")
    kept = np.empty(count, dtype=np.uint8)
    if not mask.packed:
        reader.read_into(mask.stored, first, kept)
        # Any byte but 0 means kept; read as a bool, a byte other than 0 and 1 would be invalid.
        np.not_equal(kept, 0, out=kept.view(np.bool_))
        return kept
    begin, end = first // 8, -(-(first + count) // 8)
    packed = np.empty(end - begin, dtype=np.uint8)
    reader.read_into(mask.stored, begin, packed)
    if first % 8:
        kept[:] = np.unpackbits(packed, count=first % 8 + count, bitorder="little")[first % 8 :]
    else:
        unpack(packed, kept)
    return kept


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """The masks under a path as bool tensors of their weights' names and shapes, True where kept.

    `path` is as in `open_masks`; CheckpointError if there are no masks, or if one stands in two files.
    """
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    masks: dict[str, torch.Tensor] = {}
    with TensorReader() as reader:
        for name, mask in open_masks(Path(path)).masks.items():
            kept = read_kept(reader, mask, 0, mask.numel)
            masks[name] = torch.from_numpy(kept.view(np.bool_)).reshape(mask.shape)
    return masks


def _find(path: Path) -> _Files:
    if not is_folder(path):
        return _listed(path) if path.name.endswith(INDEX_SUFFIX) else (dict([_beside(path)]), {})
    for folder in (path, path / RESULTS):
        if (folder / _INDEX).is_file():
            return _listed(folder / _INDEX)
        if (folder / _SINGLE).is_file():
            return dict([open_shard(folder / _SINGLE)]), {}
    return _others(path)


def _others(path: Path) -> _Files:
    """Masks of a folder under other names than ours: the files of its index, or all that hold masks."""
    try:
        names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) == 1:
        files = _listed(path / indexes[0])
        if all(map(_holds_masks, files[0].values())):
            return files
    found = (open_shard(path / name) for name in names if name.endswith(SUFFIX))
    headers = {shard: header for shard, header in found if _holds_masks(header)}
    if not headers:
        raise CheckpointError(f"{path}: holds no masks; {_WANTED}")
    return headers, {}


def _listed(index: Path) -> _Files:
    weight_map = read_weight_map(index)
    return dict(open_shard(index.parent / place) for place in sorted(set(weight_map.values()))), weight_map


def _beside(path: Path) -> tuple[Shard, Header]:
    """The file itself if it holds masks, else the masks that were written with it."""
    found = open_shard(path)
    if _holds_masks(found[1]):
        return found
    masks = path.with_name(f"{path.name.removesuffix(SUFFIX)}.masks{SUFFIX}")
    if masks.is_file():
        return open_shard(masks)
    raise CheckpointError(f"{path}: is no mask file, and there is no {masks.name} beside it; {_WANTED}")


def _holds_masks(header: Header) -> bool:
    """Whether sparseprune wrote a file, or all its tensors are bools, which mean the same."""
    entries = header.entries
    return FORMAT_KEY in header.metadata or (bool(entries) and all(one.dtype == "BOOL" for one in entries))


def _mask_shapes(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """The shape of every mask in a file; CheckpointError where header and metadata disagree."""
    if not _holds_masks(header):
        raise CheckpointError(f"{path}: is no mask file; {_WANTED}")
    form = header.metadata.get(FORMAT_KEY, "bool")
    if form not in ("bool", "packed"):
        raise CheckpointError(f"{path}: unknown mask format {shown(form)}, wanted bool or packed")
    if form == "packed":
        return _packed_shapes(path, header)
    for entry in header.entries:
        if entry.dtype != "BOOL":
            raise CheckpointError(f"{path}: mask {shown(entry.name)} has dtype {entry.dtype}, wanted BOOL")
    return {entry.name: entry.shape for entry in header.entries}


def _packed_shapes(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    try:
        stored = strict_json(header.metadata.get(SHAPES_KEY, "{}"))
    except ValueError as error:
        raise CheckpointError(f"{path}: metadata {SHAPES_KEY} is {error}") from error
    shapes = {}
    for entry in header.entries:
        shape = stored.get(entry.name) if isinstance(stored, dict) else None
        if not _is_shape(shape):
            raise CheckpointError(
                f"{path}: packed mask {shown(entry.name)} has the shape {shown(shape)} under "
                f"{SHAPES_KEY} in the metadata, wanted a list of integers from 0 on, whose product is "
                "below 2**63"
            )
        if entry.dtype != "U8" or entry.shape != (packed_bytes(shape),):
            raise CheckpointError(
                f"{path}: packed mask {shown(entry.name)} is {entry.dtype} {list(entry.shape)}, wanted U8 "
                f"[{packed_bytes(shape)}] for the shape {shown(shape)}"
            )
        shapes[entry.name] = tuple(shape)
    return shapes


def _is_shape(shape: object) -> TypeGuard[list[int]]:
    """Whether it is a list of integers from 0 on, of which no product from the left is out of range."""
    if not isinstance(shape, list):
        return False
    if any(type(size) is not int or not 0 <= size <= _LARGEST for size in shape):
        return False
    return all(numel <= _LARGEST for numel in accumulate(shape, mul))


class Provenance(Struct, frozen=True):
    """The run that wrote masks: its report, the tensors listed there, its variables, the text of its spec."""

    report: Path
    tensors: frozenset[str]
    overrides: Mapping[str, str] = struct_field(default_factory=lambda: MappingProxyType({}))
    spec: bytes | None = None


def provenance_of(masks: MaskSet) -> Provenance | None:
    """The run that wrote masks; None where there is no report of sparseprune beside them.

    CheckpointError for a report that is no JSON, MachineError for a file that cannot be read.
    """
    # Beside the one file, or in its folder.
    files = [shard.path for shard in masks.shards]
    stem = files[0].name.removesuffix(SUFFIX)
    stems = (stem.removesuffix(".masks"), stem) if len(files) == 1 else ()
    reports = [files[0].with_name(f"{one}.report.json") for one in stems]
    reports += [file.parent / _REPORT for file in files if file.name.startswith("masks")]
    path = next((report for report in dict.fromkeys(reports) if report.is_file()), None)
    if path is None:
        return None
    report = read_object(path)
    names, were_set = _names(report), report.get("set")
    if names is None:
        return None
    overrides = {name: str(value) for name, value in were_set.items()} if isinstance(were_set, dict) else {}
    return Provenance(path, names, MappingProxyType(overrides), _spec_beside(path))


def _names(report: Mapping[str, Any]) -> frozenset[str] | None:
    """The tensors that a report lists; None where the report is not ours, or incomplete."""
    tensors = report.get("tensors")
    if not str(report.get("schema", "")).startswith("sparseprune.") or not isinstance(tensors, list):
        return None
    names = [tensor.get("name") if isinstance(tensor, dict) else None for tensor in tensors]
    listed = frozenset(name for name in names if isinstance(name, str))
    return listed if len(listed) == len(tensors) else None


def _spec_beside(report: Path) -> bytes | None:
    """The spec beside a report in a folder; an output that is a file has none."""
    spec = report.with_name("spec.toml")
    if report.name != _REPORT or not spec.is_file():
        return None
    with machine_errors(spec, "cannot be read"):
        if spec.stat().st_size > LARGEST_DOCUMENT:
            raise CheckpointError(f"{spec}: larger than {LARGEST_DOCUMENT} bytes; wanted a page of TOML")
        return spec.read_bytes()
