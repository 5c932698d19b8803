"""JSON Schemas made from the classes of results mean what the hand-written ones mean."""

from __future__ import annotations

from typing import Any

import pytest

from sparseprune import results
from sparseprune.results.schema import json_schema
from tests.samples import schema

NAMES = {
    "Comparison": "compare",
    "Inspection": "inspect",
    "MaskVerification": "verify-masks",
    "Plan": "plan",
    "Reapplication": "reapply",
    "Removal": "remove",
    "Report": "report",
    "Statistics": "statistics",
    "Verification": "verify",
}


def alternatives(rule: dict[str, Any], defined: dict[str, Any]) -> list[dict[str, Any]]:
    """A schema as the simple schemas of which a value fits one, each with a type or a constant."""
    if "$ref" in rule:
        rest = {key: value for key, value in rule.items() if key != "$ref"}
        return alternatives({**defined[rule["$ref"].rpartition("/")[2]], **rest}, defined)
    for word in ("oneOf", "anyOf"):
        if word in rule:
            rest = {key: value for key, value in rule.items() if key != word}
            return [found for one in rule[word] for found in alternatives({**rest, **one}, defined)]
    if "enum" in rule:
        return [{"const": value} for value in rule["enum"]]
    if "const" in rule:
        return [{"const": rule["const"]}]
    if isinstance(rule.get("type"), list):
        return [found for kind in rule["type"] for found in alternatives({**rule, "type": kind}, defined)]
    return [rule]


def meaning(rule: Any, defined: dict[str, Any]) -> Any:
    """A schema without descriptions and references: a sorted list of what a value may be."""
    found = [simple(one, defined) for one in alternatives(rule, defined)]
    return sorted(found, key=repr)


def simple(rule: dict[str, Any], defined: dict[str, Any]) -> dict[str, Any]:
    kind = rule.get("type")
    told: dict[str, Any] = {key: rule[key] for key in ("const", "type") if key in rule}
    if told.get("const", "") is None:
        return {"type": "null"}
    if kind in ("integer", "number"):
        told |= {key: rule[key] for key in ("minimum", "maximum") if key in rule}
    if kind == "string":
        told |= {key: rule[key] for key in ("pattern",) if key in rule}
    if kind == "array":
        told |= {key: rule[key] for key in ("minItems", "maxItems") if key in rule}
        told["items"] = meaning(rule["items"], defined) if "items" in rule else None
        told["prefixItems"] = [meaning(one, defined) for one in rule.get("prefixItems", ())]
    if kind == "object":
        told |= {key: rule[key] for key in ("minProperties", "dependentRequired") if key in rule}
        if "propertyNames" in rule:
            names = rule["propertyNames"]
            told["names"] = defined[names["$ref"].rpartition("/")[2]] if "$ref" in names else names
            told["names"] = told["names"]["pattern"]
        told["properties"] = {key: meaning(one, defined) for key, one in rule.get("properties", {}).items()}
        told["required"] = sorted(rule.get("required", ()))
        more = rule.get("additionalProperties", True)
        told["more"] = meaning(more, defined) if isinstance(more, dict) else more
    return told


def same(generated: Any, written: Any, path: str = "") -> Any:
    """The places where two meanings differ."""
    if isinstance(generated, dict) and isinstance(written, dict):
        for key in generated.keys() | written.keys():
            yield from same(generated.get(key, "absent"), written.get(key, "absent"), f"{path}/{key}")
    elif isinstance(generated, list) and isinstance(written, list) and len(generated) == len(written):
        for at, pair in enumerate(zip(generated, written, strict=True)):
            yield from same(*pair, f"{path}/{at}")
    elif generated != written:
        yield path, generated, written


def stricter(name: str, path: str) -> bool:
    """Whether the generated schema says here: counts are integers, rules of `remove` as of `apply`."""
    return "/blocks_per_scope" in path or "/nnz" in path or (name == "remove" and "/rules/" in path)


@pytest.mark.parametrize(("kind", "name"), NAMES.items())
def test_a_generated_schema_means_what_the_written_one_means(kind: str, name: str) -> None:
    generated, written = json_schema(getattr(results, kind)), schema(name)
    found = [meaning(one, one.get("$defs", {})) for one in (generated, written)]
    differences = [one for one in same(*found) if not stricter(name, one[0])]
    assert differences == []
    assert generated["$id"] == written["$id"]
