"""Tiles: whole scopes, read, decided, cut and written at one time, by compiled loops.

One way to load, cut and store a region, which radix_select, block_norms and reapply share; what differs is
the decision: scopes that lie one after the other as they are (contiguous), others after a copy in their order
(strided). And what no rule touches. No torch. Strategy.py chooses, the runner calls.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.kernels.counting import Tally, any_in, first_nonfinite
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_below, cut_blocks, drop, finite_ranks, select_keys
from sparseprune.engine.kernels.shrinking import block_factors, kth_mids, scale_blocks, shrink_elements
from sparseprune.engine.kernels.sums import block_sums
from sparseprune.engine.kernels.tiles import INFINITE_SUM, select_tiles
from sparseprune.errors import SparsityError
from sparseprune.execution.passes import Chunk, Pass, finish
from sparseprune.execution.ranking import Ranking, refuse_nonfinite, refuse_nonfinite_bits
from sparseprune.execution.regions import (
    Region,
    cells,
    flat_leaf,
    gaps,
    members_of,
    regions_at,
    regions_in,
    whole_run,
)
from sparseprune.execution.strategy import Contiguous
from sparseprune.execution.tensor_io import pattern_of
from sparseprune.execution.within import keep_among

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredMask
    from sparseprune.engine.kernels.formats import Bits, Format
    from sparseprune.execution.passes import Outcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyScope, Run
    from sparseprune.execution.strategy import Compiled, Selection
    from sparseprune.execution.tensor_io import Loaded, Mask, TensorIO
    from sparseprune.spec import BoundBlock

    Floats = NDArray[np.float64]


_SHRUNK = 1 << 17  # elements that shrink at one time: the system hands out less memory anew; measured


class RegionPass(Pass):
    """Regions that are read, cut and written independently of each other, some of them in one chunk.

    A chunk is about pairs: a member, which is whatever a subclass knows it by, and a region.
    """

    __slots__ = ()

    @abstractmethod
    def cut(self, member: Any, loaded: Loaded, io: TensorIO) -> Mask:  # noqa: ANN401
        """Decide and cut the elements in place; gives the mask as they lie in the storage, 1 where kept."""

    @abstractmethod
    def rule(self, member: Any) -> str:  # noqa: ANN401
        """The rule that reaches a member."""

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        return [self._cut(member, region, io) for member, region in chunk.about]

    def _cut(self, member: Any, region: Region, io: TensorIO) -> Outcome:  # noqa: ANN401
        loaded = io.load(region)
        before = io.tally(loaded)
        mask = self.cut(member, loaded, io)
        io.store(loaded, mask)
        return finish(self.rule(member), loaded.stored, before, io.tally(loaded), mask)


def region_chunks(
    regions: Iterable[tuple[Any, Region]], io: TensorIO, elements: int, memory: int
) -> Iterator[Chunk]:
    """Chunks of regions in their order; small ones of one file together, up to so many elements."""
    waiting: list[tuple[Any, Region]] = []
    files: tuple[str, ...] = ()
    filled = count = 0

    def chunk() -> Chunk:
        nbytes = sum(io.nbytes(region) for _, region in waiting)
        return Chunk(tuple(waiting), nbytes, memory, str(count), files)

    for member, region in regions:
        own = io.files((region.leaf,))
        if waiting and (filled + region.numel > elements or own != files):
            yield chunk()
            waiting, filled, count = [], 0, count + 1
        waiting.append((member, region))
        filled, files = filled + region.numel, own
    if waiting:
        yield chunk()


@dataclass(frozen=True, slots=True)
class CutScopes(RegionPass):
    """Small scopes of one leaf, decided by compiled loops; the tasks are alike but for their tensors."""

    tasks: tuple[Task, ...]
    strategy: Compiled

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        return region_chunks(self._regions(), io, self.strategy.elements, self.strategy.memory)

    def _regions(self) -> Iterator[tuple[int, Region]]:
        elements = self.strategy.elements
        for number, task in enumerate(self.tasks):
            scope = task.instance.scope
            if isinstance(self.strategy, Contiguous):
                (leaf,) = scope.leaves
                yield from ((number, region) for region in regions_in(flat_leaf(leaf), elements))
            else:
                for cell in cells(scope, elements):
                    yield from ((number, region) for region in regions_at(scope, cell).values())

    def rule(self, member: int) -> str:
        return self.tasks[member].rule

    def cut(self, member: int, loaded: Loaded, io: TensorIO) -> Mask:
        task, selection = self.tasks[member], self.strategy.selection
        loaded = io.inside(loaded, task.within)
        if isinstance(self.strategy, Contiguous):
            mask = _cut_as_it_lies(loaded, selection, Ranking(task, io))
        elif selection.tile:
            mask = _cut_tiles(loaded, task.instance.scope, selection, Ranking(task, io))
        else:
            mask = _cut_in_order(loaded, task.instance.scope, selection, Ranking(task, io))
        return mask if loaded.kept is None else mask & loaded.kept


@dataclass(frozen=True, slots=True)
class CopyUntouched(Pass):
    """What no rule reaches of a tensor: copied as it is, its masks all 1; what moves alone has none.

    It is zero, and its mask 0, where the mask that it may be `within` drops it.
    """

    name: str
    leaves: tuple[BoundBlock, ...]
    slab: int
    within: StoredMask | None = None

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        stored = io.tensors[self.name]
        size, files = pattern_of(stored).itemsize, (str(stored.shard.relative),)
        for number, runs in enumerate(_batches(gaps(stored.numel, self.leaves), max(1, self.slab // size))):
            elements = sum(count for _, count in runs)
            memory = 2 * elements * (size + 1)
            yield Chunk(runs, elements * size, memory, str(number), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Outcome]:
        before, after, whole, dropped = Tally(), Tally(), whole_run(io.tensors[self.name]), 0
        for run in chunk.about:
            loaded = io.load(Region(whole, (run[0],), (run[1],)))
            found = io.tally(loaded)
            mask = np.ones(run[1], dtype=np.uint8)
            before += found
            if self.within is not None:
                mask = io.kept(self.within, loaded.region)
                drop(loaded.flat, mask)
                dropped += mask.size - int(np.count_nonzero(mask))
                found = io.tally(loaded)
            after += found
            io.store(loaded, mask if self.leaves or self.within else None)
        counted = [before.zeros, before.energy, after.zeros, after.energy]
        return [[self.name, "", before.numel, dropped, *counted]]


def _batches(gaps: Iterable[Run], slab: int) -> Iterator[tuple[Run, ...]]:
    """Runs, cut and gathered to about `slab` elements each."""
    batch: list[Run] = []
    filled = 0
    for first, count in gaps:
        done = 0
        while done < count:
            step = min(slab - filled, count - done)
            batch.append((first + done, step))
            done, filled = done + step, filled + step
            if filled == slab:
                yield tuple(batch)
                batch, filled = [], 0
    if batch:
        yield tuple(batch)


def _cut_as_it_lies(loaded: Loaded, selection: Selection, ranking: Ranking) -> Mask:
    """Scopes that lie one after the other."""
    bits, form = loaded.flat, FORMATS.get(loaded.dtype)
    mask = np.empty(bits.size, dtype=np.uint8)
    elements = ranking.elements(loaded)
    if elements is not None:
        refuse_nonfinite(loaded, elements)
        magnitudes = elements.magnitudes().reshape(-1)
        cut_blocks(bits, _keep_by_scores(magnitudes, selection, loaded.kept), 1, mask)
        return mask
    if form is None:
        raise TypeError(f"{loaded.dtype} has no compiled loops")
    blocks = bits if selection.block == 1 else bits.reshape(-1, *selection.extent)
    if selection.prunes_nonfinite and first_nonfinite(bits, form) >= 0:
        cut_blocks(bits, _keep_finite(blocks, form, selection, loaded.kept), selection.block, mask)
        return mask
    if not selection.prunes_nonfinite:
        refuse_nonfinite_bits(loaded, form)
    if selection.k_weight is not None:
        _shrink(blocks, form, selection, mask)
    elif selection.threshold is not None and selection.block == 1:
        cut_below(bits, form, form.limit(selection.threshold), mask)
    else:
        cut_blocks(bits, _keep_by_patterns(blocks, form, selection, loaded.kept), selection.block, mask)
    return mask


def _cut_in_order(loaded: Loaded, scope: AnyScope, selection: Selection, ranking: Ranking) -> Mask:
    """Scopes that do not lie together: a copy in their order is decided, the elements are cut in place."""
    elements, kept = ranking.elements(loaded), loaded.kept_view
    if not selection.prunes_nonfinite:
        refuse_nonfinite(loaded, elements)
    if kept is not None:
        kept = np.ascontiguousarray(_in_scopes(kept, scope)).reshape(-1)
    if elements is not None:
        magnitudes = np.ascontiguousarray(_in_scopes(elements.magnitudes(), scope))
        keep = _keep_by_scores(magnitudes.reshape(-1), selection, kept)
    else:
        form, blocks = FORMATS[loaded.dtype], _in_scopes(loaded.view, scope)
        if selection.k_weight is not None:
            return _shrunk_in_order(loaded, scope, blocks, selection)
        if selection.block == 1:
            blocks = np.ascontiguousarray(blocks).reshape(-1)
        rescues = selection.prunes_nonfinite and first_nonfinite(loaded.flat, form) >= 0
        keep = (_keep_finite if rescues else _keep_by_patterns)(blocks, form, selection, kept)
    mask, mask_view = loaded.masked()
    rank = len(loaded.region.extent)
    spread = _in_scopes(mask_view, scope)
    spread[...] = keep.reshape(spread.shape[: len(spread.shape) - rank] + (1,) * rank)
    cut_blocks(loaded.flat, mask, 1, mask)
    return mask


def _cut_tiles(loaded: Loaded, scope: AnyScope, selection: Selection, ranking: Ranking) -> Mask:
    """Transposable scopes: square tiles of the last two dimensions of what the leaf sees."""
    elements = ranking.elements(loaded)
    refuse_nonfinite(loaded, elements)
    form, keys = FORMATS[loaded.dtype if elements is None else "F64"], loaded.view
    if elements is not None:
        magnitudes = elements.magnitudes()
        if not np.isfinite(magnitudes).all():
            raise SparsityError(f"{scope.label}: {INFINITE_SUM}")
        keys = magnitudes.view(np.uint64)
    mask, mask_view = loaded.masked()
    in_order = mask_view.flags.c_contiguous
    keep = mask if in_order else np.empty(mask.size, dtype=np.uint8)
    rows = np.ascontiguousarray(keys).reshape(-1)
    select_tiles(rows, form, keys.shape[-1], selection.tile, selection.nnz // selection.tile, keep)
    if not in_order:
        mask_view[...] = keep.reshape(mask_view.shape)
    cut_blocks(loaded.flat, mask, 1, mask)
    return mask


def _shrunk_in_order(loaded: Loaded, scope: AnyScope, blocks: Bits, selection: Selection) -> Mask:
    """Blocks shrink where they are, elements in the order of their scopes, and go back to their places."""
    mask, mask_view = loaded.masked()
    if selection.block > 1:
        _shrink(blocks, FORMATS[loaded.dtype], selection, mask)
        return mask
    ordered = blocks.reshape(-1)
    if np.shares_memory(ordered, loaded.flat):  # they lie in this order
        ordered = ordered.copy()
    survivors = np.empty(ordered.size, dtype=np.uint8)
    _shrink(ordered, FORMATS[loaded.dtype], selection, survivors)
    for place, numbers in ((loaded.view, ordered), (mask_view, survivors)):
        spread = _in_scopes(place, scope)
        spread[...] = numbers.reshape(spread.shape)
    return mask


def _shrink(blocks: Bits, form: Format, selection: Selection, mask: Mask) -> None:
    """Soft thresholds of blocks, scope after scope, in place; the flat `mask` has 1 where one is not zero.

    `blocks` are flat elements, or (*scopes, *blocks of a scope, *elements of a block) in any storage.
    """
    if selection.block == 1:
        _shrink_elements(blocks, form, selection, mask)
        return
    norms = _norms(blocks, form, selection)
    if selection.threshold is not None:
        limits = np.full(1, selection.threshold)
    else:
        ranked, k_weight = norms.view(np.uint64), selection.k_weight or 0.0
        limits = kth_mids(ranked, FORMATS["F64"], selection.blocks, selection.nnz, k_weight)
    if selection.scales:
        limits = limits * math.sqrt(selection.block)
    factors = block_factors(norms.reshape(limits.size, -1), limits[:, None]).reshape(-1)
    grid = blocks.shape[: blocks.ndim - len(selection.extent)]
    scale_blocks(blocks, form, factors.reshape(grid), mask)
    # The largest element is the norm over the root of their number at least.
    lowest = 2 * math.sqrt(selection.block) * float(form.values(np.ones(1, dtype=form.pattern))[0])
    if bool(((factors > 0) & (norms * factors < lowest)).any()):
        _drop_empty(blocks, form, factors.reshape(grid), mask)


def _shrink_elements(bits: Bits, form: Format, selection: Selection, mask: Mask) -> None:
    """Soft thresholds of flat elements, some scopes at one time, whose limits take little memory then."""
    if selection.threshold is not None:
        shrink_elements(bits[None], form, np.full(1, selection.threshold), mask)
        return
    step = max(1, _SHRUNK // selection.blocks) * selection.blocks
    for begin in range(0, bits.size, step):
        some = bits[begin : begin + step]
        limits = kth_mids(some, form, selection.blocks, selection.nnz, selection.k_weight or 0.0)
        rows = some.reshape(limits.size, selection.blocks)
        shrink_elements(rows, form, limits, mask[begin : begin + step])


def _drop_empty(blocks: Bits, form: Format, factors: Floats, mask: Mask) -> None:
    """Mark what no element is left of, as all were rounded to zero."""
    elements = tuple(range(factors.ndim, blocks.ndim))
    left = ((blocks & blocks.dtype.type(form.magnitude)) != 0).any(elements)
    scale_blocks(blocks.copy("K"), form, np.where(left, factors, 0.0), mask)


def _keep_finite(blocks: Bits, form: Format, selection: Selection, kept: Mask | None) -> Mask:
    """As `_keep_by_patterns`, where blocks in which something is not finite rank below all others."""
    wide = FORMATS["F64"]
    if selection.block == 1:
        ranks, magnitude = finite_ranks(blocks, form), form.magnitude
        limit = selection.threshold and form.limit(selection.threshold)
    else:  # the norm of such a block is infinite
        ranks, magnitude = finite_ranks(_norms(blocks, form, selection).view(np.uint64), wide), wide.magnitude
        limit = selection.threshold and wide.limit(selection.threshold)
    if selection.threshold is not None:
        reaches: Mask = (ranks > int(limit or 0)).view(np.uint8)
        return reaches
    if kept is not None and selection.blocks > 1:
        ranks, left = ranks.astype(np.uint64), _left(kept, selection)  # with room for one rank more
        return keep_among(ranks, wide.magnitude, selection.blocks, selection.budget, left)
    keep = np.empty(ranks.size, dtype=np.uint8)
    select_keys(ranks, magnitude, selection.blocks, selection.nnz, keep)
    return keep


def _left(kept: Mask, selection: Selection) -> Mask:
    """1 for each block of which an earlier mask keeps an element, flat as the elements are."""
    return any_in(kept.reshape(-1, selection.block), (1, selection.block)).reshape(-1)


def _in_scopes(view: NDArray[Any], scope: AnyScope) -> NDArray[Any]:
    """Elements as the leaf sees them as (scopes..., blocks of a scope..., elements of a block...)."""
    ((member, _),) = members_of(scope)
    (leaf,) = member.leaves
    rank = len(leaf.shape)
    split = [
        part
        for size, extent, blocks in zip(view.shape, leaf.shape, member.shape, strict=True)
        for part in (size // (extent * blocks), blocks, extent)
    ]
    order = [3 * dim + part for part in range(3) for dim in range(rank)]
    return view.reshape(split).transpose(order)


def _keep_by_patterns(blocks: Bits, form: Format, selection: Selection, kept: Mask | None) -> Mask:
    """Bytes, one a block: 1 for those that survive. `blocks` are as `_shrink` takes them.

    What an earlier mask keeps of them, if there is one, is flat, scope after scope, block after block.
    """
    if selection.block == 1:
        return _keep(blocks, form, selection, kept)
    left = None if kept is None else _left(kept, selection)
    return _keep_by_scores(_norms(blocks, form, selection), selection, left)


def _keep_by_scores(scores: Floats, selection: Selection, left: Mask | None) -> Mask:
    """The decision over scores of blocks that are not negative, flat, scope after scope."""
    return _keep(scores.view(np.uint64), FORMATS["F64"], selection, left)


def _keep(bits: Bits, form: Format, selection: Selection, left: Mask | None) -> Mask:
    """The decision by the magnitudes of numbers, one a block, flat, scope after scope.

    Where `left` has 0, an earlier mask keeps nothing of a block.
    """
    if selection.threshold is not None:
        magnitudes = bits & bits.dtype.type(form.magnitude)
        reaches: Mask = (magnitudes >= form.limit(selection.threshold)).view(np.uint8)
        return reaches
    if left is not None and selection.blocks > 1:
        return keep_among(bits, form.magnitude, selection.blocks, selection.budget, left)
    keep = np.empty(bits.size, dtype=np.uint8)
    select_keys(bits, form.magnitude, selection.blocks, selection.nnz, keep)
    return keep


def _norms(blocks: Bits, form: Format, selection: Selection) -> Floats:
    """The norm of every block, flat, of (*grid, *elements of a block)."""
    power = int(selection.norm)
    sums = block_sums(blocks, blocks.ndim - len(selection.extent), form, power).reshape(-1)
    norms = sums if power == 1 else np.sqrt(sums)
    return norms / np.sqrt(float(selection.block)) if selection.rms else norms
