"""Selection: exactly the k largest keys of every scope, ties by the lower index, and the k-th largest.

Owns which way is the fastest for how many blocks, on the CPU and on devices. Called by scopes and execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

_PAIRWISE_LIMIT = 16  # blocks a scope up to which comparing all pairs beats a search for the k-th largest
_HISTOGRAM_LIMIT = 1 << 24  # blocks a scope from which copies of all keys and int64 positions cost too much
_CHUNK = 1 << 16  # scopes to compare at one time, so that their keys stay in the cache
_ROW_CHUNK = 1 << 22  # keys of one scope to count at one time
_DIGIT_BITS = 16


def select(keys: Tensor, nnz: int | Tensor) -> Tensor:
    """Bool mask of exactly `nnz` True along the last dimension: the largest keys, lower index first.

    `nnz` must lie within 0 and the size of the last dimension; a tensor has one for each scope.

    >>> select(torch.tensor([[3, 7, 7, 7]]), 2)
    tensor([[False,  True,  True, False]])
    """
    blocks = keys.shape[-1]
    if isinstance(nnz, Tensor):
        order = keys.argsort(dim=-1, descending=True, stable=True)
        wins = torch.arange(blocks, device=keys.device) < nnz.to(keys.device).unsqueeze(-1)
        return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device).scatter_(-1, order, wins)
    if nnz in (0, blocks) or not keys.numel():
        return torch.full(keys.shape, nnz == blocks, dtype=torch.bool, device=keys.device)
    scopes = keys.reshape(-1, blocks)
    if keys.device.type != "cpu":
        kept = select_by_comparing(scopes, nnz)
    elif blocks >= _HISTOGRAM_LIMIT:
        kept = torch.stack([select_by_histogram(scope, nnz) for scope in scopes])
    else:
        choose = _pairwise if blocks <= _PAIRWISE_LIMIT else _above_kth
        kept = torch.from_numpy(choose(scopes.numpy(), nnz))
    return kept.reshape(keys.shape)


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest along the last dimension, 1 <= k <= its size; shape without that dimension."""
    place = scores.shape[-1] - k
    if scores.device.type != "cpu":
        return scores.kthvalue(place + 1, dim=-1).values
    return torch.from_numpy(_at_place(scores.numpy(), place))


def select_by_comparing(keys: Tensor, nnz: int) -> Tensor:
    """As `select` of keys (scopes, blocks), 0 < nnz < blocks: for devices, which are never waited for."""
    if keys.shape[1] <= _PAIRWISE_LIMIT:
        return _all_pairs(keys, nnz)
    kth = kth_by_bits(keys, nnz).unsqueeze(-1)
    kept, equal = keys > kth, keys == kth
    places = nnz - kept.sum(-1, keepdim=True)
    return kept.logical_or_(equal & (equal.cumsum(-1, dtype=torch.int32) <= places))


def kth_by_bits(keys: Tensor, k: int) -> Tensor:
    """The k-th largest of signed integers along the last dimension: bit by bit, the highest first.

    Counts are exact and have no order; the host waits for none of them.

    >>> kth_by_bits(torch.tensor([[5, -3, 9, 5], [0, -1, -1, -2]], dtype=torch.int8), 3)
    tensor([ 5, -1], dtype=torch.int8)
    """
    info = torch.iinfo(keys.dtype)
    kth = torch.full(keys.shape[:-1], info.min, dtype=keys.dtype, device=keys.device)
    for bit in reversed(range(info.bits)):
        higher = kth ^ (info.min if bit == info.bits - 1 else 1 << bit)
        reached = (keys >= higher.unsqueeze(-1)).sum(-1) >= k
        kth = torch.where(reached, higher, kth)
    return kth


def select_by_histogram(keys: Tensor, nnz: int) -> Tensor:
    """Bool mask (blocks) of exactly `nnz` True: the largest of keys (blocks), lower index first.

    `nnz` lies within 1 and the number of keys.
    """
    kth = kth_largest_key(keys, nnz)
    keep = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    above = sum(int((chunk > kth).sum()) for chunk in torch.split(keys, _ROW_CHUNK))
    places = nnz - above
    for chunk, kept in zip(torch.split(keys, _ROW_CHUNK), torch.split(keep, _ROW_CHUNK), strict=True):
        equal = chunk == kth
        count = int(equal.sum())
        if count > places:
            equal &= equal.cumsum(0) <= places
        places -= min(count, places)
        torch.logical_or(chunk > kth, equal, out=kept)
    return keep


def kth_largest_key(keys: Tensor, k: int) -> int:
    """The k-th largest of signed integers (blocks): digit by digit, the most significant first.

    >>> kth_largest_key(torch.tensor([5, -3, 9, 5], dtype=torch.int16), 3)
    5
    """
    bits = keys.element_size() * 8
    digit_bits = min(_DIGIT_BITS, bits)
    prefix = 0
    for shift in range(bits - digit_bits, -1, -digit_bits):
        histogram = torch.zeros(1 << digit_bits, dtype=torch.int64, device=keys.device)
        for chunk in torch.split(keys, _ROW_CHUNK):
            histogram += torch.bincount(_digits(chunk, prefix, shift, digit_bits), minlength=1 << digit_bits)
        # How many keys have this digit or a larger one; the first that reaches k from above is the one.
        at_least = histogram.flip(0).cumsum(0)
        behind = int((at_least < k).sum())
        k -= int(at_least[behind - 1]) if behind else 0
        prefix = prefix << digit_bits | ((1 << digit_bits) - 1 - behind)
    return prefix + torch.iinfo(keys.dtype).min


def _digits(chunk: Tensor, prefix: int, shift: int, digit_bits: int) -> Tensor:
    """The digits at `shift` of the keys whose higher digits are `prefix`, all counted from the lowest key.

    Flipping the sign bit of a two's complement number gives its distance from the lowest one.
    """
    mask = (1 << digit_bits) - 1
    bits = chunk.element_size() * 8
    digits = (chunk >> shift).to(torch.int64)
    if shift + digit_bits == bits:
        return (digits + (1 << (digit_bits - 1))) & mask
    higher = (chunk >> (shift + digit_bits)).to(torch.int64)
    wanted = prefix - (1 << (bits - shift - digit_bits - 1))
    return digits[higher == wanted] & mask


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


def _all_pairs(keys: Tensor, nnz: int) -> Tensor:
    """As `_pairwise`, all scopes side by side in a few operations for each block."""
    columns = keys.T.contiguous()
    ranks = torch.zeros(columns.shape, dtype=torch.int8, device=keys.device)
    for later in range(1, len(columns)):
        wins = columns[:later] >= columns[later]
        ranks[later] += wins.sum(0, dtype=torch.int8)
        ranks[:later] += ~wins
    return (ranks < nnz).T


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
    """The key at `place` of the sorted last dimension; numpy is fast from 32 bits on."""
    wide = keys.astype(np.int32) if keys.dtype.itemsize < 4 else keys
    found: Array = np.partition(wide, place, axis=-1)[..., place].astype(keys.dtype)
    return found
