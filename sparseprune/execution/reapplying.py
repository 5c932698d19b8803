"""Masks against weights: putting zeros back where masks drop elements, and finding those that were lost.

Owns how a tensor is cut into slabs for it, and what is counted in them. Which mask is for which tensor is
matching's business, writing and noting are the executor's. Called by the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparseprune.checkpoint import read_kept
from sparseprune.checkpoint.threads import work_through
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.kernels.formats import FORMATS
from sparseprune.engine.kernels.selecting import count_lost, drop
from sparseprune.engine.sequences import Made
from sparseprune.engine.tally import tally
from sparseprune.execution.limits import Crowd, Resident, limits_of
from sparseprune.execution.outcomes import Outcome, Outcomes
from sparseprune.execution.programs import Item, Program, ProgramPass
from sparseprune.execution.runner import Job, Record, already_done, copied_bytes, dealt, write_through
from sparseprune.execution.tensor_io import TensorIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sparseprune.checkpoint import StagedOutput, TensorReader
    from sparseprune.engine.tally import Tally
    from sparseprune.execution.boxes import Run
    from sparseprune.execution.limits import Limits
    from sparseprune.execution.matching import Matched, Pair
    from sparseprune.execution.outcomes import TensorOutcome
    from sparseprune.execution.runner import Progress

_RULE = "masks"


@dataclass(frozen=True, slots=True)
class Reapplication:
    """All that has to be done to tensors with masks, by at most `workers` threads at one time."""

    matched: Matched
    limits: Limits
    workers: int


@dataclass(frozen=True, slots=True)
class Reapplied:
    """What became of a tensor: elements that its mask drops, and what was counted before and after."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruned: int
    before: Tally
    after: Tally

    @property
    def lost(self) -> int:
        """Elements that were not zero though the mask drops them, NaN among them: those that are so now."""
        return self.after.zeros - self.before.zeros


