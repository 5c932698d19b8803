"""Slices: which indices of each dimension the masks of tensors keep, counted as the masks pass by.

Owns the test whether a mask is made of whole slices. Knows neither specs nor why something is dropped.
Called by the command line for masks of a run or of files.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint import read_kept
from sparseprune.checkpoint.threads import work_through
from sparseprune.engine.grids import Shape, prod

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StoredMask, TensorReader

    Flags = NDArray[np.bool_]
    Piece = tuple["_Marks", int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What survives of a tensor: for each dimension a flag for every index, and the number of elements.

    An index is kept where any element of its slice is. `shape` is that of what is left when the other slices
    are cut out, `cut` has the dimensions in which something is dropped.
    """

    along: tuple[Flags, ...]
    elements: int
    shape: Shape = field(init=False)
    cut: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        shape = tuple(int(np.count_nonzero(flags)) for flags in self.along)
        sizes = zip(shape, self.along, strict=True)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(
            self, "cut", tuple(dim for dim, (left, flags) in enumerate(sizes) if left < flags.size)
        )

    @property
    def is_sliced(self) -> bool:
        """Whether what is dropped are whole slices, so that nothing but them is lost by cutting them out."""
        return self.is_empty or self.elements == prod(self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is dropped."""
        return self.elements == prod([flags.size for flags in self.along])

    @property
    def is_empty(self) -> bool:
        """Whether nothing survives."""
        return self.elements == 0


def kept_whole(shape: Shape) -> Kept:
    """What survives where nothing is dropped."""
    return Kept(tuple(np.ones(size, dtype=np.bool_) for size in shape), prod(shape))


def kept_slices(along: Sequence[Flags]) -> Kept:
    """What survives where these indices are, and all of their elements."""
    return Kept(tuple(along), prod([int(np.count_nonzero(flags)) for flags in along]))


def read_slices(
    masks: Sequence[StoredMask],
    reader: TensorReader,
    slab: int,
    workers: int,
    progress: Callable[[int, str], None],
) -> dict[str, Kept]:
    """What masks keep, by the name of their weights; each is read once, about `slab` elements at a time.

    Tensors without elements are left out. `progress` is told bytes of masks that were looked at, and of what.
    """
    marks = {mask.name: _Marks(mask) for mask in masks if mask.numel}

    def pieces() -> Iterator[Piece]:
        for each in marks.values():
            for first, count in each.runs(slab):
                yield each, first, count

    def worker() -> Callable[[Piece], None]:
        def look(piece: Piece) -> None:
            each, first, count = piece
            each.add(first, read_kept(reader, each.mask, first, count))
            progress(each.bytes_to(first + count) - each.bytes_to(first), each.mask.name)

        return look

    work_through(pieces(), worker, workers)
    return {name: each.result() for name, each in marks.items()}


class _Marks:
    """One mask on its way: flags of its rows and of its columns; runs may be added from any thread.

    A row is what lies along the last dimension.
    """

    def __init__(self, mask: StoredMask) -> None:
        self.mask = mask
        self._shape = mask.shape or (1,)
        self._width = self._shape[-1]
        self._rows = np.zeros(mask.numel // self._width, dtype=np.bool_)
        self._columns = np.zeros(self._width, dtype=np.bool_)
        self._elements = 0
        self._adding = threading.Lock()

    def runs(self, slab: int) -> Iterator[tuple[int, int]]:
        """Whole rows, about a slab of them, or parts of one where that has more."""
        if self._width > slab:
            for row in range(self._rows.size):
                for begin in range(0, self._width, slab):
                    yield row * self._width + begin, min(slab, self._width - begin)
            return
        step = slab // self._width * self._width
        for first in range(0, self.mask.numel, step):
            yield first, min(step, self.mask.numel - first)

    def bytes_to(self, element: int) -> int:
        """The share of the stored bytes that lies before an element."""
        return element * self.mask.stored.nbytes // self.mask.numel

    def add(self, first: int, keep: NDArray[np.uint8]) -> None:
        """The elements from `first` on, one byte 0 or 1 for each."""
        flags = keep.view(np.bool_)
        row, column = divmod(first, self._width)
        if column or flags.size < self._width:
            if flags.any():
                self._rows[row] = True
            columns = flags
        else:
            grid = flags.reshape(-1, self._width)
            self._rows[row : row + len(grid)] = np.logical_or.reduce(grid, axis=1)
            columns = np.logical_or.reduce(grid, axis=0)
        with self._adding:
            self._columns[column : column + columns.size] |= columns
            self._elements += int(np.count_nonzero(flags))

    def result(self) -> Kept:
        leading = self._shape[:-1]
        rows = self._rows.reshape(leading)
        others = (
            np.logical_or.reduce(rows, axis=tuple(other for other in range(len(leading)) if other != dim))
            for dim in range(len(leading))
        )
        along = (*others, self._columns) if self.mask.shape else ()
        return Kept(along, self._elements)


def summed_up(kept: Mapping[str, Kept]) -> str:
    """A text that tells what survives apart from whatever else might."""
    parts = (
        f"{name}:{each.elements}:{','.join(np.packbits(flags).tobytes().hex() for flags in each.along)}"
        for name, each in kept.items()
    )
    return "\n".join(parts)
