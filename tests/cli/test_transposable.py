"""`transposable = true` in a spec: what apply, verify and reconstruction make of it, and what is refused."""

from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import BlockSpec, ScopeSpec
from tests.cli.test_reconstruct import ADMM, REFIT, applied, relative_error, statistics, with_head
from tests.commands import ok, refused, run, valid
from tests.limits import force
from tests.samples import unmarked, write_spec

SPEC = """version = 1
[scope.proj]
tensors = "**.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
transposable = true
"""
STACK = (
    SPEC.replace('"**.weight"', '"s.weight"').replace("[1, 1]", "[1, 1, 1]").replace("[1, 4]", "[1, 1, 4]")
)


def dense(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"a.weight": (64, 32), "b.weight": (24, 48), "norm": (32,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def is_legal(weights: torch.Tensor) -> bool:
    """Whether each tile of 4 x 4 has at most two elements that are not zero in each row and column."""
    rows, columns = weights.shape[-2:]
    tiles = (weights != 0).reshape(-1, rows // 4, 4, columns // 4, 4)
    return bool((tiles.sum(2) <= 2).all()) and bool((tiles.sum(4) <= 2).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_apply_writes_what_the_engine_keeps(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = dense(dtype)
    save_file(tensors, tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, SPEC))
    found = load_file(tmp_path / "m.pruned.safetensors")
    assert torch.equal(found.pop("norm"), tensors.pop("norm"))
    for name, weights in found.items():
        expected = tensors[name].clone()
        ScopeSpec(BlockSpec(expected, ()), (4, 4), transposable=True).hard_threshold(nnz=8)
        assert torch.equal(weights, expected)
        assert is_legal(weights)


def test_matrices_of_a_stack_are_tiled_one_by_one(tmp_path: Path) -> None:
    stack = torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(6))
    save_file({"s.weight": stack}, tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, STACK))
    for number, weights in enumerate(load_file(tmp_path / "m.pruned.safetensors")["s.weight"]):
        expected = stack[number].clone()
        ScopeSpec(BlockSpec(expected, ()), (4, 4), transposable=True).hard_threshold(nnz=8)
        assert torch.equal(weights, expected)


def test_any_memory_and_any_number_of_jobs_give_the_same_bytes(tmp_path: Path) -> None:
    big = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(7)).bfloat16()
    save_file({"a.weight": big}, tmp_path / "m.safetensors")
    spec, found = write_spec(tmp_path, SPEC), []
    for words in (["-j", 1], ["-j", 2], ["--memory", "450MB"]):
        ok("apply", tmp_path / "m.safetensors", spec, "--force", *words)
        found.append((tmp_path / "m.pruned.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_verify_says_that_columns_break_the_rule_where_rows_hold(tmp_path: Path) -> None:
    weights = torch.zeros(8, 8)
    weights[:, :2] = 1  # two of four in each row, four of four in two columns
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    said = run("verify", tmp_path / "m.safetensors", write_spec(tmp_path, SPEC))
    assert said.code == 1
    document = valid(
        run("verify", tmp_path / "m.safetensors", tmp_path / "spec.toml", "--json").out, "verify"
    )
    rules = [(rule["name"], rule["along"], rule["broken"]) for rule in document["rules"]]
    assert rules == [("scope.proj", "rows", 0), ("scope.proj", "columns", 4)]
    assert [(one["rule"], one["along"]) for one in document["tensors"]] == [rule[:2] for rule in rules]
    assert said.out.splitlines() == [
        "rule                tensors  scopes  may survive  fullest  broken",
        "scope.proj rows           1      16       2 of 4        2       0",
        "scope.proj columns        1      16       2 of 4        4       4",
        "",
        "tensor    rule                broken  of  first scope  element  non-zero  allowed",
        "a.weight  scope.proj columns       4  16  [0, 0]       [0, 0]          4        2",
        "",
        "checked 64 of 64 parameters",
    ]


def test_verify_holds_for_what_apply_wrote(tmp_path: Path) -> None:
    save_file(dense(), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, SPEC)
    ok("apply", tmp_path / "m.safetensors", spec)
    assert "scopes are as the spec says" in ok("verify", tmp_path / "m.pruned.safetensors", spec).out


def test_a_rule_may_have_matrices_with_and_without_tiles(tmp_path: Path) -> None:
    save_file({"0.weight": torch.eye(8), "1.weight": torch.ones(8, 8)}, tmp_path / "m.safetensors")
    text = SPEC.replace('"**.weight"', '"{n}.weight"').replace("= true", '= "n == 0"')
    said = run("verify", tmp_path / "m.safetensors", write_spec(tmp_path, text), "--json")
    document = valid(said.out, "verify")
    rules = [(rule["name"], rule.get("along"), rule["broken"]) for rule in document["rules"]]
    assert rules == [("scope.proj", None, 16), ("scope.proj", "rows", 0), ("scope.proj", "columns", 0)]


def legal() -> list[tuple[tuple[int, ...], ...]]:
    """The columns that each row of a tile keeps, lower ones first, of every pattern of two in each line."""
    rows = list(combinations(range(4), 2))
    return [
        one
        for one in product(rows, repeat=4)
        if all(sum(column in row for row in one) == 2 for column in range(4))
    ]


def kept_by_hand(scores: torch.Tensor) -> torch.Tensor:
    """The mask of the largest sum in each tile, of all patterns looked at one by one."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for top, left in product(range(0, scores.shape[0], 4), range(0, scores.shape[1], 4)):
        tile = scores[top : top + 4, left : left + 4].tolist()
        sums = [sum(Fraction(tile[row][at]) for row in range(4) for at in one[row]) for one in legal()]
        for row, columns in enumerate(legal()[sums.index(max(sums))]):
            for column in columns:
                keep[top + row, left + column] = True
    return keep


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["wanda", "obd", "values"])
def test_scores_of_files_are_added_up_too(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(8)
    weights = torch.randn(8, 12, generator=generator).to(dtype)
    stored = (
        torch.randn(8, 12, generator=generator) if kind == "values" else torch.rand(12, generator=generator)
    )
    magnitudes, numbers = weights.abs().double(), stored.double()
    scores = {"wanda": magnitudes * numbers, "obd": magnitudes**2 * numbers, "values": numbers.abs()}[kind]
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    save_file({"a.weight": stored}, tmp_path / "s.safetensors")
    text = f'{SPEC}score = {{ kind = "{kind}", file = "s.safetensors" }}\n'
    spec, out = write_spec(tmp_path, text), tmp_path / "m.pruned.safetensors"
    ok("apply", tmp_path / "m.safetensors", spec)
    found = load_file(out)["a.weight"]
    assert torch.equal(found, weights * kept_by_hand(scores))
    assert not torch.equal(found, weights * kept_by_hand(magnitudes))
    assert "scopes are as the spec says" in ok("verify", out, spec).out


def test_a_score_that_is_infinite_has_no_sum_in_any_way(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(8, 8)}, tmp_path / "m.safetensors")
    numbers = torch.ones(8, 8)
    numbers[5, 6] = float("inf")
    save_file({"a.weight": numbers}, tmp_path / "s.safetensors")
    text = f'{SPEC}score = {{ kind = "values", file = "s.safetensors" }}\n'
    said = []
    for way in ("strided", "torch_in_memory"):
        with pytest.MonkeyPatch.context() as patch:
            force(patch, way)
            said.append(refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, text)).err)
    assert said[0] == said[1]
    assert "transposable N:M adds scores up: found one that is infinite" in said[0]


@pytest.mark.parametrize("wrong", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_in_any_way(tmp_path: Path, wrong: float) -> None:
    weights = torch.ones(8, 8, dtype=torch.bfloat16)
    weights[5, 6] = wrong
    save_file({"a.weight": weights}, tmp_path / "m.safetensors")
    said = []
    for way in ("strided", "torch_in_memory"):
        with pytest.MonkeyPatch.context() as patch:
            force(patch, way)
            said.append(refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, SPEC)).err)
    assert said[0] == said[1]
    assert "at [5, 6]: it has no rank" in said[0]


def test_the_shipped_spec_has_it_and_other_commands_take_what_it_makes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(7)
    tensors = {
        f"layers.0.mlp.{name}_proj.weight": torch.randn(128, 128, generator=generator).bfloat16()
        for name in ("up", "down")
    }
    save_file(tensors, tmp_path / "m.safetensors")
    given = ("nofm", "--set", "n=2", "--set", "transposable=true")
    said = ok("apply", tmp_path / "m.safetensors", *given, "-o", tmp_path / "out.safetensors")
    assert "faster: in torch-cutlass" in said.err
    pruned = load_file(tmp_path / "out.safetensors")
    assert all(map(is_legal, pruned.values()))
    assert "scopes are as the spec says" in ok("verify", tmp_path / "out.safetensors", *given).out
    ok("mask", tmp_path / "m.safetensors", *given, "-o", tmp_path / "masks.safetensors")
    again = tmp_path / "again.safetensors"
    ok("reapply", tmp_path / "m.safetensors", tmp_path / "masks.safetensors", "-o", again)
    assert unmarked(again.read_bytes()) == unmarked((tmp_path / "out.safetensors").read_bytes())
    line = refused(
        "apply", tmp_path / "m.safetensors", *given, "--within", tmp_path / "masks.safetensors"
    ).err
    assert "is transposable, and the tiles of the masks may have no pattern inside of them" in line


@pytest.mark.parametrize("method", [ADMM, REFIT])
def test_rebuilt_weights_keep_legal_tiles_and_change_outputs_less_than_the_mask(
    tmp_path: Path, method: str
) -> None:
    tensors = dense()
    stats = statistics(tensors)
    masked, _ = applied(tmp_path, SPEC, tensors, stats)
    rebuilt, _ = applied(tmp_path, with_head(method, SPEC), tensors, stats)
    for name, moment in stats.items():
        assert is_legal(rebuilt[name])
        one, other = (relative_error(found[name], tensors[name], moment) for found in (rebuilt, masked))
        assert one < 0.95 * other


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("[1, 4]", "[1, 8]", "transposable: a.weight: found groups of 8, wanted 2 to 4"),
        (
            "[1, 4]",
            "[4, 4]",
            "transposable: proj has scopes [4, 4] of blocks [1, 1]: wanted single",
        ),
        (
            "[1, 1]",
            "[1, 2]",
            "transposable: proj has scopes [1, 4] of blocks [1, 2]: wanted single",
        ),
        (
            "nnz = 2",
            "threshold = 0.5",
            "transposable: a threshold keeps no fixed number: give nnz or sparsity",
        ),
        ("nnz = 2", 'nnz = 2\nmode = "soft"', 'transposable: mode = "soft" keeps no pattern'),
        ("nnz = 2", "nnz = 2\npermute = true", "transposable: proj: permute moves inputs alone"),
        (
            "nnz = 2",
            'nnz = 2\nscore = {kind = "random"}',
            'transposable: its score has kind = "random": wanted',
        ),
        ("nnz = 2", 'nnz = 2\nscore = {nonfinite = "prune"}', 'transposable: nonfinite = "prune" has scores'),
        ("= true", '= "1 + 1"', "transposable: proj: "),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, old: str, new: str, line: str) -> None:
    tensors = dense()
    save_file({"a.weight": tensors["a.weight"]}, tmp_path / "m.safetensors")
    said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, SPEC.replace(old, new)))
    assert f"[scope.proj] {line}" in said.err


def test_a_matrix_without_whole_tiles_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(6, 8)}, tmp_path / "m.safetensors")
    said = refused("plan", tmp_path / "m.safetensors", write_spec(tmp_path, SPEC))
    assert "a.weight: [6, 8] has no whole tiles: both of the last two must be multiples of 4" in said.err
