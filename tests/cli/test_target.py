"""`--target`: what is found is what a look at every value finds, and is told; else a line says why not."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseprune
from sparseprune.errors import SparsepruneError
from tests.cli.removal import LLAMA, MIXTRAL, decoder, mixture, write
from tests.commands import ok, refused, valid

TWO_RULES = """
version = 1
[vars]
keep = 6
part = 0.25
[scope.up]
tensors = "model.layers.{layer}.mlp.up_proj.weight"
block = [1, -1]
shape = [-1]
nnz = "keep"
multiple_of = 4
[scope.down]
tensors = "model.layers.{layer}.mlp.down_proj.weight"
block = [-1, 1]
shape = [-1, -1]
nnz = "keep // 2 + layer"
[scope.q]
tensors = "model.layers.{layer}.self_attn.q_proj.weight"
block = [1, 1]
shape = [-1]
sparsity = "part"
"""
COUNTS, SHARES = tuple(range(20)), tuple(number / 144 for number in range(145))


@dataclass(frozen=True)
class Case:
    """A spec, the number to vary, and all values that make a difference; of a Mixtral where it is `mixed`."""

    spec: str
    name: str = "sparsity"
    values: Sequence[float] = SHARES
    removed: bool = False
    mixed: bool = False
    named: bool = False
    set: Mapping[str, object] = field(default_factory=dict)

    @property
    def command(self) -> Any:
        return "remove" if self.removed else "apply"

    def write(self, folder: Path) -> Path:
        return write(folder, mixture(), MIXTRAL) if self.mixed else write(folder, decoder(layers=3), DEEP)


DEEP = {**LLAMA, "num_hidden_layers": 3}
CASES = {
    "elements of rows": Case("unstructured"),
    "N:M": Case("2of4", "scope.matrix.nnz", range(5)),
    "N:M by a variable": Case("nofm", "n", range(5)),
    "channels, zero": Case("mlp-channels"),
    "channels, removed": Case("mlp-channels", removed=True),
    "channels, four at once": Case("mlp-channels", removed=True, set={"multiple": 4}),
    "heads, removed": Case("heads", removed=True),
    "layers, removed": Case("layers", removed=True),
    "hidden channels, removed": Case("hidden", removed=True),
    "experts, removed": Case("experts", removed=True, mixed=True),
    "channels of experts, removed": Case("expert-channels", removed=True, mixed=True),
    "one of two variables, the more the more": Case(TWO_RULES, "keep", COUNTS, named=True),
    "the other one of two": Case(TWO_RULES, "part", named=True),
    "one of two, as the other is set": Case(TWO_RULES, "keep", COUNTS, set={"part": 1}),
}


def left(case: Case, checkpoint: Path, **options: Any) -> int | None:
    """The parameters that a plan leaves; None where it is refused."""
    try:
        plan = sparseprune.plan(checkpoint, case.spec, command=case.command, **options)
    except SparsepruneError:
        return None
    if case.removed:
        return plan.removal.numel
    pruned = [rule.pruned for rule in plan.rules]
    return plan.totals.numel - sum(one for one in pruned if one is not None)


@pytest.mark.parametrize("name", CASES)
def test_the_most_that_does_not_exceed_the_target_is_found(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    checkpoint = case.write(tmp_path / "in")
    whole = sum(one.numel() for one in load_file(checkpoint / "model.safetensors").values())
    amounts = {value: left(case, checkpoint, set={**case.set, case.name: value}) for value in case.values}
    reachable = sorted({amount for amount in amounts.values() if amount is not None})
    middle = reachable[len(reachable) // 2]
    for most in {reachable[0], reachable[0] + 1, middle - 1, middle, whole - 1}:
        best = max((amount for amount in reachable if amount <= most), default=None)
        words = f"params={most}" + (f":{case.name}" if case.named else "")
        if best is None:
            assert left(case, checkpoint, set=case.set, target=words) is None
            continue
        plan = sparseprune.plan(checkpoint, case.spec, command=case.command, set=case.set, target=words)
        found = plan.target
        assert found is not None
        assert (found.name, found.asked, found.reached, found.before) == (case.name, most, best, whole)
        # Anyone may set the value that was found, and gets the same.
        assert left(case, checkpoint, set={**case.set, found.name: found.value}) == best
    words = f"params={reachable[0] - 1}" + (f":{case.name}" if case.named else "")
    with pytest.raises(SparsepruneError, match=f"no {case.name} reaches it: the least are {reachable[0]:,} "):
        sparseprune.plan(checkpoint, case.spec, command=case.command, set=case.set, target=words)


def test_of_elements_that_all_compete_any_number_can_be_left(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", decoder(), LLAMA)
    for most in (1000, 1001, 777):
        report = sparseprune.apply(
            checkpoint, "unstructured-global", tmp_path / f"{most}", target=f"params={most}"
        )
        assert report.target is not None
        assert report.target.reached == report.totals.numel - report.totals.pruned == most
        written = load_file(tmp_path / f"{most}" / "model.safetensors").values()
        assert sum(int(one.count_nonzero()) for one in written) == most


def test_the_bytes_of_the_weight_files_are_counted_to_the_last_one(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", decoder(), LLAMA, shards=2)
    sizes = {}
    for channels in range(1, 16):
        output, value = tmp_path / str(channels), 1 - channels / 16
        sparseprune.remove(checkpoint, "mlp-channels", output=output, set={"sparsity": value})
        sizes[channels] = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    for most in (sizes[9], sizes[9] - 1, sizes[9] + 1, sizes[1]):
        words = f"size={most}"
        removal = sparseprune.remove(
            checkpoint, "mlp-channels", output=tmp_path / "out", target=words, force=True
        )
        best = max(size for size in sizes.values() if size <= most)
        assert removal.target is not None
        assert removal.target.reached == removal.totals.bytes_after == best
        assert removal.target.before == removal.totals.bytes
    with pytest.raises(SparsepruneError, match=r"^--target size=100: no sparsity reaches it: the least are "):
        sparseprune.remove(checkpoint, "mlp-channels", output=tmp_path / "out", target="size=100", force=True)


def test_parameters_that_a_token_uses_are_reached(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", mixture(), MIXTRAL)
    tensors = load_file(checkpoint / "model.safetensors")
    experts = sum(one.numel() for name, one in tensors.items() if ".experts." in name)
    others = sum(one.numel() for one in tensors.values()) - experts
    most = others + experts // 4 + 10  # two of four experts, and half of each
    for command in ("apply", "remove"):
        plan = sparseprune.plan(checkpoint, "expert-channels", target=f"active={most}", command=command)
        assert plan.target is not None
        assert plan.target.before == others + experts // 2
        assert (plan.target.reached, plan.target.value) == (others + experts // 4, 0.5)
    # A token is sent to two experts, however many there are: only rows of routers go.
    with pytest.raises(
        SparsepruneError, match=r"no sparsity reaches it: the least are .* for each token, with"
    ):
        sparseprune.plan(checkpoint, "experts", target=f"active={most}", command="remove")


def test_what_is_found_stands_in_summary_report_and_spec_as_if_it_had_been_set(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", decoder(), LLAMA)
    words = ("apply", checkpoint, "2of4", "--target", "params=0.8K")
    said = ok(*words, "-o", tmp_path / "out")
    line = "target 800 parameters: scope.matrix.nnz=1 leaves 524 parameters"
    assert line in said.err.splitlines()
    report = valid((tmp_path / "out" / "sparseprune" / "report.json").read_text(), "report")
    assert report["set"] == {"scope.matrix.nnz": "1"}
    assert report["target"] == {
        "unit": "params", "asked": 800, "reached": 524, "before": 1388,
        "name": "scope.matrix.nnz", "value": 1,
    }  # fmt: skip
    first = (tmp_path / "out" / "sparseprune" / "spec.toml").read_text().splitlines()[0]
    assert first == "# Applied with --set scope.matrix.nnz=1"
    # What looks at the output later goes by the number that was found.
    rule = json.loads(ok("inspect", tmp_path / "out", "--by", "rule", "--json").out)
    assert rule["groups"][0]["zeros"] == 3 * 1152 // 4
    ok("verify", tmp_path / "out", "2of4", "--set", "scope.matrix.nnz=1")
    planned = valid(ok(*words, "--dry-run", "--json").out, "plan")
    assert planned["target"] == report["target"]
    assert f"target    {line.removeprefix('target ')}" in ok(*words, "--dry-run").out


def test_a_run_with_a_target_is_the_run_with_the_number_that_it_found(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", decoder(), LLAMA)
    for command in ("remove", "mask"):
        words = (command, checkpoint, "mlp-channels")
        said = ok(*words, "--target", "params=1.2K", "-o", tmp_path / f"{command}-found")
        assert "target 1,200 parameters: sparsity=0.3 leaves 1,196 parameters" in said.err.splitlines()
        ok(*words, "--set", "sparsity=0.25", "-o", tmp_path / f"{command}-set", "-q")
        found, given = (
            {path.name: path.read_bytes() for path in (tmp_path / f"{command}-{how}").rglob("*.safetensors")}
            for how in ("found", "set")
        )
        assert found == given
    removed = valid((tmp_path / "remove-found" / "sparseprune" / "report.json").read_text(), "remove")
    assert removed["set"] == {"sparsity": "0.3"}
    assert removed["target"]["reached"] == removed["totals"]["numel_after"] == 1196


MIXED = """
version = 1
[scope.some]
tensors = "model.layers.{layer}.mlp.{name:up|down}_proj.weight"
block = [1, -1]
shape = [-1, -1]
[scope_coupling.all]
scopes = ["some"]
across = "all"
nnz = 3
"""
ONE = '[scope.up]\ntensors = "**.up_proj.weight"\nblock = [1, -1]\nshape = []\n'
WANTED = "wanted params=NUMBER, active=NUMBER or size=BYTES, such as params=6B or size=12GB"
UNLIKE = "only the data tells how much scope_coupling.all drops, since blocks of unlike sizes compete"
LEAST = "the least are 236 parameters, with scope.matrix.nnz=0, of 1,388 parameters"
UP_AND_DOWN = f'version = 1\n[vars]\nx = 0.1\n{ONE}sparsity = "(2 * x - 1) * (2 * x - 1)"\n'
OTHER = f"{TWO_RULES}{ONE.replace('up', 'gate')}threshold = 0.5\n"
# The spec, the target, what is set -> the line.
REFUSED: dict[str, tuple[str, str, str, str]] = {
    "no number": ("2of4", "6B", "", WANTED),
    "another unit": ("2of4", "params=6GB", "", WANTED),
    "zeros shrink no file": (
        *("2of4", "size=1kB", ""),
        "zeros do not shrink a file; remove cuts out what a spec drops as a whole",
    ),
    "enough already": (
        *("2of4", "params=1M", ""),
        "there are 1,388 parameters as it is, and nothing has to go",
    ),
    "out of reach": ("2of4", "params=200", "", f"no scope.matrix.nnz reaches it: {LEAST}"),
    "a threshold": (
        *(f"version = 1\n{ONE}threshold = 0.5\n", "params=1K", ""),
        "the spec has no nnz and no sparsity that could be varied",
    ),
    "a threshold beside": (
        *(OTHER, "params=1K:keep", ""),
        "only the data tells how much scores the threshold of scope.gate",
    ),
    "shrinking": (
        *(f'version = 1\n{ONE}nnz = 3\nmode = "soft"\n', "params=1K", ""),
        "only the data tells how much scope.up shrinks to zero",
    ),
    "unlike blocks": (MIXED, "params=1K", "", UNLIKE),
    "several variables": (
        *(TWO_RULES, "params=1K", ""),
        "it could vary keep or part: name one, as in --target params=1K:keep, or set the others by --set",
    ),
    "no such variable": (
        *(TWO_RULES, "params=1K:kep", ""),
        "the spec has no such number to vary as kep; there is keep and part",
    ),
    "a variable that is set": (
        *(TWO_RULES, "params=1K:keep", "keep=3"),
        "it varies keep, which --set has set: leave one of them out",
    ),
    "all variables are set": (
        *("mlp-channels", "params=1K", "sparsity=0.5"),
        "it varies sparsity, which --set has set: leave one of them out",
    ),
    "up and down": (UP_AND_DOWN, "params=1.3K", "", "more of x is sometimes more and sometimes less"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_number_can_reach_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    spec, goal, given, why = REFUSED[name]
    words = ("--set", given) if given else ()
    checkpoint = write(tmp_path / "in", decoder(), LLAMA)
    for command in ("apply", "mask", "plan"):
        said = refused(command, checkpoint, spec, "--target", goal, *words)
        assert said.err == f"sparseprune: --target {goal}: {why}\n"


def test_what_a_removal_cannot_do_is_refused_as_without_a_target(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", decoder(), LLAMA)
    save_file({"a.weight": torch.ones(4, 4)}, tmp_path / "m.safetensors")
    goal = ("--target", "params=10")
    for words in ((checkpoint, "2of4"), (tmp_path / "m.safetensors", ONE_FILE)):
        assert refused("remove", *words, *goal).err == refused("remove", *words).err
    unknown = write(tmp_path / "unknown", decoder(), {**LLAMA, "model_type": "nobody"})
    words = (unknown, "mlp-channels")
    assert refused("remove", *words, *goal).err == refused("remove", *words).err
    said = refused("remove", checkpoint, "mlp-channels-global", *goal).err
    assert said == (
        "sparseprune: --target params=10: only the data tells what is left of each tensor by "
        "mlp-channels-global.toml\n"
    )
    said = refused("remove", checkpoint, "--masks", checkpoint, *goal).err
    assert said == "sparseprune: --target params=10: goes with a SPEC, of which it varies a number\n"


def test_too_few_experts_for_a_token_are_told_beside_the_least_that_can_be_left(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "in", mixture(), MIXTRAL)
    said = refused("remove", checkpoint, "experts", "--target", "params=1000").err
    assert (
        "no sparsity reaches it: the least are 2,184 parameters, with sparsity=0.5, of 3,752 parameters"
        in said
    )
    assert "; beyond that, " in said


ONE_FILE = 'version = 1\nscope.a = { tensors = "a.weight", block = [1, -1], shape = [-1], sparsity = 0.5 }\n'
