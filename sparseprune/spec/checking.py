"""Checks between tables of a spec: references, captures, budgets; every problem at once.

Knows how tables build on each other, and no checkpoint. Called by parsing; locating and binding ask it what a
table consists of.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from sparseprune.spec.expressions import FACTS, RESERVED, expressions_of, unknown_name
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
    wrong_common_reconstruct,
    wrong_method,
    wrong_reconstruct,
    wrong_score,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from sparseprune.spec.expressions import Expression

Table = tuple[str, str]
"""The kind and the name of a table."""
Membership = tuple[Table, str]
"""A coupling, and the name of one of its members."""


def table_of(spec: Spec, table: Table) -> Any:  # noqa: ANN401  (the model of that kind)
    """A table as it was read; None for one that is missing or cannot be read."""
    return getattr(spec, table[0]).get(table[1])


def block_of(spec: Spec, table: Table) -> Table | None:
    """The [block] or [block_coupling] that a scope names; None for other tables and the short form."""
    block = getattr(table_of(spec, table), "block", None)
    if not isinstance(block, str):
        return None
    return ("block_coupling" if block in spec.block_coupling else "block"), block


def leaves_of(spec: Spec, table: Table) -> tuple[Table, ...]:
    """The tables with tensors that a table consists of, without those that are missing."""
    read, block = table_of(spec, table), block_of(spec, table)
    if block is not None:
        return leaves_of(spec, block)
    if isinstance(read, CouplingTable):
        return tuple(leaf for name in read.members for leaf in leaves_of(spec, (read.member_kind, name)))
    return () if read is None else (table,)


def captures_of(spec: Spec, table: Table) -> frozenset[frozenset[str]]:
    """The sets of captures that instances of a table may have: one, unless its patterns differ in them.

    Empty where a table below it is missing or cannot be read.
    """
    read, block = table_of(spec, table), block_of(spec, table)
    if block is not None:
        return captures_of(spec, block)
    if not isinstance(read, CouplingTable):
        return frozenset(frozenset(pattern.names) for pattern in (read and read.patterns) or ())
    members = [captures_of(spec, (read.member_kind, name)) for name in read.members]
    if not members or not all(members):
        return frozenset()
    every = frozenset().union(*(names for variants in members for names in variants))
    return frozenset({frozenset() if read.across == "all" else every.difference(read.across)})


def patterns_of(spec: Spec, table: Table) -> tuple[str, ...]:
    """The patterns, in quotes, of all tensors that a table consists of."""
    leaves = [table_of(spec, leaf) for leaf in leaves_of(spec, table)]
    return tuple(f'"{pattern.text}"' for leaf in leaves for pattern in leaf.patterns or ())


def expressions_by_key(spec: Spec, table: Table) -> dict[str, tuple[Expression, ...]]:
    """The expressions of a table's view and blocks, by key; they may use captures of fellow members."""
    keys = ("slice", "axes", "view", "shape", *(["block"] if table[0] == "scope" else []))
    return {key: tuple(expressions_of(getattr(table_of(spec, table), key))) for key in keys}


def borrowed_names(spec: Spec, member: Table) -> frozenset[str]:
    """The captures that expressions of a coupling's member use and its own patterns lack."""
    leaves = leaves_of(spec, member)
    if len(leaves) != 1 or (block_of(spec, member) or member)[0] == "block_coupling":
        return frozenset()
    used = {
        name
        for table in {leaves[0], member}
        for expressions in expressions_by_key(spec, table).values()
        for expression in expressions
        for name in expression.names
    }
    return frozenset(used.difference(*captures_of(spec, member), spec.variables, RESERVED))


_BUDGET_KEYS = ("nnz", "sparsity", "threshold", "multiple_of")


