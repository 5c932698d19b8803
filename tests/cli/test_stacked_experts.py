"""Experts one below another in a matrix, as DBRX has them: each has statistics of its own."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import Matrix, refit
from tests.commands import ok, refused
from tests.samples import save_statistics, write_spec

EXPERTS, WIDTH, HIDDEN = 3, 8, 12
UP, DOWN = "0.experts.mlp.w1", "0.experts.mlp.w2"
DIMS = {UP: 1, DOWN: 0}
OF = {name: {name: dim} for name, dim in DIMS.items()}
SPEC = """
version = 1
[scope.all]
tensors = "{layer}.experts.mlp.{name}"
block = [1, 1]
shape = SHAPE
nnz = 2
"""
SCORE = """[scope.all.score]
kind = "wanda"
file = "stats.safetensors"
"""
REBUILT = """[scope.all.reconstruct]
file = "stats.safetensors"
method = "METHOD"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stacks, one whose inputs are columns and one whose inputs are rows, and moments of each expert."""
    generator = torch.Generator().manual_seed(3)
    shapes = dict.fromkeys(DIMS, (EXPERTS * WIDTH, HIDDEN))
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "m.safetensors")
    moments = {}
    for name, features in ((UP, HIDDEN), (DOWN, WIDTH)):
        inputs = torch.randn(EXPERTS, 40, features, generator=generator)
        inputs *= torch.rand(EXPERTS, 1, features, generator=generator) * 5
        moments[name] = inputs.mT @ inputs / 40
    norms = {name: one.diagonal(dim1=1, dim2=2).sqrt().contiguous() for name, one in moments.items()}
    save_statistics(tmp_path / "stats.safetensors", "hessian", moments, **OF)
    save_statistics(tmp_path / "norms.safetensors", "norm", norms, **OF)
    return tmp_path


def apart(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """(experts, outputs, inputs)."""
    stack = tensor.reshape(EXPERTS, WIDTH, HIDDEN)
    return stack if DIMS[name] == 1 else stack.mT


def losses(folder: Path, pruned: Path) -> float:
    """What the outputs lose, over all experts."""
    dense, after = load_file(folder / "m.safetensors"), load_file(pruned)
    moments = load_file(folder / "stats.safetensors")
    changes = [(apart(name, after[name] - dense[name]), moments[name]) for name in DIMS]
    return sum(float(torch.einsum("eoi,eij,eoj->", change, moment, change)) for change, moment in changes)


@pytest.mark.parametrize("file", ["stats", "norms"])
@pytest.mark.parametrize("shape", ["[1, 4]", "[4, 1]"])
def test_elements_are_ranked_by_the_norms_of_their_own_expert(folder: Path, file: str, shape: str) -> None:
    spec = write_spec(folder, SPEC.replace("SHAPE", shape) + SCORE.replace("stats.", f"{file}."))
    ok("apply", folder / "m.safetensors", spec)
    dense, moments = load_file(folder / "m.safetensors"), load_file(folder / "stats.safetensors")
    pruned = load_file(folder / "m.pruned.safetensors")
    for name, dim in DIMS.items():
        norms = moments[name].diagonal(dim1=1, dim2=2).sqrt()
        scores = apart(name, dense[name]).abs() * norms.unsqueeze(1)
        scores = (scores if dim == 1 else scores.mT).reshape(EXPERTS * WIDTH, HIDDEN)
        groups = scores.reshape(-1, 4) if shape == "[1, 4]" else scores.T.reshape(-1, 4)
        keep = torch.zeros_like(groups).scatter_(1, groups.topk(2).indices, 1.0).bool()
        keep = keep.reshape(scores.shape) if shape == "[1, 4]" else keep.reshape(HIDDEN, -1).T
        assert torch.equal(pruned[name], torch.where(keep, dense[name], 0))


@pytest.mark.parametrize("method", ["admm", "refit"])
def test_survivors_are_rebuilt_by_the_moments_of_their_own_expert(folder: Path, method: str) -> None:
    spec = SPEC.replace("SHAPE", "[1, 4]")
    ok("apply", folder / "m.safetensors", write_spec(folder, spec), "-o", folder / "by-mask.safetensors")
    ranked = SCORE if method == "refit" else ""
    path = write_spec(folder, spec + ranked + REBUILT.replace("METHOD", method))
    ok("apply", folder / "m.safetensors", path, "-o", folder / "rebuilt.safetensors")
    assert losses(folder, folder / "rebuilt.safetensors") < 0.8 * losses(
        folder, folder / "by-mask.safetensors"
    )
    dense, moments = load_file(folder / "m.safetensors"), load_file(folder / "stats.safetensors")
    after = load_file(folder / "rebuilt.safetensors")
    for name in DIMS:
        keep = apart(name, after[name]) != 0
        for expert in range(EXPERTS):
            matrix = Matrix(apart(name, dense[name])[expert].contiguous(), moments[name][expert])
            wanted = refit(matrix, keep[expert])
            torch.testing.assert_close(apart(name, after[name])[expert], wanted, rtol=2e-3, atol=2e-3)


def test_compare_tells_the_output_error_over_all_experts(folder: Path) -> None:
    ok("apply", folder / "m.safetensors", write_spec(folder, SPEC.replace("SHAPE", "[1, 4]")))
    pruned = folder / "m.pruned.safetensors"
    said = ok("compare", folder / "m.safetensors", pruned, "--stats", folder / "stats.safetensors", "--json")
    found = {one["name"]: one["output_error"] for one in json.loads(said.out)["tensors"]}
    dense, after = load_file(folder / "m.safetensors"), load_file(pruned)
    moments = load_file(folder / "stats.safetensors")
    for name in DIMS:
        change, whole = apart(name, after[name] - dense[name]), apart(name, dense[name])
        lost, there = (torch.einsum("eoi,eij,eoj->", one, moments[name], one) for one in (change, whole))
        assert found[name] == pytest.approx(float((lost / there).sqrt()), rel=1e-5)


def test_statistics_of_a_number_of_experts_that_does_not_divide_the_rows_are_refused(folder: Path) -> None:
    moments = load_file(folder / "stats.safetensors")
    wrong = {name: torch.cat([one, one, one[:1]])[:7].contiguous() for name, one in moments.items()}
    save_statistics(folder / "stats.safetensors", "hessian", wrong, **OF)
    spec = write_spec(folder, SPEC.replace("SHAPE", "[1, 4]") + SCORE)
    assert f"{UP} has shape [7, 12, 12], wanted " in refused("apply", folder / "m.safetensors", spec).err
