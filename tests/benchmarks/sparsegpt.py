"""SparseGPT, the yardstick, written from the paper (Frantar & Alistarh 2023, arXiv 2301.00774).

One sweep over the columns: what is pruned there is made up for by the columns behind it, with the inverse of
the damped Hessian. What goes is decided as the sweep reaches a group of columns, among all that the pattern
allows there. `exact` goes beyond the paper: a group is decided and made up for as a whole.
"""

from dataclasses import dataclass
from itertools import combinations, product

import torch
from torch import Tensor

_COLUMNS = 128  # whose updates are gathered before they reach the rest
_DAMP = 0.01


@dataclass(frozen=True, eq=False)
class Pattern:
    """What may go from a group of columns: one of `sets` (sets, group) in each row, True what is pruned.

    Where `distance` is not 0 there is one set, and of two rows that lie so far apart one loses it.
    """

    sets: Tensor
    distance: int = 0

    @property
    def group(self) -> int:
        return int(self.sets.shape[1])

    def choose(self, saliency: Tensor) -> Tensor:
        """What is pruned (rows, group), given what each set costs, (rows, sets)."""
        if not self.distance:
            return self.sets[saliency.argmin(1)]
        halves = saliency.reshape(-1, 2, self.distance)
        second = halves[:, 0] >= halves[:, 1]
        return torch.stack([~second, second], 1).reshape(-1, 1).expand(-1, self.group)


def n_of_m(kept: int, of: int) -> Pattern:
    """`kept` of every `of` neighbours in a row."""
    return fused([[(place,) for place in range(of)]], kept)


def fused(scopes: list[list[tuple[int, ...]]], kept: int) -> Pattern:
    """Columns of a group that go together, in scopes of each of which `kept` survive in every row."""
    group = sum(len(block) for scope in scopes for block in scope)
    losers = [combinations(scope, len(scope) - kept) for scope in scopes]
    rows = []
    for choice in product(*losers):
        gone = {column for scope in choice for block in scope for column in block}
        rows.append([column in gone for column in range(group)])
    return Pattern(torch.tensor(rows))


def rows_apart(distance: int, columns: int) -> Pattern:
    """Of the two groups of columns that lie so many rows apart, in every 2 * distance rows, one survives."""
    return Pattern(torch.ones(1, columns, dtype=torch.bool), distance)


def sparsegpt(
    dense: Tensor, moment: Tensor, pattern: Pattern, *, exact: bool = False, columns: int = _COLUMNS
) -> Tensor:
    """Weights (rows, inputs) in the pattern, of inputs with a second moment (inputs, inputs).

    The paper ranks by w^2 / U_jj^2, summed over what goes together, and makes up for one column after the
    other. With `exact` a set B costs w_B ([H^-1]_BB)^-1 w_B, what the output loses once all columns that are
    left made up for it, and the columns of the group before a loser make up for it as well.
    """
    weights, upper = dense.clone(), inverse_factor(moment)
    size = weights.shape[1]
    for begin in range(0, size, columns):
        end = min(begin + columns, size)
        block, factor = weights[:, begin:end], upper[begin:end, begin:end]
        errors = torch.zeros_like(block)
        for place in range(0, end - begin, pattern.group):
            here = slice(place, place + pattern.group)
            part, corner = block[:, here].clone(), factor[here, here]
            if exact:
                gone = pattern.choose(_exact_saliency(part, corner, pattern.sets))
                errors[:, here] = _errors_at_once(part, corner, gone)
            else:
                single = (part / corner.diagonal()).square()
                gone = pattern.choose(single @ pattern.sets.to(part.dtype).T)
                errors[:, here] = _errors_in_turn(part, corner, gone)
            block[:, place:] -= errors[:, here] @ factor[here, place:]
            block[:, here] = torch.where(gone, 0.0, block[:, here])
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


def _errors_in_turn(part: Tensor, corner: Tensor, gone: Tensor) -> Tensor:
    """By what multiples of the rows of U columns make up for losers, from the first one on."""
    left, errors = part.clone(), torch.zeros_like(part)
    for place in range(part.shape[1]):
        errors[:, place] = torch.where(gone[:, place], left[:, place], 0.0) / corner[place, place]
        left[:, place:] -= errors[:, place, None] * corner[place, place:]
    return errors


