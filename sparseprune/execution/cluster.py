"""A Ray cluster while a run lasts: joined or started, its machines, and one function that spreads work.

The only module that imports ray, which it does when a cluster is entered. Knows no pass, no checkpoint and no
output. Work is a function that machines can import, its batches are plain data; what a machine took with it
is done again elsewhere, an error of the work itself never. Called by runners, and by what calibrates.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from msgspec import Struct

from sparseprune.errors import MachineError, SparsepruneError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
    from types import ModuleType

Batch = TypeVar("Batch")
Result = TypeVar("Result")

_TRIES = 4  # of a batch whose machine or process is lost: once, and three times elsewhere
_POLL = 0.2  # seconds between looks at signals
_UNHEARD = 4  # results of a batch that wait to be heard: then its machine waits, too
_ALONE = 30.0  # seconds without news until it is asked whether any machine is left; one may be on its way
_PATIENCE = 5.0  # seconds for batches before one that failed: the first failure in their order is raised
_ANSWER = 5.0  # seconds in which the machine at an address has to answer
_STORE = 1 << 28  # bytes of shared memory of a cluster that is started here: what passes between machines
_LOCAL = "local"  # the address of a cluster that is started here, also in RAY_ADDRESS
_QUIET = {"log_to_driver": False, "logging_level": logging.CRITICAL}
_KEEPALIVE = 10_000  # milliseconds: a machine that says nothing for longer is lost (five minutes by default)
# Read once, when ray is imported.
_SETTINGS = {
    "RAY_grpc_client_keepalive_time_ms": str(_KEEPALIVE),
    "RAY_grpc_client_keepalive_timeout_ms": str(_KEEPALIVE),
    "RAY_grpc_keepalive_time_ms": str(_KEEPALIVE),
    "RAY_grpc_keepalive_timeout_ms": str(_KEEPALIVE),
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning of a change in versions to come
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Node(Struct, frozen=True):
    """A machine of the cluster that does work: its identity there, its name, its CPUs and GPUs."""

    number: str
    name: str
    cpus: int
    gpus: int = 0


class Shared(Generic[Result]):
    """A value that is sent once to each machine that asks for it; picklable, for batches."""

    def __init__(self, reference: Any) -> None:  # noqa: ANN401  (a type of ray's)
        self._reference = reference

    def get(self) -> Result:
        """The value; each process makes it of its bytes once. Not to be changed."""
        found: Result = _fetched(self._reference)
        return found


class Cluster:
    """Machines that share the work of one run, at an address of `--on`; a context manager.

    `auto` is the cluster that runs here or that RAY_ADDRESS names; where there is none, or RAY_ADDRESS is
    `local`, one that is started on this machine with `jobs` CPUs and ends with the run. `nodes` are the
    machines that have CPUs, with at most `jobs` of them each. Where the process has joined a cluster already,
    that one is used, and left as it is.

    Raises:
        SparsepruneError: ray is not installed, or the address is none that can be joined.
        MachineError: there is no cluster at the address, or no machine in it.
    """

    def __init__(self, address: str, jobs: int | None = None) -> None:
        check_address(address)
        self.address = address
        self.nodes: tuple[Node, ...] = ()
        self._jobs = jobs
        self._ours = False

    @property
    def cpus(self) -> int:
        """CPUs of all machines."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> int:
        """GPUs of all machines."""
        return sum(node.gpus for node in self.nodes)

    def __enter__(self) -> Self:
        self._ray = _ray()
        if self._ray.is_initialized():
            joined = self._ray.get_runtime_context().gcs_address
            if self.address not in {"auto", joined}:
                raise SparsepruneError(
                    f"--on {self.address}: this process has joined the cluster at {joined}"
                )
        else:
            with _own_signals():
                self._join()
            self._ours = True
            _keep_off_stdout(self._ray)
        try:
            self.nodes = self._found()
        except BaseException:
            self._leave()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def share(self, value: Result) -> Shared[Result]:
        """A value for many batches."""
        return Shared(self._ray.put(value))

    def on_each(self, work: Callable[..., Result], *arguments: object) -> Mapping[Node, Result]:
        """What `work` gives on each machine, all at one time; MachineError where one of them is lost."""
        affinity = _affinity()
        remote = self._ray.remote(work)
        asked = {
            node: remote.options(
                num_cpus=0, max_retries=1, scheduling_strategy=affinity(node.number, soft=False)
            ).remote(*arguments)
            for node in self.nodes
        }
        found = {}
        for node, reference in asked.items():
            try:
                found[node] = self._get(reference)
            except self._ray.exceptions.RayError as error:
                raise MachineError(
                    f"{node.name}: {_lost_text(error)}; start it again, or leave it out"
                ) from error
        return found

    def run(
        self,
        work: Callable[[Batch], Result],
        batches: Iterable[Batch | None],
        *,
        cpus: int = 1,
        gpus: int = 0,
    ) -> Generator[tuple[int, Result], None, None]:
        """What `work` gives for each batch, with the batch's number, as they come; see `stream`.

        Batches begin in their order: the largest first is best. They are asked for as machines are free.
        """
        done: set[int] = set()
        sent: dict[int, tuple[Callable[[Batch], Result], Batch]] = {}

        def numbered() -> Iterator[tuple[Callable[[Batch], Result], Batch] | None]:
            for number, batch in enumerate(batches):
                if batch is not None:
                    sent[number] = (work, batch)
                yield sent.get(number)

        for number, result in self.stream(_once, numbered(), sent.get, cpus=cpus, gpus=gpus):
            if number not in done:
                done.add(number)
                del sent[number]
                yield number, result

    def stream(
        self,
        work: Callable[[Batch], Iterator[Result]],
        batches: Iterable[Batch | None],
        again: Callable[[int], Batch | None],
        *,
        cpus: int = 1,
        gpus: int = 0,
    ) -> Generator[tuple[int, Result], None, None]:
        """All that `work` yields for each batch, with the batch's number, as it comes.

        A batch takes so many CPUs and GPUs of one machine. Where that is lost, `again` says what is to be
        done elsewhere, three times at the most; None for nothing. A batch that is None says that there is
        none until something has come; where nothing is at work then, all is done.

        After an error of the work itself nothing new is begun, and the first error in the order of batches is
        raised. Where the iterator is closed, by a signal for example, what is at work ends at once.

        Raises:
            MachineError: a batch was lost four times.
        """
        slots = max(
            1, sum(min(node.cpus // cpus, node.gpus // gpus if gpus else node.cpus) for node in self.nodes)
        )
        options = {"num_cpus": cpus, "num_gpus": gpus, "num_returns": "streaming", "max_retries": 0}
        options["_generator_backpressure_num_objects"] = _UNHEARD
        remote = self._ray.remote(work).options(**options, scheduling_strategy="SPREAD")
        flight = _Flight(self._ray, remote.remote, again, lambda: self._has(cpus, gpus))
        waiting = enumerate(batches)
        try:
            while True:
                while len(flight) < slots and not flight.failed:
                    number, batch = next(waiting, (0, None))
                    if batch is None:
                        break
                    flight.begin(number, batch)
                if not len(flight) or flight.is_over():
                    break
                yield from flight.landed()
        finally:
            flight.cancel()
        flight.raise_first()

    def _get(self, reference: Any) -> Any:  # noqa: ANN401
        """A result, or the error that the work raised; waits in steps, so that signals are heard."""
        while not self._ray.wait([reference], timeout=_POLL)[0]:
            pass
        return _result(self._ray, reference)

    def _join(self) -> None:
        named = os.environ.get("RAY_ADDRESS") if self.address == "auto" else self.address
        if named != _LOCAL:
            try:
                if named is not None:
                    _refuse_silent(named)
                self._ray.init(address=self.address, **_QUIET)
            except (OSError, RuntimeError, ValueError) as error:
                if named is not None:
                    raise MachineError(
                        f"--on {self.address}: there is no cluster at {named}: {_first_line(error)}; "
                        "`ray start --head` begins one"
                    ) from error
            else:
                return
        cpus = {} if self._jobs is None else {"num_cpus": self._jobs}
        with _failing(self.address):
            self._ray.init(
                address=_LOCAL, include_dashboard=False, object_store_memory=_STORE, **cpus, **_QUIET
            )

    def _found(self) -> tuple[Node, ...]:
        nodes = []
        for one in self._ray.nodes():
            has = one["Resources"]
            cpus = int(has.get("CPU", 0))
            if one["Alive"] and cpus:
                most = cpus if self._jobs is None else min(cpus, self._jobs)
                nodes.append(Node(one["NodeID"], one["NodeName"], most, int(has.get("GPU", 0))))
        if not nodes:
            raise MachineError(f"--on {self.address}: no machine of this cluster has a CPU for work")
        return tuple(nodes)

    def _has(self, cpus: int, gpus: int) -> bool:
        """Whether some machine that is alive has so much, free or not."""
        alive = [one["Resources"] for one in self._ray.nodes() if one["Alive"]]
        return any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in alive)

    def _leave(self) -> None:
        if self._ours:
            self._ours = False
            self._ray.shutdown()


class _Flight:
    """Batches that are at work, each with its number and how often it was begun."""

    def __init__(
        self,
        ray: ModuleType,
        begin: Callable[[Any], Any],
        again: Callable[[int], Any],
        can_go_on: Callable[[], bool],
    ) -> None:
        self._ray, self._remote, self._again, self._can_go_on = ray, begin, again, can_go_on
        self._numbers: dict[Any, int] = {}
        self._tries: dict[int, int] = {}
        self._failures: dict[int, BaseException] = {}
        self._failed_at = 0.0
        self._heard_at = time.monotonic()

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def failed(self) -> bool:
        """Whether some batch raised an error."""
        return bool(self._failures)

    def begin(self, number: int, batch: object) -> None:
        self._tries[number] = self._tries.get(number, 0) + 1
        self._numbers[self._remote(batch)] = number

    def is_over(self) -> bool:
        """Whether the error to raise is known: none can come before it, or it was waited for long enough."""
        if not self._failures:
            return False
        first = min(self._failures)
        return min(self._numbers.values()) > first or time.monotonic() > self._failed_at + _PATIENCE

    def landed(self) -> Iterator[tuple[int, Any]]:
        """What has come by now; waits a moment for it."""
        ready, _ = self._ray.wait(list(self._numbers), num_returns=1, timeout=_POLL, fetch_local=False)
        now = time.monotonic()
        if ready:
            self._heard_at = now
        elif now > self._heard_at + _ALONE:
            if not self._can_go_on():
                raise MachineError("no machine of the cluster is left for the work; start one again")
            self._heard_at = now
        for generator in ready:
            number = self._numbers[generator]
            try:
                result = _result(self._ray, next(generator))
            except StopIteration:
                del self._numbers[generator]
            except self._ray.exceptions.RayError as error:
                del self._numbers[generator]
                self._lost(number, error)
            except Exception as error:  # noqa: BLE001  (raised by `raise_first`)
                del self._numbers[generator]
                self._fail(number, error)
            else:
                yield number, result

    def cancel(self) -> None:
        """End what is at work, now."""
        for generator in self._numbers:
            with suppress(Exception):
                self._ray.cancel(generator, force=True)
        self._numbers.clear()

    def raise_first(self) -> None:
        if self._failures:
            raise self._failures[min(self._failures)]

    def _lost(self, number: int, error: Exception) -> None:
        rest = self._again(number)
        if rest is None:
            return
        if self._tries[number] < _TRIES:
            self.begin(number, rest)
            return
        self._fail(
            number,
            MachineError(
                f"a part of the work was lost {_TRIES} times, the last time so: {_lost_text(error)}"
            ),
        )

    def _fail(self, number: int, failure: BaseException) -> None:
        self._failed_at = self._failed_at or time.monotonic()
        self._failures[number] = failure


def check_address(address: str) -> None:
    """SparsepruneError unless an address is `auto` or HOST:PORT, and ray is there."""
    if address.startswith("ray://"):
        raise SparsepruneError(
            f"--on {address}: Ray's client is not meant for long runs; run this command on a machine of the "
            "cluster with --on auto, or through `ray job submit`"
        )
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal()):
        raise SparsepruneError(f"--on {address}: wanted auto or HOST:PORT, such as 10.0.0.1:6379")
    _ray()


