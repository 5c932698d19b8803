"""Which N:M patterns elements satisfy: zeros, and how many elements of a group are not zero.

Numpy's own vectorised loops, not compiled ones: they count about as fast as cached pages are read, and there
is nothing to compile, keep or link. 64 elements become one word, whose bits are added up in lanes (SWAR:
Lamport 1975, Multiple Byte Processing with Full-Word Instructions).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits

    Flags = NDArray[np.bool_]

WORD = 64  # elements that one word stands for
_ALL = (1 << WORD) - 1
_BYTES = _ALL // 0xFF  # a one in every byte of a word


def count_zeros(
    bits: Bits, zero_bits: int, groups: Collection[int], scratch: Flags
) -> tuple[int, Mapping[int, int]]:
    """How many elements (flat, unsigned) are zero, and by M of `groups` the most non-zero ones in one group.

    An element is zero where none of the `zero_bits` is set; where there are no such bits none is. A group is
    M neighbours, 1 <= M <= 64; groups are whole. Overwrites `bits` and `scratch`, which holds as many
    elements, rounded up to whole words.

    >>> elements = np.array([0x8000, 1, 0, 0, 5, 6, 7, 0], dtype=np.uint16)
    >>> count_zeros(elements, 0x7FFF, [2, 4, 8], np.empty(WORD, dtype=np.bool_))
    (4, {2: 2, 4: 3, 8: 4})
    """
    if zero_bits == 0:
        return 0, {group: min(group, bits.size) for group in groups}
    nonzero = _nonzero(bits, zero_bits, scratch)
    count = int(np.count_nonzero(nonzero))
    if count in {0, bits.size}:
        return bits.size - count, {group: min(group, count) for group in groups}
    return bits.size - count, {**_fullest_in_words(scratch, bits.size, groups), **_fullest(nonzero, groups)}


def _nonzero(bits: Bits, zero_bits: int, scratch: Flags) -> Flags:
    if zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(zero_bits)
    return np.not_equal(bits, 0, out=scratch[: bits.size])


def _fullest_in_words(scratch: Flags, size: int, groups: Collection[int]) -> dict[int, int]:
    """For every M that divides a word; the elements after `size` are made to count as zero."""
    end = -(-size // WORD) * WORD
    scratch[size:end] = False
    counts, lane = np.packbits(scratch[:end], bitorder="little").view(np.uint64), 1
    fullest = {}
    for group in sorted(group for group in groups if WORD % group == 0):
        while lane < group:
            low = np.uint64(_ALL // ((1 << lane) + 1))  # every second lane
            counts = (counts & low) + (counts >> np.uint64(lane) & low)
            lane *= 2
        fullest[group] = _largest(counts, lane)
    return fullest


def _largest(words: NDArray[np.uint64], lane: int) -> int:
    """The largest number in lanes of so many bits."""
    if lane >= 8:
        return int(words.view(f"u{lane // 8}").max())
    low = np.uint64(_BYTES * ((1 << lane) - 1))
    return max(int((words >> np.uint64(at) & low).view(np.uint8).max()) for at in range(0, 8, lane))


def _fullest(nonzero: Flags, groups: Collection[int]) -> dict[int, int]:
    """For every other M: the first elements of all groups, the second ones and so on are added up."""
    fullest = {}
    for group in (group for group in groups if WORD % group):
        columns = nonzero.view(np.uint8).reshape(-1, group)
        counts = columns[:, 0].copy()
        for column in range(1, group):
            counts += columns[:, column]
        fullest[group] = int(counts.max())
    return fullest
