"""The output while it is written: weights and masks at their places, the journal, syncing, the final name.

Owns `Sink`, what execution asks of an output; `StagedOutput`, the sink of local files, into which workers
write from any thread; and the journal: lines of JSON, each after a check sum of all lines up to it, appended
when the bytes that a line is about are on disk. Knows places from the layout, not what is written there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import stat
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

from msgspec import Struct

from sparseprune.checkpoint import file_io, publish
from sparseprune.checkpoint.file_io import machine_errors
from sparseprune.checkpoint.portions import FileWriter, FolderPortion, PlacedFiles
from sparseprune.checkpoint.publish import StagingDir
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.checkpoint.source import open_checkpoint
from sparseprune.errors import MachineError, is_out_of_memory, size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from sparseprune.checkpoint.file_io import Bytes, WritableBytes
    from sparseprune.checkpoint.layout import CopyRange, OutputLayout
    from sparseprune.checkpoint.portions import Portion
    from sparseprune.checkpoint.source import Checkpoint


_FORMAT = 2
_NO_FILE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO})  # nothing there, a link, a socket
_DIGITS = 8  # of the check sum, a CRC-32
_LONGEST = 1 << 28  # bytes of a line; decisions on a billion blocks have fewer
_APPEND = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Notes(Mapping[str, Any]):
    """The records of a journal by key, parsed from their lines on demand: a line is a third of the memory."""

    def __init__(self, lines: dict[str, bytes] | None = None) -> None:
        self._lines = {} if lines is None else lines

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        return json.loads(self._lines[key])[1]

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def forget(self, key: str) -> None:
        self._lines.pop(key, None)


class JournalContent(Struct, frozen=True):
    """The identity of the work, its records by key, and the end and the check sum of the last good line."""

    identity: Mapping[str, str]
    finished: Notes
    end: int
    check_sum: int


class Journal:
    """A journal that is written: notes are on disk once `append` returns; `notes` counts them.

    For one thread at a time, and not after an error.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = str(path)
        self.notes = 0
        self._descriptor = descriptor
        self._end = 0
        self._check_sum = 0

    @classmethod
    def begin(cls, path: Path, identity: Mapping[str, str]) -> Self:
        """A new journal, on disk if its folder is; OSError where there is one."""
        journal = cls(path, os.open(path, file_io.CREATE, 0o600))
        try:
            journal._add([_json({"format": _FORMAT, "identity": dict(identity)})])
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, content: JournalContent) -> Self:
        """The journal with this content, cut off after its last good line."""
        journal = cls(path, os.open(path, _APPEND))
        try:
            os.ftruncate(journal._descriptor, content.end)
        except BaseException:
            journal.close()
            raise
        journal._end, journal._check_sum = content.end, content.check_sum
        journal.notes = len(content.finished)
        return journal

    def append(self, notes: Sequence[bytes]) -> None:
        """Adds notes as `note_text` makes them and waits until they are on disk."""
        self._add(notes)
        self.notes += len(notes)

    def close(self) -> None:
        os.close(self._descriptor)

    def _add(self, texts: Sequence[bytes]) -> None:
        check_sum, lines = self._check_sum, []
        for text in texts:
            check_sum = zlib.crc32(text, check_sum)
            lines.append(b"%0*x %s\n" % (_DIGITS, check_sum, text))
        data = b"".join(lines)
        file_io.write_at(self._descriptor, data, self._end)
        file_io.sync_open(self._descriptor, data_only=True)
        self._end += len(data)
        self._check_sum = check_sum


def note_text(key: str, record: object) -> bytes:
    r"""One piece of work as JSON; TypeError or ValueError where JSON has no form for the record.

    >>> note_text("a", {"pruned": 3})
    b'["a",{"pruned":3}]'
    """
    return _json([key, record])


