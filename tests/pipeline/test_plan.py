"""Units of work: what belongs together, and where a unit may be cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.errors import SpecError
from sparseprune.pipeline import make_plan
from sparseprune.pipeline.slabs import slabs_of
from sparseprune.spec import parse_spec
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.pipeline import Plan

ROWS = """
version = 1
[scope.rows]
tensors = "w"
block = {block}
shape = {shape}
nnz = 1
"""


def plan_of(folder: Path, tensors: dict[str, torch.Tensor], spec: str) -> Plan:
    save_file(tensors, folder / "m.safetensors")
    return make_plan(open_checkpoint(folder / "m.safetensors"), parse_spec(spec, "spec.toml"))


def test_every_instance_of_an_uncoupled_rule_is_a_unit(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, mlp_tensors(), TWO_OF_FOUR)
    assert [[stored.name for stored in unit.tensors] for unit in plan.units] == [
        ["0.down.weight"],
        ["0.up.weight"],
        ["1.down.weight"],
        ["1.up.weight"],
    ]
    assert plan.reached == ("0.down.weight", "0.up.weight", "1.down.weight", "1.up.weight")


def test_coupled_tensors_of_several_shards_are_one_unit(tmp_path: Path) -> None:
    tensors = mlp_tensors()
    shards = {
        "a.safetensors": {name: tensor for name, tensor in tensors.items() if "up" in name},
        "b.safetensors": {name: tensor for name, tensor in tensors.items() if "up" not in name},
    }
    folder = write_shards(tmp_path / "ckpt", shards)
    plan = make_plan(open_checkpoint(folder), parse_spec(CHANNELS, "spec.toml"))
    assert [unit.tasks[0].instance.label for unit in plan.units] == ["mlp[layer=0]", "mlp[layer=1]"]
    assert [stored.shard.name for stored in plan.units[1].tensors] == [
        "a.safetensors",
        "a.safetensors",
        "b.safetensors",
    ]


def test_a_spec_that_does_not_fit_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing"):
        plan_of(tmp_path, mlp_tensors(), TWO_OF_FOUR.replace("{layer}", "nothing.{layer}"))


@pytest.mark.parametrize(
    ("block", "shape", "rows"),
    [
        ("[1, 1]", "[1, 4]", [24, 24, 16]),  # rows in eights, so that packed masks begin at whole bytes
        ("[1, -1]", "[3, -1]", None),  # 3 rows do not divide 64
        ("[2, -1]", "[8, -1]", [16, 16, 16, 16]),
        ("[1, -1]", "[-1, -1]", [64]),  # all rows compete
        ("[-1, 1]", "[-1, 4]", [64]),  # columns are whole blocks
        ("[1, 1]", "[16, 4]", [16, 16, 16, 16]),
    ],
)
def test_units_are_cut_between_rows_of_scopes(
    tmp_path: Path, block: str, shape: str, rows: list[int] | None
) -> None:
    spec = ROWS.format(block=block, shape=shape)
    tensors = {"w": torch.zeros(64, 8, dtype=torch.float16)}
    if rows is None:
        with pytest.raises(SpecError, match="64 is not a multiple of 3"):
            plan_of(tmp_path, tensors, spec)
        return
    (unit,) = plan_of(tmp_path, tensors, spec).units
    slabs = list(slabs_of(unit, limit=24 * 16))
    assert [slab.pieces[0].shape for slab in slabs] == [(count, 8) for count in rows]
    assert [slab.pieces[0].first for slab in slabs] == [8 * sum(rows[:number]) for number in range(len(rows))]
    ends = [slab.pieces[0].end for slab in slabs]
    assert [slab.pieces[0].begin for slab in slabs] == [0, *ends[:-1]]
    assert ends[-1] == unit.nbytes


def test_slabs_begin_at_whole_bytes_of_a_packed_mask(tmp_path: Path) -> None:
    (unit,) = plan_of(tmp_path, {"0.a.weight": torch.zeros(60, 4, dtype=torch.float16)}, TWO_OF_FOUR).units
    slabs = list(slabs_of(unit, limit=5 * 8))
    assert len(slabs) == 8
    assert all(slab.pieces[0].first % 8 == 0 for slab in slabs)
    assert sum(slab.pieces[0].shape[0] for slab in slabs) == 60


def test_tasks_that_share_tensors_are_one_unit_also_when_a_later_one_joins_them(tmp_path: Path) -> None:
    spec = """
version = 1
[block.x]
tensors = "x"
slice = ["4:8", ":"]
shape = [1, -1]
[block.y]
tensors = "y"
slice = ["4:8", ":"]
shape = [1, -1]
[block_coupling.both]
blocks = ["x", "y"]
[scope.one]
tensors = "x"
slice = ["0:4", ":"]
block = [1, -1]
shape = [-1]
nnz = 2
[scope.other]
tensors = "y"
slice = ["0:4", ":"]
block = [1, -1]
shape = [-1]
nnz = 2
[scope.joined]
block = "both"
shape = [-1]
nnz = 1
"""
    tensors = {"x": torch.ones(8, 4), "y": torch.ones(8, 4)}
    (unit,) = plan_of(tmp_path, tensors, spec).units
    assert sorted(task.rule for task in unit.tasks) == ["scope.joined", "scope.one", "scope.other"]
    assert sorted(stored.name for stored in unit.tensors) == ["x", "y"]
