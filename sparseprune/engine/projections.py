"""Projections: which weights a scope keeps of given ones, for tensors in memory.

Owns `projection`, and which block every element belongs to. Knows no moments. Called by reconstruction, by
execution and by users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from msgspec import Struct
from torch import Tensor

from sparseprune.engine import grids
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from sparseprune.engine.block import BlockSpec, Values
    from sparseprune.engine.scope import SparseScope

Projection = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From tensors of the weights' shapes to masks of these shapes, True where the largest are kept."""


class ScopeProjection(Struct, frozen=True, eq=False):
    """A Projection that keeps the `nnz` largest blocks of each scope, whose views look at `params`."""

    scope: SparseScope
    nnz: int
    params: tuple[Tensor, ...]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Masks of tensors in the order of `params`, which are overwritten."""
        for param, tensor in zip(self.params, tensors, strict=True):
            param.copy_(tensor)
        places = self._places()
        masks = [torch.ones(param.shape, dtype=torch.bool, device=param.device) for param in self.params]
        for block, mask in self.scope.get_masks(self.nnz).items():
            masks[places[id(block.view.param)]] &= block.view.to_param(mask)
        return masks

    def numbers(self) -> list[Tensor]:
        """The number of each element's block, -1 outside of all views: int32, of the shapes of `params`.

        Scope by scope blocks are numbered in the order in which they win ties.
        """
        scope, places = self.scope, self._places()
        first, plain = 0, []
        for spec, _ in scope.members:
            count = spec.block.numblk()
            plain.append(torch.arange(first, first + count).reshape(spec.block.grid_shape))
            first += count
        in_scopes = scope.gather(plain).reshape(-1)
        numbers = torch.empty(first, dtype=torch.int32, device=in_scopes.device)
        numbers[in_scopes] = torch.arange(first, dtype=torch.int32, device=in_scopes.device)
        found = [
            torch.empty_strided(one.shape, one.stride(), dtype=torch.int32, device=one.device).fill_(-1)
            for one in self.params
        ]
        for (spec, _), grid in zip(scope.members, plain, strict=True):
            for leaf, order in spec.block.members:
                own, view = numbers[grid.permute(grids.inverse_order(order)).to(numbers.device)], leaf.view
                laid = found[places[id(view.param)]].as_strided(view.shape, view.stride, view.offset)
                laid.copy_(leaf.spread(own))
        return found

    def _places(self) -> dict[int, int]:
        return {id(param): place for place, param in enumerate(self.params)}


class Level(Struct, frozen=True, eq=False):
    """One of several nested scopes: in each of its scopes `nnz` of the blocks survive that are left.

    Or all but the share `sparsity` of these, rounded up to a multiple of `multiple_of`. Blocks that are
    `silent`, as members of fused ones, count nothing in norms.
    """

    scope: SparseScope
    nnz: int | None = None
    sparsity: float | None = None
    multiple_of: int = 1
    silent: tuple[BlockSpec, ...] = ()

    def values(self, given: Values = None) -> Values:
        """What ranks the blocks in place of the weights: what is given, zeros for those without a say."""
        if not self.silent:
            return given
        values = {block: block.view.data for block in self.scope.blocks()}
        if given is not None and not isinstance(given, Tensor):
            values |= given
        return values | {block: torch.zeros_like(block.view.data) for block in self.silent}

    def budget(self, among: Values) -> int | Tensor:
        """How many blocks survive in each scope where `among` marks the elements that are left."""
        if self.nnz is not None:
            return self.nnz
        left = self.scope.left(among).sum(-1)
        return surviving_each(self.sparsity or 0.0, left, self.multiple_of)


class NestedProjection(Struct, frozen=True, eq=False):
    """A Projection by nested scopes, outer ones first: each decides among what those before it keep."""

    levels: tuple[Level, ...]
    params: tuple[Tensor, ...]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Masks of tensors in the order of `params`, which are overwritten."""
        for param, tensor in zip(self.params, tensors, strict=True):
            param.copy_(tensor)
        return nested_masks(self.levels, self.params)


def nested_masks(
    levels: Sequence[Level], params: Sequence[Tensor], values: Sequence[Values] | None = None
) -> list[Tensor]:
    """What nested scopes keep of the tensors that they look at: bool masks of the shapes of `params`.

    `levels` come outer ones first; `values` rank the blocks of each in place of the weights.
    """
    masks = [
        torch.empty_strided(one.shape, one.stride(), dtype=torch.bool, device=one.device).fill_(value=True)
        for one in params
    ]
    places = {id(param): place for place, param in enumerate(params)}
    for number, level in enumerate(levels):
        among = {
            block: masks[places[id(block.view.param)]].as_strided(
                block.view.shape, block.view.stride, block.view.offset
            )
            for block in level.scope.blocks()
        }
        own = level.values(None if values is None else values[number])
        found = level.scope.masks_among(among, level.budget(among), own)
        for block, mask in found.items():
            among[block].copy_(mask)
    return masks


def surviving_each(sparsity: float, left: Tensor, multiple_of: int = 1) -> Tensor:
    """As `grids.surviving` of each count, rounded up to a multiple, but not above the count.

    >>> surviving_each(0.5, torch.tensor([4, 3, 0])).tolist()
    [2, 2, 0]
    """
    kept = left - (left.to(torch.float64) * min(sparsity, 1.0)).floor().to(left.dtype)
    return torch.minimum(left, -(-kept // multiple_of) * multiple_of)


def nested_projection(levels: Sequence[Level], params: Sequence[Tensor]) -> NestedProjection:
    """A Projection by nested scopes, outer ones first, for tensors in the order of `params`, as `projection`.

    Raises:
        SparsityError: a view of a scope that looks at none of them.
    """
    for level in levels:
        _refuse_others(level.scope, params)
    return NestedProjection(tuple(levels), tuple(params))


def projection(scope: SparseScope, nnz: int, params: Sequence[Tensor]) -> ScopeProjection:
    """A Projection that keeps the `nnz` largest blocks of each scope, for tensors in the order of `params`.

    The views of `scope` look at `params`, which each call overwrites. Elements outside of all views are kept.

    Raises:
        SparsityError: a view of the scope that looks at none of them.
    """
    _refuse_others(scope, params)
    return ScopeProjection(scope, nnz, tuple(params))


def _refuse_others(scope: SparseScope, params: Sequence[Tensor]) -> None:
    looked_at = {id(param) for param in params}
    for block in scope.blocks():
        if id(block.view.param) not in looked_at:
            raise SparsityError(f"{block.name} looks at none of the tensors that the projection is for")
