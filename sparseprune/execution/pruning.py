"""Pruning: the jobs of a schedule as programs of the executor, and what became of every tensor.

Owns which way works a job, in which order jobs are begun, and that torch takes one thread for each. Called
by the command line.
"""

from __future__ import annotations

import mmap
import threading
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparseprune.execution.outcomes import Outcomes
from sparseprune.execution.passes import GivenUpError
from sparseprune.execution.programs import ProgramPass, Setting
from sparseprune.execution.recipes import Counted, Gathered, Reconstructed, Runs, Streamed, Summed, Tiled
from sparseprune.execution.rests import rest_program
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sparseprune.checkpoint import Shard, StagedOutput, TensorReader
    from sparseprune.execution.outcomes import TensorOutcome
    from sparseprune.execution.runner import Progress
    from sparseprune.execution.schedule import Job as Planned
    from sparseprune.execution.schedule import Schedule

_TORCH_ADDRESSES = 500 << 20  # bytes that torch takes while it is loaded, measured
_WAYS = {
    Runs: "runs",
    Gathered: "gathered",
    Counted: "counted",
    Summed: "summed",
    Tiled: "tiled",
    Streamed: "streamed",
    Reconstructed: "reconstructed",
}


def execute(
    schedule: Schedule, reader: TensorReader, output: StagedOutput, device: str, progress: Progress
) -> Sequence[TensorOutcome]:
    """Do all the work of a schedule: every byte of the output's shards and masks is written once.

    What an earlier run finished is taken over. `progress` is told, from any thread, bytes that were done and
    of what. The first error in the order of the schedule is raised once what is running has ended; nothing
    new is begun after it.
    """
    outcomes = Outcomes()
    record = Record(output, outcomes, progress)
    given_up = threading.Event()

    def check() -> None:
        if given_up.is_set():
            raise GivenUpError

    io = TensorIO(reader, output, schedule.plan.checkpoint.tensors, device, progress, check)

    def setting(key: str) -> Setting:
        def recall(name: str) -> Any:  # noqa: ANN401
            return record.recall(f"{key}.{name}")

        def note(name: str, noted: Any, nbytes: int) -> None:  # noqa: ANN401
            record.note(f"{key}.{name}", noted, nbytes)

        return Setting(
            tensors=schedule.plan.checkpoint.tensors,
            traffic=io,
            limits=schedule.limits,
            device=device,
            recall=recall,
            note=note,
            passed=progress,
            check=check,
        )

    def jobs() -> Iterator[Job]:
        """All jobs, with their numbers in the order of the plan."""
        planned = dealt(schedule.jobs, lambda job: _shard_of(job, schedule), schedule.workers)
        # The largest matrices first: one that takes an hour must not be the last to begin.
        for order, job in sorted(planned, key=lambda one: -_matrix_bytes(one[1])):
            way = import_module(f"sparseprune.execution.{_WAYS[type(job.recipe)]}")
            program = way.run_program(job.task, job.recipe, setting(job.key))
            yield Job(order, job.key, job.task.instance.label, ProgramPass(program), job.recipe.held)
        later = len(schedule.jobs)
        for rest in schedule.rests:
            program = rest_program(rest, setting(rest.key))
            yield Job(later, rest.key, rest.stored.name, ProgramPass(program))

    with _one_torch_thread(schedule):
        write_through(jobs(), io, record, schedule.crowd, given_up)
    return outcomes.of_plan(schedule.plan)


def work_bytes(schedule: Schedule, output: StagedOutput) -> tuple[int, int]:
    """Bytes that pass by from the beginning to the end of a run, and how many of them an earlier one did."""
    return schedule.nbytes + copied_bytes(output), already_done(output)


def _shard_of(job: Planned, schedule: Schedule) -> Shard:
    """The shard that a job writes to, or the first of several."""
    leaf = job.task.instance.scope.leaves[0]
    return schedule.plan.checkpoint.tensors[leaf.tensor].shard


def _matrix_bytes(job: Planned) -> int:
    """What grows with the time that a matrix takes to be rebuilt; 0 where none is."""
    return job.recipe.memory if isinstance(job.recipe, Reconstructed) else 0


@contextmanager
def _one_torch_thread(schedule: Schedule) -> Iterator[None]:
    """Every worker computes with one thread of torch's own.

    The sums of matrix products depend on how many threads share them, so that the bytes of rebuilt weights
    would depend on --jobs and on the machine. Cores are used by workers, side by side; threads of OpenMP
    that wait for each other spin, which takes ten times as long on a busy machine.
    """
    if not schedule.uses_torch:
        yield
        return
    # Where there is no room for it, torch breaks while it is loaded, in ways that Python does not hear of.
    mmap.mmap(-1, _TORCH_ADDRESSES, mmap.MAP_PRIVATE, mmap.PROT_READ).close()
    import torch  # noqa: PLC0415  (most schedules do without)

    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # also in threads that begin later, whatever OMP_NUM_THREADS says
    try:
        yield
    finally:
        torch.set_num_threads(usual)
