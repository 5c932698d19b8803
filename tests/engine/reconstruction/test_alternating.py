"""`admm`: exact budgets for any scope or coupling, better than a refit of the best weights alone."""

from collections.abc import Callable

import pytest
import torch

from sparseprune import (
    BlockCoupling,
    BlockSpec,
    Matrix,
    ScopeCoupling,
    ScopeSpec,
    SparseScope,
    SparsityError,
    View,
    admm,
    keep_rows,
    projection,
    refit,
)
from tests.engine.devices import on_every_device
from tests.engine.reconstruction.oracle import best_support, moments, objective

SIZE = 32  # of all square matrices here


def two_of_four(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), 2


def whole_rows(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (1, 1)), (1, -1)), 12


def all_together(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (1, 1)), ()), 400


def columns(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (-1, 1)), ()), 20


def blocks_of_eight(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """8 columns as a block, coupled over pairs of rows 16 apart."""
    view = View.rearrange(params[0], "(r p) (c b) -> r c p b", p=2, b=8)
    return ScopeSpec(BlockSpec(view, (1, 1, 2, 8)), (1, 2)), 1


def pairs_of_columns(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (1, 2)), (1, 8)), 4


def fused_over_two(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """A column of the first with a column of the second."""
    blocks = [BlockSpec(param, (-1, 1)) for param in params]
    return ScopeSpec(BlockCoupling(blocks, [(0, 1), (0, 1)]), ()), 20


def competing_in_two(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    scopes = [ScopeSpec(BlockSpec(param, (1, 1)), ()) for param in params]
    return ScopeCoupling(scopes, [(0, 1), (0, 1)]), 900


STRUCTURES: dict[Callable[[list[torch.Tensor]], tuple[SparseScope, int]], int] = {
    two_of_four: 1, whole_rows: 1, all_together: 1, columns: 1, blocks_of_eight: 1, pairs_of_columns: 1,
    fused_over_two: 2, competing_in_two: 2,
}  # fmt: skip


def matrices(count: int, seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Matrix]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Matrix(
            torch.randn(SIZE, SIZE, generator=generator).to(device, dtype),
            moments(SIZE, 200, generator).to(device),
        )
        for _ in range(count)
    ]


def scale_of(matrix: Matrix, damp: float = 0.01) -> torch.Tensor:
    diagonal = matrix.moment.diagonal()
    return (diagonal + damp * diagonal.mean()).sqrt()


@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.__name__)
def test_keeps_exactly_nnz_in_every_scope_and_beats_a_refit(
    structure: Callable[[list[torch.Tensor]], tuple[SparseScope, int]], dtype: torch.dtype, device: str
) -> None:
    count = STRUCTURES[structure]
    better = 0
    for seed in range(6):
        given = matrices(count, seed, dtype, device)
        params = [torch.empty(SIZE, SIZE, device=device) for _ in given]
        scope, nnz = structure(params)
        project = projection(scope, nnz, params)
        found = admm(given, project)
        for param, one in zip(params, found, strict=True):
            param.copy_(one.mask)
        survivors = scope.block_norms() > 0
        assert (survivors.sum(-1) == nnz).all()
        for one in found:
            assert one.weights.dtype == dtype
            assert not one.weights[~one.mask].any()
        masks = [one.clone() for one in project([one.dense.float() * scale_of(one) for one in given])]
        refitted = [refit(matrix, mask) for matrix, mask in zip(given, masks, strict=True)]
        pairs = list(zip(given, found, refitted, strict=True))
        mine = sum(sum(losses(matrix, one.weights)) for matrix, one, _ in pairs)
        theirs = sum(sum(losses(matrix, other)) for matrix, _, other in pairs)
        assert mine <= 1.02 * theirs
        better += mine < 0.99 * theirs
    assert better >= 3  # few blocks leave little to choose: sometimes the first choice is as good


def losses(matrix: Matrix, weights: torch.Tensor) -> list[float]:
    return objective(weights.cpu(), matrix.dense.cpu(), matrix.moment.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.__name__)
def test_weights_that_are_sparse_already_keep_every_bit(
    structure: Callable[[list[torch.Tensor]], tuple[SparseScope, int]], dtype: torch.dtype
) -> None:
    given = matrices(STRUCTURES[structure], 3, dtype)
    params = [torch.empty(SIZE, SIZE) for _ in given]
    scope, nnz = structure(params)
    project = projection(scope, nnz, params)
    first = admm(given, project)
    again = admm(
        [Matrix(one.weights, matrix.moment) for one, matrix in zip(first, given, strict=True)], project
    )
    for once, twice in zip(first, again, strict=True):
        assert torch.equal(once.mask, twice.mask)
        assert once.weights.view(torch.int16).equal(twice.weights.view(torch.int16))


