"""Matrices with gradients: what is minimized is tr(G D H D^T), for any scope, and is told in both metrics."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import (
    BlockSpec,
    Matrix,
    ScopeCoupling,
    ScopeSpec,
    ShapeMismatchError,
    SparseScope,
    SparsityError,
    admm,
    keep_rows,
    projection,
    refit,
)
from sparseprune.engine import errors_of
from sparseprune.engine.matrices import scaled
from sparseprune.engine.reconstruction import _Eigenbases, _Eigenbasis
from tests.engine.devices import on_every_device
from tests.engine.reconstruction.oracle import (
    among_zeros,
    gradients_of,
    loss_objective,
    loss_solved,
    moments,
    objective,
)
from tests.engine.reconstruction.test_alternating import (
    SIZE,
    STRUCTURES,
    competing_in_two,
    two_of_four,
)

Structure = Callable[[list[torch.Tensor]], tuple[SparseScope, int]]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def drawn(
    rows: int, features: int, seed: int, *, dtype: torch.dtype = torch.float32, samples: int = 64
) -> tuple[Matrix, torch.Tensor]:
    """A matrix with correlated inputs and gradients, and a mask that keeps about half."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, features, generator=generator).to(dtype)
    mask = torch.rand(rows, features, generator=generator) < 0.5
    inputs = moments(features, samples, generator)
    return Matrix(dense, inputs, gradients=moments(rows, samples, generator)), mask


def masked(matrix: Matrix, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, matrix.dense.double(), 0.0)


def without(matrix: Matrix) -> Matrix:
    """The same matrix without gradients."""
    return Matrix(matrix.dense, matrix.moment, matrix.input_dim, matrix.fixed)


def searched(given: list[Matrix], structure: Structure, **options: float) -> list[torch.Tensor]:
    """The weights that `admm` finds in a structure."""
    params = [torch.empty(one.dense.shape, dtype=one.work_dtype, device=one.dense.device) for one in given]
    found = admm(given, projection(*structure(params), params), damp=options.get("damp", 0.01))
    for one in found:
        assert not one.weights[~one.mask].any()
    return [one.weights for one in found]


# Refitting.


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 8),
    features=st.integers(1, 10),
    samples=st.integers(2, 40),
    seed=st.integers(0, 99),
    damp=st.sampled_from([0.001, 0.01, 0.3]),
)
def test_agrees_with_one_exact_solve_of_the_whole_matrix(
    rows: int, features: int, samples: int, seed: int, damp: float
) -> None:
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-8)):
        matrix, mask = drawn(rows, features, seed, dtype=dtype, samples=samples)
        wanted = loss_solved(matrix, mask, (damp, 0.1))
        found = refit(matrix, mask, damp=damp)
        assert found.dtype == dtype
        assert not found[~mask].any()
        least, reached, most = (
            loss_objective(one, matrix, (damp, 0.1)) for one in (wanted, found, torch.zeros_like(found))
        )
        assert reached <= least * (1 + tolerance) + 1e-9 * most
    # It loses no more than the mask alone by moments as they are, or else it would be that.
    if loss_objective(wanted, matrix, (0, 0)) < loss_objective(masked(matrix, mask), matrix, (0, 0)):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("samples", [1, 4, 64])
def test_no_matrix_gets_worse_than_under_the_mask_alone_also_once_it_is_rounded(
    dtype: torch.dtype, samples: int
) -> None:
    for seed in range(10):
        matrix, mask = drawn(8, 16, seed, dtype=dtype, samples=samples)
        before = loss_objective(masked(matrix, mask), matrix, (0, 0))
        after = loss_objective(refit(matrix, mask), matrix, (0, 0))
        assert after <= before * (1 + 1e-9)
        assert samples < 64 or after < 0.6 * before
        in_outputs = loss_objective(refit(without(matrix), mask), matrix, (0, 0))
        assert samples < 64 or after < in_outputs


