"""Transposable N:M: equal to all patterns looked at one by one; refused where it makes no sense."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, product
from math import frexp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.engine import BlockSpec, ScopeSpec, transposing
from sparseprune.engine.kernels.tiles import SCORE_BITS
from sparseprune.engine.projections import projection
from sparseprune.engine.transposing import select_transposable
from sparseprune.errors import ShapeMismatchError, SparsityError

Tile = tuple[bool, ...]
CASES = [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)]


def legal(size: int, kept: int) -> list[Tile]:
    """Every pattern with as many in each row and column, those that keep lower indices first."""
    rows = [tuple(column in one for column in range(size)) for one in combinations(range(size), kept)]
    tiles = [sum(chosen, ()) for chosen in product(rows, repeat=size)]
    return [one for one in tiles if all(sum(one[column::size]) == kept for column in range(size))]


def best(scores: list[float], size: int, kept: int) -> Tile:
    """The pattern with the largest sum, by exact fractions of scores that are rounded as documented."""
    _, exponent = frexp(max(scores))
    unit = Fraction(2) ** (exponent - SCORE_BITS)
    whole = [Fraction(score) // unit for score in scores]
    every = legal(size, kept)
    sums = [sum(score for score, keep in zip(whole, one, strict=True) if keep) for one in every]
    return every[sums.index(max(sums))]


@pytest.mark.parametrize(("kept", "patterns"), [(1, 24), (2, 90), (3, 24)])
def test_a_tile_of_four_rows_has_so_many_patterns(kept: int, patterns: int) -> None:
    assert len(set(legal(4, kept))) == patterns


@pytest.mark.parametrize(("size", "kept"), CASES)
@given(data=st.data())
def test_the_engine_keeps_what_the_best_of_all_patterns_keeps(
    size: int, kept: int, data: st.DataObject
) -> None:
    numbers = st.one_of(
        st.integers(0, 2).map(float), st.floats(0, 1e300, width=64), st.floats(0, 4, width=32)
    )
    scores = data.draw(st.lists(numbers, min_size=size**2, max_size=size**2))
    found = select_transposable(torch.tensor([scores], dtype=torch.float64), size, kept)
    assert tuple(found[0].tolist()) == best(scores, size, kept)


@pytest.mark.parametrize(("size", "kept"), CASES)
def test_operations_on_tensors_find_what_the_compiled_loop_finds(size: int, kept: int) -> None:
    generator = torch.Generator().manual_seed(size * kept)
    scores = torch.rand(300, size**2, generator=generator, dtype=torch.float64)
    scores[100:] = scores[100:].mul(3).floor()
    scores[200:] *= 2.0 ** torch.randint(-1080, 1000, (100, size**2), generator=generator).double()
    loop = select_transposable(scores, size, kept)
    assert torch.equal(loop, transposing._select(scores, size, kept))


def test_of_equal_sums_lower_indices_are_kept() -> None:
    zero = select_transposable(torch.zeros(1, 16), 4, 2).reshape(4, 4)
    assert zero.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_tiles_are_decided_alike_alone_and_among_many() -> None:
    scores = torch.rand(20_000, 16, generator=torch.Generator().manual_seed(1))
    together = select_transposable(scores, 4, 2)
    apart = torch.cat([select_transposable(some, 4, 2) for some in torch.split(scores, 777)])
    assert torch.equal(together, apart)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_row_and_column_of_a_tile_keeps_two_bit_for_bit(dtype: torch.dtype) -> None:
    dense = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(2)).to(dtype)
    weights = dense.clone()
    scope = ScopeSpec(BlockSpec(weights, (1, 1, 1)), (1, 4, 4), transposable=True)
    (mask,) = scope.get_masks(8).values()
    scope.hard_threshold(nnz=8)
    tiles = mask.reshape(3, 2, 4, 3, 4)
    assert bool((tiles.sum(2) == 2).all())
    assert bool((tiles.sum(4) == 2).all())
    assert torch.equal(weights, torch.where(mask, dense, 0))


def test_the_sum_is_no_smaller_than_that_of_a_greedy_choice() -> None:
    scores = torch.rand(200, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    kept = (scores * select_transposable(scores, 4, 2)).sum(1)
    for tile, total in zip(scores.tolist(), kept.tolist(), strict=True):
        rows, columns, greedy = [0] * 4, [0] * 4, 0.0
        for at in sorted(range(16), key=lambda at: -tile[at]):
            if rows[at // 4] < 2 and columns[at % 4] < 2:
                rows[at // 4] += 1
                columns[at % 4] += 1
                greedy += tile[at]
        assert total >= greedy - 1e-12


def test_a_projection_keeps_the_tiles_of_given_tensors() -> None:
    param = torch.zeros(8, 8)
    scope = ScopeSpec(BlockSpec(param, ()), (4, 4), transposable=True)
    given_tensor = torch.randn(8, 8, generator=torch.Generator().manual_seed(4))
    (mask,) = projection(scope, 8, [param])([given_tensor])
    assert bool((mask.reshape(2, 4, 2, 4).sum(1) == 2).all())
    assert bool((mask.reshape(2, 4, 2, 4).sum(3) == 2).all())


@pytest.mark.parametrize(("nnz", "left"), [(0, 0), (16, 64)])
def test_none_and_all_survive(nnz: int, left: int) -> None:
    weights = torch.ones(8, 8)
    ScopeSpec(BlockSpec(weights, ()), (4, 4), transposable=True).hard_threshold(nnz=nnz)
    assert int(weights.count_nonzero()) == left


def test_what_makes_no_sense_is_refused() -> None:
    weights = torch.ones(16, 16)
    scope = ScopeSpec(BlockSpec(weights, (), "w"), (4, 4), "s", transposable=True)
    with pytest.raises(SparsityError, match="s: nnz 7 is not transposable: wanted a multiple of 4"):
        scope.get_masks(7)
    with pytest.raises(SparsityError, match="a transposable scope has no threshold: give nnz"):
        scope.hard_threshold(thresholds=0.5)
    with pytest.raises(SparsityError, match="nnz 20 is out of range"):
        scope.get_masks(20)
    weights[3, 3] = float("inf")
    with pytest.raises(SparsityError, match="s: transposable N:M adds scores up: found one that is infinite"):
        scope.get_masks(8)
    for block, shape in (((), (1, 4)), ((), (8, 8)), ((1, 2), (4, 4))):
        with pytest.raises(ShapeMismatchError, match="cannot be transposable"):
            ScopeSpec(BlockSpec(weights, block), shape, transposable=True)
