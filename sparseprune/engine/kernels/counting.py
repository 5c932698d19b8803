"""What is counted in elements: zeros, energy, NaN; and digits of keys, for the search of a k-th largest.

All of it in one pass over patterns (see formats.py), flat arrays of any length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, compiled_sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

DIGIT_BITS = 16


def first_nan(bits: Bits, form: Format) -> int:
    """The number of the first NaN among the elements (flat), -1 where there is none."""
    magnitude = bits.dtype.type(form.magnitude)
    if bits.size == 0 or int(_largest(bits, magnitude)) <= form.largest:
        return -1
    return int(np.argmax((bits & magnitude) > form.largest))


def zeros_and_energy(bits: Bits, form: Format) -> tuple[int, float]:
    """How many elements (flat) are 0 of either sign, and the sum of all squares."""
    magnitude = bits.dtype.type(form.magnitude)
    zeros = int(_zeros(bits, magnitude))
    if form.itemsize == 8:
        return zeros, float(_energy_wide(bits.view(np.float64)))
    if form.itemsize == 4:
        return zeros, float(_energy_wide(bits.view(np.float32)))
    return zeros, float(
        _energy(bits, np.uint32(form.magnitude), np.uint32(form.shift), form.scale, np.uint32(form.infinity))
    )


def count_digits(bits: Bits, form: Format, prefix: int, shift: int, counts: NDArray[np.int64]) -> None:
    """Add to `counts` (1 << DIGIT_BITS) the digits at `shift` of the keys whose higher bits are `prefix`."""
    magnitude = bits.dtype.type(form.magnitude)
    if shift + DIGIT_BITS >= 8 * form.itemsize:
        _count_top(bits, magnitude, bits.dtype.type(shift), counts)
    else:
        above = np.uint64(shift + DIGIT_BITS)
        _count_below(bits, magnitude, np.uint64(prefix), above, np.uint64(shift), counts)


def count_equal(bits: Bits, form: Format, key: int) -> int:
    """How many elements (flat) have this key."""
    kind = bits.dtype.type
    return int(_count_equal(bits, kind(form.magnitude), kind(key)))


@compiled
def _largest(bits, magnitude):
    top = magnitude & np.uint8(0)
    for i in range(bits.size):
        top = max(top, bits[i] & magnitude)
    return top


@compiled
def _zeros(bits, magnitude):
    zeros = 0
    for i in range(bits.size):
        zeros += (bits[i] & magnitude) == 0
    return zeros


@compiled_sum
def _energy(bits, magnitude, shift, scale, infinity):
    energy = 0.0
    for i in range(bits.size):
        key = np.uint32(bits[i]) & magnitude
        pattern = np.uint32(key << shift)
        value = np.float64(pattern.view(np.float32))
        energy += np.inf if key >= infinity else value * value
    return energy * scale * scale


@compiled_sum
def _energy_wide(values):
    energy = 0.0
    for i in range(values.size):
        value = np.float64(values[i])
        energy += value * value
    return energy


@compiled
def _count_top(bits, magnitude, shift, counts):
    for i in range(bits.size):
        counts[(bits[i] & magnitude) >> shift] += 1


@compiled
def _count_below(bits, magnitude, prefix, above, shift, counts):
    for i in range(bits.size):
        key = np.uint64(bits[i] & magnitude)
        if key >> above == prefix:
            counts[(key >> shift) & np.uint64(0xFFFF)] += 1


@compiled
def _count_equal(bits, magnitude, key):
    count = 0
    for i in range(bits.size):
        count += (bits[i] & magnitude) == key
    return count
