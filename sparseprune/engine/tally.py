"""Tallies of tensors: elements, zeros and energy; sums and ratios of energies.

Called by execution and reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.counting import zeros_and_energy
from sparseprune.engine.kernels.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparseprune.engine.kernels.formats import Bits


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
