"""Tables: columns, widths that fit a terminal, shortened names; CSV and Markdown with everything in full.

Owns rich tables and how they shrink, quoting and escaping. Called by all that print a table.
"""

from __future__ import annotations

import csv
import re
import textwrap
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile
from operator import add, itemgetter
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from rich.cells import cell_len
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.wording import each_text, percent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.results import Removal, Report
    from sparseprune.results.pruning import RuleResult


Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


def rules_table(found: Report | Removal) -> Table:
    """What each rule reached and pruned."""
    numel = found.totals.numel
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("rule", overflow="fold")
    for name in ("tensors", "scopes", "kept in each", "elements", "pruned", "of all"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in found.rules:
        table.add_row(
            rule.name,
            f"{rule.tensors:,}",
            f"{rule.scopes:,}",
            _kept(rule),
            f"{rule.numel:,}",
            f"{rule.pruned:,}",
            percent(rule.pruned / numel if numel else 0.0),
        )
    return table


def outcome_table(report: Report) -> Table:
    """Each tensor that rules reached, after pruning."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tensor", overflow="fold")
    table.add_column("rule", overflow="fold")
    for name in ("pruned", "sparsity", "energy kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for tensor in report.tensors:
        table.add_row(
            Text(printable(tensor.name), overflow="fold"),
            tensor.rule,
            f"{tensor.pruned:,}",
            percent(tensor.zeros_after / tensor.numel if tensor.numel else 0.0),
            "?" if tensor.energy_kept is None else f"{tensor.energy_kept:.4f}",
        )
    return table


def _kept(rule: RuleResult) -> str:
    if rule.nnz is None:
        return f"norm >= {each_text(rule.threshold)}"
    return f"{each_text(rule.nnz)} of {each_text(rule.blocks_per_scope)}"


@dataclass(frozen=True, slots=True)
class Fact(Generic[Row_contra]):
    """A column and its text for a row; it is left out if all its texts are `silent`."""

    column: Column
    text: Callable[[Row_contra], str]
    silent: frozenset[str] | None = None


def told(facts: Iterable[Fact[Row]], entries: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    """The columns that say something anywhere, and a row of them for each entry."""
    columns: list[Column] = []
    texts: list[list[str]] = []
    for fact in facts:
        cells = [fact.text(entry) for entry in entries]
        if fact.silent is None or not fact.silent.issuperset(cells):
            columns.append(fact.column)
            texts.append(cells)
    return columns, [[cells[row] for cells in texts] for row in range(len(entries))]


def below(line: str) -> RenderableType:
    """A line of its own below a table, that belongs to the one above it."""
    return Padding(Text(line, overflow="fold"), (0, 0, 0, 2), expand=False)


_RAGGED = 12  # characters of a cut piece that are rather left out than shown


def shortened(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """The names in their order, each in at most `width` columns; unlike ones stay so where that is possible.

    A long name keeps its end. Where several have the same end, they keep what tells them apart as well.

    >>> shortened(["model.layers.10.self_attn.q_proj.weight", "lm_head.weight"], 24)
    ['…self_attn.q_proj.weight', 'lm_head.weight']
    >>> shortened([f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (9, 10)], 28)
    ['…9.self_attn.q_proj.weight', '…10.self_attn.q_proj.weight']
    """
    unlike = dict.fromkeys(names)
    short = {name: name for name in unlike if cell_len(name) <= width}
    long = [name for name in unlike if name not in short]
    ends = {name: ellipsis + _end(name, width - cell_len(ellipsis)) for name in long}
    became = short | ends
    for group in _alike(became, long):
        spans = _unlike(group)
        became |= {name: _told_apart(name, spans[name], width, ellipsis) for name in group if name in ends}
    for group in _alike(became, long):
        # What was gained for one may be lost for another: then at least as much as fits is shown of each.
        became |= {name: ellipsis + _tail(name, width - cell_len(ellipsis)) for name in group if name in ends}
    return [became[name] for name in names]


def _alike(became: dict[str, str], long: Sequence[str]) -> list[list[str]]:
    """Names that have become the same, if one of them was shortened."""
    groups: dict[str, list[str]] = {}
    for name, text in became.items():
        groups.setdefault(text, []).append(name)
    cut = set(long)
    return [group for group in groups.values() if len(group) > 1 and not cut.isdisjoint(group)]


def _unlike(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each name the first and the last character that it takes to tell it from the others."""
    ranked = sorted(names)
    first = _alike_up_to(ranked[0], ranked[-1])
    alike = [0, *(_alike_up_to(*pair) for pair in pairwise(ranked)), 0]
    return {name: (first, max(pair)) for name, pair in zip(ranked, pairwise(alike), strict=True)}


def _told_apart(name: str, span: tuple[int, int], width: int, ellipsis: str) -> str:
    """Its end, and before it the pieces in which it is unlike others."""
    differs, last = span
    begin = name.rfind(".", 0, differs) + 1
    dot = name.find(".", last)
    whole = dot if dot >= 0 else len(name)
    for start, stop, share in (
        (0, whole, 2),
        (begin, whole, 3),
        (begin, last + 1, 3),
        (differs, last + 1, 4),
    ):
        head = (ellipsis if start else "") + name[start:stop] + ellipsis
        room = width - cell_len(head)
        if room >= width // share:
            return head + _tail(name[stop:], room)
    return ellipsis + _end(name, width - cell_len(ellipsis))


def _alike_up_to(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _end(name: str, width: int) -> str:
    """As much of its end as fits, without the rest of a piece that was cut, if that is short or a number."""
    tail = _tail(name, width)
    ragged, dot, rest = tail.partition(".")
    before = name[: len(name) - len(tail)]
    if dot and rest and not before.endswith(".") and (len(ragged) <= _RAGGED or ragged.isdigit()):
        return rest
    return tail


def _tail(text: str, width: int) -> str:
    """The longest end of a text that fits into `width` columns."""
    if text.isascii():
        return text[len(text) - width :] if 0 <= width < len(text) else text if width > 0 else ""
    at = len(text)
    while at > 0 and (wide := cell_len(text[at - 1])) <= width:
        width -= wide
        at -= 1
    return text[at:]


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
    lines = [_line([_padded_cell(*cell) for cell in zip(header, widths, columns, strict=True)])]
    lines.append(f"|{'|'.join(_rule(*one) for one in zip(widths, columns, strict=True))}|")
    lines += [
        _line([_padded_cell(*cell) for cell in zip(row, widths, columns, strict=True)]) for row in cells
    ]
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


def _padded_cell(text: str, width: int, column: Column) -> str:
    spaces = " " * (width - cell_len(text))
    return spaces + text if column.align == "right" else text + spaces


def _rule(width: int, column: Column) -> str:
    """The line under a title; the colon is on the side that cells stand at."""
    return f"{'-' * (width + 1)}:" if column.align == "right" else f":{'-' * (width + 1)}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
