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
from sparseprune.engine.scoring import first_nan
from sparseprune.engine.tally import Tally, tally
from sparseprune.errors import NanScoreError, SparsityError
from sparseprune.pipeline.ranking import conditioners_of, rank
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine.block import SparseBlock
    from sparseprune.engine.scope import SparseScope
    from sparseprune.pipeline.ranking import Inputs
    from sparseprune.pipeline.slabs import Piece, Slab
    from sparseprune.spec import BoundBlockCoupling, BoundInstance, BoundScopeCoupling


@dataclass(frozen=True, slots=True)
class Reach:
    """Elements of a tensor that a rule reached, and how many of them its masks drop, zero before or not."""

    numel: int = 0
    pruned: int = 0

    def __add__(self, other: Reach) -> Reach:
        return Reach(self.numel + other.numel, self.pruned + other.pruned)


@dataclass(frozen=True, slots=True)
class PrunedPiece:
    """What became of one piece: its mask (bool, the piece's shape), what was there, what is there now.

    `reach` has for each rule the elements that it reached, and those that its masks drop.
    """

    keep: Tensor
    before: Tally
    after: Tally
    reach: Mapping[str, Reach]


def prune_slab(slab: Slab, tensors: Mapping[str, Tensor], inputs: Sequence[Inputs]) -> dict[str, PrunedPiece]:
    """Prune the pieces of a slab in place; `tensors` holds them by name, in the shape of their piece.

    `inputs` has one mapping for each task.

    Raises:
        SparsityError: NaN in a tensor that competes, with its index in the stored tensor.
    """
    before = {name: tally(tensor) for name, tensor in tensors.items()}
    keeps = {
        name: torch.ones(tensor.shape, dtype=torch.bool, device=tensor.device)
        for name, tensor in tensors.items()
    }
    reach: dict[str, dict[str, Reach]] = {name: {} for name in tensors}
    for task, given in zip(slab.tasks, inputs, strict=True):
        scope = build_scope(task.instance.scope, tensors)
        try:
            masks = _prune(scope, task.instance, given, slab.rows_before)
        except NanScoreError as error:
            raise _with_place(error, slab, scope) from error
        for leaf in scope.blocks():
            keep = masks[leaf]
            keeps[leaf.name] &= leaf.view.to_param(keep)
            known = reach[leaf.name].get(task.rule, Reach())
            reach[leaf.name][task.rule] = known + Reach(
                keep.numel(), keep.numel() - int(keep.count_nonzero())
            )
    return {
        name: PrunedPiece(keeps[name], before[name], tally(tensor), reach[name])
        for name, tensor in tensors.items()
    }


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


def _prune(
    scope: SparseScope, instance: BoundInstance, inputs: Inputs, rows_before: int
) -> dict[BlockSpec, Tensor]:
    """Decide and write; gives the masks, True where a weight is kept."""
    budget = instance.budget
    if instance.soft is None:
        ranking = rank(scope, instance.scope, instance.score, inputs, rows_before)
        masks = ranking.masks(scope, budget.nnz, budget.threshold)
        zero_pruned(masks)
        return masks
    soft = instance.soft
    limits = budget.threshold if budget.nnz is None else scope.soft_budget(budget.nnz, soft.k_weight)
    scope.soft_threshold(
        0.0 if limits is None else limits,
        conditioners_of(scope, inputs),
        soft.scale,
        soft.max_iter,
        soft.atol,
        soft.eps,
    )
    return scope.get_masks(0, block_mask=scope.block_norms() > 0)


def _with_place(error: NanScoreError, slab: Slab, scope: SparseScope) -> SparsityError:
    leaves = [leaf for leaf in scope.blocks() if leaf.name == error.tensor]
    leaf = next((leaf for leaf in leaves if first_nan(leaf.view.data) == error.place), leaves[0])
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
