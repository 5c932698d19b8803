"""Soft thresholds by compiled loops: thresholds made of keys, differences of elements, products of blocks.

Owns the loops that shrink; they equal the torch engine bit for bit. Called by execution, and by the engine
for tensors on the CPU.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.kernels.compiling import compiled, inlined, value_of
from sparseprune.engine.kernels.selecting import two_keys
from sparseprune.engine.kernels.sums import storage_order

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.engine.kernels.selecting import Mask

    Floats = NDArray[np.float64]

_BLOCK = 512  # elements whose results stay in the first cache


def kth_mids(bits: Bits, form: Format, blocks: int, nnz: int, k_weight: float) -> Floats:
    """`kth_mid` of the engine for every `blocks` elements (flat, whole scopes), by their magnitudes."""
    scopes = bits.size // blocks
    if nnz == 0:
        return np.full(scopes, np.inf)
    if blocks == 4 and form.itemsize < 8:
        mids = np.empty(scopes, dtype=np.float64)
        _quad_mids(bits, scopes, *form.numbers, form.scale, nnz, k_weight, mids)
        return mids
    kth, following = two_keys(bits, form, blocks, nnz)
    return mid_of(form.values(kth), form.values(following), k_weight)


def mid_of(kth: Floats, following: Floats, k_weight: float) -> Floats:
    """`(kth + k_weight * following) / (1 + k_weight)`, as the engine computes it."""
    return kth if k_weight == 0 else (kth + k_weight * following) / (1 + k_weight)


def block_factors(norms: Floats, limits: Floats) -> Floats:
    """What blocks of finite norms are multiplied by: `max(0, 1 - limit / norm)`, as the engine has it."""
    rests = norms - limits
    factors = np.zeros_like(norms)
    np.divide(rests, norms, out=factors, where=rests > 0)
    return factors


def shrink_elements(view: Bits, form: Format, limits: Floats, mask: Mask) -> None:
    """Move finite elements (*grid, ...) towards zero by a limit (*grid), up to +0.0, in place; rounded once.

    `mask` (flat, in the order of the storage) becomes 1 where the result is not zero.
    """
    _shrink(view, form, limits / form.scale, mask, multiplies=0)


def scale_blocks(view: Bits, form: Format, factors: Floats, mask: Mask) -> None:
    """Multiply blocks (*grid, *block) of finite elements by factors (*grid) within 0 and 1; rounded once.

    What is multiplied by 0 becomes +0.0. `mask` (flat, in the order of the storage) becomes 1 elsewhere.
    """
    _shrink(view, form, factors, mask, multiplies=1)


def _shrink(view: Bits, form: Format, numbers: Floats, mask: Mask, *, multiplies: int) -> None:
    """Elements in the order of the storage, with a number for each run of them."""
    if not view.size:
        return
    order, rank = storage_order(view), numbers.ndim
    laid = view.transpose(order)
    if not laid.flags.c_contiguous:
        copy = np.ascontiguousarray(laid)
        _shrink(copy.transpose(np.argsort(order)), form, numbers, mask, multiplies=multiplies)
        laid[...] = copy
        return
    inside = [dim >= rank or view.shape[dim] == 1 for dim in order]
    begin = inside.index(False) if False in inside else 0
    end = len(order) - inside[::-1].index(False) if False in inside else 0
    spread = numbers.reshape(numbers.shape + (1,) * (view.ndim - rank)).transpose(order)
    each = np.broadcast_to(spread, [*spread.shape[:begin], *laid.shape[begin:end], *spread.shape[end:]])
    by = np.ascontiguousarray(each).reshape(-1)
    rest = (by, by.size, prod(laid.shape[end:]), multiplies, np.empty(_BLOCK))
    bits = laid.reshape(-1)
    if form.itemsize > 2:
        _shrink_wide(bits.view(f"f{form.itemsize}"), bits.size, *rest, mask)
        return
    singles, errors = np.empty(_BLOCK, dtype=np.float32), np.empty(_BLOCK)
    _shrink_narrow(bits, bits.size, *form.numbers, *rest, singles.view(np.uint32), singles, errors, mask)


@compiled("void(K*, int64, K, uint32, K, float64, int64, float64, float64*)")
def _quad_mids(bits, scopes, magnitude, shift, infinity, scale, nnz, k_weight, mids):
    """Four keys in order by comparisons of two, without branches, which nobody could foretell."""
    for scope in range(scopes):
        i = 4 * scope
        a = value_of(bits[i], magnitude, shift, infinity)
        b = value_of(bits[i + 1], magnitude, shift, infinity)
        c = value_of(bits[i + 2], magnitude, shift, infinity)
        d = value_of(bits[i + 3], magnitude, shift, infinity)
        high, low = (a if a > b else b), (b if a > b else a)
        other_high, other_low = (c if c > d else d), (d if c > d else c)
        first, last = (high if high > other_high else other_high), (low if low < other_low else other_low)
        one, other = (other_high if high > other_high else high), (other_low if low < other_low else low)
        second, third = (one if one > other else other), (other if one > other else one)
        kth = first if nnz == 1 else second if nnz == 2 else third if nnz == 3 else last
        following = second if nnz == 1 else third if nnz == 2 else last if nnz == 3 else 0.0
        mids[scope] = (kth * scale + k_weight * (following * scale)) / (1 + k_weight)


@inlined
def _spread(numbers, count, run, begin, size, each):
    """The number of each of `size` elements from `begin` on; each run of them has one, in turn."""
    number, place, done = begin // run % count, begin % run, 0
    while done < size:
        if run == 1:
            step = count - number if count - number < size - done else size - done
            for i in range(step):
                each[done + i] = numbers[number + i]
            number += step
        elif run == 4 and place == 0 and size - done >= 4:
            step = (size - done) // 4
            step = 4 * (count - number if count - number < step else step)
            for i in range(step // 4):
                each[done + 4 * i] = numbers[number + i]
                each[done + 4 * i + 1] = numbers[number + i]
                each[done + 4 * i + 2] = numbers[number + i]
                each[done + 4 * i + 3] = numbers[number + i]
            number += step // 4
        else:
            step = run - place if run - place < size - done else size - done
            for i in range(done, done + step):
                each[i] = numbers[number]
            number += 1
        done, place = done + step, 0
        number = 0 if number == count else number


@compiled("void(K*, int64, float64*, int64, int64, int64, float64*, uint8*)")
def _shrink_wide(values, size, numbers, count, run, multiplies, each, mask):
    for begin in range(0, size, _BLOCK):
        block = _BLOCK if size - begin > _BLOCK else size - begin
        _spread(numbers, count, run, begin, block, each)
        if multiplies:
            for i in range(block):
                product = np.float64(values[begin + i]) * each[i]
                values[begin + i] = product if each[i] > 0 else 0.0
                mask[begin + i] = each[i] > 0
        else:
            for i in range(block):
                value, limit = np.float64(values[begin + i]), each[i]
                above, below = value - limit, value + limit
                result = above if value > limit else 0.0
                values[begin + i] = below if value < -limit else result
                mask[begin + i] = values[begin + i] != 0


@compiled(
    "void(K*, int64, K, uint32, K, float64*, int64, int64, int64, float64*, uint32*, float32*, float64*, "
    "uint8*)"
)
def _shrink_narrow(
    bits, size, magnitude, shift, infinity, numbers, count, run, multiplies, each, patterns, singles, errors,
    mask,
):  # fmt: skip
    """Results are rounded to float32; what is halfway there goes back to the side that it came from.

    `each` ends as what is above 0 where an element keeps its sign.
    """
    half, one = np.uint32(1) << (shift - np.uint32(1)), np.uint32(1)
    last = half + half - one
    for begin in range(0, size, _BLOCK):
        block = _BLOCK if size - begin > _BLOCK else size - begin
        _spread(numbers, count, run, begin, block, each)
        if multiplies:
            for i in range(block):
                rest = value_of(bits[begin + i], magnitude, shift, infinity) * each[i]
                singles[i] = rest
                errors[i] = rest - np.float64(singles[i])
        else:
            for i in range(block):
                value = value_of(bits[begin + i], magnitude, shift, infinity)
                rest = value - each[i] if value > each[i] else 0.0
                each[i] = rest
                singles[i] = rest
                errors[i] = rest - np.float64(singles[i])
        for i in range(block):
            pattern = patterns[i]
            halfway = (pattern & last) == half
            pattern += np.uint32(halfway and errors[i] > 0)
            pattern -= np.uint32(halfway and errors[i] < 0)
            pattern += half - one + ((pattern >> shift) & one)
            key = pattern >> shift
            key = infinity if key > infinity else key
            sign = np.uint32(bits[begin + i] & ~magnitude) * np.uint32(each[i] > 0)
            bits[begin + i] = key | sign
            mask[begin + i] = each[i] > 0 if multiplies else key > 0
