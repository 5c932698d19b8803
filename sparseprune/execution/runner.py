"""The runner: does the passes of jobs with some threads, as long as memory allows.

Owns order, memory, threads, failures, what is noted and recalled, progress, and the thread that keeps the
disk busy. Knows neither which elements survive nor where bytes lie. Jobs that write use `write_through`,
jobs that only read use `read_through`.
"""

from __future__ import annotations

import base64
import threading
from abc import abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, TypeVar

import numpy as np
from msgspec import Struct

from sparseprune.checkpoint import CopyRange, Source
from sparseprune.checkpoint.threads import Worker, side_by_side
from sparseprune.execution.passes import Chunk, Decision, GivenUpError, Pass, is_outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sparseprune.checkpoint import Shard, Sink
    from sparseprune.execution.passes import Outcomes
    from sparseprune.execution.regions import Resources
    from sparseprune.execution.tensor_io import TensorIO

    Progress = Callable[[int, str], None]

One = TypeVar("One")

_FIRST, _LAST = -1, 1 << 63  # before and behind all jobs in the order of failures: from outside, and our own
_FLUSH_SECONDS = 0.05
_COPY_BYTES = 64 << 20  # that the kernel copies at one time
_FLAGS = "flags"  # the key of an encoded array


class Job(Struct, frozen=True):
    """Passes that follow each other: `order` among all jobs, a `key` for notes, a `label` for people.

    `held` bytes are taken from the beginning of the first pass to the end of the last one.
    """

    order: int
    key: str
    label: str
    first: Pass
    held: int = 0


class Register(Protocol):
    """Knows what earlier runs did and hears what this one does; called by one thread at a time."""

    def known(self, key: str) -> bool: ...
    def done(self, chunk: Chunk, key: str, label: str, partial: Any) -> None: ...  # noqa: ANN401
    def recall(self, key: str) -> Any: ...  # noqa: ANN401
    def note(self, key: str, value: Any, nbytes: int) -> None: ...  # noqa: ANN401


@dataclass(slots=True, eq=False)
class Running:
    """A job that has begun: its present pass, the chunks of that pass, their partial results.

    These are kept by number, or added to a total where the pass has one.
    """

    job: Job
    io: TensorIO
    current: Pass
    chunks: Iterator[Chunk] = field(default_factory=lambda: iter(()))
    waiting: Chunk | None = None
    begun: int = 0
    open: int = 0
    partials: dict[int, Any] = field(default_factory=dict)
    total: Any = None


class Taken(Struct, frozen=True):
    running: Running
    number: int
    chunk: Chunk


