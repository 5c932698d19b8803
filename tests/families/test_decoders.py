"""Decoders with separate projections, one with a tower for pictures: lost channels and heads add nothing."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.families.checkpoints import (
    Checkpoint,
    Tensors,
    by_column,
    by_row,
    changed,
    check_ablation,
    make,
    prune,
    read,
    surviving,
    with_inputs_ablated,
)
from tests.families.models import KV_HEADS, LAYERS, WIDTH


@dataclass(frozen=True)
class Decoder:
    """A checkpoint, and what stands before `layers` in names of tensors and of modules."""

    dense: Checkpoint
    stored: str = "model"
    inside: str = "model"

    def module(self, layer: int, name: str) -> str:
        return f"{self.inside}.layers.{layer}.{name}"

    def channels(self, tensors: Tensors, layer: int) -> list[torch.Tensor]:
        """Rows of gate and up and columns of down, channels first."""
        stem = f"{self.stored}.layers.{layer}.mlp"
        gate, up, down = (tensors[f"{stem}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        return [gate, up, down.T]

    def heads(self, tensors: Tensors, layer: int) -> list[torch.Tensor]:
        """All that belongs to each key/value head, biases too where there are any."""
        stem = f"{self.stored}.layers.{layer}.self_attn"
        rows = [f"{stem}.{name}_proj.{kind}" for name in "qkv" for kind in ("weight", "bias")]
        parts = [by_row(tensors[name], KV_HEADS).flatten(1) for name in rows if name in tensors]
        return [*parts, by_column(tensors[f"{stem}.o_proj.weight"], KV_HEADS).flatten(1)]

    def mlp_names(self) -> set[str]:
        """The matrices of every layer, of a tower and its head too, and biases of what writes channels."""
        pattern = re.compile(
            r"\.(?:layers\.\d|head)\.mlp\.(?:(?:gate|up)_proj|fc1|(?:down_proj|fc2)(?=\.weight))\."
        )
        return {name for name in self.dense.tensors() if pattern.search(name)}

    def attention_names(self) -> set[str]:
        """The four matrices of every layer, of a tower too, and what biases the first three have."""
        pattern = re.compile(r"\.layers\.\d\.self_attn\.(?:[qkv]_proj|(?:o|out)_proj(?=\.weight))\.")
        return {name for name in self.dense.tensors() if pattern.search(name)}


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_with_pictures"])
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    family: str = request.param
    dense = make(family, tmp_path_factory.mktemp("dense"))
    if family == "gemma3_with_pictures":
        return Decoder(dense, "language_model.model", "model.language_model")
    return Decoder(dense)


def test_channels_of_each_layer_are_those_that_contribute_nothing(decoder: Decoder) -> None:
    pruned = prune(decoder.dense, "mlp-channels")
    assert changed(decoder.dense, pruned) == decoder.mlp_names()
    before, after = decoder.dense.tensors(), read(pruned)
    kept = {}
    for layer in range(LAYERS):
        channels = decoder.channels(before, layer), decoder.channels(after, layer)
        kept[decoder.module(layer, "mlp.down_proj")] = surviving(channels, WIDTH - WIDTH // 4)
    check_ablation(decoder.dense, pruned, with_inputs_ablated(decoder.dense.load(), kept))


def test_a_key_head_goes_with_all_its_query_heads(decoder: Decoder) -> None:
    pruned = prune(decoder.dense, "heads")
    assert changed(decoder.dense, pruned) == decoder.attention_names()
    before, after = decoder.dense.tensors(), read(pruned)
    kept = {}
    for layer in range(LAYERS):
        heads = decoder.heads(before, layer), decoder.heads(after, layer)
        kept[decoder.module(layer, "self_attn.o_proj")] = surviving(heads, KV_HEADS - KV_HEADS // 4)
    check_ablation(decoder.dense, pruned, with_inputs_ablated(decoder.dense.load(), kept))


def all_layers(parts: Iterable[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The units of all layers in one row."""
    return [torch.cat(each) for each in zip(*parts, strict=True)]


def test_channels_compete_across_layers(decoder: Decoder) -> None:
    pruned = prune(decoder.dense, "mlp-channels-global")
    assert changed(decoder.dense, pruned) == decoder.mlp_names()
    tensors, layers = (decoder.dense.tensors(), read(pruned)), range(LAYERS)
    channels = [all_layers(decoder.channels(each, layer) for layer in layers) for each in tensors]
    keeps = surviving(channels, LAYERS * WIDTH * 3 // 4).chunk(LAYERS)
    kept = {decoder.module(layer, "mlp.down_proj"): keep for layer, keep in enumerate(keeps)}
    check_ablation(decoder.dense, pruned, with_inputs_ablated(decoder.dense.load(), kept))


def test_heads_compete_across_layers(decoder: Decoder) -> None:
    pruned = prune(decoder.dense, "heads-global")
    assert changed(decoder.dense, pruned) == decoder.attention_names()
    tensors, layers = (decoder.dense.tensors(), read(pruned)), range(LAYERS)
    heads = [all_layers(decoder.heads(each, layer) for layer in layers) for each in tensors]
    keeps = surviving(heads, LAYERS * KV_HEADS * 3 // 4).chunk(LAYERS)
    kept = {decoder.module(layer, "self_attn.o_proj"): keep for layer, keep in enumerate(keeps)}
    check_ablation(decoder.dense, pruned, with_inputs_ablated(decoder.dense.load(), kept))


def test_what_is_set_takes_the_place_of_the_vars(tmp_path: Path) -> None:
    """0.5 of 48 channels leave 24, which a multiple of 16 rounds up to 32."""
    dense = make("llama", tmp_path)
    pruned = read(prune(dense, "mlp-channels", "--set=sparsity=0.5", "--set=multiple=16"))
    rows = pruned["model.layers.1.mlp.gate_proj.weight"].any(1)
    assert int(rows.sum()) == 32
    assert torch.equal(rows, pruned["model.layers.1.mlp.down_proj.weight"].any(0))
