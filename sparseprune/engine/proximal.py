"""Soft thresholding: the proximal operator of t * ||block||, plain or with a diagonal conditioner.

Works in place on fused blocks: a list with one tensor (*grid, *elements) per member, and thresholds (*grid).
Everything is float64 and rounded once, in chunks, without conditioners by compiled loops on the CPU; all is
looked at before the first element is written. What a block becomes depends neither on others nor on chunks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softshrink

from sparseprune.engine.kernels.shrinking import block_factors, scale_blocks, shrink_elements
from sparseprune.engine.scoring import (
    INTEGERS,
    block_exponents,
    fused_norms,
    largest,
    outermost,
    pairwise_sum,
    patterns,
    power_of_two,
    round_to,
)
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.engine.kernels.selecting import Mask

_CHUNK, _DEVICE_CHUNK = 1 << 16, 1 << 22  # elements that are float64 at one time
_LOOP_CHUNK = 1 << 20  # elements that compiled loops work on at one time
_NARROW = 64  # blocks that are narrower get a factor for each column


def soft_threshold_euclidean(views: Sequence[Tensor], thresholds: Tensor, eps: float) -> None:
    """`v * max(0, 1 - t / ||v||)` per block (Parikh and Boyd 2014, Proximal Algorithms, section 6.5.1).

    Blocks of norm `eps` or less, or of norm t or less, come out as +0.0. A single element becomes |v| - t
    with its sign.
    """
    if not thresholds.numel():
        return
    if not thresholds.ndim:
        views, thresholds = [view.unsqueeze(0) for view in views], thresholds.unsqueeze(0)
    if eps == 0 and len(views) == 1 and views[0].numel() == thresholds.numel():
        _shrink_elements(views[0], _stretch(thresholds, views[0]))
        return
    mask = np.empty(0, dtype=np.uint8)
    for parts, limits in _cached(views, thresholds):
        largest_part = max(part.numel() for part in parts)
        mask = mask if mask.size >= largest_part else np.empty(largest_part, dtype=np.uint8)
        _scale_blocks(parts, limits, eps, mask)


def _cached(views: Sequence[Tensor], thresholds: Tensor) -> Iterator[tuple[Sequence[Tensor], Tensor]]:
    """Some blocks that lie together and stay in the cache, with their thresholds; else all of them."""
    dim = outermost(views[0])
    if len(views) > 1 or dim >= thresholds.ndim:
        yield views, thresholds
        return
    for _, begin, size in _chunks(views[0], loops=True):
        yield [views[0].narrow(dim, begin, size)], thresholds.narrow(dim, begin, size)


def _scale_blocks(views: Sequence[Tensor], thresholds: Tensor, eps: float, mask: Mask) -> None:
    """By compiled loops if they know all members and norms are finite; an infinite one keeps its block."""
    rank = thresholds.ndim
    norms = fused_norms(views, tuple(thresholds.shape), 2)
    known = [patterns(view) for view in views]
    loops = [one for one in known if one is not None]
    if len(loops) == len(views) and math.isfinite(float(norms.max())):
        shares = block_factors(norms.numpy(), thresholds.numpy())
        shares[norms.numpy() <= eps] = 0.0
        for bits, form in loops:
            scale_blocks(bits, form, shares, mask)
        return
    kept = (norms > thresholds) & (norms > eps)
    factor = ((norms - thresholds) / norms).masked_fill_(norms.isinf(), 1.0)  # exact where they are close
    factor.masked_fill_(~kept, 0.0)
    everywhere = bool(kept.all())
    for view in views:
        flags = kept.to(INTEGERS[view.element_size()])
        for dim, begin, size in _chunks(view):
            part = view.narrow(dim, begin, size)
            factors, keep = (
                _beside(one.narrow(dim, begin, size) if dim < rank else one, part) for one in (factor, flags)
            )
            part.copy_(round_to(part.to(torch.float64).mul_(factors), view.dtype))
            if not everywhere:
                part.view(flags.dtype).mul_(keep)


def _shrink_elements(view: Tensor, thresholds: Tensor) -> None:
    """Single elements: |v| - t with the sign of v, rounded once; +0.0 where that is not above 0."""
    endless = bool(distinct(thresholds).isinf().any())
    alike = is_constant(thresholds) and not endless
    loops, mask = patterns(view) is not None, np.empty(view.numel(), dtype=np.uint8)
    for dim, begin, size in _chunks(view, loops=loops):
        part = view.narrow(dim, begin, size)
        limits = thresholds.narrow(dim, begin, size)
        known = patterns(part)
        if known is not None:
            each = distinct(limits).reshape(()) if alike else limits
            shrink_elements(*known, each.numpy(), mask)
            continue
        wide = part.to(torch.float64)
        if alike:
            shrunk = softshrink(wide, float(distinct(thresholds))).add_(0.0)  # minus 0 becomes 0
        else:
            # Minus 0 is left of a threshold of 0; what is infinite and meets an infinite one is NaN.
            shrunk = (wide - wide.clamp(-limits, limits)).add_(0.0)
            shrunk = shrunk.nan_to_num_(0.0, math.inf, -math.inf) if endless else shrunk
        part.copy_(round_to(shrunk, view.dtype))


def soft_threshold_conditioned(
    views: Sequence[Tensor],
    conditioners: Sequence[Tensor],
    thresholds: Tensor,
    max_iter: int,
    tolerances: tuple[float, float],
) -> None:
    """The minimizer of `(u - v)^T diag(h) (u - v) / 2 + t * ||u||` per block; `tolerances` = (atol, eps).

    It is `u = v * h / (h + mu)` with `mu * ||h v / (h + mu)|| = t`, and zero where `||h v|| <= t`. Where t
    is 0 nothing changes; nor does it in a block of infinite norm, apart from elements with h = 0.
    """
    atol, eps = tolerances
    if not thresholds.numel():
        return
    if not thresholds.ndim:
        views, conditioners = ([one.unsqueeze(0) for one in each] for each in (views, conditioners))
        thresholds = thresholds.unsqueeze(0)
    rank = thresholds.ndim
    single = len(views) == 1 and views[0].numel() == thresholds.numel()
    if single and eps == 0 and torch.float64 not in (views[0].dtype, conditioners[0].dtype):
        _shrink_conditioned_elements(views[0], conditioners[0], _stretch(thresholds, views[0]))
        return
    for begin, size, dim in _block_chunks(views, thresholds):
        parts, diagonals = ([one.narrow(dim, begin, size) for one in each] for each in (views, conditioners))
        limits = thresholds.narrow(dim, begin, size)
        wide, h = (
            [one.to(torch.float64).reshape(-1, *one.shape[rank:]) for one in each]
            for each in (parts, diagonals)
        )
        results = _conditioned(wide, h, limits.reshape(-1), max_iter, (atol, eps))
        for part, result in zip(parts, results, strict=True):
            part.copy_(round_to(result.reshape(part.shape), part.dtype))


def refuse_unusable(views: Sequence[Tensor], conditioners: Sequence[Tensor]) -> None:
    """SparsityError for conditioners that are negative or not finite, or 0 beside an infinite weight."""
    for view, h in zip(views, conditioners, strict=True):
        if not h.numel():
            continue
        low, high = (float(one) for one in _known(h).aminmax())
        if not (low >= 0 and high < math.inf):
            raise SparsityError(
                "conditioners must be finite and not negative: they stand for a diagonal Hessian"
            )
        if low > 0:
            continue
        ends = [abs(float(one)) for one in _known(view).aminmax()]
        if math.inf in ends and bool((view.to(torch.float64).isinf() & (h == 0)).any()):
            raise SparsityError("an infinite weight with conditioner 0 has no proximal point")


def _known(tensor: Tensor) -> Tensor:
    """Numbers of a dtype that torch finds the extremes of."""
    return tensor if tensor.element_size() > 1 else tensor.to(torch.float32)


def _shrink_conditioned_elements(view: Tensor, conditioners: Tensor, thresholds: Tensor) -> None:
    """Single elements have a closed form, (h |v| - t) / h: products of two float32 numbers are exact."""
    alike = is_constant(thresholds) and math.isfinite(float(distinct(thresholds)))
    for dim, begin, size in _chunks(view):
        part = view.narrow(dim, begin, size)
        h = conditioners.narrow(dim, begin, size).to(torch.float64)
        pull = part.to(torch.float64).mul_(h)
        if alike:
            pull = softshrink(pull, float(distinct(thresholds))).add_(0.0)
        else:
            limits = thresholds.narrow(dim, begin, size)
            pull = (pull - pull.clamp(-limits, limits)).add_(0.0).nan_to_num_(0.0, math.inf, -math.inf)
        part.copy_(round_to(pull.div_(h.clamp_(min=1e-300)), view.dtype))  # where h is 0 so is the pull


def _conditioned(
    wide: Sequence[Tensor],
    conditioners: Sequence[Tensor],
    thresholds: Tensor,
    max_iter: int,
    tolerances: tuple[float, float],
) -> list[Tensor]:
    """The minimizers of some blocks: float64 (blocks, *elements) for each member."""
    atol, eps = tolerances
    weights, scale = _scaled(conditioners, 1)
    limits = thresholds * scale
    pulls = [h * view for h, view in zip(weights, wide, strict=True)]
    reach = fused_norms(pulls, tuple(limits.shape), 2)
    kept = (reach > limits) & (reach > eps * scale)
    active = kept & (limits > 0) & reach.isfinite()
    places = active.nonzero().squeeze(-1)
    if len(places) < len(active):
        results = []
        for view, h in zip(wide, weights, strict=True):
            lost = (h == 0) & _stretch(limits != 0, view)
            results.append(view.masked_fill(lost.logical_or_(_stretch(~kept, view)), 0.0))
        if not len(places):
            return results
        weights, pulls = ([one[places] for one in each] for each in (weights, pulls))
        limits = limits[places]
    size = _solution_norms(weights, pulls, limits, max_iter, atol)
    solved = []
    for h, pull in zip(weights, pulls, strict=True):
        s = _stretch(size, h)
        solved.append((pull * s).div_((h * s).add_(_stretch(limits, h))))
    if len(places) == len(active):
        return solved
    return [one.index_copy_(0, places, each) for one, each in zip(results, solved, strict=True)]


def _scaled(weights: Sequence[Tensor], rank: int) -> tuple[list[Tensor], Tensor]:
    """Conditioners over a power of two that brings each block's largest into [0.5, 1), and its inverse.

    h and t over one number have the same minimizer; without it their products could overflow.
    """
    exponents = block_exponents(weights, rank)
    scale = power_of_two(-exponents)
    return [h * _stretch(scale, h) for h in weights], scale


def _solution_norms(
    weights: Sequence[Tensor], pulls: Sequence[Tensor], t: Tensor, max_iter: int, atol: float
) -> Tensor:
    """The norm s of the solution of each block (blocks), in at most `max_iter` of Newton's steps.

    With mu = t / s the condition reads `||h v / (h s + t)|| = 1`. The reciprocal of its left side grows
    with s and is concave (as the secular equation of trust regions, More and Sorensen 1983), so Newton's
    steps climb to the root from below, starting where the largest single element puts it at least. A block
    that is near enough rests after the step, which squares what error was left.
    """
    bounds = [
        (pull.abs().sub_(_stretch(t, h))).div_(h).masked_fill_(h == 0, 0.0)
        for h, pull in zip(weights, pulls, strict=True)
    ]
    size = largest(bounds, 1).clamp_(min=0)
    found, places = size.clone(), torch.arange(len(size), device=size.device)
    is_open = torch.ones_like(places, dtype=torch.bool)
    for _ in range(max_iter):
        square, slope = torch.zeros_like(t), torch.zeros_like(t)
        for h, pull in zip(weights, pulls, strict=True):
            stretched = (h * _stretch(size, h)).add_(_stretch(t, h))
            reached = pull / stretched
            reached.mul_(reached)
            square = square + pairwise_sum(reached, h.ndim - 1)
            slope = slope + pairwise_sum(reached.mul_(h).div_(stretched), h.ndim - 1)
        norm = square.sqrt()
        size = torch.where(is_open, (size + square * (norm - 1) / slope).clamp_(min=0), size)
        found.index_copy_(0, places, size)
        is_open &= ~((1 / norm - 1).abs() <= atol)
        left = int(is_open.count_nonzero())
        if not left:
            break
        if left <= len(places) * 3 // 4:
            places, size, t = places[is_open], size[is_open], t[is_open]
            weights, pulls = ([one[is_open] for one in each] for each in (weights, pulls))
            is_open = is_open[is_open]
    return found


def is_constant(thresholds: Tensor) -> bool:
    """Whether all thresholds are one number in memory."""
    return not any(step for step, size in zip(thresholds.stride(), thresholds.shape, strict=True) if size > 1)


def distinct(thresholds: Tensor) -> Tensor:
    """All numbers that there are among thresholds, each once where they are one in memory."""
    return thresholds[(slice(0, 1),) * thresholds.ndim] if is_constant(thresholds) else thresholds


def _chunks(view: Tensor, *, loops: bool = False) -> Iterator[tuple[int, int, int]]:
    """Parts that lie together, each a dimension, where it begins and how many places it has there.

    Compiled `loops`, which need no float64 of them, take larger ones.
    """
    dim = outermost(view)
    most = _CHUNK if view.device.type == "cpu" else _DEVICE_CHUNK
    most = _LOOP_CHUNK if loops else most
    step = max(1, most * view.shape[dim] // max(1, view.numel()))
    for begin in range(0, view.shape[dim], step):
        yield dim, begin, min(step, view.shape[dim] - begin)


def _block_chunks(views: Sequence[Tensor], thresholds: Tensor) -> Iterator[tuple[int, int, int]]:
    """Some blocks, whole ones: where they begin along a dimension of the grid, how many, and that one."""
    dim = max(range(thresholds.ndim), key=thresholds.shape.__getitem__)
    size = thresholds.shape[dim]
    most = _CHUNK if views[0].device.type == "cpu" else _DEVICE_CHUNK
    step = max(1, most * size // sum(view.numel() for view in views))
    for begin in range(0, size, step):
        yield begin, min(step, size - begin), dim


def _beside(per_block: Tensor, part: Tensor) -> Tensor:
    """One number per block beside elements; narrow rows of blocks get one for each column, side by side."""
    spread = _stretch(per_block, part)
    inner = min((dim for dim in range(part.ndim) if part.shape[dim] > 1), key=part.stride, default=0)
    if per_block.ndim <= inner and 1 < part.shape[inner] < _NARROW:
        shape = [part.shape[dim] if dim == inner else size for dim, size in enumerate(spread.shape)]
        return spread.expand(shape).contiguous()
    return spread


def _stretch(per_block: Tensor, view: Tensor) -> Tensor:
    return per_block.reshape((*per_block.shape, *(1,) * (view.ndim - per_block.ndim)))
