"""Torch tiles: whole scopes in the torch engine, a tile of them at one time.

With torch_out_of_core the strategy that is always right: every structure, dtype, score and mode, on any
device; compiled ones are tested equal to it. Imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.grids import inverse_order, permute
from sparseprune.engine.projections import surviving_each
from sparseprune.engine.selection import select
from sparseprune.execution.devices import buffers_for, downloaded, in_smaller_parts, uploaded
from sparseprune.execution.passes import Chunk, Outcome, Pass, finish
from sparseprune.execution.ranking import Elements, Ranking, refuse_nonfinite
from sparseprune.execution.regions import (
    Part,
    alone,
    block_part,
    cells,
    cut,
    members_of,
    regions_at,
    regions_of,
)
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from sparseprune.engine import SparseBlock, SparseScope, View
    from sparseprune.engine.kernels.counting import Tally
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, AnyScope
    from sparseprune.execution.strategy import TorchInMemory
    from sparseprune.execution.tensor_io import Loaded, Mask, TensorIO
    from sparseprune.spec.bound import Soft

    Keys = NDArray[np.uint64]


class Read(Struct, frozen=True):
    """The elements of some blocks of a task as they were read, leaf by leaf, and counts of them, in memory.

    Leaves have the order of the engine's blocks. What masks of an earlier step drop was put to zero once it
    was counted.
    """

    rule: str
    loaded: Mapping[BoundBlock, Loaded]
    before: Mapping[BoundBlock, Tally]

    def kept(self, masks: Mapping[BoundBlock, Mask], io: TensorIO) -> list[float]:
        """The energies of what survives, leaf by leaf, before the elements are changed."""
        return [
            io.tally(replace(one, flat=np.where(masks[leaf].view(np.bool_), one.flat, 0))).energy
            for leaf, one in self.loaded.items()
        ]

    def store(self, masks: Mapping[BoundBlock, Mask], io: TensorIO) -> list[Outcome]:
        """Write the elements, changed by now, and their masks as they lie in the storage."""
        outcomes = []
        for leaf, one in self.loaded.items():
            io.store(one, masks[leaf])
            after = io.tally(one)
            outcomes.append(finish(self.rule, one.stored, self.before[leaf], after, masks[leaf]))
        return outcomes


def read_parts(
    task: Task, parts: Sequence[tuple[AnyBlock, Part]], io: TensorIO, *, counts: bool = True
) -> Read:
    """Read blocks of each member of a scope; `counts` says whether they will be stored."""
    allocate = buffers_for(io.device)
    regions = [region for block, part in parts for region in regions_of(block, part).values()]
    loaded = {region.leaf: io.load(region, allocate=allocate) for region in regions}
    before = {leaf: io.tally(one) for leaf, one in loaded.items()} if counts else {}
    inside = {leaf: io.inside(one, task.within) for leaf, one in loaded.items()}
    return Read(task.rule, inside, before)


class Tile:
    """Blocks of a task on the device, and as the torch engine sees them: decided, shrunk, brought back.

    `parts` has the blocks of each member of `scope`. Mappings have leaves in the order of the engine's
    blocks; on the CPU `views` share the memory of `loaded`.
    """

    def __init__(
        self,
        task: Task,
        scope: AnyScope,
        parts: Sequence[tuple[AnyBlock, Part]],
        io: TensorIO,
        read: Read | None = None,
    ) -> None:
        self.task = task
        self.parts = parts
        self.ranking = Ranking(task, io)
        self._io = io
        self._read = read or read_parts(task, parts, io)
        self.loaded = self._read.loaded
        self._flat = {leaf: _on_device(one, io.device) for leaf, one in self.loaded.items()}
        self.views = {leaf: _as_view(self._flat[leaf], one) for leaf, one in self.loaded.items()}
        # Whatever ranks blocks is looked at here, on the host, before the engine gets it.
        self.engine = build_scope(scope, self.views).trusting()
        self._within = self._allowed()

    def leaves(self) -> Iterator[tuple[BlockSpec, Loaded]]:
        """The blocks of the engine, and what was loaded of each."""
        return zip(self.engine.blocks(), self.loaded.values(), strict=True)

    def element_values(self) -> dict[BlockSpec, Tensor] | None:
        """What ranks the elements in place of the weights, None where the weights do.

        Raises:
            SparsityError: what ranks them is not finite.
        """
        values = {}
        for spec, one in self.leaves():
            elements = self.ranking.elements(one)
            refuse_nonfinite(one, elements)
            if elements is not None:
                values[spec] = tensor_of(elements, self._io.device)
        return values or None

    def ranked(self) -> tuple[dict[BlockSpec, Tensor] | None, Tensor | None]:
        """What ranks elements in place of the weights, or blocks, by scope, in place of their 2-norms."""
        norm, rms, soft = self.ranking.norm, self.ranking.rms, self.task.instance.soft
        if self.ranking.prunes_nonfinite:
            return None, self._rescued_scores()
        grids = [self.ranking.block_scores(block, part) for block, part in self.parts]
        ready = [uploaded(grid, self._io.device) for grid in grids if grid is not None]
        if ready:
            return None, self.engine.gather(ready)
        values = self.element_values()
        single = all(spec.block.numel_per_block() == 1 for spec, _ in self.engine.members)
        if single or soft is not None or (norm == 2 and not rms):
            return values, None
        return values, self.engine.block_norms(values, norm, rms=rms)

    def keys(self, *, as_norms: bool = False) -> Tensor:
        """What ranks the blocks, as the engine's `keys`; lowest is what an earlier mask drops whole."""
        keys = self.engine.keys(*self.ranked(), as_norms=as_norms)
        if not self._within or self.task.instance.soft is not None:
            return keys
        return keys.masked_fill(~self._left(), torch.iinfo(keys.dtype).min)

    def _left(self) -> Tensor:
        """The blocks, by scope, of which the masks of an earlier step keep an element."""
        kept = {
            spec: self._within.get(
                spec, torch.ones(one.region.extent, dtype=torch.bool, device=self._io.device)
            )
            for spec, one in self.leaves()
        }
        return self.engine.left(kept)

    def decide(self) -> dict[BlockSpec, Tensor]:
        """The masks of hard thresholding, True where a weight is kept; nothing is written."""
        budget = self.task.instance.budget
        if budget.nnz is None:
            return self.allowed(self.engine.threshold_masks(budget.threshold or 0.0, *self.ranked()))
        if not self._within:
            return self.engine.get_masks(budget.nnz, *self.ranked())
        nnz: int | Tensor = budget.nnz
        if budget.share is not None:
            nnz = surviving_each(budget.share, self._left().sum(-1), budget.multiple_of)
        return self.allowed(self.engine.get_masks(0, block_mask=select(self.keys(), nnz)))

    def allowed(self, masks: dict[BlockSpec, Tensor]) -> dict[BlockSpec, Tensor]:
        """Masks without what the masks of an earlier step drop."""
        within = self._within
        return {spec: mask & within[spec] if spec in within else mask for spec, mask in masks.items()}

    def _allowed(self) -> dict[BlockSpec, Tensor]:
        """What the masks of an earlier step keep, of blocks that have one: bool, as the leaves see them."""
        return {
            spec: uploaded(np.array(kept, order="C").view(np.bool_), self._io.device)
            for spec, one in self.leaves()
            if (kept := one.kept_view) is not None
        }

    def shrink(self, soft: Soft, limits: Tensor | float) -> dict[BlockSpec, Tensor]:
        """Soft thresholding in place; gives the masks, True where a block is not zero afterwards."""
        diagonals = {}
        for spec, one in self.leaves():
            elements = self.ranking.conditioners(one.region)
            if elements is not None:
                diagonals[spec] = tensor_of(elements, self._io.device)
        self.engine.soft_threshold(limits, diagonals or None, soft.scale, soft.max_iter, soft.atol, soft.eps)
        return self.allowed(self.engine.get_masks(0, block_mask=self.engine.block_norms() > 0))

    def fetched(self, masks: Mapping[BlockSpec, Tensor]) -> dict[BoundBlock, Mask]:
        """Masks (bool, as the leaves see them) as they lie in the storage; `loaded` gets the elements.

        What was put on the device's stream before is waited for here, and nowhere else.
        """
        laid = []
        for spec, one in self.leaves():
            mask = torch.ones(one.flat.size, dtype=torch.uint8, device=self._io.device)
            _as_view(mask, one).copy_(masks[spec])
            laid.append(mask)
        flats = [self._flat[leaf].view(torch.uint8) for leaf in self.loaded]
        into = {len(laid) + place: one.flat.view(np.uint8) for place, one in enumerate(self.loaded.values())}
        found = downloaded([*laid, *flats], self._io.device, into)
        return dict(zip(self.loaded, found, strict=False))

    def kept(self, masks: Mapping[BlockSpec, Tensor]) -> list[float]:
        """The energies of what masks (bool, as the leaves see them) keep of the elements as they are now."""
        return self._read.kept(self.fetched(masks), self._io)

    def store(self, masks: Mapping[BlockSpec, Tensor]) -> list[Outcome]:
        """Write the elements and their masks (bool, as the leaves see them); gives the outcomes."""
        return self._read.store(self.fetched(masks), self._io)

    def _rescued_scores(self) -> Tensor:
        """The norms of blocks by scope; -1, below all others, where something in a block is not finite."""
        values, without_rank = {}, {}
        for spec, one in self.leaves():
            weights = Elements(one.view, one.dtype)
            elements = self.ranking.elements(one) or weights
            wrong = elements.without_rank() | weights.without_rank()
            finite = Elements(np.where(wrong, elements.bits.dtype.type(0), elements.bits), elements.dtype)
            values[spec] = tensor_of(finite, self._io.device)
            without_rank[spec] = uploaded(wrong.astype(np.float32), self._io.device)
        norms = self.engine.block_norms(values, self.ranking.norm, rms=self.ranking.rms)
        return torch.where(self.engine.block_norms(without_rank, math.inf) > 0, -1.0, norms)


