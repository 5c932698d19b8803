"""Nested scopes through every command: each level decides among what the one before it keeps."""

import json
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.engine.grids import surviving
from sparseprune.execution import passes, tiles, torch_tiles
from tests import oracle
from tests.cli.test_within import (
    SHAPES,
    STRUCTURES,
    Tensors,
    coupled,
    elements,
    few_numbers,
    subset,
    written,
)
from tests.commands import ok, refused, run, silent, valid
from tests.execution.structures import FLOATS, INTEGERS
from tests.limits import force, narrow
from tests.samples import unmarked

Levels = list[tuple[str, str]]  # the names of structures, outer ones first, and their budgets
PAIRS = [(outer, inner) for outer, inner in product(STRUCTURES, STRUCTURES) if outer != inner]
SOME = {
    "v:n:m": [("2:3 down the columns", "nnz = 1"), ("3:4, 2:4, 1:4", "nnz = 2")],
    "n:m in channels": [("coupled channels", "nnz = 4"), ("3:4, 2:4, 1:4", "nnz = 2")],
    "weights in channels": [("coupled channels", "sparsity = 0.3"), ("all weights", "sparsity = 0.5")],
    "three levels": [
        ("coupled channels", "nnz = 5"),
        ("pairs", "nnz = 14"),
        ("weights of each row", "sparsity = 0.4\nmultiple_of = 2"),
    ],
}


def spec_of(levels: Levels, more: str = "") -> str:
    """Rules "l0", "l1", ..., each within the one before it."""
    heads, text, outer = [f"version = 1\n{more}\n"], "", ""
    for number, (name, budget) in enumerate(levels):
        rule, own = "\n" + STRUCTURES[name][0], f"l{number}"
        for old in ("block.gate", "block.up", "block.down", "block_coupling.channel", "scope.each"):
            kind, _, word = old.partition(".")
            rule = rule.replace(old, f"{kind}.{own}{word}").replace(f'"{word}"', f'"{own}{word}"')
        head, bracket, table = rule.partition("\n[scope")
        heads.append(head)
        text += f"{bracket}{table}".replace(".all]", f".{own}]") + f"{budget}\n{outer}\n"
        outer = f'within = "{own}"'
    return "\n".join([*heads, text])


