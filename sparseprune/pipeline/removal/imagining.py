"""Imagining: what would be left if the first blocks of each scope survived, in place of the best ones.

It tells shapes and numbers, and nothing that depends on which blocks they are. Called by presuming.py, which
does without numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.errors import CheckpointError
from sparseprune.pipeline.arranging import by_leaf
from sparseprune.pipeline.removal.removing import Removal, make_removal
from sparseprune.pipeline.removal.slices import Kept, kept_slices

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.pipeline.removal.presuming import Look
    from sparseprune.spec import BoundInstance

    Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Imagined:
    """The shapes of what is left, None for nothing; of the whole checkpoint, or the problems in the way."""

    shapes: Mapping[str, Shape | None]
    removal: Removal | None
    problems: tuple[str, ...]


def imagine(
    tensors: Mapping[str, StoredTensor],
    instances: Iterable[BoundInstance],
    look: Look,
    config: Mapping[str, Any] | None,
) -> Imagined:
    """What would be left; `look` has every leaf of the instances as slices."""
    along: dict[str, list[Flags]] = {}
    for instance in instances:
        _drop(instance, tensors, look, along)
    shapes = {name: stored.shape for name, stored in tensors.items()}
    # Tensors without dimensions have no flags: they are kept or not.
    kept = {
        name: Kept((), each.elements) if not shapes[name] else each
        for name, flags in along.items()
        for each in (kept_slices(flags),)
    }
    became = {
        name: None if each.is_empty and not each.is_whole else each.shape for name, each in kept.items()
    }
    try:
        return Imagined(became, make_removal(shapes, kept, config, exact=False), ())
    except CheckpointError as error:
        return Imagined(became, None, error.args)


def _drop(
    instance: BoundInstance, tensors: Mapping[str, StoredTensor], look: Look, along: dict[str, list[Flags]]
) -> None:
    """Take out of `along` what would go."""
    scope = instance.scope
    keep = np.zeros((prod(scope.grid_shape), scope.blocks_per_scope), dtype=np.bool_)
    keep[:, : instance.budget.nnz] = True
    for leaf, blocks in by_leaf(scope, keep).items():
        found = None if blocks.all() else look(leaf)
        if found is None:
            continue
        shape = tensors[leaf.tensor].shape or (1,)
        flags = along.setdefault(leaf.tensor, [np.ones(size, dtype=np.bool_) for size in shape])
        if flags[found.dim].size:
            flags[found.dim] = flags[found.dim] & found.kept(np.ascontiguousarray(blocks).reshape(-1))
