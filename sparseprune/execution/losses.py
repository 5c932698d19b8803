"""Losses: how many blocks of an instance cost how much, to second order, counted in bins as tensors pass by.

Owns what the loss of a block is and the bins; who shares a budget by them is allocation's. A job has the
instances that share a second moment, so that each moment is factored once. Imports torch where it factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.errors import SparsityError
from sparseprune.execution.block_norms import Known, block_pairs
from sparseprune.execution.inputs import holds_rows, output_dim
from sparseprune.execution.passes import Chunk, Decision, Pass
from sparseprune.execution.plan import together
from sparseprune.execution.ranking import Elements, along, diagonals, refuse_nonfinite
from sparseprune.execution.regions import Region, leaves_of, members_of, regions_in
from sparseprune.execution.runner import Job
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

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


Counted = tuple[int, Sequence[int], Sequence[int]]
"""How many blocks lie in earlier bins than some, the keys of these, ascending, and how many lie in each."""


def keys_of(losses: Floats) -> Ints:
    """The bins of numbers that are not negative, in their order: the high bits of float64."""
    bits = np.ascontiguousarray(losses, dtype=np.float64).reshape(-1).view(np.uint64)
    return (bits >> np.uint64(_SHIFT)).astype(np.int64)


def loss_jobs(tasks: Sequence[Task], tensors: Mapping[str, StoredTensor]) -> list[tuple[Job, list[int]]]:
    """Jobs that give what is counted of each of their tasks, whose numbers stand beside them.

    Tasks that share moments, damped alike, are together. Rules of which some matrix has no gradients count
    what outputs lose.
    """
    without = rules_without_gradients(tasks)
    jobs = []
    moments = [{(moment_name(one), _damp(task)) for one in _inputs(task)} for task in tasks]
    for order, members in enumerate(map(sorted, together(moments))):
        some = tuple(tasks[number] for number in members)
        first = FactorMoments(some, tuple(task.rule not in without for task in some))
        held = sum(_held(task, tensors) for task in some)
        jobs.append((Job(order, f"allocate {order}", some[0].part, first, held), members))
    return jobs


def rules_without_gradients(tasks: Iterable[Task]) -> dict[str, str]:
    """The rules that have a matrix without gradients, each with its name."""
    found: dict[str, str] = {}
    for task in tasks:
        for one in _inputs(task):
            if one.gradients is None:
                found.setdefault(task.rule, one.key)
    return found


def moment_name(one: TaskInput) -> str:
    """What tells a stored moment from others."""
    return f"{one.stored.shard.path}\0{one.stored.name}"


def memory_of(tasks: Iterable[Task], tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes of the largest chunk."""
    leaves = [one.memory for task in tasks for one in _leaves(task, tensors)]
    return max([_ELEMENTS * _ELEMENT_BYTES, *leaves])


