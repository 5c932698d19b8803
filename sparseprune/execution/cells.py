"""Cells: the parts of a scope grid, and of the blocks in one scope, that are worked on at one time.

Owns how orders lead from a common grid to members and leaves, and where grids are cut: along the outermost
dimension in the storage first, so that what is read lies together. Pure arithmetic on bound shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.boxes import Box, storage_order
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.spec import BoundBlockCoupling, BoundScopeCoupling

    AnyBlock = BoundBlock | BoundBlockCoupling
    AnyScope = BoundScope | BoundScopeCoupling


@dataclass(frozen=True, slots=True)
class Part:
    """`extent` places in each dimension of some grid, from `begin` on."""

    begin: Shape
    extent: Shape

    @property
    def numel(self) -> int:
        return prod(self.extent)

    def scaled(self, factor: Shape) -> Part:
        """The same part of a grid whose places are cut in `factor` each."""
        return Part(_times(self.begin, factor), _times(self.extent, factor))

    def behind(self, order: Shape) -> Part:
        """The part of a member's grid that `order` permutes onto this part of the common grid."""
        begin, extent = [0] * len(order), [0] * len(order)
        for common, own in enumerate(order):
            begin[own], extent[own] = self.begin[common], self.extent[common]
        return Part(tuple(begin), tuple(extent))

    def within(self, outer: Shape) -> Part:
        """The same part, counted from `outer`."""
        return Part(tuple(a - b for a, b in zip(self.begin, outer, strict=True)), self.extent)


def whole_part(grid: Shape) -> Part:
    return Part((0,) * len(grid), grid)


def members_of(scope: AnyScope) -> tuple[tuple[BoundScope, Shape], ...]:
    """The member scopes, each with the order that permutes its grid onto the common one."""
    if isinstance(scope, BoundScope):
        return ((scope, tuple(range(len(scope.shape)))),)
    return tuple(zip(scope.members, scope.orders, strict=True))


def leaves_of(block: AnyBlock) -> tuple[tuple[BoundBlock, Shape], ...]:
    """The leaves, each with the order that permutes its grid onto the common one."""
    if isinstance(block, BoundBlock):
        return ((block, tuple(range(len(block.shape)))),)
    return tuple(zip(block.members, block.orders, strict=True))


def numel_per_scope(scope: AnyScope) -> int:
    """How many elements the blocks of one scope have, over all members."""
    return sum(member.blocks_per_scope * member.block.numel_per_block for member, _ in members_of(scope))


def cells(scope: AnyScope, limit: int) -> Iterator[Part]:
    """The grid of scopes in parts of at most `limit` elements, or of one scope where that has more."""
    member, order = members_of(scope)[0]
    dims = _outermost_first(member.block, order)
    yield from cut(whole_part(scope.grid_shape), dims, limit // max(1, numel_per_scope(scope)))


def tiles(member: BoundScope, part: Part, limit: int) -> Iterator[Part]:
    """A part of a member's block grid in parts of at most `limit` elements, or of one block."""
    dims = _outermost_first(member.block, tuple(range(len(part.extent))))
    yield from cut(part, dims, limit // max(1, member.block.numel_per_block))


def cut(part: Part, dims: Sequence[int], places: int) -> Iterator[Part]:
    """A part in smaller ones of at most so many places (at least 1), cut along the first of `dims` first."""
    if not part.numel:
        return
    extent = list(part.extent)
    for dim in dims:
        if prod(extent) <= max(1, places):
            break
        rest = prod(extent) // extent[dim]
        extent[dim] = max(1, places // rest)
    starts = [range(0, size, step) for size, step in zip(part.extent, extent, strict=True)]
    for offset in product(*starts):
        yield Part(
            tuple(a + b for a, b in zip(part.begin, offset, strict=True)),
            tuple(
                min(step, size - place) for step, size, place in zip(extent, part.extent, offset, strict=True)
            ),
        )


def block_part(member: BoundScope, order: Shape, cell: Part) -> Part:
    """The blocks of a member, on its own block grid, that belong to a part of the common grid of scopes."""
    return cell.behind(order).scaled(member.shape)


def boxes_of(block: AnyBlock, part: Part, tensors: Mapping[str, StoredTensor]) -> dict[BoundBlock, Box]:
    """The elements of a part of a block grid, leaf by leaf."""
    boxes = {}
    for leaf, order in leaves_of(block):
        elements = part.behind(order).scaled(leaf.shape)
        boxes[leaf] = Box(leaf, tensors[leaf.tensor], elements.begin, elements.extent)
    return boxes


def grid_box(block: AnyBlock, part: Part, stored: StoredTensor) -> Box:
    """The numbers that a tensor of a block grid's shape holds for a part of it."""
    grid = block.grid_shape
    steps = tuple(prod(grid[dim + 1 :]) for dim in range(len(grid)))
    return Box(
        BoundBlock(block.label, stored.name, grid, steps, 0, (1,) * len(grid)),
        stored,
        part.begin,
        part.extent,
    )


def _outermost_first(block: AnyBlock, order: Shape) -> Shape:
    """The dimensions of a common grid of scopes, as the first leaf's dimensions lie in its storage."""
    leaf, own = leaves_of(block)[0]
    return tuple(order.index(own.index(dim)) for dim in storage_order(leaf))


def _times(shape: Shape, factor: Shape) -> Shape:
    return tuple(a * b for a, b in zip(shape, factor, strict=True))
