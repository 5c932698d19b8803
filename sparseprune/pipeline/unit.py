"""One slab of work on tensors: build the engine's objects, decide, zero, count.

Owns the way from bound shapes to engine objects and back to masks. Reads and writes no files; the
executor hands it tensors and takes its results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, View
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.tally import Tally, tally
from sparseprune.errors import NanScoreError, SparsityError
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sparseprune.engine.block import SparseBlock
    from sparseprune.engine.scope import SparseScope
    from sparseprune.pipeline.slabs import Piece, Slab
    from sparseprune.spec import BoundBlockCoupling, BoundScopeCoupling, Budget


@dataclass(frozen=True, slots=True)
class PrunedPiece:
    """What became of one piece: its mask (bool, the piece's shape), what was there, what is there now.

    `pruned` counts the elements that the mask drops, zero before or not.
    """

    keep: Tensor
    before: Tally
    after: Tally

    @property
    def pruned(self) -> int:
        return self.keep.numel() - int(self.keep.sum())


def prune_slab(slab: Slab, tensors: Mapping[str, Tensor]) -> dict[str, PrunedPiece]:
    """Prune the pieces of a slab in place; `tensors` holds them by name, in the shape of their piece.

    Raises:
        SparsityError: NaN in a tensor that competes, with its index in the stored tensor.
    """
    before = {name: tally(tensor) for name, tensor in tensors.items()}
    keeps = {
        name: torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for name, tensor in tensors.items()
    }
    for task in slab.tasks:
        scope = build_scope(task.instance.scope, tensors)
        try:
            masks = _decide(scope, task.instance.budget)
        except NanScoreError as error:
            raise _with_place(error, slab, scope) from error
        for leaf, bound in zip(scope.blocks(), task.instance.scope.leaves, strict=True):
            keeps[bound.tensor] &= leaf.view.to_param(masks[leaf])
        zero_pruned(masks)
    return {name: PrunedPiece(keeps[name], before[name], tally(tensors[name])) for name in tensors}


def build_scope(bound: BoundScope | BoundScopeCoupling, tensors: Mapping[str, Tensor]) -> SparseScope:
    """The engine's scope for a bound one, over tensors by name."""
    if isinstance(bound, BoundScope):
        return _build_scope_spec(bound, tensors)
    return ScopeCoupling(
        [_build_scope_spec(member, tensors) for member in bound.members], bound.orders, bound.label
    )


def _build_scope_spec(bound: BoundScope, tensors: Mapping[str, Tensor]) -> ScopeSpec:
    return ScopeSpec(_build_block(bound.block, tensors), bound.shape, bound.label)


def _build_block(bound: BoundBlock | BoundBlockCoupling, tensors: Mapping[str, Tensor]) -> SparseBlock:
    if isinstance(bound, BoundBlock):
        view = View(tensors[bound.tensor], bound.view_shape, bound.view_stride, bound.view_offset)
        return BlockSpec(view, bound.shape, bound.tensor)
    members = [_build_block(member, tensors) for member in bound.members]
    specs = [member for member in members if isinstance(member, BlockSpec)]
    return BlockCoupling(specs, bound.orders, bound.label)


def _decide(scope: SparseScope, budget: Budget) -> dict[BlockSpec, Tensor]:
    if budget.nnz is not None:
        return scope.get_masks(budget.nnz)
    if budget.threshold is None:
        raise SparsityError(f"{scope.name}: no budget")
    return scope.threshold_masks(budget.threshold)


def _with_place(error: NanScoreError, slab: Slab, scope: SparseScope) -> SparsityError:
    leaf = next(leaf for leaf in scope.blocks() if leaf.name == error.tensor)
    piece = next(piece for piece in slab.pieces if piece.stored.name == error.tensor)
    place = _stored_index(piece, leaf.view, error.place)
    return SparsityError(
        f"{error.tensor}: NaN at {list(place)}: it has no rank among the scores; "
        "repair the tensor or leave it out of the spec"
    )


def _stored_index(piece: Piece, view: View, place: tuple[int, ...]) -> tuple[int, ...]:
    within = view.offset + sum(index * step for index, step in zip(place, view.stride, strict=True))
    flat = torch.tensor(piece.first + within)
    return tuple(int(index) for index in torch.unravel_index(flat, piece.stored.shape))
