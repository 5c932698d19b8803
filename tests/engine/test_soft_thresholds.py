"""Soft thresholding is the proximal operator it claims to be (promise 10), against a bisection."""

import math
import random
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import BlockCoupling, BlockSpec, ScopeCoupling, ScopeSpec
from sparseprune.engine import proximal, scoring
from tests import oracle
from tests.engine.devices import on_every_device
from tests.engine.structures import FLOATS, Case, assert_close, bits_of, cases, filled

NARROWNESS = {
    torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8,
    torch.float8_e4m3fn: 2**-4, torch.float8_e5m2: 2**-3,
}  # fmt: skip


def expected(
    case: Case,
    thresholds: dict[oracle.Index, float],
    conditioners: list[dict[oracle.Index, float]] | None,
    scale: bool,
) -> list[dict[oracle.Index, float]]:
    """The oracle's solution for every element of every leaf."""
    elements = case.elements()
    result: list[dict[oracle.Index, float]] = [{} for _ in case.laid]
    for place in case.plan.places():
        for block in case.plan.blocks(place):
            v = [float(elements[leaf][index]) for leaf, index in block]
            h = None if conditioners is None else [conditioners[leaf][index] for leaf, index in block]
            limit = thresholds[place] * (math.sqrt(len(v)) if scale else 1)
            for (leaf, index), u in zip(block, oracle.shrink(v, limit, h), strict=True):
                result[leaf][index] = u
    return result


def assert_solution(case: Case, before: list[list[int]], wanted: list[dict[oracle.Index, float]]) -> None:
    """Each weight is the solution rounded once; all around the views is as before.

    Just above the threshold the solution is the small difference of numbers of the size of the weights
    (2 at most here), so that it is known to some 1e-15 of that size and no better.
    """
    for leaf, old, want in zip(case.laid, before, wanted, strict=True):
        dtype = leaf.storage.dtype
        half = NARROWNESS[dtype] * (1 + 1e-6)
        floor = max(1e-13, half * torch.finfo(dtype).tiny)
        found = leaf.elements()
        for index, u in want.items():
            assert math.isclose(float(found[index]), u, rel_tol=half + 1e-9, abs_tol=floor)
        around = set(range(len(old))) - set(leaf.places.values())
        now = leaf.bits()
        assert all(now[place] == old[place] for place in around)


@on_every_device
@settings(max_examples=80)
@given(data=st.data(), scale=st.booleans(), seed=st.integers(0, 2**32))
def test_euclidean_shrinking_is_the_oracles(device: str, data: st.DataObject, scale: bool, seed: int) -> None:
    case = data.draw(cases(device, dtypes=FLOATS, kinds=("few",), empty=data.draw(st.booleans())))
    before = [leaf.bits() for leaf in case.laid]
    limits, thresholds = drawn_thresholds(case, random.Random(seed), device)
    wanted = expected(case, limits, None, scale)
    case.scope.soft_threshold(thresholds, scale=scale)
    assert_solution(case, before, wanted)


@on_every_device
@settings(max_examples=80)
@given(data=st.data(), scale=st.booleans(), seed=st.integers(0, 2**32))
def test_conditioned_shrinking_is_the_oracles_in_every_form_of_conditioners(
    device: str, data: st.DataObject, scale: bool, seed: int
) -> None:
    case = data.draw(cases(device, dtypes=FLOATS, kinds=("few",), empty=data.draw(st.booleans())))
    chance = random.Random(seed)
    before = [leaf.bits() for leaf in case.laid]
    limits, thresholds = drawn_thresholds(case, chance, device)
    given_, numbers = {}, []
    for leaf in case.laid:
        size = leaf.storage.numel()
        flat = torch.tensor([spread(chance) for _ in range(size)], dtype=torch.float64, device=device)
        view = leaf.block.view
        as_param = view.shape == tuple(view.param.shape) or chance.random() < 0.5
        given_[leaf.block] = leaf.param_shaped(flat) if as_param else leaf.view_shaped(flat)
        numbers.append({index: float(number) for index, number in leaf.elements_of(flat).items()})
    conditioners: Any = given_
    if len(given_) == 1 and chance.random() < 0.5:
        (conditioners,) = given_.values()
    wanted = expected(case, limits, numbers, scale)
    case.scope.soft_threshold(thresholds, conditioners, scale)
    assert_solution(case, before, wanted)


def spread(chance: random.Random) -> float:
    return chance.choice([0.0, 1.0, 10 ** chance.uniform(-6, 6), 10 ** chance.uniform(-6, 6)])


