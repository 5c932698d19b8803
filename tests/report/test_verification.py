"""What `verify` tells: the document, a line for each tensor that fails, tables that fit."""

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from jsonschema import ValidationError
from rich.console import Console

from sparseprune.execution.verify import Verification as Found
from sparseprune.report.checks import broken_lines, failures, verify_table, verify_totals
from sparseprune.report.coverage import Coverage
from sparseprune.results import Verification
from sparseprune.results.checking import BrokenScope, CheckedRule, CheckedTensor
from sparseprune.results.fields import Uncovered
from tests.commands import as_data, schema

COVERED = Coverage("matrices", 0.75, 0.75, (Uncovered(name="layers.*.up", tensors=1, numel=4),), 12, 20)
CHECKED = (
    "checked 12 of 20 parameters, 75.00% of the layers' matrices; not reached: 4 parameters of layers.*.up"
)


def place_of(nonzero: int = 3, allowed: int | None = 2) -> BrokenScope:
    return BrokenScope(
        instance="proj[layer=0]", scope=(0, 3), element=(0, 12), nonzero=nonzero, allowed=allowed
    )


def tensor_of(name: str = "a.weight", rule: str = "scope.proj", **facts: Any) -> CheckedTensor:
    known: dict[str, Any] = {
        "scopes": 3072,
        "broken": 12,
        "torn": 0,
        "nnz": 2,
        "threshold": None,
        "first": place_of(),
    }
    return CheckedTensor(name=name, rule=rule, **known | facts)


def rule_of(name: str = "scope.proj", **facts: Any) -> CheckedRule:
    known: dict[str, Any] = {
        "instances": 2, "tensors": 2, "scopes": 6144, "blocks_per_scope": 4, "nnz": 2, "threshold": None,
        "broken": 12, "torn": 0, "survivors": ((0, 2), (2, 6130), (3, 12)), "unchecked": None,
    }  # fmt: skip
    return CheckedRule(name=name, **known | facts)


FINE = tensor_of("b.weight", broken=0, first=None)
UNDER_THRESHOLD = tensor_of(nnz=None, threshold=0.5, first=place_of(1, None))
SOFT = rule_of(
    "scope.soft", instances=1, tensors=3, scopes=0, blocks_per_scope=1, nnz=None, threshold=0.25, broken=0,
    survivors=(), unchecked="nothing can be told",
)  # fmt: skip


def found_of(*tensors: CheckedTensor, rules: Sequence[CheckedRule] = (rule_of(),)) -> Verification:
    return Verification(
        input="ckpt",
        spec="spec.toml",
        set={"n": "2"},
        warnings=(),
        files_not_read=(),
        totals=verify_totals(Found(tuple(rules), tensors), COVERED),
        rules=tuple(rules),
        tensors=tensors,
    )


def printed(found: Verification, width: int = 200) -> list[str]:
    stream = StringIO()
    Console(file=stream, width=width, highlight=False).print(verify_table(found))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


def test_the_json_says_all_that_was_found_as_its_schema_has_it() -> None:
    document = as_data(found_of(tensor_of(), FINE))
    schema("verify").validate(document)
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


@pytest.mark.parametrize("rule", [SOFT, rule_of(nnz=(2, 3), blocks_per_scope=(4, 8)), rule_of(nnz=None)])
def test_every_kind_of_rule_fits_the_schema(rule: CheckedRule) -> None:
    document = as_data(found_of(UNDER_THRESHOLD, rules=[rule]))
    schema("verify").validate(document)
    assert document["rules"][0]["nnz"] == (None if rule.nnz is None else [2, 3])


def test_a_document_with_more_than_the_schema_has_is_refused() -> None:
    document = as_data(found_of(tensor_of(), FINE))
    for broken in (
        document | {"more": 1},
        document | {"totals": {"scopes": -1, "broken": 0, "tensors": 0}},
        document | {"rules": [document["rules"][0] | {"survivors": [[0]]}]},
    ):
        with pytest.raises(ValidationError):
            schema("verify").validate(broken)


