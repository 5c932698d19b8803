"""Checkpoints of codes by every command, against plain loops over the weights that the codes stand for."""

import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.commands import ok, refused, run, valid
from tests.execution.structures import one
from tests.limits import WAYS, force, narrow
from tests.quantized import (
    E4M3,
    LAYOUTS,
    PACKED,
    UNKNOWN,
    Coded,
    coded,
    draw,
    floats,
    integers,
    scales,
    write,
)

MATRIX, STACK = "{name}.weight", "{name:**}.gate_up_proj"
# Block and scope of matrices, and the survivors of a scope; of stacks the same behind the first dimension.
STRUCTURES: dict[str, tuple[str, str, int]] = {
    "2:4": ("1, 1", "1, 4", 2),
    "columns": ("1, 1", "-1, 1", 3),
    "whole": ("1, 1", "-1, -1", 40),
    "rows": ("1, -1", "-1, -1", 3),
    "blocks": ("2, 4", "-1, 1", 1),
    "none": ("1, 1", "1, 4", 0),
    "all": ("1, 1", "1, 4", 4),
}


def spec_of(found: Coded, structure: str) -> str:
    (weights,) = found.weights.values()
    block, shape, nnz = STRUCTURES[structure]
    front = "1, " if weights.ndim == 3 else ""
    pattern = STACK if weights.ndim == 3 else MATRIX
    return one(f"[{front}{block}]", f"[{front}{shape}]", f"nnz = {nnz}", pattern)


