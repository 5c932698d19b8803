"""Tuning: the surviving weights of a whole block, so that it gives what it gives in the dense model.

Owns the steps of the optimizer, which elements they move, and the metric of what outputs differ by. Knows no
specs, no files and no model. Called by sweeping. (Blocks that are tuned alone, through what is not linear in
them: BRECQ, Li et al. 2021; of pruned ones EBFT, Guo et al. 2024.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Loss = Callable[[Mapping[str, Tensor], int], Tensor]
    """The loss of parameters, by name, over a batch, by its number."""

# Measured in tests/benchmarks/README.md.
_RATE = 0.01  # of the first step, times the spread of the surviving weights; it falls to 0
_BETAS = (0.9, 0.99)
_TINY = 1e-16  # gradients of large blocks are small
_DAMP = 0.1  # of the gradients, as for single matrices


class Tuned(Struct, frozen=True, eq=False):
    """Tensors by name, with the shapes and dtypes that they had, and the loss of all batches."""

    tensors: Mapping[str, Tensor]
    before: float
    after: float


def tuned(
    loss: Loss,
    start: Mapping[str, Tensor],
    free: Mapping[str, Tensor],
    batches: Sequence[Sequence[int]],
    steps: int,
    between: Callable[[], None] = lambda: None,
) -> Tuned:
    """Parameters of a lower loss than `start`, by so many steps of Adam; never of a higher one.

    Each step is by one of the `batches`, which take turns, each of them by the numbers that `loss` gets.
    `free` are bool tensors of the shape of some parameters: elements where they are False, and parameters
    without one, keep their bits, and no other element becomes 0. `between` is called between steps.
    """
    every = [one for some in batches for one in some]

    def whole(parameters: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            return sum(float(loss(parameters, one)) for one in every)

    before = whole(start)
    moving = {name: start[name].detach().to(torch.float32, copy=True).requires_grad_() for name in free}
    rates = {name: _RATE * _spread(start[name], free[name]) for name in free}
    optimizer = torch.optim.Adam(
        [{"params": [one], "lr": rates[name]} for name, one in moving.items()],
        betas=_BETAS,
        eps=_TINY,
        foreach=False,
    )
    for step in range(steps if before > 0 else 0):
        between()
        for group, rate in zip(optimizer.param_groups, rates.values(), strict=True):
            group["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        for one in batches[step % len(batches)]:
            with torch.enable_grad():
                now = {name: each.to(start[name].dtype) for name, each in moving.items()}
                torch.autograd.backward([loss({**start, **now}, one) / before])
        for name, each in moving.items():
            if each.grad is not None:
                each.grad.mul_(free[name])
        optimizer.step()
    found = {name: _rounded(each.detach(), start[name], free[name]) for name, each in moving.items()}
    after = whole({**start, **found})
    if not after < before:
        return Tuned(dict(start), before, before)
    return Tuned({**start, **found}, before, after)


def _spread(weights: Tensor, free: Tensor) -> float:
    """The root mean square of the elements that may move."""
    square = (weights.to(torch.float32).square() * free).sum() / free.sum().clamp_min(1)
    return math.sqrt(float(square))


def _rounded(found: Tensor, start: Tensor, free: Tensor) -> Tensor:
    """In the dtype of the start, with its bits where nothing may move or would vanish."""
    rounded = found.to(start.dtype)
    return torch.where(free & (rounded != 0) & rounded.isfinite(), rounded, start)


def difference(made: Tensor, wanted: Tensor, root: Tensor | None) -> Tensor:
    """The sum of squares of what outputs (..., features) differ by, in a metric if there is its `root`."""
    found = (made - wanted).to(torch.float32)
    if root is not None:
        found = torch.einsum("...gi,gij->...gj", found.reshape(*found.shape[:-1], *root.shape[:2]), root)
    return found.square().sum()


def root_of(gradients: Tensor) -> Tensor:
    """The damped root of second moments of gradients, (size, size) or (groups, size, size); with groups."""
    moments = gradients.to(torch.float64).reshape(-1, *gradients.shape[-2:])
    mean = moments.diagonal(dim1=-2, dim2=-1).mean()
    scaled = (moments + moments.mT) / (2 * mean) if mean > 0 else torch.zeros_like(moments)
    damped = scaled + _DAMP * torch.eye(scaled.shape[-1], dtype=scaled.dtype, device=scaled.device)
    found: Tensor = torch.linalg.cholesky_ex(damped)[0].to(torch.float32)
    return found
