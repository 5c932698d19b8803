"""Verify: what it counts is what plain loops over blocks count, by every strategy, cut and number of jobs."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from sparseprune import load_masks
from sparseprune.checkpoint import TensorReader, lay_out, open_checkpoint
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import SparsepruneError, SparsityError, SpecError
from sparseprune.execution import nonzero_blocks
from sparseprune.execution.nonzero_blocks import count_strategy, reads_of
from sparseprune.execution.regions import Limits, leaves_of, members_of
from sparseprune.execution.strategy import CountNonzero
from sparseprune.execution.verify import count_survivors, make_check
from sparseprune.spec import BoundScope, parse_spec
from tests import oracle
from tests.commands import ok, run
from tests.execution.structures import CASES, FLOATS, INTEGERS, one
from tests.execution.test_regions import element_at
from tests.limits import AMPLE, force, narrow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from sparseprune.execution.regions import AnyScope
    from sparseprune.execution.schedule import TaskGroup
    from sparseprune.execution.verify import Check, Verification
    from sparseprune.spec import BoundBlock, BoundInstance

    Index = tuple[int, ...]

KINDS = ("scopes", "blocks", "elements")
CUTS = ((1, 1), (7, 3), (60, 1), (1 << 20, 3))
"""How many elements are counted at one time, by how many jobs."""
STRATEGIES = ("contiguous", "strided", "block_norms", "torch_in_memory")


# -- the oracle: plain loops over the blocks of every scope -----------------------------------------


@dataclass(frozen=True)
class ByHand:
    """One scope: its place, how many blocks may survive and do, its stored elements, its torn blocks."""

    rule: str
    instance: str
    place: Index
    allowed: int | None
    nonzero: int = 0
    broken: bool = False
    elements: Mapping[str, list[int]] = field(default_factory=dict)
    torn: int = 0
    torn_in: Mapping[str, int] = field(default_factory=dict)


def structure_of(scope: AnyScope) -> oracle.Coupled:
    scopes, orders = [], []
    for member, order in members_of(scope):
        parts = leaves_of(member.block)
        leaves = tuple(oracle.Leaf(leaf.view_shape, leaf.shape) for leaf, _ in parts)
        scopes.append(oracle.Scope(oracle.Fused(leaves, tuple(own for _, own in parts)), member.shape))
        orders.append(order)
    return oracle.Coupled(tuple(scopes), tuple(orders))


def parts_of(instance: BoundInstance) -> Iterator[AnyScope]:
    """What is checked of an instance: under a threshold each member alone, with every block as a scope."""
    if instance.budget.nnz is not None:
        yield instance.scope
        return
    for member, _ in members_of(instance.scope):
        yield BoundScope(member.label, member.block, (1,) * len(member.shape))


def scopes_by_hand(
    check: Check, is_zero: Mapping[str, list[bool]], is_kept: Mapping[str, list[bool]]
) -> Iterator[ByHand]:
    """`is_kept` says by element what pruning would keep, which decides under a threshold."""
    for rule, instance in check.plan.bound.instances():
        if instance.soft is not None and instance.budget.nnz is None:
            continue
        for scope in parts_of(instance):
            structure = structure_of(scope)
            for place in structure.places():
                yield scope_by_hand(
                    ByHand(rule.name, instance.label, place, instance.budget.nnz),
                    [
                        [(scope.leaves[leaf], index) for leaf, index in block]
                        for block in structure.blocks(place)
                    ],
                    is_zero,
                    is_kept,
                )


def scope_by_hand(
    scope: ByHand,
    blocks: list[list[tuple[BoundBlock, Index]]],
    is_zero: Mapping[str, list[bool]],
    is_kept: Mapping[str, list[bool]],
) -> ByHand:
    nonzero = torn = undercut = 0
    torn_in: Counter[str] = Counter()
    elements: dict[str, list[int]] = {}
    for block in blocks:
        alive: dict[BoundBlock, bool] = {}
        kept = False
        for leaf, index in block:
            at = element_at(leaf, index)
            elements.setdefault(leaf.tensor, []).append(at)
            alive[leaf] = alive.get(leaf, False) or not is_zero[leaf.tensor][at]
            kept = kept or is_kept[leaf.tensor][at]
        nonzero += any(alive.values())
        undercut += any(alive.values()) and not kept
        if scope.allowed is not None and any(alive.values()) and not all(alive.values()):
            torn += 1
            torn_in.update(leaf.tensor for leaf in alive if alive[leaf])
    broken = undercut > 0 if scope.allowed is None else nonzero > scope.allowed
    return dataclasses.replace(
        scope, nonzero=nonzero, broken=broken, elements=elements, torn=torn, torn_in=torn_in
    )


def facts(verification: Verification) -> dict[str, Any]:
    """What an outcome says, as `expected` has it, which tells rows and columns of tiles by the name."""
    rules = {
        " ".join(filter(None, (rule.name, rule.along))): (
            rule.scopes,
            rule.broken,
            rule.torn,
            dict(rule.survivors),
        )
        for rule in verification.rules
    }
    tensors = {
        (tensor.name, " ".join(filter(None, (tensor.rule, tensor.along)))): (
            tensor.scopes,
            tensor.broken,
            tensor.torn,
            tensor.first
            and (tensor.first.instance, tensor.first.scope, tensor.first.element, tensor.first.nonzero),
        )
        for tensor in verification.tensors
    }
    return {"rules": rules, "tensors": tensors}


def expected(check: Check, scopes: list[ByHand]) -> dict[str, Any]:
    rules, tensors = {}, {}
    for rule in check.plan.bound.rules:
        own = [one for one in scopes if one.rule == rule.name]
        broken = [one for one in own if one.broken]
        torn = sum(one.torn for one in broken)
        rules[rule.name] = (len(own), len(broken), torn, dict(Counter(one.nonzero for one in own)))
        for name in check.plan.reached:
            reaching = [one for one in own if name in one.elements]
            bad = [one for one in broken if name in one.elements]
            first = None
            if bad:
                shape = check.plan.checkpoint.tensors[name].shape
                index = tuple(int(at) for at in np.unravel_index(min(bad[0].elements[name]), shape))
                first = (bad[0].instance, bad[0].place, index, bad[0].nonzero)
            if reaching:
                torn_here = sum(one.torn_in.get(name, 0) for one in bad)
                tensors[name, rule.name] = (len(reaching), len(bad), torn_here, first)
    return {"rules": rules, "tensors": tensors}


# -- every structure -------------------------------------------------------------------------------


def flat_flags(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[bool]]:
    return {name: (tensor.to(torch.float64) == 0).flatten().tolist() for name, tensor in tensors.items()}


def kept_by(path: Path, spec: Path, tensors: Mapping[str, torch.Tensor], folder: Path) -> Any:
    """What pruning would keep of a checkpoint, by element; all of it where no rule reaches."""
    ok("mask", path, spec, "-o", folder, "-q")
    masks = load_masks(folder)
    return {
        name: masks.get(name, torch.ones(tensor.shape)).flatten().bool().tolist()
        for name, tensor in tensors.items()
    }


def checked(path: Path, spec: str, jobs: int = 2) -> tuple[Check, Verification]:
    check = make_check(open_checkpoint(path), parse_spec(spec), AMPLE, jobs)
    passed: list[int] = []
    with TensorReader() as reader:
        verification = count_survivors(check, reader, lambda nbytes, _: passed.append(nbytes))
    assert sum(passed) == check.nbytes
    return check, verification


def only(monkeypatch: pytest.MonkeyPatch, kind: str, limit: int) -> None:
    """One strategy of counting alone, with about so many elements at one time."""
    strategies = nonzero_blocks.count_strategies

    def one_strategy(scope: AnyScope, tensors: Any, limits: Any) -> Iterator[CountNonzero]:
        for strategy in strategies(scope, tensors, limits):
            if strategy.kind == kind:
                batch = nonzero_blocks.batch_of(scope, limit) if kind == "scopes" else 1
                yield replace(strategy, elements=limit, batch=batch)

    monkeypatch.setattr(nonzero_blocks, "count_strategies", one_strategy)


def versions(folder: Path, name: str, dtype: torch.dtype) -> Iterator[tuple[Path, Path]]:
    """A structure's checkpoint as it is, pruned, and pruned with some zeros lost and others sprinkled in."""
    spec, tensors = CASES[name]
    (folder / "spec.toml").write_text(spec)
    dense = tensors(dtype)
    save_file(dense, folder / "dense.safetensors")
    run(
        "apply", folder / "dense.safetensors", folder / "spec.toml", "-o", folder / "pruned.safetensors", "-q"
    )
    pruned = load_file(folder / "pruned.safetensors")
    generator = torch.Generator().manual_seed(len(name))
    for seed, share in enumerate((0.01, 0.3)):
        changed = {}
        for key, tensor in pruned.items():
            lost = torch.rand(tensor.shape, generator=generator) < share
            zeroed = torch.rand(tensor.shape, generator=generator) < share / 2
            small = (dense[key].to(torch.float64) / 8).to(dtype) if dtype.is_floating_point else dense[key]
            mixed = torch.where(lost, small.to(torch.float64), tensor.to(torch.float64))
            mixed = torch.where(zeroed, torch.tensor(-0.0, dtype=torch.float64), mixed)
            changed[key] = mixed.to(dtype)
        save_file(changed, folder / f"changed{seed}.safetensors")
    for version in ("dense", "pruned", "changed0", "changed1"):
        yield folder / f"{version}.safetensors", folder / f"{version}-masks.safetensors"


