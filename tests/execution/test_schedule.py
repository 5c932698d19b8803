"""The schedule: within what memory a plan is worked, for checkpoints that are headers and holes."""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.api.resources import memory_of
from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.errors import SparsepruneError
from sparseprune.execution.plan import Plan, make_plan
from sparseprune.execution.pruning import jobs_of
from sparseprune.execution.regions import TORCH_THREAD, gaps, limits_of, whole_region
from sparseprune.execution.schedule import Schedule, make_schedule, resident_of
from sparseprune.execution.strategy import Contiguous, Rebuild, choose, needs_torch
from sparseprune.execution.tensor_io import TensorIO
from sparseprune.spec import parse_spec
from tests.execution.structures import CASES
from tests.limits import AMPLE, narrow
from tests.samples import TWO_OF_FOUR, write_shards
from tests.test_house import ROOT

MIB, GIB = 1 << 20, 1 << 30
LAYERS = {10: 2, 100: 24}
"""Layers of the decoder that has so many gigabytes."""
HIDDEN, HEADS, GROUPS, INNER = 16384, 128, 8, 32768

SHIPPED = (
    "2of4", "4of8", "block16", "block16x16", "coupled-2of4", "unstructured", "unstructured-global",
    "mlp-channels", "mlp-channels-global", "heads", "heads-global",
)  # fmt: skip
PROJECTIONS = """
version = 1
[scope.proj]
tensors = "model.layers.{layer}.{part:**}.{name}_proj.weight"
block = BLOCK
shape = SHAPE
"""
STRUCTURES = {
    "rows": ("[1, 1]", "[1, -1]", "sparsity = 0.5"),
    "columns": ("[1, 1]", "[-1, 1]", "sparsity = 0.5"),
    "whole tensors": ("[1, 1]", "[-1, -1]", "sparsity = 0.5"),
    "a threshold": ("[1, 1]", "[-1, -1]", "threshold = 0.5"),
    "rows as blocks": ("[1, -1]", "[-1, 1]", "sparsity = 0.5"),
    "columns as blocks": ("[-1, 1]", "[1, -1]", "sparsity = 0.5"),
    "columns by threshold": ("[-1, 1]", "[1, -1]", "threshold = 0.5"),
    "half of all rows as a block": ("[512, -1]", "[-1, -1]", "sparsity = 0.5"),
    "random elements of rows": ("[1, 1]", "[1, -1]", 'sparsity = 0.5\nscore = { kind = "random" }'),
    "random elements of columns": ("[1, 1]", "[-1, 1]", 'sparsity = 0.5\nscore = { kind = "random" }'),
    "random elements": ("[1, 1]", "[-1, -1]", 'sparsity = 0.5\nscore = { kind = "random" }'),
    "soft columns": ("[-1, 1]", "[1, -1]", 'sparsity = 0.5\nmode = "soft"'),
    "soft elements": ("[1, 1]", "[-1, -1]", 'sparsity = 0.5\nmode = "soft"\neps = 1e-9'),  # by torch
}
OVER_ALL = '[scope_coupling.all]\nscopes = ["proj"]\nacross = "all"\n'


def structure(name: str) -> str:
    """A spec for all projections; `NAME over all` lets them compete."""
    block, shape, budget = STRUCTURES[name.removesuffix(" over all")]
    spec = PROJECTIONS.replace("BLOCK", block).replace("SHAPE", shape)
    return spec + (OVER_ALL if name.endswith(" over all") else "") + budget


WITH_ALL = (*STRUCTURES, "whole tensors over all", "soft elements over all")
SPECS: Mapping[str, str] = {name: (ROOT / "specs" / f"{name}.toml").read_text() for name in SHIPPED} | {
    name: structure(name) for name in WITH_ALL
}


