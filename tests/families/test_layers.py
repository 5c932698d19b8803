"""Layers that go where a class scales, numbers, feeds or skips them: what is left is the model without them.

That is the dense model in which they are skipped, and the masked one where that is the same.
"""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import sparseprune
from tests.families import harness
from tests.families.harness import examine, settle
from tests.families.zoo import SPECIES

pytestmark = pytest.mark.usefixtures("untraced")

CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    # A type, sizes of its own, the layers that go; all that the spec chooses where it is empty.
    "a norm at the end of a decoder": ("opt", {"do_layer_norm_before": False}, ""),
    "a norm at the end of sound": ("wav2vec2", {}, ""),
    "no norm at the end of sound": ("wav2vec2", {"do_stable_layer_norm": True}, ""),
    "windows of an encoder alone": ("led", {}, ""),
    "parts of each layer beside them": ("gemma4_text", {}, "layer in [0, 2, 4]"),
    "a scale by their number": ("minicpm3", {}, ""),
    "a period and an offset": (
        "jamba",
        {"num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2},
        "layer < 4",
    ),
    "a first one, a last one and an interval": (
        "ernie4_5_moe",
        {"num_hidden_layers": 6, "moe_layer_start_index": 2, "moe_layer_interval": 2},
        "layer in [2, 3]",
    ),
    "a step in each of two stacks": ("switch_transformers", {}, "layer in [1, 3]"),
    "a cycle": ("recurrent_gemma", {}, "layer in [0, 3, 4]"),
    "blocks that feed layers": ("qwen3_vl", {}, harness.CHOSEN_LAYERS["qwen3_vl"]),
    "a stage whose first one widens": ("hiera", {}, "layer == 2"),
    "stages in a list of lists": ("segformer", {}, "layer == 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_without_some_layers_computes_what_it_does_when_they_are_skipped(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, sizes, layers = CASES[case]
    monkeypatch.setattr(harness, "CHOSEN_LAYERS", {name: layers} if layers else {})
    species = SPECIES[name]
    one = settle(replace(species, sizes={**species.sizes, **sizes}), tmp_path)
    outcome = examine(one, "layers")
    assert outcome.kind == "right", outcome.detail


@pytest.mark.parametrize(("name", "are_skipped"), [("bert", True), ("llama", False)])
def test_a_warning_says_whether_masked_layers_are_skipped_as_well(
    name: str, are_skipped: bool, tmp_path: Path
) -> None:
    one = settle(SPECIES[name], tmp_path)
    removal = sparseprune.remove(one.folder, "layers", output=tmp_path / "out")
    warned = [line for line in removal.warnings if "removed ones are skipped, while masked ones" in line]
    assert len(warned) == are_skipped
