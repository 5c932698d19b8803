"""Regions: which elements of which tensors are worked on at one time, and where they lie in the storage.

Owns the one cutter of grids and views, the way from a common grid of scopes over orders to members and
leaves, from places in a view to runs of stored elements, and limits: what a run may hold in memory, and how
large its pieces are. Pure arithmetic on bound shapes: reads nothing. Called by all passes.
"""

from __future__ import annotations

import heapq
from itertools import product
from operator import mul, sub
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.grids import Shape, identity_order, inverse_order, permute, prod
from sparseprune.errors import SparsepruneError, enough, size
from sparseprune.execution.devices import LANES
from sparseprune.spec import BoundBlock, BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.spec import BoundBlockCoupling, BoundScopeCoupling

    AnyBlock = BoundBlock | BoundBlockCoupling
    AnyScope = BoundScope | BoundScopeCoupling

INTERPRETER = 100 << 20  # Python with numpy, numba and compiled loops, measured on the CPU
TORCH = 220 << 20  # what torch 2.13 for the CPU adds, with the first thread that it works in; measured
TORCH_THREAD = 8 << 20  # that the allocator keeps for each further thread in which torch worked, measured
SLAB_BYTES = 1 << 20  # measured: the results from a slab stay in the cache (tests/benchmarks/README.md)
TILE_ELEMENTS = 1 << 18  # that the torch engine gets at one time where scopes are small
DEVICE_TILE_ELEMENTS = 1 << 24  # the same on a device, which takes long to begin anything
_ENGINE_BYTES = 64  # that the torch engine needs for each element of a tile: keys, norms, masks, positions
# That the host needs for each where a device works on it: a pattern and a mask; or also numbers that rank it.
_PATTERN_BYTES, _SCORED_BYTES = 12, 48
_HELD_SHARE = 4  # one part in so many is for scores that are kept while a job runs
_LEAST = 16 * SLAB_BYTES  # that must be left for work
# Resident bytes, measured with 50,000 tensors: of each tensor while headers are read, and from then on; of
# each that is pruned, of each scope, of each mask; the text of a header is there three times, in parts.
_READ, _KEPT, _REACHED, _SCOPE, _MASK, _TEXTS = 510, 160, 600, 600, 190, 3
_RESIZED = 2700  # of each tensor where slices are cut out: masks that are read back, shapes, places and cuts


class Resident(Struct, frozen=True):
    """What a run holds of all tensors from the beginning to the end: `nbytes` of so many."""

    tensors: int = 0
    nbytes: int = 0

    @classmethod
    def of(
        cls, tensors: int, header_bytes: int, *, reached: int, scopes: int, masks: bool, resized: bool
    ) -> Resident:
        """For `tensors` in headers of so many bytes; `reached` counts those that are worked on.

        `masks`: these get a file of masks. `scopes` are the parts of the work. `resized`: slices will be cut
        out.
        """
        mask = _MASK + header_bytes // max(1, tensors) if masks else 0
        each = _KEPT + (_RESIZED if resized else 0)
        kept = each * tensors + (_REACHED + mask) * reached + _SCOPE * scopes
        return cls(tensors, _TEXTS * header_bytes + max(kept, _READ * tensors))


