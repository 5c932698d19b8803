"""Joining and gathering: against every combination there is."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.spec.bound import Captures, TensorInfo
from sparseprune.spec.locating import (
    JoinError,
    find_tensors,
    gather,
    label,
    missing_partners,
    natural_join,
    natural_key,
    sites_of,
)
from sparseprune.spec.patterns import parse_pattern

Member = list[Captures]


@st.composite
def members(draw: st.DrawFn) -> list[Member]:
    found = []
    for _ in range(draw(st.integers(1, 3))):
        names = draw(st.permutations("abc"))[: draw(st.integers(0, 3))]
        values = st.tuples(*[st.integers(0, 1) | st.just("x")] * len(names))
        rows = draw(st.lists(values, min_size=1, max_size=6, unique=True))
        found.append([tuple(zip(names, row, strict=True)) for row in rows])
    return found


def combinations(relations: list[Member]) -> list[tuple[Captures, ...]]:
    def agree(rows: tuple[Captures, ...]) -> bool:
        merged: dict[str, int | str] = {}
        return all(merged.setdefault(name, value) == value for row in rows for name, value in row)

    return [rows for rows in product(*relations) if agree(rows)]


@settings(max_examples=150, deadline=None)
@given(members())
def test_a_join_is_every_combination_that_agrees(relations: list[Member]) -> None:
    wanted = combinations(relations)
    idle = any(row not in {rows[at] for rows in wanted} for at, each in enumerate(relations) for row in each)
    if idle:
        with pytest.raises(JoinError, match="no instance has a place for"):
            natural_join(relations)
        return
    joins = natural_join(relations)
    assert sorted(map(repr, wanted)) == sorted(map(repr, joins.values()))
    for captures, rows in joins.items():
        assert dict(captures) == {name: value for row in rows for name, value in row or ()}


@settings(max_examples=150, deadline=None)
@given(members())
def test_what_is_missing_is_what_has_no_partner(relations: list[Member]) -> None:
    wanted = {
        (number, tuple(pair for pair in row if pair[0] in dict(others[0])))
        for at, rows in enumerate(relations)
        for number, others in enumerate(relations)
        if at != number
        for row in rows
        if not combinations([[row], others])
    }
    assert set(missing_partners(relations)) == wanted


def test_a_join_comes_in_the_natural_order_of_the_captures() -> None:
    layers = [(("layer", number),) for number in (10, 2, 1)]
    joins = natural_join([layers, [(("layer", number), ("name", "x")) for number in (2, 1, 10)]])
    assert [captures[0][1] for captures in joins] == [1, 2, 10]


def test_a_product_is_refused_before_it_is_made() -> None:
    left = [(("a", number),) for number in range(50_000)]
    right = [(("b", number),) for number in range(50_000)]
    with pytest.raises(JoinError, match="there would be 2500000000 instances"):
        natural_join([left, right])


def test_gathering_groups_by_what_is_left_and_keeps_natural_order() -> None:
    names = [f"l.{layer}.e.{expert}" for layer in (1, 0) for expert in (10, 9)]
    sites = sites_of(
        find_tensors([parse_pattern("l.{layer}.e.{expert}")], [TensorInfo(n, "F32", (1,)) for n in names])
    )
    groups = gather(sites, ["expert"])
    assert [label("x", site) for site in groups[(("layer", 0),)]] == [
        "x[layer=0,expert=9]",
        "x[layer=0,expert=10]",
    ]
    assert list(groups) == [(("layer", 0),), (("layer", 1),)]
    assert len(gather(sites, "all")[()]) == 4


def test_captures_in_unlike_order_are_alike_captures() -> None:
    patterns = [parse_pattern("{a}.{b}"), parse_pattern("y.{b}.{a}")]
    sites = sites_of(find_tensors(patterns, [TensorInfo(name, "F32", ()) for name in ("1.2", "y.2.1")]))
    assert [site.captures for site in sites] == [(("a", 1), ("b", 2))] * 2
    assert [label("x", site) for site in sites] == ["x[1.2]", "x[y.2.1]"]


@pytest.mark.parametrize(
    ("low", "high"),
    [("a2", "a10"), ("2", "10"), ("9", "a"), ("a", "a1"), ("a1", "a1b"), ("a02b", "a10b"), ("", "0")],
)
def test_natural_order_counts_digits_as_numbers(low: str, high: str) -> None:
    assert natural_key(low) < natural_key(high)
