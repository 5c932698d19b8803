"""Patterns of tensor names: captures, wildcards and regular expressions, matched in linear time.

Owns their syntax and its errors. Knows nothing of tensors but names. Called by the spec's tables, reports
and removal.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from functools import lru_cache
from itertools import takewhile
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, TypeGuard

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sparseprune.spec.bound import Captures


class Literal(Struct, frozen=True):
    """Text that stands for itself."""

    text: str


class Wildcard(Struct, frozen=True):
    """Text inside a piece (between dots), or across pieces; a named one is a capture and never empty."""

    across: bool
    name: str | None = None


class Stem(Struct, frozen=True):
    """Whole pieces at the beginning of a name with the dot behind, or nothing; a capture lacks the dot."""

    name: str | None = None


class Words(Struct, frozen=True):
    """One of several words, captured."""

    name: str
    words: tuple[str, ...]


class Again(Struct, frozen=True):
    """The same text that a capture matched before."""

    name: str


Token = Literal | Wildcard | Stem | Words | Again


_MOST_PLACES = 10_000_000  # tokens times characters of a name
_MOST_HELD = 50_000_000  # states times the bytes of each
_STATE = 250  # bytes of a state beside its characters


class PatternError(ValueError):
    """A pattern that cannot be read; the text says what is wrong, at which character."""


def is_capture(token: Token) -> TypeGuard[Wildcard | Stem | Words]:
    """Whether the token is the first place of a capture."""
    return isinstance(token, Words) or (isinstance(token, Wildcard | Stem) and token.name is not None)


def regex_of(tokens: Iterable[Token]) -> str:
    """The regular expression that matches the same names; captures are named groups."""
    return "".join(_regex_of_token(token) for token in tokens)


def floating(tokens: Sequence[Token]) -> int:
    """How many tokens may end at several places for one start."""
    followers = (*tokens[1:], Literal("."))  # the end of the name also ends a piece
    return sum(_floats(token, after) for token, after in zip(tokens, followers, strict=True))


def match_tokens(tokens: Sequence[Token], text: str) -> tuple[str, ...] | None:
    """The texts of all captures, in order, if the tokens match the whole text.

    A depth-first search that enters no state twice, and no state from which the rest cannot match. Without
    repeated captures it never backtracks: its time is tokens times characters. A state is the token, the
    place in the text, and the texts of captures that a later token repeats. PatternError where it takes too
    long, or too much memory.
    """
    too_long = (
        f"a tensor's name of {len(text)} characters takes too long to match: write a pattern with fewer "
        "captures and wildcards, above all such as stand in it twice"
    )
    if len(tokens) * len(text) > _MOST_PLACES:
        raise PatternError(too_long)
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
                raise PatternError(too_long)
            token = tokens[index]
            again = held[defined[token.name]] if isinstance(token, Again) else ""
            starts.append(end)
            choices.append(_ends(token, text, end, again))
    return None


def _held(token: Token, text: str) -> str:
    """The text of a capture, given the text that its token matches."""
    return text.removesuffix(".") if isinstance(token, Stem) else text


def _fitting_ends(tokens: Sequence[Token], text: str) -> list[list[bool]]:
    """`[i][place]`: whether tokens i and later match the text from `place`, if `Again` matches any text."""
    fits = [[place == len(text) for place in range(len(text) + 1)]]
    for token in reversed(tokens):
        fits.append(_fitting_starts(token, text, fits[-1]))
    return fits[::-1]


def _fitting_starts(token: Token, text: str, after: list[bool]) -> list[bool]:
    if isinstance(token, Stem):  # always the first token
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
    """The places where a token that starts here may end, the preferred first."""
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
        case Stem(name):  # its pieces, then a dot, which only an empty stem lacks
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


# `re` tries at worst length ** floating ways: with three floating tokens, a name of 200 characters takes
# some milliseconds. With four or more, only the matcher that is linear in the name is safe.
_FLOATING_FOR_RE = 3
_PARTS = re.compile(r"\*+|\{[^{}]*\}|[{}]|[^*{}]+")
_FOR_RE = 300  # characters of a name; longer ones take the linear matcher too
_MOST_TOKENS = 1000
_LONGEST_INTEGER = 640  # digits; int() may be set to refuse longer ones


class TensorPattern(Struct, frozen=True):
    """A parsed pattern; `names` are its captures in order of first appearance.

    Every name that it matches contains `literal`: a cheap test that sorts out most names.

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
        """A text similar to the names that it matches, to find the nearest names."""
        return "".join(map(_sample, self.tokens))

    def match(self, name: str) -> Captures | None:
        """The captures if the whole name matches, else None; PatternError for a name that is too long."""
        if self.literal not in name:
            return None
        if self.regex is None or len(name) > _FOR_RE:
            texts = match_tokens(self.tokens, name)
        else:
            found = self.regex.fullmatch(name)
            texts = None if found is None else found.groups()
        return None if texts is None else tuple(map(captured_pair, self.names, texts))


