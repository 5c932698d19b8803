"""Random scores that depend on a seed and on a block's number alone, not on chunks, threads or device."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FACTORS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
_ALL_BITS = (1 << 64) - 1


def random_scores(seed: int, name: str, first: int, count: int) -> Tensor:
    """Float64 (count), uniform in [0, 1): the scores of the blocks `first`, `first` + 1, ... of `name`.

    SplitMix64 (Steele, Lea and Flood 2014) over the blocks' numbers, started at a hash of seed and name.

    >>> bool((random_scores(0, "w", 2, 3) == random_scores(0, "w", 0, 5)[2:]).all())
    True
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    start = (int.from_bytes(digest, "little") + first * _GOLDEN) & _ALL_BITS
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(start)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)
