"""Reconstruction: survivors that make up for what was pruned, by second moments of their inputs.

Owns the least squares: `refit` of given supports, and `admm`, with the support as an unknown. Knows scopes
only as a projection. Sources are named at each function. Called by execution and by users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from msgspec import Struct
from torch import Tensor

from sparseprune.engine.matrices import (
    Matrix,
    Projection,
    Scaled,
    ScaledGradients,
    by_blocks,
    cholesky_in_place,
    distances,
    energies,
    output_losses,
    refuse_unlike,
    scaled,
    units_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_WINDOW = 8  # steps over which the objective has to go on falling
_TOLERANCE = 1e-5  # of the objective of a row, that it has to fall in a window
_LOSS_TOLERANCE = 1e-4  # of that of a matrix: 1e-5 takes twice the steps and changes the fifth digit
_EXACT_TOLERANCE = 1e-12  # the same in float64
_PENALTY = 0.03  # with a unit diagonal; measured in tests/benchmarks/README.md
_CHECK = 3  # iterations between two looks at the support
# By how much the penalty grows, by the share of the support that changed since the last look.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


class Reconstructed(Struct, frozen=True, eq=False):
    """Weights of the shape and dtype of a matrix's, and the mask of those that survived."""

    weights: Tensor
    mask: Tensor


def refit(
    matrix: Matrix,
    mask: Tensor,
    *,
    damp: float = 0.01,
    start: Tensor | None = None,
    max_iter: int = 1000,
    between: Callable[[], None] | None = None,
) -> Tensor:
    """The weights on the support of `mask` that minimize tr(G (W - W0) H (W - W0)^T), zero elsewhere.

    `mask` is bool and of the shape of the weights, True where one survives; H is the moment, damped by `damp`
    times the mean of its diagonal, and G the gradients, damped by a tenth of the mean of theirs; without
    gradients G is 1. `start` (the dense weights) is where the search starts; the result has its objective in
    no row above that of `start` under the mask. For the moment as it is, without damping, it is in no row
    above that of the dense weights under the mask: a row that would be keeps those, or `start` where that is
    better. Both hold in float64, after rounding to the weights' dtype. Rows that lost nothing keep their
    bits, what is pruned becomes +0.0. With gradients rows make up for each other, and all of this holds for
    whole matrices in place of rows; where a matrix has no gradients but zeros its outputs decide. `between`
    is called between iterations; what it raises ends the search.

    Preconditioned by the diagonals of H and G, in float32 (float64 for such weights); where all rows of a
    matrix share their support it is solved by one Cholesky factor in float64, and G changes nothing. How far
    weights move is bounded: with a Hessian of unit diagonal and an eigenvalue of at least e, a row moves by
    no more than the root of what the mask alone loses / e. Where damping leaves e below what rounding does to
    it (some 1e-5) it is raised.

    Raises:
        ShapeMismatchError: a mask or a start of another shape.
    """
    refuse_unlike(matrix.dense, mask=mask, start=start)
    problem = scaled(matrix, damp)
    kept = matrix.rows(mask)
    begin = matrix.rows(matrix.dense if start is None else start)
    free = kept
    fixed = problem.unheard if matrix.fixed is None else matrix.rows(matrix.fixed) | problem.unheard
    if bool(fixed.any()):
        begin = torch.where(fixed, matrix.rows(matrix.dense), begin)
        free = kept & ~fixed
    begin = torch.where(kept, begin.to(matrix.work_dtype), 0.0)
    step = _steps(problem, problem.scaled(begin), free, max_iter, between or (lambda: None))
    # A weight that no step moved keeps its bits, the sign of a zero among them.
    moved = torch.where(step == 0, begin, begin + problem.unscaled(step))
    masked = torch.where(kept, matrix.rows(matrix.dense).to(matrix.work_dtype), 0.0)
    return _best(matrix, problem, masked, None if start is None else begin, moved)


