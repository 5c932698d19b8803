"""Gradual pruning: only what the masks of an earlier step keep competes; each mask lies in the last one."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from tests import oracle
from tests.cli.removal import LLAMA, decoder, write
from tests.commands import ok, refused, run, silent, valid
from tests.execution.structures import FLOATS, INTEGERS

Tensors = dict[str, torch.Tensor]
ROWS, COLUMNS = 6, 12
STEPS = 3
SCORES = (
    'kind = "magnitude"',
    'kind = "random", seed = {step}',
    'kind = "values", file = "v{step}.safetensors"',
)


def one(block: str, shape: str) -> str:
    return f'[scope.all]\ntensors = "{{name}}.weight"\nblock = {block}\nshape = {shape}\n'


CHANNELS = """
block.gate = { tensors = "gate.weight", shape = [1, -1] }
block.up = { tensors = "up.weight", shape = [1, -1] }
block.down = { tensors = "down.weight", shape = [-1, 1] }
block_coupling.channel = { blocks = ["gate", "up", "down"], orders = [[0, 1], [0, 1], [1, 0]] }
[scope.all]
block = "channel"
shape = [-1, -1]
"""
EVERYWHERE = """
scope.each = { tensors = "{name}.weight", block = [1, 1], shape = [-1, -1] }
[scope_coupling.all]
scopes = ["each"]
across = "all"
"""
SHAPES = {"gate.weight": (ROWS, COLUMNS), "up.weight": (ROWS, COLUMNS), "down.weight": (COLUMNS, ROWS)}
# Rules with the budgets of their steps; the leaves of the oracle are in the order of the names.
STRUCTURES = {
    "weights of each row": (one("[1, 1]", "[1, -1]"), (5, 3, 1)),
    "3:4, 2:4, 1:4": (one("[1, 1]", "[1, 4]").replace("{name}", "{name:gate|up}"), (3, 2, 1)),
    "2:3 down the columns": (one("[1, 1]", "[3, 1]"), (2, 1, 0)),
    "rows": (one("[1, -1]", "[-1, 1]"), (5, 3, 1)),
    "pairs": (one("[1, 2]", "[-1, -1]"), (12, 7, 2)),
    "coupled channels": (CHANNELS, (5, 3, 1)),
    "all weights": (EVERYWHERE, (100, 41, 3)),
}


def coupled(name: str) -> list[tuple[tuple[str, ...], oracle.Coupled]]:
    """The structure of this name as the oracle sees it: tensors, and scopes over them."""

    def scope(shape: tuple[int, int], block: tuple[int, int], extent: tuple[int, int]) -> oracle.Scope:
        leaf = oracle.Leaf(
            shape, tuple(size if part < 0 else part for size, part in zip(shape, block, strict=True))
        )
        grid = zip(leaf.grid, extent, strict=True)
        return oracle.Scope(oracle.alone(leaf), tuple(size if part < 0 else part for size, part in grid))

    if name == "coupled channels":
        leaves = tuple(
            oracle.Leaf(shape, (shape[0], 1) if "down" in tensor else (1, shape[1]))
            for tensor, shape in SHAPES.items()
        )
        fused = oracle.Fused(leaves, ((0, 1), (0, 1), (1, 0)))
        return [(tuple(SHAPES), oracle.Coupled((oracle.Scope(fused, (ROWS, 1)),), ((0, 1),)))]
    if name == "all weights":
        names = tuple(sorted(SHAPES))
        scopes = tuple(scope(SHAPES[tensor], (1, 1), (-1, -1)) for tensor in names)
        return [(names, oracle.Coupled(scopes, ((0, 1),) * len(scopes)))]
    block, extent = {
        "weights of each row": ((1, 1), (1, -1)),
        "3:4, 2:4, 1:4": ((1, 1), (1, 4)),
        "2:3 down the columns": ((1, 1), (3, 1)),
        "rows": ((1, -1), (-1, 1)),
        "pairs": ((1, 2), (-1, -1)),
    }[name]
    names = ("gate.weight", "up.weight") if ":4" in name else tuple(SHAPES)
    return [((each,), oracle.Coupled((scope(SHAPES[each], block, extent),), ((0, 1),))) for each in names]


def expected(name: str, nnz: int, numbers: Tensors, earlier: Tensors) -> Tensors:
    """In plain loops: blocks of which the earlier mask keeps something come first, then the larger ones."""
    found = {}
    for names, structure in coupled(name):
        leaves = [elements(numbers[each] * earlier[each]) for each in names]
        kept = [elements(earlier[each]) for each in names]
        scores, flags = (oracle.scores_by_scope(structure, some) for some in (leaves, kept))
        above = 1 + max(score for each in scores.values() for score in each)
        decisions = {
            place: oracle.keep_largest(
                [a + above * bool(b) for a, b in zip(scores[place], flags[place], strict=True)], nnz
            )
            for place in scores
        }
        for each, mask in zip(names, oracle.masks(structure, decisions), strict=True):
            laid = torch.tensor([mask[index] for index in sorted(mask)]).reshape(SHAPES[each])
            found[each] = laid & earlier[each]
    return found


def alive(name: str, masks: Tensors) -> list[int]:
    """How many blocks of each scope have something that is kept."""
    return [
        sum(score > 0 for score in scores)
        for names, structure in coupled(name)
        for scores in oracle.scores_by_scope(structure, [elements(masks[each]) for each in names]).values()
    ]


def elements(tensor: torch.Tensor) -> oracle.Elements:
    rows, columns = tensor.shape
    return {(row, column): tensor[row, column].item() for row in range(rows) for column in range(columns)}


def few_numbers(seed: int) -> Tensors:
    """Weights that tie, and of which most are zero."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randint(-6, 7, shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: (each * (each.abs() > 3)).to(torch.bfloat16) for name, each in drawn.items()}