@dataclass(frozen=True, slots=True)
class CutTiles(Pass):
    """Whole scopes in the torch engine, a tile of them at one time, hard or soft."""

    task: Task
    strategy: TorchInMemory

    @property
    def scope(self) -> AnyScope:
        """The scopes; each block by itself where a threshold decides."""
        scope = self.task.instance.scope
        return scope if self.task.instance.budget.nnz is not None else alone(scope)

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        files = io.files(self.scope.leaves)
        for number, cell in enumerate(cells(self.scope, self.strategy.elements)):
            nbytes = sum(map(io.nbytes, regions_at(self.scope, cell).values()))
            yield Chunk(cell, nbytes, self.strategy.memory, str(number), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        return in_smaller_parts(lambda cell: self._cut(cell, io), chunk.about, halves)

    def _cut(self, cell: Part, io: TensorIO) -> list[Outcome]:
        """Files are read and written outside of the lane, so that others use the device meanwhile."""
        parts = parts_at(self.scope, cell)
        read = read_parts(self.task, parts, io)
        with io.lane(self.strategy.on_device):
            masks = self._decided(Tile(self.task, self.scope, parts, io, read))
        return read.store(masks, io)

    def _decided(self, tile: Tile) -> dict[BoundBlock, Mask]:
        budget, soft = self.task.instance.budget, self.task.instance.soft
        if soft is None:
            masks = tile.decide()
            zero_pruned(masks)
            return tile.fetched(masks)
        tile.element_values()
        limit = budget.threshold or 0.0
        limits = limit if budget.nnz is None else tile.engine.soft_budget(budget.nnz, soft.k_weight)
        return tile.fetched(tile.shrink(soft, limits))


def halves(part: Part) -> list[Part]:
    """A part of a grid in two or a few, or itself where it has a single place."""
    return list(cut(part, range(len(part.extent)), (part.numel + 1) // 2))


def parts_at(scope: AnyScope, cell: Part) -> list[tuple[AnyBlock, Part]]:
    """The blocks of each member that belong to a part of the grid of scopes."""
    return [(member.block, block_part(member, order, cell)) for member, order in members_of(scope)]


def tensor_of(elements: Elements, device: str) -> Tensor:
    """Numbers as a tensor of their dtype and shape."""
    return uploaded(_signed(elements.bits), device).view(torch_dtype(elements.dtype))


def build_scope(bound: AnyScope, tensors: Mapping[BoundBlock, Tensor | View]) -> SparseScope:
    """The engine's scope for a bound one, over tensors in the shape of leaves' views or of parts of them."""
    if not isinstance(bound, BoundScope):
        members = [_build_scope_spec(member, tensors) for member in bound.members]
        return ScopeCoupling(members, bound.orders, bound.label)
    return _build_scope_spec(bound, tensors)


def only(scope: AnyScope, leaves: frozenset[BoundBlock]) -> AnyScope:
    """A scope whose fused blocks have these members alone."""
    if not isinstance(scope, BoundScope):
        return replace(scope, members=tuple(_members_only(member, leaves) for member in scope.members))
    return _members_only(scope, leaves)


def _members_only(scope: BoundScope, leaves: frozenset[BoundBlock]) -> BoundScope:
    if isinstance(scope.block, BoundBlock):
        return scope
    pairs = [pair for pair in zip(scope.block.members, scope.block.orders, strict=True) if pair[0] in leaves]
    members, orders = zip(*pairs, strict=True)
    return replace(scope, block=replace(scope.block, members=members, orders=orders))


def _build_scope_spec(bound: BoundScope, tensors: Mapping[BoundBlock, Tensor | View]) -> ScopeSpec:
    leaves = [BlockSpec(tensors[leaf], leaf.shape, leaf.tensor) for leaf in bound.leaves]
    block: SparseBlock = leaves[0]
    if not isinstance(bound.block, BoundBlock):
        block = BlockCoupling(leaves, bound.block.orders, bound.block.label)
    return ScopeSpec(block, bound.shape, bound.label, transposable=bound.transposable)


def _on_device(loaded: Loaded, device: str) -> Tensor:
    # The engine knows no unsigned integers; those are ranked by what they stand for, and 0 is zero.
    dtype = torch_dtype("I8" if loaded.dtype == "U8" else loaded.dtype)
    return uploaded(_signed(loaded.flat), device).view(dtype)


def _signed(bits: np.ndarray) -> np.ndarray:
    """Patterns as the integers that every version of torch knows."""
    return bits.view(f"int{8 * bits.itemsize}")


def _as_view(flat: Tensor, loaded: Loaded) -> Tensor:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = loaded.region.storage_order
    return flat.reshape(permute(loaded.region.extent, order)).permute(inverse_order(order))