def _refuse_silent(address: str) -> None:
    """OSError where nothing listens at HOST:PORT: Ray would wait for minutes, and say so again and again."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()


def _ray() -> ModuleType:
    """The module, imported with our settings."""
    if "ray" not in sys.modules:
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
    try:
        import ray  # noqa: PLC0415  (half a second, and an extra)
    except ImportError as error:
        raise SparsepruneError(
            "--on: needs Ray, which is not installed: pip install 'sparseprune[ray]'"
        ) from error
    return ray


def _affinity() -> Any:  # noqa: ANN401  (a type of ray's)
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415  (as above)

    return NodeAffinitySchedulingStrategy


def _keep_off_stdout(ray: ModuleType) -> None:
    """Let ray not say on stdout, which has results, that a worker died: who waits for it says so."""
    worker = ray._private.worker  # noqa: SLF001  (there is no public way)
    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *_, **__: None


@lru_cache(maxsize=64)
def _fetched(reference: Any) -> Any:  # noqa: ANN401
    """A shared value: of one run, since processes that work on a cluster belong to one run."""
    return _ray().get(reference)


def _once(batch: tuple[Callable[[Batch], Result], Batch]) -> Iterator[Result]:
    work, one = batch
    yield work(one)


def _result(ray: ModuleType, reference: Any) -> Any:  # noqa: ANN401
    """A value that has come, or the error of the work: ours as it is, another one with its traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, Exception) or isinstance(cause, ray.exceptions.RayError):
            raise
        if not isinstance(cause, SparsepruneError) and not is_out_of_memory(cause):
            cause.add_note(str(error))
        raise cause from None


def _lost_text(error: Exception) -> str:
    """Why a machine or a process of it is lost, in a line."""
    if type(error).__name__ == "OutOfMemoryError":
        return "its machine ran out of memory; give a smaller --memory or -j"
    return f"a machine or its worker ended ({_first_line(error)})"


def _first_line(error: BaseException) -> str:
    text = (isinstance(error, OSError) and error.strerror) or str(error)
    return text.strip().partition("\n")[0].strip().rstrip(".") or type(error).__name__


@contextmanager
def _failing(address: str) -> Iterator[None]:
    try:
        yield
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise MachineError(f"--on {address}: no cluster could be started: {_first_line(error)}") from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself; who had it before has it again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
