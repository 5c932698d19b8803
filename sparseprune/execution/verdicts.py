"""Verdicts: what was found in the scopes of a plan, added up by rule and by tensor.

Plain data for tables, JSON and pictures. Owns where in a tensor a scope begins. Reads no tensor data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparseprune.execution.occupied import joined
from sparseprune.execution.regions import Part, block_part, members_of, regions_of
from sparseprune.execution.scores import stored_place

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.occupied import Found
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.regions import AnyScope
    from sparseprune.spec import BoundRule, Budget

UNCHECKED = "a soft threshold leaves survivors of any size: there is nothing to tell them from what it cut"


@dataclass(frozen=True, slots=True)
class BrokenScope:
    """The first broken scope that reaches a tensor.

    `scope` is its place in the grid of scopes of `instance`, `element` the index in the tensor of the first
    of its elements there. `nonzero` of its blocks are not zero where `allowed` may be; under a threshold,
    where a scope is one block that scores too little, `allowed` is None.
    """

    instance: str
    scope: Shape
    element: Shape
    nonzero: int
    allowed: int | None


@dataclass(frozen=True, slots=True)
class TensorVerdict:
    """A tensor that a rule reaches, and the scopes that reach it.

    `allowed` is the number of blocks that may survive in each of them, or `threshold` what each block has to
    score; None where they differ. `torn` counts the fused blocks of scopes with too many survivors that are
    not zero in this tensor, but are in another member.
    """

    name: str
    rule: str
    scopes: int
    broken: int
    torn: int
    allowed: int | None
    threshold: float | None
    first: BrokenScope | None


@dataclass(frozen=True, slots=True)
class RuleVerdict:
    """A rule and what was found in its scopes; `unchecked` says why it was not looked at, if it was not.

    `nnz`, `threshold` and `blocks_per_scope` have a value for each instance; under a threshold a scope is one
    block. `survivors` tells how many scopes have so many non-zero blocks.
    """

    name: str
    instances: int
    tensors: int
    scopes: int
    blocks_per_scope: tuple[int, ...]
    nnz: tuple[int | None, ...]
    threshold: tuple[float | None, ...]
    broken: int
    torn: int
    survivors: Mapping[int, int]
    unchecked: str | None


@dataclass(frozen=True, slots=True)
class Verification:
    """Every rule in the order of the spec, every tensor that was looked at in the order of the checkpoint."""

    rules: tuple[RuleVerdict, ...]
    tensors: tuple[TensorVerdict, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """Scopes of an instance that were looked at, by whose budget, and what was found in them."""

    rule: str
    instance: str
    scope: AnyScope
    budget: Budget
    found: tuple[Found, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """What a tensor has to do with some scopes that were looked at; `first` is the first broken one."""

    budget: Budget
    found: Found
    torn: int
    first: BrokenScope | None


def verification_of(plan: Plan, checked: Sequence[Checked]) -> Verification:
    """What was found, added up."""
    of_rule: dict[str, list[Found]] = {rule.name: [] for rule in plan.bound.rules}
    of_tensor: dict[str, dict[str, list[_Part]]] = {name: {} for name in plan.reached}
    for one in checked:
        found = joined(one.found)
        of_rule[one.rule].append(found)
        for name, part in _by_tensor(one, found, plan.checkpoint.tensors).items():
            of_tensor[name].setdefault(one.rule, []).append(part)
    return Verification(
        tuple(_rule_verdict(rule, of_rule[rule.name]) for rule in plan.bound.rules),
        tuple(
            _tensor_verdict(name, rule, parts)
            for name, rules in of_tensor.items()
            for rule, parts in rules.items()
        ),
    )


def _by_tensor(one: Checked, found: Found, tensors: Mapping[str, StoredTensor]) -> dict[str, _Part]:
    """What each tensor has to do with what was found."""
    torn = dict.fromkeys((leaf.tensor for leaf in one.scope.leaves), 0)
    for leaf, count in zip(
        one.scope.leaves, found.torn_in, strict=False
    ):  # where none is torn there are none
        torn[leaf.tensor] += count
    firsts: dict[str, BrokenScope] = {}
    if found.first is not None:
        scope, nonzero = found.first.scope, found.first.nonzero
        for name, element in _elements(one.scope, scope, tensors).items():
            firsts[name] = BrokenScope(one.instance, scope, element, nonzero, one.budget.nnz)
    return {name: _Part(one.budget, found, count, firsts.get(name)) for name, count in torn.items()}


def _elements(scope: AnyScope, place: Shape, tensors: Mapping[str, StoredTensor]) -> dict[str, Shape]:
    """Where in each tensor a scope begins; of several parts of it that it has, the one that stands first."""
    cell = Part(place, (1,) * len(place))
    elements: dict[str, Shape] = {}
    for member, order in members_of(scope):
        for leaf, region in regions_of(member.block, block_part(member, order, cell)).items():
            element = stored_place(region, (0,) * len(region.begin), tensors[leaf.tensor].shape)
            elements[leaf.tensor] = min(elements.get(leaf.tensor, element), element)
    return elements


def _rule_verdict(rule: BoundRule, parts: Sequence[Found]) -> RuleVerdict:
    total = joined(parts)
    budgets = [instance.budget for instance in rule.instances]
    return RuleVerdict(
        name=rule.name,
        instances=len(rule.instances),
        tensors=len({leaf.tensor for instance in rule.instances for leaf in instance.scope.leaves}),
        scopes=sum(total.survivors.values()),
        blocks_per_scope=tuple(
            1 if instance.budget.nnz is None else instance.scope.blocks_per_scope
            for instance in rule.instances
        ),
        nnz=tuple(budget.nnz for budget in budgets),
        threshold=tuple(budget.threshold for budget in budgets),
        broken=total.broken,
        torn=total.torn,
        survivors=total.survivors,
        unchecked=UNCHECKED if rule.instances and not parts else None,
    )


def _tensor_verdict(name: str, rule: str, parts: Sequence[_Part]) -> TensorVerdict:
    allowed = {part.budget.nnz for part in parts}
    thresholds = {part.budget.threshold for part in parts}
    return TensorVerdict(
        name=name,
        rule=rule,
        scopes=sum(sum(part.found.survivors.values()) for part in parts),
        broken=sum(part.found.broken for part in parts),
        torn=sum(part.torn for part in parts),
        allowed=allowed.pop() if len(allowed) == 1 else None,
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        first=next((part.first for part in parts if part.first is not None), None),
    )
