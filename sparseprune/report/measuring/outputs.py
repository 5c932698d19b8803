"""What pruning does to outputs: the relative change of every matrix's, by second moments of its inputs.

Owns which tensors have such statistics and how a sum over all rows is taken a few rows at a time. Needs no
torch. Called by the command line; what it gives goes into comparison_document.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.values import values_of
from sparseprune.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Statistic, Statistics, StoredTensor, TensorReader
    from sparseprune.report.measuring.comparison import Pair

    Floats = NDArray[np.float64]
    Progress = Callable[[int, str], None]

_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E5M2", "F8_E4M3"})
_SLAB = 1 << 22  # elements of a matrix that are worked on together


def with_statistics(pairs: Sequence[Pair], statistics: Statistics) -> tuple[Pair, ...]:
    """The matrices, and stacks of them, of which there are second moments.

    CheckpointError where there is none at all, where norms alone are there, or where a shape does not fit.
    """
    found = tuple(
        pair
        for pair in pairs
        if pair.before.name in statistics.of
        and {pair.before.dtype, pair.after.dtype} <= _FLOATS
        and len(pair.before.shape) in {2, 3}
    )
    path = statistics.checkpoint.path
    if pairs and not found:
        raise CheckpointError(
            f"{path}: has statistics of none of the tensors, such as {pairs[0].before.name}; are they of "
            "another checkpoint?"
        )
    for pair in found:
        statistic, shape = statistics.of[pair.before.name], pair.before.shape
        if statistic.kind == "norm" or len(statistic.stored.shape) == 1:
            raise CheckpointError(f"{path}: has norms of inputs alone; calibrate with --stats hessian")
        features = shape[_input_dim(pair, statistic)]
        wanted = (*shape[: len(shape) - 2], features, features)
        if statistic.stored.shape != wanted or statistic.stored.dtype not in _FLOATS:
            raise CheckpointError(
                f"{path}: {pair.before.name} has {statistic.stored.dtype} of shape "
                f"{list(statistic.stored.shape)}, wanted floats of shape {list(wanted)}"
            )
    return found


def output_errors(
    pairs: Sequence[Pair], statistics: Statistics, reader: TensorReader, progress: Progress
) -> dict[str, float | None]:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)) for each of these tensors, over all matrices of a stack.

    D is what changed, H the second moment; None where it is no finite number. One H is in memory at a time.

    Raises:
        CheckpointError: a moment that is not finite, or all zero.
    """
    return {pair.before.name: _error(pair, statistics, reader, progress) for pair in pairs}


def _error(pair: Pair, statistics: Statistics, reader: TensorReader, progress: Progress) -> float | None:
    statistic = statistics.of[pair.before.name]
    rows, columns = pair.before.shape[-2:]
    turned = _input_dim(pair, statistic) == len(pair.before.shape) - 2
    step = rows if turned else max(1, _SLAB // max(1, columns))
    lost = whole = seen = 0.0
    for matrix in range(prod(pair.before.shape[:-2])):
        moment = _moment(statistic, matrix, reader)
        seen += float(np.abs(moment).sum())
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            first = (matrix * rows + begin) * columns
            dense, after = (
                _matrix(stored, first, count, columns, reader) for stored in (pair.before, pair.after)
            )
            dense, after = (dense.T, after.T) if turned else (dense, after)
            lost += _energy(after - dense, moment)
            whole += _energy(dense, moment)
            progress(pair.nbytes * count // max(1, rows * prod(pair.before.shape[:-2])), pair.before.name)
    if not seen and pair.before.numel:
        raise CheckpointError(
            f"{statistic.stored.shard.path}: {statistic.stored.name} is zero: nothing was seen of its inputs"
        )
    if lost == 0:
        return 0.0
    error = math.sqrt(max(lost, 0.0) / whole) if whole > 0 else math.inf
    return error if math.isfinite(error) else None


def _input_dim(pair: Pair, statistic: Statistic) -> int:
    rank = len(pair.before.shape)
    dim = -1 if statistic.input_dim is None else statistic.input_dim
    return dim % rank if -rank <= dim < rank else rank - 1


def _moment(statistic: Statistic, matrix: int, reader: TensorReader) -> NDArray[np.float32]:
    stored = statistic.stored
    size = stored.shape[-1]
    values = _matrix(stored, matrix * size * size, size, size, reader).astype(np.float32)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{stored.shard.path}: {stored.name} holds NaN or infinity; calibrate again")
    return values


def _matrix(stored: StoredTensor, first: int, rows: int, columns: int, reader: TensorReader) -> Floats:
    """Neighbouring rows of a tensor, in float64."""
    itemsize = DTYPES[stored.dtype].bits // 8
    data = np.empty(rows * columns * itemsize, dtype=np.uint8)
    reader.read_into(stored, first * itemsize, data)
    values: Floats = values_of(data.view(f"u{itemsize}"), stored.dtype).astype(np.float64, copy=False)
    return values.reshape(rows, columns)


def _energy(weights: Floats, moment: NDArray[np.float32]) -> float:
    """tr(W H W^T), products in float32 and sums in float64."""
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite make it NaN
        narrow = weights.astype(np.float32)
        return float(np.einsum("ij,ij->", narrow @ moment, narrow, dtype=np.float64))
