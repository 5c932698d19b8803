"""Transposable tiles by a compiled loop: n of m survive in every row and column, with the largest sum.

Owns the choice among the legal patterns of a tile, from bit patterns of scores to masks. Called by the
engine, for tensors on the CPU, and by execution. No torch.
"""

from __future__ import annotations

from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, inlined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

    Mask = NDArray[np.uint8]

SCORE_BITS = 43  # of a score beside the largest one of its tile; with TIE_BITS sums of 12 fit in 63 bits
TIE_BITS = 16  # one for each element of the largest tile
INFINITE_SUM = "transposable N:M adds scores up: found one that is infinite, NaN or negative"
_ABOVE_TIES = -(1 << TIE_BITS)
_SIDE_BY_SIDE = 32  # tiles that are decided at one time, so that their keys stay in the cache


def select_tiles(bits: Bits, form: Format, columns: int, size: int, kept: int, keep: Mask) -> None:
    """Fill `keep` (bytes, one a key) with 1 for what survives in tiles of `size` rows, 0 elsewhere.

    `bits` are finite patterns of `form`, row-major in rows of `columns`, whole tiles of 2 to 4 rows. Each row
    and column of a tile keeps `kept`, with the largest sum of magnitudes; of equal sums the pattern wins that
    keeps lower indices first. Magnitudes count in integer multiples of 2**-43 of the power of two above the
    largest one of their tile, so that sums are exact.

    >>> from sparseprune.engine.kernels.formats import FORMATS
    >>> keep = np.empty(4, dtype=np.uint8)
    >>> tile = np.array([1, 3, 2, 1], dtype=np.float32).view(np.uint32)
    >>> select_tiles(tile, FORMATS["F32"], 2, 2, 1, keep)
    >>> keep.tolist()
    [0, 1, 1, 0]
    """
    if kept in (0, size) or not bits.size:
        keep.fill(kept > 0)
        return
    # All but 2 of 4 keep, or drop, a single element in each row and column.
    chosen = np.array(list(permutations(range(size))), dtype=np.int64)
    small, fours = (keep[:0], keep.view(np.uint32)) if size == 4 else (keep, np.empty(0, np.uint32))
    _select(
        bits, bits.size // size**2, columns, form.magnitude, form.mantissa, size, kept, chosen, len(chosen),
        np.empty((size * size + 3) * _SIDE_BY_SIDE, dtype=np.int64), small, fours,
    )  # fmt: skip


@compiled("void(K*, int64, int64, K, int64, int64, int64, int64*, int64, int64*, uint8*, uint32*)")
def _select(bits, tiles, columns, magnitude, mantissa, size, kept, chosen, ways, scratch, keep, words):
    """`scratch` has the elements of tiles, where each begins, and its key: the mask is in its lowest bits.

    The first element has the highest of these, so that of equal sums the largest key keeps lower indices.
    Bytes of masks go to `keep`, those of tiles of four rows to `words`.
    """
    first = size * size * _SIDE_BY_SIDE
    found = first + _SIDE_BY_SIDE
    row = column = np.int64(0)
    for begin in range(0, tiles, _SIDE_BY_SIDE):
        count = _SIDE_BY_SIDE if tiles - begin > _SIDE_BY_SIDE else tiles - begin
        for i in range(_SIDE_BY_SIDE):  # the last tile is decided again where there are fewer
            scratch[first + i] = row * columns + column
            if i < count - 1 or count == _SIDE_BY_SIDE:
                column += size
                if column == columns:
                    row, column = row + size, np.int64(0)
        for i in range(_SIDE_BY_SIDE):
            scratch[found + i] = 0
        last = first + _SIDE_BY_SIDE - 1
        if size == 4 and scratch[last] - scratch[first] == 4 * (_SIDE_BY_SIDE - 1):
            _load_neighbours(bits, columns, magnitude, scratch[first], found, scratch)
        else:
            _load(bits, columns, magnitude, size, first, found, scratch)
        _to_integers(mantissa, size, found, scratch)
        if size == 4 and kept == 2:
            _two_of_four(found, scratch)
        else:
            _one_of_each(size, kept, chosen, ways, found, scratch)
        if size == 4:
            _store_words(columns, first, found, count, scratch, words)
        else:
            _store(columns, size, first, found, count, scratch, keep)


