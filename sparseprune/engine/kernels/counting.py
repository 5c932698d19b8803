"""Counts: zeros, energies, digits of keys by compiled loops; nonzero flags by rows and groups in numpy.

`tally` counts the zeros and the energy of elements, exactly, however they are cut. Owns rows of flags as
64-bit words, counts in N:M groups, and flags folded into units of a grid. Called by execution and reports.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec import Struct

from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.compiling import compiled, compiled_sum, value_of
from sparseprune.engine.kernels.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.dtypes import Dtype
    from sparseprune.engine.kernels.formats import Bits, Format

    Marks = NDArray[np.bool_]
    Words = NDArray[np.uint64]
    ByteFlags = NDArray[np.uint8]
    Counts = NDArray[Any]

DIGIT_BITS = 16


def first_nonfinite(bits: Bits, form: Format) -> int:
    """The index of the first NaN or infinity among the elements (flat), -1 for none."""
    if bits.size == 0 or _largest(bits, bits.size, form.magnitude) < form.infinity:
        return -1
    return int(np.argmax((bits & bits.dtype.type(form.magnitude)) >= form.infinity))


def zeros_and_energy(bits: Bits, form: Format) -> tuple[int, float]:
    """How many elements (flat) are 0 of either sign, and the sum of all squares."""
    zeros = int(_zeros(bits, bits.size, form.magnitude))
    if form.itemsize >= 4:
        return zeros, float(_energy_wide(bits.view(f"f{form.itemsize}"), bits.size))
    return zeros, float(_energy(bits, bits.size, *form.numbers)) * form.scale * form.scale


def count_digits(bits: Bits, form: Format, prefix: int, shift: int, counts: NDArray[np.int64]) -> None:
    """Add to `counts` (1 << DIGIT_BITS) the digits at `shift` of the keys whose higher bits are `prefix`."""
    if shift + DIGIT_BITS >= 8 * form.itemsize:
        _count_top(bits, bits.size, form.magnitude, shift, counts)
    else:
        _count_below(bits, bits.size, form.magnitude, prefix, shift, counts)


def count_equal(bits: Bits, form: Format, key: int) -> int:
    """How many elements (flat) have this key."""
    return int(_count_equal(bits, bits.size, form.magnitude, key))


def mark_nonzero(bits: Bits, dtype: Dtype, marks: Marks) -> tuple[int, int]:
    """How many elements are zero, of either sign, and how many are NaN or infinite.

    `bits` are flat, unsigned patterns of elements of whole bytes, and are overwritten. `marks` become True
    where an element is not zero.

    >>> from sparseprune.engine.dtypes import DTYPES
    >>> marks = np.empty(4, dtype=np.bool_)
    >>> mark_nonzero(np.array([0x8000, 0x3F80, 0xFF80, 0], dtype=np.uint16), DTYPES["BF16"], marks), marks
    ((2, 1), array([False,  True,  True, False]))
    """
    if dtype.zero_bits == 0:
        marks[...] = True
        return 0, _nonfinite(bits, dtype)
    if dtype.zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(dtype.zero_bits)
    np.not_equal(bits, 0, out=marks)
    return bits.size - int(np.count_nonzero(marks)), _nonfinite(bits, dtype)


def _nonfinite(bits: Bits, dtype: Dtype) -> int:
    if dtype.nonfinite is None or bits.size == 0:
        return 0
    first, last = dtype.nonfinite
    numbers = bits.view(f"u{bits.itemsize // dtype.parts}")
    if numbers.max() < first:  # cheap, and nearly always true
        return 0
    found = numbers - numbers.dtype.type(first) <= last - first  # smaller ones wrap around
    return int(np.count_nonzero(found.reshape(-1, dtype.parts).any(axis=1) if dtype.parts > 1 else found))


# The loops.


@compiled("uint64(K*, int64, K)")
def _largest(bits, size, magnitude):
    top = magnitude & np.uint8(0)
    for i in range(size):
        key = bits[i] & magnitude
        top = key if key > top else top
    return top


@compiled("int64(K*, int64, K)")
def _zeros(bits, size, magnitude):
    zeros = 0
    for i in range(size):
        zeros += (bits[i] & magnitude) == 0
    return zeros


@compiled_sum("float64(K*, int64, K, uint32, K)")
def _energy(bits, size, magnitude, shift, infinity):
    energy = 0.0
    for i in range(size):
        value = value_of(bits[i], magnitude, shift, infinity)
        energy += value * value
    return energy


@compiled_sum("float64(K*, int64)")
def _energy_wide(values, size):
    energy = 0.0
    for i in range(size):
        value = np.float64(values[i])
        energy += value * value
    return energy


@compiled("void(K*, int64, K, K, int64*)")
def _count_top(bits, size, magnitude, shift, counts):
    for i in range(size):
        counts[np.int64((bits[i] & magnitude) >> shift)] += 1


@compiled("void(K*, int64, K, uint64, uint64, int64*)")
def _count_below(bits, size, magnitude, prefix, shift, counts):
    above = shift + np.uint64(16)
    for i in range(size):
        key = np.uint64(bits[i] & magnitude)
        if key >> above == prefix:
            counts[np.int64((key >> shift) & np.uint64(0xFFFF))] += 1


@compiled("int64(K*, int64, K, K)")
def _count_equal(bits, size, magnitude, key):
    count = 0
    for i in range(size):
        count += (bits[i] & magnitude) == key
    return count


class Tally(Struct, frozen=True):
    """Counts of one tensor or a part of it; parts add up.

    `zeros` are elements equal to 0, of either sign; `energy` is the sum of squares, in float64.
    """

    numel: int = 0
    zeros: int = 0
    energy: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.numel + other.numel, self.zeros + other.zeros, self.energy + other.energy)


def tally(bits: Bits, dtype: str) -> Tally:
    """The tally of elements (flat) of a dtype that can be pruned, from their patterns as unsigned integers.

    >>> tally(np.array([3.0, -0.0, 4.0]).view(np.uint64), "F64")
    Tally(numel=3, zeros=1, energy=25.0)
    """
    form = FORMATS.get(dtype)
    if form is not None:
        return Tally(bits.size, *zeros_and_energy(bits, form))
    wide = bits.view(f"int{8 * bits.itemsize}").astype(np.float64)
    return Tally(bits.size, bits.size - int(np.count_nonzero(bits)), float(np.dot(wide, wide)))


def exact_sum(terms: Iterable[float]) -> float:
    """The exactly rounded sum; infinity and NaN stay.

    >>> exact_sum([1e100, 1.0, -1e100]), exact_sum([math.inf, -math.inf])
    (1.0, nan)
    """
    listed = list(terms)
    try:
        return math.fsum(listed)
    except (OverflowError, ValueError):
        return sum(listed)


def totals_in_units(rows: Iterable[tuple[Sequence[float], int]]) -> list[float]:
    """The sums of columns, each row in units of 2^(its power); the result in units of the largest power.

    >>> totals_in_units([((1.0, 2.0), 0), ((8.0, 0.0), 3), ((1.0, 1.0), -5000)])
    [8.125, 0.25]
    """
    listed = list(rows)
    most = max((power for numbers, power in listed if any(numbers)), default=0)
    scaled = [[math.ldexp(one, power - most) for one in numbers] for numbers, power in listed]
    return [exact_sum(column) for column in zip(*scaled, strict=True)]


def share_of_output(lost: float, dense: float) -> float:
    """The relative error of outputs: the root of lost energy / energy of the dense outputs.

    >>> share_of_output(1.0, 4.0), share_of_output(-1e-20, 4.0), share_of_output(0.0, 0.0)
    (0.5, 0.0, 0.0)
    """
    return math.sqrt(max(lost, 0.0) / dense) if dense > 0 else 0.0


WORD = 64  # elements that one word stands for
_ALL = (1 << WORD) - 1
_BYTES = _ALL // 0xFF  # a one in every byte of a word
# Up to these sizes a loop over columns (rows, members) of whole arrays is faster than one call over all.
_NARROW = 16  # columns of marks
_FEW = 8  # rows to join
_FEW_MEMBERS = 16  # members to add up
_SOME = 512  # members to add up where places are few
_FEW_PLACES = 64
_MOST = 255  # the largest count in a byte
_FEW_SLICES = 64  # slices to join one by one where their elements do not lie together
_FEW_BYTES = 32  # bytes behind a dimension below which numpy reduces it slowly
_WORDS = (8, 4, 2)
_BY_EYE = 16  # counts up to which comparing with every number beats bins
_BINS = 1 << 16


# Rows of flags as bits in words.


def words_of(columns: int) -> int:
    """How many words a row takes."""
    return -(-columns // WORD)


def packed(marks: Marks) -> Words:
    """Bits of marks (matrices, rows, columns), a contiguous array: (matrices, rows, words).

    >>> packed(np.array([[[True, True, False], [False, False, True]]]))
    array([[[3],
            [4]]], dtype=uint64)
    """
    matrices, rows, columns = marks.shape
    words = words_of(columns)
    if columns % WORD == 0:
        flat = np.packbits(marks.reshape(-1), bitorder="little")
        return flat.view(np.uint64).reshape(matrices, rows, words)
    if columns < _NARROW:
        bits = marks[..., 0].astype(np.uint64)
        for column in range(1, columns):
            bits |= marks[..., column].astype(np.uint64) << np.uint64(column)
        return bits[..., np.newaxis]
    padded = np.zeros((matrices, rows, words * WORD), dtype=np.bool_)
    padded[..., :columns] = marks
    return packed(padded)


def unpacked(words: Words, columns: int) -> Marks:
    """The marks of rows of bits: (..., words) gives (..., columns)."""
    bits = np.unpackbits(words.view(np.uint8), axis=-1, count=columns, bitorder="little")
    return bits.view(np.bool_)


def ones(columns: int) -> Words:
    """A row that is full.

    >>> ones(66)
    array([18446744073709551615,                    3], dtype=uint64)
    """
    words = np.full(words_of(columns), (1 << WORD) - 1, dtype=np.uint64)
    if columns % WORD:
        words[-1] = (1 << columns % WORD) - 1
    return words


def joined(words: Words, height: int) -> Words:
    """Every `height` rows joined by "or"; the last rows of a matrix may be fewer.

    (matrices, rows, words) gives (matrices, ceil(rows / height), words).
    """
    rows = words.shape[1]
    if height == 1 or rows < 2:
        return words
    if height > _FEW:
        return np.bitwise_or.reduceat(words, range(0, rows, height), axis=1)
    groups = words[:, ::height].copy()
    for row in range(1, min(height, rows)):
        more = words[:, row::height]
        groups[:, : more.shape[1]] |= more
    return groups


def count_occupied(words: Words, width: int, columns: int) -> NDArray[np.int64]:
    """How many runs of `width` columns have a bit that is set: (stacks, ..., words) gives (stacks,).

    Rows have so many columns; the last run of a row may be shorter.

    >>> rows = packed(np.array([[[True, False, False, False, True], [True, True, False, False, False]]]))
    >>> [count_occupied(rows, width, 5).tolist() for width in (1, 2, 3, 5)]
    [[4], [3], [3], [2]]
    """
    if width >= columns:
        return _set_in(np.asarray(words.any(axis=-1)))
    if width % WORD == 0:
        runs = range(0, words.shape[-1], width // WORD)
        return _set_in(np.bitwise_or.reduceat(words, runs, axis=-1))
    if WORD % width:
        marks = unpacked(words, columns)
        return _set_in(np.logical_or.reduceat(marks, range(0, columns, width), axis=-1))
    if width >= 8:
        return _set_in(words.view(f"u{width // 8}"))
    lane = _BYTES * ((1 << width) - 1)
    lanes = [_set_in((words & np.uint64(lane << at)).view(np.uint8)) for at in range(0, 8, width)]
    return np.asarray(np.sum(lanes, axis=0))


def _set_in(flags: NDArray[Any]) -> NDArray[np.int64]:
    """How many numbers of each entry of the first dimension are not zero."""
    if len(flags) == 1:  # numpy counts all of an array much faster than along a dimension
        return np.array([np.count_nonzero(flags)])
    return np.asarray(np.count_nonzero(flags.reshape(len(flags), -1), axis=1))


# Counts in groups of N:M.


def fullest_in_words(words: Words, groups: Collection[int]) -> Mapping[int, NDArray[Any]]:
    """By M of `groups` the most ones among the M bits of one group: (stacks, ...) words give (stacks,).

    M divides a word.

    >>> found = fullest_in_words(np.array([[0b1110_0001], [0b0001_0001]], dtype=np.uint64), [2, 4, 8])
    >>> [found[group].tolist() for group in (2, 4, 8)]
    [[2, 1], [3, 1], [4, 2]]
    """
    counts, lane = words, 1
    fullest = {}
    for group in sorted(set(groups)):
        while lane < group:
            low = np.uint64(_ALL // ((1 << lane) + 1))  # every second lane
            counts = (counts & low) + (counts >> np.uint64(lane) & low)
            lane *= 2
        fullest[group] = _largest_lane(counts, lane)
    return fullest


def counts_along(marks: Marks) -> NDArray[Any]:
    """Counts the marked members of each group: (groups, members, places) gives (groups, places), unsigned.

    >>> counts_along(np.array([[[True, False], [True, False], [True, True]]]))
    array([[3, 1]], dtype=uint8)
    """
    groups, members, places = marks.shape
    kind = np.min_scalar_type(members)
    numbers = marks.view(np.uint8)
    if members > _FEW_MEMBERS and (places == 1 or places >= _FEW_PLACES or members > _SOME):
        total: NDArray[Any] = np.add.reduce(numbers, axis=1, dtype=kind)
        return total
    counts = np.zeros((groups, places), dtype=kind)
    for member in range(members):
        counts += numbers[:, member]
    return counts


def _largest_lane(words: Words, lane: int) -> NDArray[Any]:
    """The largest count in lanes of so many bits, in each entry of the first dimension."""
    rows = words.reshape(len(words), -1)
    if lane >= 8:
        return np.asarray(rows.view(f"u{lane // 8}").max(axis=1))
    if lane < 4:  # 0, 1 and 2: the highest bit of all of them together is the largest
        rows = np.bitwise_or.reduce(rows, axis=1, keepdims=True)
    low = np.uint64(_BYTES * ((1 << lane) - 1))
    lanes = [(rows >> np.uint64(at) & low).view(np.uint8).max(axis=1) for at in range(0, 8, lane)]
    return np.asarray(np.minimum(np.maximum.reduce(lanes), lane))


# Flags in units of a grid.


def nonzero(bits: Bits, zero_bits: int) -> ByteFlags:
    """1 for every element (of any shape) with one of the `zero_bits` set, else 0; overwrites `bits`.

    >>> nonzero(np.array([0x8000, 1, 0], dtype=np.uint16), 0x7FFF)
    array([0, 1, 0], dtype=uint8)
    """
    if zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(zero_bits)
    flags: ByteFlags = np.not_equal(bits, 0).view(np.uint8)
    return flags


def any_in(flags: ByteFlags, units: Sequence[int]) -> ByteFlags:
    """1 for every unit in which a flag is set: `units` are the extents of one unit of the grid.

    A dimension that is no multiple of its extent counts as one unit.

    >>> any_in(np.array([[0, 1, 0, 0], [0, 0, 0, 0]], dtype=np.uint8), [1, 2])
    array([[1, 0],
           [0, 0]], dtype=uint8)
    """
    folded: ByteFlags = _folded(flags, units, _any)
    return folded


def count_in(flags: ByteFlags, units: Sequence[int]) -> Counts:
    """Counts the flags set in every unit, as `any_in` cuts them; in bytes if they suffice, else in int64.

    >>> count_in(np.array([[0, 1, 0, 0], [0, 1, 1, 0]], dtype=np.uint8), [2, 2])
    array([[2, 1]], dtype=uint8)
    """
    most = 1

    def add(part: Counts) -> Counts:
        nonlocal most
        total = _sum(part, most)
        most *= part.shape[1]
        return total

    folded: Counts = _folded(flags, units, add)
    return folded


def histogram(counts: Counts) -> dict[int, int]:
    """How often each number occurs, in ascending order, without those that do not.

    >>> histogram(np.array([2, 2, 1, 2], dtype=np.uint8))
    {1: 1, 2: 3}
    """
    if not counts.size:
        return {}
    most = int(counts.max())
    if most <= _BY_EYE:
        found = [int(np.count_nonzero(counts == number)) for number in range(most + 1)]
        return {number: often for number, often in enumerate(found) if often}
    if most < _BINS:
        bins = np.bincount(counts.reshape(-1))
        return {int(number): int(bins[number]) for number in np.flatnonzero(bins)}
    numbers, often = np.unique(counts, return_counts=True)
    return dict(zip(numbers.tolist(), often.tolist(), strict=True))


def histograms(counts: Counts) -> list[dict[int, int]]:
    """The histogram of every row.

    >>> histograms(np.array([[2, 1], [2, 2]], dtype=np.uint8))
    [{1: 1, 2: 1}, {2: 2}]
    """
    if not counts.size or int(counts.max()) > _BY_EYE:
        return [histogram(row) for row in counts]
    numbers = range(int(counts.max()) + 1)
    found = [np.count_nonzero(counts == number, axis=1).tolist() for number in numbers]
    return [{number: often for number, often in enumerate(row) if often} for row in zip(*found, strict=True)]


def _folded(grid: Counts, units: Sequence[int], fold: Callable[[Counts], Counts]) -> Any:  # noqa: ANN401
    """Folds dimension by dimension, the innermost in memory first, so that places of a unit lie together."""
    order = sorted(range(grid.ndim), key=lambda dim: -grid.strides[dim])
    laid = np.ascontiguousarray(grid.transpose(order)).reshape([grid.shape[dim] for dim in order])
    for place in reversed(range(grid.ndim)):
        size, unit = laid.shape[place], units[order[place]]
        groups, part = (size // unit, unit) if size % unit == 0 else (1, size)
        if part > 1:
            before, behind = laid.shape[:place], laid.shape[place + 1 :]
            parts = laid.reshape(prod(before) * groups, part, prod(behind))
            laid = fold(parts).reshape(*before, groups, *behind)
    return laid.transpose(sorted(range(grid.ndim), key=order.__getitem__))


def _any(parts: ByteFlags) -> ByteFlags:
    """(units, places, behind) -> (units, behind)."""
    units, places, behind = parts.shape
    width = next((word for word in _WORDS if places % word == 0), 0) if behind == 1 else 0
    if width:
        words = np.not_equal(parts.reshape(-1).view(f"u{width}"), 0).view(np.uint8)
        left = places // width
        return words.reshape(units, 1) if left == 1 else _any(words.reshape(units, left, 1))
    folded: ByteFlags = _across(parts, np.bitwise_or)
    return folded


def _sum(parts: Counts, most: int) -> Counts:
    """(units, places, behind) -> (units, behind); no number in `parts` is above `most`."""
    units, places, behind = parts.shape
    if parts.dtype != np.uint8:
        return np.asarray(np.add.reduce(parts, axis=1))
    words = (word for word in _WORDS if places % word == 0 and word * most <= _MOST)
    width = next(words, 0) if behind == 1 else 0
    if width:
        word: Any = np.dtype(f"u{width}").type
        lanes = parts.reshape(-1).view(word) * word(((1 << 8 * width) - 1) // _MOST)
        sums = (lanes >> word(8 * (width - 1))).astype(np.uint8)
        left = places // width
        return sums.reshape(units, 1) if left == 1 else _sum(sums.reshape(units, left, 1), width * most)
    if places * most <= _MOST:
        return _across(parts, np.add)
    return np.asarray(np.add.reduce(parts, axis=1, dtype=np.int64))


def _across(parts: Counts, join: np.ufunc) -> Counts:
    """Bytes (units, places, behind) joined over their places, without overflow."""
    units, places, behind = parts.shape
    if behind in _WORDS:
        words = parts.reshape(-1).view(f"u{behind}").reshape(units, places, 1)
        return _joined(words, join).view(np.uint8).reshape(units, behind)
    return _joined(parts, join)


def _joined(parts: Counts, join: np.ufunc) -> Counts:
    if parts.shape[1] > _FEW_SLICES or parts.shape[2] >= _FEW_BYTES:
        return np.asarray(join.reduce(parts, axis=1, dtype=parts.dtype))
    total = parts[:, 0].copy()
    for place in range(1, parts.shape[1]):
        join(total, parts[:, place], out=total)
    return total
