"""Deciding and cutting by compiled loops: the nnz largest of a scope, thresholds, masks.

Owns the loops that write masks and weights; they equal the torch engine bit for bit, ties included. Called by
execution, and by checkpoint to unpack masks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, inlined

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

    Mask = NDArray[np.uint8]
PAIRWISE_LIMIT = 128  # blocks a scope up to which comparing all pairs wins (tests/benchmarks/README.md)
_SIDE_BY_SIDE = 64  # scopes that are compared at one time
_WORDS = 256  # 64-bit words whose ranks stay in the first cache
_LONG = 1 << 9  # blocks a scope from which on larger digits pay in spite of more counters
_DIGITS, _LONG_DIGITS = 8, 11  # bits, counted from the highest: few neighbours share a large digit
_FEW = 32  # blocks a scope up to which keys are put in order one by one
_BLOCK = 4096  # elements that are counted in 16 bits
_EACH = np.uint64(0x0101_0101_0101_0101)
_ITS_BIT = np.uint64(0x8040_2010_0804_0201)
_BELOW_TOP = np.uint64(0x7F7F_7F7F_7F7F_7F7F)


# The nnz largest keys of every scope.


def select_keys(bits: Bits, magnitude: int, blocks: int, nnz: int, keep: Mask) -> None:
    """Fill `keep` (bytes, one a key) with 1 for the `nnz` largest of every `blocks` keys and 0 elsewhere.

    A key is a pattern of `bits` (flat, whole scopes) & `magnitude`, which clears at least the highest bit
    where scopes fit in words. 0 <= nnz <= blocks.
    """
    if nnz in (0, blocks):
        keep.fill(nnz > 0)
        return
    width = 8 * bits.itemsize
    if 64 % (blocks * width) == 0 and bits.size * bits.itemsize % 8 == 0:
        _select_in_words(bits, magnitude, blocks, nnz, keep)
    elif blocks == 4:
        _quads(bits, bits.size // 4, magnitude, nnz, keep)
    else:
        _select_each(bits, magnitude, blocks, np.array([nnz]), 0, keep)


def select_each(bits: Bits, magnitude: int, blocks: int, nnz: NDArray[np.int64], keep: Mask) -> None:
    """As `select_keys`, with an `nnz` of its own for each scope: (scopes).

    >>> keep = np.empty(6, dtype=np.uint8)
    >>> select_each(np.array([3, 9, 5, 2, 2, 1], dtype=np.uint8), 0x7F, 3, np.array([2, 1]), keep)
    >>> keep.tolist()
    [0, 1, 1, 1, 0, 0]
    """
    if bits.size:
        _select_each(bits, magnitude, blocks, nnz, 1, keep)


def _select_each(
    bits: Bits, magnitude: int, blocks: int, nnz: NDArray[np.int64], step: int, keep: Mask
) -> None:
    """The number of scope i is nnz[i * step]."""
    if blocks <= PAIRWISE_LIMIT:
        keys = np.empty(blocks * _SIDE_BY_SIDE, dtype=bits.dtype)
        ranks = np.empty(blocks * _SIDE_BY_SIDE, dtype=np.uint8)
        _pairwise(bits, bits.size // blocks, magnitude, blocks, nnz, step, keys, ranks, keep)
    else:
        digit = _LONG_DIGITS if blocks >= _LONG else _DIGITS
        counts = np.empty(1 << digit, dtype=np.int64)
        width = magnitude.bit_length()
        _by_digits(bits, bits.size, magnitude, blocks, nnz, step, width, digit, counts, keep)


def ranks_among(bits: Bits, magnitude: int, left: Mask) -> Bits:
    """The keys of patterns plus 1, and 0 where `left` is 0: below all others, zero among them.

    >>> ranks_among(np.array([0x8000, 5, 0], dtype=np.uint16), 0x7FFF, np.array([1, 1, 0], dtype=np.uint8))
    array([1, 6, 0], dtype=uint16)
    """
    ranks = np.empty_like(bits)
    _ranks_among(bits, bits.size, magnitude, left, ranks)
    return ranks


def two_keys(bits: Bits, form: Format, blocks: int, nnz: int) -> tuple[Bits, Bits]:
    """The `nnz`-th largest key of every `blocks` patterns (flat, whole scopes) and the next one, 0 for none.

    >>> from sparseprune.engine.kernels.formats import FORMATS
    >>> two_keys(np.array([3, 9, 5, 2, 2, 1], dtype=np.uint16), FORMATS["BF16"], 3, 2)
    (array([5, 2], dtype=uint16), array([3, 1], dtype=uint16))
    """
    scopes = bits.size // blocks
    found = np.empty(2 * scopes, dtype=bits.dtype)
    keys, counts = np.empty(_FEW, dtype=bits.dtype), np.empty(1 << _DIGITS, dtype=np.int64)
    width = form.magnitude.bit_length()
    _two_keys(bits, scopes, form.magnitude, blocks, nnz, width, _DIGITS, keys, counts, found)
    return found[::2].copy(), found[1::2].copy()


def finite_ranks(bits: Bits, form: Format) -> Bits:
    """The keys of patterns plus 1, and 0 for what is not finite: it ranks below all others."""
    ranks: Bits = bits & bits.dtype.type(form.magnitude)
    ranks += ranks.dtype.type(1)
    ranks *= ranks <= ranks.dtype.type(form.infinity)
    return ranks


def _select_in_words(bits: Bits, magnitude: int, blocks: int, nnz: int, keep: Mask) -> None:
    """Lanes as wide as a key; its sign bit is free, so the sign of a difference shows the larger of two."""
    width = 8 * bits.itemsize
    lanes = 64 // width
    ones = sum(1 << width * lane for lane in range(lanes))
    # For each distance the lanes that have a neighbour so far ahead in their own scope.
    ahead = [
        sum(1 << width * lane for lane in range(lanes) if lane % blocks + distance < blocks)
        for distance in range(blocks)
    ]
    start = (sum(ahead[1:]) + ((1 << width - 1) - nnz) * ones) & (1 << 64) - 1
    words = bits.view(np.uint64)
    if width == 16 and blocks == lanes:
        _quarters(words, words.size, magnitude * ones, ones, start, *ahead[1:], keep.view(np.uint32))
        return
    kept = np.empty(_WORDS, dtype=np.uint64)
    masks = np.array(ahead, dtype=np.uint64)
    _words(words, words.size, width, magnitude * ones, ones, start, masks, blocks, kept, keep)


@compiled("void(K*, int64, uint64, uint64, uint64, uint64, uint64, uint64, uint32*)")
def _quarters(words, size, magnitude, ones, start, one, two, three, keep):
    """One scope of four keys a word, the most common case, without memory for ranks. See `_words`."""
    last = np.uint64(15)
    high = ones << last
    for i in range(size):
        keys = words[i] & magnitude
        raised = keys | high
        first = ((raised - (keys >> np.uint64(16))) >> last) & one
        second = ((raised - (keys >> np.uint64(32))) >> last) & two
        third = ((raised - (keys >> np.uint64(48))) >> last) & three
        wins = (first << np.uint64(16)) + (second << np.uint64(32)) + (third << np.uint64(48))
        rank = start + wins - first - second - third
        kept = ones - ((rank & high) >> last)
        pairs = (kept | (kept >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        keep[i] = np.uint32((pairs | (pairs >> np.uint64(16))) & np.uint64(0xFFFFFFFF))


@compiled("void(K*, int64, int64, uint64, uint64, uint64, uint64*, int64, uint64*, uint8*)")
def _words(words, size, width, magnitude, ones, start, ahead, blocks, ranks, keep):
    """Each lane's rank is the number of keys that beat it.

    Of two lanes the earlier one wins when it is not smaller; the loser's rank grows. Ranks start so high that
    a lane's highest bit becomes 1 when its rank is nnz or more.
    """
    last = np.uint64(width - 1)
    high = ones << last
    lanes = 64 // width
    for begin in range(0, size, _WORDS):
        count = _WORDS if size - begin > _WORDS else size - begin
        for i in range(count):
            ranks[i] = start
        for distance in range(1, blocks):
            shift, mask = np.uint64(distance * width), ahead[distance]
            for i in range(count):
                keys = words[begin + i] & magnitude
                wins = (((keys | high) - (keys >> shift)) >> last) & mask
                ranks[i] += (wins << shift) - wins
        for i in range(count):
            drop = (ranks[i] & high) >> last
            for lane in range(lanes):
                keep[(begin + i) * lanes + lane] = np.uint8(1) - np.uint8(
                    (drop >> np.uint64(lane * width)) & np.uint64(1)
                )


@compiled("void(K*, int64, K, int64, uint8*)")
def _quads(bits, scopes, magnitude, nnz, keep):
    """As `_pairwise`, for four keys that do not fit in a word together, without memory for ranks."""
    for scope in range(scopes):
        i = scope * 4
        a, b = bits[i] & magnitude, bits[i + 1] & magnitude
        c, d = bits[i + 2] & magnitude, bits[i + 3] & magnitude
        ab, ac, ad = np.int32(a >= b), np.int32(a >= c), np.int32(a >= d)
        bc, bd, cd = np.int32(b >= c), np.int32(b >= d), np.int32(c >= d)
        keep[i] = 3 - ab - ac - ad < nnz
        keep[i + 1] = ab + 2 - bc - bd < nnz
        keep[i + 2] = ac + bc + 1 - cd < nnz
        keep[i + 3] = ad + bd + cd < nnz


@compiled("void(K*, int64, K, uint8*, K*)")
def _ranks_among(bits, size, magnitude, left, ranks):
    for i in range(size):
        ranks[i] = ((bits[i] & magnitude) + np.uint8(1)) * left[i]


@compiled("void(K*, int64, K, int64, int64*, int64, K*, uint8*, uint8*)")
def _pairwise(bits, scopes, magnitude, blocks, nnz, step, keys, ranks, keep):
    """Each block's rank is the number of blocks that beat it: larger ones, and equal ones before it."""
    for begin in range(0, scopes, _SIDE_BY_SIDE):
        count = _SIDE_BY_SIDE if scopes - begin > _SIDE_BY_SIDE else scopes - begin
        for scope in range(count):
            for block in range(blocks):
                keys[block * _SIDE_BY_SIDE + scope] = bits[(begin + scope) * blocks + block] & magnitude
        for i in range(blocks * _SIDE_BY_SIDE):
            ranks[i] = 0
        for later in range(1, blocks):
            for earlier in range(later):
                one, other = earlier * _SIDE_BY_SIDE, later * _SIDE_BY_SIDE
                for scope in range(_SIDE_BY_SIDE):
                    wins = np.uint8(keys[one + scope] >= keys[other + scope])
                    ranks[other + scope] += wins
                    ranks[one + scope] += np.uint8(1) - wins
        for scope in range(count):
            own = nnz[(begin + scope) * step]
            for block in range(blocks):
                keep[(begin + scope) * blocks + block] = ranks[block * _SIDE_BY_SIDE + scope] < own


