"""Files of an output that exist already: bytes at the places of tensors, here or on another machine.

Owns `FileWriter`, by which a staged output and its portions write, and portions: what a worker elsewhere
needs to write some files of an output. Each file has one worker. Called by output.py and by runners.
"""

from __future__ import annotations

import os
import socket
import threading
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

from msgspec import Struct

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.file_io import OpenFiles, machine_errors
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

    from sparseprune.checkpoint.file_io import Bytes
    from sparseprune.checkpoint.layout import CopyRange, Place
    from sparseprune.checkpoint.output import Journal


class Portion(Protocol):
    """Some files of an output, as plain picklable data: what a worker elsewhere needs to write them.

    `keeps_parts`: what is flushed stays where the worker ends before the files are complete.
    """

    @property
    def keeps_parts(self) -> bool: ...

    def open(self) -> AbstractContextManager[PortionSink]:
        """Where the worker writes; all of it is durable when the context ends, or a MachineError says why."""


class PortionSink(Protocol):
    """A Sink for a worker elsewhere: it writes the files of one portion and drops what is for others.

    `facts`, once its context has ended, is plain data that `Sink.portion_done` wants to know of the files.
    """

    @property
    def facts(self) -> Mapping[str, Any]: ...

    def copy(self, part: CopyRange) -> None: ...
    def write_weight(self, name: str, begin: int, data: Bytes) -> None: ...
    def write_mask(self, name: str, first: int, keep: Bytes) -> None: ...
    def flush(self) -> None: ...


class Writer(Protocol):
    """Writes bytes at places of files, by their paths, from any thread."""

    def write(self, path: str, data: Bytes, offset: int) -> None:
        """Writes all of `data` at `offset` of a file."""

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        """Takes the bits of one byte that are set in `bits` from `value`; threads may share a byte."""

    def copy(self, path: str, part: CopyRange) -> None:
        """Copies bytes of the input to their place in a file."""


class FileWriter(Writer):
    """Writes to files that exist, and records notes once these writes are on disk; from any thread.

    A note reaches the journal, if there is one, at a `flush` after the writes before it were synced, and
    never if they could not be. `writing` gives the context in which a file is touched. `drop_cache` frees the
    system's cache of what is on disk. `unsure` becomes True where a file system cannot tell whether bytes are
    on disk: from then on nothing reaches the journal. After `close` no file stays open.
    """

    def __init__(
        self,
        writing: Callable[[str], AbstractContextManager[None]] = machine_errors,
        *,
        drop_cache: bool = False,
    ) -> None:
        self.journal: Journal | None = None
        self.unsure = False
        self._drop_cache = drop_cache
        self.writing = writing
        self._files = OpenFiles(file_io.open_to_write)
        self._lock, self._merging, self._one_flush = threading.Lock(), threading.Lock(), threading.Lock()
        self._paths: set[str] = set()
        self._notes: list[bytes] = []
        self._failure: MachineError | None = None

    def write(self, path: str, data: Bytes, offset: int) -> None:
        """Writes all of `data` at `offset` of a file that is no link."""
        with self.writing(path), self._files.use(path) as descriptor:
            file_io.write_at(descriptor, data, offset)
        self.written(path)

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        """Takes the bits of one byte that are set in `bits` from `value`; threads may share a byte."""
        with self.writing(path), self._merging, self._files.use(path) as descriptor:
            (byte,) = os.pread(descriptor, 1, offset)
            file_io.write_at(descriptor, bytes([(byte & ~bits) | (value & bits)]), offset)
        self.written(path)

    def copy(self, path: str, part: CopyRange) -> None:
        """Copies bytes of the input to their place in a file."""
        with self.writing(path):
            file_io.copy_range(part.source, part.source_offset, path, part.offset, part.length)
        self.written(path)

    def written(self, path: str) -> None:
        """Records that the next flush has to sync a file."""
        with self._lock:
            self._paths.add(path)

    def noted(self, note: bytes) -> None:
        """Records a note for the next flush."""
        with self._lock:
            self._notes.append(note)

    def flush(self) -> None:
        """Waits until the files are on disk, then until the notes are; MachineError, also from then on."""
        # One at a time: another flush may still be syncing the bytes of a note.
        with self._one_flush:
            if self._failure is not None:
                # The system reports it once: the next sync of the same file would succeed.
                raise MachineError(str(self._failure)) from self._failure
            with self._lock:
                paths, self._paths = self._paths, set()
                notes, self._notes = self._notes, []
            try:
                for path in sorted(paths):
                    with self.writing(path):
                        self.unsure |= not file_io.sync(path, data_only=True, drop_cache=self._drop_cache)
                if notes and self.journal is not None and not self.unsure:
                    with self.writing(self.journal.path):
                        self.journal.append(notes)
            except MachineError as failure:
                self._failure = failure
                raise
            except BaseException:  # interrupted: the next flush does it again
                with self._lock:
                    self._paths |= paths
                    self._notes[:0] = notes
                raise

    def close(self) -> None:
        """Closes open files; a write that is under way closes its file itself."""
        self._files.close()


