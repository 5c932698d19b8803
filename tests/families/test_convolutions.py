"""Convolutions: a filter goes with its batch norm, and a depthwise convolution is left alone."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.families.checkpoints import Checkpoint, changed, check_ablation, make, prune, read, surviving


@pytest.fixture(scope="module", params=["resnet", "resnet_with_bottlenecks", "mobilenet"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make(request.param, tmp_path_factory.mktemp("dense"))


def with_channels_ablated(model: Any, kept: Mapping[str, torch.Tensor]) -> Any:
    """The model with forward hooks that zero the lost channels that come out of the named batch norms."""

    def hook_for(keep: torch.Tensor) -> Callable[..., torch.Tensor]:
        def zero(_module: Any, _arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output.masked_fill(~keep[None, :, None, None], 0)

        return zero

    for name, keep in kept.items():
        model.get_submodule(name).register_forward_hook(hook_for(keep))
    return model


def test_a_lost_filter_gives_zeros_after_its_batch_norm(dense: Checkpoint) -> None:
    pruned = prune(dense, "resnet-filters")
    before, after = dense.tensors(), read(pruned)
    stems = [
        name.removesuffix(".convolution.weight")
        for name, tensor in before.items()
        if tensor.ndim == 4 and tensor.shape[1] > 1
    ]
    kept, names = {}, set()
    for stem in stems:
        members = [f"{stem}.convolution.weight", f"{stem}.normalization.weight", f"{stem}.normalization.bias"]
        filters = before[members[0]].shape[0]
        parts = [[each[name] for name in members] for each in (before, after)]
        kept[f"{stem}.normalization"] = surviving(parts, filters - filters // 4)
        names |= set(members)
    assert len(stems) >= 5
    assert changed(dense, pruned) == names
    check_ablation(dense, pruned, with_channels_ablated(dense.load(), kept))


def as_timm_names(name: str) -> str:
    """What timm calls a tensor of a ResNet that transformers stores under this name."""
    name = name.replace("embedder.embedder.convolution", "conv1").replace(
        "embedder.embedder.normalization", "bn1"
    )
    name = re.sub(r"shortcut\.(convolution|normalization)", shortcut_in_timm, name)
    name = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d)", lambda at: f"layer{int(at[1]) + 1}.{at[2]}", name)
    name = re.sub(r"layer\.(\d)\.convolution", lambda at: f"conv{int(at[1]) + 1}", name)
    return re.sub(r"layer\.(\d)\.normalization", lambda at: f"bn{int(at[1]) + 1}", name)


def shortcut_in_timm(found: re.Match[str]) -> str:
    return "downsample.0" if found[1] == "convolution" else "downsample.1"


def test_the_names_of_timm_are_served_too(tmp_path: Path) -> None:
    dense = make("resnet_with_bottlenecks", tmp_path)
    pruned = {as_timm_names(name): tensor for name, tensor in read(prune(dense, "resnet-filters")).items()}
    renamed = tmp_path / "timm"
    renamed.mkdir()
    tensors = {as_timm_names(name): tensor for name, tensor in dense.tensors().items()}
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.bias", "layer2.1.conv3.weight"} <= set(
        tensors
    )
    save_file(tensors, renamed / "model.safetensors")
    found = read(prune(Checkpoint(renamed, dense.model_class, dense.inputs), "resnet-filters"))
    assert found.keys() == pruned.keys()
    assert all(torch.equal(found[name], pruned[name]) for name in found)
