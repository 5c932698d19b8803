"""Ranking: what the blocks of a scope are compared by, from a score of the spec and its inputs.

Owns one function for each kind of score. Gives the engine element values or ready block scores; the
choice among blocks is the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparseprune.engine.grids import prod
from sparseprune.engine.randomness import random_scores
from sparseprune.engine.scoring import first_nan
from sparseprune.errors import SparsityError
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from torch import Tensor

    from sparseprune.engine import BlockSpec, SparseScope
    from sparseprune.spec import BoundScopeCoupling, Score

Inputs = Mapping[tuple[str, str], "Tensor"]
"""Tensors by role and key, as in TaskInput, cut as the slab is."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """Element values and the norm over them, or block scores (*grid_shape, blocks per scope)."""

    values: Mapping[BlockSpec, Tensor] | None = None
    norm: float = 2.0
    rms: bool = False
    block_scores: Tensor | None = None

    def masks(self, scope: SparseScope, nnz: int | None, threshold: float | None) -> dict[BlockSpec, Tensor]:
        """The decision of a scope by this ranking, for whichever of the budgets is given."""
        scores = self._scores(scope)
        if nnz is not None:
            return scope.get_masks(nnz, self.values, scores)
        return scope.threshold_masks(0.0 if threshold is None else threshold, self.values, scores)

    def _scores(self, scope: SparseScope) -> Tensor | None:
        """None where the engine's own comparison of norms, exact for single elements, says the same."""
        if self.block_scores is not None:
            return self.block_scores
        single = all(spec.block.numel_per_block() == 1 for spec, _ in scope.members)
        if single or (self.norm == 2 and not self.rms):
            return None
        return scope.block_norms(self.values, self.norm, rms=self.rms)


def rank(
    scope: SparseScope,
    bound: BoundScope | BoundScopeCoupling,
    score: Score,
    inputs: Inputs,
    rows_before: int = 0,
) -> Ranking:
    """The ranking that a score asks for; `rows_before` counts the rows that lie before the slab.

    Raises:
        SparsityError: NaN in an input, or a negative Hessian diagonal.
    """
    if score.kind == "magnitude":
        return Ranking(norm=score.norm, rms=score.normalize)
    if score.kind == "random":
        return Ranking(block_scores=_random(scope, bound, score.seed, rows_before))
    if score.kind == "blocks":
        return Ranking(block_scores=_given(scope, bound, inputs))
    if score.kind == "values":
        values = {leaf: _checked(inputs, "values", leaf.name) for leaf in scope.blocks()}
        return Ranking(values, score.norm, score.normalize)
    if score.kind == "wanda":
        values = {leaf: _wanda(leaf, score.input_dim, inputs) for leaf in scope.blocks()}
        return Ranking(values, score.norm, score.normalize)
    values = {leaf: _obd(leaf, score.input_dim, inputs) for leaf in scope.blocks()}
    return Ranking(values, 1.0, score.normalize)


def conditioners_of(scope: SparseScope, inputs: Inputs) -> dict[BlockSpec, Tensor] | None:
    """The diagonal that soft thresholding is conditioned by, None where no file was given."""
    leaves = scope.blocks()
    if not any(("conditioners", leaf.name) in inputs for leaf in leaves):
        return None
    return {leaf: _checked(inputs, "conditioners", leaf.name) for leaf in leaves}


def _wanda(leaf: BlockSpec, dim: int, inputs: Inputs) -> Tensor:
    """|w| times the l2 norm of its input feature (Sun et al. 2023, A Simple and Effective Pruning Approach).

    Float64, so that the product of two float32 numbers is exact. Members without statistics count 0.
    """
    weight = leaf.view.param.detach().to(torch.float64)
    if ("vector", leaf.name) not in inputs:
        return torch.zeros_like(weight)
    return weight.abs() * _along(_checked(inputs, "vector", leaf.name), dim, weight.ndim)


def _obd(leaf: BlockSpec, dim: int, inputs: Inputs) -> Tensor:
    """w^2 times the diagonal of the Hessian (LeCun et al. 1989, Optimal Brain Damage, without the 1/2)."""
    weight = leaf.view.param.detach().to(torch.float64)
    if ("vector", leaf.name) not in inputs:
        return torch.zeros_like(weight)
    diagonal = _checked(inputs, "vector", leaf.name)
    if bool((diagonal < 0).any()):
        raise SparsityError(
            f"{leaf.name}: the diagonal of the Hessian in the score file is negative somewhere"
        )
    return weight.square() * _along(diagonal, dim, weight.ndim)


def _along(vector: Tensor, dim: int, rank_of_weight: int) -> Tensor:
    shape = [1] * rank_of_weight
    shape[dim] = -1
    return vector.to(torch.float64).reshape(shape)


_FILE_OF = {"values": "score", "vector": "score", "blocks": "score", "conditioners": "conditioner"}


def _checked(inputs: Inputs, role: str, key: str) -> Tensor:
    tensor = inputs[role, key]
    if first_nan(tensor) is not None:
        raise SparsityError(
            f"{key}: there is NaN in its {_FILE_OF[role]} file: it has no rank among the scores"
        )
    return tensor


def _random(
    scope: SparseScope, bound: BoundScope | BoundScopeCoupling, seed: int, rows_before: int
) -> Tensor:
    grids = []
    for (spec, _), member in zip(scope.members, _members(bound), strict=True):
        block = member.block
        shape = spec.block.grid_shape
        first = 0
        if rows_before and isinstance(block, BoundBlock):
            first = rows_before // block.shape[0] * prod(shape[1:])
        grids.append(random_scores(seed, block.label, first, prod(shape)).reshape(shape))
    return scope.gather(grids)


def _given(scope: SparseScope, bound: BoundScope | BoundScopeCoupling, inputs: Inputs) -> Tensor:
    grids = [
        _checked(inputs, "blocks", member.block.label).reshape(spec.block.grid_shape).to(torch.float64)
        for (spec, _), member in zip(scope.members, _members(bound), strict=True)
    ]
    return scope.gather(grids)


def _members(bound: BoundScope | BoundScopeCoupling) -> tuple[BoundScope, ...]:
    return (bound,) if isinstance(bound, BoundScope) else bound.members
