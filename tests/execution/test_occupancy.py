"""Parts of tensors, and tensors together, are counted as each tensor is by itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine.kernels.counting import packed
from sparseprune.execution.inspect import BLOCKS, BlockShape, Counted, Pattern, Questions, form_of

QUESTIONS = (
    Questions(),
    Questions((), ()),
    Questions((Pattern(2, 4, 0), Pattern(1, 2, 1), Pattern(1, 10)), (BlockShape(3, 5), BlockShape(8, 1))),
)
shapes = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(0, 300)),
    st.tuples(st.sampled_from([32, 64, 70, 96]), st.sampled_from([10, 64, 130])),
    st.tuples(st.integers(0, 8), st.sampled_from([1, 6, 40]), st.sampled_from([10, 64])),
    st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3)),
)


@given(shapes, st.sampled_from(QUESTIONS), st.integers(1, 5000))
def test_parts_hold_every_row_once_in_order_and_cut_no_unit(
    shape: tuple[int, ...], questions: Questions, size: int
) -> None:
    form = form_of("I8", shape, questions)
    matrices, rows, columns = form.stack
    places: list[tuple[int, int]] = []
    for part in form.parts(size):
        for begin, extent, unit, end in zip(part.begin, part.extent, form.unit, form.stack, strict=False):
            assert begin % unit == 0
            assert extent % unit == 0 or begin + extent == end
        assert part.extent[0] == 1 or part.extent[1] == rows
        assert part.numel * form.row_bytes <= max(size, math.prod(form.unit) * form.row_bytes)
        (matrix, row), (high, wide) = part.begin, part.extent
        places += [(one, other) for one in range(matrix, matrix + high) for other in range(row, row + wide)]
    everything = [(matrix, row) for matrix in range(matrices) for row in range(rows)]
    assert places == (everything if columns else [])


def test_blocks_and_groups_say_how_many_rows_belong_together() -> None:
    assert form_of("I8", (4096, 64), Questions()).unit == (1, 32)
    assert form_of("I8", (4096, 64), Questions((Pattern(2, 64, 0),), BLOCKS)).unit == (1, 64)
    assert form_of("I8", (4096, 64), Questions((), (BlockShape(4096, 4),))).unit == (1, 1)
    assert form_of("I8", (4096, 64), Questions((), (BlockShape(7, 4), BlockShape(1000, 4)))).unit == (1, 4096)
    assert form_of("I8", (8, 4096, 64), Questions((Pattern(2, 4, 0),))).unit == (4, 4096)


@pytest.mark.parametrize("shape", [(70, 130), (6, 40, 64), (4, 3, 3, 3)])
@pytest.mark.parametrize("questions", QUESTIONS)
def test_tensors_that_are_counted_together_have_the_facts_of_each(
    shape: tuple[int, ...], questions: Questions
) -> None:
    form = form_of("I8", shape, questions)
    marks = (
        np.random.default_rng(0).random((5, *form.stack))
        < np.array([0, 0.02, 0.5, 0.9, 1])[:, np.newaxis, np.newaxis, np.newaxis]
    )
    words = packed(marks.reshape(-1, *form.stack[1:])).reshape(5, *form.stack[:2], -1)
    together = form.count(words)
    for place in range(5):
        alone = form.count(words[place : place + 1])
        assert form.facts("w", Counted(1, 0, together, place)) == form.facts("w", Counted(1, 0, alone))
