"""JSON as the safetensors package reads it: what Python's json would let pass is refused.

Owns the strictness (a key stands once, no NaN, numbers in range, no lone surrogates, bounded depth) and
how a found value is shown. Knows nothing of tensors. Called for headers and for index files; raises
ValueError with the bare fact, to which the caller adds the file.
"""

from __future__ import annotations

import json
import math
import reprlib
from typing import Any, NoReturn

# serde_json, the parser of the safetensors package, gives up at 128 levels.
MAX_DEPTH = 127
# Longer than any 64-bit integer; int() of a very long text is slow, then refused by Python.
_LONG = 21
_SMALLEST, _LARGEST = -(2**63), 2**64 - 1

_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200
_SHOWN.maxlist = _SHOWN.maxdict = 8
_SHOWN.maxlevel = 2


def shown(value: object) -> str:
    r"""What was found, as one line of bounded length for an error text: a stranger's file can hold anything.

    >>> shown("a\nb"), len(shown("a" * 1000))
    ("'a\\nb'", 200)
    """
    return _SHOWN.repr(value)


def strict_json(text: str) -> Any:  # noqa: ANN401  (JSON can be anything; callers check)
    """The value of a JSON text; ValueError with the fact where it is not acceptable.

    >>> strict_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    ValueError: the key 'a' stands twice in one object
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_number,
            parse_constant=_constant,
        )
        if "\\ud" in text or "\\uD" in text:
            _refuse_lone_surrogates(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    return value


def nested_deeper_than(value: object, levels: int) -> bool:
    """Whether lists and objects stand in each other more than `levels` deep.

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


def _refuse_lone_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError("not JSON: a lone surrogate stands in a string") from error