@dataclass(frozen=True, slots=True)
class LostZeros:
    """What a mask drops of a tensor, how much of that is not zero, the index of the first such element."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pruned: int
    lost: int
    first: tuple[int, ...] | None


def make_reapplication(matched: Matched, memory: int, workers: int) -> Reapplication:
    """What has to be done within `memory` bytes, interpreter included; SparsepruneError for too few."""
    return Reapplication(matched, limits_of(memory, uses_torch=False, resident=resident_of(matched)), workers)


def resident_of(matched: Matched, *, resized: bool = False) -> Resident:
    """What a run holds of all tensors and masks, whatever it works on at the time."""
    shards = (*matched.checkpoint.shards, *matched.masks.shards)
    return Resident.of(
        len(matched.checkpoint.tensors) + len(matched.masks.masks),
        sum(shard.data_begin for shard in shards),
        reached=len(matched.pairs),
        scopes=len(matched.pairs),
        masks=True,
        resized=resized,
    )


def reapply(
    reapplication: Reapplication, reader: TensorReader, output: StagedOutput, progress: Progress
) -> Sequence[Reapplied]:
    """Write every tensor with zeros where its mask drops elements, and the masks; copy the rest.

    Survivors keep their bits, what is dropped becomes +0.0, or 0. What an earlier run finished is taken over.
    `progress` is told, from any thread, bytes that were done and of what.
    """
    outcomes = Outcomes()
    record = Record(output, outcomes, progress)
    io = TensorIO(reader, output)
    pairs, limits, workers = reapplication.matched.pairs, reapplication.limits, reapplication.workers

    def jobs() -> Iterator[Job]:
        for order, pair in dealt(pairs, lambda pair: pair.stored.shard, workers):
            program = _program(pair, limits, reader, io)
            yield Job(order, f"mask{order}", pair.stored.name, ProgramPass(program))

    write_through(jobs(), io, record, Crowd(workers, limits.memory))
    return Made(pairs, lambda pair: _reapplied(outcomes.of_tensor(pair.stored, (_RULE,))))


def reapply_bytes(reapplication: Reapplication, output: StagedOutput) -> tuple[int, int]:
    """Bytes that pass by from the beginning to the end of a run, and how many of them an earlier one did."""
    return reapplication.matched.nbytes + copied_bytes(output), already_done(output)


def find_lost(
    reapplication: Reapplication, reader: TensorReader, progress: Progress
) -> tuple[LostZeros, ...]:
    """Where weights are not zero though their masks drop them; tensors in the order of the checkpoint.

    Zeros of either sign are zero, NaN is not. The same for any number of workers.
    """
    pairs, limits = reapplication.matched.pairs, reapplication.limits
    found: list[list[tuple[int, int, int | None]]] = [[] for _ in pairs]

    def pieces() -> Iterator[tuple[int, Run]]:
        for number, pair in enumerate(pairs):
            for run in _slabs(pair, limits):
                yield number, run

    def worker() -> Callable[[tuple[int, Run]], None]:
        traffic = TensorIO(reader)

        def look(piece: tuple[int, Run]) -> None:
            number, run = piece
            stored = pairs[number].stored
            bits = traffic.load_run(stored, run)
            mask = read_kept(reader, pairs[number].mask, *run)
            dropped, lost, first = count_lost(bits, DTYPES[stored.dtype].zero_bits or 0, mask)
            found[number].append((dropped, lost, None if first is None else run[0] + first))
            progress(bits.nbytes, stored.name)

        return look

    work_through(pieces(), worker, reapplication.workers)
    return tuple(_lost_zeros(pair, parts) for pair, parts in zip(pairs, found, strict=True))


def _program(pair: Pair, limits: Limits, reader: TensorReader, traffic: TensorIO) -> Program:
    """One step: all slabs of a tensor."""
    stored = pair.stored
    size = DTYPES[stored.dtype].bits // 8
    # A slab, its mask twice; integers are counted as float64.
    held = size + 2 + (0 if stored.dtype in FORMATS else 16)

    def cut(run: Run) -> list[Outcome]:
        bits = traffic.load_run(stored, run)
        mask = read_kept(reader, pair.mask, *run)
        before = tally(bits, stored.dtype)
        drop(bits, mask)
        after = tally(bits, stored.dtype)
        traffic.store_run(stored, run[0], bits, mask)
        pruned = run[1] - int(np.count_nonzero(mask.view(np.bool_)))
        return [
            [
                stored.name,
                _RULE,
                run[1],
                pruned,
                before.zeros,
                before.energy,
                after.zeros,
                after.energy,
            ]
        ]

    def items() -> Iterator[Item]:
        for number, run in enumerate(_slabs(pair, limits)):
            yield Item(lambda run=run: cut(run), run[1] * size, run[1] * held, str(number))  # type: ignore[misc]

    yield items()


def _slabs(pair: Pair, limits: Limits) -> Iterator[Run]:
    """Neighbouring elements, of about a slab; whole bytes of a packed mask where that can be."""
    elements = max(1, limits.slab // (DTYPES[pair.stored.dtype].bits // 8))
    elements -= elements % 8 if elements > 8 else 0
    numel = pair.stored.numel
    return ((first, min(elements, numel - first)) for first in range(0, numel, elements))


def _lost_zeros(pair: Pair, parts: list[tuple[int, int, int | None]]) -> LostZeros:
    stored = pair.stored
    places = [first for _, _, first in parts if first is not None]
    return LostZeros(
        name=stored.name,
        dtype=stored.dtype,
        shape=stored.shape,
        pruned=sum(dropped for dropped, _, _ in parts),
        lost=sum(lost for _, lost, _ in parts),
        first=_index(min(places), stored.shape) if places else None,
    )


def _index(place: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The index of an element by its number, row-major."""
    index: list[int] = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return tuple(reversed(index))


def _reapplied(outcome: TensorOutcome) -> Reapplied:
    reach = outcome.reach[_RULE]
    return Reapplied(outcome.name, outcome.dtype, outcome.shape, reach.pruned, outcome.before, outcome.after)