def read_journal(path: Path) -> JournalContent | None:
    """The content of a journal up to its first bad line; None without a head of this version."""
    try:
        descriptor = os.open(path, _READ)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        head, text, check_sum = _next(file, 0)
        if not isinstance(head, dict) or head.get("format") != _FORMAT or not _is_identity(head):
            return None
        end = _DIGITS + len(text) + 2
        lines: dict[str, bytes] = {}
        while True:
            note, text, following = _next(file, check_sum)
            if not isinstance(note, list) or len(note) != 2 or not isinstance(note[0], str):
                return JournalContent(head["identity"], Notes(lines), end, check_sum)
            lines[note[0]] = text
            end, check_sum = end + _DIGITS + len(text) + 2, following


def _next(file: BinaryIO, check_sum: int) -> tuple[Any, bytes, int]:
    """The next line's value, None for a bad line; its text, and the check sum with it."""
    line = file.readline(_LONGEST)
    text = line[_DIGITS + 1 : -1]
    check_sum = zlib.crc32(text, check_sum)
    if line == b"%0*x %s\n" % (_DIGITS, check_sum, text):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text), text, check_sum
    return None, b"", 0


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _is_identity(head: dict[str, Any]) -> bool:
    identity = head.get("identity")
    return isinstance(identity, dict) and all(isinstance(part, str) for part in identity.values())