def parse_pattern(text: str) -> TensorPattern:
    """Parse a pattern; PatternError where it is wrong."""
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
        place = f"character {part.start() + 1}"
        if len(tokens) == _MOST_TOKENS:
            raise PatternError(f"{place}: more than {_MOST_TOKENS} captures and wildcards")
        try:
            token = _read_part(part[0], defined)
        except PatternError as error:
            raise PatternError(f"{place}: {error}") from None
        tokens.append(token)
        if is_capture(token):
            defined[str(token.name)] = token
    return _with_stem(tokens)


def _with_stem(tokens: list[Token]) -> tuple[Token, ...]:
    """`**.` and `{x:**}.` at the beginning may match nothing: the name may begin with what follows them."""
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
    raise PatternError(f"{{{name}}} was captured before: give its form at the first place only")


def is_name(name: str) -> bool:
    """Whether a capture may have this name."""
    return name.isascii() and name.isidentifier() and not iskeyword(name)


def _read_words(name: str, form: str | None) -> Words:
    words = tuple((form or "").split("|"))
    for word in words:
        if not word or word != word.strip() or "*" in word:
            wanted = f"write whole words such as {{{name}:gate|up}}"
            raise PatternError(f'{{{name}:{form}}} has the word "{word}": {wanted}')
    return Words(name, words)


@lru_cache(maxsize=4096)  # thousands of names share a few words and numbers
def captured_pair(name: str, text: str) -> tuple[str, int | str]:
    """A capture and its value: an int if the text is all digits."""
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


_LENGTH = 100  # characters of a usual name
_MOST_READINGS = _LENGTH**3
_MOST_STEPS = _LENGTH**4  # each reading may walk over the whole name once
_LONGEST = 2000
# The parser of `re` itself, the only one that reads expressions exactly as `re` does; it is not public.
_PARSER: Any = importlib.import_module("re._parser")
# Characters that `re` takes for one letter in either case, in addition to str.lower and str.upper.
_ALIKE: dict[int, tuple[int, ...]] = importlib.import_module("re._casefix")._EXTRA_CASES  # noqa: SLF001
_ONE_WAY = (0x130, 0x1E9E, 0x3F4, 0x2126, 0x212A, 0x212B)  # letters that are no upper() of another
_END = "END"  # of the name
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


class RegexPattern(Struct, frozen=True):
    r"""A parsed regular expression; `names` are its named groups in order, `readings` bounds backtracking.

    >>> parse_regex(r"layers\.(?P<layer>\d+)\..*").match("layers.3.up.weight")
    (('layer', 3),)
    """

    text: str
    names: tuple[str, ...]
    regex: re.Pattern[str]
    readings: int = 1
    literal: str = ""  # in every name that it matches

    @property
    def sample(self) -> str:
        """A text similar to the names that it matches, to find the nearest names."""
        return re.sub(r"\(\?P<\w+>|[\\()\[\]^$+*?]", "", self.text)

    def match(self, name: str) -> Captures | None:
        """The captures if the whole name matches, else None; a group that took no part is empty.

        PatternError for a name so long that matching could take too long.
        """
        # `readings` holds for a name of `_LENGTH` characters; a longer one may be read in more ways.
        if len(name) > _LENGTH and self.readings > 1:
            degree = math.ceil(math.log(self.readings, _LENGTH))
            if len(name) ** (max(degree, 1) + 1) > _MOST_STEPS:
                raise PatternError(
                    f"a tensor's name of {len(name)} characters takes too long to match: write a pattern "
                    "with captures as `tensors`, or a regex with fewer parts that may end at several places"
                )
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        return tuple([captured_pair(group, found[group] or "") for group in self.names])


def parse_regex(text: str) -> RegexPattern:
    """Parse a regular expression; PatternError for wrong syntax, and where matching could take too long."""
    if not text:
        raise PatternError("the regex is empty: write one that matches the names of tensors")
    if len(text) > _LONGEST:
        raise PatternError(f"this regex has {len(text)} characters, wanted {_LONGEST} at most")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            regex = re.compile(text)
            readings = _readings(list(_PARSER.parse(text)), [(_END, None)], inside=False)
    except re.error as error:
        place = "" if error.pos is None else f"character {error.pos + 1}: "
        raise PatternError(f"{place}this is no regular expression: {error.msg}") from error
    except (RecursionError, OverflowError, MemoryError, Warning) as error:
        raise PatternError(f"this is no regular expression that can be used: {error}") from error
    if readings > _MOST_READINGS:
        raise PatternError(_slow("it has too many parts that may end at several places"))
    names = tuple(regex.groupindex)
    for name in names:
        if not is_name(name):
            raise PatternError(f'"{name}" is no name: write letters, digits and _, such as (?P<layer>...)')
    return RegexPattern(text, names, regex, readings)


