"""Charts: curves, heatmaps, histograms, and grids of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from msgspec import Struct
from msgspec.structs import replace

from sparseprune.errors import printable
from sparseprune.report.inspection import is_number, natural
from sparseprune.report.pictures.canvas import Mark, axes_at
from sparseprune.report.tables import shortened
from sparseprune.spec.patterns import shared_beginning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

    from sparseprune.report.pictures.canvas import Sheet
    from sparseprune.report.pictures.results import Fact
    from sparseprune.results.fields import EachCount
    from sparseprune.results.measuring import ComparedTensor, InspectedTensor

    Entry = InspectedTensor | ComparedTensor
    Value = Callable[[Sequence[Any]], float | None]
    Values = np.ndarray[tuple[int, int], np.dtype[np.float64]]

Tensor = TypeVar("Tensor", bound="Entry")
# Okabe and Ito without their yellow, which is hardly seen on white; markers tell the same.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST = len(COLOURS)
_CURVE_HEIGHT, _NARROWEST, _WIDEST_CURVES, _STEP = 2.5, 4.8, 16.0, 0.2  # inches; of one layer
_CURVE_LABEL, _LETTER = 0.16, 0.075  # inches of a label's height and of a letter in it


def curves(figure: Sheet, top: float, grid: Grid[Any], fact: Fact) -> Axes:
    """Draw a line for each column of the grid over its rows; a value that is not known is a gap."""
    places, breaks = _places(grid)
    width = min(_WIDEST_CURVES, max(_NARROWEST, _STEP * (places[-1] + 1)))
    axes = axes_at(figure, 0, top, width, _CURVE_HEIGHT)
    axes.patch.set_visible(False)  # the page behind it may be dark
    table = _array(grid.values(fact.value))
    _mark_points(figure, axes, grid, places, fact)
    for number, label in enumerate(shortened(grid.column_labels(), 60)):
        axes.plot(
            np.insert(np.array(places, dtype=float), breaks, np.nan),
            np.insert(table[:, number], breaks, np.nan),  # no line leads from one stack to the next
            label=f"\u200b{label}" if label.startswith("_") else label,  # else matplotlib leaves it out
            color=COLOURS[number % MOST],
            marker=MARKERS[number % MOST],
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linewidth=1.2,
            clip_on=False,
        )
    _label_layers(axes, grid, places, width)
    axes.set_xlim(places[0] - 0.6, places[-1] + 0.6)
    _label_values(axes, fact.scale)
    axes.set_title(fact.title)
    axes.set_ylabel(f"{fact.scale.name}{fact.scale.unit}")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def legend(axes: Axes) -> None:
    """Name the lines, to the right of the axes and outside of them."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), borderaxespad=0)


def _array(values: Sequence[Sequence[float | None]]) -> Values:
    return np.array([[np.nan if one is None else one for one in row] for row in values], dtype=float)


def _places(grid: Grid[Any]) -> tuple[list[int], list[int]]:
    """Where each row stands, one place left free between stacks, and the rows before which that is."""
    breaks = [at for at in range(1, len(grid.rows)) if grid.rows[at][0] != grid.rows[at - 1][0]]
    return [at + sum(at >= one for one in breaks) for at in range(len(grid.rows))], breaks


def _label_layers(axes: Axes, grid: Grid[Any], places: Sequence[int], width: float) -> None:
    labels = shortened(grid.row_labels(), 40)
    room = width / (places[-1] + 1.2)
    longest = max(map(len, labels)) * _LETTER
    upright = longest > 0.5
    wanted = _CURVE_LABEL if upright else longest + 0.1
    step = _every(room, wanted)
    axes.set_xticks(list(places[::step]), labels=labels[::step], rotation=90 if upright else 0)
    if len(grid.stacks) == 1:
        axes.set_xlabel(shortened([printable(grid.stacks[0])], 60)[0] or "layer")


def _label_values(axes: Axes, scale: Scale) -> None:
    """The ends of the scale, with room for markers where what a value means does not end there."""
    room = 0.06 * (scale.high - scale.low)
    axes.set_ylim(scale.low, scale.high + room)
    if scale.low < 0 < scale.high:
        axes.axhline(0, color="#555555", linewidth=0.8)
    if scale.percent:
        # As many digits as tell one tick from the next: of 86.825% four would make another number.
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def _mark_points(figure: Sheet, axes: Axes, grid: Grid[Any], places: Sequence[int], fact: Fact) -> None:
    for row, place in zip(grid.rows, places, strict=True):
        for column in grid.columns:
            found = grid.cells.get((row, column))
            value = fact.value(found) if found else None
            if found and value is not None and math.isfinite(value):
                text = f"{told(found)}: {fact.scale.name} {fact.scale.with_unit(value)}"
                figure.marks.append(Mark(axes, (place, value, place, value), text, name_in_table(found), 5))


