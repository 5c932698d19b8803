"""Soft thresholding: the proximal operator of t * ||block||, plain or with a diagonal conditioner.

Works on fused blocks: a list with one tensor (*grid, *elements) per member, and thresholds (*grid).
Everything is float64; the blocks that call it round once when they write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprune.engine.scoring import fused_norms, pairwise_sum
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence


def soft_threshold_euclidean(views: Sequence[Tensor], thresholds: Tensor, eps: float) -> list[Tensor]:
    """`v * max(0, 1 - t / ||v||)` per block (Parikh and Boyd 2014, Proximal Algorithms, section 6.5.1).

    Blocks of norm `eps` or less, or of norm t or less, come out as +0.0.
    """
    norms = fused_norms(views, tuple(thresholds.shape), 2)
    kept = (norms > thresholds) & (norms > eps)
    factor = torch.where(kept, 1 - thresholds / norms, 0.0)
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

    It is `u = v * h / (h + mu)` with `mu * ||h v / (h + mu)|| = t`, and zero where `||h v|| <= t`. With
    the norm s of the solution as unknown, mu = t / s and the condition reads
    `||h v / (h s + t)|| = 1`. Its left side's reciprocal grows with s and is concave (as the secular
    equation of trust regions, More and Sorensen 1983), so Newton's steps from s = 0 climb to the root.
    """
    atol, eps = tolerances
    rank = thresholds.ndim
    weights = [h.to(torch.float64) for h in conditioners]
    for h in weights:
        if not bool((h >= 0).all()) or not bool(h.isfinite().all()):
            raise SparsityError(
                "conditioners must be finite and not negative: they stand for a diagonal Hessian"
            )
    pulls = [h * view.to(torch.float64) for h, view in zip(weights, views, strict=True)]
    reach = fused_norms(pulls, tuple(thresholds.shape), 2)
    if bool(reach.isnan().any()):
        raise SparsityError("an infinite weight with conditioner 0 has no proximal point")
    kept = reach > thresholds.clamp(min=eps)
    t = torch.where(kept, thresholds, 1.0)
    size = torch.zeros_like(t)
    for _ in range(max_iter):
        square, slope = torch.zeros_like(t), torch.zeros_like(t)
        for h, pull in zip(weights, pulls, strict=True):
            stretched = h * _stretch(size, h) + _stretch(t, h)
            reached = pull / stretched
            square = square + pairwise_sum(reached * reached, h.ndim - rank)
            slope = slope + pairwise_sum(reached * reached * h / stretched, h.ndim - rank)
        norm = square.sqrt()
        if bool(((1 / norm - 1).abs() <= atol).logical_or(~kept | (t == 0)).all()):
            break
        step = square * (norm - 1) / slope
        size = torch.where(kept & (t > 0), size + step, size)
    return [
        torch.where(
            _stretch(kept, view),
            torch.where(
                _stretch(t == 0, view),
                view.to(torch.float64),
                pull * _stretch(size, view) / (h * _stretch(size, view) + _stretch(t, view)),
            ),
            0.0,
        )
        for view, h, pull in zip(views, weights, pulls, strict=True)
    ]


def _stretch(per_block: Tensor, view: Tensor) -> Tensor:
    return per_block.reshape(*per_block.shape, *(1,) * (view.ndim - per_block.ndim))
