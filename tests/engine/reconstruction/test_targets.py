"""Targets of weights, against plain least squares over every input."""

import pytest
import torch

from sparseprune.engine.targets import target_weights
from sparseprune.errors import ShapeMismatchError, SparsityError

INPUTS, OUTPUTS, ROWS = 5, 3, 40


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_least_squares(
    dense: torch.Tensor, x: torch.Tensor, y: torch.Tensor, r: torch.Tensor, damp: float
) -> torch.Tensor:
    """Row by row: equations of every token, and one for each weight that it stays near the dense one."""
    damping = damp * float(y.square().sum(0).mean())
    found = []
    for row, weights in enumerate(dense):
        wanted = [*(weights @ one for one in x), *(damping**0.5 * weights)]
        wanted = [one + (r[place, row] if place < len(x) else 0) for place, one in enumerate(wanted)]
        given = torch.cat([y, damping**0.5 * torch.eye(INPUTS, dtype=torch.float64)])
        found.append(torch.linalg.lstsq(given, torch.stack(wanted).unsqueeze(1)).solution[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("turned", [False, True])
def test_a_target_is_the_solution_of_least_squares(damp: float, turned: bool) -> None:
    dense, x = drawn(OUTPUTS, INPUTS), drawn(ROWS, INPUTS, seed=1)
    y, r = x + 0.3 * drawn(ROWS, INPUTS, seed=2), drawn(ROWS, OUTPUTS, seed=3)
    given = (y.T @ y, x.T @ y)
    residual = r.T @ y
    if turned:
        found = target_weights(dense.T, *given, residual.T, damp=damp, input_dim=0).T
    else:
        found = target_weights(dense, *given, residual, damp=damp)
    torch.testing.assert_close(found, by_least_squares(dense, x, y, r, damp))


def test_the_same_inputs_and_no_residual_leave_weights_as_they_are() -> None:
    dense, x = drawn(OUTPUTS, INPUTS), drawn(ROWS, INPUTS, seed=1)
    moment = x.T @ x
    torch.testing.assert_close(target_weights(dense, moment, moment), dense)


def test_matrices_of_a_stack_are_on_their_own_and_one_without_inputs_stays() -> None:
    dense, x = drawn(2, OUTPUTS, INPUTS), drawn(ROWS, INPUTS, seed=1)
    y = x + 0.3 * drawn(ROWS, INPUTS, seed=2)
    nothing = torch.zeros(INPUTS, INPUTS, dtype=torch.float64)
    found = target_weights(dense, torch.stack([y.T @ y, nothing]), torch.stack([x.T @ y, nothing]))
    torch.testing.assert_close(found[0], target_weights(dense[0], y.T @ y, x.T @ y))
    assert torch.equal(found[1], dense[1])


@pytest.mark.parametrize("stack", [(), (2,)])
def test_targets_lie_in_memory_as_their_shape_says(stack: tuple[int, ...]) -> None:
    x = drawn(*stack, ROWS, INPUTS)
    moment = x.mT @ x
    found = target_weights(drawn(*stack, INPUTS, OUTPUTS, seed=1), moment, moment, input_dim=-2)
    assert found.shape == (*stack, INPUTS, OUTPUTS)
    assert found.is_contiguous()


def test_fewer_rows_than_inputs_have_a_target_without_damping() -> None:
    dense, x = drawn(OUTPUTS, INPUTS).float(), drawn(2, INPUTS, seed=1).float()
    found = target_weights(dense, x.T @ x, x.T @ x, damp=0.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found @ x.T, dense @ x.T, rtol=1e-4, atol=1e-4)


def test_what_is_no_moment_is_refused() -> None:
    dense, eye = torch.ones(OUTPUTS, INPUTS), torch.eye(INPUTS)
    with pytest.raises(ShapeMismatchError, match="mixed moment of shape"):
        target_weights(dense, eye, torch.eye(INPUTS + 1))
    with pytest.raises(ShapeMismatchError, match="residual has shape"):
        target_weights(dense, eye, eye, torch.ones(INPUTS, OUTPUTS))
    with pytest.raises(SparsityError, match="holds NaN or infinity"):
        target_weights(dense, eye * torch.inf, eye)
    with pytest.raises(SparsityError, match="directions of negative energy"):
        target_weights(dense, torch.diag(torch.tensor([1.0, 1.0, 1.0, 1.0, -9.0])), eye)