def drawn_thresholds(case: Case, chance: random.Random, device: str) -> tuple[dict[oracle.Index, float], Any]:
    limits = {
        place: chance.choice([0.0, 10 ** chance.uniform(-7, 1), 0.7, 1.0, 1e30, math.inf])
        for place in case.plan.places()
    }
    if chance.random() < 0.3:
        number = chance.choice([0.0, 0.3, 1e30])
        return dict.fromkeys(limits, number), number
    numbers = torch.tensor(list(limits.values()), dtype=torch.float64, device=device)
    return limits, numbers.reshape(case.plan.grid)


@on_every_device
@pytest.mark.parametrize("decades", [0, 3, 6, 12])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_conditioners_of_many_orders_of_magnitude_are_solved_in_20_steps(
    device: str, decades: int, alpha: float
) -> None:
    generator = torch.Generator().manual_seed(decades)
    h = 10 ** ((torch.rand(64, 48, generator=generator, dtype=torch.float64) * 2 - 1) * decades)
    v = torch.randn(64, 48, generator=generator, dtype=torch.float64) * h**-alpha
    reach = (h * v).norm(dim=1, keepdim=True)
    t = reach * 10 ** -(torch.rand(64, 1, generator=generator, dtype=torch.float64) * (1 + 2 * decades))
    weight = v.clone().to(device)
    BlockSpec(weight, (1, -1)).soft_threshold(t.to(device), h.to(device), atol=1e-14)
    for row in range(64):
        wanted = oracle.shrink(v[row].tolist(), t[row].item(), h[row].tolist())
        assert_close(weight[row].tolist(), wanted, 1e-9, max(map(abs, wanted)) * 1e-9)


@pytest.mark.parametrize("size", [1e-150, 1.0, 1e150])
@pytest.mark.parametrize("hessian", [1e-150, 1.0, 1e150])
def test_scales_far_from_one_are_solved_too(size: float, hessian: float) -> None:
    v, h = [3.0, -4.0, 0.5], [1.0, 2.0, 0.0]
    weight = torch.tensor(v, dtype=torch.float64) * size
    threshold = 2.0 * size * hessian
    if not 0 < threshold < math.inf:
        pytest.skip("no double holds this threshold")
    BlockSpec(weight, (-1,)).soft_threshold(
        threshold, torch.tensor(h, dtype=torch.float64) * hessian, atol=1e-15
    )
    assert_close([one / size for one in weight.tolist()], oracle.shrink(v, 2.0, h), 1e-12, 1.0)


def test_a_constant_conditioner_is_the_euclidean_case_with_the_threshold_divided() -> None:
    torch.manual_seed(0)
    one = torch.randn(16, 8, dtype=torch.float64)
    other = one.clone()
    BlockSpec(one, (1, -1)).soft_threshold(1.5)
    BlockSpec(other, (1, -1)).soft_threshold(6.0, torch.full((16, 8), 4.0))
    assert torch.allclose(one, other, rtol=1e-7, atol=0)


def test_thresholds_at_and_just_below_the_norm_prune_and_keep() -> None:
    weight = torch.tensor([[3.0, 4.0], [3.0, 4.0], [-0.0, 0.0]], dtype=torch.float64)
    BlockSpec(weight, (1, 2)).soft_threshold(
        torch.tensor([[5.0], [5.0 - 2**-50], [0.0]], dtype=torch.float64)
    )
    assert bits_of(weight[0]) == bits_of(weight[2]) == [0, 0]
    assert weight[1].tolist() == [3.0 * (2**-50 / 5), 4.0 * (2**-50 / 5)]
    unit = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    h = torch.tensor([3.0, 4.0]).expand(2, 2)
    BlockSpec(unit, (1, 2)).soft_threshold(torch.tensor([[5.0], [4.999]]), h)
    assert bits_of(unit[0]) == [0, 0]
    assert bool((unit[1] > 0).all())


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold_zero_keeps_all_bits_of_what_is_not_zero(dtype: torch.dtype, conditioned: bool) -> None:
    weight = filled("few", 7, 64, dtype).reshape(16, 4)
    weight[:, 0] = 1.0
    before = bits_of(weight)
    h = torch.tensor([1.0, 0.0, 1e-6, 1e6]).expand(16, 4) if conditioned else None
    BlockSpec(weight, (1, 4)).soft_threshold(0.0, h)
    assert bits_of(weight) == before


@pytest.mark.parametrize("conditioned", [False, True])
def test_eps_takes_small_blocks_for_zero(conditioned: bool) -> None:
    weight = torch.tensor([[1e-3, 0.0], [1.0, 0.0]], dtype=torch.float64)
    h = torch.full((2, 2), 2.0) if conditioned else None
    BlockSpec(weight, (1, 2)).soft_threshold(0.0, h, eps=1e-4)
    assert weight.tolist() == [[1e-3, 0], [1, 0]]
    BlockSpec(weight, (1, 2)).soft_threshold(0.0, h, eps=1.9e-3 if conditioned else 0.9e-3)
    assert weight.tolist() == [[1e-3, 0], [1, 0]]
    BlockSpec(weight, (1, 2)).soft_threshold(0.0, h, eps=2e-3)
    assert weight.tolist() == [[0, 0], [1, 0]]


