"""Soft thresholds of single elements by compiled loops: the nnz-th and the next key of a scope, differences.

Owns the loops that shrink; they equal the torch engine bit for bit. Called by execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, value_of
from sparseprune.engine.kernels.selecting import two_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.engine.kernels.selecting import Mask

    Floats = NDArray[np.float64]

_BLOCK = 512  # elements whose differences stay in the first cache


def kth_mids(bits: Bits, form: Format, blocks: int, nnz: int, k_weight: float) -> Floats:
    """`kth_mid` of the engine for every `blocks` elements (flat, whole scopes), by their magnitudes."""
    scopes = bits.size // blocks
    if nnz == 0:
        return np.full(scopes, np.inf)
    kth, following = two_keys(bits, form, blocks, nnz)
    return mid_of(form.values(kth), form.values(following), k_weight)


def mid_of(kth: Floats, following: Floats, k_weight: float) -> Floats:
    """`(kth + k_weight * following) / (1 + k_weight)`, as the engine computes it."""
    return kth if k_weight == 0 else (kth + k_weight * following) / (1 + k_weight)


def shrink_elements(bits: Bits, form: Format, limits: Floats, mask: Mask) -> None:
    """Move the elements (flat, finite) of each scope towards zero by its limit, up to +0.0; rounded once.

    There are as many scopes of one size as limits. `mask` becomes 1 where the result is not zero.
    """
    size = bits.size // max(1, limits.size)
    if form.itemsize > 2:
        _shrink_wide(bits.view(f"f{form.itemsize}"), limits.size, size, limits, mask)
        return
    singles = np.empty(_BLOCK, dtype=np.float32)
    errors = np.empty(_BLOCK, dtype=np.float64)
    rest = (limits, singles.view(np.uint32), singles, errors, mask)
    _shrink_bf16(bits, limits.size, size, *form.numbers, *rest)


@compiled("void(K*, int64, int64, float64*, uint8*)")
def _shrink_wide(values, scopes, size, limits, mask):
    for scope in range(scopes):
        limit = limits[scope]
        for i in range(scope * size, (scope + 1) * size):
            value = np.float64(values[i])
            above, below = value - limit, value + limit
            result = above if value > limit else 0.0
            result = below if value < -limit else result
            values[i] = result
            mask[i] = values[i] != 0


@compiled("void(K*, int64, int64, K, uint32, K, float64*, uint32*, float32*, float64*, uint8*)")
def _shrink_bf16(bits, scopes, size, magnitude, shift, infinity, limits, patterns, singles, errors, mask):
    """Differences are rounded to float32; what is halfway there goes back to the side that it came from."""
    for scope in range(scopes):
        limit = limits[scope]
        for first in range(0, size, _BLOCK):
            begin = scope * size + first
            count = _BLOCK if size - first > _BLOCK else size - first
            for i in range(count):
                value = value_of(bits[begin + i], magnitude, shift, infinity)
                rest = value - limit if value > limit else 0.0
                singles[i] = rest
                errors[i] = rest - np.float64(singles[i])
            for i in range(count):
                pattern = patterns[i]
                halfway = (pattern & np.uint32(0xFFFF)) == 0x8000
                pattern += np.uint32(halfway and errors[i] > 0)
                pattern -= np.uint32(halfway and errors[i] < 0)
                pattern += np.uint32(0x7FFF) + ((pattern >> np.uint32(16)) & np.uint32(1))
                key = np.uint16(pattern >> np.uint32(16))
                any_left = np.uint16(key > 0 or errors[i] != 0)
                bits[begin + i] = key | (bits[begin + i] & np.uint16(0x8000)) * any_left
                mask[begin + i] = key > 0
