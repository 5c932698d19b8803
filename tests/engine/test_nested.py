"""Nested scopes against plain loops: budgets hold on each level, inner survivors lie inside outer ones."""

import math
import random
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune import (
    BlockCoupling,
    BlockSpec,
    Level,
    Matrix,
    ScopeCoupling,
    ScopeSpec,
    SparsityError,
    admm,
    nested_masks,
    nested_projection,
    refit,
)
from sparseprune.engine.grids import surviving
from sparseprune.engine.projections import surviving_each
from tests import oracle
from tests.engine.devices import on_every_device
from tests.engine.structures import FEW, Case, assert_masks, bits_of, cases, numbers_of


def drawn_masks(case: Case, seed: int, kept: float) -> list[dict[oracle.Index, bool]]:
    chance = random.Random(seed)
    return [
        {index: chance.random() < kept for index in product(*map(range, leaf.plan.view))}
        for leaf in case.laid
    ]


def laid(case: Case, masks: list[dict[oracle.Index, bool]]) -> dict[BlockSpec, torch.Tensor]:
    return {
        leaf.block: torch.tensor(list(mask.values()), dtype=torch.bool).reshape(leaf.plan.view)
        for leaf, mask in zip(case.laid, masks, strict=True)
    }


def few(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    chance = random.Random(seed)
    return torch.tensor([chance.choice(FEW) for _ in range(math.prod(shape))]).reshape(shape)


@on_every_device
@settings(max_examples=120)
@given(data=st.data(), kept=st.sampled_from([0.0, 0.3, 0.7, 1.0]))
def test_only_what_masks_keep_competes(device: str, data: st.DataObject, kept: float) -> None:
    """Every structure, dtype and layout; blocks that are left in part, ties, zeros that survive."""
    case = data.draw(cases(device))
    among = drawn_masks(case, data.draw(st.integers(0, 2**32)), kept)
    nnz = data.draw(st.integers(0, case.plan.blocks_per_scope))
    before = [leaf.bits() for leaf in case.laid]
    wanted = oracle.masks_among(case.plan, case.elements(), among, lambda left: min(left, nnz))
    found = case.scope.masks_among(laid(case, among), nnz)
    assert_masks(case, found, wanted)
    assert [leaf.bits() for leaf in case.laid] == before
    if kept == 1.0:
        assert_masks(case, case.scope.get_masks(nnz), wanted)


@on_every_device
@settings(max_examples=60)
@given(data=st.data(), sparsity=st.sampled_from([0.0, 0.29, 0.5, 0.9, 1.0]), unit=st.sampled_from([1, 2, 3]))
def test_a_share_is_one_of_what_is_left(device: str, data: st.DataObject, sparsity: float, unit: int) -> None:
    case = data.draw(cases(device))
    among = drawn_masks(case, data.draw(st.integers(0, 2**32)), 0.6)

    def budget(left: int) -> int:
        return min(left, -(-surviving(sparsity, left) // unit) * unit)

    level = Level(case.scope, sparsity=sparsity, multiple_of=unit)
    given_masks = laid(case, among)
    found = case.scope.masks_among(given_masks, level.budget(given_masks))
    assert_masks(case, found, oracle.masks_among(case.plan, case.elements(), among, budget))


def test_a_share_of_counts_is_that_of_one_count() -> None:
    counts = torch.arange(200)
    for sparsity in (0.0, 0.1, 0.29, 0.3, 0.5, 0.7, 1.0):
        wanted = [surviving(sparsity, int(count)) for count in counts]
        assert surviving_each(sparsity, counts).tolist() == wanted


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("kept", "nnz"), [(4, 2), (3, 2), (1, 1), (0, 2), (8, 2), (4, 0)])
def test_v_n_m_keeps_columns_of_tiles_and_then_weights_of_rows(seed: int, kept: int, nnz: int) -> None:
    """VENOM (Castro et al. 2023): of 8 columns of a tile some are left, of these n in each row."""
    weights = few((8, 16), seed)
    levels = [
        Level(ScopeSpec(BlockSpec(weights, (4, 1)), (1, 8)), kept),
        Level(ScopeSpec(BlockSpec(weights, (1, 1)), (1, 8)), nnz),
    ]
    (mask,) = nested_masks(levels, [weights])
    tiles = mask.reshape(2, 4, 2, 8)
    assert (tiles.sum(-1) == min(kept, nnz)).all()
    assert (tiles.any(1).sum(-1) <= kept).all()
    if kept == 8:  # one level is today's scope
        alone = levels[1].scope.get_masks(nnz)
        assert torch.equal(mask, alone[levels[1].scope.blocks()[0]])


@pytest.mark.parametrize("seed", range(6))
def test_n_of_m_lies_inside_of_fused_channels(seed: int) -> None:
    """Three levels: channels of three matrices, 2:4 inside of them, and one budget over what is left."""
    gate, up, down = few((8, 4), seed), few((8, 4), seed + 10), few((4, 8), seed + 20)
    blocks = [BlockSpec(gate, (1, -1)), BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))]
    channel = ScopeSpec(BlockCoupling(blocks, [(0, 1), (0, 1), (1, 0)]), ())
    params = [gate, up, down]
    fine = [ScopeSpec(BlockSpec(one, ()), (1, 4)) for one in params]
    every = ScopeCoupling([ScopeSpec(BlockSpec(one, ()), ()) for one in params])
    levels = [Level(channel, 5), *(Level(one, 2) for one in fine), Level(every, sparsity=0.5)]
    coarse = nested_masks(levels[:1], params)
    middle = nested_masks(levels[:-1], params)
    found = nested_masks(levels, params)
    assert coarse[0].any(1).sum() == 5
    assert torch.equal(coarse[0].any(1), coarse[2].any(0))
    for outer, inner, own in zip(coarse, middle, found, strict=True):
        assert not (inner & ~outer).any()
        assert not (own & ~inner).any()
    rows = torch.cat([coarse[0], coarse[1], coarse[2].reshape(8, 4)])
    kept = torch.cat([middle[0], middle[1], middle[2].reshape(8, 4)]).sum(-1)
    assert kept.tolist() == [min(2, left) for left in rows.sum(-1).tolist()]
    left = sum(int(one.sum()) for one in middle)
    assert sum(int(one.sum()) for one in found) == surviving(0.5, left)


