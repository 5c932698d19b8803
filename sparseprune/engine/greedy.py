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
_LEAST = 1e-6  # eigenvalue of a Hessian of unit diagonal, so that its inverse is no rounding error
_NOISE = 1e-6  # of what an exchange has to win, below which it may be rounding
_NARROWER = 4  # fewer blocks are exchanged where so many win nothing


class Elimination(Struct, frozen=True):
    """How blocks are chosen: what `share` of them goes in a round, and how many `exchanges` follow."""

    share: float
    exchanges: int


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
    problems: Sequence[Scaled], inputs: SharedInputs, search: Elimination, between: Callable[[], None]
) -> list[Tensor]:
    """Which inputs survive, (matrices, in) bool of each problem.

    In every round each block costs what the objective rises by if it goes and all others make up for it;
    those that cost least go, among equals the later. Then blocks come back and others go as long as the
    objective falls. Matrices that share no scope are chosen from one after the other. `between` is called
    between rounds.
    """
    alive = torch.ones(inputs.scopes * inputs.blocks + 1, dtype=torch.bool, device=inputs.numbers[0].device)
    for scopes, places in _independent(inputs):
        matrices = [
            _Inputs(problems[one], place, inputs.numbers[one][place], inputs.fixed[one][place])
            for one, place in places
        ]
        choice = _Choice(matrices, inputs, scopes)
        choice.shrink(search.share, between)
        choice.exchange(search, between)
        alive[:-1] &= choice.alive
    return [alive[each] for each in inputs.numbers]  # the last one is what is outside of all


