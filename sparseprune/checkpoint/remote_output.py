"""The output in an object store while it is written: objects, each there whole or not at all, in order.

Owns the order in which objects appear, what `--force` may replace, what a later run continues. Parts and
sending are uploads.py's, lock and journal remote_run.py's. Called through `make_output` of output.py.
"""

from __future__ import annotations

import contextlib
import tempfile
import threading
import time
from collections import defaultdict
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

from msgspec import Struct

from sparseprune.checkpoint import file_io, growing, publish
from sparseprune.checkpoint.discovery import INDEX_SUFFIX, RESULTS, SUFFIX
from sparseprune.checkpoint.objects import ObjectFolder
from sparseprune.checkpoint.output import Notes, Output, may_go_on, note_text
from sparseprune.checkpoint.portions import PlacedFiles, PlacedPortion
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.checkpoint.remote_run import Lock, RemoteJournal
from sparseprune.checkpoint.source import open_checkpoint, open_unnamed
from sparseprune.checkpoint.uploads import Uploads
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

    from sparseprune.checkpoint.file_io import Bytes, WritableBytes
    from sparseprune.checkpoint.layout import CopyRange, OutputFile, OutputLayout, Place
    from sparseprune.checkpoint.remote import Facts
    from sparseprune.checkpoint.remote_run import Noted
    from sparseprune.checkpoint.source import Checkpoint

_CONFIG = PurePosixPath("config.json")
_OTHER = "give another name with -o"
_IN_MEMORY = 1 << 20  # bytes of a report before it waits on disk
_NOTED = 2.0  # seconds between objects that have notes alone


