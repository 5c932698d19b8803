"""Removing: what is left of every family, the keys that change, and what follows without being pruned."""

from collections.abc import Mapping
from copy import deepcopy
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

from sparseprune.errors import CheckpointError
from sparseprune.removal.sections import Sections
from sparseprune.removal.shrink import Removal, make_removal
from sparseprune.removal.slices import KeptIndices, kept_whole
from tests.removal.models import (
    BERT,
    DEEPSEEK,
    GPT2,
    GPT_OSS,
    LLAMA,
    LLAMA4,
    MIXTRAL,
    PHI3,
    PICTURES,
    QWEN2_MOE,
    QWEN3_MOE,
    VIT,
    Config,
    Cut,
    Shapes,
    channels,
    cut,
    decoder,
    deepseek,
    encoder,
    gpt2,
    gpt_oss,
    heads,
    llama4,
    mixtral,
    mixture,
    phi3,
    picture_encoder,
    pictures,
    places,
    some_elements,
    whole,
    without,
)
from tests.removal.test_module_lists import name_after, vanished_members


class Case(NamedTuple):
    """A model, cuts, the keys that they change, and what follows them without being pruned."""

    model: tuple[Shapes, Config]
    cuts: list[Cut]
    changes: Mapping[str, tuple[object, object]]
    follows: list[Cut] = []  # noqa: RUF012  (nobody adds to it)


