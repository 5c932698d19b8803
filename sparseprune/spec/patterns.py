"""Tensor patterns: `model.layers.{layer}.mlp.{part:gate|up}_proj.weight` and the text that they match.

`parse_pattern` turns text into tokens once; `TensorPattern.match` gives the captures of a whole name or
None. Where a name can be read in several ways, earlier captures take as much as they can. Knows names
only, no tensors; the schema of the tables calls it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from keyword import iskeyword
from typing import TYPE_CHECKING

from sparseprune.spec.tokens import (
    Again,
    Literal,
    Stem,
    Token,
    TooManyStatesError,
    Wildcard,
    Words,
    floating,
    is_capture,
    match_tokens,
    regex_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sparseprune.spec.bound import Captures

# `re` tries at worst length ** floating ways: with three tokens that float, a name of 200 characters
# takes some milliseconds. From four on the matcher that is linear in the name is the safe one.
_FLOATING_FOR_RE = 3
_PARTS = re.compile(r"\*+|\{[^{}]*\}|[{}]|[^*{}]+")
_FOR_RE = 300  # characters of a name: for longer ones the linear matcher is the safe one too
_MOST_TOKENS = 1000
_LONGEST_INTEGER = 640  # the fewest digits that int() may be told to refuse


class PatternError(ValueError):
    """A pattern that cannot be read; the text says what is wrong and at which character."""


@dataclass(frozen=True, slots=True)
class TensorPattern:
    """A pattern that was read; `names` are its captures in order of first appearance.

    `literal` stands in every name that it matches, which tells most names apart at once.

    >>> parse_pattern("layers.{layer}.{part:gate|up}_proj.*").match("layers.3.up_proj.weight")
    (('layer', 3), ('part', 'up'))
    """

    text: str
    tokens: tuple[Token, ...]
    names: tuple[str, ...]
    regex: re.Pattern[str] | None
    literal: str

    @property
    def sample(self) -> str:
        """A text that resembles what it matches."""
        return "".join(map(_sample, self.tokens))

    def match(self, name: str) -> Captures | None:
        """The captures if the whole name matches, else None; PatternError where it is too long to try."""
        if self.literal not in name:
            return None
        if self.regex is None or len(name) > _FOR_RE:
            try:
                texts = match_tokens(self.tokens, name)
            except TooManyStatesError:
                raise PatternError(
                    f"a tensor's name of {len(name)} characters would take it very long: write a pattern "
                    "with fewer captures and wildcards, above all such as stand in it twice"
                ) from None
            return None if texts is None else _valued(self.names, texts)
        found = self.regex.fullmatch(name)
        return None if found is None else _valued(self.names, found.groups())


def parse_pattern(text: str) -> TensorPattern:
    """Read a pattern; PatternError where it has no meaning."""
    if not text:
        raise PatternError("the pattern is empty: write the name of a tensor, with captures or *")
    tokens = _read(text)
    names = tuple(str(token.name) for token in tokens if is_capture(token))
    regex = re.compile(regex_of(tokens), re.DOTALL) if floating(tokens) <= _FLOATING_FOR_RE else None
    literal = max([token.text for token in tokens if isinstance(token, Literal)], key=len, default="")
    return TensorPattern(text, tokens, names, regex, literal)


def _read(text: str) -> tuple[Token, ...]:
    tokens: list[Token] = []
    defined: dict[str, Token] = {}
    for part in _PARTS.finditer(text):
        piece = part[0]
        try:
            tokens.append(_read_part(piece, defined))
        except PatternError as error:
            raise PatternError(f"character {part.start() + 1}: {error}") from None
        token = tokens[-1]
        if is_capture(token):
            defined[str(token.name)] = token
        if len(tokens) > _MOST_TOKENS:
            raise PatternError(
                f"character {part.start() + 1}: more than {_MOST_TOKENS} captures and wildcards"
            )
    return _with_stem(tokens)


def _with_stem(tokens: list[Token]) -> tuple[Token, ...]:
    """`**.` and `{x:**}.` at the beginning match nothing too: the name may begin with what comes after."""
    match tokens:
        case [Wildcard(across=True, name=name), Literal(text), *rest] if text.startswith("."):
            after = [Literal(text[1:])] if len(text) > 1 else []
            return (Stem(name), *after, *rest)
    return tuple(tokens)


def _read_part(piece: str, defined: Mapping[str, Token]) -> Token:
    if piece == "{":
        raise PatternError("{ opens a capture that no } closes: write {name}, {name:this|that} or {name:**}")
    if piece == "}":
        raise PatternError("} closes a capture that no { opens")
    if piece.startswith("{"):
        name, colon, form = piece[1:-1].partition(":")
        return _read_capture(name, form if colon else None, defined)
    if piece.startswith("*"):
        if len(piece) > 2:
            raise PatternError(f"{piece} has no meaning: * matches inside a piece, ** across pieces")
        return Wildcard(across=piece == "**")
    return Literal(piece)


def _read_capture(name: str, form: str | None, defined: Mapping[str, Token]) -> Token:
    if not is_name(name):
        found = f'"{name}" is no name' if name else "the capture has no name"
        raise PatternError(f"{found}: write letters, digits and _, such as {{layer}}")
    token = Wildcard(across=form == "**", name=name) if form in (None, "**") else _read_words(name, form)
    if name not in defined:
        return token
    if form is None or token == defined[name]:
        return Again(name)
    raise PatternError(f"{{{name}}} stands there before: give its form at the first place only")


def is_name(name: str) -> bool:
    """Whether a capture may be called so."""
    return name.isascii() and name.isidentifier() and not iskeyword(name)


def _read_words(name: str, form: str | None) -> Words:
    words = tuple((form or "").split("|"))
    for word in words:
        if not word or word != word.strip() or "*" in word:
            raise PatternError(
                f'{{{name}:{form}}} has the word "{word}": write whole words such as {{{name}:gate|up}}'
            )
    return Words(name, words)


def _valued(names: Sequence[str], texts: Sequence[str]) -> Captures:
    return tuple(map(captured_pair, names, texts))


@lru_cache(maxsize=4096)  # thousands of names are made of a handful of words and numbers, which they share
def captured_pair(name: str, text: str) -> tuple[str, int | str]:
    """A capture and what its text stands for: the number, where it is all digits."""
    number = text.isdigit() and text.isascii() and len(text) <= _LONGEST_INTEGER
    return name, int(text) if number else text


def _sample(token: Token) -> str:
    match token:
        case Literal(text):
            return text
        case Words(_, words):
            return words[0]
        case Stem():
            return "model."
    return "0"