class Runner:
    """Does the chunks of jobs with some threads; `memory` bounds what chunks and jobs declare.

    Jobs are begun as they come; the next one begins when those before it have no chunk left to hand out. A
    chunk for which there will never be room runs alone. `given_up` is set where chunks that are at work need
    not be finished: they may raise GivenUpError then. `results` has what jobs gave, by their order.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        io: TensorIO,
        register: Register,
        memory: int,
        given_up: threading.Event | None = None,
    ) -> None:
        self._jobs = iter(jobs)
        self._io = io
        self._register = register
        self._memory = memory
        self._in_use = 0
        self._open = 0
        self._running: list[Running] = []
        self._next: Job | None = None
        self._looked_at = 0  # the order of the job that is asked for chunks or merged
        self._failures: list[tuple[int, int, BaseException]] = []
        self._stopped = False
        self._given_up = given_up or threading.Event()
        self._changed = threading.Condition(threading.RLock())
        self.results: dict[int, Any] = {}

    def run(self, workers: int) -> None:
        """Until everything is done; the first failure in the order of the jobs is raised."""
        side_by_side(self._work, workers, self._abandon)
        self._raise_first()

    def do(self, current: Pass, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        """Do a chunk here and now; a runner over other processes or machines does it there."""
        return current.work(chunk, io)

    def give_up(self, failure: BaseException) -> None:
        """End the run, which raises this failure; not where another one has ended it already."""
        with self._changed:
            if not self._stopped:
                self._fail(_FIRST, 0, failure)
                self._given_up.set()

    def _raise_first(self) -> None:
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[:2])[2]

    def _memory_of(self, chunk: Chunk) -> int:
        """What a chunk takes here while it is at work."""
        return chunk.memory

    def _abandon(self) -> None:
        """The caller waits no longer: all is done, or a signal came."""
        self._stop()
        self._given_up.set()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        try:
            while (taken := self._take()) is not None:
                self._do(taken)
        except BaseException as failure:  # noqa: BLE001  (raised by `run`, in the thread that waits)
            self._fail(_LAST, 0, failure)

    def _do(self, taken: Taken) -> None:
        running = taken.running
        try:
            self._finish(taken, self.do(running.current, taken.chunk, running.io))
        except GivenUpError:
            return  # the failure that ended the run is raised
        except BaseException as failure:  # noqa: BLE001  (as above)
            self._fail(running.job.order, taken.number, failure)

    def _take(self) -> Taken | None:
        """The next chunk that fits, once there is one; None when there is nothing more to do."""
        with self._changed:
            while not self._stopped:
                try:
                    taken = self._find()
                except BaseException as failure:  # noqa: BLE001  (as above: a pass failed to cut or merge)
                    self._fail(self._looked_at, 0, failure)
                    break
                if taken is not None:
                    self._in_use += self._memory_of(taken.chunk)
                    self._open += 1
                    return taken
                if not self._running and self._next is None:
                    break
                self._changed.wait()
            self._changed.notify_all()
            return None

    def _find(self) -> Taken | None:
        place = 0
        while True:
            if place == len(self._running) and not self._begin():
                return None
            running = self._running[place]
            self._looked_at = running.job.order
            chunk = self._chunk_of(running)
            if chunk is None:
                if running.open == 0:
                    self._advance(running)  # to its next pass, or out of the list
                else:
                    place += 1
            elif self._open and self._in_use + self._memory_of(chunk) > self._memory:
                return None
            else:
                running.waiting = None
                running.open += 1
                running.begun += 1
                return Taken(running, running.begun - 1, chunk)

    def _chunk_of(self, running: Running) -> Chunk | None:
        """The next chunk of the present pass; chunks that an earlier run did are passed over."""
        while running.waiting is None:
            chunk = next(running.chunks, None)
            if chunk is None:
                return None
            if chunk.key and self._register.known(f"{running.job.key}.{chunk.key}"):
                continue
            running.waiting = chunk
        return running.waiting

    def _begin(self) -> bool:
        """Begin the next job, if there is one and what it holds fits."""
        self._next = self._next or next(self._jobs, None)
        if self._next is None:
            return False
        job = self._next
        if self._running and self._in_use + job.held > self._memory:
            return False
        self._next = None
        self._in_use += job.held
        self._looked_at = job.order
        self._running.append(Running(job, self._io.of_job(), job.first))
        self._enter(self._running[-1], job.first)
        return True

    def _advance(self, running: Running) -> None:
        """Merge a pass of which all chunks are done, and go on with what follows from it."""
        partials = [running.partials[number] for number in sorted(running.partials)]
        if running.total is not None:
            partials = [running.total]
        running.partials, running.total, running.begun = {}, None, 0
        following = running.current.merge(partials, running.io)
        if isinstance(following, Decision):
            key = f"{running.job.key}.{running.current.decides}"
            self._register.note(key, _encoded(following.value), following.nbytes)
            following = running.current.decided(following.value)
        if isinstance(following, Pass):
            self._enter(running, following)
            return
        if following is not None:
            self.results[running.job.order] = following
        self._running.remove(running)
        self._in_use -= running.job.held
        self._changed.notify_all()

    def _enter(self, running: Running, following: Pass) -> None:
        """Go on with a pass, or with what follows from its decision where that is known."""
        while following.decides:
            noted = self._register.recall(f"{running.job.key}.{following.decides}")
            known = None if noted is None else following.decided(_decoded(noted))
            if known is None:
                break
            following = known
        running.current = following
        running.total = following.total()
        running.chunks = iter(following.chunks(running.io))

    def _finish(self, taken: Taken, partial: Any) -> None:  # noqa: ANN401
        running, chunk = taken.running, taken.chunk
        with self._changed:
            self._in_use -= self._memory_of(chunk)
            self._open -= 1
            running.open -= 1
            if not chunk.key and running.total is None:
                running.partials[taken.number] = partial
            elif not chunk.key:
                running.total = running.current.add(running.total, partial)
            self._register.done(chunk, f"{running.job.key}.{chunk.key}", running.job.label, partial)
            self._changed.notify_all()

    def _fail(self, order: int, number: int, failure: BaseException) -> None:
        self._stop()  # first, so that no thread waits for ever for memory
        with self._changed:
            self._failures.append((order, number, failure))


class SourceOfWork(Source):
    """A source whose jobs are not done here by threads: it has a runner of its own."""

    @abstractmethod
    def runner(self, jobs: Iterable[Job], io: TensorIO, register: Register, resources: Resources) -> Runner:
        """What does these jobs; `resources` are those of each machine."""


class Progressing:
    """The register of a run that only reads: it knows nothing of earlier runs and reports progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def known(self, key: str) -> bool:  # noqa: ARG002
        return False

    def recall(self, key: str) -> None:
        """Nothing: no earlier run left a note."""

    def note(self, key: str, value: Any, nbytes: int) -> None:  # noqa: ANN401
        """Nothing is kept."""

    def done(self, chunk: Chunk, key: str, label: str, partial: Any) -> None:  # noqa: ANN401, ARG002
        self._progress(chunk.nbytes, label)


