"""Entries of a document as a grid: a row for each layer, a column for each matrix that layers have.

Owns how a name is taken apart, and how experts and other repeated parts become one cell. Pure; draws
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparseprune.errors import printable
from sparseprune.report.listing import natural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    Entry = Mapping[str, Any]
    Value = Callable[[Sequence[Entry]], float | None]

_SUFFIX = ".weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a matrix belongs: the part of its name before the number of its layer, that number, the rest."""

    stack: str
    layer: str
    matrix: str


@dataclass(frozen=True, slots=True)
class Grid:
    """The entries that belong to numbered layers, by row and column, and those that do not.

    `rows` are layers in their natural order, stack by stack, `columns` matrices in the order in which they
    were met. `cells` has the entries of those that exist; several where a matrix is repeated in its layer.
    """

    rows: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[tuple[str, str], str], tuple[Entry, ...]]
    others: tuple[Entry, ...]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names before the numbers of layers, each once."""
        return tuple(dict.fromkeys(stack for stack, _ in self.rows))

    def row_labels(self) -> list[str]:
        """Numbers of layers; with the name of their stack where there are several."""
        if len(self.stacks) == 1:
            return [printable(layer) for _, layer in self.rows]
        shared = _shared_pieces(self.stacks)
        return [printable(f"{stack[shared:]}.{layer}".lstrip(".")) for stack, layer in self.rows]

    def column_labels(self) -> list[str]:
        """Names of matrices, without `.weight` where that leaves them unlike."""
        short = [column.removesuffix(_SUFFIX) for column in self.columns]
        return [printable(label) for label in (short if len(set(short)) == len(short) else self.columns)]

    def values(self, value: Value) -> list[list[float | None]]:
        """One value for each cell, None where there is no matrix or nothing is known of it."""
        return [
            [
                value(self.cells[row, column]) if (row, column) in self.cells else None
                for column in self.columns
            ]
            for row in self.rows
        ]


def place_of(name: str) -> Place | None:
    """A name taken apart at its first number; further numbers become *. None for a name without layers.

    >>> place_of("model.layers.3.mlp.experts.7.up_proj.weight")
    Place(stack='model.layers', layer='3', matrix='mlp.experts.*.up_proj.weight')
    >>> place_of("lm_head.weight"), place_of("layers.3")
    (None, None)
    """
    pieces = name.split(".")
    at = next((at for at, piece in enumerate(pieces) if _is_number(piece)), None)
    if at is None or at + 1 == len(pieces):
        return None
    rest = ["*" if _is_number(piece) else piece for piece in pieces[at + 1 :]]
    return Place(".".join(pieces[:at]), pieces[at], ".".join(rest))


def grid_of(entries: Iterable[Entry]) -> Grid:
    """Entries with a `name`, sorted into layers."""
    cells: dict[tuple[tuple[str, str], str], list[Entry]] = {}
    others = []
    for entry in entries:
        place = place_of(entry["name"])
        if place is None:
            others.append(entry)
        else:
            cells.setdefault(((place.stack, place.layer), place.matrix), []).append(entry)
    stacks = list(dict.fromkeys(stack for (stack, _), _ in cells))
    rows = sorted({row for row, _ in cells}, key=lambda row: (stacks.index(row[0]), natural(row[1])))
    columns = dict.fromkeys(column for _, column in cells)
    return Grid(
        tuple(rows), tuple(columns), {key: tuple(found) for key, found in cells.items()}, tuple(others)
    )


def mean_of(key: str, entries: Sequence[Entry]) -> float | None:
    """The mean of a fact over the entries that have it, each counting by its elements; None if none has."""
    known = [entry for entry in entries if entry.get(key) is not None]
    numel = sum(entry["numel"] for entry in known)
    if not known:
        return None
    if not numel:
        return float(known[0][key])
    return float(sum(entry[key] * entry["numel"] for entry in known) / numel)


def matrices(entries: Iterable[Entry]) -> list[Entry]:
    """The entries of two dimensions or more, which pictures are about."""
    return [entry for entry in entries if len(entry["shape"]) > 1]


def _is_number(piece: str) -> bool:
    return piece.isascii() and piece.isdigit()


def _shared_pieces(names: Sequence[str]) -> int:
    """How many characters of whole pieces all names begin with."""
    pieces = [name.split(".") for name in names]
    count = 0
    for column in zip(*pieces, strict=False):
        if len(set(column)) > 1:
            break
        count += len(column[0]) + 1
    return count
