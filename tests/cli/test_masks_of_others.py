"""Zeros of somebody's sparse checkpoint, masks of torch's own pruning, names that wrappers made others."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from tests.checkpoint.test_masks_of_others import pruned_module
from tests.cli.interrupted import Command, Commands, Moment
from tests.cli.removal import LLAMA, as_bytes, decoder, read, write
from tests.cli.test_resuming_runs import CONTINUED, notes, said_of
from tests.commands import ok, refused, run, valid
from tests.limits import narrow
from tests.samples import TWO_OF_FOUR, config_of, mlp_tensors, write_shards, write_spec

MATRICES = [name for name in mlp_tensors() if name.endswith("weight")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A `sparse` checkpoint that somebody pruned, without masks, and one that was `tuned` from it."""
    save_file(mlp_tensors(), tmp_path / "dense.safetensors")
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    words = ("-o", tmp_path / "sparse.safetensors", "--mask-format", "bool")
    ok("apply", tmp_path / "dense.safetensors", spec, *words)
    (tmp_path / "sparse.masks.safetensors").rename(tmp_path / "masks.safetensors")
    (tmp_path / "sparse.report.json").unlink()
    sparse = load_file(tmp_path / "sparse.safetensors")
    save_file({name: one + 0.25 for name, one in sparse.items()}, tmp_path / "tuned.safetensors")
    return tmp_path


