"""`[reconstruct]` in a spec: what apply writes and reports, against the engine on whole tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune import BlockSpec, Matrix, ScopeSpec, admm, projection, refit
from sparseprune.api.resources import memory_of
from sparseprune.checkpoint.statistics import STATISTICS_KEY
from tests.commands import ok, refused, run, valid
from tests.engine.reconstruction.oracle import moments, objective
from tests.limits import narrow
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, save_statistics, write_shards, write_spec

Tensors = dict[str, torch.Tensor]
ADMM = '[reconstruct]\nfile = "stats.safetensors"\n'
REFIT = '[reconstruct]\nfile = "stats.safetensors"\nmethod = "refit"\n'


def statistics(tensors: Mapping[str, torch.Tensor], seed: int = 0) -> Tensors:
    """A moment for every matrix and every stack of them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim in {2, 3} and "bias" not in name:
            stack = len(tensor) if tensor.ndim == 3 else 0
            found[name] = moments(tensor.shape[-1], 50, generator, stack).contiguous()
    return found


def applied(folder: Path, spec: str, tensors: Tensors, stats: Tensors, *words: object) -> tuple[Tensors, Any]:
    """Prune a file; gives its tensors and the report."""
    save_file(tensors, folder / "m.safetensors")
    save_file(stats, folder / "stats.safetensors")
    said = ok("apply", folder / "m.safetensors", write_spec(folder, spec), "--force", "--json", "-q", *words)
    report = valid(said.out, "report")
    return load_file(folder / "m.pruned.safetensors"), report


def with_head(head: str, spec: str) -> str:
    return spec.replace("version = 1\n", f"version = 1\n{head}", 1)


