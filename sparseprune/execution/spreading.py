"""Jobs over the machines of a cluster: what decides in groups of chunks, what writes file by file.

Owns which chunks go together, and that each file of an output has one writer: a batch is a file, with all
that is written or copied there. The driver keeps order, decisions and the journal; on the machines, the
ordinary runner works with the source, the sink and the memory that it has there. Called by api through a
ClusterSource.
"""

from __future__ import annotations

import pickle
import sys
import threading
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count
from typing import TYPE_CHECKING, Any, cast

from msgspec import Struct

from sparseprune.checkpoint import TensorReader
from sparseprune.checkpoint.file_io import named_errors
from sparseprune.checkpoint.threads import Worker
from sparseprune.errors import MachineError, SparsepruneError, one_of_many
from sparseprune.execution.devices import Lanes, free_bytes
from sparseprune.execution.passes import Chunk, Pass
from sparseprune.execution.pruning import one_torch_thread
from sparseprune.execution.regions import INTERPRETER, TORCH
from sparseprune.execution.runner import Job, Runner, SourceOfWork
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from sparseprune.checkpoint import Portion, Sink, Source, StoredTensor
    from sparseprune.execution.cluster import Cluster, Shared
    from sparseprune.execution.regions import Resources
    from sparseprune.execution.runner import Register, Running, Taken

_GROUP_BYTES = 128 << 20  # that one CPU reads at one time for a group of chunks
_GROUP_CHUNKS = 256
_LARGE = 1 << 16  # bytes of a pass that each machine gets once
_REPORT_SECONDS = 0.5  # between reports of a machine: what is lost with it at the most
_FILES_AT_ONCE = 4  # on one machine: one reads and waits while another one computes


class Share(Struct, frozen=True):
    """What a task has of its machine: CPUs, bytes of memory for chunks, and GPUs."""

    cpus: int
    memory: int
    gpus: int = 0


