"""`verify CKPT SPEC`: what is printed where, exit codes, and that nothing is written."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.cli.demo import write_decoder
from tests.commands import loaded, ok, refused, run, silent, valid
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Two shards, pruned 2:4; the spec stands beside them."""
    tensors = mlp_tensors()
    first = {name: tensor for name, tensor in tensors.items() if not name.startswith("1")}
    second = {name: tensor for name, tensor in tensors.items() if name.startswith("1")}
    write_shards(tmp_path / "in", {"a.safetensors": first, "b.safetensors": second})
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", tmp_path / "in", spec, "-o", tmp_path / "out", "-q")
    return tmp_path / "out"


def lose(folder: Path, *, shard: str = "b.safetensors") -> None:
    """Put some zeros of the second layer's matrices out of order."""
    tensors = load_file(folder / shard)
    tensors["1.up.weight"][2, 4:8] = 1
    tensors["1.up.weight"][9, 0:4] = 1
    save_file(tensors, folder / shard)


def test_what_was_pruned_passes_and_nothing_is_written(pruned: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    said = silent("verify", pruned, tmp_path / "spec.toml")
    assert [line.split() for line in said.out.splitlines()] == [
        ["rule", "tensors", "scopes", "may", "survive", "fullest", "broken"],
        ["scope.proj", "4", "128", "2", "of", "4", "2", "0"],
        "all 128 scopes are as the spec says".split(),
        "checked 512 of 552 parameters, 100.00% of the layers' matrices".split(),
    ]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_lost_zeros_are_told_tensor_by_tensor_with_exit_code_1(pruned: Path, tmp_path: Path) -> None:
    lose(pruned)
    said = run("verify", pruned, tmp_path / "spec.toml")
    assert said.code == 1
    assert said.err == "sparseprune: 2 of 128 scopes are broken, in 1 of 4 tensors\n"
    assert "1.up.weight  scope.proj       2  32  [2, 1]       [2, 4]          4        2" in said.out
    quiet = run("verify", pruned, tmp_path / "spec.toml", "-q")
    assert (quiet.code, quiet.out) == (1, "")
    assert quiet.err == (
        "sparseprune: 1.up.weight: 2 of 32 scopes of scope.proj hold more than 2 non-zero blocks; "
        "the first at [2, 1] (element [2, 4]) has 4\n"
    )


@pytest.mark.parametrize("against", ["spec", "masks"])
def test_a_summary_leaves_out_the_tensors(pruned: Path, tmp_path: Path, against: str) -> None:
    words = (tmp_path / "spec.toml",) if against == "spec" else ("--masks", pruned)
    whole = ok("verify", pruned, *words, "--summary").out
    assert "up.weight" not in whole
    assert len(whole.splitlines()) == (4 if against == "spec" else 1)
    tuned = tmp_path / "tuned"
    shutil.copytree(pruned, tuned, ignore=shutil.ignore_patterns("sparseprune"))
    lose(tuned)
    for more in ((), ("--json",), ("-q",)):
        said = run("verify", tuned, *words, "--summary", *more)
        (line,) = said.err.splitlines()
        assert (said.code, "up.weight" in said.out) == (1, False)
        assert ("2 of 128 scopes are broken" if against == "spec" else "not zero") in line
        if more == ("--json",):
            document = valid(said.out, "verify" if against == "spec" else "verify-masks")
            assert document["tensors"] == []
            assert document["totals"]["broken" if against == "spec" else "failed"] == (
                2 if against == "spec" else 1
            )


def test_the_dense_checkpoint_fails_in_every_tensor(pruned: Path, tmp_path: Path) -> None:
    said = run("verify", tmp_path / "in", tmp_path / "spec.toml", "-q")
    names = [line.split(": ")[1] for line in said.err.splitlines()]
    assert (said.code, said.out) == (1, "")
    assert names == ["0.down.weight", "0.up.weight", "1.down.weight", "1.up.weight"]


def test_json_is_the_document_whatever_was_found(pruned: Path, tmp_path: Path) -> None:
    lose(pruned)
    said = run("verify", pruned, tmp_path / "spec.toml", "--json")
    document = valid(said.out, "verify")
    assert said.code == 1
    assert said.err.startswith("sparseprune: 1.up.weight: 2 of 32 scopes")
    assert document["totals"] == {
        "scopes": 128, "broken": 2, "tensors": 4, "numel": 552, "checked": 512, "covers": "matrices",
        "layer_coverage": 1.0, "declared_coverage": 1.0, "uncovered": [],
    }  # fmt: skip
    assert document["warnings"] == []
    assert document["input"] == str(pruned)
    assert document["rules"][0]["survivors"][-1] == [4, 2]


def test_the_same_is_told_by_any_number_of_jobs(pruned: Path, tmp_path: Path) -> None:
    lose(pruned)
    whole = run("verify", pruned, tmp_path / "spec.toml", "--json", "--jobs", 1)
    assert run("verify", pruned, tmp_path / "spec.toml", "--json", "--jobs", 5) == whole


def test_quiet_says_nothing_where_all_is_well(pruned: Path, tmp_path: Path) -> None:
    said = run("verify", pruned, tmp_path / "spec.toml", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")


def test_a_lost_member_of_a_coupling_is_named_as_the_one_that_is_torn(tmp_path: Path) -> None:
    save_file(mlp_tensors(1), tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, CHANNELS)
    run("apply", tmp_path / "m.safetensors", spec, "-o", tmp_path / "p.safetensors", "-q")
    tensors = load_file(tmp_path / "p.safetensors")
    dead = int((tensors["0.up.weight"] == 0).all(dim=1).nonzero()[0])
    tensors["0.down.weight"][3, dead] = 1
    save_file(tensors, tmp_path / "p.safetensors")
    said = run("verify", tmp_path / "p.safetensors", spec, "-q")
    lines = dict(line.removeprefix("sparseprune: ").split(": ", 1) for line in said.err.splitlines())
    broken = "1 of 1 scope of scope.mlp holds more than 12 non-zero blocks; the first at [0, 0] "
    assert lines == {
        "0.down.weight": f"{broken}(element [0, 0]) has 13; "
        "1 fused block is not zero here but zero in another tensor",
        "0.up.bias": f"{broken}(element [0]) has 13",
        "0.up.weight": f"{broken}(element [0, 0]) has 13",
    }


@pytest.mark.parametrize("spec", ["2of4", "mlp-channels", "unstructured-global", "block16", "coupled-2of4"])
def test_shipped_specs_hold_for_what_they_pruned_and_not_before(tmp_path: Path, spec: str) -> None:
    write_decoder(tmp_path / "decoder")
    run("apply", tmp_path / "decoder", spec, "-o", tmp_path / "out", "-q")
    ok("verify", tmp_path / "out", spec, "-q")
    assert run("verify", tmp_path / "decoder", spec, "-q").code == 1


def test_variables_of_the_spec_can_be_set(tmp_path: Path) -> None:
    write_decoder(tmp_path / "decoder")
    run("apply", tmp_path / "decoder", "nofm", "--set", "n=3", "--set", "m=4", "-o", tmp_path / "out", "-q")
    words = ("verify", tmp_path / "out", "nofm", "-q", "--set", "m=4", "--set")
    assert [run(*words, f"n={kept}").code for kept in (2, 3, 4)] == [1, 0, 0]


def test_a_rule_that_cannot_be_checked_is_told_and_does_not_fail(tmp_path: Path) -> None:
    save_file({"0.up.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR.replace("nnz = 2", 'mode = "soft"\nthreshold = 0.5'))
    said = ok("verify", tmp_path / "m.safetensors", spec)
    assert said.out.splitlines()[1].split()[-2:] == ["not", "checked"]
    left_out = "0.00% of the layers' matrices; not reached: 16 parameters of *.up.weight"
    assert said.out.splitlines()[2] == f"checked 0 of 16 parameters, {left_out}"
    assert said.out.splitlines()[3].startswith(
        "scope.proj is not checked: a survivor of a soft threshold may have any size"
    )
    assert said.err == f"sparseprune: warning: the check reaches only {left_out}\n"


def test_scores_that_are_gone_are_not_missed(tmp_path: Path) -> None:
    save_file({"0.up.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR + 'score = { kind = "wanda", file = "gone.safetensors" }\n')
    ok("verify", tmp_path / "m.safetensors", spec)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["2of4", "--masks", "x"], "2of4 and --masks exclude each other; give one of them"),
        (["2of4", "--partial"], "--partial: goes with --masks MASKS or --zeros-of SPARSE"),
        (["--masks", "x", "--set", "n=2"], "--set: goes with a SPEC, whose [vars] it sets"),
    ],
)
def test_what_contradicts_itself_is_refused(pruned: Path, words: list[str], said: str) -> None:
    told = run("verify", pruned, *words)
    assert (told.code, told.out, told.err) == (2, "", f"sparseprune: {said}\n")


def test_a_checkpoint_is_checked_against_the_spec_that_it_carries(pruned: Path) -> None:
    told = ok("verify", pruned)
    carried = pruned / "sparseprune" / "spec.toml"
    assert told.err == f"sparseprune: checking against {carried}, by which it was pruned\n"
    assert "all 128 scopes are as the spec says" in told.out
    lose(pruned)
    assert run("verify", pruned, "-q").code == 1


def test_variables_are_those_that_the_spec_was_applied_with(pruned: Path, tmp_path: Path) -> None:
    ok("apply", tmp_path / "in", "nofm", "--set", "n=2", "-o", tmp_path / "other", "-q")
    told = ok("verify", tmp_path / "other", "--json")
    assert told.err.endswith("by which it was pruned, with n=2\n")
    assert valid(told.out, "verify")["set"] == {"n": "2"}
    assert run("verify", tmp_path / "other", "--set", "n=1", "-q").code == 1


def test_without_a_spec_one_line_says_what_to_give(pruned: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "in", pruned / "a.safetensors"):
        (line,) = refused("verify", folder).err.splitlines()
        assert line == (
            f"sparseprune: there is nothing to check against: {folder} carries no spec that it was pruned "
            "by; give a SPEC, such as 2of4, or --masks MASKS"
        )


def test_a_checkpoint_in_place_of_a_spec_says_which_options_take_one(pruned: Path) -> None:
    for place in (pruned, pruned / "a.safetensors"):
        (line,) = refused("verify", pruned, place).err.splitlines()
        assert line.startswith(f"sparseprune: {place}: a checkpoint, not a spec; --masks {place} checks")


def test_a_spec_that_does_not_fit_is_refused(pruned: Path, tmp_path: Path) -> None:
    spec = write_spec(tmp_path, TWO_OF_FOUR.replace("[1, 4]", "[1, 3]"))
    told = refused("verify", pruned, spec)
    assert "Traceback" not in told.err


def test_masks_may_be_checked_instead_of_a_spec(pruned: Path) -> None:
    said = silent("verify", pruned, "--masks", pruned, "--partial")
    assert "all of them are zero" in said.out


@pytest.mark.parametrize("spec", [TWO_OF_FOUR, CHANNELS, TWO_OF_FOUR.replace("nnz = 2", "threshold = 0.01")])
def test_neither_torch_nor_numba_is_loaded(pruned: Path, tmp_path: Path, spec: str) -> None:
    path = write_spec(tmp_path, spec)
    run("verify", pruned, path, "-q")  # the loops that a threshold needs are compiled and kept
    assert loaded("verify", pruned, path)[1] <= {"numpy"}
