"""Mask files back into tensors, in either form.

Owns how masks are found beside or inside an output. Imports torch only when masks are loaded. Called
by users through `sparseprune.load_masks`.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sparseprune.checkpoint.documents import shown, strict_json
from sparseprune.checkpoint.folder import INDEX_SUFFIX, RESULTS, SUFFIX, read_weight_map
from sparseprune.checkpoint.header import read_header
from sparseprune.checkpoint.layout import FORMAT_KEY, SHAPES_KEY, packed_bytes
from sparseprune.checkpoint.source import Shard, StoredTensor, TensorReader
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sparseprune.checkpoint.header import Header

_INDEX = "masks" + INDEX_SUFFIX
_SINGLE = "masks" + SUFFIX
_WANTED = "give a mask file, its folder or index, or the output of sparseprune that has masks"


def load_masks(path: str | Path) -> dict[str, torch.Tensor]:
    """The masks under a path as bool tensors of their weights' names and shapes, True where kept.

    `path` is a mask file (bool or packed), an index of mask files, a folder that holds either, a pruned
    directory, or a pruned file that has its masks beside it. CheckpointError if there are no masks.
    """
    masks: dict[str, torch.Tensor] = {}
    for file in _mask_files(Path(path)):
        header = read_header(file)
        shapes = _mask_shapes(file, header)
        shard = Shard(file, header, PurePosixPath(file.name))
        with TensorReader() as reader:
            for entry in header.entries:
                data = reader.read(StoredTensor(entry, shard))
                packed = header.metadata.get(FORMAT_KEY) == "packed"
                masks[entry.name] = _tensor(data, shapes[entry.name], packed=packed)
    return masks


def _mask_files(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return _listed(path) if path.name.endswith(INDEX_SUFFIX) else (_beside(path),)
    for folder in (path, path / RESULTS):
        if (folder / _INDEX).is_file():
            return _listed(folder / _INDEX)
        if (folder / _SINGLE).is_file():
            return (folder / _SINGLE,)
    raise CheckpointError(f"{path}: holds no masks; {_WANTED}")


def _listed(index: Path) -> tuple[Path, ...]:
    return tuple(index.parent / place for place in sorted(set(read_weight_map(index).values())))


def _beside(path: Path) -> Path:
    """The file itself if it holds masks, else the masks that were written with it."""
    if _holds_masks(read_header(path)):
        return path
    masks = path.with_name(f"{path.name.removesuffix(SUFFIX)}.masks{SUFFIX}")
    if masks.is_file():
        return masks
    raise CheckpointError(f"{path}: is no mask file, and there is no {masks.name} beside it; {_WANTED}")


def _holds_masks(header: Header) -> bool:
    """Written by sparseprune, or bool tensors throughout, which mean the same."""
    if FORMAT_KEY in header.metadata:
        return True
    return bool(header.entries) and all(entry.dtype == "BOOL" for entry in header.entries)


def _mask_shapes(path: Path, header: Header) -> dict[str, tuple[int, ...]]:
    """The shape of every mask in a file; CheckpointError where the file is not what it says it is."""
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
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise CheckpointError(
                f"{path}: packed mask {shown(entry.name)} has the shape {shown(shape)} under "
                f"{SHAPES_KEY} in the metadata, wanted a list of integers from 0 on"
            )
        if entry.dtype != "U8" or entry.shape != (packed_bytes(shape),):
            raise CheckpointError(
                f"{path}: packed mask {shown(entry.name)} is {entry.dtype} {list(entry.shape)}, wanted U8 "
                f"[{packed_bytes(shape)}] for the shape {shown(shape)}"
            )
        shapes[entry.name] = tuple(shape)
    return shapes


def _tensor(data: bytearray, shape: tuple[int, ...], *, packed: bool) -> torch.Tensor:
    import numpy as np  # noqa: PLC0415  (headers are read without numpy and torch)
    import torch  # noqa: PLC0415

    kept = np.frombuffer(data, dtype=np.uint8)
    if packed:
        kept = np.unpackbits(kept, count=int(np.prod(shape, dtype=np.int64)), bitorder="little")
    # Compared, not reinterpreted: a byte that is neither 0 nor 1 is no bool.
    return torch.from_numpy(kept != 0).reshape(shape)