def test_what_is_found_is_the_refit_of_its_own_support() -> None:
    (matrix,) = matrices(1, 7)
    params = [torch.empty(SIZE, SIZE)]
    (found,) = admm([matrix], projection(*two_of_four(params), params))
    again = refit(matrix, found.mask)
    assert sum(losses(matrix, found.weights)) == pytest.approx(sum(losses(matrix, again)), rel=1e-3)


def test_comes_close_to_the_best_of_all_supports() -> None:
    """Where all of them can be tried: often it is the best one, and rarely far from it."""
    ratios = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        dense = torch.randn(1, 10, generator=generator)
        matrix = Matrix(dense, moments(10, 60, generator))
        params = [torch.empty(1, 10)]
        (found,) = admm([matrix], projection(ScopeSpec(BlockSpec(params[0], (1, 1)), ()), 5, params))
        best = best_support(dense[0], matrix.moment, 5)
        (mine,) = losses(matrix, found.weights)
        assert mine >= 0.999 * best
        ratios.append(mine / best)
    assert sum(ratio < 1.01 for ratio in ratios) >= 5
    assert sorted(ratios)[len(ratios) // 2] < 1.5


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_uncorrelated_inputs_give_the_magnitude_result_bit_for_bit(
    structure: Callable[[list[torch.Tensor]], tuple[SparseScope, int]], factor: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    count = STRUCTURES[structure]
    dense = [torch.randn(SIZE, SIZE, generator=generator).round(decimals=1) for _ in range(count)]
    copies = [one.clone() for one in dense]
    scope, nnz = structure(copies)
    scope.hard_threshold(nnz=nnz)
    params = [torch.empty(SIZE, SIZE) for _ in dense]
    project = projection(*structure(params), params)
    found = admm([Matrix(one, factor * torch.eye(SIZE)) for one in dense], project)
    for one, copy in zip(found, copies, strict=True):
        assert torch.equal(one.weights.view(torch.int32), copy.view(torch.int32))
    for one, weights in zip(found, dense, strict=True):
        refitted = refit(Matrix(weights, factor * torch.eye(SIZE)), one.mask)
        assert torch.equal(refitted.view(torch.int32), one.weights.view(torch.int32))


@pytest.mark.parametrize("nnz", [0, SIZE])
def test_a_budget_of_none_and_one_of_all(nnz: int) -> None:
    (matrix,) = matrices(1, 2)
    params = [torch.empty(SIZE, SIZE)]
    (found,) = admm([matrix], projection(ScopeSpec(BlockSpec(params[0], (1, 1)), (1, -1)), nnz, params))
    wanted = matrix.dense if nnz else torch.zeros(SIZE, SIZE)
    assert torch.equal(found.weights.view(torch.int32), wanted.view(torch.int32))
    assert found.mask.all() == bool(nnz)


def test_a_fixed_mask_is_a_projection_too() -> None:
    (matrix,) = matrices(1, 3)
    mask = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(9)) < 0.4
    (found,) = admm([matrix], lambda _: [mask])
    assert torch.equal(found.mask, mask)
    wanted = refit(matrix, mask)
    assert sum(losses(matrix, found.weights)) == pytest.approx(sum(losses(matrix, wanted)), rel=1e-3)


def test_inputs_along_the_first_dimension_are_the_same_problem_turned() -> None:
    (matrix,) = matrices(1, 4)
    params = [torch.empty(SIZE, SIZE)]
    (found,) = admm([matrix], projection(*two_of_four(params), params))
    turned = [torch.empty(SIZE, SIZE)]
    scope = ScopeSpec(BlockSpec(turned[0], (1, 1)), (4, 1))
    (other,) = admm([Matrix(matrix.dense.T, matrix.moment, 0)], projection(scope, 2, turned))
    assert torch.equal(found.mask.T, other.mask)
    torch.testing.assert_close(found.weights.T, other.weights, rtol=1e-3, atol=1e-4)


def test_experts_that_do_not_compete_are_solved_as_one_by_one() -> None:
    generator = torch.Generator().manual_seed(6)
    dense = torch.randn(4, 24, SIZE, generator=generator)
    moment = moments(SIZE, 100, generator, matrices=4)
    params = [torch.empty(4, 24, SIZE)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, 1, 1)), (1, 1, 4)), 2, params)
    (found,) = admm([Matrix(dense, moment)], project, joint=False)
    for number in range(4):
        own = [torch.empty(24, SIZE)]
        (one,) = admm(
            [Matrix(dense[number], moment[number])],
            projection(ScopeSpec(BlockSpec(own[0], (1, 1)), (1, 4)), 2, own),
        )
        assert (found.mask[number] != one.mask).float().mean() < 0.01
        assert sum(objective(found.weights[number], dense[number], moment[number])) == pytest.approx(
            sum(objective(one.weights, dense[number], moment[number])), rel=0.01
        )