def budget_of(text: str) -> Callable[[int], int]:
    """How many survive of so many blocks that are left."""
    given = dict(line.split(" = ") for line in text.splitlines())
    unit = int(given.get("multiple_of", 1))
    if "nnz" in given:
        return lambda left: min(left, int(given["nnz"]))
    return lambda left: min(left, -(-surviving(float(given["sparsity"]), left) // unit) * unit)


def expected(levels: Levels, numbers: Tensors) -> list[Tensors]:
    """The masks after each level, in plain loops."""
    kept: Tensors = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    found = []
    for name, budget in levels:
        kept = dict(kept)
        for names, structure in coupled(name):
            among = [flags(kept[each]) for each in names]
            masks = oracle.masks_among(
                structure, [elements(numbers[each]) for each in names], among, budget_of(budget)
            )
            for each, mask in zip(names, masks, strict=True):
                kept[each] = torch.tensor([mask[index] for index in sorted(mask)]).reshape(SHAPES[each])
        found.append(kept)
    return found


def flags(mask: torch.Tensor) -> dict[oracle.Index, bool]:
    return {index: bool(mask[index]) for index in product(*map(range, mask.shape))}


def reached(levels: Iterable[tuple[str, str]]) -> set[str]:
    return {each for name, _ in levels for names, _ in coupled(name) for each in names}


def applied(tmp_path: Path, levels: Levels, numbers: Tensors, *words: object) -> tuple[Tensors, Tensors]:
    """Masks and weights of an output."""
    if not (tmp_path / "in").exists():
        written(tmp_path / "in", numbers)
    (tmp_path / "spec.toml").write_text(spec_of(levels))
    out = tmp_path / "out"
    silent("apply", tmp_path / "in", tmp_path / "spec.toml", "-o", out, "-q", "--force", *words)
    return sparseprune.load_masks(out), load_file(out / "model.safetensors")


def assert_as_loops(levels: Levels, numbers: Tensors, found: tuple[Tensors, Tensors]) -> None:
    masks, weights = found
    wanted = expected(levels, {name: one.to(torch.float64) for name, one in numbers.items()})[-1]
    assert masks.keys() == reached(levels)
    assert all(torch.equal(masks[name], wanted[name]) for name in masks)
    for name, one in weights.items():
        assert torch.equal(one, numbers[name].where(wanted[name], torch.zeros_like(numbers[name])))


@pytest.mark.parametrize(("outer", "inner"), PAIRS)
def test_two_levels_of_any_structures_are_what_plain_loops_keep(
    tmp_path: Path, outer: str, inner: str
) -> None:
    numbers = few_numbers(len(outer) + len(inner))
    levels = [(outer, f"nnz = {STRUCTURES[outer][1][0]}"), (inner, f"nnz = {STRUCTURES[inner][1][1]}")]
    assert_as_loops(levels, numbers, applied(tmp_path, levels, numbers))
    silent("verify", tmp_path / "out", tmp_path / "spec.toml", "-q")
    silent("verify", tmp_path / "out", "-q")
    alone, _ = applied(tmp_path, levels[:1], numbers)
    assert subset(expected(levels, numbers)[-1], {**expected(levels[:1], numbers)[-1], **alone})


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("way", ["", "torch_in_memory", "torch_out_of_core"])
def test_shares_are_of_what_is_left_in_every_way(tmp_path: Path, name: str, way: str) -> None:
    numbers = few_numbers(7)
    with pytest.MonkeyPatch.context() as patch:
        if way:
            narrow(patch, 64, 16)
            force(patch, way)
        assert_as_loops(SOME[name], numbers, applied(tmp_path, SOME[name], numbers))
    silent("verify", tmp_path / "out", tmp_path / "spec.toml", "-q")


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
@pytest.mark.parametrize("name", ["v:n:m", "n:m in channels"])
def test_every_dtype_is_nested(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    numbers = {each: one.to(dtype) for each, one in few_numbers(3).items()}
    assert_as_loops(SOME[name], numbers, applied(tmp_path, SOME[name], numbers))


@pytest.mark.parametrize("outer", [0, 2, 4])
@pytest.mark.parametrize("inner", [0, 2, 3])
def test_budgets_of_none_and_of_all_are_budgets(tmp_path: Path, outer: int, inner: int) -> None:
    levels = [("3:4, 2:4, 1:4", f"nnz = {outer}"), ("2:3 down the columns", f"nnz = {inner}")]
    numbers = few_numbers(5)
    (tmp_path / "alone").mkdir()
    found = applied(tmp_path, levels, numbers)
    assert_as_loops(levels, numbers, found)
    if outer == 4:  # one level is the scope that it would be without the other
        plain = [("2:3 down the columns", f"nnz = {inner}")]
        alone, _ = applied(tmp_path / "alone", plain, numbers)
        assert all(torch.equal(found[0][name], mask) for name, mask in alone.items())


def test_the_masks_alone_are_the_same(tmp_path: Path) -> None:
    numbers = few_numbers(2)
    masks, _ = applied(tmp_path, SOME["three levels"], numbers)
    silent("mask", tmp_path / "in", tmp_path / "spec.toml", "-o", tmp_path / "masks", "-q")
    alone = sparseprune.load_masks(tmp_path / "masks")
    assert alone.keys() == masks.keys()
    assert all(torch.equal(masks[name], mask) for name, mask in alone.items())
    silent("reapply", tmp_path / "in", tmp_path / "masks", "-o", tmp_path / "again", "-q")
    again, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "out"))
    assert unmarked(again) == unmarked(out)


def test_nothing_of_the_levels_stays_beside_the_output(tmp_path: Path) -> None:
    applied(tmp_path, SOME["three levels"], few_numbers(2))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "out", "spec.toml"]


def test_masks_of_an_earlier_step_hold_for_all_levels(tmp_path: Path) -> None:
    numbers = few_numbers(4)
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.rand(shape, generator=generator) < 0.7 for name, shape in SHAPES.items()}
    save_file(drawn, tmp_path / "masks.safetensors")
    levels = SOME["n:m in channels"]
    masks, weights = applied(tmp_path, levels, numbers, "--within", tmp_path / "masks.safetensors")
    kept = dict(drawn)
    for name, budget in levels:
        for names, structure in coupled(name):
            among = [flags(kept[each]) for each in names]
            own = [elements(numbers[each]) for each in names]
            found = oracle.masks_among(structure, own, among, budget_of(budget))
            for each, mask in zip(names, found, strict=True):
                kept[each] = torch.tensor([mask[index] for index in sorted(mask)]).reshape(SHAPES[each])
    assert all(torch.equal(masks[name], kept[name]) for name in masks)
    assert all(torch.equal(one, numbers[name].where(kept[name], 0)) for name, one in weights.items())