def test_rows_make_up_for_each_other_also_one_that_lost_nothing() -> None:
    matrix, mask = drawn(6, 16, 5)
    mask[1], mask[2] = True, False
    found = refit(matrix, mask)
    assert not torch.equal(found[1], matrix.dense[1])
    assert torch.equal(found[2].view(torch.int32), torch.zeros(16, dtype=torch.int32))
    matrix.dense[1, 3] = -0.0
    everything = refit(matrix, torch.ones_like(mask))
    assert torch.equal(everything.view(torch.int32), matrix.dense.view(torch.int32))


def test_a_start_that_is_better_than_what_is_found_is_kept() -> None:
    matrix, mask = drawn(6, 12, 3, dtype=torch.float64)
    best = refit(matrix, mask)
    again = refit(matrix, mask, start=best, max_iter=1)
    # No more than float64 can tell: the two take their sums in unlike orders.
    assert loss_objective(again, matrix) <= loss_objective(best, matrix) * (1 + 1e-12)
    worse = refit(matrix, mask, start=best + 1e-3 * mask, max_iter=1)
    assert loss_objective(worse, matrix) > loss_objective(best, matrix) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [-900, -121, 40, 900])
def test_powers_of_two_of_the_gradients_do_not_show(dtype: torch.dtype, power: int) -> None:
    matrix, mask = drawn(8, 16, 4, dtype=dtype)
    wide = Matrix(matrix.dense, matrix.moment.double(), gradients=gradients_of(matrix).double())
    other = Matrix(wide.dense, wide.moment, gradients=gradients_of(wide) * 4.0 ** (power // 2))
    assert torch.equal(refit(other, mask), refit(wide, mask))
    assert errors_of(other, matrix.dense * mask) == errors_of(wide, matrix.dense * mask)


@pytest.mark.parametrize("factor", [1.0, 1e-7])
def test_gradients_that_are_all_alike_and_uncorrelated_change_nothing(factor: float) -> None:
    for seed in range(4):
        matrix, mask = drawn(8, 16, seed, dtype=torch.float64)
        alike = Matrix(matrix.dense, matrix.moment, gradients=factor * torch.eye(8))
        torch.testing.assert_close(refit(alike, mask), refit(without(matrix), mask), rtol=1e-5, atol=1e-6)


def test_where_all_rows_share_their_support_gradients_change_nothing() -> None:
    matrix, mask = drawn(8, 16, 2)
    shared = mask[:1].expand(8, 16)
    torch.testing.assert_close(refit(matrix, shared), refit(without(matrix), shared))
    wanted = loss_solved(matrix, shared)
    assert torch.allclose(refit(matrix, shared).double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_directions_without_energy_make_no_weight_large(dtype: torch.dtype, damp: float) -> None:
    """Gradients of few tokens: of rank 1 and 4, an output that has none and two that have the same."""
    for tokens in (1, 4):
        generator = torch.Generator().manual_seed(tokens)
        gradients, inputs = (torch.randn(tokens, 24, generator=generator) for _ in range(2))
        for one in (gradients, inputs):
            one[:, 3] = 0
            one[:, 7] = one[:, 6]
        dense = torch.randn(24, 24, generator=generator).to(dtype)
        mask = torch.rand(24, 24, generator=generator) < 0.5
        matrix = Matrix(dense, inputs.T @ inputs, gradients=gradients.T @ gradients)
        found = refit(matrix, mask, damp=damp)
        assert found.double().abs().max() < 300  # of some inputs there is little
        after, before = (loss_objective(one, matrix, (0, 0)) for one in (found, masked(matrix, mask)))
        assert after < 0.2 * before
        (best,) = searched([matrix], lambda params: (ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), 2))
        assert best.double().abs().max() < 300  # of some inputs there is little
        assert loss_objective(best, matrix, (0, 0)) < 0.2 * before


def test_a_matrix_of_whose_gradients_nothing_is_known_is_rebuilt_by_its_outputs() -> None:
    matrix, mask = drawn(6, 16, 5, dtype=torch.float64)
    unknown = Matrix(matrix.dense, matrix.moment, gradients=torch.zeros(6, 6))
    found = refit(unknown, mask)
    torch.testing.assert_close(found, refit(without(matrix), mask), rtol=1e-5, atol=1e-6)
    (searched_one,) = searched([unknown], lambda params: (ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), 2))
    lost = errors_of(unknown, searched_one)
    assert lost.loss == (0.0,)
    assert 0 < lost.outputs[0] < errors_of(unknown, masked(matrix, mask)).outputs[0]


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_matrix_of_whose_inputs_nothing_is_known_is_masked_alone(damp: float) -> None:
    matrix, mask = drawn(6, 16, 5)
    gradients = torch.stack([gradients_of(matrix)] * 2)
    stack = Matrix(
        matrix.dense.expand(2, 6, 16), torch.stack([0 * matrix.moment, matrix.moment]), gradients=gradients
    )
    assert stack.unseen == [0]
    found = refit(stack, mask.expand(2, 6, 16), damp=damp)
    assert torch.equal(found[0], masked(matrix, mask).float())
    torch.testing.assert_close(found[1], refit(matrix, mask, damp=damp), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_fixed_weights_stay_and_the_others_know_it(shared: bool) -> None:
    matrix, mask = drawn(8, 16, 6)
    fixed = (torch.arange(16) < 5).expand(8, 16)
    kept = (mask[:1].expand(8, 16) if shared else mask) | fixed
    given = Matrix(matrix.dense, matrix.moment, fixed=fixed, gradients=matrix.gradients)
    found = refit(given, kept)
    assert torch.equal(found[fixed], matrix.dense[fixed])
    wanted = loss_objective(loss_solved(given, kept), given)
    assert loss_objective(found, given) <= wanted * (1 + 1e-3)


@on_every_device
def test_inputs_along_the_first_dimension_are_the_same_problem_turned(device: str) -> None:
    matrix, mask = drawn(10, 16, 1)
    dense, moment, gradients = (one.to(device) for one in (matrix.dense, matrix.moment, gradients_of(matrix)))
    straight = refit(Matrix(dense, moment, gradients=gradients), mask.to(device))
    turned = refit(Matrix(dense.T, moment, 0, gradients=gradients), mask.T.to(device))
    torch.testing.assert_close(turned, straight.T, rtol=1e-3, atol=1e-4)
    assert turned.is_contiguous()


@pytest.mark.parametrize("input_dim", [-1, 1])
def test_a_stack_is_solved_as_its_matrices_one_by_one(input_dim: int) -> None:
    each = [drawn(10, 14, seed, dtype=torch.float64) for seed in range(3)]
    stack = torch.stack([one.dense for one, _ in each])
    masks = torch.stack([mask for _, mask in each])
    moment = torch.stack([one.moment for one, _ in each])
    gradients = torch.stack([gradients_of(one) for one, _ in each])
    if input_dim == 1:
        found = refit(Matrix(stack.mT, moment, 1, gradients=gradients), masks.mT).mT
    else:
        found = refit(Matrix(stack, moment, gradients=gradients), masks)
    for number, (one, mask) in enumerate(each):
        torch.testing.assert_close(found[number], refit(one, mask), rtol=1e-5, atol=1e-6)


# Gradients in groups of outputs.


def grouped(matrix: Matrix, groups: int) -> tuple[Matrix, Matrix]:
    """The matrix with diagonal blocks of its gradients, and with the same among zeros."""
    full = gradients_of(matrix)
    size = len(full) // groups
    blocks = torch.stack([full[at : at + size, at : at + size] for at in range(0, len(full), size)])
    mine = Matrix(matrix.dense, matrix.moment, fixed=matrix.fixed, gradients=blocks)
    return mine, Matrix(matrix.dense, matrix.moment, fixed=matrix.fixed, gradients=among_zeros(blocks))


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("fix", [False, True])
def test_diagonal_blocks_are_the_same_problem_as_all_of_the_gradients_with_zeros_between(
    groups: int, fix: bool
) -> None:
    matrix, mask = drawn(8, 16, groups, dtype=torch.float64)
    if fix:
        fixed = torch.arange(16).expand(8, 16) < 4
        matrix = Matrix(matrix.dense, matrix.moment, fixed=fixed, gradients=matrix.gradients)
        mask = mask | fixed
    blocks, full = grouped(matrix, groups)
    found = refit(blocks, mask)
    torch.testing.assert_close(found, refit(full, mask), rtol=1e-9, atol=1e-9)
    least = loss_objective(loss_solved(full, mask), full)
    assert loss_objective(found, blocks) == pytest.approx(least, rel=1e-6)
    mine, wanted = (searched([one], two_of_four)[0] for one in (blocks, full))
    torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)
    for one in (found, mine):
        mine_told, wanted_told = errors_of(blocks, one), errors_of(full, one)
        assert mine_told.loss == pytest.approx(wanted_told.loss)
        assert mine_told.outputs == pytest.approx(wanted_told.outputs)
    params = [torch.empty(8, 16, dtype=torch.float64)]
    rows = projection(ScopeSpec(BlockSpec(params[0], (1, -1)), ()), 5, params)
    (kept,), (kept_of_full,) = keep_rows([blocks], rows), keep_rows([full], rows)
    assert torch.equal(kept.mask, kept_of_full.mask)


@pytest.mark.parametrize("input_dim", [-1, 1])
def test_diagonal_blocks_of_a_stack_are_solved_as_those_of_its_matrices_one_by_one(input_dim: int) -> None:
    each = [(grouped(matrix, 3)[0], mask) for matrix, mask in (drawn(12, 8, seed) for seed in range(3))]
    stack, moment, gradients = (
        torch.stack([getattr(one, name).double() for one, _ in each])
        for name in ("dense", "moment", "gradients")
    )
    masks = torch.stack([mask for _, mask in each])
    if input_dim == 1:
        found = refit(Matrix(stack.mT, moment, 1, gradients=gradients), masks.mT).mT
    else:
        found = refit(Matrix(stack, moment, gradients=gradients), masks)
    for number, (one, mask) in enumerate(each):
        alone = refit(Matrix(stack[number], one.moment.double(), gradients=gradients[number]), mask)
        torch.testing.assert_close(found[number], alone, rtol=1e-5, atol=1e-6)


def test_groups_of_which_one_has_no_gradients_share_the_damping_of_the_whole_matrix() -> None:
    matrix, mask = drawn(8, 16, 5, dtype=torch.float64)
    blocks, _ = grouped(matrix, 2)
    silent = (blocks.gradients if blocks.gradients is not None else torch.empty(0)).clone()
    silent[1] = 0
    given = Matrix(matrix.dense, matrix.moment, gradients=silent)
    full = Matrix(matrix.dense, matrix.moment, gradients=among_zeros(silent))
    torch.testing.assert_close(refit(given, mask), refit(full, mask), rtol=1e-6, atol=1e-6)
    assert errors_of(given, masked(matrix, mask)).loss == pytest.approx(
        errors_of(full, masked(matrix, mask)).loss
    )


# The support as an unknown.


def pair(count: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Matrix]:
    each = [drawn(SIZE, SIZE, 10 * seed + number, samples=200)[0] for number in range(count)]
    return [
        Matrix(one.dense.to(device, dtype), one.moment.to(device), gradients=gradients_of(one).to(device))
        for one in each
    ]


IN_EITHER = [
    (structure, (torch.float32, torch.bfloat16)[number % 2]) for number, structure in enumerate(STRUCTURES)
]
"""Every structure in one dtype; `test_alternating` has them in both."""


@on_every_device
@pytest.mark.parametrize(
    ("structure", "dtype"), IN_EITHER, ids=lambda one: getattr(one, "__name__", str(one))
)
def test_keeps_exactly_nnz_in_every_scope_and_loses_less_than_what_saves_outputs(
    structure: Structure, dtype: torch.dtype, device: str
) -> None:
    mine, outputs, first = [], [], []
    for seed in range(3):
        given = pair(STRUCTURES[structure], seed, dtype, device)
        params = [torch.empty(SIZE, SIZE, device=device) for _ in given]
        scope, nnz = structure(params)
        project = projection(scope, nnz, params)
        found = admm(given, project)
        for param, one in zip(params, found, strict=True):
            param.copy_(one.mask)
        assert ((scope.block_norms() > 0).sum(-1) == nnz).all()
        masks = [one.clone() for one in project([scaled(one, 0.01).dense[0] for one in given])]
        others = admm([without(one) for one in given], project)
        mine.append(sum(lost(*one) for one in zip(given, [one.weights for one in found], strict=True)))
        outputs.append(sum(lost(*one) for one in zip(given, [one.weights for one in others], strict=True)))
        first.append(
            sum(lost(matrix, refit(matrix, mask)) for matrix, mask in zip(given, masks, strict=True))
        )
    assert sum(mine) < 0.99 * sum(outputs)  # of columns gradients change the choice alone
    assert sum(mine) < sum(first)


def lost(matrix: Matrix, weights: torch.Tensor) -> float:
    on_cpu = Matrix(matrix.dense.cpu(), matrix.moment.cpu(), gradients=gradients_of(matrix).cpu())
    return loss_objective(weights.cpu(), on_cpu)


@pytest.mark.parametrize(
    ("structure", "dtype"), IN_EITHER, ids=lambda one: getattr(one, "__name__", str(one))
)
def test_weights_that_are_sparse_already_keep_every_bit(structure: Structure, dtype: torch.dtype) -> None:
    given = pair(STRUCTURES[structure], 3, dtype)
    first = searched(given, structure)
    again = searched(
        [
            Matrix(one, matrix.moment, gradients=matrix.gradients)
            for one, matrix in zip(first, given, strict=True)
        ],
        structure,
    )
    for once, twice in zip(first, again, strict=True):
        assert once.view(torch.int16).equal(twice.view(torch.int16))


def test_what_is_found_is_the_refit_of_its_own_support() -> None:
    (matrix,) = pair(1, 7)
    (found,) = searched([matrix], two_of_four)
    again = refit(matrix, found != 0)
    assert lost(matrix, found) == pytest.approx(lost(matrix, again), rel=1e-3)


def test_comes_close_to_the_best_of_all_supports() -> None:
    """Where all of them can be tried: 5 of 10 weights in two rows that make up for each other."""
    ratios = []
    for seed in range(10):
        matrix, _ = drawn(2, 5, seed, samples=20)
        params = [torch.empty(2, 5)]
        (found,) = admm([matrix], projection(ScopeSpec(BlockSpec(params[0], (1, 1)), ()), 5, params))
        every = []
        for kept in combinations(range(10), 5):
            mask = torch.zeros(10, dtype=torch.bool)
            mask[list(kept)] = True
            every.append(loss_objective(loss_solved(matrix, mask.reshape(2, 5)), matrix))
        mine = lost(matrix, found.weights)
        assert mine >= 0.999 * min(every)
        ratios.append(mine / min(every))
    assert sum(ratio < 1.01 for ratio in ratios) >= 3
    assert sorted(ratios)[len(ratios) // 2] < 1.5


def test_the_proposal_is_that_of_one_system_of_the_whole_matrix() -> None:
    """In the eigenbases of both moments, against the Kronecker product itself."""
    matrix, _ = drawn(5, 7, 2, dtype=torch.float64)
    problem = scaled(matrix, 0.01)
    if problem.gradients is None:
        raise TypeError("the matrix has gradients")
    pulled = torch.randn(1, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pull = _Eigenbases(problem.gradients, _Eigenbasis(problem.hessian))
    system = torch.kron(problem.gradients.hessian[0, 0], problem.hessian[0])
    for penalty in (0.03, 1.0, 50.0):
        pull.prepare(penalty)
        damped = system + penalty * torch.eye(35, dtype=torch.float64)
        wanted = penalty * torch.linalg.solve(damped, pulled.reshape(-1))
        torch.testing.assert_close(pull(pulled, torch.empty_like(pulled)).reshape(-1), wanted)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.__name__)
def test_uncorrelated_inputs_and_gradients_leave_survivors_their_bits(structure: Structure) -> None:
    generator = torch.Generator().manual_seed(1)
    dense = [torch.randn(SIZE, SIZE, generator=generator) for _ in range(STRUCTURES[structure])]
    energies = [torch.rand(2, SIZE, generator=generator) + 0.1 for _ in dense]
    given = [
        Matrix(one, inputs.diag(), gradients=gradients.diag())
        for one, (inputs, gradients) in zip(dense, energies, strict=True)
    ]
    params = [torch.empty(SIZE, SIZE) for _ in dense]
    scope, nnz = structure(params)
    project = projection(scope, nnz, params)
    # Damped by means that are nearly alike, which does not change the order of what is far enough apart.
    masks = [one.clone() for one in project([scaled(one, 0.01).dense[0] for one in given])]
    for one, mask, found in zip(dense, masks, searched(given, structure), strict=True):
        assert torch.equal(found.view(torch.int32), torch.where(mask, one, 0.0).view(torch.int32))


def test_matrices_compete_in_units_of_the_loss() -> None:
    """The matrix whose outputs the loss answers to keeps more, however large the outputs of the other."""
    matrix, _ = drawn(SIZE, SIZE, 1)
    near = Matrix(matrix.dense, torch.eye(SIZE), gradients=100 * torch.eye(SIZE))
    far = Matrix(matrix.dense, 9 * torch.eye(SIZE), gradients=torch.eye(SIZE))
    found = searched([near, far], competing_in_two)
    squares = torch.cat([(matrix.dense.square() * of).reshape(-1) for of in (100.0, 9.0)])
    kept = torch.cat([(one != 0).reshape(-1) for one in found])
    assert set(squares.topk(900).indices.tolist()) == set(kept.nonzero().reshape(-1).tolist())
    correlated = [
        Matrix(near.dense, matrix.moment, gradients=100 * gradients_of(matrix)),
        Matrix(far.dense, 9 * matrix.moment, gradients=gradients_of(matrix)),
    ]
    mine, theirs = ([int((one != 0).sum()) for one in searched(given, competing_in_two)] for given in (
        correlated, [without(one) for one in correlated]
    ))  # fmt: skip
    assert mine[0] > 2 * mine[1]
    assert theirs[1] > 1.5 * theirs[0]


def test_whole_rows_are_chosen_by_what_the_loss_answers_to_them() -> None:
    given = [drawn(4, 12, seed)[0] for seed in (3, 4)]
    params = [torch.empty(4, 12) for _ in given]
    rows = [ScopeSpec(BlockSpec(param, (1, -1)), ()) for param in params]
    found = keep_rows(given, projection(ScopeCoupling(rows, [(0, 1), (0, 1)]), 5, params))
    costs = []
    for matrix in given:
        outer = gradients_of(matrix).diagonal()
        alone = objective(torch.zeros(4, 12), matrix.dense, matrix.moment)
        costs += [cost * float(one + 0.1 * outer.mean()) for cost, one in zip(alone, outer, strict=True)]
    alive = torch.cat([one.mask.all(1) for one in found])
    assert set(alive.nonzero().reshape(-1).tolist()) == set(torch.tensor(costs).topk(5).indices.tolist())
    for one, matrix in zip(found, given, strict=True):
        assert torch.equal(one.weights, torch.where(one.mask, matrix.dense, 0.0))


def test_experts_that_do_not_compete_are_solved_as_one_by_one() -> None:
    each = [drawn(24, SIZE, seed, samples=100)[0] for seed in range(3)]
    stack = Matrix(
        torch.stack([one.dense for one in each]),
        torch.stack([one.moment for one in each]),
        gradients=torch.stack([gradients_of(one) for one in each]),
    )
    params = [torch.empty(3, 24, SIZE)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, 1, 1)), (1, 1, 4)), 2, params)
    (found,) = admm([stack], project, joint=False)
    shares = errors_of(stack, found.weights).loss or ()
    for number, one in enumerate(each):
        (alone,) = searched([one], two_of_four)
        assert (found.mask[number] != (alone != 0)).float().mean() < 0.02
        assert lost(one, found.weights[number]) == pytest.approx(lost(one, alone), rel=0.02)
        assert shares[number] == pytest.approx((errors_of(one, found.weights[number]).loss or ())[0])


