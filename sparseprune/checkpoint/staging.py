"""The writing side: an output grows in a hidden sibling and gets its name when it is complete.

Owns the staging folder, its lock, and the exchange of names at the end. Knows places from the layout
and not what is written there. Called by the pipeline, whose workers write from any thread in any order.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING, Self

from sparseprune.checkpoint import transfer
from sparseprune.checkpoint.partial import PartialFolder
from sparseprune.checkpoint.target import check_existing, check_target, final_paths, free_bytes, needed_bytes
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path, PurePosixPath
    from types import TracebackType

    from sparseprune.checkpoint.layout import CopyRange, OutputLayout, Place
    from sparseprune.checkpoint.transfer import Bytes


class StagedOutput:
    """An output while it is written: complete under its name after `commit`, or leaving nothing behind.

    A context manager. Entering it checks the target and makes every file of the layout at its final size
    with its header; an exit without `commit` removes all of it. Methods may be called from any thread.
    """

    def __init__(self, layout: OutputLayout, force: bool = False) -> None:  # noqa: FBT001, FBT002
        self.layout = layout
        self.force = force
        self._partial = PartialFolder(layout.target)
        self._lock = threading.Lock()
        self._unsynced: set[Path] = set()

    def __enter__(self) -> Self:
        check_target(self.layout, force=self.force)
        self._partial.acquire()
        try:
            # An earlier run that was killed while it replaced its target is undone by now.
            check_existing(self.layout, force=self.force)
            self._make_files()
        except BaseException:
            self._partial.discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.discard()

    def copy(self, part: CopyRange) -> None:
        """Copies bytes of the input to their place; MachineError where the input has become shorter."""
        path = self._path(part.file)
        with self._writing(path):
            transfer.copy_range(part.source, part.source_offset, path, part.offset, part.length)
        self._note(path)

    def write_weight(self, name: str, begin: int, data: Bytes) -> None:
        """Writes bytes of a pruned tensor from its byte `begin` on; nothing in an output of masks only."""
        if self.layout.writes_weights:
            self._write(name, self.layout.weights[name], begin, data)

    def write_mask(self, name: str, first: int, keep: Bytes) -> None:
        """Writes the mask of the elements from `first` on, one byte 0 or 1 for each, row-major.

        For packed masks `first` is a multiple of 8, and so is the end unless it is the tensor's. Nothing
        in an output without masks.
        """
        if self.layout.mask_format is None:
            return
        place = self.layout.masks[name]
        if self.layout.mask_format == "bool":
            self._write(name, place, first, keep)
            return
        end = first + memoryview(keep).nbytes
        if first % 8 or (end % 8 and end != place.numel) or end > place.numel:
            raise ValueError(
                f"packed mask of {name!r}: elements {first} to {end} of {place.numel} do not fill whole bytes"
            )
        self._write(name, place, first // 8, _packed(keep))

    def add_file(self, name: PurePosixPath, data: bytes) -> None:
        """Writes the report or the spec, under the name that the layout gives it; again to replace it."""
        if name not in (self.layout.report_file, self.layout.spec_file):
            raise ValueError(f"{name}: the layout has no such file")
        path = self._path(name)
        with self._writing(path):
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            transfer.create(path, len(data), data)

    def flush(self) -> None:
        """Waits until what has been written so far is on disk, so that `commit` finds little left to do.

        MachineError where that fails: the system tells it once, and `commit` might not hear of it again.
        """
        with self._lock:
            paths, self._unsynced = self._unsynced, set()
        for path in sorted(paths):
            with self._writing(path):
                transfer.sync(path, data_only=True)

    def commit(self) -> None:
        """Gives the complete output its name, once it is on disk; what it replaces goes only then."""
        layout = self.layout
        root = self._partial.output
        with self._writing(root):
            for folder, _, files in os.walk(root, topdown=False):
                for file in files:
                    transfer.sync(root.joinpath(folder, file))
                transfer.sync(root.joinpath(folder))
        check_existing(layout, force=self.force)
        with transfer.machine_errors(layout.target, "cannot get its name"):
            if layout.is_directory:
                self._partial.exchange()
            else:
                self._name_files()
        with transfer.machine_errors(layout.target.parent, "cannot be synced to disk"):
            transfer.sync(layout.target.parent)

    def _name_files(self) -> None:
        """The weights come last, so that whoever sees them sees their masks; all or none if none existed."""
        named: list[Path] = []
        try:
            for final in final_paths(self.layout):
                staged = self._partial.output / final.name
                if staged.exists():
                    replaced = os.path.lexists(final)
                    staged.replace(final)
                    named += [] if replaced else [final]
                else:
                    final.unlink(missing_ok=True)
        except BaseException:
            for final in named:
                final.unlink(missing_ok=True)
            raise

    def _make_files(self) -> None:
        for file in self.layout.files:
            path = self._path(file.path)
            with self._writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                transfer.create(path, file.size, file.begins_with, executable=file.executable)

    def _write(self, name: str, place: Place, begin: int, data: Bytes) -> None:
        end = begin + memoryview(data).nbytes
        if not 0 <= begin <= end <= place.nbytes:
            raise ValueError(f"bytes {begin} to {end} of {name!r} in {place.file}, which has {place.nbytes}")
        path = self._path(place.file)
        with self._writing(path):
            transfer.overwrite(path, data, place.offset + begin)
        self._note(path)

    def _note(self, path: Path) -> None:
        with self._lock:
            self._unsynced.add(path)

    def _path(self, name: PurePosixPath) -> Path:
        return self._partial.output / name

    def _writing(self, path: Path) -> AbstractContextManager[None]:
        return _Writing(path, self.layout)


class _Writing:
    """Turns an OSError of a write into a MachineError, with the bytes needed and free on a full disk."""

    def __init__(self, path: Path, layout: OutputLayout) -> None:
        self._path = path
        self._layout = layout

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError):
            return
        fact = f"{self._path}: cannot be written: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = free_bytes(self._layout.target.parent)
            fact += f"; the output needs {needed_bytes(self._layout)} bytes, {free} are free now"
        raise MachineError(fact) from error


def _packed(keep: Bytes) -> bytes:
    import numpy as np  # noqa: PLC0415  (not needed to write bool masks)

    return np.packbits(np.frombuffer(keep, dtype=np.uint8), bitorder="little").tobytes()
