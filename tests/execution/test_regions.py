"""Regions: parts of grids, sweeps and the stored elements behind them, as plain enumeration finds them."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import Shard, StoredTensor
from sparseprune.checkpoint.header import TensorEntry
from sparseprune.engine.dtypes import DTYPES
from sparseprune.execution.regions import (
    Part,
    Region,
    block_part,
    cells,
    cut,
    flat_leaf,
    gaps,
    grid_region,
    is_row_major_run,
    leaves_of,
    members_of,
    numel_per_scope,
    regions_of,
    storage_order,
    sweep_of,
    tiles,
    whole_part,
    whole_region,
)
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope, BoundScopeCoupling
from tests import oracle

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.execution.regions import AnyBlock, AnyScope

    Shape = tuple[int, ...]
    Case = tuple[StoredTensor, BoundBlock]

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


@settings(max_examples=200)
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


# -- parts of grids ----------------------------------------------------------------------------------

small = st.integers(1, 3)


def places(part: Part) -> Iterator[Shape]:
    ranges = (range(first, first + size) for first, size in zip(part.begin, part.extent, strict=True))
    return product(*ranges)


def undone(order: Sequence[int], common: Sequence[int]) -> Shape:
    """What `order` permutes onto `common`."""
    own = {source: common[dim] for dim, source in enumerate(order)}
    return tuple(own[dim] for dim in range(len(own)))


def assert_partition(parts: Iterable[Part], whole: Part) -> None:
    """Every place of the whole is in exactly one part, and no part is empty."""
    found = [place for part in parts for place in places(part)]
    assert sorted(found) == sorted(places(whole))
    assert all(part.numel for part in parts)


@st.composite
def some_parts(draw: st.DrawFn) -> tuple[Part, list[int]]:
    rank = draw(st.integers(0, 4))
    begin = tuple(draw(st.integers(0, 5)) for _ in range(rank))
    extent = tuple(draw(st.integers(1, 6)) for _ in range(rank))
    return Part(begin, extent), draw(st.permutations(range(rank)))


@given(some_parts(), st.integers(-1, 200))
def test_a_part_is_cut_into_parts_of_at_most_so_many_places(case: tuple[Part, list[int]], limit: int) -> None:
    whole, dims = case
    parts = list(cut(whole, dims, limit))
    assert_partition(parts, whole)
    assert all(part.numel <= max(1, limit) for part in parts)


@given(some_parts(), st.integers(1, 200))
def test_a_later_dimension_is_cut_only_where_the_earlier_ones_are_cut_to_single_places(
    case: tuple[Part, list[int]], limit: int
) -> None:
    whole, dims = case
    parts = list(cut(whole, dims, limit))
    for later, dim in enumerate(dims):
        if any(part.extent[dim] < whole.extent[dim] for part in parts):
            assert all(part.extent[earlier] == 1 for part in parts for earlier in dims[:later])


@given(some_parts(), st.integers(1, 200))
def test_no_fewer_parts_along_the_dimension_that_is_cut_would_do(
    case: tuple[Part, list[int]], limit: int
) -> None:
    whole, dims = case
    first = next(iter(cut(whole, dims, limit)))
    for dim in dims:
        if first.extent[dim] < whole.extent[dim]:
            larger = first.numel // first.extent[dim] * (first.extent[dim] + 1)
            assert larger > limit


@st.composite
def grids_of_units(draw: st.DrawFn) -> tuple[Shape, Shape, list[int]]:
    units = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    whole = tuple(unit * draw(st.integers(0, 4)) for unit in units)
    return whole, units, draw(st.permutations(range(len(units))))


@given(grids_of_units(), st.integers(-1, 300))
def test_parts_cut_by_units_never_cross_the_end_of_a_unit(
    case: tuple[Shape, Shape, list[int]], places: int
) -> None:
    whole, units, dims = case
    parts = list(cut(whole_part(whole), dims, places, units))
    assert_partition(parts, whole_part(whole))
    assert all(part.numel <= max(1, places) for part in parts)
    for part in parts:
        for begin, size, unit in zip(part.begin, part.extent, units, strict=True):
            assert size % unit == begin % unit == 0 or begin // unit == (begin + size - 1) // unit
        sizes = [place.stop - place.start for place in part.on_grid(units)]
        assert sizes == [size // unit or 1 for size, unit in zip(part.extent, units, strict=True)]


@pytest.mark.parametrize("extent", [(0,), (0, 3), (3, 0), (2, 0, 2)])
def test_an_empty_part_has_no_parts(extent: Shape) -> None:
    assert list(cut(whole_part(extent), range(len(extent)), 4)) == []


def test_parts_are_scaled_and_counted_from_elsewhere() -> None:
    part = Part((2, 5), (3, 1))
    assert part.scaled((4, 2)) == Part((8, 10), (12, 2))
    assert part.within((2, 1)) == Part((0, 4), (3, 1))
    assert part.behind((1, 0)) == Part((5, 2), (1, 3))
    assert whole_part((4, 7)) == Part((0, 0), (4, 7))


# -- structures, once as the plan has them and once as the oracle does ------------------------------


@st.composite
def blocks(draw: st.DrawFn, name: str, grid: Shape, *, fused: bool) -> tuple[AnyBlock, oracle.Fused]:
    """Blocks of one leaf or of several on a grid, each leaf with an order and a storage of its own."""
    rank = len(grid)
    bound: list[BoundBlock] = []
    plans: list[oracle.Leaf] = []
    orders: list[Shape] = []
    for number in range(draw(st.integers(1, 3)) if fused else 1):
        order = tuple(draw(st.permutations(range(rank)))) if fused else tuple(range(rank))
        shape = tuple(draw(small) for _ in range(rank))
        view = tuple(a * b for a, b in zip(undone(order, grid), shape, strict=True))
        stride, step = [0] * rank, 1
        for dim in draw(st.permutations(range(rank))):
            stride[dim], step = step, step * view[dim]
        label = f"{name}.{number}"
        bound.append(BoundBlock(label, label, view, tuple(stride), draw(st.integers(0, 3)), shape))
        plans.append(oracle.Leaf(view, shape))
        orders.append(order)
    plan = oracle.Fused(tuple(plans), tuple(orders))
    if not fused:
        return bound[0], plan
    return BoundBlockCoupling(name, tuple(bound), tuple(orders)), plan


@st.composite
def scopes(draw: st.DrawFn) -> tuple[AnyScope, oracle.Coupled]:
    """A scope or a coupling of scopes over leaves or fused blocks."""
    rank = draw(st.integers(1, 3))
    common = tuple(draw(small) for _ in range(rank))
    coupled = draw(st.booleans())
    members: list[BoundScope] = []
    plans: list[oracle.Scope] = []
    orders: list[Shape] = []
    for number in range(draw(st.integers(1, 3)) if coupled else 1):
        order = tuple(draw(st.permutations(range(rank)))) if coupled else tuple(range(rank))
        shape = tuple(draw(small) for _ in range(rank))
        grid = tuple(a * b for a, b in zip(undone(order, common), shape, strict=True))
        block, plan = draw(blocks(f"m{number}", grid, fused=draw(st.booleans())))
        members.append(BoundScope(f"s{number}", block, shape))
        plans.append(oracle.Scope(plan, shape))
        orders.append(order)
    plan_of_all = oracle.Coupled(tuple(plans), tuple(orders))
    if not coupled:
        return members[0], plan_of_all
    return BoundScopeCoupling("all", tuple(members), tuple(orders)), plan_of_all


def boxes_in(scope: AnyScope, cell: Part) -> list[Region]:
    """What a cell has of every leaf."""
    found = []
    for member, order in members_of(scope):
        regions = regions_of(member.block, block_part(member, order, cell))
        assert all(region.leaf is leaf for leaf, region in regions.items())
        found += [regions[leaf] for leaf in member.leaves]
    return found


@given(scopes(), st.integers(0, 300))
def test_the_regions_of_a_cell_have_the_elements_of_its_scopes(
    case: tuple[AnyScope, oracle.Coupled], limit: int
) -> None:
    scope, plan = case
    assert scope.grid_shape == plan.grid
    for cell in cells(scope, limit):
        expected = {element for place in places(cell) for block in plan.blocks(place) for element in block}
        found = [
            (number, place)
            for number, region in enumerate(boxes_in(scope, cell))
            for place in places_of(region)
        ]
        assert len(found) == len(set(found))
        assert set(found) == expected


@given(scopes(), st.integers(0, 300))
def test_cells_are_all_scopes_within_the_limit(case: tuple[AnyScope, oracle.Coupled], limit: int) -> None:
    scope, plan = case
    some = list(cells(scope, limit))
    assert_partition(some, whole_part(plan.grid))
    assert numel_per_scope(scope) == sum(math.prod(leaf.view) for leaf in plan.leaves) // math.prod(plan.grid)
    for cell in some:
        numel = sum(region.numel for region in boxes_in(scope, cell))
        assert numel == cell.numel * numel_per_scope(scope)
        assert numel <= limit or cell.numel == 1


@given(scopes(), st.integers(0, 100))
def test_tiles_are_all_blocks_of_a_part_within_the_limit(
    case: tuple[AnyScope, oracle.Coupled], limit: int
) -> None:
    scope, _ = case
    for member, order in members_of(scope):
        for cell in cells(scope, 0):
            part = block_part(member, order, cell)
            some = list(tiles(member, part, limit))
            assert_partition(some, part)
            for tile in some:
                assert tile.numel * member.block.numel_per_block <= limit or tile.numel == 1


@settings(max_examples=150)
@given(scopes(), st.integers(1, 9))
def test_cells_are_cut_first_where_the_first_leaf_lies_outermost(
    case: tuple[AnyScope, oracle.Coupled], count: int
) -> None:
    scope, _ = case
    limit = count * numel_per_scope(scope)
    member, _ = members_of(scope)[0]
    leaf, own = leaves_of(member.block)[0]
    extents = [boxes_in(scope, cell)[0].extent for cell in cells(scope, limit)]
    of_one_scope = [a * b for a, b in zip(undone(own, member.shape), leaf.shape, strict=True)]
    order = storage_order(leaf)
    for later, dim in enumerate(order):
        if any(extent[dim] < leaf.view_shape[dim] for extent in extents):
            for earlier in order[:later]:
                assert all(extent[earlier] == of_one_scope[earlier] for extent in extents)


@given(scopes())
def test_a_part_of_a_grid_is_found_in_a_tensor_of_the_shape_of_the_grid(
    case: tuple[AnyScope, oracle.Coupled],
) -> None:
    scope, _ = case
    for member, order in members_of(scope):
        grid = member.block.grid_shape
        numbers = {place: number for number, place in enumerate(product(*map(range, grid)))}
        for cell in cells(scope, 0):
            part = block_part(member, order, cell)
            region = grid_region(member.block, part)
            elements = [element for first, count in region.runs() for element in range(first, first + count)]
            assert elements == [numbers[place] for place in places(part)]


# -- sweeps ------------------------------------------------------------------------------------------

sizes = st.one_of(st.integers(1, 30), st.integers(1, 300))


def row_major(
    view: tuple[int, ...], block: tuple[int, ...], order: tuple[int, ...] | None = None
) -> BoundBlock:
    """Blocks of a whole tensor, whose dimensions lie in the storage in some order, by default their own."""
    stride, step = [0] * len(view), 1
    for dim in reversed(order or range(len(view))):
        stride[dim], step = step, step * view[dim]
    return BoundBlock("w", "w", view, tuple(stride), 0, block)


@settings(max_examples=150)
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


@settings(max_examples=150)
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


@settings(max_examples=150)
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


@settings(max_examples=150)
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
