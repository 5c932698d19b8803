"""Inputs that go for all rows at once, such as channels and heads: chosen by greedy elimination."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from sparseprune import (
    BlockCoupling,
    BlockSpec,
    Matrix,
    ScopeCoupling,
    ScopeSpec,
    SparseScope,
    View,
    admm,
    projection,
)
from sparseprune.engine.greedy import eliminated, shared_inputs
from sparseprune.engine.matrices import all_scaled, units_of
from tests.engine.devices import on_every_device
from tests.engine.reconstruction.oracle import (
    greedy_support,
    loss_objective,
    loss_solved,
    moments,
    objective,
    solved,
)
from tests.engine.reconstruction.test_alternating import STRUCTURES, blocks_of_eight, two_of_four

Structure = Callable[[list[torch.Tensor]], tuple[SparseScope, int]]
ROWS, INPUTS = 5, 12


def columns(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (-1, 1)), ()), 5


def keeping(nnz: int) -> Structure:
    """So many columns."""
    return lambda params: (ScopeSpec(BlockSpec(params[0], (-1, 1)), ()), nnz)


def columns_of_groups(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """Four compete in each of three scopes."""
    return ScopeSpec(BlockSpec(params[0], (-1, 1)), (-1, 4)), 2


def heads(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """Of three columns each."""
    return ScopeSpec(BlockSpec(params[0], (-1, 3)), ()), 2


def scattered_heads(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """Of three columns four apart."""
    view = View.rearrange(params[0], "o (d h) -> o d h", d=3)
    return ScopeSpec(BlockSpec(view, (-1, 3, 1)), ()), 2


def fused(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """A column of the first with one of the second."""
    return ScopeSpec(BlockCoupling([BlockSpec(one, (-1, 1)) for one in params], [(0, 1), (0, 1)]), ()), 6


def unlike(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    """Single columns of the first half compete with pairs of the second."""
    views = [View(params[0], (ROWS, 6), (INPUTS, 1), first) for first in (0, 6)]
    scopes = [ScopeSpec(BlockSpec(view, (-1, size)), ()) for view, size in zip(views, (1, 2), strict=True)]
    return ScopeCoupling(scopes, [(0, 1), (0, 1)]), 4


def halves_of_columns(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
    return ScopeSpec(BlockSpec(params[0], (16, 1)), ()), 32


GREEDY: dict[Structure, int] = {
    columns: 1, columns_of_groups: 1, heads: 1, scattered_heads: 1, fused: 2, unlike: 1,
}  # fmt: skip


def drawn(seed: int, count: int = 1, gradients: int = 0, device: str = "cpu") -> list[Matrix]:
    """Matrices; with so many groups of gradients."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        dense, inputs = torch.randn(ROWS, INPUTS, generator=generator), moments(INPUTS, 40, generator)
        outer = None
        if gradients:
            outer = moments(ROWS // gradients, 40, generator, matrices=gradients).to(device)
        found.append(Matrix(dense.to(device), inputs.to(device), gradients=outer))
    return found


def params_for(given: list[Matrix]) -> list[torch.Tensor]:
    return [torch.empty_like(one.dense, dtype=one.work_dtype) for one in given]


def one_by_one(given: list[Matrix], structure: Structure, damp: float = 0.01) -> list[torch.Tensor]:
    """Which inputs survive, (in,) of each matrix, where every round takes one block."""
    params = params_for(given)
    inputs = shared_inputs(given, projection(*structure(params), params))
    assert inputs is not None
    found = eliminated(all_scaled(given, damp, units_of(given)), inputs, 1e-9, lambda: None)
    return [one.squeeze(0).cpu() for one in found]


def of_plain_loops(
    given: list[Matrix], structure: Structure, cost: Callable[[Matrix, torch.Tensor], float]
) -> list[torch.Tensor]:
    params = params_for(given)
    scope, nnz = structure(params)
    numbers = [one[0].tolist() for one in projection(scope, nnz, params).numbers()]
    kept = greedy_support(
        numbers,
        scope.numblk_per_scope(),
        nnz,
        lambda kept: sum(
            cost(one, torch.tensor(mask).expand(ROWS, -1)) for one, mask in zip(given, kept, strict=True)
        ),
    )
    return [torch.tensor(one) for one in kept]


@on_every_device
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("structure", GREEDY, ids=lambda one: one.__name__)
def test_takes_what_least_squares_in_plain_loops_take(structure: Structure, seed: int, device: str) -> None:
    def cost(matrix: Matrix, mask: torch.Tensor) -> float:
        return sum(objective(solved(matrix.dense, matrix.moment, mask), matrix.dense, matrix.moment))

    wanted = of_plain_loops(drawn(seed, GREEDY[structure]), structure, cost)
    found = one_by_one(drawn(seed, GREEDY[structure], device=device), structure)
    for one, other in zip(found, wanted, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("groups", [1, ROWS])
@pytest.mark.parametrize("structure", GREEDY, ids=lambda one: one.__name__)
def test_takes_what_costs_least_of_the_loss_where_there_are_gradients(
    structure: Structure, groups: int
) -> None:
    def cost(matrix: Matrix, mask: torch.Tensor) -> float:
        return loss_objective(loss_solved(matrix, mask), matrix)

    given = drawn(7, GREEDY[structure], groups)
    wanted = of_plain_loops(given, structure, cost)
    for one, other in zip(one_by_one(given, structure), wanted, strict=True):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize("structure", [*STRUCTURES, *GREEDY], ids=lambda one: one.__name__)
def test_numbers_say_which_block_each_element_belongs_to(structure: Structure) -> None:
    shape = (ROWS, INPUTS) if structure in GREEDY else (32, 32)
    params = [torch.empty(shape[::-1]).T if place else torch.empty(shape) for place in range(2)]
    scope, nnz = structure(params)
    used = [one for one in params if any(block.view.param is one for block in scope.blocks())]
    numbers = projection(scope, nnz, used).numbers()
    decision = torch.rand(*scope.grid_shape, scope.numblk_per_scope()) < 0.5
    for block, mask in scope.get_masks(0, block_mask=decision).items():
        (place,) = (place for place, one in enumerate(used) if one is block.view.param)
        assert torch.equal(decision.reshape(-1)[block.view.layout(numbers[place]).long()], mask)


def test_numbers_are_below_zero_outside_of_all_views() -> None:
    params = [torch.empty(4, 6)]
    view = View(params[0], (4, 2), (6, 1), 2)
    (numbers,) = projection(ScopeSpec(BlockSpec(view, (-1, 1)), ()), 1, params).numbers()
    assert numbers.tolist() == [[-1, -1, 0, 1, -1, -1]] * 4


@pytest.mark.parametrize("effort", ["best", "fast"])
@pytest.mark.parametrize("gradients", [0, 1])
def test_admm_chooses_so_and_refits(effort: str, gradients: int) -> None:
    """It is close to taking one after another, as good as alternating, and the exact least squares."""
    greedy = alternated = single = 0.0
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        outer = moments(16, 200, generator) if gradients else None
        matrix = Matrix(
            torch.randn(16, 48, generator=generator), moments(48, 200, generator), gradients=outer
        )
        params = params_for([matrix])
        project = projection(*keeping(24)(params), params)
        (found,) = admm([matrix], project, effort="fast" if effort == "fast" else "best")
        assert (found.mask == found.mask[:1]).all()
        assert found.mask[0].sum() == 24
        best = solved(matrix.dense, matrix.moment, found.mask)
        torch.testing.assert_close(found.weights.double(), best, rtol=1e-3, atol=1e-3)
        (other,) = admm([matrix], project.__call__)  # any function is alternated with
        (alone,) = one_by_one([matrix], keeping(24))
        rest = solved(matrix.dense, matrix.moment, alone.expand(16, -1))
        greedy, alternated, single = (
            total + cost(matrix, one)
            for total, one in ((greedy, found.weights), (alternated, other.weights), (single, rest))
        )
    assert greedy < 1.03 * alternated
    assert greedy < 1.03 * single


def cost(matrix: Matrix, weights: torch.Tensor) -> float:
    if matrix.gradients is None:
        return sum(objective(weights, matrix.dense, matrix.moment))
    return loss_objective(weights, matrix)


def test_the_later_of_equals_goes() -> None:
    (matrix,) = drawn(1)
    dense = matrix.dense.clone()
    dense[:, [2, 5, 9]] = 0.0
    given = Matrix(dense, matrix.moment)
    for nnz, gone in ((INPUTS - 1, [9]), (INPUTS - 2, [5, 9]), (INPUTS - 3, [2, 5, 9])):
        params = params_for([given])
        (found,) = admm([given], projection(*keeping(nnz)(params), params))
        assert (~found.mask[0]).nonzero().squeeze(-1).tolist() == gone
        assert torch.equal(found.weights, dense)


def test_inputs_that_were_never_seen_go_first() -> None:
    (matrix,) = drawn(2)
    dead = torch.tensor([0, 3, 4, 11])
    moment, dense = matrix.moment.clone(), matrix.dense.clone()
    moment[dead], moment[:, dead] = 0.0, 0.0
    dense[:, dead] *= 100
    given = Matrix(dense, moment)
    params = params_for([given])
    (found,) = admm([given], projection(*keeping(8)(params), params), damp=0)
    assert (~found.mask[0]).nonzero().squeeze(-1).tolist() == dead.tolist()
    assert torch.equal(found.weights[:, found.mask[0]], dense[:, found.mask[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_singular_moment_without_damping_leads_to_finite_weights(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    seen = torch.randn(3, INPUTS, generator=generator, dtype=torch.float64)
    moment = seen.T @ seen
    given = Matrix(
        torch.randn(ROWS, INPUTS, generator=generator).to(dtype),
        moment if dtype == torch.float64 else moment.float(),
    )
    params = params_for([given])
    (found,) = admm([given], projection(*keeping(6)(params), params), damp=0)
    assert found.mask[0].sum() == 6
    assert found.weights.isfinite().all()
    lost, dense = (
        sum(objective(one, given.dense, given.moment, damp=0))
        for one in (found.weights, torch.zeros_like(given.dense))
    )
    assert lost < (1e-3 if dtype == torch.bfloat16 else 1e-6) * dense  # six of twelve span what three saw


def test_fixed_inputs_stay_and_make_up_for_nothing() -> None:
    (matrix,) = drawn(3)
    fixed = (torch.arange(INPUTS) >= 8).expand(ROWS, -1)

    def first_eight(params: list[torch.Tensor]) -> tuple[SparseScope, int]:
        return ScopeSpec(BlockSpec(View(params[0], (ROWS, 8), (INPUTS, 1)), (-1, 1)), ()), 4

    def cost(matrix: Matrix, mask: torch.Tensor) -> float:
        best = solved(matrix.dense, matrix.moment, mask, fixed=fixed)
        return sum(objective(best, matrix.dense, matrix.moment))

    given = [Matrix(matrix.dense, matrix.moment, fixed=fixed)]
    (wanted,) = of_plain_loops(given, first_eight, cost)
    (found,) = one_by_one(given, first_eight)
    assert found.tolist() == wanted.tolist()
    params = params_for(given)
    (pruned,) = admm(given, projection(*first_eight(params), params))
    assert torch.equal(pruned.weights[fixed], matrix.dense[fixed])
    assert pruned.mask[:, :8].sum() == 4 * ROWS


def test_what_competes_over_two_matrices_goes_where_it_costs_least() -> None:
    """The cheap one of two matrices loses more."""
    (loud, quiet) = drawn(6, 2)
    given = [loud, Matrix(quiet.dense * 0.3, quiet.moment)]
    params = params_for(given)
    scopes = [ScopeSpec(BlockSpec(one, (-1, 1)), ()) for one in params]
    scope = ScopeCoupling(scopes, [(0, 1), (0, 1)])
    project = projection(scope, INPUTS, params)
    found = admm(given, project)
    kept = [int(one.mask[0].sum()) for one in found]
    assert sum(kept) == INPUTS
    assert kept[0] > kept[1]
    by_norm = project([one.dense for one in given])
    chosen, plain = (
        sum(cost(one, solved(one.dense, one.moment, mask)) for one, mask in zip(given, masks, strict=True))
        for masks in ([one.mask for one in found], by_norm)
    )
    assert chosen < plain


@pytest.mark.parametrize("joint", [True, False])
def test_experts_are_chosen_as_one_by_one(joint: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    dense, moment = (
        torch.randn(3, ROWS, INPUTS, generator=generator),
        moments(INPUTS, 40, generator, matrices=3),
    )
    outer = moments(ROWS, 40, generator, matrices=3)
    stack = Matrix(dense, moment, gradients=outer)
    params = params_for([stack])
    project = projection(ScopeSpec(BlockSpec(params[0], (1, -1, 1)), (1, -1, -1)), 5, params)
    (found,) = admm([stack], project, joint=joint)
    for number in range(3):
        own = [torch.empty(ROWS, INPUTS)]
        (one,) = admm(
            [Matrix(dense[number], moment[number], gradients=outer[number])],
            projection(ScopeSpec(BlockSpec(own[0], (-1, 1)), ()), 5, own),
        )
        assert torch.equal(found.mask[number], one.mask)


def test_experts_of_one_moment_share_it() -> None:
    generator = torch.Generator().manual_seed(6)
    dense, moment = torch.randn(3, ROWS, INPUTS, generator=generator), moments(INPUTS, 40, generator)
    params = [torch.empty(3, ROWS, INPUTS)]
    project = projection(ScopeSpec(BlockSpec(params[0], (1, -1, 1)), (1, -1, -1)), 5, params)
    (found,) = admm([Matrix(dense, moment.expand(3, -1, -1))], project)
    (other,) = admm([Matrix(dense, moment.repeat(3, 1, 1))], project)
    assert torch.equal(found.mask, other.mask)


def test_inputs_along_the_first_dimension_are_the_same_problem() -> None:
    (matrix,) = drawn(9)
    (wanted,) = one_by_one([matrix], columns)
    turned = [Matrix(matrix.dense.T, matrix.moment, 0)]
    (found,) = one_by_one(turned, lambda params: (ScopeSpec(BlockSpec(params[0], (1, -1)), ()), 5))
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("nnz", [0, INPUTS])
def test_a_budget_of_none_and_one_of_all(nnz: int) -> None:
    (matrix,) = drawn(4)
    params = params_for([matrix])
    (found,) = admm([matrix], projection(*keeping(nnz)(params), params))
    assert found.mask.all() == bool(nnz)
    wanted = matrix.dense if nnz else torch.zeros(ROWS, INPUTS)
    assert torch.equal(found.weights.view(torch.int32), wanted.view(torch.int32))


def test_larger_budgets_keep_what_smaller_ones_keep() -> None:
    """One after another: what is gone is gone, wherever it ends."""
    kept = [one_by_one(drawn(5), keeping(nnz))[0] for nnz in range(INPUTS + 1)]
    assert [int(one.sum()) for one in kept] == list(range(INPUTS + 1))
    assert all((small <= large).all() for small, large in pairwise(kept))


@pytest.mark.parametrize(
    ("structure", "fixed"),
    [
        (two_of_four, None),
        (blocks_of_eight, None),
        (columns, torch.arange(32 * 32).reshape(32, 32) % 3 == 0),  # one row's, not another's
        (columns, (torch.arange(32) < 3).expand(32, 32)),  # a block that may not go
        (halves_of_columns, None),
    ],
)
def test_blocks_that_hold_a_part_of_an_input_are_not_chosen_so(
    structure: Structure, fixed: torch.Tensor | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = Matrix(torch.randn(32, 32, generator=generator), moments(32, 90, generator), fixed=fixed)
    params = params_for([matrix])
    project = projection(*structure(params), params)
    assert shared_inputs([matrix], project) is None
    (found,) = admm([matrix], project)
    assert 0 < int(found.mask.sum()) < matrix.dense.numel()


def test_what_is_called_between_rounds_may_end_the_choice() -> None:
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    (matrix,) = drawn(4)
    params = params_for([matrix])
    with pytest.raises(KeyboardInterrupt):
        admm([matrix], projection(*columns(params), params), between=stop)
