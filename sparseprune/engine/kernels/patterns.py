"""N:M patterns: how many elements of a group of M neighbours are not zero, and the most in any group.

Numpy's own vectorised loops, not compiled ones: they count about as fast as cached pages are read, and there
is nothing to compile, keep or link. Groups that fit into words of bits are added up in lanes (SWAR: Lamport
1975, Multiple Byte Processing with Full-Word Instructions).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.kernels.occupancy import WORD

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.marking import Flags
    from sparseprune.engine.kernels.occupancy import Words

_ALL = (1 << WORD) - 1
_BYTES = _ALL // 0xFF  # a one in every byte of a word
_FEW = 16  # members that are added up one after the other, each of all groups at one time
_NARROW = 64  # places that are too few to add up group by group
_SOME = 512  # the same limit of members where places are few


def fullest_in_words(words: Words, groups: Collection[int]) -> Mapping[int, int]:
    """By M of `groups` the most ones among the M bits of one group; M divides a word.

    >>> fullest_in_words(np.array([0b1110_0001], dtype=np.uint64), [2, 4, 8])
    {2: 2, 4: 3, 8: 4}
    """
    counts, lane = words, 1
    fullest = {}
    for group in sorted(set(groups)):
        while lane < group:
            low = np.uint64(_ALL // ((1 << lane) + 1))  # every second lane
            counts = (counts & low) + (counts >> np.uint64(lane) & low)
            lane *= 2
        fullest[group] = _largest(counts, lane)
    return fullest


def counts_along(marks: Flags) -> NDArray[Any]:
    """How many of the members of each group are marked: (groups, members, places) gives (groups, places).

    Unsigned integers, wide enough for a count of all members.

    >>> counts_along(np.array([[[True, False], [True, False], [True, True]]]))
    array([[3, 1]], dtype=uint8)
    """
    groups, members, places = marks.shape
    kind = np.min_scalar_type(members)
    numbers = marks.view(np.uint8)
    if members > _FEW and (places == 1 or places >= _NARROW or members > _SOME):
        total: NDArray[Any] = np.add.reduce(numbers, axis=1, dtype=kind)
        return total
    counts = np.zeros((groups, places), dtype=kind)
    for member in range(members):
        counts += numbers[:, member]
    return counts


def _largest(words: Words, lane: int) -> int:
    """The largest number in lanes of so many bits."""
    if lane >= 8:
        return int(words.view(f"u{lane // 8}").max())
    low = np.uint64(_BYTES * ((1 << lane) - 1))
    return max(int((words >> np.uint64(at) & low).view(np.uint8).max()) for at in range(0, 8, lane))