def by_hand(path: Path, masks: Path, spec: Path, check: Check) -> dict[str, Any]:
    """What is kept matters only under a threshold."""
    tensors = load_file(path)
    kept: Any = defaultdict(lambda: defaultdict(bool))
    if "threshold" in spec.read_text():
        kept = kept_by(path, spec, tensors, masks)
    return expected(check, list(scopes_by_hand(check, flat_flags(tensors), kept)))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", CASES)
def test_counts_are_those_of_plain_loops_by_every_strategy_cut_and_number_of_jobs(
    tmp_path: Path, name: str
) -> None:
    """Every cut meets one version of a structure, and another one of the next structure; so do strategies."""
    spec, first = CASES[name][0], list(CASES).index(name)
    for number, (path, masks) in enumerate(versions(tmp_path, name, torch.bfloat16), first):
        check, verification = checked(path, spec)
        wanted = by_hand(path, masks, tmp_path / "spec.toml", check)
        assert facts(verification) == wanted, path.name
        if path.stem == "pruned":
            assert not any(rule.broken for rule in verification.rules)
        limit, jobs = CUTS[number % len(CUTS)]
        kind = KINDS[(number + number // len(CUTS)) % len(KINDS)]
        with pytest.MonkeyPatch.context() as patch:
            only(patch, kind, limit)
            assert facts(checked(path, spec, jobs)[1]) == wanted, (path.name, kind, limit, jobs)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("name", [name for name in CASES if "threshold" in CASES[name][0]])
def test_what_a_threshold_would_drop_is_found_by_every_strategy_and_cut(tmp_path: Path, name: str) -> None:
    spec = CASES[name][0]
    for path, masks in versions(tmp_path, name, torch.bfloat16):
        check, _ = checked(path, spec)
        wanted = by_hand(path, masks, tmp_path / "spec.toml", check)
        worked: list[Any] = []
        slab, tile, jobs = (1, 1, 1) if path.stem == "changed0" else (64, 16, 3)
        one = list(CASES).index(name) % len(STRATEGIES)
        for strategy in STRATEGIES if slab > 1 else STRATEGIES[one : one + 1]:
            with pytest.MonkeyPatch.context() as patch:
                narrow(patch, slab, tile)
                force(patch, strategy)
                groups = make_check(open_checkpoint(path), parse_spec(spec), AMPLE, jobs).groups
                if (how := (slab, [group.strategy for group in groups])) not in worked:
                    worked.append(how)
                    assert facts(checked(path, spec, jobs)[1]) == wanted, (path.name, strategy, slab)


BUDGETS = ("2:4", "whole rows", "blocks along rows", "channels", "fused columns")
THRESHOLDS = ("a threshold", "a threshold on blocks", "channels by threshold")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (names[number % len(names)], dtype)
        for names, dtypes in ((BUDGETS, [*FLOATS, *INTEGERS]), (THRESHOLDS, [*FLOATS, torch.int16]))
        for number, dtype in enumerate(dtypes)
    ],
    ids=str,
)
def test_every_dtype_is_counted_and_held_against_a_threshold(
    tmp_path: Path, name: str, dtype: torch.dtype
) -> None:
    for path, masks in versions(tmp_path, name, dtype):
        check, verification = checked(path, CASES[name][0])
        wanted = by_hand(path, masks, tmp_path / "spec.toml", check)
        assert facts(verification) == wanted, path.name