class PlacedFiles:
    """Writes tensors and masks at their places in files that exist, by the names of the weights.

    `paths` has where each file of the layout lies. From any thread.
    """

    def __init__(
        self,
        paths: Mapping[PurePosixPath, str],
        weights: Mapping[str, Place],
        masks: Mapping[str, Place],
        writer: Writer,
        *,
        packed: bool,
    ) -> None:
        self._paths, self._weights, self._masks = paths, weights, masks
        self._writer, self._packed = writer, packed

    def copy(self, part: CopyRange) -> None:
        self._writer.copy(self._paths[part.file], part)

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        self._write(name, self._weights[name], begin, data)

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        place = self._masks[name]
        if not self._packed:
            self._write(name, place, first, keep)
            return
        bits = file_io.as_bytes(keep)
        end = first + len(bits)
        if not 0 <= first <= end <= place.numel:
            raise ValueError(f"packed mask of {name!r}: elements {first} to {end} of {place.numel}")
        head = min(-first % 8, len(bits))
        tail = 0 if end == place.numel or head == len(bits) else end % 8
        self._merge(place, first, bits[:head])
        if head + tail < len(bits):
            self._write(name, place, (first + head) // 8, _packed(bits[head : len(bits) - tail]))
        self._merge(place, end - tail, bits[len(bits) - tail :])

    def _write(self, name: str, place: Place, begin: int, data: Bytes) -> None:
        view = file_io.as_bytes(data)
        end = begin + len(view)
        if not 0 <= begin <= end <= place.nbytes:
            raise ValueError(f"bytes {begin} to {end} of {name!r} in {place.file}, which has {place.nbytes}")
        self._writer.write(self._paths[place.file], view, place.offset + begin)

    def _merge(self, place: Place, first: int, keep: memoryview) -> None:
        """Writes some bits of one byte of a packed mask."""
        if not keep:
            return
        shift = first % 8
        value = sum(bit << shift + number for number, bit in enumerate(keep))
        bits = ((1 << len(keep)) - 1) << shift
        self._writer.merge(self._paths[place.file], place.offset + first // 8, value, bits)


def _packed(bits: memoryview) -> memoryview:
    import numpy as np  # noqa: PLC0415  (not needed to write bool masks)

    return np.packbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little").data


class PlacedPortion(PlacedFiles):
    """Writes the files of a portion; what is for others is dropped."""

    def copy(self, part: CopyRange) -> None:
        if part.file in self._paths:
            super().copy(part)

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        if name in self._weights:
            super().write_weight(name, begin, data)

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        if name in self._masks:
            super().write_mask(name, first, keep)


class FolderPortion(Struct, frozen=True):
    """Files of a staged folder that all machines share; `token` is a file by which one sees that it does."""

    token: str
    paths: Mapping[str, str]
    weights: Mapping[str, Place]
    masks: Mapping[str, Place]
    packed: bool

    @property
    def keeps_parts(self) -> bool:
        return True

    @contextmanager
    def open(self) -> Iterator[FolderWriter]:
        try:
            with file_io.opened(file_io.open_to_write(self.token)):
                pass
        except OSError as error:
            raise MachineError(
                f"{os.path.dirname(self.token)}: machine {socket.gethostname()} cannot write there: "  # noqa: PTH120
                f"{error.strerror}; give an output in a folder that all machines share"
            ) from error
        writer = FolderWriter(self)
        try:
            yield writer
            writer.flush()
        finally:
            writer.close()


class FolderWriter(PlacedPortion):
    """Writes the files of a FolderPortion."""

    def __init__(self, portion: FolderPortion) -> None:
        self.facts: Mapping[str, Any] = {}
        self._files = FileWriter()
        paths = {PurePosixPath(file): path for file, path in portion.paths.items()}
        super().__init__(paths, portion.weights, portion.masks, self._files, packed=portion.packed)

    def flush(self) -> None:
        self._files.flush()

    def close(self) -> None:
        self._files.close()
