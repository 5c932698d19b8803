"""Facts of a checkpoint at one glance: heatmaps of layer by matrix, what has no layer below, notes at last.

Owns the arrangement and what there is no room for. Called by the pictures of inspect and compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import Numbers, axes_at, depth
from sparseprune.report.pictures.charts import Heat, Scale, bars, colour_bar, heatmap
from sparseprune.report.tables import shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.figure import Figure

    from sparseprune.report.pictures.charts import Entry, Grid, Value

_BESIDE_LAYERS, _ALONE = 12, 64  # tensors without a layer that there is room for
_LONGEST = 60  # characters of a name
_LINE = 90  # characters of a note
_APART = 0.4  # inches between two drawings


@dataclass(frozen=True, slots=True)
class Fact:
    """One number for each matrix: its title, its scale, and how it is found for one cell's entries."""

    title: str
    scale: Scale
    value: Value


def overview(figure: Figure, grid: Grid[Any], facts: Iterable[Fact], notes: Sequence[str]) -> None:
    """Draw every fact below the other, and the notes below all."""
    gaps = False
    hidden = 0
    for number, fact in enumerate(facts):
        top = depth(figure) + _APART + 0.2 if number else 0.0
        if grid.rows:
            values = grid.values(fact.value)
            gaps |= any(value is None for row in values for value in row)
            _layers(figure, top, grid, values, fact)
            hidden = _others(figure, grid, fact)
        elif grid.others:
            shown = _largest(grid.others, _ALONE)
            hidden = len(grid.others) - len(shown)
            bars(figure, top, _one_column(fact.title, shown, fact), fact.scale)
    told = [*notes]
    if hidden:
        told.insert(0, f"Not shown: {hidden:,} smaller tensors that belong to no numbered layer.")
    if gaps:
        told.append("Grey: there is no such matrix, or its elements cannot be looked at.")
    add_notes(figure, told)


def add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """Sentences below all that is drawn so far."""
    if not notes:
        return
    top = depth(figure) + 0.12 if figure.axes else 0.0
    axes = axes_at(figure, 0, top, 4, 0.1)
    axes.set_axis_off()
    lines = [line for note in notes for line in wrap(note, _LINE, break_long_words=False)]
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=7.5, color="#555555", linespacing=1.4)


def numbers_of(grid: Grid[Any], facts: Sequence[Fact]) -> tuple[Numbers, ...]:
    """What an overview shows, as tables: the layers, one for each fact, then the others."""
    tables = []
    if grid.rows:
        for fact in facts:
            rows = zip(grid.row_labels(), grid.values(fact.value), strict=True)
            tables.append(
                Numbers(
                    (f"{fact.scale.name}, layer", *grid.column_labels()),
                    tuple((label, *map(_exact, row)) for label, row in rows),
                )
            )
    if grid.others:
        titles = ("tensor", *(fact.scale.name for fact in facts))
        rows_of_others = tuple(
            (entry.name, *(_exact(fact.value((entry,))) for fact in facts)) for entry in grid.others
        )
        tables.append(Numbers(titles, rows_of_others))
    return tuple(tables)


def _layers(
    figure: Figure, top: float, grid: Grid[Any], values: Sequence[Sequence[float | None]], fact: Fact
) -> None:
    columns = shortened(grid.column_labels(), _LONGEST)
    rows = shortened(grid.row_labels(), _LONGEST)
    single = len(grid.stacks) == 1
    stack = shortened([printable(grid.stacks[0])], 24)[0] if single else ""
    axes = heatmap(figure, top, Heat(fact.title, rows, columns, values, stack or "layer"), fact.scale)
    for at in range(1, len(grid.rows)):
        if grid.rows[at][0] != grid.rows[at - 1][0]:
            axes.axhline(at, color="white", linewidth=2.5)
    colour_bar(figure, axes, axes.collections[0], fact.scale)


def _others(figure: Figure, grid: Grid[Any], fact: Fact) -> int:
    """Draw the largest tensors that belong to no layer; gives how many more there are."""
    shown = _largest(grid.others, _BESIDE_LAYERS)
    if shown:
        heat = _one_column("Outside of numbered layers", shown, fact)
        heatmap(figure, depth(figure) + _APART, heat, fact.scale)
    return len(grid.others) - len(shown)


def _largest(entries: Sequence[Entry], most: int) -> list[Entry]:
    """The entries that have the most elements, in the order in which they stand."""
    chosen = sorted(range(len(entries)), key=lambda at: -entries[at].numel)[:most]
    return [entries[at] for at in sorted(chosen)]


def _one_column(title: str, entries: Sequence[Entry], fact: Fact) -> Heat:
    names = shortened([printable(entry.name) for entry in entries], _LONGEST)
    return Heat(title, names, ("",), [[fact.value((entry,))] for entry in entries])


def _exact(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
