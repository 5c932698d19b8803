"""`refit`: exact on the given support, never worse than before, for every orientation and singularity."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import Matrix, ShapeMismatchError, SparsityError, refit
from sparseprune.engine.matrices import scaled
from tests.engine.devices import on_every_device
from tests.engine.reconstruction.oracle import moments, objective, solved


def drawn(rows: int, features: int, seed: int, samples: int = 64) -> tuple[torch.Tensor, ...]:
    """Weights, a moment and a mask that keeps about half."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, features, generator=generator)
    mask = torch.rand(rows, features, generator=generator) < 0.5
    return dense, moments(features, samples, generator), mask


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 12),
    features=st.integers(1, 24),
    samples=st.integers(2, 60),
    seed=st.integers(0, 99),
    damp=st.sampled_from([0.001, 0.01, 0.3]),
)
def test_agrees_with_an_exact_solve_of_every_row(
    rows: int, features: int, samples: int, seed: int, damp: float
) -> None:
    dense, moment, mask = drawn(rows, features, seed, samples)
    wanted = solved(dense, moment, mask, damp)
    for weights, tolerance in ((dense, 1e-3), (dense.double(), 1e-8)):
        found = refit(Matrix(weights, moment), mask, damp=damp)
        assert found.dtype == weights.dtype
        assert not found[~mask].any()
        least = objective(wanted, dense, moment, damp)
        reached = objective(found, dense, moment, damp)
        scale = objective(torch.zeros_like(dense), dense, moment, damp)
        assert all(
            mine <= best + tolerance * best + 1e-9 * most
            for mine, best, most in zip(reached, least, scale, strict=True)
        )
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_row_gets_worse_than_under_the_mask_alone_also_once_it_is_rounded(dtype: torch.dtype) -> None:
    for seed in range(20):
        dense, moment, mask = drawn(8, 16, seed)
        weights = dense.to(dtype)
        found = refit(Matrix(weights, moment), mask)
        masked = torch.where(mask, weights, torch.zeros_like(weights))
        before = objective(masked, weights, moment)
        after = objective(found, weights, moment)
        assert all(now <= then * (1 + 1e-6) for now, then in zip(after, before, strict=True))
        assert sum(after) < 0.8 * sum(before)


def test_a_start_that_is_better_than_what_is_found_is_kept() -> None:
    dense, moment, mask = drawn(6, 12, 3)
    best = refit(Matrix(dense.double(), moment), mask)
    again = refit(Matrix(dense.double(), moment), mask, start=best, max_iter=1)
    before = objective(best, dense, moment)
    # No more than float64 can tell: the two take their sums in unlike orders.
    assert all(
        now <= then * (1 + 1e-12) for now, then in zip(objective(again, dense, moment), before, strict=True)
    )
    worse = refit(Matrix(dense.double(), moment), mask, start=best + 1e-3 * mask, max_iter=1)
    assert sum(objective(worse, dense, moment)) > sum(before)


