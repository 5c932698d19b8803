"""Slabs hold every element of a stack once, in whole matrices, whole rows or parts of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.report.measuring.slabs import Slab, cut, cut_by_columns, slab_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sparseprune.report.measuring.slabs import Stack

stacks = st.tuples(st.integers(0, 6), st.integers(0, 20), st.one_of(st.integers(0, 20), st.integers(60, 300)))


@pytest.mark.parametrize("cutting", [cut, cut_by_columns])
@given(stacks, st.sampled_from([1, 2, 4, 8]), st.integers(1, 3000))
def test_every_element_is_in_one_slab_that_lies_together(
    cutting: Callable[[Stack, int, int], Iterator[Slab]], stack: Stack, itemsize: int, size: int
) -> None:
    places: list[int] = []
    for slab in cutting(stack, itemsize, size):
        _, rows, columns = stack
        assert slab.column % 64 == 0
        assert slab.columns == columns or slab.shape == (1, 1, slab.columns)
        assert slab.rows == rows or slab.matrices == 1
        assert 0 < slab.numel * itemsize <= slab_bytes(size)
        places.extend(range(slab.begin(stack), slab.begin(stack) + slab.numel))
    assert sorted(places) == list(range(stack[0] * stack[1] * stack[2]))
    if cutting is cut:
        assert places == sorted(places)


@given(stacks, st.integers(1, 3000), st.integers(1, 9))
def test_rows_are_cut_at_the_multiple_where_so_many_fit(stack: Stack, size: int, multiple: int) -> None:
    _, rows, columns = stack
    row_bytes = max(columns, -(-columns // 64) * 8)
    for slab in cut(stack, 1, size, multiple):
        if slab.rows < rows and size >= multiple * row_bytes:
            assert slab.row % multiple == 0


def test_slabs_told_by_hand() -> None:
    assert list(cut((5, 2, 64), 2, 600)) == [
        Slab(0, 2, 0, 2, 0, 64),
        Slab(2, 2, 0, 2, 0, 64),
        Slab(4, 1, 0, 2, 0, 64),
    ]
    assert list(cut((1, 7, 64), 2, 600, 3)) == [
        Slab(0, 1, 0, 3, 0, 64),
        Slab(0, 1, 3, 3, 0, 64),
        Slab(0, 1, 6, 1, 0, 64),
    ]
    parts = [Slab(0, 1, row, 1, column, size) for row in (0, 1) for column, size in ((0, 256), (256, 44))]
    assert list(cut((1, 2, 300), 2, 599)) == parts
    assert list(cut_by_columns((1, 2, 300), 2, 599)) == [parts[0], parts[2], parts[1], parts[3]]