def written(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def subset(masks: Tensors, earlier: Tensors) -> bool:
    return all(bool((mask <= earlier[name]).all()) for name, mask in masks.items())


@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.split('"')[1])
@pytest.mark.parametrize("name", STRUCTURES)
def test_each_mask_is_what_plain_loops_keep_of_the_last_one(tmp_path: Path, name: str, score: str) -> None:
    """Survivors that tie with pruned weights, and are zero, and tuned weights whose zeros are lost."""
    rule, budgets = STRUCTURES[name]
    given = written(tmp_path / "tuned0", few_numbers(0))
    earlier: Tensors = {each: torch.ones(shape, dtype=torch.bool) for each, shape in SHAPES.items()}
    within: tuple[object, ...] = ()
    for step, nnz in enumerate(budgets):
        spec, out = tmp_path / f"{step}.toml", tmp_path / f"step{step}"
        save_file(few_numbers(9 + step), tmp_path / f"v{step}.safetensors")
        spec.write_text(f"version = 1\n{rule}nnz = {nnz}\nscore = {{ {score.format(step=step)} }}\n")
        tuned = load_file(given / "model.safetensors")
        silent("apply", given, spec, "-o", out, "-q", *within)
        masks = sparseprune.load_masks(out)
        assert subset(masks, earlier)
        assert alive(name, masks) == [min(nnz, before) for before in alive(name, earlier)]
        if "random" not in score:
            numbers = few_numbers(9 + step) if "values" in score else tuned
            wanted = expected(name, nnz, numbers, earlier)
            assert all(torch.equal(masks[each], wanted[each]) for each in wanted)
        for each, weights in load_file(out / "model.safetensors").items():
            assert torch.equal(weights, tuned[each].where(masks.get(each, earlier[each]), 0))
        silent("verify", out, spec, "-q")
        if step:
            silent("verify", out, "--masks", tmp_path / f"step{step - 1}", "-q")
        given = written(tmp_path / f"tuned{step + 1}", few_numbers(step + 1))
        earlier, within = {**earlier, **masks}, ("--within", out)


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("name", ["weights of each row", "coupled channels"])
def test_zeros_of_every_dtype_tie_and_the_mask_decides(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    rule, (first, second, _) = STRUCTURES[name]
    dense = {each: one.to(dtype) for each, one in few_numbers(0).items()}
    tuned = {each: one.to(dtype) for each, one in few_numbers(1).items()}
    (tmp_path / "spec.toml").write_text(f'version = 1\nvars.n = {first}\n{rule}nnz = "n"\n')
    words = ("apply", written(tmp_path / "dense", dense), tmp_path / "spec.toml", "-q")
    silent(*words, "-o", tmp_path / "first")
    earlier = sparseprune.load_masks(tmp_path / "first")
    words = ("apply", written(tmp_path / "tuned", tuned), tmp_path / "spec.toml", "-q")
    silent(*words, "--set", f"n={second}", "--within", tmp_path / "first", "-o", tmp_path / "second")
    masks = sparseprune.load_masks(tmp_path / "second")
    wanted = expected(name, second, {each: one.to(torch.float64) for each, one in tuned.items()}, earlier)
    assert all(torch.equal(masks[each], wanted[each]) for each in wanted)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_shipped_schedule_is_cubic_and_ends_at_its_sparsity(tmp_path: Path, step: int) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    words = ("--set", f"step={step}", "--set", "steps=3", "--set", "sparsity=0.8", "--set", "first=0.1")
    left = 1 - step / 3
    plan = valid(ok("plan", dense, "unstructured-gradual", *words, "--json").out, "plan")
    (rule,) = plan["rules"]
    assert rule["sparsity_asked"] == pytest.approx(0.8 + (0.1 - 0.8) * left**3)


def test_steps_of_the_shipped_schedule_lie_in_each_other(tmp_path: Path) -> None:
    """Tuning makes a third of the survivors exactly zero: they tie with what was pruned."""
    given, masks = write(tmp_path / "dense", decoder(), LLAMA), []
    within: tuple[object, ...] = ()
    for step in range(1, STEPS + 1):
        out, settings = tmp_path / f"step{step}", ("--set", f"step={step}", "--set", f"steps={STEPS}")
        ok("apply", given, "unstructured-gradual", *settings, "-o", out, "-q", *within)
        ok("verify", out, "unstructured-gradual", *settings, "-q")
        ok("verify", out, "-q")  # the spec that it carries, with what was set
        masks.append(sparseprune.load_masks(out))
        tuned = tmp_path / f"tuned{step}"
        tuned.mkdir()
        (tuned / "config.json").write_bytes((out / "config.json").read_bytes())
        generator = torch.Generator().manual_seed(step)
        weights = {
            name: (each + 1e-3).where(torch.rand(each.shape, generator=generator) < 0.67, 0)
            for name, each in load_file(out / "model.safetensors").items()
        }
        save_file(weights, tuned / "model.safetensors")
        given, within = tmp_path / f"input{step}", ("--within", out)
        ok("reapply", tuned, out, "-o", given, "-q")
    assert all(subset(later, earlier) for earlier, later in pairwise(masks))
    pruned = [sum(int((~mask).sum()) for mask in each.values()) for each in masks]
    total = sum(mask.numel() for mask in masks[-1].values())
    assert pruned == sorted(pruned)
    assert pruned[-1] == total // 2


def test_a_report_and_a_card_tell_the_masks(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    ok("apply", dense, "nofm", "--set", "n=3", "-o", tmp_path / "first", "-q")
    said = ok("apply", dense, "nofm", "--within", tmp_path / "first", "-o", tmp_path / "second", "--json")
    report = valid(said.out, "report")
    assert report["within"] == str(tmp_path / "first")
    assert "within" not in json.loads((tmp_path / "first/sparseprune/report.json").read_text())
    assert "--within first" in (tmp_path / "second/README.md").read_text()
    assert f"--within {tmp_path / 'first'}\n" in (tmp_path / "second/sparseprune/spec.toml").read_text()
    masks = ok("mask", dense, "nofm", "--within", tmp_path / "first", "-o", tmp_path / "masks", "-q")
    assert masks.err == ""
    found, wanted = (sparseprune.load_masks(tmp_path / one) for one in ("masks", "second"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_tensors_that_no_rule_reaches_are_told(tmp_path: Path) -> None:
    dense = write(tmp_path / "dense", decoder(), LLAMA)
    ok("apply", dense, "2of4", "-o", tmp_path / "first", "-q")
    words = ("apply", tmp_path / "first", "mlp-channels", "--within", tmp_path / "first")
    said = ok(*words, "-o", tmp_path / "second")
    assert "--within: no rule reaches model.layers.0.self_attn." in said.err
    assert run(*words, "-o", tmp_path / "third", "--strict").code == 2


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ('reconstruct = { file = "stats.safetensors" }', "[scope.all] rebuilds weights"),
        ("permute = true", "[scope.all] permutes"),
    ],
)
def test_what_would_bring_pruned_weights_back_is_refused(tmp_path: Path, more: str, says: str) -> None:
    dense = written(tmp_path / "dense", few_numbers(0))
    moments = {name: torch.eye(shape[1]) for name, shape in SHAPES.items()}
    save_file(moments, tmp_path / "stats.safetensors")
    save_file({name: torch.ones(shape) for name, shape in SHAPES.items()}, tmp_path / "masks.safetensors")
    (tmp_path / "spec.toml").write_text(f"version = 1\n{one('[1, 1]', '[1, 2]')}nnz = 1\n{more}\n")
    said = refused("apply", dense, tmp_path / "spec.toml", "--within", tmp_path / "masks.safetensors")
    assert says in said.err
    assert "leave --within or that out" in said.err


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dense = written(tmp_path / "dense", few_numbers(0))
    (tmp_path / "spec.toml").write_text(f"version = 1\n{one('[1, 1]', '[1, 2]')}nnz = 1\n")
    save_file({"gate.weight": torch.ones(2, 2, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    said = refused("apply", dense, tmp_path / "spec.toml", "--within", tmp_path / "masks.safetensors")
    assert "has the shape [2, 2], the tensor" in said.err
    said = refused("apply", dense, tmp_path / "spec.toml", "--within", dense)
    assert "wanted a mask" in said.err or "give a mask file" in said.err