def test_infinite_weights_are_beyond_every_finite_threshold() -> None:
    weight = torch.tensor([[math.inf, 2.0, -3.0], [-math.inf, 2.0, -3.0]])
    block = BlockSpec(weight, (1, -1))
    block.soft_threshold(torch.tensor([[1.0], [1.0]]))
    assert weight.tolist() == [[math.inf, 2, -3], [-math.inf, 2, -3]]
    block.soft_threshold(1.0, torch.tensor([5.0, 1.0, 0.0]).expand(2, 3))
    assert weight.tolist() == [[math.inf, 2, 0], [-math.inf, 2, 0]]
    with pytest.raises(ValueError, match="infinite weight with conditioner 0"):
        block.soft_threshold(1.0, torch.tensor([0.0, 1.0, 1.0]).expand(2, 3))
    block.soft_threshold(math.inf)
    assert bits_of(weight) == [0] * 6


def test_more_steps_come_nearer_and_a_loose_tolerance_stops_early() -> None:
    v, h = [1.0, 2.0, 3.0, 1e3], [1e3, 1.0, 1e-2, 1e-4]
    wanted = oracle.shrink(v, 0.5, h)

    def error(max_iter: int, atol: float = 0.0) -> float:
        weight = torch.tensor(v, dtype=torch.float64)
        BlockSpec(weight, (-1,)).soft_threshold(0.5, torch.tensor(h, dtype=torch.float64), max_iter, atol)
        assert not weight.isnan().any()
        found: list[float] = weight.tolist()
        return max(abs(one - other) for one, other in zip(found, wanted, strict=True))

    errors = [error(steps) for steps in (0, 1, 2, 20)]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-10
    assert error(20, atol=1e9) == errors[1]
    assert errors[3] <= error(20, atol=1e-2) < errors[1]


def test_one_step_solves_a_block_of_like_conditioners() -> None:
    weight = torch.ones(64, dtype=torch.float64)
    BlockSpec(weight, (-1,)).soft_threshold(6.0, torch.full((64,), 3.0), max_iter=1)
    assert_close(weight.tolist(), [0.75] * 64, 1e-15, 1.0)  # the equation is linear in ||u|| here


def test_scale_multiplies_by_the_root_of_the_elements_of_each_members_fused_block() -> None:
    big, small = torch.full((2, 9), 3.0), torch.full((2, 4), 3.0)
    scopes = [ScopeSpec(BlockSpec(big, (1, -1)), (1,)), ScopeSpec(BlockSpec(small, (1, -1)), (1,))]
    ScopeCoupling(scopes, [(0, 1), (0, 1)]).soft_threshold(torch.tensor([[1.0], [3.5]]), scale=True)
    assert big.tolist() == [[2.0] * 9, [0.0] * 9]
    assert small.tolist() == [[2.0] * 4, [0.0] * 4]


def test_a_fused_block_shrinks_as_one() -> None:
    up, down = torch.tensor([[3.0], [0.3]]), torch.tensor([[4.0, 0.4]], dtype=torch.bfloat16)
    channel = BlockCoupling([BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))], [(0, 1), (1, 0)])
    channel.soft_threshold(2.5)
    assert up.tolist() == [[1.5], [0.0]]
    assert down.tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_solution_just_above_a_midpoint_is_rounded_up(conditioned: bool) -> None:
    weight = torch.tensor([1.0625], dtype=torch.bfloat16)
    wanted = 1 + 2**-8 + 2**-40  # by way of float32 it would come out as 1
    h = torch.ones(1) if conditioned else None
    BlockSpec(weight, (1,)).soft_threshold(1.0625 - wanted, h)
    assert weight.item() == 1 + 2**-7


