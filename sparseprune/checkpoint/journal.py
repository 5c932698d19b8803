"""The journal of an unfinished output: what it depends on, and which pieces of work are on disk.

Lines of JSON, each after a check sum of all lines up to it: the first has the format and the identity, every
other one [key, record]. Owns this form and how a damaged journal is read. Knows neither keys nor records.
Called by output.py, which appends notes after their bytes are on disk.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self, TypeGuard

from sparseprune.checkpoint import file_io

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_FORMAT = 2
_NO_FILE = frozenset({errno.ENOENT, errno.ELOOP, errno.ENXIO})  # nothing there, a link, a socket
_DIGITS = 8  # of the check sum, a CRC-32
_LONGEST = 1 << 28  # bytes of a line; decisions on a billion blocks have fewer
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Notes(Mapping[str, Any]):
    """The records of a journal by key, parsed from their lines on demand: a line is a third of the memory.

    `forget` removes a record that is not needed again.
    """

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


@dataclass(frozen=True, slots=True)
class JournalContent:
    """The identity of the work, its records by key, and the end and the check sum of the last good line."""

    identity: Mapping[str, str]
    finished: Notes
    end: int
    check_sum: int


class Journal:
    """A journal that is written: notes are on disk once `append` returns; `notes` counts them.

    Not for two threads at one time, and not for use after an error.
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
        journal = cls(path, os.open(path, _CREATE, 0o600))
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
        file_io.sync_data(self._descriptor)
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
        if not _is_head(head):
            return None
        end = _DIGITS + len(text) + 2
        lines: dict[str, bytes] = {}
        while True:
            note, text, following = _next(file, check_sum)
            if not _is_note(note):
                return JournalContent(head["identity"], Notes(lines), end, check_sum)
            lines[note[0]] = text
            end, check_sum = end + _DIGITS + len(text) + 2, following


def _next(file: BinaryIO, check_sum: int) -> tuple[Any, bytes, int]:
    """The next line's value, None for a bad line; its text, and the check sum with it."""
    line = file.readline(_LONGEST)
    text = line[_DIGITS + 1 : -1]
    check_sum = zlib.crc32(text, check_sum)
    if line == b"%0*x %s\n" % (_DIGITS, check_sum, text):
        with suppress(ValueError, RecursionError):
            return json.loads(text), text, check_sum
    return None, b"", 0


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _is_head(head: object) -> TypeGuard[dict[str, dict[str, str]]]:
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        return False
    identity = head.get("identity")
    return isinstance(identity, dict) and all(isinstance(part, str) for part in identity.values())


def _is_note(note: object) -> TypeGuard[tuple[str, Any]]:
    return isinstance(note, list) and len(note) == 2 and isinstance(note[0], str)
