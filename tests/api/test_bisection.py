"""The search alone: over integers and every double, among refusals, against the search of all places."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.api.bisection import Found, Refusal, Search, Values, key_of, value_of

REFUSED: Refusal = ("no",)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_neighbouring_doubles_have_neighbouring_keys(value: float) -> None:
    key = key_of(value, whole=False)
    assert value_of(key, whole=False) == value
    assert key_of(math.nextafter(value, math.inf), whole=False) in {key + 1, key_of(math.inf, whole=False)}


def test_values_end_where_the_next_one_does_not_fit() -> None:
    shares = Values.around(0.3, lambda value: 0 <= value <= 1, whole=False)
    assert (shares.at(0), shares.at(shares.last)) == (0.0, 1.0)
    counts = Values.around(3, lambda value: -2 <= value <= 10**15, whole=True)
    assert (counts.at(0), counts.at(counts.last), counts.count) == (-2, 10**15, 10**15 + 3)
    assert (counts.turned().at(0), counts.turned().at(counts.last)) == (10**15, -2)


@pytest.mark.parametrize(
    ("low", "high", "shortest"),
    [(0.24, 0.36, 0.3), (0.25, 0.26, 0.25), (1 / 3, 0.334, 0.334), (0.0, 0.1, 0.0)],
)
def test_of_many_doubles_the_one_with_the_fewest_digits_is_told(
    low: float, high: float, shortest: float
) -> None:
    values = Values(whole=False, begin=0, step=1, count=1 << 62)
    assert values.shortest(key_of(low, whole=False), key_of(high, whole=False)) == shortest


def every(left: list[int | None], states: list[int], most: int) -> int | None:
    """The left of the first place that is not refused and does not exceed `most`, by a plain loop."""
    return next(
        (left[state] for state in states if (found := left[state]) is not None and found <= most), None
    )


@settings(max_examples=300)
@given(
    drops=st.lists(st.integers(0, 5), min_size=1, max_size=30),
    refused=st.sets(st.integers(0, 29)),
    wide=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    follows=st.fractions(0, 2),
    most=st.integers(-5, 160),
)
def test_the_search_finds_what_a_look_at_all_places_finds(
    drops: list[int], refused: set[int], wide: list[int], follows: Fraction, most: int
) -> None:
    """Refusals have words of their own, so that none speaks for others."""
    exact = [100 - total for total in itertools.accumulate(drops)]
    left = [None if state in refused else amount for state, amount in enumerate(exact)]
    states = [state for state in range(len(exact)) for _ in range(wide[state])]
    measured: list[int] = []

    def measure(place: int) -> int | Refusal:
        measured.append(states[place])
        found = left[states[place]]
        return (f"{states[place]} is refused",) if found is None else found

    estimate = [100 - follows * (100 - amount) for amount in exact]
    search = Search(len(states), states.__getitem__, lambda place: estimate[states[place]], measure)
    found = search.first(most)
    assert (None if found is None else found.left) == every(left, states, most)
    assert len(measured) == len(set(measured))
    if found is None:
        possible = [amount for amount in left if amount is not None]
        assert (search.nearest.left if search.nearest else None) == min(possible, default=None)
    else:
        assert found.end - found.begin + 1 == wide[states[found.begin]]
        assert states[found.begin] == states[found.end]


def test_few_places_are_measured_where_estimates_are_close() -> None:
    measured = []

    def measure(place: int) -> int:
        measured.append(place)
        return 10**9 - 1009 * place

    search = Search(10**5, lambda place: place, lambda place: 10**9 - 1000 * place, measure)
    assert search.first(10**9 - 50 * 10**6) == Found(49555, 49555, 10**9 - 1009 * 49555)
    assert len(measured) == 3


def test_one_refusal_by_the_same_words_is_not_asked_for_at_every_place() -> None:
    asked = []

    def measure(place: int) -> Refusal:
        asked.append(place)
        return REFUSED

    search = Search(10**5, lambda place: place, lambda place: -place, measure)
    assert search.first(-500) is None
    assert (search.nearest, search.refusal) == (None, REFUSED)
    assert len(asked) == 7