def _errors_at_once(part: Tensor, corner: Tensor, gone: Tensor) -> Tensor:
    """The same where all columns that are left of the group make up for all losers together."""
    lost = torch.where(gone, part, 0.0).unsqueeze(-1)
    solved: Tensor = torch.linalg.solve(_systems(corner, gone), lost).squeeze(-1)
    return solved @ corner.T


def _exact_saliency(part: Tensor, corner: Tensor, sets: Tensor) -> Tensor:
    """What every row loses with every set: (rows, sets)."""
    inside = sets.to(part.dtype)
    inverses = torch.linalg.inv(_systems(corner, sets)) * inside.unsqueeze(-1) * inside.unsqueeze(-2)
    moved = (part @ inverses.movedim(0, 1).flatten(1)).reshape(-1, *sets.shape)
    cost: Tensor = (moved * part.unsqueeze(1)).sum(-1)
    return cost


def _systems(corner: Tensor, gone: Tensor) -> Tensor:
    """[H^-1] of the losers of each row of `gone`, and ones on the diagonal elsewhere."""
    inside = gone.to(corner.dtype)
    inverse = corner.T @ corner
    return inverse * inside.unsqueeze(-1) * inside.unsqueeze(-2) + torch.diag_embed(1 - inside)


def check() -> None:
    """Both sweeps equal plain loops that know neither factors nor blocks of columns; else RuntimeError."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    moment = (inputs.T @ inputs / 200).double()
    dense = torch.randn(8, 48, generator=generator, dtype=torch.float64)
    hessian = moment + _DAMP * moment.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    patterns = {
        "2:4": n_of_m(2, 4),
        "pairs": fused([[(place, place + 1) for place in range(0, 8, 2)]], 2),
        "coupled": fused([[(place, place + 4) for place in range(4)]], 2),
        "rows": rows_apart(4, 16),
    }
    for name, pattern in patterns.items():
        for exact in (False, True):
            found = sparsegpt(dense, moment, pattern, exact=exact, columns=16)
            wanted = _loops(dense, hessian, pattern, exact=exact)
            if not torch.allclose(found, wanted, rtol=1e-6, atol=1e-9):
                raise RuntimeError(f"{name}, exact {exact}: off by {float((found - wanted).abs().max())}")


def _loops(dense: Tensor, hessian: Tensor, pattern: Pattern, *, exact: bool) -> Tensor:
    """The sweep in plain loops: every row by itself, every inverse made anew."""
    weights = dense.clone()
    for begin in range(0, weights.shape[1], pattern.group):
        behind = hessian[begin:, begin:]
        costs = torch.zeros(len(weights), len(pattern.sets), dtype=torch.float64)
        for row, number in product(range(len(weights)), range(len(pattern.sets))):
            gone = [int(one) for one in pattern.sets[number].nonzero()]
            start = weights[row, begin:]
            if exact:
                away = _least_squares(start, behind, gone) - start
                costs[row, number] = away @ behind @ away
            else:
                for one in gone:
                    costs[row, number] += start[one] ** 2 / torch.linalg.inv(behind[one:, one:])[0, 0]
        chosen = pattern.choose(costs)
        for row in range(len(weights)):
            gone = [int(one) for one in chosen[row].nonzero()]
            if exact:
                weights[row, begin:] = _least_squares(weights[row, begin:], behind, gone)
                continue
            for one in gone:
                weights[row, begin + one :] = _least_squares(
                    weights[row, begin + one :], behind[one:, one:], [0]
                )
    return weights


def _least_squares(row: Tensor, hessian: Tensor, gone: list[int]) -> Tensor:
    """The row nearest to `row` in the outputs that is zero where `gone`."""
    free = [one for one in range(len(row)) if one not in gone]
    moved = torch.zeros_like(row)
    pull = hessian[free] @ row
    moved[free] = torch.linalg.solve(hessian[free][:, free], pull)
    return moved
