"""Greedy elimination: which inputs go where all rows of a matrix lose the same ones, such as channels.

Owns the choice alone, by the inverse Hessian (optimal brain surgeon: Hassibi & Stork 1993; for whole
structures: Kurtic et al. 2023, ZipLM, arXiv 2302.04089), for any scopes. Called by `admm`, which refits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from msgspec import Struct

from sparseprune.engine.matrices import by_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from sparseprune.engine.matrices import Matrix, Scaled
    from sparseprune.engine.projections import ScopeProjection

_OUTSIDE = -1  # the number of the block of inputs that stay
_LEAST = 1e-8  # eigenvalue of a Hessian of unit diagonal, so that its inverse is no rounding error


class SharedInputs(Struct, frozen=True, eq=False):
    """To which block each input of each matrix belongs, in all rows: (matrices, in) for each of a problem's.

    Blocks are numbered scope by scope, those of one in the order in which they win ties; `_OUTSIDE` of all.
    `scopes` have `blocks` blocks each, of which `nnz` survive.
    """

    numbers: tuple[Tensor, ...]
    fixed: tuple[Tensor, ...]
    scopes: int
    blocks: int
    nnz: int


def shared_inputs(matrices: Sequence[Matrix], project: ScopeProjection) -> SharedInputs | None:
    """Of a projection whose blocks hold every weight of their inputs; None where some hold a part of one."""
    numbers, fixed = [], []
    for matrix, each in zip(matrices, project.numbers(), strict=True):
        rows = matrix.rows(each)
        stay = torch.zeros_like(rows[:, 0], dtype=torch.bool)
        if matrix.fixed is not None:
            some = matrix.rows(matrix.fixed)
            stay = some.any(1)
            if not bool((some == stay.unsqueeze(1)).all()) or bool((rows[some] != _OUTSIDE).any()):
                return None
        if not rows.shape[1] or not bool((rows == rows[:, :1]).all()):
            return None
        numbers.append(rows[:, 0].to(torch.int64))
        fixed.append(stay)
    scope = project.scope
    return SharedInputs(tuple(numbers), tuple(fixed), scope.numscp(), scope.numblk_per_scope(), project.nnz)


def eliminated(
    problems: Sequence[Scaled], inputs: SharedInputs, share: float, between: Callable[[], None]
) -> list[Tensor]:
    """Which inputs survive, (matrices, in) bool of each problem.

    In every round each block costs what the objective rises by if it goes and all others make up for it;
    those that cost least go. Of each matrix that is a `share` of what it would lose if all that is left to do
    were done now, one block at least: only blocks of one matrix change what another one costs. Among equals
    the later goes. `between` is called between rounds.
    """
    steps = [
        _Inputs(problem, place, *pair)
        for problem, each, stays in zip(problems, inputs.numbers, inputs.fixed, strict=True)
        for place, pair in enumerate(zip(each, stays, strict=True))
    ]
    device = inputs.numbers[0].device
    count = inputs.scopes * inputs.blocks
    scope = torch.arange(count, device=device) // inputs.blocks
    home = torch.full((count,), len(steps), device=device)  # the first matrix of a block
    for number, step in reversed(list(enumerate(steps))):
        home[step.numbers[step.numbers != _OUTSIDE]] = number
    alive = torch.ones(count, dtype=torch.bool, device=device)
    left = torch.full((inputs.scopes,), inputs.blocks - inputs.nnz, device=device)
    while bool(left.any()):
        between()
        costs = torch.zeros(count, dtype=torch.float64, device=device)
        for step in steps:
            step.add_costs(costs, alive)
        there = alive.nonzero().squeeze(-1)
        ready = there[_ranks(scope[there], costs[there]) < left[scope[there]]]
        most = (torch.bincount(home[ready], minlength=len(steps) + 1) * share).ceil()
        gone = ready[_ranks(home[ready], costs[ready]) < most[home[ready]]]
        alive[gone] = False
        left -= torch.bincount(scope[gone], minlength=inputs.scopes)
        for step in steps:
            step.drop(alive)
    survives = torch.cat([alive, alive.new_ones(1)])  # the last one is what is outside of all
    return [survives[each] for each in inputs.numbers]


def _ranks(groups: Tensor, costs: Tensor) -> Tensor:
    """How many of its group each comes after: cheaper ones, and equal ones behind it."""
    order = len(costs) - 1 - costs.flip(0).argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    first = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device) - first[groups[order]]
    return ranks


class _Inputs:
    """One matrix on its way, in float64: weights that make up for what went, and the inverse of H without it.

    With gradients rows are mixed by the factor of G, so that the objective is that of outputs. Inputs that
    went have rows and columns of the identity, and so have those that are fixed.
    """

    def __init__(self, problem: Scaled, place: int, numbers: Tensor, fixed: Tensor) -> None:
        self.numbers = numbers
        dense = problem.dense[place : place + 1].to(torch.float64)
        if problem.gradients is not None:
            outer = problem.gradients.hessian[min(place, len(problem.gradients.hessian) - 1)]
            dense = by_blocks(torch.linalg.cholesky(outer.to(torch.float64)).mT.unsqueeze(0), dense)
        self._weights = dense.squeeze(0).contiguous()
        hessian = problem.hessian[min(place, len(problem.hessian) - 1)].to(torch.float64, copy=True)
        hessian.diagonal().add_(_LEAST)
        self._inverse = hessian
        self._forget(fixed.nonzero().squeeze(-1))
        self._inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        self._gone = fixed
        self._members = list(_members(numbers))

    def add_costs(self, costs: Tensor, alive: Tensor) -> None:
        """tr(W_B ([H^-1]_BB)^-1 W_B^T) of the inputs B of every block that is `alive`, to its cost."""
        for blocks, places in self._members:
            there = alive[blocks]
            costs.index_add_(0, blocks[there], self._costs(places[there]))

    def _costs(self, places: Tensor) -> Tensor:
        """Of places (blocks, inputs)."""
        if places.shape[1] == 1:
            own = places.squeeze(-1)
            costs = self._weights[:, own].square().sum(0) / self._inverse.diagonal()[own]
        else:
            small = self._inverse[places.unsqueeze(-1), places.unsqueeze(-2)]
            factor, weights = torch.linalg.cholesky(small), self._weights.mT[places]
            costs = torch.linalg.solve_triangular(factor, weights, upper=False).square().sum((-2, -1))
        return costs

    def drop(self, alive: Tensor) -> None:
        """The inputs of blocks that are not `alive` any more; the others make up for them."""
        stays = (self.numbers == _OUTSIDE) | alive[self.numbers]
        places = (~stays & ~self._gone).nonzero().squeeze(-1)
        if not len(places):
            return
        self._gone = self._gone | ~stays
        rows = self._inverse[places]
        rows = torch.cholesky_solve(rows, torch.linalg.cholesky(rows[:, places]))
        self._weights.addmm_(self._weights[:, places], rows, alpha=-1)
        self._inverse.addmm_(self._inverse[:, places], rows, alpha=-1)
        self._weights[:, places] = 0.0
        self._forget(places)

    def _forget(self, places: Tensor) -> None:
        self._inverse[places] = 0.0
        self._inverse[:, places] = 0.0
        self._inverse[places, places] = 1.0


def _members(numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks (blocks,) and their inputs (blocks, inputs), those with equally many together."""
    places, counts = numbers.argsort(stable=True), torch.bincount(numbers - _OUTSIDE)
    first = counts.cumsum(0) - counts
    for size in sorted(set(counts[1:].tolist()) - {0}):
        blocks = (counts[1:] == size).nonzero().squeeze(-1)
        among = torch.arange(size, device=places.device)
        yield blocks, places[first[1:][blocks].unsqueeze(-1) + among]
