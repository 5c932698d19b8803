"""The executor: runs the slabs and copies of a plan side by side and collects what became of them.

Owns threads and the traffic between files and tensors. Knows neither which blocks win (unit) nor where
bytes lie (checkpoint). Results and errors come in the order of the plan, whatever finishes first.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch

from sparseprune.engine.dtypes import torch_dtype
from sparseprune.pipeline.slabs import slabs_of
from sparseprune.pipeline.unit import prune_slab

if TYPE_CHECKING:
    from torch import Tensor

    from sparseprune.checkpoint import CopyRange, StagedOutput, TensorReader
    from sparseprune.engine.tally import Tally
    from sparseprune.pipeline.plan import Plan, WorkUnit
    from sparseprune.pipeline.slabs import Piece, Slab
    from sparseprune.pipeline.unit import PrunedPiece, Reach

_FLUSH_SECONDS = 0.1
Progress = Callable[[int], None]
"""Called from any thread with the bytes that have just been done."""


@dataclass(frozen=True, slots=True)
class TensorOutcome:
    """What became of one tensor; `reach` has for each rule what it reached and dropped of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    instance: str
    reach: Mapping[str, Reach]
    before: Tally
    after: Tally


@dataclass(frozen=True, slots=True)
class Machine:
    """On what a plan runs: a torch device, and how many slabs are worked on at one time."""

    device: str = "cpu"
    jobs: int = 1


class Work(Protocol):
    """What a thread does: a slab or a copy; gives the outcomes of the tensors it touched."""

    def __call__(self) -> tuple[TensorOutcome, ...]: ...


def execute(
    plan: Plan, reader: TensorReader, output: StagedOutput, machine: Machine, progress: Progress
) -> tuple[TensorOutcome, ...]:
    """Do all the work of a plan: every byte of the output's shards and masks is written once.

    The first error in the order of the plan is raised once what is running has ended; nothing new is
    begun after it.
    """
    outcomes: dict[str, TensorOutcome] = {}
    with (
        _torch_threads(machine),
        _flushing(output),
        ThreadPoolExecutor(machine.jobs, "sparseprune") as pool,
    ):
        try:
            for future in _in_order(pool, _work(plan, reader, output, machine, progress), 2 * machine.jobs):
                for outcome in future.result():
                    known = outcomes.get(outcome.name)
                    outcomes[outcome.name] = outcome if known is None else _joined(known, outcome)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return tuple(outcomes[name] for name in plan.reached)


def _work(
    plan: Plan, reader: TensorReader, output: StagedOutput, machine: Machine, progress: Progress
) -> Iterator[Work]:
    for unit in plan.units:
        for slab in slabs_of(unit):
            yield _slab_work(unit, slab, reader, output, machine.device, progress)
    for copy in output.layout.copies:
        yield _copy_work(copy, output, progress)


def _slab_work(
    unit: WorkUnit,
    slab: Slab,
    reader: TensorReader,
    output: StagedOutput,
    device: str,
    progress: Progress,
) -> Work:
    def work() -> tuple[TensorOutcome, ...]:
        tensors = {piece.stored.name: _load(piece, reader, device) for piece in slab.pieces}
        inputs = [{key: _load(piece, reader, device) for key, piece in pieces} for pieces in slab.inputs]
        pruned = prune_slab(slab, tensors, inputs)
        outcomes = []
        for piece in slab.pieces:
            name = piece.stored.name
            result = pruned[name]
            output.write_weight(name, piece.begin, _bytes_of(tensors[name]))
            output.write_mask(name, piece.first, _bytes_of(result.keep))
            outcomes.append(_outcome(unit, piece, result))
        progress(slab.nbytes)
        return tuple(outcomes)

    return work


def _copy_work(copy: CopyRange, output: StagedOutput, progress: Progress) -> Work:
    def work() -> tuple[TensorOutcome, ...]:
        output.copy(copy)
        progress(copy.length)
        return ()

    return work


def _outcome(unit: WorkUnit, piece: Piece, result: PrunedPiece) -> TensorOutcome:
    """The outcome of one piece; where several tasks reach its tensor, all of them are named."""
    name = piece.stored.name
    tasks = [task for task in unit.tasks if any(leaf.tensor == name for leaf in task.instance.scope.leaves)]
    return TensorOutcome(
        name=name,
        dtype=piece.stored.dtype,
        shape=piece.stored.shape,
        instance=", ".join(task.instance.label for task in tasks),
        reach=result.reach,
        before=result.before,
        after=result.after,
    )


def _load(piece: Piece, reader: TensorReader, device: str) -> Tensor:
    dtype = torch_dtype(piece.stored.dtype)
    data = reader.read(piece.stored, piece.begin, piece.end)
    if not data:
        return torch.empty(piece.shape, dtype=dtype, device=device)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(piece.shape).to(device)


def _bytes_of(tensor: Tensor) -> memoryview:
    array = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return array.data


def _joined(known: TensorOutcome, more: TensorOutcome) -> TensorOutcome:
    return replace(
        known,
        reach={rule: part + more.reach[rule] for rule, part in known.reach.items()},
        before=known.before + more.before,
        after=known.after + more.after,
    )


def _in_order(
    pool: ThreadPoolExecutor, work: Iterable[Work], ahead: int
) -> Iterator[Future[tuple[TensorOutcome, ...]]]:
    """Futures in the order of the work, at most `ahead` of them begun and not yet taken."""
    waiting: list[Future[tuple[TensorOutcome, ...]]] = []
    for one in work:
        waiting.append(pool.submit(one))
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


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
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def _torch_threads(machine: Machine) -> Iterator[None]:
    """Share the cores among the jobs while they run."""
    usual = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // machine.jobs))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
