"""Decisions in memory: which indices of each tensor a spec keeps, without masks on disk.

Owns when flags of blocks are enough, and how they become kept indices. Does not know how blocks are scored.
Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.engine.grids import prod
from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.plan import task_bytes
from sparseprune.execution.runner import Job, Record, already_done, dealt, write_through
from sparseprune.execution.scope_order import by_leaf
from sparseprune.execution.strategy import by_block_norms
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.two_pass import block_norms
from sparseprune.removal.preview import looker
from sparseprune.removal.shrink import kept_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from sparseprune.checkpoint import StagedOutput, TensorReader
    from sparseprune.execution.outcomes import TensorOutcome
    from sparseprune.execution.plan import Task
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.schedule import Schedule
    from sparseprune.execution.strategy import BlockNorms
    from sparseprune.removal.slices import KeptIndices
    from sparseprune.spec import BoundBlock

    Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class BlockDecisions:
    """The tasks of a schedule, all of which decide over whole blocks, each with its strategy."""

    schedule: Schedule
    tasks: Sequence[tuple[Task, BlockNorms]]

    def work_bytes(self, output: StagedOutput) -> tuple[int, int]:
        """Bytes that a whole run reads to decide, and how many of them an earlier run did."""
        tensors = self.schedule.plan.checkpoint.tensors
        read = sum((strategy.passes - 1) * task_bytes(task, tensors) for task, strategy in self.tasks)
        return read, already_done(output)

    def decide(
        self, reader: TensorReader, output: StagedOutput, progress: Progress
    ) -> tuple[dict[str, KeptIndices], Sequence[TensorOutcome]]:
        """The kept indices of the tensors that rules reach, and how many elements each rule drops.

        The journal of `output` notes each decision, so that the next run takes it over. Energies of the
        outcomes stay 0.
        """
        plan, outcomes = self.schedule.plan, Outcomes()
        io = TensorIO(reader, output, plan.checkpoint.tensors, passed=progress)
        record = Record(output, outcomes, progress)
        found = write_through(self._jobs(), io, record, self.schedule.crowd)

        def leaves() -> Iterator[tuple[BoundBlock, Flags]]:
            for number, (task, _) in enumerate(self.tasks):
                flags = found[number].view(np.bool_)
                for leaf, blocks in by_leaf(task.instance.scope, flags).items():
                    numel = prod(leaf.view_shape)
                    pruned = (blocks.size - int(np.count_nonzero(blocks))) * leaf.numel_per_block
                    outcomes.add([leaf.tensor, task.rule, numel, pruned, 0, 0.0, 0, 0.0])
                    yield leaf, np.ascontiguousarray(blocks).reshape(-1)

        shapes = {name: plan.checkpoint.tensors[name].shape for name in plan.reached}
        kept = kept_of(leaves(), looker(plan.checkpoint.tensors), shapes)
        return {name: kept[name] for name in shapes if name in kept}, outcomes.of_plan(plan)

    def _jobs(self) -> Iterator[Job]:
        tensors = self.schedule.plan.checkpoint.tensors
        shards = [tensors[task.instance.scope.leaves[0].tensor].shard for task, _ in self.tasks]
        for number, _ in dealt(shards, lambda shard: shard, self.schedule.workers):
            task, strategy = self.tasks[number]
            first = block_norms(task, strategy, tensors, cuts=False)
            yield Job(number, f"blocks{number}", task.instance.label, first, strategy.held)


def block_decisions(schedule: Schedule) -> BlockDecisions | None:
    """The decisions of a schedule as flags of blocks; None where some task needs masks on disk.

    Survivors that are shrunk or rebuilt need their new weights, and the torch engine decides on its device.
    """
    if schedule.uses_torch:
        return None
    tensors, tasks = schedule.plan.checkpoint.tensors, []
    for task in (task for job in schedule.jobs for task in job.tasks):
        strategy = by_block_norms(task, tensors, schedule.limits)
        if strategy is None:
            return None
        tasks.append((task, strategy))
    return BlockDecisions(schedule, tasks)