EVEN = {**LLAMA, "num_key_value_heads": 6, "head_dim": 4}
BIASED = {**LLAMA, "num_hidden_layers": 1, "mlp_bias": True}
L0, L1 = "model.layers.0", "model.layers.1"
FEWER = {"num_attention_heads": (6, 4), "num_key_value_heads": (3, 2)}
FUSED_HEADS: list[Cut] = [
    ("*.qkv_proj.weight", 0, [0, 1, 2, 3, 12, 13, 18, 19]),
    ("*.o_proj.weight", 1, [0, 1, 2, 3]),
]
N_INNER: list[Cut] = [("*.c_fc.weight", 1, [0]), ("*.c_fc.bias", 0, [0]), ("*.mlp.c_proj.weight", 0, [0])]
CASES: dict[str, Case] = {
    "channels": Case((decoder(LLAMA), LLAMA), channels([0, 3, 4, 9]), {"intermediate_size": (10, 6)}),
    "other channels in each layer": Case((decoder(LLAMA), LLAMA),
        [c for layer in range(3) for c in channels([layer, 9 - layer], f"*.{layer}.mlp")],
        {"intermediate_size": (10, 8)}),
    "channels that have biases, where the last one has one bias for all": Case(
        (
            {
                **decoder(BIASED),
                f"{L0}.mlp.gate_proj.bias": (10,),
                f"{L0}.mlp.up_proj.bias": (10,),
                f"{L0}.mlp.down_proj.bias": (24,),
            },
            BIASED,
        ),
        [*channels([2]), ("*.gate_proj.bias", 0, [2]), ("*.up_proj.bias", 0, [2])],
        {"intermediate_size": (10, 9)},
    ),
    "heads": Case((decoder(LLAMA), LLAMA), heads([2, 3], [1]), FEWER),
    "heads of a size that the config leaves to the class": Case(
        (decoder({**LLAMA, "head_dim": 4}), without(LLAMA, "head_dim")), heads([2, 3], [1], size=4),
        {**FEWER, "head_dim": (None, 4)}),
    "heads that all have keys and values of their own, as the config leaves to the class": Case(
        (decoder(EVEN), without(EVEN, "num_key_value_heads")), heads([2, 3], [2, 3], size=4),
        {"num_attention_heads": (6, 4), "num_key_value_heads": (None, 4)}),
    "heads that all have keys and values of their own, as null says": Case(
        (decoder(EVEN), {**EVEN, "num_key_value_heads": None}), heads([0, 5], [0, 5], size=4),
        {"num_attention_heads": (6, 4), "num_key_value_heads": (None, 4)}),
    "one query head of each key/value head": Case(
        (decoder(LLAMA), LLAMA), heads([1, 2, 5], []), {"num_attention_heads": (6, 3)}
    ),
    "fused heads": Case((phi3(), PHI3), FUSED_HEADS, FEWER),
    "fused channels": Case((phi3(), PHI3),
        [("*.gate_up_proj.weight", 0, [0, 7, 10, 17]), ("*.down_proj.weight", 1, [0, 7])],
        {"intermediate_size": (10, 8)}),
    "heads with sinks that follow": Case(
        (gpt_oss(), GPT_OSS), heads([4, 5], [2]), FEWER, [("*.sinks", 0, [4, 5])]
    ),
    "heads with sinks that go with them": Case(
        (gpt_oss(), GPT_OSS), [*heads([4, 5], [2]), ("*.sinks", 0, [4, 5])], FEWER
    ),
    "experts in tensors": Case((gpt_oss(), GPT_OSS),
        [(f"{L0}.mlp.experts.*", 0, [0]), (f"{L1}.mlp.experts.*", 0, [3])], {"num_local_experts": (4, 3)},
        [(f"{L0}.mlp.router.*", 0, [0]), (f"{L1}.mlp.router.*", 0, [3])]),
    "experts and interleaved channels in tensors": Case(
        (gpt_oss(), GPT_OSS),
        [
            ("*.experts.*", 0, [1]),
            ("*.experts.gate_up_proj", 2, places([2, 9], 2)),
            ("*.experts.gate_up_proj_bias", 1, places([2, 9], 2)),
            ("*.experts.down_proj", 1, [2, 9]),
        ],
        {"num_local_experts": (4, 3), "intermediate_size": (10, 8)},
        [("*.router.*", 0, [1])],
    ),
    "experts with a router that follows": Case((mixture(QWEN3_MOE), QWEN3_MOE),
        whole(f"{L0}.mlp.experts.0.*", f"{L1}.mlp.experts.2.*"), {"num_experts": (4, 3)},
        [(f"{L0}.mlp.gate.weight", 0, [0]), (f"{L1}.mlp.gate.weight", 0, [2])]),
    "experts with the rows of their router": Case((mixture(QWEN3_MOE), QWEN3_MOE),
        [*whole("*.experts.[03].*"), ("*.mlp.gate.weight", 0, [0, 3])], {"num_experts": (4, 2)}),
    "experts that the config counts under another name": Case(
        (mixture(QWEN3_MOE), {**without(QWEN3_MOE, "num_experts"), "num_local_experts": 4}),
        whole("*.experts.1.*"), {"num_local_experts": (4, 3)}, [("*.mlp.gate.weight", 0, [1])]),
    "experts and their channels": Case((mixture(QWEN2_MOE), QWEN2_MOE),
        [*channels([0, 6], "*.experts.*"), *whole("*.experts.2.*")],
        {"num_experts": (4, 3), "moe_intermediate_size": (7, 5)}, [("*.mlp.gate.weight", 0, [2])]),
    "channels of a shared expert": Case((mixture(QWEN2_MOE), QWEN2_MOE), channels([1], "*.shared_expert"),
        {"shared_expert_intermediate_size": (8, 7)}),
    "channels of the layers that have no experts": Case(
        (mixture(QWEN3_MOE, dense=[0]), {**QWEN3_MOE, "mlp_only_layers": [0]}), channels([1], f"{L0}.mlp"),
        {"intermediate_size": (10, 9)}),
    "experts of mixtral": Case((mixtral(), MIXTRAL),
        [("*.w[13].weight", 0, [5]), ("*.w2.weight", 1, [5]), *whole("*.experts.0.*")],
        {"num_local_experts": (4, 3), "intermediate_size": (10, 9)}, [("*.gate.weight", 0, [0])]),
    "experts of llama4": Case((llama4(), LLAMA4), [("*.experts.*", 0, [0, 2, 3])],
        {"num_local_experts": (4, 1)}, [("*.router.weight", 0, [0, 2, 3])]),
    "channels of llama4's experts, of which the shared one is as wide": Case(
        (llama4(), LLAMA4),
        [
            ("*.experts.gate_up_proj", 2, [0, 10]),
            ("*.experts.down_proj", 1, [0]),
            *channels([8], "*.shared_expert"),
        ],
        {"intermediate_size": (10, 9)},
    ),
    "channels of llama4's other layers": Case(
        (llama4(), LLAMA4), channels([0, 1], f"{L0}.feed_forward"), {"intermediate_size_mlp": (14, 12)}
    ),
    "experts of each group": Case((deepseek(), DEEPSEEK),
        whole("*.1.mlp.experts.[07].*", "*.2.mlp.experts.[24].*"), {"n_routed_experts": (8, 6)},
        [("*.1.mlp.gate.*", 0, [0, 7]), ("*.2.mlp.gate.*", 0, [2, 4])]),
    "experts of groups that serve together": Case(
        (deepseek(), {**DEEPSEEK, "topk_group": 2, "num_experts_per_tok": 6}), whole("*.mlp.experts.[07].*"),
        {"n_routed_experts": (8, 6)}, [("*.mlp.gate.*", 0, [0, 7])]),
    "a whole group of experts": Case(
        (deepseek(), DEEPSEEK),
        whole("*.1.mlp.experts.[0123].*", "*.2.mlp.experts.[4567].*"),
        {"n_routed_experts": (8, 4), "n_group": (2, 1)},
        [("*.1.mlp.gate.*", 0, range(4)), ("*.2.mlp.gate.*", 0, range(4, 8))],
    ),
    "channels of experts and as many for each shared one": Case((deepseek(), DEEPSEEK),
        [*channels([1], "*.experts.*"), *channels([0, 1], "*.shared_experts")],
        {"moe_intermediate_size": (7, 6)}),
    "latent heads": Case(
        (deepseek(), DEEPSEEK),
        [
            ("*.q_proj.weight", 0, places([1], 5)),
            ("*.kv_b_proj.weight", 0, places([1], 7)),
            ("*.o_proj.weight", 1, places([1], 4)),
        ],
        {"num_attention_heads": (4, 3), "num_key_value_heads": (4, 3)},
    ),
    "channels that the config leaves to the class": Case((gpt2(), GPT2), N_INNER, {"n_inner": (None, 31)}),
    "channels that the config has null for": Case(
        (gpt2(), {**GPT2, "n_inner": None}), N_INNER, {"n_inner": (None, 31)}
    ),
    "channels of an encoder": Case((encoder(), BERT),
        [("*.intermediate.dense.*", 0, [0]), ("*.[01].output.dense.weight", 1, [0])],
        {"intermediate_size": (10, 9)}),
    "heads of a picture encoder": Case((picture_encoder(), VIT),
        [("*.attention.attention.*", 0, [2, 3]), ("*.attention.output.dense.weight", 1, [2, 3])],
        {"num_attention_heads": (4, 3), "head_dim": (None, 2)}),
    "channels under a nested config": Case(
        (pictures(), PICTURES), channels([9], "language*.mlp"), {"text_config.intermediate_size": (10, 9)}
    ),
    "heads under a nested config": Case((pictures(), PICTURES), heads([0, 1], [0], "language*.self_attn"),
        {f"text_config.{key}": change for key, change in FEWER.items()}),
    "channels of a tower": Case((pictures(), PICTURES),
        [("vision*.fc1.weight", 0, [1, 7]), ("vision*.fc2.weight", 1, [1, 7])],
        {"vision_config.intermediate_size": (12, 10)}),
    "channels of a tower and of the text model": Case((pictures(), PICTURES),
        [("vision*.fc1.weight", 0, [1]), ("vision*.fc2.weight", 1, [1]), *channels([0, 9], "language*.mlp")],
        {"vision_config.intermediate_size": (12, 11), "text_config.intermediate_size": (10, 8)}),
    "a layer of a tower": Case((pictures(), PICTURES), whole("vision*.layers.0.*"),
        {"vision_config.num_hidden_layers": (2, 1)}),
    "a layer of a tower, and another of the text model": Case((pictures(), PICTURES),
        whole("vision*.layers.0.*", "language*.layers.1.*"),
        {"vision_config.num_hidden_layers": (2, 1), "text_config.num_hidden_layers": (2, 1)}),
    "a layer": Case((decoder(LLAMA), LLAMA), whole(f"{L1}.*"), {"num_hidden_layers": (3, 2)}),
    "layers whose names begin with them": Case(
        (decoder(LLAMA, ""), LLAMA), whole("layers.0.*", "layers.2.*"), {"num_hidden_layers": (3, 1)}
    ),
    "a layer, and channels of the others": Case((decoder(LLAMA), LLAMA),
        [*channels([4], "*.[12].mlp"), *whole(f"{L0}.*")],
        {"num_hidden_layers": (3, 2), "intermediate_size": (10, 9)}),
    "a layer with its experts, and experts of the others": Case(
        (mixture(QWEN3_MOE), QWEN3_MOE),
        whole(f"{L0}.*", f"{L1}.mlp.experts.0.*"),
        {
            "num_hidden_layers": (2, 1),
            "num_experts": (4, 3),
            "mlp_only_layers": (None, []),
            "decoder_sparse_step": (None, 1),
        },
        [(f"{L1}.mlp.gate.weight", 0, [0])],
    ),
    "a layer of gpt2": Case((gpt2(), GPT2), whole("h.0.*"), {"n_layer": (2, 1)}),
    "a layer under a nested config": Case(
        (pictures(), PICTURES), whole("language*.layers.0.*"), {"text_config.num_hidden_layers": (2, 1)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_of_a_model_and_of_its_config(case: str) -> None:
    (shapes, config), cuts, changes, follows = CASES[case]
    kept, before = cut(shapes, cuts), deepcopy((shapes, config))
    removal = make_removal(shapes, kept, config)
    assert {change.key: (change.before, change.after) for change in removal.changes} == changes
    assert removal.config == changed(config, changes)
    check_left(removal, shapes, cut(shapes, [*cuts, *follows]))
    assert (shapes, config) == before
    for name, each in cut(shapes, cuts).items():
        assert all(map(np.array_equal, kept[name].along, each.along))


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_tensors_has_no_say(case: str) -> None:
    (shapes, config), cuts, changes, follows = CASES[case]
    backwards = dict(reversed(shapes.items()))
    removal = make_removal(backwards, cut(backwards, cuts), config)
    assert {change.key: (change.before, change.after) for change in removal.changes} == changes
    check_left(removal, backwards, cut(backwards, [*cuts, *follows]))


def changed(config: Config, changes: Mapping[str, tuple[object, object]]) -> Config:
    """A config with other values."""
    written = deepcopy(config)
    for key, (_, after) in changes.items():
        *sections, last = key.split(".")
        target = written
        for section in sections:
            target = target[section]
        target[last] = after
    return written


def check_left(removal: Removal, shapes: Shapes, kept: Mapping[str, KeptIndices]) -> None:
    """Names, shapes and flags are those that plain loops find."""
    gone, _ = vanished_members(shapes, {name for name, each in kept.items() if not each.elements})
    stays = [name for name in shapes if name not in kept or kept[name].elements]
    assert list(removal.left) == stays
    for name in stays:
        left = removal.left[name]
        assert left.name == name_after(name, gone)
        everything = kept_whole(shapes[name])
        expected = kept.get(name, everything)
        found = removal.kept.get(name, everything)
        assert (left.whole) == expected.is_whole
        assert all(map(np.array_equal, found.along, expected.along))
        assert left.shape == tuple(int(flags.sum()) for flags in expected.along)
    assert len({left.name for left in removal.left.values()}) == len(stays)


@pytest.mark.parametrize("model", ["deepseek_v3", "qwen3_moe"])
def test_both_spellings_of_a_key_change_where_the_config_has_both(model: str) -> None:
    """Of two the class takes one, and not always the one that it writes."""
    shapes, dense = (deepseek(), DEEPSEEK) if model == "deepseek_v3" else (mixture(QWEN3_MOE), QWEN3_MOE)
    key, number = ("n_routed_experts", 8) if model == "deepseek_v3" else ("num_experts", 4)
    cuts = whole("*.experts.[04].*") if model == "deepseek_v3" else whole("*.experts.[02].*")
    removal = make_removal(shapes, cut(shapes, cuts), {**dense, "num_local_experts": number})
    after = (number, number - 2)
    found = {change.key: (change.before, change.after) for change in removal.changes}
    assert found == {key: after, "num_local_experts": after}


def test_heads_are_refused_where_the_class_checks_a_list_by_the_size_that_it_derives() -> None:
    """Phi3Config takes hidden_size // num_attention_heads for the size of a head, whatever head_dim is."""
    narrower: list[Cut] = [("*.gate_up_proj.weight", 0, [0, 10]), ("*.down_proj.weight", 1, [0])]
    shapes = phi3()
    for key, factor in product(("rope_scaling", "rope_parameters"), ("short_factor", "long_factor")):
        rope = {"type": "longrope", factor: [1.0, 1.0]}
        with pytest.raises(CheckpointError, match=f"num_attention_heads cannot change: .*{key}"):
            make_removal(shapes, cut(shapes, FUSED_HEADS), {**PHI3, key: rope})
        assert make_removal(shapes, cut(shapes, narrower), {**PHI3, key: rope}).changes
        assert make_removal(shapes, cut(shapes, FUSED_HEADS), {**PHI3, key: {"rope_type": "default"}}).changes
        assert make_removal(shapes, cut(shapes, FUSED_HEADS), {**PHI3, key: None}).changes


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "unheard of"}, {}, None])
def test_where_nothing_is_dropped_nothing_changes(config: Config | None) -> None:
    """Whatever the config: no key has to carry anything."""
    shapes = decoder(LLAMA)
    removal = make_removal(shapes, cut(shapes, channels([])), config)
    assert (removal.config, removal.changes) == (None, ())
    check_left(removal, shapes, {})


