"""Least squares in plain loops: one row after the other, one support after the other, in float64."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseprune import Matrix


def damped(moment: Tensor, damp: float) -> NDArray[np.float64]:
    wide = moment.double().numpy()
    hessian: NDArray[np.float64] = wide + damp * np.mean(np.diag(wide)) * np.eye(len(wide))
    return hessian


def objective(weights: Tensor, dense: Tensor, moment: Tensor, damp: float = 0.01) -> list[float]:
    """Of each row of (out, in) matrices."""
    away = (weights.double() - dense.double()).numpy()
    return [float(row @ damped(moment, damp) @ row) for row in away]


def solved(
    dense: Tensor, moment: Tensor, mask: Tensor, damp: float = 0.01, fixed: Tensor | None = None
) -> Tensor:
    """The least squares on the support of `mask` (out, in), every row by itself; where `fixed` as it was."""
    hessian = damped(moment, damp)
    rows = []
    for number, row in enumerate(dense.double().numpy()):
        kept = mask[number].numpy()
        free = kept if fixed is None else kept & ~fixed[number].numpy()
        start = np.where(kept, row, 0.0)
        result = start.copy()
        if free.any():
            pull = ((row - start) @ hessian)[free]
            step, *_ = np.linalg.lstsq(hessian[np.ix_(free, free)], pull, rcond=None)
            result[free] += step
        rows.append(result)
    found: Tensor = torch.from_numpy(np.array(rows).reshape(dense.shape))
    return found


def loss_objective(weights: Tensor, matrix: Matrix, damps: tuple[float, float] = (0.01, 0.1)) -> float:
    """tr(G D H D^T) of an (out, in) matrix by pairs of rows; `damps` are of inputs and gradients."""
    hessian, outer = damped(matrix.moment, damps[0]), damped(gradients_of(matrix), damps[1])
    away = (weights.double() - matrix.dense.double()).numpy()
    return float(
        sum(
            outer[one, other] * (away[one] @ hessian @ away[other])
            for one in range(len(away))
            for other in range(len(away))
        )
    )


def loss_solved(matrix: Matrix, mask: Tensor, damps: tuple[float, float] = (0.01, 0.1)) -> Tensor:
    """The least squares of an (out, in) matrix on its support: one system of all weights that may move."""
    system = np.kron(damped(gradients_of(matrix), damps[1]), damped(matrix.moment, damps[0]))
    dense = matrix.dense.double().numpy().reshape(-1)
    kept = mask.numpy().reshape(-1)
    free = kept if matrix.fixed is None else kept & ~matrix.fixed.numpy().reshape(-1)
    result = np.where(kept, dense, 0.0)
    if free.any():
        pull = (system @ (dense - result))[free]
        step, *_ = np.linalg.lstsq(system[np.ix_(free, free)], pull, rcond=None)
        result[free] += step
    found: Tensor = torch.from_numpy(result.reshape(tuple(matrix.dense.shape)))
    return found


def gradients_of(matrix: Matrix) -> Tensor:
    """(out, out), of a matrix also where it has diagonal blocks of it."""
    if matrix.gradients is None:
        raise TypeError("a matrix without gradients has no loss")
    if matrix.gradients.ndim == matrix.dense.ndim:
        return matrix.gradients
    return among_zeros(matrix.gradients)


def among_zeros(blocks: Tensor) -> Tensor:
    """Diagonal blocks (groups, size, size) as one matrix."""
    groups, size = blocks.shape[:2]
    found = torch.zeros(groups * size, groups * size, dtype=blocks.dtype)
    for number, block in enumerate(blocks):
        found[number * size : (number + 1) * size, number * size : (number + 1) * size] = block
    return found


def best_support(dense: Tensor, moment: Tensor, nnz: int, damp: float = 0.01) -> float:
    """The least objective of one row (in,) over all supports of so many weights."""
    found = []
    for kept in combinations(range(len(dense)), nnz):
        mask = torch.zeros(1, len(dense), dtype=torch.bool)
        mask[0, list(kept)] = True
        found += objective(solved(dense[None], moment, mask, damp), dense[None], moment, damp)
    return min(found)


def moments(features: int, samples: int, generator: torch.Generator, matrices: int = 0) -> Tensor:
    """Second moments of inputs that depend on each other, some much larger than others."""
    many = max(matrices, 1)
    mixing = torch.randn(many, features, features, generator=generator) / features**0.5
    mixing = mixing + torch.eye(features)
    scales = torch.rand(many, 1, features, generator=generator) * 3 + 0.1
    inputs = (torch.randn(many, samples, features, generator=generator) @ mixing) * scales
    found: Tensor = inputs.mT @ inputs / samples
    return found if matrices else found[0]


def greedy_support(
    numbers: list[list[int]], blocks: int, nnz: int, cost: Callable[[list[list[bool]]], float]
) -> list[list[bool]]:
    """Which inputs of each matrix survive: block after block goes, the one without which the cost is least.

    `numbers` has the block of each input, below 0 for one that stays; scopes have `blocks` blocks each.
    """
    count = max(number for one in numbers for number in one) + 1
    alive = set(range(count))

    def without(gone: set[int]) -> list[list[bool]]:
        return [[number < 0 or number in alive - gone for number in one] for one in numbers]

    while True:
        left = {
            number for number in alive if sum(other // blocks == number // blocks for other in alive) > nnz
        }
        if not left:
            return without(set())
        alive.remove(min(left, key=lambda number: cost(without({number}))))
