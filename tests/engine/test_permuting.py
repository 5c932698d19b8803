"""Orders of columns for N:M: against all splits of two groups in plain loops, and never worse than before."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sparseprune.engine.kernels.regrouping import _ROWS
from sparseprune.engine.permuting import best_order, pruned

Scores = NDArray[np.float32]


def drawn(columns: int, rows: int, seed: int) -> Scores:
    """Squares of weights, of columns of unlike size."""
    chance = np.random.default_rng(seed)
    sizes = np.exp(chance.standard_normal((columns, 1)))
    return (chance.standard_normal((columns, rows)) ** 2 * sizes).astype(np.float32)


def lost_by_loops(scores: Scores, order: list[int], keep: int, group: int) -> float:
    """What N:M prunes, row by row and group by group."""
    total = 0.0
    for row in range(scores.shape[1]):
        for begin in range(0, len(order), group):
            own = sorted(float(scores[column, row]) for column in order[begin : begin + group])
            total += sum(own[: group - keep])
    return total


def least_of_all_splits(scores: Scores, keep: int, group: int) -> float:
    """The least that two groups can lose, over every way to split their columns."""
    columns = range(2 * group)
    orders = (
        [*first, *(each for each in columns if each not in first)] for first in combinations(columns, group)
    )
    return min(lost_by_loops(scores, order, keep, group) for order in orders)


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_two_groups_of_four_get_the_best_of_all_splits(keep: int, seed: int) -> None:
    scores = drawn(8, 9, seed)
    order = best_order(scores, keep, 4, seed=seed)
    found = lost_by_loops(scores, order.tolist(), keep, 4)
    assert found == pytest.approx(least_of_all_splits(scores, keep, 4), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_two_groups_of_two_get_the_best_of_all_splits(seed: int) -> None:
    scores = drawn(4, 9, seed)
    found = lost_by_loops(scores, best_order(scores, 1, 2, seed=seed).tolist(), 1, 2)
    assert found == pytest.approx(least_of_all_splits(scores, 1, 2), rel=1e-5)


@pytest.mark.parametrize(("keep", "group"), [(1, 3), (2, 3), (2, 5), (4, 8), (7, 8)])
def test_no_exchange_of_two_columns_is_left_that_would_lose_less(keep: int, group: int) -> None:
    scores = drawn(2 * group, 7, 1)
    order = best_order(scores, keep, group).tolist()
    found = lost_by_loops(scores, order, keep, group)
    for first in range(group):
        for second in range(group, 2 * group):
            other = list(order)
            other[first], other[second] = other[second], other[first]
            assert lost_by_loops(scores, other, keep, group) > found * (1 - 1e-5)


sizes = st.tuples(st.integers(1, 7), st.integers(1, 6), st.sampled_from([1, 3, _ROWS, _ROWS + 1]))


@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_every_order_is_a_permutation_and_never_loses_more(size: tuple[int, ...], data: Any) -> None:
    groups, group, rows = size
    keep = data.draw(st.integers(0, group))
    scores = drawn(groups * group, rows, data.draw(st.integers(0, 99)))
    order = best_order(scores, keep, group)
    assert sorted(order.tolist()) == list(range(len(scores)))
    plain = np.arange(len(scores))
    assert pruned(scores, order, keep, group) <= pruned(scores, plain, keep, group) * (1 + 1e-6)


@settings(max_examples=40, deadline=None)
@given(sizes, st.data())
def test_what_is_pruned_is_what_plain_loops_count(size: tuple[int, ...], data: Any) -> None:
    groups, group, _ = size
    keep = data.draw(st.integers(0, group))
    scores = drawn(groups * group, 5, data.draw(st.integers(0, 99)))
    order = np.random.default_rng(0).permutation(len(scores))
    expected = lost_by_loops(scores, order.tolist(), keep, group)
    assert pruned(scores, order, keep, group) == pytest.approx(expected, rel=1e-5)


def test_columns_of_many_groups_lose_clearly_less() -> None:
    scores = drawn(128, 40, 0)
    found = pruned(scores, best_order(scores, 2, 4), 2, 4)
    assert found < 0.9 * pruned(scores, np.arange(128), 2, 4)


def test_columns_stay_in_their_cell() -> None:
    scores = drawn(32, 20, 0)
    order = best_order(scores, 2, 4, cells=[0, 0, 0, 1, 1, 1, 2, 2]).tolist()
    assert order != list(range(32))
    assert [sorted(order[begin:end]) for begin, end in ((0, 12), (12, 24), (24, 32))] == [
        list(range(12)),
        list(range(12, 24)),
        list(range(24, 32)),
    ]


def test_one_seed_gives_one_order_and_another_another() -> None:
    scores = drawn(64, 30, 0)
    first = best_order(scores, 2, 4, seed=3).tolist()
    assert best_order(scores, 2, 4, seed=3).tolist() == first
    assert best_order(scores, 2, 4, seed=4).tolist() != first


@pytest.mark.parametrize(
    ("scores", "keep"),
    [
        pytest.param(np.zeros((8, 3), dtype=np.float32), 2, id="all zero"),
        pytest.param(np.ones((8, 3), dtype=np.float32), 2, id="all alike"),
        pytest.param(drawn(8, 3, 0), 4, id="all kept"),
        pytest.param(drawn(8, 3, 0), 0, id="all pruned"),
        pytest.param(drawn(4, 3, 0), 2, id="one group"),
        pytest.param(np.empty((0, 3), dtype=np.float32), 2, id="no columns"),
        pytest.param(np.empty((8, 0), dtype=np.float32), 2, id="no rows"),
    ],
)
def test_columns_stay_as_they_lie_where_nothing_is_to_be_had(scores: Scores, keep: int) -> None:
    assert best_order(scores, keep, 4).tolist() == list(range(len(scores)))


def test_scores_far_from_one_are_compared_as_well_as_others() -> None:
    scores = drawn(16, 20, 0)
    plain = best_order(scores, 2, 4).tolist()
    assert best_order(scores * np.float32(2.0**90), 2, 4).tolist() == plain
    assert best_order(scores * np.float32(2.0**-90), 2, 4).tolist() == plain


def test_work_can_be_given_up_between_rounds() -> None:
    rounds: list[int] = []

    def between() -> None:
        rounds.append(len(rounds))
        if len(rounds) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        best_order(drawn(64, 8, 0), 2, 4, between=between)
    assert len(rounds) == 3


@pytest.mark.parametrize(("columns", "keep", "group"), [(10, 2, 4), (8, 5, 4), (8, -1, 4), (8, 0, 0)])
def test_refuses_columns_that_are_no_whole_groups(columns: int, keep: int, group: int) -> None:
    with pytest.raises(ValueError, match="whole groups"):
        best_order(drawn(columns, 2, 0), keep, group)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_refuses_scores_that_are_not_finite(number: float) -> None:
    scores = drawn(8, 2, 0)
    scores[3, 1] = number
    with pytest.raises(ValueError, match="not finite"):
        best_order(scores, 2, 4)
