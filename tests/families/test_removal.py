"""Removal from every family: stock classes load what is left, and it computes what the masked model does."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.families.checkpoints import Checkpoint, make, prune, read
from tests.samples import run

if TYPE_CHECKING:
    from pathlib import Path

CHANNELS = {
    "llama": "decoder-mlp-channels",
    "llama_without_head": "decoder-mlp-channels",
    "qwen2": "decoder-mlp-channels",
    "qwen3": "decoder-mlp-channels",
    "mistral": "decoder-mlp-channels",
    "gemma": "decoder-mlp-channels",
    "gemma3": "decoder-mlp-channels",
    "gemma3_with_pictures": "decoder-mlp-channels",
    "phi3": "phi3-mlp-channels",
    "gpt2": "gpt2-mlp-channels",
    "gpt2_without_head": "gpt2-mlp-channels",
    "mixtral": "moe-expert-channels",
    "qwen3_moe": "moe-expert-channels",
    "bert": "bert-mlp-channels",
    "bert_for_masked_lm": "bert-mlp-channels",
    "vit": "vit-mlp-channels",
    "vit_for_classification": "vit-mlp-channels",
}
HEADS = {
    **dict.fromkeys(
        (
            "llama",
            "llama_without_head",
            "qwen2",
            "qwen3",
            "mistral",
            "gemma",
            "gemma3",
            "mixtral",
            "qwen2_moe",
        ),
        "decoder-gqa-heads",
    ),
    **dict.fromkeys(("qwen3_moe", "gpt_oss", "llama4", "gemma3_with_pictures"), "decoder-gqa-heads"),
    "phi3": "phi3-gqa-heads",
    "vit": "vit-heads",
    "vit_for_classification": "vit-heads",
}


def removed(dense: Checkpoint, spec: object, *options: object) -> Path:
    """`sparseprune remove` beside the dense folder."""
    folder = dense.folder.with_name(f"{dense.folder.name}-smaller")
    said = run("remove", dense.folder, spec, "-o", folder, "-q", "--force", *options)
    assert (said.code, said.out) == (0, f"{folder}\n"), said.err
    return folder


def check_same_outputs(dense: Checkpoint, pruned: Path, smaller: Path) -> None:
    """What is left computes what the checkpoint with zeros does, and not what the dense one does."""
    masked = dense.output(dense.load(pruned))
    torch.testing.assert_close(dense.output(dense.load(smaller)), masked, rtol=1e-5, atol=1e-5)
    assert (masked - dense.output(dense.load())).abs().max() > 1e-2


def config_of(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text())
    return config.get("text_config", config)


@pytest.mark.parametrize("family", CHANNELS)
def test_channels_are_cut_out(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path)
    # Grouped products of torch take rows of 16 bytes.
    options = ("--set", "multiple=4") if CHANNELS[family].startswith("moe") else ()
    pruned = prune(dense, CHANNELS[family], "--no-masks", *options)
    smaller = removed(dense, CHANNELS[family], *options)
    check_same_outputs(dense, pruned, smaller)
    assert sum(tensor.numel() for tensor in read(smaller).values()) < sum(
        tensor.numel() for tensor in dense.tensors().values()
    )


@pytest.mark.parametrize("family", HEADS)
def test_heads_are_cut_out(family: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path)
    # Some classes want a divisor of the hidden size: 4 heads of 8, in place of 6.
    options = ("--set", "sparsity=0.5") if family.startswith(("llama", "gemma3")) else ()
    pruned = prune(dense, HEADS[family], "--no-masks", *options)
    smaller = removed(dense, HEADS[family], *options)
    check_same_outputs(dense, pruned, smaller)
    assert config_of(smaller)["head_dim"] == (config_of(dense.folder).get("head_dim") or 4)
