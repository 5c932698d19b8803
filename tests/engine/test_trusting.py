"""A scope whose numbers were looked at looks for no NaN again."""

from collections.abc import Callable

import pytest
import torch

from sparseprune import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec, SparseScope
from sparseprune.errors import NanScoreError


def coupled(trusting: bool) -> SparseScope:
    tensors = [torch.tensor([[1.0, 2, 3], [4, 5, number]]) for number in (6.0, float("nan"))]
    blocks = [BlockSpec(tensor, (1, -1)) for tensor in tensors]
    scope = ScopeSpec(BlockCoupling(blocks), ())
    return scope.trusting() if trusting else scope


def test_a_trusting_scope_looks_for_no_nan_in_elements_and_scores() -> None:
    asks: tuple[Callable[[SparseScope], object], ...] = (
        lambda scope: scope.get_masks(1),
        lambda scope: scope.block_norms(),
        lambda scope: scope.threshold_masks(2.0),
        lambda scope: scope.get_masks(1, block_scores=torch.tensor([[[float("nan"), 1.0]]])),
    )
    for ask in asks:
        with pytest.raises(NanScoreError):
            ask(coupled(trusting=False))
        ask(coupled(trusting=True))


def test_members_of_a_trusting_coupling_trust_too() -> None:
    scopes = [ScopeSpec(BlockSpec(torch.ones(2, 2), ()), ()) for _ in range(2)]
    coupling = ScopeCoupling(scopes)
    assert coupling.trusting() is coupling
    assert all(spec.trusted and spec.block.trusted for spec, _ in coupling.members)


def test_a_threshold_that_is_nan_is_refused_as_a_number_and_as_a_tensor() -> None:
    nan, scope = float("nan"), ScopeSpec(BlockSpec(torch.ones(2, 2), ()), (1, -1))
    for threshold in (nan, torch.tensor(nan), torch.full((2, 1), nan)):
        with pytest.raises(ValueError, match="a threshold is NaN"):
            scope.hard_threshold(threshold)
    with pytest.raises(ValueError, match="a threshold is NaN"):
        scope.trusting().hard_threshold(nan)
