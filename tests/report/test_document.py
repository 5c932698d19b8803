"""Documents as text: in pieces, and the same as all at once."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from sparseprune.engine.sequences import Made
from sparseprune.report.document import json_pieces, lines_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DOCUMENTS: dict[str, dict[str, Any]] = {
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
    document = DOCUMENTS[name]
    expected = json.dumps(document, indent=2, ensure_ascii=ensure_ascii)
    assert "".join(json_pieces(document, ensure_ascii=ensure_ascii)) == expected


@pytest.mark.parametrize("count", range(3))
def test_what_is_made_one_at_a_time_is_told_as_a_list(count: int) -> None:
    made: list[int] = []

    def entry(number: int) -> dict[str, int]:
        made.append(number)
        return {"number": number}

    document = {"before": 1, "tensors": Made(range(count), entry), "after": 2}
    listed = document | {"tensors": [{"number": number} for number in range(count)]}
    pieces = json_pieces(document)
    assert made == []
    assert "".join(pieces) == json.dumps(listed, indent=2)
    assert made == list(range(count))
    assert list(lines_of(document)) == list(lines_of(listed))


@pytest.mark.parametrize("pieces", [lines_of, json_pieces])
def test_a_number_that_json_has_no_word_for_is_refused(pieces: Callable[[Any], Iterator[str]]) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(pieces({"tensors": Made([math.nan], lambda number: {"energy": number})}))


def test_what_is_made_is_a_sequence() -> None:
    made = Made(range(5), str)
    assert (len(made), made[0], made[-1], list(made)) == (5, "0", "4", ["0", "1", "2", "3", "4"])
    assert [list(part) for part in (made[1:3], made[::-2], made[7:])] == [["1", "2"], ["4", "2", "0"], []]
    assert made == ["0", "1", "2", "3", "4"]
    assert "3" in made
    assert made != ["0"]
    assert made != 5
    with pytest.raises(IndexError):
        made[5]