class Record:
    """The register of a run that writes an output: what an earlier run finished is kept."""

    def __init__(self, output: Sink, outcomes: Outcomes, progress: Progress) -> None:
        self.output = output
        self.progress = progress
        self._outcomes = outcomes

    def known(self, key: str) -> bool:
        """Whether an earlier run did this; its outcomes are added, and their note is forgotten."""
        outcomes = self.recall(key)
        if not isinstance(outcomes, list) or not all(map(is_outcome, outcomes)):
            return False
        self._take_in(outcomes)
        self.output.finished.forget(key)
        return True

    def done(self, chunk: Chunk, key: str, label: str, partial: Any) -> None:  # noqa: ANN401
        """A chunk is done; one that writes is noted."""
        self.progress(chunk.nbytes, label)
        if chunk.key:
            self._take_in(partial)
            self.output.note(key, [chunk.nbytes, partial], chunk.files)

    def recall(self, key: str) -> Any:  # noqa: ANN401
        """What an earlier run noted under a key; None if nothing."""
        noted = self.output.finished.get(key)
        return noted[1] if _is_noted(noted) else None

    def note(self, key: str, value: Any, nbytes: int) -> None:  # noqa: ANN401
        """Keep something for a later run, for which so many bytes of the input were read."""
        self.output.note(key, [nbytes, value], ())

    def _take_in(self, outcomes: list[Any]) -> None:
        for outcome in outcomes:
            self._outcomes.add(outcome)


@dataclass(frozen=True, slots=True)
class Copying(Pass):
    """What the input and an output file share, copied by the kernel a part at a time."""

    copy: CopyRange

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:  # noqa: ARG002
        for done in range(0, self.copy.length, _COPY_BYTES):
            part = CopyRange(
                self.copy.source,
                self.copy.file,
                self.copy.source_offset + done,
                self.copy.offset + done,
                min(_COPY_BYTES, self.copy.length - done),
            )
            yield Chunk(part, part.length, key=str(done), files=(str(part.file),))

    def work(self, chunk: Chunk, io: TensorIO) -> list[Any]:
        io.copy(chunk.about)
        return []


def read_through(
    jobs: Iterable[Job], io: TensorIO, resources: Resources, progress: Progress
) -> dict[int, Any]:
    """Do jobs that write nothing; gives the results of jobs by their order.

    The first error in the order of the jobs is raised once what is running has ended; nothing new is begun
    after it.
    """
    runner = _runner(jobs, io, Progressing(progress), resources)
    runner.run(resources.threads)
    return runner.results


