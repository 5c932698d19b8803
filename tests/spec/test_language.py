# ruff: noqa: E501  (whole lines, as they are printed)
"""Vars, filters, optional members, borrowed captures, budgets by expression, scores and soft thresholds."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from sparseprune.errors import SpecError
from sparseprune.spec import BoundSpec, Budget, Score, Soft, TensorInfo, bind, parse_spec

CONFIG = {"hidden_size": 32, "num_attention_heads": 4, "text_config": {"n": 3}}
ROWS = """
[scope.rows]
tensors = "layers.{layer}.{name}.weight"
block = [1, -1]
shape = []
nnz = 1
"""
EXPERTS = """
[block.up]
tensors = "l.{layer}.e.{expert}.up"
shape = [-1, -1]
[block.router]
tensors = "l.{layer}.router"
slice = ["expert", ":"]
shape = [-1, -1]
[block_coupling.whole]
blocks = ["up", "router"]
[scope.expert]
block = "whole"
shape = []
"""


def layers(*names: str, count: int = 3, shape: tuple[int, ...] = (8, 4)) -> list[TensorInfo]:
    return [TensorInfo(f"layers.{at}.{name}.weight", "F32", shape) for at in range(count) for name in names]


def experts(layers: int = 2, count: int = 3) -> list[TensorInfo]:
    ups = [
        TensorInfo(f"l.{at}.e.{expert}.up", "F32", (4, 6)) for at in range(layers) for expert in range(count)
    ]
    return [*ups, *(TensorInfo(f"l.{at}.router", "F32", (count, 6)) for at in range(layers))]


def bound(
    text: str,
    tensors: Sequence[TensorInfo],
    config: Mapping[str, Any] | None = None,
    directory: Path = Path(),
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> BoundSpec:
    return bind(parse_spec("version = 1\n" + text, "s", directory, overrides), tensors, config)


def problems(
    text: str,
    tensors: Sequence[TensorInfo] = (),
    config: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] = MappingProxyType({}),
) -> list[str]:
    with pytest.raises(SpecError) as caught:
        bound(text, tensors, config, overrides=overrides)
    return list(caught.value.problems)


def budgets(spec: BoundSpec) -> list[tuple[str, int | None]]:
    return [(instance.label, instance.budget.nnz) for _, instance in spec.instances()]


# ---- vars


@pytest.mark.parametrize(
    ("variables", "overrides", "nnz"),
    [
        ("n = 3", {}, 3),
        ('n = "2 * m"\nm = 2', {}, 4),
        ('n = "keep[1]"\nkeep = [1, "config.text_config.n", true]', {}, 3),
        ('n = "config.head_dim or config.hidden_size // config.num_attention_heads"', {}, 8),
        ("n = \"config.text_config['n']\"", {}, 3),
        ('n = "t.n if 0 else t[\'n\']"\nt = "config.text_config"', {}, None),
        ('n = "t[\'n\']"\nt = "config.text_config"', {}, 3),
        ("n = 3", {"n": "5"}, 5),
        ("n = 3\nm = 2", {"n": "m + 4"}, 6),
        ("n = 3", {"n": "3 + 1"}, 4),
        ('n = "k[0]"\nk = [1]', {"k": "[7, 8]"}, 7),
        ("n = 3", {"n": "config.hidden_size // 4"}, 8),
    ],
)
def test_vars_are_numbers_lists_and_expressions(
    variables: str, overrides: dict[str, str], nnz: int | None
) -> None:
    text = f"[vars]\n{variables}\n" + ROWS.replace("nnz = 1", 'nnz = "n"')
    if nnz is None:
        assert (
            "the attribute .n of anything but config is not allowed"
            in problems(text, layers("a"), CONFIG, overrides=overrides)[0]
        )
    else:
        assert budgets(bound(text, layers("a", count=1), CONFIG, overrides=overrides)) == [
            ("rows[layer=0,name=a]", nnz)
        ]


@pytest.mark.parametrize(
    ("variables", "overrides", "lines"),
    [
        ('a = "b"\nb = "a + 1"', {}, ["s: [vars] a: this depends on itself: a -> b -> a"]),
        ('a = "a"', {}, ["s: [vars] a: this depends on itself: a -> a"]),
        ('keep = 1\na = "kep"', {}, ['s: [vars] a: "kep": unknown name "kep"; did you mean "keep"?']),
        ("a = 1979-05-27", {}, ['s: [vars] a: found "1979-05-27", wanted a number, true or false, an expression in quotes such as "2 * n", or a list of these']),
        ("a = nan", {}, ['s: [vars] a: found NaN, wanted a number, true or false, an expression in quotes such as "2 * n", or a list of these']),
        ("a = { b = 1 }", {}, ['s: [vars] a: found a table, wanted a number, true or false, an expression in quotes such as "2 * n", or a list of these']),
        ("shape = 1", {}, ["s: [vars] shape: shape is a reserved name in expressions: take another one"]),
        ('"a b" = 1', {}, ["s: [vars] a b: the name of a var is made of letters, digits and _"]),
        ("keep = 1", {"kep": "2"}, ['s: --set kep: [vars] has no "kep"; did you mean "keep"?']),
        ("keep = 1", {"keep": "1 +* 2"}, ['s: [vars] keep: "1 +* 2" column 4: this is no expression: invalid syntax']),
        ("keep = 1", {"keep": "1979-05-27"}, ['s: [vars] keep: found "1979-05-27", wanted a number, true or false, an expression in quotes such as "2 * n", or a list of these']),
        ('a = "config.hiden_size"\nb = "a + 1"', {}, ['s: [vars] a: "config.hiden_size" column 1: config has no key "hiden_size"; did you mean "hidden_size"?']),
        ('a = "1 / 0"', {}, ['s: [vars] a: "1 / 0" column 1: this divides by zero']),
        ("layer = 1", {}, ['s: [scope.rows] tensors: the capture "layer" is a var too: rename one']),
    ],
)  # fmt: skip
def test_what_is_no_var_is_a_problem_that_says_why(
    variables: str, overrides: dict[str, str], lines: list[str]
) -> None:
    assert problems(f"[vars]\n{variables}\n{ROWS}", layers("a"), CONFIG, overrides=overrides) == lines


def test_setting_a_var_of_a_spec_without_vars_says_so() -> None:
    assert problems(ROWS, layers("a"), overrides={"n": "1"}) == [
        's: --set n: [vars] has no "n"; the spec has no [vars]; among the shipped specs nofm and vnm have it'
    ]


def test_a_budget_is_set_by_its_table_and_key() -> None:
    for text, nnz in (("3", 3), ("config.num_attention_heads", 4)):
        found = bound(ROWS, layers("a", count=1), CONFIG, overrides={"scope.rows.nnz": text})
        assert budgets(found) == [("rows[layer=0,name=a]", nnz)]


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("scope.rows.nz", "1", 's: --set scope.rows.nz: the spec has no such budget; did you mean "scope.rows.nnz"?'),
        ("scope.rows.sparsity", "1", 's: --set scope.rows.sparsity: the spec has no such budget; did you mean "scope.rows.nnz"?'),
        ("scope.rows.nnz", "-1", "s: [scope.rows] nnz: found -1, wanted an integer of 0 or more, or an expression: how many blocks survive in each scope"),
    ],
)  # fmt: skip
def test_what_is_no_budget_is_not_set(name: str, text: str, line: str) -> None:
    assert problems(ROWS, layers("a"), CONFIG, overrides={name: text}) == [line]


def test_a_long_chain_of_vars_is_no_matter_and_lists_cannot_double_without_end() -> None:
    chain = "\n".join(f'v{at} = "v{at + 1} + 1"' for at in range(2000)) + "\nv2000 = 0"
    assert bound(f"[vars]\n{chain}\n{ROWS}", layers("a"))
    doubling = "v0 = [0]\n" + "\n".join(f'v{at + 1} = ["v{at}", "v{at}"]' for at in range(60))
    assert problems(f"[vars]\n{doubling}\n{ROWS}", layers("a")) == [
        's: [vars] v12: "[...]": this is a list of more than 10000 parts'
    ]


# ---- which tensors


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ('where = "layer >= 1"', ["layer=1,name=a", "layer=1,name=b", "layer=2,name=a", "layer=2,name=b"]),
        ('where = "layer in [0, 2] and name != \'b\'"', ["layer=0,name=a", "layer=2,name=a"]),
        ('where = "shape[1] % 4 == 0 and ndim == 2 and numel == 32 and dtype == \'F32\' and layer == n"', ["layer=1,name=a", "layer=1,name=b"]),
        ('where = "layer < config.text_config.n - 2"', ["layer=0,name=a", "layer=0,name=b"]),
        ('exclude = "**.a.*"', ["layer=0,name=b", "layer=1,name=b", "layer=2,name=b"]),
        ('exclude = ["layers.{at:0|1}.**", "*.2.a.weight"]', ["layer=2,name=b"]),
    ],
)  # fmt: skip
def test_where_and_exclude_take_tensors_out(keys: str, labels: list[str]) -> None:
    text = "[vars]\nn = 1\n" + ROWS.replace("nnz", f"{keys}\nnnz")
    assert [label for label, _ in budgets(bound(text, layers("a", "b"), CONFIG))] == [
        f"rows[{label}]" for label in labels
    ]


def test_a_regex_names_tensors_by_its_groups() -> None:
    text = ROWS.replace(
        'tensors = "layers.{layer}.{name}.weight"', r"regex = 'layers\.(?P<layer>\d+)\.[ab]\.weight'"
    )
    assert [label for label, _ in budgets(bound(text, layers("a", "c", count=2)))] == [
        "rows[layer=0]",
        "rows[layer=1]",
    ]
    assert problems(text, layers("c", count=1)) == [
        r's: [scope.rows] regex: no tensor matches "layers\.(?P<layer>\d+)\.[ab]\.weight"; the nearest names are layers.0.c.weight'
    ]


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ('where = "layr > 1"', ['s: [scope.rows] where: "layr > 1": unknown name "layr"; did you mean "layer"?']),
        ('where = "layer + 1"', ['s: [scope.rows] where: layers.0.a.weight: "layer + 1": this comes to 1, wanted true or false (and 2 more like this)']),
        ('where = "layer > 7"', ['s: [scope.rows] tensors: "layers.{layer}.{name}.weight" matches 3 tensors, of which where leaves none']),
        ('where = "layer > 7"\nexclude = "*.0.**"', ['s: [scope.rows] tensors: "layers.{layer}.{name}.weight" matches 3 tensors, of which exclude and where leave none']),
        ('where = "name > 7"', ['s: [scope.rows] where: layers.0.a.weight: "name > 7" column 8: a text > a number has no meaning (and 2 more like this)']),
        (r"regex = 'a'", ["s: [scope.rows] regex: tensors are named by patterns already: give one of tensors and regex"]),
    ],
)  # fmt: skip
def test_a_filter_that_does_not_work_says_why(keys: str, lines: list[str]) -> None:
    assert problems(ROWS.replace("nnz", f"{keys}\nnnz"), layers("a")) == lines


# ---- optional


COUPLED = """
[block.row]
tensors = "layers.{layer}.up.weight"
shape = [1, -1]
[block.bias]
tensors = "layers.{layer}.up.bias"
shape = [1]
optional = true
[block_coupling.unit]
blocks = ["row", "bias"]
[scope.units]
block = "unit"
shape = []
nnz = 1
"""


def test_an_optional_member_is_left_out_where_it_is_missing() -> None:
    tensors = [*layers("up"), TensorInfo("layers.1.up.bias", "F32", (8,))]
    found = [
        [leaf.label for leaf in instance.scope.leaves] for _, instance in bound(COUPLED, tensors).instances()
    ]
    assert found == [["row[layer=0]"], ["row[layer=1]", "bias[layer=1]"], ["row[layer=2]"]]
    assert len(bound(COUPLED, layers("up")).covered) == 3


def test_an_optional_member_without_its_partner_is_still_an_error() -> None:
    tensors = [*layers("up", count=1), TensorInfo("layers.7.up.bias", "F32", (8,))]
    assert problems(COUPLED, tensors) == [
        's: [block_coupling.unit] blocks: unit[layer=7] has no "row": no tensor matches "layers.{layer}.up.weight" with layer=7'
    ]


def test_a_rule_is_absent_where_all_of_it_is_optional_and_missing() -> None:
    for optional in (
        COUPLED.replace("shape = [1, -1]", "shape = [1, -1]\noptional = true"),
        COUPLED.replace("nnz = 1", "nnz = 1\noptional = true"),
        COUPLED.replace("[scope.units]", "optional = true\n[scope.units]"),
    ):
        assert [rule.name for rule in bound(optional + ROWS, layers("a")).rules] == ["scope.rows"]
        with pytest.raises(
            SpecError,
            match="no rule reaches a tensor: all rules are optional, and the checkpoint has none of their tensors",
        ):
            bound(optional, layers("a"))
    assert len(problems(COUPLED, layers("a"))) == 1


def test_an_optional_rule_of_which_a_part_is_there_is_an_error() -> None:
    text = COUPLED.replace("optional = true\n", "").replace("nnz = 1", "nnz = 1\noptional = true")
    assert problems(text, layers("up", count=1)) == [
        's: [block.bias] tensors: no tensor matches "layers.{layer}.up.bias"; the nearest names are layers.0.up.weight'
    ]


# ---- captures that another member has


def test_a_member_takes_part_once_for_each_value_of_a_capture_that_it_borrows() -> None:
    text = EXPERTS + '[scope_coupling.experts]\nscopes = ["expert"]\nacross = ["expert"]\nnnz = "2 - layer"'
    spec = bound(text, experts())
    assert budgets(spec) == [("experts[layer=0]", 2), ("experts[layer=1]", 1)]
    leaves = spec.rules[0].instances[1].scope.leaves
    assert [(leaf.label, leaf.view_shape, leaf.view_offset) for leaf in leaves if "router" in leaf.label] == [
        (f"router[layer=1,expert={at}]", (1, 6), 6 * at) for at in range(3)
    ]


def test_borrowed_captures_can_be_gathered_across() -> None:
    text = EXPERTS.replace('["up", "router"]', '["up", "router"]\nacross = ["expert"]') + "nnz = 1"
    (first, _) = bound(text, experts()).rules[0].instances
    assert [leaf.label for leaf in first.scope.leaves] == [
        f"{name}[layer=0,expert={at}]" for name in ("up", "router") for at in range(3)
    ]


def test_scopes_can_borrow_too_and_what_nobody_has_is_unknown() -> None:
    scopes = """
    [scope.up]
    tensors = "l.{layer}.e.{expert}.up"
    block = []
    shape = []
    [scope.router]
    tensors = "l.{layer}.router"
    slice = ["expert", ":"]
    block = []
    shape = []
    [scope_coupling.both]
    scopes = ["up", "router"]
    nnz = 5
    """
    assert len(bound(scopes, experts()).rules[0].instances) == 6
    assert problems(scopes.replace('"expert", ":"', '"exprt", ":"'), experts()) == [
        's: [scope.router] slice: "exprt": unknown name "exprt"; did you mean "expert"?'
    ]
    alone = '[scope.router]\ntensors = "l.{layer}.router"\nslice = ["expert", ":"]\nblock = []\nshape = []\nnnz = 1'
    assert problems(alone, experts())[0].startswith(
        's: [scope.router] slice: "expert": unknown name "expert"; there is '
    )


def test_a_row_that_a_slice_does_not_have_is_named() -> None:
    assert problems(EXPERTS + "nnz = 1", [*experts(1), TensorInfo("l.0.e.3.up", "F32", (4, 6))]) == [
        's: [block.router] slice: l.0.router: "expert": this comes to 3, wanted an integer from -3 to 2, as the dimension has 3'
    ]


def test_disjoint_slices_of_one_tensor_are_members_and_overlapping_ones_an_error() -> None:
    text = """
    [block.gate]
    tensors = "layers.{layer}.gate_up.weight"
    slice = ["0:shape[0] // 2", ":"]
    shape = [1, -1]
    [block.up]
    tensors = "layers.{layer}.gate_up.weight"
    slice = ["shape[0] // 2:", ":"]
    shape = [1, -1]
    [block_coupling.channel]
    blocks = ["gate", "up"]
    [scope.mlp]
    block = "channel"
    shape = []
    sparsity = 0.25
    """
    assert budgets(bound(text, layers("gate_up", count=1))) == [("mlp[layer=0]", 3)]
    assert problems(text.replace('"shape[0] // 2:"', '"3:7"'), layers("gate_up", count=1)) == [
        "s: [scope.mlp]: mlp[layer=0] reaches layers.0.gate_up.weight twice: an element may be reached by one rule, once; narrow the patterns"
    ]


# ---- budgets and shapes


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        ('nnz = "keep[layer]"', [Budget(nnz=1), Budget(nnz=2), Budget(nnz=8)]),
        ('sparsity = "0.25 * layer"', [Budget(nnz=8), Budget(nnz=6), Budget(nnz=4)]),
        ('threshold = "layer / 2"', [Budget(threshold=0.0), Budget(threshold=0.5), Budget(threshold=1.0)]),
        ('nnz = "layer + 1"\nmultiple_of = "m"', [Budget(nnz=2), Budget(nnz=2), Budget(nnz=4)]),
        ("sparsity = \"1 if name == 'a' else 0\"", [Budget(nnz=0)] * 3),
    ],
)
def test_a_budget_is_evaluated_for_each_instance(budget: str, wanted: list[Budget]) -> None:
    text = "[vars]\nkeep = [1, 2, 8]\nm = 2\n" + ROWS.replace("nnz = 1", budget)
    spec = bound(text, layers("a"))
    assert [instance.budget for _, instance in spec.instances()] == wanted


@pytest.mark.parametrize(
    ("keys", "dtype", "wanted"),
    [
        ('slice = ["0:4 * layer + 4", ":"]\nblock = [1, -1]', "F32", [((4, 4), (1, 4)), ((8, 4), (1, 4))]),
        ('block = ["layer + 1", 1]', "F32", [((8, 4), (1, 1)), ((8, 4), (2, 1))]),
        ("block = [\"2 if dtype == 'F32' else 4\", 1]", "BF16", [((8, 4), (2, 1)), ((8, 4), (4, 1))]),
    ],
)
def test_tensors_of_one_shape_may_be_looked_at_in_unlike_ways(
    keys: str, dtype: str, wanted: list[object]
) -> None:
    first, second = layers("a", count=2)
    tensors = [first, TensorInfo(second.name, dtype, second.shape)]
    spec = bound(ROWS.replace("block = [1, -1]", keys), tensors)
    leaves = [leaf for _, instance in spec.instances() for leaf in instance.scope.leaves]
    assert [(leaf.view_shape, leaf.shape) for leaf in leaves] == wanted


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ('nnz = "keep[layer]"', 's: [scope.rows] nnz: rows[layer=2,name=a]: "keep[layer]" column 1: keep has 2 items, there is no item 2'),
        ('nnz = "8 + layer // 2"', 's: [scope.rows] nnz: "8 + layer // 2": found 9, wanted 0 to 8: that many blocks has each scope of rows[layer=2,name=a]'),
        ('nnz = "1 - layer"', 's: [scope.rows] nnz: rows[layer=2,name=a]: "1 - layer": this comes to -1, wanted 0 to 8'),
        ('nnz = "1.0 if layer == 2 else 1"', 's: [scope.rows] nnz: rows[layer=2,name=a]: "1.0 if layer == 2 else 1": this comes to 1.0, wanted 0 to 8 (// divides integers)'),
        ('sparsity = "0.6 * layer"', 's: [scope.rows] sparsity: rows[layer=2,name=a]: "0.6 * layer": this comes to 1.2, wanted a number from 0 to 1'),
        ('sparsity = "layer == 2 or 0"', 's: [scope.rows] sparsity: rows[layer=2,name=a]: "layer == 2 or 0": this comes to true, wanted a number from 0 to 1'),
        ('threshold = "1 - layer"', 's: [scope.rows] threshold: rows[layer=2,name=a]: "1 - layer": this comes to -1, wanted 0 or more'),
        ('nnz = 1\nmultiple_of = "2 - layer"', 's: [scope.rows] multiple_of: rows[layer=2,name=a]: "2 - layer": this comes to 0, wanted 1 or more'),
        ('nnz = "shape[0]"', 's: [scope.rows] nnz: "shape[0]": unknown name "shape"; there is "config", "keep", "layer" and "name"'),
    ],
)  # fmt: skip
def test_a_budget_out_of_range_names_the_instance(budget: str, line: str) -> None:
    assert problems("[vars]\nkeep = [1, 1]\n" + ROWS.replace("nnz = 1", budget), layers("a")) == [line]


def test_shapes_are_expressions_so_that_n_of_m_is_one_spec() -> None:
    text = (
        '[vars]\nn = 2\nm = 4\n[scope.s]\ntensors = "*"\nblock = [1, "m // m"]\nshape = [1, "m"]\nnnz = "n"'
    )
    cases: list[tuple[dict[str, str], int, int]] = [({}, 4, 2), ({"n": "3", "m": "8"}, 8, 3)]
    for overrides, blocks, nnz in cases:
        (instance,) = bound(text, [TensorInfo("w", "F32", (4, 16))], overrides=overrides).rules[0].instances
        assert (instance.scope.blocks_per_scope, instance.budget.nnz) == (blocks, nnz)
    assert problems(text, [TensorInfo("w", "F32", (4, 16))], overrides={"m": "0.5 + 1"})[0] == (
        's: [scope.s] block: w: "m // m": this comes to 1.0, wanted an integer of 1 or more, or -1 (// divides integers)'
    )
    assert problems(text, [TensorInfo("w", "F32", (4, 16))], overrides={"m": "-2"}) == [
        's: [scope.s] shape: s: "m": this comes to -2, wanted an integer of 1 or more, or -1'
    ]
    assert problems(text, [TensorInfo("w", "F32", (4, 15))]) == [
        "s: [scope.s] shape: w: dimension 1 of the block grid [4, 15] is 15, which the scope shape [1, 4] cuts in pieces of 4: 15 is not a multiple of 4"
    ]


# ---- scores and modes


@pytest.mark.parametrize(
    ("keys", "score"),
    [
        ("", Score()),
        ("norm = 1", Score(norm=1.0)),
        ('kind = "magnitude"\nnorm = "inf"\nnormalize = "rms"', Score(norm=inf, normalize=True)),
        ('kind = "random"\nseed = 3', Score("random", seed=3)),
        ('kind = "values"\nfile = "a.safetensors"', Score("values", file=Path("/specs/a.safetensors"))),
        (
            'kind = "wanda"\nfile = "../stats"\ninput_dim = 0',
            Score("wanda", file=Path("/specs/../stats"), input_dim=0),
        ),
        ('kind = "obd"\nfile = "/abs"', Score("obd", file=Path("/abs"))),
        ('kind = "blocks"\nfile = "b"', Score("blocks", file=Path("/specs/b"))),
    ],
)
def test_a_score_is_for_all_rules_or_for_one(keys: str, score: Score) -> None:
    spec = bound(f"[score]\n{keys}\n{ROWS}", layers("a"), directory=Path("/specs"))
    assert {instance.score for _, instance in spec.instances()} == {score}
    inline = ROWS.replace("nnz", f"score = {{ {keys.replace(chr(10), ', ')} }}\nnnz")
    spec = bound(f'[score]\nkind = "random"\n{inline}', layers("a"), directory=Path("/specs"))
    assert {instance.score for _, instance in spec.instances()} == {score}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("norm = 3", 'norm: found 3, wanted 1, 2 or "inf"'),
        ("norm = true", 'norm: found true, wanted 1, 2 or "inf"'),
        ("normalize = true", 'normalize: found true, wanted "rms": the root mean square of each block'),
        ('kind = "wnda"', 'kind: found "wnda", wanted one of magnitude, random, values, wanda, obd, blocks, router or reap'),
        ('kind = "random"\nnorm = 1', 'norm: kind = "random" takes no norm: it takes seed'),
        ("seed = 1", 'seed: kind = "magnitude" takes no seed: it takes norm, normalize and nonfinite'),
        ('kind = "wanda"', 'file: missing: kind = "wanda" reads its values from a safetensors file or directory'),
        ('kind = "blocks"\nfile = "a"\ninput_dim = 1', 'input_dim: kind = "blocks" takes no input_dim: it takes file'),
        ('kind = "random"\nseed = -1', "seed: found -1, wanted an integer of 0 or more"),
        ('kind = "values"\nfile = ""', 'file: found "", wanted the path of a safetensors file or directory, relative to the spec'),
        ("nrom = 1", 'nrom: unknown key; did you mean "norm"?'),
    ],
)  # fmt: skip
def test_a_score_takes_the_keys_of_its_kind(keys: str, line: str) -> None:
    assert problems(f"[score]\n{keys}\n{ROWS}") == [f"s: [score] {line}"]
    inline = ROWS.replace("nnz", f"score = {{ {keys.replace(chr(10), ', ')} }}\nnnz")
    assert problems(inline) == [f"s: [scope.rows] score.{line}"]


@pytest.mark.parametrize(
    ("keys", "soft"),
    [
        ("nnz = 1", None),
        ('nnz = 1\nmode = "hard"', None),
        ('nnz = 1\nmode = "soft"', Soft()),
        ('threshold = 0.5\nmode = "soft"\nscale = true', Soft(scale=True)),
        ('sparsity = 0.5\nmode = "soft"\nk_weight = 0.5\nmax_iter = 3\natol = 1e-3\neps = 1e-6', Soft(0.5, False, None, 3, 1e-3, 1e-6)),
        ('nnz = 1\nmode = "soft"\nconditioners = "c.safetensors"', Soft(conditioners=Path("/specs/c.safetensors"))),
    ],
)  # fmt: skip
def test_a_soft_rule_has_its_keys(keys: str, soft: Soft | None) -> None:
    spec = bound(ROWS.replace("nnz = 1", keys), layers("a"), directory=Path("/specs"))
    assert {instance.soft for _, instance in spec.instances()} == {soft}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ('nnz = 1\nmode = "firm"', 'mode: found "firm", wanted "hard" (losers become zero) or "soft" (every block shrinks by the threshold)'),
        ("nnz = 1\nscale = true", 'scale: only mode = "soft" takes this key'),
        ('nnz = 1\nmode = "hard"\nk_weight = 1.0', 'k_weight: only mode = "soft" takes this key'),
        ('threshold = 1\nmode = "soft"\nk_weight = 1.0', "k_weight: only a threshold made from nnz or sparsity takes this key; here it is given"),
        ('nnz = 1\nmode = "soft"\nmax_iter = 0', "max_iter: found 0, wanted an integer of 1 or more"),
        ('nnz = 1\nmode = "soft"\natol = 0', "atol: found 0, wanted a number above 0"),
        ('nnz = 1\nscore = "wanda"', 'score: found "wanda", wanted a table such as { kind = "random", seed = 1 }'),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_with_the_mode_are_refused(keys: str, line: str) -> None:
    assert problems(ROWS.replace("nnz = 1", keys)) == [f"s: [scope.rows] {line}"]


@pytest.mark.parametrize("key", ["mode", "score", "scale"])
def test_an_inner_scope_has_no_method_of_its_own(key: str) -> None:
    value = {"mode": '"soft"', "score": "{ norm = 1 }", "scale": "true"}[key]
    text = ROWS.replace("nnz = 1", f"{key} = {value}")
    assert problems(text + '[scope_coupling.c]\nscopes = ["rows"]\nnnz = 1') == [
        f"s: [scope.rows] {key}: this scope is a member of [scope_coupling.c]: this belongs there"
    ]


# ---- two stacks of one layout


def test_a_stem_tells_two_stacks_apart_and_may_be_empty() -> None:
    text = """
    [block.up]
    tensors = "{stem:**}.layers.{layer}.up.weight"
    shape = [1, -1]
    [block.down]
    tensors = "{stem:**}.layers.{layer}.down.weight"
    shape = [-1, 1]
    [block_coupling.channel]
    blocks = ["up", "down"]
    orders = [[0, 1], [1, 0]]
    [scope.mlp]
    block = "channel"
    shape = []
    nnz = 1
    """
    tensors = [
        TensorInfo(f"{stem}{each.name}", "F32", (8, 4) if "up" in each.name else (4, 8))
        for stem in ("", "vision.")
        for each in layers("up", "down", count=1)
    ]
    assert budgets(bound(text, tensors)) == [("mlp[layer=0]", 1), ("mlp[stem=vision,layer=0]", 1)]