def test_narrow_weights_hold_the_float64_solution_rounded_once() -> None:
    torch.manual_seed(0)
    weight = torch.randn(512, 64).to(torch.bfloat16)
    wide = weight.to(torch.float64)
    BlockSpec(wide, (1, 8)).soft_threshold(0.7)
    BlockSpec(weight, (1, 8)).soft_threshold(0.7)
    neighbours = torch.stack([weight.view(torch.int16) + step for step in (-1, 0, 1)]).view(torch.bfloat16)
    distance = (neighbours.to(torch.float64) - wide).abs()
    assert bool((distance[1] <= distance.nan_to_num(math.inf).amin(0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("alike", [False, True])
def test_single_elements_are_the_exact_differences_rounded_once(dtype: torch.dtype, alike: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(4096).to(dtype)
    weight[:4] = torch.tensor([0.0, -0.0, math.inf, -math.inf])
    before, limits = weight.to(torch.float64).tolist(), torch.rand(4096, dtype=torch.float64)
    limits[1:4] = torch.tensor([0.0, math.inf, 0.5])
    if alike:
        limits.fill_(0.3)
    ScopeSpec(BlockSpec(weight, (1,)), (1,)).soft_threshold(0.3 if alike else limits)
    for v, t, found in zip(before[4:], limits.tolist()[4:], weight[4:], strict=True):
        exact = max(Fraction(abs(v)) - Fraction(t), Fraction(0)) * (1 if v > 0 else -1)
        pattern = found.view(torch.int16 if found.element_size() == 2 else torch.int32)
        near = [(pattern + step).view(dtype) for step in (-1, 1)]
        distance = abs(Fraction(found.item()) - exact)
        assert all(distance <= abs(Fraction(one.item()) - exact) for one in near if one.isfinite())
    assert bits_of(weight[:2]) == [0, 0]
    assert weight[2:4].tolist() == ([math.inf, -math.inf] if alike else [0.0, -math.inf])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_conditioned_element_has_the_bits_of_the_solution_of_its_block(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    weight, h = torch.randn(1024).to(dtype), torch.rand(1024) + 0.01
    h[:8] = 0.0
    closed, solved = weight.clone(), weight.clone()
    BlockSpec(closed, (1,)).soft_threshold(0.3, h)
    BlockSpec(solved, (1,)).soft_threshold(0.3, h.to(torch.float64))
    assert bits_of(closed) == bits_of(solved)
    assert 0 < int((closed == 0).sum()) < 1024


@pytest.mark.parametrize("conditioned", [False, True])
def test_an_infinite_threshold_leaves_nothing_of_single_elements(conditioned: bool) -> None:
    weight = torch.tensor([1.0, -2.0, math.inf, -math.inf])
    BlockSpec(weight, (1,)).soft_threshold(math.inf, torch.ones(4) if conditioned else None)
    assert bits_of(weight) == [0] * 4


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(
    ("shape", "order"), [((1, -1), (0, 1)), ((-1, 1), (0, 1)), ((3, 5), (1, 0)), ((1, 1), (0, 1))]
)
def test_a_block_does_not_depend_on_other_blocks_nor_on_chunks(
    monkeypatch: pytest.MonkeyPatch, conditioned: bool, shape: tuple[int, int], order: tuple[int, int]
) -> None:
    torch.manual_seed(3)
    weight, h = torch.randn(48, 35), 10 ** (4 * torch.rand(48, 35) - 2)
    whole, cut = weight.clone().permute(order), weight.clone().permute(order)
    diagonal = h.permute(order) if conditioned else None
    extent = tuple(shape[place] for place in order)
    threshold = 0.5 * BlockSpec(whole, extent).numel_per_block() ** 0.5
    BlockSpec(whole, extent).soft_threshold(threshold, diagonal)
    for chunk in (1, 64):
        monkeypatch.setattr(scoring, "_CHUNK", chunk)
        monkeypatch.setattr(proximal, "_CHUNK", chunk)
        cut.copy_(weight.permute(order))
        BlockSpec(cut, extent).soft_threshold(threshold, diagonal)
        assert bits_of(cut.contiguous()) == bits_of(whole.contiguous())
    assert not torch.equal(whole, weight.permute(order))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("block", [(1, 1), (1, -1), (-1, 1), (3, 2), (1, 4), (-1, -1)])
def test_compiled_loops_give_the_bits_of_operations_on_tensors(
    dtype: torch.dtype, block: tuple[int, int]
) -> None:
    numbers = torch.randn(12, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    numbers[0, 1] = -0.0
    numbers[0, 2] = torch.finfo(dtype).smallest_normal / 4
    infinite = numbers.clone()
    infinite[5, 6] = 448 if dtype == torch.float8_e4m3fn else -math.inf
    found: list[list[list[int]]] = []
    for loops in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            for module in () if loops else (proximal, scoring):
                patch.setattr(module, "patterns", lambda _: None)
            found.append([])
            for given, turned, eps in product((numbers, infinite), (False, True), (None, 0.3)):
                weight = given.clone().to(dtype)
                view = weight.clone().t().contiguous().t() if turned else weight
                spec = BlockSpec(view, block)
                grid = torch.rand(spec.grid_shape, generator=torch.Generator().manual_seed(4))
                norms = spec.norms()
                for limits in (0.0, 0.4, grid * norms.nan_to_num(1.0, 1.0)):
                    spec.soft_threshold(limits, eps=eps)
                    found[-1].append([*bits_of(view.contiguous()), *bits_of(norms)])
    assert found[0] == found[1]