def admm(
    matrices: Sequence[Matrix],
    project: Projection,
    *,
    damp: float = 0.01,
    max_iter: int = 300,
    joint: bool = True,
    between: Callable[[], None] | None = None,
) -> list[Reconstructed]:
    """Minimize the sum of tr(G (W - W0) H (W - W0)^T) over all matrices, on supports that `project` allows.

    G is what matrices have of gradients, without them it is 1: all have them or none.
    `project` is asked which weights survive given others of the same shapes, in coordinates in which the
    diagonals of H and G are 1; it decides for all matrices at once, so that blocks may compete across them.
    What it keeps at last is refitted, and loses no more than the dense weights do on the same support, see
    `refit`. Where inputs and gradients are uncorrelated its first answer, for the dense weights, is best.
    `joint` False tells that the matrices of a stack (experts) do not compete with each other: each gets a
    penalty of its own. H is damped as in `refit`; weights that are `fixed` stay. `between` is called between
    iterations; what it raises ends the search.
    """
    units = units_of(matrices)
    problems = [scaled(matrix, damp, units) for matrix in matrices]
    sides = [_Side(matrix, problem) for matrix, problem in zip(matrices, problems, strict=True)]
    keep = _projected(sides, project, [problem.dense for problem in problems])
    for side, kept in zip(sides, keep, strict=True):
        side.set_out(kept)
    if not all(problem.is_uncorrelated for problem in problems):
        _alternate(sides, project, max_iter, between or (lambda: None), joint=joint)
    found = []
    for side in sides:
        matrix = side.matrix
        mask = matrix.unrows(side.keep).contiguous()
        # Where the dense weight stood all along it keeps its bits.
        rows, same = side.problem.unscaled(side.sparse), side.sparse == side.problem.dense
        start = matrix.unrows(torch.where(same, matrix.rows(matrix.dense).to(rows.dtype), rows))
        found.append(Reconstructed(refit(matrix, mask, damp=damp, start=start, between=between), mask))
    return found


def keep_rows(matrices: Sequence[Matrix], project: Projection, *, damp: float = 0.01) -> list[Reconstructed]:
    """As `admm` where blocks hold whole rows: nothing can make up for these, so that the choice is exact.

    `project` is asked in coordinates in which the norm of rows is that of their outputs, or with gradients
    the root of what the loss changes by where that row alone goes. Survivors keep their bits.
    """
    units = units_of(matrices)
    outputs = []
    for matrix in matrices:
        problem = scaled(matrix, damp, units)
        outputs.append(matrix.unrows(problem.dense @ torch.linalg.cholesky(problem.hessian)))
    masks = project(outputs)
    found = []
    for matrix, mask in zip(matrices, masks, strict=True):
        kept = mask if matrix.fixed is None else mask | matrix.fixed
        found.append(Reconstructed(torch.where(kept, matrix.dense, 0).to(matrix.dense.dtype), kept.clone()))
    return found


# Refitting.


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
    """Every row, or with gradients every matrix, on its own support, all at once.

    To scale the diagonals to 1 was to precondition it.
    """
    inside = free.to(begin.dtype)
    tolerance = _TOLERANCE if problem.gradients is None else _LOSS_TOLERANCE
    if begin.dtype == torch.float64:
        tolerance = _EXACT_TOLERANCE
    info, one = torch.finfo(begin.dtype), problem.summed
    # Below what rounding makes of an output nothing can be told.
    noise = info.eps * (problem.pushed(problem.dense) * problem.dense).sum(one, keepdim=True).abs()
    away = begin - problem.dense
    pushed = problem.pushed(away)
    objective = (pushed * away).sum(one, keepdim=True)
    step = torch.zeros_like(begin)
    residual = -pushed * inside
    direction = residual.clone()
    square = (residual * residual).sum(one, keepdim=True)
    fallen = torch.zeros_like(objective)
    for number in range(1, max_iter + 1):
        between()
        along = problem.pushed(direction).mul_(inside)
        curvature = (direction * along).sum(one, keepdim=True)
        length = torch.where(curvature > 0, square / curvature.clamp_min(info.tiny), 0.0)
        step.addcmul_(length, direction)
        residual.addcmul_(length, along, value=-1)
        fallen += length * square
        if number % _WINDOW == 0:
            objective -= fallen
            if bool((fallen <= tolerance * objective.clamp_min(0) + noise).all()):
                break
            fallen.zero_()
        before, square = square, (residual * residual).sum(one, keepdim=True)
        ratio = torch.where(before > 0, square / before.clamp_min(info.tiny), 0.0)
        direction.mul_(ratio).add_(residual)
    return step


