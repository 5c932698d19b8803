"""What is counted in a tensor: its elements, its zeros and its energy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparseprune.engine.scoring import magnitude_keys

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 20  # elements that are float64 at a time: 8 MiB


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
    flat = tensor.reshape(-1)
    zero = magnitude_keys(torch.zeros(1, dtype=flat.dtype, device=flat.device))
    zeros = int((magnitude_keys(flat) == zero).sum())
    chunks = (chunk.to(torch.float64) for chunk in torch.split(flat, _CHUNK))
    energy = sum((float(chunk.square().sum()) for chunk in chunks), start=0.0)
    return Tally(flat.numel(), zeros, energy)
