"""Verifying: whether a checkpoint is as sparse as a spec says, scope by scope; nothing is written.

Owns what is checked of a rule, and how that is shared among threads. Counting is surviving's business,
thresholds are undercut's, how findings add up is verdicts'. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sparseprune.execution.limits import INTERPRETER, TORCH, TORCH_THREAD, Crowd, limits_of
from sparseprune.execution.plan import make_plan, task_bytes
from sparseprune.execution.programs import ProgramPass, Setting
from sparseprune.execution.regions import alone, members_of
from sparseprune.execution.runner import Job, read_through
from sparseprune.execution.schedule import make_schedule, resident_of
from sparseprune.execution.stacked import stack_height, stack_program
from sparseprune.execution.surviving import leaf_bytes, survivor_program, way_of
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.undercut import below_threshold
from sparseprune.execution.verdicts import Checked, Verification, verification_of

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Sequence

    from sparseprune.checkpoint import Checkpoint, Source
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.occupied import Found
    from sparseprune.execution.plan import Plan
    from sparseprune.execution.programs import Program
    from sparseprune.execution.regions import AnyScope
    from sparseprune.execution.schedule import Job as Planned
    from sparseprune.execution.surviving import Way
    from sparseprune.spec import BoundInstance, BoundSpec, Spec

    Progress = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Count:
    """Scopes of which the blocks that are not zero are counted, by some way; the rule that they are of.

    Up to `height` instances of one `form`, with as many `allowed`, are counted at one time, if not 0.
    Under a threshold every block is a scope, and `job` does what pruning would do.
    """

    rule: str
    instance: BoundInstance
    scope: AnyScope
    way: Way
    form: Hashable
    height: int
    job: Planned | None = None

    @property
    def allowed(self) -> int:
        """How many blocks of a scope may be not zero, as far as counting can tell."""
        nnz = self.instance.budget.nnz
        return self.scope.blocks_per_scope if nnz is None else nnz


@dataclass(frozen=True, slots=True)
class Check:
    """All that has to be counted for a plan, by at most `workers` threads at one time."""

    plan: Plan
    limits: Limits
    workers: int
    counts: tuple[Count, ...]
    uses_torch: bool

    @property
    def bound(self) -> BoundSpec:
        """The rules that are checked."""
        names = {count.rule for count in self.counts}
        bound = self.plan.bound
        return replace(bound, rules=tuple(rule for rule in bound.rules if rule.name in names))

    @property
    def nbytes(self) -> int:
        """Bytes of input that pass by, each as often as it is read."""
        tensors = self.plan.checkpoint.tensors
        jobs = [count.job for count in self.counts if count.job is not None]
        return sum(leaf_bytes(count.scope.leaves, tensors) for count in self.counts) + sum(
            task_bytes(job.task, tensors) * job.strategy.passes for job in jobs
        )

    @property
    def peak_bytes(self) -> int:
        """Resident memory at the most, about."""
        item, held = self._largest()
        kept = TORCH_THREAD * (self.crowd.threads - 1) if self.uses_torch else 0
        base = INTERPRETER + (TORCH if self.uses_torch else 0)
        work = min(self.limits.memory, item * self.crowd.threads + kept + sum(held))
        return base + self.limits.resident + work

    @property
    def crowd(self) -> Crowd:
        """The threads that do the work, and what they may take together."""
        item, held = self._largest()
        return Crowd.of(
            self.limits, self.workers, item=item, held=max(held, default=0), uses_torch=self.uses_torch
        )

    def _largest(self) -> tuple[int, list[int]]:
        """What the largest item takes, and what the largest programs hold, one for each worker."""
        jobs = [count.job.strategy for count in self.counts if count.job is not None]
        parts = [*(count.way for count in self.counts), *jobs]
        held = sorted((part.held for part in parts), reverse=True)[: self.workers]
        return max((part.memory for part in parts), default=0), held


def make_check(checkpoint: Checkpoint, spec: Spec, memory: int, workers: int) -> Check:
    """Bind a spec to the headers of a checkpoint, and find how each of its rules is checked.

    Files of scores are looked for only where a threshold needs them: they may be gone otherwise.

    Raises:
        SpecError: the spec does not fit the checkpoint, with every problem at once.
        SparsepruneError: the memory is too little.
    """
    plan = make_plan(checkpoint, spec, _is_scored)
    counts: list[Count] = []
    # What is found of a tensor takes about as much as what is known of its mask when it is pruned.
    resident = resident_of(plan, masks=True)
    limits, uses_torch = limits_of(memory, uses_torch=False, resident=resident), False
    units = [
        replace(unit, tasks=tuple(task for task in unit.tasks if _is_scored(task.instance)))
        for unit in plan.units
    ]
    scored = replace(plan, units=tuple(unit for unit in units if unit.tasks))
    jobs: Sequence[Planned] = ()
    if scored.units:
        schedule = make_schedule(scored, memory, workers)
        jobs = [replace(job, tasks=(task,)) for job in schedule.jobs for task in job.tasks]
        limits, uses_torch = schedule.limits, schedule.uses_torch
    known: dict[Hashable, tuple[Way, int]] = {}  # thousands of scopes have a handful of forms

    def count(rule: str, instance: BoundInstance, scope: AnyScope, job: Planned | None = None) -> Count:
        form = _form(scope, plan)
        if form not in known:
            way = way_of(scope, checkpoint.tensors, limits)
            known[form] = way, stack_height(scope, way)
        way, height = known[form]
        return Count(rule, instance, scope, way, form, height, job)

    for rule, instance in plan.bound.instances():
        if instance.budget.nnz is not None:
            counts.append(count(rule.name, instance, instance.scope))
    counts += [count(job.task.rule, job.task.instance, alone(job.task.instance.scope), job) for job in jobs]
    return Check(plan, limits, workers, tuple(counts), uses_torch)


def count_survivors(check: Check, reader: Source, progress: Progress) -> Verification:
    """How many blocks of each scope are not zero, and which scopes break the spec.

    The same for any number of workers. `progress` is told, from any thread, bytes that were read and of what.

    Raises:
        SparsityError: NaN where a threshold asks for a score.
    """
    work = _Work(check, reader, progress)
    found = read_through(work.jobs(), work.io, check.crowd, progress)
    for order, one in found.items():
        work.found[order // 2].append(one)
    checked = [
        Checked(
            count.rule, count.instance.label, count.scope, count.instance.budget, tuple(work.found[number])
        )
        for number, count in enumerate(check.counts)
    ]
    return verification_of(check.plan, checked)


class _Work:
    """The jobs of a check, and what they found."""

    def __init__(self, check: Check, reader: Source, progress: Progress) -> None:
        self._check = check
        self._progress = progress
        self.io = TensorIO(reader, tensors=check.plan.checkpoint.tensors, passed=progress)
        self.found: list[list[Found]] = [[] for _ in check.counts]

    def jobs(self) -> Iterator[Job]:
        """All jobs, in the order of the plan, by the first instance of each."""
        counts = self._check.counts
        for numbers in _stacks(counts):
            first = counts[numbers[0]]
            if first.height and first.job is None:
                yield self._job(first, numbers, self._stacked(numbers))
                continue
            tell = self.found[numbers[0]].append
            setting = self._setting(self.io)
            program = survivor_program(first.scope, first.allowed, first.way, setting, tell)
            yield self._job(first, numbers, program)
            if first.job is not None:
                order, label = 2 * numbers[0] + 1, first.instance.label
                first_pass = below_threshold(first.job, self._check.plan.checkpoint.tensors)
                yield Job(order, str(order), label, first_pass, first.job.strategy.held)

    def _job(self, first: Count, numbers: Sequence[int], program: Program) -> Job:
        order = 2 * numbers[0]
        return Job(order, str(order), first.instance.label, ProgramPass(program), first.way.held)

    def _stacked(self, numbers: Sequence[int]) -> Program:
        counts = [self._check.counts[number] for number in numbers]

        def tell(found: Sequence[Found]) -> None:
            for number, one in zip(numbers, found, strict=True):
                self.found[number].append(one)

        scopes = [count.scope for count in counts]
        return stack_program(scopes, counts[0].allowed, counts[0].way, self._setting(self.io), tell)

    def _setting(self, traffic: TensorIO) -> Setting:
        return Setting(
            tensors=self._check.plan.checkpoint.tensors,
            traffic=traffic,
            limits=self._check.limits,
            device="cpu",
            recall=lambda _: None,
            note=lambda *_: None,
            passed=self._progress,
        )


def _stacks(counts: Sequence[Count]) -> Iterator[list[int]]:
    """The numbers of counts that are done together, by the first of each; most often of one."""
    waiting: dict[Hashable, list[int]] = {}
    for number, count in enumerate(counts):
        if count.job is not None or not count.height:
            yield from waiting.values()
            waiting = {}
            yield [number]
            continue
        stack = waiting.setdefault((count.form, count.allowed), [])
        stack.append(number)
        if len(stack) == count.height:
            yield from waiting.values()
            waiting = {}
    yield from waiting.values()


def _is_scored(instance: BoundInstance) -> bool:
    """Whether blocks have to be scored to be checked: those that a threshold cuts off."""
    return instance.budget.nnz is None and instance.soft is None


def _form(scope: AnyScope, plan: Plan) -> Hashable:
    """What the way of a scope depends on."""
    tensors = plan.checkpoint.tensors
    leaves = [
        (leaf.view_shape, leaf.view_stride, leaf.shape, tensors[leaf.tensor].dtype) for leaf in scope.leaves
    ]
    members = [(member.shape, order, len(member.leaves)) for member, order in members_of(scope)]
    return tuple(leaves), tuple(members)
