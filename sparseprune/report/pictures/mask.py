"""The picture of a mask from close up: what is kept and what is zero, lines around blocks and scopes.

Takes a `CloseUp`. Owns colours and lines; kept and pruned are dark and light in any colour, and in grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import (
    Numbers,
    Page,
    Picture,
    axes_at,
    blank,
    fitted,
    pixels,
    settings,
    write,
)
from sparseprune.report.pictures.overview import add_notes
from sparseprune.report.tables import shortened
from sparseprune.report.wording import shape_text

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from sparseprune.report.pictures.closeup import CloseUp

    Labels = NDArray[np.int64]

# Pairs of one hue: the dark ones let black lines be seen. No more hues than all kinds of eyes tell apart.
TINTS = (
    ("#3f70b0", "#d6e4f5"),
    ("#b4622d", "#fbe0cc"),
    ("#4f9c84", "#e2f2e6"),
)
UNREACHED = ("#6b6b6b", "#ededed")
BLOCKS, SCOPES = ("#333333", 0.4), ("#000000", 1.6)  # colours and widths of lines
_LARGE, _SIZE = 0.24, 7.2  # inches of an element, and of a side of all of them
_RULES = 2  # that are named in the title
_NAME = 80  # characters


def plot_mask(closeup: CloseUp, path: Path) -> None:
    """Write the picture of a close-up to a .png, .svg or .html file."""
    with settings():
        write(mask_page(closeup), path)


def mask_page(closeup: CloseUp) -> Page:
    """The page, with its figure drawn; to be called under `settings`."""
    figure = blank()
    axes = _elements(figure, closeup)
    _legend(axes, closeup)
    add_notes(figure, _notes(closeup))
    rows, columns = closeup.kept.shape
    kept = int(closeup.kept.sum())
    totals = (
        ("shape", shape_text(closeup.shape)),
        ("dtype", closeup.dtype),
        *(("rule", rule) for rule in closeup.rules),
        ("in the window", f"{rows}x{columns}"),
        ("of it zero", f"{closeup.kept.size - kept:,} of {closeup.kept.size:,}"),
    )
    caption = "Some elements of the tensor: dark ones are kept, light ones are zero." + (
        " Thin lines part blocks, thick ones scopes." if closeup.rules else ""
    )
    return Page(closeup.name, (Picture(fitted(figure), caption, (_numbers(closeup),)),), totals)


def edges(labels: Labels) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Lines between unlike neighbours, each from (x, y) to (x, y), the corners of elements being integers.

    A line goes on as long as it parts unlike neighbours. There is none around all: what lies beyond may
    belong to the same.

    >>> edges(np.array([[0, 0, 1], [2, 2, 1]]))
    [((2, 0), (2, 2)), ((0, 1), (2, 1))]
    """
    upright = [((x + 1, a), (x + 1, b)) for x, a, b in _runs(labels[:, 1:] != labels[:, :-1])]
    level = [((a, y + 1), (b, y + 1)) for y, a, b in _runs((labels[1:] != labels[:-1]).T)]
    return [*upright, *level]


def lies_apart(labels: Labels) -> bool:
    """Whether some label but -1 has elements that are not all joined by neighbours of the same label."""
    return any(_pieces(labels == label) > 1 for label in np.unique(labels) if label != -1)


def _runs(differs: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Runs of True down each column: (column, begin, end)."""
    padded = np.pad(differs.astype(np.int8), ((1, 1), (0, 0)))
    change = np.diff(padded, axis=0).T
    columns, begins = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    return [
        (int(column), int(begin), int(end)) for column, begin, end in zip(columns, begins, ends, strict=True)
    ]


def _pieces(there: NDArray[np.bool_]) -> int:
    """How many pieces an area has."""
    left = {(int(row), int(column)) for row, column in zip(*np.nonzero(there), strict=True)}
    count = 0
    while left:
        count += 1
        edge = [left.pop()]
        while edge:
            row, column = edge.pop()
            for place in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if place in left:
                    left.remove(place)
                    edge.append(place)
    return count


def _elements(figure: Figure, closeup: CloseUp) -> Axes:
    rows, columns = closeup.kept.shape
    side = pixels(min(_LARGE, _SIZE / max(rows, columns)))
    axes = axes_at(figure, 0, 0, side * columns, side * rows)
    colours = [colour for pair in (*TINTS, UNREACHED) for colour in pair]
    axes.pcolormesh(
        2 * _tints(closeup) + ~closeup.kept,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
    )
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    if closeup.cells is not None:
        for labels, (colour, width) in ((closeup.cells.block, BLOCKS), (closeup.cells.scope, SCOPES)):
            axes.add_collection(
                LineCollection(edges(labels), colors=colour, linewidths=width, capstyle="butt")
            )
    _label(axes.xaxis, closeup.begin[1], columns, side, upright=False)
    _label(axes.yaxis, closeup.begin[0], rows, side, upright=True)
    _name_axes(axes, closeup)
    axes.set_title(_title(closeup), linespacing=1.35)
    return axes


def _tints(closeup: CloseUp) -> Labels:
    """The number of each element's pair of colours: one for each scope where scopes lie apart."""
    if closeup.cells is None or not closeup.rules:
        return np.zeros(closeup.kept.shape, dtype=np.int64)
    scope = closeup.cells.scope
    tints = scope % len(TINTS) if lies_apart(scope) else np.zeros_like(scope)
    return np.where(scope < 0, len(TINTS), tints)


def _label(axis: Axis, begin: int, count: int, side: float, *, upright: bool) -> None:
    """Indices in the tensor, of as many rows or columns as do not touch."""
    wanted = 0.15 if upright else 0.08 + 0.075 * len(str(begin + count))
    step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if step * side >= wanted or step == 64)
    shown = range(-begin % step, count, step)
    axis.set_ticks([at + 0.5 for at in shown], labels=[str(begin + at) for at in shown])


