"""ScopeSpec: scopes on one block grid, and the layouts by block and by scope."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

from sparseprune.engine.grids import Shape, divide, identity_order, prod, scope_extents
from sparseprune.engine.scope import SparseScope
from sparseprune.errors import ShapeMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparseprune.engine.block import SparseBlock, Values


class ScopeSpec(SparseScope):
    """Scopes of one block grid, all of one shape in blocks; -1 and missing dimensions are spanned.

    >>> import torch
    >>> from sparseprune.engine import BlockSpec
    >>> w = torch.tensor([[1.0, -4.0, 3.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    >>> ScopeSpec(BlockSpec(w, (1, 1)), (1, 4)).hard_threshold(nnz=2)
    >>> w
    tensor([[ 0.0000, -4.0000,  3.0000,  0.0000],
            [ 0.5000,  0.5000,  0.0000,  0.0000]])

    Raises:
        ShapeMismatchError: the shape has more dimensions than the block grid, or does not divide it.
    """

    def __init__(self, block: SparseBlock, shape: Sequence[int], name: str | None = None) -> None:
        self.block = block
        self.name = name or f"scope of {block.name}"
        self.shape: Shape = scope_extents(block.grid_shape, tuple(map(operator.index, shape)))
        self.grid_shape = divide(block.grid_shape, self.shape, "scope", "block grid")

    @property
    def members(self) -> tuple[tuple[ScopeSpec, Shape], ...]:
        return ((self, identity_order(len(self.grid_shape))),)

    def block_to_scope(self, b: Tensor, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: FBT001, FBT002  (a fixed signature)
        """A tensor with the block grid in front, by scope; dimensions behind the grid stay behind.

        (G1, g1, G2, g2, ..., trailing), with `reorder` (G1, G2, ..., g1, g2, ..., trailing), with `merge`
        (which reorders) (G1, G2, ..., g1*g2*..., trailing).
        """
        rank = len(self.grid_shape)
        if tuple(b.shape[:rank]) != self.block.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: shape {list(b.shape)} does not begin with the block grid "
                f"{list(self.block.grid_shape)}"
            )
        trailing = b.shape[rank:]
        interleaved = b.reshape((*self._pairs(), *trailing))
        if not (reorder or merge):
            return interleaved
        behind = range(2 * rank, 2 * rank + len(trailing))
        ordered = interleaved.permute((*range(0, 2 * rank, 2), *range(1, 2 * rank, 2), *behind))
        return ordered.reshape(*self.grid_shape, prod(self.shape), *trailing) if merge else ordered

    def scope_blocks_to_grid(self, by_scope: Tensor) -> Tensor:
        """The inverse of `block_to_scope` with `merge`: (*grid_shape, blocks per scope) to the block grid."""
        rank = len(self.grid_shape)
        split = by_scope.reshape((*self.grid_shape, *self.shape))
        pairs = [dim for d in range(rank) for dim in (d, rank + d)]
        return split.permute(pairs).reshape(self.block.grid_shape)

    def scope_to_block(self, scope_values: Tensor) -> Tensor:
        """One number per scope (`grid_shape`) as one per block (the block grid)."""
        if tuple(scope_values.shape) != self.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: scope values of shape {list(scope_values.shape)} do not fit the grid "
                f"of scopes {list(self.grid_shape)}"
            )
        ones = [size for extent in self.grid_shape for size in (extent, 1)]
        return scope_values.reshape(ones).expand(self._pairs()).reshape(self.block.grid_shape)

    def kth_largest(self, element_values: Values, nnz: int) -> Tensor:
        """The nnz-th largest norm in each scope, float64 of `grid_shape`; infinity for nnz 0."""
        return self._kth(element_values, nnz)

    def _pairs(self) -> list[int]:
        return [size for pair in zip(self.grid_shape, self.shape, strict=True) for size in pair]
