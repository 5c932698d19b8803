"""Blocks that are not zero: how many each scope has, and which scopes have more than are allowed.

Owns three strategies, chosen by what lies together in the storage: whole scopes (many small ones that look
alike at one time), whole blocks of which the counts add up, and elements that set a flag for their block.
Needs no scores and no torch. Called by verify.py.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import Shape, permute, prod
from sparseprune.engine.kernels.counting import any_in, count_in, histogram, histograms, nonzero
from sparseprune.errors import SparsepruneError, size
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import (
    Part,
    Region,
    cells,
    cut,
    leaves_of,
    members_of,
    numel_per_scope,
    regions_at,
    regions_of,
    storage_order,
    whole_part,
)
from sparseprune.execution.strategy import CountNonzero

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.kernels.counting import ByteFlags
    from sparseprune.execution.regions import AnyBlock, AnyScope, Limits
    from sparseprune.execution.tensor_io import TensorIO
    from sparseprune.spec import BoundScope

    Counts = NDArray[Any]

_FLAG_BYTES = 6  # of an element beside its pattern: its flag, words of flags, counts
_COUNT_BYTES = 16  # of a count of a scope, which is kept and in the end compared
_GRID_BYTES = 6  # of a block whose flag in each leaf is kept and in the end fused
_SLABS_A_SCOPE = 8  # several threads share a scope of more slabs
_READ_BYTES = 4096  # a call to read should give so many to be worth it
_BATCHED = 8  # leaves of which so many fit into one chunk are small
_NONZERO, _PARTLY, _PARTLY_IN = 0, 1, 2  # rows of counts; from the last one on there is a row for each leaf


class First(Struct, frozen=True):
    """A broken scope: its place in the grid of scopes, and how many of its blocks are not zero."""

    scope: Shape
    nonzero: int


class Found(Struct, frozen=True):
    """What was found in some scopes.

    `scopes` counts the scopes by how many of their blocks are not zero; `first` is the first broken scope in
    row-major order. `partly_zero` counts the fused blocks of broken scopes that are zero in one leaf and not
    in another, `partly_in` has for each leaf those of them that are not zero there.
    """

    scopes: Mapping[int, int]
    broken: int = 0
    first: First | None = None
    partly_zero: int = 0
    partly_in: tuple[int, ...] = ()


def joined(parts: Sequence[Found]) -> Found:
    """What was found in all parts together; they may come in any order."""
    if len(parts) == 1:
        return parts[0]
    scopes: Counter[int] = Counter()
    for part in parts:
        scopes.update(part.scopes)
    partly_in = [part.partly_in for part in parts if part.partly_in]
    return Found(
        dict(sorted(scopes.items())),
        sum(part.broken for part in parts),
        min((part.first for part in parts if part.first), key=lambda first: first.scope, default=None),
        sum(part.partly_zero for part in parts),
        tuple(map(sum, zip(*partly_in, strict=True))),
    )


def count_strategy(scope: AnyScope, tensors: Mapping[str, StoredTensor], limits: Limits) -> CountNonzero:
    """The first strategy that fits in memory and makes long reads, else the one that makes the fewest.

    SparsepruneError where none fits.
    """
    strategies = list(count_strategies(scope, tensors, limits))
    if not strategies:
        raise SparsepruneError(
            f"{scope.label}: {prod(scope.grid_shape)} scopes of {numel_per_scope(scope)} elements in "
            f"{len(scope.leaves)} parts cannot be counted in {size(limits.memory)}; give a larger --memory"
        )
    nbytes = sum(prod(leaf.view_shape) * _itemsize(tensors[leaf.tensor]) for leaf in scope.leaves)
    enough = len(scope.leaves) + nbytes // _READ_BYTES
    return next(
        (strategy for strategy in strategies if reads_of(scope, strategy) <= enough),
        min(strategies, key=lambda strategy: reads_of(scope, strategy)),
    )


def count_strategies(
    scope: AnyScope, tensors: Mapping[str, StoredTensor], limits: Limits
) -> Iterator[CountNonzero]:
    """The strategies that fit in memory; blocks too large to be whole are few, so that their flags fit."""
    itemsize = max((_itemsize(tensors[leaf.tensor]) for leaf in scope.leaves), default=1)
    each = 2 * itemsize + _FLAG_BYTES
    largest = max(1, limits.memory // (2 * each))
    slab = max(1, min(limits.slab // itemsize, largest))
    together = numel_per_scope(scope)
    if together <= min(largest, _SLABS_A_SCOPE * slab):
        limit = max(slab, together)
        yield CountNonzero(limit * each, limit, kind="scopes", batch=batch_of(scope, limit))
    block = max(member.block.numel_per_block for member, _ in members_of(scope))
    held = _COUNT_BYTES * _count_rows(scope) * prod(scope.grid_shape)
    if block <= largest and held <= limits.held:
        limit = max(slab, block)
        yield CountNonzero(limit * each, limit, held, kind="blocks")
    grids = _GRID_BYTES * sum(prod(leaf.grid_shape) for leaf in scope.leaves)
    if grids <= limits.held or block > largest:
        yield CountNonzero(slab * each, slab, grids, kind="elements")


def batch_of(scope: AnyScope, limit: int) -> int:
    """How many instances like this one a chunk of so many elements has: 1 where its leaves are not small."""
    numel = sum(prod(leaf.view_shape) for leaf in scope.leaves)
    is_small = 0 < numel <= limit and numel // len(scope.leaves) <= limit // _BATCHED
    return limit // numel if is_small else 1


def reads_of(scope: AnyScope, strategy: CountNonzero) -> int:
    """How many calls read the input, about: all chunks are taken for as large as the first."""
    return sum(
        -(-grid.numel // part.numel) * -(-region.numel // length)
        for grid in _grids(scope, strategy)
        for part in islice(grid.parts, 1)
        for region in grid.regions(part)
        for _, length in islice(region.runs(), 1)
    )


def count_pass(scopes: tuple[AnyScope, ...], allowed: int, strategy: CountNonzero) -> Pass:
    """A pass that gives a Found for each of some instances that look alike; only whole scopes may be several.

    `allowed` blocks of each scope may be not zero.
    """
    return _PASSES[strategy.kind](scopes, allowed, strategy)


@dataclass(frozen=True, slots=True)
class _CountPass(Pass):
    """Chunks are about the number of a grid of `_grids` and a part of it."""

    scopes: tuple[AnyScope, ...]
    allowed: int
    strategy: CountNonzero

    @property
    def form(self) -> AnyScope:
        """The first instance, which all others look like."""
        return self.scopes[0]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        for number, grid in enumerate(_grids(self.form, self.strategy)):
            for part in grid.parts:
                nbytes = len(self.scopes) * sum(map(io.nbytes, grid.regions(part)))
                yield Chunk((number, part), nbytes, self.strategy.memory)

    @abstractmethod
    def merge(self, partials: list[Any], io: TensorIO) -> list[Found]: ...

    def _judged(self, flags: Iterator[ByteFlags], begin: Shape) -> list[Found]:
        """What was found in whole scopes, by the flags of every leaf (instances, *grid of blocks)."""
        read = [_Blocks.of(member, order, flags) for member, order in members_of(self.form)]
        counts = _counted(read, _count_rows(self.form), self.allowed)
        total = counts[_NONZERO]
        if len(total) > 1 and int(total.max(initial=0)) <= self.allowed:
            return [Found(scopes) for scopes in histograms(total.reshape(len(total), -1))]
        return [_found([row[place] for row in counts], begin, self.allowed) for place in range(len(total))]


class _CountScopes(_CountPass):
    """Chunks have whole scopes, of one instance or of several."""

    __slots__ = ()

    def work(self, chunk: Chunk, io: TensorIO) -> list[Found]:
        _, cell = chunk.about
        return self._judged(_flags(list(regions_at(self.form, cell).values()), self.scopes, io), cell.begin)

    def merge(self, partials: list[list[Found]], io: TensorIO) -> list[Found]:  # noqa: ARG002
        return [joined([part[place] for part in partials]) for place in range(len(self.scopes))]


class _CountBlocks(_CountPass):
    """Chunks have whole blocks of one member; what they add to the counts of each scope is added up."""

    __slots__ = ()

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[tuple[slice, ...], list[tuple[int, Counts]]]:
        number, part = chunk.about
        members = members_of(self.form)
        member, order = members[number]
        regions = list(regions_of(member.block, part).values())
        blocks = _Blocks.of(member, order, _flags(regions, (member,), io))
        first_leaf = sum(len(before.leaves) for before, _ in members[:number])
        own = part.on_grid(member.shape)
        place = (slice(None), *(own[dim] for dim in order))
        return place, [(_NONZERO, blocks.nonzero()), *blocks.partly_zero(first_leaf)]

    def total(self) -> list[Counts]:
        return [np.zeros((1, *self.form.grid_shape), dtype=np.int64) for _ in range(_count_rows(self.form))]

    def add(self, total: list[Counts], partial: tuple[Any, list[tuple[int, Counts]]]) -> list[Counts]:
        place, found = partial
        for row, numbers in found:
            total[row][place] += numbers
        return total

    def merge(self, partials: list[list[Counts]], io: TensorIO) -> list[Found]:  # noqa: ARG002
        (total,) = partials
        return [_found([row[0] for row in total], (0,) * len(self.form.grid_shape), self.allowed)]


class _FlagBlocks(_CountPass):
    """Chunks have elements of one leaf; a block is not zero where any part of it is not."""

    __slots__ = ()

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[int, tuple[slice, ...], ByteFlags]:
        number, part = chunk.about
        leaf = self.form.leaves[number]
        (flags,) = _flags([Region(leaf, part.begin, part.extent)], (leaf,), io)
        return number, part.on_grid(leaf.shape), flags[0]

    def total(self) -> list[ByteFlags]:
        return [np.zeros(leaf.grid_shape, dtype=np.uint8) for leaf in self.form.leaves]

    def add(
        self, total: list[ByteFlags], partial: tuple[int, tuple[slice, ...], ByteFlags]
    ) -> list[ByteFlags]:
        number, place, flags = partial
        total[number][place] |= flags
        return total

    def merge(self, partials: list[list[ByteFlags]], io: TensorIO) -> list[Found]:  # noqa: ARG002
        (total,) = partials
        return self._judged((flags[np.newaxis] for flags in total), (0,) * len(self.form.grid_shape))


_PASSES: dict[str, type[_CountPass]] = {
    "scopes": _CountScopes,
    "blocks": _CountBlocks,
    "elements": _FlagBlocks,
}


class _Grid(Struct, frozen=True):
    """A grid of `numel` places in parts, and the regions of the leaves that belong to a part of it."""

    numel: int
    parts: Iterator[Part]
    regions: Callable[[Part], Iterable[Region]]


def _grids(scope: AnyScope, strategy: CountNonzero) -> Iterator[_Grid]:
    """What is cut into chunks: the grid of scopes, the members' grids of blocks, or the leaves' elements."""
    if strategy.kind == "scopes":
        parts = cells(scope, strategy.elements)
        yield _Grid(prod(scope.grid_shape), parts, lambda part: regions_at(scope, part).values())
    elif strategy.kind == "blocks":
        for member, _ in members_of(scope):
            block, grid = member.block, member.block.grid_shape
            places = strategy.elements // max(1, block.numel_per_block)
            parts = cut(whole_part(grid), _outermost_first(block), places, member.shape)
            yield _Grid(prod(grid), parts, lambda part, block=block: regions_of(block, part).values())  # type: ignore[misc]
    else:
        for leaf in scope.leaves:
            parts = cut(whole_part(leaf.view_shape), storage_order(leaf), strategy.elements, leaf.shape)
            yield _Grid(
                prod(leaf.view_shape),
                parts,
                lambda part, leaf=leaf: (Region(leaf, part.begin, part.extent),),  # type: ignore[misc]
            )


class _Blocks(Struct, frozen=True):
    """Blocks of one member, in whole scopes or in a part of one, flagged in every leaf where they are not 0.

    Flags are (instances, *common grid of blocks), of which a scope has `shape`; counts are on the common grid
    of scopes, onto which `order` permutes the member's own.
    """

    shape: Shape
    order: Shape
    flags: tuple[ByteFlags, ...]

    @classmethod
    def of(cls, member: BoundScope, order: Shape, flags: Iterator[ByteFlags]) -> _Blocks:
        """The blocks of a member, of whose leaves the flags come next."""
        own = [next(flags).transpose(_behind(to_common)) for _, to_common in leaves_of(member.block)]
        return cls((1, *member.shape), _behind(order), tuple(own))

    def nonzero(self) -> Counts:
        """The blocks of every scope that are not zero."""
        return self._counted(self.flags[0] if len(self.flags) == 1 else np.bitwise_or.reduce(self.flags))

    def partly_zero(self, first_leaf: int) -> Iterator[tuple[int, Counts]]:
        """The rows of partly zero blocks, by number; `first_leaf` counts the leaves of earlier members."""
        if len(self.flags) == 1:
            return
        somewhere_zero = 1 - np.bitwise_and.reduce(self.flags)
        yield _PARTLY, self._counted(np.bitwise_or.reduce(self.flags) & somewhere_zero)
        for leaf, own in enumerate(self.flags):
            yield _PARTLY_IN + first_leaf + leaf, self._counted(own & somewhere_zero)

    def _counted(self, flags: ByteFlags) -> Counts:
        return count_in(flags, self.shape).transpose(self.order)


def _flags(regions: Sequence[Region], instances: Sequence[Any], io: TensorIO) -> Iterator[ByteFlags]:
    """For the region of each leaf, in all instances, 1 for every block or part of one that is not zero.

    Arrays of (instances, *grid of blocks). Leaves that look alike are read together.
    """
    alike: defaultdict[object, list[int]] = defaultdict(list)
    for place, region in enumerate(regions):
        leaf = region.leaf
        look = (leaf.view_shape, leaf.view_stride, leaf.shape, region.begin, io.tensors[leaf.tensor].dtype)
        alike[look].append(place)
    of_instance, height = [one.leaves for one in instances], len(instances)
    flags: dict[int, ByteFlags] = {}
    for places in alike.values():
        region = regions[places[0]]
        bits = io.load_alike(region, [leaves[place] for place in places for leaves in of_instance])
        zero_bits = DTYPES[io.tensors[region.leaf.tensor].dtype].zero_bits or 0
        together = any_in(nonzero(bits, zero_bits), (1, *region.leaf.shape))
        for number, place in enumerate(places):
            flags[place] = together[number * height : (number + 1) * height]
    return (flags[place] for place in range(len(regions)))


def _count_rows(scope: AnyScope) -> int:
    """How many rows the counts of a scope have: blocks are partly zero only where some are fused."""
    leaves = len(scope.leaves)
    return 1 if leaves == len(members_of(scope)) else _PARTLY_IN + leaves


def _counted(read: Sequence[_Blocks], rows: int, allowed: int) -> list[Counts]:
    """The rows of counts of whole scopes over all members; the first row alone where no scope is broken."""
    nonzero = [blocks.nonzero() for blocks in read]
    total: Counts = nonzero[0] if len(read) == 1 else np.asarray(np.sum(nonzero, axis=0, dtype=np.int64))
    if rows == 1 or int(total.max(initial=0)) <= allowed:
        return [total]
    counts: list[Counts] = [total, *(np.zeros(total.shape, dtype=np.int64) for _ in range(1, rows))]
    first_leaf = 0
    for blocks in read:
        for row, partly in blocks.partly_zero(first_leaf):
            counts[row] += partly
        first_leaf += len(blocks.flags)
    return counts


def _found(counts: Sequence[Counts], begin: Shape, allowed: int) -> Found:
    """What was found in a part of the grid of scopes that begins at `begin`, from its rows of counts."""
    scopes = histogram(counts[_NONZERO])
    broken = sum(count for number, count in scopes.items() if number > allowed)
    if not broken:
        return Found(scopes)
    is_broken = np.ascontiguousarray(counts[_NONZERO] > allowed)
    inner = np.unravel_index(int(np.argmax(is_broken)), is_broken.shape) if begin else ()
    place = tuple(at + int(own) for at, own in zip(begin, inner, strict=True))
    partly = [int(row[is_broken].sum()) for row in counts[_PARTLY:]]
    first = First(place, int(counts[_NONZERO][inner]))
    return Found(scopes, broken, first, sum(partly[:1]), tuple(partly[1:]))


def _outermost_first(block: AnyBlock) -> Shape:
    """The dimensions of a common block grid, as the first leaf's dimensions lie in its storage."""
    leaf, own = leaves_of(block)[0]
    steps = permute(leaf.view_stride, own)
    return tuple(sorted(range(len(own)), key=lambda dim: -steps[dim]))


def _behind(order: Sequence[int]) -> tuple[int, ...]:
    """The same order of dimensions where one more stands in front."""
    return (0, *(1 + dim for dim in order))


def _itemsize(stored: StoredTensor) -> int:
    return DTYPES[stored.dtype].itemsize
