"""Numbers of blocks: sums or maxima of their elements, and their order in scopes.

Owns the way from the chunks of a sweep to one number a block, in the order that the tree of pairs wants,
and the order of ties: scopes row-major, in each the blocks of earlier members first. Compiled loops do the
usual shapes, numpy does the rest. Called by two_pass and removal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.sums import ColumnSums, TreeSum, run_sums, tree_sum
from sparseprune.execution.ranking import Elements
from sparseprune.execution.regions import leaves_of, members_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Format
    from sparseprune.execution.regions import AnyScope, Region, Sweep
    from sparseprune.execution.tensor_io import Loaded
    from sparseprune.spec import BoundBlock

    Floats = NDArray[np.float64]


class LeafMaxima:
    """The largest magnitude of each block; chunks may come in any order."""

    def __init__(self, sweep: Sweep) -> None:
        self._maxima = np.zeros(sweep.leaf.grid_shape)

    def add(self, loaded: Loaded, elements: Elements | None) -> None:
        """Take in a chunk, whose elements count as `elements` say, as themselves by default."""
        pairs, blocks = _split(loaded.region)
        magnitudes = _magnitudes(loaded, elements).reshape(pairs)
        top = magnitudes.max(axis=tuple(range(1, len(pairs), 2)))
        self._maxima[blocks] = np.maximum(self._maxima[blocks], top)

    def result(self) -> Floats:
        """Float64 on the leaf's block grid."""
        return self._maxima


