"""Kept indices: which slices of a tensor survive along each dimension; read from masks by a pass.

Owns the test whether a mask consists of whole slices. Knows neither specs nor why something is dropped.
Called by the command line for masks, and by the rest of removal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint import read_kept
from sparseprune.engine.grids import Shape, prod
from sparseprune.execution.limits import Crowd
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.runner import Job, read_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, StoredMask
    from sparseprune.execution.limits import Limits

    Flags = NDArray[np.bool_]
    Seen = tuple[int, Flags, Flags, int]  # first element, rows and columns that are kept, kept elements


@dataclass(frozen=True, slots=True, eq=False)
class KeptIndices:
    """What survives of a tensor: for each dimension a flag for every index, and the number of elements.

    An index is kept where any element of its slice is. `shape` is the shape after the other slices are cut
    out; `cut` lists the dimensions in which something is dropped.
    """

    along: tuple[Flags, ...]
    elements: int
    shape: Shape = field(init=False)
    cut: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(int(np.count_nonzero(flags)) for flags in self.along)
        cut = tuple(dim for dim, flags in enumerate(self.along) if shape[dim] < flags.size)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "cut", cut)

    @property
    def is_sliced(self) -> bool:
        """Whether whole slices are dropped and nothing else, so that cutting them out loses no survivor."""
        return self.is_empty or self.elements == prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped."""
        return self.elements == prod([flags.size for flags in self.along])

    @property
    def is_empty(self) -> bool:
        """Whether nothing survives."""
        return self.elements == 0


def kept_whole(shape: Shape) -> KeptIndices:
    """What survives where nothing is dropped."""
    return kept_slices([np.ones(size, dtype=np.bool_) for size in shape])


def kept_slices(along: Sequence[Flags]) -> KeptIndices:
    """What survives where every element is kept whose index is kept along each dimension."""
    return KeptIndices(tuple(along), prod([int(np.count_nonzero(flags)) for flags in along]))


def summed_up(kept: Mapping[str, KeptIndices]) -> str:
    """A text that differs whenever the kept indices differ."""
    parts = (
        f"{name}:{each.elements}:{','.join(np.packbits(flags).tobytes().hex() for flags in each.along)}"
        for name, each in kept.items()
    )
    return "\n".join(parts)


def read_slices(
    masks: Sequence[StoredMask],
    reader: Source,
    limits: Limits,
    workers: int,
    progress: Callable[[int, str], None],
) -> dict[str, KeptIndices]:
    """What masks keep, by the name of their weights; tensors without elements are left out.

    Each mask is read once, about `limits.slab` elements at a time. `progress` gets the bytes of masks that
    were read, and the name of the mask.
    """
    masks = [mask for mask in masks if mask.numel]
    jobs = (
        Job(number, str(number), mask.name, ReadSlices(mask, limits.slab))
        for number, mask in enumerate(masks)
    )
    found = read_through(jobs, TensorIO(reader), Crowd(workers, limits.memory), progress)
    return {mask.name: found[place] for place, mask in enumerate(masks)}


@dataclass(frozen=True, slots=True)
class ReadSlices(Pass):
    """Finds the rows and columns that a mask keeps; a row is what lies along the last dimension."""

    mask: StoredMask
    slab: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        """Whole rows, about a slab of them, or parts of one that exceeds a slab: first element and size."""
        width, numel = self._width, self.mask.numel
        begin = 0
        while begin < numel:
            whole = self.slab // width * width
            size = min(whole, numel - begin) if whole else min(self.slab, width - begin % width)
            nbytes = self._bytes_to(begin + size) - self._bytes_to(begin)
            yield Chunk((begin, size), nbytes, memory=4 * size)
            begin += size

    def work(self, chunk: Chunk, io: TensorIO) -> Seen:
        begin, size = chunk.about
        kept = read_kept(io.reader, self.mask, begin, size).view(np.bool_)
        grid = kept.reshape(-1, min(size, self._width))
        return (
            begin,
            np.logical_or.reduce(grid, axis=1),
            np.logical_or.reduce(grid, axis=0),
            int(np.count_nonzero(kept)),
        )

    def total(self) -> Seen:
        """Nothing seen yet: flags of all rows and columns, and the number of kept elements."""
        rows, columns = self.mask.numel // self._width, self._width
        return 0, np.zeros(rows, dtype=np.bool_), np.zeros(columns, dtype=np.bool_), 0

    def add(self, total: Seen, partial: Seen) -> Seen:
        (_, all_rows, all_columns, elements), (begin, rows, columns, more) = total, partial
        row, column = divmod(begin, self._width)
        all_rows[row : row + rows.size] |= rows
        all_columns[column : column + columns.size] |= columns
        return 0, all_rows, all_columns, elements + more

    def merge(self, partials: list[Seen], io: TensorIO) -> KeptIndices:  # noqa: ARG002
        ((_, rows, columns, elements),) = partials
        if not self.mask.shape:
            return KeptIndices((), elements)
        grid = rows.reshape(self.mask.shape[:-1])
        dims = range(grid.ndim)
        others = (
            np.logical_or.reduce(grid, axis=tuple(other for other in dims if other != dim)) for dim in dims
        )
        return KeptIndices((*others, columns), elements)

    @property
    def _width(self) -> int:
        return (self.mask.shape or (1,))[-1]

    def _bytes_to(self, element: int) -> int:
        """The share of the stored bytes that lies before an element."""
        return element * self.mask.stored.nbytes // self.mask.numel
