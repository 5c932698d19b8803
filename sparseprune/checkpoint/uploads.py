"""Files on their way to an object store: each is sent by one thread, its parts in their order.

Owns which files are sent when, how much waits and how much is on the way, and failures. What a part is made
of is growing.py's. Knows no journal. Called by remote_output.py, here and on other machines.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Protocol

from sparseprune.checkpoint import file_io
from sparseprune.checkpoint.growing import GrowingFile, Part, Spool
from sparseprune.checkpoint.portions import Writer
from sparseprune.checkpoint.threads import Worker
from sparseprune.errors import MachineError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sparseprune.checkpoint.file_io import Bytes, WritableBytes
    from sparseprune.checkpoint.layout import CopyRange
    from sparseprune.checkpoint.remote import Facts

_STARTED = 3  # files that are being sent: the others wait until one is there
_ON_THE_WAY = 54 << 20  # bytes in memory of all files that are being sent
_WAITING = 128 << 20  # bytes that wait on disk before workers wait for those that are on the way
_LOOK = 0.1  # seconds
_PATIENCE = 10  # seconds for what is on the way when all is given up


class Target(Protocol):
    """Where files are sent: each one whole, or not at all."""

    def put(self, name: str, data: Bytes) -> Facts:
        """A small file."""

    def send(self, name: str, pieces: Iterator[Bytes], part_bytes: int, side_by_side: int) -> Facts:
        """A file in pieces of `part_bytes`, the last one shorter; nothing is left where `pieces` fails."""


class Uploads(Writer):
    """Writes to files that are sent while they grow; writes and copies come from any thread.

    What is written to other files is dropped.
    `sent` is called, by the thread that sent a file, with its path and what is known of it. Files that were
    not touched are not sent before `finish`; of those that are `held` the last part is not, before
    `release`. `keeps` lets what was written be read until `close`. After a failure every call raises it.
    """

    def __init__(
        self,
        files: Iterable[GrowingFile],
        target: Target,
        sent: Callable[[str, Facts], None],
        held: Iterable[str] = (),
        *,
        keeps: bool = False,
    ) -> None:
        self._files = {str(one.file.path): one for one in files}
        self._target = target
        self._sent = sent
        self._held = set(held)
        self._at_gate: set[str] = set()
        self._keeps = keeps
        self._spool = Spool()
        self._changed = threading.Condition()
        self._touched: set[str] = set()
        self._waiting = dict.fromkeys(self._files)
        self._started: dict[str, Worker] = {}
        self._ended: list[Worker] = []
        large = min(_STARTED, sum(len(one.parts) > 1 for one in self._files.values()))
        self._room = _ON_THE_WAY // max(1, large)
        self._failure: BaseException | None = None
        self._given_up = False

    def __contains__(self, path: str) -> bool:
        return path in self._files

    @property
    def touched(self) -> frozenset[str]:
        """The files that were written to."""
        with self._changed:
            return frozenset(self._touched)

    @property
    def left_bytes(self) -> int:
        """Of files that are not sent whole."""
        with self._changed:
            return sum(self._left_of(self._files[path]) for path in (*self._waiting, *self._started))

    def write(self, path: str, data: Bytes, offset: int) -> None:
        view = file_io.as_bytes(data)
        file = self._files.get(path)
        if file is None:
            return
        for part, begin, end in file.within(offset, offset + len(view)):
            self._write(path, file, part, begin, view[begin - offset : end - offset])

    def merge(self, path: str, offset: int, value: int, bits: int) -> None:
        file = self._files.get(path)
        if file is None:
            return
        with self._changed:
            whole = file.merged(offset, value, bits)
            self._touched.add(path)
        if whole is not None:
            self.write(path, bytes([whole]), offset)

    def copy(self, path: str, part: CopyRange) -> None:  # noqa: ARG002
        """Nothing yet: bytes are copied when the part that has them is sent."""
        with self._changed:
            self._refuse_failed()
            if path in self._files:
                self._touched.add(path)
                self._start_some()

    def read_into(self, path: str, offset: int, buffer: WritableBytes) -> None:
        """Fills a buffer with what was written, if that is kept."""
        view = file_io.as_bytes(buffer)
        for part, begin, end in self._files[path].within(offset, offset + len(view)):
            if part.slot >= 0:
                self._spool.read_into(view[begin - offset : end - offset], part.slot + begin - part.begin)

    def refuse_failed(self) -> None:
        """Raises the failure that ended the sending, if there was one."""
        with self._changed:
            self._refuse_failed()

    def finish(self, paths: Iterable[str], progress: Callable[[int], None] = lambda _: None) -> None:
        """Waits until these files are sent, or held; no more is written to them. `progress` gets bytes."""
        wanted = set(paths) & self._files.keys()
        with self._changed:
            for path in wanted:
                self._files[path].finished = True
            self._touched |= wanted
            left = sum(self._left_of(self._files[path]) for path in wanted)
            while True:
                self._refuse_failed()
                self._start_some()
                rest = (wanted & {*self._waiting, *self._started}) - self._at_gate
                now = sum(self._left_of(self._files[path]) for path in rest)
                if now != left:
                    progress(left - now)
                    left = now
                if not rest:
                    return
                self._changed.wait(_LOOK)

    def release(self, path: str) -> None:
        """Sends the last part of a file that is held, too, and waits until it is there."""
        with self._changed:
            self._held.discard(path)
            self._at_gate.discard(path)
            self._changed.notify_all()
        self.finish([path])

    def drop(self, paths: Iterable[str]) -> None:
        """These files are not sent from here."""
        with self._changed:
            for path in paths:
                self._waiting.pop(path, None)

    def close(self) -> None:
        """Gives up what is not sent yet, and waits a moment for what is on the way."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._started, _PATIENCE)
            hangs, ended = bool(self._started), self._ended
        for thread in ended:
            thread.wait()
        if not hangs:
            self._spool.close()

    def _write(self, path: str, file: GrowingFile, part: Part, begin: int, view: memoryview) -> None:
        with self._changed:
            self._refuse_failed()
            if part.taken:
                return  # bytes are determined: it is the same once more
            self._touched.add(path)
            if part.slot < 0:
                self._wait_for_room(part)
            if part.slot < 0:
                part.slot = self._spool.take(part.nbytes)
            part.writers += 1
        done = 0
        try:
            self._spool.write(view, part.slot + begin - part.begin)
            done = len(view)
        finally:
            with self._changed:
                part.writers -= 1
                part.there.add(begin, begin + done)
                if file.is_ready(part.number):
                    self._start_some()
                    self._changed.notify_all()

    def _wait_for_room(self, part: Part) -> None:
        """While much waits to be sent, and is being sent."""
        while (
            not self._keeps
            and part.slot < 0
            and self._spool.held + part.nbytes > _WAITING
            and any(self._moves(self._files[path]) for path in self._started)
        ):
            self._changed.wait(_LOOK)
            self._refuse_failed()

    def _moves(self, file: GrowingFile) -> bool:
        """Whether room comes free without another write."""
        for number in range(file.next, len(file.parts)):
            if not file.is_ready(number):
                return False
            if file.parts[number].slot >= 0:
                return True
        return False

    def _left_of(self, file: GrowingFile) -> int:
        begin = file.parts[file.next].begin if file.next < len(file.parts) else file.file.size
        return file.file.size - begin

    def _refuse_failed(self) -> None:
        failure = self._failure
        if isinstance(failure, MachineError):
            raise type(failure)(*failure.args) from failure
        if failure is not None:
            raise failure
        if self._given_up:
            raise AbandonedError

    def _start_some(self) -> None:
        """Starts to send files of which the first part is ready, those that are whole first."""
        if self._is_over or len(self._started) >= _STARTED:
            return
        ready = [path for path in self._waiting if path in self._touched and self._files[path].is_ready(0)]
        ready.sort(key=lambda path: not self._files[path].is_whole)
        for path in ready[: _STARTED - len(self._started)]:
            del self._waiting[path]
            thread = Worker(partial(self._send, path), f"sparseprune-send-{path}", daemon=True)
            self._started[path] = thread
            if not thread.begin():
                self._failure = MachineError(f"{path}: cannot be sent: the system has no thread left")
                del self._started[path]

    def _send(self, path: str) -> None:
        file = self._files[path]
        failure: BaseException | None = None
        try:
            if len(file.parts) == 1:
                (data,) = self._pieces(file)
                stored = self._target.put(path, data)
            else:
                # Meanwhile one more is made, and is there twice when obstore takes it.
                side_by_side = max(1, self._room // file.part_bytes - 2)
                stored = self._target.send(path, self._pieces(file), file.part_bytes, side_by_side)
            self._sent(path, stored)
        except AbandonedError:
            pass
        except BaseException as error:  # noqa: BLE001  (raised in the threads that write)
            failure = error
        with self._changed:
            self._failure = self._failure or failure
            self._ended.append(self._started.pop(path))
            self._start_some()
            self._changed.notify_all()

    def _pieces(self, file: GrowingFile) -> Iterator[bytearray]:
        """The parts in their order, each once it is ready."""
        for part in file.parts:
            with self._changed:
                file.next = part.number
                while not (self._is_over or file.is_ready(part.number)):
                    self._changed.wait()
                if self._is_over:
                    raise AbandonedError
                part.taken = True
            yield self._content(file, part)
        file.next = len(file.parts)

    def _content(self, file: GrowingFile, part: Part) -> bytearray:
        data = file.content(part, self._spool)
        with self._changed:
            if part.slot >= 0 and not self._keeps:
                self._spool.give(part.slot, part.nbytes)
                part.slot = -1
                self._changed.notify_all()
        if part is file.parts[-1]:
            self._wait_for_release(str(file.file.path))
        return data

    @property
    def _is_over(self) -> bool:
        return self._given_up or self._failure is not None

    def _wait_for_release(self, path: str) -> None:
        with self._changed:
            if path in self._held:
                self._at_gate.add(path)
                self._changed.notify_all()
            while path in self._held:
                if self._is_over:
                    raise AbandonedError
                self._changed.wait()


class AbandonedError(BaseException):
    """Ends the sending of a file that nobody wants any more."""
