"""Membership: which members of numbered lists vanish, and what the others are called, by names alone."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.removal.preview import RemovedMembers, numbered, removed_members

Member = tuple[str, int]

pieces = st.sampled_from(["a", "0", "1", "2", "3", "10"])
names = st.lists(st.lists(pieces, min_size=1, max_size=5).map(".".join), unique=True, max_size=14)


def members_of(name: str) -> list[Member]:
    """The lists that a name passes through with its places in them, outermost first."""
    parts = name.split(".")
    found = []
    for place, part in enumerate(parts):
        if 0 < place < len(parts) - 1 and part.isdigit():
            found.append((".".join(parts[:place]), int(part)))
    return found


def vanished_members(every: Iterable[str], empty: set[str]) -> tuple[set[Member], set[str]]:
    """The outermost members of which all is empty, and what is empty and belongs to none of them."""
    gone: set[Member] = set()
    orphans = set()
    for name in empty:
        whole = [m for m in members_of(name) if all(each in empty for each in every if m in members_of(each))]
        gone |= set(whole[:1])
        if not whole:
            orphans.add(name)
    return gone, orphans


def name_after(name: str, gone: set[Member]) -> str:
    """Every number less by how many of its list with a lower one are gone."""
    parts = name.split(".")
    for before, number in members_of(name):
        lower = sum(other < number for where, other in gone if where == before)
        parts[before.count(".") + 1] = str(number - lower)
    return ".".join(parts)


@settings(max_examples=400)
@given(names, st.data())
def test_the_outermost_members_that_are_empty_vanish_and_the_others_move_up(
    every: list[str], data: st.DataObject
) -> None:
    # As likely a whole list as one tensor of it.
    prefix = data.draw(st.sampled_from(["", "a.", "a.0.", "a.1.", "a.0.a.", "a.1.2."]))
    chosen = [name for name in every if name.startswith(prefix)] or every
    empty = set(chosen if data.draw(st.booleans()) else data.draw(st.sets(st.sampled_from(every or [""]))))
    empty &= set(every)
    found = removed_members(every, frozenset(empty))
    gone, orphans = vanished_members(every, empty)
    assert {(before, number) for before, numbers in found.numbers.items() for number in numbers} == gone
    assert all(list(numbers) == sorted(set(numbers)) for numbers in found.numbers.values())
    assert sorted(found.orphans) == sorted(orphans)
    stays = [name for name in every if not any(member in gone for member in members_of(name))]
    assert [name for name in every if not found.has(name)] == stays
    after = [found.renamed(name) for name in stays]
    assert after == [name_after(name, gone) for name in stays]
    assert len(set(after)) == len(after)


@pytest.mark.parametrize(
    ("name", "lists"),
    [
        ("layers.3.experts.10.up", [("layers", 3, 1), ("layers.3.experts", 10, 3)]),
        ("model.layers.0.mlp.up.weight", [("model.layers", 0, 2)]),
        ("blocks.1.2.weight", [("blocks", 1, 1), ("blocks.1", 2, 2)]),
        ("layers.1.experts.expert_0.wi", [("layers", 1, 1), ("layers.1.experts", 0, 3)]),
        ("layers.01.up", []),
        ("layers.3", []),  # a parameter in a list, not a module
        ("0.weight", []),  # a list without a name
        ("0.1.weight", [("0", 1, 1)]),
        ("weight", []),
        ("", []),
        ("layers..up", []),
        ("layers.3a.up", []),
        ("layers.-1.up", []),
        ("layers.²³.up", []),
        ("layers.٣.up", []),
    ],
)
def test_a_name_passes_through_lists(name: str, lists: list[tuple[str, int, int]]) -> None:
    assert list(numbered(name)) == lists


LAYERS = tuple(
    f"m.layers.{layer}.{each}" for layer in range(4) for each in ("up", "experts.0.w", "experts.1.w")
)
CASES: dict[str, tuple[tuple[str, ...], dict[str, tuple[int, ...]], set[str], dict[str, str]]] = {
    # beginnings of names of which nothing is left -> what vanishes, orphans, some new names
    "a layer with its experts": (("m.layers.1.",), {"m.layers": (1,)}, set(),
        {"m.layers.0.up": "m.layers.0.up", "m.layers.3.experts.1.w": "m.layers.2.experts.1.w"}),
    "two layers and an expert": (
        ("m.layers.0.", "m.layers.2.", "m.layers.3.experts.0."),
        {"m.layers": (0, 2), "m.layers.3.experts": (0,)},
        set(),
        {
            "m.layers.1.experts.1.w": "m.layers.0.experts.1.w",
            "m.layers.3.experts.1.w": "m.layers.1.experts.0.w",
        },
    ),
    "all experts of a layer": (("m.layers.1.experts.",), {"m.layers.1.experts": (0, 1)}, set(),
        {"m.layers.1.up": "m.layers.1.up"}),
    "all layers": (("m.layers.",), {"m.layers": (0, 1, 2, 3)}, set(), {}),
    "no member": (("m.layers.2.up",), {}, {"m.layers.2.up"}, {"m.layers.3.up": "m.layers.3.up"}),
    "nothing": ((), {}, set(), {"m.layers.3.up": "m.layers.3.up"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_members_of_lists_in_lists_vanish(case: str) -> None:
    beginnings, numbers, orphans, after = CASES[case]
    found = removed_members(LAYERS, frozenset(name for name in LAYERS if name.startswith(beginnings)))
    assert (found.numbers, set(found.orphans)) == (numbers, orphans)
    assert {name: found.renamed(name) for name in after} == after
    assert not any(found.has(name) for name in after)


def test_gaps_between_numbers_stay() -> None:
    every = tuple(f"layers.{number}.w" for number in (2, 5, 9, 10))
    found = removed_members(every, frozenset({"layers.5.w"}))
    stays = [found.renamed(name) for name in every if not found.has(name)]
    assert stays == ["layers.2.w", "layers.8.w", "layers.9.w"]


def test_members_whose_names_have_a_word_before_the_number_keep_it() -> None:
    found = RemovedMembers({"h.2.experts": (1,)})
    assert found.has("h.2.experts.expert_1.wi")
    assert found.renamed("h.2.experts.expert_3.wi") == "h.2.experts.expert_2.wi"
    assert found.renamed("h.1.experts.expert_3.wi") == "h.1.experts.expert_3.wi"


def test_lists_of_one_name_in_other_places_are_others() -> None:
    found = RemovedMembers({"a.layers": (0,)})
    assert found.renamed("a.layers.1.w") == "a.layers.0.w"
    assert found.renamed("b.layers.1.w") == "b.layers.1.w"
    assert found.has("a.layers.0.w")
    for name in ("a.layers.1.w", "b.layers.0.w", "a.layers.0"):
        assert not found.has(name)


def test_a_number_of_more_digits_than_python_reads_is_none() -> None:
    name = f"layers.{'9' * 5000}.w"
    assert removed_members([name, "w"], frozenset([name])).orphans == (name,)
