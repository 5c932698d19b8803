"""What pruning does to outputs: the relative change of every matrix's, by second moments of its inputs.

Owns which tensors have such statistics and how a sum over all rows is taken a few rows at a time. Needs no
torch. Called by the command line; what it gives goes into comparison.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.engine.tally import totals_in_units
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, Statistic, Statistics, StoredTensor
    from sparseprune.report.measuring.comparison import Pair

    Floats = NDArray[np.float64]
    Progress = Callable[[int, str], None]

_MOMENTS = frozenset({"F64", "F32", "F16", "BF16"})
_ROUNDED = 1e-4  # with a unit diagonal: what sums of products in float32 may be wrong by
_EPS = {"BF16": 2**-7, "F16": 2**-10}  # of dtypes that round by more
_SLAB = 1 << 22  # elements of a matrix that are worked on together


def with_statistics(pairs: Sequence[Pair], statistics: Statistics) -> tuple[Pair, ...]:
    """The matrices, and stacks of them, of which there are second moments.

    CheckpointError where norms alone are there, or where a shape does not fit.
    """
    found = tuple(
        pair
        for pair in pairs
        if pair.before.name in statistics.of
        and all(DTYPES[stored.dtype].prunable for stored in (pair.before, pair.after))
        and len(pair.before.shape) in {2, 3}
    )
    path = statistics.checkpoint.path
    for pair in found:
        statistic, shape = statistics.of[pair.before.name], pair.before.shape
        if statistic.kind == "norm" or len(statistic.stored.shape) == 1:
            raise CheckpointError(f"{path}: has norms of inputs alone; calibrate with --stats hessian")
        dim = _input_dim(statistic, len(shape))
        if dim not in {len(shape) - 2, len(shape) - 1}:
            raise CheckpointError(f"{path}: {pair.before.name} cannot have its inputs along dimension {dim}")
        wanted = (*shape[: len(shape) - 2], shape[dim], shape[dim])
        if statistic.stored.shape != wanted or statistic.stored.dtype not in _MOMENTS:
            raise CheckpointError(
                f"{path}: {pair.before.name} has {statistic.stored.dtype} of shape "
                f"{list(statistic.stored.shape)}, wanted floats of shape {list(wanted)}"
            )
    return found


def output_errors(
    pairs: Sequence[Pair], statistics: Statistics, reader: Source, progress: Progress
) -> dict[str, float | None]:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) for each of these tensors, over all matrices of a stack.

    D is what changed, H the second moment; None where it is no finite number. One H is in memory at a time.

    Raises:
        CheckpointError: a moment that is not finite, or all zero, or gives negative energies.
    """
    return {
        pair.before.name: _error(pair, statistics.of[pair.before.name], reader, progress) for pair in pairs
    }


