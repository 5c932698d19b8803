"""Soft thresholding: the proximal operator of t * ||block||, plain or with a diagonal conditioner.

Works on fused blocks: a list with one tensor (*grid, *elements) per member, and thresholds (*grid).
Everything is float64; the blocks that call it round once when they write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprune.engine.scoring import block_exponents, fused_norms, largest, pairwise_sum, power_of_two
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence


def soft_threshold_euclidean(views: Sequence[Tensor], thresholds: Tensor, eps: float) -> list[Tensor]:
    """`v * max(0, 1 - t / ||v||)` per block (Parikh and Boyd 2014, Proximal Algorithms, section 6.5.1).

    Blocks of norm `eps` or less, or of norm t or less, come out as +0.0.
    """
    norms = fused_norms(views, tuple(thresholds.shape), 2)
    kept = (norms > thresholds) & (norms > eps)
    factor = torch.where(norms.isinf(), 1.0, (norms - thresholds) / norms)  # exact where they are close
    return [
        torch.where(_stretch(kept, view), view.to(torch.float64) * _stretch(factor, view), 0.0)
        for view in views
    ]


def soft_threshold_conditioned(
    views: Sequence[Tensor],
    conditioners: Sequence[Tensor],
    thresholds: Tensor,
    max_iter: int,
    tolerances: tuple[float, float],
) -> list[Tensor]:
    """The minimizer of `(u - v)^T diag(h) (u - v) / 2 + t * ||u||` per block; `tolerances` = (atol, eps).

    It is `u = v * h / (h + mu)` with `mu * ||h v / (h + mu)|| = t`, and zero where `||h v|| <= t`. Where t
    is 0 nothing changes; nor does it in a block of infinite norm, apart from elements with h = 0.
    """
    atol, eps = tolerances
    weights, scale = _scaled([h.to(torch.float64) for h in conditioners], thresholds.ndim)
    limits = thresholds * scale
    wide = [view.to(torch.float64) for view in views]
    pulls = [h * view for h, view in zip(weights, wide, strict=True)]
    reach = fused_norms(pulls, tuple(limits.shape), 2)
    if bool(reach.isnan().any()):
        raise SparsityError("an infinite weight with conditioner 0 has no proximal point")
    kept = (reach > limits) & (reach > eps * scale)
    active = kept & (limits > 0) & reach.isfinite()
    t = torch.where(active, limits, 1.0)
    size = _solution_norms(weights, pulls, t, active, (max_iter, atol))
    results = []
    for view, h, pull in zip(wide, weights, pulls, strict=True):
        s = _stretch(size, view)
        shrunk = pull * s / (h * s + _stretch(t, view))
        same = torch.where((h > 0) | _stretch(limits == 0, view), view, 0.0)
        survivors = torch.where(_stretch(active, view), shrunk, same)
        results.append(torch.where(_stretch(kept, view), survivors, 0.0))
    return results


def _scaled(weights: Sequence[Tensor], rank: int) -> tuple[list[Tensor], Tensor]:
    """Conditioners over a power of two that brings each block's largest into [0.5, 1), and its inverse.

    h and t over one number have the same minimizer; without it their products could overflow.
    """
    for h in weights:
        if not bool((h >= 0).all()) or not bool(h.isfinite().all()):
            raise SparsityError(
                "conditioners must be finite and not negative: they stand for a diagonal Hessian"
            )
    exponents = block_exponents(weights, rank)
    scale = power_of_two(-exponents)
    return [h * _stretch(scale, h) for h in weights], scale


def _solution_norms(
    weights: Sequence[Tensor], pulls: Sequence[Tensor], t: Tensor, active: Tensor, effort: tuple[int, float]
) -> Tensor:
    """The norm s of the solution of each active block; `effort` = (most Newton steps, atol).

    With mu = t / s the condition reads `||h v / (h s + t)|| = 1`. The reciprocal of its left side grows
    with s and is concave (as the secular equation of trust regions, More and Sorensen 1983), so Newton's
    steps climb to the root from below, starting where the largest single element puts it at least.
    """
    max_iter, atol = effort
    rank = t.ndim
    bounds = [(pull.abs() - _stretch(t, h)) / h for h, pull in zip(weights, pulls, strict=True)]
    least = largest([torch.where(h > 0, bound, 0.0) for h, bound in zip(weights, bounds, strict=True)], rank)
    size = torch.where(active, least.clamp(min=0), 0.0)
    for _ in range(max_iter):
        square, slope = torch.zeros_like(t), torch.zeros_like(t)
        for h, pull in zip(weights, pulls, strict=True):
            stretched = h * _stretch(size, h) + _stretch(t, h)
            reached = pull / stretched
            square = square + pairwise_sum(reached * reached, h.ndim - rank)
            slope = slope + pairwise_sum(reached * reached * h / stretched, h.ndim - rank)
        norm = square.sqrt()
        step = square * (norm - 1) / slope
        size = torch.where(active, (size + step).clamp(min=0), size)
        if bool((~active).logical_or_((1 / norm - 1).abs() <= atol).all()):
            break  # after the step, which squares what error was left
    return size


def _stretch(per_block: Tensor, view: Tensor) -> Tensor:
    return per_block.reshape((*per_block.shape, *(1,) * (view.ndim - per_block.ndim)))
