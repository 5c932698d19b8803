"""`remove` by lists of what stays: the bytes that are left, words, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import sparseprune
from sparseprune.errors import SparsepruneError
from tests.cli.removal import (
    EXPERTS,
    LLAMA,
    MIXTRAL,
    Tensors,
    as_bytes,
    decoder,
    expected,
    mixture,
    read,
    removed,
    weights,
    write,
)
from tests.commands import ok, refused, valid
from tests.samples import config_of

KEPT = [[0, 3], [1, 2]]


def listed(folder: Path, value: object) -> Path:
    path = folder / "keep.json"
    path.write_text(json.dumps(value))
    return path


def masks_of(dense: Tensors, kept: list[list[int]]) -> Tensors:
    """Masks that drop all experts but these."""
    found = {}
    for name, tensor in dense.items():
        pieces = name.split(".")
        if "experts" in pieces and int(pieces[5]) not in kept[int(pieces[2])]:
            found[name] = torch.zeros(tensor.shape, dtype=torch.bool)
    return found


@pytest.mark.parametrize("shards", [1, 3])
def test_what_is_left_are_the_listed_experts_and_their_rows(shards: int, tmp_path: Path) -> None:
    dense = mixture(torch.bfloat16)
    source = write(tmp_path / "in", dense, MIXTRAL, shards)
    said = removed(source, "--experts", listed(tmp_path, KEPT), "-o", tmp_path / "out", "-q")
    assert (said.out, said.err) == (f"{tmp_path / 'out'}\n", "")
    left, wanted = read(tmp_path / "out"), expected(dense, masks_of(dense, KEPT))
    assert {name: as_bytes(one) for name, one in left.items()} == {
        name: as_bytes(one) for name, one in wanted.items()
    }
    assert config_of(tmp_path / "out") == {**MIXTRAL, "num_local_experts": 2}


def test_masks_that_drop_the_same_experts_leave_the_same_bytes(tmp_path: Path) -> None:
    dense = mixture()
    source = write(tmp_path / "in", dense, MIXTRAL)
    save_file(masks_of(dense, KEPT), tmp_path / "masks.safetensors")
    removed(source, "--masks", tmp_path / "masks.safetensors", "--partial", "-o", tmp_path / "masked", "-q")
    removed(source, "--experts", listed(tmp_path, {"0": [0, 3], "1": [1, 2]}), "-o", tmp_path / "out", "-q")
    assert weights(tmp_path / "out") == weights(tmp_path / "masked")


def test_a_list_in_python_does_what_the_file_does(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    removed(source, "--experts", listed(tmp_path, [0, 2]), "-o", tmp_path / "file", "-q")
    result = sparseprune.remove(source, experts=[0, 2], output=tmp_path / "value")
    assert weights(tmp_path / "value") == weights(tmp_path / "file")
    assert (result.experts, result.masks, result.spec_sha256) == ("--experts", None, None)
    report = valid((tmp_path / "file/sparseprune/report.json").read_text(), "remove")
    assert report["experts"] == str(tmp_path / "keep.json")
    assert not (tmp_path / "file/sparseprune/spec.toml").exists()


def test_a_dry_run_tells_what_would_be_left_and_writes_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    words = ("remove", source, "--experts", listed(tmp_path, KEPT), "-o", tmp_path / "out")
    said = ok(*words, "--dry-run")
    assert (said.out.splitlines()[:2], said.err) == (
        ["config.json: num_local_experts 4 -> 2", "29 of 41 tensors are left"],
        "",
    )
    expected = valid(ok(*words, "--dry-run", "--json").out, "remove")
    assert not (tmp_path / "out").exists()
    found = json.loads(ok(*words, "-q", "--json").out)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}


def test_the_summary_tells_of_a_list_as_of_a_spec(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    said = removed(source, "--experts", listed(tmp_path, KEPT), "-o", tmp_path / "out", "-v")
    assert "config.json: num_local_experts 4 -> 2" in said.err
    assert "model.layers.1.block_sparse_moe.experts.2.w1.weight" in said.err


WRONG: dict[str, tuple[Any, str]] = {
    "no such expert": ([0, EXPERTS], "model.layers.0.block_sparse_moe.experts: 4 is no expert"),
    "fewer than are chosen": ([3], "num_local_experts would be 1, fewer than the 2 of num_experts_per_tok"),
    "unlike numbers": (
        [[0, 1], [0, 1, 2]],
        "num_local_experts would be 2 in model.layers.0.block_sparse_moe and 3 in model.layers.1.",
    ),
    "all of them": (list(range(EXPERTS)), "nothing to remove: all of it stays"),
}


@pytest.mark.parametrize(("value", "line"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_cannot_stay_is_refused_before_any_work(
    value: object, line: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    path = listed(tmp_path, value)
    said = refused("remove", source, "--experts", path, "-o", tmp_path / "out", *more)
    assert f"sparseprune: {path}: {line}" in said.err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "keep.json"]


def test_a_file_that_holds_no_list_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    (tmp_path / "keep.json").write_text('{"0": [0], "0": [1]}')
    said = refused("remove", source, "--experts", tmp_path / "keep.json", "-o", tmp_path / "out")
    assert "keep.json: cannot be read as JSON: the key '0' stands twice in one object" in said.err


CONTRADICTIONS = {
    ("experts",): "experts and --experts exclude each other; give one of them",
    ("--masks", "x"): "--masks and --experts exclude each other; give one of them",
    ("--set", "sparsity=0.5"): "--set: goes with a SPEC, whose [vars] it sets",
    ("--partial",): "--partial: goes with --masks MASKS or --zeros-of SPARSE",
}


@pytest.mark.parametrize("words", CONTRADICTIONS, ids=" ".join)
@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_list_goes_alone(words: tuple[str, ...], more: tuple[str, ...], tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    said = refused("remove", source, *words, "--experts", listed(tmp_path, KEPT), *more)
    assert said.err == f"sparseprune: {CONTRADICTIONS[words]}\n"


def test_a_dry_run_in_python_goes_with_a_list(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), LLAMA)
    with pytest.raises(SparsepruneError, match="--dry-run: goes with a SPEC, whose plan it shows, or with"):
        sparseprune.remove(source, masks=tmp_path / "masks", dry_run=True)


def test_tokens_that_stay_keep_their_rows_and_ids_follow(tmp_path: Path) -> None:
    dense, config = decoder(torch.bfloat16), {**LLAMA, "bos_token_id": 3, "eos_token_id": [5, 11]}
    source = write(tmp_path / "in", dense, config, 2)
    (source / "generation_config.json").write_text(json.dumps({"bos_token_id": 3, "max_length": 7}))
    ids = [3, 4, 5, 11]
    said = removed(source, "--vocabulary", listed(tmp_path, ids), "-o", tmp_path / "out")
    assert "warning: the tokenizer's files give the old ids: token 3 is 0 now; give each" in said.err
    assert "generation_config.json: ids of tokens are the new ones" in said.err
    left = read(tmp_path / "out")
    cut = ("model.embed_tokens.weight", "lm_head.weight")
    wanted = {name: one[ids] if name in cut else one for name, one in dense.items()}
    assert {name: as_bytes(one) for name, one in left.items()} == {
        name: as_bytes(one) for name, one in wanted.items()
    }
    found = config_of(tmp_path / "out")
    assert found == {**config, "vocab_size": 4, "bos_token_id": 0, "eos_token_id": [2, 3]}
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "max_length": 7}
    report = valid((tmp_path / "out/sparseprune/report.json").read_text(), "remove")
    assert (report["vocabulary"], report["experts"]) == (str(tmp_path / "keep.json"), None)


def test_a_special_token_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "in", decoder(), {**LLAMA, "eos_token_id": 2})
    path = listed(tmp_path, [0, 1, 3])
    said = refused("remove", source, "--vocabulary", path, "-o", tmp_path / "out")
    line = "config.json: eos_token_id is 2, which is not among the tokens that stay"
    assert said.err == f"sparseprune: {path}: {line}\n"


def test_experts_and_tokens_go_in_one_run(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    sparseprune.remove(source, experts=KEPT, vocabulary=[0, 1, 2], output=tmp_path / "both")
    removed(source, "--experts", listed(tmp_path, KEPT), "-o", tmp_path / "one", "-q")
    removed(tmp_path / "one", "--vocabulary", listed(tmp_path, [0, 1, 2]), "-o", tmp_path / "two", "-q")
    assert weights(tmp_path / "both") == weights(tmp_path / "two")


def test_an_output_that_exists_is_refused_but_shown(tmp_path: Path) -> None:
    source = write(tmp_path / "in", mixture(), MIXTRAL)
    words = ("remove", source, "--experts", listed(tmp_path, KEPT), "-o", tmp_path / "out")
    ok(*words, "-q")
    assert "already exists" in refused(*words).err
    ok(*words, "--dry-run")
    ok(*words, "-q", "--force")
