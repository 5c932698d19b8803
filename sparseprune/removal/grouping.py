"""Grouping: query heads of key/value heads and experts of groups, which classes want in equal numbers.

Owns these rules and what a router asks for. Called by widths.py, which knows who says what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sparseprune.spec.problems import shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from sparseprune.removal.family import Routing
    from sparseprune.removal.sections import Section
    from sparseprune.spec import Captures

    Units = Mapping[Captures, NDArray[np.bool_]]


def uneven_heads(section: Section, units: Mapping[str, Units], values: Mapping[str, int]) -> Iterator[str]:
    """Where a key/value head that stays has more query heads than another, or one that goes has any."""
    heads = section.family.heads
    if heads is None or heads.groups is None or not {heads.key, heads.groups} & values.keys():
        return
    for site, groups in units.get(heads.groups, {}).items():
        queries = units.get(heads.key, {}).get(site)
        if queries is None or queries.size % groups.size:
            continue
        counts = queries.reshape(groups.size, -1).sum(axis=1)
        if counts[~groups].any() or len(set(counts[groups].tolist())) > 1:
            yield (
                f"{place_of(site)}: of its {groups.size} key/value heads {int(np.count_nonzero(groups))} "
                f"stay, and they have {shown(counts.tolist())} query heads: each that stays must keep as "
                "many, the others none"
            )


def sized_lists(section: Section, values: Mapping[str, int]) -> Iterator[str]:
    """Where the class of the config checks the length of a list by a size of heads that it derives itself."""
    heads = section.family.heads
    if heads is None or heads.key not in values:
        return
    for key in heads.sized:
        found = section.values.get(key)
        if isinstance(found, dict) and any(found.get(each) for each in ("short_factor", "long_factor")):
            yield (
                f"{heads.key} cannot change: the config's class checks the length of factors in {key} by "
                f"hidden_size // {heads.key}"
            )


def indivisible(section: Section, values: Mapping[str, int]) -> Iterator[str]:
    """Where the class of the config wants the number of heads to divide another."""
    heads = section.family.heads
    if heads is None or heads.divides is None or heads.key not in values:
        return
    whole, number = section.value(heads.divides), values[heads.key]
    if number and whole % number:
        wanted = f"a divisor of {heads.divides}, {whole}"
        yield f"{heads.key} would be {number}, and the config's class wants {wanted}"


def routing_problems(
    section: Section, units: Mapping[str, Units], values: dict[str, int], *, exact: bool
) -> list[str]:
    """What a router asks of the experts that stay; a new number of groups goes into `values`.

    Where it is not `exact` which experts these are, groups are not looked at.
    """
    routing = section.family.routing
    if routing is None or routing.experts not in values:
        return []
    experts, chosen = values[routing.experts], section.value(routing.chosen)
    if experts < chosen:
        return [f"{routing.experts} would be {experts}, fewer than the {chosen} of {routing.chosen}"]
    if routing.groups is None or not experts or not exact:
        return []
    groups, whole = section.value(routing.groups), section.value(routing.experts)
    if not groups or whole % groups:
        return [f"config.json: {routing.groups} is {groups}, wanted a divisor of {whole} {routing.experts}"]
    counts = {site: kept.reshape(groups, -1).sum(axis=1) for site, kept in units[routing.experts].items()}
    problems = [_uneven(site, count.tolist(), routing.groups) for site, count in counts.items()]
    left = sorted({int(np.count_nonzero(count)) for count in counts.values()})
    if len(left) > 1:
        problems.append(f"{routing.groups} would be {_both(left)}, and config.json has one for all")
    if left[0] != groups:
        values[routing.groups] = left[0]
    of_each = (experts // left[0], whole // groups)
    problems += _served(section, routing, left[0], of_each, place_of(next(iter(counts))))
    return [problem for problem in problems if problem]


def _served(
    section: Section, routing: Routing, groups: int, of_each: tuple[int, int], place: str
) -> Iterator[str]:
    """What is in the way of a router with so many groups, of which each has, and had, so many members."""
    left, had = of_each
    serving = 1 if routing.serving is None else section.value(routing.serving)
    chosen = section.value(routing.chosen)
    if groups < serving:
        yield f"{routing.groups} would be {groups}, fewer than the {serving} of {routing.serving}"
    elif left < routing.best:
        taken = f"the router takes the best {routing.best} of each"
        yield f"{place}: its groups of experts would have {left} of {had} members each, and {taken}"
    elif left * serving < chosen:
        yield f"{serving} groups would have fewer experts than the {chosen} of {routing.chosen}"


def _both(numbers: Sequence[int]) -> str:
    return f"{numbers[0]} and {numbers[-1]}"


def place_of(site: Captures) -> str:
    """A site as words: the names of its modules."""
    return ".".join(str(value) for _, value in site if value != "") or "the model"


def _uneven(site: Captures, counts: list[int], key: str) -> str:
    """What to say where groups that keep anything keep unlike numbers; nothing where they do not."""
    if len({count for count in counts if count}) < 2:
        return ""
    return (
        f"{place_of(site)}: its groups of experts would have {shown(counts)} members, and {key} counts "
        "groups of one size: prune the same number in each"
    )
