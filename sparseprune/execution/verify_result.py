"""The result of a check: what was found in scopes, added up by rule and by tensor, and where scopes begin.

Knows neither how scopes are counted nor tensor data. Called by verify.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.execution.nonzero_blocks import joined
from sparseprune.execution.regions import Part, alone, regions_at
from sparseprune.results.checking import BrokenScope, CheckedRule, CheckedTensor
from sparseprune.results.fields import one_or_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.execution.nonzero_blocks import First, Found
    from sparseprune.execution.plan import Plan, Task
    from sparseprune.spec import BoundRule

UNCHECKED = "a survivor of a soft threshold may have any size"


@dataclass(frozen=True, slots=True)
class Verification:
    """Every rule in the order of the spec, every tensor that was checked in the order of the checkpoint."""

    rules: tuple[CheckedRule, ...]
    tensors: tuple[CheckedTensor, ...]


@dataclass(frozen=True, slots=True)
class _Reached:
    """A tensor and what was found in the scopes of a task that reach it; `partly` zero blocks are its own."""

    task: Task
    found: Found
    partly: int
    element: Shape


def verification_of(plan: Plan, checked: Iterable[tuple[Task, Found]]) -> Verification:
    """What was found in the scopes of tasks, added up."""
    of_rule: dict[str, list[Found]] = {rule.name: [] for rule in plan.bound.rules}
    of_tensor: dict[str, dict[str, list[_Reached]]] = {}
    for task, found in checked:
        of_rule[task.rule].append(found)
        for name, reached in _by_tensor(task, found, plan.checkpoint.tensors).items():
            of_tensor.setdefault(name, {}).setdefault(task.rule, []).append(reached)
    return Verification(
        tuple(_checked_rule(rule, of_rule[rule.name]) for rule in plan.bound.rules),
        tuple(
            _checked_tensor(name, rule, parts)
            for name in plan.checkpoint.tensors
            for rule, parts in of_tensor.get(name, {}).items()
        ),
    )


def _by_tensor(task: Task, found: Found, tensors: Mapping[str, StoredTensor]) -> dict[str, _Reached]:
    scope = task.instance.scope if task.instance.budget.nnz is not None else alone(task.instance.scope)
    partly = dict.fromkeys((leaf.tensor for leaf in scope.leaves), 0)
    for leaf, count in zip(
        scope.leaves, found.partly_in, strict=False
    ):  # there are none where no scope is broken
        partly[leaf.tensor] += count
    elements: dict[str, Shape] = {}
    if found.first is not None:
        place = found.first.scope
        for leaf, region in regions_at(scope, Part(place, (1,) * len(place))).items():
            shape = tensors[leaf.tensor].shape
            index = tuple(int(at) for at in np.unravel_index(region.first, shape)) if shape else ()
            elements[leaf.tensor] = min(elements.get(leaf.tensor, index), index)
    return {name: _Reached(task, found, count, elements.get(name, ())) for name, count in partly.items()}


def _checked_rule(rule: BoundRule, parts: Sequence[Found]) -> CheckedRule:
    total = joined(parts)
    instances = rule.instances
    return CheckedRule(
        name=rule.name,
        instances=len(instances),
        tensors=len({leaf.tensor for instance in instances for leaf in instance.scope.leaves}),
        scopes=sum(total.scopes.values()),
        blocks_per_scope=one_or_all(
            1 if instance.budget.nnz is None else instance.scope.blocks_per_scope for instance in instances
        ),
        nnz=one_or_all(instance.budget.nnz for instance in instances),
        threshold=one_or_all(instance.budget.threshold for instance in instances),
        broken=total.broken,
        torn=total.partly_zero,
        survivors=tuple(sorted(total.scopes.items())),
        unchecked=UNCHECKED if instances and not parts else None,
    )


def _checked_tensor(name: str, rule: str, parts: Sequence[_Reached]) -> CheckedTensor:
    nnz = {part.task.instance.budget.nnz for part in parts}
    thresholds = {part.task.instance.budget.threshold for part in parts}
    return CheckedTensor(
        name=name,
        rule=rule,
        scopes=sum(sum(part.found.scopes.values()) for part in parts),
        nnz=nnz.pop() if len(nnz) == 1 else None,
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        broken=sum(part.found.broken for part in parts),
        torn=sum(part.partly for part in parts),
        first=next((_first(part, part.found.first) for part in parts if part.found.first is not None), None),
    )


def _first(part: _Reached, first: First) -> BrokenScope:
    return BrokenScope(
        instance=part.task.instance.label,
        scope=first.scope,
        element=part.element,
        nonzero=first.nonzero,
        allowed=part.task.instance.budget.nnz,
    )
