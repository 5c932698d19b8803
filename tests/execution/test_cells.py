"""Cells: parts of grids that miss nothing, do nothing twice, and stay within their limit."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.execution.regions import (
    Part,
    block_part,
    cells,
    cut,
    grid_region,
    leaves_of,
    members_of,
    numel_per_scope,
    regions_of,
    storage_order,
    tiles,
    whole_part,
)
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope, BoundScopeCoupling
from tests import oracle
from tests.execution.test_boxes import places_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from sparseprune.execution.regions import AnyBlock, AnyScope, Region

    Shape = tuple[int, ...]

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


@settings(max_examples=300)
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