def test_whole_rows_are_chosen_by_what_their_outputs_are() -> None:
    """Against all ways to keep 5 of 8 rows over two matrices, one of which nothing is known about."""
    from itertools import combinations

    generator = torch.Generator().manual_seed(3)
    dense = [torch.randn(4, 12, generator=generator) for _ in range(2)]
    given = [Matrix(one, moments(12, 30, generator)) for one in dense]
    params = [torch.empty(4, 12) for _ in dense]
    rows = [ScopeSpec(BlockSpec(param, (1, -1)), ()) for param in params]
    project = projection(ScopeCoupling(rows, [(0, 1), (0, 1)]), 5, params)
    found = keep_rows(given, project)
    energies = [energy for one in given for energy in objective(torch.zeros(4, 12), one.dense, one.moment)]
    best = max(combinations(range(8), 5), key=lambda kept: sum(energies[one] for one in kept))
    alive = torch.cat([one.mask.all(1) for one in found])
    assert alive.nonzero().reshape(-1).tolist() == list(best)
    for one, weights in zip(found, dense, strict=True):
        assert torch.equal(one.weights, torch.where(one.mask, weights, 0.0))
    unknown = [given[0], Matrix(dense[1] * 100, 0 * given[1].moment)]
    assert [int(one.mask.all(1).sum()) for one in keep_rows(unknown, project)] == [4, 1]


def test_experts_may_compete_as_wholes() -> None:
    generator = torch.Generator().manual_seed(8)
    dense = torch.randn(6, 8, SIZE, generator=generator)
    moment = moments(SIZE, 100, generator, matrices=6) * torch.tensor([1.0, 9, 1, 9, 9, 1]).reshape(6, 1, 1)
    params = [torch.empty(6, 8, SIZE)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, -1, -1)), ()), 3, params)
    (found,) = admm([Matrix(dense, moment)], project)
    assert found.mask.reshape(6, -1).all(1).tolist() == [False, True, False, True, True, False]
    assert torch.equal(found.weights[1], dense[1])


def test_what_lies_outside_of_all_views_stays_and_is_reckoned_with() -> None:
    (matrix,) = matrices(1, 5)
    fixed = (torch.arange(SIZE) >= 16).expand(SIZE, SIZE)
    params = [torch.empty(SIZE, SIZE)]
    view = View(params[0], (SIZE, 16), (SIZE, 1))
    project = projection(ScopeSpec(BlockSpec(view, (1, 1)), (1, 4)), 2, params)
    given = Matrix(matrix.dense, matrix.moment, fixed=fixed)
    (found,) = admm([given], project)
    assert torch.equal(found.weights[fixed], matrix.dense[fixed])
    assert found.mask[fixed].all()
    assert (found.mask[:, :16].reshape(-1, 4).sum(1) == 2).all()
    again = refit(given, found.mask)
    assert sum(losses(matrix, found.weights)) == pytest.approx(sum(losses(matrix, again)), rel=1e-3)


def test_a_projection_needs_the_tensors_that_its_scope_looks_at() -> None:
    scope, nnz = two_of_four([torch.empty(SIZE, SIZE)])
    with pytest.raises(SparsityError, match="looks at none of the tensors"):
        projection(scope, nnz, [torch.empty(SIZE, SIZE)])


def test_a_fast_search_keeps_the_budget_too() -> None:
    (matrix,) = matrices(1, 1)
    params = [torch.empty(SIZE, SIZE)]
    (found,) = admm([matrix], projection(*two_of_four(params), params), effort="fast")
    assert (found.mask.reshape(-1, 4).sum(1) == 2).all()
    assert sum(losses(matrix, found.weights)) > 0


@pytest.mark.parametrize("calls", [1, 5, 15])
def test_the_search_ends_where_what_is_called_between_iterations_raises(calls: int) -> None:
    """In the alternation as well as in the refit that follows it."""
    found: list[int] = []

    def between() -> None:
        found.append(1)
        if len(found) == calls:
            raise KeyboardInterrupt

    def search(between: Callable[[], None]) -> None:
        (matrix,) = matrices(1, 3)
        params = [torch.empty_like(matrix.dense)]
        scope, nnz = two_of_four(params)
        admm([matrix], projection(scope, nnz, params), between=between)

    with pytest.raises(KeyboardInterrupt):
        search(between)
    assert len(found) == calls
    search(between)
    assert len(found) > calls + 15


