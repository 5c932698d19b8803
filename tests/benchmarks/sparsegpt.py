"""SparseGPT, the yardstick, written from the paper (Frantar & Alistarh 2023, arXiv 2301.00774).

One sweep over the columns: what is pruned there is made up for by the columns behind it, with the inverse of
the damped Hessian. Which elements go is decided as the sweep reaches a group of columns: N:M by the paper's
saliency w^2 / U_jj^2, what is kept or pruned as one by its exact saliency w_B ([H^-1]_BB)^-1 w_B.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Choice = Callable[[Tensor, Tensor], Tensor]
"""Weights (rows, group) and the factor of their inverse Hessian (group, group) -> bool, True kept."""
_COLUMNS = 128  # whose updates are gathered before they reach the rest
_DAMP = 0.01


def sparsegpt(dense: Tensor, moment: Tensor, group: int, choose: Choice, columns: int = _COLUMNS) -> Tensor:
    """Weights (rows, inputs) of which `choose` keeps some in every `group` of columns, the others updated."""
    weights, upper = dense.clone(), inverse_factor(moment)
    size = weights.shape[1]
    for begin in range(0, size, columns):
        end = min(begin + columns, size)
        block, factor = weights[:, begin:end], upper[begin:end, begin:end]
        errors = torch.zeros_like(block)
        keep = torch.ones_like(block, dtype=torch.bool)
        for place in range(end - begin):
            if place % group == 0:
                here = factor[place : place + group, place : place + group]
                keep[:, place : place + group] = choose(block[:, place : place + group], here)
            kept = torch.where(keep[:, place], block[:, place], 0.0)
            error = (block[:, place] - kept) / factor[place, place]
            block[:, place:] -= error[:, None] * factor[place, place:]
            block[:, place] = kept
            errors[:, place] = error
        weights[:, end:] -= errors @ upper[begin:end, end:]
    return weights


def inverse_factor(moment: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (H + damping)^-1; dead inputs get a diagonal of 1."""
    hessian = moment.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMP * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper.to(moment.dtype)


def n_of_m(kept: int, of: int) -> Choice:
    """`kept` of every `of` neighbours in a row."""

    def choose(weights: Tensor, factor: Tensor) -> Tensor:
        saliency = (weights / factor.diagonal()).square().reshape(len(weights), -1, of)
        return _largest(saliency, kept).reshape(weights.shape)

    return choose


def pairs(places: list[list[tuple[int, int]]], kept: int) -> Choice:
    """Scopes of pairs of columns of a group; in every row `kept` pairs of each scope survive."""

    def choose(weights: Tensor, factor: Tensor) -> Tensor:
        inverse = factor.T @ factor
        keep = torch.ones_like(weights, dtype=torch.bool)
        for scope in places:
            saliency = torch.stack([_exact(weights, inverse, list(pair)) for pair in scope], -1)
            for number, pair in enumerate(scope):
                keep[:, list(pair)] = _largest(saliency, kept)[:, number, None]
        return keep

    return choose


def rows_apart(distance: int) -> Choice:
    """Of the two groups of columns that lie so many rows apart, in every 2 * distance rows, one survives."""

    def choose(weights: Tensor, factor: Tensor) -> Tensor:
        saliency = _exact(weights, factor.T @ factor, list(range(weights.shape[1])))
        halves = saliency.reshape(-1, 2, distance)
        first = halves[:, 0] >= halves[:, 1]
        keep = torch.stack([first, ~first], 1).reshape(-1, 1)
        return keep.expand(weights.shape)

    return choose


def _exact(weights: Tensor, inverse: Tensor, columns: list[int]) -> Tensor:
    """What a row loses with some columns, once all others made up for them: (rows,)."""
    part = weights[:, columns]
    solved: Tensor = torch.linalg.solve(inverse[columns][:, columns], part.T)
    return (solved.T * part).sum(1)


def _largest(saliency: Tensor, kept: int) -> Tensor:
    keep = torch.zeros_like(saliency, dtype=torch.bool)
    return keep.scatter_(-1, saliency.topk(kept, -1).indices, value=True)


def check() -> None:
    """The sweep equals a plain loop in which every removal updates all that is left, row by row."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator)
    moment = (inputs.T @ inputs / 200).double()
    dense = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    found = sparsegpt(dense, moment, 4, n_of_m(2, 4), columns=8)
    hessian = moment + _DAMP * moment.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    for number, row in enumerate(dense.clone()):
        for place in range(24):
            left = torch.linalg.inv(hessian[place:, place:])
            if place % 4 == 0:
                saliency = torch.stack(
                    [
                        row[place + one] ** 2 / torch.linalg.inv(hessian[place + one :, place + one :])[0, 0]
                        for one in range(4)
                    ]
                )
                going = [place + int(one) for one in saliency.argsort()[:2]]
            if place in going:
                row[place:] -= row[place] / left[0, 0] * left[0]
                row[place] = 0
        if not torch.allclose(row, found[number], rtol=1e-6, atol=1e-9):
            raise RuntimeError(f"row {number}: {row} is not {found[number]}")
