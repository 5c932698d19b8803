"""Measuring a checkpoint: zeros, patterns, rows, columns and blocks of every tensor, read in slabs.

Owns who reads what: every job takes the next slab of any tensor and holds no other, so that nothing grows
with a tensor but a bit for each of its columns. Needs no torch. Called by the command line; what it gives is
plain data for tables and JSON.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint.threads import work_through
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import mark_nonzero
from sparseprune.engine.kernels.occupancy import fullest_in_words, packed
from sparseprune.report.facts import TensorFacts, Zeros
from sparseprune.report.measuring.blocking import Bits, Blocking
from sparseprune.report.measuring.neighbours import Apart, fits_words, stack_of
from sparseprune.report.measuring.occupancy import Occupancy
from sparseprune.report.measuring.slabs import cut, cut_by_columns, slab_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.counting import Marks
    from sparseprune.report.facts import Pattern, Questions
    from sparseprune.report.measuring.occupancy import Told
    from sparseprune.report.measuring.slabs import Slab, Stack

    Progress = Callable[[int, str], None]

SLAB = 1 << 21  # bytes read at a time: few calls, and they stay in the cache until they are counted


def inspect_checkpoint(
    tensors: Sequence[StoredTensor],
    reader: Source,
    questions: Questions,
    jobs: int,
    progress: Progress,
    slab: int = SLAB,
) -> tuple[TensorFacts, ...]:
    """The facts of every tensor, in the order given; the same for any number of jobs and any size of slabs.

    `progress` is told how many bytes were read, and the tensor they belong to: in all `bytes_to_read`. Of
    several failures the one is raised that is the first in the order of the tensors.
    """
    inspection = _Inspection(tensors, questions, slab)
    work_through(inspection.pieces(), lambda: _Worker(inspection, reader, progress, slab_bytes(slab)), jobs)
    return tuple(inspection.facts[number] for number in range(len(tensors)))


def bytes_to_read(tensors: Sequence[StoredTensor], questions: Questions) -> int:
    """The bytes that `progress` will be told: all, and again for patterns that need a pass of their own."""
    recipes = _recipes(tensors, questions)
    return sum(one.nbytes * (1 + len(recipes[one.dtype, one.shape].apart)) for one in tensors)


class _Recipe:
    """What is asked of every tensor of one dtype and shape, and how it is read; never changes."""

    def __init__(self, dtype: str, shape: Shape, questions: Questions) -> None:
        self.dtype = DTYPES[dtype]
        self.itemsize = self.dtype.bits // 8
        self.blocking: Blocking | None = None
        self.stack: Stack = 1, 1, prod(shape)
        self.in_words: tuple[Pattern, ...] = ()
        self.apart: tuple[tuple[Pattern, Stack], ...] = ()
        self.filled: Told | None = None  # where nothing is zero
        if self.dtype.zero_bits is None or len(shape) < 2:
            return
        self.blocking = Blocking(shape, questions.blocks)
        self.stack = self.blocking.stack
        none_zero = self.blocking.told(dict.fromkeys(self.blocking.sizes, 0))
        self.filled = tuple(Zeros(0, size) for size in shape), *none_zero
        patterns = [
            (one, stack) for one in dict.fromkeys(questions.patterns) if (stack := stack_of(shape, one))
        ]
        self.in_words = tuple(one for one, _ in patterns if fits_words(shape, one))
        if self.dtype.zero_bits:
            self.apart = tuple(each for each in patterns if not fits_words(shape, each[0]))


def _recipes(tensors: Sequence[StoredTensor], questions: Questions) -> Mapping[tuple[str, Shape], _Recipe]:
    kinds = {(stored.dtype, stored.shape) for stored in tensors}
    return {kind: _Recipe(*kind, questions) for kind in kinds}


class _Tally:
    """What is known of one tensor; of its pieces any thread may take one."""

    def __init__(self, stored: StoredTensor, recipe: _Recipe) -> None:
        self.stored, self.recipe = stored, recipe
        self.apart = tuple(Apart(pattern, stack) for pattern, stack in recipe.apart)
        self._left = stored.nbytes * (1 + len(self.apart))
        self._in_words = recipe.in_words
        self._occupancy: Occupancy | None = None
        self._zeros = self._nonfinite = 0
        self._lock = threading.Lock()

    def add(self, slab: Slab, marks: Marks, zeros: int, nonfinite: int) -> None:
        """What a slab of its matrices holds: marks where it is not zero."""
        groups = {pattern.group for pattern in self._in_words}
        bits, fullest = Bits(None, filled=zeros == 0), {group: group * (zeros == 0) for group in groups}
        blocking = self.recipe.blocking
        if blocking is not None and 0 < zeros < slab.numel:
            words = packed(marks.reshape(slab.shape))
            bits, fullest = Bits(words), dict(fullest_in_words(words, groups))
        # A tensor that was seen to be filled at one glance needs no tally: the recipe knows its facts.
        alone = zeros == 0 and slab.shape == self.recipe.stack
        found = None if blocking is None or alone else blocking.find(slab, bits)
        with self._lock:
            self._zeros += zeros
            self._nonfinite += nonfinite
            self._in_words = tuple(one for one in self._in_words if fullest[one.group] <= one.kept)
            if blocking is not None and found is not None:
                self._occupancy = self._occupancy or Occupancy(blocking)
                self._occupancy.add(*found)

    def done(self, nbytes: int) -> bool:
        """Whether with so many more bytes nothing of it is left to do."""
        with self._lock:
            self._left -= nbytes
            return self._left == 0

    def facts(self, questions: Questions) -> TensorFacts:
        stored, recipe = self.stored, self.recipe
        named = stored.name, stored.dtype, stored.shape, stored.numel
        if recipe.dtype.zero_bits is None:
            return TensorFacts(*named, blocks=None)
        holding = {*self._in_words, *(one.pattern for one in self.apart if not one.broken)}
        patterns = tuple(str(pattern) for pattern in questions.patterns if pattern in holding)
        counted = *named, self._zeros, self._nonfinite, patterns
        if recipe.filled is None:
            return TensorFacts(
                *counted, tuple(Zeros(self._zeros, size) for size in stored.shape), blocks=None
            )
        return TensorFacts(
            *counted, *(self._occupancy.told() if self._zeros and self._occupancy else recipe.filled)
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some bytes of a tensor: a slab of its matrices, or of what a pattern looks at; None: not looked at."""

    number: int
    tally: _Tally
    begin: int
    nbytes: int
    slab: Slab | None
    apart: Apart | None = None