# -- meaning ---------------------------------------------------------------------------------------


def verified(folder: Path, spec: str, **tensors: torch.Tensor) -> Verification:
    save_file({f"{name}.weight": tensor for name, tensor in tensors.items()}, folder / "m.safetensors")
    return checked(folder / "m.safetensors", spec)[1]


TWO_OF_FOUR = one("[1, 1]", "[1, 4]", "nnz = 2")


def test_zero_of_either_sign_is_zero_and_nan_and_infinity_are_not(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    rows = torch.tensor([[0.0, -0.0, 1, 2], [nan, nan, 0, 0], [nan, -inf, 1, 0], [-0.0] * 4])
    (rule,) = verified(tmp_path, TWO_OF_FOUR, a=rows).rules
    assert (rule.scopes, rule.broken, rule.survivors) == (4, 1, ((0, 1), (2, 2), (3, 1)))


@pytest.mark.parametrize(("nnz", "broken"), [(0, 2), (1, 1), (3, 1), (4, 0)])
def test_as_many_blocks_as_are_allowed_may_survive(tmp_path: Path, nnz: int, broken: int) -> None:
    rows = torch.tensor([[1.0, 2, 3, 4], [0, 0, 5, 0], [0, 0, 0, 0]])
    verification = verified(tmp_path, one("[1, 1]", "[1, 4]", f"nnz = {nnz}"), a=rows)
    assert verification.rules[0].broken == broken
    (tensor,) = verification.tensors
    assert (tensor.nnz, tensor.broken, tensor.first is None) == (nnz, broken, broken == 0)


def test_the_first_broken_scope_is_told_by_its_place_its_element_and_its_blocks(tmp_path: Path) -> None:
    rows = torch.zeros(6, 8)
    rows[3, 4:7] = 1
    rows[5, 0:4] = 1
    (tensor,) = verified(tmp_path, TWO_OF_FOUR, a=rows).tensors
    assert (tensor.broken, tensor.scopes) == (2, 12)
    first = tensor.first
    assert first is not None
    assert (first.scope, first.element, first.nonzero, first.allowed) == ((3, 1), (3, 4), 3, 2)
    assert first.instance == "all[name=a]"


def test_what_is_lost_in_one_member_of_a_coupling_is_torn_there_and_nowhere_else(tmp_path: Path) -> None:
    spec, tensors = CASES["channels"]
    (tmp_path / "spec.toml").write_text(spec)
    save_file(tensors(torch.float32), tmp_path / "m.safetensors")
    run("apply", tmp_path / "m.safetensors", tmp_path / "spec.toml", "-o", tmp_path / "p.safetensors", "-q")
    pruned = load_file(tmp_path / "p.safetensors")
    dead = [channel for channel in range(16) if not pruned["1.up"][channel].any()]
    pruned["1.down"][4, dead[:2]] = 1
    save_file(pruned, tmp_path / "p.safetensors")
    _, verification = checked(tmp_path / "p.safetensors", spec)
    (rule,) = verification.rules
    assert (rule.broken, rule.torn, rule.survivors) == (1, 2, ((7, 1), (9, 1)))
    torn = {tensor.name: (tensor.broken, tensor.torn) for tensor in verification.tensors}
    healthy = dict.fromkeys(("0.up", "0.down", "0.bias"), (0, 0))
    assert torn == healthy | {"1.up": (1, 0), "1.down": (1, 2), "1.bias": (1, 0)}


def test_empty_tensors_and_scalars_have_the_scopes_that_they_have(tmp_path: Path) -> None:
    spec = 'version = 1\n[scope.all]\ntensors = "{name}.weight"\nblock = []\nshape = []\nnnz = 0'
    verification = verified(tmp_path, spec, a=torch.tensor(3.0), b=torch.zeros(0, 4), c=torch.tensor(-0.0))
    found = {tensor.name[0]: (tensor.scopes, tensor.broken) for tensor in verification.tensors}
    check, _ = checked(tmp_path / "m.safetensors", spec)
    scopes = {
        task.instance.label[-2]: math.prod(task.instance.scope.grid_shape)
        for group in check.groups
        for task in group.tasks
    }
    assert found == {"a": (1, 1), "b": (scopes["b"], 0), "c": (1, 0)}
    (first,) = (tensor.first for tensor in verification.tensors if tensor.first)
    assert (first.scope, first.element, first.nonzero) == ((), (), 1)


def test_a_soft_threshold_is_not_checked_and_says_why(tmp_path: Path) -> None:
    verification = verified(tmp_path, CASES["soft"][0], a=torch.ones(8, 8))
    (rule,) = verification.rules
    assert (rule.instances, rule.tensors, rule.scopes, rule.broken, rule.survivors) == (1, 1, 0, 0, ())
    assert rule.unchecked is not None
    assert rule.unchecked == "a survivor of a soft threshold may have any size"
    assert list(verification.tensors) == []


def test_a_soft_budget_is_checked_as_a_hard_one(tmp_path: Path) -> None:
    rows = torch.zeros(4, 4)
    rows[0] = 1
    spec = one("[1, 1]", "[1, 4]", 'mode = "soft"\nnnz = 2')
    (rule,) = verified(tmp_path, spec, a=rows).rules
    assert (rule.broken, rule.unchecked) == (1, None)


SCORED = one("[1, 1]", "[1, 4]", '{budget}\nscore = { kind = "values", file = "gone.safetensors" }')


def test_a_budget_needs_no_score_files_and_a_threshold_does(tmp_path: Path) -> None:
    rows = torch.zeros(4, 4)
    assert verified(tmp_path, SCORED.replace("{budget}", "nnz = 2"), a=rows).rules[0].broken == 0
    soft = one("[1, 1]", "[1, 4]", 'nnz = 2\nmode = "soft"\nconditioners = "gone.safetensors"')
    assert verified(tmp_path, soft, a=rows).rules[0].broken == 0
    with pytest.raises(SpecError, match=r"\[scope.all\] score: .*gone.safetensors: no such file"):
        verified(tmp_path, SCORED.replace("{budget}", "threshold = 0.5"), a=rows)


def test_a_threshold_asks_the_scores_of_the_file(tmp_path: Path) -> None:
    scores = torch.tensor([[0.4, 0.6, 0.4, 0.6]])
    save_file({"a.weight": scores}, tmp_path / "scores.safetensors")
    spec = SCORED.replace("{budget}", "threshold = 0.5").replace(
        "gone.safetensors", str(tmp_path / "scores.safetensors")
    )
    verification = verified(tmp_path, spec, a=torch.tensor([[1.0, 1, 0, 0]]))
    assert (verification.rules[0].broken, verification.rules[0].survivors) == (1, ((0, 2), (1, 2)))
    first = verification.tensors[0].first
    assert first is not None
    assert (first.element, first.nonzero, first.allowed) == ((0, 0), 1, None)


def test_nan_has_no_score_to_hold_against_a_threshold(tmp_path: Path) -> None:
    spec = one("[1, 1]", "[1, 4]", "threshold = 0.5")
    with pytest.raises(SparsityError, match=r"a\.weight: NaN at \[0, 2\]"):
        verified(tmp_path, spec, a=torch.tensor([[1.0, 1, math.nan, 0]]))


def test_a_rule_that_matches_nothing_is_not_told(tmp_path: Path) -> None:
    nothing = TWO_OF_FOUR.replace("version = 1", "").replace("[scope.all]", "[scope.none]")
    spec = TWO_OF_FOUR + nothing.replace("{name}.weight", "nothing") + "optional = true\n"
    verification = verified(tmp_path, spec, a=torch.zeros(4, 4))
    assert [rule.name for rule in verification.rules] == ["scope.all"]


# -- how it is done --------------------------------------------------------------------------------


def headers(folder: Path, *tensors: tuple[str, str, Index]) -> Path:
    """A checkpoint of headers and holes."""
    folder.mkdir(exist_ok=True)
    raw = lay_out(tensors, {}).raw
    nbytes = sum(math.prod(shape) * DTYPES[dtype].bits // 8 for _, dtype, shape in tensors)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(raw)
        file.truncate(len(raw) + nbytes)
    return folder


LARGE = (("a.weight", "BF16", (4096, 16384)), ("b.weight", "BF16", (16384, 4096)))
CHANNELS = CASES["channels"][0]
FUSED_ELEMENTS = """
version = 1
block.up = { tensors = "{layer}.up", shape = [1, 1] }
block.down = { tensors = "{layer}.down", shape = [1, 1] }
block_coupling.pair = { blocks = ["up", "down"] }
scope.elements = { block = "pair", shape = [1, -1], nnz = 1 }
"""


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (TWO_OF_FOUR, "scopes"),
        (one("[1, 1]", "[4, 1]", "nnz = 2"), "scopes"),
        (one("[1, 1]", "[1, -1]", "nnz = 2"), "scopes"),
        (one("[1, 1]", "[-1, 1]", "nnz = 2"), "blocks"),
        (one("[1, 1]", "[-1, -1]", "nnz = 2"), "blocks"),
        (one("[16, 16]", "[-1, -1]", "nnz = 2"), "blocks"),
        (one("[1, -1]", "[8, 1]", "nnz = 2"), "scopes"),
        (one("[-1, 1]", "[1, 4]", "nnz = 2"), "elements"),
        (one("[-1, -1]", "[1, 1]", "nnz = 0"), "elements"),
    ],
)
def test_what_is_read_lies_together(tmp_path: Path, spec: str, kind: str) -> None:
    check = make_check(open_checkpoint(headers(tmp_path / "in", *LARGE)), parse_spec(spec), AMPLE, 2)
    tensors = check.plan.checkpoint.tensors
    for group in check.groups:
        strategy = counting(group)
        assert strategy.kind == kind
        for task in group.tasks:
            assert task.nbytes(tensors) / reads_of(task.instance.scope, strategy) >= 4096


