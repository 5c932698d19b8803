"""What the expressions of a spec refer to: every name in them has to be a var, a capture or config.

Knows which names each key may use, and from which members of a coupling captures may be borrowed; reports
the others with the nearest real one. Knows no checkpoint. Called by `checking`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from sparseprune.spec.captures import captures_of_table, leaves_of_table, look_of_table
from sparseprune.spec.evaluating import unknown_name
from sparseprune.spec.names import FACTS, RESERVED
from sparseprune.spec.problems import Problems, shown
from sparseprune.spec.schema import expressions_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from sparseprune.spec.expressions import Expression
    from sparseprune.spec.schema import Spec

_BUDGET_KEYS = ("nnz", "sparsity", "threshold", "multiple_of")
Table = tuple[str, str]
Membership = tuple[Table, str]
"""A coupling, and the name under which something takes part in it."""


def check_references(spec: Spec, problems: Problems, variables: Collection[str]) -> None:
    """Every name in every expression; `variables` are all that are declared, also those with problems."""
    memberships = _memberships(spec)
    members_open = problems.is_open("", "block_coupling", "scope_coupling") or any(
        problems.is_open(f"{kind}_coupling.{name}", f"{kind}s")
        for kind in ("block", "scope")
        for name in getattr(spec, f"{kind}_coupling")
    )
    for kind in ("block", "scope"):
        for name, table in getattr(spec, kind).items():
            if table.patterns is not None:
                lent = None if members_open else _lent(spec, memberships.get((kind, name), ()))
                _check_leaf(spec, (kind, name), lent, problems, variables)
    for name, scope in spec.scope.items():
        own = _captures(spec, ("scope", name))
        lent = None if members_open else _lent(spec, memberships.get(("scope", name), ()))
        if scope.patterns is None and own is not None and lent is not None:
            known = {*own, *lent, *variables, "config"}
            _check(f"scope.{name}", "shape", expressions_of(scope.shape), known, problems)
    for kind in ("scope", "scope_coupling"):
        for name, outermost in getattr(spec, kind).items():
            own = _captures(spec, (kind, name))
            if own is not None:
                for key in _BUDGET_KEYS:
                    found = expressions_of(getattr(outermost, key))
                    _check(f"{kind}.{name}", key, found, {*own, *variables, "config"}, problems)


def _check_leaf(
    spec: Spec, table: Table, lent: Collection[str] | None, problems: Problems, variables: Collection[str]
) -> None:
    """A table with tensors of its own: `where`, and what says how they are looked at.

    `lent` are the captures that it may borrow from its fellow members, None where that is not known.
    """
    kind, name = table
    place, read = f"{kind}.{name}", getattr(spec, kind)[name]
    own = _captures(spec, table) or frozenset()
    for capture in sorted(own):
        if capture in variables:
            problems.add(place, read.patterns_key, f"the capture {shown(capture)} is a var too: rename one")
        elif capture in RESERVED:
            text = f"the capture {shown(capture)} means something else in expressions: rename it"
            problems.add(place, read.patterns_key, text)
    known = {*own, *variables, "config", *FACTS}
    _check(place, "where", expressions_of(read.where), known, problems)
    if lent is None:
        return
    for key, expressions in look_of_table(spec, *table).items():
        facts = () if (kind, key) == ("scope", "shape") else FACTS
        _check(place, key, expressions, {*own, *lent, *variables, "config", *facts}, problems)


def _check(
    place: str, key: str, expressions: Iterable[Expression], known: Collection[str], problems: Problems
) -> None:
    for expression in expressions:
        for name in sorted(expression.names.difference(known)):
            text = f"{shown(expression.text)}: {unknown_name(name, frozenset(known))}"
            problems.add(place, key, text)


def _captures(spec: Spec, table: Table) -> frozenset[str] | None:
    """All captures that instances of a table may have; None where that cannot be known."""
    if table[0] != "scope_coupling":
        variants = captures_of_table(spec, *table)
        return frozenset().union(*variants) if variants else None
    coupling = spec.scope_coupling[table[1]]
    members = [_captures(spec, ("scope", name)) for name in coupling.scopes]
    if not members or None in members:
        return None
    every = frozenset(name for names in members for name in names or ())
    return frozenset() if coupling.across == "all" else every.difference(coupling.across)


def _lent(spec: Spec, memberships: Iterable[Membership]) -> set[str] | None:
    """Captures that a table may borrow: those of its fellow members, in every coupling that it is part of.

    None where a fellow member cannot be read.
    """
    fellows = [_lent_in(spec, coupling, member) for coupling, member in memberships]
    known = [captures for captures in fellows if captures is not None]
    if len(known) < len(fellows):
        return None
    return set.intersection(*known) if known else set()


def _lent_in(spec: Spec, coupling: Table, member: str) -> set[str] | None:
    table = getattr(spec, coupling[0])[coupling[1]]
    others = [name for name in table.members if name != member]
    captures = [_captures(spec, (table.member_kind, name)) for name in others]
    return None if None in captures else {name for names in captures for name in names or ()}


def _memberships(spec: Spec) -> dict[Table, list[Membership]]:
    """For every table the couplings that it is part of, itself or as the block of a member, and as whom."""
    found: defaultdict[Table, list[Membership]] = defaultdict(list)
    for coupling, fused in spec.block_coupling.items():
        for name in fused.blocks:
            found["block", name].append((("block_coupling", coupling), name))
    for coupling, coupled in spec.scope_coupling.items():
        for name in coupled.scopes:
            if name in spec.scope and leaves_of_table(spec, "scope", name):
                found["scope", name].append((("scope_coupling", coupling), name))
                block = spec.scope[name].block
                if isinstance(block, str):
                    found["block", block].append((("scope_coupling", coupling), name))
    return found
