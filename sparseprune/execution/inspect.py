"""Passes that inspect: zeros, N:M patterns, rows, columns and blocks of every tensor, each read once.

Owns what may be asked of tensors and what was found (the border to reports), how a tensor is seen as a stack
of matrices, and what is counted of it. Called by api.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec import Struct
from msgspec import field as struct_field
from msgspec.structs import replace

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import (
    WORD,
    count_occupied,
    counts_along,
    fullest_in_words,
    joined,
    mark_nonzero,
    ones,
    packed,
    unpacked,
    words_of,
)
from sparseprune.errors import SparsepruneError
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.regions import Part, Resources, cut, whole_part
from sparseprune.execution.runner import Job, batches, read_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.counting import Words

    Size = tuple[int, int]  # rows and columns of a block
    Marks = NDArray[np.bool_]
    Numbers = NDArray[np.int64]
    Progress = Callable[[int, str], None]

_PATTERN = re.compile(r"(?P<kept>[0-9]{1,9}):(?P<group>[0-9]{1,9})(@(?P<axis>-?[0-9]{1,2}|both))?")
_BLOCK = re.compile(r"(?P<rows>[0-9]{1,9})x(?P<columns>[0-9]{1,9})")


class Pattern(Struct, frozen=True):
    """N:M sparsity: of M neighbours along a dimension at most N are not zero; by default along the last.

    Along `both` of the last two it is transposable: each row and column of tiles of M x M has at most N.
    """

    kept: int
    group: int
    axis: int = -1
    both: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The dimensions along which it has to hold, the one of the neighbours farthest apart first."""
        return (-2, -1) if self.both else (self.axis,)

    def __str__(self) -> str:
        along = "@both" if self.both else "" if self.axis == -1 else f"@{self.axis}"
        return f"{self.kept}:{self.group}{along}"


