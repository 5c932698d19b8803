"""How stacks of matrices are cut into slabs: consecutive elements that are read at one time.

Owns the arithmetic of places. Knows neither files nor what is counted in a slab. Called by what measures
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from sparseprune.engine.kernels.occupancy import WORD, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

Stack = tuple[int, int, int]  # matrices, rows, columns


@dataclass(frozen=True, slots=True)
class Slab:
    """Whole matrices of a stack, or whole rows of one, or a part of one row that begins at a whole word."""

    matrix: int
    matrices: int
    row: int
    rows: int
    column: int
    columns: int

    @property
    def shape(self) -> Stack:
        return self.matrices, self.rows, self.columns

    @property
    def numel(self) -> int:
        return self.matrices * self.rows * self.columns

    def begin(self, stack: Stack) -> int:
        """The place of its first element among all of the stack."""
        _, rows, columns = stack
        return (self.matrix * rows + self.row) * columns + self.column


def slab_bytes(size: int) -> int:
    """The most bytes of a slab where about `size` are wanted: it holds a word of elements at least."""
    return max(size, WORD * 8)


def cut(stack: Stack, itemsize: int, size: int, multiple: int = 1) -> Iterator[Slab]:
    """Slabs of at most about `size` bytes, elements or bits of rows, in the order of the elements.

    Where several rows fit but not a matrix, their number is a multiple of `multiple` if so many fit.
    """
    matrices, rows, columns = stack
    if 0 in stack:
        return
    fitting = _fitting_rows(columns, itemsize, size)
    if fitting >= rows:
        step = fitting // rows
        for matrix in range(0, matrices, step):
            yield Slab(matrix, min(step, matrices - matrix), 0, rows, 0, columns)
    elif fitting:
        step = fitting // multiple * multiple or fitting
        for matrix, row in product(range(matrices), range(0, rows, step)):
            yield Slab(matrix, 1, row, min(step, rows - row), 0, columns)
    else:
        step = _fitting_columns(itemsize, size)
        for matrix, row, column in product(range(matrices), range(rows), range(0, columns, step)):
            yield Slab(matrix, 1, row, 1, column, min(step, columns - column))


def cut_by_columns(stack: Stack, itemsize: int, size: int) -> Iterator[Slab]:
    """The same slabs, but of rows that are cut the same part of all rows of a matrix comes together."""
    matrices, rows, columns = stack
    if _fitting_rows(columns, itemsize, size):
        yield from cut(stack, itemsize, size)
        return
    step = _fitting_columns(itemsize, size)
    for matrix, column, row in product(range(matrices), range(0, columns, step), range(rows)):
        yield Slab(matrix, 1, row, 1, column, min(step, columns - column))


def _fitting_rows(columns: int, itemsize: int, size: int) -> int:
    return size // max(1, columns * itemsize, words_of(columns) * WORD // 8)


def _fitting_columns(itemsize: int, size: int) -> int:
    return max(1, size // (itemsize * WORD)) * WORD
