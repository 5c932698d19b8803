"""What succeeds and is no success: told by every command, kept in its JSON, an error with --strict."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.execution.plan import make_plan
from sparseprune.execution.schedule import cpu_lines, device_text, devices_of_rules, make_schedule
from sparseprune.spec import parse_spec
from tests.checkpoint.files import names_in
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, refused, run, valid
from tests.limits import AMPLE, narrow
from tests.samples import TWO_OF_FOUR, write_spec

LEFT_OUT = "20.00% of the layers' matrices; not reached: 64 parameters of layers.*.experts.up"
HEADS = """
version = 1
[scope.heads]
tensors = "layers.{layer}.q.weight"
block = [2, -1]
shape = []
BUDGET
"""
SCHEMAS = {"apply": "report", "mask": "report", "plan": "plan", "verify": "verify"}


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A matrix that 2:4 finds, and dense fused experts that it does not."""
    tensors = {"layers.0.q.weight": torch.eye(4), "layers.0.experts.up": torch.ones(4, 4, 4)}
    save_file(tensors, tmp_path / "m.safetensors")
    write_spec(tmp_path, TWO_OF_FOUR.replace("{layer}.{name}", "layers.{layer}.{name}"))
    return tmp_path / "m.safetensors"


def options_of(command: str, folder: Path) -> tuple[object, ...]:
    return ("-o", folder / "out.safetensors") if command in {"apply", "mask"} else ()


@pytest.mark.parametrize("command", SCHEMAS)
def test_matrices_that_no_rule_reaches_are_told_and_an_error_with_strict(
    experts: Path, tmp_path: Path, command: str
) -> None:
    before = names_in(tmp_path)
    words = (command, experts, tmp_path / "spec.toml")
    what = "the check reaches" if command == "verify" else "the rules reach"
    strict = run(*words, *options_of(command, tmp_path), "--strict")
    assert (strict.code, strict.out, strict.err) == (
        2,
        "",
        f"sparseprune: --strict: {what} only {LEFT_OUT}\n",
    )
    assert names_in(tmp_path) == before
    said = run(*words, *options_of(command, tmp_path), "--json")
    document: dict[str, Any] = valid(said.out, SCHEMAS[command])
    assert said.code == 0
    assert said.err.count("warning") == 1
    assert f"sparseprune: warning: {what} only {LEFT_OUT}\n" in said.err
    assert document["warnings"] == [f"{what} only {LEFT_OUT}"]
    assert document["totals"]["layer_coverage"] == 0.2
    assert document["totals"]["uncovered"] == [{"name": "layers.*.experts.up", "tensors": 1, "numel": 64}]


def test_a_quiet_command_says_nothing_and_keeps_its_warnings(experts: Path, tmp_path: Path) -> None:
    for command in ("apply", "verify"):
        said = run(command, experts, tmp_path / "spec.toml", *options_of(command, tmp_path), "--json", "-q")
        assert (said.code, said.err, len(json.loads(said.out)["warnings"])) == (0, "", 1)


def test_a_check_says_what_it_looked_at(experts: Path, tmp_path: Path) -> None:
    said = run("verify", experts, tmp_path / "spec.toml")
    assert said.out.splitlines()[2:] == [
        "all 4 scopes are as the spec says",
        f"checked 16 of 80 parameters, {LEFT_OUT}",
    ]


def test_a_spec_that_says_what_it_covers_is_held_to_that(experts: Path, tmp_path: Path) -> None:
    text = (tmp_path / "spec.toml").read_text().replace("version = 1", 'version = 1\ncovers = "attention"')
    spec = write_spec(tmp_path, text.replace("{name}", "{name:q}"))
    tensors = {"layers.0.self_attn.q.weight": torch.eye(4), "layers.0.experts.up": torch.ones(4, 4, 4)}
    save_file(tensors, experts)
    spec.write_text(spec.read_text().replace("{layer}.{name:q}", "{layer}.self_attn.{name:q}"))
    said = ok("apply", experts, spec, "--strict")
    assert (
        "reached 20.00% of the layers' matrices, 100.00% of the attention matrices; not reached: 64"
        in said.err
    )


