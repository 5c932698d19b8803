"""Checks between tables of a spec: references, captures, budgets; every problem at once."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from sparseprune.spec.expressions import FACTS, RESERVED, unknown_name
from sparseprune.spec.problems import Problems, listed, nearest, shown, suggestion
from sparseprune.spec.schema import (
    BUDGETS,
    KINDS,
    METHOD_KEYS,
    BudgetTable,
    CouplingTable,
    ExplicitView,
    ScopeTable,
    Spec,
    TensorsTable,
    expressions_of,
    wrong_common_reconstruct,
    wrong_method,
    wrong_reconstruct,
    wrong_score,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

    from sparseprune.spec.expressions import Expression
    from sparseprune.spec.locating import Pattern
    from sparseprune.spec.schema import Spec


def captures_of_table(spec: Spec, kind: str, name: str) -> frozenset[frozenset[str]]:
    """The sets of captures that instances of `[kind.name]` may have: one, unless patterns differ in them.

    Empty where a table on the way down is missing or could not be read.
    """
    coupling = _coupling_of(spec, kind, name)
    if coupling is None:
        return frozenset(frozenset(pattern.names) for pattern in _own_patterns(spec, kind, name))
    table = spec.block_coupling[coupling]
    members = [captures_of_table(spec, "block", member) for member in table.blocks]
    if not members or not all(members):
        return frozenset()
    every = frozenset(name for variants in members for names in variants for name in names)
    return frozenset({frozenset() if table.across == "all" else every.difference(table.across)})


def patterns_of_table(spec: Spec, kind: str, name: str) -> tuple[str, ...]:
    """The patterns, in quotes, of all blocks that `[kind.name]` consists of."""
    coupling = _coupling_of(spec, kind, name)
    blocks = (
        [(kind, name)] if coupling is None else [("block", b) for b in spec.block_coupling[coupling].blocks]
    )
    return tuple(f'"{pattern.text}"' for block in blocks for pattern in _own_patterns(spec, *block))


def _coupling_of(spec: Spec, kind: str, name: str) -> str | None:
    """The block coupling that a scope is over."""
    if kind == "scope" and name in spec.scope:
        block = spec.scope[name].block
        return block if isinstance(block, str) and block in spec.block_coupling else None
    return None


def leaves_of_table(spec: Spec, kind: str, name: str) -> tuple[tuple[str, str], ...]:
    """The tables with tensors, as kind and name, that a table consists of in the end."""
    if kind == "scope_coupling":
        below = [("scope", scope) for scope in spec.scope_coupling[name].scopes if scope in spec.scope]
        return tuple(leaf for each in below for leaf in leaves_of_table(spec, *each))
    if kind == "scope" and isinstance(spec.scope[name].block, str):
        block = str(spec.scope[name].block)
        inner = "block_coupling" if block in spec.block_coupling else "block"
        return leaves_of_table(spec, inner, block) if block in getattr(spec, inner) else ()
    if kind == "block_coupling":
        return tuple(("block", block) for block in spec.block_coupling[name].blocks if block in spec.block)
    return ((kind, name),)


def look_of_table(spec: Spec, kind: str, name: str) -> dict[str, tuple[Expression, ...]]:
    """The expressions by which a table looks at its own tensors, by key; they may borrow captures."""
    keys = (
        ("slice", "axes", "view", "shape", "block") if kind == "scope" else ("slice", "axes", "view", "shape")
    )
    table = getattr(spec, kind)[name]
    return {key: tuple(expressions_of(getattr(table, key))) for key in keys}


def borrowed_names(spec: Spec, kind: str, member: str) -> frozenset[str]:
    """Names in the expressions of a coupling's member that have to be captures, but not its own."""
    leaves = leaves_of_table(spec, kind, member)
    if len(leaves) != 1 or _coupling_of(spec, kind, member) is not None:
        return frozenset()
    tables = {leaves[0], (kind, member)}
    used = {
        name
        for table in tables
        for expressions in look_of_table(spec, *table).values()
        for expression in expressions
        for name in expression.names
    }
    if not used:
        return frozenset()
    own = {name for names in captures_of_table(spec, kind, member) for name in names}
    return frozenset(used - own - {*spec.variables, *RESERVED})


def _own_patterns(spec: Spec, kind: str, name: str) -> tuple[Pattern, ...]:
    if kind == "scope":
        scope = spec.scope.get(name)
        if scope is None or scope.patterns is not None:
            return () if scope is None else scope.patterns or ()
        name = str(scope.block)
    return spec.block[name].patterns or () if name in spec.block else ()


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


_MOST_MISSING = 8  # names that are no table, of which it is asked which one was meant


