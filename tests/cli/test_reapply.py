"""`reapply` as a user runs it: zeros put back, what was lost told, interrupted and continued."""

import json
import math
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.files import names_in
from tests.cli.interrupted import Command, Commands, Ended, Moment, change
from tests.cli.test_resuming_runs import CONTINUED, content, notes, said_of
from tests.commands import ok, refused, run, valid
from tests.limits import narrow
from tests.samples import (
    CHANNELS,
    TWO_OF_FOUR,
    mlp_tensors,
    unmarked,
    without_marks,
    write_shards,
    write_spec,
)

UP, DOWN = "a.safetensors", "b.safetensors"
SETTABLE = TWO_OF_FOUR.replace("[scope", "[vars]\nkeep = 2\n[scope").replace("nnz = 2", 'nnz = "keep"')


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shards: dict[str, dict[str, torch.Tensor]] = {UP: {}, DOWN: {}}
    for name, tensor in tensors.items():
        shards[UP if "up" in name else DOWN][name] = tensor
    return write_shards(folder, shards)


def disturb(folder: Path) -> dict[str, int]:
    """Rewrites dropped elements of a pruned checkpoint, zeros among what is written; how many were lost."""
    lost, values = {}, torch.tensor([3.0, math.nan, -0.0, math.inf, 0.0, -1e-45])
    for shard in (UP, DOWN):
        tensors = load_file(folder / shard)
        for number, (name, tensor) in enumerate(tensors.items()):
            zeros = (tensor == 0).flatten().nonzero().flatten()[number : number + len(values)]
            tensor.view(-1)[zeros] = values[: len(zeros)]
            lost[name] = int((values[: len(zeros)] != 0).sum())
        header, _ = halves(folder / shard)
        save_file(tensors, folder / shard)  # the order of metadata is another one each time
        (folder / shard).write_bytes(header + halves(folder / shard)[1])
    return lost


