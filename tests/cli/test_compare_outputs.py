"""`compare --stats`: the output error of every matrix, against plain sums over rows in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.execution import compare as comparing
from tests.commands import Said, refused, run, valid
from tests.engine.reconstruction.oracle import moments, objective
from tests.samples import save_statistics

Tensors = dict[str, torch.Tensor]
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {"square": (16, 16), "wide": (6, 40), "stack": (3, 8, 16), "turned": (16, 6), "bias": (16,)}


def written(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Tensors, Tensors, Tensors]:
    """A dense file, a pruned one, and statistics of all but the bias and of one matrix by another's name."""
    generator = torch.Generator().manual_seed(1)
    dense = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    pruned = {
        name: torch.where(torch.rand(one.shape, generator=generator) < 0.5, one, torch.zeros_like(one))
        for name, one in dense.items()
    }
    stats = {
        "square": moments(16, 40, generator).contiguous(),
        "wide": moments(40, 90, generator).contiguous(),
        "stack": moments(16, 40, generator, 3).contiguous(),
    }
    weights = {"square": {"square": 1, "turned": 0}, "stack": {"stack": 2}}
    save_file(dense, folder / "dense.safetensors")
    save_file(pruned, folder / "pruned.safetensors")
    save_statistics(folder / "stats.safetensors", "hessian", stats, **weights)
    return dense, pruned, stats


def compare(folder: Path, *words: object) -> Said:
    sides = (folder / "dense.safetensors", folder / "pruned.safetensors")
    return run("compare", *sides, "--stats", folder / "stats.safetensors", *words)


def error_of(dense: torch.Tensor, pruned: torch.Tensor, moment: torch.Tensor) -> float:
    stacks = (one if one.ndim == 3 else one[None] for one in (dense, pruned, moment))
    lost = whole = 0.0
    for before, after, one in zip(*stacks, strict=True):
        lost += sum(objective(after, before, one, 0.0))
        whole += sum(objective(torch.zeros_like(before), before, one, 0.0))
    return float((lost / whole) ** 0.5)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float8_e4m3fn])
@pytest.mark.parametrize("slab", [1 << 22, 50])
def test_it_is_that_of_plain_sums(
    tmp_path: Path, dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "_WORKED_ON", slab)
    dense, pruned, stats = written(tmp_path, dtype)
    said = compare(tmp_path, "--json")
    assert said.code == 0, said.err
    document = valid(said.out, "compare")
    found = {one["name"]: one["output_error"] for one in document["tensors"]}
    wanted = {name: error_of(dense[name], pruned[name], stats[name]) for name in stats}
    wanted["turned"] = error_of(dense["turned"].T, pruned["turned"].T, stats["square"])
    assert {name for name, one in found.items() if one is not None} == wanted.keys()
    for name, error in wanted.items():
        assert found[name] == pytest.approx(error, rel=1e-4)
    assert document["totals"]["output_error"] == pytest.approx(sum(wanted.values()) / 4, rel=1e-4)


