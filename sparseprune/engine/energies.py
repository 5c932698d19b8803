"""What changes of weights cost: the energies of outputs and losses, exact or rough, and errors as shares.

Sums in float64, a few rows at a time. Knows no supports. Called by reconstruction, by execution and by users.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from msgspec import Struct

from sparseprune.engine.matrices import SAFETY, diagonal_of, times_power, units_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sparseprune.engine.matrices import Matrix, Metric, Scaled, Units

_ROWS = 1 << 18  # elements to sum at one time


class Energies(Struct, frozen=True, eq=False):
    """What changes D of the weights of a matrix with gradients cost, (matrices,) tensors in float64.

    `loss` is tr(G D H D^T), `outputs` tr(D H D^T), `gradients` tr(G D D^T), `distance` |D|^2, of moments as
    they are, in the powers of two of some `Units`.
    """

    loss: Tensor
    outputs: Tensor
    gradients: Tensor
    distance: Tensor

    def damped(self, problem: Scaled) -> Tensor:
        """tr(G D H D^T) of moments that are damped as those of a problem."""
        if problem.gradients is None:
            raise TypeError("a problem without gradients has no loss")
        inputs, outputs = problem.damping.squeeze(-1), problem.gradients.damping.squeeze(-1)
        return self.loss + inputs * self.gradients + outputs * self.outputs + inputs * outputs * self.distance

    def decisive(self, problem: Scaled) -> Tensor:
        """The loss, or where no gradients were seen the outputs."""
        if problem.gradients is None:
            raise TypeError("a problem without gradients has no loss")
        return torch.where(problem.gradients.damping.squeeze(-1) > 0, self.loss, self.outputs)


def energies(matrix: Matrix, weights: Tensor | None, units: Units) -> Energies:
    """Of D = W - W0 for `weights` W of the shape of the matrix's, or of the dense W0 itself for None."""
    if matrix.gradient_moments is None:
        raise TypeError("a matrix without gradients has no loss")
    found = torch.zeros(4, len(matrix.moments), dtype=torch.float64, device=matrix.dense.device)
    for number, (moment, groups) in enumerate(zip(matrix.moments, matrix.gradient_moments, strict=True)):
        hessian, size = _wide(moment, units.moment), groups.shape[-1]
        for group, gradients in enumerate(groups):
            outer = _wide(gradients, units.gradients)
            away = _away(matrix, weights, (number, slice(group * size, (group + 1) * size)), units)
            for rows in _slabs(size, matrix.features):
                pushed, turned = away[rows] @ hessian, outer[rows] @ away
                pairs = (turned, pushed), (pushed, away[rows]), (turned, away[rows]), (away[rows], away[rows])
                found[:, number] += torch.stack([(one * other).sum() for one, other in pairs])
    return Energies(*found)


class Errors(Struct, frozen=True):
    """What is lost of every matrix, as a share, in both metrics; `metric` is the one that is minimized.

    `outputs` is sqrt(tr(D H D^T) / tr(W0 H W0^T)), `loss` sqrt(tr(G D H D^T) / tr(G W0 H W0^T)), None without
    gradients; 0 where there is nothing to lose.
    """

    metric: Metric
    outputs: tuple[float, ...]
    loss: tuple[float, ...] | None = None


def errors_of(matrix: Matrix, weights: Tensor) -> Errors:
    """How far `weights`, of the shape of the matrix's, are from the dense ones. Of moments as they are.

    >>> import torch
    >>> from sparseprune import Matrix
    >>> errors_of(Matrix(torch.ones(2, 2), torch.eye(2)), torch.eye(2)).outputs
    (0.707...,)
    """
    units = units_of([matrix])
    if matrix.gradients is None:
        lost, whole = (one.sum(-1) for one in output_losses(matrix, [weights, None], units))
        return Errors("outputs", _shares(lost, whole))
    found, dense = energies(matrix, weights, units), energies(matrix, None, units)
    return Errors("loss", _shares(found.outputs, dense.outputs), _shares(found.loss, dense.loss))