def told(found: Sequence[Entry]) -> str:
    """What a mark calls the tensors of one cell."""
    return found[0].name if len(found) == 1 else f"{len(found)} like {found[0].name}"


def name_in_table(found: Sequence[Entry]) -> str:
    """What the search of a page finds the tensors of one cell by."""
    return found[0].name if len(found) == 1 else "_".join((place_of(found[0].name) or ("", "", ""))[1:])


NOTHING = "#e4e4e4"  # the colour of a cell without a value
BAR = "#35618f"
_CELL_WIDTH, _CELL_HEIGHT = 0.44, 0.23  # inches
_WIDEST, _HIGHEST, _LEAST = 24.0, 16.5, 0.06  # of all cells, and of one
_LABEL = 0.135  # inches from one label to the next
_NUMBER_WIDTH, _NUMBER_HEIGHT = 0.38, 0.12  # the least cell that holds a number
_MIDDLE = 0.179  # of luminance: as far from black as from white
_BAR_HEIGHT, _BARS_WIDTH = 0.2, 4.5


class Scale(Struct, frozen=True):
    """What colours and heights stand for: values from `low` to `high`, by the colour map of this name.

    `percent` values are shares, shown as percentages. Fitted to values, a scale spans `least` at least, so
    that what hardly differs looks alike, and begins at its `low` where that is `rooted`.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    percent: bool = True
    colours: str = "cividis"
    least: float = 0.1
    rooted: bool = False
    unit: str = ""

    def fitted(self, values: Iterable[float | None]) -> Scale:
        """The scale of these values, its ends rounded outwards; the same where no value is known.

        >>> of = Scale("").fitted([0.5, 0.501])
        >>> of.low, of.high
        (0.45, 0.56)
        >>> Scale("", rooted=True).fitted([0.31, 0.2]).high
        0.35
        """
        known = [value for value in values if value is not None and math.isfinite(value)]
        if not known:
            return replace(self, low=0.0, high=1.0)
        low, high = (self.low if self.rooted else min(known)), max(known)
        short = max(0.0, self.least - (high - low))
        low, high = (low, high + short) if self.rooted else (low - short / 2, high + short / 2)
        step = 10.0 ** math.floor(math.log10((high - low) / 2)) / (2 if high - low > 0.25 else 1)
        digits = max(0, 2 - math.floor(math.log10(step)))
        low = round(math.floor(low / step + 1e-9) * step, digits)
        high = round(math.ceil(high / step - 1e-9) * step, digits)
        return replace(self, low=max(self.low, low), high=min(self.high, high))

    def span_text(self) -> str:
        """The ends, for who reads colours.

        >>> Scale("", 0.45, 0.55).span_text()
        '45% to 55%'
        """
        return f"{self.with_unit(self.low)} to {self.with_unit(self.high)}"

    def with_unit(self, value: float | None) -> str:
        """A value as `text` has it, with its percent sign."""
        return self.text(value) + ("%" if self.percent and value is not None else "")

    def text(self, value: float | None) -> str:
        """A value in as few characters as tell it from the ends of the scale.

        >>> [Scale("").text(value) for value in (0.5, 0.3749, 0.0, 1e-6, 0.99999, None)]
        ['50', '37.5', '0', '<0.1', '>99.9', '-']
        >>> Scale("", percent=False).text(0.12345)
        '0.123'
        """
        if value is None:
            return "-"
        if not self.percent:
            return f"{value:.3g}"
        rounded = f"{100 * value:.1f}".removesuffix(".0") if abs(value) < 100 else f"{100 * value:.3g}"
        if rounded == "0" and value > 0:
            return "<0.1"
        return ">99.9" if rounded == "100" and value < 1 else rounded


class Heat(Struct, frozen=True):
    """Values by row and column, None where there is none; no label of columns where there is one unnamed."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float | None]]
    row_name: str = ""
    cells: Sequence[Sequence[Sequence[Any]]] = ()

    def mark(self, figure: Sheet, axes: Axes, say: Callable[[int, int], str]) -> None:
        """Let every cell that has tensors say what it stands for."""
        for i, row in enumerate(self.cells):
            for j, found in enumerate(row):
                if found:
                    text = f"{told(found)}: {say(i, j)}"
                    figure.marks.append(Mark(axes, (j, i, j + 1, i + 1), text, name_in_table(found)))