def write_through(
    jobs: Iterable[Job],
    io: TensorIO,
    record: Record,
    resources: Resources,
    given_up: threading.Event | None = None,
    *,
    copies: bool = True,
) -> dict[int, Any]:
    """Do jobs that write parts of an output, or decide something for those that do, and note it there.

    Then, unless `copies` are left to others, all is copied that the input and the output share. Results and
    errors as `read_through` has them. `given_up` is set where a signal or the disk ends the run.
    """
    every = _with_copies(jobs, record.output) if copies else jobs
    runner = _runner(every, io, record, resources, given_up)
    with _flushing(record.output, runner.give_up):
        runner.run(resources.threads)
    return runner.results


def _runner(
    jobs: Iterable[Job],
    io: TensorIO,
    register: Register,
    resources: Resources,
    given_up: threading.Event | None = None,
) -> Runner:
    if isinstance(io.reader, SourceOfWork):
        return io.reader.runner(jobs, io, register, resources)
    return Runner(jobs, io, register, resources.memory, given_up)


def already_done(output: Sink) -> int:
    """Bytes of the input that the run did that this one continues."""
    return sum(noted[0] for noted in output.finished.values() if _is_noted(noted))


def copied_bytes(output: Sink) -> int:
    """Bytes that the output takes over as they are."""
    return sum(copy.length for copy in output.layout.copies)


def dealt(jobs: Sequence[One], shard_of: Callable[[One], Shard], workers: int) -> list[tuple[int, One]]:
    """The jobs with their numbers, dealt so that workers are in different shards most of the time.

    Writers of one file wait for each other in the kernel; with several shards they need not.
    """
    stacks: list[list[tuple[int, One]]] = [[] for _ in range(workers)]
    of_shard: dict[Shard, list[tuple[int, One]]] = {}
    for number, job in enumerate(jobs):
        of_shard.setdefault(shard_of(job), []).append((number, job))
    for shard in of_shard.values():
        min(stacks, key=len).extend(shard)
    return [one for dealt in zip_longest(*stacks) for one in dealt if one is not None]


def batches(
    items: Iterable[One], size_of: Callable[[One], int], limit: int
) -> Iterator[tuple[int, tuple[One, ...]]]:
    """Neighbours of at most `limit` in all, or a single larger one; each with the number of the first."""
    some: list[One] = []
    left = limit
    for number, item in enumerate(items):
        size = size_of(item)
        if some and size > left:
            yield number - len(some), tuple(some)
            some, left = [], limit
        some.append(item)
        left -= size
    if some:
        yield number - len(some) + 1, tuple(some)


def _is_noted(noted: object) -> TypeGuard[list[Any]]:
    """Whether it is what `Record` notes: the bytes that were read, and what came of them."""
    return isinstance(noted, list) and len(noted) == 2 and type(noted[0]) is int and noted[0] >= 0


def _encoded(value: Any) -> Any:  # noqa: ANN401
    """A decision as JSON has it: arrays of 0 and 1 as base85 of their bits, the rest as it is."""
    if not isinstance(value, np.ndarray):
        return value
    return {_FLAGS: base64.b85encode(np.packbits(value).tobytes()).decode(), "count": value.size}


def _decoded(noted: Any) -> Any:  # noqa: ANN401
    """The decision of which `_encoded` made this; None where nothing can be made of it."""
    if not isinstance(noted, dict):
        return noted
    try:
        packed = np.frombuffer(base64.b85decode(noted[_FLAGS]), dtype=np.uint8)
        return np.unpackbits(packed, count=noted["count"]) if packed.size == -(-noted["count"] // 8) else None
    except (KeyError, TypeError, ValueError):
        return None


def _with_copies(jobs: Iterable[Job], output: Sink) -> Iterator[Job]:
    last = -1
    for job in jobs:
        last = max(last, job.order)
        yield job
    for number, copy in enumerate(output.layout.copies):
        yield Job(last + 1 + number, f"copy{number}", copy.file.name, Copying(copy))


@contextmanager
def _flushing(output: Sink, failed: Callable[[BaseException], None]) -> Iterator[None]:
    """Keep the disk busy from the start: a thread that syncs what has been written, again and again.

    `failed` is called at once where it fails; the failure is raised here if `failed` has not raised it.
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
