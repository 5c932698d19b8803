"""Masks: tensors of the shapes of weights that say where one is kept, in the forms in which they are stored.

Owns these forms, how masks are found beside an output or in files of others, and the report of the run that
wrote them. Imports numpy when masks are read, torch in `load_masks` alone. Called by execution and by users.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from msgspec import Struct
from msgspec import field as struct_field
from msgspec.structs import replace

from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX, is_folder, read_weight_map
from sparseprune.checkpoint.documents import LARGEST_DOCUMENT, read_object, shown, strict_json
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.layout import FORMAT_KEY, SHAPES_KEY, packed_bytes
from sparseprune.checkpoint.mask_names import ORIGINAL, masked_name, renamed
from sparseprune.checkpoint.remote import located
from sparseprune.checkpoint.source import StoredTensor, TensorReader, open_shard, open_shards
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError, MachineError, size

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from sparseprune.checkpoint.header import Header
    from sparseprune.checkpoint.source import Checkpoint, Shard, Source

    _Files = tuple[Mapping[Shard, Header], Mapping[str, PurePosixPath]]  # headers, and the weight map if any

_INDEX = "masks" + INDEX_SUFFIX
_SINGLE = "masks" + SUFFIX
_REPORT = "report.json"
_LARGEST = 2**63 - 1  # elements that torch can count
_PIECE = 1 << 16  # numbers that are read at one time
_LOOKED_INTO = 4  # masks of which some numbers are read before any work
_WANTED = (
    "give a mask file, its folder or index, or the output of sparseprune that has masks; the zeros of a "
    "sparse checkpoint are masks by --zeros-of"
)


Form = Literal["bool", "packed", "numbers", "weights"]
"""What stands for an element: a byte, 0 where it is dropped; a bit; a number, 0 or 1; a weight, or zero."""


class StoredMask(Struct, frozen=True):
    """A mask of the weight `name`, which has this shape, and the stored tensor."""

    name: str
    stored: StoredTensor
    shape: tuple[int, ...]
    form: Form

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class MaskSet:
    """The masks of some files, of which all headers were read and no data; each is in one file.

    `missing` has names that an index lists and the file that should hold them, `whole` the names of weights
    that are known to be kept whole, without a mask.
    """

    path: Path
    shards: tuple[Shard, ...]
    masks: Mapping[str, StoredMask] = field(repr=False)
    missing: Mapping[str, PurePosixPath] = field(repr=False)
    whole: frozenset[str] = field(default=frozenset(), repr=False)


def open_masks(path: Path) -> MaskSet:
    """The masks under a path; reads headers, and of masks that are numbers the first few.

    `path` is a mask file, an index of mask files, a folder with either or with mask files and no index, a
    pruned directory, or a pruned file with its masks beside it. Masks are packed bits as sparseprune writes
    them, bools, or numbers that are 0 or 1. They have the names of their weights, or all of them end as names
    of masks do; beside weights those count that are named after one, as torch.nn.utils.prune has them.

    Raises:
        CheckpointError: there are no masks, or they contradict themselves.
    """
    headers, weight_map = _find(path)
    weights = _weights_of(headers.values())
    masks: dict[str, StoredMask] = {}
    for shard, header in headers.items():
        for mask in _masks_in(shard, header, weights):
            other = masks.get(mask.name)
            if other is not None:
                one = f"mask {shown(mask.name)} is also in {other.stored.shard.path}"
                if other.stored.name != mask.stored.name:
                    both = f"{shown(other.stored.name)} and {shown(mask.stored.name)}"
                    one = f"masks {both} are both for {shown(mask.name)}"
                raise CheckpointError(f"{shard.path}: {one}; keep one of them")
            masks[mask.name] = mask
    if not masks and all(FORMAT_KEY not in header.metadata for header in headers.values()):
        raise CheckpointError(f"{path}: holds no masks; {_WANTED}")
    _refuse_weights(masks.values())
    there = {entry.name for header in headers.values() for entry in header.entries}
    missing = MappingProxyType({name: place for name, place in weight_map.items() if name not in there})
    masked = {each for name in masks for each in (name, name + ORIGINAL)}
    stored = {mask.stored.name for mask in masks.values()}
    return MaskSet(path, tuple(headers), MappingProxyType(masks), missing, frozenset(there - stored - masked))


def _masks_in(shard: Shard, header: Header, weights: Mapping[str, str]) -> Iterator[StoredMask]:
    """The masks in a file, in its order; `weights` has those that others wrote, by their stored names."""
    if FORMAT_KEY in header.metadata:
        form: Form = "packed" if header.metadata[FORMAT_KEY] == "packed" else "bool"
        shapes = _mask_shapes(shard.path, header)
        for entry in header.entries:
            yield StoredMask(entry.name, StoredTensor(entry, shard), shapes[entry.name], form)
        return
    for entry in header.entries:
        if entry.name not in weights:
            continue  # a weight beside masks
        row = DTYPES[entry.dtype]
        if not row.zero_bits or row.parts > 1:
            raise CheckpointError(
                f"{shard.path}: {shown(entry.name)} is {entry.dtype}, wanted a mask of bools or of numbers "
                f"that are 0 or 1; {_WANTED}"
            )
        form = "bool" if entry.dtype == "BOOL" else "numbers"
        yield StoredMask(weights[entry.name], StoredTensor(entry, shard), entry.shape, form)


def zeros_as_masks(checkpoint: Checkpoint, names: Iterable[str]) -> MaskSet:
    """Tensors as masks of themselves: what is zero in them is dropped."""
    stored = {name: checkpoint.tensors[name] for name in names}
    masks = {name: StoredMask(name, one, one.shape, "weights") for name, one in stored.items()}
    return MaskSet(checkpoint.path, checkpoint.shards, MappingProxyType(masks), MappingProxyType({}))


def renamed_masks(opened: MaskSet, changes: Mapping[str, str]) -> MaskSet:
    """The masks under the names that `mask_names.renamed` gives; CheckpointError where two become one."""
    names = renamed(opened.masks, changes)
    masks: dict[str, StoredMask] = {}
    for old, new in names.items():
        if new in masks:
            both = f"masks {shown(masks[new].name)} and {shown(old)} both become {shown(new)}"
            raise CheckpointError(f"{opened.path}: {both} by --rename; name them apart")
        masks[new] = opened.masks[old]
    masks = {new: replace(mask, name=new) for new, mask in masks.items()}
    missing = {renamed([name], changes)[name]: place for name, place in opened.missing.items()}
    whole = frozenset(renamed(opened.whole, changes).values())
    return MaskSet(opened.path, opened.shards, MappingProxyType(masks), MappingProxyType(missing), whole)


def read_kept(reader: Source, mask: StoredMask, first: int, count: int) -> NDArray[np.uint8]:
    """One byte for each of the elements [first, first + count), row-major: 1 where it is kept, else 0.

    ValueError outside of the mask, CheckpointError where a number is neither 0 nor 1.
    """
    import numpy as np  # noqa: PLC0415  (headers are read without numpy)

    from sparseprune.engine.kernels.selecting import unpack  # noqa: PLC0415

    if not 0 <= first <= first + count <= mask.numel:
        raise ValueError(f"elements {first} to {first + count} of mask {mask.name!r}, which has {mask.numel}")
    kept = np.empty(count, dtype=np.uint8)
    if mask.form == "bool":
        reader.read_into(mask.stored, first, kept)
        # Any byte but 0 means kept; read as a bool, a byte other than 0 and 1 would be invalid.
        np.not_equal(kept, 0, out=kept.view(np.bool_))
        return kept
    if mask.form != "packed":
        for begin in range(0, count, _PIECE):
            part = kept[begin : begin + _PIECE]
            _read_nonzero(reader, mask, first + begin, part)
        return kept
    begin, end = first // 8, -(-(first + count) // 8)
    packed = np.empty(end - begin, dtype=np.uint8)
    reader.read_into(mask.stored, begin, packed)
    if first % 8:
        kept[:] = np.unpackbits(packed, count=first % 8 + count, bitorder="little")[first % 8 :]
    else:
        unpack(packed, kept)
    return kept


def _read_nonzero(reader: Source, mask: StoredMask, first: int, kept: NDArray[np.uint8]) -> None:
    """Fill `kept` with 1 where elements from `first` on are not zero; numbers of a mask must be 1 there."""
    import numpy as np  # noqa: PLC0415

    row = DTYPES[mask.stored.dtype]
    bits = np.empty(kept.size, dtype=f"uint{row.bits}")
    reader.read_into(mask.stored, first * row.itemsize, bits)
    if mask.stored.codes is not None:
        from sparseprune.checkpoint.decoding import zero_patterns  # noqa: PLC0415

        zeros = zero_patterns(reader, mask.stored, [(first, kept.size)])
        bits -= bits.dtype.type(0) if zeros is None else zeros
    magnitude = bits & bits.dtype.type(row.zero_bits or 0)
    np.not_equal(magnitude, 0, out=kept.view(np.bool_))
    if mask.form == "weights":
        return
    from sparseprune.engine.kernels.formats import values_of  # noqa: PLC0415

    values = values_of(bits, mask.stored.dtype)
    wrong = kept.view(np.bool_) & (values != 1)
    if wrong.any():
        at = int(np.argmax(wrong))
        place = [int(one) for one in np.unravel_index(first + at, mask.shape)]
        raise CheckpointError(
            f"{mask.stored.shard.path}: {shown(mask.stored.name)} has {values[at]:g} at {place}, wanted a "
            f"mask of 0 and 1 alone; {_WANTED}"
        )


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """The masks under a path as bool tensors of their weights' names and shapes, True where kept.

    `path` is as in `open_masks`; CheckpointError if there are no masks, or if one stands in two files.
    """
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415

    masks: dict[str, torch.Tensor] = {}
    with TensorReader() as reader:
        for name, mask in open_masks(located(path)).masks.items():
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
    listed = _listed(path / indexes[0]) if len(indexes) == 1 else None
    if listed is not None and all(map(_holds_masks, listed[0].values())):
        return listed
    headers = dict(open_shards(path, [PurePosixPath(name) for name in names if name.endswith(SUFFIX)]))
    if _beside_weights(headers.values()):
        return headers, {}
    found = {shard: header for shard, header in headers.items() if _holds_masks(header)}
    if found:
        return found, {}
    if not headers:
        raise CheckpointError(f"{path}: holds no masks; {_WANTED}")
    return listed or (headers, {})  # of numbers, perhaps


def _listed(index: Path) -> _Files:
    weight_map = read_weight_map(index)
    return dict(open_shards(index.parent, sorted(set(weight_map.values())))), weight_map


def _beside(path: Path) -> tuple[Shard, Header]:
    """The file itself if it holds masks, else the masks that were written with it; else it again."""
    found = open_shard(path)
    masks = path.with_name(f"{path.name.removesuffix(SUFFIX)}.masks{SUFFIX}")
    if _holds_masks(found[1]) or _beside_weights([found[1]]) or not masks.is_file():
        return found
    return open_shard(masks)


def _holds_masks(header: Header) -> bool:
    """Whether sparseprune wrote a file, or all its tensors are bools, which mean the same, or named so."""
    entries = header.entries
    if FORMAT_KEY in header.metadata or not entries:
        return FORMAT_KEY in header.metadata
    return all(one.dtype == "BOOL" for one in entries) or all(masked_name(one.name) for one in entries)


def _beside_weights(headers: Iterable[Header]) -> dict[str, str]:
    """The masks that are named after weights of their shape beside them, and these weights."""
    shapes = {entry.name: entry.shape for header in headers for entry in header.entries}
    found = {}
    for name, shape in shapes.items():
        weight = masked_name(name)
        if weight is not None and shape in (shapes.get(weight + ORIGINAL), shapes.get(weight)):
            found[name] = weight
    return found


def _weights_of(headers: Iterable[Header]) -> Mapping[str, str]:
    """The stored names of masks in files that others wrote, and the weights that they are for."""
    headers = [header for header in headers if FORMAT_KEY not in header.metadata]
    names = [entry.name for header in headers for entry in header.entries]
    spoken = {name: weight for name in names if (weight := masked_name(name)) is not None}
    return _beside_weights(headers) or (
        spoken if len(spoken) == len(set(names)) else {one: one for one in names}
    )


def _refuse_weights(masks: Iterable[StoredMask]) -> None:
    """CheckpointError if numbers that may be masks are others than 0 and 1: some of the largest are read."""
    numbers = sorted((one for one in masks if one.form == "numbers"), key=lambda one: -one.numel)
    with TensorReader() as reader:
        for mask in numbers[:_LOOKED_INTO]:
            first = max(0, mask.numel - _PIECE) // 2
            read_kept(reader, mask, first, min(_PIECE, mask.numel - first))


def _mask_shapes(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """The shape of every mask in a file that we wrote; CheckpointError where header and metadata disagree."""
    form = header.metadata[FORMAT_KEY]
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
            raise CheckpointError(f"{spec}: larger than {size(LARGEST_DOCUMENT)}; wanted a page of TOML")
        return spec.read_bytes()
