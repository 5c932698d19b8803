# ruff: noqa: E501, ISC004  (whole lines, as they are printed)
"""Specs that are wrong in themselves: each beside its legal neighbour, with the exact lines."""

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.errors import SpecError
from sparseprune.spec import parse_spec

SHORT = """
version = 1
[scope.proj]
tensors = "layers.{layer}.{name}_proj.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
LONG = """
version = 1
[block.gate]
tensors = ["layers.{layer}.gate.weight"]
shape = [1, -1]
[block.down]
tensors = "layers.{layer}.down.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["gate", "down"]
orders = [[0, 1], [1, 0]]
[scope.mlp]
block = "channel"
shape = [-1, -1]
sparsity = 0.25
"""
COUPLED = """
version = 1
[scope.q]
tensors = "layers.{layer}.q.weight"
block = [1, -1]
shape = []
[scope.k]
tensors = "layers.{layer}.k.weight"
block = [1, -1]
shape = []
[scope_coupling.qk]
scopes = ["q", "k"]
across = ["layer"]
nnz = 4
"""
DIMENSIONS = "one for each dimension: 1 or more blocks, or -1 for the whole dimension"

ILLEGAL = [
    # what stands at the top
    (SHORT, "version = 1", "", ["version: missing; write version = 1 in the first line"]),
    (SHORT, "version = 1", "version = 2", ["version: found 2, this release reads version = 1"]),
    (SHORT, "version = 1", "version = true", ["version: found true, this release reads version = 1"]),
    (SHORT, "version = 1", "version = 1.0", ["version: found 1.0, this release reads version = 1"]),
    (SHORT, "version = 1", "version = 1\nnnz = 3", ['nnz: unknown key; there is "block", "block_coupling", "covers", "reconstruct", "scope", "scope_coupling", "score" and "vars"']),
    (SHORT, "version = 1", 'version = 1\ncovers = "heads"', ['covers: found "heads", wanted "matrices", "mlp", "attention", "experts" or "layers"']),
    (SHORT, "version = 1", "version = 1\ncovers = 1", ['covers: found 1, wanted "matrices", "mlp", "attention", "experts" or "layers"']),
    (SHORT, "version = 1", 'version = 1\ncovers = ["mlp"]', ['covers: found ["mlp"], wanted "matrices", "mlp", "attention", "experts" or "layers"']),
    (SHORT, "version = 1", 'version = 1\ncover = "mlp"', ['cover: unknown key; did you mean "covers"?']),
    (SHORT, "[scope.proj]", "[scopes.proj]", ['[scopes]: unknown table; did you mean "scope"?']),
    (SHORT, "[scope.proj]", "[[scope]]", [
        "scope: found a list of tables, wanted tables [scope.NAME] with names you choose",
        "there is no rule: write at least one [scope.NAME]",
    ]),
    (SHORT, "[scope.proj]", '[scope."my proj"]', ["[scope.my proj]: a table's name is made of letters, digits, - and _"]),
    (SHORT, "[scope.proj]", "[scope]", [
        '[scope] tensors: found "layers.{layer}.{name}_proj.weight", wanted a table: write [scope.NAME] above its keys',
        "[scope] block: found [1, 1], wanted a table: write [scope.NAME] above its keys",
        "[scope] shape: found [1, 4], wanted a table: write [scope.NAME] above its keys",
        "[scope] nnz: found 2, wanted a table: write [scope.NAME] above its keys",
    ]),
    # the keys of a table
    (SHORT, "nnz = 2", "nz = 2", ['[scope.proj] nz: unknown key; did you mean "nnz"?']),
    (SHORT, "shape = [1, 4]", "", [f"[scope.proj] shape: missing; wanted a list of integers or expressions, {DIMENSIONS}"]),
    (SHORT, "[1, 4]", "[1, 4.0]", [f"[scope.proj] shape: found [1, 4.0], wanted a list of integers or expressions, {DIMENSIONS}"]),
    (SHORT, "[1, 4]", "[true, 0]", [f"[scope.proj] shape: found [true, 0], wanted a list of integers or expressions, {DIMENSIONS}"]),
    (SHORT, "[1, 4]", "[1, -2]", [f"[scope.proj] shape: found [1, -2], wanted a list of integers or expressions, {DIMENSIONS}"]),
    (SHORT, "[1, 4]", "4", [f"[scope.proj] shape: found 4, wanted a list of integers or expressions, {DIMENSIONS}"]),
    (SHORT, "[1, 1]", "1", ["[scope.proj] block: found 1, wanted the name of a [block] or [block_coupling], or a block's shape such as [1, 1] or [1, -1]"]),
    (SHORT, '"layers.{layer}.{name}_proj.weight"', "[]", ['[scope.proj] tensors: found [], wanted a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns']),
    (SHORT, '"layers.{layer}.{name}_proj.weight"', "[3]", ['[scope.proj] tensors: found [3], wanted a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns']),
    (SHORT, '"layers.{layer}.{name}_proj.weight"', '["a.{b", "a.{}", "a"]', [
        '[scope.proj] tensors: "a.{b" character 3: { opens a capture that no } closes: write {name}, '
        "{name:this|that} or {name:**}",
        '[scope.proj] tensors: "a.{}" character 3: the capture has no name: write letters, digits and _, '
        "such as {layer}",
    ]),
    # the two forms of a scope
    (SHORT, 'tensors = "layers.{layer}.{name}_proj.weight"', "", [
        "[scope.proj] tensors: missing: a block given by its shape needs the tensors beside it; "
        "or name a [block] or [block_coupling]"
    ]),
    (LONG, 'block = "channel"', 'block = "channel"\ntensors = "a"', [
        '[scope.mlp] tensors: the block is the table "channel", which has the tensors: remove this key, '
        "or give the block's shape as a list of integers"
    ]),
    (LONG, 'block = "channel"', 'block = "channel"\nslice = [":", ":"]', [
        '[scope.mlp] slice: the block is the table "channel", which has the tensors: remove this key, '
        "or give the block's shape as a list of integers"
    ]),
    (LONG, 'tensors = ["layers.{layer}.gate.weight"]', "", ['[block.gate] tensors: missing; wanted a pattern such as "layers.{layer}.mlp.up_proj.weight", or a list of patterns']),
    # how a tensor is looked at
    (SHORT, "nnz = 2", "nnz = 2\naxes = { q = 2 }", ['[scope.proj] axes: axes belong to an einops pattern: give one as view = "..."']),
    (SHORT, "nnz = 2", 'nnz = 2\nview = "(a q) b -> a q b"\naxes = { "q 1" = 2 }', ['[scope.proj] axes: "q 1" cannot be the name of an axis: take another one, such as q']),
    (SHORT, "nnz = 2", 'nnz = 2\nview = "(a q) b -> a q b"\naxes = { tensor = 2 }', ['[scope.proj] axes: "tensor" cannot be the name of an axis: take another one, such as q']),
    (SHORT, "nnz = 2", 'nnz = 2\nview = "(a q) b -> a q b"\naxes = { q = 0 }', [
        "[scope.proj] axes: found a table, wanted a table of axes of the view, each an integer of 1 or more or an "
        "expression"
    ]),
    (SHORT, "nnz = 2", 'nnz = 2\nview = { shape = [1], stride = [1] }\nslice = [":"]', ["[scope.proj] slice: a view by shape and stride takes no slice: give it an offset instead"]),
    (SHORT, "nnz = 2", "nnz = 2\nview = { shape = [1], strid = [1] }", ['[scope.proj] view.strid: unknown key; did you mean "stride"?']),
    (SHORT, "nnz = 2", "nnz = 2\nview = { shape = [0], stride = [-1] }", [
        "[scope.proj] view.shape: found [0], wanted a list of integers or expressions, each 1 or more",
        "[scope.proj] view.stride: found [-1], wanted a list of integers or expressions, each 0 or more",
    ]),
    (SHORT, "nnz = 2", "nnz = 2\nview = 3", ['[scope.proj] view: found 3, wanted an einops pattern such as "(kv q) k -> kv q k", or a table with shape and stride']),
    (SHORT, "nnz = 2", "nnz = 2\nslice = [true]", ['[scope.proj] slice: found [true], wanted a list with one text for each dimension, such as ["0:inter", ":"]']),
    (SHORT, "nnz = 2", 'nnz = 2\nslice = ["0:1:2", "exprt"]', ['[scope.proj] slice: "0:1:2": a slice has no step: wanted "low:high", ":" or a single index']),
    (SHORT, "nnz = 2", 'nnz = 2\nslice = [":", "laye:"]', ['[scope.proj] slice: "laye": unknown name "laye"; did you mean "layer"?']),
    (SHORT, "[1, 1]", '[1, "n ** 2"]', [
        '[scope.proj] block: "n ** 2" column 1: ** is not allowed; allowed are numbers, strings, lists, names, + - * / '
        '// %, comparisons, in, and, or, not, "a if b else c", x[i] and keys of config'
    ]),
    (SHORT, "nnz = 2", 'nnz = "2 +"', ['[scope.proj] nnz: "2 +" column 4: this is no expression: invalid syntax']),
    (SHORT, "nnz = 2", 'nnz = "keep[layr]"', [
        '[scope.proj] nnz: "keep[layr]": unknown name "keep"; there is "config", "layer" and "name"',
        '[scope.proj] nnz: "keep[layr]": unknown name "layr"; did you mean "layer"?',
    ]),
    (SHORT, "{layer}.{name}", "{shape}.{name}", ['[scope.proj] tensors: the capture "shape" is a reserved name in expressions: rename it']),
    (SHORT, '"layers.{layer}.{name}_proj.weight"', '["a"]\nregex = "(a+)+"', [
        '[scope.proj] regex: "(a+)+" this regex could take very long to match, because a part that repeats can itself '
        r"be read in several ways: end a part with what it cannot hold, as [^.]+\. does, make it possessive (.++), or "
        "write a pattern with captures as `tensors`"
    ]),
    (COUPLED, "nnz = 4", 'nnz = "layer"', ['[scope_coupling.qk] nnz: "layer": unknown name "layer"; there is "config"']),
    (LONG, "sparsity = 0.25", 'sparsity = "layer / lyers"', ['[scope.mlp] sparsity: "layer / lyers": unknown name "lyers"; did you mean "layer"?']),
    # names of tables
    (LONG, '"gate", "down"]', '"gat", "down"]', ['[block_coupling.channel] blocks: there is no [block.gat]; did you mean "gate"?']),
    (LONG, '"channel"', '"chanel"', ['[scope.mlp] block: there is no [block.chanel] and no [block_coupling.chanel]; did you mean "channel"?']),
    (COUPLED, '"q", "k"]', '"q", "q"]', [
        '[scope_coupling.qk] scopes: "q" is listed twice: each member takes part once',
        "[scope.k]: there is no budget: give one of nnz, sparsity and threshold",
    ]),
    (LONG, "block_coupling.channel", "block_coupling.gate", [
        '[scope.mlp] block: there is no [block.channel] and no [block_coupling.channel]; there is "down" and "gate"',
        "[block_coupling.gate]: [block.gate] has the same name: a scope could mean either",
    ]),
    (LONG, 'block = "channel"', 'block = "gate"', ["[block_coupling.channel]: used by no scope: name it in one, or remove it"]),
    (LONG, '"gate", "down"]\norders = [[0, 1], [1, 0]]', '"gate"]', ["[block.down]: used by no scope: name it in one or in a coupling, or remove it"]),
    # orders and across
    (LONG, "[[0, 1], [1, 0]]", "[[0, 1]]", ["[block_coupling.channel] orders: found 1 orders for 2 blocks: give one order for each"]),
    (LONG, "[[0, 1], [1, 0]]", "[[0, 1], [1, 1]]", ["[block_coupling.channel] orders: [1, 1] is no order of dimensions: it needs each of 0 to 1 once"]),
    (LONG, "[[0, 1], [1, 0]]", "[0, 1]", ["[block_coupling.channel] orders: found [0, 1], wanted a list with one list for each member, such as [[0, 1], [1, 0]]"]),
    (COUPLED, '["layer"]', '["layers"]', ['[scope_coupling.qk] across: no member captures "layers"; did you mean "layer"?']),
    (COUPLED, '["layer"]', '"every"', ['[scope_coupling.qk] across: found "every", wanted a list of captures such as ["layer"], or "all"']),
    (LONG, '["layers.{layer}.gate.weight"]', '["layers.{layer}.gate.weight", "gate"]', [
        '[block_coupling.channel] blocks: "gate" captures layer or nothing, depending on which of '
        '"layers.{layer}.gate.weight" and "gate" matches: the patterns of a member need the same captures'
    ]),
    # budgets
    (SHORT, "nnz = 2", "", ["[scope.proj]: there is no budget: give one of nnz, sparsity and threshold"]),
    (SHORT, "nnz = 2", "nnz = 2\nsparsity = 0.5", ["[scope.proj]: found the budgets nnz and sparsity: give exactly one"]),
    (SHORT, "nnz = 2", "nnz = -1", ["[scope.proj] nnz: found -1, wanted an integer of 0 or more, or an expression: how many blocks survive in each scope"]),
    (SHORT, "nnz = 2", "nnz = 2.0", ["[scope.proj] nnz: found 2.0, wanted an integer of 0 or more, or an expression: how many blocks survive in each scope"]),
    (SHORT, "nnz = 2", "nnz = true", ["[scope.proj] nnz: found true, wanted an integer of 0 or more, or an expression: how many blocks survive in each scope"]),
    (SHORT, "nnz = 2", "sparsity = 1.01", ["[scope.proj] sparsity: found 1.01, wanted a number from 0 to 1, or an expression: the share of each scope's blocks to prune"]),
    (SHORT, "nnz = 2", "sparsity = nan", ["[scope.proj] sparsity: found NaN, wanted a number from 0 to 1, or an expression: the share of each scope's blocks to prune"]),
    (SHORT, "nnz = 2", "threshold = inf", ["[scope.proj] threshold: found Infinity, wanted a number of 0 or more, or an expression: the least score that survives"]),
    (SHORT, "nnz = 2", "threshold = 0.5\nmultiple_of = 8", ["[scope.proj] multiple_of: it rounds the number that nnz or sparsity gives; a threshold keeps no fixed number"]),
    (SHORT, "nnz = 2", "nnz = 2\nmultiple_of = 0", [
        "[scope.proj] multiple_of: found 0, wanted an integer of 1 or more, or an expression: the surviving blocks "
        "are rounded up to a multiple of it"
    ]),
    (COUPLED, "shape = []\n[scope.k]", "shape = []\nnnz = 2\n[scope.k]", ["[scope.q] nnz: this scope is a member of [scope_coupling.qk]: its budget belongs there"]),
    (COUPLED, "nnz = 4", "", ["[scope_coupling.qk]: there is no budget: give one of nnz, sparsity and threshold"]),
]  # fmt: skip


@pytest.mark.parametrize("text", [SHORT, LONG, COUPLED])
def test_the_legal_neighbours_are_legal(text: str) -> None:
    assert parse_spec(text, "spec.toml").source == "spec.toml"


@pytest.mark.parametrize(("text", "old", "new", "lines"), ILLEGAL)
def test_every_problem_is_one_line_that_says_where_and_what(
    text: str, old: str, new: str, lines: list[str]
) -> None:
    assert text.count(old) == 1
    with pytest.raises(SpecError) as caught:
        parse_spec(text.replace(old, new), "my.toml")
    assert [*caught.value.problems] == [f"my.toml: {line}" for line in lines]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nnz = 2", "nnz = 0"),
        ("nnz = 2", "sparsity = 1"),
        ("nnz = 2", "sparsity = 0"),
        ("nnz = 2", "threshold = 0"),
        ("nnz = 2", "nnz = 2\nmultiple_of = 2"),
        ("[1, 4]", "[]"),
        ("[1, 1]", "[]"),
        ("proj]", "2-to_4]"),
    ],
)
def test_the_edges_of_what_is_legal_are_legal(old: str, new: str) -> None:
    parse_spec(SHORT.replace(old, new))


def test_problems_of_all_tables_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(
            LONG.replace("orders", "order").replace("sparsity", "sparsty").replace("shape = [1", "shap = [1")
        )
    assert [*caught.value.problems] == [
        'spec.toml: [block.gate] shap: unknown key; did you mean "shape"?',
        'spec.toml: [block_coupling.channel] order: unknown key; did you mean "orders"?',
        'spec.toml: [scope.mlp] sparsty: unknown key; did you mean "sparsity"?',
    ]


EVERY_TABLE = """
version = 1
# top
[vars]
n = 2
# vars
[score]
kind = "magnitude"
# score
[block.gate]
tensors = "layers.{layer}.gate.weight"
shape = [1, -1]
# gate
[block.down]
tensors = "layers.{layer}.down.weight"
shape = [1, -1]
# down
[block_coupling.channel]
blocks = ["gate", "down"]
# channel
[scope.mlp]
block = "channel"
shape = [-1, -1]
sparsity = 0.25
# mlp
[scope.proj]
tensors = "layers.{layer}.{name}_proj.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
# proj
[scope.q]
tensors = "layers.{layer}.q.weight"
block = [1, 1]
shape = []
[scope_coupling.all]
scopes = ["q"]
across = ["layer"]
nnz = 4
# all
"""
# For each kind of problem what is changed and what is said; "+" appends a line where the comment stands.
KINDS_OF_PROBLEMS: dict[str, tuple[str, str, str]] = {
    "unknown table": ("# top", "+[paint]\nred = 1", "[paint]: unknown table"),
    "no such share": ("# top", '+covers = "all"', 'covers: found "all", wanted'),
    "no table": ("# top", "+reconstruct = 1", "reconstruct: found 1, wanted a table"),
    "cycle": ("# vars", '+a = "b"\nb = "a"', "[vars] a: this depends on itself"),
    "other cycle": ("# vars", '+c = "d + 1"\nd = "c"', "[vars] c: this depends on itself"),
    "unknown name in a var": ("# vars", '+e = "m"', '[vars] e: "m": unknown name "m"'),
    "no var": ("# vars", "+f = 1979-05-27", "[vars] f: found"),
    "unknown key of the score": ("# score", "+colour = 1", "[score] colour: unknown key"),
    "key of another score": ("# score", "+seed = 1", '[score] seed: kind = "magnitude" takes no seed'),
    "wrong type": ("# gate", "+optional = 3", "[block.gate] optional: found 3, wanted true or false"),
    "unknown key of a block": ("# gate", "+colour = 1", "[block.gate] colour: unknown key"),
    "axes without a view": ("# gate", "+axes = { k = 2 }", "[block.gate] axes: axes belong to an"),
    "unknown key of a view": (
        "# down",
        "+view = { shape = [4, 4], stride = [4, 1], colour = 1 }",
        "[block.down] view.colour: unknown key",
    ),
    "bad pattern": ('"layers.{layer}.down.weight"', '"layers.{layer.down"', "[block.down] tensors: "),
    "bad expression": ("# down", '+where = "2 +"', '[block.down] where: "2 +" column 4'),
    "duplicate": ('["q"', '["q", "q"', '[scope_coupling.all] scopes: "q" is listed twice'),
    "bad order": (
        "# channel",
        "+orders = [[0, 0], [0, 1]]",
        "[block_coupling.channel] orders: [0, 0] is no order",
    ),
    "unknown capture": (
        "# channel",
        '+across = ["expert"]',
        "[block_coupling.channel] across: no member captures",
    ),
    "unknown reference": ('"channel"', '"chanel"', "[scope.mlp] block: there is no [block.chanel]"),
    "missing budget": ("sparsity = 0.25", "", "[scope.mlp]: there is no budget"),
    "misspelt key": ("# mlp", "+mutiple_of = 8", "[scope.mlp] mutiple_of: unknown key; did you mean"),
    "key without its mode": ("# mlp", "+k_weight = 1.0", "[scope.mlp] k_weight: only mode"),
    "missing file": ("# mlp", '+score = { kind = "values" }', "[scope.mlp] score.file: missing"),
    "idle table": ("# top", '+[block.idle]\ntensors = "a"\nshape = []', "[block.idle]: used by no scope"),
    "unknown key": ("# proj", "+colour = 1", "[scope.proj] colour: unknown key"),
    "two budgets": ("# proj", "+sparsity = 0.5", "[scope.proj]: found the budgets nnz and sparsity"),
    "wrong value": ("# proj", "+multiple_of = 0", "[scope.proj] multiple_of: found 0, wanted"),
    "unknown name": ("[1, 4]", '[1, "lyer"]', '[scope.proj] shape: "lyer": unknown name'),
    "missing key": ("block = [1, 1]\nshape = [1", "shape = [1", "[scope.proj] block: missing"),
    "budget of a member": (
        "shape = []\n[scope_c",
        "shape = []\nnnz = 1\n[scope_c",
        "[scope.q] nnz: this scope is a",
    ),
    "unknown outer scope": (
        "# proj",
        '+within = "mlpp"',
        '[scope.proj] within: there is no [scope] or [scope_coupling] "mlpp"; did you mean "mlp"?',
    ),
    "unknown key of a coupling": ("# all", "+colour = 1", "[scope_coupling.all] colour: unknown key"),
    "unknown scope": ('"q"]', '"q", "quer"]', "[scope_coupling.all] scopes: there is no [scope.quer]"),
}
# The second is not reported beside the first, which leaves it unknown.
OPEN = {("bad pattern", "unknown capture"), ("missing key", "idle table")}


def problems_of(*kinds: str) -> list[str]:
    text = EVERY_TABLE
    for kind in sorted(kinds, key=lambda kind: "\n" in KINDS_OF_PROBLEMS[kind][1]):
        old, new, _ = KINDS_OF_PROBLEMS[kind]
        assert text.count(old) == 1, kind
        text = text.replace(old, f"{new[1:]}\n{old}" if new.startswith("+") else new)
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    return [*caught.value.problems]


def test_every_two_kinds_of_problems_are_told_together_and_nothing_else() -> None:
    parse_spec(EVERY_TABLE)
    wrong = {}
    for one, other in combinations(KINDS_OF_PROBLEMS, 2):
        hidden = {after for before, after in OPEN if {before, after} == {one, other}}
        lines = problems_of(one, other)
        begins = [f"spec.toml: {KINDS_OF_PROBLEMS[kind][2]}" for kind in (one, other) if kind not in hidden]
        if [sum(line.startswith(begin) for line in lines) for begin in begins] != [1] * len(lines):
            wrong[one, other] = lines
    assert wrong == {}


def test_one_problem_of_every_kind_makes_one_line_of_each() -> None:
    kinds = [kind for kind in KINDS_OF_PROBLEMS if kind not in {before for before, _ in OPEN}]
    lines = problems_of(*kinds)
    for kind in kinds:
        assert sum(line.startswith(f"spec.toml: {KINDS_OF_PROBLEMS[kind][2]}") for line in lines) == 1, kind
    assert len(lines) == len(kinds) == 31


BORROWED = """
version = 1
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
nnz = "layer"
"""


@pytest.mark.parametrize(
    ("text", "old", "new", "lines"),
    [
        (LONG, "[scope.mlp]", "[scop.mlp]", ['[scop]: unknown table; did you mean "scope"?']),
        (LONG, "[block.gate]", "[blok.gate]", ['[blok]: unknown table; did you mean "block"?']),
        (COUPLED, "[scope_coupling.qk]", "[scope_couplin.qk]", ['[scope_couplin]: unknown table; did you mean "scope_coupling"?']),
        (COUPLED, "scopes =", "scops =", ['[scope_coupling.qk] scops: unknown key; did you mean "scopes"?']),
        (BORROWED, "blocks =", "bloks =", ['[block_coupling.whole] bloks: unknown key; did you mean "blocks"?']),
        (BORROWED, "blocks =", "colour = 1\nblocks =", ['[block_coupling.whole] colour: unknown key; there is "across", "blocks", "optional" and "orders"']),
        (BORROWED, "{expert}", "{expert", ['[block.up] tensors: "l.{layer}.e.{expert.up" character 13: { opens a capture that no } closes: write {name}, {name:this|that} or {name:**}']),
        (SHORT, "nnz = 2", "nnz = -1\nsparsity = 0.5", [
            "[scope.proj] nnz: found -1, wanted an integer of 0 or more, or an expression: how many blocks survive in each scope",
            "[scope.proj]: found the budgets nnz and sparsity: give exactly one",
        ]),
        (SHORT, "nnz = 2", 'nnz = 2\nscore = { kind = "rondom", seed = 1 }', ['[scope.proj] score.kind: found "rondom", wanted one of magnitude, random, values, wanda, obd, blocks, router or reap']),
        (SHORT, "nnz = 2", "nnz = 2\nview = { shape = [0], stride = [1] }\naxes = { k = 2 }", [
            "[scope.proj] view.shape: found [0], wanted a list of integers or expressions, each 1 or more"
        ]),
        (SHORT, "nnz = 2", 'mode = "sof"\nk_weight = 1.0\nnnz = 2', ['[scope.proj] mode: found "sof", wanted "hard" (losers become zero) or "soft" (every block shrinks by the threshold)']),
        (SHORT, "version = 1", "", ["version: missing; write version = 1 in the first line"]),
    ],
)  # fmt: skip
def test_what_follows_from_a_problem_is_not_told_as_another(
    text: str, old: str, new: str, lines: list[str]
) -> None:
    """Also not beside a second problem, which is told all the same."""
    assert text.count(old) == 1
    for more in ("", "[block.more]\ntensors = 3\nshape = []\n"):
        with pytest.raises(SpecError) as caught:
            parse_spec(text.replace(old, new) + more, "s")
        found = [line.removeprefix("s: ") for line in caught.value.problems]
        beside = [line for line in found if line.startswith("[block.more]")]
        assert [line for line in found if line not in beside] == lines
        assert bool(beside) == bool(more)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("version = ", "at line 1, the end of the document"),
        ("version = 1\n\n[scope.x", "at line 3, the end of the document"),
        ("version = 1\nversion = 1\n", "at line 2, column 12"),
        ("version = 1\n[scope.x\n", "at line 2, column 9"),
    ],
)
def test_what_is_not_toml_is_refused_with_the_place(text: str, place: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    assert re.fullmatch(rf"spec\.toml: this is not TOML: .* \({place}\)", str(caught.value))


@pytest.mark.parametrize(
    "value",
    [
        "1" * 5000, "0x" + "f" * 5000, "[" * 900 + "]" * 900, "[" * 20_000 + "]" * 20_000, "1979-05-27",
        "{ a = { b = 1 } }", "-0x1", "1e400",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "key", ["version", "scope.x.nnz", "scope.x.sparsity", "scope.x.block", "scope.x.tensors"]
)
def test_monstrous_values_are_problems_of_one_short_line(key: str, value: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(f"{key} = {value}" if key == "version" else f"version = 1\n{key} = {value}")
    assert all(len(line) < 300 for line in caught.value.problems)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("nnz = 2", "nnz = 0x" + "f" * 5000),
        ("nnz = 2", "nnz = 9223372036854775808"),
        ("nnz = 2", "sparsity = 0x" + "f" * 5000),
        ("nnz = 2", "threshold = 0x" + "f" * 5000),
        ("nnz = 2", "threshold = 1" + "0" * 400),
        ("nnz = 2", "nnz = 1\nmultiple_of = 0x" + "f" * 5000),
        ("[1, 4]", "[0x" + "f" * 5000 + "]"),
        ("[1, 1]", "[9223372036854775808]"),
    ],
)
def test_numbers_beyond_any_tensor_are_problems_of_one_short_line(old: str, new: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SHORT.replace(old, new))
    assert [len(line) < 300 for line in caught.value.problems] == [True]


def test_line_ends_in_a_key_do_not_break_the_line() -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec(SHORT + '"a\\nb" = 1', "my\nspec.toml")
    assert str(caught.value).startswith("my\\nspec.toml: [scope.proj] a\\nb: unknown key")


KEYS = st.sampled_from(
    "tensors shape block blocks orders across scopes nnz sparsity threshold multiple_of slice view axes regex "
    "where exclude optional score mode scale x y".split()
)
LEAVES = st.sampled_from(
    [
        "1", "-1", "0", "2.5", "nan", "true", '""', '"x"', '"y"', '"a.{l}"', '"all"', "[]", "[1]", "[[0]]",
        '["x"]',
    ]
)  # fmt: skip
TABLES = st.dictionaries(KEYS, LEAVES, max_size=5)
HEADS = st.sampled_from(
    "block.x block.y block_coupling.x block_coupling.z scope.x scope.z scope_coupling.y zzz".split()
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(HEADS, TABLES, max_size=5))
def test_any_toml_is_a_spec_or_a_spec_error(document: dict[str, dict[str, str]]) -> None:
    lines = ["version = 1"]
    for head, table in document.items():
        lines += [f"[{head}]", *(f"{key} = {value}" for key, value in table.items())]
    try:
        parse_spec("\n".join(lines))
    except SpecError as error:
        assert error.problems  # noqa: PT017  (either way is fine)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_spec_or_a_spec_error(text: str) -> None:
    with pytest.raises(SpecError):
        parse_spec(text)
