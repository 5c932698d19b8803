"""Documents as JSON: the keys in the order of the fields, lists made piece by piece, absent keys."""

import json
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from sparseprune import __version__
from sparseprune.results.fields import Document, Made, OtherWeights
from tests.commands import imported


class Example(Document):
    schema: str = "example"
    numbers: Sequence[float | None]
    files: Sequence[OtherWeights]
    masks: str | None
    peak: int | None = None


def example(**more: object) -> Example:
    files = Made(["a", "b"], lambda name: OtherWeights(path=name, bytes=1))
    return Example(**{"numbers": (0.5, None), "files": files, "masks": None, **more})  # type: ignore[arg-type]


DOCUMENTS: dict[str, dict[str, object]] = {
    "nothing": {},
    "values": {"a": 1, "b": None, "c": "text\nof two lines", "d": 0.1, "é": "\ud800"},
    "empty parts": {"list": [], "object": {}, "tensors": [{}], "groups": [[]]},
    "nested": {
        "totals": {"rows": [1, 2], "by": {"4x4": {"zero": 0}}},
        "tensors": [{"shape": [2, 3]}, {"n": []}],
    },
    "lists of values": {
        "numbers": [1, 2, 3],
        "texts": ["a", "b\n  c"],
        "mixed": [None, [1, [2]], {"a": [3]}],
    },
}


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_pieces_make_up_the_text_of_json(name: str, ensure_ascii: bool) -> None:
    members = DOCUMENTS[name]
    kind: Any = type("Any", (Document,), {"__annotations__": dict.fromkeys(members, object)})
    expected = {"schema": "any", "sparseprune": __version__, **members}
    pieces = kind(schema="any", **members).json_pieces(ensure_ascii=ensure_ascii)
    assert "".join(pieces) == json.dumps(expected, indent=2, ensure_ascii=ensure_ascii)


def test_json_has_the_fields_in_their_order_and_an_indent_of_two() -> None:
    files = [{"path": "a", "bytes": 1}, {"path": "b", "bytes": 1}]
    expected = {"schema": "example", "sparseprune": __version__, "numbers": [0.5, None], "files": files}
    assert example().to_json() == json.dumps({**expected, "masks": None}, indent=2)


def test_a_field_with_the_default_none_is_absent_until_it_has_a_value() -> None:
    assert "peak" not in json.loads(example().to_json())
    assert json.loads(example(peak=0).to_json())["peak"] == 0


def test_empty_lists_are_written_as_json_writes_them() -> None:
    text = example(numbers=(), files=[]).to_json()
    assert text == json.dumps(json.loads(text), indent=2)


def test_records_are_frozen_equal_by_their_fields_and_refuse_other_fields() -> None:
    one = OtherWeights(path="a", bytes=1)
    assert one == OtherWeights(bytes=1, path="a")
    assert hash(one) == hash(OtherWeights(path="a", bytes=1))
    assert one != OtherWeights(path="a", bytes=2)
    assert one != ("a", 1)
    assert repr(one) == "OtherWeights(path='a', bytes=1)"
    with pytest.raises(FrozenInstanceError):
        one.bytes = 2  # type: ignore[misc]
    for wrong in ({"path": "a"}, {"path": "a", "bytes": 1, "size": 1}):
        with pytest.raises(TypeError, match="OtherWeights has the fields path, bytes"):
            OtherWeights(**wrong)


def test_a_number_that_is_not_finite_is_refused() -> None:
    infinite = example(numbers=[float("inf")])
    with pytest.raises(ValueError, match="not JSON compliant"):
        infinite.to_json()
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(infinite.json_lines())


def test_entries_are_made_one_by_one_as_the_text_is_read() -> None:
    made = []

    def note(name: str) -> OtherWeights:
        made.append(name)
        return OtherWeights(path=name, bytes=1)

    pieces = example(files=Made(["a", "b"], note)).json_pieces()
    next(piece for piece in pieces if '"path"' in piece)
    assert made == ["a"]


def test_results_load_neither_torch_nor_numpy_nor_pydantic() -> None:
    found = imported("from sparseprune.results import Comparison, MaskVerification, Report")
    assert found.isdisjoint({"torch", "numpy", "pydantic"})
