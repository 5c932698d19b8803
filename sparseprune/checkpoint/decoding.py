"""Codes as numbers: the scale and the zero point of each code, and the weights that codes stand for.

Owns the way from places in a tensor to entries of the tensors beside it, of which it reads what is needed.
Knows nothing of regions beyond their runs; needs numpy. Called by whoever gives patterns of which 0 is zero.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.formats import values_of
from sparseprune.errors import SparsityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint.codes import Beside
    from sparseprune.checkpoint.source import Source, StoredTensor
    from sparseprune.engine.grids import Shape

    Bits = NDArray[Any]
    Floats = NDArray[np.float64]
    Places = NDArray[np.int64]
    Run = tuple[int, int]

_LONG = 2048  # elements of a run from which rows of it are worked together, not each place by itself
_FEW = 64  # entries that are read although nobody asked for them


def zero_patterns(reader: Source, stored: StoredTensor, runs: Iterable[Run]) -> Bits | None:
    """The patterns of zero at the elements of some runs, one after the other; one for all where it is one.

    None where zero is the pattern 0 everywhere.

    Raises:
        SparsityError: a zero point is no code.
    """
    codes = stored.codes
    if codes is None or codes.zero_point is None:
        return None
    beside, pattern = codes.zero_point, np.dtype(f"u{DTYPES[stored.dtype].itemsize}")
    signed = stored.dtype.startswith("I")
    limits = np.iinfo(f"{'i' if signed else 'u'}{pattern.itemsize}")

    def numbers(entries: Bits) -> Bits:
        zeros = values_of(entries, beside.dtype).astype(np.int64)
        outside = (zeros < limits.min) | (zeros > limits.max)
        if outside.any():
            found = int(zeros[outside][0])
            raise SparsityError(f"{beside.name}: a zero point is {found}, which is no code of {stored.name}")
        return zeros.astype(pattern)

    return _spread(reader, beside, stored.shape, runs, numbers)


def scales(reader: Source, stored: StoredTensor, runs: Iterable[Run]) -> Floats:
    """The scales of the elements of some runs, float64, one after the other; one for all where it is one.

    Raises:
        SparsityError: a scale is not finite.
    """
    codes = stored.codes
    if codes is None or codes.scale is None:
        return np.ones(1)
    beside, unit = codes.scale, codes.unit

    def numbers(entries: Bits) -> Bits:
        found = values_of(entries, beside.dtype).astype(np.float64)
        if not np.isfinite(found).all():
            what = "NaN" if np.isnan(found).any() else "infinity"
            raise SparsityError(
                f"{beside.name}: there is {what} among the scales of {stored.name}: repair it, or leave "
                f"{stored.name} out of the spec ({beside.stored.shard.path})"
            )
        return found * unit if unit != 1 else found

    return _spread(reader, beside, stored.shape, runs, numbers)


def decoded(reader: Source, stored: StoredTensor, bits: Bits, runs: Sequence[Run]) -> Floats:
    """The weights (flat, float64) that the elements of some runs stand for; in `bits` zero is the pattern 0.

    Raises:
        SparsityError: a scale is not finite, a zero point is no code.
    """
    zeros = zero_patterns(reader, stored, runs)
    if zeros is None:
        numbers = values_of(bits, stored.dtype).astype(np.float64)
    else:
        numbers = values_of(bits + zeros, stored.dtype).astype(np.float64)
        numbers -= values_of(zeros, stored.dtype)
    numbers *= scales(reader, stored, runs)
    return numbers


def _spread(
    reader: Source, beside: Beside, shape: Shape, runs: Iterable[Run], numbers: Callable[[Bits], Bits]
) -> Bits:
    """The entry of each element of some runs, as `numbers` makes them of patterns."""
    table = _Table(reader, beside, shape, numbers)
    if beside.is_one:
        return table.entries(np.zeros(1, dtype=np.int64))
    parts: list[Bits] = []
    short: list[Run] = []

    def finish() -> None:
        if short:
            parts.append(table.at(_places(short)))
            short.clear()

    for run in runs:
        if run[1] >= max(_LONG, table.columns):
            finish()
            parts.append(table.rows(*run))
        else:
            short.append(run)
    finish()
    if not parts:
        return table.entries(np.zeros(0, dtype=np.int64))
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _places(runs: Sequence[Run]) -> Places:
    """The elements of some runs, by their numbers."""
    firsts, counts = (np.array(each, dtype=np.int64) for each in zip(*runs, strict=True))
    before = np.cumsum(counts) - counts
    places: Places = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(firsts - before, counts)
    return places


class _Table:
    """Scales or zero points over a tensor of a shape, read as far as they are asked for."""

    def __init__(self, reader: Source, beside: Beside, shape: Shape, numbers: Callable[[Bits], Bits]) -> None:
        self._reader, self._beside, self._numbers = reader, beside, numbers
        self._shape = shape or (1,)
        self._block = beside.block or (1,)
        self.columns = self._shape[-1]
        counts = [-(-size // block) for size, block in zip(self._shape, self._block, strict=True)]
        self._across = counts[-1]
        self._steps = [prod(tuple(counts[dim + 1 :])) for dim in range(len(counts))]

    def rows(self, first: int, count: int) -> Bits:
        """The entries of a run that is longer than a row."""
        columns, edge = self.columns, self._block[-1]
        begin, end = first // columns, -(-(first + count) // columns)
        lines = self._line(np.arange(begin, end, dtype=np.int64))
        places = (lines[:, np.newaxis] + np.arange(self._across)).reshape(-1)
        entries = self.entries(places).reshape(len(lines), self._across)
        if edge > 1:
            entries = np.repeat(entries, edge, axis=1)[:, :columns]
        skipped = first - begin * columns
        return entries.reshape(-1)[skipped : skipped + count]

    def at(self, places: Places) -> Bits:
        """The entries of elements by their numbers."""
        rows = places // self.columns
        within = (places - rows * self.columns) // self._block[-1]
        return self.entries(self._line(rows) + within)

    def entries(self, places: Places) -> Bits:
        """Entries by their numbers in the tensor that holds them."""
        if not places.size:
            return self._numbers(np.empty(0, dtype=f"u{DTYPES[self._beside.stored.dtype].itemsize}"))
        low, high = int(places.min()), int(places.max()) + 1
        if high - low <= 2 * places.size + _FEW:
            return self._numbers(self._read(low, high)).take(places - low)
        asked, where = np.unique(places, return_inverse=True)
        ends = np.flatnonzero(np.diff(asked) > _FEW) + 1
        kept = [
            self._read(int(asked[begin]), int(asked[end - 1]) + 1).take(asked[begin:end] - asked[begin])
            for begin, end in pairwise((0, *ends.tolist(), asked.size))
        ]
        return self._numbers(np.concatenate(kept)).take(where.reshape(-1))

    def _line(self, rows: Places) -> Places:
        """The first entry of each row; rows are counted through all dimensions but the last."""
        total, left = np.zeros(rows.shape, dtype=np.int64), rows
        for dim in reversed(range(len(self._shape) - 1)):
            above = left // self._shape[dim]
            total += (left - above * self._shape[dim]) // self._block[dim] * self._steps[dim]
            left = above
        return total

    def _read(self, first: int, end: int) -> Bits:
        stored = self._beside.stored
        size = DTYPES[stored.dtype].itemsize
        bits = np.empty(end - first, dtype=f"u{size}")
        self._reader.read_into(stored, first * size, bits)
        return bits
