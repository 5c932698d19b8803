"""Masks against weights: putting zeros back where masks drop elements, and finding those that were lost.

Owns what is counted in a tensor and its mask, slab by slab. Matching.py says which mask is for which tensor;
the runner writes and notes. Called by the commands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint import read_kept
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import count_lost, drop
from sparseprune.engine.sequences import Made
from sparseprune.execution.limits import Crowd, Resident, limits_of
from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import Region
from sparseprune.execution.runner import (
    Job,
    Record,
    already_done,
    copied_bytes,
    dealt,
    read_through,
    write_through,
)
from sparseprune.execution.tensor_io import TensorIO, pattern_of
from sparseprune.execution.tiles import RegionPass, region_chunks
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.checkpoint import Sink, Source
    from sparseprune.engine.tally import Tally
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.matching import Matched, Pair
    from sparseprune.execution.outcomes import TensorOutcome
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.tensor_io import Loaded, Mask

_RULE = "masks"


@dataclass(frozen=True, slots=True)
class Reapplication:
    """All that has to be done to tensors with masks, by at most `workers` threads at one time."""

    matched: Matched
    limits: Limits
    workers: int


@dataclass(frozen=True, slots=True)
class Reapplied:
    """What became of a tensor: elements that its mask drops, and what was counted before and after."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruned: int
    before: Tally
    after: Tally

    @property
    def lost(self) -> int:
        """Elements that were not zero though the mask drops them, NaN among them: those that are so now."""
        return self.after.zeros - self.before.zeros