def _slow(why: str) -> str:
    return (
        f"this regex could take very long to match, because {why}: end a part with what it cannot hold, "
        r"as [^.]+\. does, make it possessive (.++), or write a pattern with captures as `tensors`"
    )


def _readings(parts: list[Any], after: list[Any], *, inside: bool) -> int:
    """An upper bound of the ways to read parts followed by `after`; `inside` a repetition."""
    flat = _ungrouped(parts)
    count = 1
    for at, (opcode, argument) in enumerate(flat):
        kind, rest = str(opcode), flat[at + 1 :] + after
        if kind in _REPEATS:
            count *= _readings_of_repeat(kind, argument, rest, inside=inside)
        elif kind == "BRANCH" and inside:
            raise PatternError(_slow("a part that repeats has a | in it"))
        elif kind in {"BRANCH", "GROUPREF_EXISTS"}:
            branches = argument[1] if kind == "BRANCH" else [branch for branch in argument[1:] if branch]
            count *= sum(_readings(list(branch), rest, inside=inside) for branch in branches)
        elif kind in {"ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"}:
            body = argument if kind == "ATOMIC_GROUP" else argument[1]
            count *= _readings(list(body), [], inside=inside)
        if count > _MOST_READINGS:
            break
    return count


def _ungrouped(parts: list[Any]) -> list[Any]:
    """The parts, with plain groups replaced by their contents."""
    flat: list[Any] = []
    for opcode, argument in parts:
        flat += _ungrouped(list(argument[-1])) if str(opcode) == "SUBPATTERN" else [(opcode, argument)]
    return flat


def _readings_of_repeat(kind: str, repeat: Any, after: list[Any], *, inside: bool) -> int:  # noqa: ANN401
    least, most, body = int(repeat[0]), int(repeat[1]), repeat[2]
    if most <= 1:  # an optional part
        return (1 + (least == 0)) * _readings(list(body), after, inside=inside)
    if _readings(list(body), [], inside=True) > 1:
        raise PatternError(_slow("a part that repeats can itself be read in several ways"))
    sharp = least == most or kind == "POSSESSIVE_REPEAT" or _ends_sharply(_ungrouped(list(body)), after)
    return 1 if sharp else min(most - least + 1, _LENGTH)


def _ends_sharply(body: list[Any], after: list[Any]) -> bool:
    """Whether a repetition of one character can end at one place only: before a character it cannot match."""
    following = ((str(opcode), argument) for opcode, argument in after if str(opcode) != "AT")
    kind, code = next(following, ("", 0))
    if len(body) != 1 or kind not in (_END, "LITERAL"):
        return False
    return kind == _END or not _may_hold(body[0][0], body[0][1], code)


def _may_hold(opcode: object, argument: Any, code: int) -> bool:  # noqa: ANN401
    """Whether a part of one character matches this one, in either case."""
    variants = _alike(_alike({code}))
    match str(opcode):
        case "LITERAL":
            return argument in variants
        case "NOT_LITERAL":
            return variants != {argument}
        case "IN" if str(argument[0][0]) != "NEGATE":
            return any(_in_set(item, each) for item in argument for each in variants)
        case "IN":
            return not all(any(_in_set(item, each) for item in argument[1:]) for each in variants)
    return True


def _alike(codes: set[int]) -> set[int]:
    """The characters, and all that `re` may treat as one of them in either case."""
    characters = [chr(code) for code in codes]
    forms = [(each, each.lower(), each.upper(), each.title()) for each in characters]
    found = {ord(each) for form in forms for text in form for each in text}
    found |= {other for each in found for other in _ALIKE.get(each, ())}
    return found | {other for other in _ONE_WAY if ord(chr(other).lower()[0]) in found}


def _in_set(item: tuple[object, Any], code: int) -> bool:
    kind, argument = str(item[0]), item[1]
    if kind == "RANGE":
        return bool(argument[0] <= code <= argument[1])
    if kind == "CATEGORY":
        escape = {"DIGIT": r"\d", "SPACE": r"\s", "WORD": r"\w"}[str(argument).rsplit("_", maxsplit=1)[-1]]
        return (re.match(escape, chr(code)) is not None) is ("_NOT_" not in str(argument))
    return kind == "LITERAL" and argument == code


def shared_beginning(names: Iterable[str]) -> str:
    """The dotted pieces that all names begin with.

    >>> shared_beginning(["model.layers.3.up", "model.layers.3.down"]), shared_beginning(["up", "down"])
    ('model.layers.3', '')
    """
    pieces = zip(*[name.split(".") for name in names], strict=False)
    return ".".join([column[0] for column in takewhile(lambda column: len(set(column)) == 1, pieces)])
