"""Kept indices of every tensor: from decisions over blocks in memory, or from masks that are read.

Owns folding both into slices; a mask that is not made of whole slices is refused. Called by api.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint import read_kept
from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.block_norms import block_norms, by_leaf
from sparseprune.execution.passes import Chunk, Outcomes, Pass
from sparseprune.execution.plan import Task
from sparseprune.execution.regions import SLAB_BYTES, Resources, leaves_of
from sparseprune.execution.runner import Job, Record, already_done, dealt, read_through, write_through
from sparseprune.execution.strategy import by_block_norms
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.within import left_in
from sparseprune.removal.preview import looker

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Sink, Source, StoredMask, StoredTensor
    from sparseprune.execution.passes import TensorOutcome
    from sparseprune.execution.regions import Limits
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.schedule import Schedule
    from sparseprune.execution.strategy import BlockNorms
    from sparseprune.removal.preview import Look, Sliced
    from sparseprune.spec import BoundBlock, BoundSpec

    Flags = NDArray[np.bool_]
    Seen = tuple[int, Flags, Flags, int]  # first element, rows and columns that are kept, kept elements


@dataclass(frozen=True, slots=True, eq=False)
class KeptIndices:
    """What survives of a tensor: for each dimension a flag for every index, and the number of elements.

    An index is kept where any element of its slice is. `shape` is the shape after the other slices are cut
    out; `cut` lists the dimensions in which something is dropped. Where the members of a stack keep unlike
    indices of a dimension, its flags have a row for each member, which is an index of the first dimension.
    """

    along: tuple[Flags, ...]
    elements: int
    shape: Shape = field(init=False)
    cut: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(number_of(flags) for flags in self.along)
        cut = tuple(dim for dim, flags in enumerate(self.along) if shape[dim] < flags.shape[-1])
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "cut", cut)

    @property
    def is_sliced(self) -> bool:
        """Whether whole slices are dropped and nothing else, so that cutting them out loses no survivor."""
        return self.is_empty or self.elements == prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped."""
        return bool(self.elements == prod([flags.shape[-1] for flags in self.along]))

    @property
    def is_empty(self) -> bool:
        """Whether nothing survives."""
        return self.elements == 0

    @property
    def by_member(self) -> bool:
        """Whether members of a stack keep unlike indices."""
        return bool(max((flags.ndim for flags in self.along), default=1) > 1)

    def of_member(self, member: int) -> tuple[Flags, ...]:
        """What a member of a stack keeps along the dimensions behind the first."""
        return tuple(flags[member] if flags.ndim > 1 else flags for flags in self.along[1:])


def number_of(flags: Flags) -> int:
    """How many are kept; where members keep unlike ones, the largest number of one."""
    return int(np.count_nonzero(flags, axis=-1).max()) if flags.ndim > 1 else int(np.count_nonzero(flags))


def kept_whole(shape: Shape) -> KeptIndices:
    """What survives where nothing is dropped."""
    return kept_slices([np.ones(size, dtype=np.bool_) for size in shape])


def kept_slices(along: Sequence[Flags]) -> KeptIndices:
    """What survives where every element is kept whose index is kept along each dimension."""
    members, found = np.ones(1, dtype=np.int64), []
    for flags in along:
        alike = flags.ndim == 1 or bool((flags == flags[0]).all())
        found.append(flags if flags.ndim == 1 or not alike else np.ascontiguousarray(flags[0]))
    if any(flags.ndim > 1 for flags in found):
        members = found[0].astype(np.int64)
        for flags in found[1:]:
            members = members * np.count_nonzero(flags, axis=-1)
        return KeptIndices(tuple(found), int(members.sum()))
    return KeptIndices(tuple(found), prod([int(np.count_nonzero(flags)) for flags in found]))


def summed_up(kept: Mapping[str, KeptIndices]) -> str:
    """A text that differs whenever the kept indices differ."""
    bits = {name: [np.packbits(flags).tobytes().hex() for flags in each.along] for name, each in kept.items()}
    return "\n".join(f"{name}:{each.elements}:{','.join(bits[name])}" for name, each in kept.items())


def kept_of(
    leaves: Iterable[tuple[BoundBlock, Flags]], look: Look, shapes: Mapping[str, Shape]
) -> dict[str, KeptIndices]:
    """What tensors keep where these blocks of their leaves survive, flat; leaves without slices are left out.

    Several leaves may share a tensor: an index is kept where all of them keep it.
    """
    kept: dict[str, KeptIndices] = {}
    known: dict[tuple[Shape, Sliced, bytes], KeptIndices] = {}  # thousands of tensors lose the same
    for leaf, blocks in leaves:
        found, name = look(leaf), leaf.tensor
        if found is None:
            continue
        key = (shapes[name], found, blocks.tobytes())
        if key not in known:
            known[key] = _of_leaf(shapes[name], found, blocks)
        along = known[key].along
        if name in kept:
            along = tuple(one & other for one, other in zip(kept[name].along, along, strict=True))
        kept[name] = kept_slices(along) if name in kept else known[key]
    # A mask without survivors has none along any dimension.
    nothing = {
        name: [np.zeros_like(flags) for flags in each.along]
        for name, each in kept.items()
        if each.is_empty and each.cut
    }
    return kept | {name: kept_slices(along) for name, along in nothing.items()}


