"""Rows, columns, blocks and slices of one tensor that are zero throughout, added up from what its slabs hold.

Owns what is kept of a group of rows until the rest of it has come, and which slices of each dimension hold
something. Knows neither dtypes nor files. Called by inspection.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.occupancy import count_occupied, ones, unpacked, words_of
from sparseprune.report.facts import Zeros
from sparseprune.report.measuring.blocking import Bits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.engine.kernels.counting import Marks
    from sparseprune.engine.kernels.occupancy import Words
    from sparseprune.report.measuring.blocking import Blocking, Groups, Part

    Told = tuple[tuple[Zeros, ...], Zeros, Zeros, Mapping[str, Zeros]]


@dataclass(slots=True)
class _Open:
    """A group of rows of which so many elements are still to come."""

    words: Words
    left: int


class Occupancy:
    """What is known of the matrices of one tensor; one thread at a time adds what was found, in any order."""

    def __init__(self, blocking: Blocking) -> None:
        self._blocking = blocking
        self._zero = dict.fromkeys(blocking.sizes, 0)
        self._open: dict[tuple[int, int, int], _Open] = {}
        # What is not zero in each slice of a dimension; in columns those of all matrices together.
        self._columns = np.zeros(words_of(blocking.columns), dtype=np.uint64)
        self._stacked = len(blocking.shape) == 3
        self._slices = [np.zeros(size if self._stacked else 0, dtype=np.bool_) for size in blocking.stack[:2]]

    def add(self, whole: Sequence[Groups], parts: Sequence[Part]) -> None:
        """Add what `Blocking.find` gave; a group that becomes whole by it is counted."""
        for groups in whole:
            self._note(groups)
        for part in parts:
            if (completed := self._merged(part)) is not None:
                self._note(completed)

    def told(self) -> Told:
        """The slices of each dimension, rows, columns and blocks, once all slabs were added."""
        return self._slices_told(), *self._blocking.told(self._zero)

    def _merged(self, part: Part) -> Groups | None:
        """The group that a part belongs to, if nothing of it is missing any more."""
        key = part.height, part.matrix, part.group
        if (group := self._open.get(key)) is None:
            rows = min(part.height, self._blocking.rows - part.group * part.height)
            group = self._open[key] = _Open(np.zeros_like(self._columns), rows * self._blocking.columns)
        if part.words is not None:
            group.words[part.word : part.word + len(part.words)] |= part.words
        group.left -= part.elements
        if group.left:
            return None
        del self._open[key]
        matrices, groups = (slice(number, number + 1) for number in (part.matrix, part.group))
        return self._blocking.counted(
            part.height, matrices, groups, Bits(group.words[np.newaxis, np.newaxis])
        )

    def _note(self, found: Groups) -> None:
        for width, zero in found.zero.items():
            self._zero[found.height, width] += zero
        words = found.bits.words
        if self._stacked and found.height == self._blocking.row[0]:
            self._slices[1][found.groups] |= found.bits.filled if words is None else words.any(axis=(0, 2))
        if found.height != self._blocking.column[0]:
            return
        if self._stacked:
            self._slices[0][found.matrices] |= found.bits.filled if words is None else words.any(axis=(1, 2))
        if words is not None:
            self._columns |= np.bitwise_or.reduce(words, axis=(0, 1))
        elif found.bits.filled:
            self._columns |= ones(self._blocking.columns)

    def _slices_told(self) -> tuple[Zeros, ...]:
        rows, columns = self._blocking.rows, self._blocking.columns
        inner = self._blocking.shape[1:]
        if len(inner) > 2:
            marks = unpacked(self._columns, columns).reshape(inner)
            others = [
                tuple(other for other in range(len(inner)) if other != dim) for dim in range(len(inner))
            ]
            last = [_unmarked(np.logical_or.reduce(marks, axis=axes)) for axes in others]
        else:
            last = [Zeros(columns - count_occupied(self._columns, 1, columns), columns)]
        if self._stacked:
            return *map(_unmarked, self._slices), *last
        return Zeros(self._zero[self._blocking.row], rows), *last


def _unmarked(marks: Marks) -> Zeros:
    return Zeros(marks.size - int(np.count_nonzero(marks)), marks.size)