def share_of(cluster: Cluster, resources: Resources, most: int, device: str = "cpu") -> Share:
    """The share of one of up to `most` tasks that are at work on the cluster at one time.

    Several tasks of a machine divide its CPUs and its memory, of which each takes the interpreter's again.
    Where the torch engine works on CUDA each task has a GPU of its own, and machines without one do nothing.

    Raises:
        SparsepruneError: CUDA is wanted, and no machine has a GPU, or one of them by its number.
    """
    on_gpus = device.startswith("cuda")
    nodes = [node for node in cluster.nodes if node.gpus or not on_gpus]
    if device not in {"cpu", "cuda"}:
        raise SparsepruneError(
            f"--device {device}: a cluster gives out its GPUs; say --device cuda with --on"
        )
    if not nodes:
        raise SparsepruneError(f"--device {device}: no machine of the cluster has a GPU; say --device cpu")
    cpus = min(node.cpus for node in nodes)
    own = INTERPRETER + (TORCH if "torch" in sys.modules else 0)
    at_once = max(1, min(_FILES_AT_ONCE, cpus, -(-most // len(nodes))))
    while at_once > 1 and resources.memory // at_once < own:
        at_once -= 1
    if on_gpus:
        at_once = min(cpus, max(node.gpus for node in nodes))
    each = cpus // at_once
    tasks = max(node.cpus // each if not on_gpus else min(node.gpus, node.cpus // each) for node in nodes)
    memory = max(1, (resources.memory - (tasks - 1) * own) // tasks)
    return Share(each, memory, gpus=1 if on_gpus else 0)


class ClusterSource(SourceOfWork):
    """A source whose jobs are done by the machines of a cluster; what is read by it itself is read here."""

    def __init__(self, source: Source, cluster: Cluster) -> None:
        self._source, self._cluster = source, cluster

    def read_into(self, stored: StoredTensor, begin: int, buffer: Any) -> None:  # noqa: ANN401
        self._source.read_into(stored, begin, buffer)

    def close(self) -> None:
        self._source.close()

    def runner(self, jobs: Iterable[Job], io: TensorIO, register: Register, resources: Resources) -> Runner:
        return ClusterRunner(jobs, io, register, resources, self._cluster)


class Setup(Struct, frozen=True):
    """What every task of a run needs: the tensors by name, the device and its room, and a share."""

    tensors: Shared[dict[str, StoredTensor]]
    device: str
    room: int | None
    share: Share


class Group(Struct, frozen=True):
    """Chunks of some passes, each by the number of its pass."""

    setup: Setup
    passes: tuple[Pass | Shared[Pass], ...]
    chunks: tuple[tuple[int, Chunk], ...]


class FileBatch(Struct, frozen=True):
    """Jobs that write the files of a portion; `names` are those by which chunks call these files.

    Chunks with keys in `done` are not done again.
    """

    setup: Setup
    portion: Portion
    names: frozenset[str]
    jobs: tuple[tuple[int, str, str, Pass | Shared[Pass]], ...]
    done: frozenset[str]


class Written(Struct, frozen=True):
    """A chunk that is done and on disk, with what it gave."""

    key: str
    label: str
    nbytes: int
    partial: Any


class Report(Struct, frozen=True):
    """News of a file: chunks that are done, bytes that passed meanwhile; at the end the sink's facts."""

    written: tuple[Written, ...]
    passed: tuple[tuple[int, str], ...]
    facts: Mapping[str, Any] | None = None


@dataclass(slots=True)
class _File:
    """Files of the output that one worker writes: their `names` in chunks, and what is to be done there."""

    names: set[str] = field(default_factory=set)
    written: set[str] = field(default_factory=set)
    jobs: list[Running] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    nbytes: int = 0
    left: int = 0
    passed: dict[str, int] = field(default_factory=dict)


class ClusterRunner(Runner):
    """Does jobs by a cluster; as Runner, but for who works where.

    Jobs are begun as there. Chunks that decide or read go to the machines in groups. Passes that write wait
    until nothing else is left to do; then their files are written, each by one task, the largest first.
    """

    def __init__(
        self,
        jobs: Iterable[Job],
        io: TensorIO,
        register: Register,
        resources: Resources,
        cluster: Cluster,
    ) -> None:
        super().__init__(jobs, io, register, resources.memory)
        self._cluster, self._resources = cluster, resources
        self._files: dict[str, _File] = {}
        self._writing: list[Running] = []
        self._several: dict[str, set[str]] = {}  # chunks that write several files, and which are still open
        self._passes: dict[int, tuple[Pass, Pass | Shared[Pass]]] = {}
        self._beside = _masks_beside(io)

    def run(self, workers: int) -> None:
        """Until everything is done; `workers` are those of each machine."""
        try:
            self._tensors = self._cluster.share(dict(self._io.tensors))
            refuse_unseen(self._cluster, self._io)
            self._decide(workers)
            while self._writing and not self._stopped:
                self._write()
                self._decide(workers)
        except Exception as failure:  # noqa: BLE001  (raised below, as those that were noted)
            self._fail(self._looked_at, 0, failure)
        finally:
            self._abandon()
        self._raise_first()

    # -- chunks that decide or read ------------------------------------------------------------------

    def _memory_of(self, chunk: Chunk) -> int:  # noqa: ARG002
        """Nothing here: it is taken on the machines."""
        return 0

    def _enter(self, running: Running, following: Pass) -> None:
        super()._enter(running, following)
        first = next(running.chunks, None)
        if first is None:
            return
        chunks = chain((first,), running.chunks)
        if first.files:
            self._collect(running, chunks)
        else:
            running.chunks = chunks

    def _decide(self, workers: int) -> None:
        share = self._share(len(self._cluster.nodes) * workers)
        setup = self._setup(share)
        taken: dict[int, list[Taken]] = {}

        def groups() -> Iterator[Group | None]:
            for number in count():
                taken[number] = self._gathered(_GROUP_BYTES * share.cpus)
                yield self._group(setup, taken[number]) if taken[number] else None

        with closing(self._cluster.run(do_group, groups(), cpus=share.cpus, gpus=share.gpus)) as results:
            for number, (partials, passed) in results:
                for one in passed:
                    self._io.passed(*one)
                for each, partial in zip(taken.pop(number), partials, strict=True):
                    self._finish(each, partial)

    def _gathered(self, limit: int) -> list[Taken]:
        """The next chunks that can be done, about so many bytes of them; none where some must end before."""
        found: list[Taken] = []
        with self._changed:
            while not self._stopped and limit > 0 and len(found) < _GROUP_CHUNKS:
                taken = self._find()
                if taken is None:
                    break
                self._open += 1
                limit -= taken.chunk.nbytes or taken.chunk.memory
                found.append(taken)
        return found

    def _group(self, setup: Setup, taken: Sequence[Taken]) -> Group:
        numbers: dict[int, int] = {}
        passes: list[Pass | Shared[Pass]] = []
        chunks = []
        for one in taken:
            current = one.running.current
            if id(current) not in numbers:
                numbers[id(current)] = len(passes)
                passes.append(self._sent(current))
            chunks.append((numbers[id(current)], one.chunk))
        return Group(setup, tuple(passes), tuple(chunks))

    # -- passes that write ---------------------------------------------------------------------------

    def _collect(self, running: Running, chunks: Iterable[Chunk]) -> None:
        """Keep a pass that writes, with its files, until all decisions are made."""
        running.chunks, running.open = iter(()), 1
        self._writing.append(running)
        for chunk in chunks:
            key = f"{running.job.key}.{chunk.key}"
            keys = {self._file_of(name): name for name in chunk.files}
            is_known = self._register.known(key)
            if len(keys) > 1 and not is_known:
                self._several[key] = set(keys)
            for each in keys:
                file = self._files[each]
                if not file.jobs or file.jobs[-1] is not running:
                    file.jobs.append(running)
                if is_known:
                    file.done.add(key)
                else:
                    file.left += 1
                    file.nbytes += chunk.nbytes

    def _file_of(self, name: str) -> str:
        """The key of what is written together with a file: its masks; all that is small."""
        if self._io.output is None:
            raise TypeError("there is no output to write to")
        masks = self._beside.masks.get(name, ())
        key = self._beside.owners[masks[0]] if masks else name if name in self._beside.weights else ""
        file = self._files.setdefault(key, _File())
        if name not in file.names:
            file.names.add(name)
            file.written.update(masks)
            if name in self._beside.files:
                file.written.add(name)
        return key

    def _write(self) -> None:
        todo = sorted((one for one in self._files.items() if one[1].left), key=lambda one: -one[1].nbytes)
        share = self._share(len(todo))
        setup = self._setup(share)
        open_files = dict(enumerate(todo))

        def again(number: int) -> FileBatch | None:
            if number not in open_files:
                return None
            for label, nbytes in open_files[number][1].passed.items():
                self._io.passed(-nbytes, label)  # of chunks that were lost before they were done
            open_files[number][1].passed.clear()
            return self._batch(setup, open_files[number][1])

        batches = (self._batch(setup, file) for _, file in todo)
        reported = self._cluster.stream(write_file, batches, again, cpus=share.cpus, gpus=share.gpus)
        with closing(reported) as reports:
            for number, report in reports:
                if self._stopped:
                    return
                if number in open_files:
                    self._hear(*open_files[number], report)
                    if report.facts is not None:
                        del open_files[number]
        self._files.clear()
        self._passes.clear()
        for running in self._writing:
            running.open = 0
        self._writing.clear()

    def _batch(self, setup: Setup, file: _File) -> FileBatch:
        jobs = [(one.job.order, one.job.key, one.job.label, self._sent(one.current)) for one in file.jobs]
        output = cast("Sink", self._io.output)
        portion = output.portion(sorted(file.written))
        return FileBatch(setup, portion, frozenset(file.names), tuple(jobs), frozenset(file.done))

    def _hear(self, key: str, file: _File, report: Report) -> None:
        for nbytes, label in report.passed:
            file.passed[label] = file.passed.get(label, 0) + nbytes
            self._io.passed(nbytes, label)
        for one in report.written:
            file.done.add(one.key)
            waiting = self._several.get(one.key)
            if waiting is not None:
                waiting.discard(key)
                if waiting:
                    continue
            chunk = Chunk(None, one.nbytes, key=one.key)
            self._register.done(chunk, one.key, one.label, one.partial)
        if report.facts is not None:
            cast("Sink", self._io.output).portion_done(sorted(file.written), report.facts)

    # -- what is sent --------------------------------------------------------------------------------

    def _share(self, most: int) -> Share:
        return share_of(self._cluster, self._resources, most, self._io.device)

    def _setup(self, share: Share) -> Setup:
        return Setup(self._tensors, self._io.device, self._io.lanes.room, share)

    def _sent(self, current: Pass) -> Pass | Shared[Pass]:
        """A pass as it is, or, where it is large, as a value that each machine gets once."""
        if id(current) not in self._passes:
            size = len(pickle.dumps(current))
            self._passes[id(current)] = current, (self._cluster.share(current) if size > _LARGE else current)
        return self._passes[id(current)][1]


class _Beside(Struct, frozen=True):
    """Files of an output: those of weights, the masks of each, which of them own a file of masks, and all."""

    files: frozenset[str] = frozenset()
    weights: frozenset[str] = frozenset()
    masks: Mapping[str, tuple[str, ...]] = {}
    owners: Mapping[str, str] = {}


def _masks_beside(io: TensorIO) -> _Beside:
    if io.output is None:
        return _Beside()
    layout = io.output.layout
    weights = {str(place.file) for place in layout.weights.values()}
    masks: dict[str, dict[str, None]] = {}
    owners: dict[str, str] = {}
    for name, place in layout.masks.items():
        shard, file = str(io.tensors[name].shard.relative), str(place.file)
        masks.setdefault(shard, {})[file] = None
        owners.setdefault(file, shard)
    return _Beside(
        frozenset(str(file.path) for file in layout.files),
        frozenset(weights | set(masks)),
        {shard: tuple(files) for shard, files in masks.items()},
        owners,
    )


# -- on a machine ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part(Pass):
    """Chunks of another pass: those that are given, or those that write certain files."""

    whole: Pass
    some: tuple[Chunk, ...] = ()
    names: frozenset[str] = frozenset()

    def chunks(self, io: TensorIO) -> Iterator[Chunk]:
        if self.some:
            return iter(self.some)
        return (chunk for chunk in self.whole.chunks(io) if not self.names.isdisjoint(chunk.files))

    def work(self, chunk: Chunk, io: TensorIO) -> Any:  # noqa: ANN401
        return self.whole.work(chunk, io)

    def merge(self, partials: list[Any], io: TensorIO) -> Any:  # noqa: ANN401, ARG002
        """The partial results as they are."""
        return partials


class _Heard:
    """The register of a task, and its progress: what came since it was asked last."""

    def __init__(self, done: frozenset[str] = frozenset()) -> None:
        self._known = done
        self._lock = threading.Lock()
        self._written: list[Written] = []
        self._passed: dict[str, int] = {}

    def known(self, key: str) -> bool:
        return key in self._known

    def recall(self, key: str) -> None:
        """Nothing: decisions are the driver's."""

    def note(self, key: str, value: Any, nbytes: int) -> None:  # noqa: ANN401
        """Nothing is kept."""

    def done(self, chunk: Chunk, key: str, label: str, partial: Any) -> None:  # noqa: ANN401
        with self._lock:
            self._written.append(Written(key, label, chunk.nbytes, partial))

    def passed(self, nbytes: int, label: str = "") -> None:
        with self._lock:
            self._passed[label] = self._passed.get(label, 0) + nbytes

    def written(self) -> tuple[Written, ...]:
        with self._lock:
            found, self._written = tuple(self._written), []
        return found

    def progress(self) -> tuple[tuple[int, str], ...]:
        with self._lock:
            found, self._passed = self._passed, {}
        return tuple((nbytes, label) for label, nbytes in found.items())


def do_group(group: Group) -> tuple[list[Any], tuple[tuple[int, str], ...]]:
    """The partial results of chunks, in their order, and the bytes that passed."""
    heard, share = _Heard(), group.setup.share
    passes = [_of(one) for one in group.passes]
    with named_errors(), TensorReader() as reader, _one_thread_of_torch():
        io = _io(group.setup, reader, heard)
        jobs = (
            Job(order, "", "", _Part(passes[number], (chunk,)))
            for order, (number, chunk) in enumerate(group.chunks)
        )
        runner = Runner(jobs, io, heard, share.memory)
        runner.run(share.cpus)
    return [runner.results[order][0] for order in range(len(group.chunks))], heard.progress()


def write_file(batch: FileBatch) -> Iterator[Report]:
    """Write files of an output, and report again and again what is on disk."""
    heard, share = _Heard(batch.done), batch.setup.share
    jobs = [
        Job(order, key, label, _Part(_of(current), names=batch.names))
        for order, key, label, current in batch.jobs
    ]
    with named_errors():
        with batch.portion.open() as sink, TensorReader() as reader, _one_thread_of_torch():
            keeps = batch.portion.keeps_parts
            runner = Runner(jobs, _io(batch.setup, reader, heard, cast("Sink", sink)), heard, share.memory)
            work = _Work(lambda: runner.run(share.cpus))
            while not work.ended(_REPORT_SECONDS):
                written = heard.written() if keeps else ()
                if written:
                    sink.flush()
                yield Report(written, heard.progress())
            if work.failure is not None:
                if keeps:
                    written = heard.written()
                    sink.flush()
                    yield Report(written, heard.progress())
                raise work.failure
        yield Report(heard.written(), heard.progress(), dict(sink.facts))


class _Work:
    """Work in a thread of its own, and the failure that ended it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.failure: BaseException | None = None
        self._work = work
        self._thread = Worker(self._run, "sparseprune-file")
        self._began = self._thread.begin()

    def ended(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at the most."""
        if not self._began:
            self._began = True
            self._run()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as failure:  # noqa: BLE001  (raised by who waits)
            self.failure = failure


def _of(current: Pass | Shared[Pass]) -> Pass:
    return current if isinstance(current, Pass) else current.get()


def _io(setup: Setup, reader: Source, heard: _Heard, sink: Sink | None = None) -> TensorIO:
    room = setup.room
    if setup.device != "cpu":  # Ray lets a task see its own GPU alone, which may be smaller than the driver's
        found = free_bytes(setup.device)
        room = found if room is None or found is None else min(room, found)
    tensors, lanes = setup.tensors.get(), Lanes(room)
    return TensorIO(reader, sink, tensors, setup.device, heard.passed, lanes=lanes)


def _one_thread_of_torch() -> AbstractContextManager[None]:
    """Passes that need torch have imported it by now."""
    return one_torch_thread() if "torch" in sys.modules else nullcontext()


# -- at the start ------------------------------------------------------------------------------------


def refuse_unseen(cluster: Cluster, io: TensorIO) -> None:
    """MachineError where a machine does not see the input as it is here, or cannot write the output."""
    shards = tuple({stored.shard: None for stored in io.tensors.values()})
    sizes = tuple((shard.path, shard.size) for shard in shards)
    refuse_other_files(cluster, sizes, None if io.output is None else io.output.portion(()))


def refuse_other_files(
    cluster: Cluster, sizes: Sequence[tuple[Path, int]], portion: Portion | None = None
) -> None:
    """MachineError where a machine does not see files in their sizes, or cannot write a portion."""
    found = cluster.on_each(look, sizes, portion)
    lines = [f"{line} (on machine {node.name})" for node, lines in found.items() for line in lines]
    if lines:
        raise MachineError(one_of_many(lines))


def look(sizes: Sequence[tuple[Path, int]], portion: Portion | None) -> list[str]:
    """What is wrong here: files that are not there or of another size, an output that cannot be written."""
    lines = []
    for path, size in sizes:
        try:
            own = path.stat().st_size
        except OSError as error:
            lines.append(f"{path}: {error.strerror}; --on needs an input that all machines share")
            continue
        if own != size:
            lines.append(f"{path}: has {own} bytes, not {size}; --on needs an input that all machines share")
    if portion is not None:
        try:
            with portion.open():
                pass
        except MachineError as error:
            lines.extend(error.args)
    return lines
