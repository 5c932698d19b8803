"""The journal of an unfinished output: what it depends on, and which pieces of work are on disk.

JSON lines: the first holds the format and the identity, every other one [key, record]. Owns the form and
what a torn or a foreign journal means. Knows neither keys nor records. Called by staging.py, which calls
`append` only with what is on disk.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sparseprune.checkpoint import transfer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_FORMAT = 1
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_APPEND = os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class JournalContent:
    """What a journal says: the work's identity, the records by key, and where its last whole line ends."""

    identity: Mapping[str, str]
    finished: Mapping[str, Any]
    end: int


class Journal:
    """A journal that is written: what `append` returned from is on disk; `notes` counts its pieces.

    Not to be used from two threads at one time, and no longer after an error.
    """

    def __init__(self, path: Path, descriptor: int, end: int, notes: int) -> None:
        self.path = str(path)
        self._descriptor = descriptor
        self._end = end
        self.notes = notes

    @classmethod
    def begin(cls, path: Path, identity: Mapping[str, str]) -> Self:
        """A new journal, on disk if its folder is; OSError where there is one."""
        journal = cls(path, os.open(path, _CREATE, 0o666), end=0, notes=0)
        try:
            journal._add(_line({"format": _FORMAT, "identity": dict(identity)}))
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, content: JournalContent) -> Self:
        """The journal that has this content, cut off after its last whole line."""
        descriptor = os.open(path, _APPEND)
        try:
            os.ftruncate(descriptor, content.end)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, content.end, len(content.finished))

    def append(self, lines: Sequence[bytes]) -> None:
        """Adds lines as `note_line` makes them and waits until they are on disk."""
        self._add(b"".join(lines))
        self.notes += len(lines)

    def close(self) -> None:
        os.close(self._descriptor)

    def _add(self, data: bytes) -> None:
        transfer.write_at(self._descriptor, data, self._end)
        transfer.sync_data(self._descriptor)
        self._end += len(data)


def note_line(key: str, record: object) -> bytes:
    r"""The line of one piece of work; TypeError or ValueError where JSON has no form for the record.

    >>> note_line("a", {"pruned": 3})
    b'["a",{"pruned":3}]\n'
    """
    return _line([key, record])


def read_journal(path: Path) -> JournalContent | None:
    """What a journal says; None where there is none, or one that this version cannot have written.

    A last line without its end was being written when the run died: it counts as not written.
    """
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    end = data.rfind(b"\n") + 1
    try:
        head, *lines = [json.loads(line) for line in data[:end].split(b"\n")[:-1]]
    except (ValueError, RecursionError):
        return None
    if not _is_head(head) or not all(_is_note(line) for line in lines):
        return None
    return JournalContent(head["identity"], dict(lines), end)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _is_head(head: object) -> bool:
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        return False
    identity = head.get("identity")
    return isinstance(identity, dict) and all(isinstance(part, str) for part in identity.values())


def _is_note(line: object) -> bool:
    return isinstance(line, list) and len(line) == 2 and isinstance(line[0], str)
