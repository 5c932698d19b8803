"""Grids of flags folded into coarser ones: whether anything in a part is set, and how many things are.

Numpy's own vectorised loops, not compiled ones: they keep up with cached pages, and there is nothing to
compile. Short stretches of bytes are read as words (SWAR: Lamport 1975, Multiple Byte Processing with
Full-Word Instructions). Knows no tensors and no files. Called by what counts zero blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparseprune.engine.grids import prod

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from sparseprune.engine.kernels.formats import Bits

    Flags = NDArray[np.uint8]
    Counts = NDArray[Any]

_MOST = 255  # that a byte can count
_FEW = 64  # slices that are taken one by one where their elements are strewn
_NARROW = 32  # bytes behind a dimension below which numpy's own reduction of it crawls
_WORDS = (8, 4, 2)
_BY_EYE = 16  # counts up to which comparing with every number beats sorting them into bins
_BINS = 1 << 16


def nonzero(bits: Bits, zero_bits: int) -> Flags:
    """1 for every element (of any shape) that has one of the `zero_bits`, else 0; overwrites `bits`.

    >>> nonzero(np.array([0x8000, 1, 0], dtype=np.uint16), 0x7FFF)
    array([0, 1, 0], dtype=uint8)
    """
    if zero_bits != np.iinfo(bits.dtype).max:
        bits &= bits.dtype.type(zero_bits)
    flags: Flags = np.not_equal(bits, 0).view(np.uint8)
    return flags


def any_in(flags: Flags, units: Sequence[int]) -> Flags:
    """1 for every unit in which a flag is set: a grid cut in units of so many places in each dimension.

    In each dimension the grid has whole units, or is a part of a single one, which then is one place.

    >>> any_in(np.array([[0, 1, 0, 0], [0, 0, 0, 0]], dtype=np.uint8), [1, 2])
    array([[1, 0],
           [0, 0]], dtype=uint8)
    """
    folded: Flags = _folded(flags, units, _any)
    return folded


def count_in(flags: Flags, units: Sequence[int]) -> Counts:
    """How many flags are set in every unit, cut as `any_in` does; bytes where they hold it, else int64.

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
    """How often each number occurs, in ascending order; none that does not.

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
    """Dimension by dimension, the innermost in memory first, so that what is folded lies together."""
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


def _any(parts: Flags) -> Flags:
    """(units, places, behind) -> (units, behind)."""
    units, places, behind = parts.shape
    width = next((word for word in _WORDS if places % word == 0), 0) if behind == 1 else 0
    if width:
        words = np.not_equal(parts.reshape(-1).view(f"u{width}"), 0).view(np.uint8)
        left = places // width
        return words.reshape(units, 1) if left == 1 else _any(words.reshape(units, left, 1))
    folded: Flags = _across(parts, np.bitwise_or)
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
    """Bytes (units, places, behind) joined over their places, none of which overflows."""
    units, places, behind = parts.shape
    if behind in _WORDS:
        words = parts.reshape(-1).view(f"u{behind}").reshape(units, places, 1)
        return _joined(words, join).view(np.uint8).reshape(units, behind)
    return _joined(parts, join)


def _joined(parts: Counts, join: np.ufunc) -> Counts:
    if parts.shape[1] > _FEW or parts.shape[2] >= _NARROW:
        return np.asarray(join.reduce(parts, axis=1, dtype=parts.dtype))
    total = parts[:, 0].copy()
    for place in range(1, parts.shape[1]):
        join(total, parts[:, place], out=total)
    return total
