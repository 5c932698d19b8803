"""Cutting: survivors are copied from the input to the smaller output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.execution.limits import Crowd
from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.programs import Item, Program, ProgramPass
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.tensor_io import TensorIO, pattern_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StagedOutput, StoredTensor, TensorReader
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.runner import Progress
    from sparseprune.removal.slices import Kept

    Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """A tensor of which a part stays: named as in the layout, read from `stored`."""

    name: str
    stored: StoredTensor
    kept: Kept


def cut(
    cuts: Sequence[Cut],
    limits: Limits,
    workers: int,
    reader: TensorReader,
    output: StagedOutput,
    progress: Progress,
) -> None:
    """Write what stays of every tensor and copy what stays whole; what an earlier run finished is left out.

    Survivors keep their bits. `progress` is told, from any thread, bytes that were done and of what.
    """
    io = TensorIO(reader, output)
    record = Record(output, Outcomes(), progress)

    def jobs() -> Iterator[Job]:
        for order, one in dealt(cuts, lambda one: one.stored.shard, workers):
            program = _program(one, limits, io, output)
            yield Job(order, f"cut{order}", one.name, ProgramPass(program))

    write_through(jobs(), io, record, Crowd(workers, limits.memory))


def cut_bytes(cuts: Sequence[Cut], limits: Limits, output: StagedOutput) -> tuple[int, int]:
    """Bytes that pass by from the beginning to the end, and how many of them an earlier run did."""
    read = sum(slab.nbytes for one in cuts for slab in _Slabs(one, limits.slab))
    return read + copied_bytes(output), already_done(output)


def _program(one: Cut, limits: Limits, traffic: TensorIO, output: StagedOutput) -> Program:
    """One step: all slabs of a tensor in which something stays."""

    def move(slab: _Slab) -> list[Any]:
        bits = traffic.load_run(one.stored, (slab.first, slab.count))
        left = slab.left(bits)
        output.write_weight(one.name, slab.to * bits.itemsize, left.data)
        return []

    def items() -> Iterator[Item]:
        for number, slab in enumerate(_Slabs(one, limits.slab)):
            yield Item(lambda slab=slab: move(slab), slab.nbytes, 3 * slab.nbytes, str(number))  # type: ignore[misc]

    yield items()


@dataclass(frozen=True, slots=True, eq=False)
class _Slab:
    """`count` stored elements from `first` on; what is left of them goes to element `to` of what is left.

    They are rows of the shape `row`; `rows` says which rows stay, `along` which places in each.
    """

    first: int
    count: int
    to: int
    row: tuple[int, ...]
    rows: Flags
    along: tuple[Flags, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return self.count * self.itemsize

    def left(self, bits: NDArray[Any]) -> NDArray[Any]:
        """What is left of the elements, flat."""
        grid = bits.reshape(len(self.rows), *self.row)
        for dim, flags in enumerate((self.rows, *self.along)):
            if not flags.all():
                grid = grid.compress(flags, axis=dim)
        return np.ascontiguousarray(grid).reshape(-1)


class _Slabs:
    """The slabs of a tensor: neighbouring rows, of about so many bytes; none where nothing of them stays.

    A row is what lies in as many of the last dimensions as fit into a slab, or in the last one alone.
    """

    def __init__(self, one: Cut, slab: int) -> None:
        shape, along = one.stored.shape, one.kept.along
        if len(shape) == 1:  # elements as rows
            shape, along = (*shape, 1), (*along, np.ones(1, dtype=np.bool_))
        self._itemsize = pattern_of(one.stored).itemsize
        inner = len(shape) - 1
        while inner > 1 and prod(shape[inner - 1 :]) * self._itemsize <= slab:
            inner -= 1
        self._row, self._along = shape[inner:], along[inner:]
        self._rows = _outer(along[:inner])
        self._numel = prod(self._row)
        self._left = prod([int(np.count_nonzero(flags)) for flags in self._along])
        self._step = max(1, slab // max(1, self._numel * self._itemsize))

    def __iter__(self) -> Iterator[_Slab]:
        done = 0
        for begin in range(0, self._rows.size, self._step):
            rows = self._rows[begin : begin + self._step]
            stay = np.flatnonzero(rows)
            if not stay.size:
                continue
            first, last = int(stay[0]), int(stay[-1]) + 1
            yield _Slab(
                first=(begin + first) * self._numel,
                count=(last - first) * self._numel,
                to=done * self._left,
                row=self._row,
                rows=rows[first:last],
                along=self._along,
                itemsize=self._itemsize,
            )
            done += stay.size


def _outer(along: Sequence[Flags]) -> Flags:
    """Which rows stay, row-major over the dimensions in front of them."""
    rows = np.ones(1, dtype=np.bool_)
    for flags in along:
        rows = np.logical_and.outer(rows, flags).reshape(-1)
    return rows
