"""The canvas of pictures: pages, colours and axes, in matplotlib."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from msgspec import Struct

from sparseprune.errors import printable
from sparseprune.report.pictures.files import form_of, put

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from numpy.typing import NDArray


DPI = 150
MARGIN = 0.12  # inches around all that is drawn
_POINTS = 72
_WIDEST = 65_000  # pixels, what a PNG can be
_FONT = "DejaVu Sans"  # matplotlib brings it along; Verdana is as wide
_SETTINGS = {
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#555555",
    "axes.unicode_minus": True,
    "figure.dpi": DPI,
    "font.family": [_FONT],
    "font.size": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "sparseprune",
    "text.parse_math": False,  # a $ in a tensor's name is a $
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


@contextmanager
def settings() -> Iterator[None]:
    """The defaults of matplotlib, with our own settings, afterwards as it was before.

    Letters that its font lacks are drawn as boxes, and nobody is warned of it.
    """
    with warnings.catch_warnings(), style.context(["default", _SETTINGS]):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def blank() -> Figure:
    """An empty figure; axes are placed on it in inches (`axes_at`), and at last it is `fitted`."""
    figure = Figure(figsize=(10, 10), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def axes_at(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes whose frame lies so many inches from the left, and down from the top: anywhere, also outside.

    Moved to the nearest whole pixels, so that lines and areas of whole pixels are sharp.
    """
    across, down = figure.get_size_inches()
    left, top, width, height = (pixels(length) for length in (left, top, width, height))
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def pixels(length: float) -> float:
    """The nearest length, in inches, that is a whole number of pixels, and one at least if it is not 0."""
    return (max(1, round(length * DPI)) if length > 0 else round(length * DPI)) / DPI


def depth(figure: Figure) -> float:
    """How many inches below the top of the figure the lowest thing on it lies."""
    box = figure.get_tightbbox(_renderer(figure))
    return float(figure.get_size_inches()[1] - box.y0)


def fitted(figure: Figure) -> Figure:
    """The same figure, grown or shrunk to all that is on it and a margin."""
    box = figure.get_tightbbox(_renderer(figure))
    old = figure.get_size_inches()
    begin = np.floor((np.array([box.x0, box.y0]) - MARGIN) * DPI) / DPI
    size = np.ceil((np.array([box.x1, box.y1]) + MARGIN - begin) * DPI) / DPI
    places = [axes.get_position(original=True) for axes in figure.axes]
    figure.set_size_inches(*size)
    for axes, place in zip(figure.axes, places, strict=True):
        left, bottom = (np.array([place.x0, place.y0]) * old - begin) / size
        width, height = np.array([place.width, place.height]) * old / size
        axes.set_position((left, bottom, width, height))
    return figure


def png(figures: Sequence[Figure]) -> bytes:
    """All figures below each other in one image."""
    images = [_pixels(figure) for figure in figures]
    wide = max(image.shape[1] for image in images)
    padded = [
        np.pad(image, ((0, 0), (0, wide - image.shape[1]), (0, 0)), constant_values=255) for image in images
    ]
    buffer = io.BytesIO()
    whole = np.ascontiguousarray(np.concatenate(padded))
    imsave(buffer, whole, format="png", dpi=DPI)
    return buffer.getvalue()


def svg(figures: Sequence[Figure]) -> bytes:
    """All figures below each other in one document."""
    sizes = [figure.get_size_inches() * _POINTS for figure in figures]
    wide, high = max(size[0] for size in sizes), sum(size[1] for size in sizes)
    parts, top = [], 0.0
    for number, (figure, size) in enumerate(zip(figures, sizes, strict=True)):
        element = svg_element(figure, number)
        # Inside, a point is a unit of the view box; "pt" would be that of the page, which is larger.
        inner = re.sub(r"^<svg[^>]*>", lambda tag: tag[0].replace('pt"', '"'), element)
        parts.append(f'<g transform="translate(0 {top:.2f})">\n{inner}</g>\n')
        top += size[1]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.2f}pt" height="{high:.2f}pt"'
        f' viewBox="0 0 {wide:.2f} {high:.2f}" version="1.1">\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n'
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{"".join(parts)}</svg>\n'.encode()


def svg_element(figure: Figure, number: int) -> str:
    """One figure as an `svg` element whose ids are no other's; `number` tells them apart.

    Attributes that hold an id are the only place where these words stand between quotes.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    element = text[text.index("<svg") :]
    return re.sub(r"<[^!>][^>]*>", lambda tag: _adapted(tag[0], number), element)


def _adapted(tag: str, number: int) -> str:
    """A tag with ids of its own, with fonts for those who have not ours, without seams between cells."""
    renamed = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>p{number}-", tag)
    renamed = re.sub(r'^<g id="p\d+-QuadMesh_\d+"', r'\g<0> shape-rendering="crispEdges"', renamed)
    return renamed.replace(f"'{_FONT}'", f"'{_FONT}', Verdana, sans-serif")


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    """The figure as (rows, columns, 4); less fine where it is too large for the format."""
    canvas: Any = FigureCanvasAgg(figure)  # has no types
    finest = _WIDEST / max(figure.get_size_inches())
    figure.set_dpi(min(DPI, finest))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba()).copy()


def _renderer(figure: Figure) -> RendererBase:
    canvas: Any = FigureCanvasAgg(figure)
    renderer: RendererBase = canvas.get_renderer()
    return renderer


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


class Numbers(Struct, frozen=True):
    """A table: its titles, and rows of as many texts."""

    titles: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure, what there is to see on it, and the numbers that it was drawn from."""

    figure: Figure = field(repr=False)
    caption: str
    numbers: tuple[Numbers, ...] = ()


class Page(Struct, frozen=True):
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
