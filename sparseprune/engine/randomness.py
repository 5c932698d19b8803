"""Random scores that depend on a seed and on a block's number alone, not on chunks, threads or device."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GOLDEN = 0x9E37_79B9_7F4A_7C15
_FACTORS = (0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB)
_ALL_BITS = (1 << 64) - 1


def random_scores(seed: int, name: str, numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Float64, uniform in [0, 1), of the shape of `numbers`: the scores of these blocks of `name`.

    SplitMix64 (Steele, Lea and Flood 2014) over the blocks' numbers, started at a hash of seed and name.

    >>> first, second = random_scores(0, "w", np.arange(2, dtype=np.uint64))
    >>> bool(random_scores(0, "w", np.array([1], dtype=np.uint64))[0] == second)
    True
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    start = (int.from_bytes(digest, "little") + _GOLDEN) & _ALL_BITS
    state = numbers * np.uint64(_GOLDEN) + np.uint64(start)
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
