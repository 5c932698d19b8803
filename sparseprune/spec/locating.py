"""Locating: the tensors that patterns match, joined on captures into the instances of couplings.

Owns labels, the natural order, gathering by `across`, and missing members. Called by binding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.dtypes import DTYPES
from sparseprune.spec.bound import Captures, TensorInfo
from sparseprune.spec.checking import borrowed_names, patterns_of
from sparseprune.spec.expressions import ExpressionError, Names, came_to, misfit
from sparseprune.spec.patterns import PatternError
from sparseprune.spec.problems import Problems, listed, nearest, shown
from sparseprune.spec.schema import CouplingTable
from sparseprune.spec.structures import (
    NAMES,
    Index,
    Kind,
    Outlook,
    captures_of,
    find,
    hidden_size,
    matrices,
    outlook,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

    from sparseprune.spec.patterns import RegexPattern, TensorPattern
    from sparseprune.spec.schema import Spec, TensorsTable

    Pattern = TensorPattern | RegexPattern
    Match = tuple[Captures, TensorInfo]
    Key = Callable[[Captures], object]

_DIGITS = re.compile(r"([0-9]+)")
NaturalKey = tuple[tuple[int, str], ...]


class TensorSite(Struct, frozen=True):
    """A tensor that a pattern matches; `tag` is unique in its table: the captures, or the tensor's name.

    Of a structure the tensor has the shape of the `outlook` on its units.
    """

    captures: Captures
    tag: str
    tensor: TensorInfo
    outlook: Outlook | None = None


class JoinedSite(Struct, frozen=True):
    """One instance of a coupling: for each member that it lists, the sites that take part."""

    captures: Captures
    tag: str
    members: tuple[tuple[Site, ...], ...]


Site = TensorSite | JoinedSite
Found = Mapping[Kind, "Sequence[tuple[Captures, TensorInfo, Outlook]]"]


def _of_kind(kind: Kind, index: Index) -> Iterator[tuple[Captures, TensorInfo, Outlook]]:
    if kind == "matrices":
        for captures, tensor, seen in matrices(index):
            yield captures, TensorInfo(tensor.name, tensor.dtype, seen.shape, tensor.codes), seen
        return
    tensors = {tensor.name: tensor for members in index.forms.values() for tensor in members.values()}
    known: dict[tuple[object, ...], Outlook] = {}
    for structure in find(kind, index):
        for part in structure.parts:
            if not part.follows:
                tensor = tensors[part.tensor]
                key = tensor.shape, replace(part, tensor="", part="")
                if key not in known:
                    known[key] = outlook(part, tensor.shape)
                seen = known[key]
                yield (
                    captures_of(structure, part),
                    TensorInfo(tensor.name, tensor.dtype, seen.shape, tensor.codes),
                    seen,
                )


def label(place: str, site: Site) -> str:
    """The name of an instance: the table's, with its tag.

    >>> label("block_coupling.channel", JoinedSite((("layer", 3),), "layer=3", ()))
    'channel[layer=3]'
    """
    table = place.rpartition(".")[2]
    return f"{table}[{site.tag}]" if site.tag else table


def captured(captures: Captures) -> str:
    """Captures as labels and errors show them, without empty ones.

    >>> captured((("stem", ""), ("layer", 3), ("name", "up")))
    'layer=3,name=up'
    """
    return ",".join([f"{name}={value}" for name, value in captures if value != ""])


def find_tensors(
    patterns: Sequence[Pattern], tensors: Iterable[TensorInfo], exclude: Sequence[Pattern] = ()
) -> list[Match]:
    """The tensors that a pattern matches and none excludes, with the captures of the first that does."""
    found: list[Match] = []
    for tensor in tensors:
        name = tensor.name
        for pattern in patterns:
            captures = pattern.match(name) if pattern.literal in name else None
            if captures is not None:
                if pattern.names != patterns[0].names:
                    captures = _reordered(captures, patterns[0].names)
                found.append((captures, tensor))
                break
    return without(found, exclude)


def without(found: Sequence[Match], exclude: Sequence[Pattern]) -> list[Match]:
    """Those whose tensors no pattern matches."""
    left = list(found)
    for pattern in exclude:
        literal, match = pattern.literal, pattern.match
        left = [one for one in left if literal not in one[1].name or match(one[1].name) is None]
    return left


def sites_of(matches: Iterable[Match]) -> tuple[TensorSite, ...]:
    """The sites of tensors that matched, in the natural order of their captures."""
    found: dict[Captures, list[TensorInfo]] = {}
    for captures, tensor in matches:
        found.setdefault(captures, []).append(tensor)
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
    """Captures in the order of the first pattern, so that equal captures compare equal."""
    return tuple(sorted(captures, key=lambda pair: names.index(pair[0]) if pair[0] in names else len(names)))


def in_natural_order(several: Iterable[Captures]) -> list[Captures]:
    """Captures sorted by their values, numbers by size wherever they stand."""
    rows = list(several)
    values = {value for captures in rows for _, value in captures}
    keys = {value: natural_key(str(value)) for value in values}
    places = {key: place for place, key in enumerate(sorted(set(keys.values())))}
    ranks = {value: places[key] for value, key in keys.items()}  # many rows have few values: compare numbers
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


Rows = tuple["Captures | None", ...]  # one of each member; None where an optional member has none
_ROWS_BEYOND_INPUT = 1000


class JoinError(ValueError):
    """Members that cannot be joined into instances; the text says why and what to do."""


def gather(
    sites: Iterable[Site], across: Collection[str] | Literal["all"]
) -> dict[Captures, tuple[Site, ...]]:
    """The sites by their captures without those in `across`; each group keeps its order."""
    groups: dict[Captures, list[Site]] = {}
    for site in sites:
        left: Captures = () if across == "all" else site.captures
        if left and across:
            left = tuple([pair for pair in left if pair[0] not in across])
        groups.setdefault(left, []).append(site)
    return {captures: tuple(group) for captures, group in groups.items()}


def natural_join(
    members: Sequence[Collection[Captures]], optional: Collection[int] = ()
) -> dict[Captures, Rows]:
    """Every combination of one row of each member that agrees where captures have one name, in natural order.

    Keys are all captures of a combination. The rows of one member all have the same names in the same order.
    A combination may lack a row of the members numbered in `optional`. JoinError where a row fits no
    combination, and for a product that is far larger than its members.

    >>> layers, heads = [(("a", 1),)], [(("a", 1), ("b", 7)), (("a", 1), ("b", 8))]
    >>> list(natural_join([layers, heads]))
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
            text = f"the members share so few captures that there would be {count} instances"
            raise JoinError(f"{text}: give one name to what belongs together, or gather with across")
        found = [
            (_extended(captures, row), (*rows, row))
            for (captures, rows), match in zip(found, matches, strict=True)
            for row in match
        ]
        if number not in optional:  # captures of optional members alone join nothing
            known = [captures for captures, _ in found]
    places = [order.index(number) for number in range(len(members))]
    joined = {captures: tuple([rows[at] for at in places]) for captures, rows in found}
    for number, given in enumerate(members):
        used = {rows[number] for rows in joined.values()}
        unused = next((row for row in given if row not in used), None)
        if unused is not None:
            why = "no combination of members fits it"
            raise JoinError(f"no instance has a place for {captured(unused)}: {why}")
    return {captures: joined[captures] for captures in in_natural_order(joined)}


