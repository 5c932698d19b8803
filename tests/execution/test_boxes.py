"""Regions: where the elements of a part of a view lie in the stored tensor, as enumeration finds them."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import Shard, StoredTensor, TensorEntry
from sparseprune.engine.dtypes import DTYPES
from sparseprune.execution.regions import (
    Region,
    flat_leaf,
    gaps,
    is_row_major_run,
    storage_order,
    whole_region,
)
from sparseprune.spec import BoundBlock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    Shape = tuple[int, ...]

SHARD = Shard(Path("m.safetensors"), PurePosixPath("m.safetensors"))


def stored_tensor(name: str, numel: int, dtype: str = "F32") -> StoredTensor:
    """A tensor of one dimension that no file holds."""
    nbytes = numel * DTYPES[dtype].bits // 8
    return StoredTensor(TensorEntry(name, dtype, (numel,), 0, nbytes), SHARD)


@st.composite
def views(draw: st.DrawFn, most: int = 4, least: int = 0) -> tuple[int, Shape, Shape, int]:
    """The elements of a row-major tensor, and a view of it: cut, split and permuted.

    Gives the tensor's elements, the view's shape, its strides and its offset.
    """
    whole = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 7, 12]), min_size=least, max_size=3))
    dims: list[tuple[int, int]] = []
    offset = 0
    for dim, size in enumerate(whole):
        step = math.prod(whole[dim + 1 :])
        begin, count = 0, size
        if draw(st.sampled_from([False, False, True])):
            begin = draw(st.integers(0, size - 1))
            count = draw(st.integers(1, size - begin))
        offset += begin * step
        inner = draw(st.sampled_from([part for part in range(1, count + 1) if count % part == 0]))
        split = len(whole) - dim + len(dims) < most and draw(st.booleans())
        dims += [(count // inner, step * inner), (inner, step)] if split else [(count, step)]
    if len(dims) < most and draw(st.booleans()):
        dims.append((1, draw(st.integers(1, 5))))  # what einops puts in with `1`
    shuffled = draw(st.permutations(dims))
    return math.prod(whole), tuple(d[0] for d in shuffled), tuple(d[1] for d in shuffled), offset


@st.composite
def leaves(draw: st.DrawFn, most: int = 4, least: int = 0) -> tuple[StoredTensor, BoundBlock]:
    """Blocks that divide such a view, with their tensor."""
    numel, shape, stride, offset = draw(views(most, least))
    block = tuple(draw(st.sampled_from([part for part in range(1, n + 1) if n % part == 0])) for n in shape)
    return stored_tensor("w", numel), BoundBlock("w", "w", shape, stride, offset, block)


@st.composite
def regions(draw: st.DrawFn) -> Region:
    _, leaf = draw(leaves())
    begin = tuple(draw(st.integers(0, size - 1)) for size in leaf.view_shape)
    extent = tuple(
        draw(st.one_of(st.just(size - first), st.integers(0, size - first)))
        for size, first in zip(leaf.view_shape, begin, strict=True)
    )
    return Region(leaf, begin, extent)


def places_of(region: Region) -> Iterator[Shape]:
    """The places of a region in the leaf's view, row-major."""
    ranges = (range(first, first + size) for first, size in zip(region.begin, region.extent, strict=True))
    return product(*ranges)


def element_at(leaf: BoundBlock, place: Sequence[int]) -> int:
    return leaf.view_offset + sum(index * step for index, step in zip(place, leaf.view_stride, strict=True))


def elements_of(region: Region) -> list[int]:
    """The stored elements of a region, as the leaf sees them in row-major order."""
    return [element_at(region.leaf, place) for place in places_of(region)]