def heatmap(figure: Sheet, top: float, heat: Heat, scale: Scale) -> Axes:
    """Draw the cells so many inches below the top of the figure, with numbers where there is room.

    Axes count rows and columns: the cell of row i and column j lies between j and j + 1, i and i + 1.
    """
    axes, width, height = _cells_of(figure, top, heat)
    axes.pcolormesh(
        np.ma.masked_invalid(_array(heat.values)),
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
        edgecolors="white",
        linewidth=0.4 if min(width, height) > _LABEL else 0,
    )
    if width >= _NUMBER_WIDTH and height >= _NUMBER_HEIGHT:
        _number(axes, heat, scale, 7 if height >= _CELL_HEIGHT else 6)
    heat.mark(figure, axes, lambda i, j: f"{scale.name} {scale.with_unit(heat.values[i][j])}")
    return axes


# What zeros look like, the more regular the stronger: short in a cell, in words, its colour.
KINDS = {
    "dense": ("none", "no zeros", "#e9edf1"),
    "unstructured": ("any", "zeros anywhere", "#b3bfcc"),
    "pattern": ("", "N of M neighbours are kept", "#3d7ab8"),
    "rows": ("rows", "whole rows", "#2f8f74"),
    "columns": ("cols", "whole columns", "#b4622d"),
}


def kinds_map(figure: Sheet, top: float, heat: Heat, kinds: Sequence[Sequence[str]]) -> Axes:
    """Draw which kind of zeros every cell has: a key of KINDS, an N:M, or "" where nothing is known."""
    axes, width, height = _cells_of(figure, top, heat)
    order = list(KINDS)
    keys = [[one if one in KINDS or not one else "pattern" for one in row] for row in kinds]
    codes = [[float(order.index(one)) if one else None for one in row] for row in keys]
    axes.pcolormesh(
        np.ma.masked_invalid(_array(codes)),
        cmap=ListedColormap([colour for _, _, colour in KINDS.values()]),
        vmin=-0.5,
        vmax=len(KINDS) - 0.5,
        edgecolors="white",
        linewidth=0.4 if min(width, height) > _LABEL else 0,
    )
    if width >= _NUMBER_WIDTH and height >= _NUMBER_HEIGHT:
        for i, row in enumerate(keys):
            for j, key in enumerate(row):
                word = (KINDS[key][0] or kinds[i][j]) if key else ""
                text = axes.text(j + 0.5, i + 0.5, word, fontsize=6.5, ha="center", va="center")
                text.set(color="white" if order.index(key or "dense") > 1 else "#111111", in_layout=False)
    heat.mark(figure, axes, lambda i, j: KINDS.get(kinds[i][j], ("", f"{kinds[i][j] or 'not known'}"))[1])
    seen = [one for one in order if any(one in row for row in keys)]
    handles = [Patch(facecolor=KINDS[one][2], label=KINDS[one][1]) for one in seen]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)
    return axes


def _cells_of(figure: Sheet, top: float, heat: Heat) -> tuple[Axes, float, float]:
    """Axes of a heat's rows and columns with their labels, and the width and height of a cell in inches."""
    down, across = len(heat.rows), len(heat.columns)
    height = _sized(down, _CELL_HEIGHT, _HIGHEST)
    width = _sized(across, _CELL_WIDTH, _WIDEST)
    axes = axes_at(figure, 0, top, width * across, height * down)
    axes.set_facecolor(NOTHING)
    axes.set_xlim(0, across)
    axes.set_ylim(down, 0)
    axes.set_title(heat.title)
    upright = height * down > 1
    name = axes.set_ylabel(heat.row_name, rotation=90 if upright else 0, ha="center" if upright else "right")
    name.set_verticalalignment("baseline" if upright else "center")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _label_rows(axes, heat.rows, height)
    _label_columns(axes, heat.columns, width)
    return axes, width, height


def colour_bar(figure: Sheet, beside: Axes, mesh: ScalarMappable, scale: Scale) -> Axes:
    """A bar of what the colours stand for, to the right of axes, from their top down."""
    across, high = figure.get_size_inches()
    place = beside.get_position(original=True)
    height = min(2.2, max(1.1, place.height * high))
    axes = axes_at(figure, place.x1 * across + 0.18, (1 - place.y1) * high, 0.13, height)
    bar = figure.colorbar(mesh, cax=axes)
    for edge in axes.spines.values():
        edge.set_visible(False)
    bar.set_label(f"{scale.name}\n{scale.span_text()}", linespacing=1.4)
    middle = (scale.low + scale.high) / 2
    ends = (scale.low, middle, scale.high)
    bar.set_ticks(ends, labels=[*map(scale.with_unit, ends)])
    return axes


