"""Pictures of `inspect` and `compare`: heatmaps of layer by matrix, then what has no layer, then notes.

Owns the arrangement and what there is no room for.
"""

from __future__ import annotations

from functools import partial
from math import isfinite, sqrt
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import printable
from sparseprune.report.pictures import canvas, charts
from sparseprune.report.tables import shortened
from sparseprune.report.wording import many

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from sparseprune.report.pictures.charts import Entry, Grid, Survivors, Value
    from sparseprune.results import Comparison, Inspection
    from sparseprune.results.measuring import ComparedTensor, CompareTotals, InspectedTensor


_BESIDE_LAYERS, _ALONE = 12, 64  # tensors without a layer that there is room for
_LONGEST = 60  # characters of a name
_LINE = 90  # characters of a note
_GAP = 0.4  # inches between two drawings


class Fact(Struct, frozen=True):
    """One number for each matrix: its title, its scale, and how it is found for one cell's entries."""

    title: str
    scale: charts.Scale
    value: Value


def overview(figure: Figure, grid: Grid[Any], facts: Iterable[Fact], notes: Sequence[str]) -> None:
    """Draw every fact below the other, and the notes below all."""
    shown = _largest(grid.others, _BESIDE_LAYERS if grid.rows else _ALONE)
    gaps = False
    for number, fact in enumerate(facts):
        top = canvas.depth(figure) + _GAP + 0.2 if number else 0.0
        if grid.rows:
            values = grid.values(fact.value)
            gaps |= any(value is None for row in values for value in row)
            _layers(figure, top, grid, values, fact)
            if shown:
                heat = _one_column("Outside of numbered layers", shown, fact)
                charts.heatmap(figure, canvas.depth(figure) + _GAP, heat, fact.scale)
        elif shown:
            charts.bars(figure, top, _one_column(fact.title, shown, fact), fact.scale)
    hidden = len(grid.others) - len(shown)
    below = [f"Not shown: {hidden:,} smaller tensors that belong to no numbered layer."] if hidden else []
    below += notes
    if gaps:
        below.append("Grey: there is no such matrix, or its elements cannot be looked at.")
    add_notes(figure, below)


def add_notes(figure: Figure, notes: Sequence[str]) -> None:
    """Sentences below all that is drawn so far."""
    if not notes:
        return
    top = canvas.depth(figure) + 0.12 if figure.axes else 0.0
    axes = canvas.axes_at(figure, 0, top, 4, 0.1)
    axes.set_axis_off()
    lines = [line for note in notes for line in wrap(note, _LINE, break_long_words=False)]
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=7.5, color="#555555", linespacing=1.4)


def numbers_of(grid: Grid[Any], facts: Sequence[Fact]) -> tuple[canvas.Numbers, ...]:
    """What an overview shows, as tables: the layers, one for each fact, then the others."""
    tables = []
    for fact in facts if grid.rows else ():
        titles = (f"{fact.scale.name}, layer", *grid.column_labels())
        rows = zip(grid.row_labels(), grid.values(fact.value), strict=True)
        tables.append(canvas.Numbers(titles, tuple((label, *map(_exact, row)) for label, row in rows)))
    if grid.others:
        titles = ("tensor", *(fact.scale.name for fact in facts))
        alone = [(one.name, *(_exact(fact.value((one,))) for fact in facts)) for one in grid.others]
        tables.append(canvas.Numbers(titles, tuple(alone)))
    return tuple(tables)


def _layers(
    figure: Figure, top: float, grid: Grid[Any], values: Sequence[Sequence[float | None]], fact: Fact
) -> None:
    rows, columns = (shortened(labels, _LONGEST) for labels in (grid.row_labels(), grid.column_labels()))
    stack = shortened([printable(grid.stacks[0])], 24)[0] if len(grid.stacks) == 1 else ""
    heat = charts.Heat(fact.title, rows, columns, values, stack or "layer")
    axes = charts.heatmap(figure, top, heat, fact.scale)
    for at in range(1, len(grid.rows)):
        if grid.rows[at][0] != grid.rows[at - 1][0]:
            axes.axhline(at, color="white", linewidth=2.5)
    charts.colour_bar(figure, axes, axes.collections[0], fact.scale)


