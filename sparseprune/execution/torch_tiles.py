"""Torch tiles: scopes in the torch engine, whole ones in memory, larger ones as blocks that pass by.

The strategy that is always right: every structure, dtype, score and mode, on any device; compiled ones are
tested equal to it. Out of core survivors are found by digits of (key, index), which need no care of ties.
Imports torch.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from msgspec import Struct

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.grids import inverse_order, permute, prod
from sparseprune.engine.kernels.counting import DIGIT_BITS
from sparseprune.execution.passes import Chunk, Decision, Outcome, Pass, finish
from sparseprune.execution.ranking import Elements, Ranking, numbers_in, refuse_nonfinite
from sparseprune.execution.regions import (
    Part,
    alone,
    block_part,
    cells,
    members_of,
    regions_at,
    regions_of,
    tiles,
)
from sparseprune.execution.two_pass import digit_of
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from sparseprune.engine import SparseBlock, SparseScope, View
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, AnyScope
    from sparseprune.execution.strategy import TorchInMemory, TorchOutOfCore
    from sparseprune.execution.tensor_io import Loaded, TensorIO
    from sparseprune.spec.bound import Soft

    Keys = NDArray[np.uint64]

_STREAMS = threading.local()


class Tile:
    """Blocks of a task in memory, and as the torch engine sees them: decided, shrunk, stored.

    `parts` has the blocks of each member of `scope`. Mappings have leaves in the order of the engine's
    blocks; on the CPU `views` share the memory of `loaded`.
    """

    def __init__(
        self, task: Task, scope: AnyScope, parts: Sequence[tuple[AnyBlock, Part]], io: TensorIO
    ) -> None:
        self.task = task
        self.parts = parts
        self.ranking = Ranking(task, io)
        self._io = io
        allocate = _pinned if io.device != "cpu" else None
        regions = [region for block, part in parts for region in regions_of(block, part).values()]
        self.loaded = {region.leaf: io.load(region, allocate=allocate) for region in regions}
        self._flat = {leaf: _on_device(one, io.device) for leaf, one in self.loaded.items()}
        self.views = {leaf: _as_view(self._flat[leaf], one) for leaf, one in self.loaded.items()}
        self._before = {leaf: io.tally(one) for leaf, one in self.loaded.items()}
        self.engine = build_scope(scope, self.views)

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
        ready = [torch.from_numpy(grid) for grid in grids if grid is not None]
        if ready:
            return None, self.engine.gather(ready)
        values = self.element_values()
        single = all(spec.block.numel_per_block() == 1 for spec, _ in self.engine.members)
        if single or soft is not None or (norm == 2 and not rms):
            return values, None
        return values, self.engine.block_norms(values, norm, rms=rms)

    def decide(self) -> dict[BlockSpec, Tensor]:
        """The masks of hard thresholding, True where a weight is kept; nothing is written."""
        values, scores = self.ranked()
        budget = self.task.instance.budget
        if budget.nnz is not None:
            return self.engine.get_masks(budget.nnz, values, scores)
        return self.engine.threshold_masks(budget.threshold or 0.0, values, scores)

    def shrink(self, soft: Soft, limits: Tensor | float) -> dict[BlockSpec, Tensor]:
        """Soft thresholding in place; gives the masks, True where a block is not zero afterwards."""
        diagonals = {}
        for spec, one in self.leaves():
            elements = self.ranking.conditioners(one.region)
            if elements is not None:
                diagonals[spec] = tensor_of(elements, self._io.device)
        self.engine.soft_threshold(limits, diagonals or None, soft.scale, soft.max_iter, soft.atol, soft.eps)
        return self.engine.get_masks(0, block_mask=self.engine.block_norms() > 0)

    def store(self, masks: Mapping[BlockSpec, Tensor]) -> list[Outcome]:
        """Write the elements and their masks (bool, as the leaves see them); gives the outcomes."""
        outcomes, device = [], self._io.device
        for spec, one in self.leaves():
            leaf = one.region.leaf
            mask = torch.ones(one.flat.size, dtype=torch.uint8, device=device)
            _as_view(mask, one).copy_(masks[spec])
            if device != "cpu":
                target = torch.from_numpy(_signed(one.flat))
                target.copy_(self._flat[leaf].view(target.dtype), non_blocking=True)
                torch.cuda.current_stream(device).synchronize()
            kept = mask.cpu().numpy()
            self._io.store(one, kept)
            after = self._io.tally(one)
            outcomes.append(finish(self.task.rule, one.stored, self._before[leaf], after, kept))
        return outcomes

    def _rescued_scores(self) -> Tensor:
        """The norms of blocks by scope; -1, below all others, where something in a block is not finite."""
        values, without_rank = {}, {}
        for spec, one in self.leaves():
            weights = Elements(one.view, one.dtype)
            elements = self.ranking.elements(one) or weights
            wrong = elements.without_rank() | weights.without_rank()
            finite = Elements(np.where(wrong, elements.bits.dtype.type(0), elements.bits), elements.dtype)
            values[spec] = tensor_of(finite, self._io.device)
            without_rank[spec] = torch.from_numpy(wrong.astype(np.float32)).to(self._io.device)
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
        budget, soft = self.task.instance.budget, self.task.instance.soft
        with stream_of(io.device):
            tile = Tile(self.task, self.scope, parts_at(self.scope, chunk.about), io)
            if soft is None:
                masks = tile.decide()
                zero_pruned(masks)
            else:
                tile.element_values()
                limit = budget.threshold or 0.0
                masks = tile.shrink(
                    soft, limit if budget.nnz is None else tile.engine.soft_budget(budget.nnz, soft.k_weight)
                )
            return tile.store(masks)


def parts_at(scope: AnyScope, cell: Part) -> list[tuple[AnyBlock, Part]]:
    """The blocks of each member that belong to a part of the grid of scopes."""
    return [(member.block, block_part(member, order, cell)) for member, order in members_of(scope)]


def tensor_of(elements: Elements, device: str) -> Tensor:
    """Numbers as a tensor of their dtype and shape."""
    return torch.from_numpy(_signed(elements.bits)).view(torch_dtype(elements.dtype)).to(device)


def build_scope(bound: AnyScope, tensors: Mapping[BoundBlock, Tensor | View]) -> SparseScope:
    """The engine's scope for a bound one, over tensors in the shape of leaves' views or of parts of them."""
    if not isinstance(bound, BoundScope):
        members = [_build_scope_spec(member, tensors) for member in bound.members]
        return ScopeCoupling(members, bound.orders, bound.label)
    return _build_scope_spec(bound, tensors)


def _build_scope_spec(bound: BoundScope, tensors: Mapping[BoundBlock, Tensor | View]) -> ScopeSpec:
    leaves = [BlockSpec(tensors[leaf], leaf.shape, leaf.tensor) for leaf in bound.leaves]
    block: SparseBlock = leaves[0]
    if not isinstance(bound.block, BoundBlock):
        block = BlockCoupling(leaves, bound.block.orders, bound.block.label)
    return ScopeSpec(block, bound.shape, bound.label)


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


def _pinned(numel: int, dtype: np.dtype[np.generic]) -> np.ndarray[tuple[int], np.dtype[np.generic]]:
    """Memory that the device can copy from and to while the CPU goes on."""
    signed: Tensor = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, pin_memory=True)
    return signed.numpy().view(dtype)


def _on_device(loaded: Loaded, device: str) -> Tensor:
    # The engine knows no unsigned integers; those are ranked by what they stand for, and 0 is zero.
    dtype = torch_dtype("I8" if loaded.dtype == "U8" else loaded.dtype)
    return torch.from_numpy(_signed(loaded.flat)).view(dtype).to(device, non_blocking=True)


def _signed(bits: np.ndarray) -> np.ndarray:
    """Patterns as the integers that every version of torch knows."""
    return bits.view(f"int{8 * bits.itemsize}")


def _as_view(flat: Tensor, loaded: Loaded) -> Tensor:
    """Elements in the order of the storage as the leaf sees them, sharing memory."""
    order = loaded.region.storage_order
    return flat.reshape(permute(loaded.region.extent, order)).permute(inverse_order(order))


_SIGN = 1 << 63
_CANDIDATE_BYTES = 48
_GROUPS = 16  # of places whose digits are counted together


class Place(Struct, frozen=True):
    """Blocks of one scope that are read together: a part of a member's block grid.

    `origin` is where the scope begins on that grid; `before` counts the scope's blocks of earlier members.
    """

    member: BoundScope
    part: Part
    origin: tuple[int, ...]
    before: int

    def countdown(self, blocks: int) -> Keys:
        """For each block, row-major in the part, how many blocks of the scope come behind it."""
        number = self.before + numbers_in(self.member.shape, self.part.within(self.origin))
        return (blocks - 1 - number.reshape(-1)).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class _OutOfCore(Pass):
    """A pass over the blocks of scopes as they are read; `decisions` are those on the first scopes."""

    task: Task
    strategy: TorchOutOfCore
    decisions: tuple[Any, ...]

    @property
    def blocks(self) -> int:
        """How many blocks compete in a scope."""
        return self.task.instance.scope.blocks_per_scope

    def places(self, number: int) -> Iterator[Place]:
        """The blocks of one scope, member after member."""
        scope = self.task.instance.scope
        grid = scope.grid_shape
        cell = Part(tuple(map(int, np.unravel_index(number, grid))) if grid else (), (1,) * len(grid))
        before = 0
        for member, order in members_of(scope):
            whole = block_part(member, order, cell)
            for part in tiles(member, whole, self.strategy.elements):
                yield Place(member, part, whole.begin, before)
            before += member.blocks_per_scope

    def load(self, place: Place, io: TensorIO) -> Tile:
        """The blocks of a place as one scope."""
        block = place.member.block
        scope = BoundScope(place.member.label, block, place.part.extent)
        return Tile(self.task, scope, [(block, place.part)], io)

    def keys(self, tile: Tile, io: TensorIO) -> Keys:
        """Unsigned integers (blocks), row-major in the part, ordered as the blocks are ranked."""
        width = self.width(io)
        keys = tile.engine.keys(*tile.ranked(), as_norms=width is None)
        signed = keys.reshape(-1).to(torch.int64).cpu().numpy()
        return signed.view(np.uint64) + np.uint64(1 << (width or 64) - 1)

    def width(self, io: TensorIO) -> int | None:
        """Bits of the keys where single elements of one dtype compete by their patterns; None for norms."""
        instance, kind = self.task.instance, self.task.score_kind
        dtypes = kind.dtypes(self.task, io.tensors)
        single = all(member.block.numel_per_block == 1 for member, _ in members_of(instance.scope))
        ready = kind.ranks_blocks or instance.score.nonfinite == "prune"
        if instance.soft is not None or not single or len(dtypes) > 1 or ready:
            return None
        return DTYPES[dtypes.pop()].bits


@dataclass(frozen=True, slots=True)
class SearchRank(_OutOfCore):
    """The `k`-th largest rank of a scope among those that agree with `prefix` in all digits above `level`.

    Each level counts a digit; with `collect` the ranks that are left are collected instead. `kth` is the norm
    that was found already where a second one is needed.
    """

    k: int
    level: int = 0
    prefix: tuple[int, int] = (0, 0)
    collect: bool = False
    kth: float | None = None

    @property
    def decides(self) -> str:
        return f"decision {len(self.decisions)}"

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        """Neighbouring places, by their numbers; none where all or no blocks survive."""
        if not self._is_open():
            return
        places = sum(1 for _ in self.places(len(self.decisions)))
        for begin, end in pairwise(places * group // _GROUPS for group in range(_GROUPS + 1)):
            if end > begin:
                yield Chunk((begin, end), memory=self.strategy.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        part, shift = self._levels(io)[self.level]
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        found: list[tuple[Keys, Keys]] = []
        for place in islice(self.places(len(self.decisions)), *chunk.about):
            with stream_of(io.device):
                tile = self.load(place, io)
                numbers = self.keys(tile, io), place.countdown(self.blocks)
            if self.collect:
                alike = _alike(numbers, self.prefix, part, shift)
                found.append((numbers[0][alike], numbers[1][alike]))
            else:
                alike = _alike(numbers, self.prefix, part, shift + DIGIT_BITS)
                digits = (numbers[part][alike] >> np.uint64(shift)) & np.uint64(len(counts) - 1)
                counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
            nbytes = sum(one.flat.nbytes for one in tile.loaded.values())
            io.passed(nbytes, self.task.instance.label)
        return tuple(map(np.concatenate, zip(*found, strict=True))) if self.collect else counts

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | Decision:
        if not self._is_open():
            return self._found((0, 0), io)
        if self.collect:
            keys, behind = map(np.concatenate, zip(*partials, strict=True))
            chosen = np.lexsort((behind, keys))[-self.k]
            return self._found((int(keys[chosen]), int(behind[chosen])), io)
        levels = self._levels(io)
        part, shift = levels[self.level]
        counts = sum(partials)
        digit, k = digit_of(counts, self.k)
        known = self.prefix[part] | digit << shift
        prefix = (self.prefix[0], known) if part else (known, 0)
        following = dataclasses.replace(self, k=k, prefix=prefix)
        if int(counts[digit]) <= self.strategy.held // _CANDIDATE_BYTES:
            return dataclasses.replace(following, collect=True)
        if self.level + 1 == len(levels):
            return self._found(prefix, io)
        return dataclasses.replace(following, level=self.level + 1)

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        if not _is_decision(value, soft=self.task.instance.soft is not None):
            return None
        decisions = (*self.decisions, value)
        if len(decisions) == prod(self.task.instance.scope.grid_shape):
            return CutPlaces(self.task, self.strategy, decisions)
        return out_of_core(self.task, self.strategy, decisions)

    def _levels(self, io: TensorIO) -> list[tuple[int, int]]:
        """The part of the rank, key or countdown, and the first bit of each digit, most significant first."""
        parts = (self.width(io) or 64, self.blocks.bit_length())
        return [
            (part, shift) for part, bits in enumerate(parts) for shift in reversed(range(0, bits, DIGIT_BITS))
        ]

    def _is_open(self) -> bool:
        """Whether there is something to search for."""
        if self.task.instance.soft is not None:
            return 1 <= self.k <= self.blocks
        return self.task.instance.budget.nnz not in {0, self.blocks}

    def _found(self, rank: tuple[int, int], io: TensorIO) -> Pass | Decision:
        """The rank of the last block that survives, [] for none, "all" for all; or the soft threshold."""
        soft, nnz = self.task.instance.soft, self.task.instance.budget.nnz
        passed = (self.strategy.passes - 1) * self.task.nbytes(io.tensors)
        passed //= prod(self.task.instance.scope.grid_shape)
        if soft is None:
            return Decision(list(rank) if self._is_open() else ["all"] if nnz else [], passed)
        norm = float(np.array([rank[0] ^ _SIGN], dtype=np.uint64).view(np.float64)[0])
        if not self._is_open():  # infinity before the first, 0 behind the last
            norm = 0.0 if self.k else float("inf")
        if self.kth is not None:  # as `kth_mid` of the engine
            return Decision(((self.kth + soft.k_weight * norm) / (1 + soft.k_weight)).hex(), passed)
        if soft.k_weight and nnz is not None:
            return SearchRank(self.task, self.strategy, self.decisions, nnz + 1, kth=norm)
        return Decision(norm.hex(), passed)


@dataclass(frozen=True, slots=True)
class CutPlaces(_OutOfCore):
    """Blocks that are cut or shrunk by the decision on their scope."""

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        each = ((number, place) for number in range(len(self.decisions)) for place in self.places(number))
        for count, (number, place) in enumerate(each):
            regions = regions_of(place.member.block, place.part)
            nbytes = sum(map(io.nbytes, regions.values()))
            yield Chunk((number, place), nbytes, self.strategy.memory, str(count), io.files(regions))

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        number, place = chunk.about
        decision, soft = self.decisions[number], self.task.instance.soft
        with stream_of(io.device):
            tile = self.load(place, io)
            if soft is not None:
                tile.element_values()
                return tile.store(tile.shrink(soft, float.fromhex(decision)))
            kept = torch.from_numpy(self._kept(place, tile, decision, io)).to(io.device)
            masks = tile.engine.get_masks(0, block_mask=kept.reshape(*tile.engine.grid_shape, -1))
            zero_pruned(masks)
            return tile.store(masks)

    def _kept(self, place: Place, tile: Tile, decision: Sequence[Any], io: TensorIO) -> NDArray[np.bool_]:
        if len(decision) < 2:
            return np.full(place.part.numel, bool(decision))
        key, countdown = decision
        keys = self.keys(tile, io)
        last = place.countdown(self.blocks) >= np.uint64(countdown)
        kept: NDArray[np.bool_] = (keys > key) | ((keys == np.uint64(key)) & last)
        return kept


def out_of_core(task: Task, strategy: TorchOutOfCore, decisions: tuple[Any, ...] = ()) -> Pass:
    """The first pass over scopes of more blocks than fit in memory; `decisions` are those on the first."""
    nnz = task.instance.budget.nnz
    if nnz is None:
        raise TypeError(f"{task.instance.label}: a threshold decides every block alone")
    return SearchRank(task, strategy, decisions, nnz)


def _is_decision(value: Any, *, soft: bool) -> bool:  # noqa: ANN401
    """Whether it is what `SearchRank` decides."""
    if soft:
        try:
            return isinstance(value, str) and float.fromhex(value) >= 0
        except (ValueError, OverflowError):
            return False
    if value in ([], ["all"]):
        return True
    is_rank = isinstance(value, list) and len(value) == 2
    return is_rank and all(type(one) is int and 0 <= one < 1 << 64 for one in value)


def _alike(numbers: tuple[Keys, Keys], prefix: tuple[int, ...], part: int, shift: int) -> NDArray[np.bool_]:
    """Which ranks agree with a prefix in everything above `shift` of one part, and in the parts before it."""
    if shift >= 64:
        alike = np.ones(numbers[part].size, dtype=np.bool_)
    else:
        above = np.uint64(shift)
        alike = numbers[part] >> above == np.uint64(prefix[part]) >> above
    return alike if part == 0 else alike & (numbers[0] == np.uint64(prefix[0]))
