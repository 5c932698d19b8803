"""The page of HTML in a browser: three widths, light and dark, and what its script does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sparseprune.report.pictures.charts import Survivors
from sparseprune.report.pictures.results import plot_comparison, plot_inspection
from tests.report.browser import FOUND, Browser, browser
from tests.report.pictured import compared, decoder

pytestmark = pytest.mark.skipif(FOUND is None, reason="there is no chromium on this machine")

LAYERS, KINDS = 3, 4
FIRST = "[...document.querySelectorAll('main > section tbody tr')].filter(row => !row.hidden)"
SEARCH = "document.querySelector('main > section input[type=search]')"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all checks."""
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an inspection, with bars of survivors."""
    path = tmp_path_factory.mktemp("page") / "out.html"
    document = decoder(LAYERS, lambda layer, number: layer / 4 + number / 16)
    plot_inspection(document, path, [Survivors("scope.w", (2,), [(1, 3), (2, 9)])], "2of4")
    return path


@pytest.fixture
def page(started: Browser, path: Path) -> Browser:
    """The page, opened anew on a wide light window."""
    started.look(1400)
    started.open(path)
    started.run("localStorage.clear()")
    started.open(path)
    return started


def cells(page: Browser, column: int) -> list[str]:
    found: list[str] = page.run(f"{FIRST}.map(row => row.cells[{column}].textContent)")
    return found


def typed(page: Browser, text: str) -> None:
    page.run(f"{SEARCH}.value = {text!r}; {SEARCH}.dispatchEvent(new Event('input'))")


@pytest.mark.parametrize("width", [360, 800, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_every_width_in_both_looks_without_an_error_or_a_request(
    page: Browser, path: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    plot_comparison(compared({f"h.{layer}.w": (0.75, 0.5) for layer in range(12)}), tmp_path / "out.html")
    for one in (path, tmp_path / "out.html"):
        page.look(width, scheme)
        page.errors.clear()
        page.asked.clear()
        page.open(one)
        assert page.errors == []
        assert [url for url in page.asked if not url.startswith("data:")] == [one.as_uri()]
        assert page.run("document.documentElement.scrollWidth") <= width
        ground, ink = (
            page.run(f"getComputedStyle(document.body).{of}") for of in ("backgroundColor", "color")
        )
        assert (lightness(ground) > lightness(ink)) is (scheme == "light")
        letter = "getComputedStyle(document.querySelector('.drawing svg text')).fill"
        assert page.run(letter) == ink
        assert page.run("document.querySelector('.scroll table').scrollWidth") <= max(width, 1000)


def lightness(colour: str) -> int:
    return sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(","))


def test_rows_are_cards_with_titles_where_the_window_is_narrow(page: Browser) -> None:
    cell = "document.querySelector('main > section tbody tr').cells[5]"
    title = f"getComputedStyle({cell}, '::before').content"
    assert page.run(title) == "none"
    page.look(360)
    assert page.run(title) == '"elements"'
    assert page.run("document.querySelector('.scroll').scrollWidth") <= 360


def test_a_title_sorts_by_numbers_up_and_then_down(page: Browser) -> None:
    for ending, sign in (("ascending", 1), ("descending", -1)):
        page.run("document.querySelectorAll('main > section th button')[7].click()")
        shares = [float(text) for text in cells(page, 7)]
        assert shares == sorted(shares, reverse=sign < 0)
        assert len(set(shares)) > LAYERS
        sorted_by = "document.querySelectorAll('main > section th')[7].ariaSort"
        assert page.run(sorted_by) == ending


def test_a_title_sorts_by_keys_alone(page: Browser) -> None:
    page.run("document.querySelectorAll('main > section th button')[0].focus()")
    page.press("Enter", "\r")
    names = cells(page, 0)
    assert names[0] == "model.embed_tokens.weight"
    assert names != cells(page, 1)
    assert page.run("document.querySelectorAll('main > section th')[0].ariaSort") == "ascending"


def test_a_search_shows_the_rows_that_have_all_words(page: Browser) -> None:
    typed(page, "Layers.1 proj")
    assert len(cells(page, 0)) == KINDS
    assert all("layers.1." in name for name in cells(page, 0))
    assert page.run("document.querySelector('.controls output').textContent") == f"{KINDS} of 17 rows"
    typed(page, "nothing of that name")
    assert cells(page, 0) == []
    typed(page, "")
    assert len(cells(page, 0)) == 17


def test_filters_go_together_with_each_other_and_the_search(page: Browser) -> None:
    def choose(label: str, value: str) -> None:
        select = f"document.querySelector('select[aria-label=\"Only rows of this {label}\"]')"
        page.run(f"{select}.value = {value!r}; {select}.dispatchEvent(new Event('change'))")

    choose("matrix", "mlp.up_proj.weight")
    assert len(cells(page, 0)) == LAYERS
    choose("layer", "model.layers.2")
    assert cells(page, 0) == ["model.layers.2.mlp.up_proj.weight"]
    typed(page, "down")
    assert cells(page, 0) == []


def test_a_slash_goes_to_the_search_and_escape_empties_it(page: Browser) -> None:
    page.press("/", "/")
    assert page.run(f"document.activeElement === {SEARCH}")
    assert page.run(f"{SEARCH}.value") == ""
    typed(page, "up")
    page.press("Escape")
    assert len(cells(page, 0)) == 17


def test_the_pointer_over_a_cell_tells_what_it_is(page: Browser) -> None:
    assert page.run("document.getElementById('tip').hidden")
    box: Any = page.run(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])"
        "(document.querySelectorAll('.marks rect')[5].getBoundingClientRect())"
    )
    page.point(*box)
    told = page.run("document.getElementById('tip').textContent")
    assert told == "model.layers.1.self_attn.o_proj.weight: share of zeros 31.2%"
    assert not page.run("document.getElementById('tip').hidden")


def test_arrows_go_from_cell_to_cell_and_enter_finds_the_row(page: Browser) -> None:
    page.run("document.querySelector('.marks rect').focus()")
    for key in ("ArrowDown", "ArrowRight", "ArrowRight"):
        page.press(key)
    told = page.run("document.getElementById('tip').textContent")
    assert told.startswith("model.layers.1.mlp.up_proj.weight: ")
    page.press("Enter", "\r")
    assert cells(page, 0) == ["model.layers.1.mlp.up_proj.weight"]


def test_the_switch_goes_from_automatic_to_light_to_dark_and_is_remembered(page: Browser, path: Path) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.look(1400, "dark")
    dark = page.run(ground)
    page.run("document.getElementById('look').click()")
    light = page.run(ground)
    assert lightness(light) > lightness(dark)
    page.open(path)
    assert page.run(ground) == light
    page.look(1400, "light")
    page.run("document.getElementById('look').click()")
    assert page.run(ground) == dark
    page.run("document.getElementById('look').click()")
    assert page.run("document.getElementById('look').textContent") == "Colours: automatic"


def test_drawings_have_a_text_in_their_place(page: Browser) -> None:
    alts: list[str] = page.run("[...document.querySelectorAll('.drawing')].map(one => one.ariaLabel)")
    assert alts[0].startswith("3 layers with 4 kinds of matrices and 1 tensor outside of layers. Share of ")
    assert len(alts) == 2
    assert page.run("document.querySelectorAll('.drawing svg:not([aria-label])').length") == 0