def lend(
    rows: Sequence[Captures], others: Sequence[Sequence[Captures]], names: Collection[str]
) -> list[tuple[int, Captures]]:
    """Each row, with its number, extended by these names: once for each value in fitting rows of others.

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
    """The members that lack a row for captures of another member, with the captures that both name."""
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


def _shared_keys(rows: Collection[Captures], others: Collection[Captures]) -> tuple[Key, Key]:
    """The keys that join rows of two members: the captures whose names both have, in one order."""
    names = [[name for name, _ in next(iter(each), ())] for each in (rows, others)]
    shared = [name for name in names[0] if name in names[1]]
    if not shared:
        return (lambda _: ()), (lambda _: ())
    here, there = (itemgetter(*map(each.index, shared)) for each in names)
    return here, there


def _shared(row: Captures, others: Collection[Captures]) -> Captures:
    names = {name for name, _ in next(iter(others), ())}
    return tuple(pair for pair in row if pair[0] in names)


def _extended(captures: Captures, row: Captures | None) -> Captures:
    """The captures and those of a row that agrees with them."""
    if row is None or row == captures:
        return captures
    known = dict(captures)
    return captures + tuple([pair for pair in row if pair[0] not in known])


Group = dict[Captures, tuple[Site, ...]]
Sites = dict[str, tuple[Site, ...]]
_MOST_COMPARED = 2000  # names that differ in more than numbers, among which the nearest are looked for
_PRUNABLE = tuple(dtype.name for dtype in DTYPES.values() if dtype.prunable)


class Model(Struct, frozen=True):
    """What a spec is located in: all tensors of a checkpoint, and those of its structures.

    These have captures and outlooks, and the shapes of the outlooks.
    """

    tensors: Sequence[TensorInfo]
    index: Index
    structures: Found

    @staticmethod
    def of(tensors: Sequence[TensorInfo], config: Mapping[str, Any] | None, kinds: Iterable[Kind]) -> Model:
        """All tensors, and those of structures of these kinds."""
        wanted = list(dict.fromkeys(kinds))
        index = Index.of(tensors if wanted else (), config)
        return Model(tensors, index, {kind: list(_of_kind(kind, index)) for kind in wanted})


def locate(spec: Spec, model: Model, shared: Mapping[str, object], problems: Problems) -> Sites:
    """The sites of every table by its place; none where tensors or members are missing."""
    sites: Sites = {}
    for place, table in spec.tables.items():
        parts = spec.parts(place)
        if isinstance(table, CouplingTable):
            sites[place] = _join(spec, sites, place, table, problems)
        else:
            sites[place] = sites[parts[0]] if parts else _find(place, table, model, shared, problems)
    _check_found(spec, sites, model, problems)
    return sites


def _find(
    place: str, table: TensorsTable, model: Model, shared: Mapping[str, object], problems: Problems
) -> tuple[TensorSite, ...]:
    used = frozenset() if table.where is None else table.where.names
    known: dict[tuple[object, ...], bool] = {}  # thousands of tensors are alike in all that `where` names

    def fits(match: Match) -> bool:
        """Whether `where` is true; an expression without such a value is a problem, and keeps the tensor."""
        captures, tensor = match
        alike = (tensor.shape, tensor.dtype, *[pair for pair in captures if pair[0] in used])
        if alike in known:
            return known[alike]
        try:
            holds = Names(shared, captures, tensor).value(table.where)
            if not isinstance(holds, bool):
                raise came_to(table.where, holds, "true or false")
        except ExpressionError as error:
            problems.note(misfit(place, "where", error, tensor.name))
            return True
        known[alike] = holds
        return holds

    seen: Mapping[tuple[str, Captures], Outlook] = {}
    try:
        if table.structure is None:
            found = find_tensors(table.patterns or (), model.tensors, table.exclude)
        else:
            structures = model.structures[table.structure]
            found = without([(captures, tensor) for captures, tensor, _ in structures], table.exclude)
            seen = {(tensor.name, captures): one for captures, tensor, one in structures}
    except PatternError as error:
        problems.add(place, table.patterns_key, str(error))
        return ()
    sites = sites_of(found if table.where is None else filter(fits, found))
    if seen:
        sites = tuple([replace(one, outlook=seen[one.tensor.name, one.captures]) for one in sites])
    for tensor in (site.tensor for site in sites):
        if tensor.dtype not in _PRUNABLE and not tensor.codes:
            text = f"narrow the pattern to tensors of {listed(_PRUNABLE, 'or')}"
            what = f"{tensor.name} is {tensor.dtype}, which cannot be pruned"
            problems.add(place, table.patterns_key, f"{what}: {text}")
    return sites


def _check_found(spec: Spec, sites: Sites, model: Model, problems: Problems) -> None:
    """A problem for every table without tensors, unless it or a table above it is optional and has none."""
    forgiven: set[str] = set()
    for place, table in spec.tables.items():
        leaves = spec.leaves(place)
        if table.optional and not any(sites[leaf] for leaf in leaves):
            forgiven.update(leaves)
    for place in spec.tables:
        leaf = spec.leaves(place).get(place)
        if leaf is not None and not sites[place] and place not in forgiven:
            problems.add_unbound(place, leaf.patterns_key, _nothing_found(leaf, model))


def _nothing_found(table: TensorsTable, model: Model) -> str:
    if table.structure is not None:
        return _no_structure(table, table.structure, model)
    patterns, tensors = table.patterns or (), model.tensors
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


def _no_structure(table: TensorsTable, kind: Kind, model: Model) -> str:
    count = len(model.structures[kind])
    if count:
        names = [key for key in ("exclude", "where") if getattr(table, key)]
        found = f"the checkpoint has {count} {'tensors' if count > 1 else 'tensor'} of {NAMES[kind]}"
        return f"{found}, of which {listed(names)} {'leave' if len(names) > 1 else 'leaves'} none"
    if kind == "hidden":
        return f"the checkpoint has no {NAMES[kind]} that can be told: {hidden_size(model.index)}"
    some = (
        f"; the first names are {listed(tensor.name for tensor in model.tensors[:3])}"
        if model.tensors
        else ""
    )
    return f"the checkpoint has no {NAMES[kind]} under names that are known{some}"


def _nearest_tensors(patterns: Sequence[Pattern], tensors: Sequence[TensorInfo]) -> str:
    """The tensor names nearest to a pattern; names that differ in numbers alone count once."""
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
    spec: Spec, sites: Sites, place: str, table: CouplingTable, problems: Problems
) -> tuple[JoinedSite, ...]:
    """The sites of a coupling; none where a member has none, which is reported with that member."""
    located: list[Sequence[Site]] = [sites[member] for member in spec.parts(place)]
    optional = _optional_members(spec, place, located)
    if not all(each for number, each in enumerate(located) if number not in optional):
        return ()
    groups = [gather(each, table.across) for each in located]
    wrong = list(_missing(spec, place, table.members, groups, optional))
    if not wrong:
        for number, lent in _with_borrowed(spec, place, located).items():
            located[number], groups[number] = lent, gather(lent, table.across)
        wrong += [] if table.across == "all" else _twins(table.members, located)
    joined: Mapping[Captures, Rows] = {}
    try:
        joined = {} if wrong else natural_join([tuple(group) for group in groups], optional)
    except JoinError as error:
        wrong = [str(error)]
    for text in wrong:
        problems.add(place, table.members_key, text)
    found = []
    for captures, rows in joined.items():
        members = [() if row is None else group[row] for group, row in zip(groups, rows, strict=True)]
        found.append(JoinedSite(captures, captured(captures), tuple(members)))
    return tuple(found)


def _optional_members(spec: Spec, place: str, located: Sequence[Sequence[Site]]) -> frozenset[int]:
    """The members that an instance may lack; if all are optional, the first one with sites is required."""
    optional = {
        number
        for number, member in enumerate(spec.parts(place))
        if spec.tables[member].optional or all(leaf.optional for leaf in spec.leaves(member).values())
    }
    if len(optional) == len(located):
        optional.discard(next((number for number, each in enumerate(located) if each), 0))
    return frozenset(optional)


def _with_borrowed(spec: Spec, place: str, located: Sequence[Sequence[Site]]) -> dict[int, tuple[Site, ...]]:
    """The sites of members that use captures of others, by number: once for each value of these captures."""
    found: dict[int, tuple[Site, ...]] = {}
    for number, member in enumerate(spec.parts(place)):
        names = borrowed_names(spec, member)
        if names:
            own = [site for site in located[number] if isinstance(site, TensorSite)]
            others = [[site.captures for site in each] for at, each in enumerate(located) if at != number]
            found[number] = tuple(
                TensorSite(captures, captured(captures), own[at].tensor)
                for at, captures in lend([site.captures for site in own], others, names)
            )
    return found


def _twins(members: Sequence[str], located: Sequence[Sequence[Site]]) -> Iterator[str]:
    """A problem for every two tensors of one member with equal captures."""
    for member, sites in zip(members, located, strict=True):
        first: dict[Captures, TensorSite] = {}
        for site in sites:
            if isinstance(site, TensorSite) and first.setdefault(site.captures, site) is not site:
                what = f" with {captured(site.captures)}" if captured(site.captures) else ""
                both = f"{first[site.captures].tensor.name} and {site.tensor.name}"
                text = "capture what tells them apart, or narrow the pattern"
                yield f"{shown(member)} has two tensors{what}, {both}: {text}"


def _missing(
    spec: Spec, place: str, members: Sequence[str], groups: Sequence[Group], optional: frozenset[int]
) -> Iterator[str]:
    for number, captures in missing_partners([tuple(group) for group in groups]):
        if number not in optional:
            what, patterns = captured(captures), listed(patterns_of(spec, spec.parts(place)[number]), "or")
            instance = f"{place.partition('.')[2]}[{what}]"
            yield f"{instance} has no {shown(members[number])}: no tensor matches {patterns} with {what}"
