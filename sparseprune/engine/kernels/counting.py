"""What is counted in elements: zeros, energy, what is not finite; and digits, to find a k-th largest key.

All of it in one pass over patterns (see formats.py), flat arrays of any length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, compiled_sum, float32_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

DIGIT_BITS = 16


def first_nonfinite(bits: Bits, form: Format) -> int:
    """The number of the first NaN or infinity among the elements (flat), -1 where there is none."""
    if bits.size == 0 or _largest(bits, bits.size, form.magnitude) < form.infinity:
        return -1
    return int(np.argmax((bits & bits.dtype.type(form.magnitude)) >= form.infinity))


def zeros_and_energy(bits: Bits, form: Format) -> tuple[int, float]:
    """How many elements (flat) are 0 of either sign, and the sum of all squares."""
    zeros = int(_zeros(bits, bits.size, form.magnitude))
    if form.itemsize == 8:
        return zeros, float(_energy_wide(bits.view(np.float64), bits.size))
    if form.itemsize == 4:
        return zeros, float(_energy_wide(bits.view(np.float32), bits.size))
    energy = _energy(bits, bits.size, form.magnitude, form.shift, form.scale, form.infinity)
    return zeros, float(energy)


def count_digits(bits: Bits, form: Format, prefix: int, shift: int, counts: NDArray[np.int64]) -> None:
    """Add to `counts` (1 << DIGIT_BITS) the digits at `shift` of the keys whose higher bits are `prefix`."""
    if shift + DIGIT_BITS >= 8 * form.itemsize:
        _count_top(bits, bits.size, form.magnitude, shift, counts)
    else:
        _count_below(bits, bits.size, form.magnitude, prefix, shift, counts)


def count_equal(bits: Bits, form: Format, key: int) -> int:
    """How many elements (flat) have this key."""
    return int(_count_equal(bits, bits.size, form.magnitude, key))


@compiled("uint64(K*, int64, K)")
def _largest(bits, size, magnitude):
    top = magnitude & np.uint8(0)
    for i in range(size):
        key = bits[i] & magnitude
        top = key if key > top else top
    return top


@compiled("int64(K*, int64, K)")
def _zeros(bits, size, magnitude):
    zeros = 0
    for i in range(size):
        zeros += (bits[i] & magnitude) == 0
    return zeros


@compiled_sum("float64(K*, int64, uint32, uint32, float64, uint32)")
def _energy(bits, size, magnitude, shift, scale, infinity):
    energy = 0.0
    for i in range(size):
        key = np.uint32(bits[i]) & magnitude
        value = np.float64(float32_of(np.uint32(key << shift)))
        energy += np.inf if key >= infinity else value * value
    return energy * scale * scale


@compiled_sum("float64(K*, int64)")
def _energy_wide(values, size):
    energy = 0.0
    for i in range(size):
        value = np.float64(values[i])
        energy += value * value
    return energy


@compiled("void(K*, int64, K, K, int64*)")
def _count_top(bits, size, magnitude, shift, counts):
    for i in range(size):
        counts[np.int64((bits[i] & magnitude) >> shift)] += 1


@compiled("void(K*, int64, K, uint64, uint64, int64*)")
def _count_below(bits, size, magnitude, prefix, shift, counts):
    above = shift + np.uint64(16)
    for i in range(size):
        key = np.uint64(bits[i] & magnitude)
        if key >> above == prefix:
            counts[np.int64((key >> shift) & np.uint64(0xFFFF))] += 1


@compiled("int64(K*, int64, K, K)")
def _count_equal(bits, size, magnitude, key):
    count = 0
    for i in range(size):
        count += (bits[i] & magnitude) == key
    return count