def kept_by_loops(weights: torch.Tensor, structure: str) -> torch.Tensor:
    """Which elements survive: of blocks with equal norms the first ones."""
    mask = torch.zeros(weights.shape, dtype=torch.bool)
    for matrix, kept in zip(
        weights.reshape(-1, *weights.shape[-2:]), mask.reshape(-1, *mask.shape[-2:]), strict=True
    ):
        block, shape, nnz = STRUCTURES[structure]
        extent = [
            size if edge == -1 else edge for size, edge in zip(matrix.shape, numbers(block), strict=True)
        ]
        grid = [size // edge for size, edge in zip(matrix.shape, extent, strict=True)]
        scope = [size if edge == -1 else edge for size, edge in zip(grid, numbers(shape), strict=True)]
        for first in product(*(range(0, size, edge) for size, edge in zip(grid, scope, strict=True))):
            blocks = []
            for inner in product(*map(range, scope)):
                begin = [(at + step) * edge for at, step, edge in zip(first, inner, extent, strict=True)]
                part = tuple(slice(at, at + edge) for at, edge in zip(begin, extent, strict=True))
                blocks.append((sum(Fraction(float(x)) ** 2 for x in matrix[part].flatten()), part))
            for _, part in sorted(blocks, key=lambda one: -one[0])[:nnz]:
                kept[part] = True
    return mask


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def fits(found: Coded, structure: str) -> bool:
    """Whether its blocks and scopes divide the matrices."""
    (weights,) = found.weights.values()
    return weights.shape[-1] % 4 == 0 and weights.shape[-2] % 2 == 0


def expected(found: Coded, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The stored tensors with the code of zero where a mask drops an element."""
    (name,) = found.weights
    return {**found.stored, name: torch.where(mask, bits(found.stored[name]), bits(found.zeros[name]))}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.element_size() == 1 else tensor


def same(tensors: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() == wanted.keys() and all(
        torch.equal(bits(tensors[name]), bits(wanted[name])) for name in wanted
    )


def spec_at(folder: Path, text: str) -> Path:
    path = folder / "spec.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_ranks_the_weights_and_writes_the_code_of_zero(
    tmp_path: Path, layout: str, structure: str
) -> None:
    found = LAYOUTS[layout]()
    assert fits(found, structure)
    path, spec = write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, structure))
    (name,) = found.weights
    weights, zero = found.weights[name], bits(found.zeros[name])
    mask = kept_by_loops(weights, structure)
    wanted = expected(found, mask)
    report = valid(ok("apply", path, spec, "--json", "-q").out, "report")
    assert same(load_file(tmp_path / "m-pruned" / "model.safetensors"), wanted)
    (told,) = report["tensors"]
    assert told["pruned"] == int((~mask).sum())
    assert told["zeros_after"] == int((wanted[name] == zero).sum()) - negative_zeros(wanted[name], found)
    left = torch.where(mask, weights, 0.0)
    assert told["energy_kept"] == pytest.approx(float((left**2).sum() / (weights**2).sum()), rel=1e-12)
    ok("verify", tmp_path / "m-pruned", spec, "-q")
    assert run("verify", path, spec, "-q").code == (0 if structure == "all" else 1)


def negative_zeros(codes: torch.Tensor, found: Coded) -> int:
    """Zeros of floats that the plain comparison of bits misses, as a number below 0."""
    (name,) = found.weights
    return -int((codes == 0x80).sum()) if found.stored[name].is_floating_point() else 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("structure", ["2:4", "whole", "rows", "blocks"])
@pytest.mark.parametrize(
    "layout",
    [
        "fp8, blocks cut at the edges",
        "fp8, a stack with blocks",
        "int8, zero points of groups",
        "uint8, zero points of rows",
    ],
)
def test_every_way_of_working_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, structure: str, way: str
) -> None:
    found = LAYOUTS[layout]()
    path, spec = write(tmp_path / "m", found, shards=True), spec_at(tmp_path, spec_of(found, structure))
    force(monkeypatch, way)
    narrow(monkeypatch, 64, 32)
    (weights,) = found.weights.values()
    ok("apply", path, spec, "-q")
    files = sorted((tmp_path / "m-pruned").glob("*.safetensors"))
    written = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert same(written, expected(found, kept_by_loops(weights, structure)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_counts_codes_that_stand_for_zero(tmp_path: Path, layout: str) -> None:
    found = LAYOUTS[layout]()
    (name,) = found.weights
    pruned = kept_by_loops(found.weights[name], "2:4")
    path = write(tmp_path / "m", Coded(as_stored(expected(found, pruned), found), config=found.config))
    document = valid(ok("inspect", path, "--json").out, "inspect")
    (told,) = [one for one in document["tensors"] if one["name"] == name]
    alive = (found.weights[name] != 0) & pruned
    assert (told["zeros"], told["holds"]) == (int((~alive).sum()), "codes")
    assert "2:4" in told["patterns"]


def as_stored(tensors: dict[str, torch.Tensor], found: Coded) -> dict[str, torch.Tensor]:
    return {name: tensor.view(found.stored[name].dtype) for name, tensor in tensors.items()}


def test_inspect_counts_zero_points_in_pieces_of_large_tensors_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseprune.execution import inspect

    found = LAYOUTS["int8, zero points of groups"]()
    path = write(
        tmp_path / "m",
        Coded(as_stored(expected(found, kept_by_loops(found.weights["a.weight"], "2:4")), found)),
    )
    whole = json.loads(ok("inspect", path, "--json").out)["tensors"]
    monkeypatch.setattr(inspect.inspect_checkpoint, "__defaults__", (24,))
    assert json.loads(ok("inspect", path, "--json").out)["tensors"] == whole


def test_totals_groups_and_requirements_leave_out_what_lies_beside_codes(tmp_path: Path) -> None:
    found = LAYOUTS["int8, zero points of groups"]()
    mask = kept_by_loops(found.weights["a.weight"], "2:4")
    tensors = as_stored(expected(found, mask), found)
    path = write(tmp_path / "m", Coded({**tensors, "b.weight": torch.ones(8, 16)}))
    document = json.loads(ok("inspect", path, "--json", "--by", "module", "--for", "torch-cutlass").out)
    zeros = int(((found.weights["a.weight"] == 0) | ~mask).sum())
    totals = document["totals"]
    assert (totals["tensors"], totals["numel"], totals["pruned"]) == (4, 256, zeros)
    assert (totals["matrices"], totals["runtimes"]["torch-cutlass"]["of"]) == (2, 2)
    (group,) = [one for one in document["groups"] if one["name"] == "a"]
    assert (group["tensors"], group["numel"], group["zeros"]) == (3, 128, zeros)
    ok("inspect", path, "--require", "2:4 in a.*")
    assert run("inspect", path, "--require", "2:4").code == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reapply_puts_the_code_of_zero_back_where_masks_drop(tmp_path: Path, layout: str) -> None:
    found = LAYOUTS[layout]()
    (name,) = found.weights
    path, spec = write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "2:4"))
    ok("apply", path, spec, "-q")
    mask = kept_by_loops(found.weights[name], "2:4")
    assert run("verify", path, "--masks", tmp_path / "m-pruned", "-q").code == 1
    document = valid(
        ok("reapply", path, tmp_path / "m-pruned", "-o", tmp_path / "again", "--json", "-q").out, "reapply"
    )
    assert same(load_file(tmp_path / "again" / "model.safetensors"), expected(found, mask))
    assert document["tensors"][0]["lost"] == int(((found.weights[name] != 0) & ~mask).sum())
    ok("verify", tmp_path / "again", "--masks", tmp_path / "m-pruned", "-q")


@pytest.mark.parametrize("layout", ["int8, zero points of groups", "uint8, zero points of rows", "mxfp8"])
def test_reapply_takes_the_zeros_of_codes_for_masks(tmp_path: Path, layout: str) -> None:
    found = LAYOUTS[layout]()
    mask = kept_by_loops(found.weights["a.weight"], "2:4")
    path = write(tmp_path / "m", found)
    sparse = write(tmp_path / "s", Coded(as_stored(expected(found, mask), found)))
    ok("reapply", path, "--zeros-of", sparse, "-o", tmp_path / "again", "-q")
    assert same(load_file(tmp_path / "again" / "model.safetensors"), expected(found, mask))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compare_tells_energies_of_weights(tmp_path: Path, layout: str) -> None:
    found = LAYOUTS[layout]()
    (name,) = found.weights
    path, spec = write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "rows"))
    ok("apply", path, spec, "-q")
    document = valid(ok("compare", path, tmp_path / "m-pruned", "--json").out, "compare")
    (told,) = [one for one in document["tensors"] if one["name"] == name]
    weights = found.weights[name]
    after = torch.where(kept_by_loops(weights, "rows"), weights, 0.0)
    lost = float(((weights - after) ** 2).sum())
    assert told["energy_kept"] == pytest.approx(float((after**2).sum() / (weights**2).sum()), rel=1e-12)
    assert told["relative_error"] == pytest.approx(math.sqrt(lost / float((weights**2).sum())), rel=1e-12)
    assert told["largest_change"] == pytest.approx(float((weights - after).abs().max()), rel=1e-12)
    assert told["zeroed"] == int(((weights != 0) & (after == 0)).sum())
    assert (told["altered"], told["holds"]) == (0, "codes")


def test_compare_finds_no_change_where_codes_and_scales_changed_together(tmp_path: Path) -> None:
    codes = integers((8, 16), low=-60, high=60)
    one_way = write(tmp_path / "a", coded("a.weight", codes, torch.ones(8, 1), (1, 16)))
    other = write(tmp_path / "b", coded("a.weight", codes * 2, torch.full((8, 1), 0.5), (1, 16)))
    document = json.loads(ok("compare", one_way, other, "--json", "--match", "a.weight").out)
    assert document["tensors"][0]["changed"] == 0


def test_compare_sees_a_dense_checkpoint_beside_its_codes(tmp_path: Path) -> None:
    found = LAYOUTS["fp8, blocks cut at the edges"]()
    (name,) = found.weights
    dense = write(tmp_path / "dense", Coded({name: found.weights[name].to(torch.float64)}))
    document = json.loads(ok("compare", dense, write(tmp_path / "codes", found), "--json").out)
    assert document["tensors"][0]["relative_error"] == 0


def test_tensors_of_unlike_scales_compete_by_their_weights(tmp_path: Path) -> None:
    small = coded("0.weight", floats((8, 16)), torch.tensor(1e-3), (8, 16))
    large = coded("1.weight", floats((8, 16), 5), torch.tensor(1.0), (8, 16))
    plain = {"2.weight": torch.randn(8, 16, generator=draw(9)).to(torch.bfloat16) * 20}
    path = write(tmp_path / "m", Coded({**small.stored, **large.stored, **plain}))
    text = """
version = 1
scope.each = { tensors = "{name}.weight", block = [1, 1], shape = [-1, -1] }
[scope_coupling.all]
scopes = ["each"]
across = "all"
nnz = 150
"""
    weights = torch.stack([small.weights["0.weight"], large.weights["1.weight"], plain["2.weight"].double()])
    ok("apply", path, spec_at(tmp_path, text), "-q")
    kept = kept_flat(weights.flatten(), 150).reshape(weights.shape)
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    for at, name in enumerate(("0.weight", "1.weight", "2.weight")):
        assert torch.equal(written[name].double() != 0, kept[at] & (weights[at] != 0))
    assert not kept[0].any()


def kept_flat(weights: torch.Tensor, nnz: int) -> torch.Tensor:
    order = sorted(range(len(weights)), key=lambda at: (-abs(float(weights[at])), at))
    mask = torch.zeros(len(weights), dtype=torch.bool)
    mask[order[:nnz]] = True
    return mask


def test_an_expert_of_a_large_scale_is_not_dropped(tmp_path: Path) -> None:
    codes = floats((4, 8, 16))
    scale = torch.tensor([1.0, 1000.0, 1.0, 1.0])
    codes[1] = (codes[1].float() / 16).to(E4M3)
    path = write(tmp_path / "m", coded("l.gate_up_proj", codes, scale, (1, 8, 16)))
    spec = spec_at(tmp_path, one("[1, -1, -1]", "[-1, -1, -1]", "nnz = 1", STACK))
    ok("apply", path, spec, "-q")
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")["l.gate_up_proj"].float()
    assert [bool(expert.any()) for expert in written] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-120, 120])
def test_norms_of_very_large_and_small_scales_neither_vanish_nor_overflow(
    tmp_path: Path, dtype: torch.dtype, exponent: int
) -> None:
    grid = (scales((8, 1)).double() * 2.0 ** (exponent * (1 if dtype == torch.float32 else 7))).to(dtype)
    found = coded("a.weight", floats((8, 16)), grid, (1, 16))
    path, spec = write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "rows"))
    ok("apply", path, spec, "-q")
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    assert same(written, expected(found, kept_by_loops(found.weights["a.weight"], "rows")))


def test_ties_of_weights_go_to_the_lower_index(tmp_path: Path) -> None:
    codes = torch.tensor([[8, 4, 2, 1] * 2], dtype=torch.int8)
    scale = torch.tensor([[1.0, 2.0, 4.0, 8.0] * 2])
    path = write(tmp_path / "m", coded("a.weight", codes, scale, (1, 1)))
    ok("apply", path, spec_at(tmp_path, one("[1, 1]", "[1, -1]", "nnz = 3")), "-q")
    assert load_file(tmp_path / "m-pruned" / "model.safetensors")["a.weight"].tolist() == [
        [8, 4, 2, 0, 0, 0, 0, 0]
    ]


def test_a_threshold_is_one_of_weights(tmp_path: Path) -> None:
    found = LAYOUTS["int8, zero points of rows"]()
    path = write(tmp_path / "m", found)
    weights = found.weights["a.weight"]
    limit = float(weights.abs().flatten().kthvalue(50).values)
    spec = spec_at(tmp_path, one("[1, 1]", "[1, 1]", f"threshold = {limit!r}"))
    ok("apply", path, spec, "-q")
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    assert same(written, expected(found, weights.abs() >= limit))
    ok("verify", tmp_path / "m-pruned", spec, "-q")


def test_statistics_of_inputs_weigh_weights_and_not_codes(tmp_path: Path) -> None:
    found = LAYOUTS["fp8, scales of rows"]()
    norms = torch.rand(16, generator=draw(4)) + 0.1
    stats = tmp_path / "stats.safetensors"
    save_file({"a.weight": norms}, stats)
    score = f'score = {{ kind = "wanda", file = "{stats}" }}'
    text = one("[1, 1]", "[-1, 1]", f"nnz = 3\n{score}")
    ok("apply", write(tmp_path / "m", found), spec_at(tmp_path, text), "-q")
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    assert same(
        written, expected(found, kept_by_loops(found.weights["a.weight"] * norms.double(), "columns"))
    )


@pytest.mark.parametrize("jobs", [1, 2])
def test_bytes_do_not_depend_on_jobs(tmp_path: Path, jobs: int) -> None:
    found = LAYOUTS["int8, zero points of groups"]()
    path, spec = write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "whole"))
    ok("apply", path, spec, "-q", "--jobs", jobs)
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    assert same(written, expected(found, kept_by_loops(found.weights["a.weight"], "whole")))


def test_what_no_rule_reaches_of_codes_is_left_as_it_is(tmp_path: Path) -> None:
    found = LAYOUTS["int8, zero points of groups"]()
    text = one("[1, 1]", "[1, 4]", 'nnz = 2\nslice = ["2:5", ":"]')
    ok("apply", write(tmp_path / "m", found), spec_at(tmp_path, text), "-q")
    mask = kept_by_loops(found.weights["a.weight"], "2:4")
    mask[:2], mask[5:] = True, True
    assert same(load_file(tmp_path / "m-pruned" / "model.safetensors"), expected(found, mask))


def test_scales_are_no_weights_that_a_rule_may_reach(tmp_path: Path) -> None:
    path = write(tmp_path / "m", LAYOUTS["fp8, blocks cut at the edges"]())
    plan = json.loads(
        ok("plan", path, spec_at(tmp_path, one("[1, 1]", "[1, 4]", "nnz = 2", "**")), "--json").out
    )
    assert plan["rules"][0]["tensors"] == 1


# -- numbers that are none -----------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "infinity")])
@pytest.mark.parametrize("structure", ["2:4", "rows"])
def test_a_scale_that_is_not_finite_ends_the_run_by_its_name(
    tmp_path: Path, structure: str, value: float, word: str
) -> None:
    found = LAYOUTS["fp8, scales of rows"]()
    found.stored["a.weight_scale"][3] = value
    said = refused("apply", write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, structure)), "-q")
    assert f"a.weight_scale: there is {word} among the scales of a.weight" in said.err
    assert not (tmp_path / "m-pruned").exists()


def test_a_scale_of_zero_makes_weights_that_are_zero(tmp_path: Path) -> None:
    found = coded("a.weight", floats((8, 16)), torch.tensor([[0.0], *[[1.0]] * 7]), (1, 16))
    path = write(tmp_path / "m", found)
    ok("apply", path, spec_at(tmp_path, spec_of(found, "rows")), "-q")
    written = load_file(tmp_path / "m-pruned" / "model.safetensors")
    assert same(written, expected(found, kept_by_loops(found.weights["a.weight"], "rows")))
    assert not written["a.weight"][0].float().any()


def test_a_code_that_is_nan_ends_the_run_with_its_place(tmp_path: Path) -> None:
    found = LAYOUTS["fp8, blocks cut at the edges"]()
    found.stored["a.weight"][3, 5] = math.nan
    said = refused("apply", write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "whole")), "-q")
    assert "a.weight: NaN at [3, 5]" in said.err


def test_a_zero_point_that_is_no_code_ends_the_run_by_its_name(tmp_path: Path) -> None:
    found = LAYOUTS["int8, zero points of rows"]()
    found.stored["a.weight_zero_point"] = torch.full((8, 1), 200, dtype=torch.int32)
    said = refused("apply", write(tmp_path / "m", found), spec_at(tmp_path, spec_of(found, "2:4")), "-q")
    assert "a.weight_zero_point: a zero point is 200, which is no code of a.weight" in said.err


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*PACKED, *UNKNOWN])
@pytest.mark.parametrize("command", ["apply", "mask", "plan", "verify"])
def test_codes_that_are_not_understood_are_refused_by_name(tmp_path: Path, layout: str, command: str) -> None:
    make, line = {**PACKED, **UNKNOWN}[layout]
    found = make()
    path = write(tmp_path / "m", found)
    name = line.partition(" holds")[0]
    rank = found.stored[name].ndim
    block, shape = f"[{', '.join('1' * rank)}]", f"[{', '.join(['-1'] * rank)}]"
    spec = spec_at(tmp_path, one(block, shape, "nnz = 1", name))
    if command == "verify" and layout in UNKNOWN and "zero points" not in layout:
        assert run(command, path, spec, "-q").code == 1  # a zero is code 0, whatever the scale
        return
    said = refused(command, path, spec)
    assert f"[scope.all] {line}" in said.err
    assert said.err.endswith(": dequantize the checkpoint first\n")
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("layout", PACKED)
def test_packed_codes_are_not_counted(tmp_path: Path, layout: str) -> None:
    make, line = PACKED[layout]
    found = make()
    found.stored["norm"] = torch.tensor([1.0, 0.0])
    name = line.partition(" holds")[0]
    path = write(tmp_path / "m", found)
    document = valid(ok("inspect", path, "--json").out, "inspect")
    (told,) = [one for one in document["tensors"] if one["name"] == name]
    assert (told["zeros"], told["holds"]) == (None, "packed")
    assert (document["totals"]["numel"], document["totals"]["pruned"]) == (2, 1)
    assert {one["name"] for one in document["tensors"] if one["holds"] == "beside"} == {*found.stored} - {
        name,
        "norm",
    }
    assert "packed, not counted: 1 tensor of" in ok("inspect", path).out
    changed = found.stored[name].clone()
    changed.view(torch.uint8).view(-1)[0] += 1
    other = write(
        tmp_path / "n",
        Coded({**found.stored, name: changed}, config=found.config),
    )
    compared = valid(ok("compare", path, other, "--json").out, "compare")
    (told,) = [one for one in compared["tensors"] if one["name"] == name]
    assert (told["differs"], told["changed"], told["holds"]) == (True, None, "packed")
    assert compared["totals"]["zeros_after"] == 1
    assert "packed, not counted: 1 tensor" in ok("compare", path, other).out


@pytest.mark.parametrize("command", ["reapply", "verify"])
def test_masks_of_packed_codes_are_refused_by_name(tmp_path: Path, command: str) -> None:
    make, line = PACKED["gptq"]
    path = write(tmp_path / "m", make())
    save_file({"a.qweight": torch.zeros(2, 8, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    masks = tmp_path / "masks.safetensors"
    said = refused(command, path, *(["--masks"] if command == "verify" else []), masks)
    assert line in said.err


MORE = {
    'mode = "soft"\nthreshold = 1.0': "which cannot be shrunk",
    "nnz = 2\n[reconstruct]\nfile = 'stats.safetensors'": "which cannot be rebuilt",
}


@pytest.mark.parametrize("text", MORE)
def test_codes_are_neither_shrunk_nor_rebuilt(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "m", LAYOUTS["fp8, scales of rows"]())
    said = refused("apply", path, spec_at(tmp_path, one("[1, 1]", "[1, 4]", text)), "-q")
    assert f"a.weight holds FP8 codes (a.weight_scale lies beside it), {MORE[text]}" in said.err
    assert len(said.err.splitlines()) == 1


def test_random_scores_prune_codes_without_a_known_scale(tmp_path: Path) -> None:
    make, _ = UNKNOWN["scales of fused matrices"]
    found = make()
    spec = spec_at(tmp_path, one("[1, 1]", "[1, 4]", 'nnz = 2\nscore = { kind = "random" }'))
    ok("apply", write(tmp_path / "m", found), spec, "-q")
    written: Any = load_file(tmp_path / "m-pruned" / "model.safetensors")["a.weight"].float()
    assert ((written.reshape(-1, 4) != 0).sum(1) <= 2).all()
    ok("verify", tmp_path / "m-pruned", spec, "-q")