@inlined
def _load(bits, columns, magnitude, size, first, top, scratch):
    """The magnitudes of some tiles, element by element, and the largest of each tile, from `top` on."""
    for row in range(size):
        for column in range(size):
            at, step = (row * size + column) * _SIDE_BY_SIDE, row * columns + column
            for i in range(_SIDE_BY_SIDE):
                key = np.int64(bits[scratch[first + i] + step] & magnitude)
                scratch[at + i] = key
                scratch[top + i] = _larger(key, scratch[top + i])


@inlined
def _load_neighbours(bits, columns, magnitude, begin, top, scratch):
    """As `_load`, of tiles of four rows that lie one beside another: vectors are loaded and shuffled."""
    for row in range(4):
        at, step = 4 * row * _SIDE_BY_SIDE, begin + row * columns
        for i in range(_SIDE_BY_SIDE):
            place = step + 4 * i
            a, b = np.int64(bits[place] & magnitude), np.int64(bits[place + 1] & magnitude)
            c, d = np.int64(bits[place + 2] & magnitude), np.int64(bits[place + 3] & magnitude)
            scratch[at + i] = a
            scratch[at + _SIDE_BY_SIDE + i] = b
            scratch[at + 2 * _SIDE_BY_SIDE + i] = c
            scratch[at + 3 * _SIDE_BY_SIDE + i] = d
            scratch[top + i] = _larger(_larger(_larger(a, b), _larger(c, d)), scratch[top + i])


@inlined
def _to_integers(mantissa, size, top, scratch):
    """Magnitudes as integers below 2**SCORE_BITS, rounded down, in front of the bit of their element."""
    one = np.int64(1) << mantissa
    up = top + _SIDE_BY_SIDE
    for i in range(_SIDE_BY_SIDE):
        largest = scratch[top + i]
        scratch[up + i] = SCORE_BITS - 1 - mantissa + TIE_BITS
        if 0 < largest < one:
            while largest < one:
                largest += largest
                scratch[up + i] += 1
        scratch[top + i] = _larger((scratch[top + i] >> mantissa) - 1, np.int64(0))
    for element in range(size * size):
        at = element * _SIDE_BY_SIDE
        tie = np.int64(1) << (size * size - 1 - element)
        for i in range(_SIDE_BY_SIDE):
            key = scratch[at + i]
            exponent = _larger((key >> mantissa) - 1, np.int64(0))
            significand = key - (exponent << mantissa)
            down = scratch[top + i] - exponent
            down = down if down < 63 else np.int64(63)
            scratch[at + i] = (((significand << scratch[up + i]) >> down) & _ABOVE_TIES) | tie


@inlined
def _store(columns, size, first, found, count, scratch, keep):
    """The lowest bits of keys as bytes of a mask."""
    for row in range(size):
        for column in range(size):
            bit, step = size * size - 1 - row * size - column, row * columns + column
            for i in range(count):
                keep[scratch[first + i] + step] = (scratch[found + i] >> bit) & 1


@inlined
def _store_words(columns, first, found, count, scratch, words):
    """As `_store`, a row of four at once: the product puts each of its bits in the byte of its column."""
    for row in range(4):
        for i in range(count):
            kept = np.uint32((scratch[found + i] >> (12 - 4 * row)) & 15)
            spread = kept * np.uint32(0x0804_0201) >> np.uint32(3)
            words[(scratch[first + i] + row * columns) >> 2] = spread & np.uint32(0x0101_0101)


@inlined
def _larger(one, other):
    return one if one > other else other


