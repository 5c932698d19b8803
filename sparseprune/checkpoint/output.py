"""The output while it is written: weights and masks at their places, the journal, syncing, the final name.

The local sink: workers write from any thread, finished chunks are noted after they are on disk. Knows
places from the layout, not what is written there. Called by execution.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Self

from sparseprune.checkpoint import file_io, publish
from sparseprune.checkpoint.file_io import OpenFiles
from sparseprune.checkpoint.journal import Journal, JournalContent, Notes, note_text, read_journal
from sparseprune.checkpoint.publish import (
    check_existing,
    check_place,
    check_target,
    final_paths,
    free_bytes,
    needed_bytes,
)
from sparseprune.checkpoint.staging_dir import PartialFolder
from sparseprune.errors import MachineError, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager
    from io import BufferedReader
    from pathlib import Path
    from types import TracebackType

    from sparseprune.checkpoint.file_io import Bytes
    from sparseprune.checkpoint.layout import CopyRange, OutputLayout, Place


class Unsynced:
    """Files written to and notes of them, from any thread, until `flush` has them on disk.

    A note was made after the writes it tells of were: it reaches the journal, if there is one, after they
    have reached the disk, and never if they could not. `writing` gives the context in which a file is
    touched, where an OSError becomes a MachineError. `let_go` frees the cache of what is on disk. `unsure`
    once the file system could not tell whether bytes are on disk: from then on nothing reaches the journal.
    """

    def __init__(
        self, writing: Callable[[str], AbstractContextManager[None]], *, let_go: bool = False
    ) -> None:
        self.journal: Journal | None = None
        self.unsure = False
        self._let_go = let_go
        self._writing = writing
        self._lock = threading.Lock()
        self._paths: set[str] = set()
        self._notes: list[bytes] = []
        self._one_flush = threading.Lock()
        self._failure: MachineError | None = None

    def written(self, path: str) -> None:
        with self._lock:
            self._paths.add(path)

    def noted(self, note: bytes) -> None:
        with self._lock:
            self._notes.append(note)

    def flush(self) -> None:
        """Waits until the files are on disk, then until the notes are; MachineError, also from then on."""
        # One at a time: the bytes of a note may be in the hands of the flush before.
        with self._one_flush:
            if self._failure is not None:
                # The system tells it once: the next sync of the same file would call it well.
                raise MachineError(str(self._failure)) from self._failure
            with self._lock:
                paths, self._paths = self._paths, set()
                notes, self._notes = self._notes, []
            try:
                self._sync(paths, notes)
            except MachineError as failure:
                self._failure = failure
                raise
            except BaseException:  # interrupted: the next flush does it again
                with self._lock:
                    self._paths |= paths
                    self._notes[:0] = notes
                raise

    def _sync(self, paths: set[str], notes: list[bytes]) -> None:
        for path in sorted(paths):
            with self._writing(path):
                self.unsure |= not file_io.sync(path, data_only=True, let_go=self._let_go)
        if notes and self.journal is not None and not self.unsure:
            with self._writing(self.journal.path):
                self.journal.append(notes)


class FileWriter:
    """Writes to files that exist; also after `close`, but then none stays open."""

    def __init__(self) -> None:
        self._merging = threading.Lock()
        self._files = OpenFiles(file_io.open_to_write)

    def write(self, path: str, data: Bytes, offset: int) -> None:
        """Writes all of `data` at `offset` of a file that is no link."""
        with self._files.use(path) as descriptor:
            file_io.write_at(descriptor, data, offset)

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        """Gives one byte of a file those bits of `value` that `bits` has; the others stay.

        Calls wait for each other, so that several threads may share a byte.
        """
        with self._merging, self._files.use(path) as descriptor:
            (byte,) = os.pread(descriptor, 1, offset)
            file_io.write_at(descriptor, bytes([(byte & ~bits) | (value & bits)]), offset)

    def close(self) -> None:
        """Closes what is open; a write that is under way closes its file itself."""
        self._files.close()


_CACHED_SHARE = 0.25  # of the memory: an output up to this size stays in the cache, for whoever reads it next


class StagedOutput:
    """An output while it is written: complete under its name after `commit`, or nothing under it.

    A context manager. Entering it checks the target and makes every file of the layout at its final size
    with its header. With an `identity`, the part names and digests of all that the work depends on, what
    was noted is kept where the machine or the user ends the run, and continued by the next one of the same
    identity. Otherwise an exit without `commit` removes all of it. Methods may be called from any thread.

    Once entered, `resumed` tells whether an earlier run is continued, `finished` what it noted, by key, and
    `started_over` the parts of the identity for which one was not continued; `named` whether the output has
    its name; `kept`, once left, whether the next run can continue this one. `warnings` has a line for each
    promise that the file system does not allow.
    """

    def __init__(
        self,
        layout: OutputLayout,
        force: bool = False,  # noqa: FBT001, FBT002
        identity: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = layout
        self.force = force
        self.identity = identity
        self.finished = Notes()
        self.resumed = False
        self.started_over: tuple[str, ...] = ()
        self.named = False
        self.kept = False
        self._aside = False
        self._partial = PartialFolder(layout.target, "choice" if layout.is_scratch else "partial")
        self._paths = {file.path: str(self._partial.output / file.path) for file in layout.files}
        self._writer = FileWriter()
        # A large output would drive everything else out of the system's cache, its own input first.
        self._unsynced = Unsynced(self._writing, let_go=layout.output_bytes > _CACHED_SHARE * _memory_bytes())

    @property
    def partial_path(self) -> Path:
        """The hidden folder in which the output grows, and in which it stays if it is kept."""
        return self._partial.path

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._partial.warnings)

    @property
    def staged_path(self) -> Path:
        """Where the files of the layout are until the output has its name."""
        return self._partial.output

    def __enter__(self) -> Self:
        check_place(self.layout)
        if not os.path.lexists(self.partial_path):
            check_target(self.layout, force=self.force)  # nothing is made for an output that is refused
        with self._writing(self.partial_path):
            self._partial.acquire()
        found, begun = None, False
        try:
            # A run that was killed while it gave names is undone by now, and no other run is at work.
            check_target(self.layout, force=self.force, held=self._partial.held_bytes())
            with self._writing(self.partial_path):
                self._partial.probe()
            found, begun = self._unfinished(), True
            if found is None:
                self._start_over()
            else:
                self._resume(found)
        except BaseException:
            self._leave(keep=found is not None or not begun)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        keep = False
        try:
            if self._unsynced.journal is not None and _may_go_on(error):
                with contextlib.suppress(MachineError):
                    self.flush()
        finally:
            if self._unsynced.journal is not None and _may_go_on(error):
                keep = (self._unsynced.journal.notes > 0 or self._aside) and self._is_whole()
            self._leave(keep=keep)
            self.kept = keep

    def copy(self, part: CopyRange) -> None:
        """Copies bytes of the input to their place; MachineError where the input has become shorter."""
        path = self._paths[part.file]
        with self._writing(path):
            file_io.copy_range(part.source, part.source_offset, path, part.offset, part.length)
        self._unsynced.written(path)

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        """Writes bytes of a pruned tensor from its byte `begin` on; nothing in an output of masks only."""
        if self.layout.writes_weights:
            self._write(name, self.layout.weights[name], begin, data)

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        """Writes the mask of the elements from `first` on, one byte 0 or 1 for each, row-major.

        Nothing in an output without masks. Parts of a packed mask may be written side by side even where
        they share a byte; whole bytes are written faster.
        """
        if self.layout.mask_format is None:
            return
        place = self.layout.masks[name]
        if self.layout.mask_format == "bool":
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

    def add_file(self, name: PurePosixPath, data: bytes | Iterable[bytes]) -> None:
        """Writes the report or the spec, under the name that the layout gives it; again to replace it.

        `data` may come in parts, which are written as they are made.
        """
        if name not in (self.layout.report_file, self.layout.spec_file):
            raise ValueError(f"{name}: the layout has no such file")
        path = self._partial.output / name
        with self._writing(path):
            path.unlink(missing_ok=True)
            self._make_folders(name)
            file_io.create(path, 0, b"", self.layout.results_mode | file_io.OWNER)
            file_io.write_pieces(path, (data,) if isinstance(data, bytes) else data)

    def note(self, key: str, record: object) -> None:
        """Tells that a piece of work is finished: that the writes it takes have returned.

        A later run finds the JSON-able `record` in `finished` under the key, once the bytes are on disk.
        """
        if self.identity is not None:
            self._unsynced.noted(note_text(key, record))

    def put_aside(self, pieces: Iterable[Bytes]) -> None:
        """Writes bytes that are no output, by which a later run continues in the middle of a piece of work.

        They replace what was put aside before once they are on disk, or not at all; they go with the folder.
        """
        if self.identity is None or not self._partial.can_be_continued:
            return
        path = self._partial.aside
        fresh = path.with_suffix(".new")
        with self._writing(path):
            fresh.unlink(missing_ok=True)
            file_io.create(fresh, 0)
            try:
                file_io.write_pieces(fresh, pieces)
                file_io.sync(fresh)
                fresh.replace(path)
            except BaseException:
                fresh.unlink(missing_ok=True)  # the output may need the room
                raise
            file_io.sync(path.parent)
        self._aside = True

    def aside(self) -> BufferedReader | None:
        """What an earlier run put aside, if this one continues it; to be closed."""
        if not self._aside:
            return None
        with file_io.machine_errors(self._partial.aside, "cannot be read"):
            return self._partial.aside.open("rb")

    def flush(self) -> None:
        """Waits until what has been written so far is on disk, then until what was noted of it is.

        `commit` then finds little left to do. MachineError where that fails, then and from then on: the
        system tells it once. Nothing is noted after it.
        """
        self._unsynced.flush()

    def commit(self) -> None:
        """Gives the complete output its name, once it is on disk; what it replaces goes only then."""
        layout = self.layout
        self.flush()
        self._writer.close()
        root = self._partial.output
        with self._writing(root):
            for file in layout.files:
                file_io.restrict(self._paths[file.path], file.mode)
            for name in filter(None, (layout.report_file, layout.spec_file)):
                file_io.restrict(root / name, layout.results_mode)
            for folder, _, files in os.walk(root, topdown=False):
                for path in (*(root.joinpath(folder, name) for name in files), root.joinpath(folder)):
                    file_io.sync(path)
        check_existing(layout, force=self.force)
        with self._writing(layout.target, "cannot get its name"):
            if layout.is_directory:
                publish.name_directory(self.partial_path, layout.target, self._given)
            else:
                publish.name_files(self.partial_path, final_paths(layout), self._given)
        with file_io.machine_errors(layout.target.parent, "cannot be synced to disk"):
            file_io.sync(layout.target.parent, follow_links=True)

    def refuse_early(self) -> None:
        """As entering refuses a target, before the work that decides how much room it takes.

        Names that a killed run was giving are taken back, and what nobody can continue is removed.
        """
        check_place(self.layout)
        if not os.path.lexists(self.partial_path):
            check_existing(self.layout, force=self.force)
            return
        with self._writing(self.partial_path):
            self._partial.acquire()
        try:
            check_existing(self.layout, force=self.force)
        finally:
            self._partial.release()

    def discard(self) -> None:
        """Gives up all of it, and what was noted of it, before the context ends."""
        self._leave(keep=False)

    def _given(self) -> None:
        self.named = True

    def _unfinished(self) -> JournalContent | None:
        """What an earlier run noted, if this run continues it."""
        if self.identity is None or not self._partial.has_journal():
            return None
        with file_io.machine_errors(self._partial.journal, "cannot be read"):
            found = read_journal(self._partial.journal)
        if found is None or not self._partial.sizes():
            return None
        parts = dict.fromkeys((*self.identity, *found.identity))
        self.started_over = tuple(
            part for part in parts if self.identity.get(part) != found.identity.get(part)
        )
        return None if self.started_over or not self._is_whole() else found

    def _is_whole(self) -> bool:
        """Whether every file of the layout is there at its size, and nothing that does not belong there."""
        sizes = self._partial.sizes()
        if sizes is None:
            return False
        for name in (self.layout.report_file, self.layout.spec_file):
            sizes.pop(str(name), None)
        return sizes == {str(file.path): file.size for file in self.layout.files}

    def _resume(self, found: JournalContent) -> None:
        with self._writing(self.partial_path):
            self._partial.resume()
        for file in self.layout.files:
            path = self._paths[file.path]
            # No note vouches for the headers, which may not have been on disk when the machine went down.
            with self._writing(path):
                file_io.make_writable(path)
                file_io.overwrite(path, file.begins_with, 0)
        with self._writing(self._partial.journal):
            self._unsynced.journal = Journal.resume(self._partial.journal, found)
        self.finished = found.finished
        self._aside = self._partial.has_aside()
        self.resumed = True

    def _start_over(self) -> None:
        with self._writing(self.partial_path):
            self._partial.start_over(self._folder_mode(PurePosixPath()))
        for file in self.layout.files:
            path = self._partial.output / file.path
            with self._writing(path):
                self._make_folders(file.path)
                file_io.create(path, file.size, file.begins_with, file.mode | file_io.OWNER)
        if self.identity is not None and self._partial.can_be_continued:
            with self._writing(self._partial.journal):
                # After the files: from now on a later run takes them for made.
                self._unsynced.journal = Journal.begin(self._partial.journal, self.identity)
                self._partial.sync_folders()

    def _make_folders(self, path: PurePosixPath) -> None:
        """The folders in which a file of the output lies."""
        for folder in reversed(path.parents[:-1]):
            (self._partial.output / folder).mkdir(self._folder_mode(folder), exist_ok=True)

    def _folder_mode(self, folder: PurePosixPath) -> int:
        """Whoever owns a folder may always write there, else it could neither get its name nor be removed."""
        return self.layout.folders.get(folder, self.layout.folders[PurePosixPath()]) | stat.S_IRWXU

    def _leave(self, *, keep: bool) -> None:
        self._writer.close()
        if self._unsynced.journal is not None:
            self._unsynced.journal.close()
            self._unsynced.journal = None
        if keep:
            self._partial.release()
        else:
            self._partial.discard()

    def _write(self, name: str, place: Place, begin: int, data: Bytes) -> None:
        view = file_io.as_bytes(data)
        end = begin + len(view)
        if not 0 <= begin <= end <= place.nbytes:
            raise ValueError(f"bytes {begin} to {end} of {name!r} in {place.file}, which has {place.nbytes}")
        path = self._paths[place.file]
        with self._writing(path):
            self._writer.write(path, view, place.offset + begin)
        self._unsynced.written(path)

    def _merge(self, place: Place, first: int, keep: memoryview) -> None:
        """Writes some bits of one byte of a packed mask."""
        if not keep:
            return
        shift = first % 8
        value = sum(bit << shift + number for number, bit in enumerate(keep))
        path = self._paths[place.file]
        with self._writing(path):
            self._writer.merge(path, place.offset + first // 8, value, ((1 << len(keep)) - 1) << shift)
        self._unsynced.written(path)

    def _writing(self, path: Path | str, doing: str = "cannot be written") -> AbstractContextManager[None]:
        return _Writing(path, doing, self.layout, self._partial)


class _Writing:
    """Turns an OSError of a write into a MachineError, with the bytes needed and free on a full disk."""

    def __init__(self, path: Path | str, doing: str, layout: OutputLayout, partial: PartialFolder) -> None:
        self._path = path
        self._doing = doing
        self._layout = layout
        self._partial = partial

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError):
            return
        fact = f"{self._path}: {self._doing}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = needed_bytes(self._layout, self._partial.held_bytes())
            free = free_bytes(self._layout.target.parent)
            fact += f"; the output needs {needed} bytes more, {free} are free now"
        raise MachineError(fact) from error


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _may_go_on(error: BaseException | None) -> bool:
    """Whether the machine or the user ended a run, and not a mistake that the next one would make again.

    Nor a change of the input, of which some pieces may be made and others not.
    """
    if error is None or isinstance(error, file_io.ChangedInputError):
        return False
    if isinstance(error, MachineError) or is_out_of_memory(error):
        return True
    return not isinstance(error, Exception)


def _packed(bits: memoryview) -> memoryview:
    import numpy as np  # noqa: PLC0415  (not needed to write bool masks)

    return np.packbits(np.frombuffer(bits, dtype=np.uint8), bitorder="little").data
