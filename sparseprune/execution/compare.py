"""Comparing two checkpoints: what changed in each tensor, what energy is left, how far outputs move.

Owns which tensors can be compared and how. Both sides are read in the same slabs for any number of jobs, so
that sums are the same; small tensors are read together. Needs no torch. Called by the command line.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint.codes import names_beside
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.comparing import Counts, Energies, compare, compare_values
from sparseprune.engine.kernels.counting import exact_sum, totals_in_units
from sparseprune.engine.kernels.formats import FORMATS, values_of
from sparseprune.errors import CheckpointError
from sparseprune.execution.inputs import is_gradients, output_dim
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.runner import Job, batches, read_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, Statistic, Statistics, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.regions import Resources, Run

    Floats = NDArray[np.float64]
    Bytes = NDArray[np.uint8]
    Progress = Callable[[int, str], None]

SLAB = 1 << 20  # bytes of each checkpoint read at a time: both stay in the cache until they are compared
_CODED = 80  # bytes that an element takes where codes are made weights, of both sides together
_WIDEST = 16  # bytes that an element may take where it is compared by its value
_WORKED_ON = 1 << 22  # elements of a matrix whose outputs are computed together
_MOMENTS = frozenset({"F64", "F32", "F16", "BF16"})
_ROUNDED = 1e-4  # with a unit diagonal: what sums of products in float32 may be wrong by
_EPS = {"BF16": 2**-7, "F16": 2**-10}  # of dtypes that round by more


class Pair(Struct, frozen=True):
    """A tensor that both checkpoints have, with one name and one shape; `beside` codes or not."""

    before: StoredTensor
    after: StoredTensor
    beside: bool = False

    @property
    def nbytes(self) -> int:
        return self.before.nbytes + self.after.nbytes

    @property
    def by_bits(self) -> bool:
        """Whether patterns can be compared: of one dtype they mean the same."""
        return self.before.dtype == self.after.dtype

    @property
    def coded(self) -> bool:
        """Whether elements are codes on a side, so that weights are compared in place of patterns."""
        return self.before.codes is not None or self.after.codes is not None

    @property
    def known(self) -> bool:
        """Whether elements are whole bytes on both sides, and known as numbers: each can be looked at."""
        sides = self.before, self.after
        return all(one.is_counted and not (one.codes and one.codes.no_values) for one in sides)

    @property
    def is_read(self) -> bool:
        """Whether there is something to compare, elements or at least bytes."""
        return self.before.numel > 0 and (self.known or self.by_bits)

    def cut(self, slab: int) -> tuple[int, int]:
        """How many elements there are, and how many are compared at one time; bytes where these must do."""
        if not self.known:
            size = max(self.before.nbytes, self.after.nbytes)
            return size, max(1, slab if self.by_bits else size)
        direct = self.by_bits and self.before.dtype in FORMATS and not self.coded
        return self.before.numel, max(1, slab // (DTYPES[self.before.dtype].itemsize if direct else _WIDEST))

    def bytes_of(self, count: int) -> tuple[int, int]:
        """Bytes of so many elements on each side, or of so many bytes."""
        sides = self.before, self.after
        before, after = (count * DTYPES[one.dtype].itemsize if self.known else count for one in sides)
        return before, after


class TensorComparison(Struct, frozen=True):
    """What was found in one tensor. Of unlike dtypes and of codes values are compared, of one dtype bits.

    `differs` tells whether any element changed; None where that cannot be said, elements of less than a byte
    beside another dtype. These have no `counts` and no `energies` either. Places in them are flat. `holds`
    says what elements are: codes where they are on either side.
    """

    name: str
    dtype: str
    dtype_after: str
    shape: Shape
    numel: int
    differs: bool | None
    counts: Counts | None
    energies: Energies | None
    holds: Literal["weights", "codes", "packed", "beside"] = "weights"


class Sides(Struct, frozen=True):
    """Which tensors stand on one side alone, and which on both but in unlike shapes; in stored order."""

    pairs: tuple[Pair, ...]
    added: tuple[StoredTensor, ...]
    removed: tuple[StoredTensor, ...]
    reshaped: tuple[Pair, ...]


def sides_of(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor], names: Sequence[str]
) -> Sides:
    """What is to be compared of these tensors, as the headers say; one of the two has each at least."""
    beside = names_beside(before) | names_beside(after)
    there = (name for name in names if name in before and name in after)
    both = [Pair(before[name], after[name], name in beside) for name in there]
    return Sides(
        tuple(pair for pair in both if pair.before.shape == pair.after.shape),
        tuple(after[name] for name in names if name not in before),
        tuple(before[name] for name in names if name not in after),
        tuple(pair for pair in both if pair.before.shape != pair.after.shape),
    )


def compare_checkpoints(
    pairs: Sequence[Pair], reader: Source, resources: Resources, progress: Progress, slab: int = SLAB
) -> tuple[TensorComparison, ...]:
    """What is found in each pair, in their order; the same for any number of threads.

    `progress` gets how many bytes were read, of both sides, and the name of a tensor. Of several failures the
    one is raised that is the first in the order of the pairs.
    """
    todo = compare_jobs(pairs, slab)
    found = read_through(todo, TensorIO(reader), resources, progress)
    return tuple(one for order in sorted(found) for one in found[order])


def compare_jobs(pairs: Sequence[Pair], slab: int = SLAB) -> Iterator[Job]:
    """A job for each large pair, and one for neighbouring small pairs of about `slab` bytes on a side."""

    def size(pair: Pair) -> int:
        count, step = pair.cut(slab)
        return max(pair.before.nbytes, pair.after.nbytes) if count <= step else slab + 1

    for number, some in batches(pairs, size, slab):
        yield Job(number, f"compare{number}", some[0].before.name, ComparePairs(some, slab))


class Piece(Struct, frozen=True):
    """What was found in a part of a pair, from an element on; no counts where only bytes can be compared."""

    begin: int
    differs: bool | None = None
    counts: Counts | None = None
    energies: Energies | None = None


@dataclass(frozen=True, slots=True)
class ComparePairs(Pass):
    """One pair, in pieces of about `slab` bytes of each side, or several small pairs together."""

    pairs: tuple[Pair, ...]
    slab: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        if len(self.pairs) > 1:
            nbytes = sum(pair.nbytes for pair in self.pairs)
            yield Chunk(None, nbytes, 2 * nbytes + max(map(_value_bytes, self.pairs)))
            return
        pair = self.pairs[0]
        size, step = pair.cut(self.slab)
        for begin in range(0, size, step):
            end = min(begin + step, size)
            nbytes = sum(pair.bytes_of(end - begin)) if pair.is_read else pair.nbytes
            memory = _CODED * (end - begin) if _by_value(pair) else 2 * nbytes
            yield Chunk((begin, end), nbytes, memory)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Piece]:
        if chunk.about is None:
            read = [pair for pair in self.pairs if pair.is_read and not _by_value(pair)]
            before, after = (
                io.read_whole([pair.before for pair in read]),
                io.read_whole([pair.after for pair in read]),
            )
            found = map(_compared, read, repeat(0), before, after)
            return [
                _compared_values(pair, (0, pair.before.numel), io)
                if _by_value(pair)
                else next(found)
                if pair.is_read
                else Piece(0)
                for pair in self.pairs
            ]
        pair, (begin, end) = self.pairs[0], chunk.about
        if not pair.is_read:
            return [Piece(begin)]
        if _by_value(pair):
            return [_compared_values(pair, (begin, end - begin), io)]
        sides: list[Bytes] = []
        for stored, first, nbytes in zip(
            (pair.before, pair.after), pair.bytes_of(begin), pair.bytes_of(end - begin), strict=True
        ):
            sides.append(io.scratch(f"side{len(sides)}", nbytes, "u1"))
            io.reader.read_into(stored, first, sides[-1])
        return [_compared(pair, begin, *sides)]

    def merge(self, partials: list[Any], io: TensorIO) -> tuple[TensorComparison, ...]:  # noqa: ARG002
        if len(self.pairs) > 1:
            return tuple(
                _comparison(pair, [piece]) for pair, piece in zip(self.pairs, partials[0], strict=True)
            )
        return (_comparison(self.pairs[0], [piece for pieces in partials for piece in pieces]),)


def _compared(pair: Pair, begin: int, before: Bytes, after: Bytes) -> Piece:
    """The bytes of both sides from an element on."""
    if not pair.known:
        return Piece(begin, not np.array_equal(before, after))
    one, other = (
        data.view(f"u{DTYPES[stored.dtype].itemsize}")
        for data, stored in ((before, pair.before), (after, pair.after))
    )
    if pair.by_bits:
        counts, energies = compare(one, other, pair.before.dtype)
    else:
        counts, energies = compare_values(
            values_of(one, pair.before.dtype), values_of(other, pair.after.dtype)
        )
    return Piece(begin, counts.changed > 0, counts, energies)


def _by_value(pair: Pair) -> bool:
    """Whether codes are made weights to be compared."""
    return pair.is_read and pair.known and pair.coded


def _value_bytes(pair: Pair) -> int:
    """What the weights of both sides take, where they are made of codes."""
    return _CODED * pair.before.numel if _by_value(pair) else 0


def _compared_values(pair: Pair, run: Run, io: TensorIO) -> Piece:
    """The weights that elements are or stand for, on both sides."""
    counts, energies = compare_values(io.load_values(pair.before, run), io.load_values(pair.after, run))
    return Piece(run[0], counts.changed > 0, counts, energies)


def _comparison(pair: Pair, pieces: Sequence[Piece]) -> TensorComparison:
    before, after = pair.before, pair.after
    differs = None
    if pair.known or pair.by_bits:
        differs = any(piece.differs for piece in pieces)
    return TensorComparison(
        before.name,
        before.dtype,
        after.dtype,
        before.shape,
        before.numel,
        differs,
        _counts_of(pieces) if pair.known else None,
        _energies_of(pieces) if pair.known else None,
        _holds(pair),
    )


def _holds(pair: Pair) -> Literal["weights", "codes", "packed", "beside"]:
    """What both sides hold together: packed codes or codes where one side does."""
    if pair.beside:
        return "beside"
    sides = {pair.before.holds, pair.after.holds}
    return "packed" if "packed" in sides else "codes" if "codes" in sides else "weights"


def _counts_of(pieces: Sequence[Piece]) -> Counts:
    found = [(piece.begin, piece.counts) for piece in pieces if piece.counts is not None]
    firsts = [begin + counts.first_altered for begin, counts in found if counts.altered]
    each = [counts for _, counts in found]
    return Counts(
        sum(counts.zeros_before for counts in each),
        sum(counts.zeros_after for counts in each),
        sum(counts.zeroed for counts in each),
        sum(counts.altered for counts in each),
        firsts[0] if firsts else -1,
    )


def _energies_of(pieces: Sequence[Piece]) -> Energies:
    found = [(piece.begin, piece.energies) for piece in pieces if piece.energies is not None]
    changes = [(begin, energies) for begin, energies in found if energies.place >= 0]
    # Of equals max gives the first.
    begin, largest = max(changes, key=lambda change: change[1].largest, default=(0, Energies()))
    each = [energies for _, energies in found]
    return Energies(
        exact_sum(energies.before for energies in each),
        exact_sum(energies.kept for energies in each),
        exact_sum(energies.change for energies in each),
        largest.largest,
        begin + largest.place if changes else -1,
    )


def with_statistics(pairs: Sequence[Pair], statistics: Statistics) -> tuple[Pair, ...]:
    """The matrices, and stacks of them, of which there are second moments.

    CheckpointError where norms alone are there, or where a shape does not fit.
    """
    found = tuple(
        pair
        for pair in pairs
        if pair.before.name in statistics.of
        and pair.known
        and all(DTYPES[one.dtype].prunable or one.codes for one in (pair.before, pair.after))
        and len(pair.before.shape) in {2, 3}
    )
    path = statistics.checkpoint.path
    for pair in found:
        statistic, shape = statistics.of[pair.before.name], pair.before.shape
        if statistic.kind == "norm" or len(statistic.stored.shape) == 1:
            raise CheckpointError(f"{path}: has norms of inputs alone; calibrate with --kind hessian")
        shape, dim = statistic.stacked(shape, _input_dim(statistic, len(shape)))
        if dim not in {len(shape) - 2, len(shape) - 1}:
            raise CheckpointError(f"{path}: {pair.before.name} cannot have its inputs along dimension {dim}")
        wanted = (*shape[: len(shape) - 2], shape[dim], shape[dim])
        if statistic.stored.shape != wanted or statistic.stored.dtype not in _MOMENTS:
            raise CheckpointError(
                f"{path}: {pair.before.name} has {statistic.stored.dtype} of shape "
                f"{list(statistic.stored.shape)}, wanted floats of shape {list(wanted)}"
            )
        gradients, outputs = statistic.gradients, shape[output_dim(shape, dim)]
        if gradients is not None and not (
            is_gradients(gradients.shape, shape, dim) and gradients.dtype in _MOMENTS
        ):
            raise CheckpointError(
                f"{path}: {gradients.name} is {gradients.dtype} of shape {list(gradients.shape)}, wanted "
                f"floats of shape {[*shape[:-2], outputs, outputs]}, or groups of its rows"
            )
    return found


class MatrixErrors(Struct, frozen=True):
    """What outputs lose, and in units of the loss; None where it is no finite number, or not known."""

    outputs: float | None = None
    loss: float | None = None


def matrix_errors(
    pairs: Sequence[Pair], statistics: Statistics, reader: Source, resources: Resources, progress: Progress
) -> dict[str, MatrixErrors]:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) for each of these tensors, over all matrices of a stack.

    D is what changed, H the second moment of the inputs. Where there is one of gradients, G, also
    sqrt(tr(G D H D^T) / tr(G W0 H W0^T)).

    Raises:
        CheckpointError: a moment that is not finite, or of inputs all zero, or gives negative energies.
    """
    todo = (
        Job(number, f"errors{number}", pair.before.name, MeasureErrors(pair, statistics.of[pair.before.name]))
        for number, pair in enumerate(pairs)
    )
    found = read_through(todo, TensorIO(reader, passed=progress), resources, progress)
    return {pair.before.name: found.get(number, MatrixErrors()) for number, pair in enumerate(pairs)}


