"""Masks of an earlier step: which blocks they leave in each scope, and how many of these survive.

What a mask drops ranks below everything, zeros that survived among them, and never survives. The elements
themselves tensor_io puts to zero (`Loaded.kept`). Numpy and compiled loops, no torch; called by all passes.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Self

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import count_in
from sparseprune.engine.kernels.selecting import ranks_among, select_each, select_keys
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import (
    Part,
    block_part,
    leaves_of,
    members_of,
    regions_in,
    regions_of,
    tiles,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock
    from sparseprune.execution.strategy import RadixSelect, TorchOutOfCore
    from sparseprune.execution.tensor_io import Mask, TensorIO
    from sparseprune.spec import BoundBlock
    from sparseprune.spec.bound import Budget

    Counts = NDArray[np.int64]


def surviving_each(budget: Budget, left: Counts) -> Counts:
    """How many blocks survive in scopes in which so many are left: as `surviving_each` of the engine.

    >>> from sparseprune.spec.bound import Budget
    >>> surviving_each(Budget(nnz=4, share=0.5), np.array([8, 5, 0]))
    array([4, 3, 0])
    """
    kept = left - np.floor(left * min(budget.share or 0.0, 1.0)).astype(np.int64)
    surviving: Counts = np.minimum(left, -(-kept // budget.multiple_of) * budget.multiple_of)
    return surviving


def keep_among(bits: Bits, magnitude: int, blocks: int, budget: Budget, left: Mask) -> Mask:
    """Bytes, one a block: 1 for the largest of those that are `left` of every `blocks`, ties by the order.

    `bits` & `magnitude` are keys, flat, scope after scope, one a block; what is not left may be among the
    survivors where these are more than are left.
    """
    ranks, keep = ranks_among(bits, magnitude, left), np.empty(bits.size, dtype=np.uint8)
    if budget.share is None:
        select_keys(ranks, magnitude, blocks, budget.nnz or 0, keep)
    else:
        select_each(ranks, magnitude, blocks, surviving_each(budget, left_each(left, blocks)), keep)
    return keep


def left_each(left: Mask, blocks: int) -> Counts:
    """How many of every `blocks` flags, flat, are 1: (scopes)."""
    counts: Counts = count_in(left.reshape(-1, blocks), (1, blocks)).reshape(-1).astype(np.int64)
    return counts


def left_of(task: Task, block: AnyBlock, part: Part, io: TensorIO) -> Mask:
    """1 for each block in a part of a grid of which the masks keep an element, in any of its leaves."""
    masks = {mask.name: mask for mask in task.within}
    regions, found = regions_of(block, part), []
    if any(leaf.tensor not in masks for leaf in regions):
        return np.ones(part.extent, dtype=np.uint8)
    for leaf, order in leaves_of(block):
        found.append(io.kept_blocks(masks[leaf.tensor], regions[leaf]).transpose(order))
    left: Mask = reduce(np.bitwise_or, found)
    return left


def left_in(task: Task, leaf: BoundBlock, elements: int, io: TensorIO) -> Mask:
    """1 for each block of a leaf of which its mask keeps an element, on its grid; about so many at a time."""
    mask = next((one for one in task.within if one.name == leaf.tensor), None)
    if mask is None:
        return np.ones(leaf.grid_shape, dtype=np.uint8)
    left = np.zeros(leaf.grid_shape, dtype=np.uint8)
    for region in regions_in(leaf, elements):
        left[region.blocks] |= io.kept_blocks(mask, region)
    return left


class Search(Pass):
    """A pass that looks for the last survivor of a scope, of which it is told how many there are."""

    __slots__ = ()

    @abstractmethod
    def among(self, nnz: int) -> Self:
        """The same search, in a scope in which so many blocks survive."""


@dataclass(frozen=True, slots=True)
class CountLeft(Pass):
    """The blocks that masks leave in scope `number`; the `search` that follows learns how many survive.

    Chunks have whole blocks of about so many `elements`.
    """

    task: Task
    number: int
    elements: int
    memory: int
    search: Search

    @property
    def decides(self) -> str:
        return self.search.decides

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        grid = self.task.instance.scope.grid_shape
        cell = Part(tuple(map(int, np.unravel_index(self.number, grid))) if grid else (), (1,) * len(grid))
        for number, (member, order) in enumerate(members_of(self.task.instance.scope)):
            for part in tiles(member, block_part(member, order, cell), self.elements):
                yield Chunk((number, part), memory=self.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> int:
        number, part = chunk.about
        member, _ = members_of(self.task.instance.scope)[number]
        return int(np.count_nonzero(left_of(self.task, member.block, part, io)))

    def merge(self, partials: list[int], io: TensorIO) -> Pass:  # noqa: ARG002
        return self.search.among(int(surviving_each(self.task.instance.budget, np.array(sum(partials)))))

    def decided(self, value: object) -> Pass | None:
        return self.search.decided(value)


def told_survivors(task: Task, number: int, strategy: RadixSelect | TorchOutOfCore, search: Search) -> Pass:
    """The search in scope `number`; where a share of what masks leave goes, what they leave comes first."""
    if not task.within or task.instance.budget.share is None or not prod(task.instance.scope.grid_shape):
        return search
    return CountLeft(task, number, strategy.elements, strategy.memory, search)
