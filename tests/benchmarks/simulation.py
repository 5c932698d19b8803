"""N machines that share one store: a model of time, in which only requests differ, by a seed.

It assumes the following. A batch is worked by one machine. The largest of those that are left goes to the
machine that works on the fewest, the one with the lowest number among equals. A machine divides its cores
equally among the batches that it works on at one time, up to `files`, and fewer where fewer keep all machines
busy, as the driver of a cluster does. A batch is read, computed and written side by side: it ends when the
slowest of the three has ended. Each direction of a machine's network is shared equally by the batches that
still read or write there, and so is the store by all of them. A batch has no more than a window of bytes in
flight, which take the time of a request; before that it waits for a few requests, a half more or less. Pieces
of computation are done by one core each, the largest first. Of a lost machine nothing of its open batches
is kept; others begin them anew once the loss is noticed. `simulate` knows nothing of tensors.
"""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

_GBIT = 1e9 / 8
_REQUESTS = 3  # of a batch that wait for each other: the first read, the first write, the end of an upload
_NOTHING = 1e-9  # seconds, or bytes, that are none


@dataclass(frozen=True)
class Machine:
    """Cores, bytes a second in each direction, and batches at one time."""

    cores: int = 16
    network: float = 25 * _GBIT
    files: int = 4


@dataclass(frozen=True)
class Store:
    """Bytes a second in each direction over all machines, seconds a request, bytes in flight of a batch.

    `spread` is by which share of its seconds a request may take more or less.
    """

    limit: float = 400 * _GBIT
    request: float = 0.030
    spread: float = 0.5
    window: float = 64 << 20


@dataclass(frozen=True)
class Batch:
    """Bytes read and written, and CPU seconds: of pieces that one core does each, and what cores share."""

    read: float
    written: float
    pieces: tuple[float, ...] = ()
    shared: float = 0.0

    @property
    def cpu(self) -> float:
        """CPU seconds."""
        return sum(self.pieces) + self.shared

    @property
    def moved(self) -> float:
        """Bytes of the direction that has more of them."""
        return max(self.read, self.written)

    def seconds(self, cores: int) -> float:
        """What its computation takes on so many cores."""
        free = [0.0] * min(cores, max(1, len(self.pieces)))
        for piece in sorted(self.pieces, reverse=True):
            heapq.heapreplace(free, free[0] + piece)
        return max(free) + self.shared / cores


@dataclass(frozen=True)
class Lost:
    """Machine 0 is lost after some seconds, which is noticed some seconds later."""

    after: float
    noticed: float = 10.0


@dataclass
class _Open:
    """A batch at work: seconds of waiting, then of computation, and bytes that are left."""

    batch: Batch
    machine: int
    waits: float
    computes: float
    moves: float

    @property
    def ended(self) -> bool:
        return max(self.waits, self.computes) <= _NOTHING and self.moves <= 1


@dataclass
class _Run:
    """The state of a simulation."""

    waiting: list[Batch]
    machine: Machine
    store: Store
    alive: set[int]
    files: int
    now: float = 0.0
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    open: list[_Open] = field(default_factory=list)

    def begin(self) -> None:
        """Give batches to machines that have room for one."""
        while self.waiting:
            busy = dict.fromkeys(sorted(self.alive), 0)
            for one in self.open:
                busy[one.machine] += 1
            least = min(busy, key=lambda number: (busy[number], number))
            if busy[least] == self.files:
                return
            batch = self.waiting.pop(0)
            seconds = batch.seconds(max(1, self.machine.cores // self.files))
            self.open.append(_Open(batch, least, self._waits(), seconds, batch.moved))

    def _waits(self) -> float:
        """Seconds of requests that a batch waits for."""
        store = self.store
        return _REQUESTS * store.request * self.chance.uniform(1 - store.spread, 1 + store.spread)

    def rates(self) -> list[float]:
        """Bytes a second for each open batch."""
        moving = [one.moves > 1 and one.waits <= _NOTHING for one in self.open]
        of_machine = [0] * (1 + max(self.alive, default=0))
        for one, moves in zip(self.open, moving, strict=True):
            of_machine[one.machine] += moves
        alone = self.store.window / self.store.request if self.store.request else math.inf
        wanted = [
            min(alone, self.machine.network / of_machine[one.machine]) if moves else 0.0
            for one, moves in zip(self.open, moving, strict=True)
        ]
        share = min(1.0, self.store.limit / (sum(wanted) or 1.0))
        return [share * rate for rate in wanted]

    def step(self, until: float) -> None:
        """To the next moment at which something ends, or to `until`."""
        rates = self.rates()
        left = until - self.now
        for one, rate in zip(self.open, rates, strict=True):
            if one.waits > _NOTHING:
                left = min(left, one.waits)
                continue
            if one.computes > _NOTHING:
                left = min(left, one.computes)
            if rate:
                left = min(left, one.moves / rate)
        for one, rate in zip(self.open, rates, strict=True):
            if one.waits > _NOTHING:
                one.waits -= left
            else:
                one.computes -= left
                one.moves -= rate * left
        self.now += left
        self.open = [one for one in self.open if not one.ended]


def simulate(
    batches: Sequence[Batch], machines: int, machine: Machine, store: Store, lost: Lost | None = None
) -> float:
    """Seconds until all batches are written. ValueError where no machine is left."""
    files = max(1, min(machine.files, machine.cores, -(-len(batches) // machines)))
    run = _Run(_sorted(batches), machine, store, set(range(machines)), files)
    events = [] if lost is None else [lost.after, lost.after + lost.noticed]
    again: list[Batch] = []
    while True:
        while events and run.now >= events[0] - _NOTHING:
            if len(events) == 2:
                run.alive.discard(0)
                again = [one.batch for one in run.open if one.machine == 0]
                run.open = [one for one in run.open if one.machine != 0]
            else:
                run.waiting, again = _sorted([*run.waiting, *again]), []
            events.pop(0)
        if not run.alive:
            raise ValueError("no machine is left")
        run.begin()
        if not run.open and not again:
            return run.now
        run.step(events[0] if events else math.inf)


def _sorted(batches: Sequence[Batch]) -> list[Batch]:
    return sorted(batches, key=lambda one: (-one.cpu, -one.moved))


def ideal(batches: Sequence[Batch], machines: int, machine: Machine, store: Store) -> float:
    """Seconds if all work could be divided at will and no request took time."""
    moved = max(sum(one.read for one in batches), sum(one.written for one in batches))
    network = min(machines * machine.network, store.limit)
    cpu = sum(one.cpu for one in batches) / (machines * machine.cores)
    return max(moved / network, cpu)


def in_pieces(batches: Sequence[Batch], nbytes: float) -> list[Batch]:
    """The same work in batches of about so many bytes; pieces of computation stay whole."""
    cut: list[Batch] = []
    for batch in batches:
        count = max(1, math.ceil(batch.read / nbytes))
        if batch.pieces:
            count = min(count, len(batch.pieces))
        dealt: list[list[float]] = [[] for _ in range(count)]
        for piece in sorted(batch.pieces, reverse=True):
            min(dealt, key=sum).append(piece)
        part = replace(batch, read=batch.read / count, written=batch.written / count, pieces=())
        cut += [replace(part, pieces=tuple(pieces), shared=batch.shared / count) for pieces in dealt]
    return cut
