"""Loops of transposable tiles and of soft thresholds, against plain loops."""

import math
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import compress, product
from typing import Any

import numpy as np
import pytest
import torch

from sparseprune import BlockSpec, ScopeSpec
from sparseprune.engine.kernels.formats import FORMATS, Format
from sparseprune.engine.kernels.selecting import cut_below, two_keys
from sparseprune.engine.kernels.shrinking import kth_mids, scale_blocks, shrink_elements
from sparseprune.engine.kernels.sums import block_sums, storage_order
from sparseprune.engine.kernels.tiles import select_tiles
from sparseprune.engine.scoring import pairwise_sum

Shape = tuple[int, ...]
Pattern = tuple[tuple[bool, ...], ...]


@cache
def legal_patterns(size: int, kept: int) -> list[Pattern]:
    """Those that keep so many of every row and column; of two the one that keeps lower places comes first."""
    rows = [row for row in product((True, False), repeat=size) if sum(row) == kept]
    return [
        pattern
        for pattern in product(rows, repeat=size)
        if all(sum(row[column] for row in pattern) == kept for column in range(size))
    ]


def best(tile: torch.Tensor, kept: int) -> list[list[bool]]:
    """The pattern of the largest sum; of equal ones that which keeps lower places first."""
    numbers = [[abs(number) for number in row] for row in tile.tolist()]

    def total(pattern: Pattern) -> float:
        pairs = zip(numbers, pattern, strict=True)
        return math.fsum(number for row, kept in pairs for number in compress(row, kept))

    legal = legal_patterns(len(tile), kept)
    return [list(row) for row in max(legal, key=total)]  # max takes the first of equal ones


@pytest.mark.parametrize(("size", "kept"), [(2, 1), (3, 1), (3, 2)])
def test_each_tile_keeps_its_best_pattern(size: int, kept: int) -> None:
    for seed in range(8):
        weights = torch.randint(
            -4, 5, (size, 5 * size), generator=torch.Generator().manual_seed(seed)
        ).float()
        block = BlockSpec(weights, ())
        masks = ScopeSpec(block, (size, size), transposable=True).get_masks(kept * size)
        for first in range(0, 5 * size, size):
            part = slice(first, first + size)
            assert masks[block][:, part].tolist() == best(weights[:, part], kept)