def counting(group: TaskGroup) -> CountNonzero:
    assert isinstance(group.strategy, CountNonzero)
    return group.strategy


def test_columns_of_one_matrix_are_not_read_one_by_one_beside_the_rows_of_another(tmp_path: Path) -> None:
    shapes = (("0.up", "BF16", (8192, 2048)), ("0.down", "BF16", (2048, 8192)), ("0.bias", "BF16", (8192,)))
    check = make_check(open_checkpoint(headers(tmp_path / "in", *shapes)), parse_spec(CHANNELS), AMPLE, 2)
    assert [counting(group).kind for group in check.groups] == ["elements"]


@pytest.mark.parametrize("name", [name for name in CASES if "slice" not in CASES[name][0]])
def test_memory_is_kept_to_whatever_the_structure(tmp_path: Path, name: str) -> None:
    spec, tensors = CASES[name]
    shapes = [
        (key, "BF16", tuple(size * 256 for size in tensor.shape))
        for key, tensor in tensors(torch.bfloat16).items()
    ]
    asked = parse_spec(spec.replace("threshold = ", "nnz = 0 #"))
    checkpoint = open_checkpoint(headers(tmp_path / "in", *shapes))
    for memory, jobs in ((1 << 30, 2), (256 << 20, 64), (120 << 20, 1), (120 << 20, 64)):
        check = make_check(checkpoint, asked, memory, jobs)
        for group in check.groups:
            assert group.strategy.memory + group.strategy.held <= check.limits.memory
        assert check.peak_bytes <= memory


