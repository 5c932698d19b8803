"""Forward passes that halt in front of every block of a model, so that blocks may run one at a time.

The forward code of a model stays what drives it: each batch runs in a thread of its own, which waits where a
block would begin until somebody gives it the outputs of that block. Owns these threads, and where hidden
states stay meanwhile. Knows no sums and no weights.
"""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any, Self

import torch
from msgspec import Struct
from torch.utils._pytree import tree_leaves

from sparseprune.errors import SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

_here = threading.local()  # `.run` is the run of this thread, if it is one of a run


class _DroppedError(BaseException):
    """Ends the forward pass of a run that nobody waits for."""


class Run:
    """One forward pass; `at` is the block in front of which it halts, None once it has ended.

    Blocks get `args` and `kwargs`. Only one of a run and its caller is at work at any time.
    """

    def __init__(self, forward: Callable[[], Any]) -> None:
        self.at: str | None = None
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.result: Any = None
        self._forward: Callable[[], Any] | None = forward
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._out: Any = None
        self._failure: BaseException | None = None
        self._dropped = False
        self._has_gradients = torch.is_grad_enabled()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._step()

    @property
    def ended(self) -> bool:
        """Whether the pass is through."""
        return self._forward is None

    def go(self, outputs: Any) -> None:
        """Give the outputs of the block that it halts at; it halts at the next one, or ends."""
        self.args, self.kwargs, self._out = (), {}, outputs
        del outputs
        self._step()

    def drop(self) -> None:
        """End the pass where it is."""
        if not self.ended:
            self._dropped = True
            self._mine.release()
            self._theirs.acquire()

    def reach(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the thread of the run: halt in front of a block; returns its outputs."""
        self.at, self.args, self.kwargs = name, args, kwargs
        del args, kwargs
        self._theirs.release()
        self._mine.acquire()
        if self._dropped:
            raise _DroppedError
        outputs, self._out = self._out, None
        return outputs

    def _step(self) -> None:
        self._mine.release()
        self._theirs.acquire()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _work(self) -> None:
        _here.run = self
        self._mine.acquire()
        try:
            with torch.set_grad_enabled(self._has_gradients):
                forward = self._forward
                self.result = None if forward is None or self._dropped else forward()
        except _DroppedError:
            pass
        except BaseException as failure:  # noqa: BLE001  (raised in the thread that waits)
            self._failure = failure
        self.at, self.args, self.kwargs, self._forward = None, (), {}, None
        self._theirs.release()


def halting(name: str, block: torch.nn.Module) -> None:
    """Let every run halt in front of this block; calls from other threads go through."""
    real = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        run: Run | None = getattr(_here, "run", None)
        return real(*args, **kwargs) if run is None else run.reach(name, args, kwargs)

    block.forward = forward


class _Place(Struct, frozen=True, eq=False):
    """Where the bytes of a storage are while they are not in it."""

    storage: torch.UntypedStorage
    nbytes: int
    offset: int
    host: Tensor | None = None


class Parking:
    """Where hidden states wait: in memory up to `room` bytes, then in files of a folder.

    Those of a CUDA device wait in pinned memory of the host. What several runs have, and what is one of the
    tensors of the model, stays where it is.
    """

    def __init__(self, folder: Path, room: int, model: Iterable[Tensor] = ()) -> None:
        self._folder = folder
        self._room = room
        self._used = 0
        self._common = {_id_of(one.untyped_storage()) for one in model if not one.is_meta}
        self._kept: dict[Run, int] = {}  # bytes in memory
        self._parked: dict[Run, list[_Place]] = {}
        self._numbers: dict[Run, int] = {}

    def park(self, run: Run) -> None:
        """Put what a run has for its block aside, if there is no room for it."""
        storages = self._storages(run)
        on_device = any(one.device.type != "cpu" for one in storages)
        nbytes = sum(one.nbytes() for one in storages)
        if not on_device and self._used + nbytes <= self._room:
            self._kept[run] = nbytes
            self._used += nbytes
            return
        places, offset = [], 0
        with self._file(run).open("wb") as file:
            for storage in storages:
                count = storage.nbytes()
                if storage.device.type == "cpu":
                    file.write(_memory_of(storage))
                    places.append(_Place(storage, count, offset))
                    offset += count
                else:
                    host = torch.empty(count, dtype=torch.uint8, pin_memory=True)
                    host.copy_(_bytes_of(storage))
                    places.append(_Place(storage, count, 0, host))
        for place in places:
            place.storage.resize_(0)
        self._parked[run] = places

    def fetch(self, run: Run) -> None:
        """Bring what was put aside back."""
        self._used -= self._kept.pop(run, 0)
        places = self._parked.pop(run, [])
        if not places:
            return
        with self._file(run).open("rb") as file:
            for place in places:
                place.storage.resize_(place.nbytes)
                if place.host is not None:
                    _bytes_of(place.storage).copy_(place.host)
                else:
                    file.seek(place.offset)
                    file.readinto(_memory_of(place.storage))

    def _storages(self, run: Run) -> list[torch.UntypedStorage]:
        """What a run alone has for its block."""
        found: dict[int, torch.UntypedStorage] = {}
        for one in tree_leaves((run.args, run.kwargs)):
            if not isinstance(one, torch.Tensor) or not one.numel() or one.is_meta:
                continue
            storage = one.untyped_storage()
            key = _id_of(storage)
            if not storage.nbytes():  # another run has it, too
                owner = next(
                    run
                    for run, places in self._parked.items()
                    for place in places
                    if _id_of(place.storage) == key
                )
                self._common.add(key)
                self.fetch(owner)
                self.park(owner)
            if key not in self._common:
                found[key] = storage
        return list(found.values())

    def _file(self, run: Run) -> Path:
        number = self._numbers.setdefault(run, len(self._numbers))
        return self._folder / f"states{id(self)}.{number}"


def _id_of(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001  (its address changes where its memory does)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _memory_of(storage: torch.UntypedStorage) -> Any:
    """The bytes of a storage on the host; numpy arrays of it would keep it from being resized."""
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


class Stream:
    """All batches of a text on their way through one model, halted in front of one and the same block.

    A context manager: leaving it drops all runs.
    """

    def __init__(self, forwards: Iterable[Callable[[], Any]], parking: Parking) -> None:
        self._parking = parking
        self._runs: list[Run] = []
        try:
            for forward in forwards:
                self._runs.append(Run(forward))
                parking.park(self._runs[-1])
        except BaseException:
            self.drop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def at(self) -> str | None:
        """The block in front of which all runs halt; None once all have ended."""
        places = {run.at for run in self._runs}
        if len(places) > 1:
            raise SparsepruneError(
                f"some sequences meet {min(map(str, places))} where others meet {max(map(str, places))}: a "
                "model that runs other layers for other texts cannot be run layer by layer"
            )
        return next(iter(places), None)

    def given(self, batch: int) -> Run:
        """The run of a batch, with what its block gets in memory; give it outputs, or `keep` it."""
        run = self._runs[batch]
        self._parking.fetch(run)
        return run

    def keep(self, batch: int) -> None:
        """Nothing more is wanted of a batch for now."""
        self._parking.park(self._runs[batch])

    def go(self, batch: int, outputs: Any) -> None:
        """Let a batch go on with the outputs of its block."""
        self._runs[batch].go(outputs)
        del outputs
        self._parking.park(self._runs[batch])

    def result(self, batch: int) -> Any:
        """What the forward pass of a batch gave, which is then forgotten."""
        run = self._runs[batch]
        found, run.result = run.result, None
        return found

    def drop(self) -> None:
        """End all runs."""
        for run in self._runs:
            run.drop()


def outputs_of(block: torch.nn.Module, run: Run) -> Any:
    """The outputs of the block in front of which a run halts."""
    return block(*run.args, **run.kwargs)
