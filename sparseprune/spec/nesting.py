"""Nesting: how many blocks survive at most in the scopes of rules that are within others.

Owns the bound that an outer rule sets for an inner one, and the forms of instances whose bounds differ. Knows
bound scopes alone. Called by binding, and by knobs for other budgets.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import count
from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparseprune.engine.grids import inverse_order, permute, surviving
from sparseprune.spec.bound import BoundBlock, BoundScope, levels_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.engine.grids import Shape
    from sparseprune.spec.bound import BoundInstance, BoundRule, Budget

Tiling = list[tuple[int, int, int, int]]
"""Of each dimension of a view its stride and size, and the elements that a block and a scope span there."""


def bounded(rules: Sequence[BoundRule]) -> tuple[BoundRule, ...]:
    """The rules, with no larger budgets than the rules around them leave room for.

    An instance is bounded where that is simple: it has one block grid in one tensor, the outer rule has the
    same view of that tensor, and the extents of its scopes and of outer blocks and scopes divide one another.
    """
    known = {rule.name: rule for rule in rules}
    outer = {rule.name: rule.within for rule in rules}
    numbers = count(1 + max((one.form for rule in rules for one in rule.instances), default=0))
    done: dict[str, BoundRule] = {}
    for name in [each for rule in rules for each in levels_of(rule.name, outer)]:
        if name in known and name not in done:
            around = done.get(outer[name] or "")
            done[name] = known[name] if around is None else _bounded_by(around, known[name], numbers)
    return tuple(done[rule.name] for rule in rules)


def _bounded_by(outer: BoundRule, rule: BoundRule, numbers: Iterator[int]) -> BoundRule:
    """A rule as `bounded` makes it, from the one around it; `numbers` are for forms that become several."""
    reached: defaultdict[str, list[tuple[BoundInstance, int]]] = defaultdict(list)
    for around in outer.instances:
        for number, leaf in enumerate(around.scope.leaves):
            reached[leaf.tensor].append((around, number))
    budgets: dict[tuple[int, ...], Budget] = {}
    forms: dict[tuple[int, int | None], int] = {}
    taken: set[int] = set()
    instances = []
    for one in rule.instances:
        there = reached.get(one.scope.leaves[0].tensor, ()) if _is_single(one) else ()
        key = (one.form, *[number for around, leaf in there for number in (around.form, leaf)])
        if key not in budgets:
            most = [_most(one, around, number) for around, number in there]
            budgets[key] = _at_most(one.budget, min(most, default=one.scope.blocks_per_scope))
        budget = budgets[key]
        own = one.form, budget.nnz
        if own not in forms:
            forms[own] = next(numbers) if one.form in taken else one.form
            taken.add(one.form)
        instances.append(replace(one, budget=budget, form=forms[own]))
    return replace(rule, instances=tuple(instances))


def _is_single(one: BoundInstance) -> bool:
    """Whether an instance is scopes of blocks of one tensor, neither of them coupled."""
    return isinstance(one.scope, BoundScope) and isinstance(one.scope.block, BoundBlock)


def _at_most(budget: Budget, most: int) -> Budget:
    """A budget for scopes in which so many blocks are left at most."""
    asked = budget.nnz
    if asked is None:
        return budget
    if budget.share is not None:
        asked = -(-surviving(budget.share, most) // budget.multiple_of) * budget.multiple_of
    return dataclasses.replace(budget, nnz=min(asked, most))


def _most(inner: BoundInstance, outer: BoundInstance, number: int) -> int:
    """The blocks of a scope of which an outer instance keeps an element at most, in its leaf of this number.

    A scope meets some scopes of the outer instance, each of these keeps `nnz` blocks, and of each kept block
    that the scope meets some of its own blocks have elements. All blocks, where extents do not fit together.
    """
    (scope,), (leaf,) = inner.scope.members, inner.scope.leaves
    every, found, around = scope.blocks_per_scope, outer.budget.nnz, _leaf(outer, number)
    own, other = _tiling(leaf, scope.shape), _tiling(*around)
    is_seen_alike = [dim[:2] for dim in own] == [dim[:2] for dim in other]
    if found is None or not is_seen_alike or leaf.view_offset != around[0].view_offset:
        return every
    for (_, _, block, extent), (_, _, outer_block, outer_extent) in zip(own, other, strict=True):
        if not (_nest(extent, outer_block) and _nest(extent, outer_extent)):
            return every
        found *= max(1, extent // outer_extent) * _touched(min(extent, outer_block), block)
    return min(every, found)


def _leaf(one: BoundInstance, number: int) -> tuple[BoundBlock, Shape]:
    """A leaf of an instance, and the shape of its scopes in the dimensions of that leaf's grid."""
    places = []
    for scope in one.scope.members:
        if isinstance(scope.block, BoundBlock):
            places.append((scope.block, scope.shape))
        else:
            pairs = zip(scope.block.members, scope.block.orders, strict=True)
            places += [(leaf, permute(scope.shape, inverse_order(order))) for leaf, order in pairs]
    return places[number]


def _tiling(leaf: BoundBlock, shape: Shape) -> Tiling:
    """How blocks and scopes of this shape lie in a view, whatever the order of its dimensions.

    >>> _tiling(BoundBlock("w", "w", (8, 6, 1), (6, 1, 1), 0, (4, 2, 1)), (1, 3, 1))
    [(6, 8, 4, 4), (1, 6, 2, 6)]
    """
    dims = zip(leaf.view_stride, leaf.view_shape, leaf.shape, shape, strict=True)
    found = [(stride, size, block, block * blocks) for stride, size, block, blocks in dims if size != 1]
    return sorted(found, reverse=True)


def _nest(one: int, other: int) -> bool:
    return one % other == 0 or other % one == 0


def _touched(span: int, block: int) -> int:
    """The blocks that so many elements lie in at most, where they begin at a multiple of their number.

    >>> [_touched(span, block) for span, block in [(4, 2), (2, 4), (3, 2), (2, 3)]]
    [2, 1, 2, 2]
    """
    if _nest(span, block):
        return max(1, span // block)
    return (span - 2) // block + 2
