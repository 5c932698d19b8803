"""Removing: what no class can express is refused line by line, each case beside a neighbour that is legal."""

from collections.abc import Mapping
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import pytest

from sparseprune.errors import CheckpointError
from sparseprune.removal.architectures import model_types
from sparseprune.removal.shrink import make_removal
from sparseprune.removal.slices import KeptIndices
from sparseprune.spec.problems import listed
from tests.removal.models import (
    BERT,
    DEEPSEEK,
    GPT2,
    GPT_OSS,
    LLAMA,
    PHI3,
    PICTURES,
    QWEN3_MOE,
    Config,
    Cut,
    Shapes,
    channels,
    cut,
    decoder,
    deepseek,
    encoder,
    gated,
    gpt2,
    gpt_oss,
    heads,
    mixture,
    phi3,
    pictures,
    places,
    whole,
    without,
)

L0, L1, L2 = (f"model.layers.{layer}" for layer in range(3))


class Case(NamedTuple):
    """A model, cuts that are refused with a line or some, and legal ones with the keys that they change."""

    model: tuple[Shapes, Config | None]
    refused: list[Cut]
    lines: str | tuple[str, ...]
    legal: tuple[list[Cut], Mapping[str, tuple[object, object]]]


ONE: Config = {**LLAMA, "num_hidden_layers": 1}
MOE: Config = {**QWEN3_MOE, "num_hidden_layers": 1}
GROUPED: Config = {**DEEPSEEK, "num_hidden_layers": 2}
STRANGE: Config = {**PICTURES, "vision_config": {"model_type": "strange", "intermediate_size": 12}}
TYPES = model_types()
KNOWN = listed([*TYPES[:20], *([f"{len(TYPES) - 20} more"] if len(TYPES) > 20 else [])])
UNKNOWN = f"so that no key can carry the smaller shapes; known are {KNOWN}; apply keeps all shapes"


def experts_to(first: int, second: int, layer: str = "*") -> list[Cut]:
    """Of two groups of four experts so many stay, the first ones of each."""
    gone = [*range(first, 4), *range(4 + second, 8)]
    return whole(*(f"{layer}.mlp.experts.{expert}.*" for expert in gone))


def loses(name: str, gone: int, size: int, dim: int) -> str:
    return f"{name} loses {gone} of {size} along dimension {dim}, which no key of config.json carries"


def nothing_left(name: str, shape: list[int], since: str) -> str:
    return (
        f"{name}: nothing of its {shape} is kept, and it belongs to no layer or expert that is dropped as a "
        f"whole, since {since} stays: couple all tensors of one"
    )


def unlike_groups(at: str, number: int, left: int, queries: list[int]) -> str:
    return (
        f"{at}.self_attn: of its {number} key/value heads {left} stay, and they have {queries} query heads: "
        "each that stays must keep as many, the others none"
    )


def kept(name: str, left: int, size: int, dim: int) -> str:
    return f"{name} keeps {left} of {size} along dimension {dim}"


def unlike(one: str, other: str, key: str) -> str:
    return f"{one}, {other} ({key}): couple them in the spec"


def one_for_all(key: str, one: int, at: str, other: int, beside: str) -> str:
    return (
        f"{key} would be {one} in {at} and {other} in {beside}, and config.json has one for all: keep as "
        "many in all of these"
    )


FOUR = [0, 3, 4, 9]
HEADS = "num_attention_heads"
NARROW = {"intermediate_size": (10, 6)}
FEWER_HEADS = {"num_attention_heads": (6, 4), "num_key_value_heads": (3, 2)}
PAIRED: Config = {
    "model_type": "diffllama", "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 2,
}  # fmt: skip


def paired() -> Shapes:
    """One layer with four heads of two rows."""
    at = f"{L0}.self_attn"
    return {**{f"{at}.{name}_proj.weight": (8, 24) for name in "qkv"}, f"{at}.o_proj.weight": (24, 8)}


def paired_heads(outputs: list[int]) -> list[Cut]:
    """Of four heads the first, and the third, which is subtracted from it; and some columns of outputs."""
    gone = places([0, 2], 2)
    return [(f"{L0}.self_attn.[qkv]_proj.weight", 0, gone), (f"{L0}.self_attn.o_proj.weight", 1, outputs)]


T5: Config = {"model_type": "t5", "num_layers": 2, "num_heads": 4, "d_kv": 2, "d_model": 12}
BIASES = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def biased() -> Shapes:
    """Two layers of heads, of which the first has biases for all."""
    matrices = {
        f"encoder.block.{layer}.layer.0.SelfAttention.{name}.weight": (12, 8) if name == "o" else (8, 12)
        for layer in range(2)
        for name in "qkvo"
    }
    return {**matrices, BIASES: (32, 4)}


def biased_heads(gone: list[int], layer: str = "*") -> list[Cut]:
    at = f"encoder.block.{layer}.*.SelfAttention"
    return [(f"{at}.[qkv].weight", 0, places(gone, 2)), (f"{at}.o.weight", 1, places(gone, 2))]