@dataclass(frozen=True, slots=True)
class LostZeros:
    """What a mask drops of a tensor, how much of that is not zero, the index of the first such element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruned: int
    lost: int
    first: tuple[int, ...] | None


def make_reapplication(matched: Matched, memory: int, workers: int) -> Reapplication:
    """What has to be done within `memory` bytes, interpreter included; SparsepruneError for too few."""
    return Reapplication(matched, limits_of(memory, uses_torch=False, resident=resident_of(matched)), workers)


def resident_of(matched: Matched, *, resized: bool = False) -> Resident:
    """What a run holds of all tensors and masks, whatever it works on at the time."""
    shards = (*matched.checkpoint.shards, *matched.masks.shards)
    return Resident.of(
        len(matched.checkpoint.tensors) + len(matched.masks.masks),
        sum(shard.data_begin for shard in shards),
        reached=len(matched.pairs),
        scopes=len(matched.pairs),
        masks=True,
        resized=resized,
    )


def reapply(
    reapplication: Reapplication, reader: Source, output: Sink, progress: Progress
) -> Sequence[Reapplied]:
    """Write every tensor with zeros where its mask drops elements, and the masks; copy the rest.

    Survivors keep their bits, what is dropped becomes +0.0, or 0. What an earlier run finished is taken over.
    `progress` is told, from any thread, bytes that were done and of what.
    """
    outcomes = Outcomes()
    record = Record(output, outcomes, progress)
    io = TensorIO(reader, output, reapplication.matched.checkpoint.tensors)
    pairs, limits, workers = reapplication.matched.pairs, reapplication.limits, reapplication.workers

    def jobs() -> Iterator[Job]:
        for order, pair in dealt(pairs, lambda pair: pair.stored.shard, workers):
            yield Job(order, f"mask{order}", pair.stored.name, Reapply(pair, *_sizes(pair, limits)))

    write_through(jobs(), io, record, Crowd(workers, limits.memory))
    return Made(pairs, lambda pair: _reapplied(outcomes.of_tensor(pair.stored, (_RULE,))))


def reapply_bytes(reapplication: Reapplication, output: Sink) -> tuple[int, int]:
    """Bytes that pass by from the beginning to the end of a run, and how many of them an earlier one did."""
    return reapplication.matched.nbytes + copied_bytes(output), already_done(output)


def find_lost(reapplication: Reapplication, reader: Source, progress: Progress) -> tuple[LostZeros, ...]:
    """Where weights are not zero though their masks drop them; tensors in the order of the checkpoint.

    Zeros of either sign are zero, NaN is not. The same for any number of workers.
    """
    pairs, limits = reapplication.matched.pairs, reapplication.limits
    jobs = (
        Job(order, "", pair.stored.name, FindLost(pair, *_sizes(pair, limits)))
        for order, pair in enumerate(pairs)
    )
    found = read_through(jobs, TensorIO(reader), Crowd(reapplication.workers, limits.memory), progress)
    return tuple(found[order] for order in range(len(pairs)))


@dataclass(frozen=True, slots=True)
class Reapply(RegionPass):
    """Zeros where the mask of a tensor drops elements, some `elements` at one time, which take `memory`."""

    pair: Pair
    elements: int
    memory: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        regions = ((None, region) for region in _regions(self.pair, self.elements))
        return region_chunks(regions, io, self.elements, self.memory)

    def rule(self, member: None) -> str:  # noqa: ARG002
        return _RULE

    def cut(self, member: None, loaded: Loaded, io: TensorIO) -> Mask:  # noqa: ARG002
        mask = read_kept(io.reader, self.pair.mask, *loaded.region.begin, *loaded.region.extent)
        drop(loaded.flat, mask)
        return mask


@dataclass(frozen=True, slots=True)
class FindLost(Pass):
    """Elements of a tensor that its mask drops and that are not zero."""

    pair: Pair
    elements: int
    memory: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        size = pattern_of(self.pair.stored).itemsize
        for region in _regions(self.pair, self.elements):
            yield Chunk(region, region.numel * size, self.memory)

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[int, int, int | None]:
        """What the mask drops, how much of that is not zero, the number of the first such element."""
        stored, region = self.pair.stored, chunk.about
        bits = io.load(region, stored).flat
        mask = read_kept(io.reader, self.pair.mask, *region.begin, *region.extent)
        dropped, lost, first = count_lost(bits, DTYPES[stored.dtype].zero_bits or 0, mask)
        return dropped, lost, None if first is None else region.first + first

    def merge(self, partials: list[tuple[int, int, int | None]], io: TensorIO) -> LostZeros:  # noqa: ARG002
        return _lost_zeros(self.pair, partials)


def _sizes(pair: Pair, limits: Limits) -> tuple[int, int]:
    """The elements of a slab, whole bytes of a packed mask if possible, and the memory that they take."""
    size = pattern_of(pair.stored).itemsize
    elements = max(1, limits.slab // size)
    elements -= elements % 8 if elements > 8 else 0
    # A slab, its mask twice; integers are counted as float64.
    held = size + 2 + (0 if pair.stored.dtype in FORMATS else 16)
    return elements, held * min(elements, pair.stored.numel)


def _regions(pair: Pair, elements: int) -> Iterator[Region]:
    """All elements of a tensor, as they lie in the storage."""
    name, numel = pair.stored.name, pair.stored.numel
    leaf = BoundBlock(name, name, (numel,), (1,), 0, (1,))
    return (Region(leaf, (at,), (min(elements, numel - at),)) for at in range(0, numel, elements))


def _lost_zeros(pair: Pair, parts: list[tuple[int, int, int | None]]) -> LostZeros:
    stored = pair.stored
    places = [first for _, _, first in parts if first is not None]
    return LostZeros(
        name=stored.name,
        dtype=stored.dtype,
        shape=stored.shape,
        pruned=sum(dropped for dropped, _, _ in parts),
        lost=sum(lost for _, lost, _ in parts),
        first=tuple(map(int, np.unravel_index(min(places), stored.shape))) if places else None,
    )


def _reapplied(outcome: TensorOutcome) -> Reapplied:
    reach = outcome.reach[_RULE]
    return Reapplied(outcome.name, outcome.dtype, outcome.shape, reach.pruned, outcome.before, outcome.after)
