"""Units of work: what belongs together, and where a unit may be cut."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint
from sparseprune.errors import SpecError
from sparseprune.execution.plan import Plan, make_plan
from sparseprune.spec import parse_spec
from tests.samples import CHANNELS, TWO_OF_FOUR, mlp_tensors, write_shards


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


def test_tasks_that_share_tensors_are_one_unit_also_when_a_later_one_joins_them(tmp_path: Path) -> None:
    spec = """
version = 1
block.x = { tensors = "x", slice = ["4:8", ":"], shape = [1, -1] }
block.y = { tensors = "y", slice = ["4:8", ":"], shape = [1, -1] }
block_coupling.both = { blocks = ["x", "y"] }
scope.one = { tensors = "x", slice = ["0:4", ":"], block = [1, -1], shape = [-1], nnz = 2 }
scope.other = { tensors = "y", slice = ["0:4", ":"], block = [1, -1], shape = [-1], nnz = 2 }
scope.joined = { block = "both", shape = [-1], nnz = 1 }
"""
    tensors = {"x": torch.ones(8, 4), "y": torch.ones(8, 4)}
    (unit,) = plan_of(tmp_path, tensors, spec).units
    assert sorted(task.rule for task in unit.tasks) == ["scope.joined", "scope.one", "scope.other"]
    assert sorted(stored.name for stored in unit.tensors) == ["x", "y"]
