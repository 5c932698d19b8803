"""Pages: pictures below each other under a title, with the numbers they were drawn from, and their files.

Owns the page of HTML: one file that asks for nothing from elsewhere, with its style and its script in it
(page.css, page.js). Called by the drawings; canvas.py makes images.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

from msgspec import Struct

from sparseprune.errors import printable
from sparseprune.report.pictures import canvas
from sparseprune.report.pictures.files import form_of, put

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sparseprune.report.pictures.canvas import Sheet

# Colours of lines and letters on a page, which has a light and a dark look; cells keep theirs.
_INKS = re.compile('#(000000|333333|444444|555555)(?=[;"])')
_RULES = re.compile('#dddddd(?=[;"])')


class Numbers(Struct, frozen=True):
    """A table: its titles, and rows of as many texts.

    Rows can be searched, sorted, and chosen by the values of the columns in `choices`; those in `aside` are
    for that alone.
    """

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str = "The numbers"
    choices: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, what there is to see on it in words, and the numbers that it alone was drawn from."""

    figure: Sheet = field(repr=False)
    caption: str
    alt: str
    numbers: tuple[Numbers, ...] = ()


class Page(Struct, frozen=True):
    """Pictures below each other under a title; `totals` are facts on a line of their own.

    `table` has what several pictures show, line by line.
    """

    title: str
    pictures: tuple[Picture, ...]
    totals: tuple[tuple[str, str], ...] = ()
    table: Numbers | None = None


def write(page: Page, path: Path) -> None:
    """The page in the form of the file's ending; captions, totals and numbers are for HTML alone."""
    form = form_of(path)
    if form == ".html":
        put(path, html(page).encode())
        return
    every = form == ".pdf"  # whose figures are pages of their own
    sheets = [
        canvas.headed(picture.figure, page.title) if every or not number else picture.figure
        for number, picture in enumerate(page.pictures)
    ]
    draw = {".png": canvas.png, ".svg": canvas.svg, ".pdf": canvas.pdf}[form]
    put(path, draw(sheets, page.title, " ".join(picture.alt for picture in page.pictures)))


def html(page: Page) -> str:
    """The page as one document of HTML."""
    title = _text(page.title)
    totals = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>\n" for name, value in page.totals
    )
    pictures = "".join(_figure(picture, number) for number, picture in enumerate(page.pictures))
    table = "" if page.table is None else f"<section>\n{_table(page.table)}</section>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>\n{_part('page.css')}</style>\n</head>\n<body>\n"
        '<header>\n<button type="button" id="look" hidden>Colours: automatic</button>\n'
        f"<h1>{title}</h1>\n<dl>\n{totals}</dl>\n</header>\n<main>\n{pictures}{table}</main>\n"
        '<div id="tip" role="status" hidden></div>\n'
        f"<script>\n{_part('page.js')}</script>\n</body>\n</html>\n"
    )


def _part(name: str) -> str:
    return files("sparseprune.report.pictures").joinpath(name).read_text(encoding="utf-8")


def _figure(picture: Picture, number: int) -> str:
    """The drawing stands in a region that scrolls where it is wider than the window."""
    tables = "".join(map(_table, picture.numbers))
    numbers = f"<details>\n<summary>The numbers</summary>\n{tables}</details>\n" if tables else ""
    drawing = _themed(canvas.svg_element(picture.figure, number))
    alt = _text(picture.alt)
    whole = drawing.replace("<svg", f'<svg role="group" aria-label="{alt}"', 1)
    end = whole.rindex("</svg>")
    marked = whole[:end] + canvas.marks_of(picture.figure) + whole[end:]
    return (
        f'<figure>\n<div class="drawing" tabindex="0" role="region" aria-label="{alt}">\n{marked}</div>\n'
        f"<figcaption>{_text(picture.caption)}</figcaption>\n{numbers}</figure>\n"
    )


def _themed(drawing: str) -> str:
    """With the colours of the page for letters and lines, and without a ground of its own."""
    opened = re.sub(r'<g id="p\d+-patch_1">.*?</g>\n?', "", drawing, count=1, flags=re.DOTALL)
    inked = re.sub(
        r"<[^!>][^>]*>", lambda tag: _RULES.sub("var(--rule)", _INKS.sub("var(--ink)", tag[0])), opened
    )
    # Letters without a colour are black.
    return inked.replace('<text style="font', '<text style="fill: var(--ink); font')


def _table(numbers: Numbers) -> str:
    head = "".join(
        f'<th scope="col"{" data-choice" * (title in numbers.choices)}'
        f"{' data-aside' * (title in numbers.aside)}>{_text(title)}</th>"
        for title in numbers.titles
    )
    rows = "".join(_row(row) for row in numbers.rows)
    return (
        f'<div class="numbers">\n<table>\n<caption>{_text(numbers.name)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>\n</div>\n"
    )


def _row(cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in cells) + "</tr>\n"


def _text(text: str) -> str:
    """Any text as HTML: names of tensors may hold tags and line ends."""
    return escape(printable(text))
