"""Layouts by block and by scope, what -1 and short shapes span, and who refuses which shape."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseprune
from sparseprune import (
    BlockCoupling,
    BlockSpec,
    CouplingError,
    ScopeCoupling,
    ScopeSpec,
    ShapeMismatchError,
    SparseBlock,
    SparseScope,
    SparsityError,
)
from sparseprune.engine.kernels import counting as tally_module
from tests.engine.devices import on_every_device
from tests.engine.structures import cases, extents

SMALL = st.lists(st.sampled_from([1, 2, 3]), min_size=0, max_size=4)


@st.composite
def cut_grids(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(parts along each dimension, extent of a part), 0 to 4 dimensions."""
    outer = tuple(draw(SMALL))
    return outer, extents(draw, outer, [1, 2, 3], 96)


@on_every_device
@settings(max_examples=60)
@given(grids=cut_grids())
def test_block_view_has_every_form_of_the_same_elements(
    device: str, grids: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    grid, shape = grids
    whole = [g * b for g, b in zip(grid, shape, strict=True)]
    weight = torch.arange(math.prod(whole), dtype=torch.float64, device=device).reshape(whole)
    block = BlockSpec(weight, shape)
    apart, ordered, merged = (
        block.block_view(reorder=False),
        block.block_view(),
        block.block_view(merge=True),
    )
    assert tuple(apart.shape) == tuple(size for pair in zip(grid, shape, strict=True) for size in pair)
    assert tuple(ordered.shape) == (*grid, *shape)
    assert tuple(merged.shape) == (*grid, math.prod(shape))
    assert torch.equal(block.block_view(reorder=False, merge=True), merged)
    assert apart.data_ptr() == ordered.data_ptr() == weight.data_ptr()
    for place in product(*map(range, grid)):
        for number, inner in enumerate(product(*map(range, shape))):
            element = weight[tuple(p * b + i for p, b, i in zip(place, shape, inner, strict=True))]
            assert ordered[(*place, *inner)] == merged[(*place, number)] == element
            assert apart[tuple(d for pair in zip(place, inner, strict=True) for d in pair)] == element


@on_every_device
@settings(max_examples=60)
@given(grids=cut_grids(), trailing=st.sampled_from([(), (2,), (3, 1)]))
def test_block_to_scope_has_every_form_with_trailing_dimensions(
    device: str, grids: tuple[tuple[int, ...], tuple[int, ...]], trailing: tuple[int, ...]
) -> None:
    grid, shape = grids
    whole = tuple(g * b for g, b in zip(grid, shape, strict=True))
    scope = ScopeSpec(BlockSpec(torch.zeros(whole, device=device), ()), shape)
    assert (scope.grid_shape, scope.shape) == (grid, shape)
    numbers = torch.arange(math.prod((*whole, *trailing)), device=device).reshape(*whole, *trailing, -1)[
        ..., 0
    ]
    apart = scope.block_to_scope(numbers, reorder=False)
    ordered = scope.block_to_scope(numbers)
    merged = scope.block_to_scope(numbers, merge=True)
    pairs = tuple(size for pair in zip(grid, shape, strict=True) for size in pair)
    assert tuple(apart.shape) == (*pairs, *trailing)
    assert tuple(ordered.shape) == (*grid, *shape, *trailing)
    assert tuple(merged.shape) == (*grid, math.prod(shape), *trailing)
    for place in product(*map(range, grid)):
        for number, inner in enumerate(product(*map(range, shape))):
            one = numbers[tuple(p * b + i for p, b, i in zip(place, shape, inner, strict=True))]
            assert torch.equal(ordered[(*place, *inner)], one)
            assert torch.equal(merged[(*place, number)], one)
            assert torch.equal(apart[tuple(d for pair in zip(place, inner, strict=True) for d in pair)], one)
    by_scope = torch.arange(math.prod(grid), device=device).reshape(grid)
    spread = scope.scope_to_block(by_scope)
    assert tuple(spread.shape) == whole
    for index in product(*map(range, whole)):
        assert spread[index] == by_scope[tuple(i // b for i, b in zip(index, shape, strict=True))]


@on_every_device
@settings(max_examples=60)
@given(data=st.data())
def test_a_number_per_block_reaches_every_element_of_it(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, empty=data.draw(st.booleans())))
    first = 0
    for plan, (scope, _) in zip(case.plan.scopes, case.scope.members, strict=True):
        block = scope.block
        numbers = torch.arange(block.numblk(), device=device).reshape(block.grid_shape)
        leaves = case.laid[first : first + len(plan.block.leaves)]
        if isinstance(block, BlockSpec):
            spread = {block: block.broadcast_block_to_element(numbers)}
        else:
            assert isinstance(block, BlockCoupling)
            spread = block.broadcast_block_to_element(numbers)
        for place in plan.block.places():
            for leaf, index in plan.block.block_elements(place):
                assert spread[leaves[leaf].block][index] == numbers[place]
        first += len(leaves)


def test_minus_one_and_short_shapes_span() -> None:
    weight = torch.zeros(6, 4, 2)
    assert BlockSpec(weight, (2, -1, 1)).grid_shape == (3, 1, 2)
    assert BlockSpec(weight, ()).grid_shape == (6, 4, 2)
    block = BlockSpec(weight, (1, 2, 2))
    assert block.grid_shape == (6, 2, 1)
    assert [ScopeSpec(block, shape).shape for shape in ((), (3,), (1, -1), (2, 1, 1))] == [
        (6, 2, 1),
        (3, 2, 1),
        (1, 2, 1),
        (2, 1, 1),
    ]
    scope = ScopeSpec(block, (3,))
    assert (scope.numscp(), scope.numblk(), scope.numblk_per_scope(), scope.numel_per_scope()) == (
        2,
        12,
        6,
        24,
    )
    assert (block.numblk(), block.numel(), block.numel_per_block()) == (12, 48, 4)


def test_blocks_lists_the_leaves_in_the_order_of_the_members() -> None:
    one, two, three = (BlockSpec(torch.zeros(2, 2), (), name) for name in "abc")
    fused = BlockCoupling([two, one], [(0, 1), (1, 0)])
    scopes = ScopeCoupling([ScopeSpec(fused, ()), ScopeSpec(three, ())], [(0, 1), (0, 1)])
    assert scopes.blocks() == (two, one, three)
    assert isinstance(fused, SparseBlock)
    assert isinstance(scopes, SparseScope)
    assert repr(fused) == "BlockCoupling(block coupling, grid=[2, 2])"
    assert repr(scopes) == "ScopeCoupling(scope coupling, 1 scopes of 8 blocks)"
    assert repr(one.view) == "View([2, 2] of [2, 2] torch.float32)"


def test_all_names_of_the_engine_come_with_the_package() -> None:
    for name in sparseprune.__all__:
        assert getattr(sparseprune, name).__name__ == name
    for module in (sparseprune, sparseprune.engine):
        with pytest.raises(AttributeError, match="no attribute 'Blok'"):
            _ = module.Blok


def test_a_tally_counts_zeros_of_either_sign() -> None:
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.int32, "I32")):
        patterns = {2: np.uint16, 4: np.uint32}[dtype.itemsize]
        rows = (torch.tensor(row).to(dtype) for row in ([0.0, -0.0], [3.0, -4.0]))
        bits = [
            row.view(torch.int32 if dtype.itemsize == 4 else torch.int16).numpy().view(patterns)
            for row in rows
        ]
        parts = [tally_module.tally(row, name) for row in bits]
        assert parts[0] + parts[1] == tally_module.Tally(4, 2, 25.0)


