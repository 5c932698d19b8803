"""Text for calibration: documents from files, and windows of tokens cut from them.

Owns reading of plain text and JSON records, tokenizing (messages by the tokenizer's chat template), cutting
and sampling. Knows no models, only a tokenizer. Reading documents imports no torch.
"""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sparseprune.errors import MachineError, SparsepruneError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from typing import TextIO

    from torch import Tensor

FIELD = "text"  # of a record, unless another one is asked for
CHATS = ("messages", "conversations")  # fields of a record without text
_LINES = (".jsonl", ".ndjson")
_VALUES = ".json"
_PIECE = 1 << 20  # characters that are read at once
_LONGEST_RECORD = 1 << 28  # characters
_ROLES = {"human": "user", "gpt": "assistant"}  # names that ShareGPT uses
_TYPES = {str: "text", bool: "true or false", int: "a number", float: "a number"}
_TYPES |= {list: "a list", dict: "an object", type(None): "nothing"}


class Chat(Struct, frozen=True):
    """Messages, each with a `role` and a `content`; `where` names the file and the line."""

    where: str
    messages: tuple[Mapping[str, Any], ...]


def read_documents(paths: Sequence[Path], field: str | None, most: int) -> list[str | Chat]:
    """The documents of some files; of each file the first `most` characters or a little more.

    A file is one document. A .jsonl or .ndjson file, or any file if `field` is given, has a record in each
    line; a .json file is a list of records, or one record after the other. A record is a text, or an object
    with text or messages in this field: by default in `text`, else in `messages` or `conversations`.

    Raises:
        SparsepruneError: no such file, no text in it, not UTF-8, a record without such a field.
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
    """The first `most` characters, in pieces: a large `most` takes no memory of its own."""
    while most > 0 and (piece := file.read(min(most, _PIECE))):
        most -= len(piece)
        yield piece


def _lines(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """The number and the value of each line that is not empty."""
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", error)
                raise SparsepruneError(f"{path}: line {number} is not JSON: {why}") from error


def _values(path: Path, file: TextIO) -> Iterator[tuple[int, Any]]:
    """The items of a list, or values one after the other, with the line where each begins."""
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
        # A value that reaches the end of the text may continue. Pieces grow, so that little is parsed twice.
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
        text = (
            document
            if isinstance(document, str)
            else "".join(one["content"] or "" for one in document.messages)
        )
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
    """A message with `role` and `content`, from either of the two usual forms."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else content
    for what, found, kinds in (("role", role, str), ("content", content, str | None)):
        if not isinstance(found, kinds):
            raise SparsepruneError(f"{where}: the {what} of a message is {_kind(found)}, wanted text")
    return {**message, "role": _ROLES.get(str(role), role), "content": content}


def _kind(value: Any) -> str:
    """The kind of a value in words.

    >>> _kind(3), _kind(None), _kind([])
    ('a number', 'nothing', 'an empty list')
    """
    return "an empty list" if value == [] else _TYPES[type(value)]


class Sequences(Struct, frozen=True, eq=False):
    """Tokens (sequences, length) and which of them count; `available` counts the windows in the text."""

    ids: Tensor
    counted: Tensor
    available: int

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.counted.sum())


def make_sequences(
    documents: Sequence[str | Chat],
    tokenizer: Any,
    count: int,
    length: int,
    seed: int,
    *,
    special: bool = True,
) -> Sequences:
    """`count` windows of `length` tokens each, drawn by `seed`, or all if there are fewer.

    Windows are cut from the documents one after the other; each gets the special tokens that the tokenizer
    adds. Special tokens count if `special` is true; padding never does.

    Raises:
        SparsepruneError: the text has no whole window, or the chat template refuses messages.
    """
    import torch  # noqa: PLC0415

    before, after = _special_around(tokenizer)
    inside = length - len(before) - len(after)
    if inside < 1:
        raise SparsepruneError(
            f"--length {length}: {len(before) + len(after)} special tokens around a sequence leave no room"
        )
    tokens = [token for document in documents for token in _tokens(tokenizer, as_text(document, tokenizer))]
    available = len(tokens) // inside
    if not available:
        raise SparsepruneError(
            f"the text has {len(tokens)} tokens, wanted {inside} for one sequence of --length {length}: "
            "give more text or a smaller --length"
        )
    drawn = sorted(random.Random(seed).sample(range(available), min(count, available)))  # noqa: S311
    rows = [[*before, *tokens[inside * place : inside * (place + 1)], *after] for place in drawn]
    ids = torch.tensor(rows, dtype=torch.int64)
    left_out = torch.tensor(sorted(_not_counted(tokenizer, special=special)), dtype=ids.dtype)
    counted = ~torch.isin(ids, left_out)
    if not special:
        counted[:, : len(before)] = False
        counted[:, length - len(after) :] = False
    if not bool(counted.any()):
        raise SparsepruneError("the text has only tokens that do not count: give other text")
    return Sequences(ids, counted, available)


def as_text(document: str | Chat, tokenizer: Any) -> str:
    """A document as text: messages by the chat template, or as "role: content" lines if there is none.

    transformers runs templates in its sandbox.
    """
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        return "".join(f"{one['role']}: {one['content'] or ''}\n" for one in document.messages)
    try:
        text: str = tokenizer.apply_chat_template([dict(one) for one in document.messages], tokenize=False)
        text.encode()
    except Exception as error:  # a template may raise any error
        why = " ".join(str(error).split()) or type(error).__name__
        raise SparsepruneError(
            f"{document.where}: the tokenizer's chat template refuses these messages: {why}"
        ) from error
    return text


def _not_counted(tokenizer: Any, *, special: bool) -> set[int]:
    """The ids that do not count: padding, or all special tokens except the one for unknown words."""
    ids = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    others = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    return ids & {tokenizer.pad_token_id} - others if special else ids


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def _special_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer adds before and after a text."""
    bare = _tokens(tokenizer, "a")
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    for place in range(len(whole) - len(bare) + 1):
        if bare and whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    return [], []
