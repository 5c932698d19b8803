"""Tuning of a block: its steps, what they leave alone, and the metric, beside plain loops."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sparseprune.calibration.tuning import _BETAS, _DAMP, _RATE, Tuned, difference, root_of, tuned

STEPS, SEED = 12, 5


def problem(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """Weights of two products with tanh between them, half of one pruned, and two batches of inputs."""
    made = torch.Generator().manual_seed(SEED)
    start = {
        "first": torch.randn(4, 3, generator=made),
        "second": torch.randn(2, 4, generator=made),
        "bias": torch.randn(2, generator=made),
    }
    start["first"][:, 1] = 0
    free = {"first": start["first"] != 0, "second": torch.ones(2, 4, dtype=torch.bool)}
    free["second"][0] = False  # nobody pruned these: they stay
    batches = [torch.randn(5, 3, generator=made), torch.randn(7, 3, generator=made)]
    return {name: one.to(dtype) for name, one in start.items()}, free, batches


def outputs(parameters: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    hidden = torch.tanh(rows.to(parameters["first"].dtype) @ parameters["first"].T)
    return hidden @ parameters["second"].T + parameters["bias"]


def run(dtype: torch.dtype = torch.float32, steps: int = STEPS) -> tuple[dict[str, Tensor], Tuned]:
    start, free, batches = problem(dtype)
    made = torch.Generator().manual_seed(SEED + 1)
    wanted = [outputs(start, rows) + 0.3 * torch.randn(len(rows), 2, generator=made) for rows in batches]

    def loss(parameters: Mapping[str, Tensor], batch: int) -> Tensor:
        return difference(outputs(parameters, batches[batch]), wanted[batch], None)

    return start, tuned(loss, start, free, [[0], [1]], steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tuned_parameters_have_a_lower_loss_and_all_that_may_not_move_keeps_its_bits(
    dtype: torch.dtype,
) -> None:
    start, found = run(dtype)
    _, free, _ = problem(dtype)
    assert found.after < found.before
    assert not found.tensors["first"].equal(start["first"])
    for name, one in found.tensors.items():
        assert one.dtype == dtype
        stays = ~free[name] if name in free else torch.ones_like(one, dtype=torch.bool)
        assert torch.equal(one[stays], start[name][stays])
        assert torch.equal(one == 0, start[name] == 0)


def test_without_steps_or_where_the_loss_cannot_fall_all_bits_stay() -> None:
    start, found = run(steps=0)
    assert found.after == found.before
    assert all(torch.equal(one, start[name]) for name, one in found.tensors.items())
    lost = tuned(
        lambda parameters, _: parameters["one"].square().sum() * math.nan,
        {"one": torch.ones(2)},
        {"one": torch.ones(2, dtype=torch.bool)},
        [[0]],
        3,
    )
    assert torch.equal(lost.tensors["one"], torch.ones(2))


def test_steps_are_those_of_adam_in_plain_loops() -> None:
    start, free = {"one": torch.tensor([1.0, 0.0, -2.0])}, {"one": torch.tensor([True, False, True])}
    wanted = [0.5, 9.0, -1.0]

    def loss(parameters: Mapping[str, Tensor], _: int) -> Tensor:
        return difference(parameters["one"], torch.tensor(wanted), None)

    found = tuned(loss, start, free, [[0]], STEPS)
    now = [1.0, 0.0, -2.0]
    spread, before = math.sqrt((1 + 4) / 2), 0.25 + 81 + 1
    means, squares = [0.0] * 3, [0.0] * 3
    for step in range(STEPS):
        for at in (0, 2):
            gradient = 2 * (now[at] - wanted[at]) / before
            means[at] = _BETAS[0] * means[at] + (1 - _BETAS[0]) * gradient
            squares[at] = _BETAS[1] * squares[at] + (1 - _BETAS[1]) * gradient**2
            mean = means[at] / (1 - _BETAS[0] ** (step + 1))
            square = squares[at] / (1 - _BETAS[1] ** (step + 1))
            now[at] -= _RATE * spread * (1 - step / STEPS) * mean / math.sqrt(square)
    assert found.tensors["one"].tolist() == pytest.approx(now, abs=1e-5)
    assert found.before == pytest.approx(before)


@pytest.mark.parametrize("groups", [1, 2])
def test_the_metric_is_that_of_the_damped_gradients_in_each_group(groups: int) -> None:
    made, size = torch.Generator().manual_seed(SEED), 4 // groups
    rows = torch.randn(groups, 6, size, generator=made)
    gradients = rows.mT @ rows
    apart = torch.randn(3, 4, generator=made)
    given = gradients[0] if groups == 1 else gradients
    found = difference(apart, torch.zeros(3, 4), root_of(given))
    mean = sum(float(gradients[g, i, i]) for g in range(groups) for i in range(size)) / 4
    wanted = 0.0
    for token in apart.tolist():
        for g in range(groups):
            for i in range(size):
                for j in range(size):
                    metric = float(gradients[g, i, j]) / mean + (_DAMP if i == j else 0)
                    wanted += token[g * size + i] * metric * token[g * size + j]
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_gradients_that_are_all_zero_make_every_output_count_alike() -> None:
    apart = torch.tensor([[3.0, 4.0]])
    assert float(difference(apart, torch.zeros(1, 2), root_of(torch.zeros(2, 2)))) == pytest.approx(
        25 * _DAMP
    )
