"""Cutting: a pass copies the survivors of a tensor from the input to the smaller output, bit for bit.

Owns the slabs in which a tensor is read. Knows neither specs nor config.json. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

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

    def work_bytes(self, reader: Source, output: Sink) -> tuple[int, int]:
        """Bytes that a whole run reads or copies, and how many of them an earlier run did."""
        io = TensorIO(reader, output, self.tensors)
        read = sum(chunk.nbytes for one in self._passes() for chunk in one.chunks(io))
        return read + copied_bytes(output), already_done(output)

    def write(self, reader: Source, output: Sink, workers: int, progress: Progress) -> None:
        """Write the survivors of each tensor and copy all that stays whole; continues an earlier run.

        `progress` gets, from any thread, the bytes that were done and the tensor's name.
        """
        passes = dealt(self._passes(), lambda one: self.tensors[one.name].shard, workers)
        jobs = (Job(order, f"cut{order}", one.name, one) for order, one in passes)
        io, record = TensorIO(reader, output, self.tensors), Record(output, Outcomes(), progress)
        write_through(jobs, io, record, Crowd(workers, self.limits.memory))

    def _passes(self) -> list[CutTensor]:
        return [CutTensor(name, kept, self.limits.slab) for name, kept in self.kept.items()]


class Slab(NamedTuple):
    """`size` neighbouring elements, of which `rows` are kept; they go to element `to` of the output."""

    first: int
    size: int
    to: int
    rows: Flags


@dataclass(frozen=True, slots=True)
class CutTensor(Pass):
    """Reads a tensor in slabs of neighbouring rows and writes what is kept of each.

    A row is as many of the last dimensions as fit into a slab, but at least the last one; of a vector, an
    element.
    """

    name: str
    kept: KeptIndices
    slab: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        """The slabs of which anything is kept."""
        shape, outer, inner = self._rows(io)
        itemsize = pattern_of(io.tensors[self.name]).itemsize
        files = () if io.output is None else (str(io.output.layout.weights[self.name].file),)
        numel = prod(shape)
        kept_numel = prod([int(np.count_nonzero(flags)) for flags in inner])
        rows = np.ones(1, dtype=np.bool_)
        for flags in outer:
            rows = np.logical_and.outer(rows, flags).reshape(-1)
        step = max(1, self.slab // max(1, numel * itemsize))
        done = 0
        for begin in range(0, rows.size, step):
            kept = np.flatnonzero(rows[begin : begin + step])
            if kept.size:
                first, end = begin + int(kept[0]), begin + int(kept[-1]) + 1
                slab = Slab(first * numel, (end - first) * numel, done * kept_numel, rows[first:end])
                nbytes = slab.size * itemsize
                yield Chunk(slab, nbytes, _COPIES * nbytes, key=str(begin // step), files=files)
                done += kept.size

    def work(self, chunk: Chunk, io: TensorIO) -> list[Any]:
        if io.output is None:
            raise TypeError("there is no output to write to")
        slab: Slab = chunk.about
        bits = io.load_run(io.tensors[self.name], (slab.first, slab.size))
        shape, _, inner = self._rows(io)
        grid = bits.reshape(len(slab.rows), *shape)
        for dim, flags in enumerate((slab.rows, *inner)):
            if not flags.all():
                grid = grid.compress(flags, axis=dim)
        left = np.ascontiguousarray(grid).reshape(-1)
        io.output.write_weight(self.name, slab.to * bits.itemsize, left.data)
        return []

    def _rows(self, io: TensorIO) -> tuple[Shape, tuple[Flags, ...], tuple[Flags, ...]]:
        """The shape of a row, and the kept indices along the dimensions before a row and in it."""
        stored = io.tensors[self.name]
        shape, along = stored.shape, self.kept.along
        if len(shape) == 1:
            shape, along = (*shape, 1), (*along, np.ones(1, dtype=np.bool_))
        itemsize, split = pattern_of(stored).itemsize, max(0, len(shape) - 1)
        while split > 1 and prod(shape[split - 1 :]) * itemsize <= self.slab:
            split -= 1
        return shape[split:], along[:split], along[split:]
