"""Shapes: views, blocks and scopes of tensors whose shapes are known, and couplings of them.

All arithmetic is that of `engine.grids`, so that a shape means here what it means there; its errors pass
through. Knows neither tables nor captures. Called by `binding`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

from sparseprune.engine.grids import (
    Shape,
    align,
    block_extents,
    divide,
    identity_order,
    permute,
    scope_extents,
)
from sparseprune.errors import CouplingError
from sparseprune.spec.bound import BoundBlock, BoundBlockCoupling, BoundScope, BoundScopeCoupling

if TYPE_CHECKING:
    from collections.abc import Sequence

Member = TypeVar("Member", BoundBlock, BoundScope)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a view lie: `stride` and `offset` count those of the row-major tensor."""

    shape: Shape
    stride: Shape
    offset: int = 0


def blocks_in(layout: Layout, shape: Shape, tensor: Shape) -> Shape:
    """The extents of blocks in a view of a tensor of some shape; ShapeMismatchError where they do not fit."""
    return _blocks(layout.shape, shape, "tensor" if layout.shape == tensor else "view")


def scope_of(label: str, block: BoundBlock | BoundBlockCoupling, shape: Shape) -> BoundScope:
    """Scopes over a block grid; ShapeMismatchError where they do not fit."""
    return BoundScope(label, block, _scopes(_grid(block), shape))


def fuse(
    label: str, members: Sequence[Sequence[BoundBlock]], orders: Sequence[Shape] | None
) -> BoundBlockCoupling:
    """Blocks of several tensors as one; CouplingError where their grids do not align."""
    return BoundBlockCoupling(label, *_coupled(members, orders))


def compete(
    label: str, members: Sequence[Sequence[BoundScope]], orders: Sequence[Shape] | None
) -> BoundScopeCoupling:
    """Scopes that share a budget; CouplingError where their grids do not align."""
    return BoundScopeCoupling(label, *_coupled(members, orders))


def _coupled(
    groups: Sequence[Sequence[Member]], orders: Sequence[Shape] | None
) -> tuple[tuple[Member, ...], tuple[Shape, ...]]:
    """All members as one list, of one rank, with one order each; `orders` has one for each group."""
    rank = max(len(member.shape) for group in groups for member in group)
    given = orders or [identity_order(rank)] * len(groups)
    flat = [(member, order) for group, order in zip(groups, given, strict=True) for member in group]
    members = tuple([_widened(member, rank) for member, _ in flat])
    full = tuple([_widened_order(order, len(member.shape), rank) for member, order in flat])
    grids = tuple([_grid(member) for member in members])
    if not _align(grids, full):
        align(grids, full, [member.label for member in members])  # raises, with the names
    return members, full


def _widened(part: Member, rank: int) -> Member:
    """The same elements with unit dimensions appended, until the grid has this rank."""
    if len(part.shape) == rank:
        return part
    ones = (1,) * (rank - len(part.shape))
    if isinstance(part, BoundScope):
        return replace(part, block=_widened_block(part.block, rank), shape=part.shape + ones)
    view_shape, view_stride = part.view_shape + ones, part.view_stride + ones
    return replace(part, view_shape=view_shape, view_stride=view_stride, shape=part.shape + ones)


def _widened_block(block: BoundBlock | BoundBlockCoupling, rank: int) -> BoundBlock | BoundBlockCoupling:
    if isinstance(block, BoundBlock):
        return _widened(block, rank)
    members = tuple(_widened(member, rank) for member in block.members)
    orders = tuple(_widened_order(order, len(order), rank) for order in block.orders)
    return replace(block, members=members, orders=orders)


def _widened_order(order: Shape, grid_rank: int, rank: int) -> Shape:
    """An order of a member's own grid, for the grid with unit dimensions appended; others as they are."""
    return (*order, *range(grid_rank, rank)) if len(order) == grid_rank < rank else order


def _grid(part: BoundBlock | BoundBlockCoupling | BoundScope) -> Shape:
    """`part.grid_shape`, by arithmetic that is done once for all parts of one shape."""
    if isinstance(part, BoundBlock):
        return _divided(part.view_shape, part.shape)
    if isinstance(part, BoundBlockCoupling):
        return permute(_grid(part.members[0]), part.orders[0])
    return _divided(_grid(part.block), part.shape)


# A checkpoint has thousands of tensors of a handful of shapes.
@lru_cache(maxsize=1024)
def whole(shape: Shape) -> Layout:
    """The layout of all of a tensor."""
    return Layout(shape, _contiguous_stride(shape))


@lru_cache(maxsize=1024)
def _blocks(view_shape: Shape, shape: Shape, what: str) -> Shape:
    """The extents of blocks in a view."""
    extents = block_extents(view_shape, shape)
    divide(view_shape, extents, "block", what)
    return extents


@lru_cache(maxsize=1024)
def _scopes(grid: Shape, shape: Shape) -> Shape:
    """The extents of scopes in a block grid."""
    extents = scope_extents(grid, shape)
    divide(grid, extents, "scope", "block grid")
    return extents


@lru_cache(maxsize=128)
def _align(grids: tuple[Shape, ...], orders: tuple[Shape, ...]) -> bool:
    try:
        align(grids, orders, [""] * len(grids))
    except CouplingError:
        return False
    return True


@lru_cache(maxsize=1024)
def _divided(whole: Shape, part: Shape) -> Shape:
    return divide(whole, part)


def _contiguous_stride(shape: Shape) -> Shape:
    """Elements from one index to the next in each dimension of a row-major tensor.

    >>> _contiguous_stride((4, 3, 2))
    (6, 2, 1)
    """
    sizes = [max(size, 1) for size in shape[:0:-1]]
    return tuple(accumulate(sizes, int.__mul__, initial=1))[::-1] if shape else ()
