"""What is counted in a tensor: its elements, its zeros and its energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.counting import zeros_and_energy
from sparseprune.engine.kernels.formats import FORMATS

if TYPE_CHECKING:
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