class Sink(Protocol):
    """Where an output is written, from any thread; `finished` has what earlier runs noted, by key.

    Errors of the disk are MachineErrors, places outside of a tensor ValueErrors.
    """

    layout: OutputLayout
    finished: Notes

    def copy(self, part: CopyRange) -> None:
        """Copies bytes of the input to their place; MachineError where the input has become shorter."""

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        """Writes bytes of a pruned tensor from its byte `begin` on; nothing in an output of masks only."""

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        """Writes the mask of the elements from `first` on, one byte 0 or 1 for each, row-major.

        Nothing in an output without masks. Parts of a packed mask may be written side by side even where
        they share a byte; whole bytes are written faster.
        """

    def add_file(self, name: PurePosixPath, data: bytes | Iterable[bytes]) -> None:
        """Writes one of the layout's `results` under its name, or replaces it; whole or in parts."""

    def note(self, key: str, record: object, files: Sequence[str] | None = None) -> None:
        """Records that a piece of work is finished, after its writes have returned.

        A later run finds the JSON-able `record` in `finished` under the key, once the bytes are on disk:
        those of `files`, as chunks name them, or of all that was written so far.
        """

    def flush(self) -> None:
        """Waits until all writes so far are on disk, then until their notes are.

        MachineError where that fails, then and from then on; nothing is noted after it.
        """

    def portion(self, files: Sequence[str]) -> Portion:
        """These files of the output, for one worker elsewhere that alone writes them."""

    def portion_done(self, files: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Hears that a portion of these files is complete and durable, with its `facts`."""

    def commit(self) -> None:
        """Gives the complete output its name, once it is on disk; only then removes what it replaces."""

    def discard(self) -> None:
        """Gives up the output and its notes, before the context ends."""


class Output(Sink, Protocol):
    """A Sink with a target, complete under its name after `commit`; a context manager.

    Entering it checks the target. With an `identity`, which has the parts of what the work depends on and
    their digests, notes are kept where the machine or the user ends the run, and the next run of the same
    identity continues it. Otherwise an exit without `commit` removes everything.

    Once entered, `resumed` says whether an earlier run is continued, and `started_over` has the parts of the
    identity for which one was not. `named` says whether the output has its name; `kept`, after the exit,
    whether the next run can continue this one. `warnings` has a line for each promise that the place cannot
    keep. `partial_path` is where the output grows, `staged_path` where its files are. `tell` hears a line
    where entering has to wait.
    """

    force: bool
    identity: Mapping[str, str] | None
    resumed: bool
    started_over: tuple[str, ...]
    named: bool
    kept: bool
    partial_path: Path
    staged_path: Path
    tell: Callable[[str], None]
    _placed: PlacedFiles

    def __init__(self, layout: OutputLayout, force: bool, identity: Mapping[str, str] | None) -> None:  # noqa: FBT001
        self.layout, self.force, self.identity = layout, force, identity
        self.finished, self.started_over = Notes(), ()
        self.resumed = self.named = self.kept = False
        self.tell = lambda _: None

    def copy(self, part: CopyRange) -> None:
        self._placed.copy(part)

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        if self.layout.writes_weights:
            self._placed.write_weight(name, begin, data)

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        if self.layout.mask_format is not None:
            self._placed.write_mask(name, first, keep)

    @property
    def warnings(self) -> tuple[str, ...]: ...

    @property
    def left_bytes(self) -> int:
        """Of what was written, what `complete` has yet to send."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None: ...

    def refuse_early(self) -> None:
        """Refuses a target as entering does, before the work that decides how much room it takes."""

    def read_weight(self, name: str, buffer: WritableBytes) -> None:
        """Fills a buffer with the bytes of a tensor as they are now in the output."""

    def written(self) -> Checkpoint:
        """The checkpoint that the output is, before it has its name; nothing more is written then."""

    def complete(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Waits until all is there but the name; nothing more is written. `progress` gets bytes."""


def make_output(
    layout: OutputLayout,
    force: bool = False,  # noqa: FBT001, FBT002
    identity: Mapping[str, str] | None = None,
    *,
    reads_back: bool = False,
) -> Output:
    """The output of a layout, wherever its target is; `reads_back` where `read_weight` will be called."""
    if not isinstance(layout.target, RemotePath):
        return StagedOutput(layout, force, identity)
    if layout.scratch:
        # Nobody but this machine reads it; the next run of the same command finds it here.
        address = hashlib.sha256(str(layout.target).encode()).hexdigest()[:12]
        here = Path(tempfile.gettempdir(), f"{layout.target.name}-{address}")
        return StagedOutput(dataclasses.replace(layout, target=here), force, identity)
    from sparseprune.checkpoint.remote_output import RemoteOutput  # noqa: PLC0415  (with its extra)

    return RemoteOutput(layout, force, identity, keeps=reads_back)


_CACHED_SHARE = 0.25  # of the memory: an output up to this size stays in the cache for the next reader


class StagedOutput(Output):
    """The Output of local files: complete under its name after `commit`, or nothing under it.

    Entering it makes every file of the layout at its final size with its header. The output grows in the
    hidden folder `partial_path`, its files in `staged_path`.
    """

    def __init__(
        self,
        layout: OutputLayout,
        force: bool = False,  # noqa: FBT001, FBT002
        identity: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(layout, force, identity)
        self._staging = StagingDir(layout.target, layout.scratch or "partial")
        self.partial_path, self.staged_path = self._staging.path, self._staging.output
        self._paths = {file.path: str(self._staging.output / file.path) for file in layout.files}
        # A large output would push everything else out of the system's cache, its own input first.
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self._writer = FileWriter(self._writing, drop_cache=layout.output_bytes > _CACHED_SHARE * memory)
        packed = layout.mask_format == "packed"
        self._placed = PlacedFiles(self._paths, layout.weights, layout.masks, self._writer, packed=packed)
        self._token: str | None = None  # the name of a file by which machines know that they see the folder

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(self._staging.warnings)

    def __enter__(self) -> Self:
        publish.check_place(self.layout)
        if not os.path.lexists(self.partial_path):
            publish.check_target(self.layout, force=self.force)  # a refused output leaves no folder
        with self._writing(self.partial_path):
            self._staging.acquire()
        found, begun = None, False
        try:
            # Names that a killed run was giving are undone by now, and no other run works here.
            publish.check_target(self.layout, force=self.force, held=self._staging.held_bytes())
            with self._writing(self.partial_path):
                self._staging.probe()
            found, begun = self._unfinished(), True
            if found is None:
                self._start_over()
            else:
                self._resume(found)
        except BaseException:
            self._leave(keep=found is not None or not begun)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        keep = False
        journal = self._writer.journal if may_go_on(error) else None
        try:
            if journal is not None:
                with contextlib.suppress(MachineError):
                    self.flush()
        finally:
            if journal is not None:
                keep = journal.notes > 0 and self._is_whole()
            self._leave(keep=keep)
            self.kept = keep

    def read_weight(self, name: str, buffer: WritableBytes) -> None:
        place = self.layout.weights[name]
        path = self._paths[place.file]
        reading = file_io.machine_errors(path, "cannot be read")
        with reading, file_io.opened(os.open(path, os.O_RDONLY)) as descriptor:
            file_io.read_into(descriptor, buffer, place.offset)

    def portion(self, files: Sequence[str]) -> Portion:
        layout = self.layout
        if self._token is None:
            token = self.partial_path / f"token-{secrets.token_hex(8)}"
            with self._writing(token):
                file_io.create(token, 0)
                file_io.sync(self.partial_path)
            self._token = str(token)
        wanted = frozenset(map(PurePosixPath, files))
        return FolderPortion(
            self._token,
            {str(file): self._paths[file] for file in wanted},
            *layout.places_of(wanted),
            packed=layout.mask_format == "packed",
        )

    def portion_done(self, files: Sequence[str], facts: Mapping[str, Any]) -> None:
        """Nothing: the files are where they belong."""

    def add_file(self, name: PurePosixPath, data: bytes | Iterable[bytes]) -> None:
        if name not in self.layout.results:
            raise ValueError(f"{name}: the layout has no such file")
        path = self._staging.output / name
        with self._writing(path):
            path.unlink(missing_ok=True)
            self._make_folders(name)
            file_io.create(path, 0, b"", self.layout.results[name] | file_io.OWNER)
            file_io.write_pieces(path, (data,) if isinstance(data, bytes) else data)

    def note(self, key: str, record: object, files: Sequence[str] | None = None) -> None:  # noqa: ARG002
        if self.identity is not None:
            self._writer.noted(note_text(key, record))

    def flush(self) -> None:
        self._writer.flush()

    @property
    def left_bytes(self) -> int:
        return 0

    def complete(self, progress: Callable[[int], None] = lambda _: None) -> None:  # noqa: ARG002
        self.flush()

    def written(self) -> Checkpoint:
        first = next((place.file for place in self.layout.weights.values()), None)
        return open_checkpoint(
            self.staged_path / ("" if self.layout.is_directory or first is None else first)
        )

    def commit(self) -> None:
        layout = self.layout
        self.flush()
        self._writer.close()
        root = self._staging.output
        with self._writing(root):
            for file in layout.files:
                file_io.restrict(self._paths[file.path], file.mode)
            for name, mode in layout.results.items():
                file_io.restrict(root / name, mode)
            for folder, _, files in os.walk(root, topdown=False):
                for path in (*(root.joinpath(folder, name) for name in files), root.joinpath(folder)):
                    file_io.sync(path)
        publish.check_existing(layout, force=self.force)
        with self._writing(layout.target, "cannot get its name"):
            if layout.is_directory:
                publish.name_directory(self.partial_path, layout.target, self._set_named)
            else:
                publish.name_files(self.partial_path, publish.final_paths(layout), self._set_named)
        with machine_errors(layout.target.parent, "cannot be synced to disk"):
            file_io.sync(layout.target.parent, follow_links=True)

    def refuse_early(self) -> None:
        """Refuses a target as entering does, before the work that decides how much room it takes.

        Takes back names that a killed run was giving, and removes what nobody can continue.
        """
        publish.check_place(self.layout)
        if not os.path.lexists(self.partial_path):
            publish.check_existing(self.layout, force=self.force)
            return
        with self._writing(self.partial_path):
            self._staging.acquire()
        try:
            publish.check_existing(self.layout, force=self.force)
        finally:
            self._staging.release()

    def discard(self) -> None:
        self._leave(keep=False)

    def _set_named(self) -> None:
        self.named = True

    def _unfinished(self) -> JournalContent | None:
        """What an earlier run noted, if this run continues it."""
        if self.identity is None or not self._staging.has_journal():
            return None
        with machine_errors(self._staging.journal, "cannot be read"):
            found = read_journal(self._staging.journal)
        if found is None or not self._staging.sizes():
            return None
        parts = dict.fromkeys((*self.identity, *found.identity))
        mine, its = self.identity, found.identity
        self.started_over = tuple(part for part in parts if mine.get(part) != its.get(part))
        return None if self.started_over or not self._is_whole() else found

    def _is_whole(self) -> bool:
        """Whether every file of the layout is there at its size, and nothing else."""
        sizes = self._staging.sizes()
        if sizes is None:
            return False
        for name in self.layout.results:
            sizes.pop(str(name), None)
        return sizes == {str(file.path): file.size for file in self.layout.files}

    def _resume(self, found: JournalContent) -> None:
        with self._writing(self.partial_path):
            self._staging.resume()
        for file in self.layout.files:
            path = self._paths[file.path]
            # The journal does not cover headers; rewrite them in case a crash lost them.
            with self._writing(path):
                file_io.make_writable(path)
                file_io.overwrite(path, file.begins_with, 0)
        with self._writing(self._staging.journal):
            self._writer.journal = Journal.resume(self._staging.journal, found)
        self.finished = found.finished
        self.resumed = True

    def _start_over(self) -> None:
        with self._writing(self.partial_path):
            self._staging.start_over(self._folder_mode(PurePosixPath()))
        for file in self.layout.files:
            path = self._staging.output / file.path
            with self._writing(path):
                self._make_folders(file.path)
                file_io.create(path, file.size, file.begins_with, file.mode | file_io.OWNER)
        if self.identity is not None and self._staging.can_be_continued:
            with self._writing(self._staging.journal):
                # After the files: a later run that finds the journal does not make them again.
                self._writer.journal = Journal.begin(self._staging.journal, self.identity)
                self._staging.sync_folders()

    def _make_folders(self, path: PurePosixPath) -> None:
        """Makes the folders of a file of the output."""
        for folder in reversed(path.parents[:-1]):
            (self._staging.output / folder).mkdir(self._folder_mode(folder), exist_ok=True)

    def _folder_mode(self, folder: PurePosixPath) -> int:
        """The owner of a folder may always write there, else it could be neither renamed nor removed."""
        return self.layout.folders.get(folder, self.layout.folders[PurePosixPath()]) | stat.S_IRWXU

    def _leave(self, *, keep: bool) -> None:
        self._writer.close()
        if self._writer.journal is not None:
            self._writer.journal.close()
            self._writer.journal = None
        if keep:
            self._staging.release()
        else:
            self._staging.discard()

    @contextlib.contextmanager
    def _writing(self, path: Path | str, doing: str = "cannot be written") -> Iterator[None]:
        """Turns an OSError into a MachineError, with the bytes needed and free where the disk is full."""
        try:
            yield
        except OSError as error:
            fact = f"{path}: {doing}: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = publish.needed_bytes(self.layout, self._staging.held_bytes())
                free = publish.free_bytes(self.layout.target.parent)
                fact += f"; the output needs {size(needed)} more, {size(free)} are free now"
            raise MachineError(fact) from error


def may_go_on(error: BaseException | None) -> bool:
    """Whether the machine or the user ended a run, not a mistake that the next run would repeat.

    A changed input counts as a mistake: pieces that are finished and those that are not would not fit.
    """
    if error is None or isinstance(error, file_io.ChangedInputError):
        return False
    return isinstance(error, MachineError) or is_out_of_memory(error) or not isinstance(error, Exception)
