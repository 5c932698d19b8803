"""Sequences with one element at a time in memory, for results of 100,000 tensors.

Knows nothing of the elements. Imported by any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar, overload

Thing = TypeVar("Thing")
Result = TypeVar("Result")


class Made(Sequence[Result], Generic[Thing, Result]):
    """The results of `make` for some things, made anew on each access; equal to a list of them.

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
