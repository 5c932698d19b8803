"""`specs`: what ships is listed with one line each and printed as it is."""

from pathlib import Path

from sparseprune.spec import list_specs
from tests.commands import refused, run, silent

SPECS = Path(__file__).parents[2] / "specs"


def test_every_spec_has_one_line() -> None:
    said = silent("specs")
    shown = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert tuple(shown) == list_specs()
    for name, text in shown.items():
        assert (SPECS / f"{name}.toml").read_text().splitlines()[0] == f"# {text}"


def test_a_spec_is_printed_as_it_is() -> None:
    for name in list_specs():
        assert run("specs", name).out == (SPECS / f"{name}.toml").read_text()


def test_an_unknown_name_is_one_line() -> None:
    said = refused("specs", "2of5")
    assert said.err.startswith(
        'sparseprune: "2of5" is neither a file nor a spec that ships with sparseprune; '
    )
    assert "2of4" in said.err
    assert len(said.err.splitlines()) == 1
