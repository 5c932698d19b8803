"""Sums in float64 over the fixed tree of pairs that engine.scoring defines, so that a norm has one value.

The tree adds neighbours level by level and carries an odd last one along. Built from the left it is a binary
counter: a level keeps a sum of 2^level terms until its neighbour is complete. So terms may come in pieces of
any size, and one number for each level is enough. Called by execution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, inlined, value_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

    Floats = NDArray[np.float64]

_LEVELS = 48  # of a tree: more than any tensor needs
_SHORT, _SIDE_BY_SIDE = 32, 64  # runs of up to 32 elements are added 64 at one time
_COLUMNS = 512  # columns to add at one time, so that their levels stay in the cache


def run_sums(bits: Bits, form: Format, run: int, power: int) -> Floats:
    """The sum of |x| ** power, 1 or 2, over each `run` of elements (flat, whole runs), by the tree."""
    sums = np.empty(bits.size // run, dtype=np.float64)
    rest = (*form.numbers, form.scale, run, power)
    if _COLUMNS % run == 0:
        _even_sums(bits, bits.size, *rest, np.empty(_COLUMNS), sums)
    elif run <= _SHORT:
        _short_sums(bits, sums.size, *rest, np.empty(run * _SIDE_BY_SIDE), sums)
    else:
        _run_sums(bits, sums.size, *rest, np.empty(_LEVELS), np.empty(_COLUMNS), sums)
    return sums


@dataclass
class TreeSum:
    """A sum of terms, arrays of one shape, that come in order, a piece at a time."""

    count: int = 0
    _levels: dict[int, Floats] = field(default_factory=dict)

    def push(self, terms: Floats) -> None:
        """Add terms: (terms, *shape)."""
        level, place = 0, self.count
        self.count += len(terms)
        while len(terms):
            if place & 1:
                pending = self._levels.pop(level)
                terms = np.concatenate([pending[None], terms])
                place -= 1
            if len(terms) & 1:
                self._levels[level] = terms[-1].copy()
            pairs = len(terms) // 2 * 2
            terms = terms[0:pairs:2] + terms[1:pairs:2]
            level, place = level + 1, place >> 1

    def total(self) -> Floats:
        """The sum of all terms so far; ValueError where there were none."""
        total = _added(self._levels[level] for level in sorted(self._levels))
        if total is None:
            raise ValueError("a sum of no terms has no shape")
        return total


def _added(levels: Iterable[Floats]) -> Floats | None:
    """The sum of a tree's levels, the lowest first; None without any."""
    total: Floats | None = None
    for one in levels:
        total = one if total is None else one + total
    return total


def tree_sum(terms: Floats, axis: int) -> Floats:
    """The sum along one axis by the tree; zeros where it has no terms."""
    moved = np.moveaxis(terms, axis, 0)
    if not len(moved):
        return np.zeros(moved.shape[1:])
    tree = TreeSum()
    tree.push(moved)
    return tree.total()


class ColumnSums:
    """The sums of |x| ** power over the rows of a matrix (rows, columns) whose rows come in order."""

    def __init__(self, form: Format, columns: int, rows: int, power: int) -> None:
        self._form = form
        self._power = power
        self._levels = np.empty((max(1, rows.bit_length()), columns), dtype=np.float64)
        self._block = np.empty(_COLUMNS)
        self.count = 0

    def push(self, bits: Bits) -> None:
        """Add rows (rows, columns), contiguous, not more in all than were announced."""
        form = self._form
        rest = (self._power, self.count, self._levels, self._block)
        _push_rows(bits, *bits.shape, *form.numbers, form.scale, *rest)
        self.count += len(bits)

    def total(self) -> Floats:
        """The sums of all rows so far: (columns)."""
        total = _added(one for level, one in enumerate(self._levels) if self.count >> level & 1)
        return np.zeros(self._levels.shape[1]) if total is None else total.copy()


def storage_order(view: NDArray[Any]) -> list[int]:
    """The dimensions of a view, those whose neighbours lie farthest apart first."""
    return sorted(range(view.ndim), key=lambda dim: (view.shape[dim] == 1, -view.strides[dim]))


def block_sums(view: Bits, rank: int, form: Format, power: int) -> Floats:
    """The sum of |x| ** power over each block of (*grid, *block), where the grid has `rank` dimensions.

    By the tree, over the last dimension of blocks first. There is a copy only if elements do not lie
    together, or if neither the last dimension nor blocks side by side come last in the storage.
    """
    grid = view.shape[:rank]
    if not view.size:
        return np.zeros(grid)
    rank, view = sum(size > 1 for size in grid), view.squeeze()
    order, last = storage_order(view), view.ndim - 1
    columns = order[::-1].index(last) if last >= rank else 0
    laid = view.transpose(order)
    if not laid.flags.c_contiguous or any(dim >= rank for dim in order[len(order) - columns :]):
        laid, order, columns = np.ascontiguousarray(view), list(range(view.ndim)), 0
    if last < rank:
        sums = run_sums(laid.reshape(-1), form, 1, power).reshape(laid.shape)
    else:
        order.remove(last)
        outer, rows, width = laid.shape[: last - columns], view.shape[last], laid.shape[last - columns + 1 :]
        sums = _sums_of_rows(laid.reshape(-1, rows, prod(width)), form, power).reshape(outer + width)
    sums = sums.transpose(np.argsort(order))
    while sums.ndim > rank:
        sums = tree_sum(sums, -1)
    return sums.reshape(grid)


