"""Permuting: the order of the units of each interior in which N:M prunes least, found before pruning begins.

Owns the search as passes, and the source that serves all that moves in its new order, so that every other
pass works on tensors as if they had been stored so. What no rule reaches of them is copied from it, too.
"""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint.permuted import Permuted, PermutedSource, both_sides
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.engine.permuting import best_order, curvature, pruned
from sparseprune.errors import SparsityError
from sparseprune.execution.passes import Chunk, Decision, Outcomes, Pass
from sparseprune.execution.permutable import SAMPLED
from sparseprune.execution.ranking import Ranking
from sparseprune.execution.runner import Job, Record, decide_through
from sparseprune.execution.tensor_io import TensorIO, pattern_of

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Sink, Source, StoredTensor
    from sparseprune.execution.permutable import Permutation, Permutations, Weighed
    from sparseprune.execution.regions import Resources
    from sparseprune.execution.runner import Progress
    from sparseprune.spec.structures import Interior

    Order = NDArray[np.int32]
    Orders = dict[str, dict[int, Order]]
    Floats = NDArray[np.float64]

_PIECE = 1 << 20  # elements that are looked at together
_COPY_BYTES = 4 << 20
_SMALLEST = 2.0**-40  # numbers from here to its inverse can be multiplied with squares in float32


class Found(Struct, frozen=True, eq=False):
    """The orders of an interior, (sets, size), and what N:M would prune of its scores before and after.

    Both are shares of the sum of all scores.
    """

    permutation: Permutation
    orders: Order
    before: float
    after: float


class Moved(Struct, frozen=True, eq=False):
    """All that moves: what was found, the order of each tensor by its dimension, and the source of both."""

    found: tuple[Found, ...]
    orders: Orders
    source: Source


def find_orders(
    permutations: Permutations,
    io: TensorIO,
    output: Sink,
    resources: Resources,
    progress: Progress,
    given_up: threading.Event,
) -> Moved:
    """Look for all orders, or recall what an earlier run noted; the source is that of `io`, permuted."""
    passes = [FindOrders(one) for one in permutations.found]
    jobs = (
        Job(number, f"order{number}", one.permutation.interior.module, one)
        for number, one in enumerate(passes)
    )
    values = decide_through(jobs, io, Record(output, Outcomes(), progress), resources, given_up)
    found = tuple(_found(one, values[number]) for number, one in enumerate(permutations.found))
    orders: Orders = {}
    for one in found:
        orders |= orders_of(one.permutation.interior, one.orders, io.tensors)
    permuted = [Permuted(io.tensors[name], own) for name, own in orders.items()]
    for one in found:
        permuted += beside(one.permutation, orders)
    return Moved(found, orders, PermutedSource(io.reader, permuted))


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
        return _Search(self.permutation, chunk.about, io).run()

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
        return _Known(tuple(value))


@dataclass(frozen=True, slots=True)
class _Known(Pass):
    """An order that is known: nothing is left to do."""

    value: tuple[Any, ...]

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        return iter(())

    def work(self, chunk: Chunk, io: TensorIO) -> None:  # noqa: ARG002
        raise TypeError("a known order has no chunks")

    def merge(self, partials: list[Any], io: TensorIO) -> Any:  # noqa: ANN401, ARG002
        return self.value


def _found(permutation: Permutation, value: Sequence[Any]) -> Found:
    """What a decision says; ValueError where it is none."""
    text, before, after, whole = value
    interior = permutation.interior
    orders = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<i4")
    orders = orders.reshape(interior.sets, interior.size)
    if (np.sort(orders, axis=1) != np.arange(interior.size)).any():
        raise ValueError("no order")
    return Found(permutation, orders, before / (whole or 1.0), after / (whole or 1.0))


class _Piece(Struct, frozen=True):
    """A part of a matrix seen as (outer, units, inner): some places of the dimensions around its units."""

    outer: tuple[int, int]
    inner: tuple[int, int]


