"""`remove` of nested scopes: what outer rules drop is cut out, what inner ones drop stays as zeros."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparseprune.spec import find_spec
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, refused, run, valid
from tests.families.checkpoints import Checkpoint, make

Tensors = dict[str, torch.Tensor]


def spec_of(folder: Path, group: int) -> Path:
    """The shipped spec, whose channels go in groups of so many."""
    text = find_spec("mlp-channels-2of4").text
    assert "shape[0] % 4 == 0" in text
    path = folder / "spec.toml"
    path.write_text(text.replace("shape[0] % 4 == 0", "True").replace("shape = [4] ", f"shape = [{group}] "))
    return path


def cut(pruned: Tensors, left: Tensors) -> Tensors:
    """Tensors without the rows and columns that are zero, in the dimensions in which less is left."""
    found = {}
    for name, tensor in pruned.items():
        for dim, size in enumerate(left[name].shape):
            if tensor.shape[dim] > size:
                others = [each for each in range(tensor.ndim) if each != dim]
                alive = tensor.ne(0).any(others[0]) if others else tensor.ne(0)
                tensor = tensor[(slice(None),) * dim + (alive,)]  # noqa: PLW2901
        found[name] = tensor
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
def test_the_smaller_model_has_the_pattern_of_the_inner_rule(tmp_path: Path, family: str) -> None:
    dense: Checkpoint = make(family, tmp_path)
    ok("apply", dense.folder, "mlp-channels-2of4", "-o", tmp_path / "pruned", "-q")
    said = ok("remove", dense.folder, "mlp-channels-2of4", "-o", tmp_path / "smaller", "--json", "-q")
    removal = valid(said.out, "remove")
    assert removal["warnings"] == []
    assert removal["totals"]["numel_after"] < removal["totals"]["numel"]
    assert [rule.get("within") for rule in removal["rules"]] == [None, "scope.mlp"]
    pruned, smaller = (
        {
            name: one
            for file in (tmp_path / each).glob("*.safetensors")
            for name, one in load_file(file).items()
        }
        for each in ("pruned", "smaller")
    )
    assert pruned.keys() == smaller.keys()
    if family in {"llama", "mixtral"}:
        for name, wanted in cut(pruned, smaller).items():
            assert torch.equal(smaller[name], wanted), name
    ok("verify", tmp_path / "smaller", "2of4", "-q")
    assert sum(one.numel() for one in smaller.values()) == removal["totals"]["numel_after"]


def test_groups_that_are_cut_apart_are_told(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    for group, warned in ((4, False), (1, True)):
        out = tmp_path / f"smaller{group}"
        said = ok("remove", dense, spec_of(tmp_path, group), "-o", out)
        assert ("scope.matrix no longer holds in " in said.err) == warned
        assert bool(json.loads((out / "sparseprune/report.json").read_text())["warnings"]) == warned
    assert run("remove", dense, spec_of(tmp_path, 1), "-o", tmp_path / "strict", "--strict", "-q").code == 2


def test_a_target_counts_what_is_cut_out(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    plan = valid(ok("plan", dense, "mlp-channels-2of4", "--json").out, "plan")
    whole, planned = plan["totals"]["numel"], plan["removal"]["numel"]
    assert planned < whole
    words = ("mlp-channels-2of4", "--target", f"params={planned}")
    ok("remove", dense, *words, "-o", tmp_path / "smaller", "-q")
    report = json.loads((tmp_path / "smaller/sparseprune/report.json").read_text())
    assert report["totals"]["numel_after"] <= planned
    said = refused("apply", dense, *words)
    assert "only the data tells what scope.matrix drops of what scope.mlp keeps" in said.err


def test_an_outer_rule_that_cannot_be_cut_out_is_refused(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    said = refused("remove", dense, "vnm", "--set", "v=4", "-o", tmp_path / "smaller")
    assert "scope.columns cannot be removed" in said.err
    assert "scope.rows" not in said.err
