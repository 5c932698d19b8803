"""The picture of a mask from close up: what is kept and what is zero, lines around blocks and scopes.

Owns which two dimensions and which part of a tensor are worth a look (where kept and pruned both are seen),
reads just these elements, and draws them; kept and pruned are dark and light in any colour, and in grey.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from msgspec import Struct

from sparseprune.checkpoint.decoding import zero_patterns
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod
from sparseprune.engine.kernels.counting import mark_nonzero
from sparseprune.errors import SparsepruneError, printable
from sparseprune.report.drawings import cell_of, window_of
from sparseprune.report.pictures import canvas, page
from sparseprune.report.pictures.results import add_notes
from sparseprune.report.wording import many, shape_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from numpy.typing import NDArray

    from sparseprune.checkpoint import Source, StoredTensor
    from sparseprune.engine.grids import Shape
    from sparseprune.spec import BoundInstance, BoundSpec

    Flags = NDArray[np.bool_]
    Labels = NDArray[np.int64]

SIDE = 64  # rows and columns of a window
_WIDEST = 192  # the most that may be asked for
_SMALL, _MANY = 32, 256  # the same where so many scopes would be seen in it that lines cover it
_SPAN = 1 << 20  # bytes that are read at one time where not all of them are wanted
_PATIENCE = 1 << 26  # bytes that are read in search of a window
_STRIP = 2048  # rows or columns of a strip that is searched
_LEAD = 16  # rows and columns before the first place of the other kind


@dataclass(frozen=True, slots=True)
class Cells:
    """What each element of a window belongs to, (rows, columns): numbers of scopes and of blocks, or -1.

    Both count in the order in which they are met, over all rules that reach the tensor.
    """

    scope: NDArray[np.int64] = field(repr=False)
    block: NDArray[np.int64] = field(repr=False)


@dataclass(frozen=True, slots=True)
class CloseUp:
    """A window of a tensor: `kept` is True where an element is not zero, (rows, columns).

    It shows dimensions `dims` from `begin` on, the others at index 0; a vector has one row and one of `dims`.
    `rules` says what reaches the tensor, such as "scope.proj: 2 of 4 blocks". Without a spec there are no
    `cells`.
    """

    name: str
    dtype: str
    shape: Shape
    dims: tuple[int, ...]
    begin: tuple[int, int]
    kept: Flags = field(repr=False)
    rules: tuple[str, ...] = ()
    cells: Cells | None = None


class _Reach(Struct, frozen=True):
    rule: str
    instance: BoundInstance
    leaf: int


class Window(Struct, frozen=True):
    """The part of a tensor that is asked for: where it begins, and its sides where they are given."""

    begin: tuple[int, int]
    sides: tuple[int, int] | None = None

    @classmethod
    def parsed(cls, text: str) -> Window:
        """ROW,COLUMN, or BEGIN:END,BEGIN:END; SparsepruneError for anything else.

        >>> Window.parsed("128,0"), Window.parsed("0:32,64:128")
        (Window(begin=(128, 0), sides=None), Window(begin=(0, 64), sides=(32, 64)))
        """
        parts = [re.fullmatch(r"(\d{1,12})(?::(\d{1,12}))?", part.strip()) for part in text.split(",")]
        found = [(int(part[1]), None if part[2] is None else int(part[2])) for part in parts if part]
        if len(found) != 2 or len(parts) != 2 or (found[0][1] is None) != (found[1][1] is None):
            raise SparsepruneError(
                f"--window {printable(text)}: wanted ROW,COLUMN, such as 128,0, or BEGIN:END,BEGIN:END, "
                "such as 0:32,64:128"
            )
        sides = [end - begin for begin, end in found if end is not None]
        if any(not 1 <= side <= _WIDEST for side in sides):
            raise SparsepruneError(
                f"--window {printable(text)}: {sides[0]}x{sides[1]}; wanted 1 to {_WIDEST} rows and columns"
            )
        return cls((found[0][0], found[1][0]), (sides[0], sides[1]) if sides else None)

    def refuse_outside(self, size: tuple[int, int]) -> None:
        """SparsepruneError where it begins beyond the last row or column."""
        if any(begin >= end for begin, end in zip(self.begin, size, strict=True)):
            row, column = self.begin
            raise SparsepruneError(
                f"--window {row},{column}: begins beyond the tensor, which has {many(size[0], 'row')} and "
                f"{many(size[1], 'column')}"
            )


def close_up(
    stored: StoredTensor, reader: Source, bound: BoundSpec | None = None, window: Window | None = None
) -> CloseUp:
    """Look at a tensor where kept and pruned elements both are seen, or at its beginning, or at a window.

    SparsepruneError for a tensor without elements, with elements of less than a byte, or with packed codes.
    """
    line = "" if stored.codes is None else stored.codes.refusal(stored.name, values=False)
    if line:
        raise SparsepruneError(f"--tensor: {printable(line)}")
    if DTYPES[stored.dtype].zero_bits is None:
        raise SparsepruneError(
            f"--tensor {printable(stored.name)}: {stored.dtype} elements are less than a byte and cannot be "
            "looked at"
        )
    if not stored.numel:
        raise SparsepruneError(f"--tensor {printable(stored.name)}: it has no elements to draw")
    reached = [] if bound is None else list(_reaching(bound, stored.name))
    dims = _dims(stored.shape, reached)
    plane = _Plane(stored, reader, dims)
    if window is not None:
        window.refuse_outside(plane.size)
    begin = _begin(plane) if window is None else window.begin
    sides = (SIDE, SIDE) if window is None or window.sides is None else window.sides
    rows, columns = _ranges(begin, plane.size, sides)
    cells = None if bound is None else _cells(plane, rows, columns, reached)
    chosen = window is not None and window.sides is not None
    if cells is not None and len(np.unique(cells.scope)) > _MANY and not chosen:
        rows, columns = _ranges(begin, plane.size, (_SMALL, _SMALL))
        cells = Cells(*(labels[: len(rows), : len(columns)] for labels in (cells.scope, cells.block)))
    return CloseUp(
        stored.name,
        stored.dtype,
        stored.shape,
        dims,
        begin,
        plane.read(rows, columns),
        tuple(dict.fromkeys(f"{reach.rule}: {_budget(reach.instance)}" for reach in reached)),
        cells,
    )


def _ranges(begin: tuple[int, int], size: tuple[int, int], sides: tuple[int, int]) -> tuple[range, range]:
    rows, columns = (range(at, min(at + side, end)) for at, end, side in zip(begin, size, sides, strict=True))
    return rows, columns


class _Plane:
    """Two dimensions of a tensor, the others at index 0; a vector, or a single number, is one row."""

    def __init__(self, stored: StoredTensor, reader: Source, dims: tuple[int, ...]) -> None:
        strides = [prod(stored.shape[dim + 1 :]) for dim in range(len(stored.shape))]
        axes = [(1, 0)] * (2 - len(dims)) + [(stored.shape[dim], strides[dim]) for dim in dims]
        self.size = axes[0][0], axes[1][0]
        self._strides = axes[0][1], axes[1][1]
        self._stored, self._reader = stored, reader
        self._dtype = DTYPES[stored.dtype]
        self.itemsize = self._dtype.itemsize

    def element(self, row: int, column: int) -> int:
        """The place in the tensor."""
        return row * self._strides[0] + column * self._strides[1]

    def cost(self, rows: range, columns: range) -> int:
        """Bytes that are read for a rectangle, about."""
        return len(rows) * min(self._span(columns), len(columns) * 4096)

    def read(self, rows: range, columns: range) -> Flags:
        """True where an element is not zero, (rows, columns)."""
        marks = np.empty((len(rows), len(columns)), dtype=np.bool_)
        apart = self._span(columns) > max(_SPAN, self.itemsize * len(columns))
        parts = [range(column, column + 1) for column in columns] if apart else [columns]
        for at, row in enumerate(rows):
            for part in parts:
                marks[at, part.start - columns.start : part.stop - columns.start] = self._read_row(row, part)
        return marks

    def _span(self, columns: range) -> int:
        return ((len(columns) - 1) * self._strides[1] + 1) * self.itemsize

    def _read_row(self, row: int, columns: range) -> Flags:
        begin = self.element(row, columns.start) * self.itemsize
        data = self._reader.read(self._stored, begin, begin + self._span(columns))
        bits = np.frombuffer(data, dtype=f"<u{self.itemsize}")[:: max(1, self._strides[1])].copy()
        if self._stored.codes is not None:
            zeros = zero_patterns(self._reader, self._stored, [(self.element(row, at), 1) for at in columns])
            bits -= zeros if zeros is not None else bits.dtype.type(0)
        marks = np.empty(bits.size, dtype=np.bool_)
        mark_nonzero(bits, self._dtype, marks)
        return marks


def _reaching(bound: BoundSpec, name: str) -> Iterator[_Reach]:
    for rule, instance in bound.instances():
        for number, leaf in enumerate(instance.scope.leaves):
            if leaf.tensor == name:
                yield _Reach(rule.name, instance, number)


def _dims(shape: Shape, reached: Sequence[_Reach]) -> tuple[int, ...]:
    """The two dimensions to show: where a rule tells most blocks apart, else those of a matrix.

    Of three dimensions the last two are a matrix of a stack; of more the first two are, of a convolution's
    filters and channels.
    """
    if len(shape) < 3:
        return tuple(range(len(shape)))
    if reached:
        return window_of(reached[0].instance.scope, reached[0].leaf, shape).dims
    return (1, 2) if len(shape) == 3 else (0, 1)


def _begin(plane: _Plane) -> tuple[int, int]:
    """Where a window begins in which kept and pruned are seen, as near to the beginning as can be found.

    The first rows and the first columns are searched, and not to their end where they are very long.
    """
    rows, columns = (range(min(SIDE, size)) for size in plane.size)
    first = plane.read(rows, columns)
    kind = bool(first.flat[0])
    if (first != kind).any():
        return 0, 0
    across = _first_unlike(plane, kind, rows, downwards=False)
    if across is not None:
        return 0, _placed(across, plane.size[1])
    down = _first_unlike(plane, kind, columns, downwards=True)
    return (0, 0) if down is None else (_placed(down, plane.size[0]), 0)


def _first_unlike(plane: _Plane, kind: bool, across: range, *, downwards: bool) -> int | None:  # noqa: FBT001
    size = plane.size[0 if downwards else 1]
    spent = 0
    for start in range(SIDE, size, _STRIP):
        along = range(start, min(start + _STRIP, size))
        rows, columns = (along, across) if downwards else (across, along)
        spent += plane.cost(rows, columns)
        if spent > _PATIENCE:
            return None
        unlike = (plane.read(rows, columns) != kind).any(axis=1 if downwards else 0)
        if unlike.any():
            return start + int(unlike.argmax())
    return None


def _placed(first: int, size: int) -> int:
    """Where a window begins that has this line in it, with some before."""
    begin = first - _LEAD
    return max(0, min(begin - begin % _LEAD, size - SIDE))


def _cells(plane: _Plane, rows: range, columns: range, reached: Sequence[_Reach]) -> Cells:
    scopes: dict[tuple[int, int], int] = {}
    blocks: dict[tuple[int, int, int], int] = {}
    scope = np.full((len(rows), len(columns)), -1, dtype=np.int64)
    block = scope.copy()
    instances: dict[str, int] = {}
    for reach in reached:
        instance = instances.setdefault(reach.rule + reach.instance.label, len(instances))
        for at, row in enumerate(rows):
            for across, column in enumerate(columns):
                cell = cell_of(reach.instance.scope, reach.leaf, plane.element(row, column))
                if cell is None:
                    continue
                scope[at, across] = scopes.setdefault((instance, cell.scope), len(scopes))
                block[at, across] = blocks.setdefault((instance, cell.scope, cell.block), len(blocks))
    return Cells(scope, block)


def _budget(instance: BoundInstance) -> str:
    if instance.budget.nnz is not None:
        return f"{instance.budget.nnz:,} of {instance.scope.blocks_per_scope:,} blocks"
    return f"blocks from {instance.budget.threshold:g} on"


# Pairs of one hue: the dark ones let black lines be seen. No more hues than all kinds of eyes tell apart.
TINTS = (("#3f70b0", "#d6e4f5"), ("#b4622d", "#fbe0cc"), ("#4f9c84", "#e2f2e6"))
UNREACHED = ("#6b6b6b", "#ededed")
BLOCKS, SCOPES = ("#2b2b2b", 0.4), ("#0a0a0a", 1.6)  # colours and widths of lines
_LARGE, _SIZE = 0.24, 7.2  # inches of an element, and of a side of all of them
_RULES = 2  # that are named in the title


def plot_mask(closeup: CloseUp, path: Path, title: str = "") -> None:
    """Write the picture of a close-up to a .png, .svg, .pdf or .html file, under a title of its own."""
    with canvas.settings():
        page.write(mask_page(closeup, title), path)


def mask_page(closeup: CloseUp, title: str = "") -> page.Page:
    """The page, with its figure drawn; to be called under `settings`."""
    figure = canvas.blank()
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
    alt = (
        f"{rows} rows and {columns} columns of {closeup.name} from {closeup.begin[0]}, {closeup.begin[1]} "
        f"on: {closeup.kept.size - kept:,} of {closeup.kept.size:,} elements are zero."
    )
    picture = page.Picture(canvas.fitted(figure), caption, alt, (_numbers(closeup),))
    return page.Page(title or closeup.name, (picture,), totals)


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
    left = {place: label for place, label in np.ndenumerate(labels) if label != -1}
    seen = set()
    while left:
        place, label = left.popitem()
        if label in seen:
            return True
        seen.add(label)
        edge = [place]
        while edge:
            row, column = edge.pop()
            for beside in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                if left.get(beside) == label:
                    del left[beside]
                    edge.append(beside)
    return False


def _runs(differs: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """Runs of True down each column: (column, begin, end)."""
    change = np.diff(np.pad(differs.astype(np.int8), ((1, 1), (0, 0))), axis=0).T
    columns, begins = np.nonzero(change == 1)
    _, ends = np.nonzero(change == -1)
    return list(zip(columns.tolist(), begins.tolist(), ends.tolist(), strict=True))


def _elements(figure: canvas.Sheet, closeup: CloseUp) -> Axes:
    rows, columns = closeup.kept.shape
    side = canvas.pixels(min(_LARGE, _SIZE / max(rows, columns)))
    axes = canvas.axes_at(figure, 0, 0, side * columns, side * rows)
    colours = [colour for pair in (*TINTS, UNREACHED) for colour in pair]
    axes.pcolormesh(
        2 * _tints(closeup) + ~closeup.kept, cmap=ListedColormap(colours), vmin=-0.5, vmax=len(colours) - 0.5
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
    axes.set_title(_title(closeup))
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
    """What the tensor is and which rules reach it; the heading of the page has its name."""
    more = [f"{len(closeup.rules) - _RULES} more rules"] if len(closeup.rules) > _RULES else []
    facts = [f"{shape_text(closeup.shape)} {closeup.dtype}", *map(printable, closeup.rules[:_RULES]), *more]
    return ", ".join(facts)


def _legend(axes: Axes, closeup: CloseUp) -> None:
    tints = np.unique(_tints(closeup))
    swatches = [(TINTS[tint], "") for tint in tints[:1] if tint < len(TINTS)]
    swatches += [(UNREACHED, ", of no rule")] if len(TINTS) in tints else []
    handles: list[Artist] = [
        Patch(facecolor=colour, edgecolor="#444444", linewidth=0.5, label=word + of)
        for colours, of in swatches
        for colour, word in zip(colours, ("kept", "zero"), strict=True)
    ]
    if closeup.cells is not None:
        drawn = ((closeup.cells.block, BLOCKS, "block"), (closeup.cells.scope, SCOPES, "scope"))
        handles += [
            Line2D([], [], color=colour, linewidth=width, label=word)
            for labels, (colour, width), word in drawn
            if edges(labels)
        ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def _notes(closeup: CloseUp) -> list[str]:
    notes = []
    rank = len(closeup.shape)
    if rank > 2:
        others = [dim for dim in range(rank) if dim not in closeup.dims]
        plural = "Dimension" if len(others) == 1 else "Dimensions"
        notes.append(f"{plural} {', '.join(map(str, others))}: index 0.")
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


def _numbers(closeup: CloseUp) -> page.Numbers:
    rows = tuple(
        (str(closeup.begin[0] + at), str(int(row.sum())), "".join(map(str, row.astype(int))))
        for at, row in enumerate(closeup.kept)
    )
    return page.Numbers(("row", "not zero", f"elements from {closeup.begin[1]} on, 1 where not zero"), rows)
