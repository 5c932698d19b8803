"""Budgets and thresholds against the oracle: promises 1 to 5 and 9, down to every bit of the storage."""

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import BlockSpec, ScopeCoupling, ScopeSpec, SparsityError
from sparseprune.engine.selection import select
from tests import oracle
from tests.engine.devices import on_every_device
from tests.engine.structures import FEW, assert_budget_held, assert_masks, assert_pruned, cases, values_for


def budget(data: st.DataObject, most: int) -> int:
    return data.draw(st.sampled_from([0, 1, most // 2, most - 1, most]) | st.integers(0, most), "nnz")


@on_every_device
@settings(max_examples=120)
@given(data=st.data())
def test_exactly_nnz_survive_and_the_lower_index_wins_ties(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device))
    before = [leaf.bits() for leaf in case.laid]
    nnz = budget(data, case.plan.blocks_per_scope)
    wanted = case.expected(nnz)
    masks = case.scope.get_masks(nnz)
    assert_masks(case, masks, wanted)
    assert_budget_held(case, masks, nnz)
    assert_pruned(
        case, before, oracle.masks_by_budget(case.plan, case.elements(), case.plan.blocks_per_scope)
    )
    case.scope.hard_threshold(nnz=nnz)
    assert_pruned(case, before, wanted)


@on_every_device
@settings(max_examples=60)
@given(data=st.data())
def test_empty_tensors_pass_every_path(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, empty=True))
    before = [leaf.bits() for leaf in case.laid]
    nnz = budget(data, case.plan.blocks_per_scope)
    wanted = case.expected(nnz)
    assert_masks(case, case.scope.get_masks(nnz), wanted)
    norms = case.scope.block_norms()
    assert tuple(norms.shape) == (*case.plan.grid, case.plan.blocks_per_scope)
    assert tuple(kth(case.scope, nnz).shape) == case.plan.grid
    for leaf in case.laid:
        assert tuple(leaf.block.min().shape) == tuple(leaf.block.max().shape) == leaf.plan.grid
    case.scope.hard_threshold(nnz=nnz)
    assert_pruned(case, before, wanted)


@on_every_device
@settings(max_examples=80)
@given(data=st.data())
def test_values_decide_in_every_form_and_in_every_member(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device))
    values, numbers = data.draw(values_for(case, device))
    before = [leaf.bits() for leaf in case.laid]
    nnz = budget(data, case.plan.blocks_per_scope)
    wanted = oracle.masks_by_budget(case.plan, numbers, nnz)
    assert_masks(case, case.scope.get_masks(nnz, values), wanted)
    case.scope.hard_threshold(nnz=nnz, values=values)
    assert_pruned(case, before, wanted)


@on_every_device
@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float16, torch.float8_e5m2, torch.int64]))
def test_block_scores_of_either_sign_rank_instead_of_norms(
    device: str, data: st.DataObject, dtype: torch.dtype
) -> None:
    case = data.draw(cases(device))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    size = case.plan.blocks_per_scope
    drawn = {place: [chance.choice((*FEW, -3.0)) for _ in range(size)] for place in case.plan.places()}
    if dtype == torch.int64:
        drawn = {place: [float(int(one)) for one in row] for place, row in drawn.items()}
    shape = (*case.plan.grid, size)
    scores = torch.tensor(list(drawn.values()), dtype=torch.float64).reshape(shape).to(dtype).to(device)
    nnz = budget(data, size)
    kept = {place: oracle.keep_largest(row, nnz) for place, row in drawn.items()}
    assert_masks(case, case.scope.get_masks(nnz, block_scores=scores), oracle.masks(case.plan, kept))


@on_every_device
@settings(max_examples=60)
@given(data=st.data())
def test_block_mask_is_laid_out_as_it_stands(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, empty=data.draw(st.booleans())))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    size = case.plan.blocks_per_scope
    kept = {place: [chance.random() < 0.5 for _ in range(size)] for place in case.plan.places()}
    mask = torch.tensor(list(kept.values()), dtype=torch.bool, device=device)
    masks = case.scope.get_masks(-1, block_mask=mask.reshape(*case.plan.grid, size))
    assert_masks(case, masks, oracle.masks(case.plan, kept))


@on_every_device
@settings(max_examples=80)
@given(data=st.data())
def test_an_explicit_threshold_keeps_what_reaches_it(device: str, data: st.DataObject) -> None:
    case = data.draw(cases(device, kinds=("few", "any")))
    before = [leaf.bits() for leaf in case.laid]
    values, numbers = data.draw(values_for(case, device)) if data.draw(st.booleans()) else (None, None)
    elements = case.elements() if numbers is None else numbers
    # norms that some block has exactly, so that >= and > differ
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    limits: dict[oracle.Index, float] = {}
    for place, squares in oracle.scores_by_scope(case.plan, elements).items():
        roots = [root for root in map(oracle.root, squares) if root is not None]
        limits[place] = chance.choice([*roots, 0.0, -1.0, 1.5, math.inf])
    thresholds: Any = torch.tensor(list(limits.values()), dtype=torch.float64, device=device)
    thresholds = thresholds.reshape(case.plan.grid)
    if data.draw(st.booleans()):
        number = chance.choice(list(limits.values()))
        limits, thresholds = dict.fromkeys(limits, number), number
    wanted = oracle.masks_by_threshold(case.plan, elements, limits)
    case.scope.hard_threshold(thresholds, values=values)
    assert_pruned(case, before, wanted)


def kth(scope: ScopeSpec | ScopeCoupling, k: int) -> torch.Tensor:
    return scope.kth_largest(None, k) if isinstance(scope, ScopeSpec) else scope.kth_largest(k)


