"""Masks against weights: putting zeros back where masks drop elements, and finding those that were lost.

Owns which mask is for which tensor, the words for all that does not fit, and what is counted in a tensor
and its mask. The runner writes and notes. Called by the commands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.checkpoint import read_kept
from sparseprune.checkpoint.documents import shown
from sparseprune.checkpoint.mask_names import counterparts
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import count_lost, drop
from sparseprune.errors import CheckpointError, one_of_many, printable
from sparseprune.execution.passes import Chunk, Outcomes, Pass
from sparseprune.execution.regions import Resident, Resources, limits_of, regions_in, whole_run
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
from sparseprune.results.fields import Made
from sparseprune.spec.naming import MEMBER
from sparseprune.spec.problems import nearest

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from sparseprune.checkpoint import Checkpoint, MaskSet, Provenance, Sink, Source, StoredMask, StoredTensor
    from sparseprune.engine.kernels.counting import Tally
    from sparseprune.execution.regions import Limits, Region
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.tensor_io import Loaded, Mask

_RULE = "masks"
_DECODED = 64  # bytes of an element of codes while it is made a weight
_LOOKED_AT = 2000  # names that one is compared with letter by letter
_PRUNABLE = ", ".join(row.name for row in DTYPES.values() if row.prunable)


class Pair(Struct, frozen=True):
    """A tensor and its mask, of one shape."""

    stored: StoredTensor
    mask: StoredMask


@dataclass(frozen=True, slots=True)
class Matched:
    """Tensors with their masks, in the order of the checkpoint; names without a counterpart are ignored.

    Masks have the names of their tensors, whatever they are stored under. `unused` are masks whose tensor is
    not there, `unmasked` tensors that should have a mask and have none.
    """

    checkpoint: Checkpoint = field(repr=False)
    masks: MaskSet = field(repr=False)
    pairs: tuple[Pair, ...]
    unused: tuple[str, ...] = ()
    unmasked: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that have masks."""
        return sum(pair.stored.nbytes for pair in self.pairs)


class Reapplication(Struct, frozen=True):
    """All that has to be done to tensors with masks, by at most `workers` threads at one time."""

    matched: Matched
    limits: Limits
    workers: int


class Reapplied(Struct, frozen=True):
    """A tensor: elements that its mask drops, and its counts before and after."""

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


