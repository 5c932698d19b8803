"""All ways of working, however the work is cut, end in the bytes of the one that is always right."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.execution.plan import make_plan
from sparseprune.execution.schedule import make_schedule
from sparseprune.spec import parse_spec
from tests.commands import silent
from tests.execution.structures import CASES, FLOATS, INTEGERS
from tests.limits import AMPLE, WAYS, force, narrow

pytestmark = pytest.mark.usefixtures("untraced")

SMALL, TINY = (64, 48, 3), (1, 1, 1)


def applied(folder: Path, name: str, *options: object) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of an output but the report, and the report without what differs from run to run."""
    silent("apply", folder / "in", folder / "spec.toml", "-o", folder / name, "-q", *options)
    files = {
        str(path.relative_to(folder / name)): path.read_bytes()
        for path in (folder / name).rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    report = json.loads((folder / name / "sparseprune" / "report.json").read_text())
    for key in ("seconds", "output"):
        del report[key]
    for tensor in report["tensors"]:
        tensor["energy_kept"] = tensor["energy_kept"] and float(f"{tensor['energy_kept']:.9g}")
    return files, report


def prepare(folder: Path, spec: str, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "in").mkdir()
    save_file(tensors, folder / "in" / "model.safetensors")
    (folder / "spec.toml").write_text(spec)


def alike_in_all_ways(
    folder: Path, cut: tuple[int, int, int] = (64, 48, 1), ways: tuple[str, ...] = ()
) -> list[Any]:
    """How it was worked, each once, ending in the bytes of whole scopes in the engine."""
    with pytest.MonkeyPatch.context() as patch:
        force(patch, "torch_in_memory")
        reference = applied(folder, f"reference-{cut[0]}")
    slab, tile, jobs = cut
    worked: list[Any] = []
    for way in ways or quick_ways(folder):
        with pytest.MonkeyPatch.context() as patch:
            narrow(patch, slab, tile)
            force(patch, way)
            if (how := strategies(folder, jobs)) not in worked:
                worked.append(how)
                assert applied(folder, f"{way}-{slab}", "--jobs", jobs) == reference, (way, cut)
    return worked


def quick_ways(folder: Path) -> tuple[str, ...]:
    """All ways; of many scopes none that passes over the data for each of them."""
    plan = make_plan(open_checkpoint(folder / "in"), parse_spec((folder / "spec.toml").read_text()))
    scopes = sum(math.prod(task.instance.scope.grid_shape) for unit in plan.units for task in unit.tasks)
    return WAYS if scopes < 100 else WAYS[:-1]


def strategies(folder: Path, jobs: int) -> list[Any]:
    """How a run would be worked."""
    plan = make_plan(open_checkpoint(folder / "in"), parse_spec((folder / "spec.toml").read_text()))
    return [group.strategy for group in make_schedule(plan, AMPLE, jobs).groups]


@pytest.mark.parametrize("name", CASES)
def test_every_way_and_cut_gives_the_bytes_of_whole_scopes_in_the_engine(tmp_path: Path, name: str) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    number = list(CASES).index(name)
    alike_in_all_ways(tmp_path, SMALL, WAYS[number % 2 :: 2])  # the other ones within masks: test_ways_within
    if number % 2:
        alike_in_all_ways(tmp_path, TINY, (WAYS[number // 2 % len(WAYS)],))


DTYPES = (*FLOATS, *INTEGERS)
OF_ALL_DTYPES = (
    "2:4", "4:8", "whole rows", "over all tensors", "channels", "blocks along rows", "transposable 2:4",
)  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (dtype, OF_ALL_DTYPES[(2 * number + more) % len(OF_ALL_DTYPES)])
        for number, dtype in enumerate(DTYPES)
        for more in range(2)
    ],
    ids=str,
)
def test_every_dtype_is_pruned_alike_by_every_way(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(dtype))
    alike_in_all_ways(tmp_path, (64, 256 if "transposable" in spec else 48, 1))


@pytest.mark.parametrize("name", list(CASES)[::3])
def test_packed_masks_hold_the_bits_of_bool_masks(tmp_path: Path, name: str) -> None:
    from sparseprune import load_masks

    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    applied(tmp_path, "bool")
    plain = load_masks(tmp_path / "bool")
    with pytest.MonkeyPatch.context() as patch:
        narrow(patch, 26, 13)  # parts that share bytes
        applied(tmp_path, "packed", "--mask-format", "packed", "--jobs", 3)
    packed = load_masks(tmp_path / "packed")
    assert packed.keys() == plain.keys()
    assert all(torch.equal(packed[key], plain[key]) for key in plain)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("2:4", "Contiguous"),
        ("2:4 down the columns", "Strided"),
        ("blocks of 8x4 in rows", "Strided"),
        ("transposed", "Strided"),
        ("transposable 2:4", "Strided"),
        ("tiles of experts", "Strided"),
        ("whole rows", "Contiguous"),
        ("whole tensors", "RadixSelect"),
        ("over all tensors", "RadixSelect"),
        ("nothing is kept", "Contiguous"),
        ("a threshold over all", "Contiguous"),
        ("blocks along rows", "Contiguous"),
        ("channels", "BlockNorms"),
        ("experts", "BlockNorms"),
        ("random blocks", "BlockNorms"),
        ("soft", "Contiguous"),
        ("soft rows", "Contiguous"),
        ("soft blocks of 4x8", "Strided"),
        ("channels, soft", "TorchInMemory"),
        ("soft over all tensors", "TorchOutOfCore"),
    ],
)
def test_each_structure_is_worked_by_the_way_that_was_made_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    spec, tensors = CASES[name]
    prepare(tmp_path, spec, tensors(torch.bfloat16))
    slab = 16 if name in {"experts", "whole tensors"} else 64  # so that a scope has many slabs
    narrow(monkeypatch, slab, 16, memory=(16 if way == "TorchOutOfCore" else 128) << 10)
    plan = make_plan(open_checkpoint(tmp_path / "in"), parse_spec(spec))
    schedule = make_schedule(plan, AMPLE, 2)
    assert {type(group.strategy).__name__ for group in schedule.groups} == {way}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("2:4", "TorchInMemory"),
        ("whole rows", "TorchInMemory"),
        ("channels", "TorchInMemory"),
        ("over all tensors", "TorchOutOfCore"),
        ("rows over all tensors", "TorchOutOfCore"),
        ("a threshold over all", "TorchInMemory"),
        ("columns as blocks of a wide matrix", "BlockNorms"),
    ],
)
def test_a_device_gets_the_blocks_that_fit_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    spec, tensors = CASES.get(name, CASES["columns as blocks"])
    prepare(tmp_path, spec, tensors(torch.bfloat16) if name in CASES else {"w.weight": torch.ones(2048, 2)})
    spec = spec if name in CASES else spec.replace("nnz = 9", "nnz = 1")
    narrow(monkeypatch, 64, 16, memory=64 << 10)
    plan = make_plan(open_checkpoint(tmp_path / "in"), parse_spec(spec))
    schedule = make_schedule(plan, AMPLE, 2, device="cuda")
    assert {type(group.strategy).__name__ for group in schedule.groups} == {way}


