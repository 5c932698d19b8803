"""Two runs of elements, one before and one after: what differs, what energy is left, the largest change.

Counts look at bit patterns, energies at values (see formats.py); dtypes that no loop reads become floats
first. One pass for the counts, a second one for the energies, which is short where nothing was altered.
Flat arrays of any length. The loops are those of differing.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.counting import zeros_and_energy
from sparseprune.engine.kernels.differing import count_pairs, differences, kept_and_lost
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.values import values_of

if TYPE_CHECKING:
    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.engine.kernels.values import Values


@dataclass(frozen=True, slots=True)
class Counts:
    """Elements: `zeroed` are zero only after, `revived` only before, `altered` are not zero after and differ.

    `first_altered` is the place of the first of these, -1 where there is none.
    """

    zeros_before: int = 0
    zeros_after: int = 0
    zeroed: int = 0
    altered: int = 0
    first_altered: int = -1

    @property
    def revived(self) -> int:
        """A part of the altered ones."""
        return self.zeroed - (self.zeros_after - self.zeros_before)

    @property
    def changed(self) -> int:
        return self.zeroed + self.altered


@dataclass(frozen=True, slots=True)
class Energies:
    """Sums of squares, of all values before and after and of the differences.

    `largest` is the largest difference by magnitude, infinite where a NaN or an infinity came or went,
    `place` the first of its size; -1 where no values differ.
    """

    before: float = 0.0
    after: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    place: int = -1


def compare(before: Bits, after: Bits, dtype: str) -> tuple[Counts, Energies]:
    """Elements of one dtype (flat, unsigned patterns, as many); KeyError for one without whole bytes.

    Zeros of either sign are equal, NaN is equal to the same bits alone. A complex number is one element:
    its change is the magnitude of the difference.

    >>> old, new = (np.array(each, dtype=np.float32).view(np.uint32) for each in ([3, 4, 1], [3, 0, -1]))
    >>> compare(old, new, "F32")[0]
    Counts(zeros_before=0, zeros_after=1, zeroed=1, altered=1, first_altered=2)
    >>> compare(old, new, "F32")[1]
    Energies(before=26.0, after=10.0, change=20.0, largest=4.0, place=1)
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
    """As `compare`, of what `values_of` gives, also for unlike dtypes; here a NaN is equal to every other."""
    complex_ones = np.iscomplexobj(before) or np.iscomplexobj(after)
    wide = np.dtype(np.complex128) if complex_ones else np.result_type(before, after)
    with np.errstate(invalid="ignore"):  # a signalling NaN is widened like every other
        one, other = (values.astype(wide, copy=False) for values in (before, after))
    if complex_ones:
        return _compared_complex(one, other)
    form = FORMATS[f"F{8 * wide.itemsize}"]
    return _compared(_with_one_nan(one).view(form.pattern), _with_one_nan(other).view(form.pattern), form)


def _with_one_nan(values: Values) -> Values:
    nan = np.isnan(values)
    return np.where(nan, values.dtype.type(np.nan), values) if nan.any() else values


def _compared(before: Bits, after: Bits, form: Format) -> tuple[Counts, Energies]:
    if np.array_equal(before, after):
        zeros, energy = zeros_and_energy(before, form)
        return Counts(zeros, zeros), Energies(energy, energy)
    counts, highest = _counted(before, after, form.magnitude)
    if counts.altered:
        energies, part = differences(before, after, form)
        return counts, Energies(*energies, *_largest_place(before, after, form, part))
    kept, lost = kept_and_lost(before, after, form)
    if not counts.zeroed:
        return counts, Energies(kept, kept)
    # A sum that is not finite tells of values that have no order; the first of them may be anywhere.
    part = highest if math.isfinite(lost) else slice(0, before.size)
    return counts, Energies(kept + lost, kept, lost, *_largest_place(before, after, form, part))


def _counted(before: Bits, after: Bits, zero_bits: int) -> tuple[Counts, slice]:
    """What is counted, and a part that has what was zeroed with the highest pattern."""
    counts, part, highest = count_pairs(before, after, zero_bits)
    first = -1
    if counts[-1]:
        altered = (before[part] != after[part]) & ((after[part] & after.dtype.type(zero_bits)) != 0)
        first = part.start + int(np.argmax(altered))
    return Counts(*counts, first), highest


def _largest_place(before: Bits, after: Bits, form: Format, part: slice) -> tuple[float, int]:
    """The largest change in a part, and where it first is."""
    one, other = before[part], after[part]
    with np.errstate(invalid="ignore", over="ignore"):
        before_values, after_values = (values_of(bits, form.name).astype(np.float64) for bits in (one, other))
        changes = np.abs(after_values - before_values)
    changes[~(changes < np.inf)] = np.inf
    magnitude = one.dtype.type(form.magnitude)
    changes[(one == other) | ((one | other) & magnitude == 0)] = -1  # less than any change, also one of 0
    place = int(np.argmax(changes))
    return float(changes[place]), part.start + place


def _compared_complex(before: Values, after: Values) -> tuple[Counts, Energies]:
    live_before, live_after = before != 0, after != 0
    different = (before != after) & ~(np.isnan(before) & np.isnan(after))
    altered = different & live_after
    with np.errstate(invalid="ignore", over="ignore"):
        changes = np.where(different, np.abs(after - before), -1.0)
        energies = _energy(before), _energy(after)
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