def check_references(spec: Spec, problems: Problems, variables: Collection[str]) -> None:
    """Every name in every expression; `variables` are all that are declared, also those with problems."""
    memberships = _memberships(spec)
    are_known = _members_are_known(spec, problems)

    def lent(table: Table) -> set[str] | None:
        return _lent(spec, memberships[table]) if are_known else None

    for kind in ("block", "scope"):
        for name, table in getattr(spec, kind).items():
            if table.patterns is not None:
                _check_leaf(spec, (kind, name), lent((kind, name)), problems, variables)
    for name, scope in spec.scope.items():
        own, borrowed = _captures(spec, ("scope", name)), lent(("scope", name))
        if scope.patterns is None and own is not None and borrowed is not None:
            known = {*own, *borrowed, *variables, "config"}
            _check(f"scope.{name}", "shape", expressions_of(scope.shape), known, problems)
    _check_budget_names(spec, problems, variables)


def _check_budget_names(spec: Spec, problems: Problems, variables: Collection[str]) -> None:
    for kind in ("scope", "scope_coupling"):
        for name, outermost in getattr(spec, kind).items():
            own = _captures(spec, (kind, name))
            if own is not None:
                for key in _BUDGET_KEYS:
                    found = expressions_of(getattr(outermost, key))
                    _check(f"{kind}.{name}", key, found, {*own, *variables, "config"}, problems)


def _members_are_known(spec: Spec, problems: Problems) -> bool:
    """Whether the members of every coupling could be read."""
    couplings = [(kind, name) for kind in ("block", "scope") for name in getattr(spec, f"{kind}_coupling")]
    return not problems.is_open("", "block_coupling", "scope_coupling") and not any(
        problems.is_open(f"{kind}_coupling.{name}", f"{kind}s") for kind, name in couplings
    )


def _check_leaf(
    spec: Spec, table: Table, lent: Collection[str] | None, problems: Problems, variables: Collection[str]
) -> None:
    """The names in `where`, and in the view and blocks, of a table that names tensors.

    `lent` are captures of fellow members that it may use, None where these are not known.
    """
    place, read = ".".join(table), table_of(spec, table)
    own = _captures(spec, table) or frozenset()
    for capture in sorted(own):
        if capture in variables:
            problems.add(place, read.patterns_key, f"the capture {shown(capture)} is a var too: rename one")
        elif capture in RESERVED:
            text = f"the capture {shown(capture)} is a reserved name in expressions: rename it"
            problems.add(place, read.patterns_key, text)
    known = {*own, *variables, "config", *FACTS}
    _check(place, "where", expressions_of(read.where), known, problems)
    if lent is None:
        return
    for key, expressions in expressions_by_key(spec, table).items():
        facts = () if (table[0], key) == ("scope", "shape") else FACTS
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
    variants = captures_of(spec, table)
    return frozenset().union(*variants) if variants else None


def _lent(spec: Spec, memberships: Iterable[Membership]) -> set[str] | None:
    """The captures that a table may use of fellow members: those which every coupling that it is part of has.

    None where a fellow member cannot be read.
    """
    found = []
    for coupling, member in memberships:
        table = table_of(spec, coupling)
        fellows = [_captures(spec, (table.member_kind, name)) for name in table.members if name != member]
        if None in fellows:
            return None
        found.append({name for captures in fellows for name in captures or ()})
    return set.intersection(*found) if found else set()


def _memberships(spec: Spec) -> defaultdict[Table, list[Membership]]:
    """The couplings of each table, as a member itself or as the block of one."""
    found: defaultdict[Table, list[Membership]] = defaultdict(list)
    for coupling, fused in spec.block_coupling.items():
        for name in fused.blocks:
            found["block", name].append((("block_coupling", coupling), name))
    for coupling, coupled in spec.scope_coupling.items():
        for name in coupled.scopes:
            if leaves_of(spec, ("scope", name)):
                found["scope", name].append((("scope_coupling", coupling), name))
                block = block_of(spec, ("scope", name))
                if block is not None:
                    found[block].append((("scope_coupling", coupling), name))
    return found


_MOST_MISSING = 8  # names without a table, for which the tables that they may mean are looked for


