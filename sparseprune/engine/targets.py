"""Targets: weights whose outputs are those of the dense model, though their inputs are those of a pruned one.

Owns the least squares by which they are found. Called by reconstruction of matrices in a sweep, and by users.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparseprune.engine.matrices import diagonal_of, refuse_unlike
from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from torch import Tensor


def target_weights(
    dense: Tensor,
    moment: Tensor,
    mixed: Tensor,
    residual: Tensor | None = None,
    *,
    damp: float = 0.01,
    input_dim: int = -1,
) -> Tensor:
    """The weights A with the least E|A y - (W x + r)|^2 + d |A - W|^2, of the shape and dtype of `dense`, W.

    x are the inputs in the dense model, y those in the pruned one, (inputs,), and r (outputs,) is what else
    the outputs should make up for: by how much the sum that they are added to differs between the two. Up to
    one common factor `moment` is E[y y^T] and `mixed` E[x y^T], (inputs, inputs); `residual` is E[r y^T] in
    the shape of `dense`. d is `damp` times the mean of the diagonal of `moment`, as for `admm`. Stacks have
    matrices in front. (The idea of such targets: GPTAQ, arXiv 2504.02692.)

    >>> import torch
    >>> eye = torch.eye(2)
    >>> target_weights(torch.tensor([[1.0, 2.0]]), moment=4 * eye, mixed=2 * eye, damp=0.0)
    tensor([[0.5000, 1.0000]])

    Raises:
        ShapeMismatchError: shapes that do not go together.
        SparsityError: a moment that is not finite, or no such moment.
    """
    rows = _rows(dense, input_dim).to(torch.float64)
    moments, others = (_stack(one).to(torch.float64) for one in (moment, mixed))
    wanted = (len(rows), rows.shape[-1], rows.shape[-1])
    for what, one in (("second moment", moments), ("mixed moment", others)):
        if one.shape != wanted:
            shape, inputs = list(one.shape[-2:]), rows.shape[-1]
            raise ShapeMismatchError(f"a {what} of shape {shape} for {inputs} inputs of {len(rows)} matrices")
        if not bool(one.isfinite().all()):
            raise SparsityError(f"the {what} holds NaN or infinity")
    refuse_unlike(dense, residual=residual)
    damping = damp * diagonal_of(moments).mean(-1)
    asked = rows @ others + damping[:, None, None] * rows
    if residual is not None:
        asked = asked + _rows(residual, input_dim).to(torch.float64)
    found = torch.stack(
        [
            rows[place] if not bool(one.any()) else _solved(one, float(damping[place]), asked[place])
            for place, one in enumerate(moments)
        ]
    )
    turned = (found if dense.ndim == 3 else found[0]).movedim(-1, input_dim)
    return turned.to(dense.dtype).contiguous()


def _solved(moment: Tensor, damping: float, asked: Tensor) -> Tensor:
    """A of A (H + d I) = C; d grows where H is too close to being singular."""
    mean = float(moment.diagonal().mean())
    while True:
        system = (moment + moment.mT).mul_(0.5)
        system.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(system)
        if not bool(info):
            return torch.cholesky_solve(asked.mT, factor).mT
        if damping > mean:
            raise SparsityError("the second moment has directions of negative energy: it is none")
        damping = max(10 * damping, 1e-10 * mean)


def _rows(tensor: Tensor, input_dim: int) -> Tensor:
    return _stack(tensor.movedim(input_dim, -1))


def _stack(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 3 else tensor.unsqueeze(0)