@inlined
def _one_of_each(size, kept, chosen, ways, found, scratch):
    """The largest key of one element of each row and column, or all but the smallest."""
    sign, every = np.int64(1), np.int64(0)
    if kept > 1:
        sign, every = np.int64(-1), (np.int64(1) << (size * size)) - 1
    for i in range(_SIDE_BY_SIDE):
        scratch[found + i] = np.int64(-1) << 62
    for way in range(ways):
        for i in range(_SIDE_BY_SIDE):
            key = np.int64(0)
            for row in range(size):
                key += scratch[(row * size + chosen[way * size + row]) * _SIDE_BY_SIDE + i]
            scratch[found + i] = _larger(sign * key, scratch[found + i])
    for i in range(_SIDE_BY_SIDE):
        scratch[found + i] = (sign * scratch[found + i]) ^ every


@inlined
def _pairs(row, i, scratch):
    """The sums of two of four: of elements 0 and 1, 0 and 2, 0 and 3, 1 and 2, 1 and 3, 2 and 3 of a row."""
    at = row * 4 * _SIDE_BY_SIDE + i
    a, b = scratch[at], scratch[at + _SIDE_BY_SIDE]
    c, d = scratch[at + 2 * _SIDE_BY_SIDE], scratch[at + 3 * _SIDE_BY_SIDE]
    return a + b, a + c, a + d, b + c, b + d, c + d


@inlined
def _two_of_four(found, scratch):
    """The largest key of each tile: rows join one by one, the best sum of each count of columns stays."""
    for i in range(_SIDE_BY_SIDE):
        a01, a02, a03, a12, a13, a23 = _pairs(0, i, scratch)
        b01, b02, b03, b12, b13, b23 = _pairs(1, i, scratch)
        c01, c02, c03, c12, c13, c23 = _pairs(2, i, scratch)
        d01, d02, d03, d12, d13, d23 = _pairs(3, i, scratch)
        # Two rows: one in each column; or one column, the first, has two, and another, the second, none.
        even = _larger(_larger(a01 + b23, a23 + b01), _larger(a02 + b13, a13 + b02))
        even = _larger(even, _larger(a03 + b12, a12 + b03))
        t01, t02 = _larger(a02 + b03, a03 + b02), _larger(a01 + b03, a03 + b01)
        t03, t10 = _larger(a01 + b02, a02 + b01), _larger(a12 + b13, a13 + b12)
        t12, t13 = _larger(a01 + b13, a13 + b01), _larger(a01 + b12, a12 + b01)
        t20, t21 = _larger(a12 + b23, a23 + b12), _larger(a02 + b23, a23 + b02)
        t23, t30 = _larger(a02 + b12, a12 + b02), _larger(a13 + b23, a23 + b13)
        t31, t32 = _larger(a03 + b23, a23 + b03), _larger(a03 + b13, a13 + b03)
        # Three rows: two columns have two, to which the last row adds the others.
        f01 = _larger(_larger(t02 + c12, t03 + c13), _larger(t12 + c02, t13 + c03))
        f02 = _larger(_larger(t01 + c12, t03 + c23), _larger(t21 + c01, t23 + c03))
        f03 = _larger(_larger(t01 + c13, t02 + c23), _larger(t31 + c01, t32 + c02))
        f12 = _larger(_larger(t10 + c02, t13 + c23), _larger(t20 + c01, t23 + c13))
        f13 = _larger(_larger(t10 + c03, t12 + c23), _larger(t30 + c01, t32 + c12))
        f23 = _larger(_larger(t20 + c03, t21 + c13), _larger(t30 + c02, t31 + c12))
        f01 = _larger(f01, _larger(even + c01, a01 + b01 + c23)) + d23
        f02 = _larger(f02, _larger(even + c02, a02 + b02 + c13)) + d13
        f03 = _larger(f03, _larger(even + c03, a03 + b03 + c12)) + d12
        f12 = _larger(f12, _larger(even + c12, a12 + b12 + c03)) + d03
        f13 = _larger(f13, _larger(even + c13, a13 + b13 + c02)) + d02
        f23 = _larger(f23, _larger(even + c23, a23 + b23 + c01)) + d01
        scratch[found + i] = _larger(_larger(_larger(f01, f02), _larger(f03, f12)), _larger(f13, f23))