def bytes_read(tasks: Iterable[Task], tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that the jobs of some tasks read: moments and weights, each once."""
    leaves = [one for task in tasks for one in _leaves(task, tensors)]
    moments = {moment_name(one.input): one.input.stored.nbytes for one in leaves}
    read = ((prod(one.leaf.view_shape), tensors[one.leaf.tensor]) for one in leaves)
    weights = sum(numel * stored.nbytes // max(1, stored.numel) for numel, stored in read)
    return weights + sum(moments.values())


def _held(task: Task, tensors: Mapping[str, StoredTensor]) -> int:
    """Bytes that a job keeps of a task: a number for each input or row of its matrices, sums of blocks."""
    leaves = _leaves(task, tensors)
    lines = {one.leaf.tensor: sum(one.shape[-2:]) * prod(one.shape[:-2]) for one in leaves}
    blocks = sum(prod(one.leaf.grid_shape) for one in leaves if not one.is_element)
    return 8 * (KEYS + sum(lines.values()) + blocks)


def _inputs(task: Task) -> Iterable[TaskInput]:
    """The statistics that tell losses."""
    return task.with_role("loss").values()


class _Leaf(Struct, frozen=True):
    """A leaf that has a say, the block that it belongs to, and the second moment of its weight.

    `shape` is that of the weight, as a stack where it has several moments, and `dim` the dimension of inputs
    there.
    """

    block: AnyBlock
    leaf: BoundBlock
    input: TaskInput
    shape: Shape
    dim: int

    @property
    def is_element(self) -> bool:
        """Whether its blocks are single elements."""
        return isinstance(self.block, BoundBlock) and self.block.numel_per_block == 1

    @property
    def rows(self) -> bool:
        """Whether rows go whole, so that nothing in their matrix can make up for them."""
        return self.leaf.numel_per_block > 1 and holds_rows(self.leaf, self.shape, self.dim)

    @property
    def memory(self) -> int:
        """Bytes that its moment takes while it is factored, and its matrix where rows go whole."""
        stored = DTYPES[self.input.stored.dtype].itemsize
        each = stored + _COPIES * max(4, stored)
        return each * self.shape[self.dim] ** 2 + self.rows * _WEIGHT_BYTES * prod(self.shape[-2:])


def _leaves(task: Task, tensors: Mapping[str, StoredTensor]) -> list[_Leaf]:
    """The leaves of a task that have a say."""
    found = []
    inputs = task.with_role("loss")
    for member, _ in members_of(task.instance.scope):
        for leaf in member.block.leaves:
            if leaf.tensor in inputs:
                one, shape = inputs[leaf.tensor], tensors[leaf.tensor].shape
                dim = one.dim % len(shape)
                if len(shape) == 2 and len(one.stored.shape) == 3:  # matrices lie one below another
                    matrices = one.stored.shape[0]
                    shape, dim = (matrices, shape[0] // matrices, shape[1]), dim + 1
                found.append(_Leaf(member.block, leaf, one, shape, dim))
    return found


_Key = tuple[str, bool, bool]
"""A weight, whether its rows go whole, and whether gradients count."""


@dataclass(frozen=True, slots=True, eq=False)
class _Losses(Pass):
    """Passes that count the losses of each of `tasks`; `gradients` says whose statistics have some."""

    tasks: tuple[Task, ...]
    gradients: tuple[bool, ...]

    @property
    def decides(self) -> str:
        return "losses"

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        try:
            found = [(below, tuple(keys), tuple(counts)) for below, keys, counts in value]
        except (TypeError, ValueError):
            return None
        return Known(found) if len(found) == len(self.tasks) else None


@dataclass(frozen=True, slots=True, eq=False)
class FactorMoments(_Losses):
    """What a loss is made of by second moments: a factor for each input of a matrix, or for each row."""

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        """One for each matrix of a moment, by its name and number."""
        for name, about in self._weights(io).items():
            memory = max(one.memory for one in about.values())
            stored = next(iter(about.values())).input.stored
            matrices = prod(stored.shape[:-2])
            for matrix in range(matrices):
                yield Chunk((name, matrix), stored.nbytes // matrices, memory)

    def work(self, chunk: Chunk, io: TensorIO) -> list[tuple[_Key, bool, Floats]]:
        """For each weight the factors of a matrix, with whether it is one of a stack."""
        import torch  # noqa: PLC0415  (who reads notes of an earlier run does without)

        from sparseprune.engine.curvature import Curvature  # noqa: PLC0415
        from sparseprune.execution.torch_tiles import tensor_of  # noqa: PLC0415

        name, matrix = chunk.about
        about = self._weights(io)[name]
        one = next(iter(about.values())).input
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
                found.append((key, len(own.input.stored.shape) > 2, factors))
        return found

    def _weights(self, io: TensorIO) -> dict[str, dict[_Key, _Leaf]]:
        """The weights that each moment is of."""
        found: dict[str, dict[_Key, _Leaf]] = {}
        for task, gradients in zip(self.tasks, self.gradients, strict=True):
            for one in _leaves(task, io.tensors):
                found.setdefault(moment_name(one.input), {})[one.leaf.tensor, one.rows, gradients] = one
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


def _rows(one: _Leaf, matrix: int, io: TensorIO) -> Floats:
    """The weights of a matrix, (rows, inputs), in float64."""
    size = prod(one.shape[-2:])
    values = io.load_values(io.tensors[one.leaf.tensor], (matrix * size, size)).reshape(one.shape[-2:])
    return values if one.dim == len(one.shape) - 1 else np.ascontiguousarray(values.T)


def _gradients(one: _Leaf, matrix: int, io: TensorIO) -> Floats:
    """The mean square of the gradient at each output of a matrix, (rows,)."""
    stored = one.input.gradients
    if stored is None:
        raise TypeError(f"{one.leaf.tensor} has no gradients")
    groups = one.shape[output_dim(one.shape, one.dim)] // stored.shape[-1]
    bits = diagonals(stored, io, range(matrix * groups, (matrix + 1) * groups))
    squares = values_of(bits, stored.dtype).astype(np.float64)
    if not (squares >= 0).all() or np.isinf(squares).any():
        text = "the second moment of its gradients has a diagonal that is none: calibrate again"
        raise SparsityError(f"{one.leaf.tensor}: {text} ({stored.shard.path})")
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
            for place, one in enumerate(_leaves(task, io.tensors)):
                if not one.is_element:
                    yield Chunk((number, place, None), memory=memory)
                    continue
                for region in regions_in(one.leaf, _ELEMENTS):
                    yield Chunk((number, place, (region.begin, region.extent)), io.nbytes(region), memory)

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[int, int | None, int, NDArray[Any]]:
        """The number of a task; then the first bin and counts, or a leaf's place and sums of its blocks."""
        number, place, part = chunk.about
        one = _leaves(self.tasks[number], io.tensors)[place]
        if part is not None:
            keys = keys_of(self._losses(number, one, Region(one.leaf, *part), io))
            low = int(keys.min())
            return number, None, low, np.bincount(keys - low)
        sums = np.zeros(one.leaf.grid_shape)
        for region in regions_in(one.leaf, _ELEMENTS):
            pairs = block_pairs(region)
            found = self._losses(number, one, region, io).reshape(pairs)
            sums[region.blocks] += found.sum(axis=tuple(range(1, len(pairs), 2)))
            io.passed(io.nbytes(region), self.tasks[number].part)
        return number, place, 0, sums

    def total(self) -> dict[Any, Any]:
        """For each task the blocks in every bin, and the sums of its leaves by their places."""
        return {}

    def add(
        self, total: dict[Any, Any], partial: tuple[int, int | None, int, NDArray[Any]]
    ) -> dict[Any, Any]:
        number, place, low, found = partial
        if place is None:
            counts = total.setdefault((number, None), np.zeros(KEYS, dtype=np.int64))
            counts[low : low + found.size] += found
        else:
            total[number, place] = found
        return total

    def merge(self, partials: list[Any], io: TensorIO) -> Decision:
        (total,) = partials
        found = []
        for number, task in enumerate(self.tasks):
            counts = total.get((number, None), np.zeros(KEYS, dtype=np.int64))
            for losses in self._of_blocks(number, total, io):
                counts = counts + np.bincount(keys_of(losses), minlength=KEYS)
            least, most = pruned_range(task)
            ends = np.cumsum(counts)
            inside = np.flatnonzero((counts > 0) & (ends > least) & (ends - counts < most))
            below = int((ends - counts)[inside[0]]) if inside.size else least
            found.append([below, inside.tolist(), counts[inside].tolist()])
        return Decision(found)

    def _of_blocks(self, number: int, sums: Mapping[Any, Floats], io: TensorIO) -> Iterator[Floats]:
        """The loss of each block per element, of every block that is more than an element."""
        task = self.tasks[number]
        leaves = enumerate(_leaves(task, io.tensors))
        places = {(one.block.label, one.leaf): place for place, one in leaves if not one.is_element}
        for member, _ in members_of(task.instance.scope):
            own = [
                sums[number, places[member.block.label, leaf]].transpose(order)
                for leaf, order in leaves_of(member.block)
                if (member.block.label, leaf) in places
            ]
            if own:
                yield reduce(np.add, own) / member.block.numel_per_block

    def _losses(self, number: int, one: _Leaf, region: Region, io: TensorIO) -> Floats:
        """What is lost by each weight of a region."""
        rows = one.rows
        factors = self.factors[one.leaf.tensor, rows, self.gradients[number]]
        if rows:
            own = along(region, factors, one.shape, output_dim(one.shape, one.dim))
            return np.ascontiguousarray(np.broadcast_to(own, region.extent))
        losses = _magnitudes(self.tasks[number], region, io)
        losses *= losses
        losses *= along(region, factors, one.shape, one.dim)
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