@dataclass(frozen=True, slots=True)
class MeasureErrors(Pass):
    """The change of the outputs of a matrix, or a stack of them, one matrix at a time."""

    pair: Pair
    statistic: Statistic

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        """Numbers of matrices; they report their bytes as they are read."""
        shape, inputs = self._stack[0], self.statistic.stored.shape[-1]
        worked_on = min(prod(shape[-2:]), max(_WORKED_ON, inputs))
        whole = self.pair.nbytes // max(1, prod(shape[:-2])) if self._turned else 0
        gradients = self.statistic.gradients
        size = 0 if gradients is None else gradients.shape[-1]
        beside = 24 * size**2 + 24 * size * inputs
        for matrix in range(prod(shape[:-2])):
            yield Chunk(matrix, memory=24 * inputs**2 + 48 * worked_on + whole + beside)

    def work(self, chunk: Chunk, io: TensorIO) -> tuple[bool, list[_Changed], list[_Changed]]:
        """Whether the moment is not zero, and what outputs and the loss lose of some rows at a time."""
        pair, stored = self.pair, self.statistic.stored
        moment = _moment(stored, chunk.about, io)
        outputs, losses = [], []
        rows_of = self._rows(chunk.about, io)
        for begin, end, gradients in self._groups(chunk.about, io):
            dense, after = rows_of(begin, end)
            own = max(_exponent(dense), _exponent(after))
            with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite make it NaN
                dense, after = np.ldexp(dense, -own), np.ldexp(after, -own)
                both = [_energies(one, moment, gradients) for one in (after - dense, dense)]
            power = moment.power + 2 * own
            outputs.append(((both[0][0], both[1][0]), power))
            if gradients is not None:
                losses.append(((both[0][1], both[1][1]), power + gradients.power))
            io.passed(dense.size * pair.nbytes // pair.before.numel, pair.before.name)
        return bool(moment.numbers.any()), outputs, losses

    def merge(self, partials: list[Any], io: TensorIO) -> MatrixErrors:  # noqa: ARG002
        stored = self.statistic.stored
        if self.pair.before.numel and not any(seen for seen, *_ in partials):
            raise CheckpointError(
                f"{stored.shard.path}: {stored.name} is zero: nothing was seen of its inputs"
            )
        outputs, losses = ([one for found in partials for one in found[place]] for place in (1, 2))
        return MatrixErrors(_share(outputs), None if self.statistic.gradients is None else _share(losses))

    def _groups(self, matrix: int, io: TensorIO) -> Iterator[tuple[int, int, _Moment | None]]:
        """Rows that are looked at together, from one to another, with the moment of their gradients.

        Without gradients all rows are independent, and only a few are in memory at one time.
        """
        shape, dim = self._stack
        rows, columns, gradients = shape[output_dim(shape, dim)], shape[dim], self.statistic.gradients
        if gradients is None:
            step = max(1, _WORKED_ON // max(1, columns))
            for begin in range(0, rows, step):
                yield begin, min(begin + step, rows), None
            return
        size = gradients.shape[-1]
        groups = rows // size if size else 0
        for group in range(groups):
            place = matrix * groups + group
            yield group * size, (group + 1) * size, _moment(gradients, place, io)

    @property
    def _turned(self) -> bool:
        """Whether the inputs are the rows of a matrix, not its columns."""
        shape, dim = self._stack
        return dim != len(shape) - 1

    @property
    def _stack(self) -> tuple[Shape, int]:
        """The shape of the matrix, or of the stack that it is, and the dimension of its inputs."""
        shape = self.pair.before.shape
        return self.statistic.stacked(shape, _input_dim(self.statistic, len(shape)))

    def _rows(self, matrix: int, io: TensorIO) -> Callable[[int, int], tuple[Floats, Floats]]:
        """A function that gives rows of a matrix before and after, (rows, inputs) in float64.

        A matrix whose inputs come first is read whole, in its own dtype, and widened some columns at a time.
        """
        sides = self.pair.before, self.pair.after
        rows, columns = self._stack[0][-2:]
        first = matrix * rows * columns
        if self._turned:
            both = [self._numbers(stored, (first, rows * columns), io) for stored in sides]

            def turned(begin: int, end: int) -> tuple[Floats, Floats]:
                dense, after = (
                    _wide(numbers.reshape(rows, columns)[:, begin:end], dtype).T for numbers, dtype in both
                )
                return dense, after

            return turned

        def straight(begin: int, end: int) -> tuple[Floats, Floats]:
            run = first + begin * columns, (end - begin) * columns
            dense, after = (io.load_values(stored, run).reshape(-1, columns) for stored in sides)
            return dense, after

        return straight

    @staticmethod
    def _numbers(stored: StoredTensor, run: Run, io: TensorIO) -> tuple[NDArray[Any], str]:
        """Elements in the patterns of a dtype; codes become weights in F64."""
        if stored.codes is None:
            return io.load_run(stored, run), stored.dtype
        return io.load_values(stored, run).view(np.uint64), "F64"


def _input_dim(statistic: Statistic, rank: int) -> int:
    dim = -1 if statistic.input_dim is None else statistic.input_dim
    return dim + rank if dim < 0 else dim


class _Moment(Struct, frozen=True, eq=False):
    """A second moment in float64, in units of 2^`power`; `rounding` is how negative an energy may be."""

    stored: StoredTensor
    numbers: Floats
    power: int
    rounding: float

    def refuse(self) -> None:
        """CheckpointError: it gave an energy that no second moment gives."""
        what = "has directions of negative energy: no second moment; calibrate again"
        raise CheckpointError(f"{self.stored.shard.path}: {self.stored.name} {what}")


_Changed = tuple[tuple[float, float], int]
"""What some rows lose and what they were, and the power of two that both count in."""


def _share(found: Sequence[_Changed]) -> float | None:
    """The root of what is lost of all rows in a share; None where it is no finite number."""
    lost, whole = totals_in_units(found) or (0.0, 0.0)
    if lost == 0:
        return 0.0
    error = math.sqrt(max(lost, 0.0) / whole) if whole > 0 else math.inf
    return error if math.isfinite(error) else None


def _moment(stored: StoredTensor, matrix: int, io: TensorIO) -> _Moment:
    """The second moment of this number among those that lie one after the other."""
    size = stored.shape[-1]
    moment = io.load_values(stored, (matrix * size * size, size * size)).reshape(size, size)
    if not np.isfinite(moment).all():
        raise CheckpointError(f"{stored.shard.path}: {stored.name} holds NaN or infinity; calibrate again")
    if (moment.diagonal() < 0).any():
        raise CheckpointError(f"{stored.shard.path}: {stored.name} has a negative diagonal: no second moment")
    power = _exponent(moment)
    rounding = max(_ROUNDED, 2 * _EPS.get(stored.dtype, 0.0) * math.sqrt(size))
    return _Moment(stored, np.ldexp(moment, -power), power, rounding)


def _wide(bits: NDArray[Any], dtype: str) -> Floats:
    flat = np.ascontiguousarray(bits).reshape(-1)
    return values_of(flat, dtype).astype(np.float64, copy=False).reshape(bits.shape)


def _energies(rows: Floats, moment: _Moment, gradients: _Moment | None) -> tuple[float, float]:
    """tr(W H W^T), and with gradients tr(G W H W^T), of some rows W of a matrix.

    CheckpointError where a row, or all of them, have less than none, by more than rounding makes of a unit
    diagonal.
    """
    outputs = loss = least = 0.0
    step = max(1, _WORKED_ON // max(1, rows.shape[1]))
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step]
        pushed = some @ moment.numbers
        each, usual = np.einsum("ij,ij->i", pushed, some), np.square(some) @ moment.numbers.diagonal()
        if (each < -moment.rounding * usual).any():
            moment.refuse()
        outputs += float(each.sum())
        if gradients is not None:
            turned = gradients.numbers[begin : begin + step] @ rows
            loss += float(np.einsum("ij,ij->", turned, pushed))
            least -= float(gradients.numbers.diagonal()[begin : begin + step] @ usual)
    if gradients is not None and loss < (gradients.rounding + moment.rounding) * least:
        gradients.refuse()
    return outputs, loss


def _exponent(numbers: Floats) -> int:
    """Of the power of two above all magnitudes; 0 where all of them are 0, or one is not finite."""
    return int(np.frexp(np.abs(numbers).max(initial=0.0))[1])
