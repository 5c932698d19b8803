"""`compare --stats` with gradients: what matrices lose in units of the loss, against plain products."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune import Matrix
from sparseprune.engine import errors_of
from sparseprune.execution import compare as comparing
from tests.commands import ok, refused, run, valid
from tests.statistics import Tensors, drawn, save

SHAPES = {"square": (16, 16), "wide": (8, 40), "stack": (3, 8, 16), "bias": (16,)}


def written(
    folder: Path, groups: int = 1, dtype: torch.dtype = torch.float32, *, turned: bool = False
) -> tuple[Tensors, Tensors, Tensors, Tensors]:
    """A dense file, a pruned one, and statistics of all but the bias."""
    generator = torch.Generator().manual_seed(1)
    dense = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    if turned:
        dense = {name: one.mT.contiguous() if one.ndim > 1 else one for name, one in dense.items()}
    pruned = {
        name: torch.where(torch.rand(one.shape, generator=generator) < 0.5, one, torch.zeros_like(one))
        for name, one in dense.items()
    }
    inputs, gradients = drawn(dense, groups=groups, turned=turned)
    save_file(dense, folder / "dense.safetensors")
    save_file(pruned, folder / "pruned.safetensors")
    stats = folder / "stats.safetensors"
    if turned:
        del inputs["stack"], gradients["stack"]
    save(stats, inputs, gradients, input_dim=0 if turned else None)
    return dense, pruned, inputs, gradients


def words(folder: Path, *more: object) -> tuple[object, ...]:
    sides = (folder / "dense.safetensors", folder / "pruned.safetensors")
    return ("compare", *sides, "--stats", folder / "stats.safetensors", *more)


def found(folder: Path) -> dict[str, Any]:
    document = valid(ok(*words(folder, "--json")).out, "compare")
    return {one["name"]: one for one in document["tensors"]} | {"": document["totals"]}


def whole(gradients: torch.Tensor, groups: int) -> torch.Tensor:
    """One matrix of blocks along the diagonal."""
    if groups == 1:
        return gradients
    size = gradients.shape[-1]
    found = torch.zeros(groups * size, groups * size, dtype=gradients.dtype)
    for group, block in enumerate(gradients):
        found[group * size : (group + 1) * size, group * size : (group + 1) * size] = block
    return found


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("slab", [1 << 22, 50])
def test_both_errors_are_those_of_plain_products(
    tmp_path: Path, groups: int, dtype: torch.dtype, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparing, "_WORKED_ON", slab)
    dense, pruned, inputs, gradients = written(tmp_path, groups, dtype)
    told = found(tmp_path)
    errors = []
    for name, moment in inputs.items():
        sides = [one[name].double() for one in (dense, pruned, inputs, gradients)]
        stacks = [one if dense[name].ndim == 3 else one[None] for one in sides]
        lost = energy = 0.0
        for before, after, hessian, outer in zip(*stacks, strict=True):
            metric = whole(outer, groups)
            away = after - before
            lost += float((metric @ away @ hessian * away).sum())
            energy += float((metric @ before @ hessian * before).sum())
        errors.append((lost / energy) ** 0.5)
        assert told[name]["loss_error"] == pytest.approx(errors[-1], rel=1e-6)
        if dense[name].ndim == 2:
            by_engine = errors_of(Matrix(dense[name], moment, gradients=gradients[name]), pruned[name])
            assert by_engine.loss is not None
            assert told[name]["loss_error"] == pytest.approx(by_engine.loss[0], rel=1e-5)
            assert told[name]["output_error"] == pytest.approx(by_engine.outputs[0], rel=1e-5)
    assert told["bias"]["loss_error"] is None
    assert told[""]["loss_error"] == pytest.approx(sum(errors) / len(errors))


@pytest.mark.parametrize("groups", [1, 4])
def test_inputs_may_come_first(tmp_path: Path, groups: int) -> None:
    dense, pruned, inputs, gradients = written(tmp_path, groups, turned=True)
    told = found(tmp_path)
    for name, moment in inputs.items():
        errors = errors_of(Matrix(dense[name], moment, 0, gradients=gradients[name]), pruned[name])
        assert errors.loss is not None
        assert told[name]["loss_error"] == pytest.approx(errors.loss[0], rel=1e-5)


def test_it_is_a_column_with_its_mean_and_may_be_required(tmp_path: Path) -> None:
    _, _, inputs, gradients = written(tmp_path)
    told = found(tmp_path)
    table = ok(*words(tmp_path)).out
    assert "loss error" in table.splitlines()[0]
    assert f"{told['']['loss_error']:.2%} mean" in table
    assert ",loss_error," in ok(*words(tmp_path, "--csv")).out.splitlines()[0]
    ok(*words(tmp_path, "--require", "loss_error<=1", "--sort", "loss_error"))
    said = run(*words(tmp_path, "--require", "loss_error<=0.01 in square"))
    assert (said.code, "square" in said.err) == (1, True)
    gradients.pop("wide")
    save(tmp_path / "stats.safetensors", inputs, gradients)
    told = found(tmp_path)
    assert (told["wide"]["loss_error"], told["wide"]["output_error"] is None) == (None, False)
    ok(*words(tmp_path, "--require", "loss_error<=1"))  # of those that have one
    save(tmp_path / "stats.safetensors", inputs, {})
    assert "loss error" not in ok(*words(tmp_path)).out
    for more in (("--require", "loss_error<=1"), ("--sort", "loss_error")):
        said = refused(*words(tmp_path, *more))
        assert "loss_error is not known: " in said.err
        assert "stats.safetensors has no gradients; calibrate --gradients" in said.err
    said = refused(*words(tmp_path)[:3], "--require", "loss_error<=1")
    assert "loss_error is not known without --stats: give what calibrate wrote" in said.err


def test_it_is_that_of_the_report_of_apply(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "spec.toml").write_text(
        'version = 1\n[scope.all]\ntensors = "{name:square|wide}"\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2\n'
    )
    stats = ("--stats", tmp_path / "stats.safetensors")
    out = ("-o", tmp_path / "pruned.safetensors", "--force")
    report = ok("apply", tmp_path / "dense.safetensors", tmp_path / "spec.toml", *stats, *out, "--json").out
    told = found(tmp_path)
    for one in json.loads(report)["tensors"]:
        assert told[one["name"]]["loss_error"] == pytest.approx(one["loss_error"], rel=1e-6)
        assert told[one["name"]]["output_error"] == pytest.approx(one["output_error"], rel=1e-6)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (torch.eye(16) * torch.nan, "square.gradients holds NaN or infinity; calibrate again"),
        (-torch.eye(16), "square.gradients has a negative diagonal: no second moment"),
        (
            3 * torch.ones(16, 16) - 2 * torch.eye(16),
            "square.gradients has directions of negative energy: no second moment; calibrate again",
        ),
        (
            torch.eye(15),
            "square.gradients is F32 of shape [15, 15], wanted floats of shape [16, 16], or groups of its",
        ),
        (torch.eye(16, dtype=torch.int32), "square.gradients is I32 of shape [16, 16], wanted floats"),
    ],
)
def test_gradients_that_do_not_fit_get_one_line(tmp_path: Path, wrong: torch.Tensor, line: str) -> None:
    dense, pruned, inputs, gradients = written(tmp_path)
    lowest = torch.zeros(16)
    lowest[0], lowest[1] = 1, -1  # all rows that change do so against each other
    pruned["square"] = dense["square"] + torch.outer(lowest, torch.ones(16))
    save_file(pruned, tmp_path / "pruned.safetensors")
    save(tmp_path / "stats.safetensors", inputs, gradients | {"square": wrong})
    said = refused(*words(tmp_path))
    assert line in said.err
    assert len(said.err.splitlines()) == 1


def test_nothing_lost_is_nothing_also_where_no_gradient_came(tmp_path: Path) -> None:
    dense, _, inputs, gradients = written(tmp_path)
    zero = gradients | {"square": torch.zeros(16, 16)}
    save(tmp_path / "stats.safetensors", inputs, zero)
    assert found(tmp_path)["square"]["loss_error"] == 0
    save_file(dense, tmp_path / "pruned.safetensors")
    assert found(tmp_path)[""]["loss_error"] == 0
