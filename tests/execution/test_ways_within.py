"""Within the masks of an earlier step all ways end in the bytes of whole scopes in the engine."""

import json
from math import ceil, floor
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.api import pruning
from sparseprune.api.masked import masks_within
from sparseprune.checkpoint import open_checkpoint
from sparseprune.execution.plan import Plan, Task, WorkUnit, make_plan, plan_within
from sparseprune.execution.schedule import make_schedule
from sparseprune.results.fields import Made
from sparseprune.spec import parse_spec
from sparseprune.spec.bound import Budget
from tests import oracle
from tests.cli.test_within import SHAPES, STRUCTURES, coupled, elements, few_numbers
from tests.commands import refused, silent
from tests.execution.structures import CASES, FLOATS, INTEGERS, across, one
from tests.execution.test_ways import quick_ways
from tests.limits import AMPLE, WAYS, force, narrow
from tests.quantized import coded, floats, integers, scales

pytestmark = pytest.mark.usefixtures("untraced")

Tensors = dict[str, torch.Tensor]
SHARES = [(0.5, 1), (0.3, 2)]
# Tiles of which rows and columns keep as many may have no such pattern inside of masks.
PLAIN = [name for name, (spec, _) in CASES.items() if "transposable" not in spec]


def prepare(folder: Path, spec: str, tensors: Tensors, masks: Tensors) -> None:
    (folder / "in").mkdir()
    save_file(tensors, folder / "in" / "model.safetensors")
    save_file(masks, folder / "masks.safetensors")
    (folder / "spec.toml").write_text(f"version = 1\n{spec.replace('version = 1', '')}")


