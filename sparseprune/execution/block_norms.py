"""Block norms: sums or maxima of blocks are made as tensors pass by, over the tree of engine.scoring.

Then all blocks are decided, and every tensor is cut as it passes by again. Compiled loops and numpy, no
torch. Strategy.py chooses.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import interleaved, inverse_order, prod
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_blocks, select_keys
from sparseprune.engine.kernels.sums import ColumnSums, TreeSum, run_sums, tree_sum
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.ranking import Elements, Ranking, refuse_nonfinite
from sparseprune.execution.regions import Region, leaves_of, members_of, sweep_of, whole_part
from sparseprune.execution.tiles import RegionPass, region_chunks
from sparseprune.execution.within import keep_among, left_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Format
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock, AnyScope, Sweep
    from sparseprune.execution.strategy import BlockNorms
    from sparseprune.execution.tensor_io import Loaded, Mask, TensorIO
    from sparseprune.spec import BoundBlock

    Floats = NDArray[np.float64]
    Counts = NDArray[np.int64]
    Cut = tuple[int, int]


class LeafMaxima:
    """The largest magnitude of each block; chunks may come in any order."""

    def __init__(self, sweep: Sweep) -> None:
        self._maxima = np.zeros(sweep.leaf.grid_shape)

    def add(self, loaded: Loaded, elements: Elements | None) -> None:
        """Take in a chunk, whose elements count as `elements` say, as themselves by default."""
        pairs, blocks = block_pairs(loaded.region), loaded.region.blocks
        top = _magnitudes(loaded, elements).reshape(pairs).max(axis=tuple(range(1, len(pairs), 2)))
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
        waiting = tuple(size if dim in sweep.outer else 1 for dim, size in enumerate(leaf.shape))
        self._sweep = sweep
        self._power = power
        self._exponents = exponents
        self._sums = np.zeros(interleaved(leaf.grid_shape, waiting))
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
        sums = _summed(self._sums, range(len(self._sweep.leaf.shape)))
        return sums.reshape(self._sweep.leaf.grid_shape)

    def _loop(self, loaded: Loaded, elements: Elements | None) -> Format | None:
        """The format that compiled loops may read the chunk by, None where numpy has to do it."""
        plain = elements is None and self._exponents is None and loaded.view.flags.c_contiguous
        return FORMATS.get(loaded.dtype) if plain else None

    def _begun(self, loaded: Loaded, elements: Elements | None) -> TreeSum | ColumnSums:
        region, cut = loaded.region, self._sweep.cut
        form, height = self._loop(loaded, elements), region.leaf.shape[cut]
        is_matrix = region.leaf.numel_per_block == height and prod(region.extent[:cut]) == 1
        if form is not None and is_matrix:
            return ColumnSums(form, loaded.flat.size // region.extent[cut], height, self._power)
        return TreeSum()

    def _finish(self, region: Region, tree: TreeSum | ColumnSums) -> None:
        """A block is complete along the dimension that was cut; the dimensions before it follow."""
        cut = self._sweep.cut
        pairs = block_pairs(region)
        pairs[2 * cut + 1] = 1
        total = tree.total()
        sums = total.reshape(pairs) if isinstance(tree, ColumnSums) else np.expand_dims(total, 2 * cut + 1)
        self._keep(region, _summed(sums, range(cut)))

    def _reduced(self, loaded: Loaded, elements: Elements | None, first: int) -> Floats:
        """The chunk in pairs of grid and block dimensions, summed over block dimensions from `first` on."""
        pairs = block_pairs(loaded.region)
        form = self._loop(loaded, elements)
        if form is not None and pairs[-1] > 1 and first < len(pairs) // 2:
            run, pairs[-1] = pairs[-1], 1
            sums = run_sums(loaded.flat, form, run, self._power).reshape(pairs)
        else:
            sums = _magnitudes(loaded, elements).reshape(pairs)
            if self._exponents is not None:
                scale = np.ldexp(1.0, -self._exponents[loaded.region.blocks].astype(np.int32))
                sums = sums * scale.reshape(interleaved(scale.shape, (1,) * scale.ndim))
            sums = sums * sums if self._power == 2 else sums
        return _summed(sums, range(first, len(pairs) // 2))

    def _keep(self, region: Region, sums: Floats) -> None:
        """Put the sums of a chunk where its blocks and its places of outer dimensions are."""
        places: list[slice] = []
        for dim, (blocks, begin, extent) in enumerate(
            zip(region.blocks, region.begin, region.leaf.shape, strict=True)
        ):
            place = begin % extent if dim in self._sweep.outer else 0
            places += [blocks, slice(place, place + 1)]
        self._sums[tuple(places)] = sums


def _summed(sums: Floats, dims: range) -> Floats:
    """Pairs of grid and block dimensions, summed over some block dimensions, which stay with one place."""
    for dim in reversed(dims):
        if sums.shape[2 * dim + 1] > 1:
            sums = np.expand_dims(tree_sum(sums, 2 * dim + 1), 2 * dim + 1)
    return sums


def block_pairs(region: Region) -> list[int]:
    """A region's extents in pairs, blocks and elements of a block, for each dimension."""
    pairs: list[int] = []
    for size, extent in zip(region.extent, region.leaf.shape, strict=True):
        pairs += [size // extent, extent] if size % extent == 0 else [1, size]
    return pairs


def _magnitudes(loaded: Loaded, elements: Elements | None) -> Floats:
    return (elements or Elements(loaded.view, loaded.dtype)).magnitudes()


def by_scope(scope: AnyScope, grids: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Numbers on each member's block grid as (scopes, blocks per scope), in the order of ties."""
    parts = []
    for (member, order), grid in zip(members_of(scope), grids, strict=True):
        split = grid.reshape(interleaved(member.grid_shape, member.shape))
        ordered = split.transpose([2 * dim for dim in order] + [2 * dim + 1 for dim in range(len(order))])
        parts.append(ordered.reshape(prod(scope.grid_shape), prod(member.shape)))
    return np.ascontiguousarray(np.concatenate(parts, axis=1))


def by_leaf(scope: AnyScope, keep: NDArray[Any]) -> dict[BoundBlock, NDArray[Any]]:
    """What `by_scope` does, undone, for each leaf on its own block grid."""
    scopes = keep.reshape(prod(scope.grid_shape), scope.blocks_per_scope)
    decisions = {}
    done = 0
    for member, order in members_of(scope):
        part = scopes[:, done : done + member.blocks_per_scope]
        done += member.blocks_per_scope
        inner = tuple(range(len(order), 2 * len(order)))
        split = part.reshape((*scope.grid_shape, *member.shape))
        grid = split.transpose(interleaved(inverse_order(order), inner)).reshape(member.block.grid_shape)
        for leaf, own in leaves_of(member.block):
            decisions[leaf] = grid.transpose(inverse_order(own))
    return decisions


_MOST_EXPONENT = 1000
_ALL_BITS = (1 << 64) - 1


@dataclass(frozen=True, slots=True, eq=False)
class ReduceBlocks(Pass):
    """Scores of blocks: `sums` of powers, or `maxima`, leaf by leaf; or `ready` ones, with nothing to reduce.

    Sums are of x * 2 ** -exponent where `exponents` are given, an array for each leaf. Blocks are cut then,
    if `cuts` says so; else their flags are the result, 1 for those that survive, scope after scope.
    """

    task: Task
    strategy: BlockNorms
    kind: str
    cuts: bool
    exponents: tuple[NDArray[np.int64], ...] = ()

    @property
    def decides(self) -> str:
        return "decision"

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        """A leaf each, read from its beginning to its end: the order is that of the tree of sums."""
        for number in range(1 if self.kind == "ready" else len(self.task.instance.scope.leaves)):
            yield Chunk(number, memory=self.strategy.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        ranking = Ranking(self.task, io)
        if self.kind == "ready":
            blocks = [member.block for member, _ in members_of(self.task.instance.scope)]
            scores = [ranking.block_scores(block, whole_part(block.grid_shape)) for block in blocks]
            leaves = self.task.instance.scope.leaves if self.task.within else ()
            return scores, [left_in(self.task, leaf, self.strategy.elements, io) for leaf in leaves]
        sweep = _sweep(self.task.instance.scope.leaves[chunk.about], self.strategy)
        exponents = self.exponents[chunk.about] if self.exponents else None
        found = LeafMaxima(sweep) if self.kind == "maxima" else LeafSums(sweep, int(ranking.norm), exponents)
        for region in sweep.regions():
            loaded = io.inside(io.load(region), self.task.within)
            elements = ranking.elements(loaded)
            if not ranking.prunes_nonfinite:
                refuse_nonfinite(loaded, elements)
            found.add(loaded, elements)
            io.passed(loaded.flat.nbytes, sweep.leaf.tensor)
        left = left_in(self.task, sweep.leaf, sweep.elements, io) if self.task.within else None
        return found.result(), left

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | Decision:
        scope = self.task.instance.scope
        ranking = Ranking(self.task, io)
        if self.kind == "ready":
            ((scores, left),) = partials
            return self._decision(scores, left, io)
        blocks = [member.block for member, _ in members_of(scope)]
        numbers, left = zip(*partials, strict=True)
        found = dict(zip(scope.leaves, numbers, strict=True))
        if self.kind == "sums":
            exponents = dict(zip(scope.leaves, self.exponents, strict=False))
            norms = [_norms(one, found, exponents, int(ranking.norm)) for one in blocks]
            return self._decision(norms, left, io)
        tops = [_fused(block, found, np.maximum) for block in blocks]
        if math.isinf(ranking.norm):
            return self._decision(tops, left, io)
        exponents = {
            leaf: _exponents(top).transpose(inverse_order(order))
            for top, block in zip(tops, blocks, strict=True)
            for leaf, order in leaves_of(block)
        }
        return dataclasses.replace(
            self, kind="sums", exponents=tuple(exponents[leaf] for leaf in scope.leaves)
        )

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        scope = self.task.instance.scope
        blocks = prod(scope.grid_shape) * scope.blocks_per_scope
        if not isinstance(value, np.ndarray) or value.size != blocks:
            return None
        if not self.cuts:
            return Known(value)
        keep = by_leaf(scope, value)
        return CutBlocks(self.task, self.strategy, tuple(keep[leaf] for leaf in scope.leaves))

    def _decision(self, scores: Sequence[Floats], left: Sequence[Mask], io: TensorIO) -> Decision:
        """Bytes, scope after scope in the order of ties: 1 for the blocks that survive.

        `left` has, within masks, for each leaf the blocks of which an earlier mask keeps something.
        """
        budget, scope = self.task.instance.budget, self.task.instance.scope
        if self.task.instance.score.normalize and self.kind != "ready":
            sizes = [member.block.numel_per_block for member, _ in members_of(scope)]
            scores = [norms / math.sqrt(size) for norms, size in zip(scores, sizes, strict=True)]
        ordered = by_scope(scope, scores).reshape(-1)
        if self.task.instance.score.nonfinite == "prune":
            ordered = np.where(np.isfinite(ordered), ordered, -1.0)  # below all others
        among = self._left(left) if self.task.within else None
        if budget.nnz is None:
            keep: Mask = (ordered >= (budget.threshold or 0.0)).view(np.uint8)
        else:
            # As unsigned integers in the order of the numbers, -0.0 and 0.0 as one.
            bits = (ordered + 0.0).view(np.uint64)
            keys = np.where(bits >> np.uint64(63) == 1, ~bits, bits | np.uint64(1 << 63))
            keep = np.empty(keys.size, dtype=np.uint8)
            if among is None:
                select_keys(keys, _ALL_BITS, scope.blocks_per_scope, budget.nnz, keep)
            else:
                keep = keep_among(keys, _ALL_BITS, scope.blocks_per_scope, budget, among)
        keep = keep if among is None else keep & among
        return Decision(keep, (self.strategy.passes - 1) * self.task.nbytes(io.tensors))

    def _left(self, left: Sequence[Mask]) -> Mask:
        """1 for each block, scope after scope, of which masks keep something in one of its leaves."""
        scope = self.task.instance.scope
        found = dict(zip(scope.leaves, left, strict=True))
        fused = [_fused(member.block, found, np.bitwise_or) for member, _ in members_of(scope)]
        return by_scope(scope, fused).reshape(-1)


@dataclass(frozen=True, slots=True, eq=False)
class Known(Pass):
    """A result that is known already."""

    result: Any

    def chunks(self, io: TensorIO) -> tuple[Chunk, ...]:  # noqa: ARG002
        return ()

    def work(self, chunk: Chunk, io: TensorIO) -> None:
        """There is nothing to do."""

    def merge(self, partials: list[Any], io: TensorIO) -> Any:  # noqa: ANN401, ARG002
        return self.result


@dataclass(frozen=True, slots=True, eq=False)
class CutBlocks(RegionPass):
    """Blocks of which each was decided: `keep` has 1 or 0 for them, on the block grid of each leaf."""

    task: Task
    strategy: BlockNorms
    keep: tuple[Mask, ...]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        regions = (
            (number, region)
            for number, leaf in enumerate(self.task.instance.scope.leaves)
            for region in _sweep(leaf, self.strategy).regions()
        )
        return region_chunks(regions, io, self.strategy.elements, self.strategy.memory)

    def rule(self, member: int) -> str:  # noqa: ARG002
        return self.task.rule

    def cut(self, member: int, loaded: Loaded, io: TensorIO) -> Mask:
        mask, mask_view = loaded.masked()
        mask_view[...] = _spread(self.keep[member], loaded.region)
        kept = io.inside(loaded, self.task.within).kept
        if kept is not None:
            mask &= kept
        cut_blocks(loaded.flat, mask, 1, mask)
        return mask


def block_norms(task: Task, strategy: BlockNorms, *, cuts: bool = True) -> Pass:
    """The first pass over blocks too large or too scattered for a slab: channels, heads, experts, filters."""
    if task.score_kind.ranks_blocks:
        return ReduceBlocks(task, strategy, "ready", cuts)
    needs_maxima = math.isinf(task.score_kind.norm_of(task.instance.score)) or strategy.passes > 2
    return ReduceBlocks(task, strategy, "maxima" if needs_maxima else "sums", cuts)


def _norms(
    block: AnyBlock,
    sums: Mapping[BoundBlock, Floats],
    exponents: Mapping[BoundBlock, NDArray[np.int64]],
    power: int,
) -> Floats:
    """The norms of fused blocks: leaves are summed in their order, as engine.scoring does."""
    (first, order), *others = leaves_of(block)
    total = sums[first].transpose(order)
    for leaf, own in others:
        total = total + sums[leaf].transpose(own)
    root = total if power == 1 else np.sqrt(total)
    return root * np.ldexp(1.0, exponents[first].transpose(order).astype(np.int32)) if exponents else root


def _sweep(leaf: BoundBlock, strategy: BlockNorms) -> Sweep:
    sweep = sweep_of(leaf, strategy.elements)
    if sweep is None:
        raise TypeError(f"{leaf.label} cannot be swept")
    return sweep


def _fused(block: AnyBlock, found: Mapping[BoundBlock, NDArray[Any]], join: np.ufunc) -> NDArray[Any]:
    """What was found of each leaf's blocks, joined for fused blocks."""
    fused: NDArray[Any] = join.reduce([found[leaf].transpose(order) for leaf, order in leaves_of(block)])
    return fused


def _exponents(top: Floats) -> NDArray[np.int64]:
    """As engine.scoring.block_exponents: scaled by 2 ** -exponent the largest finite number is below 1."""
    finite = np.where(np.isfinite(top), top, 1.0)
    return np.clip(np.frexp(finite)[1], -_MOST_EXPONENT, _MOST_EXPONENT).astype(np.int64)


def _spread(keep: Mask, region: Region) -> Mask:
    """A decision on a leaf's block grid for each element of a region."""
    for axis, (blocks, begin, size, extent) in enumerate(
        zip(region.blocks, region.begin, region.extent, region.leaf.shape, strict=True)
    ):
        keep = keep[(slice(None),) * axis + (blocks,)]
        if extent > 1 and keep.shape[axis] > 1:
            keep = np.repeat(keep, extent, axis=axis)
            skipped = begin % extent
            keep = keep[(slice(None),) * axis + (slice(skipped, skipped + size),)]
    return keep
