"""The library: the functions do what the commands do, give typed results, print nothing and raise errors."""

import inspect
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune import results
from sparseprune.api.options import Option
from sparseprune.api.run import Run
from sparseprune.cli.app import app
from tests.commands import imported, run
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_spec

COMMANDS = "apply mask plan remove calibrate eval specs inspect verify reapply compare".split()
FUNCTIONS = {"eval": "evaluate"}
"""Where the name of a command is one of Python's own."""


def function_of(command: str) -> Any:
    return getattr(sparseprune, FUNCTIONS.get(command, command))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a checkpoint and a spec, in which the test runs."""
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    write_spec(tmp_path, TWO_OF_FOUR)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pruned(home: Path) -> Path:
    sparseprune.apply("m.safetensors", "spec.toml")
    return home / "m.pruned.safetensors"


def test_every_command_is_a_function_and_takes_its_options() -> None:
    commands = {one.callback.__name__ for one in app.registered_commands if one.callback}
    assert commands == {*COMMANDS, "demo"}
    assert (
        {function_of(name).__name__ for name in COMMANDS} < set(sparseprune.__all__) <= set(dir(sparseprune))
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_function_is_in_the_help_of_its_command(name: str) -> None:
    shown = run(name, "--help").out
    for parameter in inspect.signature(function_of(name)).parameters.values():
        for option in getattr(parameter.annotation, "__metadata__", ()):
            assert isinstance(option, Option)
            for flag in option.flags:
                assert flag.partition("/")[0] in shown
    first, *_ = (function_of(name).__doc__ or "").partition("\n")
    assert " ".join(first.split()) in " ".join(shown.split())
    assert "Raises" not in shown


def test_results_are_typed_and_are_the_json_of_the_commands(home: Path) -> None:
    report = sparseprune.apply("m.safetensors", "spec.toml")
    assert isinstance(report, results.Report)
    assert (report.totals.pruned, report.rules[0].nnz, report.tensors[0].name) == (256, 2, "0.down.weight")
    assert report.to_json() + "\n" == (home / "m.pruned.report.json").read_text()
    assert (report.output, report.bytes.masks) == ("m.pruned.safetensors", 64)
    plan = sparseprune.plan("m.safetensors", home / "spec.toml", home / "out.safetensors")
    assert isinstance(plan, results.Plan)
    words = ("plan", "m.safetensors", home / "spec.toml", "-o", home / "out.safetensors", "--json")
    assert plan.to_json() + "\n" == run(*words).out


def test_a_whole_pipeline_prints_nothing_and_leaves_signals_alone(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    report = sparseprune.apply(home / "m.safetensors", "spec.toml", home / "out.safetensors")
    checked = sparseprune.verify(report.output, "spec.toml")
    masked = sparseprune.verify(report.output, masks="out.masks.safetensors", partial=True)
    found = sparseprune.inspect(report.output, match=["*.up.weight"], pattern=["1:2"])
    compared = sparseprune.compare("m.safetensors", report.output, require=["altered==0"])
    again = sparseprune.reapply("m.safetensors", "out.masks.safetensors", "again.safetensors", partial=True)
    masks = sparseprune.mask("m.safetensors", "spec.toml", mask_format="bool")
    assert isinstance(checked, results.Verification)
    assert isinstance(masked, results.MaskVerification)
    assert (checked.totals.broken, masked.holds, again.totals.lost) == (0, True, 256)
    assert [one.name for one in found.tensors] == ["0.up.weight", "1.up.weight"]
    assert compared.totals.zeros_after >= 256
    assert masks.bytes.masks == 512
    assert "2of4" in sparseprune.specs()
    assert sparseprune.specs("2of4").keys() == {"2of4"}
    assert torch.equal(load_file("out.safetensors")["norm"], load_file("m.safetensors")["norm"])
    assert capfd.readouterr() == ("", "")
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_check_that_fails_raises_with_what_was_found(home: Path) -> None:
    with pytest.raises(sparseprune.CheckFailedError, match=r"0\.up\.weight") as caught:
        sparseprune.verify("m.safetensors", "spec.toml")
    assert caught.value.exit_code == 1
    assert isinstance(caught.value.result, results.Verification)
    assert caught.value.result.totals.broken == 128
    with pytest.raises(sparseprune.CheckFailedError) as caught:
        sparseprune.inspect("m.safetensors", require=["sparsity>=0.5"])
    assert isinstance(caught.value.result, results.Inspection)


def test_errors_are_exceptions_with_the_exit_code(home: Path) -> None:
    with pytest.raises(sparseprune.CheckpointError) as caught:
        sparseprune.apply("absent.safetensors", "spec.toml")
    assert caught.value.exit_code in {2, 3}
    with pytest.raises(sparseprune.SpecError):
        sparseprune.apply("m.safetensors", "absent")
    for wrong in ({"memory": "much"}, {"jobs": 0}):
        with pytest.raises(sparseprune.SparsepruneError, match="wanted"):
            sparseprune.plan("m.safetensors", "spec.toml", **wrong)
    with pytest.raises(sparseprune.SparsepruneError, match="nothing to check against"):
        sparseprune.verify("m.safetensors")


def test_progress_is_heard_to_the_end_of_each_step(home: Path) -> None:
    steps: list[sparseprune.Progress] = []
    sparseprune.apply("m.safetensors", "spec.toml", progress=steps.append)
    assert {step.what for step in steps} == {"pruning"}
    assert [step.ended for step in steps] == [False] * (len(steps) - 1) + [True]
    assert (steps[0].done, steps[-1].done) == (0, steps[-1].total)
    assert [step.done for step in steps] == sorted(step.done for step in steps)


def test_warnings_are_heard_and_in_the_result_and_errors_where_strict(home: Path) -> None:
    heard: list[str] = []
    listener = sparseprune.Listener(warning=heard.append)
    keeps_all = write_spec(home, TWO_OF_FOUR.replace("nnz = 2", "nnz = 4"))
    report = sparseprune.apply("m.safetensors", keeps_all, progress=listener)
    assert heard
    assert [*report.warnings] == heard
    with pytest.raises(sparseprune.SparsepruneError, match="--strict: "):
        sparseprune.apply("m.safetensors", keeps_all, "o.safetensors", strict=True)
    assert not (home / "o.safetensors").exists()


def test_a_warning_is_heard_once_and_has_nothing_that_a_terminal_obeys() -> None:
    heard: list[str] = []
    run = Run(sparseprune.Listener(warning=heard.append))
    run.warn("one\tfact", "another")
    run.warn("another")
    run.warn()
    assert heard == run.warnings == ["one\\tfact", "another"]


def test_a_strict_run_ends_with_all_that_it_would_warn_of() -> None:
    run = Run(None, strict=True)
    run.warn()
    with pytest.raises(sparseprune.SparsepruneError) as caught:
        run.warn("one", "two")
    assert caught.value.args == ("--strict: one", "--strict: two")


def test_variables_are_numbers_or_text(home: Path) -> None:
    spec = write_spec(home, TWO_OF_FOUR.replace("nnz = 2", 'nnz = "n"') + "[vars]\nn = 2\n")
    assert sparseprune.plan("m.safetensors", spec, set={"n": 1}).rules[0].nnz == 1
    assert sparseprune.plan("m.safetensors", spec, set={"n": "3"}).rules[0].nnz == 3


def test_a_spec_may_be_its_text(home: Path) -> None:
    report = sparseprune.apply("m.safetensors", TWO_OF_FOUR)
    assert report.totals.pruned == 256
    assert (home / "m.pruned.safetensors").exists()
    assert sparseprune.verify(report.output, TWO_OF_FOUR).tensors


def test_an_output_without_masks_has_none(home: Path) -> None:
    assert sparseprune.apply("m.safetensors", "spec.toml", mask_format=None).bytes.masks == 0
    assert not [*home.glob("*.masks.safetensors")]


def test_the_package_is_imported_without_what_it_loads_later() -> None:
    found = imported("import sparseprune; sparseprune.apply; dir(sparseprune)")
    assert found.isdisjoint({"torch", "numpy", "typer", "pydantic", "rich"})


def test_a_result_is_read_back_as_json(pruned: Path) -> None:
    found = json.loads(sparseprune.inspect(pruned).to_json())
    assert [one["zeros"] for one in found["tensors"] if one["name"] == "0.up.weight"] == [64]
