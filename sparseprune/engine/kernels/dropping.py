"""What masks drop: packed bits as a byte for each element, making it zero, and how much of it is not.

In masks a byte is 1 where an element is kept, 0 where it is dropped; flat arrays. Owns no dtype: it is told
which bits of a pattern make it zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits

    Mask = NDArray[np.uint8]

_BLOCK = 4096  # elements that are counted in 16 bits
_EACH = np.uint64(0x0101_0101_0101_0101)
_ITS_BIT = np.uint64(0x8040_2010_0804_0201)
_BELOW_TOP = np.uint64(0x7F7F_7F7F_7F7F_7F7F)


def unpack(packed: Mask, mask: Mask) -> None:
    """Fill a mask from bits, the lowest of a byte first; there may be more bits than elements.

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
    """Make patterns 0 where a mask drops them, in place; the others keep every bit."""
    _drop(bits, mask, bits.size)


def count_lost(bits: Bits, zero_bits: int, mask: Mask) -> tuple[int, int, int | None]:
    """Elements that a mask drops, how many of them are not zero, the number of the first of these or None.

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
