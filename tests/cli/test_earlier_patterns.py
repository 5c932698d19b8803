"""A second run warns where it may break a pattern that the first one left, and counts what it broke."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseprune.spec import find_spec
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, run, valid
from tests.engine.reconstruction.oracle import moments

SIZE = 32
BLOCKS = ("[16, 1]", "[1, 8]", 4)
TWO_OF_FOUR = ("[1, 1]", "[1, 4]", 2)
ONE_OF_FOUR = ("[1, 1]", "[1, 4]", 1)
HALF_A_ROW = ("[1, 1]", "[1, -1]", 16)
A_THIRD_OF_A_ROW = ("[1, 1]", "[1, -1]", 10)


def spec(folder: Path, rule: tuple[str, str, int], *, rebuilt: bool) -> Path:
    block, shape, nnz = rule
    path = folder / f"{len(list(folder.iterdir()))}.toml"
    reconstruct = '[reconstruct]\nfile = "stats.safetensors"\n' if rebuilt else ""
    rules = f'[scope.proj]\ntensors = "w{{n}}"\nblock = {block}\nshape = {shape}\nnnz = {nnz}\n'
    path.write_text(f"version = 1\n{reconstruct}{rules}")
    return path


def dense(folder: Path) -> Path:
    """Two matrices in a directory, with second moments of both beside it."""
    generator = torch.Generator().manual_seed(0)
    checkpoint = folder / "dense"
    checkpoint.mkdir()
    names = ("w0", "w1")
    tensors = {name: torch.randn(SIZE, SIZE, generator=generator) for name in names}
    save_file(tensors, checkpoint / "model.safetensors")
    save_file({name: moments(SIZE, 300, generator) for name in names}, folder / "stats.safetensors")
    return checkpoint


def warned(folder: Path, checkpoint: Path, path: Path, *words: object) -> list[str]:
    """What a run warns of, which is also in its report."""
    out = folder / "out"
    said = ok("apply", checkpoint, path, "-o", out, "--force", "--json", *words)
    lines = [line.split("warning: ")[1] for line in said.err.splitlines() if "warning: " in line]
    report = valid(said.out, "report")
    assert [line for line in report["warnings"] if "may break" in line or "breaks" in line] == lines
    return lines


def broken_scopes(out: Path) -> dict[str, int]:
    """Scopes of 8 blocks of 16 rows of which more than 4 are not zero, in each matrix that has some."""
    counts = {}
    for name, weights in load_file(out / "model.safetensors").items():
        alive = weights.reshape(SIZE // 16, 16, SIZE // 8, 8).any(1)
        counts[name] = int((alive.sum(-1) > 4).sum())
    return {name: count for name, count in counts.items() if count}


def test_rebuilding_inside_of_blocks_warns_before_and_counts_what_broke(tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "out"
    run("apply", dense(tmp_path), spec(tmp_path, BLOCKS, rebuilt=True), "-o", first, "-q")
    assert not broken_scopes(first)
    before, after = warned(tmp_path, first, spec(tmp_path, TWO_OF_FOUR, rebuilt=True))
    broken = broken_scopes(out)
    assert broken
    rule, many = "scope.proj: 4 of 8", "2 tensors, such as w0"
    told = f"was pruned by its sparseprune/spec.toml ({rule}) in {many}"
    assert before == f"{first} {told}: this run rebuilds weights there and may break that"
    scopes = f"{sum(broken.values())} of {2 * SIZE // 16 * SIZE // 8} scopes"
    where = many if len(broken) == 2 else next(iter(broken))
    assert after == f"the output breaks a pattern of its input: {rule} in {scopes}, in {where}"


@pytest.mark.parametrize("spec_left", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "rebuilt"),
    [
        (TWO_OF_FOUR, A_THIRD_OF_A_ROW, False),  # zeros are but added
        (TWO_OF_FOUR, TWO_OF_FOUR, True),  # the same budget in the same scopes
        (TWO_OF_FOUR, ONE_OF_FOUR, True),
        (BLOCKS, BLOCKS, True),
    ],
)
def test_what_cannot_break_a_pattern_is_silent(
    tmp_path: Path, first: tuple[str, str, int], second: tuple[str, str, int], rebuilt: bool, spec_left: bool
) -> None:
    pruned = tmp_path / "first"
    run("apply", dense(tmp_path), spec(tmp_path, first, rebuilt=False), "-o", pruned, "-q")
    if not spec_left:
        shutil.rmtree(pruned / "sparseprune")
    assert warned(tmp_path, pruned, spec(tmp_path, second, rebuilt=rebuilt)) == []
    assert warned(tmp_path, tmp_path / "dense", spec(tmp_path, second, rebuilt=True)) == []


@pytest.mark.parametrize("spec_left", [True, False])
def test_a_pattern_that_may_break_and_does_not_is_told_once(tmp_path: Path, spec_left: bool) -> None:
    pruned = tmp_path / "first"
    run("apply", dense(tmp_path), spec(tmp_path, TWO_OF_FOUR, rebuilt=False), "-o", pruned, "-q")
    told = "was pruned by its sparseprune/spec.toml (scope.proj: 2 of 4)"
    if not spec_left:
        shutil.rmtree(pruned / "sparseprune")
        told = "has 2:4 zeros"
    second = spec(tmp_path, HALF_A_ROW, rebuilt=True)
    (line,) = warned(tmp_path, pruned, second)
    assert line.startswith(f"{pruned} {told} in 2 tensors, such as w0: this run rebuilds weights there")
    assert run("mask", pruned, second, "-o", tmp_path / "k.safetensors").err.count("may break") == 0
    strict = run("apply", pruned, second, "-o", tmp_path / "strict", "--strict")
    assert (strict.code, (tmp_path / "strict").exists()) == (2, False)


def test_patterns_of_a_file_are_seen_in_some_of_its_rows(tmp_path: Path) -> None:
    dense(tmp_path)
    weights = torch.randn(4 * SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    lowest = weights.reshape(-1, 4).abs().argsort(1)[:, :2]
    gone = (torch.arange(SIZE // 4)[:, None] + torch.arange(SIZE)) % 4 == 0
    patterns = {
        "2:4 zeros": weights.reshape(-1, 4).scatter(1, lowest, 0.0).reshape(weights.shape),
        "columns of zeros": weights.index_fill(1, torch.arange(10, 20), 0.0),
        "blocks of zeros": weights.masked_fill(gone.repeat_interleave(16, 0), 0.0),
    }
    # What a score does not care for is rebuilt wherever it stands.
    text = spec(tmp_path, ("[1, 1]", "[1, -1]", 24), rebuilt=True).read_text()
    text = text.replace("w{n}", "w0").replace('"\n[scope', '"\nmethod = "refit"\n[scope')
    (tmp_path / "any.toml").write_text(f'{text}score = {{ kind = "random" }}\n')
    for pattern, given in patterns.items():
        save_file({"w0": given, "w9": weights[:0]}, tmp_path / "m.safetensors")
        said = ok("apply", tmp_path / "m.safetensors", tmp_path / "any.toml", "--force")
        before, after = (line for line in said.err.splitlines() if "warning: " in line)
        assert f"m.safetensors has {pattern} in w0: this run rebuilds weights there" in before
        rows = load_file(tmp_path / "m.pruned.safetensors")["w0"][:64]  # those that are looked at
        lost, of = int(rows[:, 10:20].any(0).sum()), 10
        if pattern == "2:4 zeros":
            lost, of = int((rows.reshape(-1, 4).ne(0).sum(1) > 2).sum()), rows.numel() // 4
        if pattern == "blocks of zeros":  # in pieces of four rows
            pieces = gone[:4].repeat_interleave(4, 0)
            lost, of = int(rows.reshape(16, 4, SIZE).any(1)[pieces].sum()), int(pieces.sum())
        assert lost
        assert f"breaks a pattern of its input: {pattern} in {lost} of {of} places" in after


@pytest.mark.parametrize("spec_left", [True, False])
def test_removing_columns_of_two_of_four_counts_what_broke_and_removing_rows_is_silent(
    tmp_path: Path, spec_left: bool
) -> None:
    folder = write(tmp_path / "dense", decoder(), LLAMA)
    pruned = tmp_path / "pruned"
    ok("apply", folder, "2of4", "-o", pruned, "-q")
    told = "was pruned by its sparseprune/spec.toml (scope.matrix: 2 of 4)"
    if not spec_left:
        shutil.rmtree(pruned / "sparseprune")
        told = "has 2:4 zeros"
    out = tmp_path / "out"
    said = ok("remove", pruned, "mlp-channels", "-o", out, "--json")
    before, after = (line for line in said.err.splitlines() if "warning: " in line)
    downs = [tensor for name, tensor in load_file(out / "model.safetensors").items() if "down" in name]
    broken = sum(int((down.reshape(-1, 4).ne(0).sum(1) > 2).sum()) for down in downs)
    groups = sum(down.numel() // 4 for down in downs)
    assert broken
    name = "model.layers.0.mlp.down_proj.weight"
    assert f"pruned {told} in 2 tensors, such as {name}: this run cuts slices out there" in before
    assert f"in {broken} of {groups} " in after
    assert len([line for line in json.loads(said.out)["warnings"] if "break" in line]) == 2
    layers = run("remove", pruned, "layers", "--set", "sparsity=0.5", "-o", tmp_path / "layers")
    assert (layers.code, "may break" in layers.err) == (0, False)


def test_removing_what_was_zeroed_is_silent(tmp_path: Path) -> None:
    folder = write(tmp_path / "dense", decoder(), LLAMA)
    zeroed = tmp_path / "zeroed"
    ok("apply", folder, "mlp-channels", "-o", zeroed, "-q")
    said = run("remove", zeroed, "mlp-channels", "-o", tmp_path / "out")
    assert (said.code, "warning: " in said.err) == (0, False)


@pytest.mark.parametrize("is_asked", [True, False])
def test_a_width_that_scopes_do_not_divide_any_more_is_told(tmp_path: Path, is_asked: bool) -> None:
    """Whether the spec asks for it and leaves such tensors out, or does not and fits no more."""
    folder = write(tmp_path / "dense", decoder(), LLAMA)
    text = find_spec("2of4").text
    (line,) = (line for line in text.splitlines() if line.startswith("where"))
    (tmp_path / "first.toml").write_text(text if is_asked else text.replace(line, ""))
    pruned = tmp_path / "pruned"
    ok("apply", folder, tmp_path / "first.toml", "-o", pruned, "-q")
    said = ok(
        "remove", pruned, "mlp-channels", "--set", "sparsity=0.1", "--set", "multiple=1", "-o",
        tmp_path / "out",
    )  # fmt: skip
    downs = "2 tensors, such as model.layers.0.mlp.down_proj.weight"
    assert f"scope.matrix: 2 of 4 no longer fits{f' {downs}' if is_asked else ', '}" in said.err
