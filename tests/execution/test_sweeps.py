"""Sweeps: every element once, in the order of the storage, in chunks of the size that was asked for."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparseprune.execution.regions import is_row_major_run, storage_order, sweep_of, whole_region
from sparseprune.spec import BoundBlock
from tests.execution.test_boxes import leaves, places_of, stored_tensor

if TYPE_CHECKING:
    from sparseprune.checkpoint import StoredTensor

    Case = tuple[StoredTensor, BoundBlock]

sizes = st.one_of(st.integers(1, 30), st.integers(1, 300))


def row_major(
    view: tuple[int, ...], block: tuple[int, ...], order: tuple[int, ...] | None = None
) -> BoundBlock:
    """Blocks of a whole tensor, whose dimensions lie in the storage in some order, by default their own."""
    stride, step = [0] * len(view), 1
    for dim in reversed(order or range(len(view))):
        stride[dim], step = step, step * view[dim]
    return BoundBlock("w", "w", view, tuple(stride), 0, block)


@settings(max_examples=300)
@given(leaves(least=1), sizes)
@example((stored_tensor("w", 48), row_major((12, 4), (6, 1))), 16)  # chunks of four rows and of two
@example((stored_tensor("w", 96), row_major((4, 6, 4), (2, 6, 4))), 30)
def test_chunks_have_every_element_once_in_the_order_of_the_storage(case: Case, elements: int) -> None:
    _, leaf = case
    sweep = sweep_of(leaf, elements)
    if sweep is None:
        return
    chunks = list(sweep.regions())
    found = [place for chunk in chunks for place in places_of(chunk)]
    assert sorted(found) == sorted(product(*map(range, leaf.view_shape)))
    firsts = [first for chunk in chunks for first, _ in chunk.runs()]
    assert firsts == sorted(firsts)
    assert all(chunk.leaf is leaf for chunk in chunks)


@settings(max_examples=300)
@given(leaves(least=1), sizes)
@example((stored_tensor("w", 48), row_major((12, 4), (6, 1))), 16)  # chunks of four rows and of two
@example((stored_tensor("w", 96), row_major((4, 6, 4), (2, 6, 4))), 30)
def test_chunks_are_about_as_large_as_they_may_be(case: Case, elements: int) -> None:
    _, leaf = case
    sweep = sweep_of(leaf, elements)
    if sweep is None:
        return
    chunks = list(sweep.regions())
    assert all(0 < chunk.numel <= elements for chunk in chunks)
    assert len(chunks) == 1 or 4 * chunks[0].numel > elements


@settings(max_examples=300)
@given(leaves(least=1), sizes)
@example((stored_tensor("w", 48), row_major((12, 4), (6, 1))), 16)  # chunks of four rows and of two
@example((stored_tensor("w", 96), row_major((4, 6, 4), (2, 6, 4))), 30)
def test_chunks_end_inside_blocks_only_along_outer_dimensions_and_the_one_that_is_cut(
    case: Case, elements: int
) -> None:
    _, leaf = case
    sweep = sweep_of(leaf, elements)
    if sweep is None:
        return
    for chunk in sweep.regions():
        for dim, (begin, size, extent) in enumerate(zip(chunk.begin, chunk.extent, leaf.shape, strict=True)):
            if dim in sweep.outer:
                assert size == 1
            elif dim == sweep.cut and sweep.inside:
                assert begin // extent == (begin + size - 1) // extent
            else:
                assert begin % extent == size % extent == 0


@settings(max_examples=300)
@given(leaves(least=1), sizes)
@example((stored_tensor("w", 48), row_major((12, 4), (6, 1))), 16)  # chunks of four rows and of two
@example((stored_tensor("w", 96), row_major((4, 6, 4), (2, 6, 4))), 30)
def test_only_sums_that_would_wait_for_a_later_dimension_have_no_sweep(case: Case, elements: int) -> None:
    """Fused dimensions in which a chunk has one place are summed up last, so they have to come first."""
    _, leaf = case
    sweep = sweep_of(leaf, elements)
    if sweep is not None:
        fused = [dim for dim, extent in enumerate(leaf.shape) if extent > 1]
        outer = [dim for dim in fused if dim in sweep.outer]
        assert outer == fused[: len(outer)]
    else:
        order = storage_order(leaf)
        assert any(a > b for a, b in zip(order, sorted(order), strict=True))
        assert not is_row_major_run(leaf)


@pytest.mark.parametrize("elements", [1, 5, 6, 30, 1000])
@pytest.mark.parametrize("block", [(1, 1, 1), (4, 1, 1), (1, 5, 1), (1, 1, 6), (2, 5, 3), (4, 5, 6)])
def test_every_row_major_leaf_has_a_sweep(block: tuple[int, ...], elements: int) -> None:
    leaf = row_major((4, 5, 6), block)
    sweep = sweep_of(leaf, elements)
    assert sweep is not None
    assert sum(chunk.numel for chunk in sweep.regions()) == 120


@pytest.mark.parametrize(
    ("leaf", "elements", "swept"),
    [
        (row_major((8, 6), (8, 6), (1, 0)), 8, True),  # a chunk is a column: whole along the first dimension
        (row_major((8, 6), (8, 6), (1, 0)), 7, False),  # parts of columns, of blocks that are summed by rows
        (row_major((8, 6), (8, 1), (1, 0)), 7, True),  # each column a block
        (row_major((8, 6), (1, 6), (1, 0)), 7, True),  # each row a block, in as many sums as there are rows
        (row_major((2, 3, 4), (2, 3, 1), (1, 0, 2)), 4, False),
        (row_major((2, 3, 4), (2, 3, 1), (1, 0, 2)), 24, True),
        (row_major((2, 3, 4), (2, 1, 4), (1, 0, 2)), 4, True),
        (BoundBlock("w", "w", (), (), 0, ()), 4, False),
    ],
)
def test_leaves_beside_each_other_with_and_without_a_sweep(
    leaf: BoundBlock, elements: int, swept: bool
) -> None:
    assert (sweep_of(leaf, elements) is not None) == swept


def test_what_is_held_grows_with_blocks_that_are_open_and_not_with_elements() -> None:
    held = {
        block: [
            sweep.numbers if (sweep := sweep_of(row_major((1 << rows, 64), block), 256)) else None
            for rows in (8, 12)
        ]
        for block in ((1, 64), (1 << 8, 1), (4, 1))
    }
    assert held[1, 64] == [2 << 8, 2 << 12]  # a sum for each row
    assert held[1 << 8, 1] == [
        64 * (1 + 1 + 9),
        16 * 64 * (1 + 1 + 9),
    ]  # a tree for each column of each block
    assert held[4, 1] == [2 * 64 * 64, 2 * 1024 * 64]


@pytest.mark.parametrize("view", [(0,), (0, 0), (3, 0, 0)])
def test_a_leaf_without_elements_has_no_chunks(view: tuple[int, ...]) -> None:
    sweep = sweep_of(row_major(view, (1,) * len(view)), 16)
    assert sweep is not None
    assert list(sweep.regions()) == []


def test_a_sweep_covers_what_the_whole_region_covers() -> None:
    leaf = row_major((6, 8), (3, 8))
    sweep = sweep_of(leaf, 12)
    assert sweep is not None
    assert (sweep.outer, sweep.cut, sweep.inside) == ((), 0, True)
    assert [chunk.numel for chunk in sweep.regions()] == [8] * 6
    assert math.prod(whole_region(leaf).extent) == 48
