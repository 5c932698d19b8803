"""Torch out of core: scopes of more blocks than fit in memory, which pass by in the torch engine.

Survivors are found by digits of (key, index), which need no care of ties: each pass counts one digit, or
collects the ranks that are left. Then every block is cut, or shrunk, as it passes by. Imports torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import islice, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.block import zero_pruned
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import DIGIT_BITS
from sparseprune.execution.devices import downloaded, in_smaller_parts
from sparseprune.execution.passes import Chunk, Decision, Outcome, Pass
from sparseprune.execution.radix_select import digit_of
from sparseprune.execution.regions import Part, block_part, members_of, regions_of, tiles
from sparseprune.execution.torch_tiles import Tile, halves, read_parts
from sparseprune.execution.within import Search, told_survivors
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from sparseprune.execution.plan import Task
    from sparseprune.execution.strategy import TorchOutOfCore
    from sparseprune.execution.tensor_io import Mask, TensorIO
    from sparseprune.execution.torch_tiles import Read
    from sparseprune.spec import BoundBlock

_SIGN = 1 << 63
_LOWEST = -(1 << 63)
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

    def countdown(self, blocks: int, device: str) -> Tensor:
        """For each block, row-major in the part, how many blocks of the scope come behind it: int64."""
        shape, part = self.member.shape, self.part.within(self.origin)
        steps = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
        first = self.before + sum(map(mul, part.begin, steps))
        number = torch.full((), first, dtype=torch.int64, device=device)
        for extent, step in zip(part.extent, steps, strict=True):
            number = number.unsqueeze(-1) + torch.arange(extent, device=device) * step
        return blocks - 1 - number.reshape(-1)


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

    def load(self, place: Place, io: TensorIO, read: Read | None = None) -> Tile:
        """The blocks of a place as one scope; `read` without counts where they are not stored."""
        block, parts = place.member.block, [(place.member.block, place.part)]
        scope = BoundScope(place.member.label, block, place.part.extent)
        return Tile(self.task, scope, parts, io, read or read_parts(self.task, parts, io, counts=False))

    def keys(self, tile: Tile, io: TensorIO) -> Tensor:
        """Patterns of unsigned integers in the order of the ranks: int64 (blocks), row-major in the part."""
        width = self.width(io)
        keys = tile.keys(as_norms=width is None)
        wide = keys.reshape(-1).to(torch.int64)
        return wide ^ _LOWEST if width in {None, 64} else wide + (1 << (width or 64) - 1)

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
class SearchRank(_OutOfCore, Search):
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
        found = in_smaller_parts(lambda span: [self._over(span, io)], chunk.about, _half_spans)
        return tuple(map(np.concatenate, zip(*found, strict=True))) if self.collect else sum(found)

    def _over(self, span: tuple[int, int], io: TensorIO) -> Any:  # noqa: ANN401
        """Places are counted on the device one after the other; the host waits for the sum of them.

        Where ranks are collected it has to know how many there are of each place.
        """
        part, shift = self._levels(io)[self.level]
        counts = torch.zeros(1 << DIGIT_BITS, dtype=torch.int64, device=io.device)
        found: list[tuple[Tensor, Tensor]] = []
        with io.lane(self.strategy.on_device):
            for place in islice(self.places(len(self.decisions)), *span):
                tile = self.load(place, io)
                keys = self.keys(tile, io)
                ties = place.countdown(self.blocks, io.device) if part or self.collect else keys
                numbers = keys, ties
                if not self.collect:
                    _count(numbers, self.prefix, (part, shift), counts)
                elif self.kept_at_once:
                    found.append(numbers)
                else:
                    alike = _alike(numbers, self.prefix, part, shift)
                    found.append((numbers[0][alike], numbers[1][alike]))
                nbytes = sum(one.flat.nbytes for one in tile.loaded.values())
                io.passed(nbytes, self.task.part)
            if not self.collect:
                return downloaded([counts], io.device)[0]
            joined = [torch.cat(each) for each in zip(*found, strict=True)]
            return tuple(one.view(np.uint64) for one in downloaded(joined, io.device))

    @property
    def kept_at_once(self) -> bool:
        """Whether there is room for the ranks of all blocks, so that no digit is counted."""
        return self.blocks * _CANDIDATE_BYTES <= self.strategy.held

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

    def among(self, nnz: int) -> Self:
        return dataclasses.replace(self, k=nnz)

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
        return self.k not in {0, self.blocks}

    def _found(self, rank: tuple[int, int], io: TensorIO) -> Pass | Decision:
        """The rank of the last block that survives, [] for none, "all" for all; or the soft threshold."""
        soft, nnz = self.task.instance.soft, self.task.instance.budget.nnz
        passed = (self.strategy.passes - 1) * self.task.nbytes(io.tensors)
        passed //= prod(self.task.instance.scope.grid_shape)
        if soft is None:
            return Decision(list(rank) if self._is_open() else ["all"] if self.k else [], passed)
        norm = float(np.array([rank[0] ^ _SIGN], dtype=np.uint64).view(np.float64)[0])
        if not self._is_open():  # infinity before the first, 0 behind the last
            norm = 0.0 if self.k else float("inf")
        if self.kth is not None:  # as `kth_mid` of the engine
            return Decision(((self.kth + soft.k_weight * norm) / (1 + soft.k_weight)).hex(), passed)
        if soft.k_weight and nnz is not None:
            return _search(self.task, self.strategy, self.decisions, nnz + 1, kth=norm)
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
        number, whole = chunk.about

        def smaller(place: Place) -> list[Place]:
            return [replace(place, part=part) for part in halves(place.part)]

        return in_smaller_parts(lambda place: self._cut(number, place, io), whole, smaller)

    def _cut(self, number: int, place: Place, io: TensorIO) -> list[Outcome]:
        read = read_parts(self.task, [(place.member.block, place.part)], io)
        with io.lane(self.strategy.on_device):
            masks = self._decided(self.decisions[number], place, self.load(place, io, read), io)
        return read.store(masks, io)

    def _decided(self, decision: Any, place: Place, tile: Tile, io: TensorIO) -> dict[BoundBlock, Mask]:  # noqa: ANN401
        soft = self.task.instance.soft
        if soft is not None:
            tile.element_values()
            return tile.fetched(tile.shrink(soft, float.fromhex(decision)))
        kept = self._kept(place, tile, decision, io).reshape(*tile.engine.grid_shape, -1)
        masks = tile.allowed(tile.engine.get_masks(0, block_mask=kept))
        zero_pruned(masks)
        return tile.fetched(masks)

    def _kept(self, place: Place, tile: Tile, decision: Sequence[Any], io: TensorIO) -> Tensor:
        if len(decision) < 2:
            return torch.full((place.part.numel,), bool(decision), device=io.device)
        key, countdown = decision
        # With the highest bit turned over signed integers have the order of the patterns as unsigned ones.
        ranks, kth = self.keys(tile, io) ^ _LOWEST, _signed_pattern(key) ^ _LOWEST
        last = place.countdown(self.blocks, io.device) >= countdown
        kept: Tensor = (ranks > kth) | ((ranks == kth) & last)
        return kept


def out_of_core(task: Task, strategy: TorchOutOfCore, decisions: tuple[Any, ...] = ()) -> Pass:
    """The first pass over scopes of more blocks than fit in memory; `decisions` are those on the first."""
    nnz = task.instance.budget.nnz
    if nnz is None:
        raise TypeError(f"{task.instance.label}: a threshold decides every block alone")
    return told_survivors(task, len(decisions), strategy, _search(task, strategy, decisions, nnz))


def _search(
    task: Task, strategy: TorchOutOfCore, decisions: tuple[Any, ...], k: int, kth: float | None = None
) -> SearchRank:
    """The first pass that looks for the k-th largest rank of a scope."""
    first = SearchRank(task, strategy, decisions, k, kth=kth)
    return dataclasses.replace(first, collect=first.kept_at_once)


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


def _alike(numbers: tuple[Tensor, Tensor], prefix: tuple[int, ...], part: int, shift: int) -> Tensor:
    """Which ranks agree with a prefix in everything above `shift` of one part, and in the parts before it."""
    if shift >= 64:
        alike = torch.ones_like(numbers[part], dtype=torch.bool)
    else:
        alike = numbers[part] >> shift == _signed_pattern(prefix[part]) >> shift
    return alike if part == 0 else alike & (numbers[0] == _signed_pattern(prefix[0]))


def _half_spans(span: tuple[int, int]) -> list[tuple[int, int]]:
    """Places from the first number up to the second in two spans, or a single one as it is."""
    begin, end = span
    middle = (begin + end) // 2
    return [(begin, middle), (middle, end)] if end - begin > 1 else [span]


def _count(
    numbers: tuple[Tensor, Tensor], prefix: tuple[int, ...], digit: tuple[int, int], counts: Tensor
) -> None:
    """Add to `counts` the `digit`, a part and its first bit, of the ranks that agree with a prefix above it.

    Integers are added, so that their order does not matter.
    """
    part, shift = digit
    alike = _alike(numbers, prefix, part, shift + DIGIT_BITS)
    digits = (numbers[part] >> shift) & (len(counts) - 1)
    counts.scatter_add_(0, digits, alike.to(torch.int64))


def _signed_pattern(number: int) -> int:
    """The signed integer whose 64 bits are those of an unsigned one."""
    return number - (1 << 64) if number >= _SIGN else number