class LostZeros(Struct, frozen=True):
    """What a mask drops of a tensor, how much of that is not zero, the index of the first such element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruned: int
    lost: int
    first: tuple[int, ...] | None


def match_masks(
    checkpoint: Checkpoint,
    masks: MaskSet,
    origin: Provenance | None,
    *,
    partial: bool,
    chosen: Collection[str] | None = None,
    cuts: bool = False,
) -> Matched:
    """Give every tensor its mask; names may differ by what wrappers add (`mask_names.counterparts`).

    A tensor must have one if the report of the run that made the masks lists it; where there is no such
    report, if its like in another layer has one: their names differ in pieces that are numbers. So must a
    name that an index of masks lists. `partial` ignores names without a counterpart, but not what does not
    fit. Where tensors are `chosen` by name, no other ones count. `cuts`: slices are cut out, of any bytes;
    else zeros are put in or looked for.

    Raises:
        CheckpointError: names without a counterpart, or with several, other shapes, dtypes that cannot be
            pruned; all of them.
    """
    here, there, tensors = checkpoint.path, masks.path, checkpoint.tensors
    named = _named(checkpoint, masks)
    wanted = tensors if chosen is None else frozenset(chosen)
    pairs = [
        Pair(tensors[name], _as(masks.masks[named[name]], name))
        for name in tensors
        if name in wanted and named.get(name) in masks.masks
    ]
    used = frozenset(named.values())
    unused = [name for name in masks.masks if name not in used] if chosen is None else []
    why_missing = _missing(checkpoint, masks, origin, named)
    if chosen is not None:
        why_missing = {name: why for name, why in why_missing.items() if name in wanted}
    lines = [*_reshaped(here, there, pairs), *(() if cuts else _unfit(here, pairs))]
    if masks.masks and not pairs and chosen is None:
        some, *others = masks.masks
        what = f"none of its {len(masks.masks):,} masks is" if others else "its mask is not"
        lines.append(
            f"{there}: {what} for a tensor of {here}, such as {shown(some)}{_near(some, list(tensors))}; "
            "give the masks of this checkpoint, or --rename OLD=NEW where only names differ"
        )
    elif not partial:
        lines += _without_counterpart(checkpoint, masks, named, unused, why_missing)
    if lines:
        raise CheckpointError(*lines)
    return Matched(checkpoint, masks, tuple(pairs), tuple(unused), tuple(why_missing))


def _without_counterpart(
    checkpoint: Checkpoint,
    masks: MaskSet,
    named: Mapping[str, str],
    unused: Sequence[str],
    why_missing: Mapping[str, str],
) -> Iterator[str]:
    """Masks without a tensor and tensors without a mask, a line for each kind, the last one with advice."""
    here, there, lines = checkpoint.path, masks.path, []
    if unused:
        first, *others = unused
        free = [name for name in checkpoint.tensors if name not in named]
        what = f"mask {shown(first)} is for no tensor of {here}"
        if others:
            counts = f"{len(unused):,} of {len(masks.masks):,} masks"
            what = f"{counts} are for no tensor of {here}, such as {shown(first)}"
        lines.append(f"{there}: {what}{_near(first, free)}")
    if why_missing:
        (first, why), *rest = why_missing.items()
        what = f"{len(why_missing):,} tensors have" if rest else f"tensor {shown(first)} has"
        such = f", such as {shown(first)}" if rest else ""
        lines.append(f"{here}: {what} no mask{such}, {why}{_near(first, unused)}")
    if lines:
        *front, last = lines
        yield from front
        yield (
            f"{last}; give the masks of this checkpoint, --rename OLD=NEW where only names differ, or "
            "--partial to ignore what has no counterpart"
        )


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

    Survivors keep their bits, what is dropped becomes +0.0, or 0. What an earlier run finished is kept.
    `progress` is called, from any thread, with bytes that were done and what they are of.
    """
    outcomes = Outcomes()
    record = Record(output, outcomes, progress)
    io = TensorIO(reader, output, reapplication.matched.checkpoint.tensors)
    pairs, limits, workers = reapplication.matched.pairs, reapplication.limits, reapplication.workers
    jobs = (
        Job(order, f"mask{order}", pair.stored.name, Reapply(pair, *_sizes(pair, limits)))
        for order, pair in dealt(pairs, lambda pair: pair.stored.shard, workers)
    )
    write_through(jobs, io, record, Resources(workers, limits.memory))

    def reapplied(pair: Pair) -> Reapplied:
        one = outcomes.of_tensor(pair.stored, (_RULE,))
        return Reapplied(one.name, one.dtype, one.shape, one.reach[_RULE].pruned, one.before, one.after)

    return Made(pairs, reapplied)


def reapply_bytes(reapplication: Reapplication, output: Sink) -> tuple[int, int]:
    """Bytes that a whole run reads or copies, and how many of them an earlier run did."""
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
    found = read_through(jobs, TensorIO(reader), Resources(reapplication.workers, limits.memory), progress)
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
        stored = self.pair.stored
        dropped, lost, firsts = zip(*partials, strict=True) if partials else ((), (), ())
        first = min((one for one in firsts if one is not None), default=None)
        place = None if first is None else tuple(map(int, np.unravel_index(first, stored.shape)))
        return LostZeros(stored.name, stored.dtype, stored.shape, sum(dropped), sum(lost), place)


