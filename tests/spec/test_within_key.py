# ruff: noqa: E501, ISC004  (whole lines, as they are printed)
"""The key `within`: what nested scopes are bound to, what bounds their budgets, and what is refused."""

from itertools import combinations, pairwise, product
from math import comb, prod
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparseprune.engine.grids import surviving
from sparseprune.errors import SpecError
from sparseprune.spec import (
    BoundInstance,
    BoundScopeCoupling,
    BoundSpec,
    Budget,
    TensorInfo,
    bind,
    parse_spec,
)
from sparseprune.spec.bound import Reconstruct
from sparseprune.spec.knobs import budgets_of, find_knobs, forms_of, turned, with_budgets
from sparseprune.spec.rebuilding import Rebuilding, rebuilt

UP, DOWN = 'tensors = "layers.{layer}.up.weight"\n', 'tensors = "layers.{layer}.down.weight"\n'
V_N_M = f"""
version = 1
[scope.fine]
{UP}block = [1, 1]
shape = [1, 8]
nnz = 2
within = "coarse"
[scope.coarse]
{UP}block = [16, 1]
shape = [1, 8]
nnz = 4
"""
CHANNELS = f"""
[block.up]
{UP}shape = [1, -1]
[block.down]
{DOWN}shape = [-1, 1]
[block_coupling.channel]
blocks = ["up", "down"]
orders = [[0, 1], [1, 0]]
[scope.channels]
block = "channel"
shape = []
sparsity = 0.25
"""
INSIDE = f"""
[scope.pattern]
tensors = "layers.{{layer}}.{{name:up|down}}.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
within = "channels"
[scope.row]
{DOWN}block = [1, 1]
shape = [1, -1]
[scope_coupling.rows]
scopes = ["row"]
across = ["layer"]
sparsity = 0.5
within = "pattern"
"""


def layers(count: int = 2, rows: int = 32, columns: int = 16) -> list[TensorInfo]:
    return [
        TensorInfo(f"layers.{layer}.{name}.weight", "F32", shape)
        for layer in range(count)
        for name, shape in (("up", (rows, columns)), ("down", (columns, rows)))
    ]


def bound(text: str, *tensors: TensorInfo) -> BoundSpec:
    return bind(parse_spec(text), tensors or layers())


def problems(text: str, *tensors: TensorInfo) -> list[str]:
    with pytest.raises(SpecError) as caught:
        bind(parse_spec(text, "s"), tensors or layers())
    return [line.removeprefix("s: ") for line in caught.value.problems]


def of_rule(spec: BoundSpec, name: str) -> list[BoundInstance]:
    return [one for rule, one in spec.instances() if rule.name == name]


# ---- what comes out


def test_v_n_m_is_two_rules_of_which_one_is_within_the_other() -> None:
    spec = bound(V_N_M)
    assert [(rule.name, rule.within) for rule in spec.rules] == [
        ("scope.fine", "scope.coarse"),
        ("scope.coarse", None),
    ]
    assert spec.levels("scope.fine") == ("scope.coarse", "scope.fine")
    assert spec.levels("scope.coarse") == ("scope.coarse",)
    assert [one.budget for one in of_rule(spec, "scope.fine")] == [Budget(nnz=2)] * 2
    assert [one.budget for one in of_rule(spec, "scope.coarse")] == [Budget(nnz=4)] * 2
    assert len({one.form for _, one in spec.instances()}) == 2


def test_patterns_lie_in_channels_and_a_coupling_lies_in_the_patterns() -> None:
    spec = bound("version = 1\n" + CHANNELS + INSIDE)
    three = ("scope.channels", "scope.pattern", "scope_coupling.rows")
    assert spec.levels("scope_coupling.rows") == three
    assert spec.levels("scope.pattern") == three[:2]
    (rows,) = of_rule(spec, "scope_coupling.rows")
    assert isinstance(rows.scope, BoundScopeCoupling)
    assert (rows.budget, rows.sparsity) == (Budget(nnz=32, share=0.5), 0.5)
    assert [one.budget for one in of_rule(spec, "scope.pattern")] == [Budget(nnz=2)] * 4
    assert {one.budget.share for one in of_rule(spec, "scope.channels")} == {None}


