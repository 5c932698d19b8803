"""Fused layouts: query, key and value or gate and up in one tensor (Phi-3), also input-first (GPT-2)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparseprune
from tests.families.checkpoints import (
    Checkpoint,
    Tensors,
    by_column,
    by_row,
    changed,
    check_ablation,
    prune,
    read,
    surviving,
    with_inputs_ablated,
    write_statistics,
)
from tests.families.models import HEADS, HIDDEN, KV_HEADS, LAYERS, WIDTH


@pytest.fixture(scope="module")
def phi3(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("phi3")


@pytest.fixture(scope="module")
def gpt2(checkpoint_of: Callable[[str], Checkpoint]) -> Checkpoint:
    return checkpoint_of("gpt2")


def phi3_channels(tensors: Tensors, layer: int) -> list[torch.Tensor]:
    stem = f"model.layers.{layer}.mlp"
    gate, up = tensors[f"{stem}.gate_up_proj.weight"].chunk(2)
    return [gate, up, tensors[f"{stem}.down_proj.weight"].T]


def phi3_heads(tensors: Tensors, layer: int) -> list[torch.Tensor]:
    stem = f"model.layers.{layer}.self_attn"
    qkv = tensors[f"{stem}.qkv_proj.weight"].tensor_split([HIDDEN, HIDDEN + HIDDEN // 2])
    output = by_column(tensors[f"{stem}.o_proj.weight"], KV_HEADS)
    return [*(by_row(part, KV_HEADS) for part in qkv), output]


def gpt2_channels(tensors: Tensors, layer: int) -> list[torch.Tensor]:
    stem = f"transformer.h.{layer}.mlp"
    weight, bias = tensors[f"{stem}.c_fc.weight"], tensors[f"{stem}.c_fc.bias"]
    return [weight.T, bias, tensors[f"{stem}.c_proj.weight"]]


def gpt2_heads(tensors: Tensors, layer: int) -> list[torch.Tensor]:
    stem = f"transformer.h.{layer}.attn"
    weights = tensors[f"{stem}.c_attn.weight"].chunk(3, 1)
    biases = tensors[f"{stem}.c_attn.bias"].chunk(3)
    output = by_row(tensors[f"{stem}.c_proj.weight"], HEADS)
    return [*(by_column(each, HEADS) for each in weights), *(by_row(each, HEADS) for each in biases), output]


def test_channels_of_phi3_lie_in_both_halves_of_gate_up(phi3: Checkpoint) -> None:
    pruned = prune(phi3, "mlp-channels")
    assert changed(phi3, pruned) == {
        f"model.layers.{layer}.mlp.{name}_proj.weight"
        for layer in range(LAYERS)
        for name in ("gate_up", "down")
    }
    check_layers(phi3, pruned, phi3_channels, "model.layers.{}.mlp.down_proj", WIDTH - WIDTH // 4)


def test_channels_that_are_rebuilt_lie_in_both_halves_of_gate_up(
    phi3: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_statistics(phi3, tmp_path)
    masks = sparseprune.load_masks(prune(phi3, "mlp-channels-admm"))
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.mlp"
        gate, up = masks[f"{stem}.gate_up_proj.weight"].chunk(2)
        kept = masks[f"{stem}.down_proj.weight"][0]
        assert kept.sum() == WIDTH - WIDTH // 4
        for mask in (gate, up, masks[f"{stem}.down_proj.weight"].T):
            assert torch.equal(mask, kept[:, None].expand_as(mask))


def test_a_key_head_of_phi3_lies_in_all_three_parts_of_qkv(phi3: Checkpoint) -> None:
    pruned = prune(phi3, "heads")
    assert changed(phi3, pruned) == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight"
        for layer in range(LAYERS)
        for name in ("qkv", "o")
    }
    check_layers(phi3, pruned, phi3_heads, "model.layers.{}.self_attn.o_proj", KV_HEADS - KV_HEADS // 4)


def test_channels_of_gpt2_are_columns_then_rows(gpt2: Checkpoint) -> None:
    pruned = prune(gpt2, "mlp-channels")
    assert changed(gpt2, pruned) == {
        f"transformer.h.{layer}.mlp.{name}"
        for layer in range(LAYERS)
        for name in ("c_fc.weight", "c_fc.bias", "c_proj.weight")
    }
    check_layers(gpt2, pruned, gpt2_channels, "transformer.h.{}.mlp.c_proj", WIDTH - WIDTH // 4)


def test_a_head_of_gpt2_has_columns_and_biases_in_three_parts_of_c_attn(gpt2: Checkpoint) -> None:
    pruned = prune(gpt2, "heads")
    assert changed(gpt2, pruned) == {
        f"transformer.h.{layer}.attn.{name}"
        for layer in range(LAYERS)
        for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight")
    }
    check_layers(gpt2, pruned, gpt2_heads, "transformer.h.{}.attn.c_proj", HEADS - HEADS // 4)


def check_layers(
    dense: Checkpoint,
    pruned: Path,
    parts: Callable[[Tensors, int], list[torch.Tensor]],
    reader: str,
    keep: int,
) -> None:
    """So many units of each layer survive, and the output is that of the dense model without the others."""
    before, after = dense.tensors(), read(pruned)
    kept = {
        reader.format(layer): surviving((parts(before, layer), parts(after, layer)), keep)
        for layer in range(LAYERS)
    }
    check_ablation(dense, pruned, with_inputs_ablated(dense.load(), kept))
