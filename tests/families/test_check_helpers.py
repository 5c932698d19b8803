"""The checks of the family tests fail where they should: each is shown a checkpoint that is not right."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.families.checkpoints import (
    Checkpoint,
    changed,
    check_ablation,
    prune,
    read,
    surviving,
    with_inputs_ablated,
)
from tests.families.models import WIDTH

GATE, DOWN = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def pruned(dense: Checkpoint, tmp_path: Path) -> Path:
    """A pruned checkpoint of which one test makes a wrong one."""
    return prune(dense, "mlp-channels").rename(tmp_path / "pruned")


def overwrite(pruned: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(read(pruned) | tensors, pruned / "model.safetensors", metadata={"format": "pt"})


def parts(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[GATE], tensors[GATE.replace("gate", "up")], tensors[DOWN].T]


def test_a_tensor_that_no_mask_covers_may_not_differ(dense: Checkpoint, pruned: Path) -> None:
    assert changed(dense, pruned)
    overwrite(pruned, {"model.norm.weight": read(pruned)["model.norm.weight"] + 1})
    with pytest.raises(AssertionError, match=r"model\.norm\.weight"):
        changed(dense, pruned)


def test_units_have_to_be_zero_in_all_parts_and_as_many_as_were_asked_for(
    dense: Checkpoint, pruned: Path
) -> None:
    before, keep = dense.tensors(), WIDTH - WIDTH // 4
    assert int(surviving((parts(before), parts(read(pruned))), keep).sum()) == keep
    with pytest.raises(AssertionError):
        surviving((parts(before), parts(read(pruned))), keep + 1)
    overwrite(pruned, {DOWN: before[DOWN]})
    with pytest.raises(AssertionError):
        surviving((parts(before), parts(read(pruned))), keep)


def test_the_output_has_to_be_that_of_the_ablated_model_and_of_no_other(
    dense: Checkpoint, pruned: Path
) -> None:
    kept = {
        f"model.layers.{layer}.mlp.down_proj": read(pruned)[DOWN.replace("0", str(layer))].any(0)
        for layer in range(2)
    }
    check_ablation(dense, pruned, with_inputs_ablated(dense.load(), kept))
    with pytest.raises(AssertionError, match="not close"):
        check_ablation(dense, pruned, dense.load())
    with pytest.raises(AssertionError):
        check_ablation(dense, dense.folder, dense.load())
