"""Tables that fit the width of a terminal, from 60 columns on: which columns stay, how names are shortened.

Gives rich renderables; whoever calls decides on the stream. Every cell is plain text, shown literally.
Called by every report that lists tensors.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from itertools import groupby
from operator import add, itemgetter
from typing import TYPE_CHECKING, Literal

from rich.cells import cell_len
from rich.segment import Segment

from sparseprune.errors import printable
from sparseprune.report.shortening import shortened

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderResult

_GAP = 2  # spaces between two columns
_ROOM = 0.45  # of the width: with so much, names are shortened rather than another column left out
_SHORTEST = 12  # columns that names keep, whatever else there is
_BOLD = "bold"


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its title, where its cells stand, what is under them, the style of its cells.

    Where the table is wider than the terminal, columns of the largest `spare` go first; 0 stays always.
    """

    title: str
    align: Literal["left", "right"] = "right"
    footer: str = ""
    spare: int = 0
    style: str = ""


@dataclass(frozen=True, slots=True)
class FittedTable:
    """Rows of text under columns; the first column has names, which are shortened in the middle at last.

    Too wide a table breaks its titles into words, then leaves columns out as long as names have not room
    enough, then shortens the names. What was left out is said below, and that `elsewhere` has it.
    Of `stems` one stands before each name and is not shortened, such as the lines that lead to it in a tree.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    elsewhere: str = ", --csv or --json"
    stems: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        drawing = _Drawing(self, options.max_width, "..." if options.ascii_only else "…")
        for line, styles in drawing.lines():
            yield from _segments(console, line, styles)
            yield Segment.line()


@dataclass(frozen=True, slots=True)
class _Fitted:
    """One column as it is drawn: lines of its title, cells, footer, none of them wider than `width`."""

    column: Column
    title: list[str]
    cells: list[str]
    footer: str
    width: int


class _Drawing:
    """A table at one width: which columns stand, how wide each one is."""

    def __init__(self, table: FittedTable, width: int, ellipsis: str) -> None:
        self._width = width
        self._ellipsis = ellipsis
        self._elsewhere = table.elsewhere
        self._stems = table.stems or [""] * len(table.rows)
        cells = [[printable(row[at]) for row in table.rows] for at in range(len(table.columns))]
        cells[:1] = [list(map(add, self._stems, texts)) for texts in cells[:1]]
        whole = [_fitted(column, texts) for column, texts in zip(table.columns, cells, strict=True)]
        if self._excess(whole) > 0:
            whole = [_fitted(one.column, one.cells, broken=True) for one in whole]
        kept = self._without_spare(whole)
        self._left_out = [one.column.title for one in whole if one not in kept]
        self._columns = self._narrowed(kept)

    def lines(self) -> Iterator[tuple[list[str], list[str]]]:
        """Texts that stand side by side, spaces included, and the style of each."""
        columns = self._columns
        styles = [one.column.style for one in columns]
        bold = [_BOLD] * len(columns)
        for at in range(max((len(one.title) for one in columns), default=0)):
            yield self._row([one.title[at] if at < len(one.title) else "" for one in columns]), bold
        for at in range(len(columns[0].cells) if columns else 0):
            yield self._row([one.cells[at] for one in columns]), styles
        if any(one.footer for one in columns):
            yield self._row([one.footer for one in columns]), bold
        if self._left_out:
            note = f"left out: {', '.join(self._left_out)}; a wider terminal{self._elsewhere} has them"
            for line in textwrap.wrap(note, self._width):
                yield [line], ["dim"]

    def _row(self, texts: Sequence[str]) -> list[str]:
        """Each text padded to its column; no spaces at the end of the line."""
        padded = [_padded(text, one) for text, one in zip(texts, self._columns, strict=True)]
        line = [text if at == 0 else " " * _GAP + text for at, text in enumerate(padded)]
        while line and not line[-1].strip():
            line.pop()
        return [*line[:-1], line[-1].rstrip()] if line else []

    def _excess(self, columns: Sequence[_Fitted]) -> int:
        """By how much they are wider than there is room."""
        return sum(one.width for one in columns) + _GAP * (len(columns) - 1) - self._width

    def _without_spare(self, columns: list[_Fitted]) -> list[_Fitted]:
        """Without the columns that the names need the room of: the largest `spare` first, from the right."""
        kept = list(columns)
        while (spare := max((one.column.spare for one in kept[1:]), default=0)) > 0:
            names = kept[0].width
            room = names - max(0, self._excess(kept))
            if room >= min(names, int(self._width * _ROOM)):
                break
            last = max(at for at, one in enumerate(kept) if at and one.column.spare == spare)
            del kept[last]
        return kept

    def _narrowed(self, columns: list[_Fitted]) -> list[_Fitted]:
        """With names as short as they have to be; where that is not enough, other cells end early."""
        if not columns or self._excess(columns) <= 0:
            return columns
        names = columns[0]
        room = max(_SHORTEST, names.width - self._excess(columns))
        narrowed = [_cut(names, room, self._ellipsis, self._stems), *columns[1:]]
        for at in sorted(range(1, len(narrowed)), key=lambda at: -narrowed[at].width):
            excess = self._excess(narrowed)
            if excess > 0:
                room = max(_SHORTEST, narrowed[at].width - excess)
                narrowed[at] = _cut(narrowed[at], room, self._ellipsis)
        return narrowed


def _fitted(column: Column, cells: list[str], *, broken: bool = False) -> _Fitted:
    """A column as wide as its widest text; a `broken` title is as narrow as its cells allow, and one word."""
    title, footer = printable(column.title), printable(column.footer)
    widest = max(map(cell_len, (footer, *cells)), default=0)
    lines = [title]
    if broken and cell_len(title) > widest:
        words = title.replace("-", "- ").split()
        lines = textwrap.wrap(title, max(widest, *map(len, words), 1), break_long_words=False)
    width = max([widest, *map(cell_len, lines)])
    return _Fitted(column, lines, cells, footer, width)


def _cut(column: _Fitted, width: int, ellipsis: str, stems: Sequence[str] = ()) -> _Fitted:
    """The same column with texts of at most `width` columns."""
    *title, footer = shortened([*column.title, column.footer], width, ellipsis)
    cells = (
        _behind(stems, column.cells, width, ellipsis) if stems else shortened(column.cells, width, ellipsis)
    )
    return _Fitted(column.column, title, cells, footer, max(map(cell_len, (*title, footer, *cells))))


def _behind(stems: Sequence[str], cells: Sequence[str], width: int, ellipsis: str) -> list[str]:
    """Cells shortened behind their stems; a stem that leaves no room for a name is shortened with it."""
    became = dict(enumerate(cells))
    lengths = [len(stem) if width - cell_len(stem) >= _SHORTEST else 0 for stem in stems]
    for length in set(lengths):
        rows = [at for at, one in enumerate(lengths) if one == length]
        names = shortened([cells[at][length:] for at in rows], width - length, ellipsis)
        became |= {at: cells[at][:length] + name for at, name in zip(rows, names, strict=True)}
    return list(became.values())


def _padded(text: str, column: _Fitted) -> str:
    spaces = " " * (column.width - cell_len(text))
    return spaces + text if column.column.align == "right" else text + spaces


def _segments(console: Console, texts: Sequence[str], styles: Sequence[str]) -> Iterator[Segment]:
    """Texts side by side, those of one style as one piece; a line may have fewer than there are styles."""
    for style, run in groupby(zip(texts, styles, strict=False), key=itemgetter(1)):
        yield Segment("".join(text for text, _ in run), console.get_style(style) if style else None)