def halves(path: Path) -> tuple[bytes, bytes]:
    """Header and data of a file."""
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    return data[:begin], data[begin:]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dense checkpoint `in`, `pruned` and a disturbed copy of that, `tuned`, without its masks."""
    sharded(tmp_path / "in", mlp_tensors())
    spec = write_spec(tmp_path, SETTABLE)
    ok("apply", tmp_path / "in", spec, "--set", "keep=2", "-o", tmp_path / "pruned", "-q")
    shutil.copytree(tmp_path / "pruned", tmp_path / "tuned", ignore=shutil.ignore_patterns("sparseprune"))
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    """All files but the report, and without what tells of the command."""
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    return without_marks(files)


@pytest.mark.parametrize("mask_format", ["bool", "packed"])
@pytest.mark.parametrize("slab", [8, 64, 1 << 20])
def test_a_disturbed_checkpoint_becomes_what_apply_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mask_format: str, slab: int
) -> None:
    lost = disturb(folder / "tuned")
    assert sum(lost.values()) > 5
    narrow(monkeypatch, slab)
    if mask_format == "bool":
        words = ["apply", folder / "in", folder / "spec.toml", "--set", "keep=2", "-o", folder / "pruned"]
        ok(*words, "--mask-format", "bool", "--force")
    said = run(
        "reapply", folder / "tuned", folder / "pruned", "-o", folder / "out", "--mask-format", mask_format
    )
    assert (said.code, said.out) == (0, f"{folder / 'out'}\n"), said.err
    assert files(folder / "out") == files(folder / "pruned")
    report = valid((folder / "out/sparseprune/report.json").read_text(), "reapply")
    assert {one["name"]: one["lost"] for one in report["tensors"]} == {
        name: count for name, count in lost.items() if name.endswith("weight")
    }
    assert report["set"] == {"keep": "2"}
    assert report["totals"] == {
        "tensors": 7,
        "numel": 8 + 2 * (128 + 16 + 128),
        "masked": 512,
        "pruned": 256,
        "lost": sum(lost.values()),
        "sparsity": 256 / 552,
    }
    for one in report["tensors"]:
        assert one["zeros_after"] == one["pruned"] == one["zeros_before"] + one["lost"] == 64


def test_the_output_is_as_sparse_as_the_spec_that_it_carries(folder: Path) -> None:
    disturb(folder / "tuned")
    carried = folder / "pruned/sparseprune/spec.toml"
    assert run("verify", folder / "tuned", carried).code == 1
    ok("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out")
    ok("verify", folder / "out", folder / "out/sparseprune/spec.toml")
    ok("verify", folder / "out", "--masks", folder / "out")
    again = run("reapply", folder / "out", folder / "out", "-o", folder / "more", "--json")
    assert json.loads(again.out)["totals"]["lost"] == 0
    assert files(folder / "more") == files(folder / "out")


def test_what_is_told(folder: Path) -> None:
    disturb(folder / "tuned")
    said = run("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out")
    *_, first, second, third, fourth, last = said.err.splitlines()
    assert said.err.splitlines()[0].split() == [
        *("tensor", "dtype", "dropped", "lost", "of", "dropped", "energy", "kept")
    ]
    lost = json.loads((folder / "out/sparseprune/report.json").read_text())["totals"]["lost"]
    assert first.startswith(f"put back {lost} of 256 zeros (")
    assert second == "masks drop 256 of 552 parameters (46.38%)"
    assert third == "left alone 3 of 7 tensors, 40 parameters"
    assert fourth.endswith("masks 64 B")
    assert " s, " in last
    quiet = run("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out", "--force", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, f"{folder / 'out'}\n", "")
    every = run("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out", "--force", "-v")
    assert [line.split()[0] for line in every.err.splitlines()[1:6]] == [
        *("0.up.weight", "1.up.weight", "0.down.weight", "1.down.weight", "total")
    ]


def test_the_ten_that_lost_most_are_shown_and_how_many_more(tmp_path: Path) -> None:
    tensors = {f"{number}.w": torch.ones(number + 1) for number in range(12)}
    save_file(tensors, tmp_path / "m.safetensors")
    save_file(
        {name: torch.zeros_like(one).bool() for name, one in tensors.items()}, tmp_path / "k.safetensors"
    )
    said = run("reapply", tmp_path / "m.safetensors", tmp_path / "k.safetensors")
    lines = said.err.splitlines()
    assert [line.split()[0] for line in lines[1:11]] == [f"{number}.w" for number in range(11, 1, -1)]
    assert lines[11] == "and 2 more tensors that had lost zeros; -v shows all"


def test_json_is_the_report_and_masks_can_be_left_out(folder: Path) -> None:
    words = ("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out", "--no-masks", "--json")
    said = run(*words)
    report = valid(said.out, "reapply")
    assert report == json.loads((folder / "out/sparseprune/report.json").read_text())
    assert sorted(path.name for path in (folder / "out/sparseprune").iterdir()) == [
        "report.json",
        "spec.toml",
    ]
    assert "no masks" in said.err


def test_masks_of_others_are_in_other_files_and_forms_and_leave_no_spec(folder: Path) -> None:
    lost = disturb(folder / "tuned")
    (folder / "masks").mkdir()
    pruned = load_file(folder / "pruned" / UP) | load_file(folder / "pruned" / DOWN)
    masks = {name: one != 0 for name, one in pruned.items()}
    for file, names in {"one": ("0.up", "1.down"), "two": ("1.up", "0.down")}.items():
        part = {f"{name}.weight": masks[f"{name}.weight"] for name in names}
        save_file(part, folder / f"masks/{file}.safetensors")
    said = ok("reapply", folder / "tuned", folder / "masks", "-o", folder / "out", "--json")
    assert {one["name"]: one["lost"] for one in json.loads(said.out)["tensors"]} == {
        name: count for name, count in lost.items() if name.endswith("weight")
    }
    assert not (folder / "out/sparseprune/spec.toml").exists()
    for shard in (UP, DOWN):
        made, wanted = ((folder / home / shard).read_bytes() for home in ("out", "pruned"))
        assert unmarked(made) == unmarked(wanted)


def test_a_file_becomes_a_file_beside_it(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    ok("mask", tmp_path / "m.safetensors", write_spec(tmp_path, CHANNELS))
    said = run("reapply", tmp_path / "m.safetensors", tmp_path / "m.masks.safetensors")
    assert (said.code, said.out) == (0, f"{tmp_path / 'm.pruned.safetensors'}\n"), said.err
    assert names_in(tmp_path) == [
        "m.masks.report.json", "m.masks.safetensors", "m.pruned.masks.safetensors", "m.pruned.report.json",
        "m.pruned.safetensors", "m.safetensors", "spec.toml",
    ]  # fmt: skip
    ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-o", tmp_path / "a.safetensors")
    for name in ("safetensors", "masks.safetensors"):
        made, wanted = ((tmp_path / f"{home}.{name}").read_bytes() for home in ("m.pruned", "a"))
        assert unmarked(made) == unmarked(wanted)


def test_names_without_a_counterpart_are_refused_and_let_be_with_partial(folder: Path) -> None:
    tensors = load_file(folder / "tuned" / UP)
    tensors["model.0.up.weight"] = tensors.pop("0.up.weight")
    save_file(tensors, folder / "tuned" / UP)
    index = folder / "tuned/model.safetensors.index.json"
    index.write_text(index.read_text().replace('"0.up.weight"', '"model.0.up.weight"'))
    words = ("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out")
    said = refused(*words)
    assert said.err.splitlines() == [
        (
            f"sparseprune: {folder / 'pruned'}: mask '0.up.weight' is for no tensor of {folder / 'tuned'}; "
            "the nearest name is 'model.0.up.weight'; give the masks of this checkpoint, --rename OLD=NEW "
            "where only names differ, or --partial to ignore what has no counterpart"
        ),
    ]
    assert not (folder / "out").exists()
    part = ok(*words, "--partial", "--json")
    assert part.err.splitlines()[0] == "sparseprune: 1 mask without a tensor left out"
    report = json.loads(part.out)
    assert (report["left_out"], len(report["tensors"])) == ({"masks": 1, "tensors": 0}, 3)
    assert (folder / "out/sparseprune/masks.safetensors.index.json").read_text().count("0.up.weight") == 0
    before, after = (load_file(folder / place / UP)["model.0.up.weight"] for place in ("tuned", "out"))
    assert torch.equal(before, after)


def test_a_tensor_that_the_report_lists_must_have_its_mask(folder: Path) -> None:
    one = folder / "pruned/sparseprune/masks-00001-of-00002.safetensors"
    said = refused("reapply", folder / "tuned", one, "-o", folder / "out")
    assert "2 tensors have no mask, such as '0.down.weight', but " in said.err
    ok("reapply", folder / "tuned", one, "-o", folder / "out", "--partial")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.complex64])
def test_what_apply_refuses_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"0.up.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "m.safetensors")
    save_file({"0.up.weight": torch.ones(4, 4).bool()}, tmp_path / "masks.safetensors")
    said = refused("reapply", tmp_path / "m.safetensors", tmp_path / "masks.safetensors", "--partial")
    assert "which has a mask, is " in said.err
    assert run("apply", tmp_path / "m.safetensors", write_spec(tmp_path, TWO_OF_FOUR)).code == 2


def test_an_output_is_replaced_only_with_force_and_masks_never(folder: Path) -> None:
    words = ("reapply", folder / "tuned", folder / "pruned", "-o")
    ok(*words, folder / "out")
    said = refused(*words, folder / "out")
    assert "already exists; give another name with -o, or --force" in said.err
    ok(*words, folder / "out", "--force")
    before = files(folder / "pruned")
    for target in ("pruned", "tuned"):
        said = refused(*words, folder / target, "--force")
        assert ("would replace the masks in" if target == "pruned" else "are the same") in said.err
    assert files(folder / "pruned") == before


def test_a_mask_file_is_not_replaced_by_weights_or_other_masks(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "m.safetensors")
    masks = tmp_path / "k.masks.safetensors"
    save_file({"w": torch.zeros(3).bool()}, masks)
    before = masks.read_bytes()
    for target in ("k.masks.safetensors", "k.safetensors"):
        said = refused("reapply", tmp_path / "m.safetensors", masks, "-o", tmp_path / target, "--force")
        assert "the output would replace the masks in" in said.err
    assert masks.read_bytes() == before


def test_odd_names_are_shown_as_they_are(tmp_path: Path) -> None:
    names = ["[red]x[/red]", "漢字", "a\nb"]
    save_file({name: torch.ones(4) for name in names}, tmp_path / "m.safetensors")
    save_file({name: torch.zeros(4).bool() for name in names}, tmp_path / "k.safetensors")
    said = run("reapply", tmp_path / "m.safetensors", tmp_path / "k.safetensors", "-v")
    shown = [line.split()[0] for line in said.err.splitlines()[1:4]]
    assert sorted(shown) == sorted(["[red]x[/red]", "漢字", r"a\nb"])


# What is killed, changed or interrupted.

WORDS = {
    "bool": "reapply tuned pruned -o out",
    "packed": "reapply tuned packed -o out --mask-format packed",
    "no masks": "reapply tuned packed -o out --no-masks",
    "a file": "reapply m.safetensors packed -o out.safetensors --mask-format packed",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every home begins with: safetensors writes metadata in another order each time."""
    home = tmp_path_factory.mktemp("start")
    source = sharded(home / "in", mlp_tensors())
    save_file(mlp_tensors(), home / "m.safetensors")
    spec = write_spec(home, TWO_OF_FOUR)
    ok("apply", source, spec, "-o", home / "pruned")
    ok("mask", source, spec, "-o", home / "packed", "--mask-format", "packed")
    shutil.copytree(home / "pruned", home / "tuned", ignore=shutil.ignore_patterns("sparseprune"))
    disturb(home / "tuned")
    return home


