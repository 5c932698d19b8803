"""Compiled loops that count: zeros, energies, digits of keys, marks of nonzero elements.

`tally` counts the zeros and the energy of elements, exactly, however they are cut.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, compiled_sum, float32_of
from sparseprune.engine.kernels.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.dtypes import Dtype
    from sparseprune.engine.kernels.formats import Bits, Format

    Marks = NDArray[np.bool_]

DIGIT_BITS = 16


def first_nonfinite(bits: Bits, form: Format) -> int:
    """The index of the first NaN or infinity among the elements (flat), -1 for none."""
    if bits.size == 0 or _largest(bits, bits.size, form.magnitude) < form.infinity:
        return -1
    return int(np.argmax((bits & bits.dtype.type(form.magnitude)) >= form.infinity))


def zeros_and_energy(bits: Bits, form: Format) -> tuple[int, float]:
    """How many elements (flat) are 0 of either sign, and the sum of all squares."""
    zeros = int(_zeros(bits, bits.size, form.magnitude))
    if form.itemsize >= 4:
        return zeros, float(_energy_wide(bits.view(f"f{form.itemsize}"), bits.size))
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


def mark_nonzero(bits: Bits, dtype: Dtype, marks: Marks) -> tuple[int, int]:
    """How many elements are zero, of either sign, and how many are NaN or infinite.

    `bits` are flat, unsigned patterns of elements of whole bytes, and are overwritten. `marks` become True
    where an element is not zero.

    >>> from sparseprune.engine.dtypes import DTYPES
    >>> marks = np.empty(4, dtype=np.bool_)
    >>> mark_nonzero(np.array([0x8000, 0x3F80, 0xFF80, 0], dtype=np.uint16), DTYPES["BF16"], marks), marks
    ((2, 1), array([False,  True,  True, False]))
    """
    if dtype.zero_bits == 0:
        marks[...] = True
        return 0, _nonfinite(bits, dtype)
    if dtype.zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(dtype.zero_bits)
    np.not_equal(bits, 0, out=marks)
    return bits.size - int(np.count_nonzero(marks)), _nonfinite(bits, dtype)


def _nonfinite(bits: Bits, dtype: Dtype) -> int:
    if dtype.nonfinite is None or bits.size == 0:
        return 0
    first, last = dtype.nonfinite
    numbers = bits.view(f"u{bits.itemsize // dtype.parts}")
    if numbers.max() < first:  # cheap, and nearly always true
        return 0
    found = numbers - numbers.dtype.type(first) <= last - first  # smaller ones wrap around
    return int(np.count_nonzero(found.reshape(-1, dtype.parts).any(axis=1) if dtype.parts > 1 else found))


# The loops.


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


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one tensor or a part of it; parts add up.

    `zeros` are elements equal to 0, of either sign; `energy` is the sum of squares, in float64.
    """

    numel: int = 0
    zeros: int = 0
    energy: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.numel + other.numel, self.zeros + other.zeros, self.energy + other.energy)


def tally(bits: Bits, dtype: str) -> Tally:
    """The tally of elements (flat) of a dtype that can be pruned, from their patterns as unsigned integers.

    >>> tally(np.array([3.0, -0.0, 4.0]).view(np.uint64), "F64")
    Tally(numel=3, zeros=1, energy=25.0)
    """
    form = FORMATS.get(dtype)
    if form is not None:
        return Tally(bits.size, *zeros_and_energy(bits, form))
    wide = bits.view(f"int{8 * bits.itemsize}").astype(np.float64)
    return Tally(bits.size, bits.size - int(np.count_nonzero(bits)), float(np.dot(wide, wide)))


def exact_sum(terms: Iterable[float]) -> float:
    """The exactly rounded sum; infinity and NaN stay.

    >>> exact_sum([1e100, 1.0, -1e100]), exact_sum([math.inf, -math.inf])
    (1.0, nan)
    """
    listed = list(terms)
    try:
        return math.fsum(listed)
    except (OverflowError, ValueError):
        return sum(listed)


def totals_in_units(rows: Iterable[tuple[Sequence[float], int]]) -> list[float]:
    """The sums of columns, each row in units of 2^(its power); the result in units of the largest power.

    >>> totals_in_units([((1.0, 2.0), 0), ((8.0, 0.0), 3), ((1.0, 1.0), -5000)])
    [8.125, 0.25]
    """
    listed = list(rows)
    most = max((power for numbers, power in listed if any(numbers)), default=0)
    scaled = [[math.ldexp(one, power - most) for one in numbers] for numbers, power in listed]
    return [exact_sum(column) for column in zip(*scaled, strict=True)]


def share_of_output(lost: float, dense: float) -> float:
    """The relative error of outputs: the root of lost energy / energy of the dense outputs.

    >>> share_of_output(1.0, 4.0), share_of_output(-1e-20, 4.0), share_of_output(0.0, 0.0)
    (0.5, 0.0, 0.0)
    """
    return math.sqrt(max(lost, 0.0) / dense) if dense > 0 else 0.0
