"""Writing decisions: patterns become +0.0 where a block is dropped, and a mask says where.

In place, on flat arrays; survivors keep every bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.kernels.compiling import compiled

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format

    Mask = NDArray[np.uint8]


def cut_below(bits: Bits, form: Format, limit: int, mask: Mask) -> int:
    """Zero the elements (flat) whose key is below `limit`, mark the others 1 in `mask`; how many are left."""
    if limit > form.magnitude:
        bits.fill(0)
        mask.fill(0)
        return 0
    return int(_cut_below(bits, bits.size, form.magnitude, limit, mask))


def cut_blocks(bits: Bits, keep: Mask, block: int, mask: Mask) -> None:
    """Zero the runs of `block` elements whose byte in `keep` is 0, and say it for each element in `mask`."""
    if block == 1:
        _cut_elements(bits, keep, bits.size, mask)
    else:
        _cut_runs(bits, keep, keep.size, block, mask)


@compiled("int64(K*, int64, K, K, uint8*)")
def _cut_below(bits, size, magnitude, limit, mask):
    left = 0
    for i in range(size):
        kept = (bits[i] & magnitude) >= limit
        bits[i] *= kept
        mask[i] = kept
        left += kept
    return left


@compiled("void(K*, uint8*, int64, uint8*)")
def _cut_elements(bits, keep, size, mask):
    for i in range(size):
        kept = keep[i]
        bits[i] *= kept
        mask[i] = kept


@compiled("void(K*, uint8*, int64, int64, uint8*)")
def _cut_runs(bits, keep, blocks, block, mask):
    for b in range(blocks):
        kept = keep[b]
        for i in range(b * block, (b + 1) * block):
            bits[i] *= kept
            mask[i] = kept
