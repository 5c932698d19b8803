"""ScopeCoupling: scopes of several block grids aligned to one grid, competing for one budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.engine.block_coupling import refuse_shared_elements
from sparseprune.engine.grids import Shape, align
from sparseprune.engine.scope import SparseScope

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from sparseprune.engine.block import Values
    from sparseprune.engine.scope_spec import ScopeSpec


class ScopeCoupling(SparseScope):
    """Aligned scopes: `common[d] = grid_i[orders[i][d]]` for the grids of scopes.

    All blocks of an aligned scope compete for one budget, so that one tensor may lose more than
    another; members may have unlike scope shapes.

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
        self, scopes: Sequence[ScopeSpec], orders: Sequence[Sequence[int]], name: str | None = None
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

    def kth_mid(self, k: int, values: Values = None, k_weight: float = 1.0) -> Tensor:
        """`(kth + k_weight * (k+1)th) / (1 + k_weight)`; what comes behind the last block counts as 0."""
        return self._kth_mid(values, k, k_weight)