def test_too_little_memory_is_refused(tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(4, 4)}, tmp_path / "m.safetensors")
    with pytest.raises(SparsepruneError, match=r"^--memory 1.00 kB: this run needs"):
        make_check(open_checkpoint(tmp_path / "m.safetensors"), parse_spec(TWO_OF_FOUR), 1000, 1)


def test_scopes_for_which_no_strategy_is_left_are_refused(tmp_path: Path) -> None:
    shapes = [(f"0.{name}", "BF16", (512, 512)) for name in ("up", "down")]
    spec = parse_spec(FUSED_ELEMENTS)
    check = make_check(open_checkpoint(headers(tmp_path / "in", *shapes)), spec, AMPLE, 1)
    (group,) = check.groups
    wanted = r"elements\[layer=0\]: 512 scopes of 1024 elements in 2 parts cannot be counted in 9.00 kB; give"
    with pytest.raises(SparsepruneError, match=wanted):
        count_strategy(group.task.instance.scope, check.plan.checkpoint.tensors, Limits(9000))


# -- batches: small tensors that look alike are counted together --------------------------------------

EXPERTS = 40
EXPERTS_2_OF_4 = TWO_OF_FOUR.replace("{name}.weight", "{expert}.{name}")
EXPERTS_CHANNELS = """
version = 1
block.up = { tensors = "{expert}.up", shape = [1, -1] }
block.down = { tensors = "{expert}.down", shape = [-1, 1] }
block_coupling.channel = { blocks = ["up", "down"], orders = [[0, 1], [1, 0]] }
scope.channels = { block = "channel", shape = [-1, -1], nnz = "expert + 2" }
"""


