"""Weights that are scaled where a norm spans fewer channels, against plain loops; and what cannot be."""

from fractions import Fraction
from math import isclose, sqrt

import numpy as np
import pytest

from sparseprune.engine.kernels.formats import bits_of, values_of
from sparseprune.errors import CheckpointError
from sparseprune.removal.scales import Scale
from sparseprune.removal.shrink import Removal, make_removal
from tests.removal.models import (
    DEEPSEEK,
    LLAMA,
    Config,
    Cut,
    Shapes,
    cut,
    decoder,
    deepseek,
    without,
)

L0, L3 = "model.layers.0", "model.layers.3"
SQUARE = "what reads heads is as wide as the hidden size, whatever the config says of heads"
GONE = [1, 4, 5, 9, 20, 23]  # 18 of 24 are left
FACTOR = sqrt(24 / 18)
MISTRAL: Config = {**LLAMA, "model_type": "mistral", "rms_norm_eps": 1e-5}
GEMMA: Config = {**MISTRAL, "model_type": "gemma"}


WRITES = ("o_proj.weight", "down_proj.weight")  # hidden states; other matrices read them


def hidden(shapes: Shapes, gone: list[int] = GONE) -> list[Cut]:
    """Hidden channels that go, from what has 24 of them."""
    return [
        (name, 0 if name.endswith(WRITES) else len(shape) - 1, gone)
        for name, shape in shapes.items()
        if 24 in shape and "eh_proj" not in name
    ]


def removal_of(shapes: Shapes, config: Config, gone: list[int] = GONE) -> Removal:
    return make_removal(shapes, cut(shapes, hidden(shapes, gone)), config)


def changed(removal: Removal) -> dict[str, tuple[object, object]]:
    return {change.key: (change.before, change.after) for change in removal.changes}


def normed(states: list[float], weights: list[float], eps: float) -> list[float]:
    """Root mean square normalization by plain loops (Zhang and Sennrich, 2019)."""
    square = 0.0
    for state in states:
        square += state * state
    root = sqrt(square / len(states) + eps)
    return [weight * state / root for state, weight in zip(states, weights, strict=True)]


def test_a_norm_over_the_channels_that_stay_computes_what_it_did_over_zeros() -> None:
    generator = np.random.default_rng(3)
    states, weights = (generator.standard_normal(24).tolist() for _ in range(2))
    stays = [channel for channel in range(24) if channel not in GONE]
    masked = normed([0.0 if channel in GONE else states[channel] for channel in range(24)], weights, 0.1)
    removal = removal_of(decoder(MISTRAL), {**MISTRAL, "rms_norm_eps": 0.1})
    (eps,) = [after for key, (_, after) in changed(removal).items() if key == "rms_norm_eps"]
    bits = np.array([weights[channel] for channel in stays]).view(np.uint64)
    scaled = values_of(removal.scales["model.norm.weight"].applied(bits, "F64"), "F64").tolist()
    smaller = normed([states[channel] for channel in stays], scaled, float(str(eps)))
    assert np.allclose(smaller, [masked[channel] for channel in stays], rtol=1e-12, atol=0)


def test_the_hidden_size_goes_with_the_norms_epsilon_and_the_size_of_heads() -> None:
    shapes = decoder(without(MISTRAL, "head_dim") | {"head_dim": 4})
    removal = removal_of(shapes, without(MISTRAL, "head_dim"))
    assert changed(removal) == {
        "hidden_size": (24, 18),
        "head_dim": (None, 4),
        "rms_norm_eps": (1e-5, float(f"{1e-5 * 24 / 18:.12g}")),
    }
    after = {name: left.shape for name, left in removal.left.items()}
    assert after[f"{L0}.self_attn.q_proj.weight"] == (24, 18)
    assert after[f"{L0}.self_attn.o_proj.weight"] == (18, 24)
    assert after[f"{L0}.mlp.up_proj.weight"] == (10, 18)
    assert after[f"{L0}.mlp.down_proj.weight"] == (18, 10)
    assert (after["model.embed_tokens.weight"], after["model.norm.weight"]) == ((50, 18), (18,))


