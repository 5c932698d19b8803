"""Tiles as torch tensors and the engine's objects over them: the strategy that always works.

Owns the way from patterns in memory to tensors on a device and back, and the pass over whole scopes: every
structure, dtype, score and mode. On CUDA patterns go through pinned memory on a stream of the thread that
works on them, so that copies overlap work. Passes without torch are tested equal to this one. Imports
torch.
"""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.tally import Tally, tally
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import alone, block_part, cells, members_of, regions_at
from sparseprune.execution.scores import Elements, Ranking, refuse_nonfinite
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine import SparseBlock, SparseScope, View
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, AnyScope, Part, Region
    from sparseprune.execution.strategy import TorchInMemory
    from sparseprune.execution.tensor_io import Loaded, TensorIO
    from sparseprune.spec import BoundScopeCoupling

_STREAMS = threading.local()


@dataclass(frozen=True, slots=True)
class Tile:
    """The elements of some leaves: patterns in memory, and as the torch engine sees them.

    `flat` has the tensors in the order of the storage, `views` as the leaves see them; on the CPU both share
    the memory of `loaded`. `before` was counted when they were read.
    """

    loaded: Mapping[BoundBlock, Loaded]
    flat: Mapping[BoundBlock, Tensor]
    views: Mapping[BoundBlock, Tensor]
    before: Mapping[BoundBlock, Tally]


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
        scope = self.scope
        files = io.files(scope.leaves)
        for number, cell in enumerate(cells(scope, self.strategy.tile)):
            nbytes = sum(map(io.nbytes, regions_at(scope, cell).values()))
            yield Chunk(cell, nbytes, self.strategy.memory, str(number), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        scope, ranking = self.scope, Ranking(self.task, io)
        with stream_of(io.device):
            tile = load_tile(regions_at(scope, chunk.about), io)
            engine = build_scope(scope, tile.views)
            parts = [
                (member.block, block_part(member, order, chunk.about)) for member, order in members_of(scope)
            ]
            masks = _pruned(self.task, engine, parts, tile, ranking)
            by_leaf = {leaf: masks[spec] for leaf, spec in zip(scope.leaves, engine.blocks(), strict=True)}
            return store_tile(self.task, tile, by_leaf, io)


def load_tile(regions: Mapping[BoundBlock, Region], io: TensorIO) -> Tile:
    """Read the elements of some regions, a leaf each."""
    allocate = _pinned if io.device != "cpu" else None
    loaded = {leaf: io.load(region, allocate=allocate) for leaf, region in regions.items()}
    flat = {leaf: _on_device(one, io.device) for leaf, one in loaded.items()}
    views = {leaf: _as_view(flat[leaf], one) for leaf, one in loaded.items()}
    before = {leaf: tally(one.flat, one.dtype) for leaf, one in loaded.items()}
    return Tile(loaded, flat, views, before)


def store_tile(task: Task, tile: Tile, masks: Mapping[BoundBlock, Tensor], io: TensorIO) -> list[Outcome]:
    """Write the elements of a tile and its masks (bool, as the leaves see them); gives the outcomes."""
    outcomes = []
    for leaf, one in tile.loaded.items():
        mask = torch.ones(one.flat.size, dtype=torch.uint8, device=io.device)
        _as_view(mask, one).copy_(masks[leaf])
        if io.device != "cpu":
            target = torch.from_numpy(_signed(one.flat))
            target.copy_(tile.flat[leaf].view(target.dtype), non_blocking=True)
            torch.cuda.current_stream(io.device).synchronize()
        kept = mask.cpu().numpy()
        io.store(one, kept)
        outcomes.append(finish(task.rule, one.stored, tile.before[leaf], one.flat, kept))
    return outcomes


def element_values(scope: SparseScope, tile: Tile, ranking: Ranking) -> dict[BlockSpec, Tensor] | None:
    """What ranks the elements in place of the weights, None where the weights do.

    What is not finite is refused.
    """
    values = {}
    for spec, (leaf, one) in zip(scope.blocks(), tile.loaded.items(), strict=True):
        elements = ranking.elements(one)
        refuse_nonfinite(one, elements)
        if elements is not None:
            values[spec] = tensor_of(elements, tile.views[leaf].device)
    return values or None


def rescued_scores(scope: SparseScope, tile: Tile, ranking: Ranking) -> Tensor:
    """The norms of blocks by scope; -1, below all others, where something in a block is not finite."""
    values, without_rank = {}, {}
    for spec, (leaf, one) in zip(scope.blocks(), tile.loaded.items(), strict=True):
        weights = Elements(one.view, one.dtype)
        elements = ranking.elements(one) or weights
        wrong = elements.without_rank() | weights.without_rank()
        finite = Elements(np.where(wrong, elements.bits.dtype.type(0), elements.bits), elements.dtype)
        device = tile.views[leaf].device
        values[spec] = tensor_of(finite, device)
        without_rank[spec] = torch.from_numpy(wrong.astype(np.float32)).to(device)
    norms = scope.block_norms(values, ranking.norm, rms=ranking.rms)
    return torch.where(scope.block_norms(without_rank, math.inf) > 0, -1.0, norms)


def shrink(
    engine: SparseScope,
    task: Task,
    tile: Tile,
    ranking: Ranking,
    limits: Tensor | float,
) -> dict[BlockSpec, Tensor]:
    """Soft thresholding in place; gives the masks, True where a block is not zero afterwards."""
    soft = task.instance.soft
    if soft is None:
        raise TypeError(f"{task.instance.label} is not soft")
    diagonals = {}
    for spec, one in zip(engine.blocks(), tile.loaded.values(), strict=True):
        elements = ranking.conditioners(one.region)
        if elements is not None:
            diagonals[spec] = tensor_of(elements, tile.flat[one.region.leaf].device)
    engine.soft_threshold(limits, diagonals or None, soft.scale, soft.max_iter, soft.atol, soft.eps)
    return engine.get_masks(0, block_mask=engine.block_norms() > 0)


def block_scores(
    engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> Tensor | None:
    """Ready scores by scope, None where elements are ranked by themselves."""
    if ranking.prunes_nonfinite:
        return rescued_scores(engine, tile, ranking)
    grids = [ranking.block_scores(block, part) for block, part in parts]
    ready = [torch.from_numpy(grid) for grid in grids if grid is not None]
    return engine.gather(ready) if ready else None


def _pruned(
    task: Task, engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> dict[BlockSpec, Tensor]:
    """Decide and write in memory; gives the masks, True where a weight is kept."""
    budget = task.instance.budget
    if task.instance.soft is not None:
        element_values(engine, tile, ranking)
        limits = (
            budget.threshold
            if budget.nnz is None
            else engine.soft_budget(budget.nnz, task.instance.soft.k_weight)
        )
        return shrink(engine, task, tile, ranking, 0.0 if limits is None else limits)
    masks = decide(task, engine, parts, tile, ranking)
    zero_pruned(masks)
    return masks


def decide(
    task: Task, engine: SparseScope, parts: Sequence[tuple[AnyBlock, Part]], tile: Tile, ranking: Ranking
) -> dict[BlockSpec, Tensor]:
    """The masks of hard thresholding, True where a weight is kept; nothing is written."""
    budget = task.instance.budget
    scores = block_scores(engine, parts, tile, ranking)
    values = None if scores is not None else element_values(engine, tile, ranking)
    single = all(spec.block.numel_per_block() == 1 for spec, _ in engine.members)
    if scores is None and not single and (ranking.norm != 2 or ranking.rms):
        scores = engine.block_norms(values, ranking.norm, rms=ranking.rms)
    if budget.nnz is not None:
        return engine.get_masks(budget.nnz, values, scores)
    return engine.threshold_masks(budget.threshold or 0.0, values, scores)


def tensor_of(elements: Elements, device: torch.device) -> Tensor:
    """Numbers as a tensor of their dtype and shape."""
    return torch.from_numpy(_signed(elements.bits)).view(torch_dtype(elements.dtype)).to(device)


def build_scope(
    bound: BoundScope | BoundScopeCoupling, tensors: Mapping[BoundBlock, Tensor | View]
) -> SparseScope:
    """The engine's scope for a bound one, over tensors in the shape of leaves' views or of parts of them."""
    if isinstance(bound, BoundScope):
        return _build_scope_spec(bound, tensors)
    return ScopeCoupling(
        [_build_scope_spec(member, tensors) for member in bound.members], bound.orders, bound.label
    )


def build_block(bound: AnyBlock, tensors: Mapping[BoundBlock, Tensor | View]) -> SparseBlock:
    """The engine's blocks for bound ones, over tensors as `build_scope` takes them."""
    if isinstance(bound, BoundBlock):
        return BlockSpec(tensors[bound], bound.shape, bound.tensor)
    members = [BlockSpec(tensors[member], member.shape, member.tensor) for member in bound.members]
    return BlockCoupling(members, bound.orders, bound.label)


@contextmanager
def stream_of(device: str) -> Iterator[None]:
    """What is done on CUDA meanwhile is done on a stream of this thread."""
    if device == "cpu":
        yield
        return
    stream = getattr(_STREAMS, "stream", None)
    if stream is None:
        stream = _STREAMS.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        yield


def _build_scope_spec(bound: BoundScope, tensors: Mapping[BoundBlock, Tensor | View]) -> ScopeSpec:
    return ScopeSpec(build_block(bound.block, tensors), bound.shape, bound.label)


def _pinned(numel: int, dtype: np.dtype[np.generic]) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """Memory that the device can copy from and to while the CPU goes on."""
    signed: Tensor = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    return signed.numpy().view(dtype)


def _on_device(loaded: Loaded, device: str) -> Tensor:
    dtype = torch_dtype(loaded.dtype)
    return torch.from_numpy(_signed(loaded.flat)).view(dtype).to(device, non_blocking=True)


def _signed(bits: np.ndarray) -> np.ndarray:
    """Patterns as the integers that every version of torch knows."""
    return bits.view(f"int{8 * bits.itemsize}")


def _as_view(flat: Tensor, loaded: Loaded) -> Tensor:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = loaded.region.storage_order
    shaped = flat.reshape([loaded.region.extent[dim] for dim in order])
    return shaped.permute(sorted(range(len(order)), key=order.__getitem__))
