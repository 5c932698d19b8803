"""What tensors are recognized as codes, by what lies beside them and by config.json."""

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from msgspec.structs import replace

from sparseprune.checkpoint import Shard, StoredTensor, open_checkpoint
from sparseprune.checkpoint.codes import Codes, names_beside, quantization_of, with_codes
from sparseprune.checkpoint.header import TensorEntry
from tests.quantized import LAYOUTS, PACKED, UNKNOWN, write

SHARD = Shard(Path("m.safetensors"), PurePosixPath("m.safetensors"))
Form = tuple[str, tuple[int, ...]]


def stored(tensors: dict[str, Form]) -> dict[str, StoredTensor]:
    return {name: StoredTensor(TensorEntry(name, *form, 0, 0), SHARD) for name, form in tensors.items()}


def codes_of(tensors: dict[str, Form], config: dict[str, Any] | None = None) -> dict[str, Codes]:
    found = with_codes(stored(tensors), lambda: config)
    return {name: one.codes for name, one in found.items() if one.codes is not None}


def block_of(
    weight: tuple[int, ...], scale: tuple[int, ...], config: dict[str, Any] | None = None
) -> tuple[int, ...] | None:
    """How many codes share a scale."""
    (codes,) = codes_of({"w": ("F8_E4M3", weight), "w_scale_inv": ("F32", scale)}, config).values()
    return None if codes.scale is None else codes.scale.block


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}}
GROUPS = {"quantization_config": {"config_groups": {"group_0": {"weights": {"group_size": 48}}}}}
BLOCKS = {"quantization_config": {"config_groups": {"group_0": {"weights": {"block_structure": [64, 64]}}}}}


@pytest.mark.parametrize(
    ("weight", "scale", "config", "block"),
    [
        ((256, 384), (), None, (256, 384)),
        ((256, 384), (1,), None, (256, 384)),
        ((256, 384), (1, 1), None, (256, 384)),
        ((256, 384), (256,), None, (1, 384)),
        ((256, 384), (256, 1), None, (1, 384)),
        ((256, 384), (1, 384), None, (256, 1)),
        ((256, 384), (384,), None, (256, 1)),
        ((256, 256), (256,), None, (1, 256)),
        ((256, 384), (256, 3), None, (1, 128)),
        ((256, 384), (256, 3, 1), None, (1, 128)),
        ((256, 100), (256, 4), None, (1, 25)),
        ((256, 100), (256, 7), None, (1, 16)),
        ((256, 384), (256, 8), GROUPS, (1, 48)),
        ((256, 384), (2, 3), None, (128, 128)),
        ((192, 192), (2, 2), None, (128, 128)),
        ((192, 64), (2, 1), None, (128, 64)),
        ((64, 192), (1, 2), None, (64, 128)),
        ((130, 1), (2, 1), None, (128, 1)),
        ((192, 96), (3, 3), FP8, (64, 32)),
        ((192, 96), (3, 2), BLOCKS, (64, 64)),
        ((256, 384), (2, 3), FP8, (128, 128)),
        ((8, 256, 384), (8, 2, 3), None, (1, 128, 128)),
        ((8, 256, 384), (8,), None, (1, 256, 384)),
        ((8, 256, 384), (8, 1, 1), None, (1, 256, 384)),
        ((8, 256, 384), (8, 256), None, (1, 1, 384)),
        ((8, 256, 384), (8, 1, 384), None, (1, 256, 1)),
        ((16, 8, 3, 3), (16, 1, 1, 1), None, (1, 8, 3, 3)),
        ((256,), (1,), None, (256,)),
        ((256,), (256,), None, (1,)),
        # What does not fit.
        ((256, 384), (3,), None, None),
        ((256, 384), (512, 1), None, None),
        ((256, 384), (2, 3, 4), None, None),
        ((256, 101), (256, 60), None, None),
        ((0, 8), (2, 2), None, None),
    ],
)
def test_scales_lie_over_codes_by_their_shapes(
    weight: tuple[int, ...],
    scale: tuple[int, ...],
    config: dict[str, Any] | None,
    block: tuple[int, ...] | None,
) -> None:
    assert block_of(weight, scale, config) == block


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_codes_is_understood(tmp_path: Path, layout: str) -> None:
    found = LAYOUTS[layout]()
    tensors = open_checkpoint(write(tmp_path, found)).tensors
    (name,) = found.weights
    assert {at: one.holds for at, one in tensors.items() if one.holds != "weights"} == {name: "codes"}
    assert names_beside(tensors) == found.stored.keys() - {name}
    assert not tensors[name].codes.refusal(name)  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", [*PACKED, *UNKNOWN])
def test_what_is_not_understood_says_what_it_is_and_what_lies_beside(tmp_path: Path, layout: str) -> None:
    make, line = {**PACKED, **UNKNOWN}[layout]
    found = make()
    tensors = open_checkpoint(write(tmp_path, found)).tensors
    name = line.partition(" holds")[0]
    codes = tensors[name].codes
    assert codes is not None
    assert codes.refusal(name).startswith(line)
    assert codes.refusal(name).endswith(": dequantize the checkpoint first")
    assert (tensors[name].holds == "packed") == (layout in PACKED)
    assert set(codes.beside) == found.stored.keys() - {name}


