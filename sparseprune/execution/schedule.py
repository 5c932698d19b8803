"""The schedule: by which strategy each task of a plan is worked within some memory, and what that will take.

Owns the border between the plan, which is what a spec means, and how it is done here, the device among it.
Reads no data and imports no torch until a device is asked for, so that `plan` can say what a run would
need.
"""

from __future__ import annotations

import re
from heapq import nlargest
from typing import TYPE_CHECKING

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError
from sparseprune.execution.devices import count_devices, free_bytes
from sparseprune.execution.nesting import levels_of, tasks_of
from sparseprune.execution.regions import (
    INTERPRETER,
    TORCH,
    TORCH_THREAD,
    Limits,
    Resident,
    Resources,
    alone,
    limits_of,
    members_of,
)
from sparseprune.execution.strategy import Compiled, Rebuild, choose, elements_of_block, needs_torch

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping

    from sparseprune.checkpoint import StoredMask, StoredTensor
    from sparseprune.execution.plan import Plan, Task, WorkUnit
    from sparseprune.execution.strategy import Strategy
    from sparseprune.spec import BoundBlock

_AMPLE = 1 << 60  # memory that allows every strategy


class TaskGroup(Struct, frozen=True):
    """Tasks of one rule that are alike but for their tensors, and their strategy; `key` names it in notes.

    Most often one task; several where these are small, so that their tensors are worked together.
    """

    key: str
    tasks: tuple[Task, ...]
    strategy: Strategy

    @property
    def task(self) -> Task:
        """The first of the tasks."""
        return self.tasks[0]


