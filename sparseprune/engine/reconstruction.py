"""Reconstruction: survivors that make up for what was pruned, by second moments of their inputs.

Owns the least squares: `refit` of given supports, and `admm`, with the support as an unknown. Knows scopes
only as a projection. Sources are named at each function. Called by execution and by users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from msgspec import Struct
from torch import Tensor

from sparseprune.engine.energies import distances, energies, output_losses, rough_gains
from sparseprune.engine.greedy import eliminated, shared_inputs
from sparseprune.engine.matrices import (
    Matrix,
    Scaled,
    ScaledGradients,
    all_scaled,
    by_blocks,
    cholesky_in_place,
    refuse_unlike,
    scaled,
    units_of,
)
from sparseprune.engine.projections import ScopeProjection
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sparseprune.engine.projections import Projection

Effort = Literal["best", "fast"]
_WINDOW = 8  # steps over which the objective has to go on falling
_TOLERANCE = 1e-3  # of the objective of a row, that it has to fall in a window
_LOSS_TOLERANCE = 1e-4  # of that of a matrix: 1e-5 takes twice the steps and changes the fifth digit
_EXACT_TOLERANCE = 1e-12  # the same in float64


class _Schedule(Struct, frozen=True):
    """How far a search goes.

    The penalty begins at `penalty`, with a unit diagonal, and grows by `growth` after every `hold` of the
    `iterations`; each goes `reach` of the way to its proposal (over-relaxation: Boyd et al. 2011, Distributed
    Optimization and Statistical Learning via ADMM, 3.4.3). The refit takes `steps`.
    """

    penalty: float
    growth: float
    hold: int
    iterations: int
    reach: float
    steps: int


# Measured in tests/benchmarks/README.md.
_SCHEDULES: dict[Effort, _Schedule] = {
    "best": _Schedule(penalty=0.15, growth=2.2, hold=4, iterations=10, reach=1.4, steps=8),
    "fast": _Schedule(penalty=0.3, growth=2.0, hold=3, iterations=5, reach=1.6, steps=1),
}
# For the loss and for large blocks the search goes on to win where the penalty grows slowly.
_FOR_LOSS: dict[Effort, _Schedule] = {
    "best": _Schedule(penalty=0.03, growth=1.12, hold=3, iterations=180, reach=1.0, steps=16),
    "fast": _Schedule(penalty=0.05, growth=1.5, hold=3, iterations=24, reach=1.2, steps=8),
}
_FOR_BLOCKS: dict[Effort, _Schedule] = {
    "best": _Schedule(penalty=0.1, growth=1.12, hold=3, iterations=180, reach=1.0, steps=16),
    "fast": _Schedule(penalty=0.05, growth=1.5, hold=3, iterations=24, reach=1.2, steps=8),
}
# Of what a matrix has to lose of its inputs, the share that goes in one round of the greedy choice.
_SHARES: dict[Effort, float] = {"best": 0.1, "fast": 0.25}
_COARSE = 0.3  # of the neighbours that chance would part are parted: blocks of more than three weights


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
    kept, begin = matrix.rows(mask), matrix.rows(matrix.dense if start is None else start)
    begin, moved = _moved(matrix, problem, kept, begin, max_iter, between or (lambda: None))
    return _best(matrix, problem, _masked(matrix, kept), None if start is None else begin, moved)


def admm(
    matrices: Sequence[Matrix],
    project: Projection,
    *,
    damp: float = 0.01,
    effort: Effort = "best",
    joint: bool = True,
    between: Callable[[], None] | None = None,
) -> list[Reconstructed]:
    """Minimize the sum of tr(G (W - W0) H (W - W0)^T) over all matrices, on supports that `project` allows.

    G is what matrices have of gradients, without them it is 1: all have them or none.
    `project` is asked which weights survive given others of the same shapes, in coordinates in which the
    diagonals of H and G are 1; it decides for all matrices at once, so that blocks may compete across them.
    What it keeps at last is refitted, and loses no more than the dense weights do on the same support, see
    `refit`. Where inputs and gradients are uncorrelated its first answer, for the dense weights, is best.
    Where it is a `projection` onto blocks that hold all weights of their inputs (channels, heads) these are
    eliminated one after another instead, which loses less and is sooner done: see `greedy`.
    `joint` False tells that the matrices of a stack (experts) do not compete with each other: each is done
    once its own support no longer changes. H is damped as in `refit`; weights that are `fixed` stay. `effort`
    "fast" takes half the time of "best" and loses a little more. `between` is called between iterations; what
    it raises ends the search.

    Raises:
        SparsityError: an unknown effort.
    """
    if effort not in _SCHEDULES:
        raise SparsityError(f"effort {effort!r}: wanted one of {', '.join(_SCHEDULES)}")
    pause = between or (lambda: None)
    problems = all_scaled(matrices, damp, units_of(matrices))
    sides = [_Side(matrix, problem) for matrix, problem in zip(matrices, problems, strict=True)]
    keep = _projected(sides, project, [problem.dense for problem in problems])
    for side, kept in zip(sides, keep, strict=True):
        side.set_out(kept)
    schedule = _schedule(sides)[effort]
    if not all(problem.is_uncorrelated for problem in problems):
        inputs = shared_inputs(matrices, project) if isinstance(project, ScopeProjection) else None
        if inputs is None:
            _alternate(sides, project, schedule, pause, joint=joint)
        else:
            survivors = eliminated(problems, inputs, _SHARES[effort], pause)
            for side, kept in zip(sides, survivors, strict=True):
                side.set_out(kept.unsqueeze(-2).expand_as(side.problem.dense))
    return [side.refitted(schedule, pause) for side in sides]


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


def _moved(
    matrix: Matrix,
    problem: Scaled,
    kept: Tensor,
    begin: Tensor,
    max_iter: int,
    between: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """The rows `begin` under a mask, and where the search leads from there: (matrices, out, in) tensors."""
    free = kept
    fixed = problem.unheard if matrix.fixed is None else matrix.rows(matrix.fixed) | problem.unheard
    if bool(fixed.any()):
        begin = torch.where(fixed, matrix.rows(matrix.dense), begin)
        free = kept & ~fixed
    begin = torch.where(kept, begin.to(matrix.work_dtype), 0.0)
    step = _steps(problem, problem.scaled(begin), free, max_iter, between)
    # A weight that no step moved keeps its bits, the sign of a zero among them.
    return begin, torch.where(step == 0, begin, begin + problem.unscaled(step))


def _masked(matrix: Matrix, kept: Tensor) -> Tensor:
    """The dense weights under a mask, (matrices, out, in)."""
    return torch.where(kept, matrix.rows(matrix.dense).to(matrix.work_dtype), 0.0)


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
    inside = free.to(torch.float64)
    system = problem.hessian.to(torch.float64).expand(len(free), -1, -1).clone()
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
    noise = info.eps * _square(problem.dense, one)
    away = begin - problem.dense
    residual = problem.pushed(away)
    objective = torch.mul(residual, away, out=away).sum(one, keepdim=True)
    step = torch.zeros_like(begin)
    residual = residual.neg_().mul_(inside)
    direction = residual.clone()
    square, product = _square(residual, one), away
    fallen = torch.zeros_like(objective)
    for number in range(1, max_iter + 1):
        between()
        along = problem.pushed(direction).mul_(inside)
        curvature = torch.mul(direction, along, out=product).sum(one, keepdim=True)
        length = torch.where(curvature > 0, square / curvature.clamp_min(info.tiny), 0.0)
        step.addcmul_(length, direction)
        residual.addcmul_(length, along, value=-1)
        fallen += length * square
        if number % _WINDOW == 0:
            objective -= fallen
            if bool((fallen <= tolerance * objective.clamp_min(0) + noise).all()):
                break
            fallen.zero_()
        before, square = square, _square(residual, one)
        ratio = torch.where(before > 0, square / before.clamp_min(info.tiny), 0.0)
        direction.mul_(ratio).add_(residual)
    return step


def _square(rows: Tensor, dims: int | tuple[int, int]) -> Tensor:
    """The square of the norm over some dimensions, which stay with length 1."""
    norm: Tensor = torch.linalg.vector_norm(rows, dim=dims, keepdim=True)
    return norm.square()


def _best(matrix: Matrix, problem: Scaled, masked: Tensor, start: Tensor | None, moved: Tensor) -> Tensor:
    """What loses least of a mask alone, a start and where that moved to, rounded.

    It is chosen row by row, with gradients matrix by matrix. Between the latter two the damped objective
    decides. Of the matrix's shape and dtype.
    """
    found = [matrix.rounded(one) for one in (masked, start, moved) if one is not None]
    if start is None and matrix.gradients is None:
        return _better_rows(matrix, problem, *found)
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


def _better_rows(matrix: Matrix, problem: Scaled, masked: Tensor, moved: Tensor) -> Tensor:
    """The rows of `moved` that lose less than those of `masked`, by float64 where float32 does not tell."""
    gain, blur = rough_gains(matrix, problem, masked, moved)
    better, worse = gain > blur, gain < -blur
    close = ~(better | worse)
    if bool(close.any()):
        before, after = output_losses(matrix, [masked, moved], problem.units, close)
        better = torch.where(close, after < before, better)
    return matrix.unrows(
        torch.where(better.unsqueeze(-1), matrix.rows(moved), matrix.rows(masked))
    ).contiguous()


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
        self.sparse, self.dual = problem.dense, torch.zeros_like(problem.dense)
        self._gap, self._proposal = torch.empty_like(problem.dense), torch.empty_like(problem.dense)
        self.keep = self.seen = torch.ones_like(problem.dense, dtype=torch.bool)

    def set_out(self, keep: Tensor) -> None:
        """The first support, and the dense weights on it."""
        self.keep = self.seen = self._with_fixed(keep)
        self.sparse = torch.where(self.keep, self.problem.dense, 0.0)

    def proposal(self, pull: _Pull, growth: float, reach: float) -> Tensor:
        """The dense weights that a penalty pulls towards the sparse ones, plus the dual.

        The penalty is `growth` times the last one. The memory is that of the last proposal.
        """
        dense = self.problem.dense
        if growth != 1:
            self.dual.div_(growth)
        torch.sub(self.sparse, dense, out=self._gap).sub_(self.dual)
        found = pull(self._gap, self._proposal).add_(dense)
        return torch.lerp(self.sparse, found, reach, out=found).add_(self.dual)

    def take(self, keep: Tensor, active: Tensor | None) -> None:
        """The sparse weights and the dual that follow, where `active`, (matrices, 1, 1), is not False."""
        keep = self._with_fixed(keep)
        sparse = torch.mul(self._proposal, keep, out=self._gap)
        if self.fixed is not None:
            sparse = torch.where(self.fixed, self.problem.dense, sparse)
        torch.sub(self._proposal, sparse, out=self.dual)
        if active is not None:
            keep, sparse = torch.where(active, keep, self.keep), torch.where(active, sparse, self.sparse)
        self.keep = keep
        self.sparse, self._gap = sparse, self.sparse

    def changed(self) -> Tensor:
        """Whether elements of each matrix came or went since the last look, (matrices, 1, 1)."""
        found = (self.keep != self.seen).flatten(1).any(1).reshape(-1, 1, 1)
        self.seen = self.keep
        return found

    def refitted(self, schedule: _Schedule, between: Callable[[], None]) -> Reconstructed:
        """On the support as it is now."""
        matrix, problem, kept = self.matrix, self.problem, self.keep
        # Where the dense weight stood all along it keeps its bits.
        rows, same = problem.unscaled(self.sparse), self.sparse == problem.dense
        begin = torch.where(same, matrix.rows(matrix.dense).to(rows.dtype), rows)
        _, moved = _moved(matrix, problem, kept, begin, schedule.steps, between)
        weights = _best(matrix, problem, _masked(matrix, kept), None, moved)
        return Reconstructed(weights, matrix.unrows(kept).contiguous())

    def _with_fixed(self, keep: Tensor) -> Tensor:
        return keep.clone(memory_format=torch.contiguous_format) if self.fixed is None else keep | self.fixed


def _pulls(problems: Sequence[Scaled], schedule: _Schedule) -> list[_Pull]:
    """What pulls the weights of each: what is made of one and the same Hessian is made once."""
    known: dict[tuple[int, bool], _Inverse | _Eigenbasis] = {}
    found: list[_Pull] = []
    for problem in problems:
        explicit = problem.dense.shape[-2] * schedule.hold >= problem.dense.shape[-1]
        place = id(problem.hessian), explicit
        if place not in known:
            known[place] = (
                _Inverse(problem.hessian, explicit=explicit)
                if problem.gradients is None
                else _Eigenbasis(problem.hessian)
            )
        inner = known[place]
        if isinstance(inner, _Inverse):
            found.append(inner)
        elif problem.gradients is not None:
            found.append(_Eigenbases(problem.gradients, inner))
    return found


class _Inverse:
    """The operator rho (H + rho I)^-1 for a penalty rho, as a factor or multiplied out."""

    def __init__(self, hessian: Tensor, *, explicit: bool) -> None:
        self._hessian = hessian
        self._explicit = explicit
        self._penalty = 0.0
        self._operator = torch.empty(0)

    def prepare(self, penalty: float) -> None:
        if penalty == self._penalty:
            return
        damped = self._hessian.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(penalty)
        factor = torch.linalg.cholesky(damped)
        self._penalty = penalty
        self._operator = torch.cholesky_inverse(factor) if self._explicit else factor

    def __call__(self, pulled: Tensor, out: Tensor) -> Tensor:
        """Of (matrices, out, in), into the memory of `out`."""
        if self._explicit:
            torch.matmul(pulled, self._operator, out=out)
        else:
            out.copy_(torch.cholesky_solve(pulled.mT, self._operator).mT)
        return out.mul_(self._penalty)


class _Eigenbasis:
    """Of a Hessian, its eigenvalues 0 or more: but for rounding they are."""

    def __init__(self, hessian: Tensor) -> None:
        values, self.vectors = torch.linalg.eigh(hessian)
        self.values = values.clamp_min(0)


class _Eigenbases:
    """The operator rho (G X H + rho I)^-1, X the Kronecker product, in the eigenbases of G and H.

    There it is rho / (m_i l_j + rho): another penalty costs nothing. G has a basis for each of its blocks.
    """

    def __init__(self, gradients: ScaledGradients, inner: _Eigenbasis) -> None:
        outer = _Eigenbasis(gradients.hessian)
        self._outer, self._inner = outer.vectors, inner.vectors
        self._energy = outer.values.flatten(1).unsqueeze(-1) * inner.values.unsqueeze(-2)
        self._share = torch.empty(0)

    def prepare(self, penalty: float) -> None:
        self._share = penalty / (self._energy + penalty)

    def __call__(self, pulled: Tensor, out: Tensor) -> Tensor:
        """Of (matrices, out, in), into the memory of `out`."""
        turned = (by_blocks(self._outer.mT, pulled) @ self._inner).mul_(self._share)
        return out.copy_(by_blocks(self._outer, turned @ self._inner.mT))


_Pull = _Inverse | _Eigenbases


def _projected(sides: Sequence[_Side], project: Projection, rows: Sequence[Tensor]) -> list[Tensor]:
    given = [side.matrix.unrows(one) for side, one in zip(sides, rows, strict=True)]
    return [side.matrix.rows(mask) for side, mask in zip(sides, project(given), strict=True)]


def _alternate(
    sides: Sequence[_Side],
    project: Projection,
    schedule: _Schedule,
    between: Callable[[], None],
    *,
    joint: bool,
) -> None:
    """While the penalty grows, until no support changes any more between two looks."""
    penalty, growth = schedule.penalty, 1.0
    active: Tensor | None = None
    pulls = _pulls([side.problem for side in sides], schedule)
    for number in range(schedule.iterations):
        if number and number % schedule.hold == 0:
            active = _changed(sides, joint=joint) & (True if active is None else active)
            if not bool(active.any()):
                break
            if bool(active.all()):
                active = None
            growth = schedule.growth
            penalty *= growth
        between()
        proposals = []
        for side, pull in zip(sides, pulls, strict=True):
            pull.prepare(penalty)
            proposals.append(side.proposal(pull, growth, schedule.reach))
        growth = 1.0
        for side, keep in zip(sides, _projected(sides, project, proposals), strict=True):
            side.take(keep, active)


def _schedule(sides: Sequence[_Side]) -> dict[Effort, _Schedule]:
    """That of the metric, and of the blocks that the first support shows."""
    if any(side.problem.gradients is not None for side in sides):
        return _FOR_LOSS
    return _FOR_BLOCKS if any(_is_coarse(side.keep) for side in sides) else _SCHEDULES


def _is_coarse(keep: Tensor) -> bool:
    """Whether neighbours in a row or a column of a support, (matrices, out, in), mostly share their fate."""
    share = keep.to(torch.float32).mean()
    parted = [keep.diff(dim=dim).to(torch.float32).mean() for dim in (-2, -1) if keep.shape[dim] > 1]
    return any(bool(one < _COARSE * 2 * share * (1 - share)) for one in parted)


def _changed(sides: Sequence[_Side], *, joint: bool) -> Tensor:
    """Whether a support changed, (matrices, 1, 1); where they are joint any of them, (1, 1, 1)."""
    found = torch.stack([side.changed().any() if joint else side.changed() for side in sides])
    return found.any(0).reshape(-1, 1, 1)