def _name_axes(axes: Axes, closeup: CloseUp) -> None:
    rank = len(closeup.shape)
    if rank < 2:
        axes.set_yticks([])
        axes.set_xlabel("element" if rank else "")
    else:
        names = ("row", "column") if rank == 2 else [f"dimension {dim}" for dim in closeup.dims]
        axes.set_ylabel(names[0])
        axes.set_xlabel(names[1])


def _title(closeup: CloseUp) -> str:
    name = shortened([printable(closeup.name)], _NAME)[0]
    rules = [printable(rule) for rule in closeup.rules[:_RULES]]
    more = len(closeup.rules) - len(rules)
    facts = [
        f"{shape_text(closeup.shape)} {closeup.dtype}",
        *rules,
        *([f"{more} more rules"] if more else []),
    ]
    return f"{name}\n{', '.join(facts)}"


def _legend(axes: Axes, closeup: CloseUp) -> None:
    tints = np.unique(_tints(closeup))
    handles: list[Artist] = []
    ordinary = [TINTS[tint] for tint in tints if tint < len(TINTS)]
    if ordinary:
        handles += [_swatch(ordinary[0][0], "kept"), _swatch(ordinary[0][1], "zero")]
    if len(TINTS) in tints:
        handles += [_swatch(UNREACHED[0], "kept, of no rule"), _swatch(UNREACHED[1], "zero, of no rule")]
    if closeup.cells is not None:
        drawn = ((closeup.cells.block, BLOCKS, "block"), (closeup.cells.scope, SCOPES, "scope"))
        handles += [_line(style, word) for labels, style, word in drawn if edges(labels)]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def _swatch(colour: str, label: str) -> Patch:
    return Patch(facecolor=colour, edgecolor="#444444", linewidth=0.5, label=label)


def _line(line: tuple[str, float], label: str) -> Line2D:
    return Line2D([], [], color=line[0], linewidth=line[1], label=label)


def _notes(closeup: CloseUp) -> list[str]:
    """What part of the tensor this is, and what the colours say besides."""
    notes = []
    rank = len(closeup.shape)
    if rank > 2:
        others = [dim for dim in range(rank) if dim not in closeup.dims]
        plural = "dimension" if len(others) == 1 else "dimensions"
        notes.append(f"{plural.capitalize()} {', '.join(map(str, others))}: index 0.")
    sizes = [closeup.shape[dim] for dim in closeup.dims]
    shown = closeup.kept.shape[2 - len(sizes) :]
    if tuple(sizes) != shown:
        notes.append(f"A part: {shape_text(shown)} of {shape_text(sizes)}.")
    if closeup.cells is not None and not closeup.rules:
        notes.append("No rule of the spec reaches this tensor.")
    elif closeup.cells is not None and (closeup.cells.scope == closeup.cells.scope.flat[0]).all():
        notes.append("All that is seen belongs to one scope.")
    elif len([tint for tint in np.unique(_tints(closeup)) if tint < len(TINTS)]) > 1:
        notes.append("Scopes have parts that lie apart: what has one tint competes, tints repeat.")
    return notes


def _numbers(closeup: CloseUp) -> Numbers:
    rows = tuple(
        (str(closeup.begin[0] + at), str(int(row.sum())), "".join("1" if one else "0" for one in row))
        for at, row in enumerate(closeup.kept)
    )
    return Numbers(("row", "not zero", f"elements from {closeup.begin[1]} on, 1 where not zero"), rows)
