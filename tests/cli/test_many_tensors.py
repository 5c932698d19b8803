"""Checkpoints of many small tensors: what is held of each is little, counted, and within --memory."""

import gc
import json
import re
import tracemalloc
from pathlib import Path

import pytest

from sparseprune.api.options import Source, Target
from sparseprune.api.pruning import prepare
from sparseprune.api.resources import Machine, memory_of
from sparseprune.checkpoint import open_checkpoint, open_masks
from sparseprune.checkpoint.header import lay_out
from sparseprune.execution.passes import Outcomes
from sparseprune.execution.reapply import make_reapplication, match_masks
from sparseprune.execution.regions import INTERPRETER
from sparseprune.report.pruning import report_totals, rule_results, summed_up, tensor_result
from sparseprune.results import Report
from sparseprune.results.fields import Made, WrittenBytes
from tests.commands import ok, refused, run

PARTS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
MANY = 12_000


def write(path: Path, tensors: int) -> Path:
    """So many matrices of 4 x 4, all ones."""
    names = [f"model.layers.{number // 7}.{PARTS[number % 7]}_proj.weight" for number in range(tensors)]
    header = lay_out([(name, "F32", (4, 4)) for name in names], {})
    path.write_bytes(header.raw + b"\0\0\x80\x3f" * 16 * tensors)
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("many") / "m.safetensors", MANY)


def told_peak(path: Path) -> int:
    """The peak in bytes that `plan` tells."""
    peak = json.loads(run("plan", path, "2of4", "--json").out)["bytes"]["peak"]
    assert isinstance(peak, int)
    return peak


@pytest.mark.parametrize("command", [("apply", "-q"), ("verify", "-q"), ("plan",)])
def test_too_little_memory_for_the_tensors_alone_is_refused_before_the_work(
    many: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    there = sorted(many.parent.iterdir())
    said = refused(name, many, "2of4", *options, "--memory", "125MB")
    told = re.fullmatch(
        r"sparseprune: --memory 125.00 MB: this checkpoint's 12,000 tensors alone take about (\d+).\d\d MB "
        r"beside Python, which takes 104.86 MB; give --memory (\d+MB)\n",
        said.err,
    )
    assert told is not None, said.err
    assert 18 < int(told[1]) < 30
    assert sorted(many.parent.iterdir()) == there
    if name == "plan":
        ok("plan", many, "2of4", "--memory", told[2])


def test_remove_counts_what_it_holds_of_every_tensor_beside(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "model.safetensors", MANY)
    config = {"model_type": "llama", "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": MANY // 7}))
    least = {}
    for command in ("apply", "remove"):
        said = run(command, folder, "mlp-channels", "-o", tmp_path / "out", "-q", "--memory", "110MB")
        told = re.search(r"; give --memory (\d+MB)\n", said.err)
        assert told is not None, said.err
        assert (said.code, [*tmp_path.iterdir()]) == (2, [folder])
        least[command] = memory_of(told[1])
    assert 1000 * MANY < least["remove"] - least["apply"] < 4000 * MANY


def test_plan_counts_what_every_tensor_takes(many: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.safetensors", 10)
    each = (told_peak(many) - told_peak(few)) / (MANY - 10)
    assert 1500 < each < 2500


def held_bytes(path: Path) -> int:
    """What a run holds at the most, of what Python knows, without reading a tensor."""
    gc.collect()
    tracemalloc.start()
    try:
        target = Target(path.with_name("out.safetensors"), "bool")
        prepared = prepare(Source(path, "2of4", {}), target, Machine("cpu", 1, 1 << 30))
        outcomes = Outcomes()
        for number, stored in enumerate(prepared.plan.checkpoint.tensors.values()):
            outcomes.add([stored.name, "scope.proj", 16, 8, number, 16.0 * number, number + 8, 8.0 * number])
        plan = prepared.plan
        tensors = outcomes.of_plan(plan)
        found = summed_up(tensors)
        report = Report(
            input="in",
            output="out",
            spec_sha256="0",
            set={},
            target=None,
            device="cpu",
            seconds=1.0,
            warnings=(),
            notes=(),
            files_left_out=(),
            bytes=WrittenBytes(weights=0, masks=0),
            totals=report_totals(plan.checkpoint, found, None),
            rules=rule_results(plan.bound, found, {}, {}),
            tensors=Made(tensors, tensor_result),
        )
        assert sum(map(len, report.json_pieces())) > 300 * len(plan.checkpoint.tensors)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_what_a_run_holds_of_a_tensor_is_what_plan_counts(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{size}.safetensors", size) for size in (100, 2100)]
    few, many = [held_bytes(path) for path in (paths[0], *paths)][1:]  # the first one loads modules
    counted = told_peak(paths[1]) - told_peak(paths[0])
    assert 0.5 * counted < many - few < 1.1 * counted


def test_masks_of_many_tensors_leave_less_memory_for_the_work(tmp_path: Path) -> None:
    path, out = write(tmp_path / "m.safetensors", 50), tmp_path / "out.safetensors"
    ok("apply", path, "2of4", "-q", "-o", out)
    masks = open_masks(tmp_path / "out.masks.safetensors")
    matched = match_masks(open_checkpoint(path), masks, None, partial=False)
    limits = make_reapplication(matched, 1 << 28, 1).limits
    assert 50 * 1500 < limits.resident < 50 * 3500
    assert limits.memory + limits.resident + INTERPRETER == 1 << 28
