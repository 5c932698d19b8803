"""Tensors that are kept for later: in memory up to a number of bytes, then in a file.

Owns which of them are views of the same memory, which is kept once, and the places in the file that are
free again. Called by sweeps.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from typing import TYPE_CHECKING, BinaryIO, Self

import torch
from msgspec import Struct
from torch.multiprocessing.reductions import StorageWeakRef

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


class _Place(Struct, eq=False):
    """Where the bytes of a storage are: in `memory`, else in the file from `offset` on."""

    nbytes: int
    device: torch.device
    memory: Tensor | None
    offset: int = 0
    users: int = 1


class Kept(Struct, frozen=True, eq=False):
    """A tensor that is kept: how it lies in the bytes at its place."""

    place: _Place
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Store:
    """Keeps copies of tensors in memory up to `room` bytes, then in a file of a folder; a context manager."""

    def __init__(self, folder: Path, room: int) -> None:
        self._path = folder / f"kept{id(self)}"
        self._room = room
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._file: BinaryIO | None = None
        # The references keep addresses from being used again.
        self._known: defaultdict[int, dict[int, tuple[StorageWeakRef, int, _Place]]] = defaultdict(dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            with closing(self._file):
                self._path.unlink(missing_ok=True)

    def keep(self, one: Tensor, batch: int | None) -> Kept:
        """Keep a tensor as it is now; tensors of one `batch` that share their memory share it here, too."""
        storage = one.untyped_storage()
        key, version = storage._cdata, one._version  # noqa: SLF001
        known = {} if batch is None else self._known[batch]
        found = known.get(key)
        if found is None or found[1] != version or not found[2].users:
            place = self._put(storage, one.device)
            known[key] = (StorageWeakRef(storage), version, place)  # type: ignore[no-untyped-call]
        else:
            place = found[2]
            place.users += 1
        return Kept(place, one.dtype, tuple(one.shape), one.stride(), int(one.storage_offset()))

    def load(self, kept: Kept) -> Tensor:
        """A new tensor that is as the kept one was."""
        place = kept.place
        data = torch.empty(place.nbytes, dtype=torch.uint8)
        if place.memory is not None:
            data.copy_(place.memory)
        elif self._file is not None:
            self._file.seek(place.offset)
            self._file.readinto(data.numpy().data)  # type: ignore[attr-defined]
        found = torch.empty(0, dtype=kept.dtype, device=place.device)
        storage = data.to(place.device).untyped_storage()
        return found.set_(storage, kept.offset, kept.size, kept.stride)

    def forget(self, kept: Kept) -> None:
        """A kept tensor is no longer wanted; its place is free once this holds for all that have it."""
        place = kept.place
        place.users -= 1
        if place.users:
            return
        if place.memory is not None:
            self._room += place.nbytes
            place.memory = None
        else:
            self._free[place.nbytes].append(place.offset)

    def _put(self, storage: torch.UntypedStorage, device: torch.device) -> _Place:
        nbytes = storage.nbytes()
        data = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        copy = data.clone() if device.type == "cpu" else data.cpu()
        if nbytes <= self._room:
            self._room -= nbytes
            return _Place(nbytes, device, copy)
        if self._file is None:
            self._file = self._path.open("w+b")
        free = self._free[nbytes]
        offset = free.pop() if free else self._end
        self._end = max(self._end, offset + nbytes)
        self._file.seek(offset)
        self._file.write(copy.numpy().data)
        return _Place(nbytes, device, None, offset)
