"""Shapes of grids and einops patterns: arithmetic on dimensions and strides, without tensors."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import floor, prod
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from sparseprune.errors import CouplingError, ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Mapping


Shape = tuple[int, ...]
Orders = Sequence[Sequence[int]] | None
"""For each member of a coupling the order of its grid's dimensions; None for all as they are."""

LARGEST_TILE = 4
"""Rows of a tile of transposable N:M; larger ones have too many patterns to look at all."""

__all__ = [
    "LARGEST_TILE",
    "Orders",
    "Shape",
    "align",
    "block_extents",
    "divide",
    "identity_order",
    "interleaved",
]
__all__ += ["inverse_order", "permute", "prod", "scope_extents", "surviving"]


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


def align(grids: Sequence[Shape], orders: Orders, names: Sequence[str]) -> tuple[Shape, tuple[Shape, ...]]:
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


class Outline(Struct, frozen=True):
    """Shape and strides of a tensor that is not there."""

    shape: Shape
    stride: Shape

    def reshape(self, shape: Sequence[int]) -> Outline:
        """The same elements in the same order; SparsityError where no strides can say that."""
        stride = _strides(self, tuple(shape))
        if stride is None:
            raise SparsityError("a copy")
        return Outline(tuple(shape), stride)

    def transpose(self, order: Sequence[int]) -> Outline:
        """Dimension `order[d]` at place d."""
        return Outline(tuple(self.shape[dim] for dim in order), tuple(self.stride[dim] for dim in order))


def rearranged(shape: Shape, stride: Shape, pattern: str, axes: Mapping[str, int]) -> Outline:
    """The outline that an einops `rearrange` pattern makes of a tensor of this shape and stride.

    >>> rearranged((4, 16), (16, 1), "m (k p j) -> m k j p", {"p": 2, "j": 4})
    Outline(shape=(4, 2, 4, 2), stride=(16, 8, 1, 4))

    Raises:
        ShapeMismatchError: the pattern does not fit the shape.
        SparsityError: the result would be a copy, so that writes would be lost.
    """
    from einops import EinopsError, rearrange  # noqa: PLC0415  (half of the users never need it)

    _backend()
    try:
        return cast("Outline", rearrange(cast("Any", Outline(shape, stride)), pattern, **axes))
    except EinopsError as error:
        raise ShapeMismatchError(
            f"pattern {pattern!r} does not fit a tensor of shape {list(shape)}: "
            f"{' '.join(str(error).split())}"
        ) from error
    except SparsityError as error:
        raise SparsityError(
            f"pattern {pattern!r} is no view of a tensor of shape {list(shape)} and stride {list(stride)}: "
            "it would need a copy, and what is written to a copy is lost"
        ) from error


def _backend() -> None:
    """Tell einops how outlines are reshaped: it finds the subclasses of its backends by itself."""
    from einops._backends import AbstractBackend  # noqa: PLC0415

    if any(backend.framework_name == "sparseprune" for backend in AbstractBackend.__subclasses__()):
        return

    class OutlineBackend(AbstractBackend):
        framework_name = "sparseprune"

        def is_appropriate_type(self, tensor: object) -> bool:
            return isinstance(tensor, Outline)


def _strides(outline: Outline, shape: Shape) -> Shape | None:
    """Strides for a new shape over the same elements, None where there are none.

    From the innermost dimension on, runs of old dimensions that lie together are cut into new ones.
    """
    if prod(outline.shape) == 0 or prod(shape) == 0:
        return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    old = [(size, step) for size, step in zip(outline.shape, outline.stride, strict=True) if size > 1]
    new = list(shape)
    strides: list[int] = []
    while old:
        size, base = old.pop()
        while old and old[-1][1] == base * size:
            size *= old.pop()[0]
        step = base
        while size > 1 and new:
            extent = new.pop()
            if size % extent:
                return None
            strides.append(step)
            step, size = step * extent, size // extent
        if size > 1:
            return None
    strides += [strides[-1] if strides else 1] * len(new)
    return tuple(reversed(strides)) if prod(new) == 1 else None


def index_of(element: int, shape: Shape) -> Shape:
    """The index of an element that is counted in row-major order.

    >>> index_of(7, (2, 4))
    (1, 3)
    """
    index = []
    for extent in reversed(shape):
        index.append(element % extent if extent else 0)
        element = element // extent if extent else 0
    return tuple(reversed(index))
