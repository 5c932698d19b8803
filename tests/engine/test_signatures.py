"""The names and signatures that users come with: each called with every parameter, on specs and couplings.

What comes out is compared with plain loops over nested indices (tests/oracle.py). Weights are parameters
that require a gradient, as in a model. mypy reads this file strictly, as it reads a user's script.
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparseprune
from sparseprune import (
    BlockCoupling,
    BlockSpec,
    ScopeCoupling,
    ScopeSpec,
    ShapeMismatchError,
    SparseBlock,
    SparsityError,
    View,
)
from tests import oracle
from tests.commands import python
from tests.engine.structures import Case, Laid, assert_masks, assert_pruned
from tests.oracle import Index, Number

Call = Callable[[Any, Any], object]
SIGNATURES = {
    (ScopeSpec, "__init__"): "block, shape, name=None",
    (ScopeCoupling, "__init__"): "scopes, orders=None, name=None",
    (BlockSpec, "__init__"): "view, shape, name=None",
    (BlockCoupling, "__init__"): "specs, orders=None, name=None",
    (View, "__init__"): "param, shape, stride",
    (View, "from_existing"): "tensor",
    (View, "rearrange"): "tensor, pattern",
    (ScopeSpec, "kth_largest"): "element_values, nnz",
    (ScopeCoupling, "kth_largest"): "k, values=None",
} | {
    (of, name): parameters
    for ofs, names in (
        (
            (ScopeSpec, ScopeCoupling),
            {
                "numscp": "",
                "numblk": "",
                "numblk_per_scope": "",
                "numel_per_scope": "",
                "blocks": "",
                "nnz": "eps=1e-08",
                "block_to_scope": "b, reorder=True, merge=False",
                "scope_to_block": "scope_values",
                "block_norms": "values=None",
                "kth_mid": "element_values, nnz, k_weight=1.0",
                "hard_threshold": "thresholds=None, nnz=None, values=None",
                "get_masks": "nnz, values=None, block_scores=None, block_mask=None",
                "soft_threshold": (
                    "thresholds, conditioners=None, scale=False, max_iter=20, atol=1e-08, eps=None"
                ),
                "sparsity_to_nnz": "sparsity",
            },
        ),
        (
            (BlockSpec, BlockCoupling),
            {
                "numblk": "",
                "numel": "",
                "numel_per_block": "",
                "nnz": "eps=1e-08",
                "norms": "values=None, p=2",
                "min": "values=None",
                "max": "values=None",
                "reduce": "values, fn",
                "block_view": "values=None, reorder=True, merge=False",
                "broadcast_block_to_element": "grid",
                "get_masks": "block_mask",
                "hard_threshold": "thresholds, values=None",
                "soft_threshold": "block_thresholds, conditioners=None, max_iter=20, atol=1e-08, eps=None",
                "apply_multiplier": "grid",
                "set_data": "t",
                "parameters": "",
                "apply_mask": "mask",
            },
        ),
    )
    for of in ofs
    for name, parameters in names.items()
}


@pytest.mark.parametrize(("of", "name"), SIGNATURES, ids=lambda one: getattr(one, "__name__", one))
def test_what_users_call_has_its_parameters_and_defaults(of: type, name: str) -> None:
    found = [
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in inspect.signature(getattr(of, name)).parameters.values()
        if each.name != "self" and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    wanted = SIGNATURES[of, name].split(", ") if SIGNATURES[of, name] else []
    assert found[: len(wanted)] == wanted
    # What was added since stands behind and may be left out.
    assert all("=" in one for one in found[len(wanted) :])


# -- the structures: every kind of scope over every kind of block ------------------------------------


def leaf(view: Index, block: Index, name: str, dtype: torch.dtype) -> Laid:
    """A parameter of small whole numbers, no two of one magnitude, and its blocks."""
    chance = random.Random(name)
    numbers = chance.sample(range(1, math.prod(view) + 1), math.prod(view))
    weight = torch.tensor([number * chance.choice((1, -1)) for number in numbers]).reshape(view).to(dtype)
    param = nn.Parameter(weight)
    places = {index: number for number, index in enumerate(product(*map(range, view)))}
    return Laid(oracle.Leaf(view, block), BlockSpec(param, block, name), param.detach().view(-1), places)


def case(kind: str, dtype: torch.dtype = torch.float32) -> Case:
    """A `kind` such as "ScopeCoupling of BlockCoupling", over parameters of up to 24 elements."""
    one, other, third = (
        leaf((4, 6), (1, 2), "one", dtype),  # grid (4, 3)
        leaf((3, 8), (1, 2), "other", dtype),  # grid (3, 4)
        leaf((4, 4), (2, 1), "third", dtype),  # grid (2, 4)
    )
    laid = [one]
    block: SparseBlock = one.block
    fused = oracle.alone(one.plan)
    if kind.endswith("BlockCoupling"):
        laid.append(other)
        block = BlockCoupling([one.block, other.block], [(0, 1), (1, 0)], name="fused")
        fused = oracle.Fused((one.plan, other.plan), ((0, 1), (1, 0)))
    scope = ScopeSpec(block, (2, 3), name="scope")  # grid (2, 1)
    plan = oracle.Scope(fused, (2, 3))
    if kind.startswith("ScopeSpec"):
        return Case(oracle.Coupled((plan,), ((0, 1),)), scope, tuple(laid))
    second = ScopeSpec(third.block, (2, 2), name="second")  # grid (1, 2)
    return Case(
        oracle.Coupled((plan, oracle.Scope(oracle.alone(third.plan), (2, 2))), ((0, 1), (1, 0))),
        ScopeCoupling([scope, second], [(0, 1), (1, 0)], name="coupled"),
        (*laid, third),
    )


KINDS = [
    f"{scope} of {block}"
    for scope in ("ScopeSpec", "ScopeCoupling")
    for block in ("BlockSpec", "BlockCoupling")
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def values_of(case: Case) -> tuple[dict[BlockSpec, Tensor], list[dict[Index, Number]]]:
    """Other numbers as values, the same for the engine (view-shaped, by blocks made anew) and the oracle."""
    given = {
        BlockSpec(each.block.view.param, each.block.shape): each.block.data.flip(0) * 2 + 1
        for each in case.laid
    }
    laid = (tensor.reshape(-1).tolist() for tensor in given.values())
    return given, [
        {index: int(numbers[place]) for index, place in each.places.items()}
        for each, numbers in zip(case.laid, laid, strict=True)
    ]


def norms_of(case: Case, elements: Sequence[dict[Index, Number]]) -> dict[Index, list[float]]:
    return {
        place: [
            oracle.norm([elements[leaf][index] for leaf, index in block]) for block in case.plan.blocks(place)
        ]
        for place in case.plan.places()
    }


def by_place(tensor: Tensor) -> dict[Index, list[float]]:
    """(*grid, numbers) as a list for each place of the grid."""
    return {place: tensor[place].tolist() for place in product(*map(range, tensor.shape[:-1]))}


def close(found: dict[Index, list[float]], wanted: dict[Index, list[float]]) -> bool:
    assert found.keys() == wanted.keys()
    return all(found[place] == pytest.approx(wanted[place], rel=1e-14) for place in wanted)


# -- scopes ------------------------------------------------------------------------------------------


@every_kind
def test_scopes_count_their_parts(kind: str) -> None:
    made = case(kind)
    scope, plan = made.scope, made.plan
    assert scope.grid_shape == plan.grid == (2, 1)
    assert scope.numscp() == 2
    assert scope.numblk_per_scope() == plan.blocks_per_scope
    assert scope.numblk() == 2 * plan.blocks_per_scope
    assert scope.numel_per_scope() == sum(len(block) for block in plan.blocks((0, 0)))
    assert scope.blocks() == tuple(each.block for each in made.laid)
    numbers = [number for each in made.elements() for number in each.values()]
    assert scope.nnz() == scope.nnz(1e-8) == len(numbers)
    assert scope.nnz(eps=3) == sum(abs(float(number)) > 3 for number in numbers)
    for sparsity in (0, 0.3, 0.5, 1.0):
        blocks = plan.blocks_per_scope
        assert scope.sparsity_to_nnz(sparsity) == blocks - math.floor(sparsity * blocks)
    assert scope.sparsity_to_nnz(sparsity=0.5) == scope.sparsity_to_nnz(0.5)


@every_kind
@every_dtype
def test_masks_keep_the_largest_by_norms_values_scores_and_decisions(kind: str, dtype: torch.dtype) -> None:
    made = case(kind, dtype)
    scope, plan, nnz = made.scope, made.plan, made.plan.blocks_per_scope // 2
    values, numbers = values_of(made)
    assert_masks(made, scope.get_masks(nnz), made.expected(nnz))
    assert_masks(made, scope.get_masks(nnz=nnz), made.expected(nnz))
    by_values = oracle.masks_by_budget(plan, numbers, nnz)
    assert_masks(made, scope.get_masks(nnz, values), by_values)
    assert_masks(made, scope.get_masks(nnz=nnz, values=values), by_values)
    scores = torch.arange(scope.numblk()).reshape(*scope.grid_shape, -1) % 5
    kept = {
        place: oracle.keep_largest([int(score) for score in row], nnz)
        for place, row in by_place(scores).items()
    }
    ranked = oracle.masks(plan, kept)
    decision = torch.tensor([kept[place] for place in plan.places()]).reshape(*scope.grid_shape, -1)
    assert_masks(made, scope.get_masks(nnz, None, scores), ranked)
    assert_masks(made, scope.get_masks(nnz, block_scores=scores), ranked)
    assert_masks(made, scope.get_masks(nnz, None, None, decision), ranked)
    assert_masks(made, scope.get_masks(nnz, block_mask=decision), ranked)


@every_kind
def test_masks_by_another_norm(kind: str) -> None:
    made = case(kind)
    elements = made.elements()
    differ = 0

    def wanted(nnz: int, p: float, *, mean: bool = False) -> list[dict[Index, bool]]:
        kept = {}
        for place in made.plan.places():
            blocks = [[elements[leaf][index] for leaf, index in block] for block in made.plan.blocks(place)]
            scores = [oracle.score(block, p) / (len(block) if mean else 1) for block in blocks]
            kept[place] = oracle.keep_largest(scores, nnz)
        return oracle.masks(made.plan, kept)

    for nnz in range(made.plan.blocks_per_scope + 1):
        by_norm = {p: wanted(nnz, p) for p in (1, 2, math.inf)}
        for p, masks in by_norm.items():
            assert_masks(made, made.scope.get_masks(nnz, p=p), masks)
        assert_masks(made, made.scope.get_masks(nnz, rms=True), wanted(nnz, 2, mean=True))
        differ += by_norm[1] != by_norm[math.inf]
    assert differ
    nnz = 1
    scores = made.scope.block_norms()
    with pytest.raises(TypeError, match="vaules"):
        made.scope.get_masks(nnz, vaules=None)  # type: ignore[call-arg]
    with pytest.raises(SparsityError, match="block_scores is used in place of norms"):
        made.scope.get_masks(nnz, block_scores=scores, p=1)
    with pytest.raises(SparsityError, match="block_mask is used in place of norms"):
        made.scope.get_masks(nnz, block_mask=scores > 3, rms=True)
    with pytest.raises(SparsityError, match="positive"):
        made.scope.get_masks(nnz, p=-1)


@every_kind
@every_dtype
def test_hard_thresholds_write_zeros_into_parameters(kind: str, dtype: torch.dtype) -> None:
    plan = case(kind, dtype).plan
    nnz = plan.blocks_per_scope // 2
    limits: dict[Index, float] = {(0, 0): 11.0, (1, 0): 19.0}
    grid = torch.tensor(list(limits.values())).reshape(2, 1)
    numbers = values_of(case(kind, dtype))[1]
    weights = case(kind, dtype).elements()
    budget = oracle.masks_by_budget(plan, weights, nnz)
    by_values = oracle.masks_by_budget(plan, numbers, nnz)
    cut = oracle.masks_by_threshold(plan, weights, limits)
    cut_by_values = oracle.masks_by_threshold(plan, numbers, limits)
    assert sum(not kept for each in cut for kept in each.values()) > 0
    calls: list[tuple[list[dict[Index, bool]], Call]] = [
        (budget, lambda scope, _: scope.hard_threshold(nnz=nnz)),
        (budget, lambda scope, _: scope.hard_threshold(None, nnz)),
        (by_values, lambda scope, values: scope.hard_threshold(None, nnz, values)),
        (by_values, lambda scope, values: scope.hard_threshold(nnz=nnz, values=values)),
        (cut, lambda scope, _: scope.hard_threshold(grid)),
        (cut, lambda scope, _: scope.hard_threshold(thresholds=grid)),
        (cut_by_values, lambda scope, values: scope.hard_threshold(grid, None, values)),
        (cut_by_values, lambda scope, values: scope.hard_threshold(thresholds=grid, values=values)),
    ]
    for wanted, call in calls:
        made = case(kind, dtype)
        before = [each.bits() for each in made.laid]
        assert call(made.scope, values_of(made)[0]) is None
        assert_pruned(made, before, wanted)
        for each in made.laid:
            assert each.block.view.param.requires_grad
    made = case(kind, dtype)
    made.scope.hard_threshold(11.0)
    assert_pruned(
        made,
        [each.bits() for each in case(kind, dtype).laid],
        oracle.masks_by_threshold(plan, weights, dict.fromkeys(limits, 11.0)),
    )


@every_kind
@every_dtype
def test_soft_thresholds_shrink_blocks_in_parameters(kind: str, dtype: torch.dtype) -> None:
    limits: dict[Index, float] = {(0, 0): 16.0, (1, 0): 24.0}
    grid = torch.tensor(list(limits.values())).reshape(2, 1)
    made = case(kind, dtype)

    def conditioners(made: Case) -> dict[BlockSpec, Tensor]:
        return {each.block: each.block.data.abs().flip(0) / 8 for each in made.laid}

    diagonals = [
        dict(zip(each.places, tensor.reshape(-1).tolist(), strict=True))
        for each, tensor in zip(made.laid, conditioners(made).values(), strict=True)
    ]

    def shrunk(*, conditioned: bool, scale: bool, eps: float = 0) -> list[dict[Index, float]]:
        result: list[dict[Index, float]] = [{} for _ in made.laid]
        start = case(kind, dtype).elements()
        for place in made.plan.places():
            for block in made.plan.blocks(place):
                v = [float(start[leaf][index]) for leaf, index in block]
                h = [diagonals[leaf][index] for leaf, index in block] if conditioned else None
                pull = math.hypot(*(a * b for a, b in zip(v, h or [1.0] * len(v), strict=True)))
                t = limits[place] * (math.sqrt(len(v)) if scale else 1)
                u = oracle.shrink(v, t, h) if pull > eps else [0.0] * len(v)
                for (leaf, index), number in zip(block, u, strict=True):
                    result[leaf][index] = number
        return result

    full = {"scale": True, "max_iter": 50, "atol": 1e-12, "eps": 16.0}
    calls: list[tuple[list[dict[Index, float]], Call]] = [
        (shrunk(conditioned=False, scale=False), lambda s, _: s.soft_threshold(grid)),
        (shrunk(conditioned=False, scale=True), lambda s, _: s.soft_threshold(grid, None, True)),
        (shrunk(conditioned=True, scale=False), lambda s, h: s.soft_threshold(grid, h)),
        (
            shrunk(conditioned=True, scale=True, eps=16),
            lambda s, h: s.soft_threshold(grid, h, True, 50, 1e-12, 16.0),
        ),
        (
            shrunk(conditioned=True, scale=True, eps=16),
            lambda s, h: s.soft_threshold(thresholds=grid, conditioners=h, **full),
        ),
    ]
    for wanted, call in calls:
        fresh = case(kind, dtype)
        call(fresh.scope, conditioners(fresh))
        for each, numbers in zip(fresh.laid, wanted, strict=True):
            flat = each.block.data.reshape(-1).tolist()
            rounding = torch.finfo(dtype).eps
            laid = [numbers[index] for index in each.places]
            assert flat == pytest.approx(laid, rel=max(rounding, 1e-7), abs=1e-6)
        assert any(number == 0 for numbers in wanted for number in numbers.values())


@every_kind
def test_norms_and_ranks_by_scope(kind: str) -> None:
    made = case(kind)
    scope, blocks = made.scope, made.plan.blocks_per_scope
    values, numbers = values_of(made)
    for given, norms in ((None, norms_of(made, made.elements())), (values, norms_of(made, numbers))):
        assert close(by_place(scope.block_norms(given)), norms)
        assert close(by_place(scope.block_norms(values=given)), norms)
        assert tuple(scope.block_norms(given).shape) == (*scope.grid_shape, blocks)
        for k in (0, 1, 3, blocks):
            ranked = {place: [math.inf, *sorted(row, reverse=True), 0.0] for place, row in norms.items()}
            if isinstance(scope, ScopeSpec):
                largest = scope.kth_largest(given, k)
                assert torch.equal(largest, scope.kth_largest(element_values=given, nnz=k))
            else:
                largest = scope.kth_largest(k, given)
                assert torch.equal(largest, scope.kth_largest(k=k, values=given))
            middle = scope.kth_mid(given, k, 0.5)
            assert torch.equal(middle, scope.kth_mid(element_values=given, nnz=k, k_weight=0.5))
            for place, row in ranked.items():
                assert largest[place] == pytest.approx(row[k], rel=1e-14)
                assert middle[place] == pytest.approx((row[k] + 0.5 * row[k + 1]) / 1.5, rel=1e-14)
                assert scope.kth_mid(given, k)[place] == pytest.approx((row[k] + row[k + 1]) / 2, rel=1e-14)


@every_kind
def test_tensors_by_block_and_by_scope(kind: str) -> None:
    """A number that tells member, block and trailing place stands where the loops say."""
    made = case(kind)
    scope = made.scope
    parts = {
        spec.block: 1000 * number + torch.arange(2 * spec.block.numblk()).reshape(*spec.block.grid_shape, 2)
        for number, (spec, _) in enumerate(scope.members)
    }
    by_scope = torch.arange(scope.numscp()).reshape(scope.grid_shape)
    if isinstance(scope, ScopeSpec):
        (part,) = parts.values()
        merged = scope.block_to_scope(part, merge=True)
        assert torch.equal(scope.block_to_scope(b=part, reorder=False, merge=True), merged)
        assert tuple(scope.block_to_scope(part, False).shape) == (2, 2, 1, 3, 2)
        assert torch.equal(scope.block_to_scope(part, True).reshape(merged.shape), merged)
        spread: dict[SparseBlock, Tensor] = {scope.block: scope.scope_to_block(by_scope)}
        assert torch.equal(scope.scope_to_block(scope_values=by_scope), spread[scope.block])
    else:
        merged = scope.block_to_scope(parts)
        assert torch.equal(scope.block_to_scope(b=parts, reorder=True, merge=True), merged)
        spread = scope.scope_to_block(by_scope)
        with pytest.raises(SparsityError, match="no common interleaved form"):
            scope.block_to_scope(parts, False)
        with pytest.raises(SparsityError, match="no tensor given for third"):
            scope.block_to_scope({scope.scopes[0].block: parts[scope.scopes[0].block]})
        with pytest.raises(ShapeMismatchError, match="do not fit the grid of scopes"):
            scope.scope_to_block(scope_values=by_scope.T)
    assert tuple(merged.shape) == (*scope.grid_shape, scope.numblk_per_scope(), 2)
    for place in made.plan.places():
        wanted = []
        for (spec, order), plan in zip(scope.members, made.plan.scopes, strict=True):
            own = [0] * len(order)
            for dim, source in enumerate(order):
                own[source] = place[dim]
            for inner in product(*map(range, plan.shape)):
                index = tuple(o * s + i for o, s, i in zip(own, plan.shape, inner, strict=True))
                wanted.append(parts[spec.block][index].tolist())
                assert spread[spec.block][index] == by_scope[place]
        assert merged[place].tolist() == wanted


# -- blocks ------------------------------------------------------------------------------------------


def blocks_of(made: Case) -> SparseBlock:
    return made.scope.members[0][0].block


def fused_numbers(
    made: Case, elements: Sequence[dict[Index, Number]] | None = None
) -> dict[Index, list[Number]]:
    plan, elements = made.plan.scopes[0].block, elements or made.elements()
    return {
        place: [elements[leaf][index] for leaf, index in plan.block_elements(place)]
        for place in plan.places()
    }


every_block = pytest.mark.parametrize("kind", KINDS[:2])


@every_block
@every_dtype
def test_blocks_count_and_measure_themselves(kind: str, dtype: torch.dtype) -> None:
    made = case(kind, dtype)
    block, numbers = blocks_of(made), fused_numbers(made)
    values, other = values_of(made)
    assert block.grid_shape == made.plan.scopes[0].block.grid
    assert block.ndim == 2
    assert block.numblk() == len(numbers)
    assert block.numel() == sum(map(len, numbers.values()))
    assert block.numel_per_block() == len(numbers[0, 0])
    assert block.nnz(2) == sum(abs(float(number)) > 2 for row in numbers.values() for number in row)
    assert block.nnz(eps=1e-8) == block.nnz() == block.numel()
    for given, rows in ((None, numbers), (values, fused_numbers(made, other))):
        for p in (1, 2, 3.5, math.inf):
            wanted = {place: [oracle.norm(row, p)] for place, row in rows.items()}
            assert close(by_place(block.norms(given, p).unsqueeze(-1)), wanted)
            assert torch.equal(block.norms(values=given, p=p), block.norms(given, p))
        merged = block.block_view(given, True, True)
        assert torch.equal(block.block_view(values=given, reorder=True, merge=True), merged)
        assert torch.equal(block.block_view(given, True, False).reshape(merged.shape), merged)
        assert by_place(merged) == rows
        summed = block.reduce(given, lambda one: one.to(torch.float64).sum(-1))
        assert torch.equal(block.reduce(values=given, fn=lambda one: one.double().sum(-1)), summed)
        for place, row in rows.items():
            assert block.min(given)[place].item() == block.min(values=given)[place].item() == min(row)
            assert block.max(given)[place].item() == block.max(values=given)[place].item() == max(row)
            assert summed[place].item() == sum(row)


@every_block
@every_dtype
def test_decisions_about_blocks_reach_their_elements(kind: str, dtype: torch.dtype) -> None:
    made = case(kind, dtype)
    block, rows = blocks_of(made), fused_numbers(made)
    keep = torch.arange(block.numblk()).reshape(block.grid_shape) % 3 > 0
    wanted = oracle.masks(
        oracle.Coupled((oracle.Scope(made.plan.scopes[0].block, (1, 1)),), ((0, 1),)),
        {place: [bool(keep[place])] for place in rows},
    )
    masks = block.get_masks(keep)
    assert_masks(made, masks, wanted)
    assert_masks(made, block.get_masks(block_mask=keep), wanted)
    spread = block.broadcast_block_to_element(keep) if isinstance(block, BlockSpec | BlockCoupling) else None
    by_block = {block: spread} if isinstance(spread, Tensor) else spread
    assert by_block is not None
    for spec, mask in masks.items():
        assert torch.equal(by_block[spec], mask)
    before = [each.bits() for each in made.laid]
    block.apply_mask(mask=masks)
    assert_pruned(made, before, wanted)

    fresh = case(kind, dtype)
    blocks_of(fresh).apply_multiplier(grid=keep * 3)
    assert fused_numbers(fresh) == {
        place: [number * (3 if keep[place] else 0) for number in row] for place, row in rows.items()
    }


@every_block
@every_dtype
def test_thresholds_of_blocks(kind: str, dtype: torch.dtype) -> None:
    rows = fused_numbers(case(kind, dtype))
    values = values_of(case(kind, dtype))[1]
    other = fused_numbers(case(kind, dtype), values)
    limits = {place: 10.0 + 3 * number for number, place in enumerate(rows)}
    grid = torch.tensor(list(limits.values())).reshape(blocks_of(case(kind, dtype)).grid_shape)
    hard: list[tuple[dict[Index, list[Number]], Call]] = [
        (rows, lambda block, _: block.hard_threshold(grid)),
        (rows, lambda block, _: block.hard_threshold(thresholds=grid)),
        (other, lambda block, values: block.hard_threshold(grid, values)),
        (other, lambda block, values: block.hard_threshold(thresholds=grid, values=values)),
    ]
    for by, call in hard:
        made = case(kind, dtype)
        call(blocks_of(made), values_of(made)[0])
        assert fused_numbers(made) == {
            place: row if oracle.norm(by[place]) >= limits[place] else [0] * len(row)
            for place, row in rows.items()
        }
    shrunk = {place: oracle.shrink([float(n) for n in row], limits[place]) for place, row in rows.items()}
    soft: list[Call] = [
        lambda block, _: block.soft_threshold(grid),
        lambda block, ones: block.soft_threshold(grid, ones, 30, 1e-12, 0.0),
        lambda block, ones: block.soft_threshold(
            block_thresholds=grid, conditioners=ones, max_iter=30, atol=1e-12, eps=0.0
        ),
    ]
    for call in soft:
        made = case(kind, dtype)
        call(blocks_of(made), {each.block: torch.ones_like(each.block.data) for each in made.laid})
        for place, row in fused_numbers(made).items():
            rounding = max(torch.finfo(dtype).eps, 1e-7)
            assert [float(number) for number in row] == pytest.approx(shrunk[place], rel=rounding, abs=1e-6)


def test_data_is_live_and_set_data_writes_it() -> None:
    param = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    block = BlockSpec(View(param, (3, 2), (1, 3)), (1, 2))
    assert torch.equal(block.data, param.detach().T)
    block.data[0, 1] = 9
    assert param[1, 0] == 9
    block.set_data(block.data + 1)
    assert param.tolist() == [[1, 2, 3], [10, 5, 6]]
    block.set_data(t=torch.zeros(2, 3))  # parameter-shaped
    assert param.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert block.parameters()[0] is param
    with pytest.raises(ShapeMismatchError, match=r"shape \[6\] fit neither"):
        block.set_data(torch.zeros(6))
    square = nn.Parameter(torch.zeros(2, 2))
    turned = BlockSpec(View(square, (2, 2), (1, 2)), (1, 1))
    turned.set_data(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))  # where both fit it is the view's
    assert square.tolist() == [[1, 3], [2, 4]]
    turned.apply_mask(torch.tensor([[True, False], [True, True]]))
    assert square.tolist() == [[1, 3], [0, 4]]
    half = BlockSpec(torch.zeros(1, dtype=torch.bfloat16), ())
    half.set_data(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64))
    assert half.data.item() == 1.0078125  # rounded once


def test_members_of_a_coupling_have_data_and_masks_by_block() -> None:
    up, down = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3, 2))
    specs = [BlockSpec(up, (1, -1)), BlockSpec(View(up, (0, 1), (3, 1)), ()), BlockSpec(down, (-1, 1))]
    block = BlockCoupling([specs[0], specs[2]], [(0, 1), (1, 0)])
    assert [id(one) for one in block.parameters()] == [id(up), id(down)]
    assert block.data[BlockSpec(down, (-1, 1))].data_ptr() == down.data_ptr()
    block.set_data({specs[2]: torch.full((3, 2), 2.0), specs[0]: torch.full((2, 3), 3.0)})
    assert up.sum() == 18
    assert down.sum() == 12
    with pytest.raises(SparsityError, match="no elements given for block"):
        block.set_data({specs[0]: torch.zeros(2, 3)})
    with pytest.raises(SparsityError, match="no mask given for block"):
        block.apply_mask({specs[0]: torch.zeros(2, 3)})
    with pytest.raises(SparsityError, match="give mask as a mapping"):
        block.apply_mask(torch.zeros(2, 3))
    assert up.sum() == 18
    with pytest.raises(SparsityError, match="needs a mask, found None"):
        block.apply_mask(None)
    both = BlockCoupling([BlockSpec(up[:, :1], ()), BlockSpec(up[:, 1:2], ())])
    assert len(both.parameters()) == 2  # each slice is a tensor of its own


@every_dtype
def test_a_mask_keeps_where_it_is_true_and_leaves_positive_zeros(dtype: torch.dtype) -> None:
    param = nn.Parameter(torch.tensor([math.nan, -1.0, math.inf, -0.0]).to(dtype))
    BlockSpec(param, ()).apply_mask(torch.tensor([False, False, True, True]))
    assert [math.copysign(1, number) for number in param.tolist()] == [1, 1, 1, -1]
    assert param.tolist() == [0, 0, math.inf, 0]
    assert "drops what is True" in str(BlockSpec.apply_mask.__doc__)


# -- views, equality, shapes -------------------------------------------------------------------------


def test_views_by_every_way() -> None:
    param = nn.Parameter(torch.arange(8.0).reshape(2, 4))
    view = View(param=param, shape=(4, 2), stride=(1, 4))
    assert view.ndim == 2
    assert view == View(param, (4, 2), (1, 4)) == View.from_existing(tensor=param.T)
    assert view == View.rearrange(param, "m k -> k m") == View.rearrange(tensor=param, pattern="m k -> k m")
    pairs = View.rearrange(param, "m (k p j) -> m k j p", p=2, j=1)
    for index in product(range(2), range(2), range(1), range(2)):
        assert pairs.data[index] == param[index[0], 2 * index[1] + index[3]]


def test_what_looks_at_the_same_elements_is_equal_and_found_in_a_dict() -> None:
    param, other = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    masks = ScopeSpec(BlockSpec(param, (1, 1), "w"), (1, 4)).get_masks(2)
    for same in (param, param.data, param.detach(), View.from_existing(param), param.T.T):
        assert BlockSpec(same, (1, 1), "another name") in masks
        assert masks[BlockSpec(same, ())].sum() == 8
    for unlike in (
        BlockSpec(param, (1, 2)),
        BlockSpec(param.T, (1, 1)),
        BlockSpec(param[1:], (1, 1)),
        BlockSpec(param.detach().view(torch.int32), (1, 1)),
        BlockSpec(other, (1, 1)),
        BlockSpec(View(param, (2, 4), (4, 1), 4), (1, 1)),
        BlockCoupling([BlockSpec(param, (1, 1))]),
    ):
        assert unlike not in masks
        assert unlike != next(iter(masks))
    assert BlockSpec(param, ()) != "block"
    assert View.from_existing(param) != param.shape
    specs = [BlockSpec(param, ()), BlockSpec(other, ())]
    pair = BlockCoupling(specs, [(0, 1), (1, 0)])
    assert pair == BlockCoupling([BlockSpec(one.view.param, ()) for one in specs], [(0, 1), (1, 0)], "pair")
    assert len({pair, BlockCoupling(specs, [(0, 1), (1, 0)])}) == 1
    assert pair != BlockCoupling(specs)
    assert pair != BlockCoupling(specs[::-1], [(0, 1), (1, 0)])


def test_a_key_stays_valid_while_its_parameter_changes() -> None:
    param = nn.Parameter(torch.ones(2, 2))
    spec = BlockSpec(param, ())
    found = {spec: "mask"}
    spec.set_data(torch.zeros(2, 2))
    assert BlockSpec(param, ()) in found
    same = BlockSpec(param.data, ())
    param.data = param.data.clone()  # as `.to(device)` does
    assert spec in found
    assert spec != same
    assert same not in found
    fresh = BlockSpec(param, ())
    assert (fresh == spec) <= (hash(fresh) == hash(spec))
    spec.data[0, 0] = 5
    assert param[0, 0] == 5


@pytest.mark.parametrize("orders", [None, [], ()])
def test_orders_that_are_left_out_are_the_identity(orders: list[Index] | None) -> None:
    specs = [BlockSpec(torch.ones(2, 3), (1, 1)), BlockSpec(torch.ones(4, 3), (2, 1))]
    fused = BlockCoupling(specs, orders)
    assert fused.orders == ((0, 1), (0, 1)) == BlockCoupling(specs).orders
    assert fused.grid_shape == (2, 3)
    scopes = [ScopeSpec(spec, (1, -1)) for spec in specs]
    coupled = ScopeCoupling(scopes, orders, name="rows")
    assert coupled.orders == ((0, 1), (0, 1)) == ScopeCoupling(scopes).orders
    assert coupled.numblk_per_scope() == 6
    assert BlockCoupling(specs=specs, orders=orders, name="x").name == "x"
    assert ScopeCoupling(scopes=scopes, orders=orders).grid_shape == (2, 1)


def test_shapes_may_span_be_short_or_be_left_empty() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    assert BlockSpec(view=param, shape=(-1, 2), name="b").grid_shape == (1, 3)
    assert BlockSpec(param, ()).grid_shape == (4, 6)
    block = BlockSpec(param, (1, 2))
    for shape, grid in (((), (1, 1)), ((2,), (2, 1)), ((-1, 1), (1, 3)), ((1, 3), (4, 1))):
        scope = ScopeSpec(block=block, shape=shape, name="s")
        assert scope.grid_shape == grid
        assert scope.name == "s"
    with pytest.raises(ShapeMismatchError, match="give one extent for each"):
        BlockSpec(param, (1,))


@every_dtype
def test_a_single_number_and_no_number_are_tensors_too(dtype: torch.dtype) -> None:
    for shape in ((), (0, 4)):
        param = nn.Parameter(torch.full(shape, -3.0, dtype=dtype))
        block = BlockSpec(param, ())
        scope = ScopeSpec(block, ())
        coupled = ScopeCoupling([scope, ScopeSpec(BlockSpec(nn.Parameter(param.detach().clone()), ()), ())])
        assert block.numel() == param.numel()
        assert tuple(block.data.shape) == shape
        assert tuple(block.norms().shape) == shape
        assert block.max().tolist() == param.tolist()
        block.apply_mask(torch.ones(shape, dtype=torch.bool))
        block.apply_multiplier(torch.ones(shape))
        block.set_data(block.data)
        assert param.flatten().tolist() == [-3.0] * param.numel()
        for one in (scope, coupled):
            masks = one.get_masks(one.numblk_per_scope())
            assert all(mask.all() for mask in masks.values())
            one.soft_threshold(1.0)
            assert [n for leaf in one.blocks() for n in leaf.data.flatten().tolist()].count(-3.0) == 0
            one.hard_threshold(nnz=0)
            assert one.nnz() == 0


# -- the package -------------------------------------------------------------------------------------


def test_the_package_lists_its_names_before_any_is_loaded() -> None:
    code = """
import sys, sparseprune
names = {"BlockSpec", "BlockCoupling", "ScopeSpec", "ScopeCoupling", "View", "SparseBlock", "SparseScope",
    "load_masks", "SparsityError", "ShapeMismatchError", "CouplingError", *sparseprune.__all__}
assert names <= set(dir(sparseprune)), names - set(dir(sparseprune))
assert dir(sparseprune) == sorted(set(dir(sparseprune)))
assert "torch" not in sys.modules
from sparseprune import *
for name in sparseprune.__all__:
    assert globals()[name] is getattr(sparseprune, name)
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert set(sparseprune.engine.__all__) <= set(dir(sparseprune.engine))
    for name in sparseprune.engine.__all__:
        assert getattr(sparseprune.engine, name).__name__ == name
