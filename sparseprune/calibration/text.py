"""Documents out of text files: plain text, or JSON records that hold text or messages.

Owns reading and what is wrong with a file; knows neither tokens nor models.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TextIO

FIELD = "text"  # of a record, where no other one is asked for
CHATS = ("messages", "conversations")  # fields of a record that has no text
_LINES = (".jsonl", ".ndjson")
_VALUES = ".json"
_PIECE = 1 << 20  # characters that are read at one time
_LONGEST_RECORD = 1 << 28  # characters
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
_TYPES = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, each with a `role` and a `content`; `where` names the file and the place in it."""

    where: str
    messages: tuple[Mapping[str, Any], ...]


def read_documents(paths: Sequence[Path], field: str | None, most: int) -> list[str | Chat]:
    """The documents of some files, of each file the first `most` characters or a little more.

    A file is one document. One that ends in .jsonl or .ndjson, or any if `field` is given, has a record in
    each line; one that ends in .json is a list of records, or one after the other. A record is a text, or an
    object that has text or messages in this field: by default in `text`, else `messages`, `conversations`.

    Raises:
        SparsepruneError: no such file, no text in it, not UTF-8, a record that has no such field.
    """
    documents = [document for path in paths for document in _documents(path, field, most)]
    if not any(isinstance(document, Chat) or document.strip() for document in documents):
        raise SparsepruneError(f"{', '.join(map(str, paths))}: there is no text in it")
    return documents


def _documents(path: Path, field: str | None, most: int) -> list[str | Chat]:
    suffix = path.suffix.lower()
    try:
        with path.open(encoding="utf-8-sig") as file:
            if suffix == _VALUES:
                return list(_records(path, _values(path, file), field, most))
            if field is None and suffix not in _LINES:
                return ["".join(_pieces(file, most))]
            return list(_records(path, _lines(path, file), field, most))
    except FileNotFoundError as error:
        raise SparsepruneError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise SparsepruneError(f"{path}: this is a directory, wanted a file of text") from error
    except UnicodeDecodeError as error:
        raise SparsepruneError(f"{path}: not UTF-8 text: {error.reason}") from error
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error


def _pieces(file: TextIO, most: int) -> Iterator[str]:
    """The first `most` characters, a piece at a time: a large number takes no memory of its own."""
    while most > 0 and (piece := file.read(min(most, _PIECE))):
        most -= len(piece)
        yield piece


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not empty, and its value."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise SparsepruneError(f"{path}: line {number} is not JSON: {why}") from error


def _values(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """The items of a list, or values that follow each other, with the line in which each begins."""
    decoder = json.JSONDecoder()
    text, line, wanted = "", 1, _PIECE
    begun = open_list = False
    while True:
        rest = text.lstrip()
        line += text.count("\n", 0, len(text) - len(rest))
        if rest[:1] == "[" and not begun:
            begun, open_list, text = True, True, rest[1:]
            continue
        if open_list and rest[:1] in {",", "]"}:
            open_list, text = rest[0] == ",", rest[1:]
            continue
        try:
            value, end = decoder.raw_decode(rest)
            problem = None
        except (ValueError, RecursionError) as error:
            value, end, problem = None, len(rest), error
        # What reaches the end of what was read may go on behind it. Pieces grow, to parse few of them again.
        piece = "" if end < len(rest) or len(rest) > _LONGEST_RECORD else file.read(wanted)
        if piece:
            text, wanted = rest + piece, 2 * wanted
        elif problem is None:
            yield line, value
            begun, wanted = True, _PIECE
            line += rest.count("\n", 0, end)
            text = rest[end:]
        elif rest or open_list:
            why = getattr(problem, "msg", problem) if rest else "the list has no end"
            raise SparsepruneError(f"{path}: line {line} is not JSON: {why}") from problem
        else:
            return


def _records(
    path: Path, values: Iterator[tuple[int, Any]], field: str | None, most: int
) -> Iterator[str | Chat]:
    read = 0
    for number, value in values:
        where = f"{path}: line {number}"
        document = _document(where, value, field)
        text = document if isinstance(document, str) else "".join(map(_said, document.messages))
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise SparsepruneError(
                f"{where} has a lone surrogate, half of a character; mend the line or leave it out"
            ) from error
        yield document
        read += len(text)
        if read >= most:
            return


def _document(where: str, value: Any, field: str | None) -> str | Chat:
    if isinstance(value, str):
        return value
    wanted = (FIELD, *CHATS) if field is None else (field,)
    found = next((name for name in wanted if isinstance(value, dict) and name in value), None)
    if found is None:
        there = ", ".join(value) or "nothing" if isinstance(value, dict) else _kind(value)
        raise SparsepruneError(
            f'{where} has no text under "{wanted[0]}", but {there}; name the field with --field'
        )
    content = value[found]
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(isinstance(one, dict) for one in content):
        return Chat(where, tuple(_message(f'{where}, "{found}"', one) for one in content))
    raise SparsepruneError(
        f'{where} has {_kind(content)} under "{found}", wanted text or a list of messages; name another '
        "field with --field"
    )


def _message(where: str, message: dict[str, Any]) -> Mapping[str, Any]:
    """A message with `role` and `content`, whichever of the two usual ways it was written."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    if not isinstance(role, str) or not isinstance(content, str | None):
        found = _kind(role) if not isinstance(role, str) else _kind(content)
        what = "role" if not isinstance(role, str) else "content"
        raise SparsepruneError(f"{where}: the {what} of a message is {found}, wanted text")
    return {**message, "role": _ROLES.get(role, role), "content": content}


def _said(message: Mapping[str, Any]) -> str:
    return message["content"] or ""


def _kind(value: Any) -> str:
    """What a value is, for people.

    >>> _kind(3), _kind(None), _kind([])
    ('a number', 'nothing', 'an empty list')
    """
    if value is None:
        return "nothing"
    return "an empty list" if value == [] else _TYPES[type(value)]
