"""One scope of a rule, drawn for the terminal: members side by side, cells by scope and block.

Letters name scopes and numbers name blocks, so that a drawing reads without colour; backgrounds follow
the scopes and join the cells of a block. What belongs where is known by drawing.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING

from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.drawing import COLUMNS, Window, window_of
from sparseprune.report.wording import shape_text
from sparseprune.spec import BoundScope

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

    from sparseprune.engine.grids import Shape
    from sparseprune.report.drawing import Cell
    from sparseprune.spec import BoundInstance, BoundRule

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
        prefix = _shared(tensors)
        title = f"{instance.label}{f' in {prefix}' if prefix else ''}"
        yield Text(printable(title), "bold", overflow="fold")
        panels, letters = self._panels(instance, prefix, options)
        for row in _packed(panels, width):
            yield from _side_by_side(row)
        more = len(instance.scope.leaves) - len(panels)
        if more:
            yield Text(f"and {more:,} more tensor{'s' * (more > 1)} in the same scopes")
        yield Text(_legend(letters, tensors), "dim")

    def _panels(
        self, instance: BoundInstance, prefix: str, options: ConsoleOptions
    ) -> tuple[list[list[Text]], dict[int, str]]:
        """The members with the letters of their scopes: less wide where all stand side by side then."""
        width = min(options.max_width, _WIDEST)
        drawn: list[tuple[list[list[Text]], dict[int, str]]] = []
        for columns in (COLUMNS, COLUMNS * 3 // 4, COLUMNS // 2):
            windows = [self._window(instance, number, width, columns) for number in _drawn(instance)]
            letters = _letters(windows)
            names = [window.tensor.removeprefix(f"{prefix}.") for window in windows]
            panels = [
                _panel(window, name, letters, ascii_only=options.ascii_only)
                for window, name in zip(windows, names, strict=True)
            ]
            drawn.append((panels, letters))
            if len(list(_packed(panels, width))) == 1:
                return panels, letters
        return drawn[0]

    def _window(self, instance: BoundInstance, number: int, width: int, columns: int) -> Window:
        """A window of a leaf with as many columns as there is room for."""
        shape = self.shapes[instance.scope.leaves[number].tensor]
        while True:
            window = window_of(instance.scope, number, shape, columns=columns)
            excess = _width(window) - width
            if excess <= 0 or columns == 1:
                return window
            columns = max(1, columns - max(1, excess // _cell_width(window)))


def _drawn(instance: BoundInstance) -> range:
    """The leaves that are drawn: of a scope coupling those of the first two scopes."""
    scope = instance.scope
    members = (scope,) if isinstance(scope, BoundScope) else scope.members[:_SCOPES]
    return range(min(_MEMBERS, sum(len(member.leaves) for member in members)))


def _shared(names: Sequence[str]) -> str:
    """The dotted beginning that names have in common; nothing for a single name."""
    pieces = zip(*[name.split(".")[:-1] for name in names], strict=False)
    same = takewhile(lambda column: len(set(column)) == 1, pieces)
    return ".".join([column[0] for column in same]) if len(set(names)) > 1 else ""


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
    """Columns of one cell and the space behind it."""
    blocks = [cell.block for row in window.cells for cell in row if cell is not None]
    return 2 + len(str(max(blocks, default=0)))


def _margin(window: Window) -> int:
    """Columns for the numbers of rows and the space behind them; none for a vector."""
    rows = [row for row in window.rows if row is not None]
    return len(str(max(rows, default=0))) + 1 if len(window.dims) > 1 else 0


def _width(window: Window) -> int:
    return _margin(window) + len(window.columns) * _cell_width(window) - 1


def _panel(window: Window, name: str, letters: Mapping[int, str], *, ascii_only: bool) -> list[Text]:
    """Name, shape, numbers of columns, and the rows: lines of any length."""
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
    """The true shape, and where in it the window lies."""
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
    """Panels in rows, as many beside each other as fit."""
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
    for number in range(max(map(len, panels))):
        whole = Text(overflow="fold")
        for panel, wide in zip(panels, widths, strict=True):
            part = panel[number].copy() if number < len(panel) else Text()
            whole.append_text(part)
            whole.append(" " * (wide - part.cell_len))
        whole.rstrip()
        yield whole