class Untouched(Struct, frozen=True):
    """A tensor of which tasks reach only `leaves`, or nothing as it moves alone: the rest is copied.

    What the mask of an earlier step drops of the rest stays zero, if it is `within` one.
    """

    key: str
    stored: StoredTensor
    leaves: tuple[BoundBlock, ...]
    within: StoredMask | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that are copied."""
        numel, reached = self.stored.numel, sum(prod(leaf.view_shape) for leaf in self.leaves)
        return (numel - reached) * self.stored.nbytes // max(1, numel)


class Schedule(Struct, frozen=True):
    """All that has to be done for a plan, by at most `workers` threads at one time.

    `outer` are the levels of nested scopes that come before, each within the masks of the one before it.
    """

    plan: Plan
    limits: Limits
    workers: int
    groups: tuple[TaskGroup, ...]
    untouched: tuple[Untouched, ...]
    outer: tuple[Schedule, ...] = ()

    @property
    def every_group(self) -> tuple[TaskGroup, ...]:
        """The groups of all levels."""
        return (*(group for level in self.outer for group in level.groups), *self.groups)

    @property
    def uses_torch(self) -> bool:
        """Whether some task needs the torch engine."""
        return any(map(needs_torch, self._unlike)) or any(level.uses_torch for level in self.outer)

    @property
    def resources(self) -> Resources:
        """The threads that do the work, and what they may take together."""
        held = max((strategy.held for strategy in self._unlike), default=0)
        return Resources.of(self.limits, self.workers, item=self._item, held=held, uses_torch=self.uses_torch)

    @property
    def peak_bytes(self) -> int:
        """Resident memory at the most, about: the interpreter, what is in flight, scores that are kept."""
        searched = min(self.limits.memory, self.search_resources.threads * self._searched)
        before = max((level.peak_bytes for level in self.outer), default=0)
        return max(before, self._peak_of_groups, self._base + max(searched, self._searched))

    @property
    def search_resources(self) -> Resources:
        """Those by which orders are looked for before: as many threads as have room."""
        memory = self.limits.memory
        threads = min(self.workers, memory // max(1, self._searched), len(self.plan.permutations.found))
        return Resources(max(1, threads), memory)

    @property
    def _searched(self) -> int:
        """The memory of the largest search for an order; 0 without any."""
        tensors = self.plan.checkpoint.tensors
        return max((one.memory(tensors) for one in self.plan.permutations.found), default=0)

    @property
    def _base(self) -> int:
        return INTERPRETER + (TORCH if self.uses_torch else 0) + self.limits.resident

    @property
    def _peak_of_groups(self) -> int:
        resources, uses_torch = self.resources, self.uses_torch
        shared = any(not isinstance(one, Rebuild) or one.stacked for one in self._unlike)
        chunks = resources.threads if shared else len(self.groups)
        threads = max(1, min(resources.threads, chunks, resources.memory // max(1, self._item)))
        held = sum(nlargest(self.workers, (group.strategy.held for group in self.groups)))
        kept = TORCH_THREAD * (threads - 1) if uses_torch else 0
        return self._base + min(self.limits.memory, self._item * threads + kept + held)

    @property
    def nbytes(self) -> int:
        """The work, in bytes of the input that are read, each as often as it is read."""
        tensors = self.plan.checkpoint.tensors
        reads = sum(group.strategy.work(task, tensors) for group in self.groups for task in group.tasks)
        reads += sum(level.nbytes for level in self.outer)
        searched = self.plan.permutations.search_bytes(tensors)
        return reads + sum(one.nbytes for one in self.untouched) + searched

    @property
    def _item(self) -> int:
        """The memory of the largest chunk."""
        return max((strategy.memory for strategy in self._unlike), default=0)

    @property
    def _unlike(self) -> Collection[Strategy]:
        """The strategies, each once: thousands of groups share a few."""
        return {id(group.strategy): group.strategy for group in self.groups}.values()


def make_schedule(
    plan: Plan,
    memory: int,
    workers: int,
    *,
    device: str = "cpu",
    masks: bool = True,
    resized: bool = False,
) -> Schedule:
    """The schedule of a plan for a process that may take `memory` bytes.

    A `device` of CUDA gets what the torch engine can do there; `auto` leaves to it what compiled loops cannot
    do. Where it is absent the schedule is that of the host's memory. `masks`: whether some are written,
    `resized`: whether slices are cut out afterwards.

    Raises:
        SparsepruneError: the memory is too little for this plan, or that of the device.
    """
    resident = resident_of(plan, masks=masks, resized=resized)
    compiled = not device.startswith("cuda")

    def limits(*, uses_torch: bool) -> Limits:
        free = free_bytes("cuda" if device == "auto" else device) if uses_torch else None
        return limits_of(memory, uses_torch=uses_torch, resident=resident, device=free)

    try:
        allowed = limits(uses_torch=not compiled)
    except SparsepruneError:
        if _schedule(plan, Limits(_AMPLE), workers, compiled=compiled).uses_torch:
            limits(uses_torch=True)  # which needs more, and says so
        raise
    schedule = _schedule(plan, allowed, workers, compiled=compiled)
    if schedule.uses_torch and compiled:
        schedule = _schedule(plan, limits(uses_torch=True), workers, compiled=True)
    return schedule


def resident_of(plan: Plan, *, masks: bool, resized: bool = False) -> Resident:
    """What a run of a plan holds of all tensors, whatever it works on at the time."""
    scopes = [instance.scope for _, instance in plan.bound.instances()]
    found = Resident.of(
        len(plan.checkpoint.tensors),
        sum(shard.data_begin for shard in plan.checkpoint.shards),
        reached=sum([len(scope.leaves) for scope in scopes]),
        scopes=sum([len(members_of(scope)) for scope in scopes]),
        masks=masks,
        resized=resized,
    )
    return replace(found, nbytes=found.nbytes + plan.permutations.resident_bytes)


def resolve_device(asked: str, *, uses_torch: bool) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` as the name of a device that is there.

    `auto` takes CUDA where there is one and the torch engine has something to do; what compiled loops do on
    the CPU is as fast as the disk. SparsepruneError for another word or an absent device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", asked)
    if found is None:
        raise SparsepruneError(f"--device {asked}: wanted auto, cpu, cuda or cuda:N")
    if asked == "cpu" or (asked == "auto" and not uses_torch):
        return "cpu"
    count = count_devices()
    if asked == "auto":
        return "cuda" if count else "cpu"
    if int(found[1] or 0) >= count:
        last = f" to cuda:{count - 1}" if count > 1 else ""
        there = f"only cuda:0{last}" if count else "no CUDA device"
        raise SparsepruneError(
            f"--device {asked}: there is {there} on this machine; try --device auto or cpu"
        )
    return asked


def device_text(groups: Iterable[TaskGroup], device: str) -> str:
    """Which devices work on some groups if the torch engine works on `device`, as a report has it.

    "cpu" for compiled loops, which know no other device; "cuda and cpu" where both have something to do.
    """
    used = {device if needs_torch(group.strategy) else "cpu" for group in groups}
    return " and ".join(sorted(used, reverse=True)) or "cpu"


def devices_of_rules(schedule: Schedule, device: str) -> dict[str, str]:
    """As `device_text`, for each rule of a schedule."""
    groups: dict[str, list[TaskGroup]] = {}
    for group in schedule.every_group:
        for task in tasks_of(group.task):
            groups.setdefault(task.rule, []).append(group)
    return {rule: device_text(some, device) for rule, some in groups.items()}


def cpu_lines(schedule: Schedule, asked: str) -> Iterator[str]:
    """A line for each rule that the CPU decides although CUDA was asked for: why it does."""
    if not asked.startswith("cuda"):
        return
    largest: dict[str, int] = {}
    for group in schedule.every_group:
        if not needs_torch(group.strategy):
            rule = group.task.rule
            largest[rule] = max(largest.get(rule, 0), elements_of_block(group.task))
    for rule, elements in largest.items():
        yield (
            f"{rule} is decided on the CPU: a block has {elements:,} elements, more than --memory and the "
            f"device have room for at one time ({schedule.limits.largest_tile():,})"
        )


def _schedule(plan: Plan, limits: Limits, workers: int, *, compiled: bool) -> Schedule:
    *outer, last = (_level(level, limits, workers, compiled=compiled) for level in levels_of(plan))
    return replace(last, plan=plan, outer=tuple(outer))


def _level(plan: Plan, limits: Limits, workers: int, *, compiled: bool) -> Schedule:
    """The schedule of scopes that are not nested, or of one level of those that are."""
    tensors = plan.checkpoint.tensors
    known: dict[Hashable, Strategy] = {}  # thousands of tasks have a handful of forms
    groups: list[TaskGroup] = []
    together: list[TaskGroup] = []  # small neighbours that are worked in one chunk
    elements = 0
    untouched: list[Untouched] = []
    for number, unit in enumerate(plan.units):
        for part, (task, member) in enumerate(_tasks(unit)):
            inputs = [(one.role, one.stored.dtype, one.stored.shape, one.tokens) for one in task.inputs]
            levels = [one.instance.form for one in task.levels]
            form = (task.instance.form, member, task.codes, bool(task.within), *levels, *inputs)
            strategy = known.get(form)
            if strategy is None:
                strategy = known[form] = choose(task, tensors, limits, compiled=compiled)
            group = TaskGroup(f"{number}.{part}", (task,), strategy)
            numel = sum([prod(leaf.view_shape) for leaf in task.instance.scope.leaves])
            elements += numel
            if together and not _fits(group, together[0], elements, tensors):
                groups.append(_joined(together))
                together, elements = [], numel
            together.append(group)
        untouched += _untouched(number, unit)
    if together:
        groups.append(_joined(together))
    alone = plan.permutations.moved.difference(plan.reached) if plan.permutations.found else ()
    untouched += [Untouched(f"moved{name}", tensors[name], ()) for name in tensors if name in alone]
    return Schedule(plan, limits, workers, tuple(groups), tuple(untouched))


def _fits(group: TaskGroup, first: TaskGroup, elements: int, tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether groups of one rule and one file are decided alike, in one chunk of so many elements."""
    own, other = group.strategy, first.strategy
    if not isinstance(own, Compiled) or elements > own.elements:
        return False
    if type(own) is not type(other) or group.task.rule != first.task.rule:
        return False
    names = [one.task.instance.scope.leaves[0].tensor for one in (group, first)]
    one_file = tensors[names[0]].shard is tensors[names[1]].shard
    return one_file and (own is other or replace(own, memory=other.memory) == other)


