"""Pictures of `inspect` and `compare`: heatmaps of layer by matrix, then what has no layer, then notes.

Owns the arrangement and what there is no room for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import isfinite, sqrt
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import (
    Numbers,
    Page,
    Picture,
    axes_at,
    blank,
    depth,
    fitted,
    settings,
    write,
)
from sparseprune.report.pictures.charts import (
    MOST,
    Heat,
    Scale,
    bars,
    budgets_of,
    colour_bar,
    curves,
    grid_of,
    heatmap,
    histograms,
    legend,
    matrices,
    mean_of,
    weighted_mean,
)
from sparseprune.report.tables import shortened

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

    from sparseprune.report.pictures.charts import Entry, Grid, Survivors, Value
    from sparseprune.results.fields import EachCount
    from sparseprune.results.measuring import (
        ComparedTensor,
        CompareTotals,
        Comparison,
        InspectedTensor,
        Inspection,
    )


_BESIDE_LAYERS, _ALONE = 12, 64  # tensors without a layer that there is room for
_LONGEST = 60  # characters of a name
_LINE = 90  # characters of a note
_GAP = 0.4  # inches between two drawings


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
        top = depth(figure) + _GAP + 0.2 if number else 0.0
        if grid.rows:
            values = grid.values(fact.value)
            gaps |= any(value is None for row in values for value in row)
            _layers(figure, top, grid, values, fact)
            hidden = _other_rows(figure, grid, fact)
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


def _other_rows(figure: Figure, grid: Grid[Any], fact: Fact) -> int:
    """Draw the largest tensors that belong to no layer; gives how many more there are."""
    shown = _largest(grid.others, _BESIDE_LAYERS)
    if shown:
        heat = _one_column("Outside of numbered layers", shown, fact)
        heatmap(figure, depth(figure) + _GAP, heat, fact.scale)
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
    with settings():
        write(comparison_page(found), path)


def comparison_page(found: Comparison) -> Page:
    """The page, with its figures drawn; to be called under `settings`."""
    shown, notes = _shown(found.tensors)
    grid = grid_of(shown)
    facts = _facts(shown)
    figure = blank()
    if grid.rows and len(grid.columns) <= MOST:
        _lines(figure, grid, facts)
        add_notes(figure, [*_others(grid, facts), *notes])
    else:
        overview(figure, grid, facts, notes)
    title = f"{found.pruned} compared with {found.dense}"
    picture = Picture(fitted(figure), _CAPTION, numbers_of(grid, facts))
    return Page(title, (picture,), _totals(found.totals))


def _shown(entries: Sequence[ComparedTensor]) -> tuple[list[ComparedTensor], list[str]]:
    """The matrices that changed, or all where none did; and a note of the others."""
    candidates = matrices(entries) or list(entries)
    if not candidates:
        return [], ["There are no tensors that both checkpoints have."]
    grid = grid_of(candidates)
    kinds: dict[str, list[ComparedTensor]] = {}
    for (_, column), found in grid.cells.items():
        kinds.setdefault(column, []).extend(found)
    kinds |= {entry.name: [entry] for entry in grid.others}
    same = [kind for kind, found in kinds.items() if all(map(_is_unchanged, found))]
    if len(same) == len(kinds):
        return candidates, ["None of these changed."]
    left_out = {entry.name for kind in same for entry in kinds[kind]}
    notes = [f"Unchanged and not shown: {_listed(same)}."] if same else []
    return [entry for entry in candidates if entry.name not in left_out], notes


def _is_unchanged(entry: ComparedTensor) -> bool:
    return entry.differs is False


def _listed(names: Sequence[str]) -> str:
    named = shortened([printable(name.removesuffix(".weight")) for name in names[:_NAMED]], 40)
    more = len(names) - len(named)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _facts(entries: Sequence[ComparedTensor]) -> tuple[Fact, Fact]:
    energy = Scale("retained energy")
    largest = max([entry.relative_error or 0.0 for entry in entries], default=0.0)
    error = Scale("relative error", high=largest or 1.0, percent=False, colours="cividis_r")
    kept = [entry.energy_kept for entry in entries if entry.energy_kept is not None]
    if kept and max(kept) > 1:
        energy = replace(energy, high=max(kept))
    return (
        Fact("Retained energy in percent", energy, partial(mean_of, "energy_kept")),
        Fact("Relative error", error, _error),
    )


def _error(entries: Sequence[ComparedTensor]) -> float | None:
    """The root of the mean square, weighted by the elements of each tensor."""
    mean = weighted_mean(
        [
            (one.relative_error * one.relative_error, one.numel)
            for one in entries
            if one.relative_error is not None
        ]
    )
    return sqrt(mean) if mean is not None and isfinite(mean) else None


def _lines(figure: Figure, grid: Grid[Any], facts: Sequence[Fact]) -> None:
    for number, fact in enumerate(facts):
        axes = curves(figure, depth(figure) + _APART if number else 0.0, grid, fact)
        if not number:
            legend(axes)


def _others(grid: Grid[Any], facts: Sequence[Fact]) -> list[str]:
    """What is not on the lines, as sentences."""
    told = []
    for entry in grid.others[:_NAMED]:
        values = [
            f"{fact.scale.name} {fact.scale.text(fact.value((entry,)))}{'%' if fact.scale.percent else ''}"
            for fact in facts
        ]
        told.append(f"{shortened([printable(entry.name)], 50)[0]}: {', '.join(values)}")
    more = len(grid.others) - len(told)
    return [*told, f"and {more:,} more that belong to no numbered layer"] if more else told


def _totals(totals: CompareTotals) -> tuple[tuple[str, str], ...]:
    """Every total that is one number."""
    told = []
    for key, value in vars(totals).items():
        if isinstance(value, float) and key in _SHARES:
            told.append((key.replace("_", " "), f"{value:.2%}"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            told.append((key.replace("_", " "), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"))
    return tuple(told)


SPARSITY = Scale("share of zeros")


def plot_inspection(found: Inspection, path: Path, survivors: Sequence[Survivors] | None = None) -> None:
    """Write the picture of an inspection to a .png, .svg or .html file."""
    with settings():
        write(inspection_page(found, survivors or ()), path)


def inspection_page(found: Inspection, survivors: Sequence[Survivors]) -> Page:
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
    return Page(f"Sparsity of {found.input}", tuple(pictures), facts)


def _sparsity(entries: Sequence[InspectedTensor]) -> Picture:
    shown = matrices(entries) or list(entries)
    grid = grid_of(shown)
    fact = Fact("Sparsity in percent", SPARSITY, partial(mean_of, "sparsity"))
    figure = blank()
    overview(figure, grid, (fact,), _left_out(entries, shown))
    caption = (
        "The share of zeros in every matrix. Matrices that a layer has several of, such as those of experts, "
        "count together."
    )
    return Picture(fitted(figure), caption, numbers_of(grid, (fact,)))


def _left_out(entries: Sequence[InspectedTensor], shown: Sequence[InspectedTensor]) -> tuple[str, ...]:
    """What the picture does not show, in a sentence."""
    if not entries:
        return ("There are no tensors.",)
    count = len(entries) - len(shown)
    if not count:
        return ()
    zeros = sum(entry.zeros or 0 for entry in entries) - sum(entry.zeros or 0 for entry in shown)
    plural = "tensor" if count == 1 else "tensors"
    having = f"with {zeros:,} zeros" if zeros else "without a zero"
    return (f"Not shown: {count:,} {plural} of less than two dimensions, {having}.",)


def _survivors(survivors: Sequence[Survivors]) -> Picture:
    figure = blank()
    histograms(figure, 0, survivors)
    rows = tuple(
        (rule.rule, _budget_text(rule.nnz), f"{blocks:,}", f"{scopes:,}")
        for rule in survivors
        for blocks, scopes in rule.histogram
    )
    caption = (
        "For every rule how many of its scopes have so many blocks that are not zero. The dashed line is the "
        "budget nnz; hatched scopes are above it."
    )
    numbers = Numbers(("rule", "nnz", "blocks that are not zero", "scopes"), rows)
    return Picture(fitted(figure), caption, (numbers,))


def _budget_text(nnz: EachCount) -> str:
    return " ".join(f"{budget:,}" for budget in budgets_of(nnz)) or "-"
