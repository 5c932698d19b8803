"""Files of pictures: their forms, the same bytes each time, whole or not at all, and the page of HTML."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparseprune.report.pictures import plot_inspection
from sparseprune.report.pictures.charts import Survivors
from sparseprune.results import Inspection
from tests.commands import imported
from tests.report.pictured import decoder

SURVIVORS = [Survivors("scope.<b>w</b>", (2,), [(1, 3), (2, 9)])]
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements and texts of a page; ValueError for tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        if self._open:
            raise ValueError(self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if self._open.pop() != tag:
            raise ValueError(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in {"td", "th"}:
            self.cells.append(data)


def page(tmp_path: Path, found: Inspection, survivors: list[Survivors] | None = None) -> str:
    plot_inspection(found, tmp_path / "out.html", survivors)
    return (tmp_path / "out.html").read_text()


@pytest.mark.parametrize("form", ["png", "svg", "html"])
def test_the_same_document_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    document = decoder(3, lambda layer, number: (layer + number) / 10)
    written = []
    for name in ("one", "two"):
        plot_inspection(document, tmp_path / f"{name}.{form}", SURVIVORS)
        written.append((tmp_path / f"{name}.{form}").read_bytes())
    assert written[0] == written[1]


def test_the_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    code = "from sparseprune.report.pictures import check_picture, plot_inspection, plot_mask"
    assert imported(code).isdisjoint({"torch", "matplotlib.pyplot", "tkinter"})


def test_loads_matplotlib_only_when_a_picture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "matplotlib" not in imported("import sparseprune.report.pictures, sparseprune.cli.app")
