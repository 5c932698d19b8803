"""Which blocks are not zero, and how many of them each scope has: from the elements of regions to counts.

Owns the way from a leaf's elements over fused blocks to the grid of scopes, for parts of any of these. Reads
what it is given to read and decides nothing. Called by surviving.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import Shape, permute
from sparseprune.engine.kernels.occupancy import any_in, count_in, histogram, nonzero
from sparseprune.execution.regions import Part, leaves_of, members_of, regions_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.occupancy import ByteFlags
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.regions import AnyBlock, AnyScope
    from sparseprune.execution.tensor_io import Loaded
    from sparseprune.spec import BoundScope

    Counts = NDArray[Any]

SURVIVORS, TORN, TORN_IN = 0, 1, 2
"""Rows of counts: non-zero blocks, torn ones among them, and from TORN_IN on for each leaf its torn ones."""


@dataclass(frozen=True, slots=True)
class First:
    """A broken scope, by its place in the grid of scopes, and how many of its blocks are not zero."""

    scope: Shape
    nonzero: int


@dataclass(frozen=True, slots=True)
class Found:
    """What was found in some scopes of a task.

    `survivors` tells how many scopes have so many non-zero blocks; `first` is the first broken scope in
    row-major order. `torn` counts the fused blocks of broken scopes that are zero in one member and not in
    another, `torn_in` for each leaf those that are not zero there.
    """

    survivors: Mapping[int, int]
    broken: int = 0
    first: First | None = None
    torn: int = 0
    torn_in: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of one member, in whole scopes or in a part of one, flagged in every leaf where they are not 0.

    Flags lie on the member's common block grid, of which a scope has `shape`; counts on the common grid of
    scopes, onto which `order` permutes the member's own.
    """

    shape: Shape
    order: Shape
    flags: tuple[ByteFlags, ...]

    def survivors(self) -> Counts:
        """The non-zero blocks of every scope."""
        fused = self.flags[0] if len(self.flags) == 1 else np.bitwise_or.reduce(self.flags)
        return self._counted(fused)

    def torn(self, first_leaf: int) -> Iterator[tuple[int, Counts]]:
        """The rows of torn blocks, by number; `first_leaf` counts the leaves of earlier members."""
        if len(self.flags) == 1:
            return
        somewhere_zero = 1 - np.bitwise_and.reduce(self.flags)
        yield TORN, self._counted(np.bitwise_or.reduce(self.flags) & somewhere_zero)
        for leaf, own in enumerate(self.flags):
            yield TORN_IN + first_leaf + leaf, self._counted(own & somewhere_zero)

    def _counted(self, flags: ByteFlags) -> Counts:
        return count_in(flags, self.shape).transpose(self.order)


def joined(parts: Sequence[Found]) -> Found:
    """What was found in all parts together; they may come in any order."""
    if len(parts) == 1:
        return parts[0]
    survivors: dict[int, int] = {}
    torn_in = [0] * max((len(part.torn_in) for part in parts), default=0)
    for part in parts:
        for number, scopes in part.survivors.items():
            survivors[number] = survivors.get(number, 0) + scopes
        for leaf, torn in enumerate(part.torn_in):
            torn_in[leaf] += torn
    return Found(
        dict(sorted(survivors.items())),
        sum(part.broken for part in parts),
        min((part.first for part in parts if part.first), key=lambda first: first.scope, default=None),
        sum(part.torn for part in parts),
        tuple(torn_in),
    )


def coarser(part: Part, units: Shape) -> tuple[slice, ...]:
    """Where an aligned part lies on the grid of units."""
    ends = zip(part.begin, part.extent, units, strict=True)
    return tuple(slice(begin // unit, (begin + size - 1) // unit + 1) for begin, size, unit in ends)


def occupied(loaded: Loaded) -> ByteFlags:
    """1 for every block, or part of one, that is not zero, on the leaf's grid; overwrites the elements."""
    zero_bits = DTYPES[loaded.dtype].zero_bits or 0
    return any_in(nonzero(loaded.view, zero_bits), loaded.region.leaf.shape)


def read_blocks(member: BoundScope, order: Shape, part: Part, setting: Setting) -> Blocks:
    """The blocks of a part of a member's grid; `order` permutes its grid of scopes onto the common one."""
    regions = regions_of(member.block, part)
    flags = [
        occupied(setting.traffic.load(regions[leaf])).transpose(own) for leaf, own in leaves_of(member.block)
    ]
    return Blocks(member.shape, order, tuple(flags))


def count_rows(scope: AnyScope) -> int:
    """How many rows the counts of a scope have: torn blocks are counted only where some are fused."""
    leaves = len(scope.leaves)
    return 1 if leaves == len(members_of(scope)) else TORN_IN + leaves


def common_place(part: Part, member: BoundScope, order: Shape) -> tuple[slice, ...]:
    """Where a part of a member's block grid lies on the common grid of scopes."""
    own = coarser(part, member.shape)
    return tuple(own[dim] for dim in order)


def counted(read: Sequence[Blocks], rows: int, allowed: int) -> list[Counts]:
    """The rows of counts of whole scopes over all members; that of survivors alone where none is broken."""
    survivors = [blocks.survivors() for blocks in read]
    total: Counts = survivors[0] if len(read) == 1 else np.asarray(np.sum(survivors, axis=0, dtype=np.int64))
    if rows == 1 or int(total.max(initial=0)) <= allowed:
        return [total]
    counts: list[Counts] = [total, *(np.zeros(total.shape, dtype=np.int64) for _ in range(1, rows))]
    first_leaf = 0
    for blocks in read:
        for row, torn in blocks.torn(first_leaf):
            counts[row] += torn
        first_leaf += len(blocks.flags)
    return counts


def judged(counts: Sequence[Counts], begin: Shape, allowed: int) -> Found:
    """What was found in a part of the grid of scopes that begins at `begin`, from its rows of counts."""
    survivors = histogram(counts[SURVIVORS])
    broken = sum(scopes for number, scopes in survivors.items() if number > allowed)
    if not broken:
        return Found(survivors)
    is_broken = np.ascontiguousarray(counts[SURVIVORS] > allowed)
    place = np.unravel_index(int(np.argmax(is_broken)), is_broken.shape) if begin else ()
    first = tuple(at + int(inner) for at, inner in zip(begin, place, strict=True))
    torn = [int(row[is_broken].sum()) for row in counts[TORN:]]
    return Found(
        survivors,
        broken,
        First(first, int(counts[SURVIVORS][place])),
        torn[0] if torn else 0,
        tuple(torn[1:]),
    )


def outermost_first(block: AnyBlock) -> Shape:
    """The dimensions of a common block grid, as the first leaf's dimensions lie in its storage."""
    leaf, own = leaves_of(block)[0]
    steps = permute(leaf.view_stride, own)
    return tuple(sorted(range(len(own)), key=lambda dim: -steps[dim]))
