"""Charts: curves, heatmaps, histograms, and grids of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter
from msgspec import Struct

from sparseprune.errors import printable
from sparseprune.report.inspection import is_number, natural
from sparseprune.report.pictures.canvas import axes_at
from sparseprune.report.tables import shortened
from sparseprune.spec.patterns import shared_beginning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

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


def curves(figure: Figure, top: float, grid: Grid[Any], fact: Fact) -> Axes:
    """Draw a line for each column of the grid over its rows; a value that is not known is a gap."""
    places, breaks = _places(grid)
    width = min(_WIDEST_CURVES, max(_NARROWEST, _STEP * (places[-1] + 1)))
    axes = axes_at(figure, 0, top, width, _CURVE_HEIGHT)
    table = _array(grid.values(fact.value))
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
    _label_values(axes, table, fact.scale)
    axes.set_title(fact.scale.name.capitalize())
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


def _label_values(axes: Axes, table: Values, scale: Scale) -> None:
    """As far as there are values, never beyond what the scale allows."""
    known = table[np.isfinite(table)]
    low, high = (float(known.min()), float(known.max())) if known.size else (scale.low, scale.high)
    room = 0.08 * (high - low) or 0.05 * (abs(high) or 1.0)
    bottom, top = max(scale.low, low - room), high + room
    axes.set_ylim(bottom, min(scale.high, top) if scale.percent else top)
    if scale.percent:
        # As many digits as tell one tick from the next: of 86.825% four would make another number.
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


NOTHING = "#e4e4e4"  # the colour of a cell without a value
BAR = "#35618f"
_CELL_WIDTH, _CELL_HEIGHT = 0.44, 0.23  # inches
_WIDEST, _HIGHEST, _LEAST = 24.0, 16.5, 0.06  # of all cells, and of one
_LABEL = 0.135  # inches from one label to the next
_NUMBER_WIDTH, _NUMBER_HEIGHT = 0.38, 0.12  # the least cell that holds a number
_MIDDLE = 0.179  # of luminance: as far from black as from white
_BAR_HEIGHT, _BARS_WIDTH = 0.2, 4.5


class Scale(Struct, frozen=True):
    """What colours stand for: values from `low` to `high`, by the colour map of this name.

    `percent` values are shares, shown as percentages.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    percent: bool = True
    colours: str = "cividis"

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
        rounded = f"{100 * value:.1f}".removesuffix(".0") if value < 100 else f"{100 * value:.3g}"
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


def heatmap(figure: Figure, top: float, heat: Heat, scale: Scale) -> Axes:
    """Draw the cells so many inches below the top of the figure, with numbers where there is room.

    Axes count rows and columns: the cell of row i and column j lies between j and j + 1, i and i + 1.
    """
    down, across = len(heat.rows), len(heat.columns)
    height = _sized(down, _CELL_HEIGHT, _HIGHEST)
    width = _sized(across, _CELL_WIDTH, _WIDEST)
    axes = axes_at(figure, 0, top, width * across, height * down)
    axes.set_facecolor(NOTHING)
    axes.pcolormesh(
        np.ma.masked_invalid(_array(heat.values)),
        cmap=scale.colours,
        vmin=scale.low,
        vmax=scale.high,
        edgecolors="white",
        linewidth=0.4 if min(width, height) > _LABEL else 0,
    )
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
    if width >= _NUMBER_WIDTH and height >= _NUMBER_HEIGHT:
        _number(axes, heat, scale, 7 if height >= _CELL_HEIGHT else 6)
    return axes


def colour_bar(figure: Figure, beside: Axes, mesh: ScalarMappable, scale: Scale) -> Axes:
    """A bar of what the colours stand for, to the right of axes, from their top down."""
    across, high = figure.get_size_inches()
    place = beside.get_position(original=True)
    height = min(2.2, max(1.1, place.height * high))
    axes = axes_at(figure, place.x1 * across + 0.18, (1 - place.y1) * high, 0.13, height)
    bar = figure.colorbar(mesh, cax=axes)
    for edge in axes.spines.values():
        edge.set_visible(False)
    bar.set_label(scale.name)
    if scale.percent and (scale.low, scale.high) == (0, 1):
        bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0%", "25%", "50%", "75%", "100%"])
    elif scale.percent:
        bar.ax.yaxis.set_major_formatter(_percent)
    return axes


def bars(figure: Figure, top: float, heat: Heat, scale: Scale) -> Axes:
    """Draw one horizontal bar for each row of a heat of one column, its number behind it."""
    count = len(heat.rows)
    height = _sized(count, _BAR_HEIGHT, _HIGHEST * 2)
    axes = axes_at(figure, 0, top, _BARS_WIDTH, height * count)
    values = [row[0] for row in heat.values]
    places = np.arange(count) + 0.5
    axes.barh(places, [value or 0 for value in values], height=0.72, color=BAR)
    span = scale.high - scale.low or 1.0
    axes.set_xlim(scale.low, scale.high or 1.0)
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
            text = scale.text(value) + ("%" if scale.percent and value is not None else "")
            end = min(value or 0, scale.high) + 0.012 * span
            axes.text(end, place, text, va="center", fontsize=7, color="#333333")
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


WITHIN, ABOVE, BUDGET = "#35618f", "#d55e00", "#111111"
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


def histograms(figure: Figure, top: float, survivors: Sequence[Survivors]) -> list[Axes]:
    """Draw a panel for each rule, two beside each other; gives their axes."""
    across, down = _WIDTH + _ACROSS, _HEIGHT + _DOWN
    return [
        _panel(axes_at(figure, number % 2 * across, top + number // 2 * down, _WIDTH, _HEIGHT), rule)
        for number, rule in enumerate(survivors)
    ]


def _panel(axes: Axes, rule: Survivors) -> Axes:
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
