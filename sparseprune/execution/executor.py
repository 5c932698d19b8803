"""The executor: does programs that write an output, several items at one time, and keeps the disk busy.

Owns what is noted and recalled, the copying of what nobody reaches, and the thread that syncs. Knows neither
which elements win nor where bytes lie. Of several errors that of the first program is raised.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from sparseprune.checkpoint import CopyRange
from sparseprune.checkpoint.threads import Worker
from sparseprune.execution.crew import Crew
from sparseprune.execution.programs import Item, Program, is_outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sparseprune.checkpoint import Shard, StagedOutput
    from sparseprune.execution.limits import Crowd
    from sparseprune.execution.outcomes import Outcomes

    Progress = Callable[[int, str], None]

One = TypeVar("One")

_FLUSH_SECONDS = 0.05
_COPY_BYTES = 64 << 20  # that the kernel copies at one time


@dataclass(frozen=True, slots=True)
class Assignment:
    """A program: its place among all, name for people, key, and what it holds while it goes on."""

    order: int
    key: str
    label: str
    program: Program
    held: int


class Record:
    """What is known of the work on an output, and who wants to know the rest: the register of its crew.

    What an earlier run finished is taken over, its outcomes with it.
    """

    def __init__(self, output: StagedOutput, outcomes: Outcomes, progress: Progress) -> None:
        self.output = output
        self.progress = progress
        self._outcomes = outcomes

    def known(self, key: str) -> bool:
        """Whether an earlier run did this; its outcomes are taken over, and their note is forgotten."""
        outcomes = self.recall(key)
        if not isinstance(outcomes, list) or not all(map(is_outcome, outcomes)):
            return False
        self._take_in(outcomes)
        self.output.finished.forget(key)
        return True

    def done(self, item: Item, key: str, label: str, result: Any) -> None:  # noqa: ANN401
        """An item is done; one that writes is noted."""
        self.progress(item.nbytes, label)
        if item.key:
            self._take_in(result)
            self.output.note(key, [item.nbytes, result])

    def recall(self, key: str) -> Any:  # noqa: ANN401
        """What an earlier run noted under a key besides its items; None if nothing."""
        noted = self.output.finished.get(key)
        return noted[1] if _is_noted(noted) else None

    def note(self, key: str, record: Any, nbytes: int) -> None:  # noqa: ANN401
        """Keeps something for a later run, for which so many bytes of input passed."""
        self.output.note(key, [nbytes, record])

    def _take_in(self, outcomes: list[Any]) -> None:
        for outcome in outcomes:
            self._outcomes.add(outcome)


def produce(
    assignments: Iterable[Assignment],
    record: Record,
    crowd: Crowd,
    given_up: threading.Event | None = None,
) -> None:
    """Do programs that write parts of an output, then copy all that the input and the output share.

    The first error in the order of the programs is raised once what is running has ended; nothing new is
    begun after it. `given_up` is set where a signal or the disk ends the run.
    """
    crew = Crew(_with_copies(assignments, record.output), record, crowd.memory, given_up)
    with _flushing(record.output, crew.give_up):
        crew.run(crowd.threads)


def already_done(output: StagedOutput) -> int:
    """Bytes that passed by in the run that this one continues."""
    return sum(noted[0] for noted in output.finished.values() if _is_noted(noted))


def _is_noted(noted: object) -> TypeGuard[list[Any]]:
    """Whether it is what `Record` notes: the bytes that passed, and what came of it."""
    return isinstance(noted, list) and len(noted) == 2 and type(noted[0]) is int and noted[0] >= 0


def copied_bytes(output: StagedOutput) -> int:
    """Bytes that the output takes over as they are."""
    return sum(copy.length for copy in output.layout.copies)


def dealt(jobs: Sequence[One], shard_of: Callable[[One], Shard], workers: int) -> list[tuple[int, One]]:
    """The jobs with their numbers, dealt so that workers find themselves in unlike shards most of the time.

    Writers of one file wait for each other in the kernel; with several shards they need not.
    """
    stacks: list[list[tuple[int, One]]] = [[] for _ in range(workers)]
    of_shard: dict[Shard, list[tuple[int, One]]] = {}
    for number, job in enumerate(jobs):
        of_shard.setdefault(shard_of(job), []).append((number, job))
    for shard in of_shard.values():
        min(stacks, key=len).extend(shard)
    return [one for dealt in zip_longest(*stacks) for one in dealt if one is not None]


def _with_copies(assignments: Iterable[Assignment], output: StagedOutput) -> Iterator[Assignment]:
    last = -1
    for assignment in assignments:
        last = max(last, assignment.order)
        yield assignment
    for number, copy in enumerate(output.layout.copies):
        program = _copy_program(copy, output)
        yield Assignment(last + 1 + number, f"copy{number}", copy.file.name, program, 0)


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
def _flushing(output: StagedOutput, failed: Callable[[BaseException], None]) -> Iterator[None]:
    """Keep the disk busy from the start: a thread that syncs what has been written, again and again.

    Where it fails it tells so at once; the failure is raised here if nobody else raised it meanwhile.
    """
    done = threading.Event()
    failures: list[BaseException] = []

    def flush() -> None:
        try:
            while not done.wait(_FLUSH_SECONDS):
                output.flush()
        except BaseException as failure:  # noqa: BLE001  (raised in the thread that waits)
            failures.append(failure)
            failed(failure)

    thread = Worker(flush, "sparseprune-flush")
    try:
        thread.begin()  # without it the output is synced when all of it is written
        yield
    finally:
        done.set()
        thread.wait()
    if failures:
        raise failures[0]