class BlockShape(Struct, frozen=True):
    """Rows and columns of the blocks that a matrix is cut into; those at its edges may be smaller."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"


PATTERNS = (Pattern(1, 2), Pattern(2, 4), Pattern(4, 8), Pattern(2, 4, both=True))
BLOCKS = (BlockShape(4, 4), BlockShape(16, 16), BlockShape(32, 32))


class Questions(Struct, frozen=True):
    """What is looked for in every tensor, besides its zeros."""

    patterns: tuple[Pattern, ...] = PATTERNS
    blocks: tuple[BlockShape, ...] = BLOCKS


class Zeros(Struct, frozen=True):
    """How many of some things are zero throughout."""

    zero: int
    of: int


class TensorFacts(Struct, frozen=True):
    """What was counted in one tensor.

    Elements that are no whole bytes, and packed codes, cannot be looked at: `zeros`, `nonfinite` and all
    below are then None, but for `holds`, which says what elements are, as `StoredTensor` does. `patterns` are
    those of the questions that it satisfies, for tensors of two dimensions or more.
    `slices` has one entry for each dimension: of the slices at one index of it, those that are all zero.
    `rows`, `columns` and `blocks` (by their shape, "4x4") are those of its matrices (`matrices_of`), None
    where it has none. `nonfinite` counts NaN and infinities.
    """

    name: str
    dtype: str
    shape: Shape
    numel: int
    zeros: int | None = None
    nonfinite: int | None = None
    patterns: tuple[str, ...] = ()
    slices: tuple[Zeros, ...] | None = None
    rows: Zeros | None = None
    columns: Zeros | None = None
    blocks: Mapping[str, Zeros] | None = struct_field(default_factory=lambda: MappingProxyType({}))
    holds: Literal["weights", "codes", "packed", "beside"] = "weights"


def matrices_of(shape: Shape) -> tuple[int, int, int] | None:
    """A tensor as (how many matrices, rows, columns), row-major without moving anything; None below 2-D.

    Three dimensions are a stack of matrices, such as experts; with four or more it is the one matrix that
    a convolution multiplies by, a row for each filter.

    >>> matrices_of((64, 16)), matrices_of((8, 64, 16)), matrices_of((64, 16, 3, 3)), matrices_of((64,))
    ((1, 64, 16), (8, 64, 16), (1, 64, 144), None)
    """
    if len(shape) < 2:
        return None
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], prod(shape[1:])


def pattern_of(text: str) -> Pattern:
    """A pattern as `--pattern` takes it: N:M, N:M@AXIS, or N:M@both.

    >>> pattern_of("1:16@0"), str(pattern_of("2:4@both"))
    (Pattern(kept=1, group=16, axis=0, both=False), '2:4@both')
    """
    found = _PATTERN.fullmatch(text.strip())
    if found is not None and 0 <= int(found["kept"]) < int(found["group"]):
        pair = int(found["kept"]), int(found["group"])
        return (
            Pattern(*pair, both=True) if found["axis"] == "both" else Pattern(*pair, int(found["axis"] or -1))
        )
    raise SparsepruneError(
        f"--pattern {text}: wanted N:M with N less than M, such as 2:4, or N:M@AXIS, such as 2:4@0, or "
        "N:M@both"
    )


def block_of(text: str) -> BlockShape:
    """A block shape as `--block` takes it: ROWSxCOLUMNS.

    >>> block_of("8x1")
    BlockShape(rows=8, columns=1)
    """
    found = _BLOCK.fullmatch(text.strip())
    if found is not None and int(found["rows"]) > 0 and int(found["columns"]) > 0:
        return BlockShape(int(found["rows"]), int(found["columns"]))
    raise SparsepruneError(f"--block {text}: wanted ROWSxCOLUMNS, such as 16x16")


class Found(Struct, frozen=True):
    """What was counted in the same part of some tensors of one form: arrays with a row for each tensor.

    `holding` (tensors, patterns) says which patterns hold. `zero` (tensors, sizes) counts zero blocks of each
    size; those as tall as a matrix only where matrices are whole. Not zero throughout are the `columns`, as
    bits (tensors, words), the `matrices` (tensors, matrices), and in some matrix the `rows` (tensors, rows).
    """

    holding: Marks
    zero: Numbers
    columns: Words
    matrices: Marks
    rows: Marks


class Counted(Struct, frozen=True):
    """Zeros and elements that are not finite, of a tensor or a part of it; `found` has the rest in row `at`.

    Without a zero, and below two dimensions, there is nothing to be found.
    """

    zeros: int
    nonfinite: int
    found: Found | None = None
    at: int = 0


class Form(Struct, frozen=True):
    """What is asked of every tensor of one dtype and shape; made by `form_of`.

    `is_read`: elements can be looked at, as they are whole bytes and no packed codes. `stack` are its
    matrices, rows and columns. `sizes` are those of blocks, cut off at the edges of a matrix, the lowest
    first; a row has the height 1, a column the width 1; none below two dimensions. Parts that are multiples
    of `unit`, (matrices, rows), cut no block and no group of a pattern.
    """

    dtype: str
    shape: Shape
    questions: Questions
    stack: tuple[int, int, int]
    sizes: tuple[Size, ...]
    patterns: tuple[Pattern, ...]
    unit: tuple[int, int]
    is_read: bool = True

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: its elements or, if they are more, its bits."""
        columns = self.stack[2]
        return max(1, columns * self.itemsize, words_of(columns) * WORD // 8 if self.sizes else 0)

    def parts(self, size: int) -> Iterator[Part]:
        """Some matrices, or some rows of one, of about `size` bytes, in the order of the elements."""
        matrices, rows, columns = self.stack
        if not columns:
            return
        some, high = self.unit
        units = whole_part((-(-matrices // some), -(-rows // high)))
        for part in cut(units, (0, 1), size // (some * high * self.row_bytes)):
            matrix, row = part.begin[0] * some, part.begin[1] * high
            extent = min(part.extent[0] * some, matrices - matrix), min(part.extent[1] * high, rows - row)
            yield Part((matrix, row), extent)

    def count(self, words: Words) -> Found:
        """What the bits (tensors, matrices, rows, words) of the same part of some tensors hold."""
        tensors, matrices, rows, width = words.shape
        joints = {1: words.reshape(tensors * matrices, rows, width)}
        zero = np.zeros((tensors, len(self.sizes)), dtype=np.int64)
        for place, (height, columns) in enumerate(self.sizes):
            if height not in joints:
                below = max(other for other in joints if height % other == 0)
                joints[height] = joined(joints[below], height // below)
            if height < self.stack[1] or rows == self.stack[1]:
                zero[:, place] = self._zero(joints[height].reshape(tensors, -1, width), columns)
        tallest = joints[max(joints)].reshape(tensors, matrices, width)
        occupied = words if len(self.shape) == 3 else words[:, :, :0]
        return Found(
            self._holding(words),
            zero,
            np.bitwise_or.reduce(tallest, axis=1),
            np.asarray(tallest.any(axis=2)),
            np.asarray(occupied.any(axis=(1, 3))),
        )

    def filled(self, part: Part) -> Found:
        """What a part of one tensor holds in which nothing is zero."""
        matrices, rows = part.extent
        return Found(
            np.zeros((1, len(self.patterns)), dtype=np.bool_),
            np.zeros((1, len(self.sizes)), dtype=np.int64),
            ones(self.stack[2])[np.newaxis],
            np.ones((1, matrices), dtype=np.bool_),
            np.ones((1, rows if len(self.shape) == 3 else 0), dtype=np.bool_),
        )

    def joined(self, parts: Sequence[Found]) -> Found:
        """What a tensor holds, from all its `parts` in their order."""
        if len(parts) == 1:
            return parts[0]
        matrices = self.stack[0]
        zero = np.sum([part.zero for part in parts], axis=0)
        columns = np.concatenate([part.columns for part in parts])
        occupied = np.concatenate([part.matrices for part in parts], axis=1)
        rows = [part.rows for part in parts]
        if len(parts) > matrices:  # each is of one matrix, whose columns are known only now
            whole = np.bitwise_or.reduce(columns.reshape(matrices, -1, columns.shape[1]), axis=1)
            for place, (height, width) in enumerate(self.sizes):
                if height == self.stack[1]:
                    zero[:, place] = self._zero(whole[np.newaxis], width)
            occupied = whole.any(axis=1)[np.newaxis]
            rows = np.split(np.concatenate(rows, axis=1), matrices, axis=1)
        return Found(
            np.logical_and.reduce([part.holding for part in parts]),
            zero,
            np.bitwise_or.reduce(columns)[np.newaxis],
            occupied,
            np.logical_or.reduce(rows),
        )

    def facts(self, name: str, counted: Counted | None) -> TensorFacts:
        """The facts of one tensor; None where it could not be looked at."""
        named = name, self.dtype, self.shape, prod(self.shape)
        if counted is None:
            return TensorFacts(*named, blocks=None)
        zeros, nonfinite, found = counted.zeros, counted.nonfinite, counted.found
        if not self.sizes:
            slices = tuple(Zeros(zeros, size) for size in self.shape)
            return TensorFacts(*named, zeros, nonfinite, (), slices, blocks=None)
        if found is None:
            return TensorFacts(*named, zeros, nonfinite, (), *_filled(self))
        holding = {one for one, holds in zip(self.patterns, found.holding[counted.at], strict=True) if holds}
        patterns = tuple(str(one) for one in self.questions.patterns if one in holding)
        rows, columns, blocks = self.blocks(found.zero[counted.at].tolist())
        slices = self._slices(found, counted.at, rows, columns)
        return TensorFacts(*named, zeros, nonfinite, patterns, slices, rows, columns, blocks)

    def blocks(self, zero: Sequence[int]) -> tuple[Zeros, Zeros, Mapping[str, Zeros]]:
        """Rows, columns and the blocks that were asked for, of which so many of each size are zero."""
        matrices, rows, columns = self.stack
        found = {
            (height, width): Zeros(count, matrices * -(-rows // height) * -(-columns // width))
            for (height, width), count in zip(self.sizes, zero, strict=True)
        }
        of_rows, of_columns = (found[_cut_off(size, self.stack)] for size in ((1, columns), (rows, 1)))
        blocks = {
            str(one): found[_cut_off((one.rows, one.columns), self.stack)] for one in self.questions.blocks
        }
        # A matrix without elements has rows or columns all the same.
        rows_there, columns_there = (
            Zeros(of_rows.zero, matrices * rows),
            Zeros(of_columns.zero, matrices * columns),
        )
        return rows_there, columns_there, MappingProxyType(blocks)

    def _zero(self, words: Words, width: int) -> Numbers:
        """How many blocks of so many columns are zero in bits (tensors, rows of blocks, words)."""
        columns = self.stack[2]
        total: Numbers = words.shape[1] * -(-columns // width) - count_occupied(words, width, columns)
        return total

    def _holding(self, words: Words) -> Marks:
        """Which patterns hold in each tensor; most are broken in the first word, or unit, already."""
        holding = np.ones((len(words), len(self.patterns)), dtype=np.bool_)
        in_words = [WORD % one.group == 0 and one.axis in {-1, len(self.shape) - 1} for one in self.patterns]
        if any(in_words):
            first = words.reshape(len(words), -1)[:, 0].tolist()
            asked = [
                place
                for place, one in enumerate(self.patterns)
                if in_words[place] and any(_holds(one, word) for word in first)
            ]
            fullest = fullest_in_words(words, {self.patterns[place].group for place in asked})
            holding[:, in_words] = False
            for place in asked:
                holding[:, place] = fullest[self.patterns[place].group] <= self.patterns[place].kept
        for some in (words[:, : self.unit[0], : self.unit[1]], words):
            asked = [
                place
                for place in np.flatnonzero(holding.any(axis=0)).tolist()
                if not in_words[place] or self.patterns[place].both
            ]
            marks = unpacked(some, self.stack[2]) if asked else np.empty(0, dtype=np.bool_)
            for place in asked:
                pattern = self.patterns[place]
                for axis in pattern.axes:
                    counts = counts_along(marks.reshape(-1, pattern.group, _inside(self.shape, axis)))
                    holding[:, place] &= counts.reshape(len(words), -1).max(axis=1) <= pattern.kept
        return holding

    def _slices(self, found: Found, at: int, rows: Zeros, columns: Zeros) -> tuple[Zeros, ...]:
        """Of each dimension the slices that are zero; `rows` and `columns` are those of the matrices."""
        if len(self.shape) == 2:
            return rows, columns
        width = self.stack[2]
        if len(self.shape) == 3:
            occupied = int(count_occupied(found.columns[at : at + 1], 1, width)[0])
            return _unmarked(found.matrices[at]), _unmarked(found.rows[at]), Zeros(width - occupied, width)
        inner = range(len(self.shape) - 1)
        marks = unpacked(found.columns[at], width).reshape(self.shape[1:])
        others = [tuple(other for other in inner if other != dim) for dim in inner]
        return rows, *(_unmarked(np.asarray(marks.any(axis=axes))) for axes in others)


@lru_cache(maxsize=256)
def form_of(dtype: str, shape: Shape, questions: Questions, *, is_read: bool = True) -> Form:
    """What these questions ask of a tensor."""
    stack = matrices_of(shape)
    if stack is None or not is_read:
        return Form(dtype, shape, questions, (1, prod(shape), 1), (), (), (1, 1), is_read)
    matrices, rows, columns = stack
    asked = {(1, columns), (rows, 1), *((one.rows, one.columns) for one in questions.blocks)}
    sizes = tuple(sorted({_cut_off(size, stack) for size in asked}))
    patterns = tuple(one for one in dict.fromkeys(questions.patterns) if _is_in(shape, one))
    groups = [one.group * _inside(shape, one.axes[0]) for one in patterns]  # elements that one spans
    heights = [height for height, _ in sizes if height < rows]
    together = math.lcm(
        *heights, *(group // columns for group in groups if columns < group <= rows * columns)
    )
    of_matrices = math.lcm(*(group // (rows * columns) for group in groups if group > rows * columns))
    whole = of_matrices > 1 or together >= rows
    unit = min(of_matrices, max(1, matrices)), max(1, rows) if whole else together
    return Form(dtype, shape, questions, stack, sizes, patterns, unit)


def _holds(pattern: Pattern, word: int) -> bool:
    """Whether no group of a word of bits has more than its pattern keeps."""
    members = (1 << pattern.group) - 1
    return all((word >> at & members).bit_count() <= pattern.kept for at in range(0, WORD, pattern.group))


def _inside(shape: Shape, axis: int) -> int:
    """How many elements lie between two members of a group along a dimension."""
    return prod(shape[axis % len(shape) + 1 :])


def _is_in(shape: Shape, pattern: Pattern) -> bool:
    """Whether a tensor has a pattern's dimensions, in whole groups."""
    rank = len(shape)
    return 0 not in shape and all(
        -rank <= axis < rank and shape[axis] % pattern.group == 0 for axis in pattern.axes
    )


@lru_cache(maxsize=256)
def _filled(form: Form) -> tuple[tuple[Zeros, ...], Zeros, Zeros, Mapping[str, Zeros]]:
    slices = tuple(Zeros(0, size) for size in form.shape)
    return slices, *form.blocks([0] * len(form.sizes))


def _cut_off(size: Size, stack: tuple[int, int, int]) -> Size:
    """The size of a block that is no larger than a matrix."""
    return max(1, min(size[0], stack[1])), max(1, min(size[1], stack[2]))


def _unmarked(marks: Marks) -> Zeros:
    return Zeros(marks.size - int(np.count_nonzero(marks)), marks.size)


SLAB = 1 << 21  # bytes read at a time: few calls, and they stay in the cache until they are counted
_MEMORY = 4  # bytes for each byte that is read or is a bit: marks, bits, joined bits


def inspect_checkpoint(
    tensors: Sequence[StoredTensor],
    reader: Source,
    questions: Questions,
    resources: Resources,
    progress: Progress,
    slab: int = SLAB,
) -> tuple[TensorFacts, ...]:
    """The facts of every tensor, in the order given; the same for any number of threads and size of slabs.

    `progress` gets the bytes that were read, in all those of the tensors, and the name of a tensor. Of
    several failures the one is raised that is the first in the order of the tensors.
    """
    found = read_through(inspect_jobs(tensors, questions, slab), TensorIO(reader), resources, progress)
    return tuple(facts for order in sorted(found) for facts in found[order])


def inspect_jobs(tensors: Sequence[StoredTensor], questions: Questions, slab: int = SLAB) -> Iterator[Job]:
    """A job for each large tensor, and one for neighbouring small tensors of about `slab` bytes in all."""

    def size(stored: StoredTensor) -> int:
        form = _form(stored, questions)
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
        return tuple(_facts(stored, form, counted) for stored, form, counted in each)

    def _forms(self) -> list[Form]:
        return [_form(stored, self.questions) for stored in self.tensors]


@dataclass(frozen=True, slots=True)
class InspectParts(Pass):
    """One large tensor, in parts of about `slab` bytes."""

    stored: StoredTensor
    questions: Questions
    slab: int

    @property
    def form(self) -> Form:
        return _form(self.stored, self.questions)

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
        pieces = list(self._pieces(part))
        for piece in pieces:
            (row, word), (height, width) = piece.begin, piece.extent
            width = min(width * WORD, columns - word * WORD)
            bits = io.scratch("bits", height * width, f"u{form.itemsize}")
            io.read_run(self.stored, first + row * columns + word * WORD, bits)
            marks = io.scratch("marks", bits.size, "?")
            found = mark_nonzero(bits, DTYPES[form.dtype], marks)
            zeros, nonfinite = zeros + found[0], nonfinite + found[1]
            if found[0] and form.sizes:
                some = packed(marks.reshape(1, height, width))[0]
                if len(pieces) == 1:
                    words = some
                    break
                if words is None:
                    words = np.tile(ones(columns), (part.numel, 1))
                words[row : row + height, word : word + words_of(width)] = some
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
            return (_facts(self.stored, form, None),)
        zeros, nonfinite = sum(one.zeros for one in partials), sum(one.nonfinite for one in partials)
        found = None
        if zeros and form.sizes:
            parts = zip(form.parts(self.slab), partials, strict=True)
            found = form.joined([one.found or form.filled(part) for part, one in parts])
        return (_facts(self.stored, form, Counted(zeros, nonfinite, found)),)


def _form(stored: StoredTensor, questions: Questions) -> Form:
    return form_of(stored.dtype, stored.shape, questions, is_read=stored.is_counted)


def _facts(stored: StoredTensor, form: Form, counted: Counted | None) -> TensorFacts:
    facts = form.facts(stored.name, counted)
    return facts if stored.codes is None else replace(facts, holds=stored.holds)


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