def _error(pair: Pair, statistic: Statistic, reader: Source, progress: Progress) -> float | None:
    shape = pair.before.shape
    turned = _input_dim(statistic, len(shape)) != len(shape) - 1
    found: list[tuple[tuple[float, float], int]] = []
    seen = False
    stored = statistic.stored
    rounding = max(_ROUNDED, 2 * _EPS.get(stored.dtype, 0.0) * math.sqrt(stored.shape[-1]))
    for matrix in range(prod(shape[:-2])):
        moment, power = _moment(statistic, matrix, reader)
        seen = seen or bool(moment.any())
        for dense, after in _slabs(pair, matrix, reader, turned=turned):
            lost, whole, own = _energies(dense, after, moment, rounding)
            if lost is None or whole is None:
                what = "has directions of negative energy: no second moment; calibrate again"
                raise CheckpointError(f"{stored.shard.path}: {stored.name} {what}")
            found.append(((lost, whole), power + 2 * own))
            progress(dense.size * pair.nbytes // pair.before.numel, pair.before.name)
    if not seen and pair.before.numel:
        raise CheckpointError(f"{stored.shard.path}: {stored.name} is zero: nothing was seen of its inputs")
    lost, whole = totals_in_units(found) or (0.0, 0.0)
    if lost == 0:
        return 0.0
    error = math.sqrt(max(lost, 0.0) / whole) if whole > 0 else math.inf
    return error if math.isfinite(error) else None


def _slabs(pair: Pair, matrix: int, reader: Source, *, turned: bool) -> Iterator[tuple[Floats, Floats]]:
    """Some rows at a time of a matrix before and after, (rows, inputs) in float64.

    A matrix whose inputs come first is read whole, in its own dtype, and widened some columns at a time.
    """
    rows, columns = pair.before.shape[-2:]
    first = matrix * rows * columns
    step = max(1, _SLAB // max(1, rows if turned else columns))
    if turned:
        both = [_bits(stored, first, rows * columns, reader) for stored in (pair.before, pair.after)]
        for begin in range(0, columns, step):
            yield tuple(  # type: ignore[misc]
                _wide(bits.reshape(rows, columns)[:, begin : begin + step], stored).T
                for bits, stored in zip(both, (pair.before, pair.after), strict=True)
            )
        return
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        yield tuple(  # type: ignore[misc]
            _wide(_bits(stored, first + begin * columns, count * columns, reader), stored).reshape(count, -1)
            for stored in (pair.before, pair.after)
        )


def _input_dim(statistic: Statistic, rank: int) -> int:
    dim = -1 if statistic.input_dim is None else statistic.input_dim
    return dim + rank if dim < 0 else dim


def _moment(statistic: Statistic, matrix: int, reader: Source) -> tuple[Floats, int]:
    """One moment, in float64 and in units of a power of two; and which."""
    stored = statistic.stored
    size = stored.shape[-1]
    bits = _bits(stored, matrix * size * size, size * size, reader)
    moment = _wide(bits, stored).reshape(size, size)
    if not np.isfinite(moment).all():
        raise CheckpointError(f"{stored.shard.path}: {stored.name} holds NaN or infinity; calibrate again")
    if (moment.diagonal() < 0).any():
        raise CheckpointError(f"{stored.shard.path}: {stored.name} has a negative diagonal: no second moment")
    power = _exponent(moment)
    return np.ldexp(moment, -power), power


def _bits(stored: StoredTensor, first: int, count: int, reader: Source) -> NDArray[Any]:
    """Neighbouring elements of a tensor, as patterns."""
    itemsize = DTYPES[stored.dtype].itemsize
    bits: NDArray[Any] = np.empty(count, dtype=f"u{itemsize}")
    reader.read_into(stored, first * itemsize, bits)
    return bits


def _wide(bits: NDArray[Any], stored: StoredTensor) -> Floats:
    flat = np.ascontiguousarray(bits).reshape(-1)
    return values_of(flat, stored.dtype).astype(np.float64, copy=False).reshape(bits.shape)


def _energies(
    dense: Floats, after: Floats, moment: Floats, rounding: float
) -> tuple[float | None, float | None, int]:
    """Of what changed and of the dense rows, and half the power of two that both count in."""
    own = max(_exponent(dense), _exponent(after))
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite make it NaN
        dense, after = np.ldexp(dense, -own), np.ldexp(after, -own)
        return _energy(after - dense, moment, rounding), _energy(dense, moment, rounding), own


def _energy(rows: Floats, moment: Floats, rounding: float) -> float | None:
    """tr(W H W^T); None where a row has less than none, by more than rounding makes of a unit diagonal."""
    each = np.einsum("ij,ij->i", rows @ moment, rows)
    least = -rounding * (np.square(rows) @ moment.diagonal())
    return None if (each < least).any() else float(each.sum())


def _exponent(numbers: Floats) -> int:
    """Of the power of two above all magnitudes; 0 where all of them are 0, or one is not finite."""
    return int(np.frexp(np.abs(numbers).max(initial=0.0))[1])
