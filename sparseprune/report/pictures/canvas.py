"""The canvas of pictures: figures, their marks, and images of them as PNG, SVG and PDF, in matplotlib.

Owns fonts and settings, and that the same figures give the same bytes. Knows nothing of what is drawn; called
by the drawings and by page.py, which makes HTML.
"""

from __future__ import annotations

import io
import re
import warnings
from contextlib import contextmanager
from html import escape
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.image import imsave
from msgspec import Struct

from sparseprune.errors import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.backend_bases import RendererBase
    from numpy.typing import NDArray


DPI = 150
MARGIN = 0.12  # inches around all that is drawn
_POINTS = 72
_HEADING_ROOM, _HEADING_LETTER = 0.2, 0.098  # inches above what is drawn, and of one letter
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
    "pdf.fonttype": 42,  # letters that stay letters: searched, copied, edited
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


class Mark(Struct, frozen=True):
    """What a place on a figure stands for: `text` says it, `name` is what it is called in the table.

    The place is a rectangle in units of the axes: left, low, right, high; grown by `around` points.
    """

    axes: Axes
    place: tuple[float, float, float, float]
    text: str
    name: str
    around: float = 0.0


class Sheet(Figure):
    """A figure that knows what places on it stand for."""

    def __init__(self) -> None:
        super().__init__(figsize=(10, 10), dpi=DPI)
        self.marks: list[Mark] = []


def blank() -> Sheet:
    """An empty figure; axes are placed on it in inches (`axes_at`), and at last it is `fitted`."""
    figure = Sheet()
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


def headed(figure: Sheet, title: str) -> Sheet:
    """The same figure under a heading, with lines as long as the figure is wide."""
    box = figure.get_tightbbox(_renderer(figure))
    down = figure.get_size_inches()[1]
    letters = max(48, int((box.x1 - box.x0) / _HEADING_LETTER))
    lines = wrap(printable(title), letters, break_on_hyphens=False)
    axes = axes_at(figure, float(box.x0), float(down - box.y1) - _HEADING_ROOM, 4, 0.02)
    axes.set_axis_off()
    axes.text(0, 0, "\n".join(lines), va="bottom", fontsize=11, fontweight="bold", linespacing=1.3)
    return fitted(figure)


def fitted(figure: Sheet) -> Sheet:
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


def png(figures: Sequence[Sheet], title: str, description: str) -> bytes:
    """All figures below each other in one image; viewers find both texts in its chunks."""
    images = [_pixels(figure) for figure in figures]
    wide = max(image.shape[1] for image in images)
    padded = [
        np.pad(image, ((0, 0), (0, wide - image.shape[1]), (0, 0)), constant_values=255) for image in images
    ]
    buffer = io.BytesIO()
    whole = np.ascontiguousarray(np.concatenate(padded))
    texts: Any = {"Title": _plain(title), "Description": _plain(description), "Software": None}
    imsave(buffer, whole, format="png", dpi=DPI, metadata=texts)
    return buffer.getvalue()


def pdf(figures: Sequence[Sheet], title: str, description: str) -> bytes:
    """A page for each figure, as large as it is; nothing in it tells when it was made."""
    texts = {"Title": printable(title), "Subject": printable(description), "Creator": None, "Producer": None}
    buffer = io.BytesIO()
    with PdfPages(buffer, metadata={**texts, "CreationDate": None}) as pages:
        for figure in figures:
            pages.savefig(figure)
    return buffer.getvalue()


def svg(figures: Sequence[Sheet], title: str, description: str) -> bytes:
    """All figures below each other in one document, which readers of screens call by its title."""
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
        f' viewBox="0 0 {wide:.2f} {high:.2f}" version="1.1" role="img"'
        ' aria-labelledby="title description">\n'
        f'<title id="title">{escape(printable(title))}</title>\n'
        f'<desc id="description">{escape(printable(description))}</desc>\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n'
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}{"".join(parts)}</svg>\n'.encode()


def marks_of(figure: Sheet) -> str:
    """The marks of a figure as transparent rectangles of SVG, in the units of its view box."""
    high, scale = figure.get_size_inches()[1] * _POINTS, _POINTS / figure.dpi
    lines = []
    for mark in figure.marks:
        (x0, y0), (x1, y1) = mark.axes.transData.transform([mark.place[:2], mark.place[2:]]) * scale
        left, top = min(x0, x1) - mark.around, high - max(y0, y1) - mark.around
        wide, tall = abs(x1 - x0) + 2 * mark.around, abs(y1 - y0) + 2 * mark.around
        text, name = escape(printable(mark.text)), escape(printable(mark.name))
        lines.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{tall:.1f}"'
            f' tabindex="-1" role="img" aria-label="{text}" data-name="{name}"></rect>\n'
        )
    return f'<g class="marks" fill="transparent">\n{"".join(lines)}</g>\n' if lines else ""


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


def _plain(text: str) -> str:
    """Without letters that the chunks of a PNG cannot hold."""
    return printable(text).encode("latin-1", "replace").decode("latin-1")


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
