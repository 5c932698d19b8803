"""Loops of transposable tiles and of soft thresholds of single elements, against plain loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch

from sparseprune import BlockSpec, ScopeSpec
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import cut_below, two_keys
from sparseprune.engine.kernels.shrinking import kth_mids, shrink_elements


def best(tile: torch.Tensor, kept: int) -> list[list[bool]]:
    """The pattern of the largest sum; of equal ones that which keeps lower places first."""
    size = len(tile)
    rows = [row for row in product((True, False), repeat=size) if sum(row) == kept]
    legal = [
        pattern
        for pattern in product(rows, repeat=size)
        if all(sum(row[column] for row in pattern) == kept for column in range(size))
    ]

    def total(pattern: tuple[tuple[bool, ...], ...]) -> float:
        places = product(range(size), repeat=2)
        return math.fsum(abs(float(tile[at])) for at in places if pattern[at[0]][at[1]])

    return [list(row) for row in max(legal, key=total)]  # max takes the first of equal ones


@pytest.mark.parametrize(("size", "kept"), [(2, 1), (3, 1), (3, 2)])
def test_each_tile_keeps_its_best_pattern(size: int, kept: int) -> None:
    for seed in range(40):
        weights = torch.randint(
            -4, 5, (size, 2 * size), generator=torch.Generator().manual_seed(seed)
        ).float()
        block = BlockSpec(weights, ())
        masks = ScopeSpec(block, (size, size), transposable=True).get_masks(kept * size)
        for first in (0, size):
            part = slice(first, first + size)
            assert masks[block][:, part].tolist() == best(weights[:, part], kept)


@pytest.mark.parametrize("blocks", [1, 2, 4, 5, 12, 40])
@pytest.mark.parametrize("name", ["F32", "F64"])
def test_the_nnz_th_and_the_next_key_are_those_of_a_sorted_scope(blocks: int, name: str) -> None:
    form, chance = FORMATS[name], np.random.default_rng(blocks)
    numbers = chance.integers(-3, 4, 2 * blocks).astype(f"f{form.itemsize}")
    bits = numbers.view(f"u{form.itemsize}")
    for nnz in range(1, blocks + 1):
        kth, following = two_keys(bits, form, blocks, nnz)
        for scope in range(2):
            ranked = sorted(map(abs, numbers[scope * blocks : (scope + 1) * blocks].tolist()), reverse=True)
            assert form.values(kth)[scope] == ranked[nnz - 1]
            assert form.values(following)[scope] == (ranked[nnz] if nnz < blocks else 0)


def test_none_and_infinity_are_thresholds_too() -> None:
    form = FORMATS["F32"]
    numbers = np.array([1.0, -2.0, 3.0, 0.5], dtype=np.float32)
    assert kth_mids(numbers.view("u4"), form, 2, 0, 1.0).tolist() == [np.inf, np.inf]
    assert kth_mids(numbers.view("u4"), form, 2, 1, 1.0).tolist() == [1.5, 1.75]
    assert kth_mids(numbers.view("u4"), form, 2, 1, 0).tolist() == [2.0, 3.0]
    mask = np.ones(4, dtype=np.uint8)
    assert cut_below(numbers.view("u4"), form, form.magnitude + 1, mask) == 0
    assert not mask.any()
    assert not numbers.any()


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_elements_move_towards_zero_by_the_limit_of_their_scope(name: str) -> None:
    form = FORMATS[name]
    numbers = np.array([[1.0, -2.0, 0.25, -0.0], [4.0, -0.5, 0.5, -3.0]], dtype=f"f{form.itemsize}")
    mask = np.full(8, 7, dtype=np.uint8)
    limits = np.array([0.5, 0.0])
    shrink_elements(numbers.view(f"u{form.itemsize}").reshape(-1), form, limits, mask)
    assert numbers.tolist() == [[0.5, -1.5, 0.0, 0.0], [4.0, -0.5, 0.5, -3.0]]
    assert mask.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
