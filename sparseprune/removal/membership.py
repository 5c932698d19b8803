"""Membership: members of numbered lists, such as layers and experts, that vanish with all their tensors.

Owns how names say that something is a member, and the numbers of those that stay. Pure work on names.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

_INDEX = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,17})(?=\.)")  # a piece as a list of modules writes it
_DEEPEST = 16  # lists in lists: no model has so many


@dataclass(frozen=True, slots=True)
class Vanished:
    """By the name of each list, in ascending order the numbers of the members that it loses.

    >>> Vanished({"layers": (0, 2)}).renamed("layers.3.up.weight")
    'layers.1.up.weight'
    """

    numbers: Mapping[str, tuple[int, ...]]
    orphans: tuple[str, ...] = field(default=())

    def takes(self, name: str) -> bool:
        """Whether a tensor vanishes with a member that it belongs to."""
        members = numbered(name) if self.numbers else ()
        return any(number in self.numbers.get(before, ()) for before, number, _ in members)

    def renamed(self, name: str) -> str:
        """What a tensor that stays is called: members move up to where others were."""
        pieces = name.split(".")
        for before, number, place in numbered(name):
            gone = self.numbers.get(before, ())
            if gone:
                pieces[place] = str(number - bisect_left(gone, number))
        return ".".join(pieces)


def numbered(name: str) -> Iterator[tuple[str, int, int]]:
    """Where a name passes through a list: the list's name, the member's number, the place of that piece.

    >>> list(numbered("layers.3.experts.10.up"))
    [('layers', 3, 1), ('layers.3.experts', 10, 3)]
    """
    for found in islice(_INDEX.finditer(name), _DEEPEST):
        before = name[: found.start() - 1]
        yield before, int(found[0]), before.count(".") + 1


def find_vanished(names: Iterable[str], empty: Collection[str]) -> Vanished:
    """The outermost members of lists of which nothing is left; `orphans` are empty and belong to none."""
    passed = {name: list(numbered(name)) for name in names}
    all_of = Counter((before, number) for through in passed.values() for before, number, _ in through)
    empty_of = Counter((before, number) for name in empty for before, number, _ in passed.get(name, ()))
    numbers: dict[str, set[int]] = {}
    orphans = []
    for name in (name for name in passed if name in empty):
        members = ((before, number) for before, number, _ in passed[name])
        gone = next((member for member in members if all_of[member] == empty_of[member]), None)
        if gone is None:
            orphans.append(name)
        else:
            numbers.setdefault(gone[0], set()).add(gone[1])
    return Vanished({before: tuple(sorted(found)) for before, found in numbers.items()}, tuple(orphans))
