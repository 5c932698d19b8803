"""NaN has no rank: refused by name and place, before a byte is written (promise 8)."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import BlockSpec, ScopeCoupling, ScopeSpec, SparsityError
from tests.engine.devices import on_every_device
from tests.engine.structures import FLOATS, Case, cases

NAN_BITS = {
    torch.float64: (0x7FF8 << 48, -1, 0x7FF0_0000_0000_0001),
    torch.float32: (0x7FC0_0000, -1, 0x7F80_0001),
    torch.bfloat16: (0x7FC0, -1, 0x7F81),
    torch.float16: (0x7E00, -1, 0x7C01),
    torch.float8_e5m2: (0x7E, -1, 0x7D),
    torch.float8_e4m3fn: (0x7F, -1),
}


def attempts(case: Case, thresholds: float = 0.5) -> list[Callable[[], Any]]:
    scope = case.scope
    tries: list[Callable[[], Any]] = [
        lambda: scope.get_masks(case.plan.blocks_per_scope),
        lambda: scope.get_masks(0),
        lambda: scope.hard_threshold(nnz=case.plan.blocks_per_scope // 2),
        lambda: scope.hard_threshold(thresholds),
        lambda: scope.soft_threshold(thresholds),
    ]
    if isinstance(scope, ScopeCoupling):
        return [*tries, lambda: scope.kth_largest(1), lambda: scope.kth_mid(None, 1)]
    return [*tries, lambda: scope.kth_largest(None, 1), lambda: scope.kth_mid(None, 1)]


@on_every_device
@settings(max_examples=100)
@given(data=st.data())
def test_nan_weights_are_named_with_their_first_place_and_nothing_is_written(
    device: str, data: st.DataObject
) -> None:
    case = data.draw(cases(device, dtypes=FLOATS))
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    leaf = chance.choice(case.laid)
    object.__setattr__(leaf.block, "name", "the sick one")
    bits = leaf.storage.view(leaf.block.view.bits.dtype)
    sick = sorted(chance.sample(sorted(leaf.places), min(2, len(leaf.places))))
    for index in sick:
        bits[leaf.places[index]] = chance.choice(NAN_BITS[leaf.storage.dtype])
    before = [one.bits() for one in case.laid]
    for attempt in attempts(case):
        with pytest.raises(ValueError, match="the sick one: NaN at") as caught:
            attempt()
        assert str(list(sick[0])) in str(caught.value)
        assert [one.bits() for one in case.laid] == before


@on_every_device
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_nan_values_are_refused_in_every_float_dtype(device: str, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 3, device=device)
    values = torch.ones(2, 3).to(dtype).to(device)
    scope = ScopeSpec(BlockSpec(weight, (), "w"), ())
    scope.get_masks(3, values)
    values[1, 1] = math.nan
    with pytest.raises(SparsityError, match=r"w: NaN at \[1, 1\]"):
        scope.hard_threshold(nnz=3, values=values)
    with pytest.raises(SparsityError, match=r"w: NaN at \[1, 1\]"):
        scope.hard_threshold(0.5, values=values)
    assert (weight == 1).all()


def test_nan_weights_do_not_matter_where_values_or_scores_decide() -> None:
    weight = torch.tensor([math.nan, 2.0, 3.0])
    scope = ScopeSpec(BlockSpec(weight, ()), ())
    scope.get_masks(1, block_scores=torch.ones(1, 3))
    scope.hard_threshold(nnz=2, values=torch.tensor([0.0, 1.0, 1.0]))
    assert weight.tolist() == [0, 2, 3]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_block_scores_are_named_with_scope_and_block(dtype: torch.dtype) -> None:
    scope = ScopeSpec(BlockSpec(torch.ones(2, 4), ()), (1, 4), name="quads")
    scores = torch.ones(2, 1, 4).to(dtype)
    scope.get_masks(2, block_scores=scores)
    scores[1, 0, 2] = math.nan
    with pytest.raises(SparsityError, match=r"quads.*NaN at \[1, 0, 2\]"):
        scope.get_masks(2, block_scores=scores)


def test_nan_thresholds_and_conditioners_are_refused() -> None:
    weight = torch.ones(2, 4)
    scope = ScopeSpec(BlockSpec(weight, (1, 2)), (1, -1))
    with pytest.raises(SparsityError, match="threshold is NaN"):
        scope.hard_threshold(math.nan)
    with pytest.raises(SparsityError, match="threshold is NaN"):
        scope.hard_threshold(torch.tensor([[0.5], [math.nan]]))
    with pytest.raises(SparsityError, match="threshold is NaN"):
        scope.soft_threshold(math.nan)
    with pytest.raises(SparsityError, match="conditioners must be finite"):
        scope.soft_threshold(0.5, torch.full((2, 4), math.nan))
    assert (weight == 1).all()
