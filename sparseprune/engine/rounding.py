"""Rounding: float64 results as elements of a tensor's own dtype, rounded once.

Owns the way back from the wide arithmetic of the engine to storage. Called by blocks when they write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_DIRECT = (torch.float64, torch.float32)


def round_to(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers as the nearest numbers of `dtype`, ties to even; integers saturate.

    torch converts float64 to the narrow floats by way of float32, which rounds twice. Rounding to odd on
    that way makes the two roundings equal to one (Boldo and Melquiond 2008, Emulation of FMA and Correctly
    Rounded Sums), as float32 has at least two bits more than each narrow format.

    >>> just_above_half = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)
    >>> just_above_half.to(torch.bfloat16).item(), round_to(just_above_half, torch.bfloat16).item()
    (1.0, 1.0078125)
    """
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        highest = info.max if info.bits < 64 else 2**63 - 1024  # the largest double that fits
        return wide.round().clamp(info.min, highest).to(dtype)
    if dtype in _DIRECT:
        return wide.to(dtype)
    return _to_odd_float32(wide).to(dtype)


def _to_odd_float32(wide: Tensor) -> Tensor:
    """Float32 whose last bit is 1 wherever the number had to be rounded; NaN and infinity as they are."""
    near = wide.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    even = (bits & 1) == 0
    too_large = even & (back.abs() > wide.abs())
    too_small = even & (back.abs() < wide.abs())
    return (bits - too_large.to(torch.int32) + too_small.to(torch.int32)).view(torch.float32)