def relative_error(pruned: torch.Tensor, dense: torch.Tensor, moment: torch.Tensor) -> float:
    """sqrt(tr(D H D^T) / tr(W0 H W0^T)), row by row in float64."""
    lost = sum(objective(pruned, dense, moment, 0.0))
    whole = sum(objective(torch.zeros_like(dense), dense, moment, 0.0))
    return float((lost / whole) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_admm_keeps_two_of_four_and_writes_what_the_engine_finds(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = mlp_tensors(dtype=dtype)
    stats = statistics(tensors)
    pruned, report = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, stats)
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    errors = {one["name"]: one for one in report["tensors"]}
    for name, moment in stats.items():
        params = [torch.empty(tensors[name].shape, dtype=Matrix(tensors[name], moment).work_dtype)]
        project = projection(ScopeSpec(BlockSpec(params[0], (1, 1)), (1, 4)), 2, params)
        (wanted,) = admm([Matrix(tensors[name], moment)], project)
        assert torch.equal(masks[name], wanted.mask)
        assert torch.equal(pruned[name], wanted.weights)
        told = relative_error(pruned[name], tensors[name], moment)
        assert errors[name]["output_error"] == pytest.approx(told, rel=1e-3)
        masked = relative_error(tensors[name] * wanted.mask, tensors[name], moment)
        assert errors[name]["output_error_masked"] == pytest.approx(masked, rel=1e-3)
        assert errors[name]["output_error"] < 0.9 * errors[name]["output_error_masked"]
    mean = sum(errors[name]["output_error"] for name in stats) / len(stats)
    assert report["totals"]["output_error"] == pytest.approx(mean)
    assert torch.equal(pruned["norm"], tensors["norm"])
    ok("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml", "-q")


@pytest.mark.parametrize(
    "score",
    ["", 'score = { kind = "wanda", file = "stats.safetensors" }', 'score = { kind = "random", seed = 3 }'],
)
def test_refit_solves_for_the_mask_that_the_score_gives(tmp_path: Path, score: str) -> None:
    tensors = mlp_tensors()
    stats = statistics(tensors)
    plain, _ = applied(tmp_path, TWO_OF_FOUR + score, tensors, stats)
    pruned, report = applied(tmp_path, with_head(REFIT, TWO_OF_FOUR + score), tensors, stats)
    for name, moment in stats.items():
        mask = plain[name] != 0
        assert torch.equal(pruned[name], refit(Matrix(tensors[name], moment), mask))
    assert report["totals"]["output_error"] < report["totals"]["output_error_masked"]


def test_refit_goes_with_a_threshold(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    spec = with_head(REFIT, TWO_OF_FOUR.replace("nnz = 2", "threshold = 0.7"))
    pruned, _ = applied(tmp_path, spec, tensors, statistics(tensors))
    for name in statistics(tensors):
        assert torch.equal(pruned[name] == 0, tensors[name].abs() < 0.7)


@pytest.mark.parametrize("head", [ADMM, REFIT])
def test_rows_that_feed_channels_and_biases_are_masked_and_have_no_say(tmp_path: Path, head: str) -> None:
    tensors = mlp_tensors()
    for layer in range(2):  # by magnitude these four would win
        tensors[f"{layer}.up.weight"][:4] *= 100
        tensors[f"{layer}.down.weight"][:, :4] *= 0.001
    stats = statistics(tensors)
    pruned, report = applied(tmp_path, with_head(head, CHANNELS), tensors, stats)
    wanda = 'score = { kind = "wanda", file = "stats.safetensors" }\n'
    only_down = {name: moment for name, moment in stats.items() if "down" in name}
    for layer in range(2):
        down = pruned[f"{layer}.down.weight"]
        alive = down.any(0)
        assert int(alive.sum()) == 12
        for name in ("up.weight", "up.bias"):
            dense = tensors[f"{layer}.{name}"]
            masked = torch.where(alive[:, None] if dense.ndim == 2 else alive, dense, 0.0)
            assert torch.equal(pruned[f"{layer}.{name}"].view(torch.int32), masked.view(torch.int32))
        dense, moment = tensors[f"{layer}.down.weight"], stats[f"{layer}.down.weight"]
        wanted = refit(Matrix(dense, moment), alive.expand(dense.shape))
        torch.testing.assert_close(down, wanted, rtol=1e-3, atol=1e-5)
        if head == ADMM:
            assert not alive[:4].any()
    if head == REFIT:
        both, _ = applied(tmp_path, with_head(REFIT, CHANNELS) + wanda, tensors, stats)
        alone, _ = applied(tmp_path, with_head(REFIT, CHANNELS) + wanda, tensors, only_down)
        assert all(torch.equal(both[name], alone[name]) for name in both)
    told = {one["name"]: one["output_error"] for one in report["tensors"]}
    assert [name for name in told if told[name] is not None] == [f"{layer}.down.weight" for layer in range(2)]


JOINT = """
version = 1
reconstruct = { file = "stats.safetensors" }
scope.up = { tensors = "{layer}.up.weight", block = [1, 1], shape = [] }
scope.down = { tensors = "{layer}.down.weight", block = [1, 1], shape = [] }
scope_coupling.layer = { scopes = ["up", "down"], nnz = 100 }
"""


def test_matrices_that_compete_are_solved_together(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    stats = statistics(tensors)
    for layer in range(2):
        stats[f"{layer}.up.weight"] *= 20
    pruned, _ = applied(tmp_path, JOINT, tensors, stats)
    for layer in range(2):
        up, down = (int((pruned[f"{layer}.{name}.weight"] != 0).sum()) for name in ("up", "down"))
        assert up + down == 100
        assert up > 1.3 * down  # whose outputs are larger


SLICED = """
version = 1
[reconstruct]
file = "stats.safetensors"
[scope.first]
tensors = "{layer}.up.weight"
slice = ["4:12", ":4"]
block = [1, 1]
shape = [1, 4]
nnz = 2
[scope.second]
tensors = "{layer}.up.weight"
slice = ["8:", "4:"]
block = [1, 2]
shape = [1, 2]
nnz = 1
optional = true
"""


def test_what_a_slice_does_not_reach_keeps_its_bits(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    pruned, _ = applied(tmp_path, SLICED, tensors, statistics(tensors))
    for layer in range(2):
        dense, now = tensors[f"{layer}.up.weight"], pruned[f"{layer}.up.weight"]
        inside = torch.zeros(dense.shape, dtype=torch.bool)
        inside[4:12, :4] = inside[8:, 4:] = True
        assert torch.equal(now[~inside].view(torch.int32), dense[~inside].view(torch.int32))
        assert (now[4:12, :4] != 0).sum(1).tolist() == [2] * 8
        assert (now[8:, 4:] != 0).sum(1).tolist() == [2] * 8
        assert (now[4:12, :4][now[4:12, :4] != 0] != dense[4:12, :4][now[4:12, :4] != 0]).any()


STACKED = """
version = 1
[reconstruct]
file = "stats.safetensors"
{more}
[block.up]
tensors = "{{layer}}.experts.up"
shape = [1, 1, -1]
[block.bias]
tensors = "{{layer}}.experts.bias"
shape = [1, 1]
[block.down]
tensors = "{{layer}}.experts.down"
shape = [1, -1, 1]
[block_coupling.channel]
blocks = ["up", "bias", "down"]
orders = [[0, 1, 2], [0, 1, 2], [0, 2, 1]]
[scope.channels]
block = "channel"
shape = [{experts}, -1]
nnz = {nnz}
"""


def stacked_tensors() -> Tensors:
    generator = torch.Generator().manual_seed(2)
    return {
        "0.experts.up": torch.randn(5, 16, 8, generator=generator),
        "0.experts.bias": torch.randn(5, 16, generator=generator),
        "0.experts.down": torch.randn(5, 8, 16, generator=generator),
    }


def test_experts_in_one_tensor_are_worked_one_at_a_time(tmp_path: Path) -> None:
    tensors = stacked_tensors()
    stats = statistics(tensors)
    spec = STACKED.format(more="", experts=1, nnz=12)
    pruned, _ = applied(tmp_path, spec, tensors, stats)
    for expert in range(5):
        down = pruned["0.experts.down"][expert]
        alive = down.any(0)
        assert int(alive.sum()) == 12
        dense = tensors["0.experts.down"][expert]
        alone = refit(Matrix(dense, stats["0.experts.down"][expert]), alive.expand(dense.shape))
        torch.testing.assert_close(down, alone, rtol=1e-3, atol=1e-5)
        assert torch.equal(pruned["0.experts.up"][expert].any(1), alive)
        assert torch.equal(pruned["0.experts.bias"][expert] != 0, alive)


def test_channels_that_compete_across_experts_are_solved_together(tmp_path: Path) -> None:
    tensors = stacked_tensors()
    stats = statistics(tensors)
    stats["0.experts.down"][3] *= 100  # tokens go there
    spec = STACKED.format(more="", experts=-1, nnz=40)
    pruned, _ = applied(tmp_path, spec, tensors, stats)
    alive = pruned["0.experts.down"].any(1).sum(-1)
    assert int(alive.sum()) == 40
    assert int(alive[3]) == 16


def test_an_expert_that_no_token_reached_goes_first_or_is_told(tmp_path: Path) -> None:
    tensors = stacked_tensors()
    tensors["0.experts.down"][2] *= 100
    stats = statistics(tensors)
    stats["0.experts.down"][2] = 0
    pruned, _ = applied(tmp_path, STACKED.format(more="", experts=-1, nnz=64), tensors, stats)
    assert pruned["0.experts.down"].any(1).sum(-1).tolist() == [16, 16, 0, 16, 16]
    spec = write_spec(tmp_path, STACKED.format(more="", experts=1, nnz=12))
    said = refused("apply", tmp_path / "m.safetensors", spec, "--force")
    assert "0.experts.down (matrix 2): its statistics are zero" in said.err


EXPERTS = """
version = 1
reconstruct = { file = "stats.safetensors" }
block.matrix = { tensors = "0.experts.{name:up|down}", shape = [1, -1, -1] }
block_coupling.whole = { blocks = ["matrix"], across = ["name"] }
scope.experts = { block = "whole", shape = [], nnz = 3 }
"""


def test_whole_experts_go_by_what_they_put_out(tmp_path: Path) -> None:
    tensors = {name: one for name, one in stacked_tensors().items() if one.ndim == 3}
    stats = statistics(tensors)
    use = torch.tensor([1.0, 0.01, 1, 0.02, 1]).reshape(5, 1, 1)
    stats = {name: (one * use).contiguous() for name, one in stats.items()}
    tensors = {name: (one * (2 - use)).contiguous() for name, one in tensors.items()}
    pruned, report = applied(tmp_path, EXPERTS, tensors, stats)
    for name, dense in tensors.items():
        kept = pruned[name].any(-1).any(-1)
        assert kept.tolist() == [True, False, True, False, True]
        assert torch.equal(pruned[name][kept], dense[kept])
    assert report["totals"]["output_error"] == report["totals"]["output_error_masked"] < 0.3


def test_matrices_whose_inputs_come_first_are_told_by_input_dim(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    stats = statistics(tensors)
    turned = {name: one.T.contiguous() if name.endswith("weight") else one for name, one in tensors.items()}
    straight, _ = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, stats)
    spec = with_head(ADMM + "input_dim = 0\n", TWO_OF_FOUR.replace("shape = [1, 4]", "shape = [4, 1]"))
    pruned, _ = applied(tmp_path, spec, turned, stats)
    for name in stats:
        torch.testing.assert_close(pruned[name].T, straight[name], rtol=1e-3, atol=1e-4)


def test_one_rule_may_go_without(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    spec = with_head(ADMM, TWO_OF_FOUR) + 'reconstruct = { method = "none" }\n'
    plain, _ = applied(tmp_path, TWO_OF_FOUR, tensors, {})
    pruned, report = applied(tmp_path, spec, tensors, {})
    assert all(torch.equal(pruned[name], plain[name]) for name in plain)
    assert report["totals"]["output_error"] is None


def test_statistics_by_calibrate_are_found_by_their_aliases_and_say_the_dimension(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    moment = moments(16, 50, torch.Generator().manual_seed(0)).contiguous()
    tensors["0.gate.weight"] = torch.randn(16, 8, generator=torch.Generator().manual_seed(9))
    weights = {"0.down.weight": {"0.down.weight": 1, "0.gate.weight": 0}}
    save_statistics(tmp_path / "stats.safetensors", "hessian", {"0.down.weight": moment}, **weights)
    save_file(tensors, tmp_path / "m.safetensors")
    text = """
version = 1
reconstruct = { file = "stats.safetensors" }
scope.down = { tensors = "0.down.weight", block = [1, 1], shape = [1, 4], nnz = 2 }
scope.gate = { tensors = "0.gate.weight", block = [1, 1], shape = [4, 1], nnz = 2 }
"""
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, text), "-q")
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    for name, dim in weights["0.down.weight"].items():
        matrix = Matrix(tensors[name], moment, dim)
        wanted = refit(matrix, pruned[name] != 0)
        torch.testing.assert_close(pruned[name], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["wanda", "obd"])
def test_scores_read_moments_and_norms_as_well_as_ready_vectors(tmp_path: Path, kind: str) -> None:
    tensors = {name: one for name, one in mlp_tensors().items() if one.ndim == 2}
    tensors["stack.weight"] = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(8))
    stats = statistics(tensors)
    diagonals = {name: one.diagonal(dim1=-2, dim2=-1).contiguous() for name, one in stats.items()}
    ready = {name: one.sqrt() if kind == "wanda" else one for name, one in diagonals.items()}
    norms = {name: one.sqrt() for name, one in diagonals.items()}
    forms = {"ready": ready, "moments without a word": stats, "hessian": stats, "norm": norms}
    spec = """
version = 1
[score]
kind = "KIND"
file = "stats.safetensors"
[scope.matrix]
tensors = "{layer}.{name:up|down}.weight"
block = [1, 1]
shape = [1, -1]
sparsity = 0.5
[scope.stack]
tensors = "stack.weight"
block = [1, 1, 1]
shape = [1, 1, -1]
sparsity = 0.5
"""
    save_file(tensors, tmp_path / "m.safetensors")
    found = {}
    for form, stored in forms.items():
        if form in {"hessian", "norm"}:
            dims = {name: {name: one.ndim - 1} for name, one in tensors.items()}
            save_statistics(tmp_path / "stats.safetensors", form, stored, **dims)
        else:
            save_file(stored, tmp_path / "stats.safetensors")
        path = write_spec(tmp_path, spec.replace("KIND", kind))
        ok("apply", tmp_path / "m.safetensors", path, "--force", "-q")
        found[form] = load_file(tmp_path / "m.pruned.safetensors")
    for name, dense in tensors.items():
        factor = ready[name].double()
        line = factor[:, None] if dense.ndim == 3 else factor
        score = (dense.double().abs() if kind == "wanda" else dense.double().square()) * line
        drop = score.argsort(dim=-1, stable=True)[..., : dense.shape[-1] // 2]
        for form in forms:
            assert torch.equal(found[form][name], dense.scatter(-1, drop, 0.0)), (form, name)


def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.execution.reconstruct import RebuildMatrices

    tensors = mlp_tensors(layers=4)
    names = [[name for name in tensors if name[0] in group] for group in ("n01", "23")]
    shards = {
        f"model-{place}.safetensors": {name: tensors[name] for name in part}
        for place, part in enumerate(names)
    }
    folder = write_shards(tmp_path / "dense", shards)
    save_file(statistics(tensors), tmp_path / "stats.safetensors")
    spec = write_spec(tmp_path, with_head(ADMM, TWO_OF_FOUR))
    ok("apply", folder, spec, "-o", tmp_path / "whole", "-q", "--jobs", 1)
    usual = RebuildMatrices.work
    done: list[int] = []

    def dies_at_the_fourth(*arguments: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return usual(*arguments)

    monkeypatch.setattr(RebuildMatrices, "work", dies_at_the_fourth)
    assert run("apply", folder, spec, "-o", tmp_path / "again", "-q", "--jobs", 1).code == 130
    assert not (tmp_path / "again").exists()
    worked: list[int] = []

    def counted(*arguments: Any) -> Any:
        worked.append(1)
        return usual(*arguments)

    monkeypatch.setattr(RebuildMatrices, "work", counted)
    said = ok("apply", folder, spec, "-o", tmp_path / "again", "--jobs", 1)
    assert "an unfinished run is continued" in said.err
    assert len(worked) < 8
    for file in (*shards, "sparseprune/masks-00001-of-00002.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    reports = [
        json.loads((tmp_path / out / "sparseprune/report.json").read_text()) for out in ("again", "whole")
    ]
    assert reports[0]["tensors"] == reports[1]["tensors"]


def test_masks_alone_are_those_of_apply(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, statistics(tensors))
    ok("mask", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-o", tmp_path / "k.safetensors", "-q")
    masks = sparseprune.load_masks(tmp_path / "k.safetensors")
    others = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    assert all(torch.equal(masks[name], others[name]) for name in masks)


def test_the_energy_kept_is_that_of_survivors_before_they_are_rebuilt_in_every_report(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    _, report = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, statistics(tensors))
    masks = sparseprune.load_masks(tmp_path / "m.pruned.masks.safetensors")
    said = ok("compare", tmp_path / "m.safetensors", tmp_path / "m.pruned.safetensors", "--json")
    compared = {one["name"]: one for one in json.loads(said.out)["tensors"]}
    for one in report["tensors"]:
        dense = tensors[one["name"]].double()
        kept = float((dense[masks[one["name"]]] ** 2).sum() / (dense**2).sum())
        assert one["energy_kept"] == pytest.approx(kept, rel=1e-12)
        assert compared[one["name"]]["energy_kept"] == pytest.approx(kept, rel=1e-12)


def test_a_line_tells_the_output_error(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    _, report = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, statistics(tensors))
    said = run("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "--force")
    totals = report["totals"]
    assert (
        f"reconstructed 4 matrices: output error {totals['output_error']:.2%} on average, "
        f"{totals['output_error_masked']:.2%} by the masks alone\n"
    ) in said.err


@pytest.mark.parametrize("head", [ADMM, REFIT])
def test_few_tokens_without_damping_are_no_worse_than_the_masks_and_the_report_is_true(
    tmp_path: Path, head: str
) -> None:
    tensors = mlp_tensors(layers=1, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    stats = {}
    for name in ("0.up.weight", "0.down.weight"):
        inputs = torch.randn(3, tensors[name].shape[1], generator=generator)
        stats[name] = inputs.T @ inputs / 3
    pruned, report = applied(tmp_path, with_head(head + "damp = 0\n", TWO_OF_FOUR), tensors, stats)
    errors = {one["name"]: one for one in report["tensors"]}
    for name, moment in stats.items():
        kept = tensors[name] * (pruned[name] != 0)
        before, after = (objective(one, tensors[name], moment, 0.0) for one in (kept, pruned[name]))
        assert all(now <= then * (1 + 1e-9) for now, then in zip(after, before, strict=True))
        told = relative_error(pruned[name], tensors[name], moment)
        assert errors[name]["output_error"] == pytest.approx(told, rel=1e-6)
        assert 0 < told < errors[name]["output_error_masked"]


EXTREMES = [
    (torch.float64, 1e300, torch.float32, 1.0),
    (torch.float64, 1e-300, torch.float64, 1e300),
    (torch.float32, 3e37, torch.float64, 1e-300),
    (torch.bfloat16, 3e37, torch.float32, 1e-36),
]


@pytest.mark.parametrize("head", [ADMM, REFIT])
@pytest.mark.parametrize(("dtype", "size", "of", "moment_size"), EXTREMES)
def test_weights_and_moments_of_any_size_are_reconstructed_as_those_of_one(
    tmp_path: Path, head: str, dtype: torch.dtype, size: float, of: torch.dtype, moment_size: float
) -> None:
    tensors = {name: one for name, one in mlp_tensors(layers=1).items() if one.ndim == 2}
    stats = statistics(tensors)
    _, usual = applied(tmp_path, with_head(head, TWO_OF_FOUR), tensors, stats)
    large = {name: (one.double() * size).to(dtype) for name, one in tensors.items()}
    moments_of = {name: (one.double() * moment_size).to(of) for name, one in stats.items()}
    _, report = applied(tmp_path, with_head(head, TWO_OF_FOUR), large, moments_of)
    written = json.loads(
        (tmp_path / "m.pruned.report.json").read_text(),
        parse_constant=lambda word: pytest.fail(f"{word} is no JSON"),
    )
    assert written == report
    for key in ("output_error", "output_error_masked"):
        assert report["totals"][key] == pytest.approx(usual["totals"][key], rel=0.05)
    where, stats_file = tmp_path / "m.pruned.safetensors", tmp_path / "stats.safetensors"
    compared = run("compare", tmp_path / "m.safetensors", where, "--stats", stats_file, "--json")
    errors = [one["output_error"] for one in json.loads(compared.out)["tensors"]]
    assert errors == [pytest.approx(one["output_error"], rel=1e-6) for one in report["tensors"]]


def test_statistics_that_rest_on_few_tokens_are_told(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    save_file(tensors, tmp_path / "m.safetensors")
    moments_of = statistics(tensors)
    (tmp_path / "stats/sparseprune").mkdir(parents=True)
    save_statistics(tmp_path / "stats/statistics.safetensors", "hessian", moments_of)
    spec = write_spec(tmp_path, with_head(ADMM.replace("stats.safetensors", "stats"), TWO_OF_FOUR))
    for tokens, told in ((7, True), (8, False)):
        matrices = [{"name": "0.up.weight", "tokens": tokens}, {"name": "0.down.weight", "tokens": 16}]
        (tmp_path / "stats/sparseprune/report.json").write_text(json.dumps({"matrices": matrices}))
        said = ok("apply", tmp_path / "m.safetensors", spec, "--force")
        line = (
            "statistics of 1 of 2 matrices rest on fewer tokens than they have inputs, such as those of 0.up"
        )
        assert (line in said.err) == told


def without(stats: Tensors) -> Tensors:
    return {name: one for name, one in stats.items() if name != "1.up.weight"}


WRONG: list[tuple[str, Any, str]] = [
    ("of another model", lambda stats: {f"x{name}": one for name, one in stats.items()},
     "has no statistics of 4 weights, such as 0.down.weight; the nearest name is x0.down.weight\n"),
    ("one is missing", without, "has no statistics of 1.up.weight; the nearest name is 0.up.weight"),
    ("another shape", lambda stats: stats | {"1.up.weight": torch.eye(9)},
     "1.up.weight has shape [9, 9], wanted [8, 8]"),
    ("vectors", lambda stats: stats | {"1.up.weight": torch.ones(8)},
     "1.up.weight has shape [8], wanted [8, 8]"),
    ("integers", lambda stats: stats | {"1.up.weight": torch.eye(8, dtype=torch.int32)},
     "1.up.weight is I32, wanted one of BF16, F16, F32, F64"),
    ("NaN", lambda stats: stats | {"1.up.weight": torch.eye(8) * torch.nan},
     "1.up.weight: the second moment of the inputs holds NaN or infinity"),
    ("zero", lambda stats: stats | {"1.up.weight": torch.zeros(8, 8)},
     "1.up.weight: its statistics are zero: nothing was seen of its inputs; calibrate on more text"),
    ("negative", lambda stats: stats | {"1.up.weight": -torch.eye(8)},
     "1.up.weight: the second moment of the inputs has a negative diagonal"),
    ("asymmetric", lambda stats: stats | {"1.up.weight": torch.eye(8) + torch.ones(8, 8).triu(1) * 0.1},
     "1.up.weight: the second moment of the inputs is none: it is not symmetric, 0.1 at [0, 1], 0 at [1"),
    ("indefinite", lambda stats: stats | {"1.up.weight": torch.ones(8, 8) * 3 - 2 * torch.eye(8)},
     "1.up.weight: the second moment of the inputs is none: it has directions of negative energy"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "line"), [pytest.param(*rest, id=name) for name, *rest in WRONG])
@pytest.mark.parametrize("head", [ADMM, REFIT])
def test_statistics_that_do_not_fit_get_one_line(tmp_path: Path, head: str, change: Any, line: str) -> None:
    tensors = mlp_tensors()
    save_file(tensors, tmp_path / "m.safetensors")
    save_file(change(statistics(tensors)), tmp_path / "stats.safetensors")
    said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, with_head(head, TWO_OF_FOUR)))
    assert line in said.err
    assert "stats.safetensors" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "m.pruned.safetensors").exists()
    assert said.out == ""


def test_no_statistics_and_norms_alone_and_tokens_that_never_came_are_told(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    save_file(tensors, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, with_head(ADMM.replace("stats.safetensors", "stats"), TWO_OF_FOUR))
    said = run("apply", tmp_path / "m.safetensors", spec)
    assert (said.code, "there are no statistics in" in said.err) == (2, True)
    features = {"0.up.weight": 8, "0.down.weight": 16}
    (tmp_path / "stats").mkdir()
    path = tmp_path / "stats/statistics.safetensors"
    save_statistics(path, "norm", {name: torch.ones(size) for name, size in features.items()})
    said = run("apply", tmp_path / "m.safetensors", spec)
    assert (said.code, "calibrate with --kind hessian" in said.err) == (2, True)
    moments_of = {name: torch.eye(size) for name, size in features.items()}
    save_statistics(path, "hessian", moments_of)
    (tmp_path / "stats/sparseprune").mkdir()
    matrices = [{"name": "0.up.weight", "tokens": 0}, {"name": "0.down.weight", "tokens": 7}]
    (tmp_path / "stats/sparseprune/report.json").write_text(json.dumps({"matrices": matrices}))
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert "[scope.proj] reconstruct: no token reached 0.up.weight when its statistics" in said.err
    assert said.err.endswith("; calibrate on more text, exclude it, or say optional = true\n")
    save_file(moments_of, path, metadata={STATISTICS_KEY: '{"kind": "no"}'})
    said = run("apply", tmp_path / "m.safetensors", spec)
    assert "is not that of a statistics file; calibrate again" in said.err


def test_a_matrix_that_no_token_reached_is_masked_alone_where_that_may_be(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    save_file(tensors, tmp_path / "m.safetensors")
    (tmp_path / "stats/sparseprune").mkdir(parents=True)
    moments_of = {"0.up.weight": torch.zeros(8, 8), "0.down.weight": torch.eye(16)}
    save_statistics(tmp_path / "stats/statistics.safetensors", "hessian", moments_of)
    matrices = [{"name": "0.up.weight", "tokens": 0}, {"name": "0.down.weight", "tokens": 7}]
    (tmp_path / "stats/sparseprune/report.json").write_text(json.dumps({"matrices": matrices}))
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    said = ok("apply", tmp_path / "m.safetensors", spec, "--stats", tmp_path / "stats")
    assert "scope.proj is not rebuilt in 1 instance, 0.up.weight: no token reached these" in said.err
    pruned, up = load_file(tmp_path / "m.pruned.safetensors"), tensors["0.up.weight"]
    kept = up.abs().reshape(-1, 4).argsort(-1).argsort(-1) >= 2
    assert torch.equal(pruned["0.up.weight"], torch.where(kept.reshape(up.shape), up, 0.0))


def test_memory_that_does_not_hold_a_matrix_is_told_with_what_would(tmp_path: Path) -> None:
    tensors = {"0.up.weight": torch.randn(2048, 1024), "0.down.weight": torch.randn(4, 8)}
    stats = {"0.up.weight": torch.eye(1024), "0.down.weight": torch.eye(8)}
    save_file(tensors, tmp_path / "m.safetensors")
    save_file(stats, tmp_path / "stats.safetensors")
    spec = write_spec(tmp_path, with_head(ADMM, TWO_OF_FOUR))
    said = refused("apply", tmp_path / "m.safetensors", spec, "--memory", "400MiB")
    assert "its matrices and their second moments must be in memory together" in said.err
    wanted = said.err.split("; give --memory ")[1].strip()
    ok("plan", tmp_path / "m.safetensors", spec, "--memory", wanted)
    assert run("plan", tmp_path / "m.safetensors", spec, "--memory", memory_of(wanted) - (2 << 20)).code == 2


def test_integers_and_nan_are_refused(tmp_path: Path) -> None:
    for dense, line in (
        (torch.ones(4, 8, dtype=torch.int8), "wanted a matrix of floats"),
        (torch.full((4, 8), torch.nan), "NaN at [0, 0]"),
    ):
        save_file({"0.up.weight": dense}, tmp_path / "m.safetensors")
        save_file({"0.up.weight": torch.eye(8)}, tmp_path / "stats.safetensors")
        spec = write_spec(tmp_path, with_head(ADMM, TWO_OF_FOUR))
        said = refused("apply", tmp_path / "m.safetensors", spec, "--force")
        assert line in said.err


def test_empty_tensors_pass(tmp_path: Path) -> None:
    tensors = {"0.up.weight": torch.zeros(0, 8), "0.down.weight": torch.zeros(8, 4)}
    stats = {"0.up.weight": torch.eye(8), "0.down.weight": torch.eye(4)}
    pruned, report = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, stats)
    assert pruned["0.up.weight"].shape == (0, 8)
    assert [one["output_error"] for one in report["tensors"]] == [0.0, None]


@pytest.mark.parametrize("jobs", [1, 3])
def test_jobs_do_not_show(tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 1 << 20)
    tensors = mlp_tensors(layers=3)
    stats = statistics(tensors)
    one, _ = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, stats)
    other, _ = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, stats, "--jobs", jobs)
    assert all(torch.equal(one[name], other[name]) for name in one)
