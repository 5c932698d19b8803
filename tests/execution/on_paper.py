"""What a run over a checkpoint would be, from its headers alone: time, memory, files, and what is sent.

`python -m tests.execution.on_paper FOLDER SPEC MEMORY EVERY` prints it as JSON, of a process of its own, so
that its peak memory is that of the plan. Imports nothing large; no tensor is read.
"""

import json
import pickle
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from msgspec import Struct, structs

from sparseprune.api.options import Source, Target
from sparseprune.api.pruning import Prepared, prepare
from sparseprune.api.resources import Machine
from sparseprune.checkpoint import TensorReader
from sparseprune.execution.passes import Pass
from sparseprune.execution.pruning import jobs_of
from sparseprune.execution.runner import Job
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.spec import BoundScope

WORKERS = 2
_SAMPLED = 100  # of so many chunks one is pickled
_MANY = 1 << 24  # blocks, which are elements of a whole model


class OnPaper(Struct, frozen=True):
    """A plan and its schedule. Seconds are of the CPU, sizes are bytes, `peak` is resident memory.

    `planned` and `peak` are those until the plan is complete, `told` is the peak of the run that it tells. A
    batch is all that one file of the output gets: `batches` has its bytes by file, masks among them.
    `written` and what follows is of jobs whose chunks were listed: bytes that they write, chunks, those that
    write several files, the largest one pickled. `sent` are the bytes of all passes of a batch for
    each 1,000 of its tensors, and `flags` those of decisions beside, of the batch that has the most. `read`
    are the bytes that the process read from files, modules among them.
    """

    tensors: int
    nbytes: int
    planned: float
    peak: int
    told: int
    jobs: int
    batches: dict[str, int]
    written: int = 0
    copied: int = 0
    chunks: int = 0
    listed: float = 0.0
    split: int = 0
    largest_chunk: int = 0
    sent: int = 0
    flags: int = 0
    peak_listed: int = 0
    read: int = 0

    @property
    def largest(self) -> int:
        """The bytes of the largest batch."""
        return max(self.batches.values())

    @property
    def median(self) -> int:
        """The bytes of a usual batch."""
        return int(statistics.median(self.batches.values()))


def of_run(folder: Path, spec: str, memory: int, every: int = 1) -> OnPaper:
    """A run of `apply`; chunks are listed of one job in `every`."""
    began = time.process_time()
    prepared = prepare(
        Source(folder, spec, {}), Target(None, "packed"), Machine("cpu", WORKERS, memory), plans=True
    )
    tensors = prepared.plan.checkpoint.tensors
    jobs = list(jobs_of(prepared.schedule))
    found = OnPaper(
        tensors=len(tensors),
        nbytes=sum(stored.nbytes for stored in tensors.values()),
        planned=time.process_time() - began,
        peak=_peak(),
        told=prepared.peak_bytes,
        jobs=len(jobs),
        batches=_batches(prepared),
        copied=sum(copy.length for copy in prepared.layout.copies),
    )
    began = time.process_time()
    counted = _chunks(prepared, jobs[::every])
    listed = time.process_time() - began
    return structs.replace(found, **counted, listed=listed, peak_listed=_peak(), read=_read())


def _batches(prepared: Prepared) -> dict[str, int]:
    """The bytes that each file of the output has to get, with those of its masks."""
    tensors, layout = prepared.plan.checkpoint.tensors, prepared.layout
    sizes: dict[str, int] = defaultdict(int)
    for stored in tensors.values():
        sizes[str(stored.shard.relative)] += stored.nbytes
    for name in layout.masks:
        sizes[str(tensors[name].shard.relative)] += -(-tensors[name].numel // 8)
    return dict(sizes)


@dataclass
class _Listed:
    """What the chunks of some jobs are, and their passes by the files that they write."""

    io: TensorIO
    written: int = 0
    chunks: int = 0
    split: int = 0
    largest: int = 0
    passes: dict[tuple[str, ...], list[Pass]] = field(default_factory=lambda: defaultdict(list))

    def add(self, job: Job) -> None:
        for current in _passes(job.first):
            files: dict[str, None] = {}
            for chunk in current.chunks(self.io):
                self.chunks += 1
                self.written += chunk.nbytes
                self.split += len(chunk.files) > 1
                files |= dict.fromkeys(chunk.files)
                if self.chunks % _SAMPLED == 1:
                    self.largest = max(self.largest, len(pickle.dumps(chunk)))
            self.passes[tuple(files)].append(current)

    def sent(self) -> tuple[int, int]:
        """The bytes of passes, and of arrays in them, that go together, for each 1,000 tensors; the most."""
        most, flags = 0, 0
        for passes in self.passes.values():
            arrays: list[pickle.PickleBuffer] = []
            plain = len(pickle.dumps(passes, 5, buffer_callback=arrays.append))
            tensors = sum(len(set(_tensors(one))) for one in passes)
            most = max(most, 1000 * plain // tensors)
            flags = max(flags, 1000 * sum(array.raw().nbytes for array in arrays) // tensors)
        return most, flags


def _chunks(prepared: Prepared, jobs: list[Job]) -> dict[str, int]:
    """What the chunks of some jobs are, those of all their passes; decisions are made up."""
    with TensorReader() as reader:
        output = cast("Any", SimpleNamespace(layout=prepared.layout))
        found = _Listed(TensorIO(reader, output, prepared.plan.checkpoint.tensors))
        for job in jobs:
            found.add(job)
    sent, flags = found.sent()
    return {
        "written": found.written,
        "chunks": found.chunks,
        "split": found.split,
        "largest_chunk": found.largest,
        "sent": sent,
        "flags": flags,
    }


def _passes(first: Pass) -> Iterator[Pass]:
    """A pass and those that follow from decisions, which could be any."""
    current: Pass | None = first
    while current is not None:
        yield current
        current = _following(current) if current.decides else None


def _following(current: Pass) -> Pass:
    """What follows where all blocks survive, or all elements above 0."""
    import numpy as np

    scope: BoundScope = current.task.instance.scope  # type: ignore[attr-defined]
    blocks = int(np.prod(scope.grid_shape)) * scope.blocks_per_scope
    values = ([0, 0], np.ones(blocks, np.uint8) if blocks < _MANY else None)
    return next(filter(None, map(current.decided, values)))


def _tensors(current: Pass) -> Iterator[str]:
    tasks = getattr(current, "tasks", None) or (current.task,)  # type: ignore[attr-defined]
    return (leaf.tensor for task in tasks for leaf in task.instance.scope.leaves)


def _peak() -> int:
    """Bytes that this process had at most; what getrusage tells may be that of the process that began it."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


def _read() -> int:
    """Bytes that this process asked of files so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def main() -> None:
    """Print one line of JSON."""
    folder, spec, memory, every = sys.argv[1:]
    found = of_run(Path(folder), spec, int(memory), int(every))
    sys.stdout.write(json.dumps(structs.asdict(found)) + "\n")


if __name__ == "__main__":
    main()
