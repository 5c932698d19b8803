"""Counting: the key that counts the units of each dimension is found by its value."""

from typing import Any

import pytest

from sparseprune.errors import CheckpointError
from sparseprune.removal.counting import Counts, count_dims
from sparseprune.removal.sections import Sections, path_shown
from sparseprune.removal.shrink import make_removal
from tests.removal.models import (
    DEEPSEEK,
    GPT_OSS,
    LLAMA,
    MIXTRAL,
    PHI3,
    PICTURES,
    QWEN2_MOE,
    QWEN3_MOE,
    Config,
    Cut,
    Shapes,
    channels,
    cut,
    decoder,
    deepseek,
    experts,
    gated,
    gpt_oss,
    mixtral,
    mixture,
    phi3,
    pictures,
    without,
)

L0, L1 = "model.layers.0", "model.layers.1"


def counts_of(shapes: Shapes, config: Config) -> Counts:
    """Of a model that loses something along every dimension of every matrix of a layer."""
    names = [name for name in shapes if "norm" not in name and "embed" not in name]
    return count_dims(shapes, Sections.of(config), {name: range(len(shapes[name])) for name in names}, ())


def counted(counts: Counts, name: str) -> list[tuple[int | None, str, int, int, int]]:
    """Of a tensor each run of units: its dimension, key, number of units, their size, where it begins."""
    found = counts.of.get(name, ())
    return [(one.dim, path_shown(one.key), one.count, one.size, one.begin) for one in found]


def two_layers(module: str, hidden: int, width: int) -> Shapes:
    """Layers with an MLP of two matrices, as OPT and BART name it."""
    return {
        f"{module}.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "fc1.weight": (width, hidden),
            "fc1.bias": (width,),
            "fc2.weight": (hidden, width),
            "fc2.bias": (hidden,),
        }.items()
    }


SIDES: Config = {
    "model_type": "bart", "d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 14, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 4,
}  # fmt: skip
ONE_WIDTH: Config = {**QWEN3_MOE, "moe_intermediate_size": 10}
LISTED: Config = {**LLAMA, "intermediate_size": [10, 12, 10]}
SINGLE: Config = {**LLAMA, "per_layer_config": {"1": {"intermediate_size": 12}}}
WIDER = {**decoder(LLAMA), **gated(f"{L1}.mlp", 24, 12)}
WIDTHS: dict[str, tuple[Shapes, Config, dict[str, str]]] = {
    # A model, its config, and tensors with the keys that count their channels.
    "channels": (decoder(LLAMA), LLAMA, {f"{L0}.mlp.up_proj.weight": "intermediate_size"}),
    "channels of experts and of a shared one": (mixture(QWEN2_MOE, [0]), QWEN2_MOE,
        {f"{L0}.mlp.up_proj.weight": "intermediate_size",
         f"{L1}.mlp.experts.3.up_proj.weight": "moe_intermediate_size",
         f"{L1}.mlp.shared_expert.up_proj.weight": "shared_expert_intermediate_size"}),
    "channels of one number for experts and others": (mixture(ONE_WIDTH, [0]), ONE_WIDTH,
        {f"{L0}.mlp.down_proj.weight": "intermediate_size",
         f"{L1}.mlp.experts.3.down_proj.weight": "moe_intermediate_size"}),
    "channels of experts where the config has one width": (
        mixtral(), MIXTRAL, {f"{L0}.block_sparse_moe.experts.1.w2.weight": "intermediate_size"}),
    "channels of stacks of experts": (gpt_oss(), GPT_OSS,
        {f"{L0}.mlp.experts.gate_up_proj_bias": "num_local_experts intermediate_size"}),
    "channels of both sides": ({**two_layers("model.encoder", 8, 12), **two_layers("model.decoder", 8, 14)},
        SIDES,
        {"model.encoder.layers.1.fc1.bias": "encoder_ffn_dim",
         "model.decoder.layers.1.fc2.weight": "decoder_ffn_dim"}),
    "channels by layer": (WIDER, LISTED,
        {f"{L0}.mlp.up_proj.weight": "intermediate_size[0]",
         f"{L1}.mlp.up_proj.weight": "intermediate_size[1]"}),
    "channels of a single layer": (WIDER, SINGLE,
        {f"{L0}.mlp.up_proj.weight": "intermediate_size",
         f"{L1}.mlp.up_proj.weight": "per_layer_config.1.intermediate_size"}),
    "channels that the config leaves out": (
        decoder(LLAMA),
        without(LLAMA, "intermediate_size"),
        {f"{L0}.mlp.up_proj.weight": "intermediate_size"},
    ),
    "channels that are told by another key": (
        decoder(LLAMA), {**without(LLAMA, "intermediate_size"), "ffn_dim": 10},
        {f"{L0}.mlp.up_proj.weight": "ffn_dim"}),
    "channels of a tower and of a text model": (pictures(), PICTURES,
        {"language_model.model.layers.0.mlp.up_proj.weight": "text_config.intermediate_size",
         "vision_tower.encoder.layers.0.mlp.fc1.weight": "vision_config.intermediate_size"}),
    "experts of a router": (mixture(QWEN3_MOE), QWEN3_MOE, {f"{L0}.mlp.gate.weight": "num_experts"}),
    "what reads as many inputs as a layer has": (decoder(LLAMA), LLAMA,
        {f"{L0}.input_layernorm.weight": "", "model.embed_tokens.weight": "vocab_size"}),
}  # fmt: skip