def plain(shape: tuple[int, ...] = (4, 6), name: str = "w") -> BlockSpec:
    return BlockSpec(torch.ones(shape), (), name)


def pair() -> BlockCoupling:
    return BlockCoupling([plain(name="a"), plain(name="b")], [(0, 1), (0, 1)], "pair")


def scope(shape: tuple[int, ...] = (2, 3)) -> ScopeSpec:
    return ScopeSpec(plain(), shape, "s")


Call = Callable[[], object]
FAULTS: dict[str, tuple[Call, Call, type[ValueError], str]] = {
    "block that does not divide": (
        lambda: BlockSpec(torch.ones(4, 6), (4, 4)),
        lambda: BlockSpec(torch.ones(4, 6), (4, 3)),
        ShapeMismatchError,
        "dimension 1 of the view .* is 6, .* not a multiple of 4",
    ),
    "block of another rank": (
        lambda: BlockSpec(torch.ones(4, 6), (4,)),
        lambda: BlockSpec(torch.ones(4, 6), (4, -1)),
        ShapeMismatchError,
        "has 1 dimensions, the view .* has 2",
    ),
    "block extent 0": (lambda: BlockSpec(torch.ones(4, 6), (0, 1)),
        lambda: BlockSpec(torch.ones(4, 6), (1, 1)), ShapeMismatchError, "has 0 in dimension 0"),
    "block extent -2": (lambda: BlockSpec(torch.ones(4, 6), (1, -2)),
        lambda: BlockSpec(torch.ones(4, 6), (1, -1)), ShapeMismatchError, "has -2 in dimension 1"),
    "scope that does not divide": (lambda: scope((1, 4)), lambda: scope((1, 3)), ShapeMismatchError,
        "dimension 1 of the block grid .* not a multiple of 4"),
    "scope of too many dimensions": (lambda: scope((1, 1, 1)), lambda: scope((1, 1)), ShapeMismatchError,
        "3 dimensions, the block grid .* only 2"),
    "scope extent 0": (lambda: scope((0,)), lambda: scope((1,)), ShapeMismatchError,
        "scope shape .* has 0 in dimension 0"),
    "coupling of nothing": (lambda: BlockCoupling([], []), lambda: BlockCoupling([plain()], [(0, 1)]),
        CouplingError, "at least one member"),
    "scope coupling of nothing": (lambda: ScopeCoupling([], []), lambda: ScopeCoupling([scope()], [(0, 1)]),
        CouplingError, "at least one member"),
    "an order too few": (lambda: BlockCoupling([plain(), plain()], [(0, 1)]),
        lambda: BlockCoupling([plain(), plain()], [(0, 1), (0, 1)]), CouplingError, "2 members but 1 orders"),
    "no permutation": (
        lambda: BlockCoupling([plain((4, 4))], [(0, 0)]),
        lambda: BlockCoupling([plain((4, 4))], [(1, 0)]),
        CouplingError,
        "no permutation of the 2 dimensions",
    ),
    "grids that differ": (
        lambda: BlockCoupling([plain(), plain((6, 4))], [(0, 1), (0, 1)]),
        lambda: BlockCoupling([plain(), plain((6, 4))], [(0, 1), (1, 0)]),
        CouplingError,
        r"has grid \[6, 4\].*must share one grid",
    ),
    "ranks that differ": (
        lambda: BlockCoupling([plain(), plain((4,))], [(0, 1), (0,)]),
        lambda: BlockCoupling([plain(), plain((4, 6))], [(0, 1), (0, 1)]),
        CouplingError,
        "must share one grid",
    ),
    "scope grids that differ": (
        lambda: ScopeCoupling([scope(), scope((2, 2))], [(0, 1), (0, 1)]),
        lambda: ScopeCoupling([scope(), ScopeSpec(plain((6, 8)), (3, 4))], [(0, 1), (0, 1)]),
        CouplingError,
        "must share one grid",
    ),
    "one values tensor for two members": (
        lambda: pair().norms(torch.ones(4, 6)),
        lambda: (both := pair()).norms(dict.fromkeys(both.specs, torch.ones(4, 6))),
        SparsityError,
        "pair has 2 members: give values as a mapping",
    ),
    "one values tensor for a scope of two blocks": (
        lambda: ScopeSpec(pair(), ()).get_masks(1, torch.ones(4, 6)),
        lambda: scope().get_masks(1, torch.ones(4, 6)),
        SparsityError,
        "has 2 blocks: give values as a mapping",
    ),
    "values for one member of two": (
        lambda: ScopeSpec(both := pair(), ()).get_masks(1, {both.specs[0]: torch.ones(4, 6)}),
        lambda: ScopeSpec(both := pair(), ()).get_masks(1, dict.fromkeys(both.specs, torch.ones(4, 6))),
        SparsityError,
        "no values given for b",
    ),
    "values of a wrong shape": (lambda: scope().get_masks(1, torch.ones(6, 4)),
        lambda: scope().get_masks(1, torch.ones(4, 6)), ShapeMismatchError, r"values of shape \[6, 4\]"),
    "block scores of a wrong shape": (
        lambda: scope().get_masks(1, block_scores=torch.ones(4, 6)),
        lambda: scope().get_masks(1, block_scores=torch.ones(2, 2, 6)),
        ShapeMismatchError,
        r"block scores of shape .*wanted \[2, 2, 6\]",
    ),
    "block mask of a wrong shape": (
        lambda: scope().get_masks(1, block_mask=torch.ones(2, 2, 2, 3)),
        lambda: scope().get_masks(1, block_mask=torch.ones(2, 2, 6)),
        ShapeMismatchError,
        r"block mask of shape .*wanted \[2, 2, 6\]",
    ),
    "block mask of a block, wrong shape": (
        lambda: plain().get_masks(torch.ones(6, 4)),
        lambda: plain().get_masks(torch.ones(4, 6)),
        ShapeMismatchError,
        "block mask of shape .* does not fit the block grid",
    ),
    "thresholds off the scope grid": (
        lambda: scope().hard_threshold(torch.ones(4, 6)),
        lambda: scope().hard_threshold(torch.ones(2, 2)),
        ShapeMismatchError,
        r"s: thresholds of shape \[4, 6\]",
    ),
    "thresholds off the block grid": (lambda: plain().hard_threshold(torch.ones(2)),
        lambda: plain().hard_threshold(torch.ones(4, 6)), ShapeMismatchError, r"thresholds of shape \[2\]"),
    "multiplier off the block grid": (lambda: plain().apply_multiplier(torch.ones(6)),
        lambda: plain().apply_multiplier(torch.ones(4, 6)), ShapeMismatchError, "multiplier of shape"),
    "a number per block off the grid": (lambda: plain().broadcast_block_to_element(torch.ones(6)),
        lambda: plain().broadcast_block_to_element(torch.ones(4, 6)), ShapeMismatchError, "grid of shape"),
    "no block grid in front": (
        lambda: scope().block_to_scope(torch.ones(6, 4)),
        lambda: scope().block_to_scope(torch.ones(4, 6, 3)),
        ShapeMismatchError,
        "does not begin with the block grid",
    ),
    "scope values off the grid": (
        lambda: scope().scope_to_block(torch.ones(4, 6)),
        lambda: scope().scope_to_block(torch.ones(2, 2)),
        ShapeMismatchError,
        "do not fit the grid of scopes",
    ),
    "a reduction that does not reduce": (lambda: plain().reduce(None, lambda merged: merged),
        lambda: plain().reduce(None, lambda merged: merged.sum(-1)), ShapeMismatchError, "reduce gave shape"),
    "an interleaved view of a coupling": (lambda: pair().block_view(reorder=False),
        lambda: pair().block_view(), SparsityError, "no common interleaved form"),
    "soft thresholds of integers": (
        lambda: ScopeSpec(BlockSpec(torch.ones(4, dtype=torch.int8), (), "whole"), ()).soft_threshold(1.0),
        lambda: ScopeSpec(BlockSpec(torch.ones(4), ()), ()).soft_threshold(1.0),
        SparsityError,
        "whole: soft thresholding needs floats, found torch.int8",
    ),
    "a negative soft threshold": (lambda: scope().soft_threshold(-1e-9), lambda: scope().soft_threshold(0.0),
        SparsityError, "must not be negative"),
    "a negative conditioner": (
        lambda: scope().soft_threshold(0.5, torch.full((4, 6), -1.0)),
        lambda: scope().soft_threshold(0.5, torch.full((4, 6), 0.0)),
        SparsityError,
        "conditioners must be finite and not negative",
    ),
    "an infinite conditioner": (
        lambda: scope().soft_threshold(0.5, torch.full((4, 6), math.inf)),
        lambda: scope().soft_threshold(0.5, torch.full((4, 6), 1e30)),
        SparsityError,
        "conditioners must be finite and not negative",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_an_illegal_call_is_refused_and_its_legal_neighbour_is_not(fault: str) -> None:
    illegal, legal, error, text = FAULTS[fault]
    with pytest.raises(ValueError, match=text) as caught:
        illegal()
    assert caught.type is error
    legal()