def test_a_name_means_the_coupling_where_a_scope_has_it_too() -> None:
    text = V_N_M.replace("nnz = 4", "").replace("coarse", "same") + (
        '[scope_coupling.same]\nscopes = ["same"]\nacross = ["layer"]\nnnz = 9\n'
    )
    assert bound(text).levels("scope.fine") == ("scope_coupling.same", "scope.fine")


def test_the_outer_rule_may_stand_behind_the_inner_one_and_reach_less() -> None:
    text = V_N_M.replace("[scope.coarse]\n", '[scope.coarse]\nwhere = "layer > 0"\n')
    spec = bound(text)
    assert [len(of_rule(spec, name)) for name in ("scope.fine", "scope.coarse")] == [2, 1]


def test_budgets_of_inner_rules_use_captures_and_are_set_by_name() -> None:
    text = V_N_M.replace("nnz = 2", 'sparsity = "0.5 if layer else 0.25"')
    assert [one.budget for one in of_rule(bound(text), "scope.fine")] == [
        Budget(nnz=3, share=0.25),
        Budget(nnz=2, share=0.5),
    ]
    spec = parse_spec(V_N_M, overrides={"scope.fine.nnz": "1", "scope.coarse.nnz": "0"})
    assert [one.budget.nnz for _, one in bind(spec, layers()).instances()] == [0, 0, 0, 0]


# ---- rules that meet


def alone(name: str, within: str = "", tensors: str = UP) -> str:
    return f"[scope.{name}]\n{tensors}block = [1, 1]\nshape = [1, 4]\nnnz = 2\n{within}"


def inside(name: str, outer: str, tensors: str = UP) -> str:
    return alone(name, f'within = "{outer}"\n', tensors)


@pytest.mark.parametrize(
    "text",
    [
        alone("a") + inside("b", "a"),
        inside("b", "a") + alone("a"),
        alone("a") + inside("b", "a") + inside("c", "b"),
        inside("c", "b") + inside("b", "a") + alone("a"),
        alone("a")
        + inside("b", "a", UP.replace("{layer}", "0"))
        + inside("c", "a", UP.replace("{layer}", "1")),
        alone("a") + inside("b", "a") + alone("c", "", DOWN),
        # half of a tensor within a half that reaches a part of it
        alone("a", "", f'{UP}slice = ["0:16", ":"]\n') + inside("b", "a", f'{UP}slice = ["8:24", ":"]\n'),
    ],
)
def test_nested_rules_may_meet(text: str) -> None:
    assert bound("version = 1\n" + text).rules


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            alone("a") + inside("b", "a") + inside("c", "a"),
            "[scope.c]: c[layer=0] reaches layers.0.up.weight (and 1 more tensors), as b[layer=0] of [scope.b] does: "
            "an element may be reached by one rule, once; narrow the patterns",
        ),
        (
            alone("a") + inside("b", "a") + alone("c", "", UP.replace("{layer}", "0")),
            "[scope.c]: c reaches layers.0.up.weight, as a[layer=0] of [scope.a] does: "
            "an element may be reached by one rule, once; narrow the patterns",
        ),
        (
            alone("a") + inside("b", "a", DOWN),
            "[scope.b] within: it reaches nothing of what [scope.a] reaches: leave this key out",
        ),
        (
            alone("a", "", f'{UP}slice = [":", "0:8"]\n') + inside("b", "a", f'{UP}slice = [":", "8:"]\n'),
            "[scope.b] within: it reaches nothing of what [scope.a] reaches: leave this key out",
        ),
        (
            alone("a") + inside("b", "a") + inside("c", "b", DOWN),
            "[scope.c] within: it reaches nothing of what [scope.b] reaches: leave this key out",
        ),
    ],
)  # fmt: skip
def test_others_may_not_and_a_rule_meets_the_one_around_it(text: str, line: str) -> None:
    assert line in problems("version = 1\n" + text)