class LeafSums:
    """The sum of |x| ** power over each block, of x * 2 ** -exponent where exponents of blocks are given.

    Chunks come in the order of the sweep. Sums are kept in pairs of dimensions, the leaf's block grid and
    what is still open of a block.
    """

    def __init__(self, sweep: Sweep, power: int, exponents: NDArray[np.int64] | None = None) -> None:
        leaf = sweep.leaf
        waiting = [size if dim in sweep.outer else 1 for dim, size in enumerate(leaf.shape)]
        self._sweep = sweep
        self._power = power
        self._exponents = exponents
        self._sums = np.zeros([size for pair in zip(leaf.grid_shape, waiting, strict=True) for size in pair])
        self._tree: TreeSum | ColumnSums | None = None

    def add(self, loaded: Loaded, elements: Elements | None) -> None:
        """Take in the next chunk, whose elements count as `elements` say, as themselves by default."""
        region, cut = loaded.region, self._sweep.cut
        if not self._sweep.inside:
            self._keep(region, self._reduced(loaded, elements, first=0))
            return
        if self._tree is None:
            self._tree = self._begun(loaded, elements)
        if isinstance(self._tree, ColumnSums):
            self._tree.push(loaded.flat.reshape(region.extent[cut], -1))
        else:
            self._tree.push(np.moveaxis(self._reduced(loaded, elements, first=cut + 1), 2 * cut + 1, 0))
        if (region.begin[cut] + region.extent[cut]) % region.leaf.shape[cut] == 0:
            self._finish(region, self._tree)
            self._tree = None

    def result(self) -> Floats:
        """Float64 on the leaf's block grid, once everything has passed."""
        sums = self._sums
        for dim in reversed(range(len(self._sweep.leaf.shape))):
            sums = _summed(sums, 2 * dim + 1)
        return sums.reshape(self._sweep.leaf.grid_shape)

    def _loop(self, loaded: Loaded, elements: Elements | None) -> Format | None:
        """The format that compiled loops may read the chunk by, None where numpy has to do it."""
        plain = elements is None and self._exponents is None and loaded.view.flags.c_contiguous
        return FORMATS.get(loaded.dtype) if plain else None

    def _begun(self, loaded: Loaded, elements: Elements | None) -> TreeSum | ColumnSums:
        region, cut = loaded.region, self._sweep.cut
        form = self._loop(loaded, elements)
        others = [size for dim, size in enumerate(region.leaf.shape) if dim != cut]
        is_matrix = prod(tuple(others)) == 1 and prod(region.extent[:cut]) == 1
        if form is not None and is_matrix:
            return ColumnSums(
                form, loaded.flat.size // region.extent[cut], region.leaf.shape[cut], self._power
            )
        return TreeSum()

    def _finish(self, region: Region, tree: TreeSum | ColumnSums) -> None:
        """A block is complete along the dimension that was cut; the dimensions before it follow."""
        cut = self._sweep.cut
        pairs, _ = _split(region)
        pairs[2 * cut + 1] = 1
        total = tree.total()
        sums = total.reshape(pairs) if isinstance(tree, ColumnSums) else np.expand_dims(total, 2 * cut + 1)
        for dim in reversed(range(cut)):
            sums = _summed(sums, 2 * dim + 1)
        self._keep(region, sums)

    def _reduced(self, loaded: Loaded, elements: Elements | None, first: int) -> Floats:
        """The chunk in pairs of grid and block dimensions, summed over block dimensions from `first` on."""
        pairs, blocks = _split(loaded.region)
        form = self._loop(loaded, elements)
        if form is not None and pairs[-1] > 1 and first < len(pairs) // 2:
            run, pairs[-1] = pairs[-1], 1
            sums = run_sums(loaded.flat, form, run, self._power).reshape(pairs)
        else:
            sums = _magnitudes(loaded, elements).reshape(pairs)
            if self._exponents is not None:
                scale = np.ldexp(1.0, -self._exponents[blocks].astype(np.int32))
                sums = sums * scale.reshape([size for count in scale.shape for size in (count, 1)])
            sums = sums * sums if self._power == 2 else sums
        for dim in reversed(range(first, len(pairs) // 2)):
            sums = _summed(sums, 2 * dim + 1)
        return sums

    def _keep(self, region: Region, sums: Floats) -> None:
        """Put the sums of a chunk where its blocks and its places of outer dimensions are."""
        places: list[slice] = []
        for dim, (begin, size, extent) in enumerate(
            zip(region.begin, region.extent, region.leaf.shape, strict=True)
        ):
            places.append(slice(begin // extent, (begin + size - 1) // extent + 1))
            place = begin % extent if dim in self._sweep.outer else 0
            places.append(slice(place, place + 1))
        self._sums[tuple(places)] = sums


def _summed(sums: Floats, axis: int) -> Floats:
    """Summed over one axis, which stays with one place."""
    return sums if sums.shape[axis] == 1 else np.expand_dims(tree_sum(sums, axis), axis)


def _split(region: Region) -> tuple[list[int], tuple[slice, ...]]:
    """A region in pairs, blocks and elements of a block, for each dimension; and its blocks."""
    pairs: list[int] = []
    blocks: list[slice] = []
    for begin, size, extent in zip(region.begin, region.extent, region.leaf.shape, strict=True):
        whole = size % extent == 0
        pairs += [size // extent, extent] if whole else [1, size]
        blocks.append(slice(begin // extent, (begin + size - 1) // extent + 1))
    return pairs, tuple(blocks)


def _magnitudes(loaded: Loaded, elements: Elements | None) -> Floats:
    ranked = Elements(loaded.view, loaded.dtype) if elements is None else elements
    return ranked.magnitudes()


def by_scope(scope: AnyScope, grids: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Numbers on each member's block grid as (scopes, blocks per scope), in the order of ties."""
    parts = []
    for (member, order), grid in zip(members_of(scope), grids, strict=True):
        pairs = [size for pair in zip(member.grid_shape, member.shape, strict=True) for size in pair]
        rank = len(order)
        split = grid.reshape(pairs).transpose((*(2 * dim for dim in order), *range(1, 2 * rank, 2)))
        parts.append(split.reshape(prod(scope.grid_shape), prod(member.shape)))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def by_leaf(scope: AnyScope, keep: NDArray[Any]) -> dict[BoundBlock, NDArray[Any]]:
    """What `by_scope` does, undone, for each leaf on its own block grid."""
    scopes = keep.reshape(prod(scope.grid_shape), scope.blocks_per_scope)
    decisions = {}
    done = 0
    for member, order in members_of(scope):
        part = scopes[:, done : done + member.blocks_per_scope]
        done += member.blocks_per_scope
        rank = len(order)
        split = part.reshape((*scope.grid_shape, *member.shape)).transpose(
            [dim for own in range(rank) for dim in (order.index(own), rank + own)]
        )
        grid = split.reshape(member.block.grid_shape)
        for leaf, own_order in leaves_of(member.block):
            decisions[leaf] = grid.transpose(inverse(own_order))
    return decisions


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    """The order that undoes another one."""
    return tuple(sorted(range(len(order)), key=order.__getitem__))
