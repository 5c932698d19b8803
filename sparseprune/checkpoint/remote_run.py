"""What a run keeps beside its output in an object store: who writes it, and what of it is finished.

Owns the lock, an object that its owner renews and others watch, and the journal, one object after each file.
Knows nothing of tensors and files but their names. Called by remote_output.py.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from sparseprune.checkpoint.remote import Facts
from sparseprune.errors import CheckpointError, MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sparseprune.checkpoint.objects import Mark, ObjectFolder

_FORMAT = 1
_RENEWED = 10.0  # seconds after which the owner of a lock renews it
_SILENT = 30.0  # seconds of silence after which another one takes it over
_PATIENCE = 10.0  # seconds for a renewal that is on its way when the run ends
_SIDE_BY_SIDE = 16  # objects that are read at one time
_OTHER = "give another name with -o"


class Owner(Struct, frozen=True):
    """The process that writes an output: `place` is where its number is unique, `start` when it began.

    `renewed` counts, so that every renewal is another content.
    """

    host: str
    place: str
    pid: int
    start: str
    token: str
    renewed: int = 0

    @classmethod
    def here(cls) -> Owner:
        return cls(socket.gethostname(), _place(), os.getpid(), _start(os.getpid()), secrets.token_hex(8))

    @property
    def is_dead(self) -> bool:
        """Whether it was a process of this machine and is none any more."""
        return self.place == _place() and self.place != "" and _start(self.pid) != self.start


class Lock:
    """The lock of an output: at most one live run has it; `lost` is set where another one took it.

    `tell` hears a line where one has to wait. Renewed every `period` seconds, taken over after `silent` ones.
    """

    def __init__(
        self,
        folder: ObjectFolder,
        name: str,
        target: object,
        periods: tuple[float, float] = (_RENEWED, _SILENT),
    ) -> None:
        self.lost = threading.Event()
        self._folder, self._name, self._target = folder, name, target
        self._renewed, self._silent = periods
        self._owner = Owner.here()
        self._mark: Mark | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="sparseprune-lock", daemon=True)

    def acquire(self, tell: Callable[[str], None]) -> None:
        """CheckpointError where another run is writing the output."""
        text = _json(self._owner)
        self._mark = self._folder.create(self._name, text)
        while self._mark is None:
            found = self._folder.read(self._name)
            if found is None:
                self._mark = self._folder.create(self._name, text)
            elif self._is_own(found[0]):  # an answer was lost on its way
                self._mark = found[1]
            else:
                mark = self._abandoned(*found, tell)
                self._mark = self._folder.replace(self._name, text, mark)
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back, if it is still ours."""
        self._done.set()
        if self._mark is None:
            return
        self._thread.join(_PATIENCE)
        if not self.lost.is_set():
            self._folder.delete([self._name])
        self._mark = None

    def _abandoned(self, data: bytes, mark: Mark, tell: Callable[[str], None]) -> Mark:
        """The version of a lock whose owner is gone; CheckpointError where it is at work."""
        owner = _owner_in(data)
        who = "a run" if owner is None else f"process {owner.pid} on {owner.host}"
        busy = f"{self._target}: {who} is writing this output; wait, or {_OTHER}"
        if owner is not None and owner.is_dead:
            return mark
        if owner is not None and owner.place == _place() != "":
            raise CheckpointError(busy)
        wait = f"waiting {self._silent:g} s to see whether it still is"
        tell(f"{self._target}: {who} was writing this output; {wait}")
        end = time.monotonic() + self._silent
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, self._silent / 15))
            now = self._folder.read(self._name)
            if now is None or now[1] != mark:
                if now is None:
                    return mark
                raise CheckpointError(busy)
        return mark

    def _renew(self) -> None:
        owner = self._owner
        while not self._done.wait(self._renewed):
            owner = msgspec.structs.replace(owner, renewed=owner.renewed + 1)
            try:
                mark = self._folder.replace(self._name, _json(owner), self._mark or {})
                if mark is None:  # taken, or an answer was lost on its way
                    found = self._folder.read(self._name)
                    mark = found[1] if found is not None and self._is_own(found[0]) else None
            except MachineError:
                continue  # whoever else takes the lock changes it
            if mark is None:
                self.lost.set()
                return
            self._mark = mark

    def _is_own(self, data: bytes) -> bool:
        owner = _owner_in(data)
        return owner is not None and owner.token == self._owner.token