class RemoteOutput(Output):
    """The Sink of an object store: complete once its last object is there, which is the index or the config.

    A context manager, as every `Output`. Objects appear one by one, each whole; with an
    `identity` those that are there stay where a machine or the user ends the run, and the next run of the
    same identity writes the others. Bytes that the input and the output share are copied when the part of the
    object that has them is sent. `keeps` lets `read_weight` read what was written. `tell` hears a line where
    entering has to wait.
    """

    def __init__(
        self,
        layout: OutputLayout,
        force: bool = False,  # noqa: FBT001, FBT002
        identity: Mapping[str, str] | None = None,
        *,
        keeps: bool = False,
    ) -> None:
        super().__init__(layout, force, identity)
        self.partial_path = layout.target
        self.staged_path = layout.root
        self._keeps = keeps
        root = layout.root
        if not isinstance(root, RemotePath):
            raise TypeError(f"{root}: is in no object store")
        self._folder = ObjectFolder(root)
        name = layout.target.name
        self._own = f"{RESULTS}/.run" if layout.is_directory else f".{name}.sparseprune-run"
        self._journal = RemoteJournal(self._folder, self._own)
        self._lock = Lock(self._folder, f"{self._own}/lock", layout.target)
        self._last = _last_files(layout)
        self._results: dict[str, tempfile.SpooledTemporaryFile[bytes]] = {}
        self._sending = Uploads((), self, self._sent)
        self._placed = PlacedFiles({}, {}, {}, self._sending, packed=False)
        self._noting, self._appending = threading.Lock(), threading.Lock()
        self._done: dict[str, Facts] = {}
        self._written: set[str] = set()  # objects of this run and of those that it continues
        self._waiting: dict[frozenset[str], list[bytes]] = {}
        self._noted_at = 0.0
        self._replaced: set[str] = set()  # objects of an earlier output that are still there
        self._replacing = threading.Lock()
        self._discarded = False

    def __enter__(self) -> Self:
        publish.check_apart(self.layout)
        self._check(self._existing(), self._journal.read())  # a refused output leaves no lock
        self._lock.acquire(self.tell)
        try:
            found = self._journal.read()
            existing = self._existing()
            self._check(existing, found)
            self._begin(existing, found)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self._sending.close()
            if not self.named and not self._discarded and not self._lock.lost.is_set():
                self.kept = self._leave(error)
        finally:
            for file in self._results.values():
                file.close()
            self._lock.release()

    @property
    def warnings(self) -> tuple[str, ...]:
        return ()

    @property
    def left_bytes(self) -> int:
        """Of the output that are not sent yet."""
        return self._sending.left_bytes

    def refuse_early(self) -> None:
        """Refuses a target as entering does, before the work that decides how much room it takes."""
        publish.check_apart(self.layout)
        self._check(self._existing(), self._journal.read())

    def read_weight(self, name: str, buffer: WritableBytes) -> None:
        """Fill a buffer with the bytes of a tensor as they were written; the output has to keep them."""
        place = self.layout.weights[name]
        path = str(place.file)
        view = file_io.as_bytes(buffer)
        if path in self._sending:
            self._sending.read_into(path, place.offset, view)
            return
        with file_io.machine_errors(self.layout.root / path, "cannot be read"):
            source = RemotePath(self.layout.root / path)
            view[:] = file_io.as_bytes(source.read_part(place.offset, place.offset + place.nbytes))

    def written(self) -> Checkpoint:
        layout, config = self.layout, str(_CONFIG)
        files = [str(file.path) for file in layout.files]
        self._sending.finish([path for path in files if path not in self._last])
        if not layout.is_directory:
            self._sending.release(layout.target.name)
            return open_checkpoint(layout.target)
        if config in self._last:  # it says what the tensors mean
            self._sending.release(config)
        left = {*layout.mask_files, *(other.path for other in layout.checkpoint.others)}
        shards = [file.path for file in layout.files if file.path.suffix == SUFFIX and file.path not in left]
        return open_unnamed(layout.root, shards, layout.checkpoint)

    def portion(self, files: Sequence[str]) -> RemotePortion:
        # What comes last is sent from here, but for a file of weights that is all of the output.
        here = self._last if self.layout.is_directory else ()
        wanted = {path for path in files if path in self._sending}.difference(here)
        self._sending.drop(wanted)
        return RemotePortion.of(self.layout, frozenset(map(PurePosixPath, wanted)))

    def portion_done(self, files: Sequence[str], facts: Mapping[str, Any]) -> None:  # noqa: ARG002
        for name, one in facts.items():
            self._sent(name, one)

    def add_file(self, name: PurePosixPath, data: bytes | Iterable[bytes]) -> None:
        if name not in self.layout.results:
            raise ValueError(f"{name}: the layout has no such file")
        file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115  (closed when it is sent)
        for piece in (data,) if isinstance(data, bytes) else data:
            file.write(piece)
        self._results[str(name)] = file

    def note(self, key: str, record: object, files: Sequence[str] | None = None) -> None:
        if self.identity is None:
            return
        about = self._sending.touched if files is None else self._written_with(tuple(files))
        with self._noting:
            self._waiting.setdefault(about, []).append(note_text(key, record))

    def flush(self) -> None:
        """Raises what ended the sending, and keeps notes of what is there; waits for no other object."""
        self._refuse_lost()
        self._sending.refuse_failed()
        if time.monotonic() - self._noted_at > _NOTED:
            self._keep_notes({})

    def complete(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Waits until everything is there but what comes last; nothing more is written."""
        files = [str(file.path) for file in self.layout.files]
        self._sending.finish([path for path in files if path not in self._last], progress)
        for name, file in self._results.items():
            self._refuse_lost()
            self._send_result(name, file)
        self._results = {}
        self._sending.finish(self._last, progress)

    def commit(self) -> None:
        self.complete()
        self._refuse_lost()
        for path in self._last:
            self._sending.release(path)
        self.named = True
        new = {str(file.path) for file in self.layout.files} | set(map(str, self.layout.results))
        self._folder.delete(self._replaced - new)
        self._journal.remove()

    def discard(self) -> None:
        self._sending.close()
        self._remove()
        self._discarded = True

    def put(self, name: str, data: Bytes) -> Facts:
        """Writes a small object, for `Uploads`."""
        self._replace()
        self._written.add(name)
        return self._folder.put(name, data)

    def send(self, name: str, pieces: Iterator[Bytes], part_bytes: int, side_by_side: int) -> Facts:
        """Writes a large object, for `Uploads`."""
        self._replace()
        self._written.add(name)
        return self._folder.send(name, pieces, part_bytes, side_by_side)

    def _existing(self) -> dict[str, Facts]:
        """The objects of the target, by their paths in the layout."""
        if self.layout.is_directory:
            return {name: one for name, one in self._folder.below().items() if not self._is_own(name)}
        names = [path.name for path in publish.final_paths(self.layout)]
        return {name: one for name in names if (one := self._folder.facts(name)) is not None}

    def _is_own(self, name: str) -> bool:
        return name.startswith(f"{self._own}/")

    def _check(self, existing: Mapping[str, Facts], found: Noted | None) -> None:
        """CheckpointError where something is there that may not be replaced."""
        target = self.layout.target
        if found is not None:
            others = existing.keys() - set(found.files)
            # An output that got its name is complete, unless this run continues the one that gave it.
            named = found.identity != self.identity and any(name in existing for name in found.last)
            if not others and not named:
                return
        elif not existing:
            return
        if not self.force:
            raise CheckpointError(f"{target}: already exists; {_OTHER}, or --force to replace it")
        if self.layout.is_directory and found is None and not _is_ours(existing):
            raise CheckpointError(
                f"{target}: --force replaces what sparseprune wrote, and this directory has no report of it; "
                f"remove it yourself, or {_OTHER}"
            )

    def _begin(self, existing: Mapping[str, Facts], found: Noted | None) -> None:
        layout, mine = self.layout, self.identity
        if found is not None and mine is not None:
            parts = dict.fromkeys((*mine, *found.identity))
            self.started_over = tuple(part for part in parts if mine.get(part) != found.identity.get(part))
        if found is not None and mine is not None and not self.started_over:
            self.resumed = True
            self._done = {name: one for name, one in found.done.items() if existing.get(name) == one}
            about = found.notes.items()
            lines = {key: line for key, (line, names) in about if self._done.keys() >= set(names)}
            self.finished = Notes(lines)
            self._journal.resume(found)
            self._replaced = existing.keys() - self._done.keys()
            self._written = existing.keys() & set(found.files)
        else:
            if found is not None:
                self._journal.remove()
                self._folder.delete(existing.keys() & set(found.files))
                existing = {name: one for name, one in existing.items() if name not in found.files}
            self._replaced = set(existing)
            if mine is not None:
                names = [*(str(file.path) for file in layout.files), *map(str, layout.results)]
                self._journal.begin(mine, names, self._last)
        files = [file for file in layout.files if str(file.path) not in self._done]
        packed = layout.mask_format == "packed"
        grown = growing_files(files, (layout.weights, layout.masks), layout.copies, packed=packed)
        self._sending = Uploads(grown, self, self._sent, self._last, keeps=self._keeps)
        paths = {file.path: str(file.path) for file in layout.files}
        self._placed = PlacedFiles(paths, layout.weights, layout.masks, self._sending, packed=packed)

    def _replace(self) -> None:
        """Before the first object is written: what shows an earlier output to readers goes."""
        with self._replacing:
            shown = {name for name in self._replaced if _comes_last(PurePosixPath(name))} | (
                self._replaced & set(self._last)
            )
            if shown:
                self._folder.delete(shown)
                self._replaced -= shown

    def _sent(self, path: str, facts: Facts) -> None:
        """An object is there."""
        if path in self._last:
            return
        if self.identity is None:
            self._done[path] = facts
        else:
            self._keep_notes({path: facts})

    def _keep_notes(self, done: Mapping[str, Facts]) -> None:
        """Writes down that these objects are there, and the notes that are about no others."""
        with self._appending:
            there = self._done.keys() | done.keys()
            with self._noting:
                ready = [about for about in self._waiting if about <= there]
                notes = [(text, sorted(about)) for about in ready for text in self._waiting.pop(about)]
            self._noted_at = time.monotonic()
            if done or notes:
                self._journal.append(done, notes)
            self._done |= done

    def _written_with(self, files: tuple[str, ...]) -> frozenset[str]:
        """The files of the output that chunks write that name these."""
        known = self._names
        every = frozenset(str(file.path) for file in self.layout.files)
        return frozenset().union(*(known.get(name, every) for name in files))

    @cached_property
    def _names(self) -> Mapping[str, frozenset[str]]:
        """Names of files in chunks, of input or output, with all that is written for their tensors."""
        layout = self.layout
        tensors = layout.checkpoint.tensors
        found: dict[str, set[str]] = {str(file.path): {str(file.path)} for file in layout.files}
        places = (layout.weights, layout.masks)
        for name in dict.fromkeys((*places[0], *places[1])):
            own = {str(some[name].file) for some in places if name in some}
            stored = tensors.get(name)
            for one in (*own, *([] if stored is None else [str(stored.shard.relative)])):
                found.setdefault(one, set()).update(own)
        return {name: frozenset(some) for name, some in found.items()}

    def _send_result(self, name: str, file: tempfile.SpooledTemporaryFile[bytes]) -> None:
        with file:
            nbytes = file.tell()
            file.seek(0)
            if nbytes <= growing.PART_BYTES:
                self.put(name, file.read())
            else:
                self.send(name, iter(lambda: file.read(growing.PART_BYTES), b""), growing.PART_BYTES, 1)

    def _leave(self, error: BaseException | None) -> bool:
        """Ends a run without an output; whether a later one can continue it."""
        may = self.identity is not None and may_go_on(error)
        if may:
            with contextlib.suppress(MachineError):
                self._keep_notes({})
        if may and self._journal.count:
            return True
        with contextlib.suppress(MachineError):  # the next run removes what cannot be removed now
            self._remove()
        return False

    def _remove(self) -> None:
        """All that this run, and those that it continues, have written."""
        self._folder.delete(self._written | self._done.keys())
        self._journal.remove()

    def _refuse_lost(self) -> None:
        if self._lock.lost.is_set():
            raise MachineError(f"{self.layout.target}: another run has taken over this output; wait for it")


class RemotePortion(Struct, frozen=True):
    """Some files of an output in an object store; what a worker leaves incomplete is lost."""

    address: str
    files: tuple[OutputFile, ...]
    weights: Mapping[str, Place]
    masks: Mapping[str, Place]
    copies: tuple[CopyRange, ...]
    packed: bool

    @classmethod
    def of(cls, layout: OutputLayout, wanted: Container[PurePosixPath]) -> RemotePortion:
        return cls(
            str(layout.root),
            tuple(file for file in layout.files if file.path in wanted),
            *layout.places_of(wanted),
            tuple(one for one in layout.copies if one.file in wanted),
            packed=layout.mask_format == "packed",
        )

    @property
    def keeps_parts(self) -> bool:
        return False

    @contextlib.contextmanager
    def open(self) -> Iterator[RemoteWriter]:
        writer = RemoteWriter(self)
        try:
            yield writer
            writer.complete()
        finally:
            writer.close()


class RemoteWriter(PlacedPortion):
    """Writes the files of a RemotePortion."""

    def __init__(self, portion: RemotePortion) -> None:
        self.facts: dict[str, Any] = {}
        grown = growing_files(
            portion.files, (portion.weights, portion.masks), portion.copies, packed=portion.packed
        )
        folder = ObjectFolder(RemotePath(portion.address))
        self._sending = Uploads(grown, folder, self.facts.__setitem__)
        paths = {file.path: str(file.path) for file in portion.files}
        super().__init__(paths, portion.weights, portion.masks, self._sending, packed=portion.packed)

    def flush(self) -> None:
        self._sending.refuse_failed()

    def complete(self) -> None:
        self._sending.finish(list(self._paths.values()))

    def close(self) -> None:
        self._sending.close()


def growing_files(
    files: Iterable[OutputFile],
    places: tuple[Mapping[str, Place], Mapping[str, Place]],
    copies: Iterable[CopyRange],
    *,
    packed: bool,
) -> list[growing.GrowingFile]:
    """These files of a layout in parts, with the `places` of weights and of masks, which may be `packed`."""
    written: defaultdict[PurePosixPath, list[tuple[int, int]]] = defaultdict(list)
    tails: defaultdict[PurePosixPath, dict[int, int]] = defaultdict(dict)
    copied: defaultdict[PurePosixPath, list[CopyRange]] = defaultdict(list)
    for number, some in enumerate(places):
        for place in some.values():
            written[place.file].append((place.offset, place.offset + place.nbytes))
            if number == 1 and packed and place.numel % 8:
                tails[place.file][place.offset + place.nbytes - 1] = (1 << place.numel % 8) - 1
    for one in copies:
        copied[one.file].append(one)
    return [
        growing.GrowingFile(file, written[file.path], copied[file.path], tails[file.path], growing.PART_BYTES)
        for file in files
    ]


def _last_files(layout: OutputLayout) -> list[str]:
    """The files without which nobody takes an output for complete, in the order in which they appear."""
    if not layout.is_directory:
        return [layout.target.name]
    last = [file.path for file in layout.files if _comes_last(file.path)]
    return [str(path) for path in sorted(last, key=lambda path: path != _CONFIG)]


def _comes_last(path: PurePosixPath) -> bool:
    return len(path.parts) == 1 and (path == _CONFIG or path.name.endswith(INDEX_SUFFIX))


def _is_ours(existing: Container[str]) -> bool:
    """Whether objects are an earlier output, of weights or of masks."""
    masks = (f"masks{end}" for end in (SUFFIX, INDEX_SUFFIX))
    return f"{RESULTS}/report.json" in existing or (
        "report.json" in existing and any(one in existing for one in masks)
    )
