"""A calibration divided among machines: each runs the text through the model and sums for some blocks.

Owns which blocks go together, what a machine sends back, and what the driver does with it: it alone writes
the output and keeps its journal, whose notes are those of `calibrate` in one process. Knows no cluster:
api hands one over. Called by api.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap, deque
from contextlib import closing, contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import torch
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.calibration.collecting import BACK, Summing, Work, counted, key_of
from sparseprune.calibration.loading import load_model
from sparseprune.calibration.outbox import Note, Outbox, Piece, states_folder
from sparseprune.calibration.sweeps import Streaming
from sparseprune.calibration.text import Sequences
from sparseprune.checkpoint import TensorReader
from sparseprune.checkpoint.file_io import named_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from sparseprune.calibration.collecting import Counted, Counts
    from sparseprune.calibration.loading import LoadedModel
    from sparseprune.calibration.outbox import Report
    from sparseprune.calibration.planning import Calibration, Summed, Unit
    from sparseprune.checkpoint import Checkpoint, Sink, StatisticsKind

_NEAR = 1.05  # times the least time that a division may take, with fewer machines
_STEPS = 50  # of a bisection


class Machines(Struct, frozen=True):
    """What does shares: `many` at one time, with so many threads of a CPU each, or on a `device`.

    `share` makes a value that is sent to each machine once, and has it by `get`; `stream` gives what work
    yields for batches, by their numbers, and asks again for what is lost.
    """

    many: int
    threads: int
    device: str
    share: Callable[[Any], Any]
    stream: Callable[..., Generator[tuple[int, Any], None, None]]


class Setup(Struct, frozen=True, eq=False):
    """What every share needs."""

    checkpoint: Checkpoint
    plan: Calibration
    text: tuple[Any, Any, int]
    kind: StatisticsKind
    device: str
    threads: int


class Share(Struct, frozen=True, eq=False):
    """A part of what is summed in one sweep, done by one machine, which runs blocks so often for it."""

    number: int
    summed: Summed
    runs: float

    @property
    def key(self) -> str:
        return f"sweep {self.number}"

    def without(self, noted: Mapping[str, Any]) -> Share | None:
        """What is left of it; None for nothing."""
        there, back = (
            {
                name: parts
                for name, parts in way.items()
                if key_of(self.number, name, back=is_back) not in noted
            }
            for way, is_back in ((self.summed.there, False), (self.summed.back, True))
        )
        rest = replace(self.summed, there=there, back=back)
        return replace(self, summed=rest) if there or back or rest.standing else None


class Batch(Struct, frozen=True, eq=False):
    """A share, and what it needs, as it is sent."""

    setup: Any  # a Setup that has been shared
    share: Share


# -- who does what -----------------------------------------------------------------------------------


class _Item(Struct, frozen=True, eq=False):
    """Something to sum: a block on a way, or all that stands.

    In runs of a block over the text, where a way back counts `BACK`: `reach` is how far the text has to go
    for it, `again` how often the block runs once more, and `sums` what its sums take.
    """

    reach: float
    again: float
    sums: float
    there: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    stands: bool = False


def divided(
    plan: Calibration, loaded: LoadedModel, kind: StatisticsKind, finished: Mapping[str, Any], many: int
) -> list[Share]:
    """Up to `many` shares of what is not finished, or one for each sweep; they take about the same time.

    Where a further share would hardly save time, there are fewer. In the order of the plan.
    """
    sweeps = [
        (number, summed, _items(plan, loaded, kind, number, finished))
        for number, summed in enumerate(plan.sweeps, 1)
        if f"sweep {number}" not in finished
    ]
    sweeps = [one for one in sweeps if one[2]]
    groups = _grouped([items for _, _, items in sweeps], many)
    return [
        Share(number, _part(summed, group), runs_of(group))
        for (number, summed, _), some in zip(sweeps, groups, strict=True)
        for group in some
    ]


def time_of(group: Sequence[_Item]) -> float:
    """What a share takes, in runs of a block over the text."""
    return runs_of(group) + sum(one.sums for one in group)


def runs_of(group: Sequence[_Item]) -> float:
    """How often a share runs a block over the text; ways back count `BACK` times."""
    return max(one.reach for one in group) + sum(one.again for one in group)


def _grouped(sweeps: Sequence[Sequence[_Item]], many: int) -> list[list[list[_Item]]]:
    """Items that follow one another in groups, at most `many` in all if there are not more sweeps."""

    def filled(limit: float) -> list[list[list[_Item]]]:
        return [_filled(items, limit) for items in sweeps]

    most = max((time_of(items) for items in sweeps), default=0)
    low, high = 0.0, most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if sum(map(len, filled(middle))) > max(many, len(sweeps)):
            low = middle
        else:
            high = middle
    return filled(min(most, _NEAR * high))


def _filled(items: Sequence[_Item], limit: float) -> list[list[_Item]]:
    """As few groups as possible that take no longer than the limit, but for those of one item."""
    groups: list[list[_Item]] = []
    for item in items:
        if groups and time_of([*groups[-1], item]) <= limit:
            groups[-1].append(item)
        else:
            groups.append([item])
    return groups


def _items(
    plan: Calibration, loaded: LoadedModel, kind: StatisticsKind, number: int, finished: Mapping[str, Any]
) -> list[_Item]:
    """What is left to sum in a sweep, in the order in which one process sums it."""
    summed, visits = plan.sweeps[number - 1], plan.visits
    places = {name: place for place, name in enumerate(visits, 1)}
    whole = float(len(visits))
    stands_back = any(unit.about == "gradients" for unit in summed.standing)

    def wanted(back: bool) -> list[tuple[str, float, float]]:  # noqa: FBT001
        way = summed.back if back else summed.there
        weight = BACK if back else 1
        return sorted(
            (
                (name, weight * (len(parts) - 1), _share_of_sums(loaded, kind, name, parts))
                for name, parts in way.items()
                if key_of(number, name, back=back) not in finished
            ),
            key=lambda one: places[one[0]],
            reverse=back,
        )

    there = [_Item(places[name], again, sums, there=(name,)) for name, again, sums in wanted(back=False)]
    back = [
        _Item(whole + BACK * (whole + 1 - places[name]), again, sums, back=(name,))
        for name, again, sums in wanted(back=True)
    ]
    standing = [_Item(whole * (1 + BACK) if stands_back else whole, 0, 1, stands=True)]
    has_standing = summed.standing and f"sweep {number} standing" not in finished
    return [*there, *back, *standing] if has_standing else [*there, *back]


def _share_of_sums(
    loaded: LoadedModel, kind: StatisticsKind, name: str, parts: Sequence[Sequence[Unit]]
) -> float:
    """The work of sums of a block to that of running it: products of matrices of these sizes."""
    tensors = loaded.checkpoint.tensors
    weights = sum(tensors[key].numel for key in loaded.blocks.stored(name))
    sums = sum(unit.nbytes(kind) // unit.itemsize(kind) for units in parts for unit in units)
    return sums / weights if weights else 1


def _part(summed: Summed, group: Sequence[_Item]) -> Summed:
    there = {name for one in group for name in one.there}
    back = {name for one in group for name in one.back}
    return replace(
        summed,
        standing=summed.standing if any(one.stands for one in group) else (),
        there={name: parts for name, parts in summed.there.items() if name in there},
        back={name: parts for name, parts in summed.back.items() if name in back},
    )


# -- the driver --------------------------------------------------------------------------------------


class Gathering:
    """Shares on their way: writes what comes of them, and notes it; `work` says how much there is."""

    def __init__(
        self,
        machines: Machines,
        streaming: Streaming,
        plan: Calibration,
        output: Sink,
        kind: StatisticsKind,
    ) -> None:
        self._machines, self._streaming, self._plan = machines, streaming, plan
        self._output, self._kind = output, kind
        self._noted: dict[str, Counts] = {}
        self._known = ChainMap(self._noted, cast("dict[str, Counts]", output.finished))
        self._waiting = deque(divided(plan, streaming.loaded, kind, output.finished, machines.many))
        self._open: dict[int, tuple[Share, list[float]]] = {}  # with how often blocks ran until now
        self._left = [0] * len(plan.sweeps)
        for share in self._waiting:
            self._left[share.number - 1] += 1
        self.work = self._whole()

    def run(self, progress: Callable[[int, str], None]) -> dict[str, Counted]:
        """Do all shares; returns the counts by tensor.

        Raises:
            SparsepruneError: an input that is not finite.
            MachineError: a share was lost again and again.
        """
        for number, left in enumerate(self._left, 1):
            if not left and f"sweep {number}" not in self._known:
                self._end(number)
        self._progress = progress
        self._setup = self._machines.share(self._needed())
        with closing(self._machines.stream(do_share, self._batches(), self._again)) as reports:
            for number, report in reports:
                if number in self._open:
                    self._hear(number, report)
        return counted(self._plan, self._known)

    def _needed(self) -> Setup:
        loaded, text, machines = self._streaming.loaded, self._streaming.sequences, self._machines
        tensors = dict(loaded.checkpoint.tensors)
        checkpoint = dataclasses.replace(loaded.checkpoint, tensors=tensors)
        plan = dataclasses.replace(self._plan, sweeps=())
        words = (text.ids.numpy(), text.counted.numpy(), text.available)
        return Setup(checkpoint, plan, words, self._kind, machines.device, machines.threads)

    def _whole(self) -> Work:
        """All runs of all shares; blocks that an interrupted run finished count as they would for one."""
        skipped = sum(
            (BACK if back else 1) * len(parts)
            for number, summed in enumerate(self._plan.sweeps, 1)
            for way, back in ((summed.there, False), (summed.back, True))
            for name, parts in way.items()
            if key_of(number, name, back=back) in self._known
        )
        whole = sum(share.runs for share in self._waiting)
        return Work(self._streaming.sequences.ids.numel(), whole + skipped, skipped)

    def _batches(self) -> Iterator[Batch | None]:
        for number in count():
            if not self._waiting:
                return
            if len(self._open) >= self._machines.many:
                yield None
                continue
            share = self._waiting.popleft()
            self._open[number] = share, [0.0]
            yield Batch(self._setup, share)

    def _again(self, number: int) -> Batch | None:
        """What is to be done once more of a share whose machine is lost."""
        if number not in self._open:
            return None
        share, runs = self._open[number]
        self._progress(self.work.step(-runs[0]), "")
        runs[0] = 0.0
        rest = share.without(self._known)
        if rest is None:
            self._ended(number, share, [])
            return None
        return Batch(self._setup, rest)

    def _hear(self, number: int, report: Report) -> None:
        share, runs = self._open[number]
        for some, label in report.passed:
            runs[0] += some
            self._progress(self.work.step(some), label)
        for item in report.items:
            if isinstance(item, Piece):
                self._output.write_weight(item.name, item.begin, item.data)
            elif item.key == share.key:
                self._ended(number, share, item.record)
            else:
                self._note(item)

    def _note(self, note: Note) -> None:
        self._noted[note.key] = note.record
        self._output.note(note.key, note.record)
        self._output.flush()

    def _ended(self, number: int, share: Share, standing: Counts) -> None:
        del self._open[number]
        if share.summed.standing:
            self._note(Note(f"{share.key} standing", standing))
        self._left[share.number - 1] -= 1
        if not self._left[share.number - 1]:
            self._end(share.number)

    def _end(self, number: int) -> None:
        key = f"sweep {number}"
        self._note(Note(key, self._known.get(f"{key} standing", [])))


# -- a machine ---------------------------------------------------------------------------------------


def do_share(batch: Batch) -> Iterator[Report]:
    """Do a share: pieces of sums, and notes of the blocks that are done, as they come."""
    setup: Setup = batch.setup.get()
    share = batch.share
    with named_errors(), _threads(setup.threads), TensorReader() as reader, states_folder() as folder:
        loaded = load_model(setup.checkpoint, setup.device, reader)
        ids, counts, available = setup.text
        text = Sequences(torch.tensor(ids), torch.tensor(counts), available)
        streaming = Streaming(loaded, loaded.read(reader), text, folder)
        outbox = Outbox()
        summing = Summing(
            streaming,
            setup.plan,
            share.summed,
            share.number,
            cast("Sink", outbox),
            setup.kind,
            outbox.passed,
        )
        yield from outbox.sent(summing.finished)


@contextmanager
def _threads(many: int) -> Iterator[None]:
    """Torch computes with so many threads, which decide the order of sums."""
    usual = torch.get_num_threads()
    torch.set_num_threads(many)
    try:
        yield
    finally:
        torch.set_num_threads(usual)