def _of_leaf(shape: Shape, found: Sliced, blocks: Flags) -> KeptIndices:
    """What a tensor keeps of which these blocks survive; one without dimensions is kept or not."""
    if not shape:
        return KeptIndices((), int(blocks.all()))
    along = [np.ones(size, dtype=np.bool_) for size in shape]
    if along[found.dim].size:
        along[found.dim] = found.kept(blocks)
        if along[found.dim].ndim > 1:  # a member of which nothing is kept goes
            along[0] = np.logical_or.reduce(along[found.dim], axis=1)
    return kept_slices(along)


class BlockDecisions(Struct, frozen=True):
    """The tasks of a schedule, all of which decide over whole blocks, each with its strategy."""

    schedule: Schedule
    tasks: Sequence[tuple[Task, BlockNorms]]

    def work_bytes(self, output: Sink) -> tuple[int, int]:
        """Bytes that a whole run reads to decide, and how many of them an earlier run did."""
        tensors = self.schedule.plan.checkpoint.tensors
        read = sum((strategy.passes - 1) * task.nbytes(tensors) for task, strategy in self.tasks)
        return read, already_done(output)

    def decide(
        self, reader: Source, output: Sink, progress: Progress
    ) -> tuple[dict[str, KeptIndices], Sequence[TensorOutcome]]:
        """The kept indices of the tensors that rules reach, and how many elements each rule drops.

        The journal of `output` notes each decision, so that the next run takes it over. Energies of the
        outcomes stay 0.
        """
        plan, outcomes = self.schedule.plan, Outcomes()
        io = TensorIO(reader, output, plan.checkpoint.tensors, passed=progress)
        record = Record(output, outcomes, progress)
        found = write_through(self._jobs(), io, record, self.schedule.resources)

        def leaves() -> Iterator[tuple[BoundBlock, Flags]]:
            for number, (task, _) in enumerate(self.tasks):
                flags = found[number].view(np.bool_)
                for leaf, blocks in by_leaf(task.instance.scope, flags).items():
                    numel = prod(leaf.view_shape)
                    pruned = (blocks.size - int(np.count_nonzero(blocks))) * leaf.numel_per_block
                    outcomes.add([leaf.tensor, task.rule, numel, pruned, 0, 0.0, 0, 0.0])
                    yield leaf, np.ascontiguousarray(blocks).reshape(-1)

        shapes = {name: plan.checkpoint.tensors[name].shape for name in plan.reached}
        kept = kept_of(leaves(), looker(plan.checkpoint.tensors), shapes)
        return {name: kept[name] for name in shapes if name in kept}, outcomes.of_plan(plan)

    def _jobs(self) -> Iterator[Job]:
        tensors = self.schedule.plan.checkpoint.tensors
        shards = [tensors[task.instance.scope.leaves[0].tensor].shard for task, _ in self.tasks]
        for number, _ in dealt(shards, lambda shard: shard, self.schedule.workers):
            task, strategy = self.tasks[number]
            first = block_norms(task, strategy, cuts=False)
            yield Job(number, f"blocks{number}", task.part, first, strategy.held)


def block_decisions(schedule: Schedule) -> BlockDecisions | None:
    """The decisions of a schedule as flags of blocks; None where some task needs masks on disk.

    Survivors that are shrunk or rebuilt need their new weights, and the torch engine decides on its device.
    Of nested scopes the outer ones leave zeros behind that inner ones make.
    """
    if schedule.uses_torch or schedule.outer:
        return None
    tensors, tasks = schedule.plan.checkpoint.tensors, []
    for task in (task for group in schedule.groups for task in group.tasks):
        strategy = by_block_norms(task, tensors, schedule.limits)
        if strategy is None:
            return None
        tasks.append((task, strategy))
    return BlockDecisions(schedule, tasks)


def read_slices(
    masks: Sequence[StoredMask], reader: Source, limits: Limits, workers: int, progress: Progress
) -> dict[str, KeptIndices]:
    """What masks keep, by the name of their weights; tensors without elements are left out.

    Each mask is read once, about `limits.slab` elements at a time. `progress` gets the bytes of masks that
    were read, and the name of the mask.
    """
    masks = [mask for mask in masks if mask.numel]
    passes = enumerate(ReadSlices(mask, limits.slab) for mask in masks)
    jobs = (Job(number, str(number), one.mask.name, one) for number, one in passes)
    found = read_through(jobs, TensorIO(reader), Resources(workers, limits.memory), progress)
    return {mask.name: found[place] for place, mask in enumerate(masks)}