def _best(matrix: Matrix, problem: Scaled, masked: Tensor, start: Tensor | None, moved: Tensor) -> Tensor:
    """What loses least of a mask alone, a start and where that moved to, rounded.

    It is chosen row by row, with gradients matrix by matrix. Between the latter two the damped objective
    decides. Of the matrix's shape and dtype.
    """
    found = [matrix.rounded(one) for one in (masked, start, moved) if one is not None]
    costs = _costs_of_rows if matrix.gradients is None else _costs_of_matrices
    losses, damped = costs(matrix, problem, found)
    rows = [matrix.rows(one) for one in found]
    if start is not None:
        of_start, of_moved = damped
        losses[2] = torch.where(of_moved > of_start, losses[1], losses[2])
        rows[2] = torch.where((of_moved > of_start).unsqueeze(-1), rows[1], rows[2])
    best = rows[0]
    for one, lost in zip(rows[1:], losses[1:], strict=True):
        best = torch.where((lost < losses[0]).unsqueeze(-1), one, best)
    return matrix.unrows(best).contiguous()


_Costs = tuple[list[Tensor], list[Tensor]]
"""What weights cost by the moments as they are; of three also what the latter two cost by damped ones."""


def _costs_of_rows(matrix: Matrix, problem: Scaled, found: Sequence[Tensor]) -> _Costs:
    """By the outputs, (matrices, out) tensors."""
    losses = output_losses(matrix, found, problem.units)
    if len(found) < 3:
        return losses, []
    return losses, [
        lost + problem.damping * distances(matrix, one, problem.units)
        for one, lost in zip(found[1:], losses[1:], strict=True)
    ]


def _costs_of_matrices(matrix: Matrix, problem: Scaled, found: Sequence[Tensor]) -> _Costs:
    """By the loss, (matrices, 1) tensors."""
    each = [energies(matrix, one, problem.units) for one in found]
    losses = [one.decisive(problem).unsqueeze(-1) for one in each]
    return losses, [one.damped(problem).unsqueeze(-1) for one in each[1:] if len(found) == 3]


# Alternating directions.


class _Side:
    """One matrix on its way: its sparse weights and the scaled dual, both (matrices, out, in) and scaled."""

    def __init__(self, matrix: Matrix, problem: Scaled) -> None:
        self.matrix = matrix
        self.problem = problem
        self.fixed = None if matrix.fixed is None else matrix.rows(matrix.fixed)
        self.sparse = problem.dense
        self.dual = torch.zeros_like(problem.dense)
        self.keep = self.seen = torch.ones_like(problem.dense, dtype=torch.bool)
        self.pull: _Inverse | _Eigenbases = (
            _Inverse(problem) if problem.gradients is None else _Eigenbases(problem, problem.gradients)
        )

    def set_out(self, keep: Tensor) -> None:
        """The first support, and the dense weights on it."""
        self.keep = self.seen = self._with_fixed(keep)
        self.sparse = torch.where(self.keep, self.problem.dense, 0.0)

    def proposal(self) -> Tensor:
        """The dense weights that this penalty pulls towards the sparse ones, plus the dual."""
        pulled = self.sparse - self.problem.dense - self.dual
        return self.pull(pulled).add_(self.problem.dense).add_(self.dual)

    def take(self, proposal: Tensor, keep: Tensor, active: Tensor) -> None:
        """The sparse weights and the dual that follow, where matrices are `active`, (matrices, 1, 1)."""
        keep = self._with_fixed(keep)
        sparse = torch.where(keep, proposal, 0.0)
        if self.fixed is not None:
            sparse = torch.where(self.fixed, self.problem.dense, sparse)
        self.keep = torch.where(active, keep, self.keep)
        self.dual = torch.where(active, proposal - sparse, self.dual)
        self.sparse = torch.where(active, sparse, self.sparse)

    def changed(self) -> tuple[Tensor, Tensor]:
        """Elements of each matrix that came or went since the last look, and those that are kept."""
        came = (self.keep != self.seen).sum((-2, -1)).to(torch.float64) / 2
        self.seen = self.keep
        return came, self.keep.sum((-2, -1)).to(torch.float64)

    def _with_fixed(self, keep: Tensor) -> Tensor:
        return keep if self.fixed is None else keep | self.fixed