def few_tokens(tokens: int, features: int = 32) -> torch.Tensor:
    """The moment of few inputs, one of them never seen and one that repeats another."""
    inputs = torch.randn(tokens, features, generator=torch.Generator().manual_seed(tokens))
    inputs[:, 3] = 0
    inputs[:, 7] = inputs[:, 6]
    found: torch.Tensor = inputs.T @ inputs / tokens
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("damp", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_few_tokens_and_no_damping_make_no_row_worse_and_no_weight_large(
    dtype: torch.dtype, damp: float, shared: bool
) -> None:
    for tokens in (1, 8, 16):
        dense, _, mask = drawn(32, 32, tokens)
        mask = mask[:1].expand(32, 32) if shared else mask
        weights, moment = dense.to(dtype), few_tokens(tokens)
        found = refit(Matrix(weights, moment), mask, damp=damp)
        masked = torch.where(mask, weights.double(), 0.0)
        before, after = (objective(one, weights, moment, 0.0) for one in (masked, found))
        assert all(now <= then * (1 + 1e-9) for now, then in zip(after, before, strict=True))
        assert sum(after) < 0.2 * sum(before)
        assert found.double().abs().max() < 100


def test_a_row_that_rounding_makes_worse_keeps_its_weights() -> None:
    """Where two inputs are nearly the same a weight of eight bits is too coarse to make up for its twin."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 8, generator=generator)
    inputs[:, 4:] = inputs[:, :4] + 0.01 * inputs[:, 4:]
    moment = inputs.T @ inputs / 200
    dense = torch.randn(64, 8, generator=generator)
    dense[:, 4:] *= 0.01  # so that little is to be made up for
    weights = dense.to(torch.float8_e4m3fn)
    mask = (torch.arange(8) < 4).expand(64, 8)
    exact = solved(weights.float(), moment, mask, 0.0).to(torch.float8_e4m3fn)
    masked = torch.where(mask, weights.double(), 0.0)
    found = refit(Matrix(weights, moment), mask, damp=0.0)
    rounded, before, after = (
        torch.tensor(objective(one, weights, moment, 0.0)) for one in (exact, masked, found)
    )
    assert (rounded > before * 1.01).any()  # what this is about
    assert (after <= before * (1 + 1e-9)).all()
    assert (after < before * 0.9).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("power", [-900, -120, -40, 40, 116, 900])
def test_powers_of_two_of_weights_and_of_moments_do_not_show(dtype: torch.dtype, power: int) -> None:
    dense, moment, mask = drawn(8, 16, 4)
    weights = dense.to(dtype)
    found = refit(Matrix(weights, moment), mask)
    wide = Matrix(weights, moment.double() * 2.0**power)
    assert torch.equal(refit(wide, mask), refit(Matrix(weights, moment.double()), mask))
    if dtype == torch.float64 or abs(power) < 100 or power == 116:
        scaled = refit(Matrix((weights.double() * 2.0**power).to(dtype), moment), mask)
        assert torch.equal(scaled.double(), found.double() * 2.0**power)


def no_moments() -> dict[str, torch.Tensor]:
    """What comes near a second moment, and is none."""
    moment = moments(16, 40, torch.Generator().manual_seed(0))
    lopsided, indefinite, unseen = moment.clone(), torch.ones(16, 16), torch.eye(16)
    lopsided[2, 5] += 0.01 * float((moment[2, 2] * moment[5, 5]).sqrt())
    indefinite.diagonal().fill_(0.99)
    unseen[4, 4] = 0.0
    unseen[4, 6] = unseen[6, 4] = 0.1
    return {"not symmetric": lopsided, "negative energy": indefinite, "directions of negative": unseen}


@pytest.mark.parametrize("text", no_moments())
@pytest.mark.parametrize("scale", [1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_no_second_moment_by_more_than_rounding_is_refused(
    text: str, dtype: torch.dtype, scale: float
) -> None:
    wrong = (no_moments()[text] * scale).to(dtype)
    if dtype == torch.bfloat16 and text != "directions of negative":
        Matrix(torch.ones(3, 16), wrong)  # eight bits do not tell
        return
    with pytest.raises(SparsityError, match=text):
        Matrix(torch.ones(3, 16), wrong)
    with pytest.raises(SparsityError, match=text):
        Matrix(torch.ones(2, 3, 16), torch.stack([torch.eye(16).to(dtype) * scale, wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_that_were_rounded_are_moments(dtype: torch.dtype) -> None:
    """Of rank 1 the rounded ones have directions of negative energy; and squares may be rounded to 0."""
    inputs = torch.randn(1, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 5] = 1e-5 if dtype == torch.float16 else 1e-25
    moment = (inputs.T @ inputs).to(dtype)
    moment[1] += moment[1] * torch.finfo(dtype).eps
    assert moment[5, 5] == 0
    assert moment[5].any()
    assert torch.linalg.eigvalsh(moment.double()).min() < 0
    dense = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    mask = torch.rand(6, 64, generator=torch.Generator().manual_seed(2)) < 0.5
    for damp in (0.0, 0.01):
        assert refit(Matrix(dense, moment), mask, damp=damp).abs().max() < 100


@pytest.mark.parametrize("tokens", [1, 8, 31, 400])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_solved_has_no_direction_that_rounding_made(dtype: torch.dtype, tokens: int) -> None:
    for damp in (0.0, 1e-8, 0.01):
        problem = scaled(Matrix(torch.ones(2, 32), few_tokens(tokens).to(dtype)), damp)
        least = torch.linalg.eigvalsh(problem.hessian[0].double()).min()
        added = problem.hessian[0, 0, 0].double() - 1
        assert least >= max(2e-6, 0.49 * added)
        if tokens == 400 and damp == 0.01:
            assert added == 0


@on_every_device
def test_inputs_along_the_first_dimension_are_the_same_problem_turned(device: str) -> None:
    dense, moment, mask = (one.to(device) for one in drawn(10, 16, 1))
    turned = refit(Matrix(dense.T, moment, 0), mask.T)
    torch.testing.assert_close(turned, refit(Matrix(dense, moment), mask).T)
    assert turned.is_contiguous()


@on_every_device
@pytest.mark.parametrize("input_dim", [-1, 1])
@pytest.mark.parametrize("shared", [False, True])
def test_a_stack_is_solved_as_its_matrices_one_by_one(input_dim: int, shared: bool, device: str) -> None:
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(3, 10, 14, generator=generator).to(device)
    features = dense.shape[input_dim]
    moment = moments(features, 40, generator, matrices=3).to(device)
    mask = torch.rand(dense.shape, generator=generator).to(device) < 0.5
    if shared:  # all rows of a matrix keep the same inputs, each matrix others and another number of them
        line = torch.rand(3, 1, features, generator=generator).to(device) < 0.5
        mask = (line if input_dim == -1 else line.mT).expand(dense.shape)
    found = refit(Matrix(dense, moment, input_dim), mask)
    for number in range(3):
        one = refit(Matrix(dense[number], moment[number], input_dim - (input_dim > 0)), mask[number])
        torch.testing.assert_close(found[number], one, rtol=1e-3, atol=1e-4)
        rows = dense[number] if input_dim == -1 else dense[number].T
        kept = mask[number] if input_dim == -1 else mask[number].T
        wanted = solved(rows.cpu(), moment[number].cpu(), kept.cpu())
        least = objective(wanted, rows.cpu(), moment[number].cpu())
        reached = objective(one.cpu() if input_dim == -1 else one.T.cpu(), rows.cpu(), moment[number].cpu())
        assert sum(reached) <= sum(least) * (1 + 1e-3)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_singular_moments_are_solved(damp: float) -> None:
    """Dead inputs, fewer samples than inputs, and inputs that repeat others."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(5, 16, generator=generator)
    inputs[:, 3] = 0
    inputs[:, 7] = inputs[:, 6]
    moment = inputs.T @ inputs / 5
    dense = torch.randn(6, 16, generator=generator)
    mask = torch.rand(6, 16, generator=generator) < 0.5
    columns = (torch.arange(16) % 2 == 0).expand(6, 16)
    for support in (mask, columns):
        found = refit(Matrix(dense, moment), support, damp=damp)
        assert found.isfinite().all()
        assert not found[~support].any()
        least = sum(objective(solved(dense, moment, support, damp), dense, moment, damp))
        most = sum(objective(torch.zeros_like(dense), dense, moment, damp))
        assert sum(objective(found, dense, moment, damp)) <= least * 1.01 + 1e-4 * most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factor", [1.0, 3e-7, 1e8])
def test_uncorrelated_inputs_leave_survivors_their_bits(dtype: torch.dtype, factor: float) -> None:
    dense = torch.randn(8, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    dense[0, 0] = -0.0
    mask = torch.rand(8, 12, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, 0] = True
    found = refit(Matrix(dense, factor * torch.eye(12)), mask)
    bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(found.view(bits), torch.where(mask, dense.view(bits), 0))


def test_a_row_that_lost_nothing_keeps_its_bits_and_one_that_lost_all_is_zero() -> None:
    dense, moment, mask = drawn(6, 16, 5)
    mask[1], mask[2] = True, False
    dense[1, 3] = -0.0
    found = refit(Matrix(dense, moment), mask)
    assert torch.equal(found[1].view(torch.int32), dense[1].view(torch.int32))
    assert torch.equal(found[2].view(torch.int32), torch.zeros(16, dtype=torch.int32))
    everything = refit(Matrix(dense, moment), torch.ones_like(mask))
    assert torch.equal(everything.view(torch.int32), dense.view(torch.int32))


@pytest.mark.parametrize("shared", [False, True])
def test_fixed_weights_stay_and_the_others_know_it(shared: bool) -> None:
    dense, moment, mask = drawn(8, 16, 6)
    mask = mask[:1].expand(8, 16) if shared else mask
    fixed = (torch.arange(16) < 5).expand(8, 16)
    kept = mask | fixed
    found = refit(Matrix(dense, moment, fixed=fixed), kept)
    assert torch.equal(found[fixed], dense[fixed])
    wanted = objective(solved(dense, moment, kept, fixed=fixed), dense, moment)
    assert sum(objective(found, dense, moment)) <= sum(wanted) * (1 + 1e-3)


def test_what_a_dtype_cannot_hold_becomes_its_largest_number() -> None:
    moment = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 1e-6]])
    dense = torch.full((1, 2), 60000.0, dtype=torch.float16)
    found = refit(Matrix(dense, moment), torch.tensor([[True, False]]), damp=1e-6)
    assert found.isfinite().all()
    assert float(found[0, 0]) == torch.finfo(torch.float16).max


