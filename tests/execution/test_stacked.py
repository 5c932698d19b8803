"""Stacks: what looks alike is counted together, and each instance is told for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from sparseprune.checkpoint import TensorReader, open_checkpoint
from sparseprune.execution import count_survivors, make_check, stacked, verifying
from sparseprune.spec import parse_spec
from tests.limits import AMPLE

if TYPE_CHECKING:
    from pathlib import Path

    from sparseprune.execution import Check, Verification

EXPERTS = 40
TWO_OF_FOUR = """
version = 1
[scope.all]
tensors = "{expert}.{name}"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""
CHANNELS = """
version = 1
[block.up]
tensors = "{expert}.up"
shape = [1, -1]
[block.down]
tensors = "{expert}.down"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["up", "down"]
orders = [[0, 1], [1, 0]]
[scope.channels]
block = "channel"
shape = [-1, -1]
nnz = "expert + 2"
"""


def checkpoint_of(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "m.safetensors")
    return folder / "m.safetensors"


def experts(shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    rows, columns = shape
    return {
        f"{expert}.{name}": torch.zeros(size, dtype=torch.bfloat16)
        for expert in range(EXPERTS)
        for name, size in (("up", (rows, columns)), ("down", (columns, rows)))
    }


def checked(path: Path, spec: str) -> tuple[Check, Verification]:
    check = make_check(open_checkpoint(path), parse_spec(spec), AMPLE, 2)
    with TensorReader() as reader:
        return check, count_survivors(check, reader, lambda _, __: None)


def test_a_few_stacks_hold_all_experts_and_each_is_told_for_itself(tmp_path: Path) -> None:
    tensors = experts((8, 12))
    tensors["7.up"][3, 4:7] = 1
    tensors["31.down"][2, 0:4] = 1
    tensors["31.down"][11, 4:8] = 1
    check, verification = checked(checkpoint_of(tmp_path, tensors), TWO_OF_FOUR)
    stacks = list(verifying._stacks(check.counts))
    assert sorted(number for stack in stacks for number in stack) == list(range(2 * EXPERTS))
    assert len(stacks) == 2  # one for each of the two shapes
    (rule,) = verification.rules
    assert (rule.scopes, rule.broken) == (2 * EXPERTS * 24, 3)
    assert dict(rule.survivors) == {0: 2 * EXPERTS * 24 - 3, 3: 1, 4: 2}
    broken = {tensor.name: tensor for tensor in verification.tensors if tensor.broken}
    assert {name: tensor.broken for name, tensor in broken.items()} == {"7.up": 1, "31.down": 2}
    first = broken["31.down"].first
    assert first is not None
    assert (first.instance, first.scope, first.element) == ("all[expert=31,name=down]", (2, 0), (2, 0))


def test_instances_with_unlike_budgets_are_not_mixed(tmp_path: Path) -> None:
    tensors = experts((4 + EXPERTS, 3))
    for expert in range(EXPERTS):
        tensors[f"{expert}.up"][: expert + 2] = 1  # as many channels as this expert may keep
        tensors[f"{expert}.down"][:, : expert + 2] = 1
    path = checkpoint_of(tmp_path, tensors)
    assert checked(path, CHANNELS)[1].rules[0].broken == 0
    tensors["20.up"][:] = 1
    _, verification = checked(checkpoint_of(tmp_path, tensors), CHANNELS)
    broken = {tensor.name: (tensor.broken, tensor.torn) for tensor in verification.tensors if tensor.broken}
    assert broken == {"20.up": (1, EXPERTS + 4 - 22), "20.down": (1, 0)}


@pytest.mark.parametrize("spec", [TWO_OF_FOUR, CHANNELS], ids=["2:4", "channels"])
def test_what_is_told_is_what_each_instance_alone_would_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.rand(tensor.shape, generator=generator) < 0.45).to(torch.bfloat16)
        for name, tensor in experts((4 + EXPERTS, 8)).items()
    }
    path = checkpoint_of(tmp_path, tensors)
    together = checked(path, spec)[1]
    assert sum(rule.broken for rule in together.rules) > 0
    monkeypatch.setattr(verifying, "stack_height", lambda *_: 0)
    check, alone = checked(path, spec)
    assert all(len(stack) == 1 for stack in verifying._stacks(check.counts))
    assert alone == together


def test_tensors_that_fill_what_is_read_at_one_time_are_not_stacked(tmp_path: Path) -> None:
    check, _ = checked(checkpoint_of(tmp_path, experts((8, 12))), TWO_OF_FOUR)
    count = check.counts[0]
    height = count.way.limit // 96
    assert count.height == height > EXPERTS
    for limit, wanted in ((8 * 96, 8), (8 * 96 - 1, 0), (95, 0)):
        way = type(count.way)(count.way.kind, limit, count.way.memory, count.way.held)
        assert stacked.stack_height(count.scope, way) == wanted
