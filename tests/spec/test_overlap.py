"""Overlap of views: exact, against the sets of their elements."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.spec.bound import BoundBlock
from sparseprune.spec.overlaps import share_an_element


def view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> BoundBlock:
    return BoundBlock("b", "w", shape, stride, offset, (1,) * len(shape))


def elements(block: BoundBlock) -> set[int]:
    indices = product(*map(range, block.view_shape))
    return {
        block.view_offset + sum(i * stride for i, stride in zip(index, block.view_stride, strict=True))
        for index in indices
    }


@st.composite
def views(draw: st.DrawFn) -> BoundBlock:
    rank = draw(st.integers(0, 3))
    shape = draw(st.tuples(*[st.integers(0, 5)] * rank))
    stride = draw(st.tuples(*[st.integers(1, 13)] * rank))
    return view(shape, stride, draw(st.integers(0, 30)))


@settings(max_examples=500, deadline=None)
@given(views(), views())
def test_views_overlap_where_their_elements_do(a: BoundBlock, b: BoundBlock) -> None:
    assert share_an_element(a, b) == bool(elements(a) & elements(b))


@pytest.mark.parametrize(
    ("a", "b", "overlap"),
    [
        (view((), ()), view((), ()), True),
        (view((4, 0), (4, 1)), view((4, 4), (4, 1)), False),
        # the gate rows and the up rows of a fused tensor of 22016 x 4096
        (view((11008, 4096), (4096, 1)), view((11008, 4096), (4096, 1), 11008 * 4096), False),
        (view((11009, 4096), (4096, 1)), view((11008, 4096), (4096, 1), 11008 * 4096), True),
        # even and odd columns
        (view((11008, 2048), (4096, 2)), view((11008, 2048), (4096, 2), 1), False),
        (view((11008, 2048), (4096, 2)), view((11008, 1), (4096, 1), 4094), True),
    ],
)
def test_large_views_are_told_apart_without_listing_elements(
    a: BoundBlock, b: BoundBlock, *, overlap: bool
) -> None:
    assert share_an_element(a, b) == overlap
    assert share_an_element(b, a) == overlap
