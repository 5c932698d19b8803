"""JSON that strangers wrote: strict parsing, small files, and values as error texts show them.

Owns what is acceptable JSON in a header, an index or a config. Knows no keys of theirs. Called by the
rest of this room, and for `read_object` by the command line.
"""

from __future__ import annotations

import errno
import json
import math
import os
import reprlib
import stat
from typing import TYPE_CHECKING, Any, NoReturn

from sparseprune.checkpoint.not_safetensors import missing_advice
from sparseprune.checkpoint.remote import RemotePath
from sparseprune.errors import CheckpointError, MachineError, size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LARGEST_DOCUMENT = 100_000_000
# Errors of names that lead to no file: the user's error, not the machine's.
_LEADS_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG})
# serde_json, the parser of the safetensors package, gives up at 128 levels.
MAX_DEPTH = 127
_LONG = 21  # digits, more than any 64-bit integer has: int() of a very long text is slow, then fails
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200
_SHOWN.maxlist = _SHOWN.maxdict = 8
_SHOWN.maxlevel = 2


def shown(value: object) -> str:
    r"""A value that was found, as one short line for an error text: a stranger's file can hold anything.

    >>> shown("a\nb"), len(shown("a" * 1000))
    ("'a\\nb'", 200)
    """
    return _SHOWN.repr(value)


def strict_json(text: str) -> Any:  # noqa: ANN401  (JSON can be anything; callers check)
    """The value of a JSON text; ValueError with the reason where it is not acceptable.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands twice in one object
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_number, parse_constant=_constant
        )
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    except UnicodeEncodeError as error:
        raise ValueError("not JSON: a lone surrogate stands in a string") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    return value


def nested_deeper_than(value: object, levels: int) -> bool:
    """Whether lists and objects are nested more than `levels` deep.

    >>> nested_deeper_than([[1]], 2), nested_deeper_than([[1]], 1)
    (False, True)
    """
    layer = [value]
    for _ in range(levels):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return any(isinstance(inner, dict | list) for inner in layer)


def read_object(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError naming the file where it holds anything else."""
    value = read_json(path, parse)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds {shown(value)}, wanted a JSON object")
    return value


def read_object_if_any(path: Path) -> dict[str, Any] | None:
    """As `read_object`; None where there is no file."""
    try:
        return read_object(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_json(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:  # noqa: ANN401  (JSON can be anything)
    """The value in a small JSON file; CheckpointError naming the file where it holds none."""
    try:
        status = path.stat()
        # Before it is opened: a pipe would block, and a device has no end.
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file; wanted a small JSON file, or none")
        if status.st_size > LARGEST_DOCUMENT:
            raise CheckpointError(f"{path}: larger than {size(LARGEST_DOCUMENT)}; wanted a small JSON file")
        return parse(path.read_bytes().decode())
    except OSError as error:
        # Not in a variable: the error's traceback holds this frame, and a cycle would keep callers alive.
        unread = f"{path}: cannot be read: {error.strerror}"
        raise (leads_nowhere(path, error) or MachineError(unread)) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 at byte {error.start}; wanted a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def leads_nowhere(path: Path, error: OSError) -> CheckpointError | None:
    """The refusal of a path that leads to no file; None where the machine failed."""
    if error.errno not in _LEADS_NOWHERE:
        return None
    if error.errno == errno.ENOENT and error.strerror not in {None, os.strerror(errno.ENOENT)}:
        return CheckpointError(f"{path}: {error.strerror}")  # there is not even a place for it
    why = missing_advice(str(path)) if error.errno == errno.ENOENT else f": {error.strerror}"
    if error.errno == errno.ENOENT and not isinstance(path, RemotePath) and os.path.islink(path):  # noqa: PTH114  (False for a name that is too long)
        why = f": it is a link to {os.readlink(path)}, which is not there"  # noqa: PTH115
    return CheckpointError(f"{path}: no such file{why}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {shown(key)} stands twice in one object")
            seen.add(key)
    return members


def _integer(text: str) -> int | float:
    if text == "-0" or len(text) > _LONG:
        return _number(text)
    value = int(text)
    return value if _SMALLEST <= value <= _LARGEST else float(value)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("not JSON: a number is out of range")
    return value


def _constant(text: str) -> NoReturn:
    raise ValueError(f"not JSON: {text} is no JSON value")
