"""The shipped JSON Schemas are those that the classes of results give."""

from importlib.resources import files

import pytest

from sparseprune.results.schema import schema_files

SCHEMAS = schema_files()


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_shipped_schema_is_what_its_class_gives(name: str) -> None:
    shipped = files("sparseprune.report").joinpath("schemas", name).read_text()
    assert shipped == SCHEMAS[name], "run: python -m sparseprune.results.schema"


def test_no_other_schema_is_shipped() -> None:
    assert {file.name for file in files("sparseprune.report").joinpath("schemas").iterdir()} == {*SCHEMAS}