def _independent(inputs: SharedInputs) -> list[tuple[set[int], list[tuple[int, int]]]]:
    """Scopes, and the matrices (problem, place) that have inputs in them: all that touches each other."""
    found: list[tuple[set[int], list[tuple[int, int]]]] = []
    for one, each in enumerate(inputs.numbers):
        for place, numbers in enumerate(each):
            scopes = set((numbers[numbers != _OUTSIDE] // inputs.blocks).tolist())
            touched = [part for part in found if part[0] & scopes]
            found = [part for part in found if not part[0] & scopes]
            places = [there for part in touched for there in part[1]]
            found.append((scopes.union(*(part[0] for part in touched)), [*places, (one, place)]))
    return found


class _Choice:
    """Which blocks are `alive`, in matrices and scopes that touch each other."""

    def __init__(self, matrices: Sequence[_Inputs], inputs: SharedInputs, scopes: set[int]) -> None:
        count, device = inputs.scopes * inputs.blocks, inputs.numbers[0].device
        own = torch.tensor(sorted(scopes), dtype=torch.int64, device=device)
        self._matrices = matrices
        self._scope = torch.arange(count, device=device) // inputs.blocks
        self._own = torch.isin(self._scope, own)
        self._left = torch.zeros(inputs.scopes, dtype=torch.int64, device=device)  # that have to go
        self._left[own] = inputs.blocks - inputs.nnz
        self._home = torch.zeros(count, dtype=torch.int64, device=device)  # the first matrix of a block
        for number, matrix in reversed(list(enumerate(matrices))):
            self._home[matrix.numbers[matrix.numbers != _OUTSIDE]] = number
        self.alive = torch.ones(count, dtype=torch.bool, device=device)
        self._goes_on = 0 < inputs.nnz < inputs.blocks

    def shrink(self, share: float, between: Callable[[], None]) -> float:
        """Until no scope has too many blocks; what it costs.

        Of each matrix a `share` goes in one round of what it would lose if all were done now, one block at
        least: only blocks of one matrix change what another one costs.
        """
        cost = 0.0
        while bool(self._left.any()):
            between()
            gone = self._first(self._costs(), self.alive & self._own, self._left, share)
            cost += self._turn(gone)
        return cost

    def exchange(self, search: Elimination, between: Callable[[], None]) -> None:
        """Let blocks come back that lower the objective most, and others go, as long as it falls."""
        share = search.share if self._goes_on else 0.0
        for _ in range(search.exchanges if self._goes_on else 0):
            between()
            before, gone = self.alive.clone(), ~self.alive & self._own
            most = torch.bincount(self._scope[gone], minlength=len(self._left))
            back = self._first(-self._costs(), gone, most, share)
            fallen = self._turn(back)
            risen = self.shrink(1.0, between)
            if risen < fallen * (1 - _NOISE):
                continue
            for changed in (before & ~self.alive, self.alive & ~before):
                self._turn(changed.nonzero().squeeze(-1))
            self._left.zero_()
            if len(back) <= len(self._matrices):
                break
            share /= _NARROWER

    def _costs(self) -> Tensor:
        """What the objective changes by for each block that goes, or that comes back."""
        costs = torch.zeros(len(self.alive), dtype=torch.float64, device=self.alive.device)
        for matrix in self._matrices:
            matrix.add_costs(costs, self.alive)
        return costs

    def _first(self, costs: Tensor, among: Tensor, left: Tensor, share: float) -> Tensor:
        """The cheapest `among` these: of a scope as many as are `left`, of a matrix a share of those."""
        there = among.nonzero().squeeze(-1)
        ready = there[_ranks(self._scope[there], costs[there]) < left[self._scope[there]]]
        most = (torch.bincount(self._home[ready]) * share).ceil()
        return ready[_ranks(self._home[ready], costs[ready]) < most[self._home[ready]]]

    def _turn(self, blocks: Tensor) -> float:
        """Let blocks go that are alive, or come back that are not; what the objective changes by."""
        if not len(blocks):
            return 0.0
        changed = torch.zeros(len(self.alive) + 1, dtype=torch.bool, device=self.alive.device)
        changed[blocks] = True
        goes = bool(self.alive[blocks[0]])
        self.alive[blocks] = not goes
        self._left -= torch.bincount(self._scope[blocks], minlength=len(self._left)) * (1 if goes else -1)
        return sum(
            matrix.turn(changed[matrix.numbers].nonzero().squeeze(-1), goes=goes) for matrix in self._matrices
        )


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
    """One matrix on its way, in float64, swept (Goodnight 1979): K are the inputs that stay, D that went.

    `_system` is -[H_KK]^-1 in the places of K, the rest of H that K leaves unexplained in those of D, and
    [H_KK]^-1 H_KD between them. `_weights` are those that make up for what went, in the places of D the
    pull on what could come back. With gradients rows are mixed by the factor of G, so that the objective is
    that of outputs. Inputs that are fixed have rows and columns of the identity.
    """

    def __init__(self, problem: Scaled, place: int, numbers: Tensor, fixed: Tensor) -> None:
        self.numbers = numbers
        dense = problem.dense[place : place + 1].to(torch.float64)
        if problem.gradients is not None:
            outer = problem.gradients.hessian[min(place, len(problem.gradients.hessian) - 1)]
            dense = by_blocks(torch.linalg.cholesky(outer.to(torch.float64)).mT.unsqueeze(0), dense)
        self._weights = dense.squeeze(0).clone()
        hessian = problem.hessian[min(place, len(problem.hessian) - 1)].to(torch.float64, copy=True)
        hessian.diagonal().add_(_LEAST)
        hessian[fixed] = 0.0
        hessian[:, fixed] = 0.0
        hessian.diagonal()[fixed] = 1.0
        self._system = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).neg_()
        self._members = list(_members(numbers))

    def add_costs(self, costs: Tensor, alive: Tensor) -> None:
        """tr(W_B ([H^-1]_BB)^-1 W_B^T) of the inputs B of every block, to its cost; of D what they give."""
        for blocks, places in self._members:
            sign = torch.where(alive[blocks], -1.0, 1.0)
            if places.shape[1] == 1:
                own = places.squeeze(-1)
                found = self._weights[:, own].square().sum(0) / (self._system.diagonal()[own] * sign)
            else:
                small = self._system[places.unsqueeze(-1), places.unsqueeze(-2)] * sign.reshape(-1, 1, 1)
                factor, weights = torch.linalg.cholesky(small), self._weights.mT[places]
                found = torch.linalg.solve_triangular(factor, weights, upper=False).square().sum((-2, -1))
            costs.index_add_(0, blocks, found)

    def turn(self, places: Tensor, *, goes: bool) -> float:
        """Take inputs from K to D, or from D to K; what the objective changes by."""
        if not len(places):
            return 0.0
        sign = -1.0 if goes else 1.0
        rows, weights = self._system[places], self._weights[:, places]
        factor = torch.linalg.cholesky(rows[:, places] * sign)
        solved, turned = torch.cholesky_solve(rows, factor), torch.cholesky_solve(weights.mT, factor).mT
        self._weights.addmm_(weights, solved, alpha=-sign)
        self._system.addmm_(rows.mT, solved, alpha=-sign)
        self._weights[:, places] = turned
        self._system[places], self._system[:, places] = solved, solved.mT
        self._system[places.unsqueeze(-1), places] = torch.cholesky_inverse(factor) * -sign
        return float((weights * turned).sum())


def _members(numbers: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks (blocks,) and their inputs (blocks, inputs), those with equally many together."""
    places, counts = numbers.argsort(stable=True), torch.bincount(numbers - _OUTSIDE)
    first = counts.cumsum(0) - counts
    for size in sorted(set(counts[1:].tolist()) - {0}):
        blocks = (counts[1:] == size).nonzero().squeeze(-1)
        among = torch.arange(size, device=places.device)
        yield blocks, places[first[1:][blocks].unsqueeze(-1) + among]
