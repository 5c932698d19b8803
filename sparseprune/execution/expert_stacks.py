"""Expert stacks: tasks whose tensors hold a matrix for each expert, of which each decides by itself.

Owns which matrices a part of the scope grid reaches, and so whether a task can be cut into independent ones.
Pure arithmetic on bound shapes. Called by strategy and reconstruct.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.engine.grids import prod
from sparseprune.execution.regions import Part, regions_at, whole_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import Region


@dataclass(frozen=True, slots=True)
class StackPart:
    """A part of a task's scope grid, and the matrices [begin, end) of every tensor that it reaches."""

    cell: Part
    begin: int
    end: int

    def joined(self, other: StackPart) -> StackPart:
        """A part and the one that follows it."""
        extent = (self.cell.extent[0] + other.cell.extent[0], *self.cell.extent[1:])
        return StackPart(Part(self.cell.begin, extent), self.begin, other.end)


def stacked_parts(task: Task, tensors: Mapping[str, StoredTensor]) -> list[StackPart]:
    """The parts that are independent of each other, a matrix each, in order; else one for all."""
    scope = task.instance.scope
    whole = whole_part(scope.grid_shape)
    rebuilt = {tensors[one.key].shape for one in task.inputs if one.role == "moment"}
    counts = {tensors[leaf.tensor].shape[:1] for leaf in scope.leaves}
    alone = [StackPart(whole, 0, 0)]
    if len(counts) != 1 or any(len(shape) != 3 for shape in rebuilt) or not whole.numel:
        return alone
    ((count,),) = counts
    parts: list[StackPart] = []
    for place in range(scope.grid_shape[0]):
        cell = Part((place, *whole.begin[1:]), (1, *whole.extent[1:]))
        reached = {_matrix(region, tensors) for region in regions_at(scope, cell).values()}
        if len(reached) != 1 or None in reached:
            return alone
        (matrix,) = reached
        if matrix is None or (parts and matrix < parts[-1].begin):
            return alone
        one = StackPart(cell, matrix, matrix + 1)
        if parts and parts[-1].begin == matrix:
            parts[-1] = parts[-1].joined(one)
        else:
            parts.append(one)
    return parts if [part.begin for part in parts] == list(range(count)) else alone


def _matrix(region: Region, tensors: Mapping[str, StoredTensor]) -> int | None:
    """The matrix of its tensor in which all of a region lies; None where it lies in several."""
    size = prod(tensors[region.leaf.tensor].shape[1:])
    steps = zip(region.extent, region.leaf.view_stride, strict=True)
    last = region.first + sum((extent - 1) * step for extent, step in steps)
    return region.first // size if size and region.first // size == last // size else None