def joined(elements: Iterable[int]) -> list[tuple[int, int]]:
    """Elements as runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for element in sorted(elements):
        first, count = runs[-1] if runs else (element, 0)
        if element == first + count:
            runs[-1:] = [(first, count + 1)]
        else:
            runs.append((element, 1))
    return runs


@settings(max_examples=400)
@given(regions())
def test_runs_are_the_elements_in_the_order_of_the_storage_with_neighbours_joined(region: Region) -> None:
    elements = elements_of(region)
    assert list(region.runs()) == joined(elements)
    assert region.numel == len(elements)


@given(regions())
def test_the_storage_order_of_dimensions_enumerates_elements_as_they_lie(region: Region) -> None:
    order = region.storage_order
    assert sorted(order) == list(range(len(region.extent)))
    ranges = [range(region.begin[dim], region.begin[dim] + region.extent[dim]) for dim in order]
    found = []
    for along in product(*ranges):
        place = dict(zip(order, along, strict=True))
        found.append(element_at(region.leaf, [place[dim] for dim in range(len(order))]))
    assert found == sorted(elements_of(region))


@pytest.mark.parametrize(
    ("shape", "stride", "extent", "runs"),
    [
        ((3, 1, 4), (4, 2, 1), (3, 1, 4), [(0, 12)]),  # a dimension of one place is in nobody's way
        ((1, 3, 4), (12, 4, 1), (1, 3, 4), [(0, 12)]),
        ((3, 4), (4, 1), (3, 3), [(0, 3), (4, 3), (8, 3)]),
        ((3, 4), (4, 1), (3, 1), [(0, 1), (4, 1), (8, 1)]),
        ((4, 3), (1, 4), (4, 2), [(0, 8)]),
        ((4, 3), (1, 4), (3, 2), [(0, 3), (4, 3)]),
        ((2, 3, 4), (12, 4, 1), (2, 1, 4), [(0, 4), (12, 4)]),
        ((2, 3, 4), (12, 4, 1), (1, 2, 4), [(0, 8)]),
    ],
)
def test_neighbours_are_joined_across_dimensions_and_no_further(
    shape: Shape, stride: Shape, extent: Shape, runs: list[tuple[int, int]]
) -> None:
    leaf = BoundBlock("w", "w", shape, stride, 0, (1,) * len(shape))
    region = Region(leaf, (0,) * len(shape), extent)
    assert list(region.runs()) == runs == joined(elements_of(region))


@given(regions())
def test_the_first_element_is_that_of_the_first_place(region: Region) -> None:
    assert region.first == element_at(region.leaf, region.begin)


@given(leaves())
def test_the_whole_region_has_all_places_of_the_view(case: tuple[StoredTensor, BoundBlock]) -> None:
    _, leaf = case
    assert list(places_of(whole_region(leaf))) == list(product(*map(range, leaf.view_shape)))


@given(leaves())
def test_a_row_major_run_is_one_whose_places_lie_one_after_the_other(
    case: tuple[StoredTensor, BoundBlock],
) -> None:
    _, leaf = case
    elements = elements_of(whole_region(leaf))
    in_a_row = elements == list(range(leaf.view_offset, leaf.view_offset + len(elements)))
    assert is_row_major_run(leaf) == in_a_row
    if in_a_row:
        flat = flat_leaf(leaf)
        assert elements_of(whole_region(flat)) == elements
        assert (flat.shape, flat.tensor) == ((1,), leaf.tensor)


@st.composite
def disjoint(draw: st.DrawFn) -> tuple[StoredTensor, list[BoundBlock]]:
    """Leaves that share a tensor but no element: what lies between cuts along one dimension, permuted."""
    whole = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    strides = [math.prod(whole[dim + 1 :]) for dim in range(len(whole))]
    along = draw(st.integers(0, len(whole) - 1))
    cuts = sorted(draw(st.lists(st.integers(0, whole[along]), max_size=5)))
    found = []
    for begin, end in pairwise(cuts):
        if begin == end or not draw(st.booleans()):
            continue
        shape, offset = list(whole), begin * strides[along]
        shape[along] = end - begin
        other = draw(st.integers(0, len(whole) - 1))
        if other != along:
            shape[other] = draw(st.integers(1, whole[other]))
        order = draw(st.permutations(range(len(whole))))
        dims = tuple(shape[dim] for dim in order), tuple(strides[dim] for dim in order)
        found.append(BoundBlock("w", "w", *dims, offset, (1,) * len(whole)))
    return stored_tensor("w", math.prod(whole)), draw(st.permutations(found))


@given(disjoint())
def test_gaps_are_all_that_no_leaf_reaches(case: tuple[StoredTensor, list[BoundBlock]]) -> None:
    stored, some = case
    reached = [element for leaf in some for element in elements_of(whole_region(leaf))]
    assert len(set(reached)) == len(reached)
    assert list(gaps(stored.numel, some)) == joined(set(range(stored.numel)) - set(reached))


@pytest.mark.parametrize(
    ("shape", "expected"), [((0, 3), [(0, 12)]), ((3, 0), [(0, 12)]), ((0,), [(0, 12)]), ((), [(1, 11)])]
)
def test_a_leaf_without_elements_leaves_everything_over(
    shape: Shape, expected: list[tuple[int, int]]
) -> None:
    leaf = BoundBlock("w", "w", shape, (1,) * len(shape), 0, (1,) * len(shape))
    stored = stored_tensor("w", 12)
    assert list(whole_region(leaf).runs()) == ([] if shape else [(0, 1)])
    assert list(gaps(stored.numel, [leaf])) == expected
    assert list(gaps(0, [])) == []


@pytest.mark.parametrize(
    ("shape", "stride"),
    [
        ((3, 4), (8, 2)),
        ((4, 3), (2, 8)),
        ((2, 2), (3, 2)),
        ((4, 2), (5, 4)),
        ((3, 2), (2, 3)),
        ((2, 3), (7, 5)),
        ((5, 2, 2), (4, 6, 1)),
    ],
)
def test_views_with_strides_of_their_own_leave_over_what_they_do_not_reach(
    shape: Shape, stride: Shape
) -> None:
    leaf = BoundBlock("w", "w", shape, stride, 1, (1,) * len(shape))
    stored = stored_tensor("w", 30)
    elements = elements_of(whole_region(leaf))
    assert len(set(elements)) == len(elements)
    runs = list(whole_region(leaf).runs())
    assert sorted(element for first, count in runs for element in range(first, first + count)) == sorted(
        elements
    )
    assert list(gaps(stored.numel, [leaf])) == joined(set(range(30)) - set(elements))


def test_the_order_of_the_storage_is_that_of_falling_strides() -> None:
    heads = BoundBlock("w", "w", (16, 4, 6), (6, 96, 1), 0, (1, 1, 1))
    assert storage_order(heads) == (1, 0, 2)
    fifth = Region(heads, (5, 0, 1), (1, 4, 2))
    assert list(fifth.runs()) == [(31, 2), (127, 2), (223, 2), (319, 2)]
