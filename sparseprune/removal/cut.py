"""Cutting: a pass copies the survivors of a tensor from the input to the smaller output, bit for bit.

Owns the slabs in which a tensor is read. Knows neither specs nor config.json. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.limits import Crowd
from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.tensor_io import TensorIO, pattern_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Sink, Source, StoredTensor
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.runner import Progress
    from sparseprune.removal.slices import KeptIndices

    Flags = NDArray[np.bool_]

_COPIES = 3  # of a slab in memory: what is read, and what numpy makes on the way to its survivors


@dataclass(frozen=True, slots=True)
class Cuts:
    """The tensors to cut and the kept indices of each, by the names in the layout; read from `tensors`."""

    kept: Mapping[str, KeptIndices]
    tensors: Mapping[str, StoredTensor]
    limits: Limits

    def work_bytes(self, output: Sink) -> tuple[int, int]:
        """Bytes that a whole run reads or copies, and how many of them an earlier run did."""
        read = sum(
            count * pattern_of(self.tensors[name]).itemsize
            for name, kept in self.kept.items()
            for _, count, _, _ in CutTensor(name, kept, self.limits.slab).slabs(self.tensors[name])
        )
        return read + copied_bytes(output), already_done(output)

    def write(self, reader: Source, output: Sink, workers: int, progress: Progress) -> None:
        """Write the survivors of each tensor and copy all that stays whole; continues an earlier run.

        `progress` gets, from any thread, the bytes that were done and the tensor's name.
        """
        io = TensorIO(reader, output, self.tensors)
        jobs = (
            Job(order, f"cut{order}", name, CutTensor(name, kept, self.limits.slab))
            for order, (name, kept) in dealt(
                list(self.kept.items()), lambda one: self.tensors[one[0]].shard, workers
            )
        )
        write_through(jobs, io, Record(output, Outcomes(), progress), Crowd(workers, self.limits.memory))


@dataclass(frozen=True, slots=True)
class CutTensor(Pass):
    """Reads a tensor in slabs of neighbouring rows and writes what is kept of each.

    A row is as many of the last dimensions as fit into a slab, but at least the last one.
    """

    name: str
    kept: KeptIndices
    slab: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        stored = io.tensors[self.name]
        itemsize = pattern_of(stored).itemsize
        files = () if io.output is None else (str(io.output.layout.weights[self.name].file),)
        for number, slab in enumerate(self.slabs(stored)):
            nbytes = slab[1] * itemsize
            yield Chunk(slab, nbytes, _COPIES * nbytes, key=str(number), files=files)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Any]:
        if io.output is None:
            raise TypeError("there is no output to write to")
        stored = io.tensors[self.name]
        first, count, to, rows = chunk.about
        bits = io.load_run(stored, (first, count))
        shape, along = self._rows_of(stored)
        grid = bits.reshape(len(rows), *shape)
        for dim, flags in enumerate((rows, *along)):
            if not flags.all():
                grid = grid.compress(flags, axis=dim)
        left = np.ascontiguousarray(grid).reshape(-1)
        io.output.write_weight(self.name, to * bits.itemsize, left.data)
        return []

    def slabs(self, stored: StoredTensor) -> Iterator[tuple[int, int, int, Flags]]:
        """The first element of each slab, their number, the first element written, and which rows are kept.

        Slabs of which nothing is kept are left out.
        """
        shape, along = self._rows_of(stored)
        numel = prod(shape)
        kept_numel = prod([int(np.count_nonzero(flags)) for flags in along])
        rows = np.ones(1, dtype=np.bool_)
        for flags in self._dims(stored)[1][: -len(along)]:
            rows = np.logical_and.outer(rows, flags).reshape(-1)
        step = max(1, self.slab // max(1, numel * pattern_of(stored).itemsize))
        done = 0
        for begin in range(0, rows.size, step):
            kept = np.flatnonzero(rows[begin : begin + step])
            if kept.size:
                first, end = begin + int(kept[0]), begin + int(kept[-1]) + 1
                yield first * numel, (end - first) * numel, done * kept_numel, rows[first:end]
                done += kept.size

    def _rows_of(self, stored: StoredTensor) -> tuple[Shape, tuple[Flags, ...]]:
        """The shape of a row, and the kept indices along its dimensions."""
        shape, along = self._dims(stored)
        itemsize = pattern_of(stored).itemsize
        inner = len(shape) - 1
        while inner > 1 and prod(shape[inner - 1 :]) * itemsize <= self.slab:
            inner -= 1
        return shape[inner:], along[inner:]

    def _dims(self, stored: StoredTensor) -> tuple[Shape, tuple[Flags, ...]]:
        """Shape and kept indices; the elements of a vector are rows."""
        if len(stored.shape) == 1:
            return (*stored.shape, 1), (*self.kept.along, np.ones(1, dtype=np.bool_))
        return stored.shape, self.kept.along
