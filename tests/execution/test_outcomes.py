"""Outcomes: the same whatever order the pieces arrive in, also where energies are no finite numbers."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.engine.kernels.counting import Tally
from sparseprune.execution.passes import Outcomes, Reach, TensorOutcome
from sparseprune.execution.plan import Plan, make_plan
from sparseprune.spec import parse_spec

LEFT_AND_RIGHT = """
version = 1
scope.left = { tensors = "{name}.weight", slice = [":", "0:4"], block = [1, 1], shape = [1, -1], nnz = 2 }
[scope.right]
tensors = "{name}.weight"
where = "name == 'a'"
slice = [":", "4:6"]
block = [1, 1]
shape = [1, -1]
nnz = 1
"""
LEFT, RIGHT = "scope.left", "scope.right"


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("outcomes") / "m.safetensors"
    save_file({f"{name}.weight": torch.ones(2, 8) for name in ("b", "a", "c")}, path)
    return make_plan(open_checkpoint(path), parse_spec(LEFT_AND_RIGHT))


def gathered(plan: Plan, pieces: list[list[Any]]) -> list[TensorOutcome]:
    outcomes = Outcomes()
    for piece in pieces:
        outcomes.add(piece)
    return list(outcomes.of_plan(plan))


counts = st.integers(0, 1 << 50)
energies = st.one_of(st.floats(0, allow_infinity=True, allow_nan=False), st.just(math.nan))
finite = st.floats(0, 1e300)


def pieces(energy: st.SearchStrategy[float]) -> st.SearchStrategy[list[list[Any]]]:
    names, rules = st.sampled_from(["a.weight", "b.weight"]), st.sampled_from([LEFT, RIGHT, ""])
    one = st.tuples(names, rules, counts, counts, counts, energy, counts, energy).map(list)
    return st.lists(one, max_size=12)


@given(pieces(energies), st.randoms(use_true_random=False))
def test_the_order_in_which_pieces_arrive_is_not_seen(plan: Plan, some: list[list[Any]], chance: Any) -> None:
    shuffled = list(some)
    chance.shuffle(shuffled)
    assert repr(gathered(plan, some)) == repr(gathered(plan, shuffled))  # repr: NaN is not itself


@given(pieces(finite))
def test_counts_add_up_and_energies_are_rounded_once(plan: Plan, some: list[list[Any]]) -> None:
    for tensor in gathered(plan, some):
        own = [piece for piece in some if piece[0] == tensor.name]
        for rule, reach in tensor.reach.items():
            of_rule = [piece for piece in own if piece[1] == rule]
            assert reach == Reach(sum(piece[2] for piece in of_rule), sum(piece[3] for piece in of_rule))
        for tally, zeros, energy in ((tensor.before, 4, 5), (tensor.after, 6, 7)):
            exact = sum((Fraction(piece[energy]) for piece in own), start=Fraction(0))
            assert tally == Tally(16, sum(piece[zeros] for piece in own), float(exact))


@pytest.mark.parametrize(
    ("parts", "total"),
    [
        ([], 0.0),
        ([1e16, 1.0, 1.0], 1e16 + 2),
        ([0.1] * 10, 1.0),
        ([1.0, math.inf], math.inf),
        ([math.inf, math.inf, 0.0], math.inf),
        ([1e308, 1e308], math.inf),
        ([1e308, 1e308, 1.0, math.inf], math.inf),
        ([5e-324, 5e-324], 1e-323),
    ],
)
def test_energies_add_up_to(plan: Plan, parts: list[float], total: float) -> None:
    for some in (parts, parts[::-1]):
        tensors = gathered(plan, [["a.weight", LEFT, 1, 0, 0, part, 0, 2 * part] for part in some])
        (tensor,) = (one for one in tensors if one.name == "a.weight")
        assert tensor.before.energy == total
        assert tensor.after.energy == 2 * total


@pytest.mark.parametrize(
    "parts", [[math.nan], [1.0, math.nan, 2.0], [math.inf, math.nan], [1e308] * 2 + [math.nan]]
)
def test_nan_among_energies_is_not_lost(plan: Plan, parts: list[float]) -> None:
    for some in (parts, parts[::-1]):
        tensors = gathered(plan, [["a.weight", "", 1, 0, 0, part, 0, part] for part in some])
        (tensor,) = (one for one in tensors if one.name == "a.weight")
        assert math.isnan(tensor.before.energy)
        assert math.isnan(tensor.after.energy)


def test_tensors_stand_in_the_order_of_the_checkpoint_with_their_rules_and_instances(plan: Plan) -> None:
    tensors = gathered(plan, [["c.weight", LEFT, 8, 4, 0, 16.0, 4, 12.0]])
    assert [tensor.name for tensor in tensors] == list(plan.reached)
    by_name = {tensor.name: tensor for tensor in tensors}
    assert {name: list(tensor.reach) for name, tensor in by_name.items()} == {
        "a.weight": [LEFT, RIGHT],
        "b.weight": [LEFT],
        "c.weight": [LEFT],
    }
    assert by_name["a.weight"].instance == "left[name=a], right[name=a]"
    assert by_name["b.weight"].reach == {LEFT: Reach()}
    assert by_name["c.weight"].reach == {LEFT: Reach(8, 4)}
    assert (by_name["c.weight"].before, by_name["c.weight"].after) == (Tally(16, 0, 16.0), Tally(16, 4, 12.0))
    assert {(tensor.dtype, tensor.shape) for tensor in tensors} == {("F32", (2, 8))}


def test_a_piece_that_no_rule_reaches_counts_in_its_tensor_alone(plan: Plan) -> None:
    some = [["a.weight", LEFT, 8, 4, 1, 2.0, 5, 1.0], ["a.weight", "", 4, 0, 2, 3.0, 2, 3.0]]
    (tensor,) = (one for one in gathered(plan, some) if one.name == "a.weight")
    assert tensor.reach == {LEFT: Reach(8, 4), RIGHT: Reach()}
    assert (tensor.before, tensor.after) == (Tally(16, 3, 5.0), Tally(16, 7, 4.0))