def test_a_rule_is_not_within_one_that_is_absent() -> None:
    absent = alone("a", "optional = true\n", UP.replace("up", "gate"))
    assert problems("version = 1\n" + absent + inside("b", "a")) == [
        "[scope.b] within: [scope.a] is optional, and the checkpoint has none of its tensors: "
        "make this rule fit what is there, or leave this key out"
    ]
    assert problems("version = 1\n" + absent.replace("optional = true\n", "") + inside("b", "a")) == [
        '[scope.a] tensors: no tensor matches "layers.{layer}.gate.weight"; '
        "the nearest names are layers.0.up.weight and layers.0.down.weight"
    ]
    both = absent + inside("b", "a", UP.replace("up", "gate")) + "optional = true\n" + alone("c", "", DOWN)
    assert [rule.name for rule in bound("version = 1\n" + both).rules] == ["scope.c"]


def test_what_does_not_fit_is_told_without_what_follows_from_it() -> None:
    text = "version = 1\n" + alone("a") + inside("b", "a") + inside("c", "b")
    wide = (
        text.replace("[scope.b]\n", "[scope.b]\n#")
        .replace("#", "")
        .replace("shape = [1, 4]", "shape = [1, 5]")
    )
    lines = problems(wide)
    assert len(lines) == 3
    assert all("16 is not a multiple of 5" in line for line in lines)
    (line,) = problems(text.replace(inside("b", "a"), inside("b", "a").replace("[1, 4]", "[1, 5]")))
    assert line.startswith("[scope.b] shape: ")


# ---- what is refused