class Noted(Struct):
    """What an earlier run left: its identity, all files it was to write, the `last` of them, what is done.

    `notes` are the records by key as JSON, with the files that they are about.
    """

    identity: dict[str, str]
    files: list[str]
    last: list[str]
    done: dict[str, Facts] = {}
    notes: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    objects: int = 0


class RemoteJournal:
    """The journal in a folder of objects; `count` is how many tell of something."""

    def __init__(self, folder: ObjectFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._lock = threading.Lock()
        self.count = 0

    def begin(self, identity: Mapping[str, str], files: Sequence[str], last: Sequence[str]) -> None:
        head = {"format": _FORMAT, "identity": dict(identity), "files": [*files], "last": [*last]}
        self._folder.put(f"{self._name}/identity", json.dumps(head).encode())

    def resume(self, found: Noted) -> None:
        self.count = found.objects

    def append(self, done: Mapping[str, Facts], notes: Iterable[tuple[bytes, Sequence[str]]]) -> None:
        """Files that are there, and notes as `note_text` makes them with the files that they are about."""
        files = json.dumps({name: [one.etag, one.nbytes] for name, one in done.items()}).encode()
        lines = b",".join(b"[%b,%b]" % (text, json.dumps([*names]).encode()) for text, names in notes)
        with self._lock:
            number, self.count = self.count, self.count + 1
        self._folder.put(f"{self._name}/{number:08d}", b'{"files":%b,"notes":[%b]}' % (files, lines))

    def read(self) -> Noted | None:
        """What an earlier run left; None where nothing can be made of it."""
        head = self._folder.read(f"{self._name}/identity")
        if head is None:
            return None
        try:
            told = json.loads(head[0])
            found = msgspec.convert({**told, "format": None}, Noted) if told["format"] == _FORMAT else None
        except (ValueError, TypeError, KeyError, msgspec.ValidationError):
            return None
        if found is None:
            return None
        names = sorted(name for name in self._folder.below(self._name) if name[-1].isdigit())
        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            texts = list(pool.map(self._folder.read, names))
        found.objects = 1 + max((int(name[-8:]) for name in names), default=-1)
        for text in texts:
            if text is not None:
                _take_in(found, text[0])
        return found

    def remove(self, *, identity: bool = True) -> None:
        """All of it, or all but what tells whose it is."""
        names = self._folder.below(self._name)
        gone = [name for name in names if name[-1].isdigit()]
        # What is done first: a run that is cut short here leaves a journal that tells less, not more.
        self._folder.delete(gone)
        if identity:
            self._folder.delete([name for name in names if name.endswith("/identity")])


def _take_in(found: Noted, text: bytes) -> None:
    try:
        told = json.loads(text)
        for name, (etag, nbytes) in told["files"].items():
            found.done[name] = Facts(nbytes, etag)
        for (key, record), files in told["notes"]:
            line = json.dumps([key, record], separators=(",", ":")).encode()
            found.notes[key] = (line, tuple(files))
    except (ValueError, TypeError, KeyError):
        return


def _owner_in(data: bytes) -> Owner | None:
    try:
        return msgspec.json.decode(data, type=Owner)
    except (ValueError, msgspec.ValidationError):
        return None


def _json(value: Any) -> bytes:  # noqa: ANN401
    return msgspec.json.encode(value)


def _place() -> str:
    """Where numbers of processes are unique: one start of one machine, one namespace; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _start(pid: int) -> str:
    """When a process began; "" where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    fields = status.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
