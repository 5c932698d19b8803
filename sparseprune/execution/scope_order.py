"""Arranging: numbers on the block grids of a scope's members, scope after scope, and back to its leaves.

Owns the order of ties: scopes row-major, in each the blocks of earlier members first. Pure numpy on bound
shapes. Called by ways that decide over block scores, and by removal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.execution.regions import leaves_of, members_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sparseprune.execution.regions import AnyScope
    from sparseprune.spec import BoundBlock


def by_scope(scope: AnyScope, grids: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Numbers on each member's block grid as (scopes, blocks per scope), in the order of ties."""
    parts = []
    for (member, order), grid in zip(members_of(scope), grids, strict=True):
        pairs = [size for pair in zip(member.grid_shape, member.shape, strict=True) for size in pair]
        rank = len(order)
        split = grid.reshape(pairs).transpose((*(2 * dim for dim in order), *range(1, 2 * rank, 2)))
        parts.append(split.reshape(prod(scope.grid_shape), prod(member.shape)))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def by_leaf(scope: AnyScope, keep: NDArray[Any]) -> dict[BoundBlock, NDArray[Any]]:
    """What `by_scope` does, undone, for each leaf on its own block grid."""
    scopes = keep.reshape(prod(scope.grid_shape), scope.blocks_per_scope)
    decisions = {}
    done = 0
    for member, order in members_of(scope):
        part = scopes[:, done : done + member.blocks_per_scope]
        done += member.blocks_per_scope
        rank = len(order)
        split = part.reshape((*scope.grid_shape, *member.shape)).transpose(
            [dim for own in range(rank) for dim in (order.index(own), rank + own)]
        )
        grid = split.reshape(member.block.grid_shape)
        for leaf, own_order in leaves_of(member.block):
            decisions[leaf] = grid.transpose(inverse(own_order))
    return decisions


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes another one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
