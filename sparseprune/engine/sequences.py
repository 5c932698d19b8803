"""Sequences of which one element at a time is in memory: 100,000 tensors have as many results.

Knows nothing of what is made. Imported by any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, overload

Thing = TypeVar("Thing")
Result = TypeVar("Result")


class Made(Sequence[Result], Generic[Thing, Result]):
    """What `make` gives for each of some things, made anew whenever it is asked for; equal to a list of it.

    >>> Made([1, 2], str) == ["1", "2"], Made([1, 2], str)[-1]
    (True, '2')
    """

    def __init__(self, things: Sequence[Thing], make: Callable[[Thing], Result]) -> None:
        self._things = things
        self._make = make

    def __len__(self) -> int:
        return len(self._things)

    @overload
    def __getitem__(self, place: int) -> Result: ...
    @overload
    def __getitem__(self, place: slice) -> Made[Thing, Result]: ...
    def __getitem__(self, place: int | slice) -> Result | Made[Thing, Result]:
        if isinstance(place, slice):
            return Made(self._things[place], self._make)
        return self._make(self._things[place])

    def __iter__(self) -> Iterator[Result]:
        return map(self._make, self._things)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as of a list
