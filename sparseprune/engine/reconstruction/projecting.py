"""Projections: what the scopes of the engine keep, asked about tensors that lie elsewhere.

Owns the buffers over which a scope is built, and the way from its views to masks of whole tensors. Called by
users of `admm` and by execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparseprune.engine.reconstruction.alternating import Projection
    from sparseprune.engine.scope import SparseScope


def projection(scope: SparseScope, nnz: int, params: Sequence[Tensor]) -> Projection:
    """Keeps `nnz` blocks in each scope, the largest: of tensors that stand for `params`, in their order.

    `params` are those that the views of `scope` look at; they are overwritten with what is asked about. An
    element outside of all views is kept.

    Raises:
        SparsityError: a view of the scope that looks at none of them.
    """
    places = {id(param): place for place, param in enumerate(params)}
    blocks = scope.blocks()
    for block in blocks:
        if id(block.view.param) not in places:
            raise SparsityError(f"{block.name} looks at none of the tensors that the projection is for")

    def keep(tensors: Sequence[Tensor]) -> list[Tensor]:
        for param, tensor in zip(params, tensors, strict=True):
            param.copy_(tensor)
        masks = [torch.ones(param.shape, dtype=torch.bool, device=param.device) for param in params]
        for block, mask in scope.get_masks(nnz).items():
            masks[places[id(block.view.param)]] &= block.view.to_param(mask)
        return masks

    return keep