def test_results_tell_what_each_level_drops(tmp_path: Path) -> None:
    levels, numbers = SOME["n:m in channels"], few_numbers(6)
    written(tmp_path / "in", numbers)
    (tmp_path / "spec.toml").write_text(spec_of(levels))
    words = (tmp_path / "in", tmp_path / "spec.toml")
    plan = valid(ok("plan", *words, "--json").out, "plan")
    assert [rule.get("within") for rule in plan["rules"]] == [None, "scope.l0"]
    report = valid(ok("apply", *words, "-o", tmp_path / "out", "--json").out, "report")
    masks = expected(levels, numbers)
    dropped = [{name: int((~mask).sum()) for name, mask in each.items()} for each in masks]
    rules = {rule["name"]: rule for rule in report["rules"]}
    assert rules["scope.l0"]["pruned"] == sum(dropped[0].values())
    assert rules["scope.l1"]["pruned"] == sum(dropped[1][name] for name in reached(levels[1:]))
    assert rules["scope.l1"]["within"] == "scope.l0"
    assert report["totals"]["pruned"] == sum(dropped[1].values())
    assert {one["name"]: one["pruned"] for one in report["tensors"]} == dropped[1]
    for one in report["tensors"]:
        assert one["zeros_before"] == int((numbers[one["name"]] == 0).sum())
    written_report = json.loads((tmp_path / "out/sparseprune/report.json").read_text())
    assert written_report["totals"] == report["totals"]


@pytest.mark.parametrize("names", [["3:4, 2:4, 1:4", "rows"], ["rows", "3:4, 2:4, 1:4"]], ids=str)
def test_what_an_inner_rule_alone_reaches_is_not_left_alone(tmp_path: Path, names: list[str]) -> None:
    written(tmp_path / "in", few_numbers(6))
    (tmp_path / "spec.toml").write_text(spec_of([(name, "nnz = 2") for name in names]))
    words = (tmp_path / "in", tmp_path / "spec.toml")
    assert "left alone 0 of 3 tensors, 0 parameters" in ok("apply", *words, "-o", tmp_path / "out").err
    totals = json.loads((tmp_path / "out/sparseprune/report.json").read_text())["totals"]
    plan = json.loads(ok("plan", *words, "--json").out)["totals"]
    assert totals["covered"] == plan["covered"] == totals["numel"]


def test_a_level_that_is_broken_is_found(tmp_path: Path) -> None:
    levels, numbers = SOME["v:n:m"], few_numbers(8)
    numbers = {name: one + 20 for name, one in numbers.items()}
    masks, weights = applied(tmp_path, levels, numbers)
    broken = {name: one.clone() for name, one in weights.items()}
    broken["up.weight"] = numbers["up.weight"].where(masks["up.weight"] | (torch.arange(12) % 4 == 3), 0)
    save_file(broken, tmp_path / "out/model.safetensors")
    said = run("verify", tmp_path / "out", tmp_path / "spec.toml")
    assert said.code == 1
    assert "scope.l0" in said.out


def test_a_run_that_was_killed_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two levels, and in the last one: the bytes are those of a run that was not."""
    levels, numbers = SOME["three levels"], few_numbers(9)
    applied(tmp_path, levels, numbers)
    wanted = (tmp_path / "out/model.safetensors").read_bytes()
    words = (tmp_path / "in", tmp_path / "spec.toml", "-o", tmp_path / "killed", "-q", "--jobs", "1")
    cut: Any = passes.finish
    count = 0

    def killed(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count in (1, 3, 4, 6):
            raise KeyboardInterrupt
        return cut(*given)

    for module in (tiles, torch_tiles):
        monkeypatch.setattr(module, "finish", killed)
    codes = []
    for _ in range(8):
        codes.append(run("apply", *words).code)
        if codes[-1] == 0:
            break
    assert len(codes) > 2
    assert codes[-1] == 0
    assert (tmp_path / "killed/model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("command", ["apply", "plan"])
def test_permuting_beside_nested_scopes_is_refused(tmp_path: Path, command: str) -> None:
    written(tmp_path / "in", few_numbers(0))
    text = spec_of(SOME["v:n:m"]).replace("nnz = 2\n", "nnz = 2\npermute = true\n")
    (tmp_path / "spec.toml").write_text(text)
    assert "permute" in refused(command, tmp_path / "in", tmp_path / "spec.toml").err
