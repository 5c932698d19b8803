"""Devices: what CUDA needs and the CPU does not: free memory, streams, pinned buffers, a second try.

Owns every call of torch.cuda; knows neither scopes nor files. On the CPU the same functions copy nothing and
wait for nobody. Imports torch where a device is used, so that schedules are made without it.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Host = NDArray[Any]

One = TypeVar("One")
Piece = TypeVar("Piece")

LANES = 3  # streams of a device: one copies to it, one computes, one copies back
_DRIVERS = ("libcuda.so.1", "nvcuda.dll")
_SHARE = 0.9  # of the memory that is free: allocators need room between what they give


def count_devices() -> int:
    """How many CUDA devices torch can use; torch is not asked where there is no driver."""
    if not any(map(_loads, _DRIVERS)):
        return 0
    import torch  # noqa: PLC0415  (importing it takes longer than most runs)

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_bytes(device: str) -> int | None:
    """About how many bytes of a device, `cuda` or `cuda:N`, are free: a power of two; None if it is absent.

    Rounded down, so that a run that is continued finds the same number though a little more or less is free.
    """
    name, _, number = device.partition(":")
    if name != "cuda" or not (number or "0").isdecimal() or int(number or 0) >= count_devices():
        return None
    import torch  # noqa: PLC0415  (as above)

    free, _ = torch.cuda.mem_get_info(device)
    return power_of_two_within(int(_SHARE * free))


def power_of_two_within(number: int) -> int:
    """The largest power of two that is not above a number of 1 or more."""
    return 1 << max(0, number.bit_length() - 1)


class Lanes:
    """Lets up to `LANES` threads work on a device, each on a stream, as long as its `room` has their bytes.

    One that needs more than there is works alone. On the CPU nobody waits.
    """

    def __init__(self, room: int | None = None) -> None:
        self.room = room
        self._changed = threading.Condition()
        self._streams: list[AbstractContextManager[object] | None] = [None] * LANES
        self._open = 0
        self._in_use = 0

    @contextmanager
    def lane(self, device: str, nbytes: int) -> Iterator[None]:
        """A stream of the device, and so many bytes of its memory, until the end of the context."""
        if device == "cpu":
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._has_room(nbytes))
            stream = self._streams.pop()
            self._open, self._in_use = self._open + 1, self._in_use + nbytes
        try:
            if stream is None:
                stream = stream_context(device)
            with stream:
                yield
        finally:
            with self._changed:
                self._streams.append(stream)
                self._open, self._in_use = self._open - 1, self._in_use - nbytes
                self._changed.notify_all()

    def _has_room(self, nbytes: int) -> bool:
        fits = self.room is None or self._in_use + nbytes <= self.room
        return bool(self._streams) and (fits or not self._open)


def stream_context(device: str) -> AbstractContextManager[object]:
    """A context in which work is put on a new stream of a device; it may be entered again and again."""
    import torch  # noqa: PLC0415  (as above)

    return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def buffers_for(device: str) -> Callable[[int, np.dtype[Any]], Host] | None:
    """How to get memory of the host that a device copies from and to while the CPU goes on; None for any."""
    return None if device == "cpu" else _pinned


def _pinned(numel: int, dtype: np.dtype[Any]) -> Host:
    import torch  # noqa: PLC0415  (as above)

    raw: Host = torch.empty(numel * dtype.itemsize, dtype=torch.uint8, pin_memory=True).numpy()
    return raw.view(dtype)


def uploaded(array: Host, device: str) -> Tensor:
    """An array of the host on a device: on the CPU the same memory, else a copy that is on its way."""
    import torch  # noqa: PLC0415  (as above)

    # The allocator of pinned memory knows which copies read a buffer, and gives it to nobody before they end.
    return torch.from_numpy(array).to(device, non_blocking=True)


def downloaded(tensors: Sequence[Tensor], device: str, into: Mapping[int, Host] | None = None) -> list[Host]:
    """Contiguous tensors of a device as arrays of the host, waited for once.

    `into` has, by the place of a tensor, memory of the host for it; on the CPU an array shares the tensor's.
    """
    if device == "cpu":
        return [tensor.numpy() for tensor in tensors]
    import torch  # noqa: PLC0415  (as above)

    arrays = []
    for place, tensor in enumerate(tensors):
        array = (into or {}).get(place)
        if array is None:
            array = _pinned(tensor.numel(), _numpy_dtype(tensor)).reshape(tensor.shape)
        torch.from_numpy(array).copy_(tensor, non_blocking=True)
        arrays.append(array)
    wait_for(device)
    return arrays


def wait_for(device: str) -> None:
    """Until all is done that this thread put on its stream of a device."""
    import torch  # noqa: PLC0415  (as above)

    torch.cuda.current_stream(device).synchronize()


def _numpy_dtype(tensor: Tensor) -> np.dtype[Any]:
    empty: Host = tensor.new_empty(0, device="cpu").numpy()
    return empty.dtype


def in_smaller_parts(
    work: Callable[[Piece], list[One]], piece: Piece, halves: Callable[[Piece], Sequence[Piece]]
) -> list[One]:
    """What `work` gives for a piece, or for its halves one after the other where the device has no room.

    Raises:
        MachineError: there is no room for a piece that has no halves.
    """
    try:
        return work(piece)
    except RuntimeError as error:
        if not _is_full(error):
            raise
        smaller = halves(piece)
        if len(smaller) < 2:
            text = "the device has too little free memory for what must be decided together"
            raise MachineError(f"{text}: free some of it, or say --device cpu") from error
    _give_back()  # here, where the error no longer holds the tensors of its frames
    return [one for part in smaller for one in in_smaller_parts(work, part, halves)]


def _is_full(error: RuntimeError) -> bool:
    import torch  # noqa: PLC0415  (as above)

    return isinstance(error, torch.OutOfMemoryError)


def _give_back() -> None:
    """Let the device have the memory that its allocator keeps for tensors to come."""
    import torch  # noqa: PLC0415  (as above)

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
