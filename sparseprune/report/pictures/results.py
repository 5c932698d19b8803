"""Pictures of `inspect` and `compare`: layer by matrix, then what has no layer, then notes.

Owns the arrangement, what there is no room for, and what is told in a sentence in place of a drawing that
would show one number. Called by api.
"""

from __future__ import annotations

from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import printable
from sparseprune.report.pictures import canvas, charts, page
from sparseprune.report.tables import shortened
from sparseprune.report.wording import many, shape_text, some_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparseprune.report.pictures.canvas import Sheet
    from sparseprune.report.pictures.charts import Entry, Grid, Survivors, Value
    from sparseprune.results import Comparison, Inspection
    from sparseprune.results.measuring import (
        ComparedTensor,
        CompareTotals,
        InspectedGroup,
        InspectedTensor,
    )


_BESIDE_LAYERS, _ALONE = 12, 64  # tensors without a layer that there is room for
_LONGEST = 60  # characters of a name
_LINE = 90  # characters of a note
_GAP = 0.4  # inches between two drawings
_SAME = 0.0005  # shares that differ by less are written alike
_BARELY = 0.005  # values that differ by less need no bars


class Fact(Struct, frozen=True):
    """One number for each matrix: its title, its scale, and how it is found for one cell's entries."""

    title: str
    scale: charts.Scale
    value: Value


def fitted(fact: Fact, grid: Grid[Any]) -> Fact:
    """The fact with the scale of what the layers have, or of all tensors where none is in a layer."""
    cells = grid.cells.values() if grid.rows else [(one,) for one in grid.others]
    return replace(fact, scale=fact.scale.fitted(fact.value(found) for found in cells))


def overview(figure: Sheet, grid: Grid[Any], facts: Iterable[Fact], notes: Sequence[str]) -> None:
    """Draw every fact below the other, and the notes below all."""
    shown = _largest(grid.others, _BESIDE_LAYERS if grid.rows else _ALONE)
    gaps, below = False, []
    for fact in facts:
        if grid.rows:
            heat = layers_of(grid, fact)
            gaps |= any(value is None for row in heat.values for value in row)
            axes = charts.heatmap(figure, next_top(figure), heat, fact.scale)
            part_stacks(axes, grid)
            charts.colour_bar(figure, axes, axes.collections[0], fact.scale)
        below += _alone(figure, shown, fact, "Outside of numbered layers" if grid.rows else fact.title)
    hidden = len(grid.others) - len(shown)
    if hidden:
        below.append(f"Not shown: {hidden:,} smaller tensors that belong to no numbered layer.")
    below += notes
    if gaps:
        below.append("Grey: there is no such matrix, or its elements cannot be looked at.")
    add_notes(figure, below)


def next_top(figure: Sheet) -> float:
    """How far down the next drawing begins."""
    return canvas.depth(figure) + _GAP + 0.2 if figure.axes else 0.0


def add_notes(figure: Sheet, notes: Sequence[str]) -> None:
    """Sentences below all that is drawn so far."""
    if not notes:
        return
    top = canvas.depth(figure) + 0.12 if figure.axes else 0.0
    axes = canvas.axes_at(figure, 0, top, 4, 0.1)
    axes.set_axis_off()
    lines = [line for note in notes for line in wrap(note, _LINE, break_long_words=False)]
    axes.text(0, 1, "\n".join(lines), va="top", fontsize=7.5, color="#555555", linespacing=1.4)


def layers_of(grid: Grid[Any], fact: Fact) -> charts.Heat:
    """The cells of the layers, with their labels."""
    rows, columns = (shortened(labels, _LONGEST) for labels in (grid.row_labels(), grid.column_labels()))
    stack = shortened([printable(grid.stacks[0])], 24)[0] if len(grid.stacks) == 1 else ""
    cells = [[grid.cells.get((row, column), ()) for column in grid.columns] for row in grid.rows]
    return charts.Heat(fact.title, rows, columns, grid.values(fact.value), stack or "layer", cells)


def part_stacks(axes: Any, grid: Grid[Any]) -> None:  # noqa: ANN401
    """A white line between stacks of layers."""
    for at in range(1, len(grid.rows)):
        if grid.rows[at][0] != grid.rows[at - 1][0]:
            axes.axhline(at, color="white", linewidth=2.5)


