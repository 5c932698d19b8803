"""How many zeros tensors have that are looked at as masks of themselves. Called by api."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint import read_kept
from sparseprune.engine.dtypes import DTYPES
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import Resources
from sparseprune.execution.runner import Job, read_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.checkpoint import Source, StoredMask
    from sparseprune.execution.regions import Limits
    from sparseprune.execution.runner import Progress


def count_zeros(
    masks: Sequence[StoredMask], reader: Source, limits: Limits, workers: int, progress: Progress
) -> dict[str, int]:
    """How many elements each mask drops, by the names of the masks; each is read once."""
    passes = enumerate(CountZeros(mask, max(1, limits.slab)) for mask in masks)
    jobs = (Job(number, "", one.mask.name, one) for number, one in passes)
    found = read_through(jobs, TensorIO(reader), Resources(workers, limits.memory), progress)
    return {mask.name: found[place] for place, mask in enumerate(masks)}


@dataclass(frozen=True, slots=True)
class CountZeros(Pass):
    """Elements that a mask drops, some `elements` at one time."""

    mask: StoredMask
    elements: int

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        itemsize = DTYPES[self.mask.stored.dtype].itemsize
        for begin in range(0, self.mask.numel, self.elements):
            size = min(self.elements, self.mask.numel - begin)
            yield Chunk((begin, size), size * itemsize, memory=size)

    def work(self, chunk: Chunk, io: TensorIO) -> int:
        begin: int
        size: int
        begin, size = chunk.about
        return size - int(np.count_nonzero(read_kept(io.reader, self.mask, begin, size)))

    def total(self) -> int:
        return 0

    def add(self, total: int, partial: int) -> int:
        return total + partial

    def merge(self, partials: list[int], io: TensorIO) -> int:  # noqa: ARG002
        return partials[0]
