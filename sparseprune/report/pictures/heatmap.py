"""Values as coloured cells with a number in each, and as bars: every size from one cell to hundreds of rows.

Owns the sizes of cells, when there is room for numbers and labels, and the colours, which all kinds of eyes
and grey prints tell apart. Knows neither layers nor sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np

from sparseprune.report.pictures.canvas import axes_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

NOTHING = "#e4e4e4"  # the colour of a cell without a value
BAR = "#35618f"
_CELL_WIDTH, _CELL_HEIGHT = 0.44, 0.23  # inches
_WIDEST, _HIGHEST, _LEAST = 24.0, 16.5, 0.06  # of all cells, and of one
_LABEL = 0.135  # inches from one label to the next
_NUMBER_WIDTH, _NUMBER_HEIGHT = 0.38, 0.12  # the least cell that holds a number
_MIDDLE = 0.179  # of luminance: as far from black as from white
_BAR_HEIGHT, _BARS_WIDTH = 0.2, 4.5


@dataclass(frozen=True, slots=True)
class Scale:
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


@dataclass(frozen=True, slots=True)
class Heat:
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
    values = np.array([[np.nan if one is None else one for one in row] for row in heat.values], dtype=float)
    axes.pcolormesh(
        np.ma.masked_invalid(values),
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
        bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
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
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
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
    """Inches of one cell where so many lie in a line."""
    return min(wanted, max(_LEAST, most / max(1, count)))


def _label_rows(axes: Axes, labels: Sequence[str], height: float) -> None:
    step = _every(height)
    axes.set_yticks(np.arange(0, len(labels), step) + 0.5, labels=list(labels[::step]))
    axes.tick_params(axis="y", labelsize=8 if height * step >= 0.17 else 6.5)


def _label_columns(axes: Axes, labels: Sequence[str], width: float) -> None:
    if labels == ("",):
        axes.set_xticks([])
        return
    step = _every(width)
    shown = list(labels[::step])
    upright = width * step < 2 * _LABEL
    axes.set_xticks(np.arange(0, len(labels), step) + 0.5, labels=shown)
    for label in axes.get_xticklabels():
        label.set(rotation=90 if upright else 45, rotation_mode="anchor", ha="right", fontsize=8)
        label.set_verticalalignment("center" if upright else "top")


def _every(size: float) -> int:
    """Of how many lines of this size one is labelled, so that labels do not touch."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 10**9) if step * size >= _LABEL * 0.9)


def _number(axes: Axes, heat: Heat, scale: Scale, size: float) -> None:
    """The value of every cell in it, dark on light and light on dark."""
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