def bars(figure: Sheet, top: float, heat: Heat, scale: Scale) -> Axes:
    """Draw one horizontal bar for each row of a heat of one column, its number behind it."""
    count = len(heat.rows)
    height = _sized(count, _BAR_HEIGHT, _HIGHEST * 2)
    axes = axes_at(figure, 0, top, _BARS_WIDTH, height * count)
    axes.patch.set_visible(False)
    values = [row[0] for row in heat.values]
    places = np.arange(count) + 0.5
    axes.barh(places, [value or 0 for value in values], height=0.72, color=BAR)
    scale = replace(scale, low=0.0, rooted=True).fitted(values)
    span = scale.high or 1.0
    axes.set_xlim(0, span)
    axes.set_ylim(count, 0)
    axes.set_title(heat.title)
    axes.set_xlabel(scale.name)
    if scale.percent:
        axes.xaxis.set_major_formatter(_percent)
    _label_rows(axes, heat.rows, height)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    if height >= _NUMBER_HEIGHT:
        for place, value in zip(places, values, strict=True):
            end = min(value or 0, scale.high) + 0.012 * span
            axes.text(end, place, scale.with_unit(value), va="center", fontsize=7, color="#333333")
    for at, (place, value) in enumerate(zip(places, values, strict=True)):
        name = heat.cells[at][0][0].name if heat.cells else heat.rows[at]
        text = f"{name}: {scale.name} {scale.with_unit(value)}"
        figure.marks.append(Mark(axes, (0, place - 0.5, span, place + 0.5), text, name))
    return axes


def _sized(count: int, wanted: float, most: float) -> float:
    return min(wanted, max(_LEAST, most / max(1, count)))


def _label_rows(axes: Axes, labels: Sequence[str], height: float) -> None:
    step = _every(height, _LABEL * 0.9)
    axes.set_yticks(np.arange(0, len(labels), step) + 0.5, labels=list(labels[::step]))
    axes.tick_params(axis="y", labelsize=8 if height * step >= 0.17 else 6.5)


def _label_columns(axes: Axes, labels: Sequence[str], width: float) -> None:
    if labels == ("",):
        axes.set_xticks([])
        return
    step = _every(width, _LABEL * 0.9)
    upright = width * step < 2 * _LABEL
    axes.set_xticks(np.arange(0, len(labels), step) + 0.5, labels=list(labels[::step]))
    for label in axes.get_xticklabels():
        label.set(rotation=90 if upright else 45, rotation_mode="anchor", ha="right", fontsize=8)
        label.set_verticalalignment("center" if upright else "top")


def _every(size: float, wanted: float) -> int:
    """Of how many lines of this size one is labelled, so that labels of the `wanted` size do not touch."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 10**9) if step * size >= wanted)


def _percent(value: float, _: object) -> str:
    return f"{100 * value:g}%"


def _number(axes: Axes, heat: Heat, scale: Scale, size: float) -> None:
    colours = mpl.colormaps[scale.colours]
    span = scale.high - scale.low or 1.0
    for i, row in enumerate(heat.values):
        for j, value in enumerate(row):
            if value is None:
                continue
            dark = _luminance(colours((value - scale.low) / span)) < _MIDDLE
            text = axes.text(j + 0.5, i + 0.5, scale.text(value), fontsize=size, ha="center", va="center")
            text.set(color="white" if dark else "#111111", in_layout=False)


def _luminance(colour: tuple[float, float, float, float]) -> float:
    """How light a colour is, from 0 to 1, as WCAG defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


WITHIN, ABOVE, BUDGET = "#35618f", "#d55e00", "#333333"
_BINS = 60
_UNLIKE = 100  # times as many scopes in the highest bar as in the lowest: then heights are logarithmic
_WIDTH, _HEIGHT, _ACROSS, _DOWN = 3.6, 1.9, 0.9, 0.95  # inches of a panel, and between two
_STEPS = (1, 2, 5, 10)
_BUDGETS = 4  # lines; of more unlike budgets the first and the last


