"""Torch tiles: scopes in the torch engine, whole ones in memory, larger ones as blocks that pass by.

The strategy that is always right: every structure, dtype, score and mode, on any device; compiled ones are
tested equal to it. Out of core survivors are found by digits of (key, index), which need no care of ties.
Imports torch.
"""

from __future__ import annotations

import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparseprune.engine import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import DTYPES, torch_dtype
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import Tally, tally
from sparseprune.execution.passes import Chunk, Decision, Outcome, Pass, finish
from sparseprune.execution.ranking import Elements, Ranking, refuse_nonfinite
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
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from sparseprune.engine import SparseBlock, SparseScope, View
    from sparseprune.execution.passes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, AnyScope, Region
    from sparseprune.execution.strategy import TorchInMemory, TorchOutOfCore
    from sparseprune.execution.tensor_io import Loaded, TensorIO
    from sparseprune.spec import BoundScopeCoupling

    Keys = NDArray[np.uint64]

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


_DIGIT = 16
_LAST = (1 << _DIGIT) - 1
_SIGN = 1 << 63
_CANDIDATE_BYTES = 48
_GROUPS = 16  # of places whose digits are counted together


@dataclass(frozen=True, slots=True)
class Place:
    """Blocks of one scope that are read together: a part of a member's block grid.

    `origin` is where the scope begins on that grid; `before` counts the scope's blocks of earlier members.
    """

    member: BoundScope
    part: Part
    origin: tuple[int, ...]
    before: int

    def countdown(self, blocks: int) -> Keys:
        """For each block, row-major in the part, how many blocks of the scope come behind it."""
        shape = self.member.shape
        index = np.full((1,) * len(shape), self.before, dtype=np.int64)
        for dim, (begin, size) in enumerate(
            zip(self.part.within(self.origin).begin, self.part.extent, strict=True)
        ):
            steps = np.arange(begin, begin + size, dtype=np.int64) * prod(shape[dim + 1 :])
            index = index + steps.reshape([-1 if other == dim else 1 for other in range(len(shape))])
        return (blocks - 1 - index.reshape(-1)).astype(np.uint64)


