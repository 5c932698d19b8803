"""What a plan may presume of a removal: only what holds whichever blocks survive."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import open_checkpoint, read_config
from sparseprune.execution.plan import make_plan
from sparseprune.removal.preview import Preview, preview
from sparseprune.spec import parse_spec

CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 4, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 8, "moe_intermediate_size": 6,
}  # fmt: skip
EXPERTS = """
[block.matrix]
tensors = "model.layers.{layer}.mlp.experts.{expert}.{name:gate|up}_proj.weight"
shape = [-1, -1]
[block_coupling.whole]
blocks = ["matrix"]
across = ["name"]
[scope.expert]
block = "whole"
shape = []
[scope_coupling.experts]
scopes = ["expert"]
"""
LAYERS = """
block.all = { tensors = "model.layers.{layer}.{name:**}", shape = [-1, -1] }
block_coupling.layer = { blocks = ["all"], across = ["name"] }
scope.layer = { block = "layer", shape = [] }
scope_coupling.depth = { scopes = ["layer"], across = ["layer"], nnz = 2 }
"""
ROWS = '[scope.row]\ntensors = "model.layers.{layer}.mlp.gate.weight"\nblock = [1, -1]\nshape = []\n'


def shapes(dense: int) -> dict[str, tuple[int, ...]]:
    """Three layers, the first ones without experts."""
    found: dict[str, tuple[int, ...]] = {"lm_head.weight": (5, 4)}
    for layer in range(3):
        place = f"model.layers.{layer}.mlp"
        if layer < dense:
            found[f"{place}.gate_proj.weight"] = (8, 4)
            continue
        found[f"{place}.gate.weight"] = (4, 4)
        for expert in range(4):
            for name in ("gate", "up"):
                found[f"{place}.experts.{expert}.{name}_proj.weight"] = (6, 4)
    return found


def presumed(folder: Path, spec: str, tensors: Mapping[str, tuple[int, ...]]) -> Preview:
    config: dict[str, Any] = CONFIG
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    plan = make_plan(checkpoint, parse_spec(f"version = 1\n{spec}", "spec.toml", folder, {}))
    return preview(plan, read_config(checkpoint))


def test_experts_of_one_layer_are_alike(tmp_path: Path) -> None:
    found = presumed(tmp_path, f'{EXPERTS}across = ["expert"]\nnnz = 3\n', shapes(1))
    assert found.removal is not None
    assert [(change.key, change.after) for change in found.removal.changes] == [("num_experts", 3)]
    assert found.numel == sum(torch.Size(shape).numel() for shape in shapes(1).values()) - 2 * (2 * 24 + 4)


def test_experts_of_all_layers_may_be_lost_in_any_of_them(tmp_path: Path) -> None:
    found = presumed(tmp_path, f'{EXPERTS}across = "all"\nnnz = 6\n', shapes(1))
    assert (found.reasons, found.shapes, found.removal, found.problems) == ({}, None, None, ())


def test_layers_that_are_alike_go_by_their_number(tmp_path: Path) -> None:
    found = presumed(tmp_path, LAYERS, shapes(0))
    assert found.removal is not None
    assert ("num_hidden_layers", 2) in [(change.key, change.after) for change in found.removal.changes]


def test_of_layers_that_are_not_alike_only_the_data_tells_what_is_left(tmp_path: Path) -> None:
    found = presumed(tmp_path, LAYERS, shapes(1))
    assert (found.shapes, found.removal, found.problems) == (None, None, ())


@pytest.mark.parametrize("budget", ["threshold = 1.0", "nnz = 2"])
def test_a_threshold_is_told_by_the_data(tmp_path: Path, budget: str) -> None:
    found = presumed(tmp_path, ROWS + budget, shapes(1))
    assert (found.shapes is None) == budget.startswith("threshold")
    if found.shapes is not None:
        assert set(found.shapes.values()) == {(2, 4)}


def test_where_one_rule_cannot_be_removed_nothing_is_said_of_the_whole(tmp_path: Path) -> None:
    elements = '[scope.e]\ntensors = "lm_head.weight"\nblock = [1, 1]\nshape = [-1, -1]\nsparsity = 0.5\n'
    found = presumed(tmp_path, f'{EXPERTS}across = ["expert"]\nnnz = 3\n{elements}', shapes(1))
    assert list(found.reasons) == ["scope.e"]
    assert found.removal is None
    assert found.shapes is not None
    assert set(found.shapes.values()) == {None}
