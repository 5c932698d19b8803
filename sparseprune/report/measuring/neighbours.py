"""N:M patterns whose groups lie apart, or are too long for a word of bits: a pass of its own for each.

Owns along which dimension the groups of a pattern lie, which patterns need such a pass, and what is kept of a
group until the rest of it has come. Called by inspection.py.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.occupancy import WORD, counts_along

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.counting import Marks
    from sparseprune.report.facts import Pattern
    from sparseprune.report.measuring.slabs import Slab, Stack


class Apart:
    """One pattern that needs a pass of its own, over a stack: (groups, members, places).

    Each place is a group of its own, of all members. Slabs are added by any thread, in any order.
    """

    def __init__(self, pattern: Pattern, stack: Stack) -> None:
        self.pattern = pattern
        self.stack = stack
        self.broken = False
        self._open: dict[tuple[int, int], tuple[NDArray[Any], int]] = {}  # counts, and members still to come
        self._lock = threading.Lock()

    def add(self, slab: Slab, marks: Marks) -> None:
        """The elements of a slab: True where one is not zero."""
        counts = counts_along(marks.reshape(slab.shape))
        if slab.rows < self.stack[1]:
            counts = self._with_others(slab, counts)
        if counts.max() > self.pattern.kept:
            self.broken = True

    def _with_others(self, slab: Slab, counts: NDArray[Any]) -> NDArray[Any]:
        """The counts of groups of which a slab holds some members, those that came before included."""
        key = slab.matrix, slab.column
        with self._lock:
            before, left = self._open.pop(key, (np.zeros(1, dtype=np.uint32), self.stack[1]))
            total: NDArray[Any] = before + counts
            if left > slab.rows:
                self._open[key] = total, left - slab.rows
        return total


def stack_of(shape: Shape, pattern: Pattern) -> Stack | None:
    """The stack that a pattern looks at; None where a tensor has not its dimension, in whole groups.

    >>> from sparseprune.report.facts import Pattern
    >>> [stack_of((6, 8), pattern) for pattern in (Pattern(2, 4), Pattern(1, 3, 0), Pattern(2, 4, 0))]
    [(12, 4, 1), (2, 3, 8), None]
    """
    rank = len(shape)
    if rank < 2 or 0 in shape or not -rank <= pattern.axis < rank or shape[pattern.axis] % pattern.group:
        return None
    places = prod(shape[pattern.axis % rank + 1 :])
    return prod(shape) // (pattern.group * places), pattern.group, places


def fits_words(shape: Shape, pattern: Pattern) -> bool:
    """Whether its groups are neighbours in rows of bits, and a word holds whole ones."""
    return WORD % pattern.group == 0 and pattern.axis in {-1, len(shape) - 1}
