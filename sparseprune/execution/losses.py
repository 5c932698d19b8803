"""Losses: how many blocks of an instance cost how much, to second order, counted in bins as tensors pass by.

Owns what the loss of a block is and the bins; who shares a budget by them is allocation's. A job has the
instances that share a second moment, so that each moment is factored once. Imports torch where it factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.errors import SparsityError
from sparseprune.execution.inputs import holds_rows
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.ranking import Elements, along, diagonals, refuse_nonfinite
from sparseprune.execution.regions import Region, leaves_of, members_of, regions_in
from sparseprune.execution.runner import Job
from sparseprune.execution.two_pass import Known, block_pairs
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.inputs import TaskInput
    from sparseprune.execution.plan import Task
    from sparseprune.execution.regions import AnyBlock
    from sparseprune.execution.tensor_io import TensorIO

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_ELEMENTS = 1 << 18  # that are looked at together: their sums must not depend on --memory
_ELEMENT_BYTES = 80  # that each of them takes meanwhile: magnitudes, places, losses, keys
_COPIES = 3  # of a moment, in the dtype of the work, while it is factored and inverted
_WEIGHT_BYTES = 20  # for each weight of a matrix whose rows go whole
_SHIFT = 45  # bits of a float64 that a bin takes together: 128 bins from a number to its double
KEYS = 1 << (64 - _SHIFT - 1)  # of numbers that are not negative


class Counted(Struct, frozen=True):
    """How many blocks lie in some bins: `below` in earlier ones, `counts` in those of `keys`, ascending."""

    below: int
    keys: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, low: int, counts: Ints, least: int, most: int) -> Counted:
        """Of all bins from `low` on, those in which places from `least` to `most` lie."""
        ends = np.cumsum(counts)
        inside = (counts > 0) & (ends > least) & (ends - counts < most)
        first = np.flatnonzero(inside)
        below = int((ends - counts)[first[0]]) if first.size else least
        return cls(below, tuple((low + first).tolist()), tuple(counts[first].tolist()))


def keys_of(losses: Floats) -> Ints:
    """The bins of numbers that are not negative, in their order: the high bits of float64."""
    bits = np.ascontiguousarray(losses, dtype=np.float64).reshape(-1).view(np.uint64)
    return (bits >> np.uint64(_SHIFT)).astype(np.int64)


def loss_inputs(task: Task) -> dict[str, TaskInput]:
    """The statistics that tell losses, by their weights."""
    return {one.key: one for one in task.inputs if one.role == "loss"}


def loss_jobs(tasks: Sequence[Task], tensors: Mapping[str, StoredTensor]) -> list[tuple[Job, list[int]]]:
    """Jobs that give a Counted for each of their tasks, whose numbers stand beside them.

    Rules of which some matrix has no gradients count what outputs lose.
    """
    without = rules_without_gradients(tasks)
    jobs = []
    for order, members in enumerate(_together(tasks)):
        some = tuple(tasks[number] for number in members)
        first = FactorMoments(some, tuple(task.rule not in without for task in some))
        held = sum(_held(task, tensors) for task in some)
        jobs.append((Job(order, f"allocate {order}", some[0].instance.label, first, held), members))
    return jobs


def _together(tasks: Sequence[Task]) -> list[list[int]]:
    """The numbers of tasks in groups that share moments, damped alike, in the order of their first ones."""
    home: dict[tuple[str, float], int] = {}
    groups: dict[int, tuple[list[int], set[tuple[str, float]]]] = {}
    for number, task in enumerate(tasks):
        named = {(moment_name(one), _damp(task)) for one in loss_inputs(task).values()}
        first, *others = sorted({home[name] for name in named if name in home}) or [number]
        members, names = groups.setdefault(first, ([], set()))
        for other in others:
            their_members, their_names = groups.pop(other)
            members += their_members
            named |= their_names
        members.append(number)
        names |= named
        home.update(dict.fromkeys(named, first))
    return [sorted(groups[first][0]) for first in sorted(groups)]


def rules_without_gradients(tasks: Iterable[Task]) -> dict[str, str]:
    """The rules that have a matrix without gradients, each with its name."""
    found: dict[str, str] = {}
    for task in tasks:
        for name, one in loss_inputs(task).items():
            if one.gradients is None:
                found.setdefault(task.rule, name)
    return found


def moment_name(one: TaskInput) -> str:
    """What tells a stored moment from others."""
    return f"{one.stored.shard.path}\0{one.stored.name}"


def memory_of(tasks: Iterable[Task], tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of the largest chunk."""
    found = [_ELEMENTS * _ELEMENT_BYTES]
    for task in tasks:
        inputs = loss_inputs(task)
        for _, leaf in _counted_leaves(task):
            one = inputs[leaf.tensor]
            rows = _goes_whole(leaf, one, tensors[leaf.tensor].shape)
            found.append(_memory_of(one, tensors, rows=rows))
    return max(found)