class _Search:
    """The search for the orders of an interior, or of the set of one member of a stack."""

    def __init__(self, permutation: Permutation, member: int | None, io: TensorIO) -> None:
        self._interior = permutation.interior
        self._cells = permutation.cells
        self._sets = range(self._interior.sets) if member is None else range(member, member + 1)
        self._io = io
        self._check = io.check
        self._scores = [_Scores(one, member or 0, io) for one in permutation.weighed]
        self._pattern = permutation.weighed[0].keep, permutation.weighed[0].group

    def run(self) -> tuple[Order, float, float, float]:
        """The orders, and what they prune: before, after, of all."""
        sampled = [np.concatenate(list(one.pieces(sample=True)), axis=1) for one in self._scores]
        plain = np.arange(self._interior.size)
        if not all(np.isfinite(each).all() for each in sampled):
            return np.tile(plain, (len(self._sets), 1)).astype(np.int32), 0.0, 0.0, 0.0  # pruning says why
        orders = []
        for one in self._sets:
            pairs = zip(self._scores, sampled, strict=True)
            rows = [part for own, each in pairs for part in own.of_set(each, one, self._interior.size)]
            scores = np.concatenate(rows, axis=1) if len(rows) > 1 else rows[0]
            cells = self._cells[one] if self._cells else None
            orders.append(best_order(scores, *self._pattern, cells=cells, seed=one, between=self._check))
        totals = self._totals(sampled, orders)
        for number, (before, after, _) in enumerate(totals):
            if not after < before:
                orders[number] = plain
                totals[number] = (before, before, totals[number][2])
        before, after, whole = (sum(column) for column in zip(*totals, strict=True))
        return np.stack(orders).astype(np.int32), before, after, whole

    def _totals(
        self, sampled: Sequence[NDArray[np.float32]], orders: Sequence[NDArray[np.int64]]
    ) -> list[tuple[float, float, float]]:
        """For each set what all rows lose as they lie and in its order, and the sum of all scores."""
        plain = np.arange(self._interior.size)
        totals = [(0.0, 0.0, 0.0)] * len(orders)
        for own, part in zip(self._scores, sampled, strict=True):
            for each in own.pieces() if own.is_sampled else [part]:
                self._check()
                for number, (one, order) in enumerate(zip(self._sets, orders, strict=True)):
                    for rows in own.of_set(each, one, self._interior.size):
                        before, after, whole = totals[number]
                        before += pruned(rows, plain, *self._pattern)
                        after += pruned(rows, order, *self._pattern)
                        totals[number] = before, after, whole + float(rows.sum(dtype=np.float64))
        return totals


