"""Boxes: parts of a leaf's view, and where their elements lie in the stored tensor.

Owns the way from places in a view to runs of stored elements. Pure arithmetic on bound shapes; what is
read and written there is traffic's business, which part is needed when is that of the programs.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import Shape, prod

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.spec import BoundBlock

Run = tuple[int, int]
"""Neighbouring elements of a stored tensor: the number of the first one, and how many."""


@dataclass(frozen=True, slots=True)
class Box:
    """`extent` places in each dimension of a leaf's view, from `begin` on.

    `stored` is the tensor that is read by the leaf's strides: its own, or one of the same shape.
    """

    leaf: BoundBlock
    stored: StoredTensor
    begin: Shape
    extent: Shape

    @property
    def numel(self) -> int:
        return prod(self.extent)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.stored.dtype].bits // 8

    @property
    def first(self) -> int:
        """The stored element of the box's first place."""
        steps = zip(self.begin, self.leaf.view_stride, strict=True)
        return self.leaf.view_offset + sum(place * step for place, step in steps)

    @property
    def storage_order(self) -> Shape:
        """The dimensions from the outermost in the storage to the innermost."""
        return storage_order(self.leaf)

    def runs(self) -> Iterator[Run]:
        """The stored elements of the box, in the order of the storage, neighbours joined."""
        if not self.numel:
            return
        stride = self.leaf.view_stride
        dims = [dim for dim in self.storage_order if self.extent[dim] > 1]
        length = 1
        while dims and stride[dims[-1]] == length:
            length *= self.extent[dims.pop()]
        yield from ((first, length) for first in self._firsts(dims, self.first))

    def part(self, dim: int, begin: int, end: int) -> Box:
        """The places from `begin` to `end` of one dimension, counted from the box's own first."""
        starts, extents = list(self.begin), list(self.extent)
        starts[dim] += begin
        extents[dim] = end - begin
        return Box(self.leaf, self.stored, tuple(starts), tuple(extents))

    def _firsts(self, dims: list[int], first: int) -> Iterator[int]:
        if not dims:
            yield first
            return
        dim, rest = dims[0], dims[1:]
        step = self.leaf.view_stride[dim]
        for place in range(self.extent[dim]):
            yield from self._firsts(rest, first + place * step)


def whole_box(leaf: BoundBlock, stored: StoredTensor) -> Box:
    """All places of a leaf's view."""
    return Box(leaf, stored, (0,) * len(leaf.view_shape), leaf.view_shape)


def storage_order(leaf: BoundBlock) -> Shape:
    """The dimensions of a view from the outermost in the storage to the innermost; stable among equals."""
    return tuple(sorted(range(len(leaf.view_shape)), key=lambda dim: -leaf.view_stride[dim]))


def flat_leaf(leaf: BoundBlock) -> BoundBlock:
    """A view that is a row-major look at neighbouring elements, seen as one dimension."""
    return replace(leaf, view_shape=(prod(leaf.view_shape),), view_stride=(1,), shape=(1,))


def is_row_major_run(leaf: BoundBlock) -> bool:
    """Whether a view is a row-major look at neighbouring elements, the whole tensor or a part of it."""
    return all(
        size == 1 or leaf.view_stride[dim] == prod(leaf.view_shape[dim + 1 :])
        for dim, size in enumerate(leaf.view_shape)
    )


def gaps(stored: StoredTensor, leaves: Iterable[BoundBlock]) -> Iterator[Run]:
    """The elements of a stored tensor that none of some disjoint leaves reaches, as runs."""
    end = 0
    for first, count in heapq.merge(*(_ascending(leaf, stored) for leaf in leaves)):
        if first > end:
            yield end, first - end
        end = first + count
    if end < stored.numel:
        yield end, stored.numel - end


def _ascending(leaf: BoundBlock, stored: StoredTensor) -> Iterable[Run]:
    """The runs of a leaf by their first elements; sorted where rows lie between each other."""
    runs = whole_box(leaf, stored).runs()
    reach = 0  # from the first to the last element of what lies further in
    for dim in reversed(storage_order(leaf)):
        if leaf.view_shape[dim] > 1:
            if leaf.view_stride[dim] <= reach:
                return sorted(runs)
            reach += (leaf.view_shape[dim] - 1) * leaf.view_stride[dim]
    return runs