def home_of(start: Path, home: Path) -> Path:
    shutil.copytree(start, home)
    return home


def command(home: Path, words: str, moment: Moment | None = None) -> Command:
    return Command(str(home), tuple(words.split()), moment=moment)


def killed_halfway(home: Path, words: str, commands: Commands, full: Ended) -> Any:
    """A run that was killed when some of its pieces were on disk: what it noted."""
    ended = commands.run(command(home, words, Moment("kill", full.calls * 6 // 10)))
    found = notes(home, words.split()[4])
    assert (ended.code, bool(found)) == (-signal.SIGKILL, True)
    return found


@pytest.mark.parametrize("name", WORDS)
def test_a_killed_run_is_continued_and_ends_in_the_same_bytes(
    start: Path, tmp_path: Path, commands: Commands, name: str
) -> None:
    words, whole = WORDS[name], home_of(start, tmp_path / "whole")
    full = commands.run(command(whole, words))
    assert full.code == 0, full.err
    wanted, draw, continued = content(whole), random.Random(name), 0
    for number in range(4):
        home = home_of(start, tmp_path / str(number))
        ended, found = Ended(-1, "", ""), None
        at = full.calls * number // 4 + draw.randint(1, full.calls // 4)
        for moment in (at, draw.randint(1, full.calls // 2), 0):
            ended = commands.run(command(home, words, Moment("kill", moment)))
            if content(home) == wanted:
                break
            assert content(home).items() <= wanted.items() | content(start).items()
            found = notes(home, words.split()[4])
        assert content(home) == wanted
        if ended.code == 0:  # else it died when all was done
            assert names_in(home) == names_in(whole)
            continued += found is not None
            assert ended.err.splitlines().count(CONTINUED) == (found is not None)
            done = sum(nbytes for nbytes, _ in (found or {}).values())
            assert ended.written == full.written - done
            assert (ended.read < full.read) == bool({key for key in found or {} if key.startswith("mask")})
    assert continued > 1


CHANGES = {
    "bytes of a mask file": ("the masks", "packed/masks-00002-of-00002.safetensors", "rewrite"),
    "the spec beside the masks": ("the masks", "packed/spec.toml", "grow"),
    "bytes of a shard": ("the input", f"tuned/{DOWN}", "rewrite"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_killed_run_is_not_continued_with_other_masks_or_input(
    start: Path, tmp_path: Path, commands: Commands, name: str
) -> None:
    words, (changed, path, how) = WORDS["packed"], CHANGES[name]
    full = commands.run(command(home_of(start, tmp_path / "full"), words))
    home, fresh = home_of(start, tmp_path / "home"), home_of(start, tmp_path / "fresh")
    killed_halfway(home, words, commands, full)
    for place in (home, fresh):
        change(place / path, how)
    assert commands.run(command(fresh, words)).code == 0
    ended = commands.run(command(home, words))
    assert (ended.code, ended.err.splitlines()[0]) == (0, said_of(changed))
    assert content(home) == content(fresh)


OPTIONS = {
    "--no-masks": "the options", "--mask-format bool": "the options", "--partial": "the options",
    "--jobs 1": "", "-v": "",
}  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS)
def test_a_killed_run_is_continued_only_with_the_same_options(
    start: Path, tmp_path: Path, commands: Commands, option: str
) -> None:
    words = WORDS["packed"]
    full = commands.run(command(home_of(start, tmp_path / "full"), words))
    home = home_of(start, tmp_path / "home")
    killed_halfway(home, words, commands, full)
    ended = commands.run(command(home, f"{words} {option}"))
    said = said_of(OPTIONS[option]) if OPTIONS[option] else CONTINUED
    assert (ended.code, ended.err.splitlines()[0]) == (0, said)


def test_apply_does_not_continue_reapply(start: Path, tmp_path: Path, commands: Commands) -> None:
    words = WORDS["bool"]
    full = commands.run(command(home_of(start, tmp_path / "full"), words))
    home = home_of(start, tmp_path / "home")
    killed_halfway(home, words, commands, full)
    ended = commands.run(command(home, "apply tuned spec.toml -o out"))
    assert ended.err.startswith("sparseprune: an unfinished run is not continued, since ")


@pytest.mark.parametrize(
    "path", ["packed/masks-00001-of-00002.safetensors", f"tuned/{UP}", "tuned/config.json"]
)
@pytest.mark.parametrize("how", ["truncate", "grow", "rewrite", "remove"])
def test_what_changes_while_it_is_read_ends_the_run(
    start: Path, tmp_path: Path, commands: Commands, path: str, how: str
) -> None:
    words, home = WORDS["packed"], home_of(start, tmp_path / "home")
    ended = commands.run(command(home, words, Moment(how, 3, ("preadv",), path)))
    assert (ended.code, ended.out) == (3, ""), ended.err
    assert path in ended.err
    assert "Traceback" not in ended.err
    assert not (home / "out").exists()


def test_an_interrupted_run_says_how_to_continue(start: Path, tmp_path: Path, commands: Commands) -> None:
    words, home = WORDS["bool"], home_of(start, tmp_path / "home")
    full = commands.run(command(home_of(start, tmp_path / "full"), words))
    ended = commands.run(command(home, words, Moment("interrupt", full.calls * 6 // 10)))
    assert ended.code == 130
    assert ended.err.splitlines()[0] == (
        "sparseprune: interrupted: there is no output; run the same command again to continue"
    )
    assert "the same command continues" in ended.err
    assert commands.run(command(home, words)).err.splitlines()[0] == CONTINUED


def test_too_little_memory_is_told(folder: Path) -> None:
    said = refused("reapply", folder / "tuned", folder / "pruned", "-o", folder / "out", "--memory", "9MB")
    assert "--memory 9.00 MB: this run needs " in said.err


def test_a_dry_run_counts_lost_zeros_and_writes_nothing(folder: Path) -> None:
    disturb(folder / "tuned")
    before = names_in(folder)
    words = ("reapply", folder / "tuned", folder / "pruned", "--dry-run")
    found = valid(ok(*words, "--json").out, "verify-masks")
    said = ok(*words).out
    assert names_in(folder) == before
    result = valid(ok(*words[:-1], "-o", folder / "out", "--json").out, "reapply")
    assert found["totals"]["lost"] == result["totals"]["lost"] > 0
    assert f"reapply would put back {result['totals']['lost']:,} zeros in " in said
    assert ok(*words, "-q").out == ""
    assert "there are no zeros to put back" in refused("reapply", folder / "tuned", "--dry-run").err