def slices_left(
    bound: BoundSpec,
    masks: Sequence[StoredMask],
    tensors: Mapping[str, StoredTensor],
    reader: Source,
    resources: Resources,
    progress: Progress,
) -> dict[str, KeptIndices]:
    """What rules leave that others are nested in: their blocks go where masks keep nothing of them.

    What the inner rules drop of the other blocks cuts nothing out. `progress` as for `read_slices`.
    """
    named = {mask.name: mask for mask in masks}
    jobs: list[Job] = []
    for rule, instance in bound.outermost.instances():
        names = dict.fromkeys(leaf.tensor for leaf in instance.scope.leaves)
        task = Task(rule.name, instance, within=tuple(named[name] for name in names if name in named))
        jobs.append(Job(len(jobs), str(len(jobs)), task.part, FindLeft(task, SLAB_BYTES)))
    found = read_through(jobs, TensorIO(reader, tensors=tensors), resources, progress)
    leaves = (pair for job in jobs for pair in found[job.order])
    return kept_of(leaves, looker(tensors), {name: tensors[name].shape for name in named})


@dataclass(frozen=True, slots=True)
class FindLeft(Pass):
    """Finds the blocks of a task of which its masks keep an element, leaf by leaf."""

    task: Task
    elements: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        for leaf in self.task.instance.scope.leaves:
            numel = prod(leaf.view_shape)
            yield Chunk(leaf, numel // 8, 4 * min(numel, self.elements) + prod(leaf.grid_shape))

    def work(self, chunk: Chunk, io: TensorIO) -> NDArray[np.uint8]:
        return left_in(self.task, chunk.about, self.elements, io)

    def merge(self, partials: list[Any], io: TensorIO) -> list[tuple[BoundBlock, Flags]]:  # noqa: ARG002
        """Leaves with flat flags of their blocks; fused ones share theirs."""
        left, found = iter(partials), []
        for member in self.task.instance.scope.members:
            each = leaves_of(member.block)
            common = np.logical_or.reduce([next(left).transpose(order) for _, order in each])
            for leaf, order in each:
                found.append((leaf, np.ascontiguousarray(common.transpose(np.argsort(order))).reshape(-1)))
        return found


@dataclass(frozen=True, slots=True)
class ReadSlices(Pass):
    """Finds the rows and columns that a mask keeps; a row is what lies along the last dimension."""

    mask: StoredMask
    slab: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        """Whole rows, about a slab of them, or parts of one that exceeds a slab: first element and size."""
        width, numel = self._width, self.mask.numel
        begin = 0
        while begin < numel:
            whole = self.slab // width * width
            size = min(whole, numel - begin) if whole else min(self.slab, width - begin % width)
            nbytes = self._bytes_to(begin + size) - self._bytes_to(begin)
            yield Chunk((begin, size), nbytes, memory=4 * size)
            begin += size

    def work(self, chunk: Chunk, io: TensorIO) -> Seen:
        begin, size = chunk.about
        kept = read_kept(io.reader, self.mask, begin, size).view(np.bool_)
        grid = kept.reshape(-1, min(size, self._width))
        rows, columns = np.logical_or.reduce(grid, axis=1), np.logical_or.reduce(grid, axis=0)
        return begin, rows, columns, int(np.count_nonzero(kept))

    def total(self) -> Seen:
        """Nothing seen yet: flags of all rows and columns, and the number of kept elements."""
        rows, columns = self.mask.numel // self._width, self._width
        return 0, np.zeros(rows, dtype=np.bool_), np.zeros(columns, dtype=np.bool_), 0

    def add(self, total: Seen, partial: Seen) -> Seen:
        (_, all_rows, all_columns, elements), (begin, rows, columns, more) = total, partial
        row, column = divmod(begin, self._width)
        all_rows[row : row + rows.size] |= rows
        all_columns[column : column + columns.size] |= columns
        return 0, all_rows, all_columns, elements + more

    def merge(self, partials: list[Seen], io: TensorIO) -> KeptIndices:  # noqa: ARG002
        ((_, rows, columns, elements),) = partials
        if not self.mask.shape:
            return KeptIndices((), elements)
        grid = rows.reshape(self.mask.shape[:-1])
        others = [tuple({*range(grid.ndim)} - {dim}) for dim in range(grid.ndim)]
        along = [np.logical_or.reduce(grid, axis=axes) for axes in others]
        return KeptIndices((*along, columns), elements)

    @property
    def _width(self) -> int:
        return (self.mask.shape or (1,))[-1]

    def _bytes_to(self, element: int) -> int:
        """The share of the stored bytes that lies before an element."""
        return element * self.mask.stored.nbytes // self.mask.numel
