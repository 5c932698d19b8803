"""The JSON Schemas of results, made from their classes.

`python -m sparseprune.results.schema` writes the files in report/schemas/ that the package ships. Imports
pydantic, which no command needs for its results: only this command and the tests import this module.
"""

import json
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from sparseprune import results
from sparseprune.results.fields import Document

FOLDER = Path(__file__).parents[1] / "report" / "schemas"


class _Generator(GenerateJsonSchema):
    """Objects have no other keys; those whose default is None may be absent, and are never null."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ANN401, ARG002
        return False

    def field_is_required(self, field: Any, *_: object, **__: object) -> bool:  # noqa: ANN401
        return field["schema"].get("default", MISSING) is not None

    def default_schema(self, schema: Any) -> dict[str, Any]:  # noqa: ANN401
        found = self.generate_inner(schema["schema"])
        if schema["default"] is None:
            rest = next(one for one in found.pop("anyOf") if one != {"type": "null"})
            return {**rest, **found}
        return found

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:  # noqa: ANN401
        return {**super().dataclass_schema(schema), "additionalProperties": False}


def json_schema(kind: type[Document]) -> dict[str, Any]:
    """The JSON Schema of a class of documents; the docstring of a class is its description."""
    found = TypeAdapter(kind).json_schema(schema_generator=_Generator, mode="serialization")
    name = found["properties"]["schema"]["const"]
    return {"$schema": _Generator.schema_dialect, "$id": name, **found}


def schema_files() -> dict[str, str]:
    """The texts of the schema files by their names, such as plan.schema.json."""
    schemas = [json_schema(getattr(results, name)) for name in results.__all__]
    return {
        f"{schema['$id'].split('.')[1]}.schema.json": json.dumps(schema, indent=2) + "\n"
        for schema in schemas
    }


if __name__ == "__main__":
    for name, text in schema_files().items():
        (FOLDER / name).write_text(text)
