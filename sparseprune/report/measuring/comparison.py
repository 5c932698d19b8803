"""Comparing two checkpoints tensor by tensor: what changed, what energy is left, the largest change.

Owns which tensors can be compared and how; both are read in slabs side by side, cut at the same places for
any number of jobs, so that sums are the same. Needs no torch. Called by the command line; what it gives is
plain data for comparison.py.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint.threads import work_through
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.comparing import Counts, Energies, compare, compare_values
from sparseprune.engine.kernels.formats import FORMATS, values_of
from sparseprune.engine.tally import exact_sum

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.formats import Bits

    Progress = Callable[[int, str], None]
    _Part = tuple[int, Counts, Energies]  # what one piece holds, and where it begins

SLAB = 1 << 20  # bytes of each checkpoint read at a time: both stay in the cache until they are compared
_WIDEST = 16  # bytes that an element may take where it is compared by its value


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor that both checkpoints have, with one name and one shape."""

    before: StoredTensor
    after: StoredTensor

    @property
    def nbytes(self) -> int:
        return self.before.nbytes + self.after.nbytes


@dataclass(frozen=True, slots=True)
class TensorComparison:
    """What was found in one tensor. Of unlike dtypes values are compared, of one dtype bits.

    `differs` tells whether any element changed; None where that cannot be said, elements of less than a byte
    beside another dtype. These have no `counts` and no `energies` either. Places in them are flat.
    """

    name: str
    dtype: str
    dtype_after: str
    shape: Shape
    numel: int
    differs: bool | None
    counts: Counts | None
    energies: Energies | None


@dataclass(frozen=True, slots=True)
class Sides:
    """Which tensors stand on one side alone, and which on both but in unlike shapes; in stored order."""

    pairs: tuple[Pair, ...]
    added: tuple[StoredTensor, ...]
    removed: tuple[StoredTensor, ...]
    reshaped: tuple[Pair, ...]


def sides_of(
    before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor], names: Sequence[str]
) -> Sides:
    """What is to be compared of these tensors, as the headers say; one of the two has each at least."""
    both = [Pair(before[name], after[name]) for name in names if name in before and name in after]
    return Sides(
        tuple(pair for pair in both if pair.before.shape == pair.after.shape),
        tuple(after[name] for name in names if name not in before),
        tuple(before[name] for name in names if name not in after),
        tuple(pair for pair in both if pair.before.shape != pair.after.shape),
    )


def compare_checkpoints(
    pairs: Sequence[Pair], reader: Source, jobs: int, progress: Progress, slab: int = SLAB
) -> tuple[TensorComparison, ...]:
    """What is found in each pair, in their order; the same for any number of jobs.

    `progress` is told how many bytes were read, of both sides, and the tensor they belong to. Of several
    failures the one is raised that is the first in the order of the pairs.
    """
    tallies = [_Tally(pair, slab) for pair in pairs]
    pieces = (piece for tally in tallies for piece in tally.pieces())
    work_through(pieces, lambda: _Worker(reader, progress), jobs)
    return tuple(tally.comparison() for tally in tallies)


