"""Bytes of files in a store: large reads as ranges side by side, small ones from blocks, and blocks ahead.

Owns which ranges are asked for, and the memory for them, which is bounded. Knows a tensor by its place in the
content of a file. Called by source.py; errors are OSErrors.
"""

from __future__ import annotations

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
_TENSORS = 64  # of which it is known how far they were read
_NEAR = BLOCK * _SIDE_BY_SIDE  # several threads read one tensor on, not quite in order


class RemoteTensor(Struct, frozen=True):
    """A tensor in a file of a store: the bytes [begin, end) of the content with this ETag."""

    path: RemotePath
    etag: str
    begin: int
    end: int

    def fill(self, offset: int, view: memoryview) -> None:
        """Fills a buffer from a byte of the tensor on; OSError of ESTALE where the file has changed."""
        self.path.fill(self.begin + offset, view, self.etag)

    def size_of(self, number: int) -> int:
        """Bytes of a block; all but the last are equally large."""
        return min(self.end - self.begin - number * BLOCK, BLOCK)

    def block(self, number: int) -> memoryview:
        data = memoryview(bytearray(self.size_of(number)))
        self.fill(number * BLOCK, data)
        return data


@dataclass(slots=True)
class _Kept:
    data: Future[memoryview]
    unread: int  # bytes


class ReadAhead:
    """Reads tensors in stores, from any thread, with at most 64 MiB for what is kept or on its way.

    A read at the beginning of a tensor, or near the end of another read, is served from blocks, and further
    blocks of the tensor are read ahead; any other one gets just its own bytes. Which tensor comes next is not
    known here. After `close` nothing is kept or read ahead.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._kept: OrderedDict[tuple[RemoteTensor, int], _Kept] = OrderedDict()
        self._ends: OrderedDict[RemoteTensor, int] = OrderedDict()  # how far tensors were read, the last last
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

    def read_into(self, tensor: RemoteTensor, offset: int, view: memoryview) -> None:
        """Fills a buffer with bytes of a tensor from `offset` on."""
        if not view:
            return
        goes_on = self._goes_on(tensor, offset, offset + len(view))
        direct: list[Future[None]] = []
        blocks: list[tuple[_Kept, int, memoryview]] = []
        for begin, end in _pieces(offset, offset + len(view)):
            piece, number = view[begin - offset : end - offset], begin // BLOCK
            is_whole = end - begin == tensor.size_of(number)
            kept = self._block(tensor, number, end - begin, make=goes_on and not is_whole)
            if kept is None:
                direct.append(self._submitted(partial(tensor.fill, begin, piece)))
            else:
                blocks.append((kept, begin - number * BLOCK, piece))
        if goes_on:
            self._read_ahead(tensor)
        for kept, begin, piece in blocks:
            piece[:] = kept.data.result()[begin : begin + len(piece)]
        for one in direct:
            one.result()

    def _goes_on(self, tensor: RemoteTensor, begin: int, end: int) -> bool:
        """Whether a read goes on where another one ended, or begins; notes where it ends itself."""
        with self._lock:
            before = self._ends.pop(tensor, 0)
            goes_on = begin == 0 or -_NEAR <= begin - before <= BLOCK
            self._ends[tensor] = max(end, before) if goes_on and begin > 0 else end
            while len(self._ends) > _TENSORS:
                self._ends.popitem(last=False)
        return goes_on

    def _block(self, tensor: RemoteTensor, number: int, taken: int, *, make: bool) -> _Kept | None:
        """A kept block of which bytes are taken, or a new one if `make`; the oldest one makes room."""
        with self._lock:
            kept = self._kept.get((tensor, number))
            if kept is not None and kept.data.done() and kept.data.exception() is not None:
                del self._kept[tensor, number]  # what failed ahead is asked for again
                kept = None
            if kept is None and make and not self._closed:
                if len(self._kept) >= _KEPT:
                    self._kept.popitem(last=False)
                kept = self._new_block(tensor, number)
            if kept is not None:
                kept.unread -= taken
                if kept.unread <= 0:
                    self._kept.pop((tensor, number), None)
                else:
                    self._kept.move_to_end((tensor, number))
            return kept

    def _read_ahead(self, tensor: RemoteTensor) -> None:
        with self._lock:
            first = -(-self._ends.get(tensor, tensor.end) // BLOCK)
            last = min(first + _AHEAD, -(-(tensor.end - tensor.begin) // BLOCK))
            for number in range(first, last):
                if self._closed or len(self._kept) >= _KEPT:
                    break
                if (tensor, number) not in self._kept:
                    self._new_block(tensor, number)

    def _new_block(self, tensor: RemoteTensor, number: int) -> _Kept:
        kept = _Kept(self._workers().submit(tensor.block, number), tensor.size_of(number))
        self._kept[tensor, number] = kept
        return kept

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