def test_it_is_a_column_with_its_mean_and_may_be_required(tmp_path: Path) -> None:
    written(tmp_path)
    document = json.loads(compare(tmp_path, "--json").out)
    table = compare(tmp_path).out
    assert "output error" in table.splitlines()[0]
    assert f"{document['totals']['output_error']:.2%} mean" in table
    assert ",output_error," in compare(tmp_path, "--csv").out.splitlines()[0]
    assert "output error" in compare(tmp_path, "--markdown").out
    assert compare(tmp_path, "--require", "output_error<=1 in **").code == 0  # the bias has none
    said = compare(tmp_path, "--require", "output_error<=0.1 in square")
    assert said.code == 1
    assert "square" in said.err
    assert "output error" not in compare(tmp_path, "--match", "bias").out
    sides = (tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors")
    assert "output error" not in run("compare", *sides).out


@pytest.mark.parametrize("words", [("--require", "output_error<=1"), ("--sort", "output_error")])
def test_without_statistics_it_cannot_be_asked_for(tmp_path: Path, words: tuple[str, ...]) -> None:
    written(tmp_path)
    said = refused("compare", tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors", *words)
    assert "output_error is not known without --stats: give what calibrate wrote" in said.err


@pytest.mark.parametrize("factor", [1e-50, 1e50])
def test_float64_is_not_narrowed(tmp_path: Path, factor: float) -> None:
    dense, pruned, stats = written(tmp_path, torch.float64)
    save_file({name: one * factor for name, one in dense.items()}, tmp_path / "dense.safetensors")
    save_file({name: one * factor for name, one in pruned.items()}, tmp_path / "pruned.safetensors")
    document = json.loads(compare(tmp_path, "--json").out)
    found = {one["name"]: one["output_error"] for one in document["tensors"]}
    assert found["square"] == pytest.approx(error_of(dense["square"], pruned["square"], stats["square"]))


def test_stacks_may_have_their_inputs_in_the_middle_and_an_expert_without_tokens(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(3, 16, 5, generator=generator)
    pruned = dense * (torch.rand(dense.shape, generator=generator) < 0.5)
    moment = moments(16, 40, generator, 3)
    moment[1] = 0
    save_file({"w": dense}, tmp_path / "dense.safetensors")
    save_file({"w": pruned}, tmp_path / "pruned.safetensors")
    stats = {"w": moment.contiguous()}
    save_statistics(tmp_path / "stats.safetensors", "hessian", stats, w={"w": 1})
    (entry,) = json.loads(compare(tmp_path, "--json").out)["tensors"]
    assert entry["output_error"] == pytest.approx(error_of(dense.mT, pruned.mT, moment), rel=1e-4)


def test_a_stack_has_no_inputs_along_its_matrices(tmp_path: Path) -> None:
    dense = torch.randn(8, 8, 16)
    for side in ("dense", "pruned"):
        save_file({"w": dense}, tmp_path / f"{side}.safetensors")
    for dim in (0, 7):
        stats = {"w": torch.eye(8).repeat(8, 1, 1)}
        save_statistics(tmp_path / "stats.safetensors", "hessian", stats, w={"w": dim})
        said = compare(tmp_path)
        assert said.code == 2
        assert f"w cannot have its inputs along dimension {dim}" in said.err


def test_what_did_not_change_has_none_of_it(tmp_path: Path) -> None:
    dense, _, _ = written(tmp_path)
    save_file(dense, tmp_path / "pruned.safetensors")
    document = json.loads(compare(tmp_path, "--json").out)
    assert document["totals"]["output_error"] == 0


def test_weights_that_are_not_finite_have_no_error(tmp_path: Path) -> None:
    dense, *_ = written(tmp_path)
    dense["square"][0, 0] = float("nan")
    save_file(dense, tmp_path / "dense.safetensors")
    document = json.loads(compare(tmp_path, "--json").out)
    found = {one["name"]: one["output_error"] for one in document["tensors"]}
    assert found["square"] is None
    assert found["wide"] is not None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"square": torch.eye(16) * torch.nan}, "square holds NaN or infinity; calibrate again"),
        ({"square": -torch.eye(16)}, "square has a negative diagonal: no second moment"),
        (
            {"square": 3 * torch.ones(16, 16) - 2 * torch.eye(16)},
            "square has directions of negative energy: no",
        ),
        ({"square": torch.zeros(16, 16)}, "square is zero: nothing was seen of its inputs"),
        ({"square": torch.eye(15)}, "square has F32 of shape [15, 15], wanted floats of shape [16, 16]"),
        ({"square": torch.ones(16)}, "has norms of inputs alone; calibrate with --kind hessian"),
        (None, "are they of another checkpoint?"),
    ],
)
def test_statistics_that_do_not_fit_get_one_line(tmp_path: Path, change: Any, line: str) -> None:
    _, _, stats = written(tmp_path)
    wrong = {"other": torch.eye(4)} if change is None else stats | change
    save_file(wrong, tmp_path / "stats.safetensors")
    said = compare(tmp_path)
    assert said.code == 2
    assert line in said.err
    assert len(said.err.splitlines()) == 1


def test_a_moment_of_one_token_that_was_rounded_to_eight_bits_is_a_moment(tmp_path: Path) -> None:
    dense, pruned, stats = written(tmp_path)
    token = torch.randn(1, 40, generator=torch.Generator().manual_seed(0))
    rounded = (token.T @ token).to(torch.bfloat16)
    least = torch.linalg.eigh(rounded.double()).eigenvectors[:, 0]
    assert least @ rounded.double() @ least < -1e-3
    pruned["wide"][0] = dense["wide"][0] - least.float()  # all that changed lies where only rounding is
    save_file(pruned, tmp_path / "pruned.safetensors")
    save_file({"wide": rounded, "stack": stats["stack"]}, tmp_path / "stats.safetensors")
    said = compare(tmp_path, "--json")
    assert said.code == 0, said.err
    errors = {one["name"]: one["output_error"] for one in json.loads(said.out)["tensors"]}
    assert errors["wide"] >= 0
