"""What a tensor pattern consists of, and the two ways to match its tokens against a whole name.

`regex_of` translates to `re`, which is fast; `match_tokens` needs no backtracking, so that no pattern
takes exponential time; `floating` tells which is the right one. Both read an ambiguous name in one way:
earlier tokens take as much as they can. Called by `patterns` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Literal:
    """Text that stands for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class Wildcard:
    """Text inside a piece, or across pieces; a named one is a capture and is not empty."""

    across: bool
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Stem:
    """Whole pieces at the beginning of a name and the dot after them, or nothing; a capture lacks the dot."""

    name: str | None = None


@dataclass(frozen=True, slots=True)
class Words:
    """One of some words, captured."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Again:
    """The text that a capture has matched before."""

    name: str


Token = Literal | Wildcard | Stem | Words | Again


_MOST_PLACES = 10_000_000  # tokens times characters of a name
_MOST_HELD = 50_000_000  # states times the characters that they may hold
_STATE = 250  # what a state takes beside


class TooManyStatesError(Exception):
    """A name and tokens that would take very long, or much memory, to match."""


def is_capture(token: Token) -> TypeGuard[Wildcard | Stem | Words]:
    """Whether the token stands for a capture at its first place."""
    return isinstance(token, Words) or (isinstance(token, Wildcard | Stem) and token.name is not None)


def regex_of(tokens: Iterable[Token]) -> str:
    """The regular expression that says the same; captures are groups of their names."""
    return "".join(_regex_of_token(token) for token in tokens)


def floating(tokens: Sequence[Token]) -> int:
    """How many tokens may end at several places for one start."""
    followers = (*tokens[1:], Literal("."))  # the end of the name ends a piece too
    return sum(_floats(token, after) for token, after in zip(tokens, followers, strict=True))


def match_tokens(tokens: Sequence[Token], text: str) -> tuple[str, ...] | None:
    """The texts of all captures, in order, if the tokens match the whole text.

    A depth-first search that enters no state twice and none from which the rest cannot match. Without
    repeated captures it never turns back, so that its time is tokens times characters. A state is the
    token, the place in the text and what the captures hold that a later token repeats.
    """
    if len(tokens) * len(text) > _MOST_PLACES:
        raise TooManyStatesError
    fits = _fitting_ends(tokens, text)
    defined = {token.name: at for at, token in enumerate(tokens) if is_capture(token)}
    last_use = {defined[token.name]: at for at, token in enumerate(tokens) if isinstance(token, Again)}
    starts, choices = [0], [_ends(tokens[0], text, 0, "")]
    seen: set[tuple[int, int, tuple[str, ...]]] = set()
    while choices:
        end = next(choices[-1], None)
        if end is None:
            starts.pop()
            choices.pop()
            continue
        index, places = len(starts), [*starts, end]
        if not fits[index][end]:
            continue
        if index == len(tokens):
            return tuple(_held(tokens[at], text[places[at] : places[at + 1]]) for at in defined.values())
        held = {
            at: _held(tokens[at], text[places[at] : places[at + 1]])
            for at, use in last_use.items()
            if at < index <= use
        }
        state = (index, end, tuple(held.values()))
        if state not in seen:
            seen.add(state)
            if last_use and len(seen) * (len(text) + _STATE) > _MOST_HELD:
                raise TooManyStatesError
            token = tokens[index]
            again = held[defined[token.name]] if isinstance(token, Again) else ""
            starts.append(end)
            choices.append(_ends(token, text, end, again))
    return None


def _held(token: Token, text: str) -> str:
    """What a capture holds of the text that its token matches."""
    return text.removesuffix(".") if isinstance(token, Stem) else text


def _fitting_ends(tokens: Sequence[Token], text: str) -> list[list[bool]]:
    """`[i][place]`: can the tokens from i on match the text from there, if `Again` matches any text?"""
    fits = [[place == len(text) for place in range(len(text) + 1)]]
    for token in reversed(tokens):
        fits.append(_fitting_starts(token, text, fits[-1]))
    return fits[::-1]


def _fitting_starts(token: Token, text: str, after: list[bool]) -> list[bool]:
    if isinstance(token, Stem):  # which stands at the beginning only
        return [any(after[end] for end in _ends(token, text, 0, "")), *[False] * len(text)]
    if not isinstance(token, Wildcard | Again):
        return [any(after[end] for end in _ends(token, text, start, "")) for start in range(len(text) + 1)]
    wildcard = Wildcard(across=True) if isinstance(token, Again) else token
    fits, ends_later = [False] * len(after), False
    for place in range(len(text), -1, -1):
        if place < len(text):  # one more character, then an end there or further on
            ends_later = (ends_later or after[place + 1]) and (wildcard.across or text[place] != ".")
        fits[place] = ends_later or (wildcard.name is None and after[place])
    return fits


def _ends(token: Token, text: str, start: int, again: str) -> Iterator[int]:
    """Where a token that starts here may end, best first."""
    match token:
        case Wildcard(across, name):
            piece_end = text.find(".", start)
            furthest = len(text) if across or piece_end < 0 else piece_end
            yield from range(furthest, start - (name is None), -1)
        case Stem(name):
            dots = [at for at in range(start + (name is not None), len(text)) if text[at] == "."]
            yield from (at + 1 for at in reversed(dots))
            yield start
        case Words(_, words):
            yield from (start + len(word) for word in words if text.startswith(word, start))
        case Literal(word):
            yield from (start + len(word),) * text.startswith(word, start)
        case Again(_):
            yield from (start + len(again),) * text.startswith(again, start)


def _regex_of_token(token: Token) -> str:  # noqa: PLR0911  (one row for each kind of token)
    match token:
        case Literal(text):
            return re.escape(text)
        case Wildcard(across, None):
            return ".*" if across else "[^.]*"
        case Wildcard(across, name):
            return f"(?P<{name}>{'.+' if across else '[^.]+'})"
        case Stem(None):
            return r"(?:.*\.)?"
        case Stem(name):  # what it holds, then its dot, which is missing at the beginning of the name alone
            return rf"(?P<{name}>(?:.+(?=\.))?)(?:\A|(?!\A)\.)"
        case Words(name, words):
            return f"(?P<{name}>{'|'.join(map(re.escape, words))})"
        case Again(name):
            return f"(?P={name})"


def _floats(token: Token, after: Token) -> bool:
    match token:
        case Wildcard(across=False):
            return not (isinstance(after, Literal) and after.text.startswith("."))
        case Wildcard(across=True) | Stem():
            return True
        case Words(_, words):
            return any(other.startswith(word) for word in words for other in words if other != word)
    return False
