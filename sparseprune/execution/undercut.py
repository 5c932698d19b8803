"""Blocks that are not zero though they score less than a threshold: what pruning by it would still drop.

Runs the passes that prune, over an io that writes nothing and looks at what would be cut, so that scores are
those of a run, bit for bit. Needs what they need: score files, torch for what only the engine can score.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.occupancy import any_in, nonzero
from sparseprune.execution.occupied import First, Found, joined
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.pruning import first_pass
from sparseprune.execution.regions import leaves_of, members_of
from sparseprune.execution.strategy import BlockNorms, Contiguous, TorchInMemory
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.occupancy import ByteFlags
    from sparseprune.execution.regions import Region
    from sparseprune.execution.schedule import Job
    from sparseprune.execution.tensor_io import Loaded, Mask
    from sparseprune.spec import BoundBlock, BoundScope


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements of a region that would be cut and are not zero: 1 for each, as the leaf sees them."""

    region: Region
    elements: ByteFlags


@dataclass(frozen=True, eq=False)
class Watch(TensorIO):
    """An io without an output: what should be written is compared with what is there."""

    cuts: list[Cut] = field(default_factory=list)

    def store(self, loaded: Loaded, mask: Mask) -> None:
        """Remember what a mask cuts that is not zero in the input, which is read again for it."""
        if mask.all():
            return
        again = self.load(loaded.region)
        flat, view = again.masked()
        flat[...] = nonzero(again.flat, DTYPES[loaded.dtype].zero_bits or 0)
        flat &= 1 - mask
        if flat.any():
            self.cuts.append(Cut(loaded.region, view))


@dataclass(frozen=True, slots=True)
class BelowThreshold(Pass):
    """Does what pruning does, without writing; gives which blocks would be dropped that are not zero.

    Every block is a scope of its own: places are those of blocks.
    """

    job: Job
    inner: Pass

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        for chunk in self.inner.chunks(io):
            yield Chunk(chunk, chunk.nbytes, chunk.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        if not chunk.about.key:
            return self.inner.work(chunk.about, io)
        watch = Watch(io.reader, None, io.tensors, io.device, io.passed, io.check, io.vectors)
        self.inner.work(chunk.about, watch)
        return self._judged(watch.cuts)

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | Found:
        if not all(isinstance(partial, Found | list) for partial in partials) or self._reduces():
            following = self.inner.merge(partials, io)
            if isinstance(following, Decision):
                following = self.inner.decided(following.value)
            return replace(self, inner=following)
        held: dict[BoundBlock, ByteFlags] = {}
        for cut in (cut for partial in partials if isinstance(partial, list) for cut in partial):
            leaf = cut.region.leaf
            held.setdefault(leaf, np.zeros(leaf.grid_shape, dtype=np.uint8))[cut.region.blocks] |= (
                cut.elements
            )
        found = [partial for partial in partials if isinstance(partial, Found)]
        return joined([*found, self._found((0,) * len(self._member.block.grid_shape), held)])

    def _reduces(self) -> bool:
        """Whether the present pass only leads to a decision."""
        return bool(self.inner.decides)

    @property
    def _member(self) -> BoundScope:
        ((member, _),) = members_of(self.job.task.instance.scope)
        return member

    def _judged(self, cuts: Sequence[Cut]) -> Found | list[Cut]:
        """What was found; cuts of blocks that are read in parts are judged when all of them are there."""
        strategy = self.job.strategy
        if isinstance(strategy, BlockNorms):
            return [Cut(cut.region, any_in(cut.elements, cut.region.leaf.shape)) for cut in cuts]
        if isinstance(strategy, Contiguous):
            return joined([Found({}), *(self._found_in_run(cut, strategy.selection.block) for cut in cuts)])
        flags = [(cut.region, any_in(cut.elements, cut.region.leaf.shape)) for cut in cuts]
        if isinstance(strategy, TorchInMemory) and cuts:  # leaves of one tile
            return self._found(self._begin(cuts[0].region), {region.leaf: own for region, own in flags})
        return joined([Found({}), *(self._found(self._begin(of), {of.leaf: own}) for of, own in flags)])

    def _begin(self, region: Region) -> Shape:
        """The first block of a region on the common grid of blocks."""
        order = dict(leaves_of(self._member.block))[region.leaf]
        return tuple(region.blocks[dim].start for dim in order)

    def _found(self, begin: Shape, flags: Mapping[BoundBlock, ByteFlags]) -> Found:
        """Fused blocks that are to be cut in any of their leaves, in a part of the grid from `begin` on."""
        orders = dict(leaves_of(self._member.block))
        common = [own.transpose(orders[leaf]) for leaf, own in flags.items()]
        if not common:
            return Found({})
        fused = np.ascontiguousarray(common[0] if len(common) == 1 else np.bitwise_or.reduce(common))
        place = np.unravel_index(int(np.argmax(fused)), fused.shape) if begin else ()
        first = tuple(at + int(inner) for at, inner in zip(begin, place, strict=True))
        return Found({}, int(np.count_nonzero(fused)), First(first, 1))

    def _found_in_run(self, cut: Cut, block: int) -> Found:
        """A leaf that is seen flat: blocks are neighbours, in the row-major order of its grid."""
        flags = any_in(cut.elements, (block,))
        number = cut.region.begin[0] // block + int(np.argmax(flags))
        grid = self._member.block.grid_shape
        first = tuple(int(place) for place in np.unravel_index(number, grid)) if grid else ()
        return Found({}, int(np.count_nonzero(flags)), First(first, 1))


def below_threshold(job: Job, tensors: Mapping[str, StoredTensor]) -> Pass:
    """The first pass that looks for blocks below the threshold of a job of one task."""
    return BelowThreshold(job, first_pass(job, tensors))