def test_no_rows_and_no_inputs_are_no_problem() -> None:
    assert refit(Matrix(torch.zeros(0, 4), torch.eye(4)), torch.ones(0, 4, dtype=torch.bool)).shape == (0, 4)
    empty = Matrix(torch.zeros(3, 0), torch.zeros(0, 0))
    assert refit(empty, torch.ones(3, 0, dtype=torch.bool)).shape == (3, 0)


EYE = torch.eye(4)
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"moment": torch.eye(5)}, ShapeMismatchError, r"a second moment of shape \[5, 5\] for weights of shape"),
    ({"moment": EYE[None]}, ShapeMismatchError, r"wanted \[4, 4\]"),
    ({"dense": torch.ones(4)}, ShapeMismatchError, "wanted a matrix, or a stack of them"),
    ({"dense": torch.ones(2, 3, 4, 4)}, ShapeMismatchError, "wanted a matrix, or a stack of them"),
    ({"input_dim": 2}, ShapeMismatchError, "inputs along dimension 2"),
    (
        {"dense": torch.ones(4, 3, 4), "input_dim": 0, "moment": EYE},
        ShapeMismatchError,
        "the first dimension of a stack counts its matrices",
    ),
    ({"fixed": torch.ones(3, 3, dtype=torch.bool)}, ShapeMismatchError, "fixed has shape"),
    ({"dense": torch.ones(3, 4, dtype=torch.int8)}, SparsityError, "cannot be reconstructed: wanted floats"),
    ({"dense": torch.full((3, 4), torch.nan)}, SparsityError, "the weights hold NaN or infinity"),
    ({"moment": EYE * torch.nan}, SparsityError, "the second moment of the inputs holds NaN or infinity"),
    ({"moment": -EYE}, SparsityError, "has a negative diagonal"),
]