MEMBER = f"""
version = 1
[scope.row]
{UP}block = [1, 1]
shape = [1, -1]
[scope_coupling.rows]
scopes = ["row"]
across = ["layer"]
nnz = 16
[block.part]
{DOWN}shape = [1, 1]
[scope.fine]
block = "part"
shape = [1, 4]
nnz = 2
"""
REFIT = 'reconstruct = { method = "refit", file = "a" }\n'
NOT_ALIKE = (
    "[scope.fine] within: this rule and [scope.coarse] have unlike reconstruct tables, but are rebuilt at once: "
    "give one [reconstruct] for all levels"
)


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ('"coarse"', "3", ["[scope.fine] within: found 3, wanted the name of a [scope] or [scope_coupling]: only what that one keeps competes"]),
        ('"coarse"', '"coarze"', ['[scope.fine] within: there is no [scope] or [scope_coupling] "coarze"; did you mean "coarse"?']),
        ('"coarse"', '"xyz"', ['[scope.fine] within: there is no [scope] or [scope_coupling] "xyz"; there is "coarse"']),
        ('"coarse"', '"fine"', ["[scope.fine] within: it is within itself: leave the key out of the outermost one"]),
        ("nnz = 4", 'nnz = 4\nwithin = "fine"', ['[scope.fine] within: it is within "coarse", that within itself: leave the key out of the outermost one']),
        ("nnz = 4", "threshold = 1", ["[scope.fine] within: [scope.coarse] has a threshold, which keeps no fixed number: give nnz or sparsity"]),
        ("nnz = 2", "threshold = 1", ["[scope.fine] within: this rule has a threshold, which keeps no fixed number: give nnz or sparsity"]),
        ("nnz = 4", 'nnz = 4\nmode = "soft"', ['[scope.fine] within: [scope.coarse] has mode = "soft", which nested rules cannot have: leave it out']),
        ("nnz = 2", 'nnz = 2\nmode = "soft"', ['[scope.fine] within: this rule has mode = "soft", which nested rules cannot have: leave it out']),
        ("nnz = 2", "nnz = 2\npermute = true", ["[scope.fine] within: this rule has permute, which nested rules cannot have: leave it out"]),
        ("nnz = 4", 'nnz = 4\npermute = "layer > 9"', ["[scope.fine] within: [scope.coarse] has permute, which nested rules cannot have: leave it out"]),
        ("nnz = 2", "nnz = 2\npermute = false\ntransposable = false", []),
        ("nnz = 2", "nnz = 2\ntransposable = true", ["[scope.fine] within: this rule has transposable, which nested rules cannot have: leave it out"]),
        ("nnz = 4", "nnz = 4\ntransposable = true", ["[scope.fine] within: [scope.coarse] has transposable, which nested rules cannot have: leave it out"]),
        ("version = 1", 'version = 1\n[reconstruct]\nallocate = "loss"\n', [
            '[scope.fine] within: this rule has allocate = "loss", which nested rules cannot have: leave it out',
            '[scope.fine] within: [scope.coarse] has allocate = "loss", which nested rules cannot have: leave it out',
        ]),
        ("nnz = 4", f"nnz = 4\n{REFIT}", [NOT_ALIKE]),
        ("nnz = 2", f"nnz = 2\n{REFIT}", [NOT_ALIKE]),
        ("version = 1", "version = 1\n[reconstruct]\nfile = 'a'\n", []),
        ("nnz = 2", "nnz = 2\nreconstruct = { method = 'none' }", []),
        ("nnz = 2", "nnz = 2\nreconstruct = { methd = 'refit' }", ['[scope.fine] reconstruct.methd: unknown key; did you mean "method"?']),
    ],
)  # fmt: skip
def test_keys_that_do_not_go_with_nested_rules_are_refused(old: str, new: str, lines: list[str]) -> None:
    assert V_N_M.count(old) == 1
    text = V_N_M.replace(old, new)
    if lines:
        assert problems(text) == lines
    else:
        assert bound(text).levels("scope.fine") == ("scope.coarse", "scope.fine")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (MEMBER + 'within = "part"\n', ['[scope.fine] within: "part" is a [block]: name a [scope] or [scope_coupling]']),
        (MEMBER + 'within = "row"\n', ["[scope.fine] within: [scope.row] is a member of [scope_coupling.rows], which decides what it keeps: name that"]),
        (MEMBER.replace("[1, -1]\n", '[1, -1]\nwithin = "fine"\n'), ["[scope.row] within: this scope is a member of [scope_coupling.rows]: this belongs there"]),
        (
            MEMBER.replace("nnz = 16", 'nnz = 16\nwithin = "fine"') + 'within = "rows"\n',
            ['[scope.fine] within: it is within "rows", that within itself: leave the key out of the outermost one'],
        ),
        (MEMBER.replace("[scope_coupling.rows]", "[scope_couplin.rows]") + 'within = "rows"\n', ['[scope_couplin]: unknown table; did you mean "scope_coupling"?']),
        (
            "version = 1\n" + CHANNELS.replace("sparsity", "threshold") + INSIDE,
            ["[scope.pattern] within: [scope.channels] has a threshold, which keeps no fixed number: give nnz or sparsity"],
        ),
        (
            "version = 1\n" + CHANNELS + INSIDE.replace("nnz = 2", "nnz = 2\npermute = true"),
            ["[scope.pattern] within: this rule has permute, which nested rules cannot have: leave it out"],
        ),
        (
            "version = 1\n" + CHANNELS + INSIDE.replace('"pattern"', f'"pattern"\n{REFIT}'),
            [NOT_ALIKE.replace("fine", "rows").replace("scope.r", "scope_coupling.r").replace("coarse", "pattern")],
        ),
        (
            f"version = 1\n[reconstruct]\nfile = 'a'\n{CHANNELS}{INSIDE}{REFIT}",
            [NOT_ALIKE.replace("fine", "rows").replace("scope.r", "scope_coupling.r").replace("coarse", "pattern")],
        ),
    ],
)  # fmt: skip
def test_names_and_levels_that_cannot_be_are_refused(text: str, lines: list[str]) -> None:
    assert problems(text) == lines


def test_a_long_circle_and_very_many_levels_are_short_lines() -> None:
    names = [f"s{number}" for number in range(3_000)]
    circle = "".join(inside(name, names[number - 1]) for number, name in enumerate(names))
    assert problems("version = 1\n" + circle) == [
        '[scope.s0] within: it is within "s2999", that within "s2998", that within "s2997", that within "s2996", '
        'that within "s2995", that within "s2994", that within "s2993", that within others, that within itself: '
        "leave the key out of the outermost one"
    ]
    chain = alone("s0") + "".join(inside(each, around) for around, each in pairwise(names))
    assert problems("version = 1\n" + chain) == [
        "[scope.s2999] within: it is within 2999 others, wanted 99 at most"
    ]
    some = alone("s0") + "".join(inside(each, around) for around, each in pairwise(names[:100]))
    assert len(bound("version = 1\n" + some).levels("scope.s99")) == 100


# ---- the most that survive