def check_spec(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Everything that can be found wrong without a checkpoint; `declared` has all names by kind, and vars."""
    if not declared["scope"] and not problems.is_open("", "scope"):
        problems.add("", "", "there is no rule: write at least one [scope.NAME]")
    for name, block in spec.block.items():
        _check_tensors(f"block.{name}", block, problems)
    for name, table in spec.scope.items():
        _check_form(f"scope.{name}", table, declared, problems)
    for place, coupling in _couplings(spec):
        _check_members(place, coupling, declared, problems)
        _check_orders(place, coupling, problems)
        _check_captures(spec, place, coupling, problems)
    _check_names(declared, problems)
    _check_idle(spec, declared, problems)
    _check_budgets(spec, declared, problems)
    if spec.score is not None and not problems.is_open("score", "kind"):
        for key, text in wrong_score(spec.score):
            if not problems.is_open("score", key):
                problems.add("score", key, text)
    if spec.reconstruct is not None and not problems.is_open("reconstruct", "method", "file"):
        for key, text in wrong_common_reconstruct(spec.reconstruct):
            problems.add("reconstruct", key, text)
    check_references(spec, problems, frozenset(declared["vars"]))


def _couplings(spec: Spec) -> Iterator[tuple[str, CouplingTable]]:
    yield from ((f"block_coupling.{name}", table) for name, table in spec.block_coupling.items())
    yield from ((f"scope_coupling.{name}", table) for name, table in spec.scope_coupling.items())


def _check_form(
    place: str, table: ScopeTable, declared: Mapping[str, Collection[str]], problems: Problems
) -> None:
    if problems.is_open(place, "block"):
        return
    if not isinstance(table.block, str):
        _check_tensors(place, table, problems)
        return
    for key in TensorsTable.model_fields:
        if getattr(table, key) not in {None, ()}:
            problems.add(
                place,
                key,
                f"the block is the table {shown(table.block)}, which has the tensors: "
                "remove this key, or give the block's shape as a list of integers",
            )
    known = [*declared["block"], *declared["block_coupling"]]
    if table.block not in known and not problems.is_open("", "block", "block_coupling"):
        text = f"there is no [block.{table.block}] and no [block_coupling.{table.block}]"
        problems.add(place, "block", text + suggestion(table.block, known))


def _check_tensors(place: str, table: TensorsTable, problems: Problems) -> None:
    """The keys of a table that has tensors of its own: what they are, and how they are looked at."""
    if table.tensors is None and table.regex is None and not problems.is_open(place, "tensors", "regex"):
        text = f"missing; wanted {TensorsTable.model_fields['tensors'].description}"
        if isinstance(table, ScopeTable):
            text = (
                "missing: a block given by its shape needs the tensors beside it; "
                "or name a [block] or [block_coupling]"
            )
        problems.add(place, "tensors", text)
    if table.tensors is not None and table.regex is not None:
        problems.add(place, "regex", "tensors are named by patterns already: give one of tensors and regex")
    if table.axes and not isinstance(table.view, str) and not problems.is_open(place, "view"):
        problems.add(place, "axes", 'these are the axes of an einops pattern: give one as view = "..."')
    if isinstance(table.view, ExplicitView) and table.slice is not None:
        problems.add(
            place, "slice", "a view by shape and stride takes its part by itself: give it an offset instead"
        )


def _check_members(
    place: str, table: CouplingTable, declared: Mapping[str, Collection[str]], problems: Problems
) -> None:
    kind, key = table.member_kind, table.members_key
    for number, member in enumerate(table.members):
        if member not in declared[kind]:
            if problems.is_open("", kind):
                continue
            problems.add(place, key, f"there is no [{kind}.{member}]{suggestion(member, declared[kind])}")
        elif member in table.members[:number]:
            problems.add(place, key, f"{shown(member)} is listed twice: each member takes part once")


def _check_orders(place: str, table: CouplingTable, problems: Problems) -> None:
    if table.orders is None:
        return
    if len(table.orders) != len(table.members) and not problems.is_open(place, table.members_key):
        found = f"found {len(table.orders)} orders for {len(table.members)} {table.members_key}"
        problems.add(place, "orders", f"{found}: give one order for each")
    for order in table.orders:
        if sorted(order) != list(range(len(order))):
            text = (
                f"{shown(order)} is no order of dimensions: it has to hold each of 0 to {len(order) - 1} once"
            )
            problems.add(place, "orders", text)


def _check_captures(spec: Spec, place: str, table: CouplingTable, problems: Problems) -> None:
    """`across` names captures that exist, and members can be joined on what is left."""
    if table.across == "all" or problems.is_open(place, table.members_key, "across"):
        return
    kind = table.member_kind
    captured = {member: captures_of_table(spec, kind, member) for member in table.members}
    every = {name for variants in captured.values() for names in variants for name in names}
    if all(captured.values()):
        for name in table.across:
            if name not in every:
                problems.add(place, "across", f"no member captures {shown(name)}{suggestion(name, every)}")
    for member, variants in captured.items():
        left = {names.difference(table.across) for names in variants}
        if len(left) > 1:
            texts = listed(sorted(listed(sorted(names)) if names else "nothing" for names in left), "or")
            problems.add(
                place,
                table.members_key,
                f"{shown(member)} captures {texts}, depending on which of "
                f"{listed(patterns_of_table(spec, kind, member))} matches: the patterns of a member need the "
                "same captures",
            )


def _check_names(declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    for name in declared["block_coupling"]:
        if name in declared["block"]:
            problems.add(
                f"block_coupling.{name}", "", f"[block.{name}] has the same name: a scope could mean either"
            )


def _check_idle(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Only where every table that names others was read; else this would be a guess."""
    named = {table.block for table in spec.scope.values() if isinstance(table.block, str)}
    fused = {block for table in spec.block_coupling.values() for block in table.blocks}
    blocks, couplings = set(declared["block"]), set(declared["block_coupling"])
    missing = sorted((named - blocks - couplings) | (fused - blocks))
    if len(missing) > _MOST_MISSING:
        return
    for name in missing:
        meant = nearest(name, blocks | couplings)
        if not meant:
            return
        named.update(meant)
    if problems.is_open("", *KINDS) or not _all_named(spec, declared, problems):
        return
    for name in declared["block_coupling"]:
        if name not in named:
            problems.add(f"block_coupling.{name}", "", "used by no scope: name it in one, or remove it")
    for name in declared["block"]:
        if name not in named | fused:
            problems.add(
                f"block.{name}", "", "used by no scope: name it in one or in a coupling, or remove it"
            )


def _all_named(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> bool:
    """Whether it is known which blocks every scope and every coupling names."""
    return all(
        len(getattr(spec, kind)) == len(declared[kind])
        and not any(problems.is_open(f"{kind}.{name}", key) for name in declared[kind])
        for kind, key in (("scope", "block"), ("block_coupling", "blocks"))
    )


def _coupled_known(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> bool:
    """Whether it is known of every scope if it is a member of a scope coupling."""
    return (
        len(spec.scope_coupling) == len(declared["scope_coupling"])
        and not problems.is_open("", "scope_coupling")
        and not any(problems.is_open(f"scope_coupling.{name}", "scopes") for name in spec.scope_coupling)
    )


def _check_budgets(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    coupled = spec.coupled_scopes()
    coupled_known = _coupled_known(spec, declared, problems)
    for name, table in spec.scope.items():
        if name in coupled:
            _check_inner(f"scope.{name}", table, coupled[name], problems)
        elif coupled_known:  # else it may be a member of one that could not be read
            _check_outermost(f"scope.{name}", table, spec, problems)
    for name, coupling in spec.scope_coupling.items():
        _check_outermost(f"scope_coupling.{name}", coupling, spec, problems)


def _check_inner(place: str, table: BudgetTable, coupling: str, problems: Problems) -> None:
    for key in (*BUDGETS, "multiple_of", *METHOD_KEYS):
        if getattr(table, key) is not None:
            what = "this" if key in METHOD_KEYS else "its budget"
            text = f"this scope is a member of [scope_coupling.{coupling}]: {what} has to stand there"
            problems.add(place, key, text)


def _check_outermost(place: str, table: BudgetTable, spec: Spec, problems: Problems) -> None:
    given = tuple(key for key in BUDGETS if key in table.budget_keys or problems.told(place, key))
    if not given and not problems.is_open(place, *BUDGETS):
        problems.add(place, "", "there is no budget: give one of nnz, sparsity and threshold")
    if len(given) > 1:
        problems.add(place, "", f"found the budgets {listed(given)}: give exactly one")
    if table.multiple_of is not None and given == ("threshold",):
        problems.add(
            place, "multiple_of", "it rounds what nnz or sparsity ask for; a threshold keeps no fixed number"
        )
    _check_method(place, table, spec, problems)


def _check_method(place: str, table: BudgetTable, spec: Spec, problems: Problems) -> None:
    if not problems.is_open(place, "mode"):
        common = None if problems.is_open(place, "score") else spec.score
        for key, text in wrong_method(table, common):
            problems.add(place, key, text)
    score, reconstruct = table.score or spec.score, table.reconstruct or spec.reconstruct
    if not problems.is_open(place, "mode", "score", "reconstruct", "threshold"):
        for key, text in wrong_reconstruct(table, score, reconstruct):
            problems.add(place, key, text)
    if table.score is not None:
        for key, text in wrong_score(table.score):
            if not problems.is_open(place, f"score.{key}"):
                problems.add(place, f"score.{key}", text)