def write_holes(folder: Path, layers: int) -> int:
    """A decoder of BF16, with matrices of up to 1 GiB, whose data are holes; gives the bytes of it."""
    head = HIDDEN // HEADS
    attention = {"q": (HIDDEN, HIDDEN), "k": (GROUPS * head, HIDDEN), "v": (GROUPS * head, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.self_attn.{name}_proj.weight": shape for name, shape in attention.items()}
        shapes |= {
            f"{place}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{place}.mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{place}.mlp.up_proj.weight": (INNER, HIDDEN),
            f"{place}.mlp.down_proj.weight": (HIDDEN, INNER),
        }
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    (folder / "config.json").write_text(json.dumps(config))
    return end


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Path]:
    """Decoders by their size in gigabytes."""
    home = tmp_path_factory.mktemp("holes")
    for size, layers in LAYERS.items():
        assert 0.8 * size < write_holes(home / str(size), layers) / 1e9 < 1.2 * size
    return {size: home / str(size) for size in LAYERS}


def plan_of(decoder: Path, name: str) -> Plan:
    return make_plan(open_checkpoint(decoder), parse_spec(SPECS[name]))


def assert_bounded(schedule: Schedule, memory: int) -> None:
    """No item and no program ever needs more than there is."""
    limits = schedule.limits
    for group in schedule.groups:
        assert 0 < group.strategy.memory <= limits.memory
        assert 0 <= group.strategy.held <= limits.held
        # There is room for an item beside what its program holds, so that none has to run without room.
        assert group.strategy.memory + group.strategy.held <= limits.memory
    assert limits.memory + limits_base(schedule) == memory
    assert limits_base(schedule) < schedule.peak_bytes <= memory


def least_memory(*, uses_torch: bool) -> int:
    """The least that a run is said to need."""
    with pytest.raises(SparsepruneError) as caught:
        limits_of(0, uses_torch=uses_torch)
    told = re.search(r"; give --memory (\d+MB)$", str(caught.value))
    assert told is not None
    return memory_of(told[1])


def limits_base(schedule: Schedule) -> int:
    """What the interpreter takes, with torch where it is needed, and what all tensors take."""
    resident = resident_of(schedule.plan, masks=True)
    return AMPLE - limits_of(AMPLE, uses_torch=schedule.uses_torch, resident=resident).memory


HOLD_ALL = {"mlp-channels-global", "heads-global"}
"""Specs whose one task holds a number for each block of the model: within the share that it may hold."""


@pytest.mark.parametrize("name", SPECS)
def test_the_peak_grows_with_the_number_of_tensors_alone(decoders: Mapping[int, Path], name: str) -> None:
    small, large = (make_schedule(plan_of(decoders[size], name), GIB, 2) for size in LAYERS)
    held = large.limits.held if name in HOLD_ALL else 0
    grown = large.limits.resident - small.limits.resident
    assert small.peak_bytes <= large.peak_bytes <= small.peak_bytes + grown + held


@pytest.mark.parametrize("name", SPECS)
def test_any_memory_is_kept_to(decoders: Mapping[int, Path], name: str) -> None:
    plan = plan_of(decoders[100], name)
    for memory in (4 * GIB, GIB, 512 * MIB, 400 * MIB):
        schedule = make_schedule(plan, memory, 2)
        assert len(schedule.groups) > 0
        assert_bounded(schedule, memory)


@pytest.mark.parametrize(
    "name", ["soft columns", "soft elements", "random elements", "soft elements over all"]
)
def test_less_memory_gives_a_smaller_peak(decoders: Mapping[int, Path], name: str) -> None:
    plan = plan_of(decoders[10], name)
    peaks = [make_schedule(plan, memory, 2).peak_bytes for memory in (4 * GIB, GIB, 512 * MIB, 400 * MIB)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] > peaks[-1]  # no more is held than there are blocks, however much there is room for


@pytest.mark.parametrize("name", SPECS)
def test_more_workers_take_no_more_than_there_is(decoders: Mapping[int, Path], name: str) -> None:
    plan = plan_of(decoders[10], name)
    peaks = [make_schedule(plan, GIB, workers).peak_bytes for workers in (1, 2, 64)]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= GIB


@pytest.mark.parametrize("memory", [4 * GIB, GIB, 512 * MIB, 400 * MIB])
@pytest.mark.parametrize("name", ["soft columns", "soft elements over all", "2of4"])
def test_threads_of_torch_have_their_share_and_leave_room_for_the_largest_item(
    decoders: Mapping[int, Path], name: str, memory: int
) -> None:
    plan = plan_of(decoders[10], name)
    threads = []
    for workers in (1, 2, 64, 1000):
        schedule = make_schedule(plan, memory, workers)
        resources = schedule.resources
        threads.append(resources.threads)
        kept = TORCH_THREAD * (resources.threads - 1) if schedule.uses_torch else 0
        assert resources.memory + kept == schedule.limits.memory
        assert all(
            group.strategy.memory + group.strategy.held <= resources.memory for group in schedule.groups
        )
        # Where pieces of work end does not depend on how many threads there are.
        assert schedule.limits == make_schedule(plan, memory, 1).limits
    assert threads[0] == 1
    assert threads == ([1, 2, 64, 1000] if name == "2of4" else sorted(threads))
    assert name == "2of4" or threads[-1] <= 1 + schedule.limits.memory // TORCH_THREAD


WITHOUT_TORCH = ("2of4", "unstructured", "unstructured-global", "rows", "whole tensors", "a threshold")


@pytest.mark.parametrize("name", [*WITHOUT_TORCH, "soft columns", "soft elements"])
def test_too_little_memory_is_refused_with_the_bytes_that_are_needed(
    decoders: Mapping[int, Path], name: str
) -> None:
    plan = plan_of(decoders[100], name)
    with pytest.raises(SparsepruneError) as caught:
        make_schedule(plan, 32 * MIB, 2)
    told = re.fullmatch(
        r"--memory 33.55 MB: this run needs (\S+ MB), of which Python(?: and torch)? takes? \S+ MB; give "
        r"--memory (\d+MB)",
        str(caught.value),
    )
    assert told is not None, str(caught.value)
    needed, enough = map(memory_of, told.groups())
    assert_bounded(make_schedule(plan, enough, 2), enough)
    with pytest.raises(SparsepruneError, match=rf"; give --memory {told[2]}$"):
        make_schedule(plan, needed - 10_000, 2)  # it is told with two digits behind the point


SOFT_TENSORS = ("[-1, -1]", "[1, 1]", 'mode = "soft"\nthreshold = 0.5')
SOFT_ROWS = ("[64, -1]", "[-1, -1]", 'mode = "soft"\nnnz = 3')


@pytest.mark.parametrize(
    ("spec", "memory"), [(SOFT_TENSORS, GIB), (SOFT_ROWS, least_memory(uses_torch=True) + MIB)]
)
def test_a_block_that_does_not_fit_is_refused_with_the_bytes_that_are_missing(
    decoders: Mapping[int, Path], spec: tuple[str, str, str], memory: int
) -> None:
    block, shape, budget = spec
    text = PROJECTIONS.replace("BLOCK", block).replace("SHAPE", shape) + budget
    plan = make_plan(open_checkpoint(decoders[10]), parse_spec(text))
    with pytest.raises(SparsepruneError) as caught:
        make_schedule(plan, memory, 2)
    told = re.fullmatch(
        r"\[scope\.proj\] proj\[layer=0,part=mlp,name=down\]: a block has (\d+) elements, which must be in "
        r"memory together; give --memory (\S+)",
        str(caught.value),
    )
    assert told is not None, str(caught.value)
    enough = memory_of(told[2])
    assert make_schedule(plan, enough, 2).peak_bytes <= enough


@pytest.mark.parametrize("budget", ["threshold = 0.5", "nnz = 0", "nnz = 1"])
def test_a_tensor_as_one_block_is_bounded_where_nobody_competes(
    decoders: Mapping[int, Path], budget: str
) -> None:
    text = PROJECTIONS.replace("BLOCK", "[-1, -1]").replace("SHAPE", "[1, 1]") + budget
    plan = make_plan(open_checkpoint(decoders[10]), parse_spec(text))
    assert_bounded(make_schedule(plan, GIB, 2), GIB)


def test_blocks_that_are_summed_are_bounded_by_the_least_memory(decoders: Mapping[int, Path]) -> None:
    plan = plan_of(decoders[10], "heads")
    least = least_memory(uses_torch=False) + resident_of(plan, masks=True).nbytes
    assert_bounded(make_schedule(plan, least, 2), least)


@pytest.mark.parametrize("name", ["random elements", "soft elements"])
def test_scopes_that_are_streamed_are_bounded_by_the_least_memory(
    decoders: Mapping[int, Path], name: str
) -> None:
    plan = plan_of(decoders[10], name)
    least = least_memory(uses_torch=True) + resident_of(plan, masks=True).nbytes
    assert_bounded(make_schedule(plan, least, 2), least)


# -- the schedule as a whole, over small checkpoints of every structure -----------------------------


@pytest.fixture(scope="module", params=CASES)
def schedule(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Schedule:
    spec, tensors = CASES[request.param]
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    save_file(tensors(torch.bfloat16), path)
    return make_schedule(make_plan(open_checkpoint(path), parse_spec(spec)), AMPLE, 2)


def test_every_element_that_a_unit_has_is_in_one_job_or_left_over(schedule: Schedule) -> None:
    left: dict[str, list[int]] = {
        name: list(range(schedule.plan.checkpoint.tensors[name].numel)) for name in schedule.plan.reached
    }
    runs = [
        (leaf.tensor, run)
        for group in schedule.groups
        for task in group.tasks
        for leaf in task.instance.scope.leaves
        for run in whole_region(leaf).runs()
    ]
    runs += [
        (rest.stored.name, run) for rest in schedule.untouched for run in gaps(rest.stored.numel, rest.leaves)
    ]
    for name, (first, count) in runs:
        for element in range(first, first + count):
            left[name].remove(element)
    assert not any(left.values())


def test_every_job_has_a_key_of_its_own_and_the_strategy_of_its_own_tasks(schedule: Schedule) -> None:
    keys = [group.key for group in schedule.groups] + [rest.key for rest in schedule.untouched]
    assert len(set(keys)) == len(keys)
    way = partial(choose, tensors=schedule.plan.checkpoint.tensors, limits=schedule.limits)
    for group in schedule.groups:
        assert group.strategy == max((way(task) for task in group.tasks), key=lambda own: own.memory)
    assert schedule.uses_torch == any(needs_torch(group.strategy) for group in schedule.groups)


def test_bytes_that_pass_by_are_those_of_every_pass(schedule: Schedule) -> None:
    tensors = schedule.plan.checkpoint.tensors
    passed = sum(
        group.strategy.cost * group.strategy.parts
        if isinstance(group.strategy, Rebuild)
        else task.nbytes(tensors) * group.strategy.passes
        for group in schedule.groups
        for task in group.tasks
    )
    passed += sum(
        2 * count for rest in schedule.untouched for _, count in gaps(rest.stored.numel, rest.leaves)
    )
    assert schedule.nbytes == passed
    assert schedule.nbytes >= sum(tensors[name].nbytes for name in schedule.plan.reached)


@pytest.mark.parametrize("columns", [8, 9, 30])
def test_what_is_left_over_of_a_tensor_is_a_rest_of_it_be_it_one_element(
    tmp_path: Path, columns: int
) -> None:
    save_file({"w": torch.ones(1, columns)}, tmp_path / "model.safetensors")
    spec = (
        'version = 1\n[scope.w]\ntensors = "w"\nslice = [":", ":8"]\nblock = [1, 1]\nshape = [1, 4]\nnnz = 2'
    )
    plan = make_plan(open_checkpoint(tmp_path / "model.safetensors"), parse_spec(spec))
    schedule = make_schedule(plan, AMPLE, 2)
    left = [run for rest in schedule.untouched for run in gaps(rest.stored.numel, rest.leaves)]
    assert left == ([(8, columns - 8)] if columns > 8 else [])
    assert len(schedule.untouched) == (columns > 8)


def test_without_compiled_loops_what_fits_in_memory_is_left_to_torch(tmp_path: Path) -> None:
    spec, tensors = CASES["2:4"]
    save_file(tensors(torch.bfloat16), tmp_path / "model.safetensors")
    plan = make_plan(open_checkpoint(tmp_path / "model.safetensors"), parse_spec(spec))
    compiled, left = (make_schedule(plan, AMPLE, 2, device=device) for device in ("cpu", "cuda"))
    assert {type(group.strategy) for group in compiled.groups} == {Contiguous}
    assert not any(isinstance(group.strategy, Contiguous) for group in left.groups)


@pytest.mark.parametrize(("slab", "jobs"), [(1 << 20, [12, 12]), (3 * 128 * 4, [3] * 8), (100, [1] * 24)])
def test_small_neighbours_of_one_rule_and_file_are_worked_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int, jobs: list[int]
) -> None:
    shapes = {"up": (16, 8), "down": (8, 16)}
    shards = {
        f"{shard}.safetensors": {
            f"{layer}.{name}.weight": torch.ones(shape)
            for layer in range(10 + 6 * shard, 16 + 6 * shard)
            for name, shape in shapes.items()
        }
        for shard in range(2)
    }
    folder = write_shards(tmp_path / "in", shards)
    narrow(monkeypatch, slab)
    schedule = make_schedule(make_plan(open_checkpoint(folder), parse_spec(TWO_OF_FOUR)), AMPLE, 2)
    assert [len(group.tasks) for group in schedule.groups] == jobs
    io = TensorIO(TensorReader(), tensors=schedule.plan.checkpoint.tensors)
    chunks = [list(job.first.chunks(io)) for job in jobs_of(schedule)]
    assert all(len(some) == 1 for some in chunks) == (slab > 100)
    assert sum(chunk.nbytes for some in chunks for chunk in some) == schedule.nbytes
    assert all(len(chunk.files) == 1 for some in chunks for chunk in some)
