"""Allocation: instances of a rule share one budget, so that what goes of each costs the same at its margin.

Owns the threshold over all instances, the clamps, and how shares become whole numbers of blocks; what blocks
cost is counted by losses. Called by api, before a schedule is made.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import TYPE_CHECKING

import numpy as np
from msgspec import Struct

from sparseprune.engine.grids import prod
from sparseprune.errors import SparsepruneError, enough
from sparseprune.execution.losses import (
    KEYS,
    bytes_read,
    kept_range,
    loss_jobs,
    memory_of,
    rules_without_gradients,
)
from sparseprune.execution.passes import Outcomes
from sparseprune.execution.plan import is_undecided
from sparseprune.execution.pruning import one_torch_thread
from sparseprune.execution.regions import INTERPRETER, TORCH, Resources, limits_of, numel_per_scope
from sparseprune.execution.runner import Record, read_through, write_through
from sparseprune.execution.schedule import resident_of
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.checkpoint import Sink, Source
    from sparseprune.execution.losses import Counted, Ints
    from sparseprune.execution.plan import Plan, Task
    from sparseprune.execution.runner import Job, Progress

Allocated = dict[str, dict[str, int]]
"""By rule and label of an instance: how many blocks survive in each of its scopes."""


class Allocation(Struct, frozen=True):
    """The work of sharing budgets over a plan: jobs that count losses, and the numbers of their tasks.

    A process takes `peak` bytes for it at the most, about, and reads `nbytes`.
    """

    plan: Plan
    tasks: tuple[Task, ...]
    jobs: tuple[tuple[Job, list[int]], ...]
    resources: Resources
    peak: int

    def nbytes(self, output: Sink | None = None) -> int:
        """Bytes to read; what an earlier run to this output counted is not read again."""
        done = {} if output is None else output.finished
        jobs = [numbers for job, numbers in self.jobs if done.get(f"{job.key}.{job.first.decides}") is None]
        left = [number for numbers in jobs for number in numbers]
        return bytes_read([self.tasks[number] for number in left], self.plan.checkpoint.tensors)

    def notes(self) -> Iterator[str]:
        """A line for each rule that cannot count in units of the loss."""
        for rule, name in rules_without_gradients(self.tasks).items():
            yield (
                f"{rule} shares its budget by what outputs lose, not by the loss: its statistics have no "
                f"gradients of {name}; calibrate --gradients"
            )


def make_allocation(plan: Plan, memory: int, workers: int) -> Allocation | None:
    """The work of sharing budgets within some memory; None where nothing is to be shared.

    Raises:
        SparsepruneError: the memory is too little.
    """
    tasks = tuple(task for unit in plan.units for task in unit.tasks if is_undecided(task.instance))
    if not tasks:
        return None
    tensors = plan.checkpoint.tensors
    resident = resident_of(plan, masks=False)
    limits = limits_of(memory, uses_torch=True, resident=resident)
    item = memory_of(tasks, tensors)
    if item > limits.memory:
        needed = INTERPRETER + TORCH + limits.resident + item
        raise SparsepruneError(
            f"[{tasks[0].rule}] reconstruct: second moments must be in memory to be factored; give "
            f"--memory {enough(needed)}"
        )
    jobs = loss_jobs(tasks, tensors)
    held = max(job.held for job, _ in jobs)
    resources = Resources.of(limits, workers, item=item, held=held, uses_torch=True)
    flight = min(limits.memory, item * resources.threads + held)
    return Allocation(plan, tasks, tuple(jobs), resources, INTERPRETER + TORCH + limits.resident + flight)


def allocate(
    work: Allocation, reader: Source, device: str, progress: Progress, output: Sink | None = None
) -> Allocated:
    """Count what blocks cost, and share the budget of each rule over its instances.

    What is counted is noted in the `output`, if there is one; the same for any number of workers.
    """
    tensors = work.plan.checkpoint.tensors
    io = TensorIO(reader, tensors=tensors, device=device, passed=progress)
    jobs = [job for job, _ in work.jobs]
    with one_torch_thread():
        if output is None:
            results = read_through(jobs, io, work.resources, progress)
        else:
            record = Record(output, Outcomes(), progress)
            results = write_through(jobs, io, record, work.resources, copies=False)
    counted: dict[int, Counted] = {}
    for job, numbers in work.jobs:
        counted.update(zip(numbers, results[job.order], strict=True))
    found: Allocated = {}
    for rule in dict.fromkeys(task.rule for task in work.tasks):
        own = [number for number, task in enumerate(work.tasks) if task.rule == rule]
        tasks = [work.tasks[number] for number in own]
        kept = shared_budget(
            [Share.of(task, counted[number]) for task, number in zip(tasks, own, strict=True)]
        )
        found[rule] = {task.instance.label: nnz for task, nnz in zip(tasks, kept, strict=True)}
    return found


class Share(Struct, frozen=True, eq=False):
    """An instance that shares a budget: `scopes` of `blocks` each, of so many `elements` each on average.

    In each of them from `least` to `most` survive, a multiple of `unit` or all; without sharing it were
    `nnz`. In the bins up to `keys[i]`, itself among them, `ends[i + 1]` of all blocks lie; before `keys[0]`
    there are `ends[0]`.
    """

    scopes: int
    blocks: int
    elements: Fraction
    nnz: int
    least: int
    most: int
    unit: int
    keys: Ints
    ends: Ints

    @classmethod
    def of(cls, task: Task, counted: Counted) -> Share:
        """Of a task, by the bins of its losses."""
        scope, shared = task.instance.scope, task.instance.allocate
        if shared is None:
            raise TypeError(f"{task.instance.label} shares no budget")
        blocks = scope.blocks_per_scope
        elements = Fraction(numel_per_scope(scope), max(1, blocks))
        unit = task.instance.budget.multiple_of
        below, keys, counts = counted
        bins = np.array(keys, dtype=np.int64), np.cumsum([below, *counts])
        return cls(prod(scope.grid_shape), blocks, elements, shared.nnz, *kept_range(task), unit, *bins)

    def pruned(self, key: int) -> int:
        """How many blocks go that lie in bins before `key`, within what may go."""
        found = int(self.ends[np.searchsorted(self.keys, key)])
        least, most = (self.scopes * (self.blocks - kept) for kept in (self.most, self.least))
        return min(max(found, least), most)

    def above(self, kept: int) -> int:
        """The next number that may survive in a scope."""
        return min(self.blocks, (kept // self.unit + 1) * self.unit)


def shared_budget(shares: Sequence[Share]) -> list[int]:
    """How many blocks survive in each scope of each instance, so that together as many elements do as before.

    What goes lies below one threshold, but for the clamps; blocks in the bin of the threshold go in
    proportion. Numbers are rounded by their largest remainders: where scopes have whole rows together one
    block less cannot go, and up to the elements of the smallest such step are pruned more than asked.
    """
    there = [share for share in shares if share.scopes and share.blocks]
    wanted = _threshold(there)
    kept = []
    for share, pruned in zip(there, wanted, strict=True):
        ideal = share.blocks - pruned / share.scopes
        low = share.blocks if ideal == share.blocks else floor(ideal) // share.unit * share.unit
        kept.append(max(share.least, low))
    budget = sum(share.elements * share.scopes * share.nnz for share in there)
    left = budget - sum(share.elements * share.scopes * own for share, own in zip(there, kept, strict=True))
    rest = [
        share.blocks - pruned / share.scopes - own
        for share, pruned, own in zip(there, wanted, kept, strict=True)
    ]
    steps = [max(1, share.above(own) - own) for share, own in zip(there, kept, strict=True)]
    order = sorted(range(len(there)), key=lambda number: -rest[number] / steps[number])
    taken = True
    while taken:
        taken = False
        for number in order:
            share, more = there[number], there[number].above(kept[number])
            cost = share.elements * share.scopes * (more - kept[number])
            if 0 < cost <= left and more <= share.most:
                kept[number], left, taken = more, left - cost, True
    found = iter(kept)
    return [next(found) if share.scopes and share.blocks else share.nnz for share in shares]


def _threshold(shares: Sequence[Share]) -> list[Fraction]:
    """How many blocks go of each instance, before these become whole numbers for each scope."""
    budget = sum(share.elements * share.scopes * (share.blocks - share.nnz) for share in shares)

    def elements(key: int) -> Fraction:
        return sum((share.elements * share.pruned(key) for share in shares), Fraction(0))

    low, high = 0, KEYS
    while high - low > 1:  # elements(low) is never more than the budget
        middle = (low + high) // 2
        low, high = (middle, high) if elements(middle) <= budget else (low, middle)
    before, after = ([share.pruned(key) for share in shares] for key in (low, high))
    there = sum(
        (share.elements * (b - a) for share, a, b in zip(shares, before, after, strict=True)), Fraction(0)
    )
    part = (budget - elements(low)) / there if there else Fraction(0)
    return [a + part * (b - a) for a, b in zip(before, after, strict=True)]
