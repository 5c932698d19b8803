"""Locating: which tensors a pattern matches, joined on captures into instances.

Owns captures of members, gathering by `across`, and missing members. Called by binding.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Literal

from sparseprune.engine.dtypes import DTYPES
from sparseprune.spec.bound import Captures
from sparseprune.spec.checking import borrowed_names, leaves_of_table, patterns_of_table
from sparseprune.spec.expressions import ExpressionError, Names, came_to, misfit
from sparseprune.spec.patterns import PatternError
from sparseprune.spec.problems import Problems, listed, nearest, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.expressions import Environment
    from sparseprune.spec.patterns import RegexPattern, TensorPattern
    from sparseprune.spec.schema import CouplingTable, Spec, TensorsTable

    Pattern = TensorPattern | RegexPattern
    Key = Callable[[Captures], object]

_DIGITS = re.compile(r"([0-9]+)")
NaturalKey = tuple[tuple[int, str], ...]


@dataclass(frozen=True, slots=True)
class TensorSite:
    """A tensor that a pattern matches; `tag` tells it apart from all others of its table."""

    captures: Captures
    tag: str
    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class JoinedSite:
    """One instance of a coupling: for each member that it lists, the sites that take part."""

    captures: Captures
    tag: str
    members: tuple[tuple[Site, ...], ...]


Site = TensorSite | JoinedSite


def label(table: str, site: Site) -> str:
    """The name of an instance: the table's, with the captures or what else tells it apart.

    >>> label("channel", JoinedSite((("layer", 3),), "layer=3", ()))
    'channel[layer=3]'
    """
    return f"{table}[{site.tag}]" if site.tag else table


def captured(captures: Captures) -> str:
    """Captures as labels and errors show them; those that hold nothing are left out.

    >>> captured((("stem", ""), ("layer", 3), ("name", "up")))
    'layer=3,name=up'
    """
    return ",".join([f"{name}={value}" for name, value in captures if value != ""])


def find_tensors(
    patterns: Sequence[Pattern],
    tensors: Iterable[TensorInfo],
    keep: Callable[[TensorInfo, Captures], bool] | None = None,
) -> tuple[TensorSite, ...]:
    """The tensors that a pattern matches, the first one that does, in the natural order of the captures.

    `keep` says which of those that match are taken, if not all.
    """
    found: dict[Captures, list[TensorInfo]] = {}
    for tensor in tensors:
        for pattern in patterns:
            captures = pattern.match(tensor.name)
            if captures is not None:
                if pattern.names != patterns[0].names:
                    captures = _reordered(captures, patterns[0].names)
                if keep is None or keep(tensor, captures):
                    found.setdefault(captures, []).append(tensor)
                break
    sites: list[TensorSite] = []
    for captures in in_natural_order(found):
        alike = found[captures]
        if len(alike) == 1:
            sites.append(TensorSite(captures, captured(captures), alike[0]))
        else:
            alike.sort(key=lambda tensor: natural_key(tensor.name))
            sites += [TensorSite(captures, tensor.name, tensor) for tensor in alike]
    return tuple(sites)


def _reordered(captures: Captures, names: Sequence[str]) -> Captures:
    """In the order in which the first pattern has the captures, so that alike captures are equal."""
    return tuple(sorted(captures, key=lambda pair: names.index(pair[0]) if pair[0] in names else len(names)))


def in_natural_order(several: Iterable[Captures]) -> list[Captures]:
    """Captures sorted by their values, numbers by size wherever they stand."""
    rows = list(several)
    values = {value for captures in rows for _, value in captures}
    keys = {value: natural_key(str(value)) for value in values}
    places = {key: place for place, key in enumerate(sorted(set(keys.values())))}
    ranks = {value: places[key] for value, key in keys.items()}  # many rows hold few values: compare numbers
    return sorted(rows, key=lambda captures: [ranks[value] for _, value in captures])


def natural_key(text: str) -> NaturalKey:
    """A key that sorts digits in a text by the number that they are.

    >>> sorted(["layer10", "layer2"], key=natural_key)
    ['layer2', 'layer10']
    """
    parts = _DIGITS.split(text)  # text and digits in turn, so that like is compared with like
    digits = (part.lstrip("0") for part in parts[1::2])
    numbers = [(len(number), number) for number in digits]
    texts = [(0, part) for part in parts[0::2]]
    return tuple(key for pair in zip_longest(texts, numbers) for key in pair if key is not None)


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


Group = dict[Captures, tuple[Site, ...]]
Sites = dict[tuple[str, str], tuple[Site, ...]]
_MOST_COMPARED = 2000  # names of unlike form among which a nearest one is looked for
_PRUNABLE = tuple(dtype.name for dtype in DTYPES.values() if dtype.prunable)


def locate(spec: Spec, tensors: Sequence[TensorInfo], environment: Environment, problems: Problems) -> Sites:
    """The instances of every table by its kind and name; none for a table that cannot have any."""
    sites: Sites = {}
    for name, block in spec.block.items():
        sites["block", name] = _find(f"block.{name}", block, tensors, environment, problems)
    for name, fused in spec.block_coupling.items():
        sites["block_coupling", name] = _join(spec, sites, name, fused, problems)
    for name, scope in spec.scope.items():
        if scope.patterns is not None:
            sites["scope", name] = _find(f"scope.{name}", scope, tensors, environment, problems)
        else:
            kind = "block" if scope.block in spec.block else "block_coupling"
            sites["scope", name] = sites[kind, str(scope.block)]
    for name, coupled in spec.scope_coupling.items():
        sites["scope_coupling", name] = _join(spec, sites, name, coupled, problems)
    _check_found(spec, sites, tensors, problems)
    return sites


def _find(
    place: str,
    table: TensorsTable,
    tensors: Sequence[TensorInfo],
    environment: Environment,
    problems: Problems,
) -> tuple[TensorSite, ...]:
    def is_taken(tensor: TensorInfo, captures: Captures) -> bool:
        for pattern in table.exclude:
            if pattern.match(tensor.name) is not None:
                return False
        if table.where is None:
            return True
        try:
            holds = Names(environment, captures, tensor).value(table.where)
            if not isinstance(holds, bool):
                raise came_to(table.where, holds, "true or false")
        except ExpressionError as error:
            problems.note(misfit(place, "where", error, tensor.name))
            return True
        return holds

    filtered = table.where is not None or table.exclude
    try:
        found = find_tensors(table.patterns or (), tensors, is_taken if filtered else None)
    except PatternError as error:
        problems.add(place, table.patterns_key, str(error))
        return ()
    for tensor in (site.tensor for site in found):
        if tensor.dtype not in _PRUNABLE:
            text = (
                f"{tensor.name} is {tensor.dtype}, which cannot be pruned: narrow the pattern to tensors of "
            )
            problems.add(place, table.patterns_key, text + listed(_PRUNABLE, "or"))
    return found


def _check_found(spec: Spec, sites: Sites, tensors: Sequence[TensorInfo], problems: Problems) -> None:
    """Every table finds a tensor, unless it or a table above it is optional and has none at all."""
    forgiven: set[tuple[str, str]] = set()
    for kind in ("block", "block_coupling", "scope", "scope_coupling"):
        for name, table in getattr(spec, kind).items():
            leaves = leaves_of_table(spec, kind, name)
            if table.optional and not any(sites[leaf] for leaf in leaves):
                forgiven.update(leaves)
    for kind, name in sites:
        table = getattr(spec, kind)[name]
        is_leaf = (kind, name) in leaves_of_table(spec, kind, name)
        if is_leaf and not sites[kind, name] and (kind, name) not in forgiven:
            problems.add(f"{kind}.{name}", table.patterns_key, _nothing_found(table, tensors))


def _nothing_found(table: TensorsTable, tensors: Sequence[TensorInfo]) -> str:
    patterns = table.patterns or ()
    texts = listed((f'"{pattern.text}"' for pattern in patterns), "or")
    try:
        count = len(find_tensors(patterns, tensors))
    except PatternError as error:
        return str(error)
    if count:
        names = [key for key in ("exclude", "where") if getattr(table, key)]
        matches = f"{texts} matches {count} {'tensors' if count > 1 else 'tensor'}"
        return f"{matches}, of which {listed(names)} {'leave' if len(names) > 1 else 'leaves'} none"
    return f"no tensor matches {texts}{_nearest_tensors(patterns, tensors)}"


def _nearest_tensors(patterns: Sequence[Pattern], tensors: Sequence[TensorInfo]) -> str:
    """The names that come nearest to what a pattern describes; names that differ in numbers count once."""
    if not tensors:
        return ": the checkpoint has no tensors"
    forms: dict[str, str] = {}
    for tensor in tensors:
        forms.setdefault(re.sub("[0-9]+", "0", tensor.name), tensor.name)
    some = list(forms)[:_MOST_COMPARED]
    for pattern in patterns:
        close = nearest(pattern.sample, some, 3)
        if close:
            return f"; the nearest names are {listed(forms[form] for form in close)}"
    return f"; the first names are {listed(tensor.name for tensor in tensors[:3])}"


def _join(
    spec: Spec, sites: Sites, name: str, table: CouplingTable, problems: Problems
) -> tuple[JoinedSite, ...]:
    """The instances of a coupling; none where a member has none, which is reported with that member."""
    place = f"{table.member_kind}_coupling.{name}"
    located: list[Sequence[Site]] = [sites[table.member_kind, member] for member in table.members]
    optional = _optional_members(spec, table, located)
    if not all(each for number, each in enumerate(located) if number not in optional):
        return ()
    groups = [gather(each, table.across) for each in located]
    wrong = list(_missing(spec, name, table, groups, optional))
    if not wrong:
        for number, lent in _with_borrowed(spec, table, located).items():
            located[number], groups[number] = lent, gather(lent, table.across)
        wrong += [] if table.across == "all" else _twins(table.members, located)
    for text in wrong:
        problems.add(place, table.members_key, text)
    if wrong:
        return ()
    try:
        return _combined(groups, optional)
    except JoinError as error:
        problems.add(place, table.members_key, str(error))
        return ()


def _optional_members(spec: Spec, table: CouplingTable, located: Sequence[Sequence[Site]]) -> frozenset[int]:
    """The members that an instance may lack; where all could be, the first that is there at all is needed."""
    optional = set()
    for number, member in enumerate(table.members):
        leaves = leaves_of_table(spec, table.member_kind, member)
        itself = getattr(spec, table.member_kind)[member].optional
        if itself or all(getattr(spec, kind)[name].optional for kind, name in leaves):
            optional.add(number)
    if len(optional) == len(located):
        optional.discard(next((number for number, each in enumerate(located) if each), 0))
    return frozenset(optional)


def _with_borrowed(
    spec: Spec, table: CouplingTable, located: Sequence[Sequence[Site]]
) -> dict[int, tuple[Site, ...]]:
    """For members that use captures which only others have: their sites, once for each value of these."""
    found: dict[int, tuple[Site, ...]] = {}
    for number, member in enumerate(table.members):
        names = borrowed_names(spec, table.member_kind, member)
        if names:
            own = [site for site in located[number] if isinstance(site, TensorSite)]
            others = [[site.captures for site in each] for at, each in enumerate(located) if at != number]
            found[number] = tuple(
                TensorSite(captures, captured(captures), own[at].tensor)
                for at, captures in lend([site.captures for site in own], others, names)
            )
    return found


def _twins(members: Sequence[str], located: Sequence[Sequence[Site]]) -> Iterator[str]:
    """What to say where two tensors of one member cannot be told apart by captures."""
    for member, sites in zip(members, located, strict=True):
        first: dict[Captures, TensorSite] = {}
        for site in sites:
            if isinstance(site, TensorSite) and first.setdefault(site.captures, site) is not site:
                other, what = first[site.captures].tensor.name, captured(site.captures)
                yield (
                    f"{shown(member)} has two tensors{f' with {what}' if what else ''}, {other} and "
                    f"{site.tensor.name}: capture what tells them apart, or narrow the pattern"
                )


def _missing(
    spec: Spec, name: str, table: CouplingTable, groups: Sequence[Group], optional: frozenset[int]
) -> Iterator[str]:
    for number, captures in missing_partners([tuple(group) for group in groups]):
        if number not in optional:
            member, what = table.members[number], captured(captures)
            patterns = listed(patterns_of_table(spec, table.member_kind, member), "or")
            yield f"{name}[{what}] has no {shown(member)}: no tensor matches {patterns} with {what}"


def _combined(groups: Sequence[Group], optional: frozenset[int]) -> tuple[JoinedSite, ...]:
    """What joins, every site used; JoinError where that cannot be."""
    joins = natural_join([tuple(group) for group in groups], optional)
    return tuple(
        JoinedSite(
            joined.captures,
            captured(joined.captures),
            tuple(
                [() if row is None else group[row] for group, row in zip(groups, joined.rows, strict=True)]
            ),
        )
        for joined in joins
    )