@pytest.mark.parametrize("case", WIDTHS)
def test_the_likeliest_key_of_the_right_value_counts_units(case: str) -> None:
    shapes, config, wanted = WIDTHS[case]
    counts = counts_of(shapes, config)
    found = {name: " ".join(key for _, key, *_ in reversed(counted(counts, name))) for name in wanted}
    assert found == wanted
    assert (counts.misfits, counts.refused, counts.contested) == ({}, {}, {})


def test_units_are_told_with_their_size_and_place() -> None:
    counts = counts_of(phi3(), PHI3)
    queries, keys = "num_attention_heads", "num_key_value_heads"
    assert counted(counts, f"{L0}.self_attn.qkv_proj.weight") == [
        (0, queries, 6, 2, 0),
        (0, keys, 3, 2, 12),
        (0, keys, 3, 2, 18),
    ]
    assert counted(counts, f"{L0}.self_attn.o_proj.weight") == [(1, queries, 6, 2, 0)]
    assert counted(counts, f"{L0}.mlp.gate_up_proj.weight") == [
        (0, "intermediate_size", 10, 1, 0),
        (0, "intermediate_size", 10, 1, 10),
    ]
    assert {one.group for listed in counts.of.values() for one in listed} == {
        f"{L0}.self_attn",
        f"{L0}.mlp",
    }


def test_several_shared_experts_are_one_wide_one_with_so_many_channels_for_each() -> None:
    counts = counts_of(deepseek(), DEEPSEEK)
    (one,) = counts.of[f"{L1}.mlp.shared_experts.up_proj.weight"]
    assert (path_shown(one.key), one.count, one.by_index) == ("moe_intermediate_size", 14, 2)
    (one,) = counts.of[f"{L1}.mlp.experts.0.up_proj.weight"]
    assert (path_shown(one.key), one.count, one.by_index) == ("moe_intermediate_size", 7, 1)


def test_a_router_and_its_correction_follow_the_experts_and_a_shared_gate_does_not() -> None:
    counts = counts_of(deepseek(), DEEPSEEK)
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        (one,) = counts.of[f"{L1}.mlp.{name}"]
        assert (path_shown(one.key), one.dim, one.follows) == ("n_routed_experts", 0, True)
    assert not counted(counts_of(mixture(QWEN2_MOE), QWEN2_MOE), f"{L0}.mlp.shared_expert_gate.weight")


