"""Joining: which instances of a coupling's members belong together.

Members join on the captures that they share; what only one member captures makes more instances. With
`across`, the instances of a member that differ in nothing else are gathered first. Pure relations over
captures, linear in what comes in and out; knows neither tables nor shapes. Called by `locating`.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from sparseprune.spec.sites import captured, in_natural_order

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from sparseprune.spec.bound import Captures
    from sparseprune.spec.sites import Site

    Key = Callable[[Captures], object]

Rows = tuple["Captures | None", ...]  # one of each member, None for none
_ROWS_BEYOND_INPUT = 1000


class JoinError(ValueError):
    """Members that do not make up instances; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Joined:
    """One row of a join: all its captures, and the row of each member."""

    captures: Captures
    rows: Rows


def gather(
    sites: Iterable[Site], across: Collection[str] | Literal["all"]
) -> dict[Captures, tuple[Site, ...]]:
    """The sites by those of their captures that are not gathered across, each group in its old order."""
    groups: dict[Captures, list[Site]] = {}
    for site in sites:
        left: Captures = () if across == "all" else site.captures
        if left and across:
            left = tuple([pair for pair in left if pair[0] not in across])
        groups.setdefault(left, []).append(site)
    return {captures: tuple(group) for captures, group in groups.items()}


def natural_join(
    members: Sequence[Collection[Captures]], optional: Collection[int] = ()
) -> tuple[Joined, ...]:
    """Every combination of one row of each member that agrees where captures have one name, in natural order.

    The rows of one member all have the same names in the same order. A combination may do without a row of
    the members that are numbered in `optional`. JoinError where a row fits no combination, and before a
    product gets out of hand.

    >>> layers, heads = [(("a", 1),)], [(("a", 1), ("b", 7)), (("a", 1), ("b", 8))]
    >>> [joined.captures for joined in natural_join([layers, heads])]
    [(('a', 1), ('b', 7)), (('a', 1), ('b', 8))]
    """
    limit = 2 * sum(map(len, members)) + _ROWS_BEYOND_INPUT
    order = sorted(range(len(members)), key=lambda number: number in optional)
    found: list[tuple[Captures, Rows]] = [((), ())]
    known: Sequence[Captures] = [()]
    for number in order:
        have, key = _shared_keys(known, members[number])
        partners: dict[object, list[Captures | None]] = {}
        for row in members[number]:
            partners.setdefault(key(row), []).append(row)
        alone: list[Captures | None] = [None] if number in optional else []
        matches = [partners.get(have(captures), alone) for captures, _ in found]
        count = sum(map(len, matches))
        if count > limit:
            raise JoinError(
                f"the members share so few captures that there would be {count} instances: "
                "give one name to what belongs together, or gather with across"
            )
        found = [
            (_extended(captures, row), (*rows, row))
            for (captures, rows), match in zip(found, matches, strict=True)
            for row in match
        ]
        if number not in optional:  # what only optional members capture joins nothing
            known = [captures for captures, _ in found]
    listed = [order.index(number) for number in range(len(members))]
    found = [(captures, tuple([rows[at] for at in listed])) for captures, rows in found]
    _check_used([rows for _, rows in found], members)
    by_captures = dict(found)
    return tuple([Joined(captures, by_captures[captures]) for captures in in_natural_order(by_captures)])


def lend(
    rows: Sequence[Captures], others: Sequence[Sequence[Captures]], names: Collection[str]
) -> list[tuple[int, Captures]]:
    """What each row becomes once it has these names too, as the others have them beside it, with its number.

    >>> lend([(("layer", 1),)], [[(("layer", 1), ("expert", 7)), (("layer", 2), ("expert", 8))]], ["expert"])
    [(0, (('layer', 1), ('expert', 7)))]
    """
    found = list(enumerate(rows))
    wanted = set(names)
    for lender in others:
        lent = wanted.intersection(name for name, _ in next(iter(lender), ()))
        if lent and found:
            wanted -= lent
            have, key = _shared_keys([row for _, row in found], lender)
            partners: dict[object, dict[Captures, None]] = {}
            for row in lender:
                extra = tuple(pair for pair in row if pair[0] in lent)
                partners.setdefault(key(row), {})[extra] = None
            found = [(at, row + extra) for at, row in found for extra in partners.get(have(row), ())]
    return found


def missing_partners(members: Sequence[Collection[Captures]]) -> tuple[tuple[int, Captures], ...]:
    """Which member has no row for captures that another one has, and these (only the names of both)."""
    missing: dict[tuple[int, Captures], None] = {}
    for rows in members:
        for number, others in enumerate(members):
            if others is not rows:
                here, there = _shared_keys(rows, others)
                known = set(map(there, others))
                if not known.issuperset(map(here, rows)):
                    lacking = [row for row in rows if here(row) not in known]
                    missing |= {(number, _shared(row, others)): None for row in lacking}
    return tuple(missing)


def _check_used(joins: Sequence[Rows], members: Sequence[Collection[Captures]]) -> None:
    for number, rows in enumerate(members):
        used = {joined[number] for joined in joins}
        for row in rows:
            if row not in used:
                raise JoinError(
                    f"no instance has a place for {captured(row)}: no combination of members fits it"
                )


def _shared_keys(rows: Collection[Captures], others: Collection[Captures]) -> tuple[Key, Key]:
    """What to compare a row of either by: the pairs of the names that both have, in one order."""
    names = [[name for name, _ in next(iter(each), ())] for each in (rows, others)]
    shared = [name for name in names[0] if name in names[1]]
    here, there = (_picker([each.index(name) for name in shared]) for each in names)
    return here, there


def _picker(places: Sequence[int]) -> Key:
    return itemgetter(*places) if places else lambda _: ()


def _shared(row: Captures, others: Collection[Captures]) -> Captures:
    names = {name for name, _ in next(iter(others), ())}
    return tuple(pair for pair in row if pair[0] in names)


def _extended(captures: Captures, row: Captures | None) -> Captures:
    """The captures with those of a row that fits them."""
    if row is None or row == captures:
        return captures
    known = dict(captures)
    return captures + tuple([pair for pair in row if pair[0] not in known])
