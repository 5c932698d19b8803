"""Sweeps: one way through a leaf's elements, in the order of the storage, that sums them up block by block.

Owns where a leaf may be cut so that the sum over each block still runs over the fixed tree of pairs: the last
dimension of a block is summed first. Pure arithmetic on bound shapes; the sums are summed.py's.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.boxes import Box, storage_order

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.spec import BoundBlock


@dataclass(frozen=True, slots=True)
class Sweep:
    """A leaf in chunks: one place of every `outer` dimension, `step` places of dimension `cut`, all others.

    `inside` says that chunks end inside blocks. `numbers` are held for the leaf until all of it has passed.
    """

    leaf: BoundBlock
    outer: Shape
    cut: int
    step: int
    inside: bool
    numbers: int

    def chunks(self, stored: StoredTensor) -> Iterator[Box]:
        """All elements, in the order of the storage."""
        leaf = self.leaf
        span = leaf.shape[self.cut] if self.inside else leaf.view_shape[self.cut]
        for places in product(*(range(leaf.view_shape[dim]) for dim in self.outer)):
            for first in range(0, leaf.view_shape[self.cut], max(1, span)):
                for begin in range(first, first + span, self.step):
                    yield self._chunk(stored, places, begin, min(self.step, first + span - begin))

    def _chunk(self, stored: StoredTensor, places: tuple[int, ...], begin: int, size: int) -> Box:
        starts, extents = [0] * len(self.leaf.view_shape), list(self.leaf.view_shape)
        for dim, place in zip(self.outer, places, strict=True):
            starts[dim], extents[dim] = place, 1
        starts[self.cut], extents[self.cut] = begin, size
        return Box(self.leaf, stored, tuple(starts), tuple(extents))


def sweep_of(leaf: BoundBlock, elements: int) -> Sweep | None:
    """The sweep of a leaf in chunks of about so many elements, None where none keeps the order of the sums.

    >>> from sparseprune.spec import BoundBlock
    >>> columns = sweep_of(BoundBlock("w", "w", (64, 16), (16, 1), 0, (64, 1)), 256)
    >>> columns.step, columns.inside
    (16, True)
    """
    order = storage_order(leaf)
    if not order:
        return None
    level, behind = 0, prod(leaf.view_shape) // max(1, leaf.view_shape[order[0]])
    while behind > elements:
        level += 1
        behind //= leaf.view_shape[order[level]]
    outer, cut = order[:level], order[level]
    extent = leaf.shape[cut]
    inside = extent > 1 and extent * behind > elements
    step = max(1, elements // max(1, behind))
    if not inside:
        step = extent * max(1, step // extent)
    fused = [dim for dim, size in enumerate(leaf.shape) if size > 1]
    inner = [dim for dim in fused if dim not in outer]
    open_dims = [dim for dim in fused if dim in outer]
    if open_dims and inner and max(open_dims) > min(inner):
        return None
    waiting = prod(tuple(leaf.shape[dim] for dim in inner if inside and dim < cut))
    unfinished = prod(tuple(leaf.shape[dim] for dim in open_dims))
    levels = 1 + (leaf.shape[cut].bit_length() if inside else 0)
    return Sweep(leaf, outer, cut, step, inside, prod(leaf.grid_shape) * (unfinished + waiting * levels))