RATIOS: dict[str, tuple[float, list[int], str, float]] = {
    # A ratio of hidden channels, channels that go, what is refused or "", the ratio that stays.
    "whole": (4, [*range(3, 11)], "", 3),
    "whole, and not as many": (4, [3, 4], "wanted a multiple of 8, as mlp_ratio counts them", 4),
    "whole, written as a decimal": (4.0, [3, 4], "", 3.75),
    "none": (2.5, [0, 19], "", 2.25),
}


@pytest.mark.parametrize("case", RATIOS)
def test_a_ratio_counts_channels_by_the_hidden_size(case: str) -> None:
    ratio, gone, why, after = RATIOS[case]
    width = int(8 * ratio)
    shapes = two_layers("model", 8, width)
    config: Config = {"model_type": "dinov2", "hidden_size": 8, "mlp_ratio": ratio, "num_hidden_layers": 2}
    cuts: list[Cut] = [("*.fc1.*", 0, gone), ("*.fc2.weight", 1, gone)]
    if why:
        with pytest.raises(CheckpointError, match=why):
            make_removal(shapes, cut(shapes, cuts), config)
        return
    removal = make_removal(shapes, cut(shapes, cuts), config)
    (change,) = removal.changes
    assert (change.key, change.before, change.after) == ("mlp_ratio", ratio, after)
    assert type(change.after) is type(ratio)


ENTRIES: dict[str, tuple[Config, dict[str, Any]]] = {
    "a list": (LISTED, {"intermediate_size": [10, 9, 10]}),
    "an object of single layers": (SINGLE, {"per_layer_config": {"1": {"intermediate_size": 9}}}),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_channels_of_one_layer_change_its_own_entry(case: str) -> None:
    config, after = ENTRIES[case]
    cuts = channels([1, 4, 11], f"{L1}.mlp")
    removal = make_removal(WIDER, cut(WIDER, cuts), config)
    assert removal.config == {**config, **after}


def test_a_layer_goes_with_its_entry_and_the_others_keep_what_they_lost() -> None:
    cuts = [*channels([1, 4, 11], f"{L1}.mlp"), (f"{L0}.*", None, ())]
    listed = make_removal(WIDER, cut(WIDER, cuts), LISTED)
    assert {change.key: change.after for change in listed.changes} == {
        "num_hidden_layers": 2,
        "intermediate_size": [9, 10],
    }
    single = make_removal(WIDER, cut(WIDER, cuts), SINGLE)
    assert {change.key: change.after for change in single.changes} == {
        "num_hidden_layers": 2,
        "per_layer_config": {"0": {"intermediate_size": 9}},
    }


STRANGE: dict[str, tuple[Shapes, Config, str, str]] = {
    # A model and its config -> a key that may not change, and why.
    "a layer of other channels": (
        WIDER,
        LLAMA,
        "intermediate_size",
        (
            f"{L1}.mlp.gate_proj.weight has 12 channels along dimension 0, config.json says 10 for "
            "intermediate_size"
        ),
    ),
    "another number of experts": (
        {**mixture(QWEN3_MOE), **experts(f"{L1}.mlp", 24, 7, 5)}, QWEN3_MOE, "num_experts",
        f"{L1}.mlp.experts has 5 members, config.json says 4 for num_experts"),
    "a width that is a text": (WIDER, {**LISTED, "intermediate_size": [10, "12", 10]}, "intermediate_size[1]",
        'config.json: intermediate_size[1] is "12", wanted an integer'),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE)
def test_what_a_key_should_count_and_does_not_keeps_it_from_changing(case: str) -> None:
    shapes, config, key, line = STRANGE[case]
    counts = counts_of(shapes, config)
    assert {path_shown(path): list(lines) for path, lines in counts.contested.items()} == {key: [line]}


def test_a_tower_that_its_config_does_not_count_is_no_reason_against_a_key() -> None:
    shapes = {**decoder(LLAMA), **gated("vision_tower.layers.0.mlp", 24, 12)}
    counts = counts_of(shapes, LLAMA)
    assert not counts.contested
    assert "vision_tower.layers.0.mlp.up_proj.weight" in counts.misfits
