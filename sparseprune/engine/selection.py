"""Selection: which blocks of a scope survive a budget, exactly, ties included.

Owns the tie rule: among equal keys the lower index wins. Works on integer keys of shape (..., blocks),
so that no comparison rounds and nothing depends on threads or device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparseprune.engine.radix import select_by_histogram

_HISTOGRAM_LIMIT = 1 << 22  # from here on no copies of all keys and no int64 positions are affordable
_PAIRWISE_LIMIT = 8  # up to here comparing all pairs beats a search for the k-th largest


def select(keys: Tensor, nnz: int) -> Tensor:
    """Bool mask of exactly `nnz` True along the last dimension: the largest keys, lower index first.

    `nnz` must lie within 0 and the size of the last dimension.

    >>> select(torch.tensor([[3, 7, 7, 7]]), 2)
    tensor([[False,  True,  True, False]])
    """
    blocks = keys.shape[-1]
    if nnz in (0, blocks) or not keys.numel():
        return torch.full(keys.shape, nnz == blocks, dtype=torch.bool, device=keys.device)
    if blocks <= _PAIRWISE_LIMIT:
        return _select_pairwise(keys, nnz)
    if blocks < _HISTOGRAM_LIMIT:
        return _select_kth(keys, nnz)
    scopes = keys.reshape(-1, blocks)
    return torch.stack([select_by_histogram(scope, nnz) for scope in scopes]).reshape(keys.shape)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest along the last dimension, 1 <= k <= its size; shape without that dimension."""
    return scores.kthvalue(scores.shape[-1] - k + 1, dim=-1).values


def _select_pairwise(keys: Tensor, nnz: int) -> Tensor:
    """Each block's rank is the number of blocks that beat it: larger ones, and equal ones before it."""
    blocks = keys.unbind(-1)
    ranks = [torch.zeros_like(blocks[0], dtype=torch.int8) for _ in blocks]
    for later in range(1, len(blocks)):
        for earlier in range(later):
            wins = blocks[earlier] >= blocks[later]
            ranks[later] += wins
            ranks[earlier] += ~wins
    return torch.stack([rank < nnz for rank in ranks], dim=-1)


def _select_kth(keys: Tensor, nnz: int) -> Tensor:
    """All above the k-th largest, and as many of those equal to it as the budget still holds."""
    kth = kth_largest(keys, nnz).unsqueeze(-1)
    above = keys > kth
    equal = keys == kth
    open_places = nnz - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) == open_places).all()):
        return above.logical_or_(equal)
    return above.logical_or_(equal & (equal.cumsum(-1) <= open_places))
