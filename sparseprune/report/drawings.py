"""Drawings in letters: a tensor with its blocks and scopes, for `plan` and close-ups."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

from msgspec import Struct
from rich.text import Text

from sparseprune.engine.grids import Shape, index_of, inverse_order, permute, prod
from sparseprune.errors import printable
from sparseprune.report.wording import many, shape_text
from sparseprune.spec import BoundBlockCoupling
from sparseprune.spec.patterns import shared_beginning

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from sparseprune.spec import BoundBlock, BoundInstance, BoundRule, BoundScope, BoundScopeCoupling

    AnyScope = BoundScope | BoundScopeCoupling

ROWS, COLUMNS = 8, 16
_SHORT = 4  # cells alike that are all shown; of a longer run the first two and the last
_PATIENCE = 2048  # looks along an axis until a run is taken to end


class Cell(Struct, frozen=True):
    """What an element belongs to: the number of its scope, and of its block within the scope.

    Both count in row-major order, blocks of a scope coupling member by member, as in the engine.
    """

    scope: int
    block: int


Line = tuple[int | None, ...]
"""Indices along a dimension that are shown, in order; None stands for some that are left out."""


class Window(Struct, frozen=True):
    """A part of two dimensions of a tensor, the others being fixed at `begin`.

    `cells[i][j]` is that of row `rows[i]` and column `columns[j]`, None outside the view or where either
    index is None. A vector has one row, `dims` is then its only dimension.
    """

    tensor: str
    shape: Shape
    begin: Shape
    dims: tuple[int, ...]
    rows: Line
    columns: Line
    cells: tuple[tuple[Cell | None, ...], ...]

    @property
    def blocks(self) -> int:
        """How many blocks can be told apart in it."""
        return len({cell for row in self.cells for cell in row if cell is not None})


def view_index(leaf: BoundBlock, element: int) -> Shape | None:
    """The index in the view of an element of the tensor; None for an element outside of it.

    >>> from sparseprune.spec import BoundBlock
    >>> pairs = BoundBlock("w", "w", (4, 8, 2), (16, 1, 8), 0, (1, 1, 2))
    >>> view_index(pairs, 16 + 8 + 3)
    (1, 3, 1)
    """
    dims = sorted(range(len(leaf.view_shape)), key=lambda dim: -leaf.view_stride[dim])
    steps = [(leaf.view_stride[dim], leaf.view_shape[dim]) for dim in dims]
    found = _decomposed(element - leaf.view_offset, steps)
    return None if found is None else permute(found, inverse_order(tuple(dims)))


def _decomposed(rest: int, steps: Sequence[tuple[int, int]]) -> Shape | None:
    """Factors below each size with `sum(factor * step) == rest`; steps fall. None if there are none.

    Views whose dimensions do not interleave have one candidate at each step.
    """
    if not steps:
        return () if rest == 0 else None
    (step, size), smaller = steps[0], steps[1:]
    reach = sum([(count - 1) * other for other, count in smaller])
    if step == 0:
        first = last = 0
    else:
        first, last = max(0, -((reach - rest) // step)), min(size - 1, rest // step)
    for factor in range(last, first - 1, -1):
        found = _decomposed(rest - factor * step, smaller)
        if found is not None:
            return (factor, *found)
    return None


def cell_of(scope: AnyScope, number: int, element: int) -> Cell | None:
    """The cell of an element of the tensor under leaf `number`; None outside of that leaf's view."""
    before = 0
    for member, order in zip(scope.members, scope.orders, strict=True):
        if number < len(member.leaves):
            index = view_index(member.leaves[number], element)
            if index is None:
                return None
            place, block = _in_member(member, number, index)
            return Cell(_ravelled(permute(place, order), scope.grid_shape), before + block)
        number -= len(member.leaves)
        before += member.blocks_per_scope
    raise IndexError(f"{scope.label} has no leaf {number}")