def test_values_rank_each_level_in_place_of_the_weights() -> None:
    weights, numbers = torch.ones(2, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    levels = [
        Level(ScopeSpec(BlockSpec(weights, (2, 1)), ()), 2),
        Level(ScopeSpec(BlockSpec(weights, ()), (1, 4)), 1),
    ]
    (mask,) = nested_masks(levels, [weights], [torch.tensor([[0.0, 5.0, 5.0, 0.0]] * 2), numbers])
    assert mask.tolist() == [[False, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("gradients", [False, True])
def test_the_projection_of_all_levels_serves_reconstruction(*, gradients: bool) -> None:
    torch.manual_seed(0)
    dense = torch.randn(32, 32)
    inputs = torch.randn(256, 32) @ torch.randn(32, 32)
    outputs = torch.randn(256, 32) @ torch.randn(32, 32)
    g = outputs.T @ outputs / 256 if gradients else None
    matrix = Matrix(dense, inputs.T @ inputs / 256, gradients=g)
    param = torch.empty_like(dense)
    levels = [
        Level(ScopeSpec(BlockSpec(param, (16, 1)), (1, 8)), 4),
        Level(ScopeSpec(BlockSpec(param, ()), (1, 8)), 2),
    ]
    project = nested_projection(levels, [param])
    (found,) = admm([matrix], project)
    tiles = found.mask.reshape(2, 16, 4, 8)
    assert (tiles.sum(-1) == 2).all()
    assert (tiles.any(1).sum(-1) <= 4).all()
    assert not found.weights[~found.mask].any()
    (plain,) = project([dense])
    rebuilt = refit(matrix, plain)

    def lost(weights: torch.Tensor) -> float:
        change = (weights - dense).double()
        middle = torch.eye(32).double() if g is None else g.double()
        return float((middle @ change @ matrix.moment.double() * change).sum())

    assert lost(found.weights) < lost(rebuilt) < lost(dense * plain)


def test_what_does_not_fit_is_refused() -> None:
    weights, other = torch.ones(4, 4), torch.ones(4, 4)
    scope = ScopeSpec(BlockSpec(weights, ()), (1, 4), "rows")
    with pytest.raises(SparsityError, match=r"rows: nnz 5 is out of range"):
        scope.masks_among(None, 5)
    with pytest.raises(SparsityError, match=r"rows: nnz -1 is out of range"):
        scope.masks_among(None, torch.tensor([[1], [2], [-1], [4]]))
    with pytest.raises(SparsityError, match="looks at none of the tensors"):
        nested_projection([Level(scope, 2)], [other])
    tile = ScopeSpec(BlockSpec(weights, ()), (4, 4), "tiles", transposable=True)
    with pytest.raises(SparsityError, match="tiles that are transposable compete whole"):
        tile.masks_among(None, 8)
    weights[0, 0] = torch.nan
    with pytest.raises(SparsityError, match="NaN"):
        scope.masks_among(None, 2)
    kept = torch.ones(4, 4, dtype=torch.bool)
    kept[0, 0] = False
    (mask,) = scope.masks_among({scope.blocks()[0]: kept}, 2).values()
    assert mask.sum(-1).tolist() == [2, 2, 2, 2]
    assert not mask[0, 0]


def test_the_tensors_that_are_ranked_keep_their_bits() -> None:
    weights = torch.tensor([[-0.0, 1.0, torch.inf, -2.0]])
    before = bits_of(weights)
    (mask,) = nested_masks(
        [Level(ScopeSpec(BlockSpec(weights, ()), ()), 3), Level(ScopeSpec(BlockSpec(weights, ()), ()), 1)],
        [weights],
    )
    assert mask.tolist() == [[False, False, True, False]]
    assert bits_of(weights) == before
    assert numbers_of(weights)[2] == math.inf