def pieces(shape: tuple[int, ...], part: tuple[int, ...]) -> list[set[tuple[int, ...]]]:
    """The elements of each piece of this shape that a shape is cut in."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for index in product(*map(range, shape)):
        at = tuple(place // extent for place, extent in zip(index, part, strict=True))
        found.setdefault(at, set()).add(index)
    return list(found.values())


def kept_sets(
    shape: tuple[int, ...], block: tuple[int, ...], scope: tuple[int, ...], nnz: int
) -> list[set[tuple[int, ...]]]:
    """What a rule may keep of a tensor: each choice of `nnz` blocks in every scope of so many elements."""
    blocks = pieces(shape, block)
    inside = [[each for each in blocks if each <= one] for one in pieces(shape, scope)]
    choices = [[set().union(*some) for some in combinations(one, nnz)] for one in inside]
    return [set().union(*some) for some in product(*choices)]


def most_left(
    shape: tuple[int, ...], block: tuple[int, ...], scope: tuple[int, ...], kept: list[set[tuple[int, ...]]]
) -> int:
    """The most blocks of a scope of which any of these sets has an element."""
    blocks = pieces(shape, block)
    scopes = [[each for each in blocks if each <= one] for one in pieces(shape, scope)]
    return max(sum(bool(each & some) for each in one) for some in kept for one in scopes)


def parts_of(size: int) -> list[int]:
    return [part for part in range(1, size + 1) if size % part == 0]


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The extents of a block and of a scope, both in elements."""
    scope = tuple(draw(st.sampled_from(parts_of(size))) for size in shape)
    return tuple(draw(st.sampled_from(parts_of(size))) for size in scope), scope