class Limits(Struct, frozen=True):
    """`memory` bytes may be in flight, over all chunks and what jobs keep; a slab has about `slab` bytes.

    The interpreter is not counted, nor are the `resident` bytes that all tensors take from first to last.
    Where the torch engine works on a device, `device` bytes of that are free, and tiles lie there.
    """

    memory: int
    slab: int = SLAB_BYTES
    tile: int = TILE_ELEMENTS
    resident: int = 0
    device: int | None = None

    def element_bytes(self, *, patterns: bool) -> int:
        """What the host needs for each element of a tile; `patterns` alone rank it, or numbers of float64."""
        if self.device is None:
            return _ENGINE_BYTES
        return _PATTERN_BYTES if patterns else _SCORED_BYTES

    def largest_tile(self, *, patterns: bool = False) -> int:
        """The elements that one tile of the torch engine may have at most."""
        on_host = (self.memory - self.held) // self.element_bytes(patterns=patterns)
        return max(1, on_host if self.device is None else min(on_host, self.device // _ENGINE_BYTES))

    def usual_tile(self, *, patterns: bool = False) -> int:
        """The elements that a tile has where scopes are small; a device works on several at one time."""
        most = self.largest_tile(patterns=patterns)
        return min(self.tile, most if self.device is None else max(1, most // LANES))

    @property
    def held(self) -> int:
        """Bytes of block scores that one task may hold."""
        return self.memory // _HELD_SHARE


class Resources(Struct, frozen=True):
    """How many `threads` share the work, and the bytes of `memory` that chunks and jobs may take."""

    threads: int
    memory: int

    @classmethod
    def of(cls, limits: Limits, workers: int, *, item: int, held: int, uses_torch: bool) -> Resources:
        """Up to `workers` threads, where the largest chunk and the largest job take so many bytes.

        What torch keeps for each thread beyond the first is taken from the memory. There are no more threads
        than have room for that and for a tile beside the largest item.
        """
        if not uses_torch:
            return cls(workers, limits.memory)
        each = TORCH_THREAD + min(item, limits.usual_tile() * limits.element_bytes(patterns=False))
        threads = min(workers, 1 + max(0, limits.memory - item - held) // each)
        return cls(threads, limits.memory - TORCH_THREAD * (threads - 1))


def tile_bytes(elements: int) -> int:
    """Memory that the torch engine takes for so many elements, of the host or of a device."""
    return _ENGINE_BYTES * elements


def memory_for_tile(elements: int) -> int:
    """The memory of a process in which one tile of the torch engine may have so many elements."""
    left = -(-tile_bytes(elements + 1) * _HELD_SHARE // (_HELD_SHARE - 1))
    return INTERPRETER + TORCH + left


def limits_of(
    memory: int, *, uses_torch: bool, resident: Resident = Resident(), device: int | None = None
) -> Limits:
    """The limits of a run that may take so many bytes of memory, the interpreter and `resident` among them.

    `device` bytes of a device are free, None where there is none or it does nothing. SparsepruneError where
    the interpreter and `resident` alone would not fit.
    """
    base = INTERPRETER + (TORCH if uses_torch else 0)
    left = memory - base - resident.nbytes
    needed = base + resident.nbytes + _LEAST
    if left >= _LEAST:
        tile = TILE_ELEMENTS if device is None else DEVICE_TILE_ELEMENTS
        return Limits(left, tile=tile, resident=resident.nbytes, device=device)
    python, takes = ("Python and torch", "take") if uses_torch else ("Python", "takes")
    if resident.nbytes > _LEAST:
        raise SparsepruneError(
            f"--memory {size(memory)}: this checkpoint's {resident.tensors:,} tensors alone take about "
            f"{size(resident.nbytes)} beside {python}, which {takes} {size(base)}; give "
            f"--memory {enough(needed)}"
        )
    raise SparsepruneError(
        f"--memory {size(memory)}: this run needs {size(needed)}, of which {python} {takes} {size(base)}; "
        f"give --memory {enough(needed)}"
    )


Run = tuple[int, int]
"""Neighbouring elements of a stored tensor: the number of the first one, and how many."""


class Part(Struct, frozen=True):
    """`extent` places in each dimension of some grid, from `begin` on."""

    begin: Shape
    extent: Shape

    @property
    def numel(self) -> int:
        return prod(self.extent)

    def scaled(self, factor: Shape) -> Part:
        """The same part of a grid whose places are cut in `factor` each."""
        return Part(tuple(map(mul, self.begin, factor)), tuple(map(mul, self.extent, factor)))

    def behind(self, order: Shape) -> Part:
        """The part of a member's grid that `order` permutes onto this part of the common grid."""
        back = inverse_order(order)
        return Part(permute(self.begin, back), permute(self.extent, back))

    def on_grid(self, units: Shape) -> tuple[slice, ...]:
        """Where the units of which the part has any place lie on their own grid."""
        ends = zip(self.begin, self.extent, units, strict=True)
        return tuple(slice(begin // unit, (begin + size - 1) // unit + 1) for begin, size, unit in ends)

    def within(self, outer: Shape) -> Part:
        """The same part, counted from `outer`."""
        return Part(tuple(map(sub, self.begin, outer)), self.extent)


class Region(Struct, frozen=True):
    """`extent` places in each dimension of a leaf's view, from `begin` on; the leaf names the tensor."""

    leaf: BoundBlock
    begin: Shape
    extent: Shape

    @property
    def numel(self) -> int:
        return prod(self.extent)

    @property
    def first(self) -> int:
        """The stored element of the region's first place."""
        steps = zip(self.begin, self.leaf.view_stride, strict=True)
        return self.leaf.view_offset + sum(place * step for place, step in steps)

    @property
    def storage_order(self) -> Shape:
        """The dimensions from the outermost in the storage to the innermost."""
        return storage_order(self.leaf)

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Where the blocks of which the region has a part lie on the leaf's block grid."""
        return Part(self.begin, self.extent).on_grid(self.leaf.shape)

    def runs(self) -> Iterator[Run]:
        """The stored elements of the region, in the order of the storage, neighbours joined."""
        if not self.numel:
            return
        stride = self.leaf.view_stride
        dims = [dim for dim in self.storage_order if self.extent[dim] > 1]
        length = 1
        while dims and stride[dims[-1]] == length:
            length *= self.extent[dims.pop()]
        ranges = (range(0, self.extent[dim] * stride[dim], stride[dim]) for dim in dims)
        first = self.first
        yield from ((first + sum(steps), length) for steps in product(*ranges))


def cut(part: Part, dims: Sequence[int], places: int, units: Shape = ()) -> Iterator[Part]:
    """A part of a grid in smaller ones of about so many places (at least 1), in the order of `dims`.

    Cut along the first of `dims` first. In every dimension a smaller part has whole `units`, counted from the
    part's begin, or lies in a single one; without units it has no more places than were asked for.

    >>> [one.extent for one in cut(whole_part((1, 10)), (0, 1), 7, (1, 5))]
    [(1, 5), (1, 5)]
    >>> [one.begin for one in cut(whole_part((2, 2)), (1, 0), 1)]
    [(0, 0), (1, 0), (0, 1), (1, 1)]
    """
    total = part.numel
    if not total:
        return
    pieces = [[pair] for pair in zip(part.begin, part.extent, strict=True)]
    for dim in dims:
        if total <= max(1, places):
            break
        size, unit = part.extent[dim], units[dim] if units else 1
        behind = total // size
        step = max(1, places // behind)
        span = size if step >= unit else unit
        step -= step % unit if step >= unit else 0
        pieces[dim] = [
            (part.begin[dim] + begin, min(step, first + span - begin))
            for first in range(0, size, span)
            for begin in range(first, first + span, step)
        ]
        total = behind * step
    order = (*dims, *(dim for dim in range(len(pieces)) if dim not in dims))
    back = inverse_order(order)
    for chosen in product(*(pieces[dim] for dim in order)):
        yield Part(tuple(chosen[dim][0] for dim in back), tuple(chosen[dim][1] for dim in back))


def whole_part(grid: Shape) -> Part:
    return Part((0,) * len(grid), grid)


def whole_region(leaf: BoundBlock) -> Region:
    """All places of a leaf's view."""
    return Region(leaf, (0,) * len(leaf.view_shape), leaf.view_shape)


def storage_order(leaf: BoundBlock) -> Shape:
    """The dimensions of a view from the outermost in the storage to the innermost; stable among equals."""
    return tuple(sorted(range(len(leaf.view_shape)), key=lambda dim: -leaf.view_stride[dim]))


def flat_leaf(leaf: BoundBlock) -> BoundBlock:
    """A view that is a row-major look at neighbouring elements, seen as one dimension."""
    return replace(leaf, view_shape=(prod(leaf.view_shape),), view_stride=(1,), shape=(1,))


def whole_run(stored: StoredTensor) -> BoundBlock:
    """All elements of a tensor, seen as one dimension."""
    return BoundBlock(stored.name, stored.name, (stored.numel,), (1,), 0, (1,))


def is_row_major_run(leaf: BoundBlock) -> bool:
    """Whether a view is a row-major look at neighbouring elements, the whole tensor or a part of it."""
    return all(
        size == 1 or leaf.view_stride[dim] == prod(leaf.view_shape[dim + 1 :])
        for dim, size in enumerate(leaf.view_shape)
    )


def is_run(part: Shape, whole: Shape) -> bool:
    """Whether parts of a row-major whole are runs of it: full behind some dimension, 1 before it.

    >>> is_run((1, 2, 6), (3, 4, 6)), is_run((2, 2, 6), (3, 4, 6))
    (True, False)
    """
    sizes = [(a, b) for a, b in zip(part, whole, strict=True) if b > 1]
    while sizes and sizes[0][0] == 1:
        sizes.pop(0)
    return all(a == b for a, b in sizes[1:])


def gaps(numel: int, leaves: Iterable[BoundBlock]) -> Iterator[Run]:
    """Of the elements of a stored tensor those that none of some disjoint leaves reaches, as runs."""
    end = 0
    for first, count in heapq.merge(*map(_ascending, leaves)):
        if first > end:
            yield end, first - end
        end = first + count
    if end < numel:
        yield end, numel - end


def members_of(scope: AnyScope) -> tuple[tuple[BoundScope, Shape], ...]:
    """The member scopes, each with the order that permutes its grid onto the common one."""
    if isinstance(scope, BoundScope):
        return ((scope, identity_order(len(scope.shape))),)
    return tuple(zip(scope.members, scope.orders, strict=True))


def leaves_of(block: AnyBlock) -> tuple[tuple[BoundBlock, Shape], ...]:
    """The leaves, each with the order that permutes its grid onto the common one."""
    if isinstance(block, BoundBlock):
        return ((block, identity_order(len(block.shape))),)
    return tuple(zip(block.members, block.orders, strict=True))


def alone(scope: AnyScope) -> AnyScope:
    """The same blocks, each in a scope of its own: what a threshold asks about."""
    if isinstance(scope, BoundScope):
        return replace(scope, shape=(1,) * len(scope.shape), transposable=False)
    return replace(scope, members=tuple(alone(member) for member in scope.members))


def numel_per_scope(scope: AnyScope) -> int:
    """How many elements the blocks of one scope have, over all members."""
    return sum(member.blocks_per_scope * member.block.numel_per_block for member, _ in members_of(scope))


def regions_in(leaf: BoundBlock, elements: int) -> Iterator[Region]:
    """A view in regions of about so many elements, of whole blocks or in one, in the order of the storage."""
    for part in cut(whole_part(leaf.view_shape), storage_order(leaf), elements, leaf.shape):
        yield Region(leaf, part.begin, part.extent)


def cells(scope: AnyScope, limit: int) -> Iterator[Part]:
    """The grid of scopes in parts of at most `limit` elements, or of one scope where that has more."""
    member, order = members_of(scope)[0]
    dims = _outermost_first(member.block, order)
    yield from cut(whole_part(scope.grid_shape), dims, limit // max(1, numel_per_scope(scope)))


def tiles(member: BoundScope, part: Part, limit: int) -> Iterator[Part]:
    """A part of a member's block grid in parts of at most `limit` elements, or of one block."""
    dims = _outermost_first(member.block, identity_order(len(part.extent)))
    yield from cut(part, dims, limit // max(1, member.block.numel_per_block))


def block_part(member: BoundScope, order: Shape, cell: Part) -> Part:
    """The blocks of a member, on its own block grid, that belong to a part of the common grid of scopes."""
    return cell.behind(order).scaled(member.shape)


def regions_of(block: AnyBlock, part: Part) -> dict[BoundBlock, Region]:
    """The elements of a part of a block grid, leaf by leaf."""
    regions = {}
    for leaf, order in leaves_of(block):
        elements = part.behind(order).scaled(leaf.shape)
        regions[leaf] = Region(leaf, elements.begin, elements.extent)
    return regions


def regions_at(scope: AnyScope, cell: Part) -> dict[BoundBlock, Region]:
    """The elements of a part of the grid of scopes, leaf by leaf."""
    return {
        leaf: region
        for member, order in members_of(scope)
        for leaf, region in regions_of(member.block, block_part(member, order, cell)).items()
    }


def grid_region(block: AnyBlock, part: Part) -> Region:
    """The numbers that a tensor of a block grid's shape holds for a part of it."""
    grid = block.grid_shape
    steps = tuple(prod(grid[dim + 1 :]) for dim in range(len(grid)))
    leaf = BoundBlock(block.label, block.label, grid, steps, 0, (1,) * len(grid))
    return Region(leaf, part.begin, part.extent)


class Sweep(Struct, frozen=True):
    """One way through a leaf's elements, in the order of the storage, that sums them up block by block.

    The sum over each block still runs over the fixed tree of pairs: the last dimension of a block is summed
    first. A chunk has one place of every `outer` dimension, some places of dimension `cut`, all of the
    others, about `elements` in all. `inside`: chunks end inside blocks. `numbers` are held until all of it
    was read.
    """

    leaf: BoundBlock
    elements: int
    outer: Shape
    cut: int
    inside: bool
    numbers: int

    def regions(self) -> Iterator[Region]:
        """All elements, in the order of the storage."""
        return regions_in(self.leaf, self.elements)


def sweep_of(leaf: BoundBlock, elements: int) -> Sweep | None:
    """The sweep of a leaf in chunks of about so many elements, None where none keeps the order of the sums.

    >>> from sparseprune.spec import BoundBlock
    >>> columns = sweep_of(BoundBlock("w", "w", (64, 16), (16, 1), 0, (64, 1)), 256)
    >>> columns.inside, next(columns.regions()).extent
    (True, (16, 16))
    """
    order = storage_order(leaf)
    if not order:
        return None
    level, behind = 0, prod(leaf.view_shape) // max(1, leaf.view_shape[order[0]])
    while behind > elements:
        level += 1
        behind //= leaf.view_shape[order[level]]
    outer, at = order[:level], order[level]
    extent = leaf.shape[at]
    inside = extent > 1 and extent * behind > elements
    fused = [dim for dim, size in enumerate(leaf.shape) if size > 1]
    inner = [dim for dim in fused if dim not in outer]
    open_dims = [dim for dim in fused if dim in outer]
    if open_dims and inner and max(open_dims) > min(inner):
        return None
    waiting = prod(leaf.shape[dim] for dim in inner if inside and dim < at)
    unfinished = prod(leaf.shape[dim] for dim in open_dims)
    levels = 1 + (extent.bit_length() if inside else 0)
    numbers = prod(leaf.grid_shape) * (unfinished + waiting * levels)
    return Sweep(leaf, elements, outer, at, inside, numbers)


def _ascending(leaf: BoundBlock) -> Iterable[Run]:
    """The runs of a leaf by their first elements; sorted where rows lie between each other."""
    runs = whole_region(leaf).runs()
    reach = 0  # from the first to the last element of what lies further in
    for dim in reversed(storage_order(leaf)):
        if leaf.view_shape[dim] > 1:
            if leaf.view_stride[dim] <= reach:
                return sorted(runs)
            reach += (leaf.view_shape[dim] - 1) * leaf.view_stride[dim]
    return runs


def _outermost_first(block: AnyBlock, order: Shape) -> Shape:
    """The dimensions of a common grid of scopes, as the first leaf's dimensions lie in its storage."""
    leaf, own = leaves_of(block)[0]
    return tuple(order.index(own.index(dim)) for dim in storage_order(leaf))
