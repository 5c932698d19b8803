"""Numbered lists of modules, by tensors' names alone: which members are removed, new names of the others.

A list is whatever has numbers as a piece of a name, such as layers and experts. Needs no numpy. Called by the
rest of removal.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,17})(?=\.)")  # as a list of modules writes it
_DEEPEST = 16  # lists in lists: no model has so many


@dataclass(frozen=True, slots=True)
class RemovedMembers:
    """By the name of each list the numbers of the members that it loses, in ascending order.

    `orphans` are tensors that keep nothing although other tensors of their member do, or belong to no list.

    >>> RemovedMembers({"layers": (0, 2)}).renamed("layers.3.up.weight")
    'layers.1.up.weight'
    """

    numbers: Mapping[str, tuple[int, ...]]
    orphans: tuple[str, ...] = ()

    def has(self, name: str) -> bool:
        """Whether a tensor belongs to a member that is removed."""
        members = numbered(name) if self.numbers else ()
        return any(number in self.numbers.get(before, ()) for before, number, _ in members)

    def renamed(self, name: str) -> str:
        """The new name of a tensor that stays: members move up into the gaps."""
        pieces = name.split(".")
        for before, number, place in numbered(name):
            gone = self.numbers.get(before, ())
            if gone:
                pieces[place] = str(number - bisect_left(gone, number))
        return ".".join(pieces)


def numbered(name: str) -> Iterator[tuple[str, int, int]]:
    """The lists that a name passes through: the list's name, the member's number, the place of that piece.

    >>> list(numbered("layers.3.experts.10.up"))
    [('layers', 3, 1), ('layers.3.experts', 10, 3)]
    """
    for found in islice(_NUMBER.finditer(name), _DEEPEST):
        before = name[: found.start() - 1]
        yield before, int(found[0]), before.count(".") + 1


def removed_members(names: Iterable[str], empty: Collection[str]) -> RemovedMembers:
    """The outermost members of lists of which all tensors are `empty`."""
    lists_of = {name: list(numbered(name)) for name in names}
    all_of = Counter((before, number) for lists in lists_of.values() for before, number, _ in lists)
    empty_of = Counter((before, number) for name in empty for before, number, _ in lists_of.get(name, ()))
    numbers: dict[str, set[int]] = {}
    orphans = []
    for name in (name for name in lists_of if name in empty):
        members = ((before, number) for before, number, _ in lists_of[name])
        gone = next((member for member in members if all_of[member] == empty_of[member]), None)
        if gone is None:
            orphans.append(name)
        else:
            numbers.setdefault(gone[0], set()).add(gone[1])
    return RemovedMembers({before: tuple(sorted(found)) for before, found in numbers.items()}, tuple(orphans))