@pytest.mark.parametrize("shape", [(4, 6), (3, 2, 5)])
def test_masks_that_are_not_made_of_whole_slices_are_refused(shape: tuple[int, ...]) -> None:
    shapes = {**decoder(LLAMA), "a.weight": shape}
    kept = cut(shapes, channels([1]))
    with pytest.raises(CheckpointError, match=r"^a\.weight: its mask is not made of whole slices"):
        make_removal(shapes, {**kept, "a.weight": some_elements(shape, 7)}, LLAMA)
    removal = make_removal(shapes, {**kept, "a.weight": some_elements(shape, 99)}, LLAMA)
    assert removal.left["a.weight"].whole


LOOSE: dict[str, tuple[Shapes, Config, list[Cut]]] = {
    "query heads of no one key/value head": (decoder(LLAMA), LLAMA, heads([4, 5], [0])),
    "experts of one group": (deepseek(), DEEPSEEK, whole("*.experts.[67].*")),
}


@pytest.mark.parametrize("case", LOOSE)
def test_numbers_alone_are_looked_at_where_it_is_not_known_what_stays(case: str) -> None:
    shapes, config, cuts = LOOSE[case]
    assert make_removal(shapes, cut(shapes, cuts), config, decisions={}).changes
    with pytest.raises(CheckpointError):
        make_removal(shapes, cut(shapes, cuts), config)


