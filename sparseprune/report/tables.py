"""Tables: columns, widths that fit a terminal, shortened names; CSV and Markdown with everything in full.

Owns rich tables and how they shrink, quoting and escaping. Called by all that print a table.
"""

from __future__ import annotations

import csv
import re
import textwrap
from itertools import groupby, pairwise, takewhile, zip_longest
from operator import add, itemgetter
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

from msgspec import Struct
from rich.cells import cell_len
from rich.padding import Padding
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from sparseprune.errors import printable
from sparseprune.report.wording import each_text, percent, shape_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from sparseprune.results import Removal, Report
    from sparseprune.results.checking import CheckedRule
    from sparseprune.results.pruning import RuleResult


Row = TypeVar("Row")
Row_contra = TypeVar("Row_contra", contravariant=True)


def plain_table(names: Sequence[str], others: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table without lines: columns of names, which fold, and others to the right of them, which do not."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in names:
        table.add_column(title, overflow="fold")
    for title in others:
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def rules_table(found: Report | Removal) -> Table:
    """What each rule reached and pruned."""
    titles = ("tensors", "scopes", "kept in each", "elements", "pruned", "of all")
    numel = found.totals.numel
    rows = (
        (
            *(rule.name, f"{rule.tensors:,}", f"{rule.scopes:,}", budget_text(rule, "norm")),
            *(f"{rule.numel:,}", f"{rule.pruned:,}", percent(rule.pruned / numel if numel else 0.0)),
        )
        for rule in found.rules
    )
    return plain_table(("rule",), titles, rows)


def outcome_table(report: Report) -> Table:
    """Each tensor that rules reached, after pruning."""
    rows = (
        (
            *(printable(tensor.name), tensor.rule, f"{tensor.pruned:,}"),
            percent(tensor.zeros_after / tensor.numel if tensor.numel else 0.0),
            percent(tensor.energy_kept),
        )
        for tensor in report.tensors
    )
    return plain_table(("tensor", "rule"), ("pruned", "sparsity", "energy kept"), rows)


def budget_text(rule: RuleResult | CheckedRule, score: str) -> str:
    """How many blocks of each scope survive, or from which `score` on."""
    if rule.nnz is None:
        return f"{score} >= {each_text(rule.threshold)}"
    return f"{each_text(rule.nnz)} of {each_text(rule.blocks_per_scope)}"


class Fact(Struct, Generic[Row_contra], frozen=True):
    """A column and its text for a row; it is left out if all its texts are `silent`."""

    column: Column
    text: Callable[[Row_contra], str]
    silent: frozenset[str] | None = None


def filled(facts: Iterable[Fact[Row]], entries: Sequence[Row]) -> tuple[list[Column], list[list[str]]]:
    """The columns that say something anywhere, and a row of them for each entry."""
    texts = [(fact, [fact.text(entry) for entry in entries]) for fact in facts]
    used = [pair for pair in texts if pair[0].silent is None or not pair[0].silent.issuperset(pair[1])]
    return [fact.column for fact, _ in used], [[cells[at] for _, cells in used] for at in range(len(entries))]


INDENT = 2


def indented(part: RenderableType, indent: int = INDENT) -> RenderableType:
    """Something that belongs to what is above it."""
    return Padding(part, (0, 0, 0, indent), expand=False)


def below(line: str, style: str = "", indent: int = INDENT) -> RenderableType:
    """A line of its own that belongs to what is above it."""
    return indented(Text(line, style, overflow="fold"), indent)


_RAGGED = 12  # characters of a cut piece that are rather left out than shown


def shortened(names: Sequence[str], width: int, ellipsis: str = "…") -> list[str]:
    """The names in their order, each in at most `width` columns; unlike ones stay so where that is possible.

    A long name keeps its end. Where several have the same end, they keep what tells them apart as well.

    >>> shortened(["model.layers.10.self_attn.q_proj.weight", "lm_head.weight"], 24)
    ['…self_attn.q_proj.weight', 'lm_head.weight']
    >>> shortened([f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (9, 10)], 28)
    ['…9.self_attn.q_proj.weight', '…10.self_attn.q_proj.weight']
    """
    room = width - cell_len(ellipsis)
    long = {name for name in names if cell_len(name) > width}
    became = {name: ellipsis + _end(name, room) if name in long else name for name in names}
    for group in _alike(became, long):
        spans = _unlike(group)
        became |= {name: _told_apart(name, spans[name], width, ellipsis) for name in group if name in long}
    for group in _alike(became, long):
        # What was gained for one may be lost for another: then at least as much as fits is shown of each.
        became |= {name: ellipsis + _tail(name, room) for name in group if name in long}
    return [became[name] for name in names]


def _alike(became: dict[str, str], long: set[str]) -> list[list[str]]:
    """Names that have become the same, if one of them was shortened."""
    groups: dict[str, list[str]] = {}
    for name, text in became.items():
        groups.setdefault(text, []).append(name)
    return [group for group in groups.values() if len(group) > 1 and not long.isdisjoint(group)]


def _unlike(names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each name the first and the last character that it takes to tell it from the others."""
    ranked = sorted(names)
    first = _alike_up_to(ranked[0], ranked[-1])
    alike = [0, *(_alike_up_to(*pair) for pair in pairwise(ranked)), 0]
    return {name: (first, max(pair)) for name, pair in zip(ranked, pairwise(alike), strict=True)}


def _alike_up_to(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


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


def _end(name: str, width: int) -> str:
    """As much of its end as fits, without the rest of a piece that was cut, if that is short or a number."""
    tail = _tail(name, width)
    ragged, dot, rest = tail.partition(".")
    before = name[: len(name) - len(tail)]
    if dot and rest and not before.endswith(".") and (len(ragged) <= _RAGGED or ragged.isdigit()):
        return rest
    return tail


def _tail(text: str, width: int) -> str:
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


class Column(Struct, frozen=True):
    """A column: its title, where its cells stand, what is under them, the style of its cells.

    Where the table is wider than the terminal, columns of the largest `spare` go first; 0 stays always.
    """

    title: str
    align: Literal["left", "right"] = "right"
    footer: str = ""
    spare: int = 0
    style: str = ""


class FittedTable(Struct, frozen=True):
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
        width, ellipsis = options.max_width, "..." if options.ascii_only else "…"
        stems = self.stems or [""] * len(self.rows)
        cells = [[printable(row[at]) for row in self.rows] for at in range(len(self.columns))]
        cells[:1] = [list(map(add, stems, names)) for names in cells[:1]]
        whole = [_fitted(column, texts) for column, texts in zip(self.columns, cells, strict=True)]
        if _excess(whole, width) > 0:
            whole = [_fitted(one.column, one.cells, broken=True) for one in whole]
        kept = _without_spare(whole, width)
        for texts, styles in _lines(_narrowed(kept, width, ellipsis, stems)):
            yield from _segments(console, texts, styles)
            yield Segment.line()
        left_out = [one.column.title for one in whole if one not in kept]
        if left_out:
            note = f"left out: {', '.join(left_out)}; a wider terminal{self.elsewhere} has them"
            for line in textwrap.wrap(note, width):
                yield from (Segment(line, console.get_style("dim")), Segment.line())


class _Fitted(Struct, frozen=True):
    """One column as it is drawn: lines of its title, cells, footer, none of them wider than `width`."""

    column: Column
    title: list[str]
    cells: list[str]
    footer: str
    width: int


def _lines(columns: Sequence[_Fitted]) -> Iterator[tuple[list[str], list[str]]]:
    """Texts that stand side by side, padded but for the end of the line, and the style of each."""
    bold = [_BOLD] * len(columns)
    lines = [(texts, bold) for texts in zip_longest(*(one.title for one in columns), fillvalue="")]
    styles = [one.column.style for one in columns]
    lines += [(texts, styles) for texts in zip(*(one.cells for one in columns), strict=True)]
    if any(one.footer for one in columns):
        lines.append((tuple(one.footer for one in columns), bold))
    for texts, line_styles in lines:
        pairs = zip(texts, columns, strict=True)
        line = [
            " " * _GAP * (at > 0) + _padded(text, one.width, one.column)
            for at, (text, one) in enumerate(pairs)
        ]
        while line and not line[-1].strip():
            line.pop()
        line[-1:] = [text.rstrip() for text in line[-1:]]
        yield line, line_styles


def _excess(columns: Sequence[_Fitted], width: int) -> int:
    return sum(one.width for one in columns) + _GAP * (len(columns) - 1) - width


def _without_spare(columns: Sequence[_Fitted], width: int) -> list[_Fitted]:
    """Without the columns that the names need the room of: the largest `spare` first, from the right."""
    kept = list(columns)
    while (spare := max((one.column.spare for one in kept[1:]), default=0)) > 0:
        names = kept[0].width
        if names - max(0, _excess(kept, width)) >= min(names, int(width * _ROOM)):
            break
        del kept[max(at for at, one in enumerate(kept) if at and one.column.spare == spare)]
    return kept


def _narrowed(columns: list[_Fitted], width: int, ellipsis: str, stems: Sequence[str]) -> list[_Fitted]:
    """With names as short as they have to be; where that is not enough, other cells end early."""
    narrowed = list(columns)
    others = sorted(range(1, len(columns)), key=lambda at: -columns[at].width)
    for at in (0, *others) if columns else ():
        excess = _excess(narrowed, width)
        if excess > 0:
            room = max(_SHORTEST, narrowed[at].width - excess)
            narrowed[at] = _cut(narrowed[at], room, ellipsis, () if at else stems)
    return narrowed


def _fitted(column: Column, cells: list[str], *, broken: bool = False) -> _Fitted:
    """A column as wide as its widest text; a `broken` title is as narrow as its cells allow, and one word."""
    title, footer = printable(column.title), printable(column.footer)
    widest = max(map(cell_len, (footer, *cells)), default=0)
    lines = [title]
    if broken and cell_len(title) > widest:
        words = title.replace("-", "- ").split()
        lines = textwrap.wrap(title, max(widest, *map(len, words), 1), break_long_words=False)
    return _Fitted(column, lines, cells, footer, max([widest, *map(cell_len, lines)]))


def _cut(column: _Fitted, width: int, ellipsis: str, stems: Sequence[str] = ()) -> _Fitted:
    """The same column with texts of at most `width` columns; `stems` before cells are not shortened.

    A stem that leaves no room for a name is shortened with it.
    """
    *title, footer = shortened([*column.title, column.footer], width, ellipsis)
    cells = list(column.cells)
    lengths = [len(stem) if width - cell_len(stem) >= _SHORTEST else 0 for stem in stems or [""] * len(cells)]
    for length in set(lengths):
        rows = [at for at, one in enumerate(lengths) if one == length]
        names = shortened([cells[at][length:] for at in rows], width - length, ellipsis)
        for at, name in zip(rows, names, strict=True):
            cells[at] = cells[at][:length] + name
    return _Fitted(column.column, title, cells, footer, max(map(cell_len, (*title, footer, *cells))))


def _padded(text: str, width: int, column: Column) -> str:
    spaces = " " * (width - cell_len(text))
    return spaces + text if column.align == "right" else text + spaces


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
    lines: list[str] = []
    writer = csv.writer(_Lines(lines), lineterminator=_QUOTED_END)
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return "".join(lines)


def markdown_text(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> str:
    r"""A table of Markdown with its columns aligned; footers are its last row. Marks in cells are escaped.

    >>> from sparseprune.report.tables import Column
    >>> print(markdown_text([Column("tensor", "left"), Column("zeros")], [["a|b", "7"]]), end="")
    | tensor | zeros |
    |:-------|------:|
    | a\|b   |     7 |
    """
    lines = [[_escaped(column.title) for column in columns]]
    lines += [[_escaped(cell) for cell in row] for row in rows]
    if any(column.footer for column in columns):
        lines.append([f"**{_escaped(column.footer)}**" if column.footer else "" for column in columns])
    widths = [max(3, *(cell_len(row[at]) for row in lines)) for at in range(len(columns))]
    header, *others = ["| " + " | ".join(map(_padded, row, widths, columns)) + " |\n" for row in lines]
    # The colon is on the side that cells stand at.
    rules = [
        f"{'-' * (width + 1)}:" if column.align == "right" else f":{'-' * (width + 1)}"
        for width, column in zip(widths, columns, strict=True)
    ]
    return "".join((header, f"|{'|'.join(rules)}|\n", *others))


class _Lines(Struct, frozen=True):
    """What a CSV writer writes its rows to, one at a time."""

    lines: list[str]

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


def changed_table(removal: Removal) -> FittedTable:
    """Every tensor that was removed, or has another shape or name."""
    rows = []
    for tensor in removal.tensors:
        after, name = tensor.shape_after, tensor.name_after
        renamed = "" if name in (None, tensor.name) else str(name)
        became = "removed" if after is None else shape_text(after) if after != tensor.shape else "as it was"
        rows.append((tensor.name, shape_text(tensor.shape), became, renamed))
    columns = [Column(title, "left") for title in ("tensor", "shape", "becomes", "named")]
    return FittedTable(columns, rows, ", --json")