class _Inverse:
    """The operator rho (H + rho I)^-1 for a penalty rho, as a factor or multiplied out."""

    def __init__(self, problem: Scaled) -> None:
        self._hessian = problem.hessian
        self._explicit = problem.dense.shape[-2] >= problem.dense.shape[-1]
        self._penalty = self._operator = torch.empty(0)

    def prepare(self, penalty: Tensor) -> None:
        """For a penalty (matrices, 1, 1)."""
        damped = self._hessian.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(penalty.squeeze(-1))
        factor = torch.linalg.cholesky(damped)
        self._penalty = penalty
        self._operator = torch.cholesky_inverse(factor) if self._explicit else factor

    def __call__(self, pulled: Tensor) -> Tensor:
        solve = torch.cholesky_solve
        moved = pulled @ self._operator if self._explicit else solve(pulled.mT, self._operator).mT
        return moved.mul_(self._penalty)


class _Eigenbases:
    """The operator rho (G X H + rho I)^-1, X the Kronecker product, in the eigenbases of G and H.

    There it is rho / (m_i l_j + rho): another penalty costs nothing. G has a basis for each of its blocks.
    """

    def __init__(self, problem: Scaled, gradients: ScaledGradients) -> None:
        outer, self._outer = torch.linalg.eigh(gradients.hessian)
        inner, self._inner = torch.linalg.eigh(problem.hessian)
        # All are positive, but for rounding.
        self._energy = outer.clamp_min(0).flatten(1).unsqueeze(-1) * inner.clamp_min(0).unsqueeze(-2)
        self._share = torch.empty(0)

    def prepare(self, penalty: Tensor) -> None:
        """For a penalty (matrices, 1, 1)."""
        self._share = penalty / (self._energy + penalty)

    def __call__(self, pulled: Tensor) -> Tensor:
        turned = (by_blocks(self._outer.mT, pulled) @ self._inner).mul_(self._share)
        return by_blocks(self._outer, turned @ self._inner.mT)


def _projected(sides: Sequence[_Side], project: Projection, rows: Sequence[Tensor]) -> list[Tensor]:
    given = [side.matrix.unrows(one) for side, one in zip(sides, rows, strict=True)]
    return [side.matrix.rows(mask) for side, mask in zip(sides, project(given), strict=True)]


def _alternate(
    sides: Sequence[_Side], project: Projection, max_iter: int, between: Callable[[], None], *, joint: bool
) -> None:
    """Until no support changes any more between two looks, while the penalty grows."""
    first = sides[0].problem.dense
    penalties = 1 if joint else len(first)
    penalty = torch.full((penalties, 1, 1), _PENALTY, dtype=first.dtype, device=first.device)
    active = torch.ones_like(penalty, dtype=torch.bool)
    for side in sides:
        side.pull.prepare(penalty)
    for number in range(1, max_iter + 1):
        between()
        proposals = [side.proposal() for side in sides]
        keeps = _projected(sides, project, proposals)
        for side, proposal, keep in zip(sides, proposals, keeps, strict=True):
            side.take(proposal, keep, active)
        if number % _CHECK:
            continue
        share = _changed_share(sides, joint=joint)
        active = active & (share > 0)
        if not bool(active.any()):
            break
        growth = torch.ones_like(penalty)
        for least, factor in reversed(_GROWTH):
            growth = torch.where(active & (share > least), factor, growth)
        penalty = penalty * growth
        for side in sides:
            side.dual = side.dual / growth
            side.pull.prepare(penalty)


def _changed_share(sides: Sequence[_Side], *, joint: bool) -> Tensor:
    """What share of the support changed, (matrices, 1, 1); where they are joint of all, (1, 1, 1)."""
    came, kept = (
        torch.stack([one.sum() if joint else one for one in counts]).sum(0).reshape(-1, 1, 1)
        for counts in zip(*(side.changed() for side in sides), strict=True)
    )
    return came / kept.clamp_min(1)
