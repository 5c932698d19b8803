"""Nested scopes: a plan as levels, each of which decides among what the levels before it keep.

Every level but the last writes masks, and the next one is worked within them. Weights that are reconstructed
are worked in one task of all levels instead. Owns which tasks belong to which level. Reads no data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from sparseprune.checkpoint import StoredMask
from sparseprune.engine.grids import identity_order, prod
from sparseprune.errors import SpecError
from sparseprune.spec import BoundBlock, BoundBlockCoupling, BoundScope
from sparseprune.spec.bound import Budget

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sparseprune.checkpoint import StoredTensor
    from sparseprune.execution.plan import Plan, Task, WorkUnit
    from sparseprune.execution.schedule import Schedule


def levels_of(plan: Plan) -> tuple[Plan, ...]:
    """The levels of a plan, outer ones first; the plan itself where no scope is nested.

    The last one has all units, with their innermost tasks; those before it have the tasks of outer rules. Its
    masks are placeholders, by the names of weights, until those before it are done (`within_masks`).
    """
    outer = plan.bound.outer
    if not outer:
        return (plan,)
    depths = {rule.name: len(plan.bound.levels(rule.name)) - 1 for rule in plan.bound.rules}
    together = [_rebuilt_together(unit, depths) for unit in plan.units]
    levels = []
    masked: dict[str, StoredMask] = {}
    for depth in range(1 + max(depths[rule] for rule in outer)):
        units = [
            _part(unit, [task for task in unit.tasks if depths[task.rule] == depth and task.rule in outer])
            for unit, joined in zip(plan.units, together, strict=True)
            if joined is None
        ]
        units = [_within(unit, masked) for unit in units if unit.tasks]
        masked |= {one.name: _placeholder(one) for unit in units for one in unit.tensors}
        levels.append(replace(plan, units=units))
    last = [
        _within(replace(unit, tasks=_innermost(unit, outer)), masked) if joined is None else joined
        for unit, joined in zip(plan.units, together, strict=True)
    ]
    return (*(level for level in levels if level.units), replace(plan, units=last))


def within_masks(schedule: Schedule, masks: Mapping[str, StoredMask]) -> Schedule:
    """The schedule with the masks that the levels before it have written, in the place of placeholders."""
    if not masks:
        return schedule

    def found(within: Iterable[StoredMask]) -> tuple[StoredMask, ...]:
        return tuple([masks.get(one.name, one) for one in within])

    groups = [
        replace(group, tasks=tuple([replace(task, within=found(task.within)) for task in group.tasks]))
        for group in schedule.groups
    ]
    untouched = [
        one if one.within is None else replace(one, within=found((one.within,))[0])
        for one in schedule.untouched
    ]
    return replace(schedule, groups=tuple(groups), untouched=tuple(untouched), outer=())


def _part(unit: WorkUnit, tasks: Sequence[Task]) -> WorkUnit:
    """Some tasks of a unit, and the tensors that they reach."""
    names = {leaf.tensor for task in tasks for leaf in task.instance.scope.leaves}
    return replace(
        unit,
        tasks=tuple(tasks),
        tensors=tuple([one for one in unit.tensors if one.name in names]),
        within=tuple([one for one in unit.within if one.name in names]),
    )


def _innermost(unit: WorkUnit, outer: frozenset[str]) -> tuple[Task, ...]:
    return tuple([task for task in unit.tasks if task.rule not in outer])


def _within(unit: WorkUnit, masked: Mapping[str, StoredMask]) -> WorkUnit:
    """A unit whose tasks decide among what these masks keep, beside those that it has."""
    own = {one.name: one for one in unit.within}
    own |= {one.name: masked[one.name] for one in unit.tensors if one.name in masked}
    return unit.having(own) if own else unit


def _placeholder(stored: StoredTensor) -> StoredMask:
    return StoredMask(stored.name, stored, stored.shape, "packed")


def _rebuilt_together(unit: WorkUnit, depths: Mapping[str, int]) -> WorkUnit | None:
    """A unit with one task of all levels, where nested scopes are reconstructed; None where they are not.

    SpecError where a level has no matrix with statistics.
    """
    method = next((one.instance.reconstruct for one in unit.tasks if one.instance.reconstruct), None)
    is_nested = any(task.instance.within is not None for task in unit.tasks)
    if method is None or not is_nested or not any(stored.numel for stored in unit.tensors):
        return None
    levels = tuple(sorted(unit.tasks, key=lambda task: depths[task.rule]))
    inputs = {(one.role, one.key): one for task in levels for one in task.inputs}
    known = {one.key for one in inputs.values() if one.role == "moment"}
    for task in levels:
        groups = [[leaf.tensor for leaf in member.leaves] for member in task.instance.scope.members]
        names = next((names for names in groups if known.isdisjoint(names)), None)
        if names is not None:
            where = f"[{task.rule}] {task.instance.label}"
            raise SpecError(
                f"{where}: nested scopes are reconstructed together, and there are no statistics of "
                f"{names[0]}: calibrate these too, or leave reconstruct out"
            )
    first = levels[0]
    scope = _whole(first.instance.label, unit.tensors)
    instance = replace(first.instance, scope=scope, budget=Budget(nnz=1), reconstruct=method)
    task = replace(first, instance=instance, inputs=tuple(inputs.values()), levels=levels)
    return replace(unit, tasks=(task,))


def _whole(label: str, tensors: Sequence[StoredTensor]) -> BoundScope:
    """A scope of one block: all of some tensors that have elements."""
    filled = [stored for stored in tensors if stored.numel]
    rank = max(len(stored.shape) for stored in filled)
    leaves = []
    for stored in filled:
        shape = (*stored.shape, *(1,) * (rank - len(stored.shape)))
        stride = tuple([prod(shape[dim + 1 :]) for dim in range(rank)])
        leaves.append(BoundBlock(label, stored.name, shape, stride, 0, shape))
    orders = (identity_order(rank),) * len(leaves)
    block = leaves[0] if len(leaves) == 1 else BoundBlockCoupling(label, tuple(leaves), orders)
    return BoundScope(label, block, (1,) * rank)


def tasks_of(task: Task) -> tuple[Task, ...]:
    """The tasks of the levels that are worked in one, or the task itself."""
    return task.levels or (task,)
