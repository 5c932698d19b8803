"""`plan` and `--dry-run`: what a spec binds to, from headers alone, as lines, as JSON and as a drawing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import ValidationError
from safetensors.torch import save_file

from sparseprune.cli.demo import write_decoder
from tests.commands import loaded, ok, python, refused, run, schema, silent, valid
from tests.faults import failing
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_spec

GLOBAL = """
version = 1
scope.all = { tensors = "{layer}.{name}.weight", block = [1, 1], shape = [-1, -1] }
scope_coupling.model = { scopes = ["all"], across = "all", sparsity = 0.5 }
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint m.safetensors, and spec.toml with 2:4."""
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    write_spec(tmp_path, TWO_OF_FOUR)
    return tmp_path


def lines(folder: Path, spec: str, *more: object) -> list[str]:
    said = silent("plan", folder / "m.safetensors", write_spec(folder, spec), *more)
    return said.out.splitlines()


def document(folder: Path, spec: str, *more: object) -> Any:
    said = silent("plan", folder / "m.safetensors", write_spec(folder, spec), "--json", *more)
    return valid(said.out, "plan")


def facts(shown: list[str]) -> dict[str, str]:
    """The lines of the cards that tell one thing each."""
    pairs = (line.strip().split(maxsplit=1) for line in shown if line.startswith("  "))
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_two_of_four(folder: Path) -> None:
    shown = lines(folder, TWO_OF_FOUR)
    memory = [line for line in shown if line.startswith("  memory")]
    assert [line for line in shown if line not in memory] == [
        "scope.proj",
        "  binds     4 tensors in 4 instances such as proj[layer=0,name=down]",
        "  keeps     2 of 4 blocks in each of 128 scopes",
        "  sparsity  50.00%",
        "  prunes    256 of 512 elements, 46.38% of all parameters",
        "  removes   nothing: its blocks [1, 1] are not whole slices of 0.down.weight, [8, 16]",
        "  tensors  shape  block  grid  scope  example",
        "        2  8x16   1x1    8x16  1x4    0.down.weight",
        "        2  16x8   1x1    16x8  1x4    0.up.weight",
        "",
        "in all",
        "  covers    512 of 552 parameters (92.75%) in 4 of 7 tensors",
        "  layers    100.00% of the layers' matrices",
        f"  input     {(folder / 'm.safetensors').stat().st_size / 1000:.2f} kB",
        "  masks     64 B",
        f"  output    {output_size(folder)} in {folder / 'm.pruned.safetensors'}",
        "  largest left alone  shape  parameters  bytes",
        "  0.up.bias           16             16   64 B",
        "  1.up.bias           16             16   64 B",
        "  norm                8               8   32 B",
    ]
    assert len(memory) == 1


def output_size(folder: Path) -> str:
    """What `apply` writes, without its report."""
    ok("apply", folder / "m.safetensors", folder / "spec.toml", "-o", folder / "o.safetensors")
    written = sum(path.stat().st_size for path in folder.glob("o.*safetensors"))
    return f"{written / 1000:.2f} kB"


def test_fused_blocks_name_their_members_and_the_label_of_a_block(folder: Path) -> None:
    assert lines(folder, CHANNELS)[:11] == [
        "scope.mlp",
        "  binds     6 tensors in 2 instances such as mlp[layer=0]",
        "  block     up + bias + down, fused: channel[layer=0]",
        "  keeps     12 of 16 blocks in each of 2 scopes",
        "  sparsity  25.00%",
        "  prunes    136 of 544 elements, 24.64% of all parameters",
        "  removes   16x8 becomes 12x8, 16 becomes 12, 8x16 becomes 8x12",
        "  tensors  member  shape  block  grid  scope  example",
        "        2  up      16x8   1x8    16x1  16x1   0.up.weight",
        "        2  bias    16     1x1    16x1  16x1   0.up.bias",
        "        2  down    8x16   8x1    1x16  16x1   0.down.weight",
    ]


def test_scopes_that_compete_are_one_scope(folder: Path) -> None:
    assert lines(folder, GLOBAL)[:6] == [
        "scope_coupling.model",
        "  binds     4 tensors in 1 instance",
        "  scope     4 scopes compete for one budget",
        "  keeps     256 of 512 blocks in the one scope",
        "  sparsity  50.00%",
        "  prunes    256 of 512 elements, 46.38% of all parameters",
    ]


def test_sparsity_is_told_as_it_was_rounded(folder: Path) -> None:
    spec = TWO_OF_FOUR.replace("nnz = 2", "sparsity = 0.3")
    assert facts(lines(folder, spec))["sparsity"] == "25.00%, asked 30.00%: whole blocks"
    (rule,) = document(folder, spec)["rules"]
    assert (rule["sparsity_asked"], rule["sparsity"], rule["nnz"]) == (0.3, 0.25, 3)


def test_threshold_says_what_survives_and_not_how_much(folder: Path) -> None:
    spec = TWO_OF_FOUR.replace("nnz = 2", "threshold = 0.5")
    told = facts(lines(folder, spec))
    assert told["keeps"] == "blocks that score 0.5 or more"
    assert told["reaches"] == "512 elements, 92.75% of all parameters"
    (rule,) = document(folder, spec)["rules"]
    assert (rule["pruned"], rule["sparsity"], rule["threshold"]) == (None, None, 0.5)


def test_blocks_of_unlike_size_that_compete_leave_the_elements_open(folder: Path) -> None:
    spec = GLOBAL.replace("block = [1, 1]", "block = [1, -1]")
    (rule,) = document(folder, spec)["rules"]
    assert rule["pruned"] is None
    assert (rule["blocks_per_scope"], rule["nnz"], rule["numel"]) == (48, 24, 512)


def test_json_counts_what_apply_prunes(folder: Path) -> None:
    for spec in (TWO_OF_FOUR, CHANNELS, GLOBAL, TWO_OF_FOUR.replace("nnz = 2", "nnz = 0")):
        plan = document(folder, spec)
        said = run("apply", folder / "m.safetensors", folder / "spec.toml", "--json", "-q", "--force")
        report = json.loads(said.out)
        for told, counted in zip(plan["rules"], report["rules"], strict=True):
            same = (
                "name", "instances", "tensors", "scopes", "blocks_per_scope", "nnz", "blocks", "numel",
                "pruned",
            )  # fmt: skip
            assert [told[key] for key in same] == [counted[key] for key in same]
        assert plan["totals"]["numel"] == report["totals"]["numel"]
        assert plan["totals"]["covered"] == sum(rule["numel"] for rule in report["rules"])
        written = (folder / "m.pruned.safetensors", folder / "m.pruned.masks.safetensors")
        assert plan["bytes"]["output"] == sum(path.stat().st_size for path in written)


def test_json_lists_forms_and_what_is_left_alone(folder: Path) -> None:
    found = document(folder, CHANNELS)
    (rule,) = found["rules"]
    assert (rule["fused"], rule["fused_block"]) == (["up", "bias", "down"], "channel[layer=0]")
    assert rule["forms"][2] == {
        "block_name": "down", "tensors": 2, "example": "0.down.weight", "dtype": "F32", "shape": [8, 16],
        "view": None, "block": [8, 1], "grid": [1, 16], "scope": [16, 1],
    }  # fmt: skip
    assert found["unreached"] == [{"name": "norm", "dtype": "F32", "shape": [8], "numel": 8, "bytes": 32}]


def test_a_wrong_document_does_not_pass_the_schema(folder: Path) -> None:
    found = document(folder, TWO_OF_FOUR)
    for broken in (found | {"schema": "sparseprune.plan.v0"}, found | {"more": 1}, found | {"rules": [{}]}):
        with pytest.raises(ValidationError):
            schema("plan").validate(broken)


def test_peak_memory_is_left_out_where_nobody_knows_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert document(folder, TWO_OF_FOUR)["bytes"]["peak"] > 0
    monkeypatch.setattr("sparseprune.execution.schedule.Schedule.peak_bytes", None)
    assert "peak" not in document(folder, TWO_OF_FOUR)["bytes"]
    assert "memory" not in facts(lines(folder, TWO_OF_FOUR))


@pytest.mark.parametrize(("more", "masks"), [([], 64), (["--mask-format", "bool"], 512), (["--no-masks"], 0)])
def test_masks_are_sized_in_their_form(folder: Path, more: list[str], masks: int) -> None:
    found = document(folder, TWO_OF_FOUR, *more)
    assert found["bytes"]["masks"] == masks
    shown = facts(lines(folder, TWO_OF_FOUR, *more))
    assert shown["masks"] == (f"{masks} B" if masks else "none")


def test_an_output_that_exists_is_told(folder: Path) -> None:
    (folder / "there.safetensors").touch()
    shown = facts(lines(folder, TWO_OF_FOUR, "-o", folder / "there.safetensors"))
    assert shown["output"].endswith("there.safetensors (exists: --force replaces it)")


@pytest.mark.parametrize("command", ["apply", "mask"])
def test_dry_run_says_what_plan_says_and_writes_nothing(folder: Path, command: str) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for more in ([], ["--json"]):
        words = [folder / "m.safetensors", folder / "spec.toml", "-o", folder / "new.safetensors", *more]
        dry, plan = run(command, *words, "--dry-run"), run("plan", *words)
        assert (dry.code, dry.err) == (0, "")
        if command == "apply":
            assert dry == plan
        else:
            assert dry.out != plan.out  # no weights are written
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_nothing_but_headers_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr("sparseprune.checkpoint.TensorReader.read_into", failing(ZeroDivisionError))
    assert lines(folder, TWO_OF_FOUR)
    with pytest.raises(ZeroDivisionError):
        run("apply", folder / "m.safetensors", folder / "spec.toml")


def test_a_terabyte_of_holes_is_planned_without_torch(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(80) for name in ("up", "down")]
    size = 65536 * 65536 * 2
    header = json.dumps(
        {
            name: {"dtype": "BF16", "shape": [65536, 65536], "data_offsets": [at * size, (at + 1) * size]}
            for at, name in enumerate(names)
        }
    ).encode()
    with (tmp_path / "m.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + len(names) * size)
    words = ("plan", tmp_path / "m.safetensors", "2of4", "--draw", "all")
    assert loaded(*words) == (0, set())
    assert "343,597,383,680 of 687,194,767,360 elements" in silent(*words).out


def test_draw_draws_the_rules_that_are_named(folder: Path) -> None:
    two = TWO_OF_FOUR.replace("{layer}", "0") + TWO_OF_FOUR.replace("proj", "other").replace(
        "version = 1", ""
    ).replace("{layer}", "1")
    heads = {"proj": "proj[name=down]", "other": "other[name=down]"}

    def drawn(*more: str) -> list[str]:
        shown = lines(folder, two, *more)
        return [name for name, head in heads.items() if head in shown]

    assert drawn() == []
    assert drawn("--draw", "none") == []
    assert drawn("--draw", "other") == ["other"]
    assert drawn("--draw", "scope.proj") == ["proj"]
    assert drawn("--draw", "all") == ["proj", "other"]


def test_json_draws_nothing(folder: Path) -> None:
    assert document(folder, TWO_OF_FOUR, "--draw", "all") == document(folder, TWO_OF_FOUR)


def test_the_first_rule_is_drawn_on_a_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseprune.cli.plan.on_terminal", lambda: True)
    assert "proj[layer=0,name=down]" in lines(folder, TWO_OF_FOUR)
    assert "proj[layer=0,name=down]" not in lines(folder, TWO_OF_FOUR, "--draw", "none")


BAD = {
    "no such checkpoint": (["absent.safetensors", "spec.toml"], "absent.safetensors: no such file"),
    "no such spec": (["m.safetensors", "absent.toml"], "neither a file nor a spec"),
    "no such rule": (["m.safetensors", "spec.toml", "--draw", "scope.prj"],
        'sparseprune: --draw scope.prj: there is no such rule; did you mean "scope.proj"?'),
    "set without a value": (["m.safetensors", "spec.toml", "--set", "n"],
        "sparseprune: --set n: wanted NAME=VALUE, such as --set n=2"),
    "set without a name": (["m.safetensors", "spec.toml", "--set", "=2"], "--set =2: wanted NAME=VALUE"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, text = BAD[name]
    monkeypatch.chdir(folder)
    said = refused("plan", *words)
    assert text in said.err
    assert len(said.err.splitlines()) == 1
    assert said.err.startswith("sparseprune: ")


VARS = """
version = 1
vars = { keep = 2 }
scope.proj = { tensors = "{layer}.{name}.weight", block = [1, 1], shape = [1, 4], nnz = "keep" }
"""


@pytest.mark.parametrize("command", ["plan", "apply", "mask"])
def test_set_changes_a_variable_of_the_spec(folder: Path, command: str) -> None:
    spec = write_spec(folder, VARS)
    for more, kept in (([], 2), (["--set", "keep=1"], 1), (["--set", "keep=1", "--set", "keep=3"], 3)):
        said = ok(
            command, folder / "m.safetensors", spec, "--json", *more, *["--force"] * (command != "plan")
        )
        assert json.loads(said.out)["rules"][0]["nnz"] == kept


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("spec", ["2of4", "mlp-channels", "unstructured-global"])
def test_plan_fits_the_width_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, spec: str
) -> None:
    write_decoder(tmp_path / "decoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(width))
    said = ok("plan", "decoder", spec, "--draw", "all")
    shown = said.out.splitlines()
    assert max(map(len, shown)) <= width
    assert all(line == line.rstrip() for line in shown)
    assert "\x1b" not in said.out
    whole = "".join(shown).replace(" ", "")
    assert "model.embed_tokens.weight" in whole or width == 60  # there it goes on in the next line
    assert "model.layers.0.mlp.down_proj.weight" in whole


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_other_encodings_can_show_it(tmp_path: Path, encoding: str) -> None:
    write_decoder(tmp_path / "decoder")
    words = ("-m", "sparseprune", "plan", "decoder", "mlp-channels", "--draw", "all")
    done = python(*words, env=os.environ | {"PYTHONIOENCODING": encoding}, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a0 a0 .. a0" in done.stdout


def test_empty_and_single_elements_are_planned(tmp_path: Path) -> None:
    save_file({"a.w.weight": torch.zeros(0, 8), "b.w.weight": torch.ones(1, 4)}, tmp_path / "m.safetensors")
    said = silent("plan", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR), "--draw", "all")
    assert "0x8: no elements" in said.out


def test_names_that_hold_anything_stay_on_their_line(tmp_path: Path) -> None:
    names = ("a.x\ny.weight", "[red]z\x1b[31m")
    save_file({name: torch.ones(2, 4) for name in names}, tmp_path / "m.safetensors")
    said = silent("plan", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR), "--draw", "all")
    assert r"a.x\ny.weight" in said.out
    assert r"[red]z\x1b[31m" in said.out


SOFT = (
    TWO_OF_FOUR
    + """
mode = "soft"
score = { norm = 1 }
"""
)


def test_what_is_not_usual_is_told(folder: Path) -> None:
    told = facts(lines(folder, SOFT))
    assert told["mode"] == "soft: what survives shrinks, too"
    assert told["score"] == "magnitude, norm 1.0"
    (rule,) = document(folder, SOFT)["rules"]
    assert (rule["mode"], rule["pruned"]) == ("soft", None)
    assert rule["score"] == {"kind": "magnitude", "norm": 1.0, "normalize": False, "file": None}
