"""Folding: flags and counts of parts of grids are those of plain loops, however a grid lies in memory."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.counting import any_in, count_in, histogram, histograms, nonzero

Flags = NDArray[np.uint8]

sizes = st.sampled_from([1, 1, 2, 3, 4, 5, 8, 16, 24, 67])


@st.composite
def grids(draw: st.DrawFn) -> tuple[Flags, list[int]]:
    """Flags in whole units, or in a part of one, with their dimensions in any order in memory."""
    rank = draw(st.integers(0, 4))
    shape: list[int] = []
    units: list[int] = []
    for _ in range(rank):
        unit = draw(sizes)
        left = max(1, 20_000 // max(1, int(np.prod(shape))))
        size = unit * draw(st.integers(0, 4)) if draw(st.booleans()) else draw(st.integers(1, unit))
        shape.append(min(size, left - left % unit if left >= unit else unit))
        units.append(unit)
    order = draw(st.permutations(range(rank)))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    laid = (generator.random([shape[dim] for dim in order]) < share).astype(np.uint8)
    return laid.transpose(sorted(range(rank), key=order.__getitem__)), units


def counted_by_hand(flags: Flags, units: list[int]) -> NDArray[np.int64]:
    grid = [size // unit if size % unit == 0 else 1 for size, unit in zip(flags.shape, units, strict=True)]
    counts = np.zeros(grid, dtype=np.int64)
    for place in product(*map(range, flags.shape)):
        counts[tuple(at // unit for at, unit in zip(place, units, strict=True))] += flags[place]
    return counts


@given(grids())
@example((np.ones((2, 4096), dtype=np.uint8), [2, 4096]))
@example((np.ones((300, 3), dtype=np.uint8), [300, 1]))
@example((np.ones((3, 300), dtype=np.uint8).T, [300, 3]))
@example((np.ones((130, 2, 8), dtype=np.uint8), [130, 1, 1]))
@example((np.ones((7, 32, 40), dtype=np.uint8), [1, 32, 1]))
@example((np.ones((7, 255, 8), dtype=np.uint8), [1, 255, 1]))
@example((np.ones((7, 256, 8), dtype=np.uint8), [1, 256, 1]))
@example((np.ones((1, 0), dtype=np.uint8), [1, 3]))
def test_flags_and_counts_are_those_of_plain_loops(case: tuple[Flags, list[int]]) -> None:
    flags, units = case
    counts = counted_by_hand(flags, units)
    before = flags.copy()
    assert np.array_equal(count_in(flags, units), counts)
    assert np.array_equal(any_in(flags, units), counts > 0)
    assert any_in(flags, units).dtype == np.uint8
    assert np.array_equal(flags, before)


@given(st.lists(st.one_of(st.integers(0, 20), st.integers(0, 1 << 40)), max_size=60), st.booleans())
def test_a_histogram_counts_every_number_once(numbers: list[int], small: bool) -> None:
    values = [number % 250 for number in numbers] if small else numbers
    found = histogram(np.array(values, dtype=np.uint8 if small else np.int64))
    assert found == {number: values.count(number) for number in sorted(set(values))}
    assert list(found) == sorted(found)


@pytest.mark.parametrize("most", [0, 3, 16, 17, 250])
@pytest.mark.parametrize("shape", [(4, 60), (1, 5), (0, 3), (3, 0)])
def test_histograms_are_those_of_the_rows(most: int, shape: tuple[int, int]) -> None:
    counts = np.random.default_rng(most).integers(0, most, shape, dtype=np.uint8, endpoint=True)
    assert histograms(counts) == [histogram(row) for row in counts]


@pytest.mark.parametrize("name", [row.name for row in DTYPES.values() if row.prunable])
def test_every_pattern_but_those_of_zero_is_nonzero(name: str) -> None:
    row = DTYPES[name]
    pattern = np.dtype(f"u{row.bits // 8}")
    sign = 1 << (row.bits - 1)
    bits = np.array([0, sign, 1, sign | 1, (1 << row.bits) - 1], dtype=pattern)
    negative_zero = 0 if row.zero_bits == sign - 1 else 1  # integers have none: that is their least number
    assert nonzero(bits, row.zero_bits or 0).tolist() == [0, negative_zero, 1, 1, 1]