def _memory_of(one: TaskInput, tensors: Mapping[str, StoredTensor], *, rows: bool) -> int:
    """Bytes that a moment takes while it is factored, and a matrix whose rows go whole."""
    stored = DTYPES[one.stored.dtype].itemsize
    each = stored + _COPIES * max(4, stored)
    return each * one.stored.shape[-1] ** 2 + rows * _WEIGHT_BYTES * _matrix(one, tensors)


def bytes_read(tasks: Iterable[Task], tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that the jobs of some tasks read: moments and weights, each once."""
    listed = list(tasks)
    moments = {moment_name(one): one.stored for task in listed for one in loss_inputs(task).values()}
    weights = sum(
        prod(leaf.view_shape) * tensors[leaf.tensor].nbytes // max(1, tensors[leaf.tensor].numel)
        for task in listed
        for _, leaf in _counted_leaves(task)
    )
    return weights + sum(stored.nbytes for stored in moments.values())


def _held(task: Task, tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that a job keeps of a task: a number for each input or row of its matrices, sums of blocks."""
    inputs = loss_inputs(task)
    lines = sum(sum(tensors[name].shape[-2:]) * prod(one.stored.shape[:-2]) for name, one in inputs.items())
    blocks = sum(prod(leaf.grid_shape) for block, leaf in _counted_leaves(task) if not _single(block))
    return 8 * (lines + blocks)


def _matrix(one: TaskInput, tensors: Mapping[str, StoredTensor]) -> int:
    """The elements of a weight that belong to one moment."""
    return tensors[one.key].numel // max(1, prod(one.stored.shape[:-2]))


def _seen(one: TaskInput, shape: Shape) -> tuple[Shape, int]:
    """The shape of a weight, as a stack where it has several moments, and the dimension of its inputs."""
    matrices = one.stored.shape[0]
    if len(shape) == 2 and len(one.stored.shape) == 3:  # they lie one below another
        return (matrices, shape[0] // matrices, shape[1]), one.dim % 2 + 1
    return shape, one.dim


def _single(block: AnyBlock) -> bool:
    return isinstance(block, BoundBlock) and block.numel_per_block == 1


def _counted_leaves(task: Task) -> Iterator[tuple[AnyBlock, BoundBlock]]:
    """The leaves that have a say, each with the block that it belongs to."""
    inputs = loss_inputs(task)
    for member, _ in members_of(task.instance.scope):
        yield from ((member.block, leaf) for leaf in member.block.leaves if leaf.tensor in inputs)


def _goes_whole(leaf: BoundBlock, one: TaskInput, shape: Shape) -> bool:
    """Whether rows go whole, so that nothing in their matrix can make up for them."""
    seen, dim = _seen(one, shape)
    return leaf.numel_per_block > 1 and holds_rows(leaf, seen, dim)


_Key = tuple[str, bool, bool]
"""A weight, whether its rows go whole, and whether gradients count."""


@dataclass(frozen=True, slots=True, eq=False)
class _Losses(Pass):
    """Passes that give a Counted for each of `tasks`; `gradients` says whose statistics have some."""

    tasks: tuple[Task, ...]
    gradients: tuple[bool, ...]

    @property
    def decides(self) -> str:
        return "losses"

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        try:
            found = [Counted(below, tuple(keys), tuple(counts)) for below, keys, counts in value]
        except (TypeError, ValueError):
            return None
        return Known(found) if len(found) == len(self.tasks) else None

    def _about(self, moment: str, io: TensorIO) -> dict[_Key, TaskInput]:
        """The weights that a moment is of, and their statistics."""
        found = {}
        for task, gradients in zip(self.tasks, self.gradients, strict=True):
            inputs = {name: one for name, one in loss_inputs(task).items() if moment_name(one) == moment}
            for _, leaf in _counted_leaves(task):
                if leaf.tensor in inputs:
                    one = inputs[leaf.tensor]
                    rows = _goes_whole(leaf, one, io.tensors[leaf.tensor].shape)
                    found[leaf.tensor, rows, gradients] = one
        return found


@dataclass(frozen=True, slots=True, eq=False)
class FactorMoments(_Losses):
    """What a loss is made of by second moments: a factor for each input of a matrix, or for each row."""

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        """One for each matrix of a moment, by its name and number."""
        inputs = [one for task in self.tasks for one in loss_inputs(task).values()]
        for name in dict.fromkeys(map(moment_name, inputs)):
            about = self._about(name, io)
            memory = max(_memory_of(one, io.tensors, rows=rows) for (_, rows, _), one in about.items())
            stored = next(iter(about.values())).stored
            matrices = prod(stored.shape[:-2])
            for matrix in range(matrices):
                yield Chunk((name, matrix), stored.nbytes // matrices, memory)

    def work(self, chunk: Chunk, io: TensorIO) -> list[tuple[_Key, bool, Floats]]:
        """For each weight the factors of a matrix, with whether it is one of a stack."""
        import torch  # noqa: PLC0415  (who reads notes of an earlier run does without)

        from sparseprune.engine.curvature import Curvature  # noqa: PLC0415
        from sparseprune.execution.torch_tiles import tensor_of  # noqa: PLC0415

        name, matrix = chunk.about
        about = self._about(name, io)
        one = next(iter(about.values()))
        size, damp = one.stored.shape[-1], _damp(self.tasks[0])
        bits = io.load_run(one.stored, (matrix * size * size, size * size))
        found = []
        with io.lane(chunk.memory):
            moment = tensor_of(Elements(bits, one.stored.dtype), io.device).reshape(size, size)
            try:
                curvature = Curvature.of(moment, damp)
            except SparsityError as error:
                raise SparsityError(f"{one.key}: {error} ({one.stored.shard.path})") from error
            singles = None
            for key, own in about.items():
                _, rows, gradients = key
                scale = _gradients(own, matrix, io) if gradients else np.ones(1)
                if rows:
                    values = torch.from_numpy(_rows(own, matrix, io)).to(io.device)
                    factors = curvature.rows(values).cpu().numpy() * scale / size
                else:
                    singles = curvature.singles().cpu().numpy() if singles is None else singles
                    factors = singles * scale.mean()
                found.append((key, len(own.stored.shape) > 2, factors))
        return found

    def merge(self, partials: list[Any], io: TensorIO) -> Pass:  # noqa: ARG002
        factors: dict[tuple[_Key, bool], list[Floats]] = {}
        for partial in partials:  # in the order of the matrices
            for key, stacked, own in partial:
                factors.setdefault((key, stacked), []).append(own)
        arrays = {key: np.stack(own) if stacked else own[0] for (key, stacked), own in factors.items()}
        return CountLosses(self.tasks, self.gradients, arrays)


def _damp(task: Task) -> float:
    shared = task.instance.allocate
    if shared is None:
        raise TypeError(f"{task.instance.label} shares no budget")
    return shared.damp


def _rows(one: TaskInput, matrix: int, io: TensorIO) -> Floats:
    """The weights of a matrix, (rows, inputs), in float64."""
    stored = io.tensors[one.key]
    seen, dim = _seen(one, stored.shape)
    size = prod(seen[-2:])
    values = io.load_values(stored, (matrix * size, size)).reshape(seen[-2:])
    return values if dim == len(seen) - 1 else np.ascontiguousarray(values.T)


def _gradients(one: TaskInput, matrix: int, io: TensorIO) -> Floats:
    """The mean square of the gradient at each output of a matrix, (rows,)."""
    stored = one.gradients
    if stored is None:
        raise TypeError(f"{one.key} has no gradients")
    groups = _matrix(one, io.tensors) // one.stored.shape[-1] // stored.shape[-1]
    bits = diagonals(stored, io, range(matrix * groups, (matrix + 1) * groups))
    squares = values_of(bits, stored.dtype).astype(np.float64)
    if not (squares >= 0).all() or np.isinf(squares).any():
        text = "the second moment of its gradients has a diagonal that is none: calibrate again"
        raise SparsityError(f"{one.key}: {text} ({stored.shard.path})")
    return squares


@dataclass(frozen=True, slots=True, eq=False)
class CountLosses(_Losses):
    """Bins of the losses of all blocks; `factors` have a number for each input or row of a weight.

    The loss of a block is the sum of w^2 / [H^-1]_jj times the mean square gradient over its weights w, or of
    w H w^T times that of its row over its rows; over the leaves that have statistics. Per element of a block
    it is what blocks are compared by.
    """

    factors: Mapping[_Key, Floats]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        memory = _ELEMENTS * _ELEMENT_BYTES
        for number, task in enumerate(self.tasks):
            for place, (block, leaf) in enumerate(_counted_leaves(task)):
                if not _single(block):
                    yield Chunk((number, place, None), memory=memory)
                    continue
                for region in regions_in(leaf, _ELEMENTS):
                    yield Chunk((number, place, (region.begin, region.extent)), io.nbytes(region), memory)

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[int, int | None, int, NDArray[Any]]:
        """The number of a task; then the first bin and counts, or a leaf's place and sums of its blocks."""
        number, place, part = chunk.about
        task = self.tasks[number]
        _, leaf = list(_counted_leaves(task))[place]
        if part is not None:
            return number, None, *_binned(self._losses(number, Region(leaf, *part), io))
        sums = np.zeros(leaf.grid_shape)
        for region in regions_in(leaf, _ELEMENTS):
            pairs = block_pairs(region)
            found = self._losses(number, region, io).reshape(pairs)
            sums[region.blocks] += found.sum(axis=tuple(range(1, len(pairs), 2)))
            io.passed(io.nbytes(region), task.instance.label)
        return number, place, 0, sums

    def total(self) -> dict[Any, Any]:
        return {}

    def add(
        self, total: dict[Any, Any], partial: tuple[int, int | None, int, NDArray[Any]]
    ) -> dict[Any, Any]:
        number, place, low, found = partial
        own = found if place is not None else _joined(total.get((number, None)), (low, found))
        total[number, place] = own
        return total

    def merge(self, partials: list[Any], io: TensorIO) -> Decision:  # noqa: ARG002
        (total,) = partials
        found = []
        for number, task in enumerate(self.tasks):
            bins = total.get((number, None))
            for block_losses in self._of_blocks(number, total):
                bins = _joined(bins, _binned(block_losses))
            least, most = pruned_range(task)
            low, counts = bins or (0, np.zeros(0, dtype=np.int64))
            counted = Counted.of(low, counts, least, most)
            found.append([counted.below, counted.keys, counted.counts])
        return Decision(found)

    def _of_blocks(self, number: int, sums: Mapping[Any, Floats]) -> Iterator[Floats]:
        """The loss of each block per element, of every block that is more than an element."""
        task = self.tasks[number]
        places = {(block.label, leaf): place for place, (block, leaf) in enumerate(_counted_leaves(task))}
        for member, _ in members_of(task.instance.scope):
            block = member.block
            if not _single(block):
                own = [
                    sums[number, places[block.label, leaf]].transpose(order)
                    for leaf, order in leaves_of(block)
                    if (block.label, leaf) in places
                ]
                total = own[0]
                for one in own[1:]:
                    total = total + one
                yield total / block.numel_per_block

    def _losses(self, number: int, region: Region, io: TensorIO) -> Floats:
        """What is lost by each weight of a region."""
        task, name = self.tasks[number], region.leaf.tensor
        one, shape = loss_inputs(task)[name], io.tensors[name].shape
        rows = _goes_whole(region.leaf, one, shape)
        seen, dim = _seen(one, shape)
        factors = self.factors[name, rows, self.gradients[number]]
        if rows:
            own = along(region, factors, seen, 2 * len(seen) - 3 - dim)
            return np.ascontiguousarray(np.broadcast_to(own, region.extent))
        losses = _magnitudes(task, region, io)
        losses *= losses
        losses *= along(region, factors, seen, dim)
        return losses


def _magnitudes(task: Task, region: Region, io: TensorIO) -> Floats:
    """Of the weights of a region, 0 where one is not finite and the rule says that this ranks lowest."""
    loaded = io.load(region)
    if loaded.stored.codes is None:
        found = Elements(loaded.view, loaded.dtype).magnitudes()
    else:
        found = np.abs(io.values(loaded))
    if task.instance.score.nonfinite == "prune":
        found[~np.isfinite(found)] = 0.0
    refuse_nonfinite(loaded, Elements(found.view(np.uint64), "F64", weights=True))
    return found


def pruned_range(task: Task) -> tuple[int, int]:
    """How many blocks of an instance go at least and at most."""
    scope = task.instance.scope
    least, most = kept_range(task)
    scopes = prod(scope.grid_shape)
    return scopes * (scope.blocks_per_scope - most), scopes * (scope.blocks_per_scope - least)


def kept_range(task: Task) -> tuple[int, int]:
    """How many blocks of a scope survive at least and at most, both as `multiple_of` allows."""
    found = task.instance.kept_range
    if found is None:
        raise TypeError(f"{task.instance.label} shares no budget")
    return found


def _binned(losses: Floats) -> tuple[int, Ints]:
    """The first bin of some losses, and how many lie in it and in those that follow."""
    keys = keys_of(losses)
    if not keys.size:
        return 0, np.zeros(0, dtype=np.int64)
    low = int(keys.min())
    return low, np.bincount(keys - low).astype(np.int64)


def _joined(one: tuple[int, Ints] | None, other: tuple[int, Ints]) -> tuple[int, Ints]:
    """The bins of both."""
    if one is None or not one[1].size:
        return other
    if not other[1].size:
        return one
    low = min(one[0], other[0])
    counts = np.zeros(max(begin + own.size for begin, own in (one, other)) - low, dtype=np.int64)
    for begin, own in (one, other):
        counts[begin - low : begin - low + own.size] += own
    return low, counts
