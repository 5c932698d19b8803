"""The document of `inspect`: its schema, its totals, its sheet, and the tables that are made of it."""

import io
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from jsonschema import ValidationError
from msgspec.structs import replace
from rich.console import Console

from sparseprune.execution.inspect import BlockShape, Pattern, Questions, TensorFacts, Zeros
from sparseprune.report.inspect_table import columns_and_rows, inspect_table
from sparseprune.report.inspection import (
    Grouping,
    fields_of,
    grouping_of,
    make_inspection,
    sheet_of,
)
from sparseprune.report.runtimes import runtimes_of
from sparseprune.results import Inspection
from tests.commands import as_data, schema

QUESTIONS = Questions((Pattern(2, 4), Pattern(1, 4, 0)), (BlockShape(4, 4),))
NORM = TensorFacts("norm.weight", "F32", (8,), 8, 0, 0, slices=(Zeros(0, 8),), blocks=None)
HALF = TensorFacts(
    "h.0.up.weight", "BF16", (64, 64), 4096, 2048, 0, ("2:4", "2:4@0"), (Zeros(1, 64), Zeros(2, 64)),
    Zeros(1, 64), Zeros(2, 64), {"4x4": Zeros(3, 256)},
)  # fmt: skip
DENSE = replace(HALF, name="h.1.up.weight", zeros=0, patterns=(), rows=Zeros(0, 64), columns=Zeros(0, 64))
PLAIN = replace(DENSE, name="plain", rows=Zeros(0, 64), columns=Zeros(0, 64), blocks={"4x4": Zeros(0, 256)})
PACKED = TensorFacts("q.weight", "F4", (4, 4), 16, blocks=None)
FACTS = (NORM, HALF, DENSE, PACKED)


def inspected(*facts: TensorFacts, by: str | None = None, runtimes: str | None = None) -> Inspection:
    grouping: Grouping | None = None if by is None else grouping_of(by, [one.name for one in facts])
    asked = () if runtimes is None else runtimes_of(runtimes)
    found = make_inspection("m", facts, QUESTIONS, asked, grouping)
    schema("inspect").validate(as_data(found))
    return found


def document(*facts: TensorFacts, **asked: Any) -> Any:
    return as_data(inspected(*facts, **asked))


def printed(found: Inspection, width: int = 120) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as captured:
        console.print(inspect_table(found))
    return captured.get().splitlines()


def test_entries_tell_all_facts_and_only_the_patterns_that_were_asked_for() -> None:
    norm, half, _, packed = document(*FACTS)["tensors"]
    assert half == {
        "name": "h.0.up.weight",
        "dtype": "BF16",
        "shape": [64, 64],
        "numel": 4096,
        "zeros": 2048,
        "sparsity": 0.5,
        "nonfinite": 0,
        "patterns": ["2:4"],
        "rows": 64,
        "zero_rows": 1,
        "columns": 64,
        "zero_columns": 2,
        "zero_slices": [1, 2],
        "zero_blocks": {"4x4": {"zero": 3, "of": 256}},
        "holds": "weights",
    }
    assert (norm["rows"], norm["zero_slices"], norm["zero_blocks"]) == (None, [0], {})
    assert {key: packed[key] for key in ("zeros", "sparsity", "nonfinite", "zero_slices", "zero_blocks")} == {
        "zeros": None,
        "sparsity": None,
        "nonfinite": None,
        "zero_slices": None,
        "zero_blocks": {},
    }


def test_totals_are_over_all_tensors() -> None:
    assert document(*FACTS)["totals"] == {
        "tensors": 4,
        "matrices": 3,
        "uncounted": 1,
        "numel": 8216,
        "pruned": 2048,
        "sparsity": 2048 / 8216,
        "nonfinite": 0,
        "patterns": {"2:4": 1, "1:4@0": 0},
        "rows": 128,
        "zero_rows": 1,
        "columns": 128,
        "zero_columns": 2,
        "zero_blocks": {"4x4": {"zero": 6, "of": 512}},
    }


def test_groups_are_there_when_asked_for_and_beside_the_tensors() -> None:
    found = document(*FACTS, by="module")
    assert (found["by"], [group["name"] for group in found["groups"]]) == ("module", ["h.*.up", "norm", "q"])
    assert len(found["tensors"]) == 4
    assert found["groups"][2]["zeros"] is None
    assert "groups" not in document(*FACTS)


@pytest.mark.parametrize("by", [None, "layer", "module", "rule"])
@pytest.mark.parametrize("facts", [(), (NORM,), (PACKED,), FACTS], ids=["none", "vector", "packed", "all"])
def test_every_document_fits_the_schema_and_has_tables(
    facts: tuple[TensorFacts, ...], by: str | None
) -> None:
    found = inspected(*facts, by=by, runtimes="all")
    titles, rows = sheet_of(found)
    assert {len(row) for row in rows} <= {len(titles)}
    assert len(rows) == len(found.tensors if found.groups is None else found.groups)
    assert printed(found)
    assert (found.totals.runtimes or {})["asp"].of == sum(len(one.shape) > 1 for one in facts)


def undescribed(rules: Any, where: str, defined: Mapping[str, Any]) -> Iterator[str]:
    """Keys of a schema that say nothing of themselves, nor what they refer to."""
    if not isinstance(rules, dict):
        return
    for key, rule in rules.get("properties", {}).items():
        named = rule.get("$ref", "").rpartition("/")[2]
        if not rule.keys() & {"description", "const"} and "description" not in defined.get(named, {}):
            yield f"{where}.{key}"
        yield from undescribed(rule, f"{where}.{key}", defined)
    for key in ("items", "additionalProperties"):
        yield from undescribed(rules.get(key), f"{where}[]", defined)
    for key, rule in rules.get("$defs", {}).items():
        yield from undescribed(rule, key, defined)


