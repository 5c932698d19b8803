"""Blocks that are not zero though they score less than a threshold: what pruning by it would still drop.

Runs the programs that prune, over traffic that writes nothing and looks at what would be cut, so that scores
are those of a run, bit for bit. Needs what they need: score files, torch for what only the engine can score.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.occupancy import any_in, nonzero
from sparseprune.execution.cells import Part, leaves_of, members_of
from sparseprune.execution.occupied import First, Found, coarser, joined
from sparseprune.execution.recipes import Gathered, Runs, Summed, Tiled
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.occupancy import ByteFlags
    from sparseprune.execution.boxes import Box
    from sparseprune.execution.programs import Item, Program, Setting
    from sparseprune.execution.schedule import Job
    from sparseprune.execution.tensor_io import Loaded, Mask
    from sparseprune.spec import BoundBlock

_WAYS = {Runs: "runs", Gathered: "gathered", Summed: "summed", Tiled: "tiled"}


@dataclass(frozen=True, slots=True)
class Cut:
    """Elements of a box that would be cut and are not zero: 1 for each, as the leaf sees them."""

    box: Box
    elements: ByteFlags


class _Seen(threading.local):
    """What was seen of the item that a thread is at."""

    def __init__(self) -> None:
        self.cuts: list[Cut] = []


_SEEN = _Seen()


class Watch(TensorIO):
    """TensorIO without an output: what should be written is compared with what is there."""

    def store(self, loaded: Loaded, mask: Mask) -> None:
        """Remember what a mask cuts that is not zero in the input, which is read again for it."""
        if mask.all():
            return
        again = self.load(loaded.box)
        flat, view = again.masked()
        flat[...] = nonzero(again.flat, DTYPES[loaded.box.stored.dtype].zero_bits or 0)
        flat &= 1 - mask
        if flat.any():
            _SEEN.cuts.append(Cut(loaded.box, view))

    def watched(self, work: Callable[[], Any]) -> list[Cut]:
        """Do the work of an item; what it would cut."""
        _SEEN.cuts = []
        work()
        cuts, _SEEN.cuts = _SEEN.cuts, []
        return cuts


def undercut_program(job: Job, setting: Setting, watch: Watch, tell: Callable[[Found], None]) -> Program:
    """Do what pruning does, without writing; `tell` gets which blocks would be dropped that are not zero.

    `setting` has the watch for its traffic. Every block is a scope of its own: places are those of blocks.
    """
    work = _Work(job, watch)
    way = import_module(f"sparseprune.execution.{_WAYS[type(job.recipe)]}")
    program: Program = way.run_program(job.task, job.recipe, setting)
    found: list[Found] = []
    try:
        step = next(program)
        while True:
            results = yield (work.around(item) for item in step)
            found += [result for result in results if isinstance(result, Found)]
            step = program.send(results)
    except StopIteration:
        tell(joined([*found, work.held()]))


class _Work:
    """What the items of one task share: for blocks that pass by in parts a flag for each."""

    def __init__(self, job: Job, watch: Watch) -> None:
        self._job = job
        self._watch = watch
        ((self._member, _),) = members_of(job.task.instance.scope)
        self._lock = threading.Lock()
        self._held: dict[BoundBlock, ByteFlags] = {}

    def around(self, item: Item) -> Item:
        """An item that tells what the one would cut; those that write nothing stay as they are."""
        if not item.key:
            return item
        return replace(item, work=lambda: self._judged(self._watch.watched(item.work)), key="")

    def held(self) -> Found:
        """What was found in blocks that passed by in parts."""
        return self._found((0,) * len(self._member.block.grid_shape), self._held)

    def _judged(self, cuts: Sequence[Cut]) -> Found:
        recipe = self._job.recipe
        if not cuts:
            return Found({})
        if isinstance(recipe, Runs):
            return self._found_in_run(cuts, recipe.contest.block)
        if isinstance(recipe, Summed):
            for cut in cuts:
                self._hold(cut)
            return Found({})
        leaf, order = next(pair for pair in leaves_of(self._member.block) if pair[0] == cuts[0].box.leaf)
        own = [begin // extent for begin, extent in zip(cuts[0].box.begin, leaf.shape, strict=True)]
        flags = {cut.box.leaf: any_in(cut.elements, cut.box.leaf.shape) for cut in cuts}
        return self._found(tuple(own[dim] for dim in order), flags)

    def _hold(self, cut: Cut) -> None:
        leaf = cut.box.leaf
        flags = any_in(cut.elements, leaf.shape)
        with self._lock:
            if leaf not in self._held:
                self._held[leaf] = np.zeros(leaf.grid_shape, dtype=np.uint8)
            self._held[leaf][coarser(Part(cut.box.begin, cut.box.extent), leaf.shape)] |= flags

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

    def _found_in_run(self, cuts: Sequence[Cut], block: int) -> Found:
        """A leaf that is seen flat: blocks are neighbours, in the row-major order of its grid."""
        (cut,) = cuts
        flags = any_in(cut.elements, (block,))
        number = cut.box.begin[0] // block + int(np.argmax(flags))
        grid = self._member.block.grid_shape
        first = tuple(int(place) for place in np.unravel_index(number, grid)) if grid else ()
        return Found({}, int(np.count_nonzero(flags)), First(first, 1))
