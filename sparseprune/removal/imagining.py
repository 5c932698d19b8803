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
from sparseprune.execution.arranging import by_leaf
from sparseprune.removal.removing import Removal, make_removal
from sparseprune.removal.slices import Kept, kept_slices
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.removal.geometry import Sliced
    from sparseprune.removal.presuming import Look
    from sparseprune.spec import BoundBlock, BoundInstance

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
    beside: Mapping[str, Mapping[str, Any]],
) -> Imagined:
    """What would be left; `look` has every leaf of the instances as slices; `beside` as in `make_removal`."""
    shapes = {name: stored.shape for name, stored in tensors.items()}
    kept: dict[str, Kept] = {}
    known: dict[tuple[Shape, Sliced, bytes], Kept] = {}  # thousands of tensors lose the same
    for instance in instances:
        for leaf, blocks in _first_ones(instance):
            found, name = look(leaf), leaf.tensor
            if found is None:
                continue
            key = (shapes[name], found, blocks.tobytes())
            if key not in known:
                known[key] = _left(shapes[name], found, blocks)
            kept[name] = known[key] if name not in kept else _both(kept[name], known[key])
    became = {
        name: None if each.is_empty and not each.is_whole else each.shape for name, each in kept.items()
    }
    try:
        return Imagined(became, make_removal(shapes, kept, config, exact=False, beside=beside), ())
    except CheckpointError as error:
        return Imagined(became, None, error.args)


def _left(shape: Shape, found: Sliced, blocks: Flags) -> Kept:
    """What is left of a tensor where these blocks survive; one without dimensions is kept or not."""
    if not shape:
        return Kept((), int(blocks.all()))
    along = [np.ones(size, dtype=np.bool_) for size in shape]
    if along[found.dim].size:
        along[found.dim] = found.kept(blocks)
    return kept_slices(along)


def _both(one: Kept, other: Kept) -> Kept:
    """What two rules leave of a tensor, each of which drops something."""
    return kept_slices([first & second for first, second in zip(one.along, other.along, strict=True)])


def _first_ones(instance: BoundInstance) -> Iterator[tuple[BoundBlock, Flags]]:
    """For every leaf that would lose any the blocks that survive, flat: the first ones of each scope."""
    scope, nnz = instance.scope, instance.budget.nnz
    if (
        not isinstance(scope, BoundScope)
        and prod(scope.grid_shape) == 1
        and scope.blocks_per_scope == len(scope.members)
    ):
        for member in scope.members[nnz:]:  # each a single block
            yield from ((leaf, np.zeros(1, dtype=np.bool_)) for leaf in member.leaves)
        return
    keep = np.zeros((prod(scope.grid_shape), scope.blocks_per_scope), dtype=np.bool_)
    keep[:, :nnz] = True
    for leaf, blocks in by_leaf(scope, keep).items():
        if not blocks.all():
            yield leaf, np.ascontiguousarray(blocks).reshape(-1)
