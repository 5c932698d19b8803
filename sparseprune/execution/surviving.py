"""Counting what survives: how many blocks of each scope are not zero, and which scopes have too many.

Three ways, chosen by what lies together in the storage: cells of whole scopes; tiles of whole blocks, whose
counts add up; chunks of elements in the order of the storage, of which a flag for every block is held. No way
needs scores, score files or torch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError
from sparseprune.execution.occupied import (
    SURVIVORS,
    Blocks,
    Found,
    coarser,
    common_place,
    count_rows,
    counted,
    joined,
    judged,
    occupied,
    outermost_first,
    read_blocks,
)
from sparseprune.execution.programs import Item, Program
from sparseprune.execution.regions import (
    Part,
    Region,
    block_part,
    cells,
    cut,
    leaves_of,
    members_of,
    numel_per_scope,
    regions_of,
    storage_order,
    whole_part,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.occupancy import ByteFlags
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.occupied import Counts
    from sparseprune.execution.programs import Setting
    from sparseprune.execution.regions import AnyScope
    from sparseprune.spec import BoundBlock, BoundScope

Kind = Literal["cells", "tiles", "chunks"]

_FLAG_BYTES = 6  # that an element costs beside its patterns: its flag, words of flags, counts
_COUNT_BYTES = 16  # that a number of a scope costs, held and in the end compared
_GRID_BYTES = 6  # that a block costs, held in one flag for each leaf and in the end fused
_SLABS_A_SCOPE = 8  # scopes of more slabs than that are shared by several threads
_READ_BYTES = 4096  # that one call to read should give, to be worth it


@dataclass(frozen=True, slots=True)
class Way:
    """How scopes are counted: at most `limit` elements at one time take `memory` bytes, others are `held`."""

    kind: Kind
    limit: int
    memory: int
    held: int


def way_of(scope: AnyScope, tensors: Mapping[str, StoredTensor], limits: Limits) -> Way:
    """The first way that fits in memory and makes long reads, else the one that makes the fewest.

    SparsepruneError where none fits.
    """
    ways = list(_open_ways(scope, tensors, limits))
    if not ways:
        raise SparsepruneError(
            f"{scope.label}: {prod(scope.grid_shape)} scopes of {numel_per_scope(scope)} elements in "
            f"{len(scope.leaves)} parts cannot be counted in {limits.memory} bytes; give a larger --memory"
        )
    enough = len(scope.leaves) + leaf_bytes(scope.leaves, tensors) // _READ_BYTES
    reads = []
    for way in ways:
        reads.append(_reads(scope, way))
        if reads[-1] <= enough:
            return way
    return ways[reads.index(min(reads))]


def survivor_program(
    scope: AnyScope, allowed: int, way: Way, setting: Setting, tell: Callable[[Found], None]
) -> Program:
    """Count what survives in the scopes of a task; `tell` gets what was found, once all of it was read."""
    work = _Work(scope, allowed, way, setting)
    if way.kind == "cells":
        parts = yield work.cells()
    else:
        yield work.tiles() if way.kind == "tiles" else work.chunks()
        parts = yield [Item(work.judge)]
    tell(joined(parts))


class _Work:
    """What the items of one task share: counts of scopes, or flags of blocks, added to by any thread."""

    def __init__(self, scope: AnyScope, allowed: int, way: Way, setting: Setting) -> None:
        self._scope = scope
        self._allowed = allowed
        self._way = way
        self._setting = setting
        self._lock = threading.Lock()
        self._counts: list[Counts] = []
        self._flags: dict[BoundBlock, ByteFlags] = {}

    def cells(self) -> Iterator[Item]:
        """Whole scopes, judged at once."""
        for cell in cells(self._scope, self._way.limit):
            size = cell.numel * self._nbytes(self._scope) // max(1, prod(self._scope.grid_shape))
            yield Item(partial(self._count_cell, cell), size, self._way.memory)

    def tiles(self) -> Iterator[Item]:
        """Whole blocks; what they add to each scope is added up."""
        grid = self._scope.grid_shape
        self._counts = [np.zeros(grid, dtype=np.int64) for _ in range(count_rows(self._scope))]
        first_leaf = 0
        for member, order in members_of(self._scope):
            each = self._nbytes(member) // max(1, prod(member.block.grid_shape))
            for part in _tiles(member, self._way):
                work = partial(self._add_tile, member, order, part, first_leaf)
                yield Item(work, part.numel * each, self._way.memory)
            first_leaf += len(member.leaves)

    def chunks(self) -> Iterator[Item]:
        """Elements in the order of the storage; a block is not zero where any of its parts is not."""
        self._flags = {leaf: np.zeros(leaf.grid_shape, dtype=np.uint8) for leaf in self._scope.leaves}
        for leaf in self._scope.leaves:
            for region in _chunks(leaf, self._way):
                yield Item(
                    partial(self._mark_chunk, region), self._setting.traffic.nbytes(region), self._way.memory
                )

    def judge(self) -> Found:
        """What was found, once all tiles or chunks have passed."""
        if self._way.kind == "tiles":
            return judged(self._counts, (0,) * len(self._scope.grid_shape), self._allowed)
        read = [
            Blocks(
                member.shape,
                order,
                tuple(self._flags[leaf].transpose(own) for leaf, own in leaves_of(member.block)),
            )
            for member, order in members_of(self._scope)
        ]
        return self._judged(read, whole_part(self._scope.grid_shape))

    def _nbytes(self, scope: AnyScope) -> int:
        return leaf_bytes(scope.leaves, self._setting.tensors)

    def _count_cell(self, cell: Part) -> Found:
        read = [
            read_blocks(member, order, block_part(member, order, cell), self._setting)
            for member, order in members_of(self._scope)
        ]
        return self._judged(read, cell)

    def _judged(self, read: Sequence[Blocks], cell: Part) -> Found:
        """What was found in whole scopes; torn blocks are looked for only where a scope is broken."""
        counts = counted(read, count_rows(self._scope), self._allowed)
        return judged(counts, cell.begin, self._allowed)

    def _add_tile(self, member: BoundScope, order: Shape, part: Part, first_leaf: int) -> None:
        blocks = read_blocks(member, order, part, self._setting)
        found = [(SURVIVORS, blocks.survivors()), *blocks.torn(first_leaf)]
        place = common_place(part, member, order)
        with self._lock:
            for row, numbers in found:
                self._counts[row][place] += numbers

    def _mark_chunk(self, region: Region) -> None:
        flags = occupied(self._setting.traffic.load(region))
        place = coarser(Part(region.begin, region.extent), region.leaf.shape)
        with self._lock:
            self._flags[region.leaf][place] |= flags


def leaf_bytes(leaves: Iterable[BoundBlock], tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of the elements that some leaves look at."""
    return sum(prod(leaf.view_shape) * _itemsize(tensors[leaf.tensor]) for leaf in leaves)


