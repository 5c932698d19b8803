"""A file that is written in any order and read in its own: its parts, and which bytes of each are there.

Owns the places of a part's bytes: those that workers write, which wait in a temporary file without a name,
those that are copied from the input, and the header. Knows no object store. Called by uploads.py.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sparseprune.checkpoint import file_io
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint.layout import CopyRange, OutputFile

PART_BYTES = 6 << 20
MOST_PARTS = 10_000
"""Of one object, for every store."""


class Spool:
    """A temporary file without a name, in slots that are used again; for one caller at a time."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[int]] = defaultdict(list)
        self._descriptor = -1
        self._end = 0
        self.held = 0

    def take(self, nbytes: int) -> int:
        """The offset of a slot of so many bytes."""
        if self._descriptor < 0:
            with _waiting():
                descriptor, path = tempfile.mkstemp(prefix="sparseprune-")
                os.unlink(path)  # noqa: PTH108  (a str)
                self._descriptor = descriptor
        self.held += nbytes
        if self._free[nbytes]:
            return self._free[nbytes].pop()
        self._end += nbytes
        return self._end - nbytes

    def give(self, offset: int, nbytes: int) -> None:
        """A slot is free again."""
        self.held -= nbytes
        self._free[nbytes].append(offset)

    def write(self, data: memoryview, offset: int) -> None:
        """May be called from several threads, unlike the rest."""
        with _waiting():
            file_io.write_at(self._descriptor, data, offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """May be called from several threads, unlike the rest."""
        with _waiting():
            file_io.read_into(self._descriptor, buffer, offset)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir()
        raise MachineError(
            f"{folder}: cannot be written: {error.strerror or error}; what waits to be sent lies there; give "
            "another folder by TMPDIR"
        ) from error


class Intervals:
    """Ranges of numbers, those that touch merged; `count` of them are in it.

    >>> found = Intervals()
    >>> found.add(0, 3), found.add(5, 8), found.add(2, 6), found.count
    (None, None, None, 8)
    """

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.count = 0

    def add(self, begin: int, end: int) -> None:
        if begin == end:
            return
        first, last = bisect_left(self._ends, begin), bisect_right(self._begins, end)
        if first < last:
            self.count -= sum(self._ends[first:last]) - sum(self._begins[first:last])
            begin, end = min(begin, self._begins[first]), max(end, self._ends[last - 1])
        self._begins[first:last], self._ends[first:last] = [begin], [end]
        self.count += end - begin

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._begins, self._ends, strict=True)


class Part:
    """The bytes [begin, end) of a file, of which workers write `wanted`; `slot` is where these wait."""

    __slots__ = ("begin", "end", "number", "slot", "taken", "there", "wanted", "writers")

    def __init__(self, number: int, begin: int, end: int) -> None:
        self.number = number
        self.begin = begin
        self.end = end
        self.wanted = 0
        self.there = Intervals()
        self.slot = -1
        self.writers = 0
        self.taken = False

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def is_ready(self) -> bool:
        return self.there.count >= self.wanted and not self.writers


class GrowingFile:
    """A file of an output in parts; `written` has the ranges that workers write, `tails` the bits of bytes.

    These are the last bytes of packed masks whose numbers of elements are no multiples of 8. `finished` says
    that nothing more is written: what is missing then is zero, as in a file of that length.
    """

    def __init__(
        self,
        file: OutputFile,
        written: Iterable[tuple[int, int]],
        copies: Sequence[CopyRange],
        tails: Mapping[int, int],
        part_bytes: int,
    ) -> None:
        self.file = file
        self.part_bytes = max(part_bytes, -(-file.size // MOST_PARTS))
        bounds = range(0, file.size, self.part_bytes) if file.size else [0]
        self.parts = [
            Part(number, begin, min(begin + self.part_bytes, file.size))
            for number, begin in enumerate(bounds)
        ]
        for begin, end in written:
            for part, first, last in self.within(begin, end):
                part.wanted += last - first
        self.next = 0
        self.finished = False
        self._copies = sorted(copies, key=lambda one: one.offset)
        self._copy_ends = [one.offset + one.length for one in self._copies]
        self._tails = tails
        self._bits: dict[int, tuple[int, int]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether every part is ready."""
        return self.finished or all(part.is_ready for part in self.parts[self.next :])

    def is_ready(self, number: int) -> bool:
        return self.parts[number].is_ready or (self.finished and not self.parts[number].writers)

    def within(self, begin: int, end: int) -> Iterator[tuple[Part, int, int]]:
        """The parts that a range meets, each with what it has of it."""
        while begin < end:
            part = self.parts[begin // self.part_bytes]
            yield part, begin, min(end, part.end)
            begin = part.end

    def merged(self, offset: int, value: int, bits: int) -> int | None:
        """A byte of which these bits are known now; None while others are missing."""
        old, seen = self._bits.get(offset, (0, 0))
        value, seen = (old & ~bits) | (value & bits), seen | bits
        if seen == self._tails.get(offset, 0xFF):
            self._bits.pop(offset, None)
            return value
        self._bits[offset] = (value, seen)
        return None

    def content(self, part: Part, spool: Spool) -> bytearray:
        """The bytes of a part that is ready; reads what is copied from the input."""
        data = bytearray(part.nbytes)
        view = memoryview(data)
        head = self.file.begins_with[part.begin : part.end]
        view[: len(head)] = head
        for begin, end in part.there:
            spool.read_into(view[begin - part.begin : end - part.begin], part.slot + begin - part.begin)
        number = bisect_right(self._copy_ends, part.begin)
        for one in self._copies[number:]:
            if one.offset >= part.end:
                break
            begin, end = max(part.begin, one.offset), min(part.end, one.offset + one.length)
            file_io.read_input(
                one.source,
                view[begin - part.begin : end - part.begin],
                one.source_offset + begin - one.offset,
            )
        # Bits that nobody completed: where nothing is written any more, the others are zero.
        for offset in [one for one in self._bits if part.begin <= one < part.end]:
            view[offset - part.begin] |= self._bits.pop(offset)[0]
        return data
