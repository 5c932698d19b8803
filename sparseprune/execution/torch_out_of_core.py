"""Scopes that do not fit in memory, of blocks that do, in the torch engine.

Blocks are read in tiles and ranked anew each time. What survives is found by digits of (key, index): the
index, counted down, behind the key makes every rank unlike every other, so that ties need no care of their
own. As soon as few enough candidates are left they are collected and sorted. Imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.plan import task_bytes
from sparseprune.execution.regions import Part, block_part, members_of, regions_of, tiles
from sparseprune.execution.scores import Ranking
from sparseprune.execution.torch_tiles import (
    block_scores,
    build_scope,
    element_values,
    load_tile,
    shrink,
    store_tile,
    stream_of,
)
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine import SparseScope
    from sparseprune.execution.outcomes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.strategy import TorchOutOfCore
    from sparseprune.execution.tensor_io import TensorIO
    from sparseprune.execution.torch_tiles import Tile

    Keys = NDArray[np.uint64]

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
        scope, kind = self.task.instance.scope, self.task.instance.score.kind
        dtypes = {io.tensors[leaf.tensor].dtype for leaf in scope.leaves}
        if kind == "values":
            dtypes = {one.stored.dtype for one in self.task.inputs if one.role == "values"}
        single = all(member.block.numel_per_block == 1 for member, _ in members_of(scope))
        ready = kind in {"random", "blocks"} or self.task.instance.score.nonfinite == "prune"
        if self.task.instance.soft is not None or not single or len(dtypes) > 1 or ready:
            return None
        return 64 if kind in {"wanda", "obd"} else DTYPES[dtypes.pop()].bits


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
        passed = (self.scopes.strategy.passes - 1) * task_bytes(task, io.tensors)
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