def change(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Rewrite a file with other tensors, or more."""
    save_file(load_file(path) | dict(tensors), path)


def renamed(path: Path, names: Mapping[str, str]) -> None:
    """Rewrite a file with its tensors under other names; those without one are left out."""
    tensors = load_file(path)
    save_file({new: tensors[old] for old, new in names.items()}, path)


def words(folder: Path, *more: object) -> tuple[object, ...]:
    return ("reapply", folder / "tuned.safetensors", "-o", folder / "out.safetensors", *more)


def check_reapplied(folder: Path, names: Mapping[str, str] | None = None) -> None:
    """The output is the tuned one with the zeros of the masks, which lie beside it, under their `names`."""
    names = {name: name for name in mlp_tensors()} if names is None else names
    keep = load_file(folder / "masks.safetensors")
    tuned, out = load_file(folder / "tuned.safetensors"), load_file(folder / "out.safetensors")
    assert out.keys() == tuned.keys()
    for name, here in names.items():
        wanted = torch.where(keep[name], tuned[here], 0) if name in keep else tuned[here]
        assert as_bytes(out[here]) == as_bytes(wanted)
    found = load_masks(folder / "out.safetensors")
    assert found.keys() == {names[name] for name in keep}
    assert all(torch.equal(found[names[name]], one) for name, one in keep.items())


# The zeros of a sparse checkpoint.


@pytest.mark.parametrize("slab", [8, 64, 1 << 20])
@pytest.mark.parametrize("form", ["bool", "packed"])
def test_the_zeros_of_a_sparse_checkpoint_are_masks(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str, slab: int
) -> None:
    narrow(monkeypatch, slab)
    said = ok(*words(folder, "--zeros-of", folder / "sparse.safetensors", "--mask-format", form, "--json"))
    check_reapplied(folder)
    report = valid(said.out, "reapply")
    assert (report["masks"], report["totals"]["pruned"]) == (str(folder / "sparse.safetensors"), 256)
    assert {one["name"]: one["pruned"] for one in report["tensors"]} == dict.fromkeys(MATRICES, 64)
    assert said.err.splitlines()[0] == (
        f"sparseprune: masks are the zeros of 4 tensors of {folder / 'sparse.safetensors'}"
    )


def test_the_output_is_that_of_the_masks_of_the_same_zeros(folder: Path) -> None:
    ok(*words(folder, "--zeros-of", folder / "sparse.safetensors"))
    masks = folder / "masks.safetensors"
    ok("reapply", folder / "tuned.safetensors", masks, "-o", folder / "other.safetensors")
    for end in (".safetensors", ".masks.safetensors"):
        assert (folder / f"out{end}").read_bytes() == (folder / f"other{end}").read_bytes()


def test_of_shards_in_folders_and_another_dtype(folder: Path) -> None:
    sparse, tuned = (load_file(folder / f"{name}.safetensors") for name in ("sparse", "tuned"))
    halves = {name: one.bfloat16() for name, one in sparse.items()}
    write_shards(folder / "s", {"a.safetensors": halves})
    up = {name: one for name, one in tuned.items() if "up" in name}
    down = {name: one for name, one in tuned.items() if "up" not in name}
    write_shards(folder / "t", {"x.safetensors": up, "y.safetensors": down})
    ok("reapply", folder / "t", "--zeros-of", folder / "s", "-o", folder / "o")
    for name, one in (load_file(folder / "o/x.safetensors") | load_file(folder / "o/y.safetensors")).items():
        wanted = torch.where(sparse[name] == 0, 0, tuned[name]) if one.ndim == 2 else tuned[name]
        assert as_bytes(one) == as_bytes(wanted)
    assert not (folder / "o/sparseprune/spec.toml").exists()


def test_a_tensor_without_zeros_has_no_mask_though_its_like_has_one(folder: Path) -> None:
    change(folder / "sparse.safetensors", {"1.up.weight": torch.ones(16, 8)})
    ok(*words(folder, "--zeros-of", folder / "sparse.safetensors"))
    assert sorted(load_masks(folder / "out.safetensors")) == sorted({*MATRICES} - {"1.up.weight"})


def test_zeros_of_vectors_and_wide_integers_count_only_where_match_names_them(folder: Path) -> None:
    bias = torch.zeros(16)
    ids = torch.arange(8).reshape(1, 8)
    change(folder / "sparse.safetensors", {"0.up.bias": bias, "ids": ids})
    change(folder / "tuned.safetensors", {"ids": ids + 1})
    sparse = ("--zeros-of", folder / "sparse.safetensors")
    ok(*words(folder, *sparse))
    assert sorted(load_masks(folder / "out.safetensors")) == sorted(MATRICES)
    ok(*words(folder, *sparse, "--match", "*.up.*", "--match", "ids", "--force"))
    found = load_masks(folder / "out.safetensors")
    assert sorted(found) == ["0.up.bias", "0.up.weight", "1.up.weight", "ids"]
    out = load_file(folder / "out.safetensors")
    assert (out["0.up.bias"].tolist(), out["ids"].tolist()) == ([0.0] * 16, [[0, 2, 3, 4, 5, 6, 7, 8]])


def test_exclude_leaves_tensors_as_they_are(folder: Path) -> None:
    ok(*words(folder, "--zeros-of", folder / "sparse.safetensors", "--exclude", "0.**"))
    assert sorted(load_masks(folder / "out.safetensors")) == ["1.down.weight", "1.up.weight"]
    before, after = (load_file(folder / f"{name}.safetensors") for name in ("tuned", "out"))
    assert torch.equal(before["0.up.weight"], after["0.up.weight"])


def test_few_zeros_are_told_of(folder: Path) -> None:
    table = torch.ones(50, 40)
    table[7, 7] = 0
    change(folder / "sparse.safetensors", {"embed": table})
    change(folder / "tuned.safetensors", {"embed": table + 1})
    sparse = ("--zeros-of", folder / "sparse.safetensors")
    told = (
        f"{folder / 'sparse.safetensors'}: 1 zero of 2,000 elements of 'embed' may be there by chance; "
        "--exclude leaves them out"
    )
    said = ok(*words(folder, *sparse))
    assert f"sparseprune: warning: {told}" in said.err.splitlines()
    assert json.loads((folder / "out.report.json").read_text())["warnings"] == [told]
    assert "strict" in refused(*words(folder, *sparse, "--strict", "--force")).err
    assert "warning" not in ok(*words(folder, *sparse, "--exclude", "embed", "--force")).err


def test_a_sparse_checkpoint_without_zeros_is_refused(folder: Path) -> None:
    said = refused(*words(folder, "--zeros-of", folder / "dense.safetensors"))
    told = "there is no zero in 4 tensors; give a sparse checkpoint"
    assert said.err == f"sparseprune: {folder / 'dense.safetensors'}: {told}\n"


def test_zeros_of_a_tensor_that_is_not_there_are_refused_and_others_do_not_matter(folder: Path) -> None:
    change(folder / "sparse.safetensors", {"head": torch.eye(4), "more": torch.ones(3, 3)})
    said = refused(*words(folder, "--zeros-of", folder / "sparse.safetensors"))
    assert "mask 'head' is for no tensor of" in said.err
    assert "more" not in said.err.replace("no more", "")
    said = ok(*words(folder, "--zeros-of", folder / "sparse.safetensors", "--partial"))
    assert "1 mask without a tensor left out" in said.err
    ok(*words(folder, "--zeros-of", folder / "sparse.safetensors", "--exclude", "head", "--force"))


def test_an_output_that_exists_is_refused_before_the_zeros_are_looked_for(folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"")
    said = refused(*words(folder, "--zeros-of", folder / "sparse.safetensors"))
    assert said.err.splitlines()[0].startswith(f"sparseprune: {folder / 'out.safetensors'}: already exists; ")
    assert len(said.err.splitlines()) == 1


def test_verify_against_the_zeros_of_a_sparse_checkpoint(folder: Path) -> None:
    sparse = ("--zeros-of", folder / "sparse.safetensors")
    ok("verify", folder / "sparse.safetensors", *sparse)
    said = run("verify", folder / "tuned.safetensors", *sparse, "--json")
    document = valid(said.out, "verify-masks")
    assert (said.code, document["totals"]["lost"], document["totals"]["failed"]) == (1, 256, 4)
    ok(*words(folder, *sparse))
    ok("verify", folder / "out.safetensors", *sparse)


def test_remove_by_the_zeros_of_a_sparse_checkpoint(tmp_path: Path) -> None:
    write(tmp_path / "in", decoder(), LLAMA)
    ok("apply", tmp_path / "in", "mlp-channels", "-o", tmp_path / "sparse")
    ok("remove", tmp_path / "in", "mlp-channels", "-o", tmp_path / "by-spec")
    ok("remove", tmp_path / "in", "--zeros-of", tmp_path / "sparse", "-o", tmp_path / "by-zeros")
    one, other = read(tmp_path / "by-spec"), read(tmp_path / "by-zeros")
    assert one.keys() == other.keys()
    assert all(as_bytes(one[name]) == as_bytes(other[name]) for name in one)
    configs = [config_of(tmp_path / name) for name in ("by-spec", "by-zeros")]
    assert configs[0] == configs[1]


CONTRADICTIONS: dict[str, tuple[tuple[object, ...], str]] = {
    "reapply without masks": (("reapply", "m"), "give MASKS, or --zeros-of SPARSE"),
    "reapply with both": (("reapply", "m", "k", "--zeros-of", "s"), "MASKS and --zeros-of exclude each"),
    "verify with both": (("verify", "m", "--masks", "k", "--zeros-of", "s"), "--masks and --zeros-of excl"),
    "verify with a spec": (("verify", "m", "2of4", "--zeros-of", "s"), "2of4 and --zeros-of exclude each"),
    "rename with a spec": (("verify", "m", "2of4", "--rename", "a=b"), "--rename: goes with --masks MASKS"),
    "match with a spec": (("remove", "m", "2of4", "--match", "a"), "--match: goes with --masks MASKS or"),
    "partial with a spec": (("remove", "m", "2of4", "--partial"), "--partial: goes with --masks MASKS or"),
    "a plan without a spec": (("remove", "m", "--zeros-of", "s", "--dry-run"), "--dry-run: goes with a SPEC"),
    "no pair": (("reapply", "m", "k", "--rename", "a"), "--rename a: wanted OLD=NEW, such as --rename tr"),
    "nothing in front": (("reapply", "m", "k", "--rename", "="), "--rename =: wanted OLD=NEW"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "wanted"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_what_contradicts_itself_is_refused(line: tuple[object, ...], wanted: str) -> None:
    assert wanted in refused(*line).err


# What is killed, and what has changed since.

LINE = "reapply tuned.safetensors --zeros-of sparse.safetensors -o out.safetensors"


@pytest.mark.parametrize("option", ["", "--exclude 0.down.*", "--rename x=y", "--partial"])
def test_a_killed_run_is_continued_by_the_same_command_alone(
    folder: Path, commands: Commands, option: str
) -> None:
    whole = commands.run(Command(str(folder), tuple(f"{LINE} --force".split())))
    assert whole.code == 0, whole.err
    wanted = (folder / "out.safetensors").read_bytes()
    moment = Moment("kill", whole.calls * 6 // 10)
    assert commands.run(Command(str(folder), tuple(f"{LINE} --force".split()), moment=moment)).code < 0
    assert notes(folder, "out.safetensors")
    again = commands.run(Command(str(folder), tuple(f"{LINE} --force {option}".split())))
    assert again.code == 0, again.err
    assert (CONTINUED in said_of(again.err)) == (not option)
    assert ((folder / "out.safetensors").read_bytes() == wanted) == (option != "--exclude 0.down.*")


# Weights that torch.nn.utils.prune keeps in two.


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A model in training whose weights torch prunes."""
    save_file(pruned_module().state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def folded_by_torch() -> dict[str, Any]:
    from torch.nn.utils import prune

    model = pruned_module()
    for layer, name in ((model[0], "weight"), (model[0], "bias"), (model[1], "weight")):
        prune.remove(layer, name)  # type: ignore[no-untyped-call]
    return dict(model.state_dict())


def check_equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("form", ["bool", "packed"])
def test_a_checkpoint_given_twice_is_folded_as_torch_does_it(split: Path, form: str) -> None:
    path = split / "model.safetensors"
    said = ok("reapply", path, path, "-o", split / "out.safetensors", "--mask-format", form)
    out = load_file(split / "out.safetensors")
    check_equal(out, folded_by_torch())
    found = load_masks(split / "out.safetensors")
    assert sorted(found) == ["0.bias", "0.weight", "1.weight"]
    assert all(torch.equal(out[name] != 0, mask) for name, mask in found.items())
    report = valid((split / "out.report.json").read_text(), "reapply")
    assert (report["folded"], report["totals"]["tensors"]) == (3, 6)
    assert report["bytes"]["weights"] == (split / "out.safetensors").stat().st_size
    assert "\nfolded 3 weights with their masks: weights 1.05 kB after, masks " in said.err
    assert "another name" not in said.err
    ok("verify", split / "out.safetensors", "--masks", split / "out.safetensors")


def test_a_folder_of_shards_is_folded_with_its_index(split: Path) -> None:
    tensors = load_file(split / "model.safetensors")
    home = write_shards(
        split / "in",
        {
            "model-00001-of-00003.safetensors": {
                name: one for name, one in tensors.items() if "mask" in name
            },
            "model-00002-of-00003.safetensors": {name: tensors[name] for name in ("0.weight_orig", "2.bias")},
            "model-00003-of-00003.safetensors": {
                name: one
                for name, one in tensors.items()
                if "mask" not in name and name not in {"0.weight_orig", "2.bias"}
            },
        },
    )
    ok("reapply", home, home, "-o", split / "out")
    index = json.loads((split / "out/model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(folded_by_torch())
    files = sorted(set(index["weight_map"].values()))
    assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        loaded |= load_file(split / "out" / file)
    check_equal(loaded, folded_by_torch())
    assert index["metadata"]["total_size"] == sum(one.nbytes for one in loaded.values())
    assert sorted(load_masks(split / "out")) == ["0.bias", "0.weight", "1.weight"]
    assert (split / "out/extra/tokenizer.txt").read_text() == "a b c"


def test_masks_of_torch_are_put_on_a_checkpoint_of_plain_weights(split: Path) -> None:
    dense = {name: one + 0.25 for name, one in folded_by_torch().items()}
    save_file(dense, split / "dense.safetensors")
    ok("reapply", split / "dense.safetensors", split / "model.safetensors", "-o", split / "out.safetensors")
    state = load_file(split / "model.safetensors")
    masks = {name: state.get(f"{name}_mask", torch.ones(1)).bool() for name in dense}
    check_equal(
        load_file(split / "out.safetensors"),
        {name: torch.where(masks[name].expand(one.shape), one, 0) for name, one in dense.items()},
    )


def test_masks_of_others_are_put_on_the_originals_which_stay_in_two(split: Path) -> None:
    masks = {"0.weight": torch.zeros(8, 6).bool()}
    save_file(masks, split / "k.safetensors")
    where = (split / "model.safetensors", split / "k.safetensors", "-o", split / "out.safetensors")
    ok("reapply", *where, "--partial")
    wanted = load_file(split / "model.safetensors") | {"0.weight_orig": torch.zeros(8, 6)}
    check_equal(load_file(split / "out.safetensors"), wanted)


@pytest.mark.parametrize(
    "line",
    [
        "apply . s.toml", "mask . s.toml", "plan . s.toml", "verify . s.toml", "remove . s.toml",
        "remove . --masks .", "reapply model.safetensors --zeros-of .", "calibrate . --text s.toml",
    ],
)  # fmt: skip
def test_what_would_take_originals_for_weights_is_refused(
    split: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(split)
    (split / "s.toml").write_text(TWO_OF_FOUR)
    (split / "config.json").write_text("{}")
    err = refused(*line.split()).err
    assert "torch.nn.utils.prune keeps '0.bias' and 2 more weights in two, such as '0.bias_orig' with" in err
    assert err.endswith("; sparseprune reapply . . makes one of them\n")


def test_inspect_tells_how_to_fold(split: Path) -> None:
    said = ok("inspect", split / "model.safetensors")
    path = split / "model.safetensors"
    assert f"sparseprune reapply {path} {path} makes one of them" in said.err


def test_an_original_without_its_mask_is_a_tensor_as_others(tmp_path: Path) -> None:
    tensors = {
        "w_orig": torch.ones(4, 4),
        "v_orig": torch.ones(2),
        "v_mask": torch.ones(3),
        "w": torch.ones(1),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    assert "reapply" not in ok("inspect", tmp_path / "m.safetensors").err


# Names.


@pytest.mark.parametrize("before", ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("whose", ["tuned", "masks", "sparse"])
def test_prefixes_of_wrappers_are_seen_through(folder: Path, before: str, whose: str) -> None:
    names = {name: before + name for name in load_file(folder / f"{whose}.safetensors")}
    keep = load_file(folder / "masks.safetensors")
    renamed(folder / f"{whose}.safetensors", names)
    masks = folder / "masks.safetensors"
    said = ok(
        *words(folder, *(("--zeros-of", folder / "sparse.safetensors") if whose == "sparse" else (masks,)))
    )
    save_file(keep, masks)
    check_reapplied(folder, names if whose == "tuned" else None)
    ours, theirs = ("", before) if whose == "tuned" else (before, "")
    told = f"4 masks of another name, such as '{ours}0.down.weight' for '{theirs}0.down.weight'"
    assert f"sparseprune: {told}" in said.err.splitlines()


def test_layers_under_adapters_have_the_masks_of_the_layers(folder: Path) -> None:
    names = {
        name: f"base_model.model.{name}".replace(".weight", ".base_layer.weight") for name in mlp_tensors()
    }
    renamed(folder / "tuned.safetensors", names)
    change(folder / "tuned.safetensors", {"base_model.model.0.up.lora_A.default.weight": torch.zeros(2, 8)})
    ok(*words(folder, folder / "masks.safetensors"))
    check_reapplied(folder, names)


def test_names_are_replaced_by_rename(folder: Path) -> None:
    names = {name: f"model.layers.{name}" for name in mlp_tensors()}
    renamed(folder / "tuned.safetensors", names)
    assert "--rename OLD=NEW where only" in refused(*words(folder, folder / "masks.safetensors")).err
    for number, words_of in enumerate((("=model.layers.",), ("=h.", "h.=model.layers."))):
        options = [word for one in words_of for word in ("--rename", one)]
        ok(*words(folder, folder / "masks.safetensors", *options, *["--force"] * number))
        check_reapplied(folder, names)


def test_a_rename_that_changes_nothing_is_told(folder: Path) -> None:
    said = ok(*words(folder, folder / "masks.safetensors", "--rename", "transformer.=model."))
    told = f"changes no name in {folder / 'masks.safetensors'}, such as '0.down.weight'"
    assert f"sparseprune: warning: --rename transformer.=model.: {told}" in said.err.splitlines()


def test_two_names_that_become_one_are_refused(folder: Path) -> None:
    said = refused(*words(folder, folder / "masks.safetensors", "--rename", "0.up=1.up"))
    assert "masks '0.up.weight' and '1.up.weight' both become '1.up.weight' by --rename" in said.err or (
        "masks '1.up.weight' and '0.up.weight' both become '1.up.weight' by --rename" in said.err
    )


def test_a_mask_that_fits_two_names_is_refused_with_both(folder: Path) -> None:
    change(folder / "tuned.safetensors", {"module.0.up.weight": torch.ones(16, 8)})
    renamed(folder / "masks.safetensors", {name: f"_orig_mod.{name}" for name in MATRICES})
    said = refused(*words(folder, folder / "masks.safetensors"))
    assert "mask '_orig_mod.0.up.weight' is for both '0.up.weight' and 'module.0.up.weight'" in said.err


def test_a_spec_is_not_carried_where_names_are_others(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", {"model.safetensors": mlp_tensors()})
    ok("apply", tmp_path / "in", write_spec(tmp_path, TWO_OF_FOUR), "-o", tmp_path / "pruned")
    wrapped = {f"module.{name}": one for name, one in mlp_tensors().items()}
    write_shards(tmp_path / "tuned", {"model.safetensors": wrapped})
    ok("reapply", tmp_path / "in", tmp_path / "pruned", "-o", tmp_path / "same")
    ok("reapply", tmp_path / "tuned", tmp_path / "pruned", "-o", tmp_path / "other")
    assert (tmp_path / "same/sparseprune/spec.toml").exists()
    assert not (tmp_path / "other/sparseprune/spec.toml").exists()
    ok("verify", tmp_path / "other", "--masks", tmp_path / "pruned")


# Masks as numbers.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int8])
@pytest.mark.parametrize("end", ["", "_mask", ".mask"])
def test_masks_may_be_numbers_under_names_of_masks(folder: Path, dtype: torch.dtype, end: str) -> None:
    keep = load_file(folder / "masks.safetensors")
    save_file({name + end: one.to(dtype) for name, one in keep.items()}, folder / "k.safetensors")
    ok(*words(folder, folder / "k.safetensors"))
    check_reapplied(folder)
    ok("verify", folder / "out.safetensors", "--masks", folder / "k.safetensors")


def test_remove_takes_masks_of_numbers_under_wrapped_names(tmp_path: Path) -> None:
    write(tmp_path / "in", decoder(), LLAMA)
    ok("mask", tmp_path / "in", "mlp-channels", "-o", tmp_path / "masks")
    masks = {f"module.{name}_mask": one.float() for name, one in load_masks(tmp_path / "masks").items()}
    save_file(masks, tmp_path / "k.safetensors")
    ok("remove", tmp_path / "in", "mlp-channels", "-o", tmp_path / "by-spec")
    ok("remove", tmp_path / "in", "--masks", tmp_path / "k.safetensors", "-o", tmp_path / "by-masks")
    one, other = read(tmp_path / "by-spec"), read(tmp_path / "by-masks")
    assert all(as_bytes(one[name]) == as_bytes(other[name]) for name in one.keys() | other.keys())


def test_numbers_that_are_no_mask_end_the_run_with_their_place(folder: Path) -> None:
    keep = load_file(folder / "masks.safetensors")
    wrong = {name: one.float() for name, one in keep.items()}
    wrong["1.up.weight"][3, 2] = 0.5
    save_file(wrong, folder / "k.safetensors")
    said = refused(*words(folder, folder / "k.safetensors"))
    assert said.err.startswith(
        f"sparseprune: {folder / 'k.safetensors'}: '1.up.weight' has 0.5 at [3, 2], wanted a mask of 0 and 1"
    )
    assert not (folder / "out.safetensors").exists()