AT = "at [0, 3] (element [0, 12])"
FAILING = [
    (tensor_of(), "12 of 3,072 scopes of scope.proj hold more than 2 non-zero blocks",
     f"the first {AT} has 3"),
    (
        tensor_of(broken=1, scopes=1, nnz=1, torn=1),
        "1 of 1 scope of scope.proj holds more than 1 non-zero block",
        f"the first {AT} has 3",
        "1 fused block is not zero here but zero in another tensor",
    ),
    (tensor_of(nnz=None, torn=5), "12 of 3,072 scopes of scope.proj hold too many non-zero blocks",
     f"the first {AT} has 3 where 2 may be", "5 fused blocks are not zero here but zero in another tensor"),
    (UNDER_THRESHOLD, "12 of 3,072 blocks of scope.proj are not zero though they score less than 0.5",
     f"the first is {AT}"),
    (
        replace(UNDER_THRESHOLD, broken=1, threshold=None),
        "1 of 3,072 blocks of scope.proj is not zero though it scores less than the threshold",
        f"the first is {AT}",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("tensor", "facts"), [(tensor, facts) for tensor, *facts in FAILING])
def test_each_tensor_that_fails_has_one_line(tensor: CheckedTensor, facts: list[str]) -> None:
    found = found_of(tensor, tensor_of("fine", broken=0, first=None))
    assert failures(found) == [f"a.weight: {'; '.join(facts)}"]


def test_odd_names_stay_on_one_line() -> None:
    (line,) = failures(found_of(tensor_of("odd\nname [red]")))
    assert line.startswith("odd\\nname [red]: 12 of 3,072 scopes")


def test_the_table_has_a_line_for_each_rule_and_each_broken_tensor() -> None:
    found = found_of(tensor_of(), FINE, rules=[rule_of(), SOFT])
    assert [line.split() for line in printed(found)] == [
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
    found = found_of(tensor_of(), FINE, rules=[rule_of(), SOFT])
    assert broken_lines(found) == ["12 of 6,144 scopes are broken, in 1 of 2 tensors"]


def test_torn_blocks_have_a_column_where_there_are_some() -> None:
    assert printed(found_of(tensor_of(torn=7)))[3].split()[-1] == "torn"
    assert printed(found_of(tensor_of(torn=7)))[4].split()[-1] == "7"


@pytest.mark.parametrize(("scopes", "said"), [(6144, "all 6,144 scopes are"), (1, "the one scope is")])
def test_where_nothing_is_broken_that_is_said(scopes: int, said: str) -> None:
    rule = rule_of(scopes=scopes, broken=0, survivors=((2, scopes),))
    found = found_of(tensor_of(broken=0, first=None), rules=[rule])
    assert printed(found)[2:] == [f"{said} as the spec says", CHECKED]
    assert failures(found) == []


def test_budgets_that_differ_are_told_from_the_least_to_the_greatest() -> None:
    rule = rule_of(nnz=(2, 1), blocks_per_scope=(4, 1000), broken=0)
    assert "1 to 2 of 4 to 1,000" in printed(found_of(rules=[rule]))[1]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_width_that_it_is_given(width: int) -> None:
    names = ("model.layers.0.self_attn.q_proj.weight", "[red]odd[/red]", "\u5e83\u3044" * 20, "a\nb" * 30)
    broken = [tensor_of(name, "scope_coupling.everything", torn=3) for name in names]
    found = found_of(*broken, rules=[rule_of(), SOFT])
    stream = StringIO()
    console = Console(file=stream, width=width, highlight=False)
    console.print(verify_table(found))
    lines = stream.getvalue().splitlines()
    assert max(console.measure(line).maximum if "[" not in line else len(line) for line in lines) <= width
    assert any("[red]odd[/red]" in line for line in lines)