class _Scores:
    """What is lost where an element of a matrix is pruned: its square, times what its inputs count."""

    def __init__(self, weighed: Weighed, member: int, io: TensorIO) -> None:
        self._weighed, self._io = weighed, io
        part = weighed.part
        is_read = weighed.score is not None and weighed.score.role == "values"
        self._stored = weighed.score.stored if is_read and weighed.score else io.tensors[part.tensor]
        shape = self._stored.shape
        leading = int(part.stacked)
        self._first = member * prod(shape[1:]) if part.stacked else 0
        self._outer = prod(shape[leading : part.dim])
        self._units, self._inner = shape[part.dim], prod(shape[part.dim + 1 :])
        self._factors = self._factor(weighed, member, io)
        self._pieces = list(self._cut())
        total = self._outer * self._units * self._inner
        self._stride = -(-total // SAMPLED)

    @property
    def is_sampled(self) -> bool:
        """Whether orders are looked for by a part of the rows."""
        return self._stride > 1

    def pieces(self, *, sample: bool = False) -> Iterator[NDArray[np.float32]]:
        """(units, rows) of some rows at one time: of all, or of a sample far apart."""
        for piece in self._pieces[:: self._stride if sample else 1]:
            values = values_of(self._read(piece), self._stored.dtype).astype(np.float32)
            np.square(values, out=values)
            shaped = values.reshape(piece.outer[1], self._units, piece.inner[1])
            factors = self._factors
            if factors is not None:
                parts = (piece.outer, (0, self._units), piece.inner)
                own = [
                    slice(begin, begin + size) if factors.shape[dim] > 1 else slice(None)
                    for dim, (begin, size) in enumerate(parts)
                ]
                shaped = shaped * factors[tuple(own)]
            yield np.ascontiguousarray(shaped.transpose(1, 0, 2)).reshape(self._units, -1)

    def of_set(self, scores: NDArray[np.float32], one: int, size: int) -> Iterator[NDArray[np.float32]]:
        """The rows of the `size` units of a set in each of its runs: (size, rows)."""
        part = self._weighed.part
        begin = part.begin + (0 if part.stacked else one * part.step)
        for run in range(part.runs):
            yield scores[begin + run * size : begin + (run + 1) * size]

    def _cut(self) -> Iterator[_Piece]:
        row = self._units * self._inner
        if row <= _PIECE:
            step = max(1, _PIECE // max(1, row))
            for begin in range(0, self._outer, step):
                yield _Piece((begin, min(step, self._outer - begin)), (0, self._inner))
            return
        step = max(1, _PIECE // self._units)
        for outer in range(self._outer):
            for begin in range(0, self._inner, step):
                yield _Piece((outer, 1), (begin, min(step, self._inner - begin)))

    def _read(self, piece: _Piece) -> NDArray[Any]:
        """The elements of a piece, flat."""
        (outer, count), (inner, width) = piece.outer, piece.inner
        first = self._first + outer * self._units * self._inner
        if width == self._inner:
            return self._io.load_run(self._stored, (first, count * self._units * self._inner))
        found = np.empty((self._units, width), dtype=pattern_of(self._stored))
        for unit in range(self._units):
            found[unit] = self._io.load_run(self._stored, (first + unit * self._inner + inner, width))
        return found.reshape(-1)

    def _factor(self, weighed: Weighed, member: int, io: TensorIO) -> NDArray[np.float32] | None:
        """What the inputs of a matrix count, a shape that broadcasts to (outer, units, inner); None for 1."""
        one = weighed.moment or (weighed.score if weighed.score and weighed.score.role == "vector" else None)
        if one is None:
            return None
        if one.role == "moment":
            factors = self._curvature(weighed, member, io)
        else:
            vector = Ranking(weighed.task, io).vector(one)
            factors = vector[member] if vector.ndim > 1 else vector
            factors = factors if weighed.task.instance.score.kind == "obd" else np.square(factors)
        most = float(factors.max(initial=0.0))
        if not _SMALLEST < most < 1 / _SMALLEST and 0 < most < float("inf"):
            factors = factors / most
        scaled = factors.astype(np.float32)
        rank = len(io.tensors[weighed.part.tensor].shape)
        where = one.dim % rank - weighed.part.dim
        return scaled.reshape([-1 if at == (where > 0) - (where < 0) + 1 else 1 for at in range(3)])

    def _curvature(self, weighed: Weighed, member: int, io: TensorIO) -> Floats:
        one, method = weighed.moment, weighed.task.instance.reconstruct
        if one is None or method is None:
            raise TypeError(f"{weighed.part.tensor} is not reconstructed")
        size = one.stored.shape[-1]
        begin = member * size * size if len(one.stored.shape) > 2 else 0
        bits = io.load_run(one.stored, (begin, size * size))
        moment = values_of(bits, one.stored.dtype).astype(np.float32, copy=False).reshape(size, size)
        if not np.isfinite(moment).all():
            where = f"({one.stored.shard.path})"
            raise SparsityError(f"{one.key}: the second moment of the inputs holds NaN or infinity {where}")
        return curvature(moment, method.damp)


# -- what no rule reaches ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CopyPermuted(Pass):
    """A tensor that moves and that no rule reaches: written as the source serves it."""

    name: str

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        stored = io.tensors[self.name]
        files = (str(stored.shard.relative),)
        for begin in range(0, stored.nbytes, _COPY_BYTES):
            part = (begin, min(_COPY_BYTES, stored.nbytes - begin))
            yield Chunk(part, part[1], 2 * part[1], str(begin), files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Any]:
        begin, size = chunk.about
        if io.output is None:
            raise TypeError("there is no output to write to")
        data = np.empty(size, dtype=np.uint8)
        io.reader.read_into(io.tensors[self.name], begin, data)
        io.output.write_weight(self.name, begin, data.data)
        return []
