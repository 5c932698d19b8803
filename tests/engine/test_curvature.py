"""Curvature: what single weights and whole rows cost, against inverses in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.engine.curvature import Curvature
from sparseprune.errors import SparsityError


def moment_of(features: int, tokens: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, features, generator=generator, dtype=torch.float64)
    mixed = inputs @ torch.randn(features, features, generator=generator, dtype=torch.float64)
    return (mixed.T @ mixed / max(tokens, 1)).to(dtype)


def damped(moment: torch.Tensor, damp: float) -> torch.Tensor:
    wide = moment.to(torch.float64)
    return wide + damp * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


@given(
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 99),
    st.sampled_from([0.01, 0.3]),
    st.integers(-60, 60),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_costs_what_its_inputs_variance_is_given_the_others(
    features: int, tokens: int, seed: int, damp: float, power: int
) -> None:
    moment = moment_of(features, tokens, seed) * 2.0**power
    found = Curvature.of(moment, damp)
    hessian = damped(moment, damp)
    torch.testing.assert_close(found.singles(), 1 / torch.linalg.inv(hessian).diagonal(), rtol=2e-3, atol=0)
    rows = torch.randn(5, features)
    wide = rows.to(torch.float64)
    torch.testing.assert_close(found.rows(rows), ((wide @ hessian) * wide).sum(-1), rtol=1e-4, atol=0)


def test_inputs_that_never_were_cost_the_damping_alone_and_without_it_nothing() -> None:
    moment = moment_of(6, 30, 1)
    moment[2], moment[:, 2] = 0, 0
    found = Curvature.of(moment, 0.01)
    assert found.singles()[2] == pytest.approx(0.01 * float(moment.diagonal().double().mean()))
    assert Curvature.of(moment, 0.0).singles()[2] == 0
    assert Curvature.of(torch.zeros(4, 4), 0.01).singles().tolist() == [0, 0, 0, 0]
    assert Curvature.of(torch.zeros(4, 4), 0.01).rows(torch.ones(2, 4)).tolist() == [0, 0]


def test_a_singular_moment_without_damping_has_finite_costs() -> None:
    found = Curvature.of(moment_of(8, 3, 2), 0.0)
    assert bool(found.singles().isfinite().all())
    assert bool((found.singles() >= 0).all())


def test_what_is_no_second_moment_is_refused() -> None:
    moment = moment_of(4, 9, 3)
    moment[1, 2] = torch.nan
    with pytest.raises(SparsityError, match="NaN or infinity"):
        Curvature.of(moment)
    with pytest.raises(SparsityError, match="negative diagonal"):
        Curvature.of(-torch.eye(3))