def test_every_norm_of_hidden_channels_is_scaled_and_no_other_weight() -> None:
    removal = removal_of(decoder(MISTRAL), MISTRAL)
    assert set(removal.scales) == {name for name in decoder(MISTRAL) if "norm" in name}
    assert {scale.offset for scale in removal.scales.values()} == {0.0}
    assert all(isclose(scale.factor, FACTOR) for scale in removal.scales.values())
    (line,) = removal.remarks
    assert line.startswith(f"4 weights, such as {L0}.input_layernorm.weight, are multiplied by 1.1547")


@pytest.mark.parametrize("tied", [True, False, None])
def test_embeddings_that_a_class_scales_make_up_for_the_last_norm_only_if_the_head_shares_them(
    tied: bool | None,
) -> None:
    shapes = decoder(GEMMA) | ({"lm_head.weight": (50, 24)} if tied is False else {})
    removal = removal_of(shapes, GEMMA if tied is None else {**GEMMA, "tie_word_embeddings": tied})
    assert removal.scales["model.embed_tokens.weight"] == Scale(FACTOR)
    assert removal.scales[f"{L0}.input_layernorm.weight"] == Scale(FACTOR, 1.0)
    assert ("model.norm.weight" in removal.scales) == (tied is False)
    assert "lm_head.weight" not in removal.scales


def test_a_scale_is_for_the_weight_with_its_offset() -> None:
    bits = np.array([0.5, -1.0]).view(np.uint64)
    assert Scale(2.0, 1.0).applied(bits, "F64").view(np.float64).tolist() == [2.0, -1.0]


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_many_weights_are_scaled_as_each_by_itself(dtype: str) -> None:
    bits = bits_of(np.random.default_rng(2).standard_normal(40_000), dtype)
    found = Scale(FACTOR, 1.0).applied(bits, dtype)
    places = [0, 1, 16_383, 16_384, 16_385, 32_767, 32_768, 39_999]
    assert found.shape == bits.shape
    assert found[places].tolist() == [
        int(Scale(FACTOR, 1.0).applied(bits[place : place + 1], dtype)[0]) for place in places
    ]


def test_an_epsilon_that_other_norms_share_stays() -> None:
    config = {**MISTRAL, "model_type": "qwen3_next"}
    assert "rms_norm_eps" not in changed(removal_of(decoder(config), config))


def test_norms_over_all_heads_are_scaled_with_the_heads() -> None:
    config = {**MISTRAL, "model_type": "olmo2"}
    shapes = decoder(config)
    shapes |= {f"model.layers.{layer}.self_attn.q_norm.weight": (12,) for layer in range(3)}
    shapes |= {f"model.layers.{layer}.self_attn.k_norm.weight": (6,) for layer in range(3)}
    cuts: list[Cut] = [
        ("*.q_proj.weight", 0, [4, 5, 6, 7]), ("*.o_proj.weight", 1, [4, 5, 6, 7]),
        ("*.k_proj.weight", 0, [2, 3]), ("*.v_proj.weight", 0, [2, 3]),
    ]  # fmt: skip
    removal = make_removal(shapes, cut(shapes, cuts), config)
    assert removal.left[f"{L0}.self_attn.q_norm.weight"].shape == (8,)
    assert {name: scale.factor for name, scale in removal.scales.items() if name.startswith(L0)} == {
        f"{L0}.self_attn.q_norm.weight": sqrt(12 / 8),
        f"{L0}.self_attn.k_norm.weight": sqrt(6 / 4),
    }
    assert "rms_norm_eps" not in changed(removal)


def test_both_halves_of_what_a_speculative_head_reads_lose_the_same_channels() -> None:
    shapes = deepseek() | {
        f"{L3}.eh_proj.weight": (24, 48),
        f"{L3}.enorm.weight": (24,),
    }
    both = [*GONE, *(24 + at for at in GONE)]
    cuts = [*hidden(shapes), *((f"{L3}.eh_proj.weight", dim, gone) for dim, gone in enumerate((GONE, both)))]
    removal = make_removal(shapes, cut(shapes, cuts), DEEPSEEK)
    assert removal.left[f"{L3}.eh_proj.weight"].shape == (18, 36)
    assert f"{L3}.enorm.weight" in removal.scales


