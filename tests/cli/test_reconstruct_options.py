"""`--reconstruct` and `--stats`: any spec, whether it says so or not, rebuilds what survives."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.api.options import Target, source
from sparseprune.api.pruning import identity_of, prepare
from sparseprune.api.resources import machine
from sparseprune.errors import SparsepruneError
from tests.cli import removal
from tests.cli.test_reconstruct import ADMM, REFIT, with_head
from tests.commands import ok, refused, valid
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_spec
from tests.statistics import Tensors, drawn, save

STATS = "stats.safetensors"
OUT = "m.pruned.safetensors"


def written(folder: Path, spec: str, *left_out: str, stats: str = STATS) -> Path:
    """A file, statistics of all but some weights, and a spec."""
    tensors = mlp_tensors()
    inputs, gradients = drawn({name: one for name, one in tensors.items() if name not in left_out})
    save_file(tensors, folder / "m.safetensors")
    save(folder / stats, inputs, gradients)
    return write_spec(folder, spec)


def applied(folder: Path, spec: str | Path, *words: object) -> tuple[Tensors, Any]:
    said = ok("apply", folder / "m.safetensors", spec, "--force", "--json", "-q", *words)
    return load_file(folder / OUT), valid(said.out, "report")


def same(one: Tensors, other: Tensors) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def rule_of(report: Any) -> tuple[str | None, str | None]:
    (rule,) = report["rules"]
    return rule["reconstructed"], rule["metric"]


@pytest.mark.parametrize("method", ["admm", "refit"])
@pytest.mark.parametrize("spec", [TWO_OF_FOUR, CHANNELS])
def test_they_do_what_a_table_in_the_spec_does(tmp_path: Path, spec: str, method: str) -> None:
    path = written(tmp_path, with_head(f'[reconstruct]\nfile = "{STATS}"\nmethod = "{method}"\n', spec))
    wanted, _ = applied(tmp_path, path)
    path.write_text(spec)
    found, report = applied(tmp_path, path, "--reconstruct", method, "--stats", tmp_path / STATS)
    assert same(found, wanted)
    assert rule_of(report) == (method, "loss")
    assert (report["reconstruct"], report["stats"]) == (method, str(tmp_path / STATS))
    assert report["notes"] == [f"statistics in {tmp_path / STATS}"]
    if method == "admm":
        alone, report = applied(tmp_path, path, "--stats", tmp_path / STATS)
        assert same(alone, wanted)
        assert "reconstruct" not in report


def test_the_library_takes_them_too(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_OF_FOUR)
    wanted, _ = applied(tmp_path, path, "--reconstruct", "refit", "--stats", tmp_path / STATS)
    stats = tmp_path / STATS
    report = sparseprune.apply(
        tmp_path / "m.safetensors", path, tmp_path / "out.safetensors", reconstruct="refit", stats=stats
    )
    assert same(load_file(tmp_path / "out.safetensors"), wanted)
    assert report.totals.metric == "loss"
    with pytest.raises(SparsepruneError, match="--reconstruct best: wanted admm, refit or none"):
        sparseprune.apply(tmp_path / "m.safetensors", path, reconstruct="best")  # type: ignore[arg-type]


def test_a_command_is_stronger_than_the_keys_of_the_spec_and_leaves_the_others(tmp_path: Path) -> None:
    head = '[reconstruct]\nfile = "gone"\nmethod = "refit"\ndamp = 0.3\nmetric = "outputs"\n'
    path = written(tmp_path, with_head(head, TWO_OF_FOUR))
    stats = ("--stats", tmp_path / STATS)
    found, report = applied(tmp_path, path, *stats)
    assert rule_of(report) == ("refit", "outputs")
    path.write_text(with_head(head.replace("gone", STATS), TWO_OF_FOUR))
    assert same(found, applied(tmp_path, path)[0])
    assert rule_of(applied(tmp_path, path, "--reconstruct", "admm")[1]) == ("admm", "outputs")
    plain, report = applied(tmp_path, path, "--reconstruct", "none")
    assert rule_of(report) == (None, None)
    path.write_text(TWO_OF_FOUR)
    assert same(plain, applied(tmp_path, path)[0])
    path.write_text(TWO_OF_FOUR + 'reconstruct = { method = "none" }\n')
    assert rule_of(applied(tmp_path, path, "--reconstruct", "admm", *stats)[1]) == (None, None)


def test_without_statistics_it_is_refused_unless_calibrate_left_some_beside_the_checkpoint(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, TWO_OF_FOUR)
    said = refused("apply", tmp_path / "m.safetensors", path, "--reconstruct", "admm")
    model = tmp_path / "m.safetensors"
    assert said.err == (
        f"sparseprune: [scope.proj] reconstruct: there are no statistics in {model}-stats; make them from a "
        f"text: sparseprune calibrate {model} --text corpus.txt\n"
    )
    wanted, _ = applied(tmp_path, path, "--stats", tmp_path / STATS)
    (tmp_path / "m.safetensors-stats").mkdir()
    (tmp_path / STATS).rename(tmp_path / "m.safetensors-stats/statistics.safetensors")
    found, report = applied(tmp_path, path, "--reconstruct", "admm")
    assert same(found, wanted)
    assert report["stats"] == str(tmp_path / "m.safetensors-stats")
    assert report["notes"][0] == f"statistics in {tmp_path / 'm.safetensors-stats'}"
    plain, report = applied(tmp_path, path)
    assert rule_of(report) == (None, None)
    assert not same(found, plain)


def test_a_shipped_spec_takes_the_statistics_here_or_those_beside_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, beside = removal.write(tmp_path / "in", removal.decoder(), removal.LLAMA), tmp_path / "in-stats"
    (line,) = refused("apply", model, "2of4-admm", "-o", "out").err.splitlines()
    assert line.endswith(f"make them from a text: sparseprune calibrate {model} --text corpus.txt")
    inputs = {name: torch.eye(one.shape[-1]) for name, one in removal.decoder().items() if one.ndim == 2}
    beside.mkdir()
    save_file(inputs, beside / "statistics.safetensors")
    report = json.loads(ok("apply", model, "2of4-admm", "-o", "out", "--json").out)
    assert (report["stats"], rule_of(report)) == (beside.name, ("admm", "outputs"))
    beside.rename("stats")
    report = json.loads(ok("apply", model, "2of4-admm", "-o", "out", "--json", "--force").out)
    assert report["stats"] == "stats"


def test_missing_statistics_of_a_score_are_told_with_the_command_that_makes_them(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_OF_FOUR + 'score = { kind = "wanda", file = "absent" }\n')
    (line,) = refused("apply", tmp_path / "m.safetensors", path).err.splitlines()
    model = tmp_path / "m.safetensors"
    assert line.endswith(f"sparseprune calibrate {model} --text corpus.txt -o {tmp_path / 'absent'}")


def test_a_spec_may_leave_the_file_to_the_command(tmp_path: Path) -> None:
    path = written(tmp_path, with_head('[reconstruct]\nmethod = "refit"\n', TWO_OF_FOUR))
    said = refused("apply", tmp_path / "m.safetensors", path)
    assert (
        "[scope.proj] reconstruct: there is no file: give what calibrate wrote, as file here or by --stats"
        in said.err
    )
    assert len(said.err.splitlines()) == 1
    assert rule_of(applied(tmp_path, path, "--stats", tmp_path / STATS)[1]) == ("refit", "loss")
    ok("verify", tmp_path / OUT, path)


SOFT = TWO_OF_FOUR + 'mode = "soft"\n'
PRUNE = TWO_OF_FOUR + 'score = { nonfinite = "prune" }\n'
THRESHOLD = TWO_OF_FOUR.replace("nnz = 2", "threshold = 0.7")
RANDOM = TWO_OF_FOUR + 'score = { kind = "random", seed = 3 }\n'
LAYERS = """
version = 1
block.part = { tensors = "{layer}.{name:up|down}.weight", shape = [-1, -1] }
block_coupling.layer = { blocks = ["part"], across = ["name"] }
scope.layer = { block = "layer", shape = [] }
[scope_coupling.depth]
scopes = ["layer"]
across = ["layer"]
nnz = 1
score = { kind = "magnitude", normalize = "rms" }
"""
OTHERS = {
    "soft": (SOFT, None, 'scope.proj is not rebuilt: it has mode = "soft"'),
    "prune": (PRUNE, None, 'scope.proj is not rebuilt: it has a score with nonfinite = "prune"'),
    "threshold": (THRESHOLD, "refit", "scope.proj is refitted: its threshold says what survives, which"),
    "random": (RANDOM, "refit", "scope.proj is refitted: its score says what survives, which admm would"),
    "layers": (LAYERS, None, "nothing can make up for the whole rows of these"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_rebuilt_keeps_working_and_is_told(tmp_path: Path, name: str) -> None:
    spec, method, line = OTHERS[name]
    path = written(tmp_path, spec)
    plain, _ = applied(tmp_path, path)
    found, report = applied(tmp_path, path, "--reconstruct", "admm", "--stats", tmp_path / STATS)
    assert rule_of(report) == (method, method and "loss")
    assert any(line in note for note in report["notes"])
    assert all(torch.equal(found[tensor] == 0, plain[tensor] == 0) for tensor in plain)
    assert same(found, plain) == (method is None)
    said = ok("apply", tmp_path / "m.safetensors", path, "--force", "--stats", tmp_path / STATS)
    assert line in said.err
    said = ok("plan", tmp_path / "m.safetensors", path, "--stats", tmp_path / STATS)
    assert line in said.err
    assert ("rebuilds" in said.out) == (method is not None)


def test_weights_without_statistics_are_masked_alone_and_are_counted(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_OF_FOUR, "0.up.weight", "1.down.weight")
    plain, _ = applied(tmp_path, path)
    found, report = applied(tmp_path, path, "--stats", tmp_path / STATS)
    for name, one in found.items():
        assert torch.equal(one, plain[name]) == (name not in {"0.down.weight", "1.up.weight"})
    _, note = report["notes"]
    assert note == (
        "scope.proj is not rebuilt in 2 instances, such as those with 0.up.weight: there are no statistics "
        "of these"
    )
    told = {one["name"]: one["metric"] for one in report["tensors"]}
    assert told["0.up.weight"] is None
    assert told["0.down.weight"] == "loss"
    path.write_text(with_head(ADMM, TWO_OF_FOUR))  # a spec that asks for it means all
    said = refused("apply", tmp_path / "m.safetensors", path, "--stats", tmp_path / STATS, "--force")
    assert "has no statistics of 0.up.weight" in said.err
    path.write_text(with_head(ADMM + "optional = true\n", TWO_OF_FOUR))
    assert same(found, applied(tmp_path, path)[0])


def test_statistics_of_another_checkpoint_are_refused(tmp_path: Path) -> None:
    names = [name for name in mlp_tensors() if "weight" in name]
    path = written(tmp_path, TWO_OF_FOUR, *names)
    inputs, gradients = drawn({"other": torch.zeros(4, 4)})
    save(tmp_path / STATS, inputs, gradients)
    said = refused("apply", tmp_path / "m.safetensors", path, "--stats", tmp_path / STATS)
    assert "stats.safetensors: has statistics of no weight that it could rebuild" in said.err
    assert len(said.err.splitlines()) == 1


def test_scores_read_the_same_statistics(tmp_path: Path) -> None:
    score = 'score = { kind = "wanda", file = "FILE" }\n'
    path = written(tmp_path, with_head(REFIT, TWO_OF_FOUR + score.replace("FILE", STATS)))
    wanted, _ = applied(tmp_path, path)
    path.write_text(TWO_OF_FOUR + score.replace("FILE", "gone"))
    found, report = applied(tmp_path, path, "--stats", tmp_path / STATS)
    assert same(found, wanted)
    assert rule_of(report) == ("refit", "loss")


def test_the_output_says_what_was_done_and_is_checked_and_put_back_as_ever(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_OF_FOUR)
    (tmp_path / "in").mkdir()
    (tmp_path / "m.safetensors").rename(tmp_path / "in/model.safetensors")
    words = ("--reconstruct", "refit", "--stats", tmp_path / STATS)
    ok("apply", tmp_path / "in", path, *words, "-q")
    out = tmp_path / "in-pruned"
    first, rest = (out / "sparseprune/spec.toml").read_text().split("\n", 1)
    assert first == f"# Applied with --reconstruct refit --stats {tmp_path / STATS}"
    assert rest == TWO_OF_FOUR
    ok("verify", out, out / "sparseprune/spec.toml")
    found = load_file(out / "model.safetensors")
    tuned = {name: one + 1 for name, one in found.items()}
    save_file(tuned, tmp_path / "tuned.safetensors")
    ok("reapply", tmp_path / "tuned.safetensors", out, "-q")
    back = load_file(tmp_path / "tuned.pruned.safetensors")
    for name in ("0.up.weight", "1.down.weight"):
        assert torch.equal(back[name], torch.where(found[name] != 0, tuned[name], 0))


def test_a_run_with_other_ones_is_not_continued(tmp_path: Path) -> None:
    path, stats = written(tmp_path, TWO_OF_FOUR), tmp_path / STATS

    def options(method: Any, file: Path | None) -> dict[str, str]:
        asked = source(tmp_path / "m.safetensors", path, None, None, (method, file))
        return identity_of(prepare(asked, Target(None), machine()))

    runs = [
        options(method, file)
        for method, file in ((None, None), (None, stats), ("refit", stats), ("none", stats))
    ]
    assert len({one["the options"] for one in runs}) == 4
    inputs, gradients = drawn(mlp_tensors(), seed=5)
    save(stats, inputs, gradients)
    assert options(None, stats)["the input"] != runs[1]["the input"]
    assert options(None, stats)["the options"] == runs[1]["the options"]


def test_masks_take_them_too(tmp_path: Path) -> None:
    path = written(tmp_path, TWO_OF_FOUR)
    stats = ("--stats", tmp_path / STATS)
    found, _ = applied(tmp_path, path, *stats)
    ok("mask", tmp_path / "m.safetensors", path, *stats, "-q")
    masks = sparseprune.load_masks(tmp_path / "m.masks.safetensors")
    assert all(torch.equal(found[name] != 0, one) for name, one in masks.items())


HIDDEN, INNER, HEADS, GROUPS, LAYERS_OF_MODEL = 16, 32, 4, 2, 4


def write_decoder(folder: Path) -> Tensors:
    """A Llama of random numbers, with the config that its structures are known by."""
    generator = torch.Generator().manual_seed(1)
    head = HIDDEN // HEADS
    shapes = {"model.embed_tokens.weight": (32, HIDDEN), "lm_head.weight": (32, HIDDEN)}
    for layer in range(LAYERS_OF_MODEL):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.self_attn.k_proj.weight": (GROUPS * head, HIDDEN),
            f"{at}.self_attn.v_proj.weight": (GROUPS * head, HIDDEN),
            f"{at}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{at}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{at}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{one}_layernorm.weight" for layer in range(LAYERS_OF_MODEL)
             for one in ("input", "post_attention")]  # fmt: skip
    tensors |= {name: torch.ones(HIDDEN) for name in (*norms, "model.norm.weight")}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS_OF_MODEL,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "vocab_size": 32,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return tensors


SHIPPED = {
    "2of4": "admm",
    "mlp-channels": "admm",
    "heads": "admm",
    "unstructured": "admm",
    "unstructured-global": "admm",
    "coupled-2of4": "admm",
    "hidden": "admm",
    "layers": None,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_take_statistics(tmp_path: Path, name: str) -> None:
    tensors = write_decoder(tmp_path / "model")
    inside = {each: one for each, one in tensors.items() if "layers" in each and one.ndim == 2}
    inputs, gradients = drawn(inside)
    save(tmp_path / STATS, inputs, gradients)
    words = ("--stats", tmp_path / STATS, "--set", "sparsity=0.5") if "of4" not in name else (
        "--stats", tmp_path / STATS)  # fmt: skip
    said = ok("apply", tmp_path / "model", name, *words, "--json", "-q", "--no-masks")
    report = valid(said.out, "report")
    assert rule_of(report)[0] == SHIPPED[name]
    assert (report["totals"]["loss_error"] is None) == (SHIPPED[name] is None)
    ok("verify", tmp_path / "model-pruned", name, *words[2:], "-q")


def test_removal_takes_them_too(tmp_path: Path) -> None:
    tensors = write_decoder(tmp_path / "model")
    inputs, gradients = drawn({name: one for name, one in tensors.items() if "down_proj" in name})
    stats = ("--stats", tmp_path / STATS)
    save(tmp_path / STATS, inputs, gradients)
    ok("apply", tmp_path / "model", "mlp-channels", *stats, "-q")
    said = ok("remove", tmp_path / "model", "mlp-channels", *stats, "-o", tmp_path / "small", "--json", "-q")
    report = valid(said.out, "remove")
    assert (report["stats"], report["totals"]["metric"]) == (str(tmp_path / STATS), "loss")
    assert rule_of(report) == ("admm", "loss")
    zeroed, small = (load_file(tmp_path / each / "model.safetensors") for each in ("model-pruned", "small"))
    for name in inputs:
        assert torch.equal(small[name], zeroed[name][:, zeroed[name].any(0)])
    first = (tmp_path / "small/sparseprune/spec.toml").read_text().split("\n")[0]
    assert first == f"# Applied with --stats {tmp_path / STATS}"
    masks = tmp_path / "model-pruned"
    said = refused("remove", tmp_path / "model", "--masks", masks, *stats)
    assert f"--stats {tmp_path / STATS}: goes with a SPEC, of which survivors are rebuilt" in said.err
