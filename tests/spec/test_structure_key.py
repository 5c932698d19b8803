"""The key `structure`: what a table sees of it, and with which other keys it goes."""

import pytest

from sparseprune.errors import SpecError, UnboundError
from sparseprune.spec import BoundInstance, BoundSpec, TensorInfo, bind, parse_spec

SHAPES = {
    "model.layers.0.mlp.gate_proj.weight": (8, 4), "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 8), "model.layers.1.mlp.experts.gate_up_proj": (3, 16, 4),
    "model.layers.1.mlp.experts.down_proj": (3, 4, 8), "model.embed_tokens.weight": (9, 4),
}  # fmt: skip
MATRIX = 'structure = "matrices"\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n'


def bound(text: str, shapes: dict[str, tuple[int, ...]] | None = None) -> BoundSpec:
    """A spec as it binds to F32 tensors of these shapes."""
    tensors = [TensorInfo(name, "F32", shape) for name, shape in (shapes or SHAPES).items()]
    return bind(parse_spec("version = 1\n" + text), tensors, {})


def instances(text: str) -> list[BoundInstance]:
    """What the one rule of a spec binds to."""
    (rule,) = bound(text).rules
    return list(rule.instances)


def refused(text: str) -> str:
    """The problems of a spec."""
    with pytest.raises(SpecError) as caught:
        bound(text)
    return str(caught.value)


def test_shapes_speak_of_one_matrix_of_a_stack() -> None:
    found = {one.scope.leaves[0].tensor: one for one in instances(f"[scope.m]\n{MATRIX}")}
    assert "model.embed_tokens.weight" not in found
    plain = found["model.layers.0.mlp.down_proj.weight"].scope.leaves[0]
    stacked = found["model.layers.1.mlp.experts.down_proj"].scope.leaves[0]
    assert (plain.view_shape, plain.shape) == ((4, 8), (1, 1))
    assert (stacked.view_shape, stacked.shape) == ((3, 4, 8), (1, 1, 1))
    assert {one.scope.blocks_per_scope for one in found.values()} == {4}
    assert {one.label for one in found.values() if "down" in one.label} == {
        "m[stack=model.layers,layer=0,module=mlp,part=down_proj]",
        "m[stack=model.layers,layer=1,module=mlp.experts,part=down_proj]",
    }


@pytest.mark.parametrize(("shape", "scopes"), [("[1, -1]", 12), ("[-1, -1]", 3), ("[]", 1)])
def test_what_a_scope_leaves_out_is_spanned_and_an_empty_one_spans_a_stack(shape: str, scopes: int) -> None:
    text = MATRIX.replace("[1, 4]\nnnz = 2", f"{shape}\nsparsity = 0.5")
    (one,) = instances(f'[scope.m]\n{text}where = "ndim == 3 and shape[-1] == 8"\n')
    count = 1
    for size in one.scope.grid_shape:
        count *= size
    assert count == scopes


def test_a_view_is_that_of_each_matrix_of_a_stack() -> None:
    pairs = '[block.pair]\nstructure = "matrices"\nview = "m (k p) -> m k p"\naxes = { p = 2 }\n'
    pairs += "shape = [1, 1, 2]\n"
    found = instances(f'{pairs}[scope.m]\nblock = "pair"\nshape = [1, 2]\nnnz = 1\n')
    shapes = {one.scope.leaves[0].tensor: one.scope.leaves[0].view_shape for one in found}
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (8, 2, 2)
    assert shapes["model.layers.1.mlp.experts.gate_up_proj"] == (3, 16, 2, 2)


CHANNELS = """
[block.part]
structure = "mlp"
shape = [1]
WHERE
[block_coupling.channel]
blocks = ["part"]
across = ["part"]
[scope.mlp]
block = "channel"
shape = [-1]
sparsity = 0.25
"""


def test_units_come_first_with_all_that_belongs_to_them() -> None:
    first, second = instances(CHANNELS.replace("WHERE", ""))
    assert [leaf.view_shape for leaf in first.scope.leaves] == [(8, 4)] * 3
    assert [leaf.shape for leaf in first.scope.leaves] == [(1, 4)] * 3
    assert [leaf.view_shape for leaf in second.scope.leaves] == [(3, 8, 4)] * 3
    assert (first.scope.grid_shape, first.scope.blocks_per_scope) == ((1, 1), 8)
    assert (second.scope.grid_shape, second.scope.blocks_per_scope) == ((3, 1, 1), 8)


@pytest.mark.parametrize(
    ("where", "layers"),
    [
        ("layer == 0", [0]),
        ("expert == '*'", [1]),
        ("module == 'mlp'", [0]),
        ("ndim == 3", [1]),
        ("shape[0] == 8 and stack == 'model.layers'", [0]),
    ],
)
def test_where_goes_by_captures_and_by_what_is_seen(where: str, layers: list[int]) -> None:
    found = instances(CHANNELS.replace("WHERE", f'where = "{where}"'))
    assert [dict(one.captures)["layer"] for one in found] == layers


def test_exclude_goes_by_the_names_of_tensors() -> None:
    found = instances(CHANNELS.replace("WHERE", 'exclude = "**.experts.**"'))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('tensors = "**.up_proj.weight"', "[scope.m] structure: tensors are named by patterns already"),
        ("regex = '.*up_proj.weight'", "[scope.m] structure: tensors are named by a regex already"),
        ('slice = ["0:4", ":"]', "[scope.m] slice: a structure says which part of a tensor it is"),
        (
            "view = { shape = [4], stride = [1] }",
            "[scope.m] view: a structure says which part of a tensor it is",
        ),
        ("where = \"layer == 'x'\"", "of which where leaves none"),
        ('exclude = "**"', "of which exclude leaves none"),
        ('exclude = "**.up_proj.*"\nwhere = "layer > 5"', "of which exclude and where leave none"),
        ('where = "kind == 1"', "kind"),
    ],
)
def test_what_does_not_go_with_it_is_refused(more: str, says: str) -> None:
    assert says in refused(f"[scope.m]\n{MATRIX}{more}\n")


def test_an_unknown_structure_is_answered_with_those_there_are() -> None:
    text = refused(f"[scope.m]\n{MATRIX.replace('matrices', 'mlps')}")
    assert '"matrices", "mlp", "heads", "experts", "layers" or "hidden"' in text


def test_a_hidden_size_that_is_not_there_is_told_with_the_reason() -> None:
    text = r"the checkpoint has no hidden size of a text model that can be told: no layers and no embeddings"
    with pytest.raises(UnboundError, match=text):
        bound(f"[scope.m]\n{MATRIX.replace('matrices', 'hidden')}", {"w": (4, 4), "x": (4,)})


@pytest.mark.parametrize("kind", ["heads", "experts", "layers"])
def test_a_structure_that_is_not_there_is_told_by_its_name(kind: str) -> None:
    with pytest.raises(UnboundError, match=r"under names that are known; the first names are w and x$"):
        bound(f"[scope.m]\n{MATRIX.replace('matrices', kind)}", {"w": (4, 4), "x": (4,)})


def test_rules_over_one_structure_may_not_reach_an_element_twice() -> None:
    text = f"[scope.a]\n{MATRIX}[scope.b]\n{MATRIX}"
    assert "scope.a" in refused(text)
    apart = f'[scope.a]\n{MATRIX}where = "layer == 0"\n[scope.b]\n{MATRIX}where = "layer == 1"\n'
    assert len(bound(apart).rules) == 2
