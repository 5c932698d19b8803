"""Values that are no usual numbers: not finite, subnormal, negative zeros, all equal; by every way."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from tests import commands
from tests.commands import ok, run
from tests.execution.structures import FLOATS, INTEGERS, one
from tests.limits import WAYS, force, narrow
from tests.samples import CHANNELS, write_spec

NAN, INF = math.nan, math.inf
PRUNE = 'score = { nonfinite = "prune" }\n'
TWO_OF_FOUR = one("[1, 1]", "[1, 4]", "nnz = 2")


def rows(nnz: int) -> str:
    return one("[1, -1]", "[-1, 1]", f"nnz = {nnz}")


SPECS = {
    "2:4": TWO_OF_FOUR,
    "columns": one("[1, 1]", "[4, 1]", "nnz = 2"),
    "whole": one("[1, 1]", "[-1, -1]", "nnz = 20"),
    "rows": rows(3),
    "columns as blocks": one("[-1, 1]", "[1, -1]", "nnz = 3"),
    "norm 1": rows(3).rstrip() + "\nscore = { norm = 1 }\n",
}


def applied(folder: Path, spec: str, **tensors: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "m.safetensors")
    said = ok("apply", folder / "m.safetensors", write_spec(folder, spec), "--json", "-q", "--force")
    return load_file(folder / "m.pruned.safetensors"), json.loads(said.out)


def refused(folder: Path, spec: str, **tensors: torch.Tensor) -> str:
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "m.safetensors")
    said = commands.refused("apply", folder / "m.safetensors", write_spec(folder, spec), "-q")
    assert not list(folder.glob("*pruned*"))
    assert len(said.err.splitlines()) == 1
    return said.err


def bits(tensor: torch.Tensor) -> list[int]:
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(kind).flatten().tolist()


def random(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def spoiled(tensor: torch.Tensor, value: float, *places: tuple[int, int]) -> torch.Tensor:
    wide = tensor.to(torch.float64)
    for place in places:
        wide[place] = value
    return wide.to(tensor.dtype)


# -- not finite: an error by default ------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("value", "word"), [(NAN, "NaN"), (INF, "infinity"), (-INF, "infinity")])
def test_what_is_not_finite_ends_the_run_with_its_place_whatever_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, spec: str, value: float, word: str
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 32)
    tensor = spoiled(random(torch.bfloat16, 8, 8), value, (5, 2))
    said = refused(tmp_path, SPECS[spec], a=random(torch.bfloat16, 8, 8), b=tensor)
    assert f"b.weight: {word} at [5, 2]: it has no rank" in said
    assert 'nonfinite = "prune"' in said


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_is_looked_at(tmp_path: Path, dtype: torch.dtype) -> None:
    said = refused(tmp_path, TWO_OF_FOUR, a=spoiled(random(dtype, 8, 8), NAN, (7, 7)))
    assert "a.weight: NaN at [7, 7]" in said
    largest = torch.full((4, 8), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert applied(tmp_path, TWO_OF_FOUR, a=largest)[1]["totals"]["pruned"] == 16


def test_what_no_rule_reaches_may_hold_anything(tmp_path: Path) -> None:
    save_file(
        {"a.weight": torch.ones(4, 4), "free": torch.tensor([NAN, INF, -INF, -0.0])},
        tmp_path / "m.safetensors",
    )
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR), "-q")
    free = load_file(tmp_path / "m.pruned.safetensors")["free"]
    assert bits(free) == bits(torch.tensor([NAN, INF, -INF, -0.0]))


# -- nonfinite = "prune" ------------------------------------------------------------------------------


def kept_by_hand(tensor: torch.Tensor, scope: list[list[tuple[int, int]]], nnz: int) -> set[int]:
    """Which blocks (lists of elements) survive: those with something not finite rank below all others."""
    scores = []
    for block in scope:
        numbers = [float(tensor[place]) for place in block]
        finite = all(map(math.isfinite, numbers))
        scores.append(math.sqrt(sum(number**2 for number in numbers)) if finite else -1.0)
    order = sorted(range(len(scope)), key=lambda place: (-scores[place], place))
    return set(order[:nnz])


@pytest.mark.parametrize("way", ["contiguous", "torch_in_memory", "torch_out_of_core"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_elements_that_are_not_finite_rank_below_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 16)
    rows = [[NAN, 0, -0.0, 0], [NAN, NAN, NAN, 1], [1, 2, NAN, 3], [NAN] * 4, [0, NAN, 0, NAN]]
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        rows += [[INF, 0.5, -INF, 2], [INF, NAN, 0, 0], [INF, INF, 1, INF]]
    tensor = torch.tensor(rows, dtype=torch.float64).to(dtype)
    pruned, _ = applied(tmp_path, TWO_OF_FOUR.rstrip() + "\n" + PRUNE, a=tensor)
    mask = load_masks(tmp_path / "m.pruned.masks.safetensors")["a.weight"]
    wide = tensor.to(torch.float64)
    for row in range(len(rows)):
        keep = kept_by_hand(wide, [[(row, column)] for column in range(4)], 2)
        assert set(mask[row].nonzero().flatten().tolist()) == keep, row
    expected = [pattern if kept else 0 for pattern, kept in zip(bits(tensor), mask.flatten(), strict=True)]
    assert bits(pruned["a.weight"]) == expected


@pytest.mark.parametrize("way", ["block_norms", "torch_in_memory", "torch_out_of_core"])
@pytest.mark.parametrize("nnz", range(9))
def test_blocks_in_which_something_is_not_finite_are_the_first_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, nnz: int
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 16)
    tensor = spoiled(spoiled(random(torch.float32, 8, 8), NAN, (1, 3), (6, 0)), INF, (2, 2))
    tensor[4] = 0
    pruned, _ = applied(tmp_path, rows(nnz).rstrip() + "\n" + PRUNE, a=tensor)
    blocks = [[(row, column) for column in range(8)] for row in range(8)]
    keep = kept_by_hand(tensor, blocks, nnz)
    expected = torch.stack([tensor[row] if row in keep else torch.zeros(8) for row in range(8)])
    assert bits(pruned["a.weight"]) == bits(expected)


def test_a_channel_goes_whole_where_one_of_its_members_is_not_finite(tmp_path: Path) -> None:
    tensors = {"0.up.weight": torch.ones(8, 4), "0.up.bias": torch.ones(8), "0.down.weight": torch.ones(4, 8)}
    tensors["0.down.weight"][2, 5] = NAN
    tensors["0.up.bias"][6] = INF
    save_file(tensors, tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, CHANNELS + PRUNE), "-q")
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    for name, dim in (("0.up.weight", 0), ("0.up.bias", 0), ("0.down.weight", 1)):
        zero = [place for place in range(8) if not pruned[name].select(dim, place).any()]
        assert zero == [5, 6], name


def test_a_threshold_drops_what_is_not_finite_and_verify_agrees(tmp_path: Path) -> None:
    spec = one("[1, 1]", "[1, -1]", "threshold = 0.0").rstrip() + "\n" + PRUNE
    tensor = torch.tensor([[NAN, 0.5, INF, -3.0]])
    pruned, _ = applied(tmp_path, spec, a=tensor)
    assert bits(pruned["a.weight"]) == bits(torch.tensor([[0.0, 0.5, 0.0, -3.0]]))
    out = tmp_path / "m.pruned.safetensors"
    ok("verify", out, tmp_path / "spec.toml")
    assert run("verify", tmp_path / "m.safetensors", tmp_path / "spec.toml").code == 1


@pytest.mark.parametrize("name", [*SPECS, "channels"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e5m2, torch.int8], ids=str)
def test_where_all_is_finite_it_changes_nothing(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    spec = SPECS.get(name, CHANNELS.replace("up.bias", "up.weight").replace("[1]\n", "[1, -1]\n"))
    if name == "channels":
        spec = one("[1, -1]", "[2, 1]", "nnz = 1")
    with_score = spec.replace("{ norm = 1 }", '{ norm = 1, nonfinite = "prune" }')
    prune = with_score if "nonfinite" in with_score else spec.rstrip() + "\n" + PRUNE
    tensor = (random(torch.float32, 8, 8) * 8).to(dtype)
    plain, report = applied(tmp_path, spec, a=tensor)
    rescued, again = applied(tmp_path, prune, a=tensor)
    assert bits(plain["a.weight"]) == bits(rescued["a.weight"])
    assert report["totals"] == again["totals"]


@pytest.mark.parametrize("kind", ["values", "wanda", "obd"])
def test_scores_that_are_not_numbers_are_errors_or_the_lowest(tmp_path: Path, kind: str) -> None:
    weights = torch.tensor([[1.0, 2, 3, 4]])
    scores = torch.tensor([[NAN, 1, 1, 1]]) if kind == "values" else torch.tensor([1.0, 1, 1, NAN])
    save_file({"a.weight": scores}, tmp_path / "scores.safetensors")
    score = f'score = {{ kind = "{kind}", file = "scores.safetensors"'
    said = refused(tmp_path, TWO_OF_FOUR.rstrip() + f"\n{score} }}\n", a=weights)
    assert "a.weight: there is NaN in its score file" in said
    pruned, _ = applied(tmp_path, TWO_OF_FOUR.rstrip() + f'\n{score}, nonfinite = "prune" }}\n', a=weights)
    assert pruned["a.weight"].tolist() == [[0, 2, 3, 0]]


@pytest.mark.parametrize("kind", ["wanda", "obd"])
@pytest.mark.parametrize(
    ("weight", "score", "said"),
    [
        (0.0, INF, "NaN as its score"),  # 0 times infinity
        (1.0, INF, "infinity as its score"),
        (1e200, 1e200, "infinity as its score"),
        (NAN, 1.0, "NaN as its score"),
    ],
)
def test_a_product_that_is_not_finite_is_told_as_a_score_and_pruned_on_demand(
    tmp_path: Path, kind: str, weight: float, score: float, said: str
) -> None:
    weights = torch.tensor([[1, 2, weight, 3]], dtype=torch.float64)
    vector = torch.tensor([1, 1, score, 1], dtype=torch.float64)
    save_file({"a.weight": vector}, tmp_path / "scores.safetensors")
    key = f'score = {{ kind = "{kind}", file = "scores.safetensors"'
    told = refused(tmp_path, TWO_OF_FOUR.rstrip() + f"\n{key} }}\n", a=weights)
    assert f"a.weight: {said} at [0, 2]" in told
    pruned, _ = applied(tmp_path, TWO_OF_FOUR.rstrip() + f'\n{key}, nonfinite = "prune" }}\n', a=weights)
    assert pruned["a.weight"].tolist() == [[0, 2, 0, 3]]


def test_a_weight_that_is_not_finite_goes_first_whatever_its_given_value(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([[1.0, 2, 9, 3]])}, tmp_path / "scores.safetensors")
    score = 'score = { kind = "values", file = "scores.safetensors", nonfinite = "prune" }\n'
    pruned, _ = applied(tmp_path, TWO_OF_FOUR.rstrip() + "\n" + score, a=torch.tensor([[1.0, 1, NAN, 1]]))
    assert pruned["a.weight"].tolist() == [[0, 1, 0, 1]]


def test_infinity_among_given_values_is_the_highest_score(tmp_path: Path) -> None:
    save_file({"a.weight": torch.tensor([[1, INF, 3, 2]])}, tmp_path / "scores.safetensors")
    score = 'score = { kind = "values", file = "scores.safetensors" }\n'
    pruned, _ = applied(tmp_path, TWO_OF_FOUR.rstrip() + "\n" + score, a=torch.ones(1, 4))
    assert pruned["a.weight"].tolist() == [[0, 1, 1, 0]]


@pytest.mark.parametrize("score", ["", 'score = { kind = "random", seed = 1 }'])
def test_what_goes_with_it_is_told(tmp_path: Path, score: str) -> None:
    top = '[score]\nnonfinite = "prune"\n' if not score else ""
    spec = one("[1, 1]", "[1, 4]", 'mode = "soft"\nnnz = 2' if not score else "nnz = 2")
    spec = spec.replace("version = 1\n", f"version = 1\n{top}").rstrip() + "\n"
    spec += score.replace(" }", ', nonfinite = "prune" }')
    said = refused(tmp_path, spec, a=torch.ones(4, 4))
    assert ('which only "hard" takes' if not score else "takes no nonfinite") in said


# -- finite, and odd ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_subnormal_numbers_have_their_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 16)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    numbers = torch.tensor([[1, 0, 2, 1], [0, 3, 0, 1], [2, 2, 1, 2]], dtype=kind).view(dtype)
    pruned, _ = applied(tmp_path, TWO_OF_FOUR, a=numbers)
    assert bits(pruned["a.weight"]) == [1, 0, 2, 0, 0, 3, 0, 1, 2, 2, 0, 0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_the_earlier_one_survives_among_equals_and_zeros_keep_their_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dtype: torch.dtype
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 16)
    rows = torch.tensor([[1.0, -1, 1, -1], [-0.0, -0.0, -0.0, -0.0], [0, 0, 0, 0]]).to(dtype)
    pruned, report = applied(tmp_path, TWO_OF_FOUR, a=rows)
    masks = load_masks(tmp_path / "m.pruned.masks.safetensors")["a.weight"]
    assert masks.tolist() == [[True, True, False, False]] * 3
    expected = [pattern if kept else 0 for pattern, kept in zip(bits(rows), masks.flatten(), strict=True)]
    assert bits(pruned["a.weight"]) == expected
    (tensor,) = report["tensors"]
    assert (tensor["zeros_before"], tensor["zeros_after"]) == (8, 10)


@pytest.mark.parametrize("spec", SPECS)
def test_a_tensor_of_zeros_is_pruned_exactly_and_all_of_its_energy_is_kept(tmp_path: Path, spec: str) -> None:
    pruned, report = applied(tmp_path, SPECS[spec], a=torch.zeros(8, 8))
    assert not pruned["a.weight"].any()
    masks = load_masks(tmp_path / "m.pruned.masks.safetensors")["a.weight"]
    assert int(masks.sum()) == 64 - report["totals"]["pruned"]
    assert report["tensors"][0]["energy_kept"] == 1
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml")


@pytest.mark.parametrize("way", ["block_norms", "torch_in_memory", "torch_out_of_core"])
@pytest.mark.parametrize(
    ("small", "large"), [(1e-300, 2e-300), (1e-45, 2e-45), (1e200, 2e200), (4e-324, 1e-323)]
)
def test_squares_neither_vanish_nor_overflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, small: float, large: float
) -> None:
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 16)
    tensor = torch.full((8, 8), small, dtype=torch.float64)
    tensor[6] = large
    pruned, report = applied(tmp_path, rows(1), a=tensor)
    assert [row for row in range(8) if pruned["a.weight"][row].any()] == [6]
    kept = report["tensors"][0]["energy_kept"]
    assert kept == (pytest.approx(4 / 11) if small == 1e-45 else None)  # where float64 has no such squares


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_the_most_negative_integer_is_the_largest(tmp_path: Path, dtype: torch.dtype) -> None:
    least, most = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    pruned, _ = applied(tmp_path, TWO_OF_FOUR, a=torch.tensor([[most, most, least, 1]], dtype=dtype))
    assert pruned["a.weight"].tolist() == [[most, 0, least, 0]]
