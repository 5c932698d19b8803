"""What `verify` tells: the document, a line for each tensor that fails, tables that fit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from rich.console import Console

from sparseprune.report.coverage import Coverage, LeftOut
from sparseprune.report.document import json_pieces
from sparseprune.report.verification import AskedCheck, broken_line, failures, verify_document, verify_table
from tests.samples import schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    Shape = tuple[int, ...]

COVERED = Coverage("matrices", 0.75, 0.75, (LeftOut("layers.*.up", 1, 4),), 12, 20)
CHECKED = (
    "checked 12 of 20 parameters, 75.00% of the layers' matrices; not reached: 4 parameters of layers.*.up"
)
ASKED = AskedCheck("ckpt", "spec.toml", {"n": "2"}, COVERED)


@dataclass(frozen=True)
class Place:
    instance: str = "proj[layer=0]"
    scope: Shape = (0, 3)
    element: Shape = (0, 12)
    nonzero: int = 3
    allowed: int | None = 2


@dataclass(frozen=True)
class Tensor:
    name: str = "a.weight"
    rule: str = "scope.proj"
    scopes: int = 3072
    broken: int = 12
    torn: int = 0
    allowed: int | None = 2
    threshold: float | None = None
    first: Place | None = field(default_factory=Place)


@dataclass(frozen=True)
class Rule:
    name: str = "scope.proj"
    instances: int = 2
    tensors: int = 2
    scopes: int = 6144
    blocks_per_scope: Shape = (4, 4)
    nnz: tuple[int | None, ...] = (2, 2)
    threshold: tuple[float | None, ...] = (None, None)
    broken: int = 12
    torn: int = 0
    survivors: Mapping[int, int] = field(default_factory=lambda: {3: 12, 0: 2, 2: 6130})
    unchecked: str | None = None


@dataclass(frozen=True)
class Spec:
    rules: tuple[Rule, ...] = (Rule(),)
    tensors: tuple[Tensor, ...] = (Tensor(), Tensor("b.weight", broken=0, first=None))


UNDER_THRESHOLD = Tensor(allowed=None, threshold=0.5, first=Place(allowed=None, nonzero=1))
SOFT = Rule("scope.soft", 1, 3, 0, (1,), (None,), (0.25,), 0, 0, {}, "nothing can be told")


def document_of(*tensors: Tensor) -> dict[str, Any]:
    return verify_document(ASKED, Spec(tensors=tensors))


def as_json(document: Mapping[str, Any]) -> Any:
    return json.loads("".join(json_pieces(document)))


def printed(document: Mapping[str, Any], width: int = 200) -> list[str]:
    stream = StringIO()
    Console(file=stream, width=width, highlight=False).print(verify_table(document))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_a_document_says_all_that_was_found_as_its_schema_has_it() -> None:
    document = verify_document(ASKED, Spec())
    jsonschema.validate(as_json(document), schema("verify"))
    assert document["totals"] == {
        "scopes": 6144,
        "broken": 12,
        "tensors": 2,
        "numel": 20,
        "checked": 12,
        "covers": "matrices",
        "layer_coverage": 0.75,
        "declared_coverage": 0.75,
        "uncovered": [{"name": "layers.*.up", "tensors": 1, "numel": 4}],
    }
    assert (document["input"], document["spec"], document["set"]) == ("ckpt", "spec.toml", {"n": "2"})
    (rule,) = document["rules"]
    assert rule["survivors"] == [[0, 2], [2, 6130], [3, 12]]
    assert (rule["nnz"], rule["blocks_per_scope"], rule["threshold"]) == (2, 4, None)
    first, other = document["tensors"]
    assert first["first"] == {
        "instance": "proj[layer=0]",
        "scope": [0, 3],
        "element": [0, 12],
        "nonzero": 3,
        "allowed": 2,
    }
    assert (other["name"], other["broken"], other["first"]) == ("b.weight", 0, None)


@pytest.mark.parametrize(
    "rule", [SOFT, Rule(nnz=(2, 3), blocks_per_scope=(4, 8)), Rule(nnz=(), threshold=())]
)
def test_every_kind_of_rule_fits_the_schema(rule: Rule) -> None:
    document = verify_document(ASKED, Spec((rule,), (UNDER_THRESHOLD,)))
    jsonschema.validate(as_json(document), schema("verify"))
    assert document["rules"][0]["nnz"] == (None if rule.nnz in {(None,), ()} else [2, 3])


def test_a_document_with_more_than_the_schema_has_is_refused() -> None:
    document = verify_document(ASKED, Spec())
    for broken in (
        document | {"more": 1},
        document | {"totals": {"scopes": -1, "broken": 0, "tensors": 0}},
        document | {"rules": [document["rules"][0] | {"survivors": [[0]]}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(as_json(broken), schema("verify"))


AT = "at [0, 3] (element [0, 12])"
FAILING = [
    (Tensor(), "12 of 3,072 scopes of scope.proj hold more than 2 non-zero blocks", f"the first {AT} has 3"),
    (
        Tensor(broken=1, scopes=1, allowed=1, torn=1),
        "1 of 1 scope of scope.proj holds more than 1 non-zero block",
        f"the first {AT} has 3",
        "1 fused block is not zero here but zero in another tensor",
    ),
    (
        Tensor(allowed=None, torn=5),
        "12 of 3,072 scopes of scope.proj hold too many non-zero blocks",
        f"the first {AT} has 3 where 2 may be",
        "5 fused blocks are not zero here but zero in another tensor",
    ),
    (
        UNDER_THRESHOLD,
        "12 of 3,072 blocks of scope.proj are not zero though they score less than 0.5",
        f"the first is {AT}",
    ),
    (
        replace(UNDER_THRESHOLD, broken=1, threshold=None),
        "1 of 3,072 blocks of scope.proj is not zero though it scores less than the threshold",
        f"the first is {AT}",
    ),
]


@pytest.mark.parametrize(("tensor", "facts"), [(tensor, facts) for tensor, *facts in FAILING])
def test_each_tensor_that_fails_has_one_line(tensor: Tensor, facts: list[str]) -> None:
    document = document_of(tensor, Tensor("fine", broken=0, first=None))
    assert failures(document) == [f"a.weight: {'; '.join(facts)}"]


def test_odd_names_stay_on_one_line() -> None:
    (line,) = failures(document_of(Tensor("odd\nname [red]")))
    assert line.startswith("odd\\nname [red]: 12 of 3,072 scopes")


def test_the_table_has_a_line_for_each_rule_and_each_broken_tensor() -> None:
    document = verify_document(ASKED, Spec((Rule(), SOFT)))
    assert [line.split() for line in printed(document)] == [
        ["rule", "tensors", "scopes", "may", "survive", "fullest", "broken"],
        ["scope.proj", "2", "6,144", "2", "of", "4", "3", "12"],
        ["scope.soft", "3", "0", "score", ">=", "0.25", "not", "checked"],
        [],
        "tensor rule broken of first scope element non-zero allowed".split(),
        "a.weight scope.proj 12 3,072 [0, 3] [0, 12] 3 2".split(),
        [],
        CHECKED.split(),
        "scope.soft is not checked: nothing can be told".split(),
    ]


def test_one_line_sums_up_what_is_broken() -> None:
    document = verify_document(ASKED, Spec((Rule(), SOFT)))
    assert broken_line(document) == "12 of 6,144 scopes are broken, in 1 of 2 tensors"


def test_torn_blocks_have_a_column_where_there_are_some() -> None:
    assert printed(document_of(Tensor(torn=7)))[3].split()[-1] == "torn"
    assert printed(document_of(Tensor(torn=7)))[4].split()[-1] == "7"


@pytest.mark.parametrize(("scopes", "said"), [(6144, "all 6,144 scopes are"), (1, "the one scope is")])
def test_where_nothing_is_broken_that_is_said(scopes: int, said: str) -> None:
    rule = Rule(scopes=scopes, broken=0, survivors={2: scopes})
    document = verify_document(ASKED, Spec((rule,), (Tensor(broken=0, first=None),)))
    assert printed(document)[2:] == [f"{said} as the spec says", CHECKED]
    assert failures(document) == []


def test_budgets_that_differ_are_told_from_the_least_to_the_greatest() -> None:
    rule = Rule(nnz=(2, 1), blocks_per_scope=(4, 1000), broken=0)
    assert "1 to 2 of 4 to 1,000" in printed(verify_document(ASKED, Spec((rule,), ())))[1]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_width_that_it_is_given(width: int) -> None:
    names = ("model.layers.0.self_attn.q_proj.weight", "[red]odd[/red]", "\u5e83\u3044" * 20, "a\nb" * 30)
    document = verify_document(
        ASKED,
        Spec((Rule(), SOFT), tuple(Tensor(name, "scope_coupling.everything", torn=3) for name in names)),
    )
    stream = StringIO()
    console = Console(file=stream, width=width, highlight=False)
    console.print(verify_table(document))
    lines = stream.getvalue().splitlines()
    assert max(console.measure(line).maximum if "[" not in line else len(line) for line in lines) <= width
    assert any("[red]odd[/red]" in line for line in lines)
