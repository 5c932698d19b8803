"""Where elements belong: for a window of a tensor, the scope and the block of each element.

Plain integer arithmetic on bound shapes, the inverse of what the engine does with strides; which rows
and columns are worth showing is decided here too. How it looks is up to plan_drawing.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, inverse_order, permute, prod
from sparseprune.report.plan import index_of
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparseprune.spec import BoundScopeCoupling

    AnyScope = BoundScope | BoundScopeCoupling

ROWS, COLUMNS = 8, 16
_SHORT = 4  # cells alike that are all shown; of a longer run the first two and the last
_PATIENCE = 2048  # looks along an axis until a run is taken to end


@dataclass(frozen=True, slots=True)
class Cell:
    """What an element belongs to: the number of its scope, and of its block within the scope.

    Both count in row-major order, blocks of a scope coupling member by member, as in the engine.
    """

    scope: int
    block: int


Line = tuple[int | None, ...]
"""Indices along a dimension that are shown, in order; None stands for some that are left out."""


@dataclass(frozen=True, slots=True)
class Window:
    """A part of two dimensions of a tensor, the others being fixed at `begin`.

    `cells[i][j]` is that of row `rows[i]` and column `columns[j]`, None outside the view or where either
    index is None. A vector has one row, `dims` is then its only dimension.
    """

    tensor: str
    shape: Shape
    begin: Shape
    dims: tuple[int, ...]
    rows: Line
    columns: Line
    cells: tuple[tuple[Cell | None, ...], ...]

    @property
    def blocks(self) -> int:
        """How many blocks can be told apart in it."""
        return len({cell for row in self.cells for cell in row if cell is not None})


def view_index(leaf: BoundBlock, element: int) -> Shape | None:
    """The index in the view of an element of the tensor; None for an element outside of it.

    >>> pairs = BoundBlock("w", "w", (4, 8, 2), (16, 1, 8), 0, (1, 1, 2))
    >>> view_index(pairs, 16 + 8 + 3)
    (1, 3, 1)
    """
    dims = sorted(range(len(leaf.view_shape)), key=lambda dim: -leaf.view_stride[dim])
    steps = [(leaf.view_stride[dim], leaf.view_shape[dim]) for dim in dims]
    found = _decomposed(element - leaf.view_offset, steps)
    return None if found is None else permute(found, inverse_order(tuple(dims)))


def _decomposed(rest: int, steps: Sequence[tuple[int, int]]) -> Shape | None:
    """Factors below each size with `sum(factor * step) == rest`; steps fall. None if there are none.

    Views whose dimensions do not interleave have one candidate at each step.
    """
    if not steps:
        return () if rest == 0 else None
    (step, size), smaller = steps[0], steps[1:]
    reach = sum([(count - 1) * other for other, count in smaller])
    if step == 0:
        first = last = 0
    else:
        first, last = max(0, -((reach - rest) // step)), min(size - 1, rest // step)
    for factor in range(last, first - 1, -1):
        found = _decomposed(rest - factor * step, smaller)
        if found is not None:
            return (factor, *found)
    return None


def cell_of(scope: AnyScope, number: int, element: int) -> Cell | None:
    """The cell of an element of the tensor under leaf `number`; None outside of that leaf's view."""
    members = (scope,) if isinstance(scope, BoundScope) else scope.members
    before = 0
    for position, member in enumerate(members):
        if number < len(member.leaves):
            index = view_index(member.leaves[number], element)
            if index is None:
                return None
            where = _in_member(member, number, index)
            if isinstance(scope, BoundScope):
                return Cell(_ravelled(where[0], member.grid_shape), where[1])
            common = permute(where[0], scope.orders[position])
            return Cell(_ravelled(common, scope.grid_shape), before + where[1])
        number -= len(member.leaves)
        before += member.blocks_per_scope
    raise IndexError(f"{scope.label} has no leaf {number}")