def _joined(groups: list[TaskGroup]) -> TaskGroup:
    """One group of several, by the key of the first one."""
    if len(groups) == 1:
        return groups[0]
    largest = max((group.strategy for group in groups), key=lambda strategy: strategy.memory)
    return TaskGroup(groups[0].key, tuple(task for group in groups for task in group.tasks), largest)


def _tasks(unit: WorkUnit) -> Iterator[tuple[Task, int]]:
    """The tasks of a unit; under a threshold one for each member of a coupling, block by block."""
    for task in unit.tasks:
        instance = task.instance
        if instance.budget.nnz is not None:
            yield task, 0
            continue
        for number, (member, _) in enumerate(members_of(instance.scope)):
            yield replace(task, instance=replace(instance, scope=alone(member))), number


def _untouched(number: int, unit: WorkUnit) -> Iterator[Untouched]:
    leaves_of: dict[str, list[BoundBlock]] = {stored.name: [] for stored in unit.tensors}
    within = {mask.name: mask for mask in unit.within}
    for task in unit.tasks:
        for leaf in task.instance.scope.leaves:
            leaves_of[leaf.tensor].append(leaf)
    for place, stored in enumerate(unit.tensors):
        leaves = leaves_of[stored.name]
        if sum([prod(leaf.view_shape) for leaf in leaves]) < stored.numel:
            yield Untouched(f"{number}.rest{place}", stored, tuple(leaves), within.get(stored.name))
