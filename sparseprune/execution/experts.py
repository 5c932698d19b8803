"""Experts as blocks: to which experts the blocks of a rule belong, and where a router has their rows.

Owns what a block has to be for that. Reads names, shapes and the config. Called by plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.checkpoint import read_config
from sparseprune.engine.grids import prod
from sparseprune.spec import TensorInfo
from sparseprune.spec.structures import Index, expert_modules, find_routers

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.checkpoint import Checkpoint
    from sparseprune.execution.regions import AnyBlock
    from sparseprune.spec import BoundBlock


class BlockExperts(Struct, frozen=True):
    """Whose experts the blocks of a grid are, in its order: `number` of them from `first` on.

    `module` has `count` experts in all.
    """

    module: str
    count: int
    first: int
    number: int


class Routed(Struct, frozen=True):
    """The routed experts of a checkpoint: whose each tensor is, and the routers by modules of experts.

    Of a router it knows the tensor and its dimension of the experts.
    """

    numel: Mapping[str, int]
    experts: Mapping[str, BlockExperts]
    routers: Mapping[str, tuple[TensorInfo, int]]

    @staticmethod
    def find(checkpoint: Checkpoint) -> Routed:
        stored = checkpoint.tensors
        tensors = (TensorInfo(name, each.dtype, each.shape) for name, each in stored.items())
        index = Index.of(tensors, read_config(checkpoint))
        found: dict[str, BlockExperts] = {}
        for module, structures in expert_modules(index).items():
            for number, structure in structures.items():
                if isinstance(number, int):
                    one = BlockExperts(module, max(map(int, structures)) + 1, number, 1)
                else:
                    one = BlockExperts(module, structure.units, 0, structure.units)
                found |= dict.fromkeys([part.tensor for part in structure.parts], one)
        routers = find_routers(index, {one.module: one.count for one in found.values()})
        return Routed({name: stored[name].numel for name in found}, found, routers)

    def of(self, block: AnyBlock) -> BlockExperts | None:
        """The experts that the blocks of a grid are; None where they are something else."""
        found = {self.experts.get(leaf.tensor) for leaf in block.leaves}
        one = found.pop()
        if one is None or found or prod(block.grid_shape) != one.number:
            return None
        fits = all(_is_slices(leaf, self.numel[leaf.tensor] // one.number) for leaf in block.leaves)
        return one if fits else None

    def router(self, experts: BlockExperts) -> tuple[str, int] | None:
        """The tensor that has a row for each expert, and its dimension of the experts."""
        found = self.routers.get(experts.module)
        return None if found is None else (found[0].name, found[1])


def _is_slices(leaf: BoundBlock, numel: int) -> bool:
    """Whether the blocks of a leaf lie `numel` elements apart, one behind the other."""
    grid = leaf.grid_shape
    return all(
        size == 1 or extent * stride == prod(grid[dim + 1 :]) * numel
        for dim, (size, extent, stride) in enumerate(zip(grid, leaf.shape, leaf.view_stride, strict=True))
    )
