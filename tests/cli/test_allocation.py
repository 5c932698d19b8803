"""`allocate = "loss"`: the parts of a common budget, against all losses in memory, sorted."""

import json
import multiprocessing
from bisect import bisect_left
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.checkpoint.output import read_journal
from sparseprune.checkpoint.statistics import STATISTICS_KEY
from sparseprune.execution import runner
from tests.cli.interrupted import NOTES, Command, Commands, Moment
from tests.commands import ok, refused, run, valid
from tests.execution.elsewhere import PoolRunner, one_thread
from tests.samples import CHANNELS, mlp_tensors, write_spec

Tensors = dict[str, torch.Tensor]
Floats = NDArray[np.float64]
ALLOCATE = '[reconstruct]\nfile = "stats.safetensors"\nmethod = "none"\nallocate = "loss"\n'
WHOLE = """
version = 1
[scope.matrix]
tensors = "{layer}.{name}.weight"
block = [1, 1]
shape = []
sparsity = 0.5
"""
ROWS = WHOLE.replace("shape = []", "shape = [1, -1]")


def with_head(spec: str, head: str = ALLOCATE) -> str:
    return spec.replace("version = 1\n", f"version = 1\n{head}", 1)


def drawn(shape: tuple[int, ...], seed: int, stack: tuple[int, ...] = ()) -> torch.Tensor:
    """A second moment of correlated inputs, in float64, so that losses lie where those of the oracle do."""
    generator = torch.Generator().manual_seed(seed)
    features = shape[0]
    inputs = torch.randn((*stack, 4 * features, features), generator=generator, dtype=torch.float64)
    mixed = inputs @ torch.randn((features, features), generator=generator, dtype=torch.float64)
    return mixed.mT @ mixed / (4 * features)


