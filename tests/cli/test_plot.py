"""`--plot` of inspect and compare: what is told where, what is drawn with which spec, what cannot be."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

from sparseprune.cli.demo import write_decoder
from tests.commands import ok, refused, run, silent
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards, write_spec
from tests.statistics import drawn, save


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A checkpoint that was pruned 2:4, with its spec beside the weights."""
    dense = write_shards(tmp_path / "dense", {"model.safetensors": mlp_tensors()})
    spec = write_spec(tmp_path, TWO_OF_FOUR)
    ok("apply", dense, spec, "-o", tmp_path / "pruned", "-q")
    return tmp_path / "pruned"


@pytest.fixture
def decoder(tmp_path: Path) -> Path:
    write_decoder(tmp_path / "decoder")
    return tmp_path / "decoder"


def html(pruned: Path, *words: object) -> str:
    """The page that `inspect --plot` makes of it."""
    path = pruned.parent / "out.html"
    silent("inspect", pruned, "-q", "--plot", path, *words)
    return path.read_text()


@pytest.mark.parametrize("form", ["png", "svg", "pdf", "html"])
def test_tells_the_picture_on_stderr_and_leaves_stdout_as_it_is(pruned: Path, form: str) -> None:
    path = pruned.parent / f"out.{form}"
    said = ok("inspect", pruned, "--plot", path)
    assert said.out == run("inspect", pruned).out
    assert said.err.splitlines()[-1] == f"sparseprune: wrote {path}"
    assert path.stat().st_size > 1000


def test_json_and_a_picture_go_together(pruned: Path) -> None:
    said = run("inspect", pruned, "--json", "--plot", pruned.parent / "out.png", "-q")
    assert json.loads(said.out)["totals"]["tensors"] == 7
    assert imread(pruned.parent / "out.png").shape[2] == 4


def test_survivors_are_counted_by_the_spec_that_was_applied(pruned: Path) -> None:
    page = html(pruned)
    assert "scope.proj" in page
    assert "scope.proj: each of its 128 scopes keeps 2 blocks, nnz 2." in page
    assert "<title>Sparsity of pruned, spec spec.toml</title>" in page


def test_survivors_are_counted_by_the_spec_that_is_named(pruned: Path, tmp_path: Path) -> None:
    spec = tmp_path / "other.toml"
    spec.write_text(CHANNELS)
    page = html(pruned, "--spec", spec)
    assert "scope.mlp: each of its 2 scopes keeps 16 blocks, nnz 12." in page
    assert ", spec other.toml</title>" in page
    assert "scope.proj" not in page


