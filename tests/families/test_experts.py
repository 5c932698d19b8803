"""Mixtures of experts: experts as separate tensors and as 3-D tensors, under the names that are published."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.checkpoints import (
    Checkpoint,
    Tensors,
    changed,
    check_ablation,
    make,
    prune,
    read,
    surviving,
)
from tests.families.models import EXPERT_WIDTH, EXPERTS, HIDDEN


@dataclass(frozen=True)
class Family:
    """Where the experts of a family lie, on disk and in the model."""

    stored: str  # the folder of a layer's experts in names of tensors
    parts: tuple[str, ...]  # gate, up and down
    module: str
    layers: tuple[int, ...]
    groups: int = 1  # of experts, from which the router chooses first

    def names(self) -> set[str]:
        return {
            f"{self.stored.format(layer)}.{expert}.{part}.weight"
            for layer in self.layers
            for expert in range(EXPERTS)
            for part in self.parts
        }

    def whole(self, tensors: Tensors, layer: int) -> list[torch.Tensor]:
        """Gate, up and down of all experts of a layer: (experts, rows, columns) each."""
        stored = self.stored.format(layer)
        return [
            torch.stack([tensors[f"{stored}.{expert}.{part}.weight"] for expert in range(EXPERTS)])
            for part in self.parts
        ]


LLAMA_LIKE = ("gate_proj", "up_proj", "down_proj")
INSIDE = "model.layers.{}.mlp.experts"
FAMILIES = {
    "mixtral": Family("model.layers.{}.block_sparse_moe.experts", ("w1", "w3", "w2"), INSIDE, (0, 1)),
    "qwen2_moe": Family(INSIDE, LLAMA_LIKE, INSIDE, (0, 1)),
    "qwen3_moe": Family(INSIDE, LLAMA_LIKE, INSIDE, (0, 1)),
    "deepseek_v3": Family(INSIDE, LLAMA_LIKE, INSIDE, (1,), groups=2),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def separate(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Family, Checkpoint]:
    """A checkpoint with the names that are published: one tensor for each matrix of each expert."""
    return FAMILIES[request.param], make(request.param, tmp_path_factory.mktemp("dense"))


def without_experts(model: Any, kept: Mapping[str, torch.Tensor]) -> Any:
    """The model with hooks that give the lost experts of the named modules no weight in the sum."""

    def hook_for(keep: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
        def zero(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            states, chosen, weights = arguments
            return states, chosen, weights.masked_fill(~keep[chosen], 0)

        return zero

    for name, keep in kept.items():
        model.get_submodule(name).register_forward_pre_hook(hook_for(keep))
    return model


def with_channels_ablated(model: Any, kept: Mapping[str, torch.Tensor]) -> Any:
    """The model with hooks that run the experts one by one and zero the lost channels (experts, channels).

    transformers runs all experts in one module, which has no place for a hook in front of the down matrix.
    """

    def hook_for(keep: torch.Tensor) -> Callable[..., torch.Tensor]:
        def forward(module: Any, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            states, chosen, weights = arguments
            intact = one_by_one(module, states, chosen, weights, torch.ones_like(keep))
            torch.testing.assert_close(intact, output, rtol=1e-5, atol=1e-5)
            return one_by_one(module, states, chosen, weights, keep)

        return forward

    for name, keep in kept.items():
        model.get_submodule(name).register_forward_hook(hook_for(keep))
    return model


def one_by_one(
    module: Any, states: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    """What the experts of a layer make of states (tokens, hidden); chosen and weights are (tokens, k)."""
    result = torch.zeros_like(states)
    for expert in range(EXPERTS):
        gate, up = (states @ module.gate_up_proj[expert].T).chunk(2, -1)
        channels = (module.act_fn(gate) * up).masked_fill(~keep[expert], 0)
        weight = weights.masked_fill(chosen != expert, 0).sum(-1, keepdim=True)
        result += weight * (channels @ module.down_proj[expert].T)
    return result


def test_lost_experts_add_nothing_and_routers_stay(separate: tuple[Family, Checkpoint]) -> None:
    """Experts compete in their group, so that each group keeps as many."""
    family, dense = separate
    pruned = prune(dense, "experts", "--set=sparsity=0.5")
    assert changed(dense, pruned) == family.names()
    before, after = dense.tensors(), read(pruned)
    kept = {}
    for layer in family.layers:
        parts = [[each.chunk(family.groups) for each in family.whole(of, layer)] for of in (before, after)]
        groups = [[[part[at] for part in of] for of in parts] for at in range(family.groups)]
        keeps = [surviving(group, EXPERTS // family.groups // 2) for group in groups]
        kept[family.module.format(layer)] = torch.cat(keeps)
    check_ablation(dense, pruned, without_experts(dense.load(), kept))


def channels(whole: list[torch.Tensor], expert: int) -> list[torch.Tensor]:
    """Rows of gate and up and columns of down of one expert, channels first."""
    gate, up, down = (each[expert] for each in whole)
    return [gate, up, down.T]


def test_lost_channels_of_each_expert_add_nothing(separate: tuple[Family, Checkpoint]) -> None:
    family, dense = separate
    pruned = prune(dense, "expert-channels")
    assert changed(dense, pruned) == family.names()
    kept = {}
    before, after = dense.tensors(), read(pruned)
    for layer in family.layers:
        whole, left = family.whole(before, layer), family.whole(after, layer)
        of_each = [
            surviving((channels(whole, expert), channels(left, expert)), EXPERT_WIDTH - EXPERT_WIDTH // 4)
            for expert in range(EXPERTS)
        ]
        kept[family.module.format(layer)] = torch.stack(of_each)
    check_ablation(dense, pruned, with_channels_ablated(dense.load(), kept))


# ---- experts as 3-D tensors


def test_lost_experts_of_gpt_oss_add_nothing(tmp_path: Path) -> None:
    dense = make("gpt_oss", tmp_path)
    pruned = prune(dense, "experts")
    before, after = dense.tensors(), read(pruned)
    parts = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    modules = [f"model.layers.{layer}.mlp.experts" for layer in range(2)]
    assert changed(dense, pruned) == {f"{module}.{part}" for module in modules for part in parts}
    kept = {}
    for module in modules:
        names = [f"{module}.{part}" for part in parts]
        experts = [[each[name] for name in names] for each in (before, after)]
        kept[module] = surviving(experts, EXPERTS - EXPERTS // 4)
    check_ablation(dense, pruned, without_experts(dense.load(), kept))


def test_lost_experts_of_llama4_add_nothing(tmp_path: Path) -> None:
    dense = make("llama4", tmp_path)
    pruned = prune(dense, "experts")
    module = "model.layers.1.feed_forward.experts"
    names = [f"{module}.gate_up_proj", f"{module}.down_proj"]
    assert changed(dense, pruned) == set(names)
    experts = [[each[name] for name in names] for each in (dense.tensors(), read(pruned))]
    keep = surviving(experts, EXPERTS - EXPERTS // 4)

    def zero(_module: Any, _arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        of_each = output.view(EXPERTS, -1, HIDDEN)  # the tokens as every expert answers them
        return of_each.masked_fill(~keep[:, None, None], 0).view_as(output)

    ablated = dense.load()
    ablated.get_submodule(module).register_forward_hook(zero)
    check_ablation(dense, pruned, ablated)
