"""Transposable N:M: square tiles in which n of m survive in every row and in every column.

Owns the exact choice of the largest sum of scores among all legal patterns of a tile (Hubara et al. 2021,
"Accelerated Sparse Neural Training", section 4, maximize sums of |w|). Knows no block and no file. Called by
scopes. Imports torch.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.tiles import INFINITE_SUM, SCORE_BITS, TIE_BITS, select_tiles
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 1 << 17  # tiles that a device decides at one time: sums of a tile take about 800 bytes


def select_transposable(scores: Tensor, size: int, kept: int) -> Tensor:
    """Bool mask of the shape of `scores` (..., size * size): `kept` True in each row and column of a tile.

    The sum of the scores that are kept is the largest one; of equal sums the pattern wins that keeps lower
    indices first, in row-major order. Scores count in integer multiples of 2**-43 of the power of two above
    the largest one of their tile, so that sums are exact on every device, in any order.

    >>> select_transposable(torch.tensor([[1.0, 3.0, 2.0, 1.0]]), 2, 1)
    tensor([[False,  True,  True, False]])

    Raises:
        SparsityError: a score is infinite, NaN or negative, so that sums of them say nothing.
    """
    if kept in (0, size) or not scores.numel():
        return torch.full(scores.shape, kept == size, dtype=torch.bool, device=scores.device)
    tiles = scores.detach().reshape(-1, size * size).to(torch.float64)
    if not bool((torch.isfinite(tiles) & (tiles >= 0)).all()):
        raise SparsityError(INFINITE_SUM)
    if tiles.device.type == "cpu":
        keep = np.empty(tiles.numel(), dtype=np.uint8)
        keys = tiles.contiguous().view(-1).numpy().view(np.uint64)
        select_tiles(keys, FORMATS["F64"], size, size, kept, keep)
        return torch.from_numpy(keep.view(np.bool_)).reshape(scores.shape)
    masks = [_select(some, size, kept) for some in torch.split(tiles, _TOGETHER)]
    return torch.cat(masks).reshape(scores.shape)


def _select(tiles: Tensor, size: int, kept: int) -> Tensor:
    """As `select_tiles`, by operations on tensors, for devices: rows join one by one.

    Of the rows before the next one the best sum stays for each count of what columns keep.
    """
    values = (_integers(tiles) << TIE_BITS) + _ties(size, tiles.device)[:, None]
    rows = list(combinations(range(size), kept))
    best = {(0,) * size: torch.zeros_like(values[0])}
    for row in range(size):
        further: dict[tuple[int, ...], Tensor] = {}
        for columns in rows:
            own = values[[row * size + column for column in columns]].sum(0)
            for counts, key in best.items():
                both = tuple(count + (column in columns) for column, count in enumerate(counts))
                if max(both) <= kept:
                    total = key + own
                    further[both] = torch.maximum(further[both], total) if both in further else total
        best = further
    return (best[(kept,) * size][:, None] & _ties(size, tiles.device)) != 0


def _ties(size: int, device: torch.device) -> Tensor:
    """A bit for each element of a tile, the first one highest: the lowest bits of a sum are its mask."""
    return 1 << torch.arange(size * size - 1, -1, -1, device=device)


def _integers(tiles: Tensor) -> Tensor:
    """Scores (tiles, elements) as integers below 2**SCORE_BITS, (elements, tiles): int64, rounded down."""
    columns = tiles.T.contiguous()
    scale = SCORE_BITS - torch.frexp(columns.amax(0)).exponent.to(torch.int64)
    # Two factors, as one alone may be out of range; powers of two round nothing.
    first = scale.div(2, rounding_mode="floor")
    for power in (first, scale - first):
        columns = columns * ((power + 1023) << 52).view(torch.float64)
    return columns.to(torch.int64)
