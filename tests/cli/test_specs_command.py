"""`specs`: what ships is listed and printed as it is; with a checkpoint what fits, and what it would do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import sparseprune
from sparseprune.errors import SpecError
from sparseprune.spec import list_specs
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, refused, run, schema, silent

SPECS = Path(__file__).parents[2] / "specs"
UNFIT = {"experts", "experts-by-router", "expert-channels", "resnet-filters"}
UNFIT |= {"block16", "block16x16"}  # no matrix has 16 inputs
FIT = {*list_specs()} - UNFIT


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama of two layers."""
    return write(tmp_path / "a llama", decoder(), LLAMA)


def test_every_spec_is_shown_with_its_summary_its_structure_and_its_variables() -> None:
    lines = silent("specs").out.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines[::2])
    assert tuple(shown) == list_specs()
    knobs = dict(zip(shown, map(str.strip, lines[1::2]), strict=True))
    assert knobs["nofm"] == "matrices; --set n=1 m=4 permute=false transposable=false"
    assert knobs["coupled-2of4"] == "matrices; nothing to set"
    assert knobs["mlp-channels"] == """mlp; --set sparsity=0.25 only="''" multiple=1"""
    for name, text in shown.items():
        assert (SPECS / f"{name}.toml").read_text().splitlines()[0] == f"# {text}"


def test_a_spec_is_printed_as_it_is() -> None:
    for name in list_specs():
        assert run("specs", name).out == (SPECS / f"{name}.toml").read_text()


def test_an_earlier_name_prints_the_spec_that_took_its_place() -> None:
    assert run("specs", "bert-heads").out == (SPECS / "heads.toml").read_text()


def test_an_unknown_name_is_one_line() -> None:
    said = refused("specs", "2of5")
    assert said.err.startswith(
        'sparseprune: "2of5" is neither a file nor a spec that ships with sparseprune; '
    )
    assert "2of4" in said.err
    assert len(said.err.splitlines()) == 1


def listed(*words: object) -> list[dict[str, object]]:
    """The documents of `specs WORDS --json`, each of which has the schema."""
    found: list[dict[str, object]] = json.loads(ok("specs", *words, "--json").out)
    for one in found:
        schema("specs").validate(one)
    return found


def test_json_is_a_list_of_specs_with_their_variables_and_earlier_names() -> None:
    found = {one["name"]: one for one in listed()}
    assert tuple(found) == list_specs()
    assert found["nofm"]["variables"] == {"n": 1, "m": 4, "permute": False, "transposable": False}
    assert found["nofm"]["structures"] == ["matrices"]
    assert "bert-heads" in str(found["heads"]["aliases"])
    assert found["heads"]["text"] == (SPECS / "heads.toml").read_text()
    assert not any({"coverage", "reached", "removal"} & one.keys() for one in found.values())


def test_specs_that_fit_a_checkpoint_say_what_they_reach_and_what_remove_would_make(folder: Path) -> None:
    found = {str(one["name"]): one for one in listed("--for", folder)}
    assert found.keys() == FIT
    channels = json.loads(json.dumps(found["mlp-channels"]))
    assert (channels["reached"]["covers"], channels["coverage"]) == ("mlp", 1)
    assert 0 < channels["reached"]["layer_coverage"] < 1
    change = {"key": "intermediate_size", "before": 16, "after": 12}
    plan = json.loads(ok("plan", folder, "mlp-channels", "--json").out)
    assert channels["removal"] == {"config": [change], "numel": plan["removal"]["numel"], "reason": None}
    pairs = json.loads(json.dumps(found["pairs-4of8"]))
    assert pairs["coverage"] > 0
    assert pairs["removal"]["config"] is None
    assert pairs["removal"]["reason"]


def test_what_fits_is_shown_in_lines_for_people(folder: Path) -> None:
    lines = [line.strip() for line in ok("specs", "--for", folder).out.splitlines()]
    at = next(number for number, line in enumerate(lines) if line.startswith("mlp-channels "))
    variables, reaches, removal = lines[at + 1 : at + 4]
    assert reaches.endswith("of the layers' matrices, 100.00% of the MLP matrices")
    assert variables == """mlp; --set sparsity=0.25 only="''" multiple=1"""
    assert removal.startswith("remove: intermediate_size 16 -> 12, ")
    assert removal.endswith(" parameters left")
    assert "remove: whole slices, as many as the data tells" in lines  # of the global ones


def test_a_spec_whose_budget_is_nothing_there_says_so(folder: Path) -> None:
    (layers,) = listed("layers", "--for", folder)
    assert "prunes nothing" in str(layers["removal"])


def test_one_that_is_named_and_does_not_fit_is_refused(folder: Path) -> None:
    said = refused("specs", "experts", "--for", folder)
    assert "the checkpoint has no routed experts under names that are known" in said.err


def test_a_spec_that_finds_nothing_names_the_command_that_lists_what_fits(folder: Path) -> None:
    for command in ("plan", "apply", "verify", "remove"):
        (line,) = refused(command, folder, "experts").err.splitlines()
        assert line.startswith(
            "sparseprune: experts.toml: [block.part] structure: the checkpoint has no routed "
        )
        assert line.endswith(f"; `sparseprune specs --for '{folder}'` lists the specs that fit")


@pytest.mark.parametrize(
    ("name", "told"), [("n", "nofm and vnm have it"), ("steps", "unstructured-gradual has it")]
)
def test_a_variable_of_another_spec_points_to_that(folder: Path, name: str, told: str) -> None:
    (line,) = refused("plan", folder, "coupled-2of4", "--set", f"{name}=1").err.splitlines()
    assert line.endswith(f'[vars] has no "{name}"; the spec has no [vars]; among the shipped specs {told}')


def test_a_percentage_is_one_line_with_the_share_that_was_meant(folder: Path) -> None:
    for spec in ("unstructured", "heads", "mlp-channels"):
        (line,) = refused("plan", folder, spec, "--set", "sparsity=50").err.splitlines()
        assert "this comes to 50, wanted a number from 0 to 1; did you mean 0.5?" in line


def test_a_checkpoint_that_nothing_fits_is_told_why(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "m.safetensors")
    said = ok("specs", "--for", tmp_path / "m.safetensors")
    assert said.out == ""
    assert said.err.startswith(
        f"sparseprune: no spec that ships with sparseprune fits {tmp_path / 'm.safetensors'}: 2of4.toml: "
    )
    assert listed("--for", tmp_path / "m.safetensors") == []


def test_an_adapter_is_told_to_be_merged(tmp_path: Path) -> None:
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{at}.lora_A.weight": torch.ones(8, 64), f"{at}.lora_B.weight": torch.ones(64, 8)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        (line,) = refused("apply", source, "2of4").err.splitlines()
        assert "it is a LoRA adapter, so merge it into its base model first" in line


def test_statistics_need_not_be_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"2of4-admm", "mlp-channels-admm"} <= {one["name"] for one in listed("--for", folder)}


def test_specs_are_records_in_python(folder: Path) -> None:
    every = sparseprune.specs()
    assert every["2of4"].text == (SPECS / "2of4.toml").read_text()
    assert every["2of4"].coverage is None
    fit = sparseprune.specs(checkpoint=folder)
    assert fit.keys() == FIT
    found = sparseprune.specs("decoder-gqa-heads", checkpoint=folder)["heads"].reached
    assert found is not None
    assert found.declared_coverage == 1
    with pytest.raises(SpecError, match="no routed experts"):
        sparseprune.specs("experts", checkpoint=folder)
