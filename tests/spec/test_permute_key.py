"""The key `permute`: with which other keys it goes, and what binding makes of it."""

import pytest

from sparseprune.errors import SpecError
from sparseprune.spec import BoundSpec, TensorInfo, bind, parse_spec

SHAPES = {f"model.layers.{layer}.mlp.down_proj.weight": (4, 8) for layer in range(3)}
TENSORS = 'tensors = "model.layers.{layer}.mlp.down_proj.weight"\n'
SCOPE = f"[scope.down]\n{TENSORS}block = [1, 1]\nshape = [1, 4]\nnnz = 2\npermute = true\n"


NAMED = '"one"'


def bound(text: str) -> BoundSpec:
    tensors = [TensorInfo(name, "F32", shape) for name, shape in SHAPES.items()]
    return bind(parse_spec("version = 1\n" + text), tensors, {})


def refused(text: str) -> str:
    with pytest.raises(SpecError) as caught:
        bound(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("true", [True, True, True]),
        ("false", [False, False, False]),
        ('"moves"', [True, True, True]),
        ('"layer > 0"', [False, True, True]),
    ],
)
def test_is_a_truth_or_an_expression_that_comes_to_one(value: str, found: list[bool]) -> None:
    text = f"[vars]\nmoves = true\n{SCOPE.replace('permute = true', f'permute = {value}')}"
    assert [one.permute for _, one in bound(text).instances()] == found


def test_nothing_is_permuted_without_it() -> None:
    assert not any(one.permute for _, one in bound(SCOPE.replace("permute = true\n", "")).instances())


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (SCOPE.replace("true", "1"), "permute: found 1, wanted true, false or an expression"),
        (SCOPE.replace("true", '"layer"'), 'down[layer=0]: "layer": this comes to 0, wanted true or false'),
        (SCOPE.replace("true", '"moves"'), "moves"),
        (SCOPE.replace("nnz = 2", "threshold = 0.5"), "permute: a threshold keeps no fixed number"),
        (SCOPE.replace("[1, 1]", "[1, 2]").replace("[1, 4]", "[1, 2]"), "wanted single elements"),
        (SCOPE.replace("[1, 4]", "[2, 4]"), "has scopes [2, 4] of blocks [1, 1]: wanted single elements"),
        (SCOPE.replace("[1, 4]", "[]"), "wanted single elements, several along one dimension"),
        (f'[score]\nkind = "random"\n{SCOPE}', 'permute: its score has kind = "random"'),
        (f'[score]\nkind = "blocks"\nfile = "a"\n{SCOPE}', 'permute: its score has kind = "blocks"'),
        (
            f'{SCOPE.replace("nnz = 2", "")}[scope_coupling.all]\nscopes = ["down"]\nnnz = 2\n',
            "permute: this scope is a member of [scope_coupling.all], and only N:M is permuted",
        ),
        (
            f"[block.one]\n{TENSORS}shape = [1, 1]\n{SCOPE.replace(TENSORS, '').replace('[1, 1]', NAMED)}",
            "permute: only N:M of a scope that names its tensors is permuted",
        ),
    ],
)  # fmt: skip
def test_refuses_what_is_no_pattern_of_single_elements(text: str, problem: str) -> None:
    assert problem in refused(text)


@pytest.mark.parametrize("shape", ["[1, 4]", "[2, 1]", "[1, 8]"])
def test_takes_single_elements_along_either_dimension(shape: str) -> None:
    text = SCOPE.replace("[1, 4]", shape).replace("nnz = 2", "nnz = 1")
    assert all(one.permute for _, one in bound(text).instances())
