"""Refitting: the survivors of a mask as the least squares of what the dense matrix computed.

Owns the solvers for a given support: one Cholesky factor where all rows of a matrix share theirs, else
preconditioned conjugate gradients, all rows at once. Called by users of the engine and by execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprune.engine.reconstruction.matrices import (
    Matrix,
    Scaled,
    cholesky_in_place,
    distances,
    output_losses,
    scaled,
)
from sparseprune.errors import ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW = 8  # steps over which the objective has to go on falling
_TOLERANCE = 1e-5  # of the objective of a row, that it has to fall in a window
_EXACT_TOLERANCE = 1e-12  # the same in float64


def refit(
    matrix: Matrix,
    mask: Tensor,
    *,
    damp: float = 0.01,
    start: Tensor | None = None,
    max_iter: int = 1000,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """The weights on the support of `mask` that minimize tr((W - W0) H (W - W0)^T), zero elsewhere.

    `mask` is bool and of the shape of the weights, True where one survives; H is the moment, damped by `damp`
    times the mean of its diagonal. `start` (the dense weights) is where the search starts; the result has its
    objective in no row above that of `start` under the mask. For the moment as it is, without damping, it is
    in no row above that of the dense weights under the mask: a row that would be keeps those, or `start`
    where that is better. Both hold in float64, after rounding to the weights' dtype. Rows that lost nothing
    keep their bits, what is pruned becomes +0.0. `between` is called between iterations; what it raises ends
    the search.

    Preconditioned by the diagonal of H, in float32 (float64 for such weights); where all rows of a matrix
    share their support it is solved by one Cholesky factor in float64. How far weights move is bounded: with
    a Hessian of unit diagonal and an eigenvalue of at least e, a row moves by no more than the root of what
    the mask alone loses / e. Where damping leaves e below what rounding does to it (some 1e-5) it is raised.

    Raises:
        ShapeMismatchError: a mask or a start of another shape.
    """
    for what, given in (("mask", mask), ("start", start)):
        if given is not None and given.shape != matrix.dense.shape:
            raise ShapeMismatchError(
                f"{what} has shape {list(given.shape)}, the weights have {list(matrix.dense.shape)}"
            )
    problem = scaled(matrix, damp)
    kept = matrix.rows(mask)
    begin = matrix.rows(matrix.dense if start is None else start)
    free = kept
    if matrix.fixed is not None:
        fixed = matrix.rows(matrix.fixed)
        begin = torch.where(fixed, matrix.rows(matrix.dense), begin)
        free = kept & ~fixed
    begin = torch.where(kept, begin.to(matrix.work_dtype), 0.0)
    step = _steps(problem, problem.scaled(begin), free, max_iter, between or (lambda: None))
    # A weight that no step moved keeps its bits, the sign of a zero among them.
    moved = torch.where(step == 0, begin, begin + problem.unscaled(step))
    masked = torch.where(kept, matrix.rows(matrix.dense).to(matrix.work_dtype), 0.0)
    return _best(matrix, problem, masked, None if start is None else begin, moved)


def _steps(
    problem: Scaled, begin: Tensor, free: Tensor, max_iter: int, between: Callable[[], None]
) -> Tensor:
    """How far to go from `begin`, in scaled coordinates; 0 where not `free`. All (matrices, out, in)."""
    if not begin.numel():
        return torch.zeros_like(begin)
    if bool((free == free[:, :1]).all()):
        return _solved_together(problem, begin, free[:, 0])
    return _conjugate_gradients(problem, begin, free, max_iter, between)


def _solved_together(problem: Scaled, begin: Tensor, free: Tensor) -> Tensor:
    """The exact step where all rows of a matrix may move in the same places, `free` (matrices, in)."""
    system = problem.hessian.to(torch.float64, copy=True)
    inside = free.to(torch.float64)
    pull = ((problem.dense - begin).to(torch.float64) @ system) * inside.unsqueeze(-2)
    # Where nothing moves stands the identity: one factor of one size, however many places each matrix has.
    system.mul_(inside.unsqueeze(-1)).mul_(inside.unsqueeze(-2))
    system.diagonal(dim1=-2, dim2=-1).add_(1.0 - inside)
    solved: Tensor = torch.cholesky_solve(pull.mT, cholesky_in_place(system)[0])
    return solved.mT.to(begin.dtype)


def _conjugate_gradients(
    problem: Scaled, begin: Tensor, free: Tensor, max_iter: int, between: Callable[[], None]
) -> Tensor:
    """Every row on its own support, all rows at once; to scale the diagonal to 1 was to precondition it."""
    inside = free.to(begin.dtype)
    tolerance = _EXACT_TOLERANCE if begin.dtype == torch.float64 else _TOLERANCE
    info = torch.finfo(begin.dtype)
    # Below what rounding makes of a row's output nothing can be told.
    noise = info.eps * ((problem.dense @ problem.hessian) * problem.dense).sum(-1, keepdim=True).abs()
    away = begin - problem.dense
    pushed = away @ problem.hessian
    objective = (pushed * away).sum(-1, keepdim=True)
    step = torch.zeros_like(begin)
    residual = -pushed * inside
    direction = residual.clone()
    square = (residual * residual).sum(-1, keepdim=True)
    fallen = torch.zeros_like(objective)
    for number in range(1, max_iter + 1):
        between()
        along = (direction @ problem.hessian).mul_(inside)
        curvature = (direction * along).sum(-1, keepdim=True)
        length = torch.where(curvature > 0, square / curvature.clamp_min(info.tiny), 0.0)
        step.addcmul_(length, direction)
        residual.addcmul_(length, along, value=-1)
        fallen += length * square
        if number % _WINDOW == 0:
            objective -= fallen
            if bool((fallen <= tolerance * objective.clamp_min(0) + noise).all()):
                break
            fallen.zero_()
        before, square = square, (residual * residual).sum(-1, keepdim=True)
        ratio = torch.where(before > 0, square / before.clamp_min(info.tiny), 0.0)
        direction.mul_(ratio).add_(residual)
    return step


def _best(matrix: Matrix, problem: Scaled, masked: Tensor, start: Tensor | None, moved: Tensor) -> Tensor:
    """Row by row what loses least of a mask alone, a start and where that moved to, rounded.

    Between the latter two the damped objective decides. Of the matrix's shape and dtype.
    """
    found = [matrix.rounded(one) for one in (masked, start, moved) if one is not None]
    losses = output_losses(matrix, found, problem.units)
    if start is not None:
        damped = [
            lost + problem.damping * distances(matrix, one, problem.units)
            for one, lost in zip(found[1:], losses[1:], strict=True)
        ]
        worse = damped[1] > damped[0]
        losses[2] = torch.where(worse, losses[1], losses[2])
        second, third = (matrix.rows(one) for one in found[1:])
        found[2] = matrix.unrows(torch.where(worse.unsqueeze(-1), second, third))
    best = matrix.rows(found[0])
    for one, lost in zip(found[1:], losses[1:], strict=True):
        best = torch.where((lost < losses[0]).unsqueeze(-1), matrix.rows(one), best)
    return matrix.unrows(best).contiguous()
