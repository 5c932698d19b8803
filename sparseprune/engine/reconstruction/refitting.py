"""Refitting: the survivors of a mask as the least squares of what the dense matrix computed.

Owns the solvers for a given support: one Cholesky factor where all rows of a matrix share theirs, else
preconditioned conjugate gradients, all rows at once. Called by users of the engine and by the pipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparseprune.engine.reconstruction.matrices import Matrix, Scaled, scaled
from sparseprune.errors import ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW = 8  # steps over which the objective has to go on falling
_TOLERANCE = 1e-5  # of the objective of a row, that it has to fall in a window
_EXACT_TOLERANCE = 1e-12  # the same in float64
_BLUR, _EXACT_BLUR = 1e-6, 1e-13  # added to a diagonal of 1, in float32 and in float64


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
    objective in no row above that of `start` under the mask, also after it was rounded to the weights' dtype.
    Rows that lost nothing keep their bits, what is pruned becomes +0.0. `between` is called between
    iterations; what it raises ends the search.

    Preconditioned by the diagonal of H, in float32 (float64 for such weights); where all rows of a matrix
    share their support it is solved by one Cholesky factor in float64.

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
    step = _steps(problem, begin * problem.scale, free, max_iter, between or (lambda: None))
    # A weight that no step moved keeps its bits, the sign of a zero among them.
    moved = matrix.rounded(torch.where(step == 0, begin, begin + step / problem.scale))
    still = matrix.rounded(begin)
    return _better(matrix, problem, moved, still)


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
    wide = problem.hessian.to(torch.float64)
    inside = free.to(torch.float64)
    pull = ((problem.dense - begin).to(torch.float64) @ wide) * inside.unsqueeze(-2)
    # Where nothing moves stands the identity: one factor of one size, however many places each matrix has.
    system = wide * inside.unsqueeze(-1) * inside.unsqueeze(-2) + torch.diag_embed(1.0 - inside)
    # Inputs that follow from each other are told apart no further than the moment was rounded.
    blur = _BLUR if begin.dtype == torch.float32 else _EXACT_BLUR
    system.diagonal(dim1=-2, dim2=-1).add_(blur)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed.any()):
        inverse: Tensor = torch.linalg.pinv(system, hermitian=True, rtol=blur)
        return ((pull @ inverse) * inside.unsqueeze(-2)).to(begin.dtype)
    solved: Tensor = torch.cholesky_solve(pull.mT, factor)
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


def _better(matrix: Matrix, problem: Scaled, moved: Tensor, still: Tensor) -> Tensor:
    """Row by row the one of two weights, of the matrix's shape and dtype, whose objective is lower."""
    rows = [matrix.rows(weights) for weights in (moved, still)]
    first, second = (_objective(problem, one) for one in rows)
    return matrix.unrows(torch.where(first <= second, rows[0], rows[1])).contiguous()


def _objective(problem: Scaled, rows: Tensor) -> Tensor:
    """(matrices, out, 1) in float64."""
    away = rows.to(problem.dense.dtype) * problem.scale - problem.dense
    return ((away @ problem.hessian).to(torch.float64) * away).sum(-1, keepdim=True)