def _sums_of_rows(matrices: Bits, form: Format, power: int) -> Floats:
    """The sums over the rows of (matrices, rows, columns): (matrices, columns)."""
    count, rows, columns = matrices.shape
    if columns == 1:
        return run_sums(matrices.reshape(-1), form, rows, power)
    sums = np.empty((count, columns))
    for matrix, own in zip(matrices, sums, strict=True):
        tree = ColumnSums(form, columns, rows, power)
        tree.push(matrix)
        own[...] = tree.total()
    return sums


@compiled("void(K*, int64, K, uint32, K, float64, int64, int64, float64*, float64*)")
def _even_sums(bits, size, magnitude, shift, infinity, scale, run, power, block, sums):
    """Runs of 2^level elements that lie in a block: each of its sums is a node of the tree over the block."""
    for begin in range(0, size, _COLUMNS):
        count = _COLUMNS if size - begin > _COLUMNS else size - begin
        _fill(bits, begin, count, magnitude, shift, infinity, scale, power, block)
        left = count // run
        while count > left:
            count = count // 2
            for i in range(count):
                block[i] = block[2 * i] + block[2 * i + 1]
        first = begin // run
        for i in range(left):
            sums[first + i] = block[i]


@compiled("void(K*, int64, K, uint32, K, float64, int64, int64, float64*, float64*)")
def _short_sums(bits, runs, magnitude, shift, infinity, scale, run, power, block, sums):
    """Adds runs side by side: each row of the block has one term of every run; the tree adds the rows."""
    for begin in range(0, runs, _SIDE_BY_SIDE):
        count = _SIDE_BY_SIDE if runs - begin > _SIDE_BY_SIDE else runs - begin
        for i in range(run):
            for number in range(count):
                pattern = bits[(begin + number) * run + i]
                value = value_of(pattern, magnitude, shift, infinity) * scale
                block[i * _SIDE_BY_SIDE + number] = value * value if power == 2 else value
        size = run
        while size > 1:
            pairs = size // 2
            for pair in range(pairs):
                one, other = 2 * pair * _SIDE_BY_SIDE, (2 * pair + 1) * _SIDE_BY_SIDE
                for number in range(count):
                    block[pair * _SIDE_BY_SIDE + number] = block[one + number] + block[other + number]
            if size & 1:
                for number in range(count):
                    block[pairs * _SIDE_BY_SIDE + number] = block[(size - 1) * _SIDE_BY_SIDE + number]
            size = pairs + (size & 1)
        for number in range(count):
            sums[begin + number] = block[number]


@compiled("void(K*, int64, K, uint32, K, float64, int64, int64, float64*, float64*, float64*)")
def _run_sums(bits, runs, magnitude, shift, infinity, scale, run, power, levels, block, sums):
    for number in range(runs):
        for done in range(0, run, _COLUMNS):
            size = _COLUMNS if run - done > _COLUMNS else run - done
            begin = number * run + done
            _fill(bits, begin, size, magnitude, shift, infinity, scale, power, block)
            _push_block(block, size, done // _COLUMNS, levels)
        sums[number] = _total_of(block, run, levels)


@inlined
def _fill(bits, begin, size, magnitude, shift, infinity, scale, power, block):
    """The terms |x| ** power of some elements."""
    for i in range(size):
        value = value_of(bits[begin + i], magnitude, shift, infinity) * scale
        block[i] = value * value if power == 2 else value


@inlined
def _push_block(block, size, number, levels):
    """Sum a block in place by the tree; a whole block is a term of the tree over blocks."""
    whole = size == _COLUMNS
    while size > 1:
        pairs = size // 2
        for i in range(pairs):
            block[i] = block[2 * i] + block[2 * i + 1]
        if size & 1:
            block[pairs] = block[size - 1]
        size = pairs + (size & 1)
    if whole:
        total, level = block[0], 0
        while (number >> level) & 1:
            total = levels[level] + total
            level += 1
        levels[level] = total


@inlined
def _total_of(block, run, levels):
    """The sum of a finished tree: a last block that is not whole, then the levels whose bit is set."""
    whole, rest = run // _COLUMNS, run % _COLUMNS
    total, begun = (block[0], True) if rest else (0.0, False)
    level = 0
    while whole >> level:
        if (whole >> level) & 1:
            total = levels[level] + total if begun else levels[level]
            begun = True
        level += 1
    return total


@compiled("void(K*, int64, int64, K, uint32, K, float64, int64, int64, float64*, float64*)")
def _push_rows(bits, rows, columns, magnitude, shift, infinity, scale, power, count, levels, block):
    for first in range(0, columns, _COLUMNS):
        size = _COLUMNS if columns - first > _COLUMNS else columns - first
        for row in range(rows):
            begin = row * columns + first
            _fill(bits, begin, size, magnitude, shift, infinity, scale, power, block)
            _carry(block, size, levels, columns, first, count + row)


@inlined
def _carry(block, size, levels, columns, first, number):
    """Add the terms of row `number` to the tree."""
    level = 0
    while (number >> level) & 1:
        begin = level * columns + first
        for i in range(size):
            block[i] = levels[begin + i] + block[i]
        level += 1
    begin = level * columns + first
    for i in range(size):
        levels[begin + i] = block[i]
