"""Keys and norms of blocks, pairwise sums in float64, and rounding to narrow dtypes, on torch tensors.

Owns the order of sums, which does not depend on chunks or threads. Called by blocks, scopes and solvers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.sums import block_sums
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.formats import Format


# The magnitude key of the largest value that is not NaN: infinity, or the largest number of E4M3.
_LARGEST_KEY = {
    torch.float64: 0x7FF0_0000_0000_0000,
    torch.float32: 0x7F80_0000,
    torch.float16: 0x7C00,
    torch.bfloat16: 0x7F80,
    torch.float8_e5m2: 0x7C,
    torch.float8_e4m3fn: 0x7E,
}
_WITH_MAXIMUM = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # NaN where something is NaN
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The signed integers for bit patterns, by bytes of an element."""
_FORMATS = {torch_dtype(name): form for name, form in FORMATS.items()}
_CHUNK = 1 << 17  # elements turned into float64 at a time: 1 MiB, which stays in the cache
_DEVICE_CHUNK = 1 << 22  # the same on other devices, where each operation takes some microseconds to begin


def magnitude_keys(elements: Tensor) -> Tensor:
    """Signed integers of the elements' own width that are ordered as the magnitudes are.

    The bit pattern of a positive float grows with its value; NaN comes out above infinity. Integers
    use |x| - 1, which fits where |x| of the lowest one does not.

    >>> magnitude_keys(torch.tensor([-128, 5, 0], dtype=torch.int8))
    tensor([127,   4,  -1], dtype=torch.int8)
    """
    if not elements.dtype.is_floating_point:
        return torch.where(elements > 0, -elements, elements).bitwise_not_()
    bits = elements.view(INTEGERS[elements.element_size()])
    return bits & torch.iinfo(bits.dtype).max


def order_keys(scores: Tensor) -> Tensor:
    """Signed integers ordered as scores of either sign are; -0.0 and 0.0 get one key."""
    if scores.dtype == torch.uint64:
        return scores.view(torch.int64) ^ torch.iinfo(torch.int64).min
    if not scores.dtype.is_floating_point:
        return scores.to(torch.int64)
    bits = (scores.to(torch.float64) + 0.0).view(torch.int64)
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def has_exact_keys(dtype: torch.dtype) -> bool:
    """Whether `magnitude_keys` takes elements of this dtype."""
    return dtype in _LARGEST_KEY or dtype in INTEGERS.values()


def first_nan(elements: Tensor) -> Shape | None:
    """The index of the first NaN in row-major order, None where there is none."""
    if not elements.dtype.is_floating_point or not elements.numel():
        return None
    if elements.dtype in _WITH_MAXIMUM and not math.isnan(float(elements.max())):
        return None  # without a copy
    known = elements if elements.dtype in _LARGEST_KEY else elements.to(torch.float64)
    largest = _LARGEST_KEY[known.dtype]
    keys = magnitude_keys(known)
    if int(keys.max()) <= largest:
        return None
    place = int((keys > largest).reshape(-1).int().argmax())
    return tuple(int(index) for index in torch.unravel_index(torch.tensor(place), elements.shape))


def fused_norms(views: Sequence[Tensor], grid_shape: Shape, p: float) -> Tensor:
    """The p-norm over all elements of each block: float64 of `grid_shape`.

    Each view is (*grid_shape, *elements of one member's block); members are summed in their order.
    The tree of pairs runs over the last dimension first, so whole rows of a block may be summed apart.

    Raises:
        SparsityError: p is not a positive number or infinity.
    """
    if math.isnan(p) or p <= 0:
        raise SparsityError(f"norm of order {p} is not defined: wanted a positive number, or infinity")
    norms = torch.empty(grid_shape, dtype=torch.float64, device=views[0].device)
    if not norms.numel():
        return norms
    if p == 2 and all(view.dtype.is_floating_point and view.dtype != torch.float64 for view in views):
        first, *others = (square_sums(view, len(grid_shape)) for view in views)
        for other in others:
            first += other
        return square_root(first)
    if not grid_shape:
        return _norms_of(views, 0, p)
    dim = max(range(len(grid_shape)), key=grid_shape.__getitem__)
    most = _CHUNK if norms.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, most * grid_shape[dim] // max(1, sum(view.numel() for view in views)))
    for begin in range(0, grid_shape[dim], step):
        size = min(step, grid_shape[dim] - begin)
        chunks = [view.narrow(dim, begin, size) for view in views]
        norms.narrow(dim, begin, size).copy_(_norms_of(chunks, len(grid_shape), p))
    return norms