class _Inspection:
    """All tensors, cut into pieces as these are taken, and the facts of those that are done."""

    def __init__(self, tensors: Sequence[StoredTensor], questions: Questions, slab: int) -> None:
        self.facts: dict[int, TensorFacts] = {}
        self._tensors, self._questions, self._slab = tensors, questions, slab
        self._recipes = _recipes(tensors, questions)

    def pieces(self) -> Iterator[_Piece]:
        """Every element of every tensor once, then once more for each pattern that needs it."""
        for number, stored in enumerate(self._tensors):
            recipe = self._recipes[stored.dtype, stored.shape]
            tally, itemsize = _Tally(stored, recipe), recipe.itemsize
            if stored.nbytes == 0:
                self.facts[number] = tally.facts(self._questions)
            elif recipe.dtype.zero_bits is None:
                yield _Piece(number, tally, 0, stored.nbytes, None)
            else:
                multiple = 1 if recipe.blocking is None else recipe.blocking.multiple
                for slab in cut(recipe.stack, itemsize, self._slab, multiple):
                    begin = slab.begin(recipe.stack) * itemsize
                    yield _Piece(number, tally, begin, slab.numel * itemsize, slab)
                for apart in tally.apart:
                    for slab in cut_by_columns(apart.stack, itemsize, self._slab):
                        begin = slab.begin(apart.stack) * itemsize
                        yield _Piece(number, tally, begin, slab.numel * itemsize, slab, apart)

    def finish(self, piece: _Piece) -> None:
        """A piece was looked at."""
        if piece.tally.done(piece.nbytes):
            self.facts[piece.number] = piece.tally.facts(self._questions)


class _Worker:
    """What one thread does with a piece, and the buffers that it needs."""

    def __init__(self, inspection: _Inspection, reader: Source, progress: Progress, most: int) -> None:
        self._inspection = inspection
        self._reader = reader
        self._progress = progress
        self._data = np.empty(most, dtype=np.uint8)
        self._marks = np.empty(most, dtype=np.bool_)

    def __call__(self, piece: _Piece) -> None:
        if piece.slab is not None and not (piece.apart is not None and piece.apart.broken):
            self._look(piece, piece.slab)
        self._inspection.finish(piece)
        self._progress(piece.nbytes, piece.tally.stored.name)

    def _look(self, piece: _Piece, slab: Slab) -> None:
        tally, dtype = piece.tally, piece.tally.recipe.dtype
        data, marks = self._data[: piece.nbytes], self._marks[: slab.numel]
        self._reader.read_into(tally.stored, piece.begin, data)
        zeros, nonfinite = mark_nonzero(data.view(f"u{dtype.bits // 8}"), dtype, marks)
        if piece.apart is None:
            tally.add(slab, marks, zeros, nonfinite)
        else:
            piece.apart.add(slab, marks)