@pytest.mark.parametrize("command", SCHEMAS)
@pytest.mark.parametrize(
    ("budget", "why"),
    [
        ("sparsity = 0.25", "sparsity 0.25 of 2 rounds to none; 0.5 or more prunes"),
        ("sparsity = 0.001", "sparsity 0.001 of 2 rounds to none; 0.5 or more prunes"),
        ("nnz = 2", "nnz 2 let all survive; nnz 1 or less prunes"),
    ],
)
def test_a_run_that_prunes_nothing_is_told_before_it(
    tmp_path: Path, command: str, budget: str, why: str
) -> None:
    save_file({"layers.0.q.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, HEADS.replace("BUDGET", budget))
    line = f"scope.heads prunes nothing: it keeps 2 of 2 blocks in each scope: {why}"
    words = (command, tmp_path / "m.safetensors", spec, *options_of(command, tmp_path))
    strict = run(*words, "--strict")
    assert (strict.code, strict.err) == (2, f"sparseprune: --strict: {line}\n")
    assert names_in(tmp_path) == ["m.safetensors", "spec.toml"]
    said = run(*words, "--json")
    assert (said.code, json.loads(said.out)["warnings"]) == (0, [line])
    assert said.err.splitlines()[0] == f"sparseprune: warning: {line}"


def test_one_rule_of_several_that_prunes_nothing_is_told(tmp_path: Path) -> None:
    save_file({f"layers.{n}.q.weight": torch.ones(4, 4) for n in range(2)}, tmp_path / "m.safetensors")
    rule = HEADS.replace("version = 1", "")
    text = "version = 1" + "".join(
        rule.replace("heads", f"h{n}").replace("{layer}", str(n)).replace("BUDGET", f"sparsity = {share}")
        for n, share in enumerate((0.25, 0.5))
    )
    said = run("apply", tmp_path / "m.safetensors", write_spec(tmp_path, text), "--json", "-q")
    (line,) = json.loads(said.out)["warnings"]
    assert line.startswith("scope.h0 prunes nothing: ")


def test_a_threshold_that_prunes_nothing_is_told_at_the_end(tmp_path: Path) -> None:
    save_file({"layers.0.q.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, HEADS.replace("BUDGET", "threshold = 0.5"))
    line = "scope.heads prunes nothing: no block scores less than the threshold 0.5"
    strict = run("apply", tmp_path / "m.safetensors", spec, "--strict", "-q")
    assert (strict.code, strict.err.splitlines()[0]) == (2, f"sparseprune: --strict: {line}")
    assert not (tmp_path / "m.pruned.safetensors").exists()
    assert names_in(tmp_path) == ["m.safetensors", "spec.toml"]
    said = run("apply", tmp_path / "m.safetensors", spec)
    assert (said.code, said.err.splitlines()[0]) == (0, f"sparseprune: warning: {line}")
    assert json.loads((tmp_path / "m.pruned.report.json").read_text())["warnings"] == [line]
    pruning = write_spec(tmp_path, HEADS.replace("BUDGET", "threshold = 5"))
    ok("apply", tmp_path / "m.safetensors", pruning, "--strict", "--force")


def test_masks_that_drop_nothing_are_told(tmp_path: Path) -> None:
    save_file({"layers.0.q.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    save_file({"layers.0.q.weight": torch.ones(4, 4) > 0}, tmp_path / "masks.safetensors")
    checking = ("verify", tmp_path / "m.safetensors", "--masks", tmp_path / "masks.safetensors")
    putting = ("reapply", tmp_path / "m.safetensors", tmp_path / "masks.safetensors")
    for words, name, why in (
        (checking, "verify-masks", "there is nothing to check"),
        (putting, "reapply", "the output is a copy of the input"),
    ):
        strict = run(*words, "--strict", "-q")
        assert (strict.code, strict.err.splitlines()[0]) == (
            2,
            f"sparseprune: --strict: the masks drop nothing: {why}",
        )
        assert not (tmp_path / "m.pruned.safetensors").exists()
        said = run(*words, "--json")
        document = valid(said.out, name)
        assert (said.code, document["warnings"]) == (0, [f"the masks drop nothing: {why}"])
        assert f"sparseprune: warning: the masks drop nothing: {why}\n" in said.err


MORE = """
[scope.q]
tensors = "model.layers.{layer}.self_attn.q_proj.weight"
block = [1, -1]
shape = []
threshold = 1e-30
"""


def test_a_removal_by_a_threshold_that_removes_nothing_is_an_error_after_the_decision(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    channels = run("specs", "mlp-channels").out
    text = channels.replace('sparsity = "sparsity"\nmultiple_of = "multiple"', "threshold = 1e-30")
    said = run("remove", source, write_spec(tmp_path, text.replace("multiple = 1\n", "")), "-q")
    line = "scope.mlp prunes nothing: no block scores less than the threshold 1e-30"
    assert (said.code, said.out) == (2, "")
    assert said.err.splitlines()[0] == f"sparseprune: {tmp_path / 'spec.toml'}: nothing to remove: {line}"
    assert not (tmp_path / "in-smaller").exists()


def test_a_removal_with_one_rule_that_removes_nothing_warns(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    spec = write_spec(tmp_path, run("specs", "mlp-channels").out + MORE)
    line = "scope.q prunes nothing: no block scores less than the threshold 1e-30"
    strict = run("remove", source, spec, "--strict", "-q")
    assert (strict.code, strict.err.splitlines()[0]) == (2, f"sparseprune: --strict: {line}")
    assert not (tmp_path / "in-smaller").exists()
    said = run("remove", source, spec, "--json")
    document = valid(said.out, "remove")
    assert (said.code, document["warnings"]) == (0, [line])
    assert f"sparseprune: warning: {line}\n" in said.err


def test_a_plan_of_a_removal_of_nothing_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    words = (source, "mlp-channels", "--set", "sparsity=0.01")
    said = refused("remove", *words, "--dry-run")
    assert said.err.endswith("sparsity 0.01 of 16 rounds to none; 0.0625 or more prunes\n")
    planned = ok("plan", *words)
    assert planned.err.startswith("sparseprune: warning: scope.mlp prunes nothing: ")


WHOLE = """
version = 1
[scope.whole]
tensors = "layers.{layer}.q.weight"
block = [-1, 1]
shape = []
sparsity = 0.5
[scope.rows]
tensors = "layers.{layer}.up.weight"
block = [1, 1]
shape = [1, -1]
sparsity = 0.5
"""
CPU = (
    "scope.whole is decided on the CPU: a block has 1,024 elements, more than --memory and the device have "
    "room for at one time (768)"
)


@pytest.fixture
def with_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a block that is larger than a device may hold, and a device that is not there."""
    tensors = {"layers.0.q.weight": torch.randn(1024, 4), "layers.0.up.weight": torch.randn(8, 8)}
    save_file(tensors, tmp_path / "m.safetensors")
    narrow(monkeypatch, 512, 16, memory=64 << 10)
    monkeypatch.setattr("sparseprune.execution.schedule.count_devices", lambda: 1)
    return tmp_path / "m.safetensors"


def test_what_the_cpu_decides_is_not_said_to_be_on_cuda(with_cuda: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, WHOLE[: WHOLE.index("[scope.rows]")])
    strict = run("apply", with_cuda, spec, "--device", "cuda", "--strict")
    assert (strict.code, strict.err.splitlines()[-1]) == (2, f"sparseprune: --strict: {CPU}")
    said = run("apply", with_cuda, spec, "--device", "cuda", "--json")
    report = json.loads(said.out)
    assert (said.code, report["device"], report["rules"][0]["device"]) == (0, "cpu", "cpu")
    assert CPU in report["warnings"]
    assert said.err.splitlines()[-1].endswith(", on cpu")
    assert run("apply", with_cuda, spec, "--device", "cpu", "--force").err.count("decided on") == 0


@pytest.mark.parametrize(
    ("asked", "planned", "found", "rows"),
    [
        ("cuda:1", "cuda:1", "cuda:1 and cpu", "cuda:1"),
        ("cpu", "cpu", "cpu", "cpu"),
        ("cuda", "auto", "cpu", "cpu"),
    ],
)
def test_the_devices_are_those_of_the_ways_of_working(
    with_cuda: Path, asked: str, planned: str, found: str, rows: str
) -> None:
    schedule = make_schedule(
        make_plan(open_checkpoint(with_cuda), parse_spec(WHOLE)), AMPLE, 2, device=planned
    )
    assert device_text(schedule.groups, asked) == found
    assert devices_of_rules(schedule, asked) == {"scope.whole": "cpu", "scope.rows": rows}
    assert list(cpu_lines(schedule, asked))[:1] == ([] if asked == "cpu" else [CPU])
