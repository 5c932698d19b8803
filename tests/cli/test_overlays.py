"""Shards of which two hold a tensor: the index says which one counts, the other one is carried along."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from sparseprune.checkpoint import open_checkpoint
from tests.cli.removal import LLAMA, decoder
from tests.commands import ok
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, unmarked, write_spec

BASE, OVERLAY, INDEX = "base.safetensors", "overlay.safetensors", "model.safetensors.index.json"
OVERLAID = ("0.up.weight", "1.down.weight")


def index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))


@pytest.fixture(params=[OVERLAY, BASE])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of two layers; two of its matrices are in both shards, and count in one of them."""
    there = tmp_path / "in"
    there.mkdir()
    tensors = mlp_tensors()
    other = {name: tensors[name] * 3 + 1 for name in OVERLAID}
    base, overlay = tensors | other, {name: tensors[name] for name in OVERLAID}
    if request.param == BASE:
        base, overlay = tensors, other
    save_file(base, there / BASE)
    save_file(overlay | {"new": torch.ones(5)}, there / OVERLAY)
    index(there, dict.fromkeys(tensors, BASE) | dict.fromkeys(OVERLAID, request.param) | {"new": OVERLAY})
    return tmp_path


def counted(folder: Path) -> dict[str, torch.Tensor]:
    """What a loader that goes by the index loads."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {place: load_file(folder / place) for place in set(places.values())}
    return {name: files[place][name] for name, place in places.items()}


def aside(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that the index has in another shard."""
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    return {
        f"{file}: {name}": one
        for file in (BASE, OVERLAY)
        for name, one in load_file(folder / file).items()
        if places[name] != file
    }


def check_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_tensor_stands_in_the_order_of_the_shard_where_it_counts(folder: Path) -> None:
    checkpoint = open_checkpoint(folder / "in")
    assert sorted(checkpoint.tensors) == sorted([*mlp_tensors(), "new"])
    of_shards = [entry.name for shard in checkpoint.shards for entry in checkpoint.counted(shard)]
    assert list(checkpoint.tensors) == of_shards
    places = json.loads((folder / "in" / INDEX).read_text())["weight_map"]
    assert {name: one.shard.name for name, one in checkpoint.tensors.items()} == places


@pytest.mark.parametrize("spec", [TWO_OF_FOUR, CHANNELS])
@pytest.mark.parametrize("form", ["bool", "packed"])
def test_apply_prunes_what_counts_and_carries_the_rest_along(folder: Path, spec: str, form: str) -> None:
    save_file(counted(folder / "in"), folder / "plain.safetensors")
    path = write_spec(folder, spec)
    ok("apply", folder / "plain.safetensors", path)
    said = ok("apply", folder / "in", path, "-o", folder / "out", "--mask-format", form, "--json")
    check_same(counted(folder / "out"), load_file(folder / "plain.pruned.safetensors"))
    check_same(aside(folder / "out"), aside(folder / "in"))
    check_same(load_masks(folder / "out"), load_masks(folder / "plain.pruned.safetensors"))
    for file in (BASE, OVERLAY):
        made, dense = (len(unmarked((folder / home / file).read_bytes())) for home in ("out", "in"))
        assert made == dense
    report = json.loads(said.out)
    assert report["totals"]["numel"] == sum(one.numel() for one in counted(folder / "in").values())
    again = ok("reapply", folder / "in", folder / "out", "-o", folder / "again", "--json")
    assert json.loads(again.out)["totals"]["pruned"] == report["totals"]["pruned"]
    check_same(counted(folder / "again"), counted(folder / "out"))
    check_same(aside(folder / "again"), aside(folder / "in"))
    ok("verify", folder / "out", path)


def test_commands_that_read_count_each_tensor_once(folder: Path) -> None:
    there: Any = json.loads(ok("inspect", folder / "in", "--json").out)
    assert there["totals"]["tensors"] == len(mlp_tensors()) + 1
    ok("compare", folder / "in", folder / "in", "--require", "altered==0")
    save_file(counted(folder / "in"), folder / "plain.safetensors")
    found = json.loads(ok("compare", folder / "in", folder / "plain.safetensors", "--json").out)
    assert (found["totals"]["altered"], found["added"], found["removed"]) == (0, [], [])


def test_remove_leaves_the_tensors_out_that_do_not_count(tmp_path: Path) -> None:
    tensors = decoder()
    name = "model.layers.1.mlp.up_proj.weight"
    for folder in ("in", "plain"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(LLAMA))
    save_file(tensors, tmp_path / "plain/model.safetensors")
    save_file(tensors | {name: tensors[name] + 1}, tmp_path / "in" / BASE)
    save_file({name: tensors[name]}, tmp_path / "in" / OVERLAY)
    index(tmp_path / "in", dict.fromkeys(tensors, BASE) | {name: OVERLAY})
    for folder in ("in", "plain"):
        words = ("--set", "sparsity=0.5", "-o", tmp_path / f"{folder}-out")
        ok("remove", tmp_path / folder, "mlp-channels", *words)
    check_same(counted(tmp_path / "in-out"), load_file(tmp_path / "plain-out/model.safetensors"))
    assert name not in load_file(tmp_path / "in-out" / BASE)
