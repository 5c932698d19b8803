"""Weights that torch.nn.utils.prune keeps in two: `X_orig` beside its mask `X_mask`, where a model has `X`.

Owns how such pairs are recognized, and the checkpoint as it is once they are folded into one. Called where
masks are put back, and where such a checkpoint is refused or noted.
"""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparseprune.checkpoint.codes import codes_in
from sparseprune.checkpoint.documents import shown
from sparseprune.checkpoint.header import Header
from sparseprune.checkpoint.mask_names import ORIGINAL
from sparseprune.checkpoint.source import StoredTensor
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.checkpoint.source import Checkpoint

_MASK = "_mask"


def split_weights(checkpoint: Checkpoint) -> dict[str, str]:
    """The weights that are kept in two, by the names of their originals."""
    tensors = checkpoint.tensors
    found = {}
    for name, stored in tensors.items():
        weight = name.removesuffix(ORIGINAL)
        mask = tensors.get(weight + _MASK)
        if weight != name and mask is not None and mask.shape == stored.shape and weight not in tensors:
            found[name] = weight
    return found


def folded(checkpoint: Checkpoint, weights: Mapping[str, str]) -> Checkpoint:
    """The checkpoint with the originals under the names of their weights and without the masks.

    Its data is still read from the same places: headers list what counts, and describe no file.
    """
    masks = {weight + _MASK for weight in weights.values()}
    headers = {}
    for shard, header in checkpoint.headers.items():
        entries = [
            replace(entry, name=weights.get(entry.name, entry.name))
            for entry in checkpoint.counted(shard)
            if entry.name not in masks
        ]
        headers[shard] = Header(tuple(entries), header.metadata, header.raw)
    entries_of = ((entry, shard) for shard, header in headers.items() for entry in header.entries)
    codes = codes_in(checkpoint.tensors)
    tensors = {entry.name: StoredTensor(entry, shard, codes.get(entry.name)) for entry, shard in entries_of}
    return dataclasses.replace(checkpoint, headers=headers, tensors=MappingProxyType(tensors))


def split_line(checkpoint: Checkpoint) -> str | None:
    """What to do with weights that are kept in two, as a line; None where there are none."""
    found = split_weights(checkpoint)
    if not found:
        return None
    original, weight = next(iter(found.items()))
    more = f" and {len(found) - 1:,} more weights" if len(found) > 1 else ""
    path = checkpoint.path
    return (
        f"{path}: torch.nn.utils.prune keeps {shown(weight)}{more} in two, such as {shown(original)} with "
        f"{shown(weight + _MASK)}; sparseprune reapply {path} {path} makes one of them"
    )


def refuse_split(checkpoint: Checkpoint) -> None:
    """CheckpointError where weights are kept in two, so that no tensor has the zeros."""
    line = split_line(checkpoint)
    if line is not None:
        raise CheckpointError(line)