def _alone(figure: Sheet, shown: Sequence[Entry], fact: Fact, title: str) -> list[str]:
    """Bars of tensors without a layer; where they would all be alike a sentence instead."""
    values = [fact.value((entry,)) for entry in shown]
    known = [value for value in values if value is not None]
    if len(known) > 1 and max(known) - min(known) > _BARELY:
        names = shortened([printable(entry.name) for entry in shown], _LONGEST)
        heat = charts.Heat(title, names, ("",), [[one] for one in values], cells=[[(one,)] for one in shown])
        charts.bars(figure, next_top(figure), heat, fact.scale)
        return []
    ends = dict.fromkeys(map(fact.scale.with_unit, (min(known), max(known)) if known else (None,)))
    return [f"{_listed(shown)}: {fact.scale.name} {' to '.join(ends)}."] if shown else []


def _largest(entries: Sequence[Entry], most: int) -> list[Entry]:
    """The entries that have the most elements, in the order in which they stand."""
    chosen = sorted(range(len(entries)), key=lambda at: -entries[at].numel)[:most]
    return [entries[at] for at in sorted(chosen)]


def _exact(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def _places(name: str) -> tuple[str, str]:
    """The layer and the matrix of a tensor, as a table has them."""
    place = charts.place_of(name)
    return ("-", name) if place is None else (f"{place[0]}.{place[1]}".lstrip("."), place[2])


def _titled(what: str, path: str, spec: str | None) -> str:
    """A title that tells which checkpoint is seen, by the name of its folder, and by which spec."""
    return f"{what}{_name(path)}" + ("" if spec is None else f", spec {spec}")


def _name(path: str) -> str:
    return Path(path).name or path


_PLACE = ("layer", "matrix")
_NAMED = 6  # matrices without a change that are named
_SHARES = {"energy_kept", "sparsity", "sparsity_before"}
_CAPTION = (
    "The energy of a matrix is the sum of its squares. A random choice of as many elements would keep their "
    "share of it: drawn is how many points more are kept, so that layers of unlike sparsity can be "
    "compared. Relative error is ||pruned - dense|| / ||dense||. Output error and loss error are the "
    "same of the outputs of a matrix, weighted for the loss by its gradients. Of several "
    "matrices of a kind in a layer, such as those of experts, the mean is shown, of the squares for errors; "
    "each counts by its elements. What is not finite is a gap."
)
_ERRORS = {
    "relative_error": ("relative error", "Relative error of the weights"),
    "output_error": ("output error", "Relative error of the outputs"),
    "loss_error": ("loss error", "Relative error of the outputs, weighted by gradients of the loss"),
}


_OF_ERRORS = charts.Scale("", high=float("inf"), percent=False, colours="cividis_r", least=1e-6, rooted=True)


def plot_comparison(found: Comparison, path: Path, spec: str | None = None) -> None:
    """Write the picture of a comparison to a .png, .svg, .pdf or .html file; `spec` is named in the title."""
    with canvas.settings():
        page.write(comparison_page(found, spec), path)


def comparison_page(found: Comparison, spec: str | None = None) -> page.Page:
    """The page, with its figures drawn; to be called under `settings`."""
    shown, notes = _shown(found.tensors)
    grid = charts.grid_of(shown)
    facts = [fitted(fact, grid) for fact in _facts(shown)]
    figure = canvas.blank()
    if grid.rows and len(grid.columns) <= charts.MOST:
        _lines(figure, grid, facts)
        add_notes(figure, [*_others(grid, facts), *notes])
    else:
        overview(figure, grid, facts, notes)
    against = f" compared with {_name(found.dense)}"
    title = _titled("", found.pruned, None) + against + ("" if spec is None else f", spec {spec}")
    ranges = "; ".join(f"{fact.scale.name} {_range(fact, grid)}" for fact in facts)
    alt = f"{_size(grid)}. {ranges}."
    picture = page.Picture(canvas.fitted(figure), _CAPTION, alt)
    return page.Page(title, (picture,), _totals(found.totals), _compared_table(found.tensors))


def _range(fact: Fact, grid: Grid[Any]) -> str:
    """From the least to the largest value that is drawn."""
    cells = [*grid.cells.values(), *((one,) for one in grid.others)]
    known = [value for found in cells if (value := fact.value(found)) is not None]
    ends = dict.fromkeys(fact.scale.with_unit(value) for value in ((min(known), max(known)) if known else ()))
    return " to ".join(ends) or "not known"


def _size(grid: Grid[Any]) -> str:
    layers, kinds = len(grid.rows), len(grid.columns)
    layered = f"{many(layers, 'layer')} with {many(kinds, 'kind')} of matrices" if layers else ""
    alone = f"{many(len(grid.others), 'tensor')} outside of layers" if grid.others else ""
    return " and ".join(filter(None, (layered, alone))) or "No tensors"


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
    notes = [f"Unchanged and not shown: {_named(same)}."] if same else []
    return [entry for entry in candidates if entry.name not in left_out], notes


def _listed(entries: Sequence[Entry]) -> str:
    return _named([entry.name for entry in entries])


def _named(names: Sequence[str]) -> str:
    named = shortened([printable(name.removesuffix(".weight")) for name in names[:_NAMED]], 40)
    return some_of([*named, *names[_NAMED:]], _NAMED)


def _facts(entries: Sequence[ComparedTensor]) -> list[Fact]:
    """Energy beyond chance, and every error that is known of some matrix, the one of weights always."""
    beyond = charts.Scale("energy kept beyond chance", low=-1.0, high=float("inf"), unit=", points")
    facts = [Fact("Energy kept beyond a random choice", beyond, _beyond)]
    for key, (name, title) in _ERRORS.items():
        if key == "relative_error" or any(getattr(entry, key) is not None for entry in entries):
            scale = replace(_OF_ERRORS, name=name)
            facts.append(Fact(title, scale, partial(_error, key)))
    return facts


def beyond_chance(entry: ComparedTensor) -> float | None:
    """The share of energy that is kept less the share of elements that are, of those that were not zero."""
    if entry.energy_kept is None or entry.zeroed is None or entry.zeros_before is None:
        return None
    there = entry.numel - entry.zeros_before
    return entry.energy_kept - (1 - entry.zeroed / there if there else 1)


def _beyond(entries: Sequence[ComparedTensor]) -> float | None:
    known = [(value, one.numel) for one in entries if (value := beyond_chance(one)) is not None]
    return charts.weighted_mean(known)


def _error(key: str, entries: Sequence[ComparedTensor]) -> float | None:
    """The root of the mean square, weighted by the elements of each tensor."""
    errors = [(getattr(one, key), one.numel) for one in entries if getattr(one, key) is not None]
    mean = charts.weighted_mean([(error * error, numel) for error, numel in errors])
    return sqrt(mean) if mean is not None and isfinite(mean) else None


def _lines(figure: Sheet, grid: Grid[Any], facts: Sequence[Fact]) -> None:
    for number, fact in enumerate(facts):
        axes = charts.curves(figure, next_top(figure), grid, fact)
        if not number:
            charts.legend(axes)


def _others(grid: Grid[Any], facts: Sequence[Fact]) -> list[str]:
    lines = []
    for entry in grid.others[:_NAMED]:
        values = [f"{fact.scale.name} {fact.scale.with_unit(fact.value((entry,)))}" for fact in facts]
        lines.append(f"{shortened([printable(entry.name)], 50)[0]}: {', '.join(values)}")
    more = len(grid.others) - len(lines)
    return [*lines, f"and {more:,} more that belong to no numbered layer"] if more else lines


def _compared_table(entries: Sequence[ComparedTensor]) -> page.Numbers:
    errors = [key for key in _ERRORS if any(getattr(one, key) is not None for one in entries)]
    rows = tuple(
        (
            entry.name,
            *_places(entry.name),
            shape_text(entry.shape),
            "-" if entry.zeroed is None else f"{entry.zeroed:,}",
            _exact(entry.energy_kept),
            _exact(beyond_chance(entry)),
            *(_exact(getattr(entry, key)) for key in errors),
        )
        for entry in entries
    )
    names = tuple(_ERRORS[key][0] for key in errors)
    titles = ("tensor", "layer", "matrix", "shape", "zeroed", "energy kept", "beyond chance", *names)
    return page.Numbers(titles, rows, "All tensors that both have", _PLACE, _PLACE)


def _totals(totals: CompareTotals) -> tuple[tuple[str, str], ...]:
    numbers = {key: value for key, value in vars(totals).items() if isinstance(value, int | float)}
    forms = {
        key: "," if isinstance(value, int) else ".2%" if key in _SHARES else ".4g"
        for key, value in numbers.items()
    }
    return tuple((key.replace("_", " "), f"{value:{forms[key]}}") for key, value in numbers.items())


SPARSITY = charts.Scale("share of zeros")
_REGULAR = 0.98  # of the zeros that lie in whole rows or columns where a matrix is one of these


def plot_inspection(
    found: Inspection, path: Path, survivors: Sequence[Survivors] | None = None, spec: str | None = None
) -> None:
    """Write the picture of an inspection to a .png, .svg, .pdf or .html file; `spec` is for its title."""
    with canvas.settings():
        page.write(inspection_page(found, survivors or (), spec), path)


def inspection_page(found: Inspection, survivors: Sequence[Survivors], spec: str | None = None) -> page.Page:
    """The page, with its figures drawn; to be called under `settings`."""
    totals = found.totals
    facts = (
        ("tensors", f"{totals.tensors:,}"),
        ("elements", f"{totals.numel:,}"),
        ("zeros", f"{totals.pruned:,}"),
        ("sparsity", f"{totals.sparsity:.2%}"),
        *((f"satisfy {name}", f"{count:,}") for name, count in totals.patterns.items() if count),
    )
    spread = [one for one in survivors if len(one.histogram) > 1]
    pictures = [_sparsity(found, _uniform([one for one in survivors if one not in spread]))]
    if spread:
        pictures.append(_survivors(spread))
    title = _titled("Sparsity of ", found.input, spec)
    return page.Page(title, tuple(pictures), facts, _inspected_table(found.tensors))


def _uniform(survivors: Sequence[Survivors]) -> list[str]:
    """What there is to say of rules whose scopes all keep as many blocks."""
    return [
        f"{printable(rule.rule)}: each of its {many(scopes, 'scope')} keeps {many(blocks, 'block')}, "
        f"nnz {' '.join(map('{:,}'.format, charts.budgets_of(rule.nnz))) or 'not given'}."
        for rule in survivors
        for blocks, scopes in rule.histogram
    ]


def _sparsity(found: Inspection, notes: Sequence[str]) -> page.Picture:
    """The share of zeros by layer and matrix, or by group; and which kind of zeros they are."""
    entries = found.tensors
    shown = charts.matrices(entries) or list(entries)
    grid = charts.grid_of(shown)
    fact = fitted(Fact("Sparsity in percent", SPARSITY, partial(charts.mean_of, "sparsity")), grid)
    figure = canvas.blank()
    numbers: tuple[page.Numbers, ...] = ()
    below = [*_left_out(entries, shown), *notes]
    kinds = [[_kind(cell) for cell in row] for row in layers_of(grid, fact).cells] if grid.rows else []
    if found.groups is not None and len(found.groups) > 1:
        below = [*_groups(figure, found.groups, str(found.by)), *notes]
        numbers = (_grouped_table(found.groups, str(found.by)),)
    else:
        regular = any(kind and kind not in {"dense", "unstructured"} for row in kinds for kind in row)
        if regular:
            title, flat = _kinds_title(grid, fact)
            heat = replace(layers_of(grid, fact), title=title)
            part_stacks(charts.kinds_map(figure, 0.0, heat, kinds), grid)
            if flat:  # else the share of zeros is drawn as well
                fact, below = replace(fact, scale=SPARSITY), [*_rest(figure, grid, fact), *below]
        if not (regular and flat):
            overview(figure, grid, (fact,), below)
        else:
            add_notes(figure, below)
    caption = (
        "The share of zeros in every matrix, and how they lie. Matrices that a layer has several of, such as "
        "those of experts, count together."
    )
    alt = f"{_size(grid)}. Share of zeros {_range(fact, grid)}."
    return page.Picture(canvas.fitted(figure), caption, alt, numbers)


def _kinds_title(grid: Grid[Any], fact: Fact) -> tuple[str, bool]:
    """The title of the map of kinds, and whether it tells the share of zeros of all its matrices."""
    known = [value for found in grid.cells.values() if (value := fact.value(found)) is not None]
    if known and max(known) - min(known) < _SAME:
        return f"Where zeros lie: {fact.scale.with_unit(known[0])} of every matrix", True
    return "Where zeros lie", False


def _rest(figure: Sheet, grid: Grid[Any], fact: Fact) -> list[str]:
    """Tensors without a layer, below the map of kinds."""
    return _alone(figure, _largest(grid.others, _BESIDE_LAYERS), fact, "Outside of numbered layers")


def _kind(entries: Sequence[InspectedTensor]) -> str:
    """A key of KINDS, or the N:M that all of these satisfy; "" where nothing is known."""
    zeros = [one.zeros for one in entries if one.zeros is not None]
    if not zeros:
        return ""
    if not sum(zeros):
        return "dense"
    for key, zero, lines in (("rows", "zero_rows", "rows"), ("columns", "zero_columns", "columns")):
        if all(getattr(one, lines) and getattr(one, zero) is not None for one in entries):
            whole = sum(getattr(one, zero) / getattr(one, lines) * one.numel for one in entries)
            if whole >= _REGULAR * sum(zeros):
                return key
    shared = set[str](entries[0].patterns).intersection(*(one.patterns for one in entries))
    return min(sorted(one for one in shared if "@" not in one), key=_density, default="unstructured")


def _density(pattern: str) -> tuple[float, int]:
    kept, of = map(int, pattern.split(":"))
    return kept / of, of


def _groups(figure: Sheet, groups: Sequence[InspectedGroup], by: str) -> list[str]:
    """Bars of groups, the largest of them where there are too many; gives notes."""
    most = sorted(range(len(groups)), key=lambda at: -groups[at].numel)[:_ALONE]
    shown = [groups[at] for at in sorted(most)]
    names = shortened([printable(group.name) for group in shown], _LONGEST)
    values = [[group.sparsity] for group in shown]
    charts.bars(figure, 0.0, charts.Heat(f"Sparsity by {by}", names, ("",), values), SPARSITY)
    hidden = len(groups) - len(shown)
    return [f"Not shown: {hidden:,} smaller ones."] if hidden else []


def _grouped_table(groups: Sequence[InspectedGroup], by: str) -> page.Numbers:
    rows = tuple(
        (
            group.name,
            f"{group.tensors:,}",
            f"{group.numel:,}",
            "-" if group.zeros is None else f"{group.zeros:,}",
            _exact(group.sparsity),
            " ".join(group.patterns) or "-",
        )
        for group in groups
    )
    titles = (by, "tensors", "elements", "zeros", "share of zeros", "patterns")
    return page.Numbers(titles, rows, f"By {by}")


def _inspected_table(entries: Sequence[InspectedTensor]) -> page.Numbers:
    rows = tuple(
        (
            entry.name,
            *_places(entry.name),
            shape_text(entry.shape),
            entry.dtype,
            f"{entry.numel:,}",
            "-" if entry.zeros is None else f"{entry.zeros:,}",
            _exact(entry.sparsity),
            _kind((entry,)) or "-",
        )
        for entry in entries
    )
    titles = ("tensor", "layer", "matrix", "shape", "dtype", "elements", "zeros", "share of zeros", "kind")
    return page.Numbers(titles, rows, "All tensors", (*_PLACE, "dtype", "kind"), _PLACE)


def _left_out(entries: Sequence[InspectedTensor], shown: Sequence[InspectedTensor]) -> tuple[str, ...]:
    count = len(entries) - len(shown)
    if not count:
        return () if entries else ("There are no tensors.",)
    zeros = sum(entry.zeros or 0 for entry in entries) - sum(entry.zeros or 0 for entry in shown)
    having = f"with {zeros:,} zeros" if zeros else "without a zero"
    return (f"Not shown: {many(count, 'tensor')} of less than two dimensions, {having}.",)


def _survivors(survivors: Sequence[Survivors]) -> page.Picture:
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
    titles = ("rule", "nnz", "blocks that are not zero", "scopes")
    alt = f"Blocks that are not zero in the scopes of {', '.join(rule.rule for rule in survivors)}."
    numbers = page.Numbers(titles, rows, "Survivors per scope")
    return page.Picture(canvas.fitted(figure), caption, alt, (numbers,))