@pytest.mark.parametrize(
    ("shapes", "config", "line"),
    [
        (
            decoder({**MISTRAL, "model_type": "cohere"}),
            {**MISTRAL, "model_type": "cohere"},
            "hidden channels cannot go: its norms subtract the mean of all hidden channels",
        ),
        (
            decoder(MISTRAL) | {"model.norm.bias": (24,)},
            MISTRAL,
            "hidden channels cannot go: its norms subtract the mean of all hidden channels",
        ),
        (
            decoder(MISTRAL),
            {**MISTRAL, "model_type": "gpt_neox"},
            "hidden channels cannot go: the class derives the size of a head from the hidden size",
        ),
        (
            decoder(MISTRAL),
            {**MISTRAL, "model_type": "helium"},
            f"hidden channels cannot go: {SQUARE}; or --as ernie4_5, whose class takes any",
        ),
        (
            decoder(MISTRAL),
            without(MISTRAL, "hidden_size"),
            "hidden channels cannot go: its tensors have 24 hidden channels, no key of config.json",
        ),
    ],
    ids=["a mean", "a mean, as a bias tells", "sizes of heads", "a way out", "no key"],
)
def test_a_hidden_size_that_cannot_change_is_refused_in_a_line(
    shapes: Shapes, config: Config, line: str
) -> None:
    with pytest.raises(CheckpointError) as raised:
        removal_of(shapes, config)
    assert any(each.startswith(line) for each in raised.value.args), raised.value.args


def test_a_class_that_wants_a_multiple_of_the_heads_is_told_with_the_nearest_ones_and_the_way_out() -> None:
    wants = "the config's class wants a multiple of num_attention_heads, 6, such as 18 or 24"
    with pytest.raises(CheckpointError) as raised:
        removal_of(decoder(LLAMA), LLAMA, GONE[:5])
    line = f"hidden_size would be 19, and {wants}; or --as mistral, whose class takes any"
    assert raised.value.args == (line,)
    assert changed(removal_of(decoder(LLAMA), LLAMA))["hidden_size"] == (24, 18)


@pytest.mark.parametrize(("dtype", "width"), [("BF16", 7), ("F16", 10), ("F32", 23)])
def test_a_value_becomes_the_nearest_pattern_and_of_two_the_even_one(dtype: str, width: int) -> None:
    generator = np.random.default_rng(0)
    exact = generator.integers(1 << width, 2 << width, 300) / (1 << width)
    step = 2.0**-width
    values = np.concatenate(
        [
            *(sign * (exact + part * step) for sign in (1, -1) for part in (0, 0.25, 0.5, 0.75)),
            *(exact + step / 2 + way for way in (2.0**-45, -(2.0**-45))),  # halfway in float32, and not quite
        ]
    )
    for value, bits in zip(values.tolist(), bits_of(values, dtype).tolist(), strict=True):
        around = np.array([bits - 1, bits, bits + 1], dtype={"F32": np.uint32}.get(dtype, np.uint16))
        apart = [abs(Fraction(float(each)) - Fraction(value)) for each in values_of(around, dtype)]
        assert apart[1] == min(apart), value
        assert apart[1] < min(apart[0], apart[2]) or bits % 2 == 0, value


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_zeros_infinities_and_nan_keep_what_they_are(dtype: str) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300])
    found = values_of(bits_of(values, dtype), dtype).astype(np.float64)
    beyond = [np.inf, -np.inf] if dtype != "F64" else [1e300, -1e300]
    assert np.array_equal(found, [0.0, 0.0, np.inf, -np.inf, np.nan, *beyond], equal_nan=True)
    assert np.signbit(found[:2]).tolist() == [False, True]


def test_channels_that_only_one_matrix_loses_are_no_hidden_size() -> None:
    shapes = decoder(MISTRAL)
    with pytest.raises(CheckpointError, match=r"which no key of config\.json carries"):
        make_removal(shapes, cut(shapes, [(f"{L0}.mlp.up_proj.weight", 1, [3])]), MISTRAL)
