"""Geometry: blocks that are whole slices of a tensor, as a walk over every element of them finds it."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseprune.removal.preview import Sliced, sliced
from sparseprune.spec import BoundBlock
from tests.execution.test_regions import element_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Shape = tuple[int, ...]
    Leaf = tuple[BoundBlock, Shape]

sizes = st.sampled_from([2, 3, 4, 6, 1])


def strides_of(shape: Shape) -> Shape:
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def divisors(number: int) -> list[int]:
    return [part for part in range(1, number + 1) if number % part == 0]


def block_of(view: Sequence[tuple[int, int]], shape: Shape, draw: st.DrawFn) -> Shape:
    """Any block that divides a view of sizes and strides; most often blocks along one stored dimension."""
    steps = strides_of(shape) or (1,)
    one = draw(st.integers(0, len(steps) - 1))
    outer = steps[one - 1] if one else math.inf
    extents = []
    for size, stride in view:
        along = steps[one] <= stride < outer
        spans = not along and draw(st.sampled_from([True, True, True, False]))
        extents.append(size if spans else draw(st.sampled_from(divisors(size))))
    return tuple(extents)


def leaf_of(view: Sequence[tuple[int, int]], offset: int, shape: Shape, draw: st.DrawFn) -> BoundBlock:
    sizes, strides = tuple(size for size, _ in view), tuple(stride for _, stride in view)
    return BoundBlock("w", "w", sizes, strides, offset, block_of(view, shape, draw))


@st.composite
def rearranged(draw: st.DrawFn) -> Leaf:
    """A tensor's slice, its dimensions split, joined or permuted as einops does it."""
    shape = tuple(draw(st.lists(sizes, min_size=0, max_size=4).filter(lambda each: math.prod(each) <= 72)))
    dims: list[tuple[int, int]] = []
    offset = 0
    for size, step in zip(shape, strides_of(shape), strict=True):
        begin = draw(st.sampled_from([0, 0, *range(size)]))
        count = draw(st.sampled_from([size - begin] * 2 + list(range(1, size - begin + 1))))
        by = draw(st.sampled_from([1, 1, 1, 2])) if count % 2 == 0 else 1
        count, stride, offset = count // by, step * by, offset + begin * step
        inner = draw(st.sampled_from([1, *divisors(count)]))
        dims += [(count // inner, stride * inner), (inner, stride)] if inner > 1 else [(count, stride)]
    for place in range(len(dims) - 2, -1, -1):
        (outer, step), (inner, stride) = dims[place : place + 2]
        if step == inner * stride and draw(st.sampled_from([False, False, True])):
            dims[place : place + 2] = [(outer * inner, stride)]
    if draw(st.booleans()):
        dims.append((1, draw(st.integers(1, 7))))
    shuffled = draw(st.permutations(dims))
    return leaf_of(shuffled, offset, shape, draw), shape


@st.composite
def strided(draw: st.DrawFn) -> Leaf:
    """Any view at all that is injective and stays in the storage."""
    shape = tuple(draw(st.lists(sizes, min_size=1, max_size=3).filter(lambda each: math.prod(each) <= 48)))
    numel = math.prod(shape)
    view: list[tuple[int, int]] = []
    offset = draw(st.sampled_from([0, *range(numel)]))
    last = offset
    for _ in range(draw(st.integers(1, 3))):
        step = draw(st.sampled_from([*strides_of(shape), *range(1, 7)]))
        room = (numel - 1 - last) // step + 1
        size = draw(st.sampled_from([room, *range(1, min(room, 6) + 1)]))
        view.append((size, step))
        last += (size - 1) * step
    leaf = leaf_of(view, offset, shape, draw)
    places = list(product(*map(range, leaf.view_shape)))
    assume(len({element_at(leaf, place) for place in places}) == len(places))
    return leaf, shape


leaves = st.one_of(rearranged(), strided())


def labelled(leaf: BoundBlock, shape: Shape) -> NDArray[Any]:
    """For each element of the tensor the number of its block, row-major over the grid; -1 out of reach."""
    numbers = np.full(math.prod(shape), -1)
    for place in product(*map(range, leaf.view_shape)):
        number = 0
        for index, extent, count in zip(place, leaf.shape, leaf.grid_shape, strict=True):
            number = number * count + index // extent
        numbers[element_at(leaf, place)] = number
    return numbers.reshape(shape)


def slice_dims(numbers: NDArray[Any]) -> set[int]:
    """The dimensions along which every block is made of whole slices: all elements of an index agree."""
    found = set()
    for dim in range(numbers.ndim):
        rows = np.moveaxis(numbers, dim, 0).reshape(numbers.shape[dim], -1)
        if all(len(set(row.tolist())) == 1 for row in rows):
            found.add(dim)
    return found


def runs_on(leaf: BoundBlock, shape: Shape) -> bool:
    """Whether some dimension of the view leaves the stored dimension in which it begins."""
    for dim, size in enumerate(leaf.view_shape):
        ranges = [range(each) if other != dim else range(1) for other, each in enumerate(leaf.view_shape)]
        for place in product(*ranges):
            line = [(*place[:dim], index, *place[dim + 1 :]) for index in range(size)]
            coordinates = np.array([np.unravel_index(element_at(leaf, each), shape) for each in line])
            if sum(len(set(column)) > 1 for column in coordinates.T) > 1:
                return True
    return False


def check_kept(found: Sliced, numbers: NDArray[Any], blocks: NDArray[np.bool_]) -> None:
    """The flags, spread over the other dimensions, are the elements that survive or are out of reach."""
    flags = found.kept(blocks)
    assert flags.shape[-1] == found.size == numbers.shape[found.dim]
    spread = [1] * numbers.ndim
    spread[found.dim] = found.size
    if flags.ndim > 1:  # of a stack
        spread[0] = len(flags)
    assert flags.ndim == 1 or found.stacked
    expected = np.array([number < 0 or blocks[number] for number in numbers.flat]).reshape(numbers.shape)
    assert np.array_equal(np.broadcast_to(flags.reshape(spread), numbers.shape), expected)


@settings(max_examples=400)
@given(leaves, st.randoms(use_true_random=False))
def test_blocks_are_slices_where_all_elements_of_an_index_share_one_and_keep_what_these_keep(
    drawn: Leaf, random: Any
) -> None:
    leaf, shape = drawn
    numbers = labelled(leaf, shape or (1,))
    dims = slice_dims(numbers)
    found = sliced(leaf, shape)
    if found is None:
        assert not dims or runs_on(leaf, shape or (1,))
        return
    if found.stacked:
        assert len(shape) > 2
        assert not dims
        assert all(found.dim - 1 in slice_dims(member) for member in numbers)
    else:
        assert found.dim in dims
    count = math.prod(leaf.grid_shape)
    for keep in ([True] * count, [False] * count, [random.random() < 0.5 for _ in range(count)]):
        check_kept(found, numbers, np.array(keep, dtype=np.bool_))


CASES: dict[str, tuple[Shape, Shape, Shape, int, Shape, int | None]] = {
    # stored shape, view's shape, strides and offset, block -> dimension of the slices
    "rows": ((6, 4), (6, 4), (4, 1), 0, (1, 4), 0),
    "parts of rows": ((6, 4), (6, 4), (4, 1), 0, (1, 2), None),
    "pairs of rows": ((6, 4), (6, 4), (4, 1), 0, (2, 4), 0),
    "columns": ((6, 4), (6, 4), (4, 1), 0, (6, 1), 1),
    "parts of columns": ((6, 4), (6, 4), (4, 1), 0, (3, 1), None),
    "single elements": ((6, 4), (6, 4), (4, 1), 0, (1, 1), None),
    "elements of a vector": ((6,), (6,), (1,), 0, (1,), 0),
    "elements of a row": ((1, 6), (1, 6), (6, 1), 0, (1, 1), 1),
    "elements of a column": ((6, 1), (6, 1), (1, 1), 0, (1, 1), 0),
    "columns as a transposed view has them": ((6, 4), (4, 6), (1, 4), 0, (1, 6), 1),
    "all of it": ((6, 4), (6, 4), (4, 1), 0, (6, 4), 0),
    "all of one number": ((), (1,), (1,), 0, (1,), 0),
    "rows behind the first two": ((6, 4), (4, 4), (4, 1), 8, (1, 4), 0),
    "all rows behind the first two": ((6, 4), (4, 4), (4, 1), 8, (4, 4), 0),
    "rows without their last column": ((6, 4), (6, 3), (4, 1), 0, (1, 3), None),
    "a column": ((6, 4), (6, 1), (4, 1), 2, (6, 1), 1),
    "every other row": ((6, 4), (3, 4), (8, 1), 4, (1, 4), 0),
    "heads of rows": ((6, 4), (3, 2, 4), (8, 4, 1), 0, (1, 2, 4), 0),
    "heads of columns": ((4, 6), (4, 3, 2), (6, 2, 1), 0, (4, 1, 2), 1),
    "one place in every head": ((4, 6), (4, 3, 2), (6, 2, 1), 0, (4, 3, 1), 1),
    "experts": ((3, 2, 4), (3, 2, 4), (8, 4, 1), 0, (1, 2, 4), 0),
    "channels of all experts": ((3, 2, 4), (3, 2, 4), (8, 4, 1), 0, (3, 1, 4), 1),
    "channels of each expert": ((3, 2, 4), (3, 2, 4), (8, 4, 1), 0, (1, 1, 4), 1),
    "inputs of each expert": ((3, 2, 4), (3, 2, 4), (8, 4, 1), 0, (1, 2, 1), 2),
    "channels of two experts of three": ((3, 2, 4), (2, 2, 4), (8, 4, 1), 0, (1, 1, 4), None),
    "channels of pairs of experts": ((4, 2, 4), (4, 2, 4), (8, 4, 1), 0, (2, 1, 4), None),
    "single elements of experts": ((3, 2, 4), (3, 2, 4), (8, 4, 1), 0, (1, 1, 1), None),
    "gate and up interleaved": ((2, 3, 8), (2, 3, 4, 2), (24, 8, 2, 1), 0, (2, 3, 1, 2), 2),
    "a view without its places of one": ((1, 6, 1, 4), (6, 4), (4, 1), 0, (1, 4), 1),
    "a diagonal": ((4, 4), (4,), (5,), 0, (1,), None),
    "all, seen as rows of another length": ((6, 4), (8, 3), (3, 1), 0, (8, 3), None),
    "rows, seen as one run": ((6, 4), (24,), (1,), 0, (4,), None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_dimension_of_the_slices_is_told(case: str) -> None:
    shape, view, stride, offset, block, dim = CASES[case]
    leaf = BoundBlock("w", "w", view, stride, offset, block)
    found = sliced(leaf, shape)
    assert (None if found is None else found.dim) == dim
    if found is not None:
        assert leaf == found.leaf
        blocks = np.arange(math.prod(leaf.grid_shape)) % 2 == 0
        check_kept(found, labelled(leaf, shape or (1,)), blocks)


def test_a_stack_of_biases_has_channels_of_each_expert_and_a_matrix_has_none() -> None:
    for name, is_stack in (("experts.down_proj_bias", True), ("experts.bias", True), ("up.weight", False)):
        found = sliced(BoundBlock(name, name, (3, 4), (4, 1), 0, (1, 1)), (3, 4))
        assert (found is not None) == is_stack
        if found is not None:
            blocks = np.arange(12) % 5 == 0
            assert np.array_equal(found.kept(blocks), blocks.reshape(3, 4))


@pytest.mark.parametrize("case", ["all, seen as rows of another length", "rows, seen as one run"])
def test_a_view_that_runs_on_into_the_next_dimension_is_refused_though_its_blocks_are_slices(
    case: str,
) -> None:
    """Nothing is lost by it: the same rows can be written as blocks of a view that keeps the dimensions."""
    shape, view, stride, offset, block, _ = CASES[case]
    leaf = BoundBlock("w", "w", view, stride, offset, block)
    assert sliced(leaf, shape) is None
    assert 0 in slice_dims(labelled(leaf, shape))
    assert runs_on(leaf, shape)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 3), (0, 0)])
def test_a_tensor_without_elements_is_made_of_slices_and_keeps_all_of_its_indices(shape: Shape) -> None:
    found = sliced(BoundBlock("w", "w", shape, strides_of(shape), 0, (1,) * len(shape)), shape)
    assert found is not None
    flags = found.kept(np.ones(0, dtype=np.bool_))
    assert flags.tolist() == [True] * shape[found.dim]


@pytest.mark.parametrize(
    ("begin", "kept"), [(0, [0, 1, 0, 1, 1, 1]), (1, [1, 0, 1, 0, 1, 1]), (3, [1, 1, 1, 0, 1, 0])]
)
def test_indices_out_of_reach_are_kept(begin: int, kept: Sequence[int]) -> None:
    found = sliced(BoundBlock("w", "w", (3, 4), (4, 1), 4 * begin, (1, 4)), (6, 4))
    assert found is not None
    assert (found.begin, found.size) == (begin, 6)
    assert found.kept(np.array([False, True, False])).tolist() == [bool(flag) for flag in kept]