def experts(rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {
        f"{expert}.{name}": torch.zeros(size, dtype=torch.bfloat16)
        for expert in range(EXPERTS)
        for name, size in (("up", (rows, columns)), ("down", (columns, rows)))
    }


def checked_tensors(folder: Path, tensors: dict[str, torch.Tensor], spec: str) -> tuple[Check, Verification]:
    save_file(tensors, folder / "m.safetensors")
    return checked(folder / "m.safetensors", spec)


def test_a_few_batches_have_all_experts_and_each_is_told_for_itself(tmp_path: Path) -> None:
    tensors = experts(8, 12)
    tensors["7.up"][3, 4:7] = 1
    tensors["31.down"][2, 0:4] = 1
    tensors["31.down"][11, 4:8] = 1
    check, verification = checked_tensors(tmp_path, tensors, EXPERTS_2_OF_4)
    assert [len(group.tasks) for group in check.groups] == [
        EXPERTS,
        EXPERTS,
    ]  # one for each of the two shapes
    (rule,) = verification.rules
    assert (rule.scopes, rule.broken) == (2 * EXPERTS * 24, 3)
    assert rule.survivors == ((0, 2 * EXPERTS * 24 - 3), (3, 1), (4, 2))
    broken = {tensor.name: tensor for tensor in verification.tensors if tensor.broken}
    assert {name: tensor.broken for name, tensor in broken.items()} == {"7.up": 1, "31.down": 2}
    first = broken["31.down"].first
    assert first is not None
    assert (first.instance, first.scope, first.element) == ("all[expert=31,name=down]", (2, 0), (2, 0))


def test_instances_with_unlike_budgets_are_not_mixed(tmp_path: Path) -> None:
    tensors = experts(4 + EXPERTS, 3)
    for expert in range(EXPERTS):
        tensors[f"{expert}.up"][: expert + 2] = 1  # as many channels as this expert may keep
        tensors[f"{expert}.down"][:, : expert + 2] = 1
    assert checked_tensors(tmp_path, tensors, EXPERTS_CHANNELS)[1].rules[0].broken == 0
    tensors["20.up"][:] = 1
    _, verification = checked_tensors(tmp_path, tensors, EXPERTS_CHANNELS)
    broken = {tensor.name: (tensor.broken, tensor.torn) for tensor in verification.tensors if tensor.broken}
    assert broken == {"20.up": (1, EXPERTS + 4 - 22), "20.down": (1, 0)}


@pytest.mark.parametrize("spec", [EXPERTS_2_OF_4, EXPERTS_CHANNELS], ids=["2:4", "channels"])
def test_what_is_told_is_what_each_instance_alone_would_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.rand(tensor.shape, generator=generator) < 0.45).to(torch.bfloat16)
        for name, tensor in experts(4 + EXPERTS, 8).items()
    }
    together = checked_tensors(tmp_path, tensors, spec)[1]
    assert sum(rule.broken for rule in together.rules) > 0
    monkeypatch.setattr(nonzero_blocks, "batch_of", lambda *_: 1)
    check, alone = checked_tensors(tmp_path, tensors, spec)
    assert all(len(group.tasks) == 1 for group in check.groups)
    assert alone == together


def test_tensors_that_fill_a_chunk_are_not_batched(tmp_path: Path) -> None:
    check, _ = checked_tensors(tmp_path, experts(8, 12), EXPERTS_2_OF_4)
    strategy, scope = counting(check.groups[0]), check.groups[0].task.instance.scope
    assert strategy.batch == strategy.elements // 96 > EXPERTS
    for limit, wanted in ((8 * 96, 8), (8 * 96 - 1, 1), (95, 1)):
        assert nonzero_blocks.batch_of(scope, limit) == wanted