@pytest.mark.parametrize("damp", [0.0, 1e-8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_tokens_and_no_damping_leave_no_row_worse_than_its_own_mask(
    dtype: torch.dtype, damp: float
) -> None:
    for tokens in (1, 8, 16):
        generator = torch.Generator().manual_seed(tokens)
        inputs = torch.randn(tokens, SIZE, generator=generator)
        inputs[:, 3] = 0
        inputs[:, 7] = inputs[:, 6]
        matrix = Matrix(torch.randn(SIZE, SIZE, generator=generator).to(dtype), inputs.T @ inputs / tokens)
        params = [torch.empty(SIZE, SIZE)]
        (found,) = admm([matrix], projection(*two_of_four(params), params), damp=damp)
        masked = torch.where(found.mask, matrix.dense.double(), 0.0)
        before, after = (objective(one, matrix.dense, matrix.moment, 0.0) for one in (masked, found.weights))
        assert all(now <= then * (1 + 1e-9) for now, then in zip(after, before, strict=True))
        assert sum(after) < 0.05 * sum(before)
        assert found.weights.double().abs().max() < 100


@pytest.mark.parametrize("power", [-900, -120, 120, 900])
def test_powers_of_two_of_weights_and_of_commondo_not_show(power: int) -> None:
    """Also where matrices compete, whose scales must stay what they are to each other."""
    given = matrices(2, 3, torch.float64)
    params = [torch.empty(SIZE, SIZE, dtype=torch.float64) for _ in given]
    project = projection(*competing_in_two(params), params)
    once = admm(given, project)
    scale = 2.0**power
    other = [Matrix(one.dense * scale, one.moment.double() / scale) for one in given]
    for one, two in zip(once, admm(other, project), strict=True):
        assert torch.equal(one.mask, two.mask)
        torch.testing.assert_close(two.weights / scale, one.weights, rtol=1e-6, atol=1e-9)
    chosen = keep_rows(given, project), keep_rows(other, project)
    assert all(torch.equal(one.mask, two.mask) for one, two in zip(*chosen, strict=True))


def test_a_fast_search_loses_more_than_the_best_and_less_than_a_refit() -> None:
    lost = {"best": 0.0, "fast": 0.0, "refit": 0.0}
    for seed in range(4):
        (matrix,) = matrices(1, seed)
        params = [torch.empty(SIZE, SIZE)]
        project = projection(*two_of_four(params), params)
        best, fast = admm([matrix], project), admm([matrix], project, effort="fast")
        (first,) = project([matrix.dense * scale_of(matrix)])
        each = (best[0].weights, fast[0].weights, refit(matrix, first))
        for name, weights in zip(lost, each, strict=True):
            lost[name] += sum(losses(matrix, weights))
    assert lost["best"] < lost["fast"] < lost["refit"]


def test_an_unknown_effort_is_refused() -> None:
    (matrix,) = matrices(1, 1)
    params = [torch.empty(SIZE, SIZE)]
    with pytest.raises(SparsityError, match="effort 'most': wanted one of best, fast"):
        admm([matrix], projection(*two_of_four(params), params), effort="most")  # type: ignore[arg-type]


def test_matrices_that_share_one_moment_are_rebuilt_as_with_copies_of_it() -> None:
    one, two = matrices(2, 4)
    params = [torch.empty(SIZE, SIZE) for _ in range(2)]
    project = projection(*competing_in_two(params), params)
    shared = [Matrix(each.dense, one.moment) for each in (one, two)]
    copied = [Matrix(each.dense, one.moment.clone()) for each in (one, two)]
    for mine, wanted in zip(admm(shared, project), admm(copied, project), strict=True):
        assert torch.equal(mine.weights, wanted.weights)


def test_a_stack_over_one_moment_is_rebuilt_as_over_copies_of_it() -> None:
    one, two = matrices(2, 4)
    dense = torch.stack([one.dense, two.dense])
    params = [torch.empty(2, SIZE, SIZE)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, 1, 1)), (1, 1, 4)), 2, params)
    common = one.moment.expand(2, SIZE, SIZE)
    (mine,), (wanted,) = (
        admm([Matrix(dense, each)], project, joint=False) for each in (common, common.clone())
    )
    assert (mine.mask != wanted.mask).float().mean() < 0.01
    torch.testing.assert_close(
        refit(Matrix(dense, common), wanted.mask),
        refit(Matrix(dense, common.clone()), wanted.mask),
        rtol=1e-4,
        atol=1e-5,
    )
    alike = wanted.mask[:, :1].expand(2, SIZE, SIZE)
    torch.testing.assert_close(
        refit(Matrix(dense, common), alike), refit(Matrix(dense, common.clone()), alike)
    )