def _in_member(member: BoundScope, number: int, index: Shape) -> tuple[Shape, int]:
    """The scope's place in the member's grid of scopes, and the block's number in that scope."""
    leaf = member.leaves[number]
    block = tuple([at // extent for at, extent in zip(index, leaf.shape, strict=True)])
    if isinstance(member.block, BoundBlockCoupling):
        block = permute(block, member.block.orders[number])
    scope = tuple([at // extent for at, extent in zip(block, member.shape, strict=True)])
    within = tuple([at % extent for at, extent in zip(block, member.shape, strict=True)])
    return scope, _ravelled(within, member.shape)


def _ravelled(index: Shape, shape: Shape) -> int:
    number = 0
    for at, size in zip(index, shape, strict=True):
        number = number * size + at
    return number


def window_of(scope: AnyScope, number: int, shape: Shape, rows: int = ROWS, columns: int = COLUMNS) -> Window:
    """The beginning of the view of leaf `number` in a tensor of this shape.

    The last two dimensions, or two others where more blocks can be told apart; at most `rows` and
    `columns` of them, what is left out counted in. A run of lines that are alike is cut in its middle.
    """
    if prod(shape) == 0:
        return Window(scope.leaves[number].tensor, shape, (0,) * len(shape), (), (), (), ())
    rank = len(shape)
    last = (rank - 2, rank - 1)
    pairs = [last, *(pair for pair in combinations(range(rank), 2) if pair != last)]
    planes = pairs if rank > 1 else [tuple(range(rank))]
    windows = (_window(scope, number, shape, dims, (rows, columns)) for dims in planes)
    return max(windows, key=lambda window: window.blocks)  # the first one of several


def _window(
    scope: AnyScope, number: int, shape: Shape, dims: tuple[int, ...], limits: tuple[int, int]
) -> Window:
    leaf = scope.leaves[number]
    begin = index_of(leaf.view_offset, shape)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    # A vector, or a single number, is a matrix of one row.
    axes = [_Axis(0, 1, 0)] * (2 - len(dims)) + [_Axis(begin[dim], shape[dim], strides[dim]) for dim in dims]
    down, across = axes
    origin = leaf.view_offset - down.begin * down.stride - across.begin * across.stride

    def element(i: int, j: int) -> int:
        return origin + i * down.stride + j * across.stride

    def cell(i: int, j: int) -> Cell | None:
        return cell_of(scope, number, element(i, j))

    def reach(i: int, j: int, axis: _Axis) -> int:
        return _reach(leaf, element(i, j), axis.stride)

    near = range(across.begin, min(across.begin + limits[1], across.size))
    rows = _shown(
        down,
        limits[0],
        lambda i: [cell(i, j) for j in near],
        lambda i: min([reach(i, j, down) for j in near]),
    )
    some = [i for i in rows if i is not None]
    columns = _shown(
        across,
        limits[1],
        lambda j: [cell(i, j) for i in some],
        lambda j: min([reach(i, j, across) for i in some]),
    )
    cells = [tuple([None if i is None or j is None else cell(i, j) for j in columns]) for i in rows]
    return Window(leaf.tensor, shape, begin, dims, rows, columns, tuple(cells))


class _Axis(Struct, frozen=True):
    """A dimension from `begin` on; `stride` in elements of the tensor."""

    begin: int
    size: int
    stride: int


def _shown(
    axis: _Axis, limit: int, line: Callable[[int], list[Cell | None]], reach: Callable[[int], int]
) -> Line:
    """Which indices of an axis to show: all of them, but only the ends of a run of lines that are alike.

    `reach` says how many lines from an index on are alike for sure.
    """
    shown: list[int | None] = []
    start = axis.begin
    while start < axis.size and len(shown) < limit:
        first, end = line(start), start
        for _ in range(_PATIENCE):
            end = min(axis.size, end + reach(end))
            if end == axis.size or line(end) != first:
                break
        long = end - start > _SHORT
        shown += [start, start + 1, None, end - 1] if long else range(start, end)
        start = end
    del shown[limit:]
    while shown[-1] is None:
        shown.pop()
    return tuple(shown) if shown[-1] == axis.size - 1 else (*shown, None)


def _reach(leaf: BoundBlock, element: int, stride: int) -> int:
    """How many elements from this one on, `stride` apart, lie in the same block, or all outside the view.

    At least: 1 where it cannot be seen from the strides, as of a view whose dimensions interleave.
    """
    sizes = zip(leaf.view_stride, leaf.view_shape, leaf.shape, strict=True)
    steps = sorted([step for step in sizes if step[1] > 1], reverse=True)
    smallest = steps[-1][0] if steps else 0
    if stride == 0 or not smallest or stride % smallest or not _nested(steps):
        return 1
    ends, period = [], 0  # the period of a dimension is the step of the next larger one
    for step, size, extent in steps:
        if not period or stride % period:
            at = (element - leaf.view_offset) % period if period else element - leaf.view_offset
            if at < step * size:
                ends.append((at // (step * extent) + 1) * step * extent - at)
            if period:
                ends.append(period - at)
        period = step
    return -(-min(ends) // stride) if ends else sys.maxsize


def _nested(steps: Sequence[tuple[int, int, int]]) -> bool:
    """Whether each step leads past all that the smaller ones can reach."""
    return all(
        sum([(size - 1) * smaller for smaller, size, _ in steps[at + 1 :]]) < step
        for at, (step, _, _) in enumerate(steps)
    )


_LETTERS = ascii_lowercase + ascii_uppercase
# Okabe and Ito, the lighter ones: told apart by all kinds of eyes, and black can be read on each.
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#cc79a7")
_SCOPES, _MEMBERS = 2, 8  # that are drawn of a coupling
_BETWEEN = 4
_WIDEST = 200  # where lines have no end


@dataclass(frozen=True, slots=True)
class RuleDrawing:
    """The first instance of a rule, as a rich renderable; `shapes` has those of the tensors by name."""

    rule: BoundRule
    shapes: Mapping[str, Shape] = field(repr=False)

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        if not self.rule.instances:
            return
        instance = self.rule.instances[0]
        width = min(options.max_width, _WIDEST)
        tensors = [instance.scope.leaves[number].tensor for number in _drawn(instance)]
        prefix = (
            shared_beginning([name.rpartition(".")[0] for name in tensors]) if len(set(tensors)) > 1 else ""
        )
        title = f"{instance.label}{f' in {prefix}' if prefix else ''}"
        title += f", within {instance.within}" if instance.within is not None else ""
        yield Text(printable(title), "bold", overflow="fold")
        panels, letters = self._panels(instance, prefix, options)
        for row in _packed(panels, width):
            yield from _side_by_side(row)
        more = len(instance.scope.leaves) - len(panels)
        if more:
            yield Text(f"and {many(more, 'more tensor')} in the same scopes")
        out = f"; what {instance.within} drops is out" if instance.within is not None else ""
        yield Text(_legend(letters, tensors) + out, "dim")

    def _panels(
        self, instance: BoundInstance, prefix: str, options: ConsoleOptions
    ) -> tuple[list[list[Text]], dict[int, str]]:
        """The members with the letters of their scopes: less wide where all stand side by side then."""
        width = min(options.max_width, _WIDEST)
        drawn: list[tuple[list[list[Text]], dict[int, str]]] = []
        for columns in (COLUMNS, COLUMNS * 3 // 4, COLUMNS // 2):
            windows = [self._window(instance, number, width, columns) for number in _drawn(instance)]
            letters = _letters(windows)
            panels = [_panel(one, prefix, letters, ascii_only=options.ascii_only) for one in windows]
            drawn.append((panels, letters))
            if len(list(_packed(panels, width))) == 1:
                return panels, letters
        return drawn[0]

    def _window(self, instance: BoundInstance, number: int, width: int, columns: int) -> Window:
        shape = self.shapes[instance.scope.leaves[number].tensor]
        while True:
            window = window_of(instance.scope, number, shape, columns=columns)
            excess = _width(window) - width
            if excess <= 0 or columns == 1:
                return window
            columns = max(1, columns - max(1, excess // _cell_width(window)))


def _drawn(instance: BoundInstance) -> range:
    """The leaves that are drawn: of a scope coupling those of the first two scopes."""
    return range(min(_MEMBERS, sum(len(member.leaves) for member in instance.scope.members[:_SCOPES])))


def _letters(windows: Sequence[Window]) -> dict[int, str]:
    """A letter for each scope that is seen, in the order in which it is seen first."""
    cells = [cell for window in windows for row in window.cells for cell in row if cell is not None]
    scopes = dict.fromkeys(cell.scope for cell in cells)
    return {scope: _LETTERS[at % len(_LETTERS)] for at, scope in enumerate(scopes)}


def _legend(letters: Mapping[int, str], tensors: Sequence[str]) -> str:
    many = "; cells alike are one block" if len(tensors) > 1 else ""
    first = f", {letters[0]} is the first one" if 0 in letters and len(letters) > 1 else ""
    return f"letter: scope{first}; number: block in the scope{many}"


def _cell_width(window: Window) -> int:
    blocks = [cell.block for row in window.cells for cell in row if cell is not None]
    return 2 + len(str(max(blocks, default=0)))


def _margin(window: Window) -> int:
    """Columns for the numbers of rows and the space behind them; none for a vector."""
    rows = [row for row in window.rows if row is not None]
    return len(str(max(rows, default=0))) + 1 if len(window.dims) > 1 else 0


def _width(window: Window) -> int:
    return _margin(window) + len(window.columns) * _cell_width(window) - 1


def _panel(window: Window, prefix: str, letters: Mapping[int, str], *, ascii_only: bool) -> list[Text]:
    """Name, shape, numbers of columns, and the rows: lines of any length."""
    name = window.tensor.removeprefix(f"{prefix}.")
    lines = [Text(printable(name), "bold"), Text(_where(window))]
    if not window.cells:
        return lines
    margin, wide = _margin(window), _cell_width(window)
    lines.append(Text(" " * margin + _ruler(window, wide), "dim"))
    across, down = ("...", ":") if ascii_only else ("…", "⋮")
    gap = (across if wide > 3 else across[:2]).ljust(wide)
    for index, row in zip(window.rows, window.cells, strict=True):
        label = down if index is None else str(index)
        line = Text()
        line.append(label.rjust(margin - 1) + " " if margin else "", "dim")
        for column, cell in enumerate(row):
            if index is None:
                line.append(down.ljust(wide))
            elif window.columns[column] is None:
                joined = 0 < column < len(row) - 1 and row[column - 1] == row[column + 1]
                line.append(gap, _style(row[column - 1], letters) if joined else "")
            else:
                _add_cell(line, cell, row[column + 1 : column + 3], letters, wide)
        line.rstrip()
        lines.append(line)
    return lines


def _where(window: Window) -> str:
    text = shape_text(window.shape)
    if not window.cells:
        return f"{text}: no elements"
    if len(window.shape) > 2:
        text += ", dimensions {} and {}".format(*window.dims)
    return text + (f" from {list(window.begin)}" if any(window.begin) else "")


def _ruler(window: Window, wide: int) -> str:
    """The numbers of the columns, as many as do not touch each other."""
    ruler = ""
    for place, column in enumerate(window.columns):
        if column is not None and (not ruler or len(ruler) < place * wide):
            ruler = ruler.ljust(place * wide) + str(column)
    return ruler


def _add_cell(
    line: Text, cell: Cell | None, following: Sequence[Cell | None], letters: Mapping[int, str], wide: int
) -> None:
    """A cell and the space behind it, which has its colour where the block goes on."""
    if cell is None:
        line.append("·".ljust(wide), "dim")
        return
    style = _style(cell, letters)
    line.append(f"{letters[cell.scope]}{cell.block}".ljust(wide - 1), style)
    line.append(" ", style if cell in following else "")


def _style(cell: Cell | None, letters: Mapping[int, str]) -> str:
    if cell is None:
        return ""
    place = list(letters).index(cell.scope)
    return f"{'bold ' if cell.scope == 0 else ''}black on {_COLOURS[place % len(_COLOURS)]}"


def _packed(panels: Sequence[list[Text]], width: int) -> Iterator[list[list[Text]]]:
    row: list[list[Text]] = []
    used = 0
    for panel in panels:
        wide = max(line.cell_len for line in panel) + _BETWEEN
        if row and used + wide - _BETWEEN > width:
            yield row
            row, used = [], 0
        row.append(panel)
        used += wide
    if row:
        yield row


def _side_by_side(panels: Sequence[list[Text]]) -> Iterator[Text]:
    widths = [max(line.cell_len for line in panel) + _BETWEEN for panel in panels]
    for parts in zip_longest(*panels, fillvalue=Text()):
        whole = Text(overflow="fold")
        for part, wide in zip(parts, widths, strict=True):
            whole.append_text(part)
            whole.append(" " * (wide - part.cell_len))
        whole.rstrip()
        yield whole