def table(name: str, block: tuple[int, ...], scope: tuple[int, ...], budget: str) -> str:
    blocks = [extent // part for extent, part in zip(scope, block, strict=True)]
    return f'[scope.{name}]\ntensors = "w"\nblock = {[*block]}\nshape = {blocks}\n{budget}\n'


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from([(4, 4), (2, 8), (6, 2), (8,), (6,), (2, 2, 4)]),
    sparsity=st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]),
    unit=st.sampled_from([1, 2, 3]),
)
def test_budgets_have_no_room_for_more_than_outer_rules_leave(
    data: st.DataObject, shape: tuple[int, ...], sparsity: float | None, unit: int
) -> None:
    """Against every choice that the outer rule has."""
    outer_block, outer_scope = data.draw(tilings(shape))
    block, scope = data.draw(tilings(shape))
    blocks, outer_blocks = (
        prod(extent // part for extent, part in zip(*pair, strict=True))
        for pair in ((scope, block), (outer_scope, outer_block))
    )
    outer_nnz = data.draw(st.integers(0, outer_blocks))
    assume(comb(outer_blocks, outer_nnz) ** (prod(shape) // prod(outer_scope)) <= 2000)
    asked = data.draw(st.integers(0, blocks))
    budget = f"nnz = {asked}" if sparsity is None else f"sparsity = {sparsity}\nmultiple_of = {unit}"
    text = table("coarse", outer_block, outer_scope, f"nnz = {outer_nnz}")
    text += table("fine", block, scope, f'{budget}\nwithin = "coarse"')
    (fine,) = of_rule(bound("version = 1\n" + text, TensorInfo("w", "F32", shape)), "scope.fine")
    left = most_left(shape, block, scope, kept_sets(shape, outer_block, outer_scope, outer_nnz))
    wanted = min(left, asked)
    if sparsity is not None:
        wanted = max(min(some, -(-surviving(sparsity, some) // unit) * unit) for some in range(left + 1))
    assert fine.budget.nnz is not None
    assert fine.budget.nnz >= wanted
    fits = [
        all(max(a, b) % min(a, b) == 0 for a, b in ((inner, out), (inner, part), (own, part)))
        for inner, own, out, part in zip(scope, block, outer_scope, outer_block, strict=True)
    ]
    if all(fits):
        assert fine.budget.nnz == wanted
    assert fine.budget.share == sparsity


def test_bounds_go_on_from_level_to_level_through_fused_blocks_and_other_orders_of_dimensions() -> None:
    """Of 32 channels 8 stay, so that an inner scope over all of `down` has 16 * 8 elements, and so on."""
    outer = CHANNELS.replace("sparsity = 0.25", "sparsity = 0.75")
    text = f"""version = 1
{outer}
[scope.down]
{DOWN}view = "m k -> k m"
block = [1, 1]
shape = []
sparsity = 0.5
within = "channels"
[scope.last]
{DOWN}block = [1, 1]
shape = []
nnz = 500
within = "down"
"""
    spec = bound(text)
    assert [one.budget for one in of_rule(spec, "scope.down")] == [Budget(nnz=64, share=0.5)] * 2
    assert [one.budget for one in of_rule(spec, "scope.last")] == [Budget(nnz=64)] * 2


@pytest.mark.parametrize(
    ("orders", "shape", "bound_of"),
    [
        ("[[0, 1, 2], [0, 1, 2]]", (2, 3, 4), 1),
        # the second tensor's last dimension is the first one of the common grid, and so on
        ("[[0, 1, 2], [2, 0, 1]]", (3, 4, 2), 1),
        ("[[1, 2, 0], [0, 1, 2]]", (3, 4, 2), 4),
    ],
)
def test_scopes_of_fused_blocks_lie_in_each_tensor_as_its_order_says(
    orders: str, shape: tuple[int, ...], bound_of: int
) -> None:
    """Of the fused blocks along the last common dimension one is kept."""
    text = f"""version = 1
[block.a]
tensors = "a"
shape = []
[block.b]
tensors = "b"
shape = []
[block_coupling.both]
blocks = ["a", "b"]
orders = {orders}
[scope.outer]
block = "both"
shape = [1, 1, -1]
nnz = 1
[scope.inner]
tensors = "b"
block = []
shape = [{", ".join("-1" if size == 4 else "1" for size in shape)}]
nnz = 4
within = "outer"
"""
    spec = bound(text, TensorInfo("a", "F32", (2, 3, 4)), TensorInfo("b", "F32", shape))
    assert [one.budget.nnz for one in of_rule(spec, "scope.inner")] == [bound_of]


def test_a_vector_beside_a_matrix_is_bounded_as_its_rows_are() -> None:
    bias = UP.replace("weight", "bias")
    text = f"""version = 1
[block.row]
{UP}shape = [1, -1]
[block.bias]
{bias}shape = [1]
[block_coupling.unit]
blocks = ["row", "bias"]
[scope.units]
block = "unit"
shape = []
sparsity = 0.25
[scope.inner]
{bias}block = [1]
shape = []
sparsity = 0.5
within = "units"
"""
    spec = bound(
        text, TensorInfo("layers.0.up.weight", "F32", (32, 16)), TensorInfo("layers.0.up.bias", "F32", (32,))
    )
    assert [one.budget for one in of_rule(spec, "scope.inner")] == [Budget(nnz=12, share=0.5)]


@pytest.mark.parametrize(
    ("outer_block", "block", "wanted"),
    [(3, 2, 2), (2, 3, 2), (3, 1, 3), (1, 3, 1), (2, 2, 1), (6, 2, 3)],
)
def test_a_kept_block_leaves_each_block_that_it_touches(outer_block: int, block: int, wanted: int) -> None:
    text = table("coarse", (outer_block,), (6,), "nnz = 1")
    text += table("fine", (block,), (6,), f'nnz = {6 // block}\nwithin = "coarse"')
    (fine,) = of_rule(bound("version = 1\n" + text, TensorInfo("w", "F32", (6,))), "scope.fine")
    assert (
        fine.budget.nnz == wanted == most_left((6,), (block,), (6,), kept_sets((6,), (outer_block,), (6,), 1))
    )


def test_instances_whose_bounds_differ_are_of_different_forms() -> None:
    text = V_N_M.replace("nnz = 4", 'nnz = "layer"').replace("nnz = 2", "nnz = 3")
    spec = bound(text, *layers(6))
    found = [(one.budget.nnz, one.form) for one in of_rule(spec, "scope.fine")]
    assert [nnz for nnz, _ in found] == [0, 1, 2, 3, 3, 3]
    assert len({form for _, form in found}) == len(set(found)) == 4
    assert not {form for _, form in found} & {one.form for one in of_rule(spec, "scope.coarse")}
    assert len({one.form for one in of_rule(bound(V_N_M), "scope.fine")}) == 1


@pytest.mark.parametrize(
    "change",
    [
        ("block = [16, 1]", 'block = [4, 1]\nslice = ["0:16", ":"]'),  # another view of the tensor
        ("shape = [1, 8]\nnnz = 4", "shape = [1, 16]\nnnz = 4"),
    ],
)
def test_what_an_outer_rule_does_not_bound_keeps_its_budget(change: tuple[str, str]) -> None:
    spec = bound(V_N_M.replace("nnz = 2", "nnz = 4").replace(*change))
    assert {one.budget.nnz for one in of_rule(spec, "scope.fine")} == {4}


def test_a_view_that_begins_elsewhere_in_the_tensor_bounds_nothing() -> None:
    text = V_N_M.replace("nnz = 2", 'nnz = 8\nslice = ["8:24", ":"]').replace(
        "nnz = 4", 'nnz = 4\nslice = ["0:16", ":"]'
    )
    assert {one.budget.nnz for one in of_rule(bound(text), "scope.fine")} == {8}
    same = text.replace("8:24", "0:16")
    assert {one.budget.nnz for one in of_rule(bound(same), "scope.fine")} == {4}


# ---- budgets and methods that a command asks for


@pytest.mark.parametrize("name", ["n", "v"])
@pytest.mark.parametrize("value", [0, 1, 3, 4, 8])
def test_a_knob_turns_the_budgets_that_binding_gives(name: str, value: int) -> None:
    budgets = V_N_M.replace("nnz = 2", 'nnz = "n"').replace("nnz = 4", 'nnz = "v"')
    text = budgets.replace("version = 1", "version = 1\n[vars]\nn = 2\nv = 4")
    spec, first = parse_spec(text), bound(text)
    (knob,) = [each for each in find_knobs(spec, first, None) if each.name == name]
    found = budgets_of(turned(spec, knob, value), forms_of(first), None)
    assert found is not None
    wanted = bind(parse_spec(text, overrides={name: str(value)}), layers())
    assert [one.budget for _, one in with_budgets(first, found).instances()] == [
        one.budget for _, one in wanted.instances()
    ]


RANDOM = 'score = { kind = "random" }'
PRUNE = 'score = { nonfinite = "prune" }'
NONE = 'reconstruct = { method = "none" }'


@pytest.mark.parametrize(
    ("inner", "outer", "method", "told"),
    [
        ("", "", "admm", {}),
        ("", RANDOM, "refit", {
            "scope.fine": "is refitted: it is nested with scope.coarse, which is",
            "scope.coarse": "is refitted: its score says what survives, which admm would",
        }),
        (RANDOM, "", "refit", {
            "scope.coarse": "is refitted: it is nested with scope.fine, which is",
            "scope.fine": "is refitted: its score says what survives, which admm would",
        }),
        (PRUNE, RANDOM, None, {
            "scope.coarse": "is not rebuilt: it is nested with scope.fine, which is not",
            "scope.fine": 'is not rebuilt: it has a score with nonfinite = "prune"',
        }),
        ("", NONE, None, {"scope.fine": "is not rebuilt: it is nested with scope.coarse, which is not"}),
    ],
)  # fmt: skip
def test_all_levels_are_rebuilt_by_the_method_that_each_can_have(
    inner: str, outer: str, method: str | None, told: dict[str, str]
) -> None:
    text = V_N_M.replace("nnz = 2", f"nnz = 2\n{inner}").replace("nnz = 4", f"nnz = 4\n{outer}")
    spec, lines = rebuilt(parse_spec(text + alone("other", "", DOWN)), Rebuilding(file=Path("/stats")))
    assert lines == told
    found = {rule.name: rule.instances[0].reconstruct for rule in bind(spec, layers()).rules}
    file = Path("/stats")
    assert found.pop("scope.other") == Reconstruct(file, optional=True)
    wanted = (
        None if method is None else Reconstruct(file, "refit" if method == "refit" else "admm", optional=True)
    )
    assert found == {"scope.fine": wanted, "scope.coarse": wanted}