CASES: dict[str, Case] = {
    "heads of which others are read": Case(
        (paired(), PAIRED),
        paired_heads([4, 5, 6, 7]),
        unlike(kept(f"{L0}.self_attn.q_proj.weight", 2, 4, 0), f"{L0}.self_attn.o_proj.weight as many others",
            "num_attention_heads"),
        (paired_heads([0, 1, 2, 3]), {"num_attention_heads": (4, 2), "num_key_value_heads": (4, 2)})),
    "other heads in layers that share biases": Case((biased(), T5),
        [*biased_heads([0, 2], "0"), *biased_heads([0, 3], "1")],
        "encoder.block.*.layer.0.SelfAttention may keep other heads in one layer than in another, and the "
        "position biases of the first layer are those of all, head by head: prune by heads-aligned, or "
        "couple the heads of all layers",
        (biased_heads([0, 3]), {"num_heads": (4, 2)})),
    "a dimension that no key carries": Case((decoder(LLAMA), LLAMA),
        [(f"{L0}.mlp.gate_proj.weight", 1, [3, 5])], loses(f"{L0}.mlp.gate_proj.weight", 2, 24, 1),
        (channels(FOUR), NARROW)),
    "a tensor that the family does not know": Case(({**decoder(LLAMA), "model.extra.weight": (5, 4)}, LLAMA),
        [*channels(FOUR), ("model.extra.weight", 0, [1])], loses("model.extra.weight", 1, 5, 0),
        (channels(FOUR), NARROW)),
    "a matrix of another size than the config's": Case(
        ({**decoder(LLAMA), f"{L1}.mlp.up_proj.weight": (12, 24)}, LLAMA),
        [(f"{L1}.mlp.up_proj.weight", 0, [0, 11])],
        f"{L1}.mlp.up_proj.weight has 12 along dimension 0, config.json says 10 for intermediate_size",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "a matrix of another size beside such as are cut": Case(
        ({**decoder(LLAMA), f"{L1}.mlp.up_proj.weight": (12, 24)}, LLAMA),
        [
            *channels(FOUR, "*.[02].mlp"),
            (f"{L1}.mlp.gate_proj.weight", 0, FOUR),
            (f"{L1}.mlp.down_proj.weight", 1, FOUR),
        ],
        f"{L1}.mlp.up_proj.weight has 12 along dimension 0, config.json says 10 for intermediate_size",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "a fused matrix of another size than the config's": Case(
        ({**phi3(), f"{L0}.self_attn.qkv_proj.weight": (26, 24)}, PHI3),
        [(f"{L0}.self_attn.qkv_proj.weight", 0, [1])],
        f"{L0}.self_attn has no whole heads: qkv_proj.weight [26, 24], o_proj.weight [24, 12], and "
        "config.json says 6 for num_attention_heads and 3 for num_key_value_heads and 2 for head_dim",
        (
            [(f"{L0}.mlp.gate_up_proj.weight", 0, [2, 3, 12, 13]), (f"{L0}.mlp.down_proj.weight", 1, [2, 3])],
            {"intermediate_size": (10, 8)},
        ),
    ),
    "half a head": Case(
        (decoder(ONE), ONE),
        [
            ("*.q_proj.weight", 0, [0, 1, 2, 3, 4, 6]),
            ("*.o_proj.weight", 1, [0, 1, 2, 3]),
            ("*.[kv]_proj.weight", 0, [0, 1]),
        ],
        (
            (
                f"{L0}.self_attn.q_proj.weight keeps 6 of 12 along dimension 0, wanted whole units of 2, "
                "as num_attention_heads counts them"
            ),
            unlike(kept(f"{L0}.self_attn.q_proj.weight", 2, 6, 0),
                kept(f"{L0}.self_attn.o_proj.weight", 4, 6, 1), "num_attention_heads"),
            unlike_groups(L0, 3, 2, [0, 0, 2]),
        ),
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "gate and up that keep unlike numbers": Case(
        (decoder({**LLAMA, "num_hidden_layers": 2}), {**LLAMA, "num_hidden_layers": 2}),
        [
            *channels(FOUR, "*.0.mlp"),
            *channels(FOUR, f"{L1}.mlp")[:2],
            (f"{L1}.mlp.down_proj.weight", 1, [0, 3]),
        ],
        unlike(
            kept(f"{L1}.mlp.gate_proj.weight", 6, 10, 0),
            kept(f"{L1}.mlp.down_proj.weight", 8, 10, 1),
            "intermediate_size",
        ),
        (channels(FOUR), NARROW),
    ),
    "gate and up that keep unlike channels": Case(
        (decoder(ONE), ONE),
        [*channels(FOUR)[:1], *channels([1, 2, 3, 4])[1:]],
        (
            unlike(
                kept(f"{L0}.mlp.gate_proj.weight", 6, 10, 0),
                f"{L0}.mlp.up_proj.weight as many others",
                "intermediate_size",
            ),
            unlike(
                kept(f"{L0}.mlp.gate_proj.weight", 6, 10, 0),
                f"{L0}.mlp.down_proj.weight as many others",
                "intermediate_size",
            ),
        ),
        (channels(FOUR), NARROW),
    ),
    "one matrix of three": Case(
        (decoder(ONE), ONE),
        channels(FOUR)[1:2],
        (
            unlike(
                kept(f"{L0}.mlp.up_proj.weight", 6, 10, 0),
                kept(f"{L0}.mlp.gate_proj.weight", 10, 10, 0),
                "intermediate_size",
            ),
            unlike(
                kept(f"{L0}.mlp.up_proj.weight", 6, 10, 0),
                kept(f"{L0}.mlp.down_proj.weight", 10, 10, 1),
                "intermediate_size",
            ),
        ),
        (channels(FOUR), NARROW),
    ),
    "gate and up of one matrix that keep unlike channels": Case(
        (phi3(), PHI3),
        [(f"{L0}.mlp.gate_up_proj.weight", 0, [2, 3, 12, 14]), (f"{L0}.mlp.down_proj.weight", 1, [2, 3])],
        unlike(
            kept(f"{L0}.mlp.gate_up_proj.weight", 8, 10, 0),
            f"{L0}.mlp.gate_up_proj.weight as many others",
            "intermediate_size",
        ),
        (
            [(f"{L0}.mlp.gate_up_proj.weight", 0, [2, 3, 12, 13]), (f"{L0}.mlp.down_proj.weight", 1, [2, 3])],
            {"intermediate_size": (10, 8)},
        ),
    ),
    "a part of shared experts that is none for each": Case(
        (deepseek(GROUPED), GROUPED),
        [*channels([1], "*.experts.*"), *channels([1, 8, 11], "*.shared_experts")],
        (
            (
                f"{L1}.mlp.shared_experts.gate_proj.weight keeps 11 of 14 along dimension 0, wanted a "
                "multiple of 2, as moe_intermediate_size counts them"
            ),
            (
                f"{L1}.mlp.shared_experts.up_proj.weight keeps 11 of 14 along dimension 0, wanted a "
                "multiple of 2, as moe_intermediate_size counts them"
            ),
            (
                f"{L1}.mlp.shared_experts.down_proj.weight keeps 11 of 14 along dimension 1, wanted a "
                "multiple of 2, as moe_intermediate_size counts them"
            ),
            one_for_all("moe_intermediate_size", 6, f"{L1}.mlp.experts.7.gate_proj", 5,
                f"{L1}.mlp.shared_experts.gate_proj"),
        ),
        (
            [*channels([1], "*.experts.*"), *channels([8, 11], "*.shared_experts")],
            {"moe_intermediate_size": (7, 6)},
        ),
    ),
    "shared experts of other channels": Case(
        (deepseek(GROUPED), GROUPED),
        [
            *channels([1], "*.experts.*"),
            *channels([8, 11], "*.shared_experts")[:2],
            *channels([8, 12], "*.shared_experts")[2:],
        ],
        unlike(
            kept(f"{L1}.mlp.shared_experts.gate_proj.weight", 12, 14, 0),
            f"{L1}.mlp.shared_experts.down_proj.weight as many others",
            "moe_intermediate_size",
        ),
        (
            [*channels([1], "*.experts.*"), *channels([8, 11], "*.shared_experts")],
            {"moe_intermediate_size": (7, 6)},
        ),
    ),
    "layers of unlike widths": Case(
        (decoder(LLAMA), LLAMA),
        [*channels(FOUR, f"{L0}.mlp"), *channels([1], f"{L2}.mlp")],
        one_for_all(
            "intermediate_size", 6, "model.layers.0.mlp.gate_proj", 10, "model.layers.1.mlp.gate_proj"
        ),
        (
            [
                *channels(FOUR, f"{L0}.mlp"),
                *channels([1, 2, 5, 6], f"{L1}.mlp"),
                *channels([0, 1, 2, 9], f"{L2}.mlp"),
            ],
            NARROW,
        ),
    ),
    "experts of unlike widths": Case(
        (mixture(QWEN3_MOE), QWEN3_MOE),
        [*channels([1], "*.experts.[012]"), *channels([1, 2], "*.experts.3")],
        one_for_all(
            "moe_intermediate_size", 6, f"{L1}.mlp.experts.2.gate_proj", 5, f"{L1}.mlp.experts.3.gate_proj"
        ),
        (
            [*channels([1], "*.experts.[012]"), *channels([5], "*.experts.3")],
            {"moe_intermediate_size": (7, 6)},
        ),
    ),
    "unlike numbers of experts": Case(
        (mixture(QWEN3_MOE), QWEN3_MOE),
        whole(f"{L0}.mlp.experts.0.*", f"{L1}.mlp.experts.[12].*"),
        one_for_all("num_experts", 3, "model.layers.0.mlp", 2, "model.layers.1.mlp"),
        (whole(f"{L0}.mlp.experts.0.*", f"{L1}.mlp.experts.2.*"), {"num_experts": (4, 3)}),
    ),
    "all experts": Case(
        (mixture(MOE), MOE),
        whole("*.experts.*"),
        (
            "num_experts would be 0, fewer than the 2 of num_experts_per_tok",
            "config.json: num_experts would be 0: nothing is left",
        ),
        (whole("*.experts.1.*"), {"num_experts": (4, 3)}),
    ),
    "no channel": Case(
        (decoder(ONE), ONE),
        channels(range(10)),
        (
            nothing_left(f"{L0}.mlp.gate_proj.weight", [10, 24], f"{L0}.self_attn.q_proj.weight"),
            nothing_left(f"{L0}.mlp.up_proj.weight", [10, 24], f"{L0}.self_attn.q_proj.weight"),
            nothing_left(f"{L0}.mlp.down_proj.weight", [24, 10], f"{L0}.self_attn.q_proj.weight"),
        ),
        (channels(range(9)), {"intermediate_size": (10, 1)}),
    ),
    "no channel in a layer": Case(
        (decoder(LLAMA), LLAMA),
        channels(range(10), f"{L0}.mlp"),
        (
            nothing_left(f"{L0}.mlp.gate_proj.weight", [10, 24], f"{L0}.self_attn.q_proj.weight"),
            nothing_left(f"{L0}.mlp.up_proj.weight", [10, 24], f"{L0}.self_attn.q_proj.weight"),
            nothing_left(f"{L0}.mlp.down_proj.weight", [24, 10], f"{L0}.self_attn.q_proj.weight"),
        ),
        (channels(range(9)), {"intermediate_size": (10, 1)}),
    ),
    "members of a list that no key counts": Case(
        ({**decoder(LLAMA), **{f"model.adapters.{number}.weight": (3, 3) for number in range(4)}}, LLAMA),
        whole("model.adapters.1.*"),
        "model.adapters loses 1 of 4 members, which no key of config.json counts",
        (whole(f"{L1}.*"), {"num_hidden_layers": (3, 2)}),
    ),
    "a router alone": Case(
        (mixture(MOE), MOE),
        [("*.mlp.gate.weight", 0, [1])],
        f"{L0}.mlp.experts keeps 4 of 4, {L0}.mlp.gate.weight keeps 3 of 4 along dimension 0 "
        "(num_experts): couple them in the spec",
        ([*whole("*.experts.1.*"), ("*.mlp.gate.weight", 0, [1])], {"num_experts": (4, 3)}),
    ),
    "another row of the router": Case(
        (mixture(MOE), MOE),
        [*whole("*.experts.1.*"), ("*.mlp.gate.weight", 0, [2])],
        f"{L0}.mlp.experts keeps 3 of 4, {L0}.mlp.gate.weight as many others (num_experts): couple "
        "them in the spec",
        (whole("*.experts.1.*"), {"num_experts": (4, 3)}),
    ),
    "a vector in place of a matrix": Case(
        ({**decoder(ONE), f"{L0}.mlp.down_proj.weight": (240,)}, ONE),
        channels(FOUR)[:2],
        f"{L0}.mlp.down_proj.weight has the shape [240], and {L0}.mlp.gate_proj.weight [10, 24]: these make "
        "no MLP",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "experts with a gap between their numbers": Case(
        ({name.replace("experts.3.", "experts.4."): shape for name, shape in mixture(MOE).items()}, MOE),
        whole("*.experts.0.*"),
        f"{L0}.mlp.experts has a member 4 and none with the number 3, config.json says 4 for num_experts",
        (channels([0], "*.experts.*"), {"moe_intermediate_size": (7, 6)}),
    ),
    "a key/value head alone": Case((decoder(ONE), ONE), heads([], [0]), unlike_groups(L0, 3, 2, [2, 2, 2]),
        (heads([0, 1], [0]), FEWER_HEADS)),
    "quantized, as is said beside a nested config": Case(
        (pictures(), {**PICTURES, "quantization_config": {"quant_method": "fp8"}}),
        channels(FOUR, "language*.mlp"),
        "language_model.model.layers.0.mlp.gate_proj.weight is quantized, and its scales are those "
        "of the whole: dequantize the checkpoint first",
        (whole("language*.layers.0.*"), {"text_config.num_hidden_layers": (2, 1)}),
    ),
    "a matrix of another size, cut as those beside it": Case(
        ({**decoder(ONE), f"{L0}.mlp.up_proj.weight": (12, 24)}, ONE),
        channels(FOUR),
        f"{L0}.mlp.up_proj.weight has 12 along dimension 0, config.json says 10 for intermediate_size",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "as many problems as are told": Case(
        (decoder(LLAMA, layers=10), {**LLAMA, "num_hidden_layers": 10}),
        [("*.mlp.gate_proj.weight", 1, [0])],
        tuple(
            f"model.layers.{layer}.mlp.gate_proj.weight loses 1 of 24 along dimension 1, which no key of "
            "config.json carries"
            for layer in range(10)
        ),
        (channels(FOUR), NARROW),
    ),
    "a width that is true": Case((decoder(LLAMA), {**LLAMA, "intermediate_size": True}), channels(FOUR),
        "config.json: intermediate_size is true, wanted an integer", ([], {})),
    "a number of heads that is a text": Case((decoder(LLAMA), {**LLAMA, "num_attention_heads": "6"}),
        heads([0, 1], [0]), 'config.json: num_attention_heads is "6", wanted an integer',
        (channels(FOUR), NARROW)),
    "a number of experts that is true": Case((mixture(QWEN3_MOE), {**QWEN3_MOE, "num_experts": True}),
        whole("*.experts.0.*"), "config.json: num_experts is true, wanted an integer",
        (heads([0, 1], [0]), FEWER_HEADS)),
    "a number of layers that is a text": Case((decoder(LLAMA), {**LLAMA, "num_hidden_layers": "3"}),
        whole(f"{L0}.*"), 'config.json: num_hidden_layers is "3", wanted an integer',
        (channels(FOUR), NARROW)),
    "a width in a list that is a text": Case(
        (decoder(LLAMA), {**LLAMA, "intermediate_size": [10, "10", 10]}),
        channels(FOUR, "*.1.mlp"),
        'config.json: intermediate_size[1] is "10", wanted an integer',
        (channels(FOUR, f"{L0}.mlp"), {"intermediate_size": ([10, "10", 10], [6, "10", 10])}),
    ),
    "a layer with channels that the config does not say, beside such as are cut": Case(
        ({**decoder(LLAMA), **gated(f"{L1}.mlp", 24, 20)}, LLAMA),
        channels(FOUR, "*.[02].mlp"),
        f"{L1}.mlp.gate_proj.weight has 20 channels along dimension 0, config.json says 10 for "
        "intermediate_size",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "key/value heads that the config counts otherwise": Case(
        (decoder(ONE), {**ONE, "num_key_value_heads": 2}),
        heads([0, 1], [0]),
        f"{L0}.self_attn.k_proj.weight has 3 key/value heads along dimension 0, config.json says 2 for "
        "num_key_value_heads",
        (channels(FOUR), NARROW),
    ),
    "channels under a key of several": Case(
        (mixture(MOE), {**MOE, "moe_intermediate_size": 8}),
        channels([0], "*.experts.*"),
        tuple(
            f"{L0}.mlp.experts.{expert}.gate_proj.weight has 7 channels along dimension 0, config.json says "
            "8 for moe_intermediate_size and 10 for intermediate_size"
            for expert in range(4)
        ),
        (whole("*.experts.0.*"), {"num_experts": (4, 3)}),
    ),
    "a nested config that is none": Case(
        (pictures(), {"model_type": "gemma3", "text_config": ["gemma3_text"]}),
        channels(FOUR, "language*.mlp"),
        f'config.json: nothing is known of the model_type "gemma3", {UNKNOWN}',
        ([], {}),
    ),
    "experts that the config counts otherwise": Case(
        (mixture({**QWEN3_MOE, "num_experts": 5}), QWEN3_MOE),
        whole("*.experts.0.*"),
        (
            f"{L0}.mlp.experts has 5 members, config.json says 4 for num_experts",
            f"{L1}.mlp.experts has 5 members, config.json says 4 for num_experts",
        ),
        (channels([0], "*.experts.*"), {"moe_intermediate_size": (7, 6)}),
    ),
    "a router beside more experts than the config counts": Case(
        ({**mixture(QWEN3_MOE), f"{L1}.mlp.experts.4.gate_proj.weight": (7, 24)}, QWEN3_MOE),
        whole(f"{L0}.mlp.experts.0.*"),
        f"{L1}.mlp.experts has 5 members, config.json says 4 for num_experts",
        (heads([0, 1], [0]), FEWER_HEADS),
    ),
    "layers of another list": Case(
        ({**decoder(LLAMA), **decoder(LLAMA, "draft.")}, LLAMA),
        whole("model.layers.0.*", "draft.layers.1.*"),
        "model.layers loses layers and draft.layers loses others, and num_hidden_layers counts both",
        (whole("*.layers.1.*"), {"num_hidden_layers": (3, 2)}),
    ),
    "all layers": Case((decoder(LLAMA), LLAMA), whole("*.layers.*"),
        "config.json: num_hidden_layers would be 0: nothing is left",
        (whole(f"{L0}.*", f"{L2}.*"), {"num_hidden_layers": (3, 1)})),
    "layers of which the number has a say": Case(
        (gpt2(), {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
        whole("h.1.*"),
        "layers of h cannot go: the scale of attention depends on a layer's number",
        (
            [("*.c_fc.weight", 1, FOUR), ("*.c_fc.bias", 0, FOUR), ("*.mlp.c_proj.weight", 0, FOUR)],
            {"n_inner": (None, 28)},
        ),
    ),
    "heads of which the class derives the size": Case(
        (encoder(), BERT),
        [("*.self.*", 0, [0, 1]), ("*.attention.output.dense.weight", 1, [0, 1])],
        "heads of bert.encoder.layer cannot go: the class derives the size of a head from the hidden size, "
        "so that fewer heads are larger",
        ([("*.intermediate.dense.*", 0, FOUR), ("*.layer.?.output.dense.weight", 1, FOUR)], NARROW),
    ),
    "heads in one matrix, of which the class derives the size": Case(
        (gpt2(), GPT2),
        [
            ("*.c_attn.weight", 1, [0, 1, 8, 9, 16, 17]),
            ("*.c_attn.bias", 0, [0, 1, 8, 9, 16, 17]),
            ("*.attn.c_proj.weight", 0, [0, 1]),
        ],
        "heads of h cannot go: the class derives the size of a head from the hidden size, so that fewer "
        "heads are larger",
        (whole("h.0.*"), {"n_layer": (2, 1)}),
    ),
    "scales beside what is cut": Case(
        (
            {
                **decoder(LLAMA),
                f"{L0}.mlp.up_proj.weight_scale": (10, 1),
                f"{L0}.self_attn.q_proj.weight_scale": (12, 1),
                f"{L0}.mlp.gate_proj.lora_A.default.weight": (2, 24),
                f"{L0}.mlp.act.scale": (1,),
            },
            LLAMA,
        ),
        channels(FOUR),
        (
            (
                f"{L0}.mlp.up_proj.weight_scale lies beside {L0}.mlp.up_proj.weight, which is cut, and "
                "nothing tells how to cut it: merge it, or take it out"
            ),
            (
                f"{L0}.mlp.gate_proj.lora_A.default.weight lies beside {L0}.mlp.gate_proj.weight, which is "
                "cut, and nothing tells how to cut it: merge it, or take it out"
            ),
        ),
        (whole(f"{L0}.*"), {"num_hidden_layers": (3, 2)}),
    ),
    "query heads of a key/value head that goes": Case((decoder(ONE), ONE), heads([0, 2], [0]),
        unlike_groups(L0, 3, 2, [1, 1, 2]), (heads([0, 1], [0]), FEWER_HEADS)),
    "unlike numbers of query heads": Case((decoder(ONE), ONE), heads([0, 2, 3], [1]),
        unlike_groups(L0, 3, 2, [1, 0, 2]), (heads([2, 3], [1]), FEWER_HEADS)),
    "a query head of two key/value heads": Case((decoder(ONE), ONE), heads([0, 2], []),
        unlike_groups(L0, 3, 3, [1, 1, 2]), (heads([0, 2, 5], []), {"num_attention_heads": (6, 3)})),
    "a number of heads that the config's class refuses": Case(
        (decoder({**LLAMA, "hidden_size": 18}), {**LLAMA, "hidden_size": 18}),
        heads([0, 1], [0]),
        "num_attention_heads would be 4, and the config's class wants a divisor of hidden_size, 18, "
        "such as 3 or 6; or --as mistral, whose class takes any",
        (heads(range(4), [0, 1]), {"num_attention_heads": (6, 2), "num_key_value_heads": (3, 1)}),
    ),
    "fewer experts than are chosen": Case((mixture(QWEN3_MOE), QWEN3_MOE), whole("*.experts.[013].*"),
        "num_experts would be 1, fewer than the 2 of num_experts_per_tok",
        (whole("*.experts.[03].*"), {"num_experts": (4, 2)})),
    "fewer experts in a tensor than are chosen": Case(
        (gpt_oss(), GPT_OSS),
        [("*.mlp.experts.*", 0, [0, 1, 3])],
        "num_local_experts would be 1, fewer than the 2 of num_experts_per_tok",
        ([("*.mlp.experts.*", 0, [0, 1])], {"num_local_experts": (4, 2)}),
    ),
    "groups of unlike sizes": Case(
        (deepseek(GROUPED), GROUPED),
        experts_to(4, 3),
        f"{L1}.mlp.experts: its groups of experts would have [4, 3] members, and n_group counts groups of "
        "one size: prune the same number in each",
        (experts_to(3, 3), {"n_routed_experts": (8, 6)}),
    ),
    "unlike numbers of groups": Case((deepseek(), DEEPSEEK), [*experts_to(4, 0, L1), *experts_to(2, 2, L2)],
        "n_group would be 1 and 2, and config.json has one for all",
        ([*experts_to(4, 0, L1), *experts_to(0, 4, L2)], {"n_routed_experts": (8, 4), "n_group": (2, 1)})),
    "fewer groups than serve": Case((deepseek(GROUPED), {**GROUPED, "topk_group": 2}), experts_to(0, 4),
        "n_group would be 1, fewer than the 2 of topk_group",
        (experts_to(3, 3), {"n_routed_experts": (8, 6)})),
    "groups that have no two members": Case(
        (deepseek(GROUPED), {**GROUPED, "num_experts_per_tok": 1}),
        experts_to(1, 1),
        f"{L1}.mlp.experts: its groups of experts would have 1 of 4 members each, and the router takes the "
        "best 2 of each",
        (experts_to(2, 2), {"n_routed_experts": (8, 4)}),
    ),
    "groups that have fewer members than are chosen": Case((deepseek(GROUPED), GROUPED), experts_to(2, 2),
        "1 groups would have fewer experts than the 3 of num_experts_per_tok",
        (experts_to(3, 3), {"n_routed_experts": (8, 6)})),
    "quantized": Case(
        (decoder(LLAMA), {**LLAMA, "quantization_config": {"quant_method": "fp8"}}),
        channels(FOUR),
        f"{L0}.mlp.gate_proj.weight is quantized, and its scales are those of the whole: "
        "dequantize the checkpoint first",
        (whole(f"{L0}.*"), {"num_hidden_layers": (3, 2)}),
    ),
    "quantized, as a nested config says": Case(
        (pictures(), {**PICTURES, "text_config": {**PICTURES["text_config"], "quantization_config": {}}}),
        channels(FOUR, "language*.mlp"),
        "language_model.model.layers.0.mlp.gate_proj.weight is quantized, and its scales are "
        "those of the whole: dequantize the checkpoint first",
        (whole("language*.layers.0.*"), {"text_config.num_hidden_layers": (2, 1)}),
    ),
    "a list without an entry for each layer": Case((decoder(LLAMA), {**LLAMA, "layer_types": ["a", "b"]}),
        whole(f"{L0}.*"), "config.json: layer_types has no entry for each of 3 layers",
        (channels(FOUR), NARROW)),
    "a list that is none": Case((decoder(LLAMA), {**LLAMA, "layer_types": "abc"}), whole(f"{L0}.*"),
        'config.json: layer_types is "abc", wanted a list with an entry for each of 3 layers',
        (channels(FOUR), NARROW)),
    "no config": Case(
        (decoder(LLAMA), None),
        channels(FOUR),
        "there is no config.json, which has to say what becomes smaller; give the directory of a "
        "checkpoint that has one, or use apply, which keeps all shapes",
        ([], {}),
    ),
    "a type of model that is not known": Case(
        (decoder(LLAMA), {**LLAMA, "model_type": "strange"}),
        channels(FOUR),
        f'config.json: nothing is known of the model_type "strange", {UNKNOWN}',
        ([], {}),
    ),
    "no type of model": Case(
        (decoder(LLAMA), {}),
        channels(FOUR),
        f"config.json: nothing is known of the model_type null, {UNKNOWN}",
        ([], {}),
    ),
    "a nested config of a type that is not known": Case(
        (pictures(), {**PICTURES, "text_config": {"model_type": ["a"]}}),
        channels(FOUR, "language*.mlp"),
        f'config.json: nothing is known of the text_config.model_type ["a"], {UNKNOWN}',
        ([], {}),
    ),
    "a width that is no number": Case((decoder(LLAMA), {**LLAMA, "intermediate_size": "10"}), channels(FOUR),
        'config.json: intermediate_size is "10", wanted an integer', ([], {})),
    "a width that is no integer": Case((decoder(LLAMA), {**LLAMA, "intermediate_size": 10.0}), channels(FOUR),
        "config.json: intermediate_size is 10.0, wanted an integer", ([], {})),
    "a size of heads without heads": Case(
        (decoder(ONE), {**ONE, "head_dim": None, "num_attention_heads": 0}),
        heads([0, 1], [0]),
        f"{L0}.self_attn has no whole heads: q_proj.weight [12, 24], k_proj.weight [6, 24], v_proj.weight "
        "[6, 24], o_proj.weight [24, 12], and config.json says 0 for num_attention_heads and 3 for "
        "num_key_value_heads",
        (channels(FOUR), NARROW),
    ),
    "layers of a tower of a type that is not known": Case((pictures(), STRANGE), whole("vision*.layers.0.*"),
        f'config.json: nothing is known of the vision_config.model_type "strange", {UNKNOWN}',
        (whole("language*.layers.0.*"), {"text_config.num_hidden_layers": (2, 1)})),
    "channels of a tower of a type that is not known": Case(
        (pictures(), STRANGE),
        [
            ("vision*.1.mlp.fc1.weight", 0, [1]),
            ("vision*.1.mlp.fc2.weight", 1, [1]),
            ("vision*.1.mlp.gate_proj.weight", 0, [0]),
        ],
        f'config.json: nothing is known of the vision_config.model_type "strange", {UNKNOWN}',
        (channels(FOUR, "language*.mlp"), {"text_config.intermediate_size": (10, 6)}),
    ),
    "tensors without their layer": Case(
        (decoder(LLAMA), LLAMA),
        whole("model.norm.weight", "model.layers.1.mlp.up_proj.weight"),
        (
            nothing_left(f"{L1}.mlp.up_proj.weight", [10, 24], f"{L1}.self_attn.q_proj.weight"),
            (
                "model.norm.weight: nothing of its [24] is kept, and it belongs to no layer or expert "
                "that is dropped as a whole: couple all tensors of one"
            ),
        ),
        (whole(f"{L0}.*"), {"num_hidden_layers": (3, 2)}),
    ),
    "more problems than are told": Case(
        (decoder(LLAMA, layers=12), {**LLAMA, "num_hidden_layers": 12}),
        [("*.mlp.gate_proj.weight", 1, [0])],
        (
            *(
                f"model.layers.{layer}.mlp.gate_proj.weight loses 1 of 24 along dimension 1, which no key of "
                "config.json carries"
                for layer in range(10)
            ),
            "and 2 more",
        ),
        (channels(FOUR), NARROW),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_no_class_can_express_is_refused_line_by_line(case: str) -> None:
    (shapes, config), refused, lines, _ = CASES[case]
    kept, before = cut(shapes, refused), deepcopy((shapes, config))
    with pytest.raises(CheckpointError) as error:
        make_removal(shapes, kept, config)
    assert error.value.args == ((lines,) if isinstance(lines, str) else lines)
    assert (shapes, config) == before
    check_untouched(kept, cut(shapes, refused))


def test_heads_of_layers_that_share_biases_are_decided_together() -> None:
    """Where it is not yet known which heads stay, but that each layer has its own."""
    shapes = biased()
    kept = cut(shapes, biased_heads([0, 3]))
    assert make_removal(shapes, kept, T5, decisions=dict.fromkeys(shapes, 0)).changes
    with pytest.raises(CheckpointError, match="SelfAttention may keep other heads in one layer"):
        make_removal(shapes, kept, T5, decisions={name: int(".block.1." in name) for name in shapes})


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].legal[0]])
def test_its_neighbour_is_legal_and_changes_its_keys_alone(case: str) -> None:
    (shapes, config), _, _, (legal, changes) = CASES[case]
    kept, before = cut(shapes, legal), deepcopy((shapes, config))
    removal = make_removal(shapes, kept, config)
    assert {change.key: (change.before, change.after) for change in removal.changes} == changes
    assert (shapes, config) == before
    check_untouched(kept, cut(shapes, legal))


CONTRADICTING: dict[str, tuple[Shapes, Config, list[Cut], str]] = {
    # A model, its config, cuts -> what the one line speaks of.
    "groups that do not divide the experts": (deepseek(GROUPED), {**GROUPED, "n_group": 3},
        whole("*.experts.[26].*"), "n_group"),
    "no group": (deepseek(GROUPED), {**GROUPED, "n_group": 0}, whole("*.experts.[26].*"), "n_group"),
    "less than no group": (deepseek(GROUPED), {**GROUPED, "n_group": -2}, whole("*.experts.[26].*"),
        "n_group"),
    "no number of groups": (deepseek(GROUPED), {**GROUPED, "n_group": None}, whole("*.experts.[26].*"),
        "config.json: config.n_group comes to null, wanted an integer"),
    "no expert that is chosen, and none left": (
        deepseek(GROUPED),
        {**GROUPED, "num_experts_per_tok": 0, "topk_group": 0},
        whole("*.experts.*"),
        "config.json: n_routed_experts would be 0: nothing is left",
    ),
    "heads without a size": (
        {f"{L0}.self_attn.q_proj.weight": (0, 2), f"{L0}.self_attn.k_proj.weight": (3, 2)},
        {**ONE, "hidden_size": 2, "head_dim": None},
        [(f"{L0}.self_attn.k_proj.weight", 0, [1])],
        "",
    ),
    "widths below zero that add up": (
        {**phi3(), f"{L0}.self_attn.qkv_proj.weight": (4, 24)},
        {**PHI3, "num_attention_heads": 6, "num_key_value_heads": -2},
        [(f"{L0}.self_attn.qkv_proj.weight", 0, [1, 2])],
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTRADICTING)
def test_a_config_that_contradicts_itself_is_refused(case: str) -> None:
    shapes, config, cuts, said = CONTRADICTING[case]
    with pytest.raises(CheckpointError) as error:
        make_removal(shapes, cut(shapes, cuts), config)
    assert said in error.value.args[0]


def test_keys_that_the_config_leaves_out_are_not_asked_for_where_they_do_not_change() -> None:
    """Published configs of models with pictures leave to the class what is as its default."""
    text = without(PICTURES["text_config"], "num_attention_heads", "num_key_value_heads", "head_dim")
    config = {"model_type": "gemma3", "text_config": text}
    shapes = pictures()
    for cuts, key in (
        (channels([1], "language*.mlp"), "intermediate_size"),
        (whole("language*.1.*"), "num_hidden_layers"),
    ):
        removal = make_removal(shapes, cut(shapes, cuts), config)
        assert [change.key for change in removal.changes] == [f"text_config.{key}"]


def test_a_number_of_heads_that_the_config_leaves_out_is_written() -> None:
    """The size of a head tells how many the matrices have."""
    removal = make_removal(decoder(ONE), cut(decoder(ONE), heads([0, 1], [0])), without(ONE, HEADS))
    assert {change.key: (change.before, change.after) for change in removal.changes} == {
        HEADS: (None, 4),
        "num_key_value_heads": (3, 2),
    }


def test_null_in_place_of_a_quantization_is_none() -> None:
    shapes = decoder(LLAMA)
    removal = make_removal(shapes, cut(shapes, channels([1])), {**LLAMA, "quantization_config": None})
    assert [change.key for change in removal.changes] == ["intermediate_size"]


RESAMPLER: Shapes = {f"resampler.layers.{layer}.weight": (3, 3) for layer in range(3)}
LISTS: dict[str, list[Cut]] = {
    "another kind of list": whole("resampler.layers.1.*"),
    "another kind of list beside it": whole("resampler.layers.1.*", "model.layers.1.*"),
    "another list of as many layers": whole("draft.layers.1.*"),
    "one list of two": whole("model.layers.1.*"),
    "other layers of another list": whole("draft.layers.1.*", "model.layers.2.*"),
}


@pytest.mark.parametrize("case", LISTS)
def test_layers_of_several_lists_are_refused_of_which_the_config_counts_one(case: str) -> None:
    shapes = {**decoder(LLAMA), **decoder(LLAMA, "draft."), **RESAMPLER}
    with pytest.raises(CheckpointError) as error:
        make_removal(shapes, cut(shapes, LISTS[case]), LLAMA)
    assert len(error.value.args) == 1


def test_lists_that_one_key_counts_may_lose_the_same_layers() -> None:
    shapes = {**decoder(LLAMA), **decoder(LLAMA, "draft.")}
    removal = make_removal(shapes, cut(shapes, whole("*.layers.1.*")), LLAMA)
    assert {change.key: change.after for change in removal.changes} == {"num_hidden_layers": 2}
    assert removal.left["draft.layers.2.mlp.up_proj.weight"].name == "draft.layers.1.mlp.up_proj.weight"


def test_a_list_of_layers_may_lose_some_beside_others_that_the_config_cannot_count() -> None:
    shapes = {**decoder(LLAMA), **decoder(LLAMA, "draft.", layers=2), **RESAMPLER}
    removal = make_removal(shapes, cut(shapes, whole("model.layers.1.*")), LLAMA)
    assert [change.key for change in removal.changes] == ["num_hidden_layers"]
    for name in ("resampler.layers.1.weight", "draft.layers.1.mlp.up_proj.weight"):
        assert removal.left[name].name == name


def check_untouched(kept: Mapping[str, KeptIndices], before: Mapping[str, KeptIndices]) -> None:
    assert list(kept) == list(before)
    for name, each in kept.items():
        assert all(map(np.array_equal, each.along, before[name].along))