@on_every_device
@settings(max_examples=60)
@given(data=st.data(), weight=st.sampled_from([0.0, 0.25, 1.0, 3.0]))
def test_kth_largest_and_kth_mid_are_ranks_of_sorted_norms(
    device: str, data: st.DataObject, weight: float
) -> None:
    case = data.draw(cases(device, kinds=("few",)))
    size = case.plan.blocks_per_scope
    k = budget(data, size)
    found, middle = kth(case.scope, k), case.scope.kth_mid(None, k, weight)
    assert found.dtype == middle.dtype == torch.float64
    assert tuple(found.shape) == tuple(middle.shape) == case.plan.grid
    for place, squares in oracle.scores_by_scope(case.plan, case.elements()).items():
        norms = [math.inf, *sorted((math.sqrt(square) for square in squares), reverse=True), 0.0]
        assert math.isclose(found[place].item(), norms[k], rel_tol=1e-15)
        mean = (norms[k] + weight * norms[k + 1]) / (1 + weight)
        assert math.isclose(middle[place].item(), mean, rel_tol=1e-15)


def test_kth_mid_without_weight_is_kth_largest_even_where_norms_are_infinite() -> None:
    scope = ScopeSpec(BlockSpec(torch.tensor([math.inf, math.inf, 1.0]), ()), ())
    assert scope.kth_mid(None, 1, 0.0).tolist() == [math.inf]
    assert scope.kth_mid(None, 3).tolist() == [0.5]


def test_the_whole_budget_touches_nothing_and_none_prunes_all() -> None:
    weight = torch.tensor([[-0.0, math.inf, 1.0, -2.0]], dtype=torch.bfloat16)
    scope = ScopeSpec(BlockSpec(weight, ()), (1, 4))
    before = weight.view(torch.int16).tolist()
    scope.hard_threshold(nnz=4)
    assert weight.view(torch.int16).tolist() == before
    scope.hard_threshold(nnz=0)
    assert weight.view(torch.int16).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("nnz", [-1, 5])
def test_a_budget_out_of_range_names_scope_nnz_and_range(nnz: int) -> None:
    scope = ScopeSpec(BlockSpec(torch.ones(2, 4), ()), (1, 4), name="quads")
    with pytest.raises(ValueError, match=rf"quads: nnz {nnz} is out of range: .* 0 and 4"):
        scope.get_masks(nnz)
    with pytest.raises(ValueError, match="out of range"):
        scope.hard_threshold(nnz=nnz)
    with pytest.raises(ValueError, match="out of range"):
        scope.kth_largest(None, nnz)


def test_exactly_one_of_threshold_and_budget_is_given() -> None:
    weight = torch.ones(4)
    scope = ScopeSpec(BlockSpec(weight, ()), ())
    with pytest.raises(SparsityError, match="exactly one"):
        scope.hard_threshold()
    with pytest.raises(SparsityError, match="exactly one"):
        scope.hard_threshold(0.0, 0)
    assert weight.tolist() == [1, 1, 1, 1]
    scope.hard_threshold(0.0)  # 0 is a threshold, and one that keeps all
    assert weight.tolist() == [1, 1, 1, 1]
    scope.hard_threshold(nnz=0)
    assert weight.tolist() == [0, 0, 0, 0]


@on_every_device
@settings(max_examples=60)
@given(
    rows=st.integers(1, 4),
    blocks=st.integers(1, 40),
    low=st.sampled_from([-1, -3, -(2**63)]),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_selection_is_a_stable_sort(
    device: str, rows: int, blocks: int, low: int, seed: int, data: st.DataObject
) -> None:
    chance = random.Random(seed)
    keys = [[chance.choice([low, 0, 1, ~low]) for _ in range(blocks)] for _ in range(rows)]
    nnz = budget(data, blocks)
    found = select(torch.tensor(keys, dtype=torch.int64, device=device), nnz)
    assert found.tolist() == [oracle.keep_largest(row, nnz) for row in keys]


@pytest.mark.parametrize("shape", [(1, 4), (1, -1), (), (8, 32)])
def test_masks_do_not_depend_on_the_number_of_threads(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 512, dtype=torch.bfloat16).mul_(4).round_()
    masks = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            for block in ((1, 1), (2, 4)):
                scope = ScopeSpec(BlockSpec(weight, block), shape)
                masks.append((block, scope.get_masks(scope.numblk_per_scope() // 2)))
    finally:
        torch.set_num_threads(threads)
    for block, mask in masks:
        (found,) = mask.values()
        (first,) = next(other for shape, other in masks if shape == block).values()
        assert torch.equal(found, first)


@pytest.mark.parametrize(
    ("sparsity", "nnz"),
    [(0, 8), (0.0, 8), (0.1, 8), (0.125, 7), (0.3, 6), (0.5, 4), (0.99, 1), (1, 0), (1.5, 0), (math.inf, 0)],
)
def test_a_sparsity_is_a_budget_rounded_in_favour_of_the_weights(sparsity: float, nnz: int) -> None:
    scope = ScopeSpec(BlockSpec(torch.zeros(2, 8), ()), (1, 8))
    assert scope.sparsity_to_nnz(sparsity) == nnz


@pytest.mark.parametrize("sparsity", [-0.1, math.nan])
def test_a_sparsity_below_nothing_is_refused(sparsity: float) -> None:
    scope = ScopeSpec(BlockSpec(torch.zeros(2, 8), ()), (1, 8))
    with pytest.raises(SparsityError, match="no share of blocks"):
        scope.sparsity_to_nnz(sparsity)