@pytest.mark.parametrize("columns", [4, 12, 144])
@pytest.mark.parametrize("name", FORMATS)
def test_patterns_of_every_dtype_are_decided_by_their_magnitudes(name: str, columns: int) -> None:
    form, chance = FORMATS[name], np.random.default_rng(columns)
    step = 1 << max(0, form.mantissa - 20)  # so that sums are exact in whatever adds up
    small, large = chance.integers(0, 1 << form.mantissa, (2, 8 * columns)) // step * step
    numbers = np.where(chance.random(small.size) < 0.5, small, form.limit(1.0) + large)
    numbers[: numbers.size // 2 : 3] = 0
    numbers.reshape(8, -1)[4:, :4] = small.reshape(8, -1)[4:, :4]  # subnormal throughout
    bits = numbers.astype(form.pattern)
    keep = np.empty(bits.size, dtype=np.uint8)
    signs = chance.integers(0, 2, bits.size).astype(form.pattern) << (8 * form.itemsize - 1)
    select_tiles((bits | signs).astype(form.pattern), form, columns, 4, 2, keep)
    values = torch.from_numpy(form.values(bits)).reshape(8, columns)
    for row in (0, 4):
        for column in range(0, columns, 4):
            tile = (slice(row, row + 4), slice(column, column + 4))
            wanted = best(values[tile], 2)
            assert keep.reshape(8, columns)[tile].astype(bool).tolist() == wanted


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


def numbers_of(name: str, size: int, seed: int) -> np.ndarray[Any, Any]:
    """Patterns of finite numbers of either sign, among them zeros of either sign and the lowest."""
    form, chance = FORMATS[name], np.random.default_rng(seed)
    few = [0, form.magnitude + 1, 1, form.magnitude + 2, form.infinity - 1]
    keys = chance.integers(0, form.infinity, size - len(few), dtype=np.uint64)
    signs = chance.integers(0, 2, keys.size, dtype=np.uint64) * np.uint64(form.magnitude + 1)
    found: np.ndarray[Any, Any] = np.array([*few, *(keys | signs).tolist()], dtype=form.pattern)
    return found


def rounded(wanted: float, form: Format) -> int:
    """The key of the nearest number by bisection over all of them, of two the even one."""
    low, high = 0, form.infinity - 1
    while high - low > 1:
        middle = (low + high) // 2
        if form.values(np.array([middle], dtype=form.pattern))[0] <= wanted:
            low = middle
        else:
            high = middle
    below, above = (
        Fraction(float(form.values(np.array([key], dtype=form.pattern))[0])) for key in (low, low + 1)
    )
    left = Fraction(wanted) - below - (above - Fraction(wanted))
    return low + 1 if left > 0 or (left == 0 and low % 2) else low


def keys_after(bits: np.ndarray[Any, Any], form: Format, work: Callable[[float], float]) -> list[int]:
    return [
        rounded(work(float(value)), form) for value in form.values(bits & bits.dtype.type(form.magnitude))
    ]


NARROW = ["F32", "BF16", "F16", "F8_E5M2", "F8_E4M3"]


@pytest.mark.parametrize("run", [1, 3, 4, 20])
@pytest.mark.parametrize("name", NARROW)
def test_differences_and_products_are_rounded_once_to_the_nearest_number(name: str, run: int) -> None:
    form, chance = FORMATS[name], np.random.default_rng(run)
    bits = numbers_of(name, 60, run)
    sign, magnitude = (bits.dtype.type(each) for each in (form.magnitude + 1, form.magnitude))
    numbers = chance.choice([0.0, 1.0, 0.5, 0.123456789, 1 - 2.0**-9], 60 // run)
    factors, mask = np.repeat(numbers, run), np.empty(60, dtype=np.uint8)
    products = iter(factors.tolist())
    wanted = keys_after(bits, form, lambda value: value * next(products))
    found = bits.copy()
    scale_blocks(found.reshape(-1, run), form, numbers, mask)
    assert (found & magnitude).tolist() == wanted
    assert (found & sign).tolist() == np.where(factors > 0, bits & sign, 0).tolist()
    assert mask.tolist() == (factors > 0).tolist()

    limits = form.values(np.sort(bits & magnitude))[30] * numbers
    each = iter(np.repeat(limits, run).tolist())
    rests = [value - next(each) for value in form.values(bits & magnitude).tolist()]
    wanted = [rounded(max(rest, 0), form) for rest in rests]
    found = bits.copy()
    shrink_elements(found.reshape(-1, run), form, limits, mask)
    assert (found & magnitude).tolist() == wanted
    left = np.array([rest > 0 for rest in rests])
    assert (found & sign).tolist() == np.where(left, bits & sign, 0).tolist()
    assert mask.tolist() == [key > 0 for key in wanted]


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3, 1), (3, 1, 0, 2), (1, 3, 2, 0), (2, 3, 0, 1)])
@pytest.mark.parametrize("gap", [1, 2])
def test_blocks_in_any_storage_are_summed_and_scaled(rank: int, order: Shape, gap: int) -> None:
    for shape in ((3, 4, 2, 5), (7, 1, 1, 4), (1, 8, 6, 1), (2, 1, 600, 1), (1, 1, 1, 1), (0, 2, 1, 3)):
        chance = np.random.default_rng(rank)
        stored = chance.uniform(-2, 2, [gap * shape[dim] for dim in order]).astype(np.float32)
        view = stored[(slice(None, None, gap),) * 4].transpose(np.argsort(order))
        before = stored.copy().transpose(np.argsort(order))[(slice(None, None, gap),) * 4]
        sums = block_sums(view.view("u4"), rank, FORMATS["F32"], 2)
        squares = torch.from_numpy(np.square(np.ascontiguousarray(view), dtype=np.float64))
        assert sums.tolist() == pairwise_sum(squares, 4 - rank).tolist()
        factors = np.asarray(chance.choice([0.0, 0.25, 1.0], shape[:rank]))
        mask = np.full(view.size, 7, dtype=np.uint8)
        scale_blocks(view.view("u4"), FORMATS["F32"], factors, mask)
        each = np.broadcast_to(factors.reshape(factors.shape + (1,) * (4 - rank)), shape)
        assert view.tolist() == (before * each).tolist()
        in_storage = each.transpose(storage_order(view))
        assert mask.tolist() == (in_storage.reshape(-1) > 0).tolist()


@pytest.mark.parametrize("k_weight", [0, 1.0, 0.3])
@pytest.mark.parametrize("name", NARROW)
def test_thresholds_of_four_elements_are_those_of_a_sorted_scope(name: str, k_weight: float) -> None:
    form, bits = FORMATS[name], numbers_of(name, 40, 3)
    bits[8:12] = bits[5]  # ties
    magnitudes = form.values(bits & bits.dtype.type(form.magnitude)).reshape(-1, 4)
    ranked = -np.sort(-magnitudes, axis=1)
    for nnz in range(1, 5):
        following = ranked[:, nnz] if nnz < 4 else np.zeros(10)
        wanted = (ranked[:, nnz - 1] + k_weight * following) / (1 + k_weight)
        assert kth_mids(bits, form, 4, nnz, k_weight).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", ["F32", "F64"])
def test_elements_move_towards_zero_by_the_limit_of_their_scope(name: str) -> None:
    form = FORMATS[name]
    numbers = np.array([[1.0, -2.0, 0.25, -0.0], [4.0, -0.5, 0.5, -3.0]], dtype=f"f{form.itemsize}")
    mask = np.full(8, 7, dtype=np.uint8)
    limits = np.array([0.5, 0.0])
    shrink_elements(numbers.view(f"u{form.itemsize}"), form, limits, mask)
    assert numbers.tolist() == [[0.5, -1.5, 0.0, 0.0], [4.0, -0.5, 0.5, -3.0]]
    assert mask.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