def test_what_lies_outside_of_all_views_stays_and_is_reckoned_with() -> None:
    (matrix,) = pair(1, 5)
    fixed = (torch.arange(SIZE) >= 16).expand(SIZE, SIZE)
    given = Matrix(matrix.dense, matrix.moment, fixed=fixed, gradients=matrix.gradients)
    (found,) = searched([given], two_of_four)
    assert torch.equal(found[fixed], matrix.dense[fixed])
    assert ((found[:, :16] != 0).reshape(-1, 4).sum(1) == 2).all()
    assert lost(given, found) == pytest.approx(lost(given, refit(given, found != 0)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bytes_also_where_others_are_solved_beside_it_and_nearly_so_with_more_threads(
    dtype: torch.dtype,
) -> None:
    """Sums of products depend on how many threads of torch share them, on nothing else."""
    given = pair(1, 2, dtype)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with ThreadPoolExecutor(3) as pool:
                alike = list(pool.map(lambda _: searched(given, two_of_four)[0], range(3)))
            assert all(torch.equal(one, alike[0]) for one in alike)
            found.append(alike[0])
    finally:
        torch.set_num_threads(threads)
    for one in found[1:]:
        assert ((one != 0) != (found[0] != 0)).float().mean() < 0.02
        assert lost(given[0], one) == pytest.approx(lost(given[0], found[0]), rel=0.02)


@pytest.mark.parametrize("calls", [1, 5, 15])
def test_the_search_ends_where_what_is_called_between_iterations_raises(calls: int) -> None:
    found: list[int] = []

    def between() -> None:
        found.append(1)
        if len(found) == calls:
            raise KeyboardInterrupt

    (matrix,) = pair(1, 3)
    params = [torch.empty_like(matrix.dense)]
    project = projection(*two_of_four(params), params)
    with pytest.raises(KeyboardInterrupt):
        admm([matrix], project, between=between)
    assert len(found) == calls
    admm([matrix], project, between=between)
    assert len(found) > calls + 15


# What is told and what is refused.


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_are_told_in_both_metrics_and_which_of_them_was_minimized(dtype: torch.dtype) -> None:
    matrix, mask = drawn(8, 16, 1, dtype=dtype)
    found = refit(matrix, mask)
    told, plain = errors_of(matrix, found), errors_of(without(matrix), found)
    nothing = torch.zeros(8, 16)
    outputs, whole = (sum(objective(one, matrix.dense, matrix.moment, 0.0)) for one in (found, nothing))
    assert told.outputs == pytest.approx([(outputs / whole) ** 0.5])
    loss, most = (loss_objective(one, matrix, (0, 0)) for one in (found, nothing))
    assert told.loss == pytest.approx([(loss / most) ** 0.5])
    assert (told.metric, plain.metric, plain.loss) == ("loss", "outputs", None)
    assert plain.outputs == pytest.approx(told.outputs)
    assert errors_of(matrix, matrix.dense).loss == errors_of(matrix, matrix.dense).outputs == (0.0,)


def no_gradients() -> dict[str, torch.Tensor]:
    """What comes near a second moment of the gradients of 6 outputs, and is none."""
    moment = moments(6, 40, torch.Generator().manual_seed(0))
    lopsided, indefinite, unknown, negative = (moment.clone() for _ in range(4))
    lopsided[2, 5] += 0.1
    indefinite[0, 1] = indefinite[1, 0] = 2 * (moment[0, 0] * moment[1, 1]).sqrt()
    unknown[1, 1] = torch.nan
    negative[4, 4] = -1
    return {
        "gradients is none: it is not symmetric": lopsided,
        "gradients is none: it has directions of negative energy": indefinite,
        "gradients holds NaN or infinity": unknown,
        "gradients has a negative diagonal": negative,
    }


@pytest.mark.parametrize("text", no_gradients())
def test_what_is_no_second_moment_of_gradients_is_refused(text: str) -> None:
    dense, inputs = torch.ones(6, 4), torch.eye(4)
    Matrix(dense, inputs, gradients=moments(6, 40, torch.Generator().manual_seed(0)))
    with pytest.raises(SparsityError, match=text):
        Matrix(dense, inputs, gradients=no_gradients()[text])
    with pytest.raises(SparsityError, match=text):
        Matrix(dense.expand(2, 6, 4), inputs.expand(2, 4, 4), gradients=no_gradients()[text].expand(2, 6, 6))
    groups = torch.stack([torch.eye(6), no_gradients()[text]])
    with pytest.raises(SparsityError, match=text):
        Matrix(torch.ones(12, 4), inputs, gradients=groups)


@pytest.mark.parametrize(
    ("dense", "input_dim", "legal", "wrong"),
    [
        ((3, 4), -1, (3, 3), (4, 4)),
        ((3, 4), 0, (4, 4), (3, 3)),
        ((2, 3, 4), -1, (2, 3, 3), (3, 3)),
        ((2, 3, 4), 1, (2, 4, 4), (2, 3, 3)),
        ((6, 4), -1, (2, 3, 3), (3, 3, 3)),
        ((6, 4), 0, (2, 2, 2), (2, 3, 3)),
        ((7, 4), -1, (7, 1, 1), (2, 3, 3)),
        ((2, 6, 4), -1, (2, 2, 3, 3), (2, 3, 3)),
        ((2, 6, 4), 1, (2, 1, 4, 4), (2, 0, 4, 4)),
    ],
)
def test_gradients_lie_along_the_outputs(
    dense: tuple[int, ...], input_dim: int, legal: tuple[int, ...], wrong: tuple[int, ...]
) -> None:
    features = dense[input_dim]
    moment = torch.eye(features).expand(*dense[:-2], features, features)
    eye = torch.eye(legal[-1]).expand(legal)
    assert Matrix(torch.ones(dense), moment, input_dim, gradients=eye).metric == "loss"
    with pytest.raises(ShapeMismatchError, match=r"a second moment of gradients of shape .* wanted \["):
        Matrix(torch.ones(dense), moment, input_dim, gradients=torch.zeros(wrong))


def test_matrices_with_gradients_and_without_do_not_compete() -> None:
    one, two = pair(2, 0)
    params = [torch.empty(SIZE, SIZE) for _ in range(2)]
    project = projection(*competing_in_two(params), params)
    admm([one, two], project, effort="fast")
    with pytest.raises(
        SparsityError, match="1 of 2 matrices that compete have gradients: wanted all or none"
    ):
        admm([one, without(two)], project)


def test_no_rows_and_no_inputs_are_no_problem() -> None:
    none = torch.zeros(0, 0)
    for dense, moment, gradients in (
        (torch.zeros(0, 4), torch.eye(4), none),
        (torch.zeros(3, 0), none, torch.eye(3)),
    ):
        matrix = Matrix(dense, moment, gradients=gradients)
        assert refit(matrix, torch.ones_like(dense, dtype=torch.bool)).shape == dense.shape
        assert errors_of(matrix, dense).loss == (0.0,)