def _in_member(member: BoundScope, number: int, index: Shape) -> tuple[Shape, int]:
    """The scope's place in the member's grid of scopes, and the block's number in that scope."""
    leaf = member.leaves[number]
    block = tuple([at // extent for at, extent in zip(index, leaf.shape, strict=True)])
    if isinstance(member.block, BoundBlockCoupling):
        block = permute(block, member.block.orders[number])
    scope = tuple([at // extent for at, extent in zip(block, member.shape, strict=True)])
    within = tuple([at % extent for at, extent in zip(block, member.shape, strict=True)])
    return scope, _ravelled(within, member.shape)


def _ravelled(index: Shape, shape: Shape) -> int:
    number = 0
    for at, size in zip(index, shape, strict=True):
        number = number * size + at
    return number


def window_of(scope: AnyScope, number: int, shape: Shape, rows: int = ROWS, columns: int = COLUMNS) -> Window:
    """The beginning of the view of leaf `number` in a tensor of this shape.

    The last two dimensions, or two others where more blocks can be told apart; at most `rows` and
    `columns` of them, what is left out counted in. A run of lines that are alike is cut in its middle.
    """
    if prod(shape) == 0:
        return Window(scope.leaves[number].tensor, shape, (0,) * len(shape), (), (), (), ())
    rank = len(shape)
    last = (rank - 2, rank - 1)
    pairs = [last, *(pair for pair in combinations(range(rank), 2) if pair != last)]
    best: Window | None = None
    for dims in pairs if rank > 1 else [tuple(range(rank))]:
        window = _window(scope, number, shape, dims, (rows, columns))
        if best is None or window.blocks > best.blocks:
            best = window
    if best is None:
        raise IndexError("a tensor has at least one window")
    return best


def _window(
    scope: AnyScope, number: int, shape: Shape, dims: tuple[int, ...], limits: tuple[int, int]
) -> Window:
    leaf = scope.leaves[number]
    begin = index_of(leaf.view_offset, shape)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # A vector, or a single number, is a matrix of one row.
    axes = [_Axis(0, 1, 0)] * (2 - len(dims)) + [_Axis(begin[dim], shape[dim], strides[dim]) for dim in dims]
    down, across = axes
    origin = leaf.view_offset - down.begin * down.stride - across.begin * across.stride

    def element(i: int, j: int) -> int:
        return origin + i * down.stride + j * across.stride

    def cell(i: int, j: int) -> Cell | None:
        return cell_of(scope, number, element(i, j))

    near = range(across.begin, min(across.begin + limits[1], across.size))
    rows = _shown(
        down,
        limits[0],
        lambda i: [cell(i, j) for j in near],
        lambda i: min([_reach(leaf, element(i, j), down.stride) for j in near]),
    )
    some = [i for i in rows if i is not None]
    columns = _shown(
        across,
        limits[1],
        lambda j: [cell(i, j) for i in some],
        lambda j: min([_reach(leaf, element(i, j), across.stride) for i in some]),
    )
    cells = tuple([tuple([_cell_at(cell, i, j) for j in columns]) for i in rows])
    return Window(leaf.tensor, shape, begin, dims, rows, columns, cells)


@dataclass(frozen=True, slots=True)
class _Axis:
    """A dimension from `begin` on; `stride` in elements of the tensor."""

    begin: int
    size: int
    stride: int


def _cell_at(cell: Callable[[int, int], Cell | None], i: int | None, j: int | None) -> Cell | None:
    return None if i is None or j is None else cell(i, j)


def _shown(
    axis: _Axis, limit: int, line: Callable[[int], list[Cell | None]], reach: Callable[[int], int]
) -> Line:
    """Which indices of an axis to show: all of them, but only the ends of a run of lines that are alike.

    `reach` says how many lines from an index on are alike for sure.
    """
    shown: list[int | None] = []
    start = axis.begin
    while start < axis.size and len(shown) < limit:
        first, end = line(start), start
        for _ in range(_PATIENCE):
            end = min(axis.size, end + reach(end))
            if end == axis.size or line(end) != first:
                break
        long = end - start > _SHORT
        shown += [start, start + 1, None, end - 1] if long else range(start, end)
        start = end
    del shown[limit:]
    while shown[-1] is None:
        shown.pop()
    return tuple(shown) if shown[-1] == axis.size - 1 else (*shown, None)


def _reach(leaf: BoundBlock, element: int, stride: int) -> int:
    """How many elements from this one on, `stride` apart, lie in the same block, or all outside the view.

    At least: 1 where it cannot be seen from the strides, as of a view whose dimensions interleave.
    """
    sizes = zip(leaf.view_stride, leaf.view_shape, leaf.shape, strict=True)
    steps = sorted([step for step in sizes if step[1] > 1], reverse=True)
    smallest = steps[-1][0] if steps else 0
    if stride == 0 or not smallest or stride % smallest or not _nested(steps):
        return 1
    ends, period = [], 0  # the period of a dimension is the step of the next larger one
    for step, size, extent in steps:
        if not period or stride % period:
            at = (element - leaf.view_offset) % period if period else element - leaf.view_offset
            if at < step * size:
                ends.append((at // (step * extent) + 1) * step * extent - at)
            if period:
                ends.append(period - at)
        period = step
    return -(-min(ends) // stride) if ends else sys.maxsize


def _nested(steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether each step leads past all that the smaller ones can reach."""
    return all(
        sum([(size - 1) * smaller for smaller, size, _ in steps[at + 1 :]]) < step
        for at, (step, _, _) in enumerate(steps)
    )
