"""Statistics with gradients: what apply writes and tells, against the engine on whole tensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import BlockSpec, Matrix, ScopeCoupling, ScopeSpec, admm, projection, refit
from sparseprune.engine import errors_of
from sparseprune.engine.energies import energies
from sparseprune.engine.matrices import units_of
from tests.cli.test_reconstruct import (
    ADMM,
    EXPERTS,
    JOINT,
    REFIT,
    SLICED,
    STACKED,
    stacked_tensors,
    with_head,
)
from tests.commands import ok, python, refused, valid
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_spec
from tests.statistics import Tensors, drawn, save

OUTPUTS = ADMM + 'metric = "outputs"\n'
LOSS = ADMM + 'metric = "loss"\n'


def written(folder: Path, spec: str, tensors: Tensors, inputs: Tensors, gradients: Tensors) -> Path:
    """A file, its statistics and a spec."""
    save_file(tensors, folder / "m.safetensors")
    save(folder / "stats.safetensors", inputs, gradients)
    return write_spec(folder, spec)


def applied(
    folder: Path, spec: str, tensors: Tensors, inputs: Tensors, gradients: Tensors, *words: object
) -> tuple[Tensors, Any]:
    """Prune a file; gives its tensors and the report."""
    path = written(folder, spec, tensors, inputs, gradients)
    said = ok("apply", folder / "m.safetensors", path, "--force", "--json", "-q", *words)
    return load_file(folder / "m.pruned.safetensors"), valid(said.out, "report")


def two_of_four(matrix: Matrix) -> torch.Tensor:
    """What the engine makes of a matrix."""
    param = torch.empty(matrix.dense.shape, dtype=matrix.work_dtype)
    block, shape = ((1, 1), (1, 4)) if matrix.input_dim in {-1, 1} else ((1, 1), (4, 1))
    (found,) = admm([matrix], projection(ScopeSpec(BlockSpec(param, block), shape), 2, [param]))
    return found.weights


def told(report: Any) -> dict[str, Any]:
    return {one["name"]: one for one in report["tensors"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_what_is_written_is_what_the_engine_finds_in_units_of_the_loss(
    tmp_path: Path, dtype: torch.dtype, groups: int
) -> None:
    tensors = mlp_tensors(layers=1, dtype=dtype)
    inputs, gradients = drawn(tensors, groups=groups)
    pruned, report = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, gradients)
    plain, _ = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, {})
    found = told(report)
    for name, moment in inputs.items():
        matrix = Matrix(tensors[name], moment, gradients=gradients[name])
        assert torch.equal(pruned[name], two_of_four(matrix))
        assert not torch.equal(pruned[name], plain[name])
        errors = errors_of(matrix, pruned[name])
        assert errors.loss is not None
        assert found[name]["output_error"] == pytest.approx(errors.outputs[0])
        assert found[name]["loss_error"] == pytest.approx(errors.loss[0])
        masked = errors_of(matrix, torch.where(pruned[name] != 0, tensors[name], 0))
        assert masked.loss is not None
        assert found[name]["loss_error_masked"] == pytest.approx(masked.loss[0], rel=1e-5)
        assert found[name]["loss_error"] < found[name]["loss_error_masked"]
        assert found[name]["metric"] == "loss"
    totals = report["totals"]
    assert totals["metric"] == report["rules"][0]["metric"] == "loss"
    for key in ("output_error", "loss_error", "output_error_masked", "loss_error_masked"):
        assert totals[key] == pytest.approx(sum(found[name][key] for name in inputs) / len(inputs))


def test_outputs_may_be_minimized_all_the_same_and_both_errors_are_told(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    inputs, gradients = drawn(tensors)
    plain, without = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, {})
    pruned, report = applied(tmp_path, with_head(OUTPUTS, TWO_OF_FOUR), tensors, inputs, gradients)
    assert all(torch.equal(pruned[name], plain[name]) for name in plain)
    for name, one in told(report).items():
        matrix = Matrix(tensors[name], inputs[name], gradients=gradients[name])
        assert (one["metric"], told(without)[name]["loss_error"]) == ("outputs", None)
        assert one["output_error"] == pytest.approx(told(without)[name]["output_error"])
        assert [one["loss_error"]] == pytest.approx(list(errors_of(matrix, pruned[name]).loss or ()))
    assert report["totals"]["metric"] == "outputs"
    best, _ = applied(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, gradients)
    for name in inputs:
        matrix = Matrix(tensors[name], inputs[name], gradients=gradients[name])
        in_loss, in_outputs = (errors_of(matrix, one[name]) for one in (best, pruned))
        assert (in_loss.loss or (1,))[0] < (in_outputs.loss or (0,))[0]
        assert in_loss.outputs[0] > in_outputs.outputs[0]


def test_refit_takes_the_metric_too(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    inputs, gradients = drawn(tensors)
    plain, _ = applied(tmp_path, TWO_OF_FOUR, tensors, inputs, gradients)
    pruned, report = applied(tmp_path, with_head(REFIT, TWO_OF_FOUR), tensors, inputs, gradients)
    for name, moment in inputs.items():
        wanted = refit(Matrix(tensors[name], moment, gradients=gradients[name]), plain[name] != 0)
        assert torch.equal(pruned[name], wanted)
    assert report["totals"]["metric"] == "loss"


def joint(matrices: list[Matrix], nnz: int) -> list[torch.Tensor]:
    """Single elements of all matrices compete."""
    params = [torch.empty(one.dense.shape) for one in matrices]
    scope = ScopeCoupling([ScopeSpec(BlockSpec(param, (1, 1)), ()) for param in params])
    return [one.weights for one in admm(matrices, projection(scope, nnz, params))]


def test_matrices_compete_in_units_of_the_loss_if_all_of_them_have_gradients(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    gradients["0.up.weight"] *= 50
    del gradients["1.up.weight"]
    pruned, report = applied(tmp_path, JOINT, tensors, inputs, gradients)
    for layer, metric in enumerate(("loss", "outputs")):
        names = [f"{layer}.up.weight", f"{layer}.down.weight"]
        matrices = [
            Matrix(tensors[name], inputs[name], gradients=gradients[name] if metric == "loss" else None)
            for name in names
        ]
        for name, wanted in zip(names, joint(matrices, 100), strict=True):
            assert torch.equal(pruned[name], wanted)
            assert told(report)[name]["metric"] == metric
            assert (told(report)[name]["loss_error"] is None) == (name not in gradients)
    up, down = (int((pruned[f"0.{name}.weight"] != 0).sum()) for name in ("up", "down"))
    assert up > 1.5 * down
    assert report["totals"]["metric"] == report["rules"][0]["metric"] == "loss and outputs"


def test_the_loss_is_refused_where_a_matrix_has_no_gradients(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    del gradients["1.up.weight"]
    spec = written(tmp_path, with_head(LOSS, TWO_OF_FOUR), tensors, inputs, gradients)
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert (
        'stats.safetensors: has no gradients of 1.up.weight, which metric = "loss" needs: calibrate '
        "--gradients" in said.err
    )
    assert len(said.err.splitlines()) == 1
    written(tmp_path, with_head(LOSS, TWO_OF_FOUR), tensors, inputs, {})
    said = refused("plan", tmp_path / "m.safetensors", spec)
    assert "has no gradients of 4 weights, such as 0.down.weight" in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_experts_in_one_tensor_are_worked_one_at_a_time(tmp_path: Path, groups: int) -> None:
    tensors = stacked_tensors()
    inputs, gradients = drawn(tensors, groups=groups)
    gradients = {name: one for name, one in gradients.items() if "down" in name}  # up has no say
    spec = with_head(ADMM, TWO_OF_FOUR_EXPERTS)
    pruned, report = applied(tmp_path, spec, tensors, inputs, gradients)
    dense, now = tensors["0.experts.down"], pruned["0.experts.down"]
    lost, whole = 0.0, 0.0
    for expert in range(5):
        one = Matrix(
            dense[expert : expert + 1],
            inputs["0.experts.down"][expert : expert + 1],
            gradients=gradients["0.experts.down"][expert : expert + 1],
        )
        param = torch.empty(one.dense.shape)
        scope = ScopeSpec(BlockSpec(param, (1, 1, 1)), (1, 1, 4))
        (wanted,) = admm([one], projection(scope, 2, [param]), joint=False)
        assert torch.equal(now[expert : expert + 1], wanted.weights)
        units = units_of([one])
        lost += float(energies(one, wanted.weights, units).loss.sum()) * 2.0**units.loss
        whole += float(energies(one, None, units).loss.sum()) * 2.0**units.loss
    assert told(report)["0.experts.down"]["loss_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-6)
    assert told(report)["0.experts.up"]["metric"] == "outputs"


TWO_OF_FOUR_EXPERTS = """
version = 1
[scope.experts]
tensors = "0.experts.{name:up|down}"
block = [1, 1, 1]
shape = [1, 1, 4]
nnz = 2
"""


def test_whole_experts_go_by_what_the_loss_loses(tmp_path: Path) -> None:
    tensors = {name: one for name, one in stacked_tensors().items() if one.ndim == 3}
    inputs, gradients = drawn(tensors)
    use = torch.tensor([1.0, 0.01, 1, 0.02, 1]).reshape(5, 1, 1)
    gradients = {name: (one * use).contiguous() for name, one in gradients.items()}
    pruned, report = applied(tmp_path, EXPERTS, tensors, inputs, gradients)
    matrices = [Matrix(tensors[name], inputs[name], gradients=gradients[name]) for name in sorted(tensors)]
    scores = sum(energies(one, None, units_of(matrices)).loss for one in matrices)
    assert isinstance(scores, torch.Tensor)
    for name, dense in tensors.items():
        kept = pruned[name].any(-1).any(-1)
        assert kept.tolist() == [True, False, True, False, True]
        assert sorted(scores.topk(3).indices.tolist()) == [0, 2, 4]
        assert torch.equal(pruned[name][kept], dense[kept])
    assert report["totals"]["loss_error"] == report["totals"]["loss_error_masked"] < 0.2


def test_channels_are_chosen_by_the_loss_of_what_reads_them(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=1)
    tensors["0.down.weight"] = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
    inputs, gradients = drawn(tensors)
    of_down = {name: one for name, one in gradients.items() if "down" in name}
    pruned, report = applied(tmp_path, with_head(LOSS, CHANNELS), tensors, inputs, of_down)
    dense, now = tensors["0.down.weight"], pruned["0.down.weight"]
    matrix = Matrix(dense, inputs["0.down.weight"], gradients=gradients["0.down.weight"])
    param = torch.empty(dense.shape)
    scope = ScopeSpec(BlockSpec(param, (8, 1)), (1, 16))
    (wanted,) = admm([matrix], projection(scope, 12, [param]))
    assert torch.equal(now, wanted.weights)
    assert torch.equal(pruned["0.up.weight"].any(1), now.any(0))
    assert {name: one["metric"] for name, one in told(report).items()} == {
        "0.up.weight": None,
        "0.up.bias": None,
        "0.down.weight": "loss",
    }


def test_matrices_whose_inputs_come_first_have_their_gradients_along_the_other_dimension(
    tmp_path: Path,
) -> None:
    tensors = {name: one for name, one in mlp_tensors(layers=1).items() if one.ndim == 2}
    inputs, gradients = drawn(tensors, turned=True)
    save_file(tensors, tmp_path / "m.safetensors")
    save(tmp_path / "stats.safetensors", inputs, gradients, input_dim=0)
    spec = write_spec(tmp_path, with_head(ADMM, TWO_OF_FOUR.replace("[1, 4]", "[4, 1]")))
    said = ok("apply", tmp_path / "m.safetensors", spec, "--json", "-q")
    assert json.loads(said.out)["totals"]["metric"] == "loss"
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    for name, moment in inputs.items():
        matrix = Matrix(tensors[name], moment, 0, gradients=gradients[name])
        assert torch.equal(pruned[name], two_of_four(matrix))


def test_what_a_slice_does_not_reach_keeps_its_bits(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    pruned, report = applied(tmp_path, SLICED, tensors, inputs, gradients)
    for layer in range(2):
        dense, now = tensors[f"{layer}.up.weight"], pruned[f"{layer}.up.weight"]
        inside = torch.zeros(dense.shape, dtype=torch.bool)
        inside[4:12, :4] = inside[8:, 4:] = True
        assert torch.equal(now[~inside].view(torch.int32), dense[~inside].view(torch.int32))
    assert [one["metric"] for one in report["tensors"]] == ["loss", "loss"]


def test_experts_one_below_another_have_gradients_each(tmp_path: Path) -> None:
    """As DBRX stores them: (experts * rows, inputs), with statistics of each."""
    generator = torch.Generator().manual_seed(6)
    stack = torch.randn(3, 8, 12, generator=generator)
    inputs, gradients = drawn({"0.up.weight": stack})
    save_file({"0.up.weight": stack.reshape(24, 12).contiguous()}, tmp_path / "m.safetensors")
    save(tmp_path / "stats.safetensors", inputs, gradients, input_dim=1)
    spec = write_spec(tmp_path, with_head(LOSS, TWO_OF_FOUR))
    ok("apply", tmp_path / "m.safetensors", spec, "-q")
    now = load_file(tmp_path / "m.pruned.safetensors")["0.up.weight"]
    matrix = Matrix(stack, inputs["0.up.weight"], gradients=gradients["0.up.weight"])
    param = torch.empty(24, 12)
    scope = ScopeSpec(BlockSpec(param, (1, 1)), (1, 4))
    project = projection(scope, 2, [param])
    (wanted,) = admm([matrix], lambda given: [project([given[0].reshape(24, 12)])[0].reshape(3, 8, 12)])
    assert torch.equal(now, wanted.weights.reshape(24, 12))


WRONG: Mapping[str, tuple[Any, str]] = {
    "another shape": (
        torch.eye(9),
        "1.up.weight.gradients has shape [9, 9], wanted [16, 16], or groups of its rows",
    ),
    "groups that do not add up": (
        torch.eye(4).repeat(3, 1, 1),
        "1.up.weight.gradients has shape [3, 4, 4], wanted [16, 16], or groups of its rows",
    ),
    "integers": (
        torch.eye(16, dtype=torch.int32),
        "1.up.weight.gradients is I32, wanted one of BF16, F16, F32, F64",
    ),
    "NaN": (
        torch.eye(16) * torch.nan,
        "1.up.weight: the second moment of the gradients holds NaN or infinity",
    ),
    "asymmetric": (
        torch.eye(16) + torch.ones(16, 16).triu(1) * 0.1,
        "1.up.weight: the second moment of the gradients is none: it is not symmetric",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("head", [ADMM, OUTPUTS])
def test_gradients_that_do_not_fit_get_one_line(tmp_path: Path, name: str, head: str) -> None:
    wrong, line = WRONG[name]
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    spec = written(
        tmp_path, with_head(head, TWO_OF_FOUR), tensors, inputs, gradients | {"1.up.weight": wrong}
    )
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert line in said.err
    assert "stats.safetensors" in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "m.pruned.safetensors").exists()


@pytest.mark.parametrize(
    ("head", "left_out", "metric", "words"),
    [
        (ADMM, "", "loss", "in units of the loss"),
        (OUTPUTS, "", "outputs", "by the change of outputs"),
        (ADMM, "0.up.weight", "loss and outputs", "in units of the loss where there are gradients, else by"),
        (ADMM + 'effort = "fast"\n', "", "loss", "by admm, fast, with the second moments in"),
    ],
)
def test_plan_says_what_will_be_minimized(
    tmp_path: Path, head: str, left_out: str, metric: str, words: str
) -> None:
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    gradients.pop(left_out, None)
    spec = written(tmp_path, with_head(head, TWO_OF_FOUR), tensors, inputs, gradients)
    document = valid(ok("plan", tmp_path / "m.safetensors", spec, "--json").out, "plan")
    assert document["rules"][0]["reconstruct"]["metric"] == metric
    assert words in ok("plan", tmp_path / "m.safetensors", spec).out


def test_the_summary_tells_both_errors_and_what_was_minimized(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    inputs, gradients = drawn(tensors)
    spec = written(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, gradients)
    said = ok("apply", tmp_path / "m.safetensors", spec)
    totals = json.loads((tmp_path / "m.pruned.report.json").read_text())["totals"]
    assert (
        f"reconstructed 4 matrices: loss error {totals['loss_error']:.2%} on average, "
        f"{totals['loss_error_masked']:.2%} by the masks alone, minimized; output error "
        f"{totals['output_error']:.2%} and {totals['output_error_masked']:.2%}\n" in said.err
    )
    spec.write_text(with_head(OUTPUTS, TWO_OF_FOUR))
    said = ok("apply", tmp_path / "m.safetensors", spec, "--force")
    assert "by the masks alone, minimized; loss error" in said.err
    del gradients["0.up.weight"]
    spec = written(tmp_path, with_head(ADMM, TWO_OF_FOUR), tensors, inputs, gradients)
    said = ok("apply", tmp_path / "m.safetensors", spec, "--force")
    assert "by the masks alone, minimized where there are gradients; output error" in said.err
    assert ", minimized elsewhere" in said.err


def test_jobs_do_not_show(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=3)
    inputs, gradients = drawn(tensors)
    head = with_head(ADMM, TWO_OF_FOUR)
    one, other = (applied(tmp_path, head, tensors, inputs, gradients, "--jobs", n)[0] for n in (1, 3))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_channels_that_compete_across_experts_do_so_by_the_loss(tmp_path: Path) -> None:
    tensors = stacked_tensors()
    inputs, gradients = drawn(tensors)
    gradients["0.experts.down"][3] *= 100  # the loss answers to this one
    spec = STACKED.format(more="", experts=-1, nnz=40)
    pruned, _ = applied(tmp_path, spec, tensors, inputs, gradients)
    down = "0.experts.down"
    param = torch.empty(5, 8, 16)
    project = projection(ScopeSpec(BlockSpec(param, (1, 8, 1)), (5, 1, 16)), 40, [param])
    (wanted,) = admm([Matrix(tensors[down], inputs[down], gradients=gradients[down])], project)
    assert torch.equal(pruned[down], wanted.weights)
    without, _ = applied(tmp_path, spec, tensors, inputs, {})
    alive = [int(one[down][3].any(0).sum()) for one in (pruned, without)]
    assert alive[0] > 1.5 * alive[1]


PEAK = """
import sys, sparseprune
report = sparseprune.apply(sys.argv[1], sys.argv[2], mask_format=None, force=True, device="cpu")
assert report.totals.metric == "loss"
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")
def test_the_peak_that_is_planned_holds_with_gradients(tmp_path: Path) -> None:
    planned, taken = [], []
    for size in (16, 640):
        dense = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
        inputs, gradients = drawn({"0.up.weight": dense})
        head = with_head(ADMM + 'effort = "fast"\n', TWO_OF_FOUR)
        spec = written(tmp_path, head, {"0.up.weight": dense}, inputs, gradients)
        told_by_plan = ok("plan", tmp_path / "m.safetensors", spec, "--json").out
        planned.append(json.loads(told_by_plan)["bytes"]["peak"])
        done = python("-c", PEAK, tmp_path / "m.safetensors", spec)
        assert done.returncode == 0, done.stderr
        taken.append(1024 * int(done.stdout.split()[-1]))
    grown, expected = taken[1] - taken[0], planned[1] - planned[0]
    assert 0.5 * expected < grown < 1.05 * expected, (grown, expected)


@pytest.mark.parametrize("effort", ["best", "fast"])
def test_effort_is_that_of_the_engine(tmp_path: Path, effort: Literal["best", "fast"]) -> None:
    tensors = mlp_tensors(layers=1)
    inputs, gradients = drawn(tensors)
    head = with_head(ADMM + f'effort = "{effort}"\n', TWO_OF_FOUR)
    pruned, _ = applied(tmp_path, head, tensors, inputs, gradients)
    for name, moment in inputs.items():
        param = torch.empty(tensors[name].shape)
        project = projection(ScopeSpec(BlockSpec(param, (1, 1)), (1, 4)), 2, [param])
        matrix = Matrix(tensors[name], moment, gradients=gradients[name])
        (wanted,) = admm([matrix], project, effort=effort)
        assert torch.equal(pruned[name], wanted.weights)
