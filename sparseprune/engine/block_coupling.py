"""BlockCoupling: blocks of several tensors fused into one, kept or pruned together."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING

import torch

from sparseprune.engine.block import BlockSpec, SparseBlock, Values
from sparseprune.engine.grids import Shape, align, inverse_order, prod
from sparseprune.engine.view import disjoint
from sparseprune.errors import CouplingError, SparsityError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

    from torch import Tensor


class BlockCoupling(SparseBlock):
    """Fused blocks: `common[d] = grid_i[orders[i][d]]`; a fused block's norm is over all its elements.

    Without orders every grid is taken as it is.

    >>> up = BlockSpec(torch.zeros(8, 6), (1, -1), name="up")
    >>> down = BlockSpec(torch.zeros(6, 8), (-1, 1), name="down")
    >>> channel = BlockCoupling([up, down], [(0, 1), (1, 0)])
    >>> channel.grid_shape, channel.numel_per_block()
    ((8, 1), 12)

    Raises:
        CouplingError: grids that do not align, or an element that would belong to two members.
    """

    def __init__(
        self,
        specs: Sequence[BlockSpec],
        orders: Sequence[Sequence[int]] | None = None,
        name: str | None = None,
    ) -> None:
        self.specs = tuple(specs)
        self.name = name or "block coupling"
        grids = [spec.grid_shape for spec in self.specs]
        self.grid_shape, self.orders = align(grids, orders, [spec.name for spec in self.specs])
        refuse_shared_elements(self.specs)

    @property
    def members(self) -> tuple[tuple[BlockSpec, Shape], ...]:
        return tuple(zip(self.specs, self.orders, strict=True))

    @property
    def _identity(self) -> Hashable:
        return self.specs, self.orders

    @property
    def data(self) -> dict[BlockSpec, Tensor]:
        """The elements of each member's view, sharing its parameter's storage."""
        return {spec: spec.data for spec in self.specs}

    def set_data(self, t: Mapping[BlockSpec, Tensor]) -> None:
        """Write new elements into each member's view, as `BlockSpec.set_data`.

        Raises:
            SparsityError: a member without elements; nothing has been written then.
            ShapeMismatchError: a tensor of a wrong shape.
        """
        self._write_elements(t)

    def block_view(self, values: Values = None, reorder: bool = True, merge: bool = False) -> Tensor:  # noqa: ARG002, FBT001, FBT002  (a fixed signature)
        """Elements by fused block, members one after the other: (*grid_shape, elements per block).

        Members have blocks of unlike shape, so that only this form exists, with or without `merge`; unlike
        dtypes become float64.
        """
        if not reorder:
            raise SparsityError(f"{self.name}: the blocks of a coupling have no common interleaved form")
        elements = self.resolve(values)
        device = self.specs[0].view.param.device
        parts = [
            spec.fuse(elements[spec], order).reshape(*self.grid_shape, prod(spec.shape)).to(device)
            for spec, order in self.members
        ]
        dtypes = {part.dtype for part in parts}
        wide = parts if len(dtypes) == 1 else [part.to(torch.float64) for part in parts]
        return torch.cat(wide, dim=-1)

    def broadcast_block_to_element(self, grid: Tensor) -> dict[BlockSpec, Tensor]:
        """One number per fused block (`grid_shape`) as one per element of each member's view."""
        checked = self._on_grid(grid, "grid")
        return {spec: spec.spread(checked.permute(inverse_order(order))) for spec, order in self.members}


def refuse_shared_elements(specs: Sequence[BlockSpec]) -> None:
    """CouplingError where one element of a storage would belong to two members."""
    by_storage: defaultdict[int, list[BlockSpec]] = defaultdict(list)
    for spec in specs:
        by_storage[spec.view.param.untyped_storage()._cdata].append(spec)  # noqa: SLF001  (its identity)
    for neighbours in by_storage.values():
        if disjoint([spec.view for spec in neighbours]):
            continue  # told in one pass, however many members look at one tensor
        for one, other in combinations(neighbours, 2):
            if one.view.overlaps(other.view):
                raise CouplingError(
                    f"{one.name} and {other.name} share elements: an element belongs to one member only"
                )
