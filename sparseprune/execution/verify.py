"""Passes that verify: how many blocks of each scope are not zero, and which scopes break the spec.

Owns what is checked of a rule, and how findings add up by rule and tensor; nonzero_blocks counts. Called by
api.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import any_in, nonzero
from sparseprune.execution.nonzero_blocks import First, Found, count_pass, count_strategy, joined
from sparseprune.execution.passes import Decision, Pass
from sparseprune.execution.plan import Task, is_undecided, make_plan
from sparseprune.execution.regions import (
    Part,
    alone,
    flat_leaf,
    leaves_of,
    limits_of,
    members_of,
    numel_per_scope,
    regions_at,
)
from sparseprune.execution.runner import Job, read_through
from sparseprune.execution.schedule import Schedule, TaskGroup, make_schedule, resident_of
from sparseprune.execution.strategy import BlockNorms, CountNonzero
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.results.checking import BrokenScope, CheckedRule, CheckedTensor, SharedSurvivors
from sparseprune.results.fields import one_or_all
from sparseprune.spec import BoundRule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint import Checkpoint, Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.engine.kernels.counting import ByteFlags
    from sparseprune.execution.passes import Chunk
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.regions import AnyBlock, Limits, Region
    from sparseprune.execution.tensor_io import Loaded, Mask
    from sparseprune.spec import BoundBlock, BoundInstance, BoundSpec, Spec


UNCHECKED = "a survivor of a soft threshold may have any size"


class Verification(Struct, frozen=True):
    """Every rule in the order of the spec, every tensor that was checked in the order of the checkpoint."""

    rules: tuple[CheckedRule, ...]
    tensors: tuple[CheckedTensor, ...]


class _Reached(Struct, frozen=True):
    """A tensor and what was found in the scopes of a task that reach it; `partly` zero blocks are its own."""

    task: Task
    found: Found
    partly: int
    element: Shape


def verification_of(plan: Plan, checked: Iterable[tuple[Task, Found]]) -> Verification:
    """What was found in the scopes of tasks, added up."""
    of_rule: dict[str, list[tuple[Task, Found]]] = {rule.name: [] for rule in plan.bound.rules}
    of_tensor: dict[str, dict[str, list[_Reached]]] = {}
    for task, found in checked:
        of_rule[task.rule].append((task, found))
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


def _checked_rule(rule: BoundRule, parts: Sequence[tuple[Task, Found]]) -> CheckedRule:
    total = joined([found for _, found in parts])
    instances = rule.instances
    name, along = _name_and_lines(rule.name, [instance.form for instance in instances])
    return CheckedRule(
        name=name,
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
        together=_together(parts),
        along=along,
    )


def _together(parts: Sequence[tuple[Task, Found]]) -> SharedSurvivors | None:
    """What survives of a budget whose parts nobody knows; None where they are known, or none is shared."""
    nonzero = allowed = Fraction(0)
    undecided = [pair for pair in parts if is_undecided(pair[0].instance)]
    for task, found in undecided:
        shared, scope = task.instance.allocate, task.instance.scope
        elements = Fraction(numel_per_scope(scope), max(1, scope.blocks_per_scope))
        nonzero += elements * sum(count * scopes for count, scopes in found.scopes.items())
        allowed += elements * prod(scope.grid_shape) * (0 if shared is None else shared.nnz)
    return SharedSurvivors(nonzero=floor(nonzero), allowed=floor(allowed)) if undecided else None


def _checked_tensor(name: str, rule: str, parts: Sequence[_Reached]) -> CheckedTensor:
    nnz = {part.task.instance.budget.nnz for part in parts}
    thresholds = {part.task.instance.budget.threshold for part in parts}
    rule, along = _name_and_lines(rule, [part.task.instance.form for part in parts])
    return CheckedTensor(
        name=name,
        rule=rule,
        scopes=sum(sum(part.found.scopes.values()) for part in parts),
        nnz=nnz.pop() if len(nnz) == 1 else None,
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        broken=sum(part.found.broken for part in parts),
        torn=sum(part.partly for part in parts),
        first=next((_first(part, part.found.first) for part in parts if part.found.first is not None), None),
        along=along,
    )


def _first(part: _Reached, first: First) -> BrokenScope:
    return BrokenScope(
        instance=part.task.instance.label,
        scope=first.scope,
        element=part.element,
        nonzero=first.nonzero,
        allowed=part.task.instance.budget.nnz,
    )


class Check(Schedule, frozen=True):
    """All that has to be counted, and under a threshold scored, to check a plan."""

    @property
    def bound(self) -> BoundSpec:
        """The rules that are checked; of transposable ones the rows, as the columns are the same elements."""
        names = {task.rule for group in self.groups for task in group.tasks}
        bound = self.plan.bound
        rules = [rule for rule in bound.rules if rule.name in names]
        once = [rule for rule in rules if not any(one.form < 0 == one.form % 2 for one in rule.instances)]
        return replace(bound, rules=tuple(once))


def make_check(checkpoint: Checkpoint, spec: Spec, memory: int, workers: int) -> Check:
    """Bind a spec to the headers of a checkpoint, and find how each of its rules is checked.

    Files of scores are looked for only where a threshold needs them: they may be gone otherwise.

    Raises:
        SpecError: the spec does not fit the checkpoint, with every problem at once.
        SparsepruneError: the memory is too little.
    """
    plan = make_plan(checkpoint, spec, _is_scored)
    plan = replace(plan, bound=_by_rows_and_columns(_loosened(plan.bound)))
    # What is found of a tensor takes about as much as what is known of its mask when it is pruned.
    limits = limits_of(memory, uses_torch=False, resident=resident_of(plan, masks=True))
    alike = [
        [Task(rule.name, instance) for instance in instances]
        for rule in plan.bound.rules
        for instances in rule.forms().values()
        if instances[0].budget.nnz is not None
    ]
    scoring: tuple[TaskGroup, ...] = ()
    if any(_is_scored(instance) for _, instance in plan.bound.instances()):
        units = [
            replace(unit, tasks=tuple(task for task in unit.tasks if _is_scored(task.instance)))
            for unit in plan.units
        ]
        scored = replace(plan, units=tuple(unit for unit in units if unit.tasks))
        schedule = make_schedule(scored, memory, workers)
        scoring, limits = schedule.groups, schedule.limits
        alike += _alike([task for group in scoring for task in group.tasks], checkpoint.tensors)
    place = _places(plan)
    counting = [group for tasks in alike for group in _counting_groups(tasks, checkpoint.tensors, limits)]
    counting.sort(key=lambda group: place[group.task.rule, group.task.instance.label])
    return Check(plan, limits, workers, (*counting, *scoring), ())


def _by_rows_and_columns(bound: BoundSpec) -> BoundSpec:
    """Rules with transposable instances as two, of the rows and of the columns of tiles."""
    rules: list[BoundRule] = []
    for rule in bound.rules:
        tiled = [_is_tiled(instance) for instance in rule.instances]
        if not any(tiled):
            rules.append(rule)
            continue
        others = [one for one, is_tiled in zip(rule.instances, tiled, strict=True) if not is_tiled]
        rows, columns = (
            [_lines(instance, place) for instance in rule.instances if _is_tiled(instance)]
            for place in (0, 1)
        )
        if others:
            rules.append(BoundRule(rule.name, tuple(others)))
        rules.append(BoundRule(f"{rule.name} rows", tuple(rows)))
        rules.append(BoundRule(f"{rule.name} columns", tuple(columns)))
    return replace(bound, rules=tuple(rules))


def _name_and_lines(rule: str, forms: Iterable[int]) -> tuple[str, Literal["rows", "columns"] | None]:
    """The name that the spec has for a rule of `_by_rows_and_columns`, and the lines that it checks."""
    lowest = min(forms, default=0)
    if lowest >= 0:
        return rule, None
    lines: Literal["rows", "columns"] = "rows" if lowest % 2 else "columns"
    return rule.removesuffix(f" {lines}"), lines


def _is_tiled(instance: BoundInstance) -> bool:
    return any(member.transposable for member in instance.scope.members)


def _lines(instance: BoundInstance, place: int) -> BoundInstance:
    """The rows (0) or columns (1) of tiles as scopes; their forms have negative numbers, even for columns."""
    (scope,) = instance.scope.members
    nnz, size = instance.budget.nnz, max(scope.shape)
    line = (1, size) if place == 0 else (size, 1)
    one = replace(scope, shape=(*scope.shape[:-2], *line), transposable=False)
    budget = dataclasses.replace(instance.budget, nnz=None if nnz is None else nnz // size)
    return replace(instance, scope=one, budget=budget, form=-2 * instance.form - 1 - place)


def _loosened(bound: BoundSpec) -> BoundSpec:
    """With the most that may survive of instances whose parts of a common budget nobody knows."""
    if not any(is_undecided(instance) for _, instance in bound.instances()):
        return bound

    def loose(instance: BoundInstance) -> BoundInstance:
        if not is_undecided(instance) or instance.kept_range is None:
            return instance
        return replace(instance, budget=dataclasses.replace(instance.budget, nnz=instance.kept_range[1]))

    rules = [replace(rule, instances=tuple(map(loose, rule.instances))) for rule in bound.rules]
    return replace(bound, rules=tuple(rules))


def count_survivors(check: Check, reader: Source, progress: Callable[[int, str], None]) -> Verification:
    """How many blocks of each scope are not zero, and which scopes break the spec.

    The same for any number of workers. `progress` gets, from any thread, bytes that were read and of what.

    Raises:
        SparsityError: NaN where a threshold asks for a score.
    """
    io = TensorIO(reader, tensors=check.plan.checkpoint.tensors, passed=progress)
    results = read_through(check_jobs(check), io, check.resources, progress)
    found = [
        pair
        for order, group in enumerate(check.groups)
        for pair in zip(group.tasks, results[order], strict=True)
    ]
    place = _places(check.plan)
    found.sort(key=lambda pair: place[pair[0].rule, pair[0].instance.label])
    return verification_of(check.plan, found)


def check_jobs(check: Check) -> Iterator[Job]:
    """The jobs of a check for a runner; each gives a Found for each of its tasks."""
    for order, group in enumerate(check.groups):
        yield Job(order, group.key, group.task.part, _first_pass(group), group.strategy.held)


def _alike(tasks: Iterable[Task], tensors: Mapping[str, StoredTensor]) -> list[list[Task]]:
    """Tasks under a threshold, of which each block is a scope of its own, in groups that look alike."""
    groups: dict[object, list[Task]] = {}
    for task in tasks:
        look = tuple(
            (leaf.view_shape, leaf.view_stride, leaf.shape, order, tensors[leaf.tensor].dtype)
            for leaf, order in leaves_of(_block(task))
        )
        single = replace(task, instance=replace(task.instance, scope=alone(task.instance.scope)))
        groups.setdefault(look, []).append(single)
    return list(groups.values())


def _counting_groups(
    alike: Sequence[Task], tensors: Mapping[str, StoredTensor], limits: Limits
) -> Iterator[TaskGroup]:
    """Groups of tasks of one form, of which the non-zero blocks are counted; small ones go together."""
    strategy = count_strategy(alike[0].instance.scope, tensors, limits)
    for begin in range(0, len(alike), strategy.batch):
        tasks = tuple(alike[begin : begin + strategy.batch])
        yield TaskGroup(f"count {tasks[0].instance.label}", tasks, strategy)


def _first_pass(group: TaskGroup) -> Pass:
    """What counts blocks that are not zero, or looks for those below a threshold."""
    if isinstance(group.strategy, CountNonzero):
        scope, nnz = group.task.instance.scope, group.task.instance.budget.nnz
        allowed = scope.blocks_per_scope if nnz is None else nnz
        return count_pass(tuple(task.instance.scope for task in group.tasks), allowed, group.strategy)
    from sparseprune.execution.pruning import first_pass  # noqa: PLC0415  (loads the loops that prune)

    pruning = first_pass(group)
    return BelowThreshold(group.tasks, pruning, whole=not isinstance(group.strategy, BlockNorms))


def _places(plan: Plan) -> dict[tuple[str, str], tuple[bool, int]]:
    """The order in which instances are checked, by rule and label: those with a threshold last."""
    return {
        (rule.name, instance.label): (instance.budget.nnz is None, number)
        for number, (rule, instance) in enumerate(plan.bound.instances())
    }


def _is_scored(instance: BoundInstance) -> bool:
    """Whether blocks have to be scored to be checked: those that a threshold cuts off."""
    return instance.budget.nnz is None and instance.soft is None


@dataclass(frozen=True, slots=True)
class BelowThreshold(Pass):
    """Blocks that are not zero though they score less than a threshold: what a pass that prunes would cut.

    Every block is a scope of its own: places are those of blocks. `whole`: chunks have whole blocks, in all
    of their leaves; else a flag of each block is kept.
    """

    tasks: tuple[Task, ...]
    pruning: Pass
    whole: bool

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        return (replace(chunk, key="", files=()) for chunk in self.pruning.chunks(io))

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        if self.pruning.decides:
            return self.pruning.work(chunk, io)
        watch = Watch(**{one.name: getattr(io, one.name) for one in fields(TensorIO)})
        self.pruning.work(chunk, watch)
        if self.whole:
            return list(self._of_tasks(watch.cuts))
        return [(cut.region.leaf, cut.region.blocks, _blocks_of(cut)) for cut in watch.cuts]

    def total(self) -> Any:  # noqa: ANN401
        if self.pruning.decides:
            return self.pruning.total()
        return None if self.whole else {}

    def add(self, total: Any, partial: Any) -> Any:  # noqa: ANN401
        if self.pruning.decides:
            return self.pruning.add(total, partial)
        for leaf, place, flags in partial:
            total.setdefault(leaf, np.zeros(leaf.grid_shape, dtype=np.uint8))[place] |= flags
        return total

    def merge(self, partials: list[Any], io: TensorIO) -> Pass | list[Found]:
        if self.pruning.decides:
            following = self.pruning.merge(partials, io)
            if isinstance(following, Decision):
                following = self.pruning.decided(following.value)
            return dataclasses.replace(self, pruning=following)
        if not self.whole:
            block = _block(self.tasks[0])
            return [_found_in(block, partials[0], (0,) * len(block.grid_shape))]
        found: list[list[Found]] = [[] for _ in self.tasks]
        for number, one in (pair for partial in partials for pair in partial):
            found[number].append(one)
        return [joined(own) for own in found]

    def _of_tasks(self, cuts: list[Cut]) -> Iterator[tuple[int, Found]]:
        """What was found in a chunk, with the number of the task; of fused blocks a chunk has one part."""
        tasks = {
            look: (number, _block(task))
            for number, task in enumerate(self.tasks)
            for leaf in _block(task).leaves
            for look in (leaf, flat_leaf(leaf))
        }
        together = len(_block(self.tasks[0]).leaves) > 1
        for group in filter(None, [cuts] if together else ([cut] for cut in cuts)):
            region = group[0].region
            number, block = tasks[region.leaf]
            if region.leaf in block.leaves:
                own = tuple(place.start for place in region.blocks)
                begin = tuple(own[dim] for dim in dict(leaves_of(block))[region.leaf])
                yield number, _found_in(block, {cut.region.leaf: _blocks_of(cut) for cut in group}, begin)
            else:
                yield number, _found_in_run(block, group[0])


class Cut(Struct, frozen=True):
    """Elements of a region that would be cut and are not zero: 1 for each, as the leaf sees them."""

    region: Region
    elements: ByteFlags


@dataclass(frozen=True, eq=False)
class Watch(TensorIO):
    """TensorIO without an output: what a pass would write is compared with what the input has there."""

    cuts: list[Cut] = field(default_factory=list)

    def store(self, loaded: Loaded, mask: Mask | None) -> None:
        """Keep what a mask cuts that is not zero in the input, which is read again for it."""
        if mask is None or mask.all():
            return
        again = self.load(loaded.region)
        flat, view = again.masked()
        flat[...] = nonzero(again.flat, DTYPES[again.dtype].zero_bits or 0)
        flat &= 1 - mask
        if flat.any():
            self.cuts.append(Cut(loaded.region, view))


def _block(task: Task) -> AnyBlock:
    """The blocks of a task under a threshold: it has one member."""
    ((member, _),) = members_of(task.instance.scope)
    return member.block


def _blocks_of(cut: Cut) -> ByteFlags:
    """1 for each block, or part of one, of which an element would be cut."""
    return any_in(cut.elements, cut.region.leaf.shape)


def _found_in(block: AnyBlock, flags: Mapping[BoundBlock, ByteFlags], begin: Shape) -> Found:
    """Fused blocks that would be cut in any of their leaves, in a part of the grid that begins at `begin`."""
    common = [flags[leaf].transpose(order) for leaf, order in leaves_of(block) if leaf in flags]
    return _found(np.bitwise_or.reduce(common), begin) if common else Found({})


def _found_in_run(block: AnyBlock, cut: Cut) -> Found:
    """Blocks of a leaf that is seen flat: neighbours, in the row-major order of its grid."""
    size, grid = block.numel_per_block, block.grid_shape
    found = _found(any_in(cut.elements, (size,)), (cut.region.begin[0] // size,))
    number = 0 if found.first is None else found.first.scope[0]
    place = np.unravel_index(number, grid) if grid else ()
    return replace(found, first=First(tuple(map(int, place)), 1))


def _found(flags: ByteFlags, begin: Shape) -> Found:
    """What was found in a part of a grid that begins at `begin`: 1 for blocks below the threshold."""
    inner = np.unravel_index(int(np.argmax(flags)), flags.shape) if begin else ()
    first = tuple(at + int(own) for at, own in zip(begin, inner, strict=True))
    return Found({}, int(np.count_nonzero(flags)), First(first, 1))