def drawn_masks(tensors: Tensors, seed: int = 0) -> Tensors:
    """Masks that drop elements here and there, whole rows and whole columns; c has none."""
    generator = torch.Generator().manual_seed(seed)

    def some(shape: tuple[int, ...], share: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < share

    masks = {}
    for name, tensor in sorted(tensors.items()):
        mask = some(tensor.shape, 0.7)
        if tensor.ndim > 1:
            mask &= some((tensor.shape[-1],), 0.8)
            mask &= some((*tensor.shape[:-1], 1), 0.8)
        masks[name] = mask
    masks.pop("c.weight", None)
    return masks


def applied(folder: Path, name: str, *options: object) -> None:
    words = ("--within", folder / "masks.safetensors", "-o", folder / name, "-q")
    silent("apply", folder / "in", folder / "spec.toml", *words, *options)


def told(out: Path) -> tuple[dict[str, bytes], list[Any]]:
    """The files of an output but the report, and what that counts of each tensor."""
    files = {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "report.json"
    }
    counts = json.loads((out / "sparseprune/report.json").read_text())["tensors"]
    for tensor in counts:
        tensor["energy_kept"] = tensor["energy_kept"] and float(f"{tensor['energy_kept']:.9g}")
    return files, counts


def strategies(folder: Path, jobs: int = 1) -> list[Any]:
    """How a run within the masks would be worked."""
    checkpoint = open_checkpoint(folder / "in")
    plan = make_plan(checkpoint, parse_spec((folder / "spec.toml").read_text()))
    masks = masks_within(checkpoint, folder / "masks.safetensors")
    inside = vars(pruning)["plan_within"](plan, masks)  # which a test may have replaced
    return [group.strategy for group in make_schedule(inside, AMPLE, jobs).groups]


def alike_in_all_ways(
    folder: Path, cut: tuple[int, int, int] = (64, 48, 2), ways: tuple[str, ...] = ()
) -> set[str]:
    """The ways that were taken, once their bytes are equal to those of whole scopes in the engine."""
    if not (folder / "reference").exists():
        with pytest.MonkeyPatch.context() as patch:
            force(patch, "torch_in_memory")
            applied(folder, "reference")
    reference = told(folder / "reference")
    worked: list[Any] = []
    for way in ways or quick_ways(folder):
        with pytest.MonkeyPatch.context() as patch:
            narrow(patch, *cut[:2])
            force(patch, way)
            if (how := strategies(folder, cut[2])) not in worked:
                worked.append(how)
                applied(folder, f"{way}-{cut[0]}", "--jobs", cut[2])
                assert told(folder / f"{way}-{cut[0]}") == reference, (way, cut)
    return {type(one).__name__ for how in worked for one in how}


def in_shares(monkeypatch: pytest.MonkeyPatch, share: float, multiple_of: int) -> None:
    """Rules with a budget of blocks drop a share of what masks leave instead, as rules within others do.

    The third tensor of a task, by name, has no mask.
    """

    def task_in_shares(task: Task) -> Task:
        instance = task.instance
        if instance.budget.nnz is None or instance.soft is not None:
            return task
        most = surviving(share, multiple_of, instance.scope.blocks_per_scope)
        some = tuple(sorted(task.within, key=lambda mask: mask.name)[:2])
        budget = Budget(most, multiple_of=multiple_of, share=share)
        return replace(task, instance=replace(instance, budget=budget), within=some)

    def planned(plan: Plan, masks: Any) -> Plan:
        found = plan_within(plan, masks)

        def unit(one: WorkUnit) -> WorkUnit:
            return replace(one, tasks=tuple(map(task_in_shares, one.tasks)))

        return replace(found, units=Made(found.units, unit))

    monkeypatch.setattr(pruning, "plan_within", planned)


def surviving(share: float, multiple_of: int, left: int) -> int:
    return min(left, ceil((left - floor(left * share)) / multiple_of) * multiple_of)


@pytest.mark.parametrize("name", PLAIN)
def test_every_way_and_cut_keeps_within_the_masks(tmp_path: Path, name: str) -> None:
    spec, make = CASES[name]
    tensors = make(torch.bfloat16)
    drawn = drawn_masks(tensors)
    prepare(tmp_path, spec, tensors, drawn)
    number = list(CASES).index(name)
    alike_in_all_ways(tmp_path, ways=WAYS[1 - number % 2 :: 2])  # the other ones without masks: test_ways
    if number % 6 == 0:
        alike_in_all_ways(tmp_path, (1, 1, 1), (WAYS[number // 6 % len(WAYS)],))
    masks = sparseprune.load_masks(tmp_path / "reference")
    assert all(bool((masks[each] <= mask).all()) for each, mask in drawn.items() if each in masks)
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    assert all(not weights[each][~mask].count_nonzero() for each, mask in masks.items())


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("2:4", "Contiguous"),
        ("2:4 down the columns", "Strided"),
        ("blocks of 8x4 in rows", "Strided"),
        ("blocks along rows", "Contiguous"),
        ("whole rows", "Contiguous"),
        ("whole tensors", "RadixSelect"),
        ("over all tensors", "RadixSelect"),
        ("nothing is kept", "Contiguous"),
        ("a threshold on blocks", "Contiguous"),
        ("rows over all tensors", "BlockNorms"),
        ("channels", "BlockNorms"),
        ("experts", "BlockNorms"),
        ("random blocks", "BlockNorms"),
        ("soft 2:4", "Contiguous"),
    ],
)
def test_structures_within_masks_need_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, way: str
) -> None:
    spec, make = CASES[name]
    tensors = make(torch.bfloat16)
    prepare(tmp_path, spec, tensors, drawn_masks(tensors))
    narrow(monkeypatch, 16 if name in {"experts", "whole tensors"} else 64, 16, memory=128 << 10)
    assert {type(how).__name__ for how in strategies(tmp_path)} == {way}
    in_shares(monkeypatch, 0.5, 1)
    if name != "nothing is kept":
        assert {type(how).__name__ for how in strategies(tmp_path)} == {way}


OF_ALL_DTYPES = ("2:4", "2:4 down the columns", "whole rows", "over all tensors", "channels")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (dtype, OF_ALL_DTYPES[(number + more) % len(OF_ALL_DTYPES)])
        for number, dtype in enumerate((*FLOATS, *INTEGERS))
        for more in range(1 + dtype.is_floating_point)
    ],
    ids=str,
)
def test_every_dtype_is_kept_within_alike(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    spec, make = CASES[name]
    tensors = make(dtype)
    prepare(tmp_path, spec, tensors, drawn_masks(tensors))
    assert len(alike_in_all_ways(tmp_path, ways=() if dtype.is_floating_point else WAYS)) > 1


BUDGETS = [name for name in PLAIN if "soft" not in name and "thresh" not in name]


@pytest.mark.parametrize("name", BUDGETS[::2])
def test_every_way_drops_the_same_share_of_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec, make = CASES[name]
    share = SHARES[BUDGETS.index(name) // 2 % len(SHARES)]
    tensors = make(torch.bfloat16)
    prepare(tmp_path, spec, tensors, drawn_masks(tensors, seed=1))
    in_shares(monkeypatch, *share)
    assert len(alike_in_all_ways(tmp_path)) > 1


ALL_SHARES = [*SHARES, (0.0, 1), (1.0, 1), (0.9, 4)]


@pytest.mark.parametrize(
    ("name", "share"),
    [
        (name, ALL_SHARES[(number + more) % len(ALL_SHARES)])
        for number, name in enumerate(STRUCTURES)
        for more in (0, 2)
    ],
    ids=str,
)
def test_the_share_of_what_is_left_is_what_plain_loops_drop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: tuple[float, int]
) -> None:
    rule, (nnz, *_) = STRUCTURES[name]
    tensors = few_numbers(0)
    masks = {**drawn_masks(tensors, seed=2), max(tensors): torch.ones_like(tensors[max(tensors)]).bool()}
    prepare(tmp_path, f"{rule}nnz = {nnz}", tensors, masks)
    in_shares(monkeypatch, *share)
    assert len(alike_in_all_ways(tmp_path)) > 1
    found = sparseprune.load_masks(tmp_path / "reference")
    for names, structure in coupled(name):
        numbers = [elements(tensors[each]) for each in names]
        among = [{at: bool(one) for at, one in elements(masks[each]).items()} for each in names]
        wanted = oracle.masks_among(structure, numbers, among, lambda left: surviving(*share, left))
        for each, mask in zip(names, wanted, strict=True):
            laid = torch.tensor([mask[index] for index in sorted(mask)]).reshape(SHAPES[each])
            assert torch.equal(found[each], laid), each


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("kept", ["all", "none", "the first"])
@pytest.mark.parametrize(
    "sizes",
    [
        ((), "[]", "[]"),
        ((0, 4), "[1, 1]", "[1, 4]"),
        ((4, 0), "[1, 1]", "[1, -1]"),
        ((0, 4), "[1, 4]", "[-1, 1]"),
        ((4, 4), "[1, 1]", "[1, 4]"),
        ((4, 4), "[1, 1]", "[4, 1]"),
        ((4, 4), "[1, 1]", "[-1, -1]"),
        ((4, 4), "[4, 4]", "[1, 1]"),
        ((4, 4), "[1, 4]", "[-1, 1]"),
    ],
)
def test_masks_may_keep_all_or_nothing_of_tensors_of_any_size(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[tuple[int, ...], str, str],
    kept: str,
    shares: bool,
) -> None:
    shape, block, scope = sizes
    torch.manual_seed(0)
    weight, mask = torch.randn(shape).to(torch.bfloat16), torch.full(shape, kept == "all")
    mask.view(-1)[:1] |= kept == "the first"
    prepare(tmp_path, one(block, scope, "nnz = 1"), {"a.weight": weight}, {"a.weight": mask})
    if shares:
        in_shares(monkeypatch, 0.5, 1)
    alike_in_all_ways(tmp_path, ways=WAYS if weight.numel() else WAYS[:1])  # of nothing nothing is counted
    found = sparseprune.load_masks(tmp_path / "reference")["a.weight"]
    assert bool((found <= mask).all())
    assert bool(found.any()) == bool(mask.any())


CODES = {
    "scales": coded("a.weight", floats((8, 16)), scales((2, 4)), (4, 4)),
    "one scale": coded("a.weight", floats((8, 16)), scales((1,)), (8, 16)),
    "zero points": coded(
        "a.weight", integers((8, 16)), scales((8, 1)), (1, 16), integers((8, 1), 3), end="_scale"
    ),
}


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("name", ["2:4", "whole rows", "whole tensors", "rows as blocks of a tensor"])
@pytest.mark.parametrize("codes", CODES)
def test_codes_are_kept_within_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: str, name: str, shares: bool
) -> None:
    spec, _ = CASES[name]
    tensors = CODES[codes].stored
    prepare(tmp_path, spec, tensors, drawn_masks({"a.weight": tensors["a.weight"]}))
    if shares:
        in_shares(monkeypatch, 0.5, 1)
    assert len(alike_in_all_ways(tmp_path)) > 1
    masks = sparseprune.load_masks(tmp_path / "reference")
    weights = load_file(tmp_path / "reference" / "model.safetensors")["a.weight"]
    assert torch.equal(
        weights.double()[~masks["a.weight"]], CODES[codes].zeros["a.weight"].double()[~masks["a.weight"]]
    )