@pytest.mark.parametrize(("changes", "error", "text"), WRONG)
def test_what_is_no_matrix_with_a_moment_is_refused(
    changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    legal: dict[str, Any] = {"dense": torch.ones(3, 4), "moment": EYE}
    Matrix(**legal)
    with pytest.raises(error, match=text):
        Matrix(**{**legal, **changes})


def test_masks_and_starts_of_another_shape_and_negative_damps_are_refused() -> None:
    matrix, mask = Matrix(torch.ones(3, 4), EYE), torch.ones(3, 4, dtype=torch.bool)
    with pytest.raises(ShapeMismatchError, match="mask has shape"):
        refit(matrix, mask[:2])
    with pytest.raises(ShapeMismatchError, match="start has shape"):
        refit(matrix, mask, start=torch.ones(4, 3))
    with pytest.raises(SparsityError, match="damp -1"):
        refit(matrix, mask, damp=-1)


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_matrix_of_whose_inputs_nothing_is_known_is_masked_alone(damp: float) -> None:
    dense, moment, mask = drawn(2 * 6, 16, 5)
    stack = Matrix(dense.reshape(2, 6, 16), torch.stack([0 * moment, moment]))
    assert stack.unseen == [0]
    assert Matrix(dense, moment).unseen == []
    found = refit(stack, mask.reshape(2, 6, 16), damp=damp)
    assert torch.equal(found[0], torch.where(mask, dense, 0.0)[:6])
    torch.testing.assert_close(found[1], refit(Matrix(dense[6:], moment), mask[6:], damp=damp))


def test_the_search_ends_where_what_is_called_between_iterations_raises() -> None:
    dense, moment, mask = drawn(6, 12, 3)
    found: list[int] = []

    def between() -> None:
        found.append(1)
        if len(found) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refit(Matrix(dense, moment), mask, between=between)
    assert len(found) == 3
    quiet = refit(Matrix(dense, moment), mask)
    assert torch.equal(refit(Matrix(dense, moment), mask, between=lambda: found.append(2)), quiet)
    assert len(found) > 3
