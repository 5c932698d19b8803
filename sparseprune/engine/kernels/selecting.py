"""Which of some keys survive a budget: exactly `nnz` in every scope, the lower index among equals.

Keys are unsigned patterns without their sign (formats.py), or norms in float64 read as such, flat, scope
after scope. Small scopes are compared inside 64-bit words (SWAR: Lamport 1975, Multiple Byte Processing with
Full-Word Instructions), short ones all with all, in long ones the k-th largest is found digit by digit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits

    Mask = NDArray[np.uint8]

PAIRWISE_LIMIT = 128  # blocks a scope up to which comparing all pairs wins (tests/benchmarks/README.md)
_SIDE_BY_SIDE = 64  # scopes that are compared at one time
_WORDS = 256  # 64-bit words whose ranks stay in the first cache
_LONG = 1 << 12  # blocks a scope from which on larger digits pay in spite of more counters
_DIGITS, _LONG_DIGITS = 8, 11  # bits; a 16-bit key has two of either


def select_keys(bits: Bits, magnitude: int, blocks: int, nnz: int, keep: Mask) -> None:
    """Fill `keep` (bytes, one a key) with 1 for the `nnz` largest of every `blocks` keys and 0 elsewhere.

    A key is a pattern of `bits` (flat, whole scopes) without what `magnitude` leaves out, which takes away
    its highest bit at least. 0 <= nnz <= blocks.
    """
    if nnz in (0, blocks):
        keep.fill(nnz > 0)
        return
    width = 8 * bits.itemsize
    if 64 % (blocks * width) == 0 and bits.size * bits.itemsize % 8 == 0:
        _select_in_words(bits, magnitude, blocks, nnz, keep)
        return
    kind = bits.dtype.type
    if blocks <= PAIRWISE_LIMIT:
        _pairwise(bits, kind(magnitude), blocks, nnz, keep)
    else:
        digit = _LONG_DIGITS if blocks >= _LONG and width > 16 else _DIGITS
        _by_digits(bits, kind(magnitude), (blocks, nnz), (width, digit), keep)


def _select_in_words(bits: Bits, magnitude: int, blocks: int, nnz: int, keep: Mask) -> None:
    """Lanes as wide as a key; its sign bit is free, so that a difference of two lanes tells the larger."""
    width = 8 * bits.itemsize
    lanes = 64 // width
    ones = sum(1 << width * lane for lane in range(lanes))
    # For each distance the lanes that have a neighbour so far ahead in their own scope.
    ahead = [
        sum(1 << width * lane for lane in range(lanes) if lane % blocks + distance < blocks)
        for distance in range(blocks)
    ]
    masks = np.array(ahead, dtype=np.uint64)
    start = np.uint64(sum(ahead[1:]) + ((1 << width - 1) - nnz) * ones)
    words = (np.uint64(magnitude * ones), np.uint64(ones), start)
    if width == 16 and blocks == lanes:
        _words_of_4(bits.view(np.uint64), words, masks, keep.view(np.uint32))
    elif width == 16:
        _words_of_16(bits.view(np.uint64), words, masks, keep.view(np.uint32))
    elif width == 8:
        _words_of_8(bits.view(np.uint64), words, masks, keep.view(np.uint64))
    else:
        _words_of_32(bits.view(np.uint64), words, masks, keep.view(np.uint16))


@compiled
def _ranks(words, begin, end, width, masks_of_words, ahead, ranks):
    """Per lane the number of keys that beat it, plus what makes its highest bit tell a rank of nnz or more.

    Of two lanes the earlier one wins when it is not smaller; then the later one's rank grows, else its own.
    """
    magnitude, ones, start = masks_of_words
    last = np.uint64(width - 1)
    high = ones << last
    for i in range(begin, end):
        ranks[i - begin] = start
    for distance in range(1, ahead.size):
        shift, lanes = np.uint64(distance * width), ahead[distance]
        for i in range(begin, end):
            keys = words[i] & magnitude
            wins = (((keys | high) - (keys >> shift)) >> last) & lanes
            ranks[i - begin] += (wins << shift) - wins
    for i in range(end - begin):
        ranks[i] = ones - ((ranks[i] & high) >> last)


@compiled
def _words_of_4(words, masks_of_words, ahead, keep):
    """As `_words_of_16`, for the commonest case, one scope of four a word: one pass without memory."""
    magnitude, ones, start = masks_of_words
    one, two, three = ahead[1], ahead[2], ahead[3]
    high, last = ones << np.uint64(15), np.uint64(15)
    for i in range(words.size):
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


@compiled
def _words_of_16(words, masks_of_words, ahead, keep):
    ranks = np.empty(_WORDS, dtype=np.uint64)
    for begin in range(0, words.size, _WORDS):
        end = min(begin + _WORDS, words.size)
        _ranks(words, begin, end, 16, masks_of_words, ahead, ranks)
        for i in range(end - begin):
            pairs = (ranks[i] | (ranks[i] >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
            keep[begin + i] = np.uint32((pairs | (pairs >> np.uint64(16))) & np.uint64(0xFFFFFFFF))


@compiled
def _words_of_8(words, masks_of_words, ahead, keep):
    ranks = np.empty(_WORDS, dtype=np.uint64)
    for begin in range(0, words.size, _WORDS):
        end = min(begin + _WORDS, words.size)
        _ranks(words, begin, end, 8, masks_of_words, ahead, ranks)
        for i in range(end - begin):
            keep[begin + i] = ranks[i]


@compiled
def _words_of_32(words, masks_of_words, ahead, keep):
    ranks = np.empty(_WORDS, dtype=np.uint64)
    for begin in range(0, words.size, _WORDS):
        end = min(begin + _WORDS, words.size)
        _ranks(words, begin, end, 32, masks_of_words, ahead, ranks)
        for i in range(end - begin):
            keep[begin + i] = np.uint16((ranks[i] | (ranks[i] >> np.uint64(24))) & np.uint64(0xFFFF))


@compiled
def _pairwise(bits, magnitude, blocks, nnz, keep):
    """Each block's rank is the number of blocks that beat it: larger ones, and equal ones before it."""
    scopes = bits.size // blocks
    keys = np.empty((blocks, _SIDE_BY_SIDE), dtype=bits.dtype)
    ranks = np.empty((blocks, _SIDE_BY_SIDE), dtype=np.uint8)
    for begin in range(0, scopes, _SIDE_BY_SIDE):
        count = min(_SIDE_BY_SIDE, scopes - begin)
        for scope in range(count):
            for block in range(blocks):
                keys[block, scope] = bits[(begin + scope) * blocks + block] & magnitude
        ranks[:] = 0
        for later in range(1, blocks):
            for earlier in range(later):
                for scope in range(_SIDE_BY_SIDE):
                    wins = np.uint8(keys[earlier, scope] >= keys[later, scope])
                    ranks[later, scope] += wins
                    ranks[earlier, scope] += np.uint8(1) - wins
        for scope in range(count):
            for block in range(blocks):
                keep[(begin + scope) * blocks + block] = ranks[block, scope] < nnz


