"""Selection in one large scope: the k-th largest key by histograms of its digits, then one pass for ties.

Needs no memory beside keys and mask that grows with the scope; every pass walks chunks in order. Called
by selection where sorting or copying all keys would be too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22
_DIGIT_BITS = 16


def select_by_histogram(keys: Tensor, nnz: int) -> Tensor:
    """Bool mask (blocks) of exactly `nnz` True: the largest of keys (blocks), lower index first.

    `nnz` lies within 1 and the number of keys.
    """
    kth = kth_largest_key(keys, nnz)
    keep = torch.empty(keys.shape, dtype=torch.bool, device=keys.device)
    above = sum(int((chunk > kth).sum()) for chunk in torch.split(keys, _CHUNK))
    places = nnz - above
    for chunk, kept in zip(torch.split(keys, _CHUNK), torch.split(keep, _CHUNK), strict=True):
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
        for chunk in torch.split(keys, _CHUNK):
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
