"""Inspecting a checkpoint: zeros, patterns, rows, columns and blocks of every tensor.

Owns which bytes are read at one time: every element once, a large tensor in parts, small tensors together.
What is counted in them is occupancy.py's part. Needs no torch. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import mark_nonzero
from sparseprune.engine.kernels.occupancy import WORD, ones, packed, words_of
from sparseprune.execution.limits import READING, Crowd
from sparseprune.execution.occupancy import Counted, form_of
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import cut, whole_part
from sparseprune.execution.runner import Job, batches, read_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.execution.facts import Questions, TensorFacts
    from sparseprune.execution.occupancy import Form
    from sparseprune.execution.regions import Part

    Progress = Callable[[int, str], None]

SLAB = 1 << 21  # bytes read at a time: few calls, and they stay in the cache until they are counted
_MEMORY = 4  # bytes for each byte that is read or is a bit: marks, bits, joined bits


def inspect_checkpoint(
    tensors: Sequence[StoredTensor],
    reader: Source,
    questions: Questions,
    jobs: int,
    progress: Progress,
    slab: int = SLAB,
) -> tuple[TensorFacts, ...]:
    """The facts of every tensor, in the order given; the same for any number of jobs and any size of slabs.

    `progress` gets the bytes that were read, in all those of the tensors, and the name of a tensor. Of
    several failures the one is raised that is the first in the order of the tensors.
    """
    found = read_through(
        inspect_jobs(tensors, questions, slab), TensorIO(reader), Crowd(jobs, READING), progress
    )
    return tuple(facts for order in sorted(found) for facts in found[order])


def inspect_jobs(tensors: Sequence[StoredTensor], questions: Questions, slab: int = SLAB) -> Iterator[Job]:
    """A job for each large tensor, and one for neighbouring small tensors of about `slab` bytes in all."""

    def size(stored: StoredTensor) -> int:
        form = form_of(stored.dtype, stored.shape, questions)
        return max(stored.nbytes, prod(form.stack[:2]) * form.row_bytes if form.is_read else 0)

    for number, some in batches(tensors, size, slab):
        large = size(some[0]) > slab
        first = InspectParts(some[0], questions, slab) if large else InspectTogether(some, questions)
        yield Job(number, f"inspect{number}", some[0].name, first)


@dataclass(frozen=True, slots=True)
class InspectTogether(Pass):
    """Small tensors, read at one time; those of one form are counted at one time."""

    tensors: tuple[StoredTensor, ...]
    questions: Questions

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        nbytes = sum(stored.nbytes for stored in self.tensors)
        yield Chunk(None, nbytes, _MEMORY * nbytes)

    def work(self, chunk: Chunk, io: TensorIO) -> list[Counted | None]:  # noqa: ARG002
        forms = self._forms()
        places = [place for place, form in enumerate(forms) if form.is_read]
        alike: dict[Form, dict[int, NDArray[np.uint8]]] = {}
        for place, data in zip(places, io.read_whole([self.tensors[place] for place in places]), strict=True):
            alike.setdefault(forms[place], {})[place] = data
        counted: dict[int, Counted] = {}
        for form, each in alike.items():
            counted.update(zip(each, _counted_together(form, list(each.values())), strict=True))
        return [counted.get(place) for place in range(len(forms))]

    def merge(self, partials: list[Any], io: TensorIO) -> tuple[TensorFacts, ...]:  # noqa: ARG002
        each = zip(self.tensors, self._forms(), partials[0], strict=True)
        return tuple(form.facts(stored.name, counted) for stored, form, counted in each)

    def _forms(self) -> list[Form]:
        return [form_of(stored.dtype, stored.shape, self.questions) for stored in self.tensors]


@dataclass(frozen=True, slots=True)
class InspectParts(Pass):
    """One large tensor, in parts of about `slab` bytes."""

    stored: StoredTensor
    questions: Questions
    slab: int

    @property
    def form(self) -> Form:
        return form_of(self.stored.dtype, self.stored.shape, self.questions)

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        form = self.form
        if not form.is_read:
            yield Chunk(nbytes=self.stored.nbytes)
            return
        for part in form.parts(self.slab):
            nbytes = part.numel * form.stack[2] * form.itemsize
            yield Chunk(part, nbytes, _MEMORY * part.numel * form.row_bytes)

    def work(self, chunk: Chunk, io: TensorIO) -> Counted | None:
        part, form = chunk.about, self.form
        if part is None:
            return None
        _, rows, columns = form.stack
        first = (part.begin[0] * rows + part.begin[1]) * columns
        zeros = nonfinite = 0
        words = None
        for piece in self._pieces(part):
            (row, word), (height, width) = piece.begin, piece.extent
            width = min(width * WORD, columns - word * WORD)
            bits = io.scratch("bits", height * width, f"u{form.itemsize}")
            io.reader.read_into(self.stored, (first + row * columns + word * WORD) * form.itemsize, bits)
            marks = io.scratch("marks", bits.size, "?")
            found = mark_nonzero(bits, DTYPES[form.dtype], marks)
            zeros, nonfinite = zeros + found[0], nonfinite + found[1]
            if found[0] and form.sizes:
                if words is None:
                    words = np.tile(ones(columns), (part.numel, 1))
                words[row : row + height, word : word + words_of(width)] = packed(
                    marks.reshape(1, height, width)
                )[0]
        if words is None:
            return Counted(zeros, nonfinite)
        return Counted(zeros, nonfinite, form.count(words.reshape(1, *part.extent, -1)))

    def _pieces(self, part: Part) -> Iterator[Part]:
        """The rows of a part, as many as are read at one time, or words of bits of one row."""
        columns = self.form.stack[2]
        rows = whole_part((part.numel, words_of(columns)))
        return cut(rows, (0, 1), self.slab // (min(columns, WORD) * self.form.itemsize))

    def merge(self, partials: list[Any], io: TensorIO) -> tuple[TensorFacts]:  # noqa: ARG002
        form = self.form
        if not form.is_read:
            return (form.facts(self.stored.name, None),)
        zeros, nonfinite = sum(one.zeros for one in partials), sum(one.nonfinite for one in partials)
        found = None
        if zeros and form.sizes:
            parts = zip(form.parts(self.slab), partials, strict=True)
            found = form.joined([one.found or form.filled(part) for part, one in parts])
        return (form.facts(self.stored.name, Counted(zeros, nonfinite, found)),)


def _counted_together(form: Form, data: Sequence[NDArray[np.uint8]]) -> list[Counted]:
    """What is counted in tensors of one form, from the bytes of each."""
    dtype, number = DTYPES[form.dtype], len(data)
    bits = np.concatenate(data).view(f"u{form.itemsize}")
    marks = np.empty(bits.size, dtype=np.bool_)
    zeros, nonfinite = mark_nonzero(bits, dtype, marks)
    if not zeros and not nonfinite:
        return [Counted(0, 0)] * number
    each, marked = bits.reshape(number, -1), marks.reshape(number, -1)
    zeros_of = marked.shape[1] - np.count_nonzero(marked, axis=1)
    nonfinite_of = [0] * number
    if nonfinite:
        nonfinite_of = [mark_nonzero(each[one], dtype, marked[one])[1] for one in range(number)]
    counts = list(zip(zeros_of.tolist(), nonfinite_of, strict=True))
    some = np.flatnonzero(zeros_of)
    if not form.sizes or not some.size:
        return [Counted(*one) for one in counts]
    words = packed(marked[some].reshape(-1, *form.stack[1:]))
    found = form.count(words.reshape(some.size, form.stack[0], *words.shape[1:]))
    at = iter(range(some.size))
    return [Counted(*one, found, next(at)) if one[0] else Counted(*one) for one in counts]
