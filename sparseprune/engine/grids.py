"""The arithmetic of shapes: what -1 spans, how often a part fits into a whole, how orders align grids.

Plain integers and tuples, no tensors: the engine and the binding of specs both call it, so that a
shape means the same in Python, in TOML and in a plan that is made from headers alone.
"""

from __future__ import annotations

import operator
from math import floor, prod
from typing import TYPE_CHECKING

from sparseprune.errors import CouplingError, ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

Shape = tuple[int, ...]

__all__ = [
    "Shape",
    "align",
    "block_extents",
    "divide",
    "identity_order",
    "interleaved",
    "inverse_order",
    "permute",
    "prod",
    "scope_extents",
    "surviving",
]


def block_extents(view_shape: Shape, shape: Sequence[int]) -> Shape:
    """The block's extent in each dimension of a view; -1 spans it, an empty shape is one element.

    >>> block_extents((8, 6), (-1, 2)), block_extents((8, 6), ())
    ((8, 2), (1, 1))
    """
    if len(shape) == 0:
        return (1,) * len(view_shape)
    if len(shape) != len(view_shape):
        raise ShapeMismatchError(
            f"block shape {list(shape)} has {len(shape)} dimensions, the view {list(view_shape)} has "
            f"{len(view_shape)}: give one extent for each (-1 spans a dimension)"
        )
    return _spanned("block", view_shape, shape)


def scope_extents(grid_shape: Shape, shape: Sequence[int]) -> Shape:
    """The scope's extent in blocks in each dimension of a grid; -1 and missing dimensions are spanned.

    >>> scope_extents((8, 6), (1,)), scope_extents((8, 6), ())
    ((1, 6), (8, 6))
    """
    if len(shape) > len(grid_shape):
        raise ShapeMismatchError(
            f"scope shape {list(shape)} has {len(shape)} dimensions, the block grid {list(grid_shape)} has "
            f"only {len(grid_shape)}"
        )
    padded = (*shape, *(-1,) * (len(grid_shape) - len(shape)))
    return _spanned("scope", grid_shape, padded)


def divide(whole: Shape, part: Shape, what: str = "block", of: str = "view") -> Shape:
    """How many parts fit along each dimension of the whole; ShapeMismatchError where one does not divide.

    >>> divide((8, 6), (4, 2))
    (2, 3)
    """
    for dim, (size, extent) in enumerate(zip(whole, part, strict=True)):
        if size % extent:
            raise ShapeMismatchError(
                f"dimension {dim} of the {of} {list(whole)} is {size}, which the {what} shape {list(part)} "
                f"cuts in pieces of {extent}: {size} is not a multiple of {extent}"
            )
    return tuple(size // extent for size, extent in zip(whole, part, strict=True))


def identity_order(rank: int) -> Shape:
    """The order that leaves a grid of this rank as it is."""
    return tuple(range(rank))


def inverse_order(order: Shape) -> Shape:
    """The order that undoes another.

    >>> inverse_order((1, 2, 0))
    (2, 0, 1)
    """
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def interleaved(outer: Shape, inner: Shape) -> Shape:
    """The extents of two shapes in turn.

    >>> interleaved((8, 6), (1, 2))
    (8, 1, 6, 2)
    """
    return tuple(size for pair in zip(outer, inner, strict=True) for size in pair)


def permute(shape: Shape, order: Shape) -> Shape:
    """`result[d] = shape[order[d]]`, the reading of `orders` everywhere."""
    return tuple(shape[dim] for dim in order)


def align(
    grids: Sequence[Shape], orders: Sequence[Sequence[int]] | None, names: Sequence[str]
) -> tuple[Shape, tuple[Shape, ...]]:
    """The one grid that all members share once permuted by their orders, and the orders as tuples.

    Without orders (None, or an empty sequence) every grid is taken as it is.

    >>> align([(8, 1), (1, 8)], [(0, 1), (1, 0)], ["up", "down"])
    ((8, 1), ((0, 1), (1, 0)))
    """
    if not grids:
        raise CouplingError("a coupling needs at least one member")
    if orders is None or len(orders) == 0:
        orders = [identity_order(len(grid)) for grid in grids]
    if len(orders) != len(grids):
        raise CouplingError(f"{len(grids)} members but {len(orders)} orders: give one order for each member")
    checked = tuple(tuple(map(operator.index, order)) for order in orders)
    for grid, order, name in zip(grids, checked, names, strict=True):
        if sorted(order) != list(range(len(grid))):
            raise CouplingError(
                f"order {list(order)} of {name} is no permutation of the {len(grid)} dimensions of its "
                f"grid {list(grid)}"
            )
    common = permute(grids[0], checked[0])
    for grid, order, name in zip(grids, checked, names, strict=True):
        if permute(grid, order) != common:
            raise CouplingError(
                f"{name} has grid {list(grid)}, which its order {list(order)} turns into "
                f"{list(permute(grid, order))}; {names[0]} gives {list(common)}: all members of a coupling "
                "must share one grid"
            )
    return common, checked


def surviving(sparsity: float, blocks: int) -> int:
    """What is left of so many blocks once the whole number of pruned ones is taken away, never below 0.

    >>> surviving(0.25, 10), surviving(0.3, 4), surviving(1.0, 10)
    (8, 3, 0)
    """
    return max(0, blocks - floor(min(sparsity, 1.0) * blocks))


def _spanned(what: str, whole: Shape, shape: Sequence[int]) -> Shape:
    for dim, extent in enumerate(shape):
        if extent != -1 and extent < 1:
            raise ShapeMismatchError(
                f"{what} shape {list(shape)} has {extent} in dimension {dim}: "
                "extents are 1 or more, or -1 for the whole dimension"
            )
    return tuple(max(size, 1) if extent == -1 else extent for size, extent in zip(whole, shape, strict=True))