NONE: dict[str, dict[str, Form]] = {
    "floats": {"w": ("BF16", (8, 4)), "w_scale": ("F32", (8,))},
    "a norm's scale": {"n.weight": ("F32", (8,)), "n.scale": ("F32", (8,))},
    "a scale of something else": {"logit_scale": ("F32", ()), "a.weight": ("BF16", (8, 4))},
    "a shape": {"a.position_ids": ("I64", (1, 8)), "a.position_ids_shape": ("I64", (2,))},
    "a shape beside bytes": {"image": ("U8", (8, 8)), "image_shape": ("I64", (2,))},
    "counters": {"bn.num_batches_tracked": ("I64", ()), "bn.num_batches_tracked_scale": ("F32", ())},
    "a mask": {"attn.bias": ("BOOL", (8, 8)), "attn.bias_scale": ("F32", ())},
    "fp8 alone": {"a.weight": ("F8_E4M3", (8, 8))},
    "int8 alone": {"a.weight": ("I8", (8, 8))},
}


@pytest.mark.parametrize("what", NONE)
def test_what_is_no_code_stays_a_weight(what: str) -> None:
    assert codes_of(NONE[what]) == {}


def test_nothing_is_made_anew_and_no_config_is_read_where_all_are_floats() -> None:
    def unread() -> None:
        raise AssertionError

    tensors = stored({"a.weight": ("BF16", (8, 4)), "a.weight_scale": ("F32", (8,))})
    assert with_codes(tensors, unread) is tensors


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I8"])
def test_where_the_config_says_that_weights_are_quantized_a_scale_is_missed(dtype: str) -> None:
    tensors = {"a.weight": (dtype, (8, 4)), "a.bias": (dtype, (8,)), "b": (dtype, (8, 4))}
    found = codes_of(tensors, {"quantization_config": {"quant_method": "fp8"}})
    assert {name: codes.no_values for name, codes in found.items()} == {
        "a.weight": "and no scale lies beside it"
    }
    assert codes_of(tensors, {"quantization_config": {"sparsity_config": {"format": "dense"}}}) == {}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"sparsity_config": {"format": "dense"}}}, None),
        (
            {
                "quantization_config": {
                    "quant_method": "compressed-tensors",
                    "sparsity_config": {"format": "x"},
                }
            },
            None,
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8, says quantization_config of config.json"),
        (
            {"text_config": {"quantization_config": {"quant_algo": "NVFP4"}}},
            "NVFP4, says text_config.quantization_config of config.json",
        ),
        (
            {"quantization_config": {"bits": 4}},
            "of an unknown method, says quantization_config of config.json",
        ),
    ],
)
def test_a_config_states_a_quantization_unless_it_is_of_sparsity_alone(
    config: dict[str, Any], found: str | None
) -> None:
    assert quantization_of(config) == found


@pytest.mark.parametrize(
    "config",
    [
        {"quantization_config": "fp8"},
        {"quantization_config": {"weight_block_size": 7, "bits": "four", "group_size": -1}},
        {"quantization_config": {"weight_block_size": [0, "x"], "config_groups": [1]}},
        {"quantization_config": {"config_groups": {"a": {"weights": None}}}},
        {"quantization_config": {"config_groups": {"a": {"weights": 7}}}},
    ],
)
def test_a_config_of_anything_is_no_error(config: dict[str, Any]) -> None:
    assert block_of((256, 384), (2, 3), config) == (128, 128)


def test_a_config_that_cannot_be_read_says_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, LAYOUTS["fp8, scales of rows"]())
    (path / "config.json").write_text("{")
    assert open_checkpoint(path).tensors["a.weight"].holds == "codes"


def test_int8_codes_beside_exponents_of_32_are_no_pairs() -> None:
    found = codes_of({"a.weight": ("I8", (8, 64)), "a.weight_scale": ("F8_E8M0", (8, 2))})
    assert not found["a.weight"].packed
    assert found["a.weight"].scale is not None
    assert found["a.weight"].scale.block == (1, 32)


def test_two_scales_are_one_too_many() -> None:
    forms: dict[str, Form] = {
        "a.weight": ("F8_E4M3", (8, 4)),
        "a.weight_scale": ("F32", (8, 1)),
        "a.weight_scale_inv": ("F32", (8, 1)),
    }
    assert codes_of(forms)["a.weight"].no_values == "with two scales"


@pytest.mark.parametrize(
    "beside",
    [
        {"_scale_inv": ("F32", (2, 3))},
        {"_scale_inv": ("F32", ())},
        {"_scale": ("F32", (256, 1)), "_zero_point": ("I8", (256, 1))},
        {"_scale": ("F32", (2, 3)), "_g_idx": ("I32", (384,))},
        {"_scale": ("F32", (5, 3))},
        {".SCB": ("F32", (256,))},
    ],
)
def test_codes_that_are_alike_mean_what_each_means_alone(beside: dict[str, Form]) -> None:
    def module(name: str) -> dict[str, Form]:
        stem = name if ".SCB" in beside else f"{name}.weight"
        return {f"{name}.weight": ("I8", (256, 384)), **{stem + end: form for end, form in beside.items()}}

    together = codes_of(module("a") | module("b") | {"c.weight": ("I8", (8, 4)), "c.SCB": ("F32", (8,))})
    alone = codes_of(module("a")) | codes_of(module("b"))
    assert {name: replace(together[name], form=0) for name in alone} == {
        name: replace(codes, form=0) for name, codes in alone.items()
    }
    forms = [codes.form for codes in together.values()]
    assert (forms[0] == forms[1] > 0) == (not together["a.weight"].no_values)
    assert forms[2] not in forms[:2]