@pytest.mark.parametrize("name", ["inspect", "compare"])
def test_every_key_of_a_document_is_described_in_its_schema(name: str) -> None:
    rules = schema(name).schema
    assert list(undescribed(rules, name, rules.get("$defs", {}))) == []


def test_keys_without_a_description_are_found() -> None:
    rules: dict[str, Any] = {
        "properties": {
            "a": {"description": "a"},
            "b": {"items": {"properties": {"c": {"$ref": "#/$defs/d"}}}, "description": "b"},
        },
        "$defs": {"d": {"properties": {"e": {}}}},
    }
    assert list(undescribed(rules, "x", rules["$defs"])) == ["x.b[].c", "d.e"]


def test_a_document_that_is_wrong_does_not_fit_the_schema() -> None:
    for wrong in ({"zeros": -1}, {"sparsity": 2}, {"patterns": ["2of4"]}, {"more": 1}):
        found = document(HALF)
        found["tensors"][0] |= wrong
        with pytest.raises(ValidationError):
            schema("inspect").validate(found)


def test_the_sheet_has_the_same_titles_whatever_there_is() -> None:
    titles, rows = sheet_of(inspected(HALF, NORM, runtimes="asp"))
    assert sheet_of(inspected(runtimes="asp")) == (titles, [])
    assert dict(zip(titles, rows[0], strict=True)) == {
        "name": "h.0.up.weight", "dtype": "BF16", "shape": "64x64", "numel": 4096, "zeros": 2048,
        "sparsity": 0.5, "nonfinite": 0, "patterns": ("2:4",), "rows": 64, "zero_rows": 1, "columns": 64,
        "zero_columns": 2, "zero_slices": (1, 2), "zero_blocks_4x4": 3, "zero_blocks_4x4_of": 256,
        "runtimes_asp": True, "runtimes_asp_reason": None,
    }  # fmt: skip
    assert dict(zip(titles, rows[1], strict=True))["zero_blocks_4x4"] is None


def test_fields_for_requirements_are_flat_names_of_the_sheet() -> None:
    titles, _ = sheet_of(inspected(HALF))
    assert set(fields_of(QUESTIONS)) <= set(titles)
    assert "zero_blocks_4x4" in fields_of(QUESTIONS)


def test_the_table_leaves_out_what_it_has_nothing_to_say_of() -> None:
    columns, rows = columns_and_rows(inspected(NORM, PLAIN))
    assert [column.title for column in columns] == ["tensor", "dtype", "shape", "zeros", "sparsity"]
    assert rows == [
        ["norm.weight", "F32", "8", "0", "0.00%"],
        ["plain", "BF16", "64x64", "0", "0.00%"],
    ]
    columns, rows = columns_and_rows(inspected(*FACTS, replace(NORM, name="bad", nonfinite=2)))
    assert [column.title for column in columns][5:] == [
        "patterns", "zero rows", "zero columns", "zero 4x4", "not finite",
    ]  # fmt: skip
    assert rows[0][5:] == ["", "", "", "", "0"]
    assert rows[1][5:] == ["2:4", "1", "2", "3", "0"]
    assert rows[3][3:] == ["?", "?", "", "", "", "", ""]
    assert rows[4][9] == "2"


def test_runtimes_are_columns_and_their_reasons_stand_below_the_most_frequent_first() -> None:
    more = [replace(DENSE, name=f"h.{at}.up.weight") for at in (2, 3)]
    lines = printed(inspected(*FACTS, *more, runtimes="torch-cutlass"), 140)
    assert lines[0].endswith("torch-cutlass")
    cells = {line.split()[0]: line.split()[-1] for line in lines[1:7]}
    assert (cells["norm.weight"], cells["h.0.up.weight"], cells["h.1.up.weight"]) == ("-", "yes", "no")
    assert lines[-3:] == [
        "torch-cutlass: 1 of 5 matrices (needs CUDA, compute capability 8.x)",
        "  h.1.up.weight and 2 more: is not 2:4 along the input dimension",
        "  q.weight: F4 is not supported, wanted F16, BF16, I8 or F32",
    ]


def test_what_a_runtime_needs_is_told_for_the_dtypes_of_matrices() -> None:
    eight = replace(DENSE, name="w", dtype="F8_E4M3")
    vector = replace(DENSE, name="v", dtype="BF16", shape=(64,), numel=64)
    found = document(eight, vector, runtimes="torch-cusparselt")["totals"]["runtimes"]["torch-cusparselt"]
    assert found["device"] == "CUDA, compute capability 8.9 and above, with cuSPARSELt 0.8"


def test_many_reasons_are_cut_and_counted() -> None:
    facts = [replace(DENSE, name=f"w{at}", shape=(1 + at, 64), numel=64 + at * 64) for at in range(9)]
    lines = printed(inspected(*facts, runtimes="torch-cutlass"))
    assert lines[-1] == "  3 matrices more: for other reasons, which --json has"


def test_what_was_not_looked_at_is_told() -> None:
    lines = printed(inspected(*FACTS))
    assert lines[-1] == "not looked at: 1 tensor of F4, whose elements are no whole bytes"
    assert lines[-2] == "satisfied: 2:4 by 1 tensor"
