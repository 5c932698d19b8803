"""Knobs: which numbers of a spec budgets alone depend on, and the budgets for other values of them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest

from sparseprune.spec import BoundSpec, Spec, TensorInfo, bind, parse_spec
from sparseprune.spec.knobs import Knob, budgets_of, find_knobs, forms_of, turned, with_budgets

TENSORS = [
    TensorInfo(f"layers.{layer}.{name}.weight", "F32", shape)
    for layer in range(2)
    for name, shape in (("up", (12, 8)), ("down", (8, 12)))
]
CONFIG: Mapping[str, Any] = MappingProxyType({"heads": 4})
ROWS = '[scope.rows]\ntensors = "layers.{layer}.up.weight"\nblock = [1, -1]\nshape = [-1]\n'
COLUMNS = '[scope.columns]\ntensors = "layers.{layer}.down.weight"\nblock = [-1, 1]\nshape = [-1, -1]\n'


def parsed(text: str, overrides: Mapping[str, str] = MappingProxyType({})) -> tuple[Spec, BoundSpec]:
    spec = parse_spec(f"version = 1\n{text}", overrides=overrides)
    return spec, bind(spec, TENSORS, CONFIG)


# The spec -> its knobs, each with whether it takes integers alone, and its value.
KNOBS: dict[str, list[tuple[str, bool, float]]] = {
    f"{ROWS}nnz = 3\n": [("scope.rows.nnz", True, 3)],
    f"{ROWS}sparsity = 0.5\n": [("scope.rows.sparsity", False, 0.5)],
    f"{ROWS}threshold = 0.5\n": [],
    f'{ROWS}nnz = "config.heads * 2"\n': [],
    f'[vars]\ns = 0.5\n{ROWS}sparsity = "s"\n': [("s", False, 0.5)],
    f'[vars]\ns = 1\n{ROWS}sparsity = "s"\n': [("s", False, 1)],
    f'[vars]\npercent = 25\n{ROWS}sparsity = "percent / 100"\n': [("percent", True, 25)],
    f'[vars]\nn = 3\nm = 4\n{ROWS}nnz = "n"\nmultiple_of = "m"\n': [("n", True, 3)],
    f'[vars]\nn = 3\n{ROWS}nnz = "n"\nmultiple_of = "n"\n': [],
    f'[vars]\nn = 1\n{ROWS}where = "layer < n"\nnnz = "n"\n': [],
    f'[vars]\nn = [3, 4]\n{ROWS}nnz = "n[layer]"\n': [],
    f'[vars]\non = true\n{ROWS}nnz = "4 if on else 2"\n': [],
    f'[vars]\nkeep = "config.heads"\n{ROWS}nnz = "keep"\n': [("keep", True, 4)],
    # What is written as a number comes before what is computed, roots before what is made of them.
    f'[vars]\nheads = "config.heads"\neach = 2\n{ROWS}nnz = "heads * each"\n': [("each", True, 2)],
    f'[vars]\nkeep = "12 - drop"\ndrop = 4\n{ROWS}nnz = "keep"\n': [("drop", True, 4)],
    f'[vars]\na = 0.5\nb = 2\nunused = 7\n{ROWS}sparsity = "a"\n{COLUMNS}nnz = "b"\n': [
        ("a", False, 0.5),
        ("b", True, 2),
    ],
    f'[vars]\na = 0.5\n{ROWS}sparsity = "a"\n{COLUMNS}nnz = 5\n': [
        ("a", False, 0.5),
        ("scope.columns.nnz", True, 5),
    ],
    f'{ROWS}nnz = 3\n[scope.no]\ntensors = "no.{{x}}"\nblock = [1]\nshape = []\nnnz = 1\noptional = true\n': [
        ("scope.rows.nnz", True, 3)
    ],
}


@pytest.mark.parametrize("text", KNOBS)
def test_the_numbers_that_budgets_alone_depend_on_are_knobs(text: str) -> None:
    spec, bound = parsed(text)
    found = [(knob.name, knob.whole, knob.value) for knob in find_knobs(spec, bound, CONFIG)]
    assert found == KNOBS[text]


def test_a_value_that_was_set_is_that_of_the_knob() -> None:
    (knob,) = find_knobs(*parsed(f"{ROWS}nnz = 3\n", {"scope.rows.nnz": "5"}), CONFIG)
    assert knob == Knob("scope.rows.nnz", whole=True, value=5)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        (f"{ROWS}nnz = 3\n{COLUMNS}nnz = 2\n", "scope.rows.nnz", 7),
        (f'[vars]\ns = 0.5\n{ROWS}sparsity = "s"\n{COLUMNS}sparsity = "s / 2"\n', "s", 0.75),
        (f'[vars]\nkeep = 1\n{ROWS}nnz = "keep + 3 * layer"\nmultiple_of = 4\n', "keep", 6),
        (f'[vars]\nkeep = 4\nhalf = "keep // 2"\n{ROWS}nnz = "half"\n', "keep", 9),
    ],
)
def test_a_turned_knob_gives_what_the_spec_with_that_value_binds_to(
    text: str, name: str, value: float
) -> None:
    spec, bound = parsed(text)
    knob = next(knob for knob in find_knobs(spec, bound, CONFIG) if knob.name == name)
    budgets = budgets_of(turned(spec, knob, value), forms_of(bound), CONFIG)
    assert budgets is not None
    assert with_budgets(bound, budgets) == parsed(text, {name: repr(value)})[1] != bound


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        (f"{ROWS}nnz = 3\n", "scope.rows.nnz", 13),
        (f"{ROWS}nnz = 3\n", "scope.rows.nnz", -1),
        (f"{ROWS}sparsity = 0.5\n", "scope.rows.sparsity", 1.5),
        (f'[vars]\nn = 3\nm = "12 // n"\n{ROWS}nnz = "m"\n', "n", 0),
    ],
)
def test_a_value_that_a_spec_may_not_have_gives_no_budgets(text: str, name: str, value: float) -> None:
    spec, bound = parsed(text)
    knob = next(knob for knob in find_knobs(spec, bound, CONFIG) if knob.name == name)
    assert budgets_of(turned(spec, knob, value), forms_of(bound), CONFIG) is None
