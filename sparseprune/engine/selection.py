"""Selection: which blocks of a scope survive a budget, exactly, ties included.

Owns the tie rule: among equal keys the lower index wins. Works on integer keys of shape (..., blocks),
so that no comparison rounds and nothing depends on threads or device. On the CPU numpy does the work:
its strided comparisons and its partition are several times as fast as torch's (see tests/benchmarks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparseprune.engine.radix import select_by_histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_PAIRWISE_LIMIT = 16  # up to here comparing all pairs beats a search for the k-th largest
_HISTOGRAM_LIMIT = 1 << 24  # from here on no copies of all keys and no int64 positions are affordable
_CHUNK = 1 << 16  # scopes that are compared at one time: their keys stay in the cache


def select(keys: Tensor, nnz: int) -> Tensor:
    """Bool mask of exactly `nnz` True along the last dimension: the largest keys, lower index first.

    `nnz` must lie within 0 and the size of the last dimension.

    >>> select(torch.tensor([[3, 7, 7, 7]]), 2)
    tensor([[False,  True,  True, False]])
    """
    blocks = keys.shape[-1]
    if nnz in (0, blocks) or not keys.numel():
        return torch.full(keys.shape, nnz == blocks, dtype=torch.bool, device=keys.device)
    scopes = keys.reshape(-1, blocks)
    if blocks >= _HISTOGRAM_LIMIT:
        kept = torch.stack([select_by_histogram(scope, nnz) for scope in scopes])
    elif keys.device.type == "cpu":
        choose = _pairwise if blocks <= _PAIRWISE_LIMIT else _above_kth
        kept = torch.from_numpy(choose(scopes.numpy(), nnz))
    else:
        kept = _select_by_sort(scopes, nnz)
    return kept.reshape(keys.shape)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest along the last dimension, 1 <= k <= its size; shape without that dimension."""
    place = scores.shape[-1] - k
    if scores.device.type != "cpu":
        return scores.kthvalue(place + 1, dim=-1).values
    return torch.from_numpy(_at_place(scores.numpy(), place))


def _pairwise(keys: Array, nnz: int) -> Array:
    """Each block's rank is the number of blocks that beat it: larger ones, and equal ones before it."""
    kept = np.empty(keys.shape, dtype=np.bool_)
    blocks = keys.shape[1]
    for begin in range(0, len(keys), _CHUNK):
        chunk = keys[begin : begin + _CHUNK]
        columns = [np.ascontiguousarray(chunk[:, block]) for block in range(blocks)]
        ranks = [np.zeros(len(chunk), dtype=np.int8) for _ in columns]
        for later in range(1, blocks):
            for earlier in range(later):
                wins = (columns[earlier] >= columns[later]).view(np.int8)
                ranks[later] += wins
                ranks[earlier] += 1 - wins
        for block, rank in enumerate(ranks):
            kept[begin : begin + _CHUNK, block] = rank < nnz
    return kept


def _above_kth(keys: Array, nnz: int) -> Array:
    """All above the k-th largest, and as many of those equal to it as the budget still holds."""
    kth = _at_place(keys, keys.shape[1] - nnz)[:, None]
    kept = keys > kth
    equal = keys == kth
    places = nnz - np.count_nonzero(kept, axis=1)
    crowded = np.flatnonzero(np.count_nonzero(equal, axis=1) > places)
    equal[crowded] &= np.cumsum(equal[crowded], axis=1, dtype=np.int32) <= places[crowded, None]
    kept |= equal
    return kept


def _at_place(keys: Array, place: int) -> Array:
    """What stands at `place` of the last dimension once it is sorted; numpy is fast from 32 bits on."""
    wide = keys.astype(np.int32) if keys.dtype.itemsize < 4 else keys
    found: Array = np.partition(wide, place, axis=-1)[..., place].astype(keys.dtype)
    return found


def _select_by_sort(keys: Tensor, nnz: int) -> Tensor:
    """The first `nnz` of a stable sort: the way of other devices, and the measure of the ways above."""
    ranked = keys.sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    return kept.scatter_(-1, ranked[..., :nnz], value=True)
