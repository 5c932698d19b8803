"""Groups of tensors: by layer, by module, by rule, and how facts add up."""

from math import prod
from typing import Any

import pytest

from sparseprune.report.inspection import (
    NO_RULE,
    grouped,
    grouping_of,
    layer_of,
    module_of,
    rules_of_report,
    rules_of_spec,
    summed,
)
from sparseprune.results.measuring import (
    InspectedGroup,
    InspectedTensor,
    RuntimeCount,
    RuntimeVerdict,
    ZeroBlocks,
)
from sparseprune.spec import TensorInfo, bind, parse_spec

PATTERNS = ["1:2", "2:4"]


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", "model.layers.*.mlp.up_proj"),
        ("model.layers.3.mlp.up_proj.bias", "model.layers.3", "model.layers.*.mlp.up_proj"),
        ("model.layers.10.mlp.experts.7.w1.weight", "model.layers.10", "model.layers.*.mlp.experts.*.w1"),
        ("model.layers.0.experts.gate_up_proj", "model.layers.0", "model.layers.*.experts.gate_up_proj"),
        ("model.layers.0.q.weight_scale", "model.layers.0", "model.layers.*.q"),
        ("model.embed_tokens.weight", "model.embed_tokens", "model.embed_tokens"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("layer1.0.conv1.weight", "layer1.0", "layer1.*.conv1"),
        ("layer1.0.bn1.running_mean", "layer1.0", "layer1.*.bn1"),
        ("bn1.num_batches_tracked", "bn1", "bn1"),
        ("0.up.weight", "0", "*.up"),
        ("0", "0", "*"),
        ("weight", "weight", "weight"),
        (".weight", ".weight", ".weight"),
        ("norm", "norm", "norm"),
        ("", "", ""),
        ("a.٣.weight", "a.٣", "a.٣"),
    ],
)
def test_a_name_belongs_to_a_layer_and_to_a_module(name: str, layer: str, module: str) -> None:
    assert (layer_of(name), module_of(name)) == (layer, module)


def test_groups_stand_in_their_natural_order() -> None:
    names = ["norm.weight", "h.10.w", "h.9.w", "h.9.v"]
    assert list(dict.fromkeys(grouping_of("layer", names).groups.values())) == ["h.9", "h.10", "norm"]


def test_rules_stand_in_their_order_and_what_none_reaches_comes_last() -> None:
    names = ["a", "b", "c", "d"]
    grouping = grouping_of("rule", names, {"d": "scope.z", "b": "scope.a", "c": "scope.z", "gone": "scope.q"})
    assert dict(grouping.groups) == {"c": "scope.z", "d": "scope.z", "b": "scope.a", "a": NO_RULE}
    assert list(dict.fromkeys(grouping.groups.values())) == ["scope.z", "scope.a", NO_RULE]


def test_rules_of_a_spec_are_those_that_reach_a_tensor() -> None:
    text = """
    version = 1
    [scope.top]
    tensors = "{layer}.up.weight"
    slice = ["0:4", ":"]
    block = [1, 1]
    shape = [1, 4]
    nnz = 2
    [scope.bottom]
    tensors = "{layer}.up.weight"
    slice = ["4:8", ":"]
    block = [1, 1]
    shape = [1, 4]
    nnz = 1
    """
    tensors = [TensorInfo(name, "F32", (8, 8)) for name in ("0.up.weight", "0.down.weight")]
    assert rules_of_spec(bind(parse_spec(text, "spec"), tensors, None)) == {
        "0.up.weight": "scope.top, scope.bottom"
    }


@pytest.mark.parametrize(
    ("report", "rules"),
    [
        ({"tensors": [{"name": "a", "rule": "x"}, {"name": "b", "rule": "y"}]}, {"a": "x", "b": "y"}),
        ({"tensors": [{"name": "a"}, {"rule": "x"}, 3, {"name": "b", "rule": 4}]}, {}),
        ({"tensors": "a"}, {}),
        ({}, {}),
    ],
)  # fmt: skip
def test_rules_of_a_report_are_read_with_care(report: dict[str, Any], rules: dict[str, str]) -> None:
    assert rules_of_report(report) == rules


def tensor(
    name: str, shape: tuple[int, ...], zeros: int | None, patterns: tuple[str, ...] = (), **facts: Any
) -> InspectedTensor:
    is_known = zeros is not None and len(shape) == 2
    return InspectedTensor(
        name=name,
        dtype="F32",
        shape=shape,
        numel=prod(shape),
        zeros=zeros,
        sparsity=None,
        nonfinite=None if zeros is None else 1,
        patterns=patterns,
        rows=shape[0] if is_known else None,
        zero_rows=1 if is_known else None,
        columns=shape[1] if is_known else None,
        zero_columns=0 if is_known else None,
        zero_slices=None,
        zero_blocks={"4x4": ZeroBlocks(zero=1, of=3)} if is_known else {},
        **facts,
    )


def test_facts_of_several_tensors_add_up() -> None:
    tensors = [
        tensor("a", (4, 4), 8, ("1:2", "2:4")),
        tensor("b", (8, 4), 16, ("2:4",)),
        tensor("c", (4,), 0),
        tensor("d", (0, 4), 0),
    ]
    assert summed("all", tensors, PATTERNS) == InspectedGroup(
        name="all",
        tensors=4,
        matrices=3,
        numel=52,
        zeros=24,
        sparsity=24 / 52,
        nonfinite=4,
        patterns=("2:4",),
        rows=12,
        zero_rows=3,
        columns=12,
        zero_columns=0,
        zero_blocks={"4x4": ZeroBlocks(zero=3, of=9)},
    )


def test_what_cannot_be_looked_at_is_unknown_and_satisfies_nothing() -> None:
    unknown = tensor("f4", (4, 4), None)
    group = summed("", [unknown], PATTERNS)
    assert (group.numel, group.zeros, group.sparsity, group.nonfinite, group.rows) == (16, *[None] * 4)
    group = summed("", [unknown, tensor("a", (4, 4), 8, ("1:2", "2:4"))], PATTERNS)
    assert (group.zeros, group.sparsity, group.patterns, group.rows) == (8, 0.5, (), 4)


def test_vectors_satisfy_no_pattern_and_have_no_rows() -> None:
    group = summed("", [tensor("norm", (4,), 4)], PATTERNS)
    assert (group.matrices, group.patterns, group.rows, group.zero_blocks) == (0, (), None, {})


def test_runtimes_count_the_matrices_that_they_can_use() -> None:
    can = {"asp": RuntimeVerdict(eligible=True, reason=None)}
    cannot = {"asp": RuntimeVerdict(eligible=False, reason="x")}
    tensors = [
        tensor("a", (4, 4), 8, runtimes=can),
        tensor("b", (4, 4), 8, runtimes=cannot),
        tensor("c", (4,), 8, runtimes=cannot),
    ]
    assert summed("", tensors, PATTERNS).runtimes == {"asp": RuntimeCount(eligible=1, of=2)}


def test_every_tensor_is_in_one_group() -> None:
    tensors = [tensor(name, (4, 4), 8) for name in ("h.0.a", "h.1.a", "h.1.b", "norm")]
    groups = grouped(tensors, grouping_of("layer", [one.name for one in tensors]), PATTERNS)
    assert [(group.name, group.tensors, group.numel) for group in groups] == [
        ("h.0", 1, 16), ("h.1", 2, 32), ("norm", 1, 16),
    ]  # fmt: skip
