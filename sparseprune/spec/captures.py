"""Which captures tell the instances of a table apart, and by which patterns it finds its tensors.

Follows a table down to its blocks: a coupling has the captures of its members, less those that it
gathers across. Knows names only; `checking` asks before a checkpoint is at hand, `locating` for its errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparseprune.spec.names import RESERVED
from sparseprune.spec.schema import expressions_of

if TYPE_CHECKING:
    from sparseprune.spec.expressions import Expression
    from sparseprune.spec.schema import Spec
    from sparseprune.spec.sites import Pattern


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