def test_the_ways_have_the_order_of_the_choice() -> None:
    assert WAYS == (
        "contiguous", "strided", "radix_select", "block_norms", "torch_in_memory", "torch_out_of_core",
    )  # fmt: skip


PRUNING = {
    "2:4": ("[1, 1]", "[1, 4]", "nnz = 2"),
    "2:4 down the columns": ("[1, 1]", "[4, 1]", "nnz = 2"),
    "all elements": ("[1, 1]", "[-1, -1]", "sparsity = 0.5"),
    "nearly all elements": ("[1, 1]", "[-1, -1]", "nnz = 757"),
    "a threshold": ("[1, 1]", "[1, 4]", "threshold = 0.0"),
    "runs": ("[1, 4]", "[1, 2]", "nnz = 1"),
    "runs by threshold": ("[1, 4]", "[-1, -1]", "threshold = 1.5"),
    "tiles": ("[4, 8]", "[-1, -1]", "nnz = 20"),
    "columns": ("[-1, 1]", "[1, -1]", "nnz = 31"),
    "columns by maximum": ("[-1, 1]", "[1, -1]", "nnz = 9"),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, FLOATS[(number + more) % len(FLOATS)]) for number, name in enumerate(PRUNING) for more in (0, 3)],
    ids=str,
)
def test_what_is_not_finite_ranks_last_in_every_way(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    block, shape, budget = PRUNING[name]
    norm = ', norm = "inf"' if "maximum" in name else ""
    score = f'score = {{ kind = "magnitude", nonfinite = "prune"{norm} }}'
    table = f'tensors = "{{name}}"\nblock = {block}\nshape = {shape}\n{budget}\n{score}\n'
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    weight[torch.rand(24, 32) < 0.1] = 0.0
    weight.view(-1)[::71] = float("nan")
    weight[:2, 3:8] = float("nan")
    if dtype != torch.float8_e4m3fn:
        weight[20, 5:9] = float("-inf")
        weight[:, 30] = float("inf")
    prepare(tmp_path, f"version = 1\n[scope.all]\n{table}", {"w": weight.to(dtype)})
    worked = alike_in_all_ways(tmp_path, (64, 48, 2))
    assert len(worked) > 1 or dtype == torch.float64  # whose blocks need torch
