"""Transposable tiles by a compiled loop: the key of the best pattern of each, as the torch engine finds it.

Called by the engine, for tensors on the CPU. What the numbers say is the engine's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, inlined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]


_SIDE_BY_SIDE = 64  # tiles that are decided at one time, so that their keys stay in the cache


def best_numbers(values: Integers, size: int, rows: Integers, upper: Integers, lower: Integers) -> Integers:
    """The largest key of each tile (tiles,), of `values` (size * size, tiles): sums less patterns' numbers.

    `rows` (patterns, kept) are the columns that a row may keep. `upper` and `lower` (patterns of half a tile,
    1 + rows) have a state first, then patterns of rows: halves of one state fit each other.
    """
    tiles = values.shape[1]
    found = np.empty(tiles, dtype=np.int64)
    states = 1 + int(max(upper[:, 0].max(), lower[:, 0].max()))
    keys = np.empty(size * len(rows) * _SIDE_BY_SIDE, dtype=np.int64)
    best = np.empty(2 * states * _SIDE_BY_SIDE, dtype=np.int64)
    _best(
        values, tiles, size, rows, len(rows), rows.shape[1], upper, len(upper), upper.shape[1] - 1,
        lower, len(lower), lower.shape[1] - 1, states, keys, best, found,
    )  # fmt: skip
    return found


@compiled(
    "void(int64*, int64, int64, int64*, int64, int64, int64*, int64, int64, int64*, int64, int64, int64, "
    "int64*, int64*, int64*)"
)
def _best(
    values, tiles, size, rows, patterns, kept, upper, uppers, above, lower, lowers, below, states, keys, best,
    found,
):  # fmt: skip
    """Keys of whole halves are above `none`, of which two can be added without leaving int64."""
    none = np.int64(-(1 << 61))
    for begin in range(0, tiles, _SIDE_BY_SIDE):
        count = _SIDE_BY_SIDE if tiles - begin > _SIDE_BY_SIDE else tiles - begin
        _row_keys(values, tiles, begin, size, rows, patterns, kept, count, keys)
        for i in range(2 * states * _SIDE_BY_SIDE):
            best[i] = none
        _halves(upper, uppers, above, 0, 0, patterns, count, keys, best)
        _halves(lower, lowers, below, above, states, patterns, count, keys, best)
        for i in range(count):
            found[begin + i] = none
        for state in range(states):
            first, second = state * _SIDE_BY_SIDE, (states + state) * _SIDE_BY_SIDE
            for i in range(count):
                key = best[first + i] + best[second + i]
                largest = found[begin + i]
                found[begin + i] = key if key > largest else largest


@inlined
def _row_keys(values, tiles, begin, size, rows, patterns, kept, count, keys):
    """The key of each pattern of each row: its sum, less its number as the digit of that row."""
    digit = np.int64(1)
    for back in range(size):
        row = size - 1 - back
        for pattern in range(patterns):
            at = (row * patterns + pattern) * _SIDE_BY_SIDE
            for i in range(count):
                keys[at + i] = -pattern * digit
            for place in range(kept):
                element = (row * size + rows[pattern * kept + place]) * tiles + begin
                for i in range(count):
                    keys[at + i] += values[element + i]
        digit *= patterns


@inlined
def _halves(half, number, height, row, state, patterns, count, keys, best):
    """Halves of one or two rows, from `row` on; `state` is the first of their states in `best`."""
    for one in range(number):
        at = one * (height + 1)
        into = (state + half[at]) * _SIDE_BY_SIDE
        first = (row * patterns + half[at + 1]) * _SIDE_BY_SIDE
        if height == 1:
            for i in range(count):
                key = keys[first + i]
                best[into + i] = key if key > best[into + i] else best[into + i]
        else:
            second = ((row + 1) * patterns + half[at + 2]) * _SIDE_BY_SIDE
            for i in range(count):
                key = keys[first + i] + keys[second + i]
                best[into + i] = key if key > best[into + i] else best[into + i]
