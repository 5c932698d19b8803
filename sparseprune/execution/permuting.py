"""Permuting: the order of the units of each interior in which N:M prunes least, found before pruning begins.

Owns the search as a pass, and the source that serves all that moves in its new order, so that every other
pass works on tensors as if they had been stored so.
"""

from __future__ import annotations

import base64
import zlib
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint.permuted import Permuted, PermutedSource, both_sides, permutations_bytes
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.engine.permuting import best_order, pruned
from sparseprune.errors import SparsityError
from sparseprune.execution.block_norms import Known
from sparseprune.execution.passes import Chunk, Decision, Outcomes, Pass
from sparseprune.execution.permutable import SAMPLED
from sparseprune.execution.pruning import one_torch_thread, stopped_by
from sparseprune.execution.ranking import Ranking
from sparseprune.execution.regions import Region, cut, whole_part
from sparseprune.execution.runner import Job, Record, write_through
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Sink, Source, StoredTensor
    from sparseprune.execution.inputs import TaskInput
    from sparseprune.execution.permutable import Permutation, Weighed
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.schedule import Schedule
    from sparseprune.spec.structures import Interior

    Order = NDArray[np.int32]
    Orders = dict[str, dict[int, Order]]
    Floats = NDArray[np.float64]

_PIECE = 1 << 20  # elements that are looked at together
_LEAST_DAMP = 1e-6
_SMALLEST = 2.0**-40  # numbers from here to its inverse can be multiplied with squares in float32


class Found(Struct, frozen=True, eq=False):
    """The orders of an interior, (sets, size), and what N:M would prune of its scores before and after.

    Both are shares of the sum of all scores.
    """

    permutation: Permutation
    orders: Order
    before: float
    after: float


def find_orders(
    schedule: Schedule, reader: Source, output: Sink, progress: Progress
) -> tuple[tuple[Found, ...], Source]:
    """Look for all orders of a plan, or recall what an earlier run noted, and write them beside the report.

    What comes after reads by the source that is given: that of the input, permuted.
    """
    given_up, check = stopped_by()
    tensors, permutations = schedule.plan.checkpoint.tensors, schedule.plan.permutations.found
    io, record = (
        TensorIO(reader, output, tensors, "cpu", progress, check),
        Record(output, Outcomes(), progress),
    )
    jobs = [
        Job(number, f"order{number}", one.interior.module, FindOrders(one))
        for number, one in enumerate(permutations)
    ]
    with one_torch_thread() if schedule.uses_torch else nullcontext():
        values = write_through(jobs, io, record, schedule.search_resources, given_up, copies=False)
    found = tuple(_found(one, values[number]) for number, one in enumerate(permutations))
    orders: Orders = {}
    for one in found:
        orders |= orders_of(one.permutation.interior, one.orders, tensors)
    permuted = [Permuted(tensors[name], own) for name, own in orders.items()]
    permuted += [each for one in permutations for each in beside(one, orders)]
    if output.layout.permutations_file is not None:
        output.add_file(output.layout.permutations_file, permutations_bytes(orders))
    return found, PermutedSource(reader, permuted)


def orders_of(interior: Interior, orders: Order, tensors: Mapping[str, StoredTensor]) -> Orders:
    """The order of every tensor of an interior along the dimension of its units, each (leading, indices).

    `orders` (sets, size) of the units.
    """
    found: Orders = {}
    known: dict[tuple[Any, ...], Order] = {}  # most tensors of an interior move alike
    for part in interior.parts:
        size = tensors[part.tensor].shape[part.dim]
        before = found.get(part.tensor, {}).get(part.dim)
        key = (size, part.begin, part.step, part.runs, part.width, part.stacked)
        if before is None and key in known:
            found[part.tensor] = {part.dim: known[key]}
            continue
        leading = interior.sets if part.stacked else 1
        order = np.tile(np.arange(size, dtype=np.int32), (leading, 1)) if before is None else before.copy()
        for one, own in enumerate(orders):
            row, begin = (one, part.begin) if part.stacked else (0, part.begin + one * part.step)
            units = (own[:, None] * part.width + np.arange(part.width)).reshape(-1)
            for run in range(part.runs):
                at = begin + run * units.size
                order[row, at : at + units.size] = at + units
        found[part.tensor] = {part.dim: order}
        if before is None:
            known[key] = order
    return found


