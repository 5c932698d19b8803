"""The picture of what `compare` found: retained energy and relative error, by layer and by matrix.

Takes the compare document. Owns when lines are drawn and when there are too many of them, and which
matrices are left out because nothing changed in them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import isfinite, sqrt
from typing import TYPE_CHECKING, Any

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import blank, depth, fitted, settings
from sparseprune.report.pictures.curves import MOST, curves, legend
from sparseprune.report.pictures.heatmap import Scale
from sparseprune.report.pictures.layers import grid_of, matrices, mean_of
from sparseprune.report.pictures.overview import Fact, add_notes, numbers_of, overview
from sparseprune.report.pictures.page import Page, Picture, write
from sparseprune.report.shortening import shortened

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from sparseprune.report.pictures.layers import Entry, Grid

_NAMED = 6  # matrices without a change that are named
_SHARES = {"energy_kept", "sparsity", "sparsity_before"}
_APART = 0.55  # inches between two drawings
_CAPTION = (
    "Retained energy is ||pruned||^2 / ||dense||^2, relative error ||pruned - dense|| / ||dense||. "
    "Where a layer has several matrices of a kind, such as those of experts, the mean is shown, of the "
    "squares for the error; each counts by its elements. What is not finite is a gap."
)


def plot_comparison(document: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a compare document to a .png, .svg or .html file."""
    with settings():
        write(comparison_page(document), path)


def comparison_page(document: Mapping[str, Any]) -> Page:
    """The page, with its figures drawn; to be called under `settings`."""
    shown, notes = _shown(document["tensors"])
    grid = grid_of(shown)
    facts = _facts(shown)
    figure = blank()
    if grid.rows and len(grid.columns) <= MOST:
        _lines(figure, grid, facts)
        add_notes(figure, [*_others(grid, facts), *notes])
    else:
        overview(figure, grid, facts, notes)
    title = f"{document['pruned']} compared with {document['dense']}"
    picture = Picture(fitted(figure), _CAPTION, numbers_of(grid, facts))
    return Page(title, (picture,), _totals(document["totals"]))


def _shown(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The matrices that changed, or all where none did; and a note of the others."""
    candidates = matrices(entries) or list(entries)
    if not candidates:
        return [], ["There are no tensors that both checkpoints have."]
    grid = grid_of(candidates)
    kinds: dict[str, list[Entry]] = {}
    for (_, column), found in grid.cells.items():
        kinds.setdefault(column, []).extend(found)
    kinds |= {entry["name"]: [entry] for entry in grid.others}
    same = [kind for kind, found in kinds.items() if all(map(_is_unchanged, found))]
    if len(same) == len(kinds):
        return candidates, ["None of these changed."]
    left_out = {entry["name"] for kind in same for entry in kinds[kind]}
    notes = [f"Unchanged and not shown: {_listed(same)}."] if same else []
    return [entry for entry in candidates if entry["name"] not in left_out], notes


def _is_unchanged(entry: Entry) -> bool:
    return entry["differs"] is False


def _listed(names: Sequence[str]) -> str:
    named = shortened([printable(name.removesuffix(".weight")) for name in names[:_NAMED]], 40)
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _facts(entries: Sequence[Entry]) -> tuple[Fact, Fact]:
    energy = Scale("retained energy")
    largest = max([entry["relative_error"] or 0.0 for entry in entries], default=0.0)
    error = Scale("relative error", high=largest or 1.0, percent=False, colours="cividis_r")
    kept = [entry["energy_kept"] for entry in entries if entry["energy_kept"] is not None]
    if kept and max(kept) > 1:
        energy = replace(energy, high=max(kept))
    return (
        Fact("Retained energy in percent", energy, partial(mean_of, "energy_kept")),
        Fact("Relative error", error, _error),
    )


def _error(entries: Sequence[Entry]) -> float | None:
    """The root of the mean square, each tensor counting by its elements."""
    known = [entry for entry in entries if entry["relative_error"] is not None]
    squares = [
        {"numel": one["numel"], "square": one["relative_error"] * one["relative_error"]} for one in known
    ]
    mean = mean_of("square", squares)
    return sqrt(mean) if mean is not None and isfinite(mean) else None


def _lines(figure: Figure, grid: Grid, facts: Sequence[Fact]) -> None:
    for number, fact in enumerate(facts):
        axes = curves(figure, depth(figure) + _APART if number else 0.0, grid, fact)
        if not number:
            legend(axes)


def _others(grid: Grid, facts: Sequence[Fact]) -> list[str]:
    """What is not on the lines, as sentences."""
    told = []
    for entry in grid.others[:_NAMED]:
        values = [
            f"{fact.scale.name} {fact.scale.text(fact.value((entry,)))}{'%' if fact.scale.percent else ''}"
            for fact in facts
        ]
        told.append(f"{shortened([printable(entry['name'])], 50)[0]}: {', '.join(values)}")
    more = len(grid.others) - len(told)
    return [*told, f"and {more:,} more that belong to no numbered layer"] if more else told


def _totals(totals: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Every total that is one number."""
    told = []
    for key, value in totals.items():
        if isinstance(value, float) and key in _SHARES:
            told.append((key.replace("_", " "), f"{value:.2%}"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            told.append((key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return tuple(told)
