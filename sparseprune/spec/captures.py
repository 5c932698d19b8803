"""Which captures tell the instances of a table apart, and by which patterns it finds its tensors.

Follows a table down to its blocks: a coupling has the captures of its members, less those that it
gathers across. Knows names only; `checking` asks before a checkpoint is at hand, `locating` for its errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparseprune.spec.patterns import TensorPattern
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
    if not all(members):
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


def _own_patterns(spec: Spec, kind: str, name: str) -> tuple[TensorPattern, ...]:
    if kind == "scope":
        scope = spec.scope.get(name)
        if scope is None or scope.tensors is not None:
            return () if scope is None else scope.tensors or ()
        name = str(scope.block)
    return spec.block[name].tensors if name in spec.block else ()
