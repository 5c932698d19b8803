"""`[reconstruct]` with nested scopes: one projection for all levels, and what follows it."""

from pathlib import Path

import pytest
import torch

import sparseprune
from sparseprune import BlockCoupling, BlockSpec, Level, Matrix, ScopeSpec, admm, nested_projection, refit
from tests.cli.test_reconstruct import ADMM, REFIT, Tensors, applied, relative_error, statistics, with_head
from tests.commands import ok, refused
from tests.samples import CHANNELS, mlp_tensors, write_spec

V_N_M = """
version = 1
[scope.columns]
tensors = "**.weight"
block = [4, 1]
shape = [1, 8]
nnz = 4
[scope.rows]
tensors = "**.weight"
block = [1, 1]
shape = [1, 8]
nnz = 2
within = "columns"
"""
IN_CHANNELS = f"""{CHANNELS.replace("scope.mlp", "scope.channels")}
[scope.fine]
tensors = "{{layer}}.{{name:up|down}}.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
within = "channels"
"""
PLAIN = {
    "wanda": 'score = { kind = "wanda", file = "stats.safetensors" }\n',
    "obd": 'score = { kind = "obd", file = "stats.safetensors" }\n',
    "magnitude": "",
}


def matrices(tensors: Tensors, stats: Tensors) -> Tensors:
    return {name: tensors[name] for name in stats}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_admm_has_one_projection_for_all_levels(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mlp_tensors(dtype=dtype)
    stats = statistics(tensors)
    pruned, report = applied(tmp_path, with_head(ADMM, V_N_M), tensors, stats)
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    for name, moment in stats.items():
        matrix = Matrix(tensors[name], moment)
        param = torch.empty(tensors[name].shape, dtype=matrix.work_dtype)
        levels = [
            Level(ScopeSpec(BlockSpec(param, (4, 1)), (1, 8)), 4),
            Level(ScopeSpec(BlockSpec(param, (1, 1)), (1, 8)), 2),
        ]
        (wanted,) = admm([matrix], nested_projection(levels, [param]), joint=True)
        assert torch.equal(masks[name], wanted.mask)
        assert torch.equal(pruned[name], wanted.weights)
        assert relative_error(pruned[name], tensors[name], moment) < 0.9 * relative_error(
            tensors[name] * wanted.mask, tensors[name], moment
        )
    dropped = sum(int((~mask).sum()) for mask in masks.values())
    rules = {rule["name"]: rule for rule in report["rules"]}
    whole = sum(mask.numel() for mask in masks.values())
    assert rules["scope.columns"]["pruned"] >= whole // 2  # and blocks of which the rows keep nothing
    assert rules["scope.rows"]["pruned"] == dropped == report["totals"]["pruned"] == whole * 3 // 4
    assert {rule["reconstructed"] for rule in rules.values()} == {"admm"}
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml", "-q")


@pytest.mark.parametrize("score", PLAIN)
@pytest.mark.parametrize("spec", [V_N_M, IN_CHANNELS], ids=["v:n:m", "channels"])
def test_refit_solves_for_the_masks_that_the_scores_give(tmp_path: Path, spec: str, score: str) -> None:
    tensors = mlp_tensors()
    stats = statistics(tensors)
    scored = spec + PLAIN[score]
    applied(tmp_path, scored, tensors, stats)
    plain = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    pruned, _ = applied(tmp_path, with_head(REFIT, scored), tensors, stats)
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    assert all(torch.equal(masks[name], mask) for name, mask in plain.items())
    for name, moment in stats.items():
        assert torch.equal(pruned[name], refit(Matrix(tensors[name], moment), masks[name]))
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml", "-q")


def test_rows_that_feed_channels_have_no_say_in_the_outer_level(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    stats = statistics(tensors)
    applied(tmp_path, with_head(ADMM, IN_CHANNELS), tensors, stats)
    before = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    for layer in range(2):  # by magnitude these four would win
        tensors[f"{layer}.up.weight"][:4] *= 128
    pruned, report = applied(tmp_path, with_head(ADMM, IN_CHANNELS), tensors, stats)
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    for layer in range(2):
        up, bias, down = (masks[f"{layer}.{name}"] for name in ("up.weight", "up.bias", "down.weight"))
        alive = up.any(1) | down.any(0)
        assert int(alive.sum()) <= 12
        assert torch.equal(down, before[f"{layer}.down.weight"])
        assert torch.equal(bias, alive)
        assert (up.reshape(-1, 4).sum(1) <= 2).all()
        assert (down.reshape(-1, 4).sum(1) <= 2).all()
        assert (up[alive].reshape(-1, 4).sum(1) == 2).all()
        for name, mask in (("up.weight", up), ("down.weight", down)):
            key = f"{layer}.{name}"
            assert not pruned[key][~mask].any()
            lost = relative_error(tensors[key] * mask, tensors[key], stats[key])
            assert relative_error(pruned[key], tensors[key], stats[key]) <= lost
    rules = {rule["name"]: rule for rule in report["rules"]}
    assert rules["scope.channels"]["pruned"] == sum(
        int((~masks[f"{layer}.up.bias"]).sum()) * (2 * tensors[f"{layer}.up.weight"].shape[1] + 1)
        for layer in range(2)
    )
    assert report["totals"]["pruned"] == sum(int((~mask).sum()) for mask in masks.values())
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml", "-q")


def test_the_outer_level_of_fused_blocks_is_that_of_the_engine(tmp_path: Path) -> None:
    tensors = {name: one for name, one in mlp_tensors().items() if name.startswith("0.")}
    stats = statistics(tensors)
    pruned, _ = applied(tmp_path, with_head(ADMM, IN_CHANNELS), tensors, stats)
    names = ["0.down.weight", "0.up.weight"] if next(iter(stats)) == "0.down.weight" else list(stats)
    params = {name: torch.empty_like(tensors[name]) for name in names}
    up, down = params["0.up.weight"], params["0.down.weight"]
    blocks = [BlockSpec(up, (1, -1)), BlockSpec(down, (-1, 1))]
    channel = ScopeSpec(BlockCoupling(blocks, [(0, 1), (1, 0)]), ())
    fine = [Level(ScopeSpec(BlockSpec(one, ()), (1, 4)), 2) for one in (down, up)]
    levels = [Level(channel, 12, silent=(blocks[0],)), *fine]
    every = [Matrix(tensors[name], stats[name]) for name in names]
    found = admm(every, nested_projection(levels, [params[name] for name in names]), joint=True)
    for name, one in zip(names, found, strict=True):
        assert torch.equal(pruned[name], one.weights)


def test_levels_without_statistics_are_told(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    stats = {name: one for name, one in statistics(tensors).items() if "down" in name}
    spec = with_head(ADMM.replace("\n", "\noptional = true\n", 1), IN_CHANNELS)
    applied(tmp_path, V_N_M, tensors, stats)
    said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, spec), "--force")
    assert "nested scopes are reconstructed together, and there are no statistics of 0.up.weight" in said.err


def test_matrices_without_statistics_are_masked_alone_where_that_is_allowed(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    stats = {name: one for name, one in statistics(tensors).items() if "down" in name}
    spec = with_head(ADMM + "optional = true\n", V_N_M)
    pruned, report = applied(tmp_path, spec, tensors, stats)
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    for name, mask in masks.items():
        dense = tensors[name].where(mask, 0)
        assert torch.equal(pruned[name], dense) == ("up" in name)
    assert report["totals"]["output_error"] < report["totals"]["output_error_masked"]
    assert sum(rule["pruned"] for rule in report["rules"][1:]) == report["totals"]["pruned"]
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml", "-q")
