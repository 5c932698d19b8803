"""`regex = "..."`: a regular expression whose named groups are captures, if it can be matched in time.

`re` may try as many readings of a name as the choices in an expression multiply to; what could pass a
bound for a name of a hundred characters is refused, with the way out. Used by the models of the tables.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.spec.patterns import PatternError, captured_pair, is_name

if TYPE_CHECKING:
    from sparseprune.spec.bound import Captures

_LENGTH = 100  # characters of a name as they come
_MOST_READINGS = _LENGTH**3
_MOST_STEPS = _LENGTH**4  # a reading may pass over the whole name once
_LONGEST = 2000
# The parser of `re` itself: no other one reads an expression as `re` does. Python lacks a public door to it.
_PARSER: Any = importlib.import_module("re._parser")
# Which characters `re` takes for one letter in either case beyond what str.lower and str.upper say.
_ALIKE: dict[int, tuple[int, ...]] = importlib.import_module("re._casefix")._EXTRA_CASES  # noqa: SLF001
_ONE_WAY = (0x130, 0x1E9E, 0x3F4, 0x2126, 0x212A, 0x212B)  # letters to which no upper() leads
_END = "END"  # of the name
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


@dataclass(frozen=True, slots=True)
class RegexPattern:
    r"""A regular expression that was read; `names` are its named groups in order.

    >>> parse_regex(r"layers\.(?P<layer>\d+)\..*").match("layers.3.up.weight")
    (('layer', 3),)
    """

    text: str
    names: tuple[str, ...]
    regex: re.Pattern[str]
    readings: int = 1

    @property
    def sample(self) -> str:
        """A text that resembles what it matches."""
        return re.sub(r"\(\?P<\w+>|[\\()\[\]^$+*?]", "", self.text)

    def match(self, name: str) -> Captures | None:
        """The captures if the whole name matches, else None; a group that took no part is empty.

        PatternError where the name is so long that to try could take very long.
        """
        # What a name of `_LENGTH` characters could be read in so many ways, a longer one in more.
        if len(name) > _LENGTH and self.readings > 1:
            degree = math.ceil(math.log(self.readings, _LENGTH))
            if len(name) ** (max(degree, 1) + 1) > _MOST_STEPS:
                raise PatternError(
                    f"a tensor's name of {len(name)} characters would take it very long: write a pattern "
                    "with captures as `tensors`, or a regex with fewer parts that may end at several places"
                )
        found = self.regex.fullmatch(name)
        if found is None:
            return None
        return tuple([captured_pair(group, found[group] or "") for group in self.names])


def parse_regex(text: str) -> RegexPattern:
    """Read a regular expression; PatternError where it is none, or none that ends in time."""
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
    names = tuple(sorted(regex.groupindex, key=lambda name: regex.groupindex[name]))
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
    """In how many ways parts with this after them may be read, at most; `inside` of a repetition."""
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
    """The parts with those of plain groups in their place."""
    flat: list[Any] = []
    for opcode, argument in parts:
        flat += _ungrouped(list(argument[-1])) if str(opcode) == "SUBPATTERN" else [(opcode, argument)]
    return flat


def _readings_of_repeat(kind: str, repeat: Any, after: list[Any], *, inside: bool) -> int:  # noqa: ANN401
    least, most, body = int(repeat[0]), int(repeat[1]), repeat[2]
    if most <= 1:  # a part that may be left out
        return (1 + (least == 0)) * _readings(list(body), after, inside=inside)
    if _readings(list(body), [], inside=True) > 1:
        raise PatternError(_slow("a part that repeats can itself be read in several ways"))
    sharp = least == most or kind == "POSSESSIVE_REPEAT" or _ends_sharply(_ungrouped(list(body)), after)
    return 1 if sharp else min(most - least + 1, _LENGTH)


def _ends_sharply(body: list[Any], after: list[Any]) -> bool:
    """Whether a repetition of one character can end in one place only: before what it cannot hold."""
    following = next(((str(opcode), argument) for opcode, argument in after if str(opcode) != "AT"), None)
    if len(body) != 1 or following is None:
        return False
    if following[0] == _END:
        return True
    return following[0] == "LITERAL" and not _may_hold(body[0][0], body[0][1], following[1])


def _may_hold(opcode: object, argument: Any, code: int) -> bool:  # noqa: ANN401
    """Whether a part of one character may be this one, in either case."""
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
    """The characters, and those that `re` may take for one of them in either case."""
    texts = [
        form
        for code in codes
        for form in (chr(code), chr(code).lower(), chr(code).upper(), chr(code).title())
    ]
    found = {ord(each) for text in texts for each in text}
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
