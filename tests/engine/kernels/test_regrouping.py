"""Trades between groups of columns: against every split, or every exchange, in plain loops."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sparseprune.engine.kernels.regrouping import FOUR, lost, trade

SEEDS = (5, 6, 7, 8, 14, 16, 19, 20)  # which lead to calls that are run as Python, too


def whole_numbers(columns: int, rows: int, seed: int) -> NDArray[np.float32]:
    """Scores whose sums are exact in any order, many of them equal."""
    return np.random.default_rng(seed).integers(0, 9, (columns, rows)).astype(np.float32)


def lost_by_loops(scores: NDArray[Any], group: tuple[int, ...], least: int) -> float:
    return sum(sum(sorted(float(one) for one in row)[:least]) for row in scores[list(group)].T)


def both_lost(scores: NDArray[Any], pair: tuple[int, ...], least: int) -> float:
    half = len(pair) // 2
    return lost_by_loops(scores, pair[:half], least) + lost_by_loops(scores, pair[half:], least)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("least", [1, 2, 3])
def test_groups_of_four_get_the_best_of_all_splits(least: int, seed: int) -> None:
    scores = whole_numbers(16, 5, seed)
    pairs = np.random.default_rng(seed).permutation(16).reshape(2, 8)
    members = [set(pair.tolist()) for pair in pairs]
    trade(scores, pairs, least)
    for pair, own in zip(pairs, members, strict=True):
        assert set(pair.tolist()) == own
        splits = [(*first, *sorted(own - set(first))) for first in combinations(sorted(own), FOUR)]
        best = min(both_lost(scores, split, least) for split in splits)
        assert both_lost(scores, tuple(pair.tolist()), least) == best


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("group", "least"), [(2, 1), (3, 1), (3, 2), (5, 3)])
def test_other_groups_make_the_best_exchange_of_two_columns(group: int, least: int, seed: int) -> None:
    scores = whole_numbers(2 * group, 5, seed)
    pairs = np.arange(2 * group).reshape(1, -1)
    before = tuple(range(2 * group))
    ways = [before]
    for one in range(group):
        for other in range(group, 2 * group):
            way = list(before)
            way[one], way[other] = way[other], way[one]
            ways.append(tuple(way))
    trade(scores, pairs, least)
    found = both_lost(scores, tuple(pairs[0].tolist()), least)
    assert found == min(both_lost(scores, way, least) for way in ways)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("group", "least"), [(2, 0), (2, 1), (4, 2), (5, 5)])
def test_what_groups_lose_is_the_sum_of_the_lowest_of_each_row(group: int, least: int, seed: int) -> None:
    scores = whole_numbers(2 * group, 5, seed)
    groups = np.random.default_rng(seed).permutation(2 * group).reshape(2, group)
    assert lost(scores, groups, least) == both_lost(scores, tuple(groups.reshape(-1).tolist()), least)