def pairwise_sum(terms: Tensor, dims: int) -> Tensor:
    """Sum over the last `dims` dimensions by a tree of neighbouring pairs, the last dimension first.

    >>> pairwise_sum(torch.ones(2, 3, 5), 2)
    tensor([15., 15.])
    """
    for _ in range(dims):
        while terms.shape[-1] > 1:
            odd = terms[..., -1:] if terms.shape[-1] % 2 else None
            terms = terms[..., :-1:2] + terms[..., 1::2]
            terms = terms if odd is None else torch.cat([terms, odd], dim=-1)
        terms = terms.sum(-1) if terms.shape[-1] == 0 else terms.squeeze(-1)
    return terms


def patterns(view: Tensor) -> tuple[NDArray[Any], Format] | None:
    """The patterns of a tensor on the CPU, in its memory, for compiled loops; None where they know none."""
    form = _FORMATS.get(view.dtype)
    if form is None or view.device.type != "cpu":
        return None
    return view.detach().view(INTEGERS[form.itemsize]).numpy().view(form.pattern), form


def square_sums(view: Tensor, rank: int) -> Tensor:
    """The sums of squares of each block (*grid, *block), by the tree; these floats' squares fit in float64.

    By compiled loops if they can, which take NaN for infinity.
    """
    known = patterns(view)
    if known is not None:
        sums = torch.from_numpy(np.asarray(block_sums(known[0], rank, known[1], 2)))
        if sums.numel() and math.isfinite(float(sums.max())):
            return sums
    return _square_sums(view, rank)


def _square_sums(view: Tensor, rank: int) -> Tensor:
    """As `square_sums`, by operations on tensors.

    What is read together lies together: whole blocks, or else rows of columns that are blocks.
    """
    sums = torch.empty(view.shape[:rank], dtype=torch.float64, device=view.device)
    dim = outermost(view)
    most = _CHUNK if view.device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, most * view.shape[dim] // view.numel()) if view.ndim else 1
    if view.ndim == 0 or step >= view.shape[dim]:
        return sums.copy_(_squares_summed(view, rank))
    if dim < rank:
        for begin in range(0, view.shape[dim], step):
            size = min(step, view.shape[dim] - begin)
            sums.narrow(dim, begin, size).copy_(_squares_summed(view.narrow(dim, begin, size), rank))
        return sums
    if view.shape[dim] != math.prod(view.shape[rank:]):
        dim = max(range(rank), key=view.shape.__getitem__, default=dim)
        if dim >= rank or view.shape[dim] == 1:
            return sums.copy_(_squares_summed(view, rank))
        for begin in range(view.shape[dim]):
            sums.narrow(dim, begin, 1).copy_(_squares_summed(view.narrow(dim, begin, 1), rank))
        return sums
    step = 1 << step.bit_length() - 1  # so that each part is a node of the tree
    parts = [
        _squares_summed(view.narrow(dim, begin, min(step, view.shape[dim] - begin)), rank)
        for begin in range(0, view.shape[dim], step)
    ]
    return sums.copy_(_down_the_tree(torch.stack(parts)))


def _down_the_tree(terms: Tensor) -> Tensor:
    """Sum over the first dimension by the tree of pairs."""
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else None
        terms = terms[:-1:2] + terms[1::2]
        terms = terms if odd is None else torch.cat([terms, odd])
    return terms[0]