def _open_ways(scope: AnyScope, tensors: Mapping[str, StoredTensor], limits: Limits) -> Iterator[Way]:
    """The ways that fit in memory; blocks too large for tiles are few, so that their flags always do."""
    itemsize = max((_itemsize(tensors[leaf.tensor]) for leaf in scope.leaves), default=1)
    each = 2 * itemsize + _FLAG_BYTES
    largest = max(1, limits.memory // (2 * each))
    slab = max(1, min(limits.slab // itemsize, largest))
    together = numel_per_scope(scope)
    if together <= min(largest, _SLABS_A_SCOPE * slab):
        limit = max(slab, together)
        yield Way("cells", limit, limit * each, 0)
    block = max(member.block.numel_per_block for member, _ in members_of(scope))
    held = _COUNT_BYTES * count_rows(scope) * prod(scope.grid_shape)
    if block <= largest and held <= limits.held:
        limit = max(slab, block)
        yield Way("tiles", limit, limit * each, held)
    grids = _GRID_BYTES * sum(prod(leaf.grid_shape) for leaf in scope.leaves)
    if grids <= limits.held or block > largest:
        yield Way("chunks", slab, slab * each, grids)


def _reads(scope: AnyScope, way: Way) -> int:
    """How often the input is read from, about: all pieces are taken for as large as the first."""
    return sum(
        -(-pieces * region.numel // length)
        for pieces, region in _first_boxes(scope, way)
        for _, length in islice(region.runs(), 1)
    )


def _first_boxes(scope: AnyScope, way: Way) -> Iterator[tuple[int, Region]]:
    """What is read first of every leaf, and how many pieces like it there are."""
    if way.kind == "chunks":
        for leaf in scope.leaves:
            for region in islice(_chunks(leaf, way), 1):
                yield -(-prod(leaf.view_shape) // region.numel), region
    elif way.kind == "tiles":
        for member, _ in members_of(scope):
            for part in islice(_tiles(member, way), 1):
                pieces = -(-prod(member.block.grid_shape) // part.numel)
                yield from ((pieces, region) for region in regions_of(member.block, part).values())
    else:
        for cell in islice(cells(scope, way.limit), 1):
            pieces = -(-prod(scope.grid_shape) // cell.numel)
            for member, order in members_of(scope):
                part = block_part(member, order, cell)
                yield from ((pieces, region) for region in regions_of(member.block, part).values())


def _tiles(member: BoundScope, way: Way) -> Iterator[Part]:
    """A member's block grid in parts of whole blocks, each of whole scopes or in a single one."""
    block = member.block
    places = way.limit // max(1, block.numel_per_block)
    return cut(whole_part(block.grid_shape), outermost_first(block), places, member.shape)


def _chunks(leaf: BoundBlock, way: Way) -> Iterator[Region]:
    """A leaf's elements in the order of the storage, each time those of whole blocks or in a single one."""
    for part in cut(whole_part(leaf.view_shape), storage_order(leaf), way.limit, leaf.shape):
        yield Region(leaf, part.begin, part.extent)


def _itemsize(stored: StoredTensor) -> int:
    return DTYPES[stored.dtype].itemsize