class Survivors(Struct, frozen=True):
    """Of a rule: the budgets of its instances; pairs of a number of non-zero blocks and scopes with it."""

    rule: str
    nnz: EachCount
    histogram: Sequence[tuple[int, int]]


def binned(histogram: Sequence[Sequence[int]], bins: int = _BINS) -> tuple[list[int], list[int]]:
    """Pairs of survivors and scopes as bars of one width, a whole number of survivors.

    Gives edges and counts: bar i goes from edge i up to and without the next one.

    >>> binned([[0, 3], [2, 5]]), binned([[10, 1], [1009, 2]], bins=2)
    (([0, 1, 2, 3], [3, 0, 5]), ([10, 510, 1010], [1, 2]))
    """
    known = [(survivors, scopes) for survivors, scopes in histogram if scopes]
    if not known:
        return [0, 1], [0]
    first, last = min(known)[0], max(known)[0]
    step = -(-(last + 1 - first) // bins)
    counts = [0] * -(-(last + 1 - first) // step)
    for survivors, scopes in known:
        counts[(survivors - first) // step] += scopes
    return [first + step * at for at in range(len(counts) + 1)], counts


def budgets_of(nnz: EachCount) -> tuple[int, ...]:
    """The budgets of the instances of a rule, each once, sorted."""
    each = nnz if isinstance(nnz, Sequence) else (nnz,)
    return tuple(sorted({one for one in each if one is not None}))


def histograms(figure: Sheet, top: float, survivors: Sequence[Survivors]) -> list[Axes]:
    """Draw a panel for each rule, two beside each other; gives their axes."""
    across, down = _WIDTH + _ACROSS, _HEIGHT + _DOWN
    return [
        _panel(figure, axes_at(figure, number % 2 * across, top + number // 2 * down, _WIDTH, _HEIGHT), rule)
        for number, rule in enumerate(survivors)
    ]


def _panel(figure: Sheet, axes: Axes, rule: Survivors) -> Axes:
    axes.patch.set_visible(False)
    edges, counts = binned(rule.histogram)
    budgets = budgets_of(rule.nnz)
    starts, widths = np.array(edges[:-1]), np.diff(edges)
    allowed = budgets[-1] if budgets else math.inf
    colours = [ABOVE if start > allowed else WITHIN for start in edges[:-1]]
    single = widths[0] == 1
    axes.bar(
        starts if single else starts + widths / 2 - 0.5,
        counts,
        width=widths * (0.82 if single and len(starts) < 40 else 1.0),
        color=colours,
        hatch=["////" if colour == ABOVE else "" for colour in colours],
        edgecolor=["white" if colour == ABOVE else colour for colour in colours],
        linewidth=0 if ABOVE in colours or single else 0.4,  # bars that touch have no seams then
    )
    there = [count for count in counts if count]
    if there and max(there) > _UNLIKE * min(there):
        axes.set_yscale("log")
        axes.set_ylim(0.6, max(there) * 4)
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, max(there, default=1) * 1.2)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: _short(value))
    _frame(axes, edges, budgets)
    _budgets(axes, budgets)
    low, high = axes.get_ylim()
    for begin, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count:
            blocks = f"{begin:,}" if single else f"{begin:,} to {end - 1:,}"
            text = f"{rule.rule}: {count:,} scopes with {blocks} blocks that are not zero"
            figure.marks.append(Mark(axes, (begin - 0.5, low, end - 0.5, high), text, ""))
    axes.set_title(f"Survivors per scope of {_cut(printable(rule.rule), 26)}")
    axes.set_xlabel("blocks that are not zero")
    axes.set_ylabel("scopes")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _frame(axes: Axes, edges: Sequence[int], budgets: Sequence[int]) -> None:
    """From zero where that is near, else from what there is to see; whole numbers below."""
    first = min([edges[0], *budgets])
    last = max([edges[-1] - 1, *budgets])
    if first <= 2 * (last - first) or last <= _BINS:
        first = 0
    room = 2.5 if first == last else max(0.75, (last - first) * 0.05)
    axes.set_xlim(first - room, last + room)
    wide = last - first >= last / 100  # so that a few digits tell the numbers apart
    shown = _short if wide else "{:,.0f}".format
    ticks = 5 if wide or last < 10**6 else 2
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=_STEPS, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(lambda value, _: shown(value) if value >= 0 else "")


def _budgets(axes: Axes, budgets: Sequence[int]) -> None:
    if not budgets:
        return
    shown = budgets if len(budgets) <= _BUDGETS else (budgets[0], budgets[-1])
    for budget in shown:
        axes.axvline(budget, color=BUDGET, linewidth=1.1, linestyle=(0, (4, 2)))
    text = f"nnz {budgets[0]:,}" + (f" to {budgets[-1]:,}" if len(budgets) > 1 else "")
    low, high = axes.get_xlim()
    at = (budgets[-1] - low) / (high - low)
    axes.annotate(
        text,
        (at, 1.0),
        xycoords="axes fraction",
        xytext=(-3 if at > 0.5 else 3, -2),
        textcoords="offset points",
        ha="right" if at > 0.5 else "left",
        va="top",
        fontsize=7.5,
        color=BUDGET,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1.0},
    )


def _short(value: float) -> str:
    """A count on an axis.

    >>> _short(1200), _short(12_500_000), _short(98304)
    ('1,200', '12.5M', '98,304')
    """
    for unit, letter in ((10**9, "G"), (10**6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-(most // 2 - 1) :]}"


_SUFFIX = ".weight"


class Grid(Struct, Generic[Tensor], frozen=True):
    """The entries that belong to numbered layers, by row and column, and those that do not.

    `rows` are layers in their natural order, stack by stack, `columns` matrices in the order in which they
    were met. `cells` has the entries of those that exist; several where a matrix is repeated in its layer.
    """

    rows: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[tuple[str, str], str], tuple[Tensor, ...]]
    others: tuple[Tensor, ...]

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names before the numbers of layers, each once."""
        return tuple(dict.fromkeys(stack for stack, _ in self.rows))

    def row_labels(self) -> list[str]:
        """Numbers of layers; with the name of their stack where there are several."""
        if len(self.stacks) == 1:
            return [printable(layer) for _, layer in self.rows]
        shared = len(shared_beginning(self.stacks))
        return [printable(f"{stack[shared:]}.{layer}".lstrip(".")) for stack, layer in self.rows]

    def column_labels(self) -> list[str]:
        """Names of matrices, without `.weight` where that leaves them unlike."""
        short = [column.removesuffix(_SUFFIX) for column in self.columns]
        return [printable(label) for label in (short if len(set(short)) == len(short) else self.columns)]

    def values(self, value: Value) -> list[list[float | None]]:
        """One value for each cell, None where there is no matrix or nothing is known of it."""
        return [
            [value(found) if (found := self.cells.get((row, column))) else None for column in self.columns]
            for row in self.rows
        ]


def place_of(name: str) -> tuple[str, str, str] | None:
    """A name taken apart at its first number; further numbers become *. None for a name without layers.

    >>> place_of("model.layers.3.mlp.experts.7.up_proj.weight")
    ('model.layers', '3', 'mlp.experts.*.up_proj.weight')
    >>> place_of("lm_head.weight"), place_of("layers.3")
    (None, None)
    """
    pieces = name.split(".")
    at = next((at for at, piece in enumerate(pieces) if is_number(piece)), len(pieces))
    rest = ["*" if is_number(piece) else piece for piece in pieces[at + 1 :]]
    return (".".join(pieces[:at]), pieces[at], ".".join(rest)) if rest else None


def grid_of(entries: Iterable[Tensor]) -> Grid[Tensor]:
    """Tensors sorted into layers."""
    cells: dict[tuple[tuple[str, str], str], list[Tensor]] = {}
    others = []
    for entry in entries:
        place = place_of(entry.name)
        if place is None:
            others.append(entry)
        else:
            cells.setdefault((place[:2], place[2]), []).append(entry)
    stacks = list(dict.fromkeys(stack for (stack, _), _ in cells))
    rows = sorted({row for row, _ in cells}, key=lambda row: (stacks.index(row[0]), natural(row[1])))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    return Grid(tuple(rows), columns, {key: tuple(found) for key, found in cells.items()}, tuple(others))


def mean_of(key: str, entries: Sequence[Any]) -> float | None:
    """The mean of a field over the tensors that have it, weighted by their elements; None if none has."""
    return weighted_mean([(getattr(one, key), one.numel) for one in entries if getattr(one, key) is not None])


def weighted_mean(values: Sequence[tuple[float, int]]) -> float | None:
    """The mean of values with their weights; of weights that are all zero the first value."""
    weight = sum(weight for _, weight in values)
    if not values:
        return None
    return float(sum(value * weight for value, weight in values) / weight if weight else values[0][0])


def matrices(entries: Iterable[Tensor]) -> list[Tensor]:
    """The tensors of two dimensions or more, which pictures are about."""
    return [entry for entry in entries if len(entry.shape) > 1]
