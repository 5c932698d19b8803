"""Tiles as torch tensors, and the engine's objects over them.

Owns the way from patterns in memory to tensors on a device and back, and from bound shapes to engine
objects. On CUDA patterns go through pinned memory on a stream of the thread that works on them, so that the
copies of one tile overlap the work on another. Imports torch.
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
from sparseprune.engine.dtypes import torch_dtype
from sparseprune.engine.tally import Tally, tally
from sparseprune.execution.cells import boxes_of
from sparseprune.execution.outcomes import Outcome, finish
from sparseprune.execution.ranking import Elements, Ranking, refuse_nonfinite
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from sparseprune.engine import SparseBlock, SparseScope, View
    from sparseprune.execution.cells import AnyBlock, Part
    from sparseprune.execution.plan import Task
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.tensor_io import Loaded
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


def load_tile(parts: Sequence[tuple[AnyBlock, Part]], setting: Setting) -> Tile:
    """Read the elements of parts of block grids."""
    boxes = {
        leaf: box for block, part in parts for leaf, box in boxes_of(block, part, setting.tensors).items()
    }
    allocate = _pinned if setting.device != "cpu" else None
    loaded = {leaf: setting.traffic.load(box, allocate) for leaf, box in boxes.items()}
    flat = {leaf: _on_device(one, setting.device) for leaf, one in loaded.items()}
    views = {leaf: _as_view(flat[leaf], one) for leaf, one in loaded.items()}
    before = {leaf: tally(one.flat, one.box.stored.dtype) for leaf, one in loaded.items()}
    return Tile(loaded, flat, views, before)


def store_tile(task: Task, tile: Tile, masks: Mapping[BoundBlock, Tensor], setting: Setting) -> list[Outcome]:
    """Write what became of a tile, and its masks (bool, as the leaves see them); gives the outcomes."""
    outcomes = []
    for leaf, one in tile.loaded.items():
        mask = torch.ones(one.flat.size, dtype=torch.uint8, device=setting.device)
        _as_view(mask, one).copy_(masks[leaf])
        if setting.device != "cpu":
            target = torch.from_numpy(_signed(one.flat))
            target.copy_(tile.flat[leaf].view(target.dtype), non_blocking=True)
            torch.cuda.current_stream(setting.device).synchronize()
        kept = mask.cpu().numpy()
        setting.traffic.store(one, kept)
        outcomes.append(finish(task, one.box.stored, tile.before[leaf], one.flat, kept))
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
        weights = Elements(one.view, one.box.stored.dtype)
        elements = ranking.elements(one) or weights
        wrong = elements.without_rank() | weights.without_rank()
        finite = Elements(np.where(wrong, elements.bits.dtype.type(0), elements.bits), elements.dtype)
        device = tile.views[leaf].device
        values[spec] = tensor_of(finite, device)
        without_rank[spec] = torch.from_numpy(wrong.astype(np.float32)).to(device)
    norms = scope.block_norms(values, ranking.norm, rms=ranking.rms)
    return torch.where(scope.block_norms(without_rank, math.inf) > 0, -1.0, norms)


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
    dtype = torch_dtype(loaded.box.stored.dtype)
    return torch.from_numpy(_signed(loaded.flat)).view(dtype).to(device, non_blocking=True)


def _signed(bits: np.ndarray) -> np.ndarray:
    """Patterns as the integers that every version of torch knows."""
    return bits.view(f"int{8 * bits.itemsize}")


def _as_view(flat: Tensor, loaded: Loaded) -> Tensor:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = loaded.box.storage_order
    shaped = flat.reshape([loaded.box.extent[dim] for dim in order])
    return shaped.permute(sorted(range(len(order)), key=order.__getitem__))
