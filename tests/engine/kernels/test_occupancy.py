"""Rows of bits: packed, joined and counted as plain loops over marks do it."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine.kernels.counting import count_occupied, joined, ones, packed, unpacked, words_of

if TYPE_CHECKING:
    from sparseprune.engine.kernels.counting import Marks

sizes = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 130, 192, 200]))


@st.composite
def stacks(draw: st.DrawFn) -> Marks:
    """Marks of few matrices; all, none, or some of them set, in runs."""
    shape = draw(st.integers(1, 3)), draw(st.integers(1, 20)), draw(sizes)
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    return np.random.default_rng(draw(st.integers(0, 2**32))).random(shape) < share


def occupied_by_hand(marks: Marks, height: int, width: int) -> int:
    """Block by block, element by element."""
    matrices, rows, columns = marks.shape
    found = 0
    for matrix, row, column in product(range(matrices), range(0, rows, height), range(0, columns, width)):
        inside = product(range(row, min(row + height, rows)), range(column, min(column + width, columns)))
        found += any(marks[matrix, at, place] for at, place in inside)
    return found


@given(stacks())
def test_packed_marks_are_unpacked_again(marks: Marks) -> None:
    words = packed(marks)
    matrices, rows, columns = marks.shape
    assert words.shape == (matrices, rows, words_of(columns))
    assert (unpacked(words, columns) == marks).all()
    bits = [[[int(word) for word in row] for row in matrix] for matrix in words]
    for matrix, row, column in product(range(matrices), range(rows), range(words.shape[2] * 64)):
        mark = column < columns and bool(marks[matrix, row, column])
        assert bits[matrix][row][column // 64] >> column % 64 & 1 == mark


@given(stacks(), st.one_of(st.integers(1, 25), st.just(10**9)))
def test_joined_rows_have_the_bits_of_them_all(marks: Marks, height: int) -> None:
    matrices, rows, columns = marks.shape
    groups = joined(packed(marks), height)
    assert groups.shape[:2] == (matrices, math.ceil(rows / height))
    for matrix, group, column in product(range(matrices), range(groups.shape[1]), range(columns)):
        inside = range(group * height, min((group + 1) * height, rows))
        expected = any(marks[matrix, row, column] for row in inside)
        assert bool(unpacked(groups, columns)[matrix, group, column]) == expected


@given(stacks(), st.integers(1, 20), st.one_of(sizes, st.sampled_from([2, 4, 8, 16, 32, 256, 10**9])))
def test_blocks_are_counted_as_by_plain_loops(marks: Marks, height: int, width: int) -> None:
    groups = joined(packed(marks), height)
    found = count_occupied(groups, width, marks.shape[2])
    assert found.tolist() == [occupied_by_hand(one[None], height, width) for one in marks]


def test_a_full_row_ends_with_its_columns() -> None:
    for columns in range(1, 200):
        assert (ones(columns) == packed(np.ones((1, 1, columns), dtype=np.bool_))[0, 0]).all()


def test_plain_loops_tell_a_case_by_hand() -> None:
    marks = np.array([[[1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]], dtype=np.bool_)
    assert occupied_by_hand(marks, 1, 1) == 5
    assert occupied_by_hand(marks, 2, 2) == 3
    assert occupied_by_hand(marks, 3, 5) == 1
    assert occupied_by_hand(marks, 1, 5) == 3
