"""The executor: does all the work of a schedule, several items at one time, and tells what became of it.

Owns threads, memory in flight, what is noted and recalled. Knows neither which blocks win nor where bytes
lie. Of several errors the one that stands first in the schedule is raised.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from sparseprune.checkpoint import CopyRange
from sparseprune.pipeline.crew import Crew
from sparseprune.pipeline.outcomes import Outcomes
from sparseprune.pipeline.programs import Item, Program, Setting
from sparseprune.pipeline.recipes import Counted, Gathered, Runs, Streamed, Summed, Tiled
from sparseprune.pipeline.rests import rest_program
from sparseprune.pipeline.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sparseprune.checkpoint import Shard, StagedOutput, TensorReader
    from sparseprune.pipeline.outcomes import TensorOutcome
    from sparseprune.pipeline.schedule import Job, Schedule

    Progress = Callable[[int, str], None]

_FLUSH_SECONDS = 0.05
_COPY_BYTES = 64 << 20  # that the kernel copies at one time
_WAYS = {
    Runs: "runs",
    Gathered: "gathered",
    Counted: "counted",
    Summed: "summed",
    Tiled: "tiled",
    Streamed: "streamed",
}


@dataclass(frozen=True, slots=True)
class Assignment:
    """A program: its place among all, name for people, key, and what it holds while it goes on."""

    order: int
    key: str
    label: str
    program: Program
    held: int


def execute(
    schedule: Schedule, reader: TensorReader, output: StagedOutput, device: str, progress: Progress
) -> tuple[TensorOutcome, ...]:
    """Do all the work of a schedule: every byte of the output's shards and masks is written once.

    What an earlier run finished is taken over. `progress` is told, from any thread, bytes that were done and
    of what. The first error in the order of the schedule is raised once what is running has ended; nothing
    new is begun after it.
    """
    outcomes = Outcomes()
    work = _Work(schedule, reader, output, device, progress, outcomes)
    with _torch_threads(schedule), _flushing(output):
        crew = Crew(work.assignments(), work, schedule.limits.memory)
        crew.run(schedule.workers)
    return outcomes.of_plan(schedule.plan)


def work_bytes(schedule: Schedule, output: StagedOutput) -> tuple[int, int]:
    """Bytes that pass by from the beginning to the end of a run, and how many of them an earlier one did."""
    copied = sum(copy.length for copy in output.layout.copies)
    done = sum(nbytes for nbytes, _ in output.finished.values())
    return schedule.nbytes + copied, done


class _Work:
    """What the crew asks: what there is to do, what is known already, and who wants to know the rest."""

    def __init__(
        self,
        schedule: Schedule,
        reader: TensorReader,
        output: StagedOutput,
        device: str,
        progress: Progress,
        outcomes: Outcomes,
    ) -> None:
        self._schedule = schedule
        self._traffic = Traffic(reader, output)
        self._output = output
        self._device = device
        self._progress = progress
        self._outcomes = outcomes

    def assignments(self) -> Iterator[Assignment]:
        """All programs, in the order of the plan; what nobody reaches is copied in the end."""
        jobs = self._schedule.jobs
        for order, job in _dealt(jobs, self._shard_of, self._schedule.workers):
            way = import_module(f"sparseprune.pipeline.{_WAYS[type(job.recipe)]}")
            program = way.run_program(job.task, job.recipe, self._setting(job.key))
            yield Assignment(order, job.key, job.task.instance.label, program, job.recipe.held)
        later = len(jobs)
        for rest in self._schedule.rests:
            program = rest_program(rest, self._setting(rest.key))
            yield Assignment(later, rest.key, rest.stored.name, program, 0)
        for number, copy in enumerate(self._output.layout.copies):
            program = _copy_program(copy, self._output)
            yield Assignment(later + 1 + number, f"copy{number}", copy.file.name, program, 0)

    def _shard_of(self, job: Job) -> Shard:
        """The shard that a job writes to, or the first of several."""
        leaf = job.task.instance.scope.leaves[0]
        return self._schedule.plan.checkpoint.tensors[leaf.tensor].shard

    def known(self, key: str) -> bool:
        """Whether an earlier run did this; its outcomes are taken over."""
        if key not in self._output.finished:
            return False
        _, outcomes = self._output.finished[key]
        self._take_in(outcomes)
        return True

    def done(self, item: Item, key: str, label: str, result: Any) -> None:  # noqa: ANN401
        """An item is done; one that writes is noted."""
        self._progress(item.nbytes, label)
        if item.key:
            self._take_in(result)
            self._output.note(key, [item.nbytes, result])

    def _take_in(self, outcomes: list[Any]) -> None:
        for outcome in outcomes:
            self._outcomes.add(outcome)

    def _setting(self, key: str) -> Setting:
        output = self._output

        def recall(name: str) -> Any:  # noqa: ANN401
            noted = output.finished.get(f"{key}.{name}")
            return None if noted is None else noted[1]

        def note(name: str, record: Any, nbytes: int) -> None:  # noqa: ANN401
            output.note(f"{key}.{name}", [nbytes, record])

        return Setting(
            tensors=self._schedule.plan.checkpoint.tensors,
            traffic=self._traffic,
            limits=self._schedule.limits,
            device=self._device,
            recall=recall,
            note=note,
            passed=self._progress,
        )


def _dealt(jobs: Sequence[Job], shard_of: Callable[[Job], Shard], workers: int) -> list[tuple[int, Job]]:
    """The jobs with their numbers, dealt so that workers find themselves in unlike shards most of the time.

    Writers of one file wait for each other in the kernel; with several shards they need not.
    """
    stacks: list[list[tuple[int, Job]]] = [[] for _ in range(workers)]
    of_shard: dict[Shard, list[tuple[int, Job]]] = {}
    for number, job in enumerate(jobs):
        of_shard.setdefault(shard_of(job), []).append((number, job))
    for shard in of_shard.values():
        min(stacks, key=len).extend(shard)
    return [one for dealt in zip_longest(*stacks) for one in dealt if one is not None]


def _copy_program(copy: CopyRange, output: StagedOutput) -> Program:
    """One step: what the input and the output share, a part at a time, by the kernel."""

    def items() -> Iterator[Item]:
        for done in range(0, copy.length, _COPY_BYTES):
            part = CopyRange(
                copy.source,
                copy.file,
                copy.source_offset + done,
                copy.offset + done,
                min(_COPY_BYTES, copy.length - done),
            )
            yield Item(lambda part=part: output.copy(part) or [], part.length, key=str(done))  # type: ignore[misc,func-returns-value]

    yield items()


@contextmanager
def _flushing(output: StagedOutput) -> Iterator[None]:
    """Keep the disk busy from the start: a thread that syncs what has been written, again and again."""
    done = threading.Event()
    failures: list[BaseException] = []

    def flush() -> None:
        try:
            while not done.wait(_FLUSH_SECONDS):
                output.flush()
        except BaseException as failure:  # noqa: BLE001  (raised below, in the thread that waits)
            failures.append(failure)

    thread = threading.Thread(target=flush, name="sparseprune-flush")
    try:
        thread.start()
        yield
    finally:
        # Ctrl-C may come while it starts: it then ends by itself.
        done.set()
        if thread.ident is not None:
            thread.join()
    if failures:
        raise failures[0]


@contextmanager
def _torch_threads(schedule: Schedule) -> Iterator[None]:
    """Share the cores among the workers where they use torch."""
    if not schedule.uses_torch:
        yield
        return
    import torch  # noqa: PLC0415  (most schedules do without)

    usual = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // schedule.workers))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
