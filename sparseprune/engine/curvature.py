"""Curvature: what it costs by itself that a single weight goes, or a whole row, given its inputs' moments.

Owns the factor of a damped second moment and what follows from it (Optimal Brain Surgeon, Hassibi & Stork
1993). Knows neither masks nor files; called by what shares budgets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from msgspec import Struct

from sparseprune.engine.matrices import cholesky_in_place
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from torch import Tensor

_TOGETHER = 1 << 18  # weights whose rows are multiplied at one time
_MARGIN, _GROWTH = 4, 8  # units of rounding added to a unit diagonal that is singular, and how these grow


class Curvature(Struct, frozen=True, eq=False):
    """H = E[x x^T] + damp * mean(diag) * I of n inputs, as a L L^T a, where L L^T has a unit diagonal.

    `factor` is L, (n, n), and `roots` are the diagonal of a, float64, (n,); 0 where nothing is known of an
    input.

    >>> curvature = Curvature.of(torch.diag(torch.tensor([4.0, 9.0])), damp=0.0)
    >>> curvature.singles().tolist(), curvature.rows(torch.tensor([[1.0, 1.0]])).tolist()
    ([4.0, 9.0], [13.0])
    """

    factor: Tensor
    roots: Tensor

    @classmethod
    def of(cls, moment: Tensor, damp: float = 0.01) -> Curvature:
        """Of a moment (n, n); SparsityError where that is none: not finite, or with a negative diagonal."""
        diagonal = moment.diagonal().to(torch.float64)
        if not bool(moment.isfinite().all()):
            raise SparsityError("the second moment of the inputs holds NaN or infinity")
        if bool((diagonal < 0).any()):
            raise SparsityError("the second moment of the inputs has a negative diagonal: it is none")
        roots = (diagonal + damp * diagonal.mean()).sqrt() if len(moment) else diagonal
        seen = diagonal > 0
        work = torch.promote_types(moment.dtype, torch.float32)
        divisor = torch.where(seen & (roots > 0), roots, 1.0).to(work)
        eps, added = torch.finfo(work).eps, 0.0
        while True:
            system = moment.to(work, copy=True)
            # One after the other: the product of two roots may leave the range of a float.
            system.div_(divisor.unsqueeze(-1)).div_(divisor)
            system.mul_(seen).mul_(seen.unsqueeze(-1))
            system.diagonal().fill_(1.0 + added)
            factor, failed = cholesky_in_place(system)
            if not bool(failed):
                return cls(factor.tril_(), roots)
            added = added * _GROWTH or _MARGIN * eps * len(moment) ** 0.5

    def singles(self) -> Tensor:
        """1 / [H^-1]_jj for each input, float64: w^2 times that is lost where w goes and others make up."""
        inverse = torch.cholesky_inverse(self.factor).diagonal().to(torch.float64)
        return self.roots.square() / inverse

    def rows(self, rows: Tensor) -> Tensor:
        """W H w^T for each row w of (rows, n), float64: what is lost where nothing can make up for a row."""
        step = max(1, _TOGETHER // max(1, rows.shape[-1]))
        found = []
        for part in torch.split(rows, step):
            scaled = (part.to(torch.float64) * self.roots).to(self.factor.dtype)
            found.append((scaled @ self.factor).to(torch.float64).square().sum(-1))
        return torch.cat(found)
