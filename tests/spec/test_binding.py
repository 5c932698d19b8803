# ruff: noqa: E501, ISC004  (whole lines, as they are printed)
"""Binding: what a spec comes to for the tensors of a checkpoint, and every way in which it does not fit."""

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseprune.errors import SpecError
from sparseprune.spec import (
    BoundBlock,
    BoundBlockCoupling,
    BoundScope,
    BoundScopeCoupling,
    BoundSpec,
    Budget,
    TensorInfo,
    bind,
    parse_spec,
)

SHORT = """
version = 1
[scope.proj]
tensors = "layers.{layer}.{name}_proj.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
CHANNEL = """
version = 1
[block.row]
tensors = "layers.{layer}.up.weight"
shape = [1, -1]
[block.bias]
tensors = "layers.{layer}.up.bias"
shape = [1]
[block.column]
tensors = "layers.{layer}.down.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["row", "bias", "column"]
orders = [[0, 1], [0, 1], [1, 0]]
[scope.mlp]
block = "channel"
shape = [-1, -1]
sparsity = 0.25
"""
EXPERTS = """
version = 1
[block.up]
tensors = "layers.{layer}.experts.{expert}.up.weight"
shape = [-1, -1]
[block.down]
tensors = "layers.{layer}.experts.{expert}.down.weight"
shape = [-1, -1]
[block_coupling.whole]
blocks = ["up", "down"]
[scope.expert]
block = "whole"
shape = []
[scope_coupling.experts]
scopes = ["expert"]
across = ["expert"]
nnz = 3
"""


def tensor(name: str, *shape: int, dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, shape)


def layer(number: int, width: int = 8) -> list[TensorInfo]:
    return [
        tensor(f"layers.{number}.down.weight", 4, width),
        tensor(f"layers.{number}.up.bias", width),
        tensor(f"layers.{number}.up.weight", width, 4),
    ]


def experts(layers: int, count: int) -> list[TensorInfo]:
    return [
        tensor(f"layers.{number}.experts.{expert}.{name}.weight", 6, 4)
        for number in range(layers)
        for expert in range(count)
        for name in ("down", "up")
    ]


def bound(text: str, *tensors: TensorInfo) -> BoundSpec:
    return bind(parse_spec(text), tensors)


def problems(text: str, *tensors: TensorInfo) -> list[str]:
    with pytest.raises(SpecError) as caught:
        bind(parse_spec(text, "s"), tensors)
    return list(caught.value.problems)


def labels(spec: BoundSpec) -> list[str]:
    return [instance.label for _, instance in spec.instances()]


# ---- what comes out


def test_a_short_scope_is_bound_once_for_each_tensor() -> None:
    spec = bound(SHORT, tensor("layers.0.up_proj.weight", 6, 8, dtype="BF16"))
    (rule,) = spec.rules
    (instance,) = rule.instances
    assert rule.name == "scope.proj"
    assert instance.label == "proj[layer=0,name=up]"
    assert instance.captures == (("layer", 0), ("name", "up"))
    assert (instance.budget, instance.sparsity) == (Budget(nnz=2), None)
    block = BoundBlock(instance.label, "layers.0.up_proj.weight", (6, 8), (8, 1), 0, (1, 1))
    assert instance.scope == BoundScope(instance.label, block, (1, 4))
    assert (instance.scope.grid_shape, instance.scope.blocks_per_scope) == ((6, 2), 4)
    assert instance.scope.leaves == (block,)


def test_instances_come_in_the_natural_order_of_captures_whatever_the_order_of_tensors() -> None:
    names = ["layers.10.a_proj.weight", "layers.2.b_proj.weight", "layers.2.a_proj.weight"]
    spec = bound(SHORT, *(tensor(name, 4, 4) for name in names))
    assert labels(spec) == ["proj[layer=2,name=a]", "proj[layer=2,name=b]", "proj[layer=10,name=a]"]
    assert spec.covered == (names[2], names[1], names[0])


def test_without_captures_the_label_is_the_name_of_the_table_or_has_the_tensor() -> None:
    text = SHORT.replace("layers.{layer}.{name}_proj", "*")
    assert labels(bound(text, tensor("a.weight", 4, 4))) == ["proj"]
    assert labels(bound(text, tensor("a.weight", 4, 4), tensor("b.weight", 4, 4))) == [
        "proj[a.weight]",
        "proj[b.weight]",
    ]


def test_only_twins_are_labelled_by_their_tensor() -> None:
    text = SHORT.replace("{name}", "*")
    names = ["layers.0.a_proj.weight", "layers.1.a_proj.weight", "layers.1.b_proj.weight"]
    assert labels(bound(text, *(tensor(name, 4, 4) for name in names))) == [
        "proj[layer=0]",
        "proj[layers.1.a_proj.weight]",
        "proj[layers.1.b_proj.weight]",
    ]


def test_of_a_list_of_patterns_one_has_to_match_and_each_tensor_is_taken_once() -> None:
    text = SHORT.replace('"layers.{layer}.{name}_proj.weight"', '["{name}.weight", "*.weight", "gone.*"]')
    assert labels(bound(text, tensor("a.weight", 4, 4), tensor("b.bias", 4))) == ["proj[name=a]"]


def test_a_coupling_exists_once_for_each_shared_capture_and_pads_the_bias() -> None:
    spec = bound(CHANNEL, *layer(10), *layer(2))
    assert labels(spec) == ["mlp[layer=2]", "mlp[layer=10]"]
    scope = spec.rules[0].instances[0].scope
    assert isinstance(scope, BoundScope)
    fused = scope.block
    assert isinstance(fused, BoundBlockCoupling)
    assert fused.label == "channel[layer=2]"
    assert fused.orders == ((0, 1), (0, 1), (1, 0))
    assert fused.members == (
        BoundBlock("row[layer=2]", "layers.2.up.weight", (8, 4), (4, 1), 0, (1, 4)),
        BoundBlock("bias[layer=2]", "layers.2.up.bias", (8, 1), (1, 1), 0, (1, 1)),
        BoundBlock("column[layer=2]", "layers.2.down.weight", (4, 8), (8, 1), 0, (4, 1)),
    )
    assert (fused.grid_shape, fused.numel_per_block) == ((8, 1), 9)
    assert (scope.grid_shape, scope.blocks_per_scope, scope.shape) == ((1, 1), 8, (8, 1))
    assert spec.rules[0].instances[0].budget == Budget(nnz=6)
    assert spec.rules[0].instances[0].sparsity == 0.25


@pytest.mark.parametrize("order", ["[0]", "[0, 1]"])
def test_the_order_of_a_padded_member_may_leave_out_the_padding(order: str) -> None:
    spec = bound(CHANNEL.replace("[0, 1], [0, 1], [1", f"[0, 1], {order}, [1"), *layer(0))
    assert spec == bound(CHANNEL, *layer(0))


def test_without_orders_grids_align_as_they_are() -> None:
    text = CHANNEL.replace("orders = [[0, 1], [0, 1], [1, 0]]", "").replace("[-1, 1]", "[1, -1]")
    tensors = [*layer(0)[1:], tensor("layers.0.down.weight", 8, 3)]
    fused = bound(text, *tensors).rules[0].instances[0].scope.leaves
    assert [leaf.shape for leaf in fused] == [(1, 4), (1, 1), (1, 3)]


def test_scopes_gathered_across_a_capture_compete_in_natural_order() -> None:
    spec = bound(EXPERTS, *experts(2, 11))
    assert labels(spec) == ["experts[layer=0]", "experts[layer=1]"]
    scope = spec.rules[0].instances[1].scope
    assert isinstance(scope, BoundScopeCoupling)
    assert [member.label for member in scope.members] == [
        f"expert[layer=1,expert={number}]" for number in range(11)
    ]
    assert (scope.grid_shape, scope.blocks_per_scope, len(scope.leaves)) == ((1, 1), 11, 22)
    assert spec.rules[0].name == "scope_coupling.experts"


def test_blocks_gathered_across_a_capture_are_fused_listed_member_first() -> None:
    text = EXPERTS.replace('["up", "down"]', '["up", "down"]\nacross = ["expert"]')
    text = text.replace('across = ["expert"]\nnnz', 'across = ["layer"]\nnnz').replace("nnz = 3", "nnz = 1")
    (instance,) = bound(text, *experts(2, 2)).rules[0].instances
    assert instance.label == "experts"
    assert isinstance(instance.scope, BoundScopeCoupling)
    member = instance.scope.members[0]
    assert (member.label, member.block.label) == ("expert[layer=0]", "whole[layer=0]")
    assert [leaf.tensor for leaf in member.leaves] == [
        f"layers.0.experts.{expert}.{name}.weight" for name in ("up", "down") for expert in (0, 1)
    ]


def test_across_all_gathers_everything_also_what_no_capture_tells_apart() -> None:
    text = """
    version = 1
    [scope.any]
    tensors = ["a.*", "{name}.weight", "scale"]
    block = []
    shape = []
    [scope_coupling.everything]
    scopes = ["any"]
    across = "all"
    sparsity = 0.5
    """
    tensors = [tensor("a.10", 3), tensor("a.9", 2, 2), tensor("b.weight", 2, 3, 2), tensor("scale")]
    (instance,) = bound(text, *tensors).rules[0].instances
    assert instance.label == "everything"
    assert [leaf.tensor for leaf in instance.scope.leaves] == ["a.9", "a.10", "scale", "b.weight"]
    assert {leaf.view_shape for leaf in instance.scope.leaves} == {(3, 1, 1), (2, 2, 1), (2, 3, 2), (1, 1, 1)}
    assert instance.scope.grid_shape == (1, 1, 1)
    assert (instance.scope.blocks_per_scope, instance.budget.nnz) == (20, 10)


def test_a_scope_over_a_coupling_is_padded_with_its_orders() -> None:
    text = (
        CHANNEL.replace("sparsity = 0.25", "")
        + """
    [scope.conv]
    tensors = "layers.{layer}.conv.weight"
    block = [1, -1, -1]
    shape = []
    [scope_coupling.both]
    scopes = ["mlp", "conv"]
    nnz = 5
    """
    )
    (instance,) = bound(text, *layer(0), tensor("layers.0.conv.weight", 5, 3, 3)).rules[0].instances
    assert isinstance(instance.scope, BoundScopeCoupling)
    mlp = instance.scope.members[0]
    assert isinstance(mlp.block, BoundBlockCoupling)
    assert mlp.block.orders == ((0, 1, 2), (0, 1, 2), (1, 0, 2))
    assert mlp.block.grid_shape == (8, 1, 1)
    assert mlp.shape == (8, 1, 1)
    assert instance.scope.blocks_per_scope == 13


def test_tensors_without_dimensions_and_without_elements_are_bound() -> None:
    text = 'version = 1\n[scope.s]\ntensors = "{x}"\nblock = []\nshape = []\nsparsity = 0.5'
    spec = bound(text, tensor("a"), tensor("b", 0, 4))
    scalar, empty = (instance.scope for _, instance in spec.instances())
    assert (scalar.grid_shape, scalar.blocks_per_scope, scalar.leaves[0].view_stride) == ((), 1, ())
    assert (empty.grid_shape, empty.leaves[0].view_stride) == ((0, 1), (4, 1))


@pytest.mark.parametrize(
    ("budget", "nnz"),
    [
        ("nnz = 0", 0),
        ("nnz = 20", 20),
        ("sparsity = 0", 20),
        ("sparsity = 1", 0),
        ("sparsity = 0.24", 16),
        ("sparsity = 0.26", 15),
        ("nnz = 9\nmultiple_of = 8", 16),
        ("nnz = 8\nmultiple_of = 8", 8),
        ("nnz = 17\nmultiple_of = 8", 20),
        ("nnz = 0\nmultiple_of = 8", 0),
        ("sparsity = 0.9\nmultiple_of = 64", 20),
    ],
)
def test_budgets_are_resolved_in_blocks_of_each_scope(budget: str, nnz: int) -> None:
    text = SHORT.replace("[1, 4]", "[]").replace("nnz = 2", budget)
    (rule,) = bound(text, tensor("layers.0.a_proj.weight", 4, 5)).rules
    assert rule.instances[0].budget == Budget(nnz=nnz)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_sparsity_never_asks_for_less_than_nothing_or_more_than_all(sparsity: float, blocks: int) -> None:
    text = SHORT.replace("[1, 4]", "[]").replace("nnz = 2", f"sparsity = {sparsity!r}")
    (rule,) = bound(text, tensor("layers.0.a_proj.weight", 1, blocks)).rules
    nnz = rule.instances[0].budget.nnz
    assert nnz is not None
    assert 0 <= nnz <= blocks


def test_a_threshold_stays_a_threshold() -> None:
    (rule,) = bound(SHORT.replace("nnz = 2", "threshold = 1"), tensor("layers.0.a_proj.weight", 4, 4)).rules
    assert rule.instances[0].budget == Budget(threshold=1.0)


# ---- what does not fit


def test_a_pattern_that_matches_nothing_names_the_nearest_tensors() -> None:
    tensors = [
        tensor(f"model.layers.{at}.{name}_proj.weight", 4, 4) for at in range(99) for name in ("q", "up")
    ]
    assert problems(SHORT, *tensors) == [
        's: [scope.proj] tensors: no tensor matches "layers.{layer}.{name}_proj.weight"; the nearest names are '
        "model.layers.0.q_proj.weight and model.layers.0.up_proj.weight"
    ]
    assert problems(SHORT, tensor("x")) == [
        's: [scope.proj] tensors: no tensor matches "layers.{layer}.{name}_proj.weight"; the first names are x'
    ]
    assert problems(SHORT) == [
        's: [scope.proj] tensors: no tensor matches "layers.{layer}.{name}_proj.weight": the checkpoint has no tensors'
    ]


def test_a_dtype_that_cannot_be_pruned_is_named() -> None:
    assert problems(SHORT, tensor("layers.0.a_proj.weight", 4, 4, dtype="U8")) == [
        "s: [scope.proj] tensors: layers.0.a_proj.weight is U8, which cannot be pruned: narrow the pattern to tensors "
        "of I8, F8_E5M2, F8_E4M3, I16, F16, BF16, I32, F32, F64 or I64"
    ]


@pytest.mark.parametrize(
    ("text", "shape", "line"),
    [
        (SHORT, (4, 6), "[scope.proj] shape: layers.0.a_proj.weight: dimension 1 of the block grid [4, 6] is 6, which "
         "the scope shape [1, 4] cuts in pieces of 4: 6 is not a multiple of 4"),
        (SHORT.replace("[1, 1]", "[3, 1]"), (4, 4), "[scope.proj] block: layers.0.a_proj.weight: dimension 0 of the "
         "tensor [4, 4] is 4, which the block shape [3, 1] cuts in pieces of 3: 4 is not a multiple of 3"),
        (SHORT, (4,), "[scope.proj] block: layers.0.a_proj.weight: block shape [1, 1] has 2 dimensions, the view [4] "
         "has 1: give one extent for each (-1 spans a dimension)"),
        (SHORT.replace("[1, 4]", "[1, 4, 1]"), (4, 4), "[scope.proj] shape: layers.0.a_proj.weight: scope shape "
         "[1, 4, 1] has 3 dimensions, the block grid [4, 4] has only 2"),
        (SHORT.replace("nnz = 2", "nnz = 5"), (4, 4), "[scope.proj] nnz: found 5, wanted 0 to 4: that many blocks has "
         "each scope of proj[layer=0,name=a]"),
    ],
)  # fmt: skip
def test_a_shape_or_budget_that_does_not_fit_is_one_line(
    text: str, shape: tuple[int, ...], line: str
) -> None:
    assert problems(text, tensor("layers.0.a_proj.weight", *shape)) == [f"s: {line}"]


def test_of_many_alike_problems_the_first_is_told() -> None:
    tensors = [tensor(f"layers.{at}.a_proj.weight", 4, 6) for at in range(50)]
    lines = problems(SHORT, *tensors)
    assert len(lines) == 1
    assert lines[0].startswith("s: [scope.proj] shape: layers.0.a_proj.weight: dimension 1 of ")
    assert lines[0].endswith(" (and 49 more like this)")


def test_a_member_that_is_missing_is_named_with_the_instance_and_its_pattern() -> None:
    assert problems(CHANNEL, *layer(0), *layer(1)[1:]) == [
        's: [block_coupling.channel] blocks: channel[layer=1] has no "column": no tensor matches '
        '"layers.{layer}.down.weight" with layer=1'
    ]


def test_a_missing_scope_of_a_coupling_is_named_too() -> None:
    text = """
    version = 1
    [scope.q]
    tensors = "{layer}.q"
    block = [1]
    shape = []
    [scope.k]
    tensors = "{layer}.k"
    block = [1]
    shape = []
    [scope_coupling.qk]
    scopes = ["q", "k"]
    nnz = 1
    """
    assert problems(text, tensor("0.q", 4), tensor("0.k", 4), tensor("1.k", 4)) == [
        's: [scope_coupling.qk] scopes: qk[layer=1] has no "q": no tensor matches "{layer}.q" with layer=1'
    ]


def test_two_tensors_with_the_same_captures_cannot_be_one_member() -> None:
    text = CHANNEL.replace("up.weight", "*.weight").replace("down.weight", "d*.weight")
    assert problems(text, *layer(0)) == [
        's: [block_coupling.channel] blocks: "row" has two tensors with layer=0, layers.0.down.weight and '
        "layers.0.up.weight: capture what tells them apart, or narrow the pattern"
    ]


def test_grids_that_do_not_align_are_named_with_their_members() -> None:
    tensors = [*layer(0)[1:], tensor("layers.0.down.weight", 4, 6)]
    assert problems(CHANNEL, *tensors) == [
        "s: [block_coupling.channel] orders: channel[layer=0]: column[layer=0] has grid [1, 6], which its order "
        "[1, 0] turns into [6, 1]; row[layer=0] gives [8, 1]: all members of a coupling must share one grid"
    ]


def test_a_scope_that_does_not_divide_a_coupling_names_the_coupling() -> None:
    assert problems(CHANNEL.replace("[-1, -1]", "[3, -1]"), *layer(0)) == [
        "s: [scope.mlp] shape: channel[layer=0] (layers.0.up.weight and others): dimension 0 of the block grid [8, 1] "
        "is 8, which the scope shape [3, 1] cuts in pieces of 3: 8 is not a multiple of 3"
    ]


def test_two_rules_that_reach_one_tensor_are_named_with_an_example() -> None:
    text = SHORT + SHORT.replace("version = 1", "").replace("proj]", "again]").replace("{name}", "q")
    tensors = [tensor(f"layers.{at}.{name}_proj.weight", 4, 4) for at in range(3) for name in ("q", "k")]
    assert problems(text, *tensors) == [
        "s: [scope.again]: again[layer=0] reaches layers.0.q_proj.weight (and 2 more tensors), as "
        "proj[layer=0,name=q] of [scope.proj] does: an element may be reached by one rule, once; narrow the patterns"
    ]


def test_two_instances_of_one_rule_that_reach_one_tensor_are_named() -> None:
    text = CHANNEL.replace("layers.{layer}.up.bias", "bias")
    tensors = [*layer(0), *layer(1), tensor("bias", 8)]
    assert problems(text, *tensors) == [
        "s: [scope.mlp]: mlp[layer=0] and mlp[layer=1] both reach bias: an element may be reached by one rule, once; "
        "narrow the patterns"
    ]


def test_one_instance_that_reaches_a_tensor_twice_is_named() -> None:
    text = CHANNEL.replace("layers.{layer}.down.weight", "layers.{layer}.up.weight").replace(
        "[-1, 1]", "[1, -1]"
    )
    text = text.replace("[1, 0]]", "[0, 1]]")
    assert problems(text, *layer(0)) == [
        "s: [scope.mlp]: mlp[layer=0] reaches layers.0.up.weight twice: an element may be reached by one rule, once; "
        "narrow the patterns"
    ]


def test_problems_of_unlike_tables_come_together() -> None:
    text = CHANNEL + SHORT.replace("version = 1", "")
    lines = problems(text, *layer(0)[:2], tensor("layers.0.a_proj.weight", 4, 6))
    assert [line.split(": ")[1] for line in lines] == ["[block.row] tensors", "[scope.proj] shape"]


def test_a_product_of_unlike_captures_is_refused() -> None:
    text = CHANNEL.replace("layers.{layer}.down", "blocks.{block}.down")
    tensors = [tensor(f"blocks.{at}.down.weight", 4, 8) for at in range(100)]
    tensors += [each for at in range(100) for each in layer(at)[1:]]
    assert problems(text, *tensors) == [
        "s: [block_coupling.channel] blocks: the members share so few captures that there would be 10000 instances: "
        "give one name to what belongs together, or gather with across"
    ]


# ---- forms


def test_instances_of_one_form_differ_in_nothing_but_names() -> None:
    spec = bound(SHORT, *[tensor(f"layers.{number}.up_proj.weight", 6, 8) for number in range(3)])
    ((form, members),) = spec.rules[0].forms().items()
    assert [instance.label for instance in members] == labels(spec)
    assert {instance.form for instance in members} == {form}
    (alone,) = bound(SHORT, tensor("layers.2.up_proj.weight", 6, 8)).rules[0].instances
    assert members[2] == alone


@pytest.mark.parametrize(
    ("other", "budget"),
    [
        (tensor("layers.1.up_proj.weight", 6, 4), "nnz = 2"),
        (tensor("layers.1.up_proj.weight", 6, 8, dtype="BF16"), "nnz = 2"),
        (tensor("layers.1.up_proj.weight", 6, 8), 'nnz = "1 + layer"'),
    ],
)
def test_shapes_dtypes_and_captures_that_are_used_keep_forms_apart(other: TensorInfo, budget: str) -> None:
    spec = bound(SHORT.replace("nnz = 2", budget), tensor("layers.0.up_proj.weight", 6, 8), other)
    assert [len(members) for members in spec.rules[0].forms().values()] == [1, 1]


def test_each_form_belongs_to_one_rule() -> None:
    other = SHORT.replace("version = 1\n", "").replace("scope.proj", "scope.gate").replace("_proj", "_gate")
    tensors = [
        tensor(f"layers.{number}.up_{kind}.weight", 6, 8) for number in (0, 1) for kind in ("proj", "gate")
    ]
    first, second = bound(SHORT + other, *tensors).rules
    assert len({*first.forms(), *second.forms()}) == len(first.forms()) + len(second.forms()) == 2


# ---- size


def test_fifty_thousand_tensors_are_bound_in_linear_work() -> None:
    spec = parse_spec(EXPERTS)

    def calls(tensors: list[TensorInfo]) -> int:
        """How many functions are called, which is the same on every machine, busy or not."""
        count = 0

        def each(_frame: object, event: str, _argument: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(each)
        try:
            assert len(bind(spec, tensors).covered) == len(tensors)
        finally:
            sys.setprofile(None)
        return count

    assert calls(experts(100, 250)) < 11 * calls(experts(10, 250))
