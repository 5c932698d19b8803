"""Spec x names of tensors -> sites: which tensors each table finds, and which of them belong together.

Reports patterns that match nothing, dtypes that cannot be pruned, members that are missing. Knows names
and dtypes, no shapes: those are for `shaping`. Called by `binding`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sparseprune.engine.dtypes import DTYPES
from sparseprune.spec.bound import Captures
from sparseprune.spec.captures import patterns_of_table
from sparseprune.spec.joining import JoinError, gather, missing_partners, natural_join
from sparseprune.spec.problems import Problems, listed, nearest, shown
from sparseprune.spec.sites import JoinedSite, Site, TensorSite, captured, find_tensors
from sparseprune.spec.tokens import Literal, Token, Words

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.spec.bound import TensorInfo
    from sparseprune.spec.patterns import TensorPattern
    from sparseprune.spec.schema import CouplingTable, Spec

Group = dict[Captures, tuple[Site, ...]]
Sites = dict[tuple[str, str], tuple[Site, ...]]
_MOST_COMPARED = 2000  # names of unlike form among which a nearest one is looked for
_PRUNABLE = tuple(dtype.name for dtype in DTYPES.values() if dtype.prunable)


def locate(spec: Spec, tensors: Sequence[TensorInfo], problems: Problems) -> Sites:
    """The instances of every table by its kind and name; tables that cannot have any are left out."""
    sites: Sites = {}
    for name, block in spec.block.items():
        sites["block", name] = _find(f"block.{name}", block.tensors, tensors, problems)
    for name, fused in spec.block_coupling.items():
        sites["block_coupling", name] = _join(spec, sites, name, fused, problems)
    for name, scope in spec.scope.items():
        if scope.tensors is not None:
            sites["scope", name] = _find(f"scope.{name}", scope.tensors, tensors, problems)
        else:
            kind = "block" if scope.block in spec.block else "block_coupling"
            sites["scope", name] = sites[kind, str(scope.block)]
    for name, coupled in spec.scope_coupling.items():
        sites["scope_coupling", name] = _join(spec, sites, name, coupled, problems)
    return sites


def _find(
    place: str, patterns: Sequence[TensorPattern], tensors: Sequence[TensorInfo], problems: Problems
) -> tuple[TensorSite, ...]:
    found = find_tensors(patterns, tensors)
    if not found:
        texts = listed((f'"{pattern.text}"' for pattern in patterns), "or")
        problems.add(place, "tensors", f"no tensor matches {texts}{_nearest_tensors(patterns, tensors)}")
    for tensor in (site.tensor for site in found):
        if tensor.dtype not in _PRUNABLE:
            text = (
                f"{tensor.name} is {tensor.dtype}, which cannot be pruned: narrow the pattern to tensors of "
            )
            problems.add(place, "tensors", text + listed(_PRUNABLE, "or"))
    return found


def _nearest_tensors(patterns: Sequence[TensorPattern], tensors: Sequence[TensorInfo]) -> str:
    """The names that come nearest to what a pattern describes; names that differ in numbers count once."""
    if not tensors:
        return ": the checkpoint has no tensors"
    forms: dict[str, str] = {}
    for tensor in tensors:
        forms.setdefault(re.sub("[0-9]+", "0", tensor.name), tensor.name)
    some = list(forms)[:_MOST_COMPARED]
    for pattern in patterns:
        close = nearest("".join(map(_sample, pattern.tokens)), some, 3)
        if close:
            return f"; the nearest names are {listed(forms[form] for form in close)}"
    return f"; the first names are {listed(tensor.name for tensor in tensors[:3])}"


def _sample(token: Token) -> str:
    match token:
        case Literal(text):
            return text
        case Words(_, words):
            return words[0]
    return "0"


def _join(
    spec: Spec, sites: Sites, name: str, table: CouplingTable, problems: Problems
) -> tuple[JoinedSite, ...]:
    """The instances of a coupling; none where a member has none, which is reported with that member."""
    place = f"{table.member_kind}_coupling.{name}"
    located = [sites[table.member_kind, member] for member in table.members]
    if not all(located):
        return ()
    groups = [gather(each, table.across) for each in located]
    wrong = [] if table.across == "all" else list(_twins(table.members, located))
    wrong += _missing(spec, name, table, groups)
    for text in wrong:
        problems.add(place, table.members_key, text)
    if wrong:
        return ()
    try:
        return _combined(groups)
    except JoinError as error:
        problems.add(place, table.members_key, str(error))
        return ()


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


def _missing(spec: Spec, name: str, table: CouplingTable, groups: Sequence[Group]) -> Iterator[str]:
    for number, captures in missing_partners([tuple(group) for group in groups]):
        member, what = table.members[number], captured(captures)
        patterns = listed(patterns_of_table(spec, table.member_kind, member), "or")
        yield f"{name}[{what}] has no {shown(member)}: no tensor matches {patterns} with {what}"


def _combined(groups: Sequence[Group]) -> tuple[JoinedSite, ...]:
    """What joins, every site used; JoinError where that cannot be."""
    joins = natural_join([tuple(group) for group in groups])
    return tuple(
        JoinedSite(
            joined.captures,
            captured(joined.captures),
            tuple([group[row] for group, row in zip(groups, joined.rows, strict=True)]),
        )
        for joined in joins
    )