def test_a_number_without_dimensions_goes_with_its_layer() -> None:
    shapes: Shapes = {**decoder(LLAMA), f"{L1}.scale": (), "model.scale": ()}
    removal = make_removal(shapes, cut(shapes, whole(f"{L1}.*")), LLAMA)
    check_left(removal, shapes, cut(shapes, whole(f"{L1}.*")))
    assert removal.left["model.scale"].shape == ()


def test_a_tensor_without_elements_goes_with_its_layer() -> None:
    """No mask says of it that anything is kept."""
    shapes: Shapes = {**decoder(LLAMA), f"{L1}.empty": (0, 4), "model.layers.2.empty": (0, 4)}
    removal = make_removal(shapes, cut(shapes, whole(f"{L1}.[!e]*")), LLAMA)
    assert f"{L1}.empty" not in removal.left
    assert removal.left["model.layers.2.empty"].name == f"{L1}.empty"


@pytest.mark.parametrize(
    ("name", "reached"),
    [
        ("language_model.model.layers.0.mlp.up_proj.weight", True),
        ("language_model.transformer.layers.0.mlp.up_proj.weight", True),
        ("vision_tower.encoder.layers.0.mlp.up_proj.weight", False),
        ("qformer.encoder.layers.0.mlp.up_proj.weight", False),
        ("perceiver_resampler.layers.0.mlp.up_proj.weight", False),
    ],
)
def test_a_nested_config_speaks_of_the_text_alone(name: str, reached: bool) -> None:
    tower = {"model_type": "clip_vision_model"}
    nested = Sections.of({"model_type": "llava", "text_config": LLAMA, "vision_config": tower})
    assert (nested.path_at(name) == ("text_config",)) == reached
    assert Sections.of(LLAMA).path_at(name) == ()
