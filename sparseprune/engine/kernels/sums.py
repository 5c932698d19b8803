"""Sums over the fixed tree of pairs that engine.scoring defines, in float64, so that a norm has one value.

The tree joins neighbours level by level and carries an odd last one along. Built from the left it is a
binary counter: a level holds a sum of 2^level terms until its neighbour is complete. So terms may come in
pieces of any size, and what is kept is one number for each level.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

    Floats = NDArray[np.float64]

_LEVELS = 48  # of a tree over runs: more terms than any tensor has
_COLUMNS = 512  # columns that are added at one time: their levels stay in the cache


def run_sums(bits: Bits, form: Format, run: int, power: int) -> Floats:
    """The sum of |x| ** power, 1 or 2, over each run of so many elements (flat, whole runs), by the tree."""
    sums = np.empty(bits.size // run, dtype=np.float64)
    if form.itemsize == 8:
        _run_sums_wide(np.abs(bits.view(np.float64)), run, power, sums)
    else:
        magnitude, shift = np.uint32(form.magnitude), np.uint32(form.shift)
        infinity = np.uint32(form.infinity)
        _run_sums(bits, (magnitude, shift, infinity), form.scale, (run, power), sums)
    return sums


@dataclass
class TreeSum:
    """Sums along one axis whose terms, arrays of one shape, come in order, a piece at a time."""

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
        if not self._levels:
            raise ValueError("a sum of no terms has no shape")
        levels = sorted(self._levels)
        total = self._levels[levels[0]]
        for level in levels[1:]:
            total = self._levels[level] + total
        return total


def tree_sum(terms: Floats, axis: int) -> Floats:
    """The sum along one axis by the tree; zeros where it has no terms."""
    moved = np.moveaxis(terms, axis, 0)
    if not len(moved):
        return np.zeros(moved.shape[1:])
    tree = TreeSum()
    tree.push(moved)
    return tree.total()


@compiled
def _run_sums(bits, pattern, scale, form, sums):
    magnitude, shift, infinity = pattern
    run, power = form
    levels = np.empty(_LEVELS, dtype=np.float64)
    block = np.empty(_COLUMNS, dtype=np.float64)
    for number in range(sums.size):
        begin = number * run
        done = 0
        while done < run:
            size = min(_COLUMNS, run - done)
            for i in range(size):
                key = np.uint32(bits[begin + done + i]) & magnitude
                value = np.float64(np.uint32(key << shift).view(np.float32)) * scale
                value = np.inf if key >= infinity else value
                block[i] = value * value if power == 2 else value
            _push_block(block, size, done // _COLUMNS, levels, size == _COLUMNS)
            done += size
        sums[number] = _total_of(block, run, levels)


@compiled
def _run_sums_wide(values, run, power, sums):
    levels = np.empty(_LEVELS, dtype=np.float64)
    block = np.empty(_COLUMNS, dtype=np.float64)
    for number in range(sums.size):
        begin = number * run
        done = 0
        while done < run:
            size = min(_COLUMNS, run - done)
            for i in range(size):
                value = values[begin + done + i]
                block[i] = value * value if power == 2 else value
            _push_block(block, size, done // _COLUMNS, levels, size == _COLUMNS)
            done += size
        sums[number] = _total_of(block, run, levels)


@compiled
def _push_block(block, size, number, levels, whole):
    """Sum a block in place by the tree; a whole one is a term of the tree over blocks."""
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


@compiled
def _total_of(block, run, levels):
    """The sum of a finished tree: a level holds one where its bit is set; the last block comes first."""
    whole, rest = run // _COLUMNS, run % _COLUMNS
    total, begun = (block[0], True) if rest else (0.0, False)
    for level in range(_LEVELS):
        if (whole >> level) & 1:
            total = levels[level] + total if begun else levels[level]
            begun = True
    return total


class ColumnSums:
    """The sums of |x| ** power over the rows of a matrix (rows, columns) whose rows come in order."""

    def __init__(self, form: Format, columns: int, rows: int, power: int) -> None:
        self._form = form
        self._power = power
        self._levels = np.empty((max(1, rows.bit_length()), columns), dtype=np.float64)
        self.count = 0

    def push(self, bits: Bits) -> None:
        """Add rows (rows, columns), contiguous, not more in all than were announced."""
        form = self._form
        if form.itemsize == 8:
            _push_rows_wide(np.abs(bits.view(np.float64)), self._power, self._levels, self.count)
        else:
            pattern = (np.uint32(form.magnitude), np.uint32(form.shift), np.uint32(form.infinity))
            _push_rows(bits, pattern, form.scale, self._power, self._levels, self.count)
        self.count += len(bits)

    def total(self) -> Floats:
        """The sums of all rows so far: (columns)."""
        total: Floats | None = None
        for level in range(len(self._levels)):
            if self.count >> level & 1:
                total = self._levels[level] + total if total is not None else self._levels[level]
        return np.zeros(self._levels.shape[1]) if total is None else total.copy()


@compiled
def _push_rows(bits, pattern, scale, power, levels, count):
    magnitude, shift, infinity = pattern
    rows, columns = bits.shape
    block = np.empty(_COLUMNS, dtype=np.float64)
    for first in range(0, columns, _COLUMNS):
        size = min(_COLUMNS, columns - first)
        for row in range(rows):
            for i in range(size):
                key = np.uint32(bits[row, first + i]) & magnitude
                value = np.float64(np.uint32(key << shift).view(np.float32)) * scale
                value = np.inf if key >= infinity else value
                block[i] = value * value if power == 2 else value
            _carry(block, size, levels, first, count + row)


@compiled
def _push_rows_wide(values, power, levels, count):
    rows, columns = values.shape
    block = np.empty(_COLUMNS, dtype=np.float64)
    for first in range(0, columns, _COLUMNS):
        size = min(_COLUMNS, columns - first)
        for row in range(rows):
            for i in range(size):
                value = values[row, first + i]
                block[i] = value * value if power == 2 else value
            _carry(block, size, levels, first, count + row)


@compiled
def _carry(block, size, levels, first, number):
    """Put a row's terms, the `number`-th, where the tree has its place for them."""
    level = 0
    while (number >> level) & 1:
        for i in range(size):
            block[i] = levels[level, first + i] + block[i]
        level += 1
    for i in range(size):
        levels[level, first + i] = block[i]