def check_spec(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Every problem that shows without a checkpoint; `declared` has all names by kind, and those of vars."""
    if not declared["scope"] and not problems.is_open("", "scope"):
        problems.add("", "", "there is no rule: write at least one [scope.NAME]")
    for name, block in spec.block.items():
        _check_tensors(f"block.{name}", block, problems)
    for name, table in spec.scope.items():
        _check_form(f"scope.{name}", table, declared, problems)
    couplings = [("block_coupling", spec.block_coupling), ("scope_coupling", spec.scope_coupling)]
    for place, coupling in [
        (f"{kind}.{name}", one) for kind, tables in couplings for name, one in tables.items()
    ]:
        _check_members(place, coupling, declared, problems)
        _check_orders(place, coupling, problems)
        _check_captures(spec, place, coupling, problems)
    _check_names(declared, problems)
    _check_unused(spec, declared, problems)
    _check_budgets(spec, declared, problems)
    if spec.score is not None and not problems.is_open("score", "kind"):
        for key, text in wrong_score(spec.score):
            if not problems.is_open("score", key):
                problems.add("score", key, text)
    if spec.reconstruct is not None and not problems.is_open("reconstruct", "method", "file"):
        for key, text in wrong_common_reconstruct(spec.reconstruct):
            problems.add("reconstruct", key, text)
    check_references(spec, problems, frozenset(declared["vars"]))


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
    """The keys of a table that names tensors: which tensors, and its view of them."""
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
        problems.add(place, "axes", 'axes belong to an einops pattern: give one as view = "..."')
    if isinstance(table.view, ExplicitView) and table.slice is not None:
        problems.add(place, "slice", "a view by shape and stride takes no slice: give it an offset instead")


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
            text = f"{shown(order)} is no order of dimensions: it needs each of 0 to {len(order) - 1} once"
            problems.add(place, "orders", text)


def _check_captures(spec: Spec, place: str, table: CouplingTable, problems: Problems) -> None:
    """`across` names captures that exist, and members can be joined on what is left."""
    if table.across == "all" or problems.is_open(place, table.members_key, "across"):
        return
    kind = table.member_kind
    captured = {member: captures_of(spec, (kind, member)) for member in table.members}
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
                f"{listed(patterns_of(spec, (kind, member)))} matches: the patterns of a member need the "
                "same captures",
            )


def _check_names(declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    for name in declared["block_coupling"]:
        if name in declared["block"]:
            problems.add(
                f"block_coupling.{name}", "", f"[block.{name}] has the same name: a scope could mean either"
            )


def _check_unused(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    """Blocks that no scope uses; only where every table that names others could be read."""
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
    if problems.is_open("", *KINDS) or not all(
        _all_read(kind, key, spec, declared, problems)
        for kind, key in (("scope", "block"), ("block_coupling", "blocks"))
    ):
        return
    for name in declared["block_coupling"]:
        if name not in named:
            problems.add(f"block_coupling.{name}", "", "used by no scope: name it in one, or remove it")
    for name in declared["block"]:
        if name not in named | fused:
            problems.add(
                f"block.{name}", "", "used by no scope: name it in one or in a coupling, or remove it"
            )


def _all_read(
    kind: str, key: str, spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems
) -> bool:
    """Whether this key is known of every table of a kind."""
    return len(getattr(spec, kind)) == len(declared[kind]) and not any(
        problems.is_open(f"{kind}.{name}", key) for name in declared[kind]
    )


def _check_budgets(spec: Spec, declared: Mapping[str, Collection[str]], problems: Problems) -> None:
    coupled = spec.coupled_scopes()
    coupled_known = not problems.is_open("", "scope_coupling") and _all_read(
        "scope_coupling", "scopes", spec, declared, problems
    )
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
            text = f"this scope is a member of [scope_coupling.{coupling}]: {what} belongs there"
            problems.add(place, key, text)


def _check_outermost(place: str, table: BudgetTable, spec: Spec, problems: Problems) -> None:
    given = tuple(key for key in BUDGETS if getattr(table, key) is not None or problems.has(place, key))
    if not given and not problems.is_open(place, *BUDGETS):
        problems.add(place, "", "there is no budget: give one of nnz, sparsity and threshold")
    if len(given) > 1:
        problems.add(place, "", f"found the budgets {listed(given)}: give exactly one")
    if table.multiple_of is not None and given == ("threshold",):
        problems.add(
            place,
            "multiple_of",
            "it rounds the number that nnz or sparsity gives; a threshold keeps no fixed number",
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