@compiled("void(K*, int64, K, int64, int64*, int64, int64, int64, int64*, uint8*)")
def _by_digits(bits, size, magnitude, blocks, nnz, step, width, digit, counts, keep):
    for scope in range(size // blocks):
        begin, own = scope * blocks, nnz[scope * step]
        kth, places = _kth(bits, begin, blocks, magnitude, own, width, digit, counts)
        equal = 0
        for i in range(begin, begin + blocks):
            key = np.uint64(bits[i] & magnitude)
            keep[i] = key >= kth
            equal += key == kth
        if equal > places:
            for i in range(begin, begin + blocks):
                if np.uint64(bits[i] & magnitude) == kth:
                    keep[i] = places > 0
                    places -= 1


@inlined
def _kth(bits, begin, blocks, magnitude, k, width, digit, counts):
    """The k-th largest key of a scope, and how many keys equal to it are among the k largest."""
    prefix = np.uint64(0)
    left = width
    while left > 0:
        size = digit if left > digit else left
        above, step, last = np.uint64(left), np.uint64(left - size), np.uint64((1 << size) - 1)
        for i in range(1 << size):
            counts[i] = 0
        if left == width:
            for i in range(begin, begin + blocks):
                counts[np.int64(np.uint64(bits[i] & magnitude) >> step)] += 1
        else:
            for i in range(begin, begin + blocks):
                key = np.uint64(bits[i] & magnitude)
                if key >> above == prefix:
                    counts[np.int64((key >> step) & last)] += 1
        found = (1 << size) - 1
        while counts[found] < k:
            k -= counts[found]
            found -= 1
        prefix = (prefix << np.uint64(size)) | np.uint64(found)
        left -= size
    return prefix, k


@compiled("void(K*, int64, K, int64, int64, int64, int64, K*, int64*, K*)")
def _two_keys(bits, scopes, magnitude, blocks, nnz, width, digit, keys, counts, found):
    """The nnz-th largest key of each scope and the one after it, 0 after the last one."""
    for scope in range(scopes):
        begin = scope * blocks
        if blocks > _FEW:
            kth, _ = _kth(bits, begin, blocks, magnitude, nnz, width, digit, counts)
            found[2 * scope] = kth
            found[2 * scope + 1] = 0
            if nnz < blocks:
                following, _ = _kth(bits, begin, blocks, magnitude, nnz + 1, width, digit, counts)
                found[2 * scope + 1] = following
        elif blocks == 4:  # without branches, which nobody could foretell
            a, b = bits[begin] & magnitude, bits[begin + 1] & magnitude
            c, d = bits[begin + 2] & magnitude, bits[begin + 3] & magnitude
            high, low = (a if a > b else b), (b if a > b else a)
            other_high, other_low = (c if c > d else d), (d if c > d else c)
            one = other_high if high > other_high else high
            other = low if low > other_low else other_low
            keys[0] = high if high > other_high else other_high
            keys[1] = one if one > other else other
            keys[2] = other if one > other else one
            keys[3] = other_low if low > other_low else low
            found[2 * scope] = keys[nnz - 1]
            found[2 * scope + 1] = keys[nnz] if nnz < 4 else keys[0] & np.uint8(0)
        else:
            for i in range(blocks):
                key = bits[begin + i] & magnitude
                place = i
                while place > 0 and keys[place - 1] < key:
                    keys[place] = keys[place - 1]
                    place -= 1
                keys[place] = key
            found[2 * scope] = keys[nnz - 1]
            found[2 * scope + 1] = 0
            if nnz < blocks:
                found[2 * scope + 1] = keys[nnz]


# Thresholds and decisions about blocks.


def cut_below(bits: Bits, form: Format, limit: int, mask: Mask) -> int:
    """Zero the elements (flat) whose key is below `limit`, mark and count the others: 1 in `mask`."""
    if limit > form.magnitude:
        bits.fill(0)
        mask.fill(0)
        return 0
    return int(_cut_below(bits, bits.size, form.magnitude, limit, mask))


def cut_blocks(bits: Bits, keep: Mask, block: int, mask: Mask) -> None:
    """Zero the runs of `block` elements whose byte in `keep` is 0; `mask` gets that byte for each element."""
    if block == 1:
        _cut_elements(bits, keep, bits.size, mask)
    else:
        _cut_runs(bits, keep, keep.size, block, mask)


@compiled("int64(K*, int64, K, K, uint8*)")
def _cut_below(bits, size, magnitude, limit, mask):
    left = 0
    for i in range(size):
        kept = (bits[i] & magnitude) >= limit
        bits[i] *= kept
        mask[i] = kept
        left += kept
    return left


@compiled("void(K*, uint8*, int64, uint8*)")
def _cut_elements(bits, keep, size, mask):
    for i in range(size):
        kept = keep[i]
        bits[i] *= kept
        mask[i] = kept


@compiled("void(K*, uint8*, int64, int64, uint8*)")
def _cut_runs(bits, keep, blocks, block, mask):
    for b in range(blocks):
        kept = keep[b]
        for i in range(b * block, (b + 1) * block):
            bits[i] *= kept
            mask[i] = kept


# Masks that exist already.


def unpack(packed: Mask, mask: Mask) -> None:
    """Fill a mask from bits, the lowest of a byte first; surplus bits are ignored.

    >>> mask = np.empty(10, dtype=np.uint8)
    >>> unpack(np.array([0b00000101, 0b11111110], dtype=np.uint8), mask)
    >>> mask.tolist()
    [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    """
    whole = mask.size // 8
    _unpack(packed, whole, mask)
    for place in range(8 * whole, mask.size):
        mask[place] = packed[whole] >> (place % 8) & 1


def drop(bits: Bits, mask: Mask) -> None:
    """Zero patterns in place where a mask is 0; the others keep every bit."""
    _drop(bits, mask, bits.size)


def count_lost(bits: Bits, zero_bits: int, mask: Mask) -> tuple[int, int, int | None]:
    """Elements that a mask drops, how many of them are not zero, the index of the first of these or None.

    >>> count_lost(np.array([5, 0, 7], dtype=np.uint16), 0x7FFF, np.array([1, 0, 0], dtype=np.uint8))
    (2, 1, 2)
    """
    found = np.zeros(3, dtype=np.int64)
    _count_lost(bits, mask, bits.size, zero_bits, found)
    dropped, lost, begin = map(int, found)
    if not lost:
        return dropped, 0, None
    part = slice(begin, begin + _BLOCK)
    place = np.argmax((mask[part] == 0) & ((bits[part] & bits.dtype.type(zero_bits)) != 0))
    return dropped, lost, begin + int(place)


@compiled("void(K*, int64, uint64*)")
def _unpack(packed, size, mask):
    for i in range(size):
        bits = (np.uint64(packed[i]) * _EACH) & _ITS_BIT
        mask[i] = ((bits + _BELOW_TOP) >> np.uint64(7)) & _EACH


@compiled("void(K*, uint8*, int64)")
def _drop(bits, mask, size):
    for i in range(size):
        bits[i] *= mask[i]


@compiled("void(K*, uint8*, int64, K, int64*)")
def _count_lost(bits, mask, size, zero_bits, found):
    dropped = lost = np.int64(0)
    for begin in range(0, size, _BLOCK):
        end = begin + _BLOCK if size - begin > _BLOCK else size
        out = gone = np.uint16(0)
        for i in range(begin, end):
            none = np.uint16(mask[i] == 0)
            out = np.uint16(out + none)
            gone = np.uint16(gone + (none & np.uint16((bits[i] & zero_bits) != 0)))
        if gone > 0 and lost == 0:
            found[2] = begin
        dropped += np.int64(out)
        lost += np.int64(gone)
    found[0] = dropped
    found[1] = lost
