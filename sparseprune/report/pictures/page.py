"""A page of pictures: figures with captions and the numbers behind them, written as the file's ending says.

Owns the page of HTML: one file, no script, nothing from elsewhere. Called by what draws.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from sparseprune.errors import printable
from sparseprune.report.pictures.canvas import png, svg, svg_element
from sparseprune.report.pictures.files import form_of, put

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; --line: #ccc; --quiet: #555; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --quiet: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1.5rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { font-size: 1.15rem; font-variant-numeric: tabular-nums; margin: 0; }
figure { margin: 2rem 0; }
figcaption { margin: .5rem 0; max-width: 50rem; }
.drawing { background: #fff; border-radius: 4px; overflow-x: auto; padding: .5rem; }
.drawing svg { display: block; }
.numbers { margin: .5rem 0 1rem; max-height: 30rem; overflow: auto; }
summary { color: var(--quiet); cursor: pointer; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .15rem .6rem; text-align: right; }
th, td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table: its titles, and rows of as many texts."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, what there is to see on it, and the numbers that it was drawn from."""

    figure: Figure = field(repr=False)
    caption: str
    numbers: tuple[Numbers, ...] = ()


@dataclass(frozen=True, slots=True)
class Page:
    """Pictures below each other under a title; `totals` are facts on a line of their own."""

    title: str
    pictures: tuple[Picture, ...]
    totals: tuple[tuple[str, str], ...] = ()


def write(page: Page, path: Path) -> None:
    """The page in the form of the file's ending; titles, captions and numbers are for HTML alone."""
    figures = [picture.figure for picture in page.pictures]
    form = form_of(path)
    if form == ".png":
        put(path, png(figures))
    elif form == ".svg":
        put(path, svg(figures))
    else:
        put(path, html(page).encode())


def html(page: Page) -> str:
    """The page as one document of HTML."""
    title = _text(page.title)
    totals = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>\n" for name, value in page.totals
    )
    pictures = "".join(_figure(picture, number) for number, picture in enumerate(page.pictures))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{title}</h1>\n<dl>\n{totals}</dl>\n{pictures}</body>\n</html>\n"
    )


def _figure(picture: Picture, number: int) -> str:
    tables = "".join(map(_table, picture.numbers))
    numbers = f"<details>\n<summary>The numbers</summary>\n{tables}</details>\n" if tables else ""
    return (
        f'<figure>\n<div class="drawing">\n{svg_element(picture.figure, number)}</div>\n'
        f"<figcaption>{_text(picture.caption)}</figcaption>\n{numbers}</figure>\n"
    )


def _table(numbers: Numbers) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in numbers.titles)
    rows = "".join(_row(row) for row in numbers.rows)
    table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"
    return f'<div class="numbers">\n{table}\n</div>\n'


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>\n"


def _text(text: str) -> str:
    """Any text as HTML: names of tensors may hold tags and line ends."""
    return escape(printable(text))
