"""The crew: threads that take items of programs as they become free, as long as memory allows.

Owns who works on what when. Programs are taken up as they come; the next one begins when those before it
have no item left to hand out. Knows nothing of what items do.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparseprune.checkpoint.threads import side_by_side
from sparseprune.execution.programs import GivenUpError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sparseprune.execution.programs import Item, Program

# Before and behind the programs in the order of failures: from outside of the crew, and its own.
_FIRST, _LAST = -1, 1 << 63


class Assigned(Protocol):
    """A program: its place among all, name for people, key, and the bytes that it holds while it goes on."""

    @property
    def order(self) -> int: ...
    @property
    def key(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def program(self) -> Program: ...
    @property
    def held(self) -> int: ...


class Register(Protocol):
    """Who knows what has been done and hears of what is done; called by one thread at a time."""

    def known(self, key: str) -> bool: ...
    def done(self, item: Item, key: str, label: str, result: Any) -> None: ...  # noqa: ANN401


@dataclass(slots=True, eq=False)
class _Running:
    """A program that has begun: the items of its present step, and their results by number."""

    assigned: Assigned
    step: Iterator[Item] = field(default_factory=lambda: iter(()))
    waiting: Item | None = None
    begun: int = 0
    open: int = 0
    results: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Taken:
    running: _Running
    number: int
    item: Item


class Crew:
    """Does the items of programs with some threads; `memory` bounds what items and programs declare.

    An item for which there will never be room runs alone. `given_up` is set where items that are at work
    need not be finished: they may raise GivenUpError then.
    """

    def __init__(
        self,
        programs: Iterable[Assigned],
        register: Register,
        memory: int,
        given_up: threading.Event | None = None,
    ) -> None:
        self._programs = iter(programs)
        self._register = register
        self._memory = memory
        self._in_use = 0
        self._open = 0
        self._running: list[_Running] = []
        self._next: Assigned | None = None
        self._failures: list[tuple[int, int, BaseException]] = []
        self._stopped = False
        self._given_up = given_up or threading.Event()
        self._changed = threading.Condition(threading.RLock())

    def run(self, workers: int) -> None:
        """Until everything is done; the first failure in the order of the programs is raised."""
        try:
            side_by_side(self._work, workers, self._abandon)
        finally:
            for running in self._running:
                # What ends the run is told, and not what its end brings about.
                with suppress(Exception):
                    running.assigned.program.close()
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[:2])[2]

    def give_up(self, failure: BaseException) -> None:
        """End the run, which raises this failure; not where another one has ended it already."""
        with self._changed:
            if not self._stopped:
                self._fail(_FIRST, 0, failure)
                self._given_up.set()

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

    def _do(self, taken: _Taken) -> None:
        try:
            self._finish(taken, taken.item.work())
        except GivenUpError:
            return  # what ended the run is told elsewhere
        except BaseException as failure:  # noqa: BLE001  (as above)
            self._fail(taken.running.assigned.order, taken.number, failure)

    def _take(self) -> _Taken | None:
        """The next item that fits, once there is one; None when there is nothing more to do."""
        with self._changed:
            while not self._stopped:
                try:
                    taken = self._find()
                except BaseException as failure:  # noqa: BLE001  (as above: a program's own)
                    self._fail(self._running[-1].assigned.order if self._running else 0, 0, failure)
                    break
                if taken is not None:
                    self._in_use += taken.item.memory
                    self._open += 1
                    return taken
                if not self._running and self._next is None:
                    break
                self._changed.wait()
            self._changed.notify_all()
            return None

    def _find(self) -> _Taken | None:
        place = 0
        while True:
            if place == len(self._running) and not self._begin():
                return None
            running = self._running[place]
            item = self._item_of(running)
            if item is None:
                if running.open == 0:
                    self._advance(running)  # to its next step, or out of the list
                else:
                    place += 1
            elif self._open and self._in_use + item.memory > self._memory:
                return None
            else:
                running.waiting = None
                running.open += 1
                running.begun += 1
                return _Taken(running, running.begun - 1, item)

    def _item_of(self, running: _Running) -> Item | None:
        """The item that the program's step hands out next; what is known already is passed over."""
        while running.waiting is None:
            item = next(running.step, None)
            if item is None:
                return None
            if item.key and self._register.known(f"{running.assigned.key}.{item.key}"):
                continue
            running.waiting = item
        return running.waiting

    def _begin(self) -> bool:
        """Take up the next program, if there is one and what it holds fits."""
        self._next = self._next or next(self._programs, None)
        if self._next is None:
            return False
        assigned = self._next
        if self._running and self._in_use + assigned.held > self._memory:
            return False
        self._next = None
        self._in_use += assigned.held
        running = _Running(assigned)
        self._running.append(running)
        self._advance(running, first=True)
        return True

    def _advance(self, running: _Running, *, first: bool = False) -> None:
        results = [running.results[number] for number in sorted(running.results)]
        running.results, running.begun = {}, 0
        try:
            step = next(running.assigned.program) if first else running.assigned.program.send(results)
        except StopIteration:
            self._running.remove(running)
            self._in_use -= running.assigned.held
            self._changed.notify_all()
        else:
            running.step = iter(step)

    def _finish(self, taken: _Taken, result: Any) -> None:  # noqa: ANN401
        running, item = taken.running, taken.item
        with self._changed:
            self._in_use -= item.memory
            self._open -= 1
            running.open -= 1
            if not item.key:
                running.results[taken.number] = result
            self._register.done(item, f"{running.assigned.key}.{item.key}", running.assigned.label, result)
            self._changed.notify_all()

    def _fail(self, order: int, number: int, failure: BaseException) -> None:
        self._stop()  # first, so that nobody waits for ever for somebody who has no memory left
        with self._changed:
            self._failures.append((order, number, failure))
