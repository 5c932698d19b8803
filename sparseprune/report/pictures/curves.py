"""Values by layer as lines with markers, one line for each kind of matrix.

Owns colours and markers, which differ for all kinds of eyes and in grey, and the axis of the layers, on
which stacks of layers stand behind each other. Knows nothing of what the values mean.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import PercentFormatter

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import axes_at
from sparseprune.report.shortening import shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparseprune.report.pictures.heatmap import Scale
    from sparseprune.report.pictures.layers import Grid
    from sparseprune.report.pictures.overview import Fact

# Okabe and Ito without their yellow, which is hardly seen on white; markers tell the same.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7f7f7f")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MOST = len(COLOURS)
_HEIGHT, _NARROWEST, _WIDEST, _STEP = 2.5, 4.8, 16.0, 0.2  # inches; of one layer
_LABEL, _LETTER = 0.16, 0.075  # inches of a label's height and of a letter in it


def curves(figure: Figure, top: float, grid: Grid, fact: Fact) -> Axes:
    """Draw a line for each column of the grid over its rows; a value that is not known is a gap."""
    places, breaks = _places(grid)
    width = min(_WIDEST, max(_NARROWEST, _STEP * (places[-1] + 1)))
    axes = axes_at(figure, 0, top, width, _HEIGHT)
    table = np.array(
        [[np.nan if one is None else one for one in row] for row in grid.values(fact.value)], dtype=float
    )
    labels = shortened(grid.column_labels(), 60)
    for number, label in enumerate(labels):
        line = np.insert(table[:, number], breaks, np.nan)  # no line leads from one stack to the next
        axes.plot(
            np.insert(np.array(places, dtype=float), breaks, np.nan),
            line,
            label=_seen(label),
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


def _seen(label: str) -> str:
    """A label that is not empty for matplotlib: it leaves out what begins with an underscore."""
    return f"\u200b{label}" if label.startswith("_") else label


def _places(grid: Grid) -> tuple[list[int], list[int]]:
    """Where each row stands, one place left free between stacks, and the rows before which that is."""
    breaks = [at for at in range(1, len(grid.rows)) if grid.rows[at][0] != grid.rows[at - 1][0]]
    return [at + sum(at >= one for one in breaks) for at in range(len(grid.rows))], breaks


def _label_layers(axes: Axes, grid: Grid, places: Sequence[int], width: float) -> None:
    labels = shortened(grid.row_labels(), 40)
    room = width / (places[-1] + 1.2)
    longest = max(map(len, labels)) * _LETTER
    upright = longest > 0.5
    wanted = _LABEL if upright else longest + 0.1
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, 10**9) if step * room >= wanted)
    axes.set_xticks(list(places[::step]), labels=labels[::step], rotation=90 if upright else 0)
    if len(grid.stacks) == 1:
        axes.set_xlabel(shortened([printable(grid.stacks[0])], 60)[0] or "layer")


def _label_values(axes: Axes, table: np.ndarray[tuple[int, int], np.dtype[np.float64]], scale: Scale) -> None:
    """As far as there are values, never beyond what the scale allows."""
    known = table[np.isfinite(table)]
    low, high = (float(known.min()), float(known.max())) if known.size else (scale.low, scale.high)
    room = 0.08 * (high - low) or 0.05 * (abs(high) or 1.0)
    bottom, top = max(scale.low, low - room), high + room
    axes.set_ylim(bottom, min(scale.high, top) if scale.percent else top)
    if scale.percent:
        # As many digits as tell one tick from the next: of 86.825% four would make another number.
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
