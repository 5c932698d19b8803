"""Groups of columns that trade members: which of two groups each of their columns belongs to, to lose least.

Owns what a round of trades does to pairs of groups, and what groups lose. A column is contiguous, all rows of
one after the other. Sums of squares in float32, a slab of rows at a time. Called by engine.permuting.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled_sum, inlined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scores = NDArray[np.float32]
    Columns = NDArray[np.int64]

FOUR = 4  # members of a group for which all splits of two groups are tried
_ROWS = 256  # of a slab, so that eight columns of one and their network stay in the cache
_SPLITS = np.array(
    [
        (*first, *(place for place in range(2 * FOUR) if place not in first))
        for first in combinations(range(2 * FOUR), FOUR)
        if first[0] == 0  # the other half are the same two groups
    ],
    dtype=np.int64,
)


def trade(scores: Scores, pairs: Columns, least: int) -> None:
    """Give the columns of each pair of groups to the two groups anew, in place, where less is lost by that.

    `scores` (columns, rows); `pairs` (pairs, 2 * group). A row of a group loses the sum of its `least` lowest
    scores. Of four columns in a group all 35 splits of two groups are tried; of others every exchange of a
    column of one group with a column of the other.
    """
    group = pairs.shape[1] // 2
    rest = scores.shape[1], pairs, len(pairs)
    if group == FOUR:
        costs = np.empty(len(_SPLITS), dtype=np.float64)
        _split_fours(scores, *rest, least, _SPLITS, len(_SPLITS), costs)
    else:
        work = np.empty((group, _ROWS), dtype=np.float32)
        last, gains = np.empty((4, _ROWS), dtype=np.float32), np.empty(group * group, dtype=np.float64)
        _exchange(scores, *rest, group, least, work, last, gains)


def lost(scores: Scores, groups: Columns, least: int) -> float:
    """The sum over rows and groups of the `least` lowest scores of each; `groups` (groups, members)."""
    group = groups.shape[1]
    work = np.empty((group, _ROWS), dtype=np.float32)
    found: float = _lost(scores, scores.shape[1], groups, len(groups), group, least, work)
    return found


@inlined
def _lower(first, second):
    return first if first < second else second


@inlined
def _higher(first, second):
    return second if first < second else first


@inlined
def _fours_lost(scores, a, b, c, d, size, least):
    """What some rows of four columns lose, which begin at these places."""
    total = np.float32(0.0)
    if least == 1:
        for row in range(size):
            low, other = _lower(scores[a + row], scores[b + row]), _lower(scores[c + row], scores[d + row])
            total += _lower(low, other)
    elif least == 2:
        for row in range(size):
            one, two, three, four = scores[a + row], scores[b + row], scores[c + row], scores[d + row]
            low, other = _lower(one, two), _lower(three, four)
            second = _lower(_higher(one, two), _higher(three, four))
            total += _lower(low, other) + _lower(_higher(low, other), second)
    else:
        for row in range(size):
            one, two, three, four = scores[a + row], scores[b + row], scores[c + row], scores[d + row]
            total += (one + two) + (three + four) - _higher(_higher(one, two), _higher(three, four))
    return total


@inlined
def _least(numbers, count):
    """The place of the first of the least numbers."""
    best = 0
    for place in range(1, count):
        if numbers[place] < numbers[best]:
            best = place
    return best


@compiled_sum("void(K*, int64, int64*, int64, int64, int64*, int64, float64*)")
def _split_fours(scores, rows, pairs, count, least, splits, number, costs):
    for pair in range(count):
        own = 8 * pair
        for split in range(number):
            costs[split] = 0.0
        for begin in range(0, rows, _ROWS):
            size = _lower(rows - begin, _ROWS)
            for half in range(2 * number):
                at = 4 * half
                costs[half // 2] += _fours_lost(
                    scores,
                    rows * pairs[own + splits[at]] + begin,
                    rows * pairs[own + splits[at + 1]] + begin,
                    rows * pairs[own + splits[at + 2]] + begin,
                    rows * pairs[own + splits[at + 3]] + begin,
                    size,
                    least,
                )
        best = _least(costs, number)
        if best:
            for place in range(8):
                costs[place] = pairs[own + splits[8 * best + place]]
            for place in range(8):
                pairs[own + place] = np.int64(costs[place])


@inlined
def _sink(scores, rows, groups, own, begin, size, group, passes, work):
    """Some rows of a group in `work` (group, slab), where their lowest scores sink to the end, one a pass."""
    for place in range(group):
        column, to = rows * groups[own + place] + begin, _ROWS * place
        for row in range(size):
            work[to + row] = scores[column + row]
    for sunk in range(passes):
        for place in range(group - 1 - sunk):
            upper, below = _ROWS * place, _ROWS * (place + 1)
            for row in range(size):
                one, other = work[upper + row], work[below + row]
                work[upper + row] = _higher(one, other)
                work[below + row] = _lower(one, other)


@compiled_sum("float64(K*, int64, int64*, int64, int64, int64, K*)")
def _lost(scores, rows, groups, count, group, least, work):
    total = 0.0
    for one in range(count):
        for begin in range(0, rows, _ROWS):
            size = _lower(rows - begin, _ROWS)
            _sink(scores, rows, groups, group * one, begin, size, group, least, work)
            for sunk in range(group - least, group):
                part = np.float32(0.0)
                for row in range(size):
                    part += work[_ROWS * sunk + row]
                total += np.float64(part)
    return total


@inlined
def _gained(scores, given, taken, size, borders):
    """How much more some rows lose if two groups exchange a column of theirs: see `_exchange`."""
    total = np.float32(0.0)
    for row in range(size):
        out, new = scores[given + row], scores[taken + row]
        low, high = borders[row], borders[_ROWS + row]
        low_too, high_too = borders[2 * _ROWS + row], borders[3 * _ROWS + row]
        total += _lower(new, high if out <= low else low) - _lower(out, low)
        total += _lower(out, high_too if new <= low_too else low_too) - _lower(new, low_too)
    return total


@compiled_sum("void(K*, int64, int64*, int64, int64, int64, K*, K*, float64*)")
def _exchange(scores, rows, pairs, count, group, least, work, borders, gains):
    """Exchange the two columns of each pair of groups by which most is gained.

    `borders` (4, slab) has of both groups the highest score that a row loses, and the next one above it: a
    group that gives a column away loses that or the border below, and then the lower of what it gets and of
    the border that is left.
    """
    for pair in range(count):
        own = 2 * group * pair
        for place in range(group * group):
            gains[place] = 0.0
        for begin in range(0, rows, _ROWS):
            size = _lower(rows - begin, _ROWS)
            for half in range(2):
                _sink(scores, rows, pairs, own + half * group, begin, size, group, least + 1, work)
                below, to = _ROWS * (group - least), 2 * _ROWS * half
                for row in range(size):
                    borders[to + row] = work[below + row]
                    borders[to + _ROWS + row] = work[below - _ROWS + row]
            for place in range(group * group):
                given = rows * pairs[own + place // group] + begin
                taken = rows * pairs[own + group + place % group] + begin
                gains[place] += _gained(scores, given, taken, size, borders)
        best = _least(gains, group * group)
        if gains[best] < 0.0:
            first, second = own + best // group, own + group + best % group
            column = pairs[first]
            pairs[first] = pairs[second]
            pairs[second] = column