UNRANKED = {
    "2:4": one("[1, 1]", "[1, 4]", "nnz = 2"),
    "2:4 down the columns": one("[1, 1]", "[4, 1]", "nnz = 2"),
    "all elements": one("[1, 1]", "[-1, -1]", "nnz = 200", "a.weight"),
    "elements over all": across("[1, 1]", "nnz = 300"),
    "runs": one("[1, 4]", "[1, 2]", "nnz = 1"),
    "columns": one("[-1, 1]", "[1, -1]", "nnz = 5"),
}


@pytest.mark.parametrize(
    ("name", "dtype", "nonfinite"),
    [
        (name, dtypes[(number + more) % len(dtypes)], nonfinite)
        for number, name in enumerate(UNRANKED)
        for nonfinite, dtypes, count in (("error", FLOATS[2::2], 1), ("prune", FLOATS[1:], 2))
        for more in range(count)
    ],
    ids=str,
)
def test_what_is_not_finite_matters_only_where_a_mask_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, nonfinite: str
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 32)
    other = torch.randn(8, 8).to(dtype)
    mask = torch.rand(24, 32) < 0.7
    weight[~mask] = float("nan")
    weight[mask & (torch.rand(24, 32) < 0.1)] = -0.0
    spec = UNRANKED[name] + f'\nscore = {{ kind = "magnitude", nonfinite = "{nonfinite}" }}\n'
    if nonfinite == "prune":
        weight[mask & (torch.rand(24, 32) < 0.1)] = float("nan")
    tensors = {"a.weight": weight.to(dtype), "b.weight": other}
    prepare(tmp_path, spec, tensors, {"a.weight": mask})
    assert len(alike_in_all_ways(tmp_path)) > 1
    if nonfinite == "prune":
        in_shares(monkeypatch, 0.5, 1)
        (tmp_path / "reference").rename(tmp_path / "by number")
        alike_in_all_ways(tmp_path, (26, 48, 1))
        return
    weight[tuple(mask.nonzero()[5].tolist())] = float("nan")
    save_file({**tensors, "a.weight": weight.to(dtype)}, tmp_path / "in" / "model.safetensors")
    for way in WAYS:
        with pytest.MonkeyPatch.context() as patch:
            narrow(patch, 64, 16)
            force(patch, way)
            words = ("--within", tmp_path / "masks.safetensors", "-o", tmp_path / "out")
            said = refused("apply", tmp_path / "in", tmp_path / "spec.toml", *words)
        assert "a.weight: NaN at " in said.err
