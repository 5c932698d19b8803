"""Spec x names of tensors -> sites: which tensors each table finds, and which of them belong together.

Reports patterns that match nothing, dtypes that cannot be pruned, members that are missing. Knows names,
dtypes and the facts that `where` asks for; views are for `viewing`, grids for `shaping`. Called by `binding`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sparseprune.engine.dtypes import DTYPES
from sparseprune.spec.bound import Captures
from sparseprune.spec.captures import borrowed_names, leaves_of_table, patterns_of_table
from sparseprune.spec.expressions import ExpressionError
from sparseprune.spec.joining import JoinError, gather, lend, missing_partners, natural_join
from sparseprune.spec.names import Names, came_to, misfit
from sparseprune.spec.patterns import PatternError
from sparseprune.spec.problems import Problems, listed, nearest, shown
from sparseprune.spec.sites import JoinedSite, Site, TensorSite, captured, find_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.names import Environment
    from sparseprune.spec.schema import CouplingTable, Spec, TensorsTable
    from sparseprune.spec.sites import Pattern

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
