"""Comparing two tensors: changed elements, zeros gained and lost, differences of values.

Owns the loops over pairs of elements and what is counted of them. Called by reports.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.compiling import compiled, compiled_sum, inlined, value_of
from sparseprune.engine.kernels.counting import zeros_and_energy
from sparseprune.engine.kernels.formats import FORMATS, values_of

if TYPE_CHECKING:
    from sparseprune.engine.kernels.formats import Bits, Format, Values
_BLOCK = 4096  # elements that are counted in 16 bits
_RUN = 512  # elements whose changes are kept to find the largest


class Counts(Struct, frozen=True):
    """Counts of elements: `zeroed` are zero only after, `altered` are not zero after and differ from before.

    `first_altered` is the index of the first altered one, -1 for none.
    """

    zeros_before: int = 0
    zeros_after: int = 0
    zeroed: int = 0
    altered: int = 0
    first_altered: int = -1

    @property
    def revived(self) -> int:
        """Elements that are zero only before; they are among the altered ones."""
        return self.zeroed - (self.zeros_after - self.zeros_before)

    @property
    def changed(self) -> int:
        return self.zeroed + self.altered


class Energies(Struct, frozen=True):
    """Sums of squares of all values before, of those of them that are not zero after, and of differences.

    `largest` is the largest difference by magnitude, infinite where a NaN or an infinity came or went;
    `place` is the index of the first of that size, -1 where no values differ.
    """

    before: float = 0.0
    kept: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    place: int = -1


def compare(before: Bits, after: Bits, dtype: str) -> tuple[Counts, Energies]:
    """Compares elements of one dtype (flat, unsigned patterns); KeyError for one without whole bytes.

    Zeros of either sign are equal, NaN only equals the same bits. A complex number is one element: its
    change is the magnitude of the difference.

    >>> old, new = (np.array(each, dtype=np.float32).view(np.uint32) for each in ([3, 4, 1], [3, 0, -1]))
    >>> compare(old, new, "F32")[0]
    Counts(zeros_before=0, zeros_after=1, zeroed=1, altered=1, first_altered=2)
    >>> compare(old, new, "F32")[1]
    Energies(before=26.0, kept=10.0, change=20.0, largest=4.0, place=1)
    """
    zero_bits = DTYPES[dtype].zero_bits
    if zero_bits is None:
        raise KeyError(dtype)
    form = FORMATS.get(dtype)
    if form is not None:
        return _compared(before, after, form)
    counts, energies = compare_values(values_of(before, dtype), values_of(after, dtype))
    if before.itemsize == 8:  # values can be equal where bits are not
        counts, _ = _counted(before, after, zero_bits)
    return counts, energies


def compare_values(before: Values, after: Values) -> tuple[Counts, Energies]:
    """As `compare`, for results of `values_of`, also of unlike dtypes; here all NaNs are equal."""
    complex_ones = np.iscomplexobj(before) or np.iscomplexobj(after)
    wide = np.dtype(np.complex128) if complex_ones else np.result_type(before, after)
    with np.errstate(invalid="ignore"):  # a signalling NaN is widened like every other
        one, other = (values.astype(wide, copy=False) for values in (before, after))
    if complex_ones:
        return _compared_complex(one, other)
    form = FORMATS[f"F{8 * wide.itemsize}"]
    return _compared(_with_one_nan(one).view(form.pattern), _with_one_nan(other).view(form.pattern), form)


# Loops: counts of pairs, energies by what is zero after, differences.


@compiled("void(K*, K*, int64, K, int64*)")
def _count(before, after, size, zero_bits, found):
    zeros_before = zeros_after = zeroed = altered = np.int64(0)
    highest = zero_bits ^ zero_bits
    for begin in range(0, size, _BLOCK):
        end = begin + _BLOCK if size - begin > _BLOCK else size
        dead_before = dead_after = lost = other = np.uint16(0)
        top = zero_bits ^ zero_bits
        for i in range(begin, end):
            one = before[i] & zero_bits
            two = after[i] & zero_bits
            gone = one if two == 0 else two ^ two
            dead_before = np.uint16(dead_before + np.uint16(one == 0))
            dead_after = np.uint16(dead_after + np.uint16(two == 0))
            lost = np.uint16(lost + np.uint16(gone != 0))
            other = np.uint16(other + np.uint16((two != 0) & (before[i] != after[i])))
            top = gone if gone > top else top
        zeros_before += np.int64(dead_before)
        zeros_after += np.int64(dead_after)
        zeroed += np.int64(lost)
        if other > 0 and altered == 0:
            found[4] = begin
        altered += np.int64(other)
        if top > highest:
            highest = top
            found[5] = begin
    found[0] = zeros_before
    found[1] = zeros_after
    found[2] = zeroed
    found[3] = altered


@compiled_sum("void(K*, K*, int64, K, uint32, K, float64*)")
def _keep(before, after, size, magnitude, shift, infinity, sums):
    kept = lost = 0.0
    for i in range(size):
        value = value_of(before[i], magnitude, shift, infinity)
        square = value * value
        live = (after[i] & magnitude) != 0
        kept += square if live else 0.0
        lost += 0.0 if live else square
    sums[0] = kept
    sums[1] = lost


@compiled_sum("void(K*, K*, int64, K, uint32, K, float64, float64*, float64*)")
def _differ(before, after, size, magnitude, shift, infinity, scale, changes, sums):
    energy_before = energy_kept = energy_of_change = 0.0
    largest = -1.0
    for begin in range(0, size, _RUN):
        count = _RUN if size - begin > _RUN else size - begin
        for i in range(count):
            one, two = before[begin + i], after[begin + i]
            value = value_of(one, magnitude, shift, infinity) * scale
            changed = value_of(two, magnitude, shift, infinity) * scale
            change = abs(changed + value if (one ^ two) > magnitude else changed - value)
            change = change if change < np.inf else np.inf
            change = 0.0 if (one == two) | (((one | two) & magnitude) == 0) else change
            changes[i] = change
            square = value * value
            energy_before += square
            energy_kept += square if (two & magnitude) != 0 else 0.0
            energy_of_change += change * change
        top = _top(changes, count)
        if top > largest:
            largest = top
            sums[3] = begin
    sums[0] = energy_before
    sums[1] = energy_kept
    sums[2] = energy_of_change


@inlined
def _top(changes, count):
    """The largest of some changes, none NaN; four chains of comparisons run side by side."""
    a = b = c = d = 0.0
    whole = count // 4 * 4
    for i in range(0, whole, 4):
        a = changes[i] if changes[i] > a else a
        b = changes[i + 1] if changes[i + 1] > b else b
        c = changes[i + 2] if changes[i + 2] > c else c
        d = changes[i + 3] if changes[i + 3] > d else d
    for i in range(whole, count):
        a = changes[i] if changes[i] > a else a
    a = b if b > a else a
    c = d if d > c else c
    return c if c > a else a


# Comparisons that are put together from these loops.


def _compared(before: Bits, after: Bits, form: Format) -> tuple[Counts, Energies]:
    if np.array_equal(before, after):
        zeros, energy = zeros_and_energy(before, form)
        return Counts(zeros, zeros), Energies(energy, energy)
    counts, highest = _counted(before, after, form.magnitude)
    if counts.altered:
        sums, changes = np.zeros(4), np.empty(_RUN)
        _differ(before, after, before.size, *form.numbers, form.scale, changes, sums)
        energy, kept, change, run = sums.tolist()
        part = slice(int(run), int(run) + _RUN)
        return counts, Energies(energy, kept, change, *_largest_place(before, after, form, part))
    sums = np.empty(2)
    _keep(before, after, after.size, *form.numbers, sums)
    kept, lost = (sums * (form.scale * form.scale)).tolist()
    if not counts.zeroed:
        return counts, Energies(kept, kept)
    # If the sum is not finite, some values have no order, and the first of them may be anywhere.
    part = highest if math.isfinite(lost) else slice(0, before.size)
    return counts, Energies(kept + lost, kept, lost, *_largest_place(before, after, form, part))


def _counted(before: Bits, after: Bits, zero_bits: int) -> tuple[Counts, slice]:
    """The counts, and a slice with the zeroed element of the highest pattern."""
    found = np.zeros(6, dtype=np.int64)
    _count(before, after, before.size, zero_bits, found)
    zeros_before, zeros_after, zeroed, altered, begin, highest = map(int, found)
    first, part = -1, slice(begin, begin + _BLOCK)
    if altered:
        marks = (before[part] != after[part]) & ((after[part] & after.dtype.type(zero_bits)) != 0)
        first = begin + int(np.argmax(marks))
    return Counts(zeros_before, zeros_after, zeroed, altered, first), slice(highest, highest + _BLOCK)


def _largest_place(before: Bits, after: Bits, form: Format, part: slice) -> tuple[float, int]:
    """The largest change in a slice, and the index of the first one."""
    one, other = before[part], after[part]
    with np.errstate(invalid="ignore", over="ignore"):
        before_values, after_values = (values_of(bits, form.name).astype(np.float64) for bits in (one, other))
        changes = np.abs(after_values - before_values)
    changes[~(changes < np.inf)] = np.inf
    magnitude = one.dtype.type(form.magnitude)
    changes[(one == other) | ((one | other) & magnitude == 0)] = -1  # less than any change, also one of 0
    place = int(np.argmax(changes))
    return float(changes[place]), part.start + place


def _with_one_nan(values: Values) -> Values:
    nan = np.isnan(values)
    return np.where(nan, values.dtype.type(np.nan), values) if nan.any() else values


def _compared_complex(before: Values, after: Values) -> tuple[Counts, Energies]:
    live_before, live_after = before != 0, after != 0
    different = (before != after) & ~(np.isnan(before) & np.isnan(after))
    altered = different & live_after
    with np.errstate(invalid="ignore", over="ignore"):
        changes = np.where(different, np.abs(after - before), -1.0)
        energies = _energy(before), _energy(before[live_after])
    changes[~(changes < np.inf)] = np.inf
    counts = Counts(
        before.size - int(np.count_nonzero(live_before)),
        after.size - int(np.count_nonzero(live_after)),
        int(np.count_nonzero(live_before & ~live_after)),
        int(np.count_nonzero(altered)),
        int(np.argmax(altered)) if altered.any() else -1,
    )
    if not different.any():
        return counts, Energies(*energies)
    place = int(np.argmax(changes))
    change = float(np.sum(np.square(changes[different])))
    return counts, Energies(*energies, change, float(changes[place]), place)


def _energy(values: Values) -> float:
    return float(np.sum(np.square(values.real) + np.square(values.imag)))
