"""The problems of a spec: collected, worded in one way, raised together as one SpecError.

Owns the form of a problem (`spec.toml: [scope.proj] shape: ...`), how a value is quoted, and the search for
the nearest name. Checks nothing itself; every module of spec reports to it.
"""

from __future__ import annotations

import json
import re
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING

from sparseprune.errors import SpecError, UnboundError, one_of_many

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_FEW_PER_PLACE = 2
_SHOWN_CHARACTERS = 80
_FEW = 8
_MOST_LINES = 50
# The tensor or instance that a text is about. It never goes back, so that long texts take no longer.
_DETAIL = re.compile(r"\[[^\]]{0,400}+\]|\d++")  # in which texts alike differ
_LABEL = re.compile(r"(?<![\w.*-])[\w.*-]++(?:\[[^\]]{0,400}+\])?+: ")


class Misfit(Exception):  # noqa: N818  (stays inside spec: it becomes a line of a SpecError)
    """One problem, raised where it is found, with its table and key."""

    def __init__(self, table: str, key: str, text: str) -> None:
        super().__init__(text)
        self.table, self.key, self.text = table, key, text


class Problems:
    """The problems found so far; of those alike, and of many with one table and key, the first is shown."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._found: dict[str, dict[str, None]] = {}
        self._unknown: dict[str, set[str]] = {}
        self._unbound = False

    def add(self, table: str, key: str, text: str) -> None:
        """Note a problem of `[table] key`; either may be empty, and the same text counts once."""
        self._found.setdefault(_place(table, key), {})[text] = None

    def add_unbound(self, table: str, key: str, text: str) -> None:
        """As `add`, of a table that finds no tensor."""
        self.add(table, key, text)
        self._unbound = True

    def has(self, table: str, key: str) -> bool:
        """Whether a problem of `[table] key` was noted."""
        return _place(table, key) in self._found

    def leave_open(self, table: str, keys: Iterable[str]) -> None:
        """Note keys whose values are unknown because of a problem: checks must not rely on them."""
        self._unknown.setdefault(table, set()).update(keys)

    def is_open(self, table: str, *keys: str) -> bool:
        """Whether the value of one of these keys, or of a key in a table under one, is unknown."""
        unknown = self._unknown.get(table, ())
        return any(one.partition(".")[0] in keys or one in keys for one in unknown)

    def note(self, misfit: Misfit) -> None:
        """Note a misfit; one without a text follows from a problem that is already noted."""
        if misfit.text:
            self.add(misfit.table, misfit.key, misfit.text)

    def suggestion(self, name: str, real: Iterable[str]) -> str:
        """As the function of that name; empty once there are so many problems that no other one is shown."""
        return "" if len(self._found) > _MOST_LINES else suggestion(name, real)

    def raise_if_any(self) -> None:
        if self._found:
            *lines, last = islice(self._lines(), _MOST_LINES + 1)
            if len(lines) == _MOST_LINES:
                last = f"{self._source}: there are more problems than these"
            raise (UnboundError if self._unbound else SpecError)(*lines, last)

    def _lines(self) -> Iterable[str]:
        for place, texts in self._found.items():
            prefix = f"{self._source}: {place}: " if place else f"{self._source}: "
            alike: dict[str, list[str]] = {}
            for text in texts:
                alike.setdefault(_DETAIL.sub("", _LABEL.sub("", text)), []).append(text)
            if len(alike) > _FEW_PER_PLACE:
                alike = {"": list(texts)}
            yield from (prefix + one_of_many(each) for each in alike.values())


def _place(table: str, key: str) -> str:
    return " ".join(part for part in (f"[{table}]" if table else "", key) if part)


def shown(value: object) -> str:
    """A value as TOML writes it, shortened if it is long.

    >>> shown([1, True, "a"]), shown({"a": 1})
    ('[1, true, "a"]', 'a table')
    """
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "a list of tables"
    if isinstance(value, list | str):
        value = value[:_SHOWN_CHARACTERS]  # more than is shown
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # integers of thousands of digits, deeply nested lists
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def listed(names: Iterable[str], word: str = "and") -> str:
    """Names as a sentence lists them.

    >>> listed(["a", "b", "c"]), listed(["a"])
    ('a, b and c', 'a')
    """
    *front, last = names
    return f"{', '.join(front)} {word} {last}" if front else last


def nearest(name: str, real: Iterable[str], count: int = 1, cutoff: float = 0.6) -> Sequence[str]:
    """The real names most similar to this one, best first; empty if none is similar."""
    return get_close_matches(name, list(real), n=count, cutoff=cutoff)


def suggestion(name: str, real: Iterable[str]) -> str:
    """The end of a text about an unknown name: the nearest real name, else all names if they are few.

    >>> suggestion("gat", ["gate", "up"]), suggestion("zzz", ["gate", "up"]), suggestion("zzz", [])
    ('; did you mean "gate"?', '; there is "gate" and "up"', '')
    """
    known = sorted(set(real))
    close = nearest(name, known)
    if close:
        return f'; did you mean "{close[0]}"?'
    return f"; there is {listed(map(shown, known))}" if 0 < len(known) <= _FEW else ""