@dataclass(frozen=True, slots=True)
class _Scopes:
    """The scopes of a task, and the blocks of each as they are read."""

    task: Task
    strategy: TorchOutOfCore

    @property
    def blocks(self) -> int:
        """How many blocks compete in a scope."""
        return self.task.instance.scope.blocks_per_scope

    def places(self, number: int) -> Iterator[Place]:
        """The blocks of one scope, member after member."""
        scope = self.task.instance.scope
        coordinate = tuple(int(index) for index in np.unravel_index(number, scope.grid_shape or (1,)))
        cell = Part(coordinate[: len(scope.grid_shape)], (1,) * len(scope.grid_shape))
        before = 0
        for member, order in members_of(scope):
            whole = block_part(member, order, cell)
            for part in tiles(member, whole, self.strategy.tile):
                yield Place(member, part, whole.begin, before)
            before += member.blocks_per_scope

    def loaded(self, place: Place, io: TensorIO) -> tuple[Tile, SparseScope]:
        """A tile, and the engine's blocks over it as one scope."""
        tile = load_tile(regions_of(place.member.block, place.part), io)
        scope = BoundScope(place.member.label, place.member.block, place.part.extent)
        return tile, build_scope(scope, tile.views)

    def keys(self, place: Place, engine: SparseScope, tile: Tile, io: TensorIO) -> Keys:
        """Unsigned integers (blocks), row-major in the part, ordered as the blocks are ranked."""
        score, ranking, width = self.task.instance.score, Ranking(self.task, io), self.width(io)
        scores = block_scores(engine, [(place.member.block, place.part)], tile, ranking)
        values = None if scores is not None else element_values(engine, tile, ranking)
        single = place.member.block.numel_per_block == 1
        plain = single or self.task.instance.soft is not None
        if scores is None and not plain and (ranking.norm != 2 or score.normalize):
            scores = engine.block_norms(values, ranking.norm, rms=score.normalize)
        keys = engine.keys(values, scores, as_norms=width is None)
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
class SearchRank(Pass):
    """The `k`-th largest rank of a scope among those that agree with `prefix` in all digits above `level`.

    `decisions` are those on the scopes before it. Each level counts a digit; with `collect` the ranks that
    are left are collected instead. `kth` is the norm that was found already where a second one is needed.
    """

    scopes: _Scopes
    decisions: tuple[Any, ...]
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
        places = sum(1 for _ in self.scopes.places(len(self.decisions)))
        bounds = (places * group // _GROUPS for group in range(_GROUPS + 1))
        for begin, end in pairwise(bounds):
            if end > begin:
                yield Chunk((begin, end), memory=self.scopes.strategy.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        part, shift = self._levels(io)[self.level]
        counts = np.zeros(_LAST + 1, dtype=np.int64)
        found: list[tuple[Keys, Keys]] = []
        for place in islice(self.scopes.places(len(self.decisions)), *chunk.about):
            with stream_of(io.device):
                tile, engine = self.scopes.loaded(place, io)
                numbers = (
                    self.scopes.keys(place, engine, tile, io),
                    place.countdown(self.scopes.blocks),
                )
            if self.collect:
                alike = _alike(numbers, self.prefix, part, shift)
                found.append((numbers[0][alike], numbers[1][alike]))
            else:
                alike = _alike(numbers, self.prefix, part, shift + _DIGIT)
                digits = (numbers[part][alike] >> np.uint64(shift)) & np.uint64(_LAST)
                counts += np.bincount(digits.astype(np.int64), minlength=_LAST + 1)
            nbytes = sum(map(io.nbytes, regions_of(place.member.block, place.part).values()))
            io.passed(nbytes, self.scopes.task.instance.label)
        if not self.collect:
            return counts
        return np.concatenate([one[0] for one in found]), np.concatenate([one[1] for one in found])

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | Decision:
        if not self._is_open():
            return self._found((0, 0), io)
        if self.collect:
            keys = np.concatenate([one[0] for one in partials])
            countdown = np.concatenate([one[1] for one in partials])
            chosen = np.lexsort((countdown, keys))[-self.k]
            return self._found((int(keys[chosen]), int(countdown[chosen])), io)
        levels = self._levels(io)
        part, shift = levels[self.level]
        at_least = np.cumsum(sum(partials)[::-1])
        behind = int(np.searchsorted(at_least, self.k))
        above = int(at_least[behind - 1]) if behind else 0
        digit = (_LAST - behind) << shift
        prefix = (self.prefix[0] | digit, 0) if part == 0 else (self.prefix[0], self.prefix[1] | digit)
        following = replace(self, k=self.k - above, prefix=prefix)
        if int(at_least[behind]) - above <= self.scopes.strategy.held // _CANDIDATE_BYTES:
            return replace(following, collect=True)
        if self.level + 1 == len(levels):
            return self._found(prefix, io)
        return replace(following, level=self.level + 1)

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        if not _is_decision(value, soft=self.scopes.task.instance.soft is not None):
            return None
        decisions = (*self.decisions, value)
        if len(decisions) == prod(self.scopes.task.instance.scope.grid_shape):
            return CutPlaces(self.scopes, decisions)
        return _search(self.scopes, decisions)

    def _levels(self, io: TensorIO) -> list[tuple[int, int]]:
        """The part of the rank, key or countdown, and the first bit of each digit, most significant first."""
        parts = (self.scopes.width(io) or 64, self.scopes.blocks.bit_length())
        return [(part, shift) for part, bits in enumerate(parts) for shift in _shifts(bits)]

    def _is_open(self) -> bool:
        """Whether there is something to search for."""
        if self.scopes.task.instance.soft is not None:
            return 1 <= self.k <= self.scopes.blocks
        return self.scopes.task.instance.budget.nnz not in {0, self.scopes.blocks}

    def _found(self, rank: tuple[int, int], io: TensorIO) -> Pass | Decision:
        """The rank of the last block that survives, [] for none, "all" for all; or the soft threshold."""
        task = self.scopes.task
        soft, nnz = task.instance.soft, task.instance.budget.nnz
        passed = (self.scopes.strategy.passes - 1) * task.nbytes(io.tensors)
        passed //= prod(task.instance.scope.grid_shape)
        if soft is None:
            return Decision(list(rank) if self._is_open() else ["all"] if nnz else [], passed)
        norm = float(np.array([rank[0] ^ _SIGN], dtype=np.uint64).view(np.float64)[0])
        if not self._is_open():  # infinity before the first, 0 behind the last
            norm = 0.0 if self.k else float("inf")
        if self.kth is not None:  # as `kth_mid` of the engine
            return Decision(((self.kth + soft.k_weight * norm) / (1 + soft.k_weight)).hex(), passed)
        if soft.k_weight and nnz is not None:
            return SearchRank(self.scopes, self.decisions, nnz + 1, kth=norm)
        return Decision(norm.hex(), passed)


@dataclass(frozen=True, slots=True)
class CutPlaces(Pass):
    """Blocks that are cut or shrunk by the decision on their scope."""

    scopes: _Scopes
    decisions: tuple[Any, ...]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        strategy, count = self.scopes.strategy, 0
        for number in range(len(self.decisions)):
            for place in self.scopes.places(number):
                regions = regions_of(place.member.block, place.part)
                nbytes = sum(map(io.nbytes, regions.values()))
                yield Chunk((number, place), nbytes, strategy.memory, str(count), io.files(regions))
                count += 1

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        number, place = chunk.about
        task, decision = self.scopes.task, self.decisions[number]
        with stream_of(io.device):
            tile, engine = self.scopes.loaded(place, io)
            if task.instance.soft is not None:
                ranking = Ranking(task, io)
                element_values(engine, tile, ranking)
                masks = shrink(engine, task, tile, ranking, float.fromhex(decision))
            else:
                kept = self._kept(place, engine, tile, decision, io)
                scopes = torch.from_numpy(kept).to(io.device).reshape(*engine.grid_shape, -1)
                masks = engine.get_masks(0, block_mask=scopes)
                zero_pruned(masks)
            by_leaf = dict(zip(tile.loaded, (masks[spec] for spec in engine.blocks()), strict=True))
            return store_tile(task, tile, by_leaf, io)

    def _kept(
        self, place: Place, engine: SparseScope, tile: Tile, decision: Sequence[Any], io: TensorIO
    ) -> NDArray[np.bool_]:
        if len(decision) < 2:
            return np.full(place.part.numel, bool(decision))
        key, countdown = decision
        keys = self.scopes.keys(place, engine, tile, io)
        last = place.countdown(self.scopes.blocks) >= np.uint64(countdown)
        kept: NDArray[np.bool_] = (keys > key) | ((keys == np.uint64(key)) & last)
        return kept


def out_of_core(task: Task, strategy: TorchOutOfCore) -> Pass:
    """The first pass over scopes of more blocks than fit in memory."""
    return _search(_Scopes(task, strategy), ())


def _search(scopes: _Scopes, decisions: tuple[Any, ...]) -> SearchRank:
    nnz = scopes.task.instance.budget.nnz
    if nnz is None:
        raise TypeError(f"{scopes.task.instance.label}: a threshold decides every block alone")
    return SearchRank(scopes, decisions, nnz)


def _is_decision(value: Any, *, soft: bool) -> bool:  # noqa: ANN401
    """Whether it is what `SearchRank` decides."""
    if soft:
        try:
            return isinstance(value, str) and float.fromhex(value) >= 0
        except (ValueError, OverflowError):
            return False
    if value in ([], ["all"]):
        return True
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(one) is int and 0 <= one < 1 << 64 for one in value)
    )


def _shifts(bits: int) -> list[int]:
    """Where the digits of numbers of so many bits begin, the most significant first."""
    return [digit * _DIGIT for digit in reversed(range(-(-bits // _DIGIT)))]


def _alike(numbers: tuple[Keys, Keys], prefix: tuple[int, ...], part: int, shift: int) -> NDArray[np.bool_]:
    """Which ranks agree with a prefix in everything above `shift` of one part, and in the parts before it."""
    above = np.uint64(shift)
    if shift >= 64:
        alike = np.ones(numbers[part].size, dtype=np.bool_)
    else:
        alike = numbers[part] >> above == np.uint64(prefix[part]) >> above
    return alike if part == 0 else alike & (numbers[0] == np.uint64(prefix[0]))
