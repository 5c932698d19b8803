"""Shrinking: kept indices of every tensor become new shapes, names and a config; survivors are copied.

Owns the smaller checkpoint as plain data, and the passes that write it. Called by api.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint import ResizedTensor
from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.passes import Chunk, Outcomes, Pass
from sparseprune.execution.regions import Resources
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.tensor_io import TensorIO, pattern_of
from sparseprune.removal.config import check_shapes, configure
from sparseprune.removal.dim_constraints import CutModel, refuse
from sparseprune.removal.preview import numbered, removed_members
from sparseprune.removal.quantized import carry
from sparseprune.removal.scales import Scale, remarks_on, scales_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Sink, Source, StoredTensor
    from sparseprune.checkpoint.codes import Codes
    from sparseprune.execution.regions import Limits
    from sparseprune.execution.runner import Progress
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.results.fields import ConfigChange

    Flags = NDArray[np.bool_]


class Removal(Struct, frozen=True):
    """What is left of a checkpoint, by the old names of tensors; `kept` has the indices of cut ones.

    `config` is None where it stays as it is, `beside` are documents beside it that change. `remarks` are
    lines about statements in files that may no longer be true, and about weights that get other values, by
    `scales`.
    """

    left: Mapping[str, ResizedTensor]
    kept: Mapping[str, KeptIndices] = {}
    config: Mapping[str, Any] | None = None
    changes: tuple[ConfigChange, ...] = ()
    remarks: tuple[str, ...] = ()
    beside: Mapping[str, Mapping[str, Any]] = {}
    scales: Mapping[str, Scale] = {}


def make_removal(
    shapes: Mapping[str, Shape],
    kept: Mapping[str, KeptIndices],
    config: Mapping[str, Any] | None,
    *,
    codes: Mapping[str, Codes] = MappingProxyType({}),
    decisions: Mapping[str, int] | None = None,
    beside: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> Removal:
    """What is left of tensors of these shapes where masks keep the indices in `kept`; others are kept whole.

    `codes` tells which tensors hold codes: what lies beside them goes with them. With `decisions`, numbers of
    what decides over each tensor, only the numbers of kept units are known, not which they are. `beside` are
    other documents about the model, by the names of their files.

    Raises:
        CheckpointError: masks that are not made of whole slices, or a model that no class can express.
    """
    carried = carry(shapes, kept, codes)
    refuse(carried.problems[:1])
    cut = {name: each for name, each in carried.kept.items() if not each.is_whole}
    empty = frozenset(name for name, each in cut.items() if each.is_empty)
    removed = removed_members((name for name, shape in shapes.items() if prod(shape)), empty)
    refuse([*_not_sliced(cut), *_orphans(removed.orphans, shapes, empty)])
    if not cut:
        return Removal({name: ResizedTensor(name, shape, whole=True) for name, shape in shapes.items()})
    # Tensors without elements have no mask; they go with the layer or expert that they belong to.
    gone = empty | {name for name, shape in shapes.items() if not prod(shape) and removed.has(name)}
    model = CutModel(shapes, cut, removed, gone, carried.whole, decisions)
    configured = configure(config, model, beside)
    smaller, changes = configured.config, configured.changes
    left_of = {
        name: each for name, each in {**cut, **configured.agreed.followers}.items() if name not in gone
    }
    after = {name: shape for name, shape in shapes.items() if name not in gone}
    after |= {name: each.shape for name, each in left_of.items()}
    left = {
        name: ResizedTensor(removed.renamed(name), shape, whole=name not in left_of)
        for name, shape in after.items()
    }
    check_shapes(configured.agreed, shapes, after)
    scales = scales_of(configured.agreed.counts, left_of, shapes)
    remarks = (*configured.remarks, *remarks_on(scales))
    return Removal(left, left_of, smaller, changes, remarks, configured.beside, scales)


def _not_sliced(cut: Mapping[str, KeptIndices]) -> Iterator[str]:
    for name, each in cut.items():
        if not each.is_sliced:
            text = "so that nothing can be cut out; use apply, which writes zeros"
            yield f"{name}: its mask is not made of whole slices along its dimensions, {text}"


def _orphans(names: tuple[str, ...], shapes: Mapping[str, Shape], empty: frozenset[str]) -> Iterator[str]:
    """Tensors of which nothing is left, each with a tensor of the same layer or expert that stays."""
    staying: dict[tuple[str, int], str] = {}
    for name in shapes if names else ():
        if name not in empty:
            for before, number, _ in numbered(name):
                staying.setdefault((before, number), name)
    for name in names:
        members = [(before, number) for before, number, _ in numbered(name)]
        stays = next((staying[member] for member in reversed(members) if member in staying), None)
        since = "" if stays is None else f", since {stays} stays"
        text = (
            f"it belongs to no layer or expert that is dropped as a whole{since}: couple all tensors of one"
        )
        yield f"{name}: nothing of its {list(shapes[name])} is kept, and {text}"


_COPIES = 3  # of a slab in memory: what is read, and what numpy makes on the way to its survivors


class Cuts(Struct, frozen=True):
    """The tensors to cut and the kept indices of each, by the names in the layout; read from `tensors`."""

    kept: Mapping[str, KeptIndices]
    tensors: Mapping[str, StoredTensor]
    limits: Limits
    scales: Mapping[str, Scale] = {}

    def work_bytes(self, reader: Source, output: Sink) -> tuple[int, int]:
        """Bytes that a whole run reads or copies, and how many of them an earlier run did."""
        io = TensorIO(reader, output, self.tensors)
        read = sum(chunk.nbytes for one in self._passes(output) for chunk in one.chunks(io))
        return read + copied_bytes(output), already_done(output)

    def write(self, reader: Source, output: Sink, workers: int, progress: Progress) -> None:
        """Write the survivors of each tensor and copy all that stays whole; continues an earlier run.

        `progress` gets, from any thread, the bytes that were done and the tensor's name.
        """
        passes = dealt(self._passes(output), lambda one: self.tensors[one.name].shard, workers)
        jobs = (Job(order, f"cut{order}", one.name, one) for order, one in passes)
        io, record = TensorIO(reader, output, self.tensors), Record(output, Outcomes(), progress)
        write_through(jobs, io, record, Resources(workers, self.limits.memory))

    def _passes(self, output: Sink) -> list[CutTensor]:
        weights, slab = output.layout.weights, self.limits.slab
        return [
            CutTensor(name, str(weights[name].file), kept, slab, member, self.scales.get(name))
            for name, kept in self.kept.items()
            for member in (np.flatnonzero(kept.along[0]).tolist() if kept.by_member else [None])
        ]


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
    element. Of a stack whose members keep unlike indices it is about one `member`. Survivors are scaled if
    there is a `scale`.
    """

    name: str
    file: str
    kept: KeptIndices
    slab: int
    member: int | None = None
    scale: Scale | None = None

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        """The slabs of which anything is kept."""
        shape, outer, inner = self._rows(io)
        itemsize = pattern_of(io.tensors[self.name]).itemsize
        numel = prod(shape)
        kept_numel = prod([int(np.count_nonzero(flags)) for flags in inner])
        rows = np.ones(1, dtype=np.bool_)
        for flags in outer:
            rows = np.logical_and.outer(rows, flags).reshape(-1)
        step = max(1, self.slab // max(1, numel * itemsize))
        before, done = self._before(rows.size * numel, int(np.count_nonzero(rows)) * kept_numel), 0
        for begin in range(0, rows.size, step):
            kept = np.flatnonzero(rows[begin : begin + step])
            if kept.size:
                first, end = begin + int(kept[0]), begin + int(kept[-1]) + 1
                to = before[1] + done * kept_numel
                slab = Slab(before[0] + first * numel, (end - first) * numel, to, rows[first:end])
                nbytes = slab.size * itemsize
                yield Chunk(slab, nbytes, _COPIES * nbytes, key=str(begin // step), files=(self.file,))
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
        if self.scale is not None:
            left = self.scale.applied(left, io.tensors[self.name].dtype)
        io.output.write_weight(self.name, slab.to * bits.itemsize, left.data)
        return []

    def _before(self, numel: int, kept_numel: int) -> tuple[int, int]:
        """Elements of the members in front, before and after the cut; each member has so many."""
        if self.member is None:
            return 0, 0
        return self.member * numel, int(np.count_nonzero(self.kept.along[0][: self.member])) * kept_numel

    def _rows(self, io: TensorIO) -> tuple[Shape, tuple[Flags, ...], tuple[Flags, ...]]:
        """The shape of a row, and the kept indices along the dimensions before a row and in it."""
        stored = io.tensors[self.name]
        shape, along = stored.shape, self.kept.along
        if self.member is not None:
            shape, along = shape[1:], self.kept.of_member(self.member)
        if len(shape) == 1:
            shape, along = (*shape, 1), (*along, np.ones(1, dtype=np.bool_))
        itemsize, split = pattern_of(stored).itemsize, max(0, len(shape) - 1)
        while split > 1 and prod(shape[split - 1 :]) * itemsize <= self.slab:
            split -= 1
        return shape[split:], along[:split], along[split:]
