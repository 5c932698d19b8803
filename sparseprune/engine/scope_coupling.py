"""ScopeCoupling: scopes of several block grids aligned to one grid, competing for one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.block_coupling import refuse_shared_elements
from sparseprune.engine.grids import Shape, align, inverse_order
from sparseprune.engine.scope import SparseScope
from sparseprune.errors import ShapeMismatchError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine.block import SparseBlock, Values
    from sparseprune.engine.scope_spec import ScopeSpec


class ScopeCoupling(SparseScope):
    """Aligned scopes: `common[d] = grid_i[orders[i][d]]` for the grids of scopes.

    All blocks of an aligned scope compete for one budget, so that one tensor may lose more than
    another; members may have unlike scope shapes. Without orders every grid is taken as it is.

    >>> import torch
    >>> from sparseprune.engine import BlockSpec, ScopeSpec
    >>> big, small = torch.full((2, 2), 3.0), torch.ones(2, 2)
    >>> scopes = [ScopeSpec(BlockSpec(t, ()), ()) for t in (big, small)]
    >>> ScopeCoupling(scopes, [(0, 1), (0, 1)]).hard_threshold(nnz=4)
    >>> small
    tensor([[0., 0.],
            [0., 0.]])

    Raises:
        CouplingError: grids of scopes that do not align, or an element that would belong to two scopes.
    """

    def __init__(
        self,
        scopes: Sequence[ScopeSpec],
        orders: Sequence[Sequence[int]] | None = None,
        name: str | None = None,
    ) -> None:
        self.scopes = tuple(scopes)
        self.name = name or "scope coupling"
        grids = [scope.grid_shape for scope in self.scopes]
        self.grid_shape, self.orders = align(grids, orders, [scope.name for scope in self.scopes])
        refuse_shared_elements(self.blocks())

    @property
    def members(self) -> tuple[tuple[ScopeSpec, Shape], ...]:
        return tuple(zip(self.scopes, self.orders, strict=True))

    def kth_largest(self, k: int, values: Values = None) -> Tensor:
        """The k-th largest norm in each scope, over all members: float64 of `grid_shape`; inf for k 0."""
        return self._kth(values, k)

    def block_to_scope(
        self,
        b: Mapping[SparseBlock, Tensor],
        reorder: bool = True,  # noqa: FBT001, FBT002  (a fixed signature)
        merge: bool = False,  # noqa: ARG002, FBT001, FBT002  (a fixed signature)
    ) -> Tensor:
        """Tensors with their block's grid in front, by scope: (*grid_shape, blocks per scope, trailing).

        Members have scopes of unlike shape, so that only this form exists, with or without `merge`; their
        blocks stand one after the other, in the order of the members.
        """
        if not reorder:
            raise SparsityError(f"{self.name}: the scopes of a coupling have no common interleaved form")
        missing = [spec.block.name for spec in self.scopes if spec.block not in b]
        if missing:
            raise SparsityError(f"{self.name}: no tensor given for {', '.join(missing)}")
        return self.gather([b[spec.block] for spec in self.scopes])

    def scope_to_block(self, scope_values: Tensor) -> dict[SparseBlock, Tensor]:
        """One number per scope (`grid_shape`) as one per block, on each member's block grid."""
        if tuple(scope_values.shape) != self.grid_shape:
            raise ShapeMismatchError(
                f"{self.name}: scope values of shape {list(scope_values.shape)} do not fit the grid of "
                f"scopes {list(self.grid_shape)}"
            )
        return {
            spec.block: spec.scope_to_block(scope_values.permute(inverse_order(order)))
            for spec, order in self.members
        }
