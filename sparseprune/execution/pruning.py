"""Pruning: the tasks of a schedule as passes for the runner, and the counts of every tensor.

Owns which pass follows which strategy, in which order jobs are begun, and that each thread has one of torch.
Called by the commands.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from sparseprune.checkpoint import make_output
from sparseprune.checkpoint.resizing import lay_out_choice, open_choice
from sparseprune.execution.block_norms import block_norms
from sparseprune.execution.devices import Lanes
from sparseprune.execution.nesting import within_masks
from sparseprune.execution.passes import GivenUpError, OfOuter, Outcomes
from sparseprune.execution.radix_select import radix_select
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.strategy import (
    BlockNorms,
    Compiled,
    RadixSelect,
    Rebuild,
    TorchInMemory,
    TorchOutOfCore,
)
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.execution.tiles import CopyUntouched, CutScopes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sparseprune.checkpoint import Output, Shard, Sink, Source, StoredMask
    from sparseprune.execution.passes import Pass, TensorOutcome
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.schedule import Schedule, TaskGroup

_TORCH_ADDRESSES = 500 << 20  # bytes that torch takes while it is loaded, measured


def stopped_by() -> tuple[threading.Event, Callable[[], None]]:
    """An event, and a function that raises GivenUpError from then on."""
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise GivenUpError

    return given_up, check


def execute(
    schedule: Schedule, reader: Source, output: Sink, device: str, progress: Progress
) -> Sequence[TensorOutcome]:
    """Do all the work of a schedule: every byte of the output's shards and masks is written once.

    What an earlier run finished is kept. `progress` is called, from any thread, with bytes that were
    done and what they are of. The first error in the order of the schedule is raised once what is running
    has ended; nothing new is begun after it.
    """
    work = Work(reader, output, device, progress)
    work.do(schedule)
    return work.outcomes.of_plan(schedule.plan)


class Work:
    """An output that is written by several schedules, one after the other; `outcomes` of all of them."""

    def __init__(self, reader: Source, output: Sink, device: str, progress: Progress) -> None:
        self.outcomes = Outcomes()
        self._reader, self._output, self._device, self._progress = reader, output, device, progress

    def do(self, schedule: Schedule, part: str = "", *, copies: bool = True) -> None:
        """Do the work of a schedule; `part` tells its notes from those of others, `copies` end the output.

        Levels of nested scopes wait in scratch outputs, which a run that continues this one finds as well.
        """
        with ExitStack() as context:
            masks: dict[str, StoredMask] = {}
            scratch: list[Output] = []
            for number, level in enumerate(schedule.outer):
                output = self._scratch(level, f"{part}{number}")
                scratch.append(context.enter_context(output))
                self._progress(already_done(output), "")
                record = Record(output, OfOuter(self.outcomes), self._progress)
                self._write(within_masks(level, masks), output, record, "", copies=False)
                output.flush()
                masks |= {one.name: one for one in open_choice(output)[0]}
            record = Record(self._output, self.outcomes, self._progress)
            self._write(within_masks(schedule, masks), self._output, record, part, copies=copies)
            for output in scratch:
                output.discard()

    def _scratch(self, level: Schedule, name: str) -> Output:
        """Where the masks of a level wait, beside the output."""
        final = self._output.layout
        layout = lay_out_choice(
            final.checkpoint, final, level.plan.reached, rebuilt=False, kind=f"level-{name}"
        )
        identity = getattr(self._output, "identity", None)  # which not every sink has
        return make_output(layout, identity=identity and {**identity, "the level": name})

    def _write(self, schedule: Schedule, output: Sink, record: Record, part: str, *, copies: bool) -> None:
        given_up, check = stopped_by()
        tensors, lanes = schedule.plan.checkpoint.tensors, Lanes(schedule.limits.device)
        io = TensorIO(self._reader, output, tensors, self._device, self._progress, check, lanes=lanes)
        with one_torch_thread() if schedule.uses_torch else nullcontext():
            jobs = jobs_of(schedule, part)
            write_through(jobs, io, record, schedule.resources, given_up, copies=copies)


def jobs_of(schedule: Schedule, part: str = "") -> Iterator[Job]:
    """All jobs for a runner, with their numbers in the order of the plan, and a `part` before their keys."""
    tensors = schedule.plan.checkpoint.tensors

    def shard_of(group: TaskGroup) -> Shard:
        """The shard that a group writes to, or the first of several."""
        return tensors[group.task.instance.scope.leaves[0].tensor].shard

    def cost(group: TaskGroup) -> int:
        """The time that a matrix takes to be rebuilt; 0 where none is."""
        return group.strategy.cost if isinstance(group.strategy, Rebuild) else 0

    planned = dealt(schedule.groups, shard_of, schedule.workers)
    # The largest matrices first: one that takes an hour must not be the last to begin.
    for order, group in sorted(planned, key=lambda one: -cost(one[1])):
        yield Job(order, part + group.key, group.task.part, first_pass(group), group.strategy.held)
    for one in schedule.untouched:
        copying = CopyUntouched(one.stored.name, one.leaves, schedule.limits.slab, one.within)
        yield Job(len(schedule.groups), part + one.key, one.stored.name, copying)


def first_pass(group: TaskGroup) -> Pass:
    """The pass with which the work of a group begins; those that need torch import it."""
    task, strategy = group.task, group.strategy
    if isinstance(strategy, Compiled):
        return CutScopes(group.tasks, strategy)
    if isinstance(strategy, RadixSelect):
        return radix_select(task, strategy)
    if isinstance(strategy, BlockNorms):
        return block_norms(task, strategy)
    if isinstance(strategy, TorchInMemory):
        from sparseprune.execution.torch_tiles import CutTiles  # noqa: PLC0415  (torch)

        return CutTiles(task, strategy)
    if isinstance(strategy, TorchOutOfCore):
        from sparseprune.execution.torch_out_of_core import out_of_core  # noqa: PLC0415  (torch)

        return out_of_core(task, strategy)
    if isinstance(strategy, Rebuild):
        from sparseprune.execution.reconstruct import RebuildMatrices  # noqa: PLC0415  (torch)

        return RebuildMatrices(task, strategy)
    raise TypeError(f"{task.instance.label} is counted, not pruned")


def work_bytes(schedule: Schedule, output: Sink) -> tuple[int, int]:
    """The work of a whole run, in bytes that are read or copied, and how much of it an earlier run did."""
    return schedule.nbytes + copied_bytes(output), already_done(output)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Every worker computes with one thread of torch's own.

    The sums of matrix products depend on how many threads share them, so that the bytes of rebuilt weights
    would depend on --jobs and on the machine. Cores are used by workers, side by side; threads of OpenMP
    that wait for each other spin, which takes ten times as long on a busy machine.
    """
    # Without room for it torch breaks while it is loaded, and Python does not notice.
    mmap.mmap(-1, _TORCH_ADDRESSES, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
    import torch  # noqa: PLC0415  (most schedules do without)

    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # also in threads that begin later, whatever OMP_NUM_THREADS says
    try:
        yield
    finally:
        torch.set_num_threads(usual)