def write_statistics(folder: Path, tensors: Tensors, *, gradients: bool = True, groups: int = 1) -> Tensors:
    """Moments of every matrix and stack, in units that differ, and those of gradients; inputs lie last."""
    found, weights, beside = {}, {}, {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        if tensor.ndim < 2:
            continue
        stack, (outputs, features) = tuple(tensor.shape[:-2]), tensor.shape[-2:]
        found[name] = drawn((features,), seed, stack) * 3.0 ** (seed % 3)
        weights[name] = {name: tensor.ndim - 1}
        if gradients:
            size = outputs // groups
            split = (*stack, groups) if groups > 1 else stack
            found[f"{name}.gradients"] = drawn((size,), 99 + seed, split) * 2.0 ** (seed % 2)
            beside[f"{name}.gradients"] = {name: tensor.ndim - 2}
    document = {"kind": "hessian", "weights": weights} | ({"gradients": beside} if beside else {})
    save_file(found, folder / "stats.safetensors", metadata={STATISTICS_KEY: json.dumps(document)})
    return found


@dataclass
class Instance:
    """All losses of the blocks of an instance; what survives in each of its scopes without sharing."""

    label: str
    losses: Floats
    scopes: int
    nnz: int
    elements: int = 1
    unit: int = 1
    clamp: float = 0.1
    keys: list[int] = field(default_factory=list)
    allowed: list[int] = field(init=False)
    """The numbers that may survive, ascending."""

    def __post_init__(self) -> None:
        room = floor(self.clamp * self.blocks)
        near = [n for n in range(self.blocks + 1) if abs(n - self.nnz) <= room]
        self.allowed = [n for n in near if n % self.unit == 0 or n in {self.blocks, self.nnz}]

    @property
    def blocks(self) -> int:
        return len(self.losses) // self.scopes

    def pruned(self, key: int) -> int:
        lowest, highest = self.allowed[0], self.allowed[-1]
        below = bisect_left(self.keys, key)
        return min(max(below, self.scopes * (self.blocks - highest)), self.scopes * (self.blocks - lowest))


def oracle(instances: list[Instance]) -> dict[str, int]:
    """One threshold after the other, in bins of 1/128 of a power of two, then one step after the other."""
    for one in instances:
        one.keys = sorted(int(bits) >> 45 for bits in (one.losses / one.elements).view(np.uint64))
    budget = sum(one.elements * one.scopes * (one.blocks - one.nnz) for one in instances)
    threshold = 0
    for key in sorted({key + 1 for one in instances for key in one.keys}):
        if sum(one.elements * one.pruned(key) for one in instances) <= budget:
            threshold = key
    candidates = [key + 1 for one in instances for key in one.keys if key + 1 > threshold]
    behind = min(candidates, default=threshold)
    before = [one.pruned(threshold) for one in instances]
    more = [one.pruned(behind) - begin for one, begin in zip(instances, before, strict=True)]
    left = budget - sum(one.elements * begin for one, begin in zip(instances, before, strict=True))
    there = sum(one.elements * count for one, count in zip(instances, more, strict=True))
    part = Fraction(left, there) if there else Fraction(0)
    return rounded(
        instances, [begin + part * count for begin, count in zip(before, more, strict=True)], budget
    )


def rounded(instances: list[Instance], goes: list[Fraction], budget: int) -> dict[str, int]:
    ideal = [one.blocks - gone / one.scopes for one, gone in zip(instances, goes, strict=True)]
    kept = [max(n for n in one.allowed if n <= best) for one, best in zip(instances, ideal, strict=True)]

    def step(number: int) -> int:
        return min((n for n in instances[number].allowed if n > kept[number]), default=kept[number])

    def left() -> int:
        stays = sum(one.elements * one.scopes * n for one, n in zip(instances, kept, strict=True))
        return sum(one.elements * one.scopes * one.blocks for one in instances) - budget - stays

    def remainder(number: int) -> Fraction:
        one = instances[number]
        size = min(one.blocks, (kept[number] // one.unit + 1) * one.unit) - kept[number]
        return (ideal[number] - kept[number]) / max(1, size)

    order = sorted(range(len(instances)), key=lambda number: -remainder(number))
    while True:
        fits = []
        for number in order:
            one, more = instances[number], step(number) - kept[number]
            if 0 < one.elements * one.scopes * more <= left():
                kept[number] += more
                fits.append(number)
        if not fits:
            return {one.label: n for one, n in zip(instances, kept, strict=True)}


def singles(moment: torch.Tensor, damp: float = 0.01) -> torch.Tensor:
    wide = moment.double()
    mean = wide.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    inverse: torch.Tensor = torch.linalg.inv(wide + damp * mean * torch.eye(wide.shape[-1]))
    return inverse.diagonal(dim1=-2, dim2=-1).reciprocal()


def trace_of(stats: Tensors, name: str) -> torch.Tensor:
    """The mean of the diagonal of a weight's gradients, for each matrix of a stack."""
    found = stats.get(f"{name}.gradients")
    if found is None:
        return torch.ones(stats[name].shape[:-2])
    each = found.double().diagonal(dim1=-2, dim2=-1)
    return each.reshape(*stats[name].shape[:-2], -1).mean(-1)


def losses_of(tensors: Tensors, stats: Tensors, name: str) -> torch.Tensor:
    """w^2 / [H^-1]_jj * tr(G) / rows of every weight, of the weight's shape."""
    scale = trace_of(stats, name)[..., None, None]
    return tensors[name].double().square() * singles(stats[name]).unsqueeze(-2) * scale


def planned(folder: Path, spec: str, tensors: Tensors, *words: object) -> dict[str, int]:
    """What `plan --allocation` tells of each instance of every rule, which the table tells as well."""
    save_file(tensors, folder / "m.safetensors")
    command = ("plan", folder / "m.safetensors", write_spec(folder, spec), "--allocation", *words)
    document = valid(ok(*command, "--json").out, "plan")
    return {one["instance"]: one["nnz"] for rule in document["rules"] for one in rule["allocation"] or ()}


MATRICES = ["0.up.weight", "0.down.weight", "1.up.weight", "1.down.weight"]


def labelled(name: str) -> str:
    layer, part, _ = name.split(".")
    return f"matrix[layer={layer},name={part}]"


def larger(seed: int = 3, dtype: torch.dtype = torch.float32) -> Tensors:
    """Two layers of an up and a down matrix whose weights differ in size."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"up": (48, 20), "down": (20, 48)}
    return {
        f"{layer}.{part}.weight": (torch.randn(shape, generator=generator) * (1 + layer)).to(dtype)
        for layer in range(2)
        for part, shape in shapes.items()
    }


@pytest.mark.parametrize("groups", [0, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ["[]", "[1, -1]", "[-1, 1]"])
def test_matrices_share_a_budget_by_one_threshold_of_losses(
    tmp_path: Path, shape: str, dtype: torch.dtype, groups: int
) -> None:
    tensors = larger(dtype=dtype)
    stats = write_statistics(tmp_path, tensors, gradients=groups > 0, groups=max(1, groups))
    spec = with_head(WHOLE.replace("shape = []", f"shape = {shape}"))
    instances = []
    for name, tensor in tensors.items():
        scopes = {"[]": 1, "[1, -1]": tensor.shape[0], "[-1, 1]": tensor.shape[1]}[shape]
        losses = losses_of(tensors, stats, name).reshape(-1).numpy()
        instances.append(Instance(labelled(name), losses, scopes, tensor.numel() // scopes // 2))
    found = planned(tmp_path, spec, tensors)
    assert found == oracle(sorted(instances, key=lambda one: one.label))
    assert len(set(found.values())) > 2
    kept = sum(one.scopes * found[one.label] for one in instances)
    asked = sum(one.scopes * one.nnz for one in instances)
    assert asked - min(one.scopes for one in instances) < kept <= asked


@pytest.mark.parametrize("clamp", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("unit", [1, 7])
def test_no_part_is_further_from_uniform_than_the_clamp_and_each_is_a_multiple(
    tmp_path: Path, clamp: float, unit: int
) -> None:
    tensors = larger()
    tensors["1.up.weight"] *= 30
    stats = write_statistics(tmp_path, tensors)
    spec = with_head(f"{WHOLE}multiple_of = {unit}\n", f"{ALLOCATE}clamp = {clamp}\n")
    uniform = -(-480 // unit) * unit
    instances = [
        Instance(
            labelled(name), losses_of(tensors, stats, name).reshape(-1).numpy(), 1, uniform, 1, unit, clamp
        )
        for name in sorted(tensors)
    ]
    found = planned(tmp_path, spec, tensors)
    assert found == oracle(instances)
    assert all(abs(nnz - uniform) <= clamp * 960 for nnz in found.values())
    assert all(nnz % unit == 0 or nnz == 960 for nnz in found.values())
    assert uniform * 4 - unit < sum(found.values()) <= uniform * 4


def channel_losses(tensors: Tensors, stats: Tensors, layer: int) -> Floats:
    down: Floats = losses_of(tensors, stats, f"{layer}.down.weight").sum(0).numpy()
    return down


def test_a_channel_costs_what_the_column_that_reads_it_costs(tmp_path: Path) -> None:
    tensors = mlp_tensors(layers=3)
    tensors["2.down.weight"] *= 1.3
    stats = write_statistics(tmp_path, tensors)
    spec = with_head(CHANNELS.replace("0.25", "0.5"), f"{ALLOCATE}clamp = 0.3\n")
    instances = [
        Instance(f"mlp[layer={layer}]", channel_losses(tensors, stats, layer), 1, 8, 17 + 8, clamp=0.3)
        for layer in range(3)
    ]
    found = planned(tmp_path, spec, tensors)
    assert found == oracle(instances)
    assert len(set(found.values())) > 1
    assert sum(found.values()) == 24


EXPERTS = """
version = 1
[block.up]
tensors = "{layer}.experts.up"
shape = [1, -1, -1]
[block.down]
tensors = "{layer}.experts.down"
shape = [1, -1, -1]
[block_coupling.expert]
blocks = ["up", "down"]
[scope.experts]
block = "expert"
shape = []
sparsity = 0.5
"""


def stacks(seed: int = 5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{layer}.experts.{part}": torch.randn((10, *shape), generator=generator) * (1 + 0.2 * layer)
        for layer in range(3)
        for part, shape in {"up": (12, 8), "down": (8, 12)}.items()
    }


def test_a_whole_expert_costs_the_outputs_of_all_its_rows(tmp_path: Path) -> None:
    tensors = stacks()
    stats = write_statistics(tmp_path, tensors)
    found = planned(tmp_path, with_head(EXPERTS, f"{ALLOCATE}clamp = 0.4\n"), tensors)
    instances = []
    for layer in range(3):
        total = torch.zeros(10, dtype=torch.float64)
        for part in ("up", "down"):
            name = f"{layer}.experts.{part}"
            moment, weights = stats[name], tensors[name].double()
            mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            damped = moment + 0.01 * mean * torch.eye(moment.shape[-1])
            rows = ((weights @ damped) * weights).sum(-1)
            total += (rows * stats[f"{name}.gradients"].diagonal(dim1=-2, dim2=-1)).sum(-1)
        instances.append(Instance(f"experts[layer={layer}]", total.numpy(), 1, 5, 192, clamp=0.4))
    assert found == oracle(instances)
    assert len(set(found.values())) > 1


def test_each_matrix_of_a_stack_has_its_own_moments(tmp_path: Path) -> None:
    tensors = stacks()
    stats = write_statistics(tmp_path, tensors)
    spec = with_head(
        WHOLE.replace("{layer}.{name}.weight", "{layer}.experts.{name}").replace("[1, 1]", "[1, 1, 1]")
    )
    names = sorted(tensors, key=lambda name: (name[0], name.endswith("up")))
    instances = [
        Instance(
            f"matrix[layer={name[0]},name={name.rpartition('.')[2]}]",
            losses_of(tensors, stats, name).reshape(-1).numpy(),
            *(1, 480),
        )
        for name in names
    ]
    assert planned(tmp_path, spec, tensors) == oracle(instances)


def test_weights_that_lie_the_other_way_round_or_in_a_slice_cost_the_same(tmp_path: Path) -> None:
    tensors = larger()
    stats = write_statistics(tmp_path, tensors)
    wanted = planned(tmp_path, with_head(WHOLE), tensors)
    turned = {name: tensor.T.contiguous() for name, tensor in tensors.items()}
    document = {
        "kind": "hessian",
        "weights": {name: {name: 0} for name in tensors},
        "gradients": {f"{name}.gradients": {name: 1} for name in tensors},
    }
    save_file(stats, tmp_path / "stats.safetensors", metadata={STATISTICS_KEY: json.dumps(document)})
    assert planned(tmp_path, with_head(WHOLE), turned) == wanted


@pytest.mark.parametrize("method", ["none", "refit", "admm"])
def test_apply_prunes_and_reports_what_the_plan_told_and_verify_knows_it(tmp_path: Path, method: str) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors, gradients=method != "admm")
    head = ALLOCATE.replace('"none"', f'"{method}"')
    told = planned(tmp_path, with_head(ROWS, head), tensors)
    said = ok(
        "apply",
        tmp_path / "m.safetensors",
        tmp_path / "spec.toml",
        "-o",
        tmp_path / "p.safetensors",
        "--json",
    )
    report = valid(said.out, "report")
    parts = {one["instance"]: one for one in report["rules"][0]["allocation"]}
    assert {label: one["nnz"] for label, one in parts.items()} == told
    pruned = load_file(tmp_path / "p.safetensors")
    for name, tensor in pruned.items():
        assert set((tensor != 0).sum(1).tolist()) == {told[labelled(name)]}
        part = parts[labelled(name)]
        assert part["sparsity_asked"] == 0.5
        assert part["sparsity"] == pytest.approx(1 - told[labelled(name)] / tensor.shape[1])
    lowest, highest = (f"{100 * edge(one['sparsity'] for one in parts.values()):.2f}%" for edge in (min, max))
    line = (
        f"scope.matrix shares one budget over 4 instances: 50.00% asked, {lowest} to {highest} of each pruned"
    )
    assert line in said.err
    ok("verify", tmp_path / "p.safetensors", tmp_path / "spec.toml", "-q")
    name = "0.up.weight"
    save_file(pruned | {name: torch.ones_like(pruned[name])}, tmp_path / "p.safetensors")
    assert run("verify", tmp_path / "p.safetensors", tmp_path / "spec.toml").code == 1


@pytest.mark.parametrize("spec", [WHOLE, ROWS])
def test_without_the_report_verify_checks_the_clamps_and_what_survives_together(
    tmp_path: Path, spec: str
) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors)
    told = planned(tmp_path, with_head(spec), tensors)
    ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-q")
    command = ("verify", tmp_path / "m.pruned.safetensors", tmp_path / "spec.toml")
    assert "together" not in valid(ok(*command, "--json").out, "verify")["rules"][0]
    (tmp_path / "m.pruned.report.json").unlink()
    said = ok(*command)
    assert "scope.matrix shares one budget, and no report tells its parts: " in said.out
    pruned = load_file(tmp_path / "m.pruned.safetensors")
    kept = sum(int(one.count_nonzero()) for one in pruned.values())
    together = valid(ok(*command, "--json").out, "verify")["rules"][0]["together"]
    assert together == {"nonzero": kept, "allowed": 1920}
    lost = 1920 - kept + 1
    least = min(tensors, key=lambda name: told[labelled(name)] / tensors[name].shape[1])
    zeros = (pruned[least] == 0).nonzero()
    zeros = zeros[zeros[:, 1].argsort(stable=True)][:lost]  # one in a row, as long as there are rows
    pruned[least][zeros[:, 0], zeros[:, 1]] = 1.0
    save_file(pruned, tmp_path / "m.pruned.safetensors")
    said = run(*command, "-q")
    assert said.code == 1
    assert "1,921 of 1,920 elements that may survive together do" in said.err
    assert run(*command).code == 1


def test_a_report_of_another_spec_is_told_apart(tmp_path: Path) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors)
    planned(tmp_path, with_head(ROWS), tensors)
    ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-q")
    other = write_spec(tmp_path, with_head(ROWS.replace("0.5", "0.8")))
    said = refused("verify", tmp_path / "m.pruned.safetensors", other)
    assert "its part of the common budget, wanted" in said.err


def test_without_gradients_outputs_count_and_a_note_says_so(tmp_path: Path) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors, gradients=False)
    planned(tmp_path, with_head(ROWS), tensors)
    said = ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml")
    assert "scope.matrix shares its budget by what outputs lose, not by the loss" in said.err
    assert "calibrate --gradients" in said.err


def test_bytes_do_not_depend_on_jobs_or_memory(tmp_path: Path) -> None:
    tensors = {name: tensor.repeat(12, 1) for name, tensor in larger().items()}
    write_statistics(tmp_path, tensors)
    planned(tmp_path, with_head(ROWS), tensors)
    outputs = []
    for jobs, memory in ((1, "400MB"), (3, "2GB")):
        where = tmp_path / f"{jobs}.safetensors"
        limits = ("--jobs", jobs, "--memory", memory)
        ok("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-o", where, "-q", *limits)
        outputs.append(where.read_bytes())
    assert outputs[0] == outputs[1]


def test_what_was_counted_when_a_run_was_killed_is_not_counted_again(
    tmp_path: Path, commands: Commands
) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors)
    planned(tmp_path, with_head(WHOLE), tensors)
    words = ("apply", "m.safetensors", "spec.toml", "-o", "p.safetensors")
    full = commands.run(Command(str(tmp_path), (*words[:-1], "whole.safetensors")))
    assert full.code == 0, full.err
    read = []
    for at in (2, 4):
        killed = commands.run(Command(str(tmp_path), words, moment=Moment("kill", at, NOTES)))
        assert killed.code < 0
        found = read_journal(tmp_path / ".p.safetensors.sparseprune-partial" / "journal")
        assert found is not None
        read.append(sum(key.endswith(".losses") for key in found.finished))
    ended = commands.run(Command(str(tmp_path), words))
    assert (ended.code, read) == (0, [1, 4]), ended.err
    assert "an unfinished run is continued" in ended.err
    assert ended.read < full.read - sum(tensor.nbytes for tensor in tensors.values())
    for kind in ("", ".masks"):
        outputs = [tmp_path / f"{name}{kind}.safetensors" for name in ("p", "whole")]
        assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize("spec", [WHOLE, CHANNELS.replace("0.25", "0.5")])
def test_losses_that_other_processes_count_give_the_same_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    tensors = mlp_tensors(layers=3)
    write_statistics(tmp_path, tensors)
    spec = with_head(spec, f"{ALLOCATE}clamp = 0.3\n")
    wanted = planned(tmp_path, spec, tensors)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), one_thread) as processes:
        monkeypatch.setattr(PoolRunner, "pool", processes, raising=False)
        monkeypatch.setattr(PoolRunner, "done", [])
        monkeypatch.setattr(runner, "Runner", PoolRunner)
        assert planned(tmp_path, spec, tensors) == wanted
    assert {*PoolRunner.done} == {"FactorMoments", "CountLosses"}


def test_memory_that_holds_no_moment_is_refused_before_any_work(tmp_path: Path) -> None:
    tensors = {f"{layer}.{part}.weight": torch.ones(8, 3000) for layer in range(2) for part in ("up", "down")}
    stats = {name: torch.eye(3000) for name in tensors}
    save_file(tensors, tmp_path / "m.safetensors")
    save_file(stats, tmp_path / "stats.safetensors")
    spec = write_spec(tmp_path, with_head(ROWS))
    said = refused("apply", tmp_path / "m.safetensors", spec, "--memory", "400MB")
    assert "second moments must be in memory to be factored; give --memory" in said.err
    ok("plan", tmp_path / "m.safetensors", spec, *said.err.split()[-2:])


REFUSED: Mapping[str, tuple[str, str]] = {
    "nm": (WHOLE.replace("shape = []", "shape = [1, 4]"), "a pattern that has to be the same everywhere"),
    "tiles": (WHOLE.replace("shape = []", "shape = [4, 4]"), "a pattern that has to be the same everywhere"),
    "few": (
        WHOLE.replace("[1, 1]", "[-1, 10]").replace("{name}", "{name:up}"),
        "clamp 0.1 moves none of 2 blocks: give 0.5 or more",
    ),
    "threshold": (WHOLE.replace("sparsity = 0.5", "threshold = 0.5"), "give nnz or sparsity"),
    "soft": (f'{WHOLE}mode = "soft"\n', 'found "soft", which allocate = "loss" does not go with'),
    "all": (
        WHOLE.replace(
            "sparsity = 0.5", '[scope_coupling.all]\nscopes = ["matrix"]\nacross = "all"\nsparsity = 0.5'
        ),
        "everything competes for one budget already",
    ),
    "layers": (
        WHOLE.replace(
            "sparsity = 0.5",
            '[scope_coupling.all]\nscopes = ["matrix"]\nacross = ["layer", "name"]\nsparsity = 0.5',
        ),
        "all alone is the rule: its scopes compete for one budget already",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_budget_to_share_is_refused_in_a_line(tmp_path: Path, case: str) -> None:
    spec, why = REFUSED[case]
    tensors = larger()
    write_statistics(tmp_path, tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, with_head(spec)))
    assert why in said.err
    assert len(said.err.splitlines()) == 1


def test_a_clamp_without_a_shared_budget_and_a_budget_without_statistics_are_refused(tmp_path: Path) -> None:
    save_file(larger(), tmp_path / "m.safetensors")
    for head, why in {
        '[reconstruct]\nfile = "stats"\nclamp = 0.2\n': 'clamp: only allocate = "loss" takes this key',
        '[reconstruct]\nmethod = "none"\nallocate = "loss"\n': "there is no file: give what calibrate wrote",
        f"{ALLOCATE}clamp = 1.5\n": "[reconstruct] clamp: found 1.5, wanted a number from 0 to 1",
    }.items():
        said = refused("apply", tmp_path / "m.safetensors", write_spec(tmp_path, with_head(ROWS, head)))
        assert why in said.err


def test_statistics_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    tensors = larger()
    stats = write_statistics(tmp_path, tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    spec = write_spec(tmp_path, with_head(ROWS))
    stats["0.up.weight.gradients"] = stats["0.up.weight.gradients"][:7, :7].contiguous()
    document = {
        "kind": "hessian",
        "weights": {name: {name: 1} for name in tensors},
        "gradients": {f"{name}.gradients": {name: 0} for name in tensors},
    }
    save_file(stats, tmp_path / "stats.safetensors", metadata={STATISTICS_KEY: json.dumps(document)})
    said = refused("apply", tmp_path / "m.safetensors", spec)
    assert "0.up.weight.gradients has shape [7, 7], which fits no [48, 20]" in said.err
    (tmp_path / "stats.safetensors").unlink()
    refused("apply", tmp_path / "m.safetensors", spec)


def test_a_rule_that_shares_nothing_has_no_allocation(tmp_path: Path) -> None:
    save_file(larger(), tmp_path / "m.safetensors")
    plain = write_spec(tmp_path, ROWS)
    said = refused("plan", tmp_path / "m.safetensors", plain, "--allocation")
    assert f"--allocation: no rule of {plain} shares a budget" in said.err
    report: Any = sparseprune.apply(tmp_path / "m.safetensors", plain)
    assert report.rules[0].allocation is None


def test_without_the_flag_plan_reads_no_weights_and_says_what_tells(tmp_path: Path) -> None:
    tensors = larger()
    write_statistics(tmp_path, tensors)
    save_file(tensors, tmp_path / "m.safetensors")
    said = ok("plan", tmp_path / "m.safetensors", write_spec(tmp_path, with_head(ROWS)))
    assert "up to 10.00% more or less of each" in said.out
    assert "--allocation reads the weights" in said.out
    shown = ok("plan", tmp_path / "m.safetensors", tmp_path / "spec.toml", "--allocation").out
    assert "matrix[layer=1,name=up]" in shown
    assert "asked  sparsity" in shown
