"""`verify --masks` as a user runs it: whether the zeros are there, and where the first one was lost."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.interrupted import Command, Commands, Moment
from tests.commands import ok, refused, run, silent, valid
from tests.limits import narrow
from tests.samples import TWO_OF_FOUR, mlp_tensors, write_spec

MATRICES = [name for name in mlp_tensors() if name.endswith("weight")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint `m`, pruned with its masks."""
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    ok("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR), "--mask-format", "bool")
    return tmp_path


def lose(folder: Path, name: str, *indexes: tuple[int, ...], value: float = 1.0) -> None:
    """Write something to elements of the pruned checkpoint."""
    tensors = load_file(folder / "m.pruned.safetensors")
    for index in indexes:
        tensors[name][index] = value
    save_file(tensors, folder / "m.pruned.safetensors")


def dropped(folder: Path, name: str) -> list[tuple[int, ...]]:
    masks = load_file(folder / "m.pruned.masks.safetensors")
    return [tuple(index) for index in torch.nonzero(~masks[name]).tolist()]


def words(folder: Path, *more: object) -> tuple[object, ...]:
    masks = folder / "m.pruned.masks.safetensors"
    return ("verify", folder / "m.pruned.safetensors", "--masks", masks, *more)


def test_what_holds_exits_0_with_a_table(folder: Path) -> None:
    said = silent(*words(folder))
    lines = said.out.splitlines()
    assert lines[0].split() == "tensor dtype shape dropped lost of dropped first lost".split()
    assert sorted(line.split()[0] for line in lines[1:5]) == sorted(MATRICES)
    assert lines[1].split()[1:] == ["F32", "8x16", "64", "0", "0.00%"]
    assert lines[5].split() == ["total", "of", "4", "256", "0", "0.00%"]
    assert lines[6] == "masks drop 256 elements of 4 tensors; all of them are zero"


@pytest.mark.parametrize("slab", [8, 64, 1 << 20])
def test_lost_zeros_exit_1_with_their_number_and_the_first_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    first, last = dropped(folder, "1.up.weight")[3], dropped(folder, "1.up.weight")[-1]
    other = dropped(folder, "0.down.weight")[-1]
    lose(folder, "1.up.weight", last, first)
    lose(folder, "0.down.weight", other, value=float("nan"))
    narrow(monkeypatch, slab)
    quiet = run(*words(folder, "-q"))
    assert (quiet.code, quiet.out) == (1, "")
    assert quiet.err.splitlines() == [
        (
            "sparseprune: 0.down.weight: 1 of 64 elements that the mask drops is not zero, first "
            f"{list(other)}"
        ),
        (f"sparseprune: 1.up.weight: 2 of 64 elements that the mask drops are not zero, first {list(first)}"),
    ]
    said = run(*words(folder))
    assert said.code == 1
    (row,) = [line for line in said.out.splitlines() if line.startswith("1.up.weight")]
    assert row.split(maxsplit=6)[3:] == ["64", "2", "3.12%", str(list(first))]
    assert said.err == "sparseprune: 3 of 256 elements that masks drop are not zero, in 2 of 4 tensors\n"


def test_minus_zero_is_zero_and_survivors_may_be_anything(folder: Path) -> None:
    lose(folder, "0.up.weight", *dropped(folder, "0.up.weight"), value=-0.0)
    masks = load_file(folder / "m.pruned.masks.safetensors")
    kept = [tuple(index) for index in torch.nonzero(masks["0.up.weight"]).tolist()]
    lose(folder, "0.up.weight", *kept, value=float("nan"))
    ok(*words(folder))


def test_json_has_the_shape_of_its_schema(folder: Path) -> None:
    index = dropped(folder, "0.up.weight")[5]
    lose(folder, "0.up.weight", index)
    said = run(*words(folder, "--json"))
    document = valid(said.out, "verify-masks")
    assert (said.code, document["holds"], document["totals"]["failed"]) == (1, False, 1)
    assert {one["name"]: (one["lost"], one["first"]) for one in document["tensors"]} == {
        name: (1, list(index)) if name == "0.up.weight" else (0, None) for name in MATRICES
    }
    assert document["totals"]["lost"] == 1
    said = run("verify", folder / "m.pruned.safetensors", "--masks", folder, "--json")
    valid(said.out, "verify-masks")


def test_quiet_says_only_what_fails(folder: Path) -> None:
    said = run(*words(folder, "-q"))
    assert (said.code, said.out, said.err) == (0, "", "")
    lose(folder, "0.up.weight", dropped(folder, "0.up.weight")[0])
    said = run(*words(folder, "-q"))
    assert (said.code, said.out, len(said.err.splitlines())) == (1, "", 1)


def test_a_scalar_and_an_empty_tensor_have_places_too(tmp_path: Path) -> None:
    save_file({"s": torch.tensor(2.0), "e": torch.ones(0, 3)}, tmp_path / "m.safetensors")
    save_file({"s": torch.tensor(False), "e": torch.zeros(0, 3).bool()}, tmp_path / "k.safetensors")
    said = run("verify", tmp_path / "m.safetensors", "--masks", tmp_path / "k.safetensors")
    assert said.code == 1
    assert said.err == "sparseprune: 1 of 1 element that masks drop is not zero, in 1 of 2 tensors\n"
    assert [line.split() for line in said.out.splitlines()[1:3]] == [
        ["e", "F32", "0x3", "0", "0", "0.00%"],
        ["s", "F32", "0-d", "1", "1", "100.00%", "[]"],
    ]


def test_names_are_matched_as_reapply_does(folder: Path) -> None:
    tensors = load_file(folder / "m.pruned.safetensors")
    tensors["x"] = tensors.pop("1.up.weight")
    save_file(tensors, folder / "m.pruned.safetensors")
    said = refused(*words(folder))
    assert "mask '1.up.weight' is for no tensor of " in said.err
    part = run(*words(folder, "--partial"))
    assert (part.code, part.err) == (0, "sparseprune: 1 mask without a tensor left out\n")


def test_odd_names_are_told_on_one_line(tmp_path: Path) -> None:
    name = "[red]a\nb"
    save_file({name: torch.ones(2)}, tmp_path / "m.safetensors")
    save_file({name: torch.zeros(2).bool()}, tmp_path / "k.safetensors")
    words = ("verify", tmp_path / "m.safetensors", "--masks", tmp_path / "k.safetensors")
    assert (
        run(*words, "-q").err
        == "sparseprune: [red]a\\nb: 2 of 2 elements that the mask drops are not zero, first [0]\n"
    )
    assert run(*words).out.splitlines()[1].split()[0] == "[red]a\\nb"


@pytest.mark.parametrize("path", ["m.pruned.safetensors", "m.pruned.masks.safetensors"])
@pytest.mark.parametrize("how", ["truncate", "rewrite"])
def test_what_changes_while_it_is_read_ends_the_run(
    folder: Path, commands: Commands, path: str, how: str
) -> None:
    line = ("verify", "m.pruned.safetensors", "--masks", "m.pruned.safetensors")
    ended = commands.run(Command(str(folder), line, moment=Moment(how, 3, ("preadv",), path)))
    assert (ended.code, ended.out) == (3, ""), ended.err
    assert path in ended.err
    assert "Traceback" not in ended.err


def test_a_broken_disk_is_told(folder: Path, commands: Commands) -> None:
    line = ("verify", "m.pruned.safetensors", "--masks", "m.pruned.safetensors")
    ended = commands.run(Command(str(folder), line, moment=Moment("fail", 2, ("preadv",))))
    assert (ended.code, ended.out) == (3, "")
    assert "Input/output error" in ended.err
