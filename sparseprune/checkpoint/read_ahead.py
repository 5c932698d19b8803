"""Bytes of files in a store: large reads as ranges side by side, small ones from blocks, and blocks ahead.

Owns which ranges are asked for, and the memory for them, which is bounded. Knows a file by its address, size
and ETag, and no tensors. Called by source.py and file_io.py; errors are OSErrors.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Self

from msgspec import Struct

if TYPE_CHECKING:
    from sparseprune.checkpoint.remote import RemotePath

BLOCK = 4 << 20
"""Bytes of most requests: a request costs 20 to 50 ms, as long as it takes to carry some megabytes."""
_SIDE_BY_SIDE = 8  # requests at a time: so many blocks are on their way, at most
_KEPT = 8  # blocks that are kept, or on their way to be kept
_AHEAD = 4  # blocks
_PLACES = 32  # at which files are read on
_NEAR = BLOCK * _SIDE_BY_SIDE  # of a place: several threads read one file on, not quite in order


class RemoteFile(Struct, frozen=True):
    """A file in a store with the content that is wanted."""

    path: RemotePath
    nbytes: int
    etag: str

    def part(self, begin: int, end: int) -> memoryview:
        """Bytes of the file; OSError of ESTALE where it has changed or become shorter."""
        data = self.path.read_part(begin, end, self.etag)
        if len(data) != end - begin:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(self.path))
        return data


@dataclass(slots=True)
class _Kept:
    data: Future[memoryview]
    unread: int  # bytes


class ReadAhead:
    """Reads files in stores, from any thread, with at most 64 MiB for what is kept or on its way.

    A read that goes on where another one ended, or near it, is served from blocks, and further blocks are
    read ahead; one that does not gets just its own bytes. After `close` nothing is kept or read ahead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[RemoteFile, int], _Kept] = OrderedDict()
        self._places: OrderedDict[tuple[RemoteFile, int], None] = OrderedDict()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops what is kept; reads under way end well."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
            self._kept.clear()
        if pool is not None:
            pool.shutdown(wait=False)

    def read_into(self, file: RemoteFile, offset: int, view: memoryview) -> None:
        """Fills a buffer of bytes from `offset` on."""
        if not view:
            return
        goes_on = self._goes_on(file, offset, offset + len(view))
        parts: list[Future[None] | tuple[_Kept, int, memoryview]] = []
        for begin, end in _pieces(offset, offset + len(view)):
            piece = view[begin - offset : end - offset]
            number = begin // BLOCK
            whole = end - begin == min(BLOCK, file.nbytes - number * BLOCK)
            kept = self._block(file, number, end - begin, make=goes_on and not whole)
            if kept is None:
                parts.append(self._submitted(partial(_fill, file, begin, piece)))
            else:
                parts.append((kept, begin - number * BLOCK, piece))
        if goes_on:
            self._read_ahead(file, offset + len(view))
        for part in parts:
            if isinstance(part, tuple):
                kept, begin, piece = part
                piece[:] = kept.data.result()[begin : begin + len(piece)]
            else:
                part.result()

    def _goes_on(self, file: RemoteFile, begin: int, end: int) -> bool:
        """Whether a read goes on where another one ended; notes where it ends itself."""
        with self._lock:
            near = [
                place
                for place in reversed(self._places)
                if place[0] == file and -_NEAR <= begin - place[1] <= BLOCK
            ]
            for place in near[:1]:
                del self._places[place]
            self._places[file, max([end, *(place[1] for place in near[:1])])] = None
            while len(self._places) > _PLACES:
                self._places.popitem(last=False)
        return bool(near)

    def _block(self, file: RemoteFile, number: int, taken: int, *, make: bool) -> _Kept | None:
        """A kept block of which bytes are taken, or a new one if `make`."""
        with self._lock:
            kept = self._kept.get((file, number))
            if kept is None and make and not self._closed:
                kept = self._new_block(file, number)
            if kept is not None:
                kept.unread -= taken
                if kept.unread <= 0 or (kept.data.done() and kept.data.exception() is not None):
                    self._kept.pop((file, number), None)
                else:
                    self._kept.move_to_end((file, number))
            return kept

    def _read_ahead(self, file: RemoteFile, end: int) -> None:
        first = -(-end // BLOCK)
        last = min(first + _AHEAD, -(-file.nbytes // BLOCK))
        with self._lock:
            for number in range(first, last):
                is_read = any(one == file and 0 < at - number * BLOCK <= _NEAR for one, at in self._places)
                if self._closed or is_read or (file, number) in self._kept:
                    continue
                if not self._has_room():
                    break
                self._new_block(file, number)

    def _new_block(self, file: RemoteFile, number: int) -> _Kept:
        self._has_room()
        begin, end = number * BLOCK, min(file.nbytes, (number + 1) * BLOCK)
        kept = _Kept(self._workers().submit(file.part, begin, end), end - begin)
        self._kept[file, number] = kept
        return kept

    def _has_room(self) -> bool:
        """Whether one more block may be kept: the oldest one that has arrived makes room."""
        if len(self._kept) >= _KEPT:
            arrived = next((place for place, kept in self._kept.items() if kept.data.done()), None)
            if arrived is None:
                return False
            del self._kept[arrived]
        return True

    def _submitted(self, work: partial[None]) -> Future[None]:
        with self._lock:
            if not self._closed:
                return self._workers().submit(work)
        done: Future[None] = Future()
        work()
        done.set_result(None)
        return done

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_SIDE_BY_SIDE, "read-ahead")
        return self._pool


def _pieces(begin: int, end: int) -> list[tuple[int, int]]:
    """A range, cut where blocks begin.

    >>> _pieces(BLOCK - 1, BLOCK + 1) == [(BLOCK - 1, BLOCK), (BLOCK, BLOCK + 1)]
    True
    """
    cuts = range((begin // BLOCK + 1) * BLOCK, end, BLOCK)
    return list(zip([begin, *cuts], [*cuts, end], strict=True))


def _fill(file: RemoteFile, begin: int, piece: memoryview) -> None:
    piece[:] = file.part(begin, begin + len(piece))
