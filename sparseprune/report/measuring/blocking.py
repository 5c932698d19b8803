"""Which rows, columns and blocks the matrices of a shape have, and which of them a slab of bits holds.

Owns this arithmetic, once for all tensors of a shape, and counts what a slab holds wholly; what it holds in
part is told as it is. Knows neither dtypes nor files. Called by occupancy.py and inspection.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.occupancy import WORD, count_occupied, joined, ones
from sparseprune.report.facts import Zeros, matrices_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.occupancy import Words
    from sparseprune.report.facts import BlockShape
    from sparseprune.report.measuring.slabs import Slab

Size = tuple[int, int]  # rows and columns of a block


@dataclass(frozen=True, slots=True)
class Bits:
    """What is not zero: bits (matrices, rows, words), or None where all elements are alike.

    `filled` says what they are then: not one zero, or nothing else.
    """

    words: Words | None
    filled: bool = False


@dataclass(frozen=True, slots=True)
class Groups:
    """Whole groups of `height` rows, in each of some matrices; of `bits` one row is one group.

    `zero` counts, by the width of a block, those blocks of the groups that are zero.
    """

    height: int
    matrices: slice
    groups: slice
    bits: Bits
    zero: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Part:
    """Some elements of one group, their joined bits (None: all zero) from a word of the group's row on."""

    height: int
    matrix: int
    group: int
    word: int
    words: Words | None
    elements: int


class Blocking:
    """The blocks of a tensor of two dimensions or more, as its matrices are cut; never changes.

    All are blocks, cut off at the edges of a matrix: a row has the height 1, a column the width 1.
    """

    def __init__(self, shape: Shape, blocks: Sequence[BlockShape]) -> None:
        stack = matrices_of(shape)
        if stack is None:
            raise ValueError(f"no matrix has the shape {shape}")
        self.shape, self.stack = shape, stack
        self.matrices, self.rows, self.columns = stack
        self.row, self.column = self._cut_off(1, self.columns), self._cut_off(self.rows, 1)
        self.blocks = {str(block): self._cut_off(block.rows, block.columns) for block in blocks}
        self.sizes = tuple(sorted({self.row, self.column, *self.blocks.values()}))
        self._heights = sorted({height for height, _ in self.sizes})

    @property
    def multiple(self) -> int:
        """In slabs of so many rows no block is cut, nor in slabs of whole matrices."""
        return math.lcm(*self._heights[:-1])

    def find(self, slab: Slab, bits: Bits) -> tuple[list[Groups], list[Part]]:
        """The groups of rows that a slab holds: the whole ones, counted, and parts of others."""
        if slab.columns < self.columns:
            words = _row_of(bits, 0, slab.columns)
            return [], [_part(height, slab.row // height, slab, words) for height in self._heights]
        whole: list[Groups] = []
        parts: list[Part] = []
        matrices = slice(slab.matrix, slab.matrix + slab.matrices)
        end = slab.row + slab.rows
        for height, joint in zip(self._heights, self._joints(slab, bits), strict=True):
            first, last = slab.row // height, -(-end // height)
            begin = first + (slab.row % height > 0)
            stop = last - (end % height > 0 and end < self.rows)
            if begin < stop:
                inner = joint if joint.words is None else Bits(joint.words[:, begin - first : stop - first])
                whole.append(self.counted(height, matrices, slice(begin, stop), inner))
            parts.extend(
                _part(height, group, slab, _row_of(joint, group - first, slab.columns))
                for group in sorted({first, last - 1})
                if not begin <= group < stop
            )
        return whole, parts

    def counted(self, height: int, matrices: slice, groups: slice, bits: Bits) -> Groups:
        """Whole groups, with the number of their blocks that are zero."""
        number = (matrices.stop - matrices.start) * (groups.stop - groups.start)
        zero = {}
        for width in (width for other, width in self.sizes if other == height):
            zero[width] = 0 if bits.filled else number * -(-self.columns // width)
            if bits.words is not None:
                zero[width] -= count_occupied(np.ascontiguousarray(bits.words), width, self.columns)
        return Groups(height, matrices, groups, bits, zero)

    def told(self, zero: Mapping[Size, int]) -> tuple[Zeros, Zeros, Mapping[str, Zeros]]:
        """Rows, columns and the blocks that were asked for, of which so many of each size are zero."""
        rows = Zeros(zero[self.row], self.matrices * self.rows)
        columns = Zeros(zero[self.column], self.matrices * self.columns)
        blocks = {
            name: Zeros(
                zero[height, width], self.matrices * -(-self.rows // height) * -(-self.columns // width)
            )
            for name, (height, width) in self.blocks.items()
        }
        return rows, columns, MappingProxyType(blocks)

    def _cut_off(self, height: int, width: int) -> Size:
        return max(1, min(height, self.rows)), max(1, min(width, self.columns))

    def _joints(self, slab: Slab, bits: Bits) -> Iterator[Bits]:
        """By height the groups that a slab touches, its rows joined: taller groups from shorter ones."""
        aligned: dict[int, Words] = {}
        for height in self._heights:
            head = min(-slab.row % height, slab.rows)
            if bits.words is None:
                yield bits
            elif head:
                groups = joined(bits.words[:, :head], head), joined(bits.words[:, head:], height)
                yield Bits(np.concatenate(groups, axis=1))
            else:
                below = max((other for other in aligned if height % other == 0), default=1)
                aligned[height] = joined(aligned.get(below, bits.words), height // below)
                yield Bits(aligned[height])


def _row_of(bits: Bits, row: int, columns: int) -> Words | None:
    """One row of the first matrix; None where it is zero."""
    if bits.words is not None:
        joint: Words = bits.words[0, row]
        return joint
    return ones(columns) if bits.filled else None


def _part(height: int, group: int, slab: Slab, words: Words | None) -> Part:
    rows = min(slab.row + slab.rows, (group + 1) * height) - max(slab.row, group * height)
    return Part(height, slab.matrix, group, slab.column // WORD, words, rows * slab.columns)
