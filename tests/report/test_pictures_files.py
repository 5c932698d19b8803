"""Files of pictures: their forms, the same bytes each time, whole or not at all, and the page of HTML."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread
from msgspec.structs import replace

from sparseprune.errors import SparsepruneError
from sparseprune.report.pictures import files
from sparseprune.report.pictures.charts import Survivors
from sparseprune.report.pictures.files import check_picture
from sparseprune.report.pictures.results import plot_comparison, plot_inspection
from sparseprune.results import Inspection
from tests.commands import imported
from tests.faults import failing
from tests.report.pictured import compared, decoder, facts, inspected

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


@pytest.mark.parametrize("form", ["png", "svg", "pdf", "html"])
def test_the_same_document_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    document = decoder(3, lambda layer, number: (layer + number) / 10)
    written = []
    for name in ("one", "two"):
        plot_inspection(document, tmp_path / f"{name}.{form}", SURVIVORS)
        written.append((tmp_path / f"{name}.{form}").read_bytes())
    assert written[0] == written[1]


def test_the_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.report.pictured import decoder\n"
        "from sparseprune.report.pictures.results import plot_inspection\n"
        "for path in sys.argv[1:]: plot_inspection(decoder(2, lambda *_: 0.5), Path(path))"
    )
    for name, seed in (("one", "1"), ("two", "2")):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / f"{name}.svg"), str(tmp_path / f"{name}.pdf")],
            check=True,
            cwd=tmp_path,
            env=environment | {"HOME": str(tmp_path), "MPLCONFIGDIR": str(tmp_path / "cache")},
        )
    for form in ("svg", "pdf"):
        assert (tmp_path / f"one.{form}").read_bytes() == (tmp_path / f"two.{form}").read_bytes()


def test_a_png_has_all_pictures_below_each_other(tmp_path: Path) -> None:
    document = decoder(2, lambda *_: 0.5)
    plot_inspection(document, tmp_path / "one.png")
    plot_inspection(document, tmp_path / "two.png", SURVIVORS)
    one, two = (imread(tmp_path / name) for name in ("one.png", "two.png"))
    assert two.shape[0] > one.shape[0]
    narrow = min(one.shape[1], two.shape[1])
    assert np.array_equal(two[: one.shape[0], :narrow], one[:, :narrow])
    corner = two[-1, -1]
    assert corner[:3].tolist() == [1, 1, 1]


def test_an_svg_has_all_pictures_within_its_frame(tmp_path: Path) -> None:
    plot_inspection(decoder(2, lambda *_: 0.5), tmp_path / "out.svg", SURVIVORS)
    root = ET.parse(tmp_path / "out.svg").getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    space = "{http://www.w3.org/2000/svg}"
    top = 0.0
    parts = root.findall(f"{space}g")
    for part in parts:
        (inner,) = part.findall(f"{space}svg")
        wide, high = float(inner.attrib["width"]), float(inner.attrib["height"])
        assert part.attrib["transform"] == f"translate(0 {top:.2f})"
        assert inner.attrib["viewBox"].split()[2:] == [inner.attrib["width"], inner.attrib["height"]]
        assert wide <= width + 0.01
        top += high
    assert len(parts) == 2
    assert abs(top - height) < 0.05


def test_ids_in_an_svg_are_unlike_and_all_that_is_referred_to_is_there(tmp_path: Path) -> None:
    plot_inspection(decoder(2, lambda *_: 0.5), tmp_path / "out.svg", SURVIVORS)
    text = (tmp_path / "out.svg").read_text()
    ids = re.findall(r' id="([^"]*)"', text)
    used = re.findall(r'(?:url\(|href=")#([^")]*)', text)
    assert len(ids) == len(set(ids))
    assert used
    assert set(used) <= set(ids)


def test_every_form_tells_its_title_and_what_is_seen(tmp_path: Path) -> None:
    document = inspected([facts(f"h.{layer}.w", 0.25 + layer / 4) for layer in range(2)], "some/model")
    title = "Sparsity of model, spec 2of4"
    seen = "2 layers with 1 kind of matrices. Share of zeros 25% to 50%."
    for form in ("png", "svg", "pdf", "html"):
        plot_inspection(document, tmp_path / f"out.{form}", None, "2of4")
        content = (tmp_path / f"out.{form}").read_bytes()
        assert title.encode() in content
        assert seen.encode() in content


def test_a_pdf_has_a_page_for_each_picture_and_no_date(tmp_path: Path) -> None:
    plot_inspection(decoder(2, lambda *_: 0.5), tmp_path / "out.pdf", SURVIVORS)
    content = (tmp_path / "out.pdf").read_bytes()
    assert content.startswith(b"%PDF-")
    assert len(re.findall(rb"/Type /Page\b", content)) == 2
    assert b"Date" not in content


def test_a_page_is_one_file_that_asks_for_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = page(tmp_path, decoder(2, lambda *_: 0.5), SURVIVORS)
    parsed = Page(text)
    assert not {"link", "iframe", "object", "embed", "img", "base"} & {tag for tag, _ in parsed.elements}
    for _, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name != "src"
            if name not in {"xmlns", "xmlns:xlink"}:
                assert "//" not in (value or "")
    left = re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
    assert not re.search(r"https?:|@import|url\((?!#)|fetch\(|XMLHttpRequest|import\(|WebSocket", left)


def test_a_page_shows_totals_captions_and_every_number(tmp_path: Path) -> None:
    parsed = Page(page(tmp_path, decoder(2, lambda layer, number: layer / 4 + number / 8), SURVIVORS))
    assert "Sparsity of model" in parsed.text
    assert "share of zeros" in parsed.text.lower()
    tags = [tag for tag, _ in parsed.elements]
    assert tags.count("figure") == tags.count("figcaption") == 2
    assert tags.count("svg") == 2
    at = parsed.cells.index("model.layers.1.self_attn.o_proj.weight")
    where = ["model.layers.1", "self_attn.o_proj.weight", "10x100", "BF16", "1,000"]
    assert parsed.cells[at + 1 : at + 9] == [*where, "375", "0.375", "unstructured"]
    at = parsed.cells.index("scope.<b>w</b>")
    assert parsed.cells[at : at + 8] == ["scope.<b>w</b>", "2", "1", "3", "scope.<b>w</b>", "2", "2", "9"]


def test_a_cell_of_a_drawing_says_what_it_is(tmp_path: Path) -> None:
    parsed = Page(page(tmp_path, decoder(2, lambda layer, number: layer / 4 + number / 8)))
    labels = [of["aria-label"] for tag, of in parsed.elements if tag == "rect" and "aria-label" in of]
    assert "model.layers.1.self_attn.o_proj.weight: share of zeros 37.5%" in labels


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", 'h.0."><img src=x onerror=y>', "a&b", "<!--"])
def test_names_are_texts_and_never_tags(tmp_path: Path, name: str) -> None:
    document = inspected([facts(name, 0.5), facts("h.1.b", 0.5)], path=f"{name}/model")
    parsed = Page(page(tmp_path, document, [replace(SURVIVORS[0], rule=name)]))
    tags = {tag for tag, _ in parsed.elements}
    assert "img" not in tags
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert name in parsed.text
    plot_inspection(document, tmp_path / "out.svg", SURVIVORS)
    ET.parse(tmp_path / "out.svg")  # would fail on a name that is taken for markup


def test_a_page_of_a_comparison_tells_its_totals(tmp_path: Path) -> None:
    plot_comparison(compared({"h.0.w": (0.875, 0.25)}), tmp_path / "out.html")
    parsed = Page((tmp_path / "out.html").read_text())
    assert "pruned compared with dense" in parsed.text
    assert "90.00%" in parsed.text  # the energy kept
    assert {"0.875", "0.375", "0.25"} <= set(parsed.cells)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("out.jpg", "ends in .jpg; wanted .png, .svg, .pdf or .html"),
        ("out", "has no ending; wanted .png, .svg, .pdf or .html"),
        (".png", "has no ending"),
        ("nowhere/out.png", "there is no folder"),
        ("folder.svg", "this is a folder"),
    ],
)
def test_a_file_that_cannot_be_is_told(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(SparsepruneError, match=re.escape(said)) as told:
        check_picture(tmp_path / name)
    assert str(told.value).startswith(f"--plot {tmp_path / name}: ")


@pytest.mark.parametrize("name", ["out.png", "OUT.PNG", "out.svg", "a.b.HTML"])
def test_a_file_that_can_be_is_let_pass_and_not_touched(tmp_path: Path, name: str) -> None:
    check_picture(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_says_what_to_install_where_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SparsepruneError) as told:
        check_picture(tmp_path / "out.png")
    assert str(told.value) == (
        "--plot needs matplotlib: pip install 'sparseprune[plot]' (in a clone: '.[plot]')"
    )
    assert told.value.exit_code == 2


def test_replaces_a_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    path.write_text("old")
    plot_inspection(decoder(1, lambda *_: 0.5), path)
    assert "<svg" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_could_not_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.svg"
    path.write_text("old")

    monkeypatch.setattr(Path, "replace", failing(OSError, 28, "No space left on device"))
    with pytest.raises(OSError, match="No space") as told:
        files.put(path, b"new")
    assert told.value.filename == str(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real.svg").write_text("old")
    (tmp_path / "link.svg").symlink_to("real.svg")
    files.put(tmp_path / "link.svg", b"new")
    assert (tmp_path / "link.svg").is_symlink()
    assert (tmp_path / "real.svg").read_bytes() == b"new"


def test_drawing_asks_for_no_display_and_no_torch() -> None:
    code = "from sparseprune.report.pictures import mask, results"
    assert imported(code).isdisjoint({"torch", "matplotlib.pyplot", "tkinter"})


def test_loads_matplotlib_only_when_a_picture_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "matplotlib" not in imported("import sparseprune.report.pictures, sparseprune.cli.app")