def test_variables_count_that_were_set_when_it_was_applied(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("apply", decoder, "nofm", "-o", out, "-q", "--set", "n=1", "--set", "m=8")
    page = html(out)
    assert "scope.matrix: each of its 61,440 scopes keeps 1 block, nnz 1." in page
    assert "<title>Sparsity of out, spec nofm with n=1, m=8</title>" in page
    assert "1 of 8 blocks" in html(out, "--tensor", "model.layers.0.self_attn.q_proj.weight")


def test_without_a_spec_only_the_sparsity_is_drawn(tmp_path: Path) -> None:
    save_file(mlp_tensors(), tmp_path / "m.safetensors")
    page = html(tmp_path / "m.safetensors")
    assert page.count("<figure>") == 1


def test_a_spec_that_does_not_fit_any_more_is_told_and_the_picture_drawn(pruned: Path) -> None:
    weights = load_file(pruned / "model.safetensors")
    renamed = {name.replace("weight", "kernel"): weights[name] for name in weights}
    save_file(renamed, pruned / "model.safetensors")
    (pruned / "model.safetensors.index.json").unlink()
    path = pruned.parent / "out.html"
    said = ok("inspect", pruned, "-q", "--plot", path)
    (first,) = said.err.splitlines()
    assert first.startswith("sparseprune: drawn without the spec that lies beside the weights: ")
    assert path.read_text().count("<figure>") == 1


def test_a_named_spec_that_does_not_fit_is_an_error(pruned: Path, tmp_path: Path) -> None:
    spec = tmp_path / "other.toml"
    spec.write_text(TWO_OF_FOUR.replace(".weight", ".kernel"))
    said = refused("inspect", pruned, "-q", "--plot", tmp_path / "out.html", "--spec", spec)
    assert "other.toml" in said.err
    assert not (tmp_path / "out.html").exists()


def test_draws_the_mask_of_a_tensor_with_its_scopes(pruned: Path) -> None:
    page = html(pruned, "--tensor", "0.up.weight")
    assert "scope.proj: 2 of 4 blocks" in page
    weights = load_file(pruned / "model.safetensors")["0.up.weight"]
    for row in range(16):
        marks = "".join("1" if one else "0" for one in weights[row] != 0)
        assert f"<td>{row}</td><td>4</td><td>{marks}</td>" in page


def test_draws_the_window_that_is_asked_for(pruned: Path) -> None:
    page = html(pruned, "--tensor", "0.up.weight", "--window", "3:5,4:8")
    weights = load_file(pruned / "model.safetensors")["0.up.weight"]
    for row in (3, 4):
        marks = "".join("1" if one else "0" for one in weights[row, 4:8] != 0)
        assert f"<td>{row}</td><td>2</td><td>{marks}</td>" in page
    assert "elements from 4 on" in page


def test_groups_are_drawn_where_they_are_asked_for(pruned: Path) -> None:
    assert "Sparsity by layer" in html(pruned, "--by", "layer")
    assert "Sparsity by module" in html(pruned, "--by", "module")


def test_errors_of_outputs_are_drawn_where_there_are_statistics(pruned: Path, tmp_path: Path) -> None:
    save(tmp_path / "stats.safetensors", *drawn(mlp_tensors()))
    path = tmp_path / "out.html"
    stats = ("--stats", tmp_path / "stats.safetensors")
    ok("compare", tmp_path / "dense", pruned, *stats, "--plot", path, "-q")
    page = path.read_text()
    assert "Relative error of the outputs<" in page
    assert "Relative error of the outputs, weighted by gradients of the loss<" in page


def test_channels_are_seen_as_whole_lines(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("apply", decoder, "mlp-channels", "-o", out, "-q")
    page = html(out, "--tensor", "model.layers.3.mlp.down_proj.weight")
    assert "scope.mlp: 144 of 192 blocks" in page
    weights = load_file(out / "model-00002-of-00002.safetensors")["model.layers.3.mlp.down_proj.weight"]
    assert f"<td>{int((weights[0, :64] != 0).sum())}</td>" in page


def test_a_tensor_that_is_not_there_gets_the_nearest_name(pruned: Path) -> None:
    path = pruned.parent / "out.png"
    said = refused("inspect", pruned, "-q", "--plot", path, "--tensor", "0.up.wieght")
    assert said.err == (
        f'sparseprune: --tensor 0.up.wieght: {pruned} has no such tensor; did you mean "0.up.weight"?\n'
    )
    assert not path.exists()


@pytest.mark.parametrize("command", ["inspect", "compare"])
@pytest.mark.parametrize(
    ("name", "said"),
    [("out.gif", "ends in .gif"), ("no/out.png", "there is no folder"), ("out", "no ending")],
)
def test_what_is_wrong_with_the_file_is_told_before_anything_is_read(
    tmp_path: Path, command: str, name: str, said: str
) -> None:
    nowhere = [tmp_path / "nowhere"] * (1 if command == "inspect" else 2)
    told = refused(command, *nowhere, "--plot", tmp_path / name)
    assert told.err.startswith(f"sparseprune: --plot {tmp_path / name}: ")
    assert said in told.err


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_matplotlib_is_asked_for_before_anything_is_read(
    tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    nowhere = [tmp_path / "nowhere"] * (1 if command == "inspect" else 2)
    told = refused(command, *nowhere, "--plot", tmp_path / "out.png")
    assert told.err == (
        "sparseprune: --plot needs matplotlib: pip install 'sparseprune[plot]' (in a clone: '.[plot]')\n"
    )


def test_a_tensor_without_a_picture_is_an_error(pruned: Path) -> None:
    told = refused("inspect", pruned, "--tensor", "0.up.weight")
    assert "--plot" in told.err


def test_a_tensor_of_odd_elements_is_told(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(0, 4)}, tmp_path / "m.safetensors")
    said = run("inspect", tmp_path / "m.safetensors", "-q", "--plot", tmp_path / "out.png", "--tensor", "w")
    assert (said.code, said.err) == (2, "sparseprune: --tensor w: it has no elements to draw\n")


def test_an_empty_checkpoint_has_a_picture(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    assert "There are no tensors." in html(tmp_path / "m.safetensors")


def test_only_what_is_listed_is_drawn(pruned: Path) -> None:
    page = html(pruned, "--match", "0.**")
    assert "<td>0</td>" in page
    assert "Not shown: 1 tensor of less than two dimensions" in page


def test_a_picture_of_a_comparison(pruned: Path) -> None:
    path = pruned.parent / "out.html"
    ok("compare", pruned.parent / "dense", pruned, "--plot", path, "-q")
    page = path.read_text()
    assert "Energy kept beyond a random choice" in page
    assert ", spec spec.toml</title>" in page
    assert "pruned compared with " in page


def test_the_folder_of_the_checkpoint_is_left_as_it_is(pruned: Path) -> None:
    before = sorted(path.relative_to(pruned) for path in pruned.rglob("*"))
    copy = pruned.parent / "copy"
    shutil.copytree(pruned, copy)
    html(pruned)
    assert sorted(path.relative_to(pruned) for path in pruned.rglob("*")) == before
    for path in before:
        if (pruned / path).is_file():
            assert (pruned / path).read_bytes() == (copy / path).read_bytes()
