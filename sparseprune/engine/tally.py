"""What is counted in a tensor: its elements, its zeros and its energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparseprune.engine.scoring import magnitude_keys

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 16  # elements that are float64 at a time: they stay in the cache


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts of one tensor or a part of it; parts add up.

    `zeros` are elements equal to 0, of either sign; `energy` is the sum of squares, in float64.

    >>> tally(torch.tensor([3.0, -0.0, 4.0]))
    Tally(numel=3, zeros=1, energy=25.0)
    """

    numel: int = 0
    zeros: int = 0
    energy: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.numel + other.numel, self.zeros + other.zeros, self.energy + other.energy)


def tally(tensor: Tensor) -> Tally:
    """The tally of a tensor of a dtype that can be pruned."""
    total = Tally()
    for chunk in torch.split(tensor.reshape(-1), _CHUNK):
        # Keys of floats are their bits without the sign, which are 0 for zeros of either sign.
        marked = magnitude_keys(chunk) if chunk.dtype.is_floating_point else chunk
        zeros = chunk.numel() - int(torch.count_nonzero(marked))
        wide = chunk.to(torch.float64)
        total += Tally(chunk.numel(), zeros, float(torch.dot(wide, wide)))
    return total
