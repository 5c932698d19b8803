"""Bisection: the first of many values of a number for which not too much is left.

Owns the order of values, integers or every double, and the search among values some of which may be refused.
Knows neither specs nor checkpoints. Called by goals.
"""

from __future__ import annotations

import struct
import sys
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Number = int | Fraction
Refusal = tuple[str, ...]

LARGEST = 2**63 - 1
_SAME = 4  # refusals in a row by the same words hold for all values in between
_QUICK = 4  # guesses before the range is halved


class Values(Struct, frozen=True):
    """`count` neighbouring values in a row, which begins at the key `begin`; `step` is 1 or -1.

    Keys of integers are these themselves, those of doubles count doubles.

    >>> values = Values(whole=True, begin=4, step=-1, count=5)
    >>> values.at(0), values.at(4)
    (4, 0)
    """

    whole: bool
    begin: int
    step: int
    count: int

    @staticmethod
    def around(value: float, fits: Callable[[float], bool], *, whole: bool) -> Values:
        """All neighbours of a value that fit, in ascending order."""
        key, most = key_of(value, whole=whole), LARGEST if whole else key_of(sys.float_info.max, whole=False)

        def holds(key: int) -> bool:
            return abs(key) <= most and fits(value_of(key, whole=whole))

        low, high = _edge(key, -1, holds), _edge(key, 1, holds)
        return Values(whole, low, 1, high - low + 1)

    @property
    def last(self) -> int:
        return self.count - 1

    def at(self, place: int) -> float:
        return value_of(self.begin + self.step * place, whole=self.whole)

    def spread(self, count: int) -> list[float]:
        """Values from the first one to the last, about as far from each other."""
        first, last = self.at(0), self.at(self.last)
        if self.whole:
            span = int(last) - int(first)
            return [int(first) + span * number // count for number in range(count + 1)]
        return [first * (1 - number / count) + last * (number / count) for number in range(count + 1)]

    def turned(self) -> Values:
        """The same values, the last one first."""
        return Values(self.whole, self.begin + self.step * self.last, -self.step, self.count)

    def shortest(self, first: int, last: int) -> float:
        """Of the values from one place to another the first integer, or the double with the fewest digits."""
        if self.whole:
            return self.at(first)
        low, high = sorted((self.at(first), self.at(last)))
        near = (float(f"{ceil(Fraction(low) * 10**digits)}e-{digits}") for digits in range(1, 18))
        return next((value for value in near if low <= value <= high), low)


def key_of(value: float, *, whole: bool) -> int:
    """The key of a value: of doubles the next larger one has the next key.

    >>> key_of(0.0, whole=False), key_of(5e-324, whole=False), key_of(-5e-324, whole=False)
    (0, 1, -1)
    """
    if whole:
        return int(value)
    (bits,) = struct.unpack("<q", struct.pack("<d", abs(value)))
    return -int(bits) if value < 0 else int(bits)


def value_of(key: int, *, whole: bool) -> float:
    """The value of a key."""
    if whole:
        return key
    (value,) = struct.unpack("<d", struct.pack("<q", abs(key)))
    return -float(value) if key < 0 else float(value)


def _edge(key: int, step: int, holds: Callable[[int], bool]) -> int:
    """The last key in one direction up to which `holds` is true."""
    reach = 1
    while holds(key + step * reach):
        key, reach = key + step * reach, 2 * reach
    while reach > 1:
        reach //= 2
        if holds(key + step * reach):
            key += step * reach
    return key


def first_place(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The first place behind `low` from which on `holds` is true, `high` if it is true there alone."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Found(Struct, frozen=True):
    """What is `left` from the place `begin` to the place `end`, where the budgets are the same."""

    begin: int
    end: int
    left: Number


class Search:
    """Looks for the first of `count` places, of which less and less is left, with `most` left at most.

    `state` tells what is decided at a place, `estimate` about how much is left of that, and `measure` how
    much exactly, or why it is refused; the last one takes long. `nearest` is the place without a refusal
    behind which nothing less was found.
    """

    def __init__(
        self,
        count: int,
        state: Callable[[int], Hashable],
        estimate: Callable[[int], Number],
        measure: Callable[[int], Number | Refusal],
    ) -> None:
        self._count, self._state, self._estimate, self._measure = count, state, estimate, measure
        self._known: dict[Hashable, Number | Refusal] = {}
        self.nearest: Found | None = None
        self.refusal: Refusal = ()

    def first(self, most: int) -> Found | None:
        """The first place with so much left at most, None where there is none."""
        low, high, found = -1, self._count, None
        whole, ratio = self._estimate(0), Fraction(1)  # of what goes to what estimates say
        for round_ in range(sys.maxsize):
            if high - low < 2:
                break
            quick = round_ < _QUICK and ratio > 0
            aim = whole - (whole - most) / ratio if quick else self._halfway(low, high)
            place = self._guess(low, high, aim)
            seen = self._near(min(place, high - 1), low, high)
            if seen is None:
                break
            about = whole - self._estimate(seen.begin)
            ratio = Fraction(whole - seen.left) / about if about else ratio
            if seen.left <= most:
                high, found = seen.begin, seen
            else:
                low, self.nearest = seen.end, seen
        return found

    def _guess(self, low: int, high: int, aim: Number) -> int:
        """The first place of which no more than `aim` is left as far as estimates tell, `high` if none is."""
        return first_place(low, high, lambda place: self._estimate(place) <= aim)

    def _halfway(self, low: int, high: int) -> Number:
        first, last = self._estimate(low + 1), self._estimate(high - 1)
        return last + (first - last) // 2

    def _near(self, place: int, low: int, high: int) -> Found | None:
        """The nearest place between two that is not refused: first where less is left, then where more is."""
        for step in (1, -1):
            last: list[Refusal] = []
            at = place
            while low < at < high and not (len(last) == _SAME and len(set(last)) == 1):
                begin, end = self._alike(at, low, high)
                left = self._left(at)
                if not isinstance(left, tuple):
                    return Found(begin, end, left)
                last, self.refusal = [*last, left][-_SAME:], left
                at = end + 1 if step > 0 else begin - 1
        return None

    def _left(self, place: int) -> Number | Refusal:
        state = self._state(place)
        if state not in self._known:
            self._known[state] = self._measure(place)
        return self._known[state]

    def _alike(self, place: int, low: int, high: int) -> tuple[int, int]:
        """The first and the last place between two at which the same is decided."""
        state = self._state(place)
        begin = first_place(low, place, lambda each: self._state(each) == state)
        end = first_place(place, high, lambda each: self._state(each) != state) - 1
        return begin, end
