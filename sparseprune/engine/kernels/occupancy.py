"""Which rows, columns and blocks of matrices hold anything but zeros, on one bit for each element.

64 neighbours of a row are one word; every row begins with a word of its own, and bits after its end are 0.
Owns this form and what is counted in it, all with numpy's own loops; knows neither dtypes nor files. Called
by what measures checkpoints.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.marking import Flags

    Words = NDArray[np.uint64]

WORD = 64  # elements that one word stands for
_BYTES = ((1 << WORD) - 1) // 0xFF  # a one in every byte of a word
_NARROW = 16  # columns that are best made bits one after the other, those of all rows at one time
_FEW = 8  # rows that are best joined one after the other, those of all groups at one time


def words_of(columns: int) -> int:
    """How many words a row takes."""
    return -(-columns // WORD)


def packed(marks: Flags) -> Words:
    """Bits of marks (matrices, rows, columns), a contiguous array: (matrices, rows, words).

    >>> packed(np.array([[[True, True, False], [False, False, True]]]))
    array([[[3],
            [4]]], dtype=uint64)
    """
    matrices, rows, columns = marks.shape
    words = words_of(columns)
    if columns % WORD == 0:
        flat = np.packbits(marks.reshape(-1), bitorder="little")
        return flat.view(np.uint64).reshape(matrices, rows, words)
    if columns < _NARROW:
        bits = marks[..., 0].astype(np.uint64)
        for column in range(1, columns):
            bits |= marks[..., column].astype(np.uint64) << np.uint64(column)
        return bits[..., np.newaxis]
    padded = np.zeros((matrices, rows, words * WORD), dtype=np.bool_)
    padded[..., :columns] = marks
    return packed(padded)


def unpacked(words: Words, columns: int) -> Flags:
    """The marks of rows of bits: (..., words) gives (..., columns)."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=columns, bitorder="little")
    return bits.view(np.bool_)


def ones(columns: int) -> Words:
    """A row that is full.

    >>> ones(66)
    array([18446744073709551615,                    3], dtype=uint64)
    """
    words = np.full(words_of(columns), (1 << WORD) - 1, dtype=np.uint64)
    if columns % WORD:
        words[-1] = (1 << columns % WORD) - 1
    return words


def joined(words: Words, height: int) -> Words:
    """Every `height` rows as one that has the bits of them all; the last rows of a matrix may be fewer.

    (matrices, rows, words) gives (matrices, ceil(rows / height), words).
    """
    rows = words.shape[1]
    if height == 1 or rows < 2:
        return words
    if height > _FEW:
        return np.bitwise_or.reduceat(words, range(0, rows, height), axis=1)
    groups = words[:, ::height].copy()
    for row in range(1, min(height, rows)):
        more = words[:, row::height]
        groups[:, : more.shape[1]] |= more
    return groups


def count_occupied(words: Words, width: int, columns: int) -> int:
    """How many runs of `width` columns have a bit that is set, over all rows (..., words) of so many columns.

    The last run of a row may be shorter.

    >>> rows = packed(np.array([[[True, False, False, False, True], [True, True, False, False, False]]]))
    >>> [count_occupied(rows, width, 5) for width in (1, 2, 3, 5)]
    [4, 3, 3, 2]
    """
    if width >= columns:
        return int(np.count_nonzero(words.any(axis=-1)))
    if width % WORD == 0:
        runs = range(0, words.shape[-1], width // WORD)
        return int(np.count_nonzero(np.bitwise_or.reduceat(words, runs, axis=-1)))
    if WORD % width:
        marks = unpacked(words, columns)
        return int(np.count_nonzero(np.logical_or.reduceat(marks, range(0, columns, width), axis=-1)))
    if width >= 8:
        return int(np.count_nonzero(words.view(f"u{width // 8}")))
    lane = _BYTES * ((1 << width) - 1)
    lanes = (words & np.uint64(lane << at) for at in range(0, 8, width))
    return sum(int(np.count_nonzero(each.view(np.uint8))) for each in lanes)
