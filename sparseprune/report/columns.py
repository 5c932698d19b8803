"""What a table says of entries of a document: a column for each fact, left out where it says nothing.

Owns when a column is left out for what is in it; for want of room it is fitting.py that decides. Knows no
fact. Called by the tables of inspect and compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.padding import Padding
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from rich.console import RenderableType

    from sparseprune.report.fitting import Column

    Entry = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fact:
    """A column and what it says of an entry; it is left out where all it has to say is `silent`."""

    column: Column
    text: Callable[[Entry], str]
    silent: frozenset[str] | None = None


def told(facts: Iterable[Fact], entries: Sequence[Entry]) -> tuple[list[Column], list[list[str]]]:
    """The columns that say something anywhere, and a row of them for each entry."""
    columns: list[Column] = []
    texts: list[list[str]] = []
    for fact in facts:
        cells = [fact.text(entry) for entry in entries]
        if fact.silent is None or not fact.silent.issuperset(cells):
            columns.append(fact.column)
            texts.append(cells)
    return columns, [[cells[row] for cells in texts] for row in range(len(entries))]


def below(line: str) -> RenderableType:
    """A line of its own below a table, that belongs to the one above it."""
    return Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False)