def _shares(lost: Tensor, whole: Tensor) -> tuple[float, ...]:
    ratio = torch.where(whole > 0, lost.clamp_min(0) / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0.0)
    return tuple(float(one) for one in ratio.sqrt())


def output_losses(
    matrix: Matrix, weights: Sequence[Tensor | None], units: Units, chosen: Tensor | None = None
) -> list[Tensor]:
    """tr(D H D^T) of every row, for D = W - W0 of each of some `weights` W, or the dense W0 itself for None.

    `weights` have the shape of the matrix's, and H is its moment as it is. All in float64; gives
    (matrices, out) tensors, in units of 2^`units.energy`; 0 for rows that are not `chosen`, (matrices, out).
    """
    lost = [_for_rows(matrix) for _ in weights]
    for number, moment in enumerate(matrix.moments):
        places = None if chosen is None else chosen[number].nonzero().reshape(-1)
        count = lost[0].shape[1] if places is None else len(places)
        wide = _wide(moment, units.moment) if count else moment
        for part in _slabs(count, matrix.features):
            rows = part if places is None else places[part]
            for found, one in zip(lost, weights, strict=True):
                away = _away(matrix, one, (number, rows), units)
                found[number, rows] = ((away @ wide) * away).sum(-1)
    return lost


def rough_gains(matrix: Matrix, problem: Scaled, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """By how much `output_losses` of `after` are below those of `before`, and by how much it may be wrong.

    In the precision of the work, (matrices, out) tensors, by one product: D H D^T - E H E^T is
    (D - E) H (D + E)^T.
    """
    work = matrix.work_dtype
    one, other, dense = (matrix.rows(rows).to(work) for rows in (before, after, matrix.dense))
    apart, both = problem.scaled(one - other), problem.scaled((one - dense) + (other - dense))
    added = diagonal_of(problem.hessian).unsqueeze(-2) - 1 + problem.damping.unsqueeze(-1) / problem.scale**2
    pushed = (both @ problem.hessian).addcmul_(both, added.to(work), value=-1)
    if not both.numel():
        return both.sum(-1), both.sum(-1)
    most = torch.linalg.vector_norm(problem.hessian, 1, dim=-1).amax(-1, keepdim=True)
    rounded = SAFETY * torch.finfo(work).eps * math.sqrt(matrix.features)
    lengths = (torch.linalg.vector_norm(rows, dim=-1) for rows in (apart, both))
    return pushed.mul_(apart).sum(-1), rounded * most * math.prod(lengths)


def distances(matrix: Matrix, weights: Tensor, units: Units) -> Tensor:
    """|W - W0|^2 of every row, (matrices, out) in float64, in units of 2^(2 `units.weight`)."""
    found = _for_rows(matrix)
    for number in range(len(found)):
        for rows in _slabs(found.shape[1], matrix.features):
            found[number, rows] = _away(matrix, weights, (number, rows), units).square().sum(-1)
    return found


def _wide(moment: Tensor, power: int) -> Tensor:
    """A copy in float64, in units of 2^`power`."""
    wide = moment.to(torch.float64, copy=True)
    for half in (power // 2, power - power // 2):
        wide.mul_(2.0**-half)
    return wide


def _for_rows(matrix: Matrix) -> Tensor:
    dense = matrix.rows(matrix.dense)
    return torch.zeros(dense.shape[:2], dtype=torch.float64, device=dense.device)


def _slabs(rows: int, features: int) -> Iterator[slice]:
    """So many rows, a few at a time, so that float64 copies stay small."""
    step = max(1, _ROWS // max(1, features))
    for begin in range(0, rows, step):
        yield slice(begin, min(begin + step, rows))


def _away(matrix: Matrix, weights: Tensor | None, rows: tuple[int, slice | Tensor], units: Units) -> Tensor:
    """Some rows of weights minus the dense ones, or the dense ones for None, in float64."""
    before = times_power(matrix.rows(matrix.dense)[rows].to(torch.float64), -units.weight)
    if weights is None:
        return before
    return times_power(matrix.rows(weights)[rows].to(torch.float64), -units.weight) - before