def _squares_summed(view: Tensor, rank: int) -> Tensor:
    wide = view.to(torch.float64)
    return pairwise_sum(wide.mul_(wide), view.ndim - rank)


def outermost(view: Tensor) -> int:
    """The dimension whose neighbours lie farthest apart, among those of more than one place."""
    return max(range(view.ndim), key=lambda dim: (view.shape[dim] > 1, view.stride(dim)), default=0)


def _norms_of(views: Sequence[Tensor], rank: int, p: float) -> Tensor:
    wide = [view.to(torch.float64).abs() for view in views]
    if math.isinf(p):
        return largest(wide, rank)
    # A power of two per block keeps its powers in range; none is needed where they fit in float64.
    fits = p in (1, 2) and all(view.dtype != torch.float64 for view in views)
    exponent = None if fits else block_exponents(wide, rank)
    total: Tensor | None = None
    for magnitudes in wide:
        dims = magnitudes.ndim - rank
        scaled = magnitudes
        if exponent is not None:
            scaled = magnitudes * power_of_two(-exponent).reshape((*exponent.shape, *(1,) * dims))
        powers = scaled if p == 1 else scaled * scaled if p == 2 else scaled**p
        part = pairwise_sum(powers, dims)
        total = part if total is None else total + part
    if total is None:
        raise SparsityError("a block needs at least one member")
    root = total if p == 1 else square_root(total) if p == 2 else total ** (1 / p)
    return root if exponent is None else root * power_of_two(exponent)


def square_root(numbers: Tensor) -> Tensor:
    """The correctly rounded root; torch's own is not, on some CPUs."""
    if numbers.device.type != "cpu":
        return numbers.sqrt()
    roots = torch.empty_like(numbers)
    np.sqrt(numbers.numpy(), out=roots.numpy())
    return roots


def largest(wide: Sequence[Tensor], rank: int) -> Tensor:
    """The largest number of each block, over all members: the first `rank` dimensions are the grid."""
    if not wide[0].numel():
        return wide[0].new_zeros(wide[0].shape[:rank])
    return torch.cat([one.reshape((*one.shape[:rank], -1)).amax(-1, keepdim=True) for one in wide], -1).amax(
        -1
    )


def block_exponents(magnitudes: Sequence[Tensor], rank: int) -> Tensor:
    """The exponent of the largest finite number of each block: magnitudes / 2 ** exponent are below 1."""
    top = largest(magnitudes, rank)
    finite = torch.where(top.isfinite(), top, 1.0)
    return torch.frexp(finite).exponent.clamp(-1000, 1000).to(torch.int64)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent as float64, by its bits: torch.ldexp passes through float32 in some versions."""
    return (exponent + 1023 << 52).view(torch.float64)


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
    if dtype in (torch.float64, torch.float32):
        return wide.to(dtype)
    if dtype != torch.bfloat16 or wide.device.type != "cpu":
        return _to_odd_float32(wide).to(dtype)
    near = wide.to(torch.float32)
    narrow = near.to(dtype)
    # Only what lies halfway in float32 may have been rounded to there: its lower bits are the lowest integer.
    below = near.view(torch.int32).bitwise_left_shift_(16)
    lowest = torch.iinfo(torch.int32).min
    if wide.numel() and int(below.min()) == lowest:
        halfway = below == lowest
        narrow[halfway] = _to_odd_float32(wide[halfway]).to(dtype)
    return narrow


def _to_odd_float32(wide: Tensor) -> Tensor:
    """Float32 whose last bit is 1 wherever the number had to be rounded; NaN and infinity as they are."""
    near = wide.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    even = (bits & 1) == 0
    too_large = even & (back.abs() > wide.abs())
    too_small = even & (back.abs() < wide.abs())
    return (bits - too_large.to(torch.int32) + too_small.to(torch.int32)).view(torch.float32)
