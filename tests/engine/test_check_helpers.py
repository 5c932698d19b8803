"""The judges on trial: each check fails once on something wrong, or it would prove nothing."""

from fractions import Fraction

import pytest
import torch

from sparseprune import BlockSpec, ScopeSpec
from tests import oracle
from tests.engine.structures import (
    Case,
    Laid,
    assert_budget_held,
    assert_close,
    assert_masks,
    assert_pruned,
    filled,
)


@pytest.fixture
def case() -> Case:
    storage = torch.tensor([9.0, 1.0, 2.0, 3.0, 4.0, 9.0])
    plan = oracle.Leaf((2, 2), (1, 1))
    leaf = Laid(
        plan, BlockSpec(storage[1:5].view(2, 2), ()), storage, {(0, 0): 1, (0, 1): 2, (1, 0): 3, (1, 1): 4}
    )
    scopes = (oracle.Scope(oracle.alone(plan), (1, 2)),)
    return Case(oracle.Coupled(scopes, ((0, 1),)), ScopeSpec(leaf.block, (1, 2)), (leaf,))


def test_the_oracle_finds_what_was_worked_out_by_hand(case: Case) -> None:
    assert case.expected(1) == [{(0, 0): False, (0, 1): True, (1, 0): False, (1, 1): True}]
    assert oracle.keep_largest([3, 7, 7, 7], 2) == [False, True, True, False]
    half = oracle.masks_by_threshold(case.plan, case.elements(), {(0, 0): 2.0, (1, 0): 3.5})
    assert half == [{(0, 0): False, (0, 1): True, (1, 0): False, (1, 1): True}]
    assert oracle.norm([3, -4]) == 5
    assert oracle.root(Fraction(9, 4)) == 1.5
    assert oracle.root(2) is oracle.root((2**53 + 1) ** 2) is None
    assert oracle.norm([1e200, 1e200], 1) == 2e200
    assert oracle.shrink([3.0, 4.0], 2.5) == pytest.approx([1.5, 2.0], rel=1e-15)
    assert oracle.shrink([3.0, 4.0], 5.0) == [0, 0]


def test_the_oracle_permutes_grids_as_the_contract_words_it() -> None:
    plan = oracle.Fused((oracle.Leaf((2, 3, 4), (1, 1, 2)),), ((2, 0, 1),))
    assert plan.grid == (2, 2, 3)  # common[d] = grid[order[d]] of the grid (2, 3, 2)
    assert list(plan.block_elements((1, 0, 2))) == [(0, (0, 2, 2)), (0, (0, 2, 3))]


def test_a_wrong_mask_is_caught(case: Case) -> None:
    right = case.scope.get_masks(1)
    wanted = case.expected(1)
    assert_masks(case, right, wanted)
    assert_budget_held(case, right, 1)
    block = case.laid[0].block
    for wrong in (
        {block: ~right[block]},
        {block: right[block].to(torch.uint8)},
        {block: right[block].reshape(4)},
        {},
    ):
        with pytest.raises(AssertionError):
            assert_masks(case, wrong, wanted)
    with pytest.raises(AssertionError):
        assert_budget_held(case, {block: torch.ones(2, 2, dtype=torch.bool)}, 1)


def test_a_block_kept_in_part_is_caught(case: Case) -> None:
    whole = oracle.Coupled((oracle.Scope(oracle.alone(oracle.Leaf((2, 2), (2, 1))), (1, 2)),), ((0, 1),))
    pairs = Case(whole, case.scope, case.laid)
    block = case.laid[0].block
    assert_budget_held(pairs, {block: torch.tensor([[True, False], [True, False]])}, 1)
    with pytest.raises(AssertionError):
        assert_budget_held(pairs, {block: torch.tensor([[True, False], [False, True]])}, 1)


@pytest.mark.parametrize(
    ("place", "value"),
    [(1, -0.0), (1, 1.0), (2, 2.5), (0, 0.0), (5, 8.0)],
    ids=["negative zero", "not pruned", "survivor changed", "guard zeroed", "guard changed"],
)
def test_a_wrong_bit_anywhere_in_the_storage_is_caught(case: Case, place: int, value: float) -> None:
    before = [leaf.bits() for leaf in case.laid]
    wanted = case.expected(1)
    case.scope.hard_threshold(nnz=1)
    assert_pruned(case, before, wanted)
    case.laid[0].storage[place] = value
    with pytest.raises(AssertionError):
        assert_pruned(case, before, wanted)


def test_unlike_numbers_are_caught() -> None:
    assert_close([1.0, 0.0], [1.0 + 1e-12, 1e-12], 1e-9, 1.0)
    for wrong in ([1.0 + 1e-6, 0.0], [1.0, 1e-6], [1.0]):
        with pytest.raises(AssertionError):
            assert_close(wrong, [1.0, 0.0], 1e-9, 1.0)


def test_the_filler_draws_ties_extremes_and_any_bits_but_no_nan() -> None:
    assert len(set(filled("few", 1, 99, torch.float8_e5m2).to(torch.float64).tolist())) < 9
    assert -128 in filled("extreme", 1, 99, torch.int8).tolist()
    assert not filled("any", 1, 999, torch.float8_e4m3fn).to(torch.float64).isnan().any()
    assert len(set(filled("any", 1, 999, torch.bfloat16).view(torch.int16).tolist())) > 900