def _largest(entries: Sequence[Entry], most: int) -> list[Entry]:
    """The entries that have the most elements, in the order in which they stand."""
    chosen = sorted(range(len(entries)), key=lambda at: -entries[at].numel)[:most]
    return [entries[at] for at in sorted(chosen)]


def _one_column(title: str, entries: Sequence[Entry], fact: Fact) -> charts.Heat:
    names = shortened([printable(entry.name) for entry in entries], _LONGEST)
    return charts.Heat(title, names, ("",), [[fact.value((entry,))] for entry in entries])


def _exact(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


_NAMED = 6  # matrices without a change that are named
_SHARES = {"energy_kept", "sparsity", "sparsity_before"}
_APART = 0.55  # inches between two drawings
_CAPTION = (
    "Retained energy is ||pruned||^2 / ||dense||^2, relative error ||pruned - dense|| / ||dense||. "
    "Where a layer has several matrices of a kind, such as those of experts, the mean is shown, of the "
    "squares for the error; each counts by its elements. What is not finite is a gap."
)


def plot_comparison(found: Comparison, path: Path) -> None:
    """Write the picture of a comparison to a .png, .svg or .html file."""
    with canvas.settings():
        canvas.write(comparison_page(found), path)


def comparison_page(found: Comparison) -> canvas.Page:
    """The page, with its figures drawn; to be called under `settings`."""
    shown, notes = _shown(found.tensors)
    grid = charts.grid_of(shown)
    facts = _facts(shown)
    figure = canvas.blank()
    if grid.rows and len(grid.columns) <= charts.MOST:
        _lines(figure, grid, facts)
        add_notes(figure, [*_others(grid, facts), *notes])
    else:
        overview(figure, grid, facts, notes)
    title = f"{found.pruned} compared with {found.dense}"
    picture = canvas.Picture(canvas.fitted(figure), _CAPTION, numbers_of(grid, facts))
    return canvas.Page(title, (picture,), _totals(found.totals))


def _shown(entries: Sequence[ComparedTensor]) -> tuple[list[ComparedTensor], list[str]]:
    """The matrices that changed, or all where none did; and a note of the others."""
    candidates = charts.matrices(entries) or list(entries)
    if not candidates:
        return [], ["There are no tensors that both checkpoints have."]
    grid = charts.grid_of(candidates)
    kinds: dict[str, list[ComparedTensor]] = {}
    for (_, column), found in grid.cells.items():
        kinds.setdefault(column, []).extend(found)
    kinds |= {entry.name: [entry] for entry in grid.others}
    same = [kind for kind, found in kinds.items() if all(entry.differs is False for entry in found)]
    if len(same) == len(kinds):
        return candidates, ["None of these changed."]
    left_out = {entry.name for kind in same for entry in kinds[kind]}
    notes = [f"Unchanged and not shown: {_listed(same)}."] if same else []
    return [entry for entry in candidates if entry.name not in left_out], notes


def _listed(names: Sequence[str]) -> str:
    named = shortened([printable(name.removesuffix(".weight")) for name in names[:_NAMED]], 40)
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _facts(entries: Sequence[ComparedTensor]) -> tuple[Fact, Fact]:
    energy = charts.Scale("retained energy")
    largest = max([entry.relative_error or 0.0 for entry in entries], default=0.0)
    error = charts.Scale("relative error", high=largest or 1.0, percent=False, colours="cividis_r")
    kept = [entry.energy_kept for entry in entries if entry.energy_kept is not None]
    if kept and max(kept) > 1:
        energy = replace(energy, high=max(kept))
    return (
        Fact("Retained energy in percent", energy, partial(charts.mean_of, "energy_kept")),
        Fact("Relative error", error, _error),
    )


def _error(entries: Sequence[ComparedTensor]) -> float | None:
    """The root of the mean square, weighted by the elements of each tensor."""
    errors = [(one.relative_error, one.numel) for one in entries if one.relative_error is not None]
    mean = charts.weighted_mean([(error * error, numel) for error, numel in errors])
    return sqrt(mean) if mean is not None and isfinite(mean) else None


def _lines(figure: Figure, grid: Grid[Any], facts: Sequence[Fact]) -> None:
    for number, fact in enumerate(facts):
        axes = charts.curves(figure, canvas.depth(figure) + _APART if number else 0.0, grid, fact)
        if not number:
            charts.legend(axes)


def _others(grid: Grid[Any], facts: Sequence[Fact]) -> list[str]:
    lines = []
    for entry in grid.others[:_NAMED]:
        values = [
            f"{fact.scale.name} {fact.scale.text(fact.value((entry,)))}{'%' if fact.scale.percent else ''}"
            for fact in facts
        ]
        lines.append(f"{shortened([printable(entry.name)], 50)[0]}: {', '.join(values)}")
    more = len(grid.others) - len(lines)
    return [*lines, f"and {more:,} more that belong to no numbered layer"] if more else lines


def _totals(totals: CompareTotals) -> tuple[tuple[str, str], ...]:
    numbers = {key: value for key, value in vars(totals).items() if isinstance(value, int | float)}
    forms = {
        key: "," if isinstance(value, int) else ".2%" if key in _SHARES else ".4g"
        for key, value in numbers.items()
    }
    return tuple((key.replace("_", " "), f"{value:{forms[key]}}") for key, value in numbers.items())


SPARSITY = charts.Scale("share of zeros")


def plot_inspection(found: Inspection, path: Path, survivors: Sequence[Survivors] | None = None) -> None:
    """Write the picture of an inspection to a .png, .svg or .html file."""
    with canvas.settings():
        canvas.write(inspection_page(found, survivors or ()), path)


def inspection_page(found: Inspection, survivors: Sequence[Survivors]) -> canvas.Page:
    """The page, with its figures drawn; to be called under `settings`."""
    totals = found.totals
    facts = (
        ("tensors", f"{totals.tensors:,}"),
        ("elements", f"{totals.numel:,}"),
        ("zeros", f"{totals.pruned:,}"),
        ("sparsity", f"{totals.sparsity:.2%}"),
        *((f"satisfy {name}", f"{count:,}") for name, count in totals.patterns.items() if count),
    )
    pictures = [_sparsity(found.tensors)]
    if survivors:
        pictures.append(_survivors(survivors))
    return canvas.Page(f"Sparsity of {found.input}", tuple(pictures), facts)


def _sparsity(entries: Sequence[InspectedTensor]) -> canvas.Picture:
    shown = charts.matrices(entries) or list(entries)
    grid = charts.grid_of(shown)
    fact = Fact("Sparsity in percent", SPARSITY, partial(charts.mean_of, "sparsity"))
    figure = canvas.blank()
    overview(figure, grid, (fact,), _left_out(entries, shown))
    caption = (
        "The share of zeros in every matrix. Matrices that a layer has several of, such as those of experts, "
        "count together."
    )
    return canvas.Picture(canvas.fitted(figure), caption, numbers_of(grid, (fact,)))


def _left_out(entries: Sequence[InspectedTensor], shown: Sequence[InspectedTensor]) -> tuple[str, ...]:
    count = len(entries) - len(shown)
    if not count:
        return () if entries else ("There are no tensors.",)
    zeros = sum(entry.zeros or 0 for entry in entries) - sum(entry.zeros or 0 for entry in shown)
    having = f"with {zeros:,} zeros" if zeros else "without a zero"
    return (f"Not shown: {many(count, 'tensor')} of less than two dimensions, {having}.",)


def _survivors(survivors: Sequence[Survivors]) -> canvas.Picture:
    figure = canvas.blank()
    charts.histograms(figure, 0, survivors)
    rows = tuple(
        (
            rule.rule,
            " ".join(map("{:,}".format, charts.budgets_of(rule.nnz))) or "-",
            f"{blocks:,}",
            f"{scopes:,}",
        )
        for rule in survivors
        for blocks, scopes in rule.histogram
    )
    caption = (
        "For every rule how many of its scopes have so many blocks that are not zero. The dashed line is the "
        "budget nnz; hatched scopes are above it."
    )
    numbers = canvas.Numbers(("rule", "nnz", "blocks that are not zero", "scopes"), rows)
    return canvas.Picture(canvas.fitted(figure), caption, (numbers,))