class _Tally:
    """What is known of one pair, of which about `slab` bytes are looked at together.

    Pieces may be added by any thread, in any order; what they hold is added up when all are there.
    """

    def __init__(self, pair: Pair, slab: int) -> None:
        self.pair = pair
        before, after = DTYPES[pair.before.dtype], DTYPES[pair.after.dtype]
        self.by_bits = before == after
        self.known = before.zero_bits is not None and after.zero_bits is not None
        self._differs = False if self.known or self.by_bits else None
        self._size = pair.before.numel if self.known else max(pair.before.nbytes, pair.after.nbytes)
        self._step = max(1, slab)
        if self.known:
            direct = self.by_bits and before.name in FORMATS
            self._step = max(1, slab // (before.itemsize if direct else _WIDEST))
        elif not self.by_bits:
            self._step = max(1, self._size)
        self._found: dict[int, tuple[Counts, Energies]] = {}
        self._sum = Counts(), Energies()
        self._lock = threading.Lock()

    def pieces(self) -> Iterator[_Piece]:
        """All elements, or all bytes where only these can be compared, or at all."""
        for begin in range(0, self._size, self._step):
            yield _Piece(self, begin, min(begin + self._step, self._size))

    def add(self, begin: int, counts: Counts, energies: Energies) -> None:
        """What a piece holds."""
        with self._lock:
            self._found[begin] = counts, energies
            self._differs = self._differs or counts.changed > 0
            if len(self._found) == -(-self._size // self._step):
                found = [(begin, *self._found[begin]) for begin in sorted(self._found)]
                self._found.clear()
                self._sum = _counts_of(found), _energies_of(found)

    def add_bytes(self, *, equal: bool) -> None:
        """Whether the bytes of a piece are equal, which is all that is known."""
        with self._lock:
            self._differs = self._differs or not equal

    def comparison(self) -> TensorComparison:
        before, after = self.pair.before, self.pair.after
        return TensorComparison(
            before.name,
            before.dtype,
            after.dtype,
            before.shape,
            before.numel,
            self._differs,
            self._sum[0] if self.known else None,
            self._sum[1] if self.known else None,
        )


def _counts_of(found: Sequence[_Part]) -> Counts:
    firsts = [begin + counts.first_altered for begin, counts, _ in found if counts.altered]
    each = [counts for _, counts, _ in found]
    return Counts(
        sum(counts.zeros_before for counts in each),
        sum(counts.zeros_after for counts in each),
        sum(counts.zeroed for counts in each),
        sum(counts.altered for counts in each),
        firsts[0] if firsts else -1,
    )


def _energies_of(found: Sequence[_Part]) -> Energies:
    changes = [(begin, energies) for begin, _, energies in found if energies.place >= 0]
    # Of equals the first, which stands first.
    begin, largest = max(changes, key=lambda change: change[1].largest, default=(0, Energies()))
    each = [energies for *_, energies in found]
    return Energies(
        exact_sum(energies.before for energies in each),
        exact_sum(energies.after for energies in each),
        exact_sum(energies.change for energies in each),
        largest.largest,
        begin + largest.place if changes else -1,
    )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements [begin, end) of a pair, or bytes where elements are less than one."""

    tally: _Tally
    begin: int
    end: int


class _Worker:
    """What one thread does with a piece, and the buffers that it keeps."""

    def __init__(self, reader: Source, progress: Progress) -> None:
        self._reader = reader
        self._progress = progress
        self._buffers = [np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.uint8)]

    def __call__(self, piece: _Piece) -> None:
        tally, pair = piece.tally, piece.tally.pair
        if not (tally.known or tally.by_bits):
            self._progress(pair.nbytes, pair.before.name)
            return
        before = self._read(0, pair.before, piece)
        after = self._read(1, pair.after, piece)
        if not tally.known:
            tally.add_bytes(equal=np.array_equal(before, after))
        elif tally.by_bits:
            tally.add(piece.begin, *compare(before, after, pair.before.dtype))
        else:
            values = values_of(before, pair.before.dtype), values_of(after, pair.after.dtype)
            tally.add(piece.begin, *compare_values(*values))
        self._progress(before.nbytes + after.nbytes, pair.before.name)

    def _read(self, side: int, stored: StoredTensor, piece: _Piece) -> Bits:
        """The patterns of the elements of a piece; valid until the next one of this side is read."""
        itemsize = DTYPES[stored.dtype].itemsize if piece.tally.known else 1
        size = (piece.end - piece.begin) * itemsize
        if self._buffers[side].size < size:
            self._buffers[side] = np.empty(size, dtype=np.uint8)
        data = self._buffers[side][:size]
        self._reader.read_into(stored, piece.begin * itemsize, data)
        return data.view(f"u{itemsize}")