def _sizes(pair: Pair, limits: Limits) -> tuple[int, int]:
    """The elements of a slab, whole bytes of a packed mask if possible, and the memory that they take."""
    size = pattern_of(pair.stored).itemsize
    elements = max(1, limits.slab // size)
    elements -= elements % 8 if elements > 8 else 0
    # A slab, its mask twice; integers are counted as float64, codes as the weights that they stand for.
    held = size + 2 + (0 if pair.stored.dtype in FORMATS else 16) + (_DECODED if pair.stored.codes else 0)
    return elements, held * min(elements, pair.stored.numel)


def _regions(pair: Pair, elements: int) -> Iterator[Region]:
    """All elements of a tensor, as they lie in the storage."""
    return regions_in(whole_run(pair.stored), elements)


def _reshaped(here: Path, there: Path, pairs: Sequence[Pair]) -> Iterator[str]:
    """Masks of another shape."""
    reshaped = [pair for pair in pairs if pair.mask.shape != pair.stored.shape]
    for pair in reshaped[:1]:
        mask, tensor = shown(list(pair.mask.shape)), shown(list(pair.stored.shape))
        what = f"mask {shown(pair.stored.name)} has the shape {mask}, the tensor in {here} {tensor}"
        if len(reshaped) > 1:
            counts = f"{len(reshaped):,} of {len(pairs):,} masks have other shapes than their tensors"
            what = f"{counts} in {here}, such as {mask} for {tensor} of {shown(pair.stored.name)}"
        which = "these" if len(reshaped) > 1 else "this one"
        yield f"{there}: {what}; give the masks of this checkpoint, or leave {which} out by --exclude"


def _unfit(here: Path, pairs: Sequence[Pair]) -> Iterator[str]:
    """Elements of which no pattern need be zero, or nobody knows which."""
    coded = [pair.stored for pair in pairs if pair.stored.codes is not None]
    lines = [one.codes.refusal(one.name, values=False) for one in coded if one.codes is not None]
    refused = [f"{here}: {printable(line)}; or leave its mask out" for line in lines if line]
    other = [
        f"{here}: tensor {shown(one.name)}, which has a mask, is {one.dtype}, and need not be zero where its "
        f"bits are; wanted one of {_PRUNABLE}: leave its mask out"
        for one in (pair.stored for pair in pairs if not _may_be_zero(pair.stored))
    ]
    yield from (one_of_many(alike) for alike in (refused, other) if alike)


def _may_be_zero(stored: StoredTensor) -> bool:
    """Whether zeros can be put into it; what is wrong with codes is told by themselves."""
    return DTYPES[stored.dtype].prunable or stored.codes is not None


def _named(checkpoint: Checkpoint, masks: MaskSet) -> dict[str, str]:
    """The name of the mask of each tensor that has one, or is known to be kept whole."""
    try:
        return counterparts(checkpoint.tensors, (*masks.masks, *masks.whole))
    except CheckpointError as error:
        raise CheckpointError(*(f"{masks.path}: {line}" for line in error.args)) from error


def _as(mask: StoredMask, name: str) -> StoredMask:
    """The mask of a weight of this name."""
    return mask if mask.name == name else replace(mask, name=name)


def _missing(
    checkpoint: Checkpoint, masks: MaskSet, origin: Provenance | None, named: Mapping[str, str]
) -> dict[str, str]:
    """The names that should have a mask and have none, and why; tensors of the checkpoint come first."""
    why: dict[str, str] = {}
    if origin is not None:
        there = {mask.stored.name for mask in masks.masks.values()}
        why = {name: f"but {origin.report} lists it" for name in origin.tensors if name not in there}
    else:
        alike = {
            _kind(name, len(masks.masks[mask].shape)): name
            for name, mask in reversed(list(named.items()))
            if mask in masks.masks
        }
        for name, stored in checkpoint.tensors.items():
            like = alike.get(_kind(name, len(stored.shape)))
            if like is not None and name not in named:
                why[name] = f"but {shown(like)} has one"
    for name, place in masks.missing.items():
        why[name] = f"but the index of {masks.path} lists one in {place}"
    places = {name: place for place, name in enumerate(checkpoint.tensors)}
    return {name: why[name] for name in sorted(why, key=lambda name: (places.get(name, len(places)), name))}


def _kind(name: str, rank: int) -> tuple[str, int]:
    """What is alike in all layers of a name: pieces that are numbers count as one."""
    return MEMBER.sub("*", name), rank


def _near(name: str, others: Sequence[str]) -> str:
    """The name that was meant, as words; nothing where none is near."""
    # Names that are this one but for pieces in front of it: `model.`, `base_model.model.`.
    alike = (other for other in others if f".{other}".endswith(f".{name}") or name.endswith(f".{other}"))
    near = max(alike, key=len, default=None)
    if near is None:
        near = next(iter(nearest(name, islice(others, _LOOKED_AT), cutoff=0.8)), None)
    return "" if near is None else f"; the nearest name is {shown(near)}"