def beside(permutation: Permutation, orders: Mapping[str, Mapping[int, Order]]) -> Iterator[Permuted]:
    """Statistics and scores of the tensors of an interior, in the order of these."""
    seen: set[tuple[Any, ...]] = set()
    for one in permutation.beside:
        stored, order = one.stored, orders[one.part.tensor][one.part.dim]
        if (stored.shard, stored.name) in seen:
            continue
        seen.add((stored.shard, stored.name))
        if one.moves == "both":
            yield both_sides(stored, order)
        else:
            yield Permuted(stored, {one.part.dim if one.moves == "alike" else len(stored.shape) - 1: order})


# -- the search --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FindOrders(Pass):
    """The orders of an interior, the members of a stack one by one."""

    permutation: Permutation

    @property
    def decides(self) -> str:
        return "order"

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        weighed, memory = self.permutation.weighed, self.permutation.memory(io.tensors)
        stacked = weighed[0].part.stacked
        nbytes = sum(io.tensors[one.part.tensor].nbytes for one in weighed)
        members = self.permutation.interior.sets if stacked else 1
        for member in range(members):
            yield Chunk(member if stacked else None, nbytes // members, memory)

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[Order, float, float, float]:
        """Orders (sets, size) of the sets of a member, what they prune before and after, and all there is."""
        one, size = self.permutation, self.permutation.interior.size
        sets = [*range(one.interior.sets)] if chunk.about is None else [chunk.about]
        found = [_Scores(weighed, chunk.about or 0, io) for weighed in one.weighed]
        sampled = [np.concatenate(list(own.pieces(sample=True)), axis=1) for own in found]
        orders = np.tile(np.arange(size), (len(sets), 1))
        if not all(np.isfinite(each).all() for each in sampled):
            return orders.astype(np.int32), 0.0, 0.0, 0.0  # pruning says why
        pattern = one.weighed[0].keep, one.weighed[0].group
        for number, own in zip(sets, orders, strict=True):
            pairs = zip(found, sampled, strict=True)
            parts = [part for scores, each in pairs for part in scores.of_set(each, number, size)]
            joined = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            cells = one.cells[number] if one.cells else None
            own[:] = best_order(joined, *pattern, cells=cells, seed=number, between=io.check)
        totals = np.zeros((len(sets), 3))  # for each set what all rows lose as they lie, in its order, of all
        for scores, part in zip(found, sampled, strict=True):
            for each in scores.pieces() if scores.is_sampled else [part]:
                io.check()
                for place, (number, own) in enumerate(zip(sets, orders, strict=True)):
                    for rows in scores.of_set(each, number, size):
                        ways = [pruned(rows, order, *pattern) for order in (np.arange(size), own)]
                        totals[place] += (*ways, rows.sum(dtype=np.float64))
        in_vain = ~(totals[:, 1] < totals[:, 0])
        orders[in_vain], totals[in_vain, 1] = np.arange(size), totals[in_vain, 0]
        before, after, whole = totals.sum(axis=0).tolist()
        return orders.astype(np.int32), before, after, whole

    def merge(self, partials: list[Any], io: TensorIO) -> Decision:
        orders = np.concatenate([order for order, *_ in partials])
        before, after, whole = (sum(column) for column in list(zip(*partials, strict=True))[1:])
        text = base64.b85encode(zlib.compress(orders.astype("<i4").tobytes())).decode()
        nbytes = sum(io.tensors[one.part.tensor].nbytes for one in self.permutation.weighed)
        return Decision([text, before, after, whole], nbytes)

    def decided(self, value: Any) -> Pass | None:  # noqa: ANN401
        try:
            _found(self.permutation, value)
        except (ValueError, TypeError, zlib.error):
            return None
        return Known(tuple(value))


def _found(permutation: Permutation, value: Sequence[Any]) -> Found:
    """What a decision says; ValueError where it is none."""
    text, before, after, whole = value
    interior = permutation.interior
    orders = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i4")
    orders = orders.reshape(interior.sets, interior.size)
    if (np.sort(orders, axis=1) != np.arange(interior.size)).any():
        raise ValueError("no order")
    return Found(permutation, orders, before / (whole or 1.0), after / (whole or 1.0))


class _Scores:
    """What is lost where an element of a matrix is pruned: its square, times what its inputs count."""

    def __init__(self, weighed: Weighed, member: int, io: TensorIO) -> None:
        part, score = weighed.part, weighed.score
        self._weighed, self._io = weighed, io
        self._stored = io.tensors[part.tensor]
        if score is not None and score.role == "values":
            self._stored = score.stored
        shape = self._stored.shape
        grid = prod(shape[int(part.stacked) : part.dim]), shape[part.dim], prod(shape[part.dim + 1 :])
        steps, first = (prod(grid[1:]), grid[2], 1), member * prod(grid) if part.stacked else 0
        leaf = BoundBlock(part.tensor, part.tensor, grid, steps, first, (1, 1, 1))
        self._regions = [Region(leaf, one.begin, one.extent) for one in cut(whole_part(grid), (0, 2), _PIECE)]
        self._factors = self._factor(member)
        self._stride = -(-prod(grid) // SAMPLED)

    @property
    def is_sampled(self) -> bool:
        """Whether orders are looked for by a part of the rows."""
        return self._stride > 1

    def pieces(self, *, sample: bool = False) -> Iterator[NDArray[np.float32]]:
        """(units, rows) of some rows at one time: of all, or of a sample far apart."""
        for region in self._regions[:: self._stride if sample else 1]:
            values = values_of(self._io.load(region, self._stored).view, self._stored.dtype)
            values = values.astype(np.float32)
            np.square(values, out=values)
            if self._factors is not None:
                ends = zip(region.begin, region.extent, self._factors.shape, strict=True)
                own = [slice(at, at + size) if several > 1 else slice(None) for at, size, several in ends]
                values = values * self._factors[tuple(own)]
            yield np.ascontiguousarray(values.transpose(1, 0, 2)).reshape(region.extent[1], -1)

    def of_set(self, scores: NDArray[np.float32], one: int, size: int) -> Iterator[NDArray[np.float32]]:
        """The rows of the `size` units of a set in each of its runs: (size, rows)."""
        part = self._weighed.part
        begin = part.begin + (0 if part.stacked else one * part.step)
        for run in range(part.runs):
            yield scores[begin + run * size : begin + (run + 1) * size]

    def _factor(self, member: int) -> NDArray[np.float32] | None:
        """What the inputs of a matrix count, a shape that broadcasts to (outer, units, inner); None for 1."""
        weighed, io = self._weighed, self._io
        one = weighed.moment or (weighed.score if weighed.score and weighed.score.role == "vector" else None)
        if one is None:
            return None
        if one.role == "moment":
            factors = self._curvature(one, member)
        else:
            vector = Ranking(weighed.task, io).vector(one)
            factors = vector[member] if vector.ndim > 1 else vector
            factors = factors if weighed.task.instance.score.kind == "obd" else np.square(factors)
        most = float(factors.max(initial=0.0))
        if not _SMALLEST < most < 1 / _SMALLEST and 0 < most < float("inf"):
            factors = factors / most
        where = one.dim % len(io.tensors[weighed.part.tensor].shape) - weighed.part.dim
        along = [-1 if at == (where > 0) - (where < 0) + 1 else 1 for at in range(3)]
        return factors.astype(np.float32).reshape(along)

    def _curvature(self, one: TaskInput, member: int) -> Floats:
        """What is lost at the least where a weight of 1 goes, for each input; 1 where nothing was seen."""
        import torch  # noqa: PLC0415  (orders by magnitude do without)

        from sparseprune.engine.curvature import Curvature  # noqa: PLC0415

        method = self._weighed.task.instance.reconstruct
        if method is None:
            raise TypeError(f"{one.key} is not reconstructed")
        size = one.stored.shape[-1]
        begin = member * size * size if len(one.stored.shape) > 2 else 0
        moment = values_of(self._io.load_run(one.stored, (begin, size * size)), one.stored.dtype)
        try:
            found = Curvature.of(
                torch.from_numpy(moment.astype(np.float64)).reshape(size, size), max(method.damp, _LEAST_DAMP)
            )
        except SparsityError as error:
            raise SparsityError(f"{one.key}: {error} ({one.stored.shard.path})") from error
        factors: Floats = found.singles().numpy()
        return factors if factors.any() else np.ones(size)