@compiled
def _by_digits(bits, magnitude, budget, digits, keep):
    blocks, nnz = budget
    counts = np.empty(1 << digits[1], dtype=np.int64)
    for begin in range(0, bits.size, blocks):
        scope = bits[begin : begin + blocks]
        kth, places = _kth(scope, magnitude, nnz, digits, counts)
        equal = 0
        for i in range(blocks):
            key = np.uint64(scope[i] & magnitude)
            keep[begin + i] = key >= kth
            equal += key == kth
        if equal > places:
            for i in range(blocks):
                if np.uint64(scope[i] & magnitude) == kth:
                    keep[begin + i] = places > 0
                    places -= 1


@compiled
def _kth(scope, magnitude, k, digits, counts):
    """The k-th largest key of a scope, and how many of those equal to it are among the k largest."""
    width, size = digits
    last = np.uint64((1 << size) - 1)
    prefix, above = np.uint64(0), np.uint64(64)
    for shift in range((width - 1) // size * size, -1, -size):
        counts[:] = 0
        step = np.uint64(shift)
        if above == 64:
            for i in range(scope.size):
                counts[np.uint64(scope[i] & magnitude) >> step] += 1
        else:
            for i in range(scope.size):
                key = np.uint64(scope[i] & magnitude)
                if key >> above == prefix:
                    counts[(key >> step) & last] += 1
        digit = counts.size - 1
        while counts[digit] < k:
            k -= counts[digit]
            digit -= 1
        prefix = (prefix << np.uint64(size)) | np.uint64(digit)
        above = step
    return prefix, k
