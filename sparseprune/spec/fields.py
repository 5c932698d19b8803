"""The types of keys: what a value of TOML may be, and what it is read into.

A text of its own (`OWN_WORDS`) says what is wrong inside a pattern or an expression; for all else the
key's description is what an error says is wanted. Used by the models of the tables.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, StrictInt, StrictStr
from pydantic_core import PydanticCustomError

from sparseprune.spec.expressions import (
    LARGEST,
    Expression,
    ExpressionError,
    SliceEntry,
    parse_expression,
    parse_slice,
)
from sparseprune.spec.patterns import PatternError, TensorPattern, parse_pattern
from sparseprune.spec.regexes import RegexPattern, parse_regex

if TYPE_CHECKING:
    from collections.abc import Callable

Read = TypeVar("Read")
OWN_WORDS = "own_words"  # the type of a validation error whose text is a whole sentence already
_TAKEN = ("cls", "tensor", "pattern")  # what the functions that read einops patterns call their arguments


def own_words(text: str) -> PydanticCustomError:
    """An error whose text is told as it is."""
    return PydanticCustomError(OWN_WORDS, "{text}", {"text": text})


def _reader(parse: Callable[[str], Read]) -> Callable[[object], Read]:
    """A validator that parses texts, and lets a parser's own errors through."""

    def read(value: object) -> Read:
        if not isinstance(value, str):
            raise ValueError("no text")  # noqa: TRY004  (pydantic turns ValueErrors into problems)
        try:
            return parse(value)
        except PatternError as error:
            raise own_words(f'"{value}" {error}') from error
        except ExpressionError as error:
            raise own_words(str(error)) from error

    return read


_expression = _reader(parse_expression)


def _integer(least: int) -> Callable[[object], int | Expression]:
    def read(value: object) -> int | Expression:
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST:
            return value
        return _expression(value)

    return read


def _number(most: float) -> Callable[[object], float | Expression]:
    def read(value: object) -> float | Expression:
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most:
            return float(value)
        return _expression(value)

    return read


def _extent(value: object) -> int | Expression:
    return -1 if value == -1 and type(value) is int else _integer(1)(value)


def _slice_entry(value: object) -> SliceEntry:
    single = type(value) is int and abs(value) <= LARGEST
    return _reader(parse_slice)(str(value) if single else value)


def _axes(value: object) -> tuple[tuple[str, int | Expression], ...]:
    if not isinstance(value, dict):
        raise ValueError("no table")  # noqa: TRY004
    for name in value:
        if not (name.isascii() and name.isidentifier()) or name in _TAKEN:
            raise own_words(f'"{name}" cannot be the name of an axis: take another one, such as q')
    return tuple((name, _integer(1)(size)) for name, size in value.items())


def _einops(pattern: str) -> str:
    if pattern.count("->") != 1:
        raise own_words(f'"{pattern}" is no einops pattern: wanted two sides, as in "(kv q) k -> kv q k"')
    return pattern


def _one_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Integer = Annotated[int | Expression, PlainValidator(_integer(0))]
Positive = Annotated[int | Expression, PlainValidator(_integer(1))]
Share = Annotated[float | Expression, PlainValidator(_number(1.0))]
Threshold = Annotated[float | Expression, PlainValidator(_number(sys.float_info.max))]
Text = Annotated[Expression, PlainValidator(_expression)]
Extents = tuple[Annotated[int | Expression, PlainValidator(_extent)], ...]
Sizes = tuple[Annotated[int | Expression, PlainValidator(_integer(0))], ...]
Slices = tuple[Annotated[SliceEntry, PlainValidator(_slice_entry)], ...]
Axes = Annotated[tuple[tuple[str, int | Expression], ...], PlainValidator(_axes)]
Einops = Annotated[StrictStr, AfterValidator(_einops)]
Names = Annotated[tuple[StrictStr, ...], Field(min_length=1)]
Order = tuple[Annotated[StrictInt, Field(ge=0, le=LARGEST)], ...]
Across = Literal["all"] | tuple[StrictStr, ...]
Patterns = Annotated[
    tuple[Annotated[TensorPattern, PlainValidator(_reader(parse_pattern))], ...],
    BeforeValidator(_one_as_list),
    Field(min_length=1),
]
Regex = Annotated[RegexPattern, PlainValidator(_reader(parse_regex))]
