"""Rows as text that other programs read: CSV with everything in full, Markdown for pages.

Owns quoting and escaping; knows nothing of what the rows tell. Called by the commands that list tensors.
"""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING

from rich.cells import cell_len

from sparseprune.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sparseprune.report.tables import Column

# A cell with a character of the line end is quoted, but only then: either one may stand in a name.
_QUOTED_END = "\r\n"
# How a text begins that a spreadsheet takes for a formula, as OWASP's page on CSV injection lists it (also in
# full width); and what is set in front of it, or of itself, so that a reader that takes one off has the text.
_GUARD = "'"
_FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20", _GUARD)
# What Markdown takes for its own: emphasis, code, links, tags; an underscore inside a word is none.
_MARKS = re.compile(r"[\\|*`<>\[\]~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)")


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    r"""Rows under their titles; None is an empty cell, numbers are exact, a list is its items.

    A text that a spreadsheet would take for a formula has an apostrophe in front, and one that has it already
    a second one.

    >>> csv_text(["name", "shape", "share"], [["a,b", [2, 3], 0.1], ["c", [], None]])
    'name,shape,share\n"a,b",2 3,0.1\nc,,\n'
    """
    text = _Lines()
    writer = csv.writer(text, lineterminator=_QUOTED_END)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(value) for value in row])
    return "".join(text.lines)


def markdown_text(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    r"""A table of Markdown with its columns aligned; footers are its last row. Marks in cells are escaped.

    >>> from sparseprune.report.tables import Column
    >>> print(markdown_text([Column("tensor", "left"), Column("zeros")], [["a|b", "7"]]), end="")
    | tensor | zeros |
    |:-------|------:|
    | a\|b   |     7 |
    """
    cells = [[_escaped(cell) for cell in row] for row in rows]
    if any(column.footer for column in columns):
        cells.append([f"**{_escaped(column.footer)}**" if column.footer else "" for column in columns])
    header = [_escaped(column.title) for column in columns]
    widths = [max(3, *(cell_len(row[at]) for row in (header, *cells))) for at in range(len(columns))]
    lines = [_line([_padded(*cell) for cell in zip(header, widths, columns, strict=True)])]
    lines.append(f"|{'|'.join(_rule(*one) for one in zip(widths, columns, strict=True))}|")
    lines += [_line([_padded(*cell) for cell in zip(row, widths, columns, strict=True)]) for row in cells]
    return "".join(f"{line}\n" for line in lines)


class _Lines:
    """What a CSV writer writes its rows to, one at a time."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, text: str, /) -> None:
        self.lines.append(text.removesuffix(_QUOTED_END) + "\n")


def _cell(value: object) -> object:
    """A value as it stands in a sheet: truth as JSON writes it, floats so that they read back exactly."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return " ".join(str(_cell(item)) for item in value)
    if isinstance(value, str) and value.startswith(_FORMULAS):
        return _GUARD + value
    return value


def _escaped(text: str) -> str:
    return _MARKS.sub(r"\\\g<0>", printable(text))


def _padded(text: str, width: int, column: Column) -> str:
    spaces = " " * (width - cell_len(text))
    return spaces + text if column.align == "right" else text + spaces


def _rule(width: int, column: Column) -> str:
    """The line under a title; the colon is on the side that cells stand at."""
    return f"{'-' * (width + 1)}:" if column.align == "right" else f":{'-' * (width + 1)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
