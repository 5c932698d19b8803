"""Masks as others store them: numbers of any dtype, names of their own, beside weights or alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune

from sparseprune.checkpoint import TensorReader, load_masks, open_checkpoint, open_masks, read_kept
from sparseprune.checkpoint.mask_names import counterparts, masked_name, renamed, unwrapped
from sparseprune.checkpoint.masks import MaskSet, renamed_masks, zeros_as_masks
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError
from tests.checkpoint.test_masks import SHAPES, check_equal, masks_of

NUMBERS = ["U8", "I8", "I16", "I32", "I64", "F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"]


def torch_dtype(name: str) -> torch.dtype:
    found = getattr(torch, DTYPES[name].torch_name or "")
    assert isinstance(found, torch.dtype)
    return found


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("of_folder", [False, True])
def test_numbers_that_are_0_and_1_are_masks(tmp_path: Path, dtype: str, of_folder: bool) -> None:
    masks = masks_of(SHAPES)
    stored = {name: one.to(torch_dtype(dtype)) for name, one in masks.items()}
    save_file(stored, tmp_path / "mine.safetensors")
    opened = tmp_path if of_folder else tmp_path / "mine.safetensors"
    check_equal(load_masks(opened), masks)
    assert {mask.form for mask in open_masks(opened).masks.values()} == {"numbers"}


def test_minus_zero_drops_as_well(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([-0.0, 1.0, 0.0])}, tmp_path / "m.safetensors")
    assert load_masks(tmp_path / "m.safetensors")["a"].tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("value", [2.0, -1.0, 0.5, float("nan"), float("inf")])
def test_another_number_is_refused_with_its_first_place(tmp_path: Path, dtype: str, value: float) -> None:
    if (dtype == "U8" and value < 0) or (DTYPES[dtype].nonfinite is None and value not in {2.0, -1.0}):
        value = 2.0
    if dtype == "F8_E4M3" and value == float("inf"):
        value = float("nan")
    tensor = torch.ones(7, 9, dtype=torch.float64)
    tensor[:, ::2] = 0
    tensor[3, 4] = tensor[5, 1] = value
    save_file({"w": tensor.to(torch_dtype(dtype))}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load_masks(tmp_path / "m.safetensors")
    assert str(caught.value).startswith(
        f"{tmp_path}/m.safetensors: 'w' has {value:g} at [3, 4], wanted a mask of 0 and 1 alone; give a mask"
    )


def test_a_number_beyond_the_first_look_is_refused_where_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparseprune.checkpoint.masks._PIECE", 8)
    tensor = torch.ones(5, 20)
    tensor[4, 18] = 3
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    mask = open_masks(tmp_path / "m.safetensors").masks["w"]
    with TensorReader() as reader:
        assert read_kept(reader, mask, 3, 90).tolist() == [1] * 90
        with pytest.raises(CheckpointError, match=r"'w' has 3 at \[4, 18\], wanted a mask"):
            read_kept(reader, mask, 3, 97)


def test_weights_of_which_the_first_are_ones_are_no_masks(tmp_path: Path) -> None:
    weights = {"norm": torch.ones(8), "w": torch.randn(64, 64), "z": torch.zeros(3)}
    save_file(weights, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"'w' has .* wanted a mask of 0 and 1 alone"):
        open_masks(tmp_path / "m.safetensors")


@pytest.mark.parametrize("dtype", PRUNABLE := [row.name for row in DTYPES.values() if row.prunable])
def test_the_zeros_of_weights_are_masks(tmp_path: Path, dtype: str) -> None:
    keep = masks_of({"w": (6, 7)})["w"]
    weights = torch.where(keep, 1.0, 0.0)
    weights[0, 0], keep[0, 0] = -0.0, False
    weights[1, 1], keep[1, 1] = 3.0, True
    save_file({"w": weights.to(torch_dtype(dtype)), "v": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint = open_checkpoint(tmp_path / "m.safetensors")
    opened = zeros_as_masks(checkpoint, ["w"])
    assert list(opened.masks) == ["w"]
    with TensorReader() as reader:
        kept = read_kept(reader, opened.masks["w"], 0, 42)
        assert np.array_equal(kept.reshape(6, 7), keep.numpy())
        assert read_kept(reader, opened.masks["w"], 5, 10).tolist() == keep.flatten()[5:15].int().tolist()


def pruned_module() -> Any:
    """Two layers that torch prunes, one of them with its bias, and one that it does not."""
    torch.manual_seed(3)
    layers: list[Any] = [nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)]
    for layer in layers[:2]:
        prune.l1_unstructured(layer, "weight", amount=0.5)  # type: ignore[no-untyped-call]
    prune.l1_unstructured(layers[0], "bias", amount=2)  # type: ignore[no-untyped-call]
    return nn.Sequential(*layers)


def test_masks_beside_weights_of_torch_prune_are_masks(tmp_path: Path) -> None:
    model = pruned_module()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    masks = {f"{layer}.weight": model[layer].weight_mask.bool() for layer in (0, 1)}
    masks["0.bias"] = model[0].bias_mask.bool()
    check_equal(load_masks(tmp_path / "m.safetensors"), masks)
    check_equal(load_masks(tmp_path), masks)


def test_masks_of_torch_prune_may_be_in_other_shards_than_their_weights(tmp_path: Path) -> None:
    tensors = pruned_module().state_dict()
    of_shard = {name: "b" if name in {"0.weight_mask", "2.weight"} else "a" for name in tensors}
    for shard in "ab":
        part = {name: tensor for name, tensor in tensors.items() if of_shard[name] == shard}
        save_file(part, tmp_path / f"{shard}.safetensors")
    index = {"weight_map": {name: f"{shard}.safetensors" for name, shard in of_shard.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(load_masks(tmp_path)) == ["0.bias", "0.weight", "1.weight"]
    assert sorted(load_masks(tmp_path / "model.safetensors.index.json")) == ["0.bias", "0.weight", "1.weight"]


@pytest.mark.parametrize("end", ["_mask", ".mask"])
def test_names_that_all_end_as_names_of_masks_are_those_of_weights(tmp_path: Path, end: str) -> None:
    masks = masks_of(SHAPES)
    save_file({f"{name}{end}": one.float() for name, one in masks.items()}, tmp_path / "m.safetensors")
    check_equal(load_masks(tmp_path / "m.safetensors"), masks)


def test_masks_of_apex_stand_beside_their_weights(tmp_path: Path) -> None:
    keep = torch.tensor([[True, False], [False, True]])
    tensors = {
        "fc.weight": torch.randn(2, 2),
        "fc.__weight_mma_mask": keep.to(torch.uint8),
        "x": torch.ones(3),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    check_equal(load_masks(tmp_path / "m.safetensors"), {"fc.weight": keep})


def test_a_name_that_ends_as_one_of_a_mask_is_a_name_where_others_do_not(tmp_path: Path) -> None:
    masks = {"attn_mask": torch.tensor([True]), "w": torch.tensor([False])}
    save_file(masks, tmp_path / "m.safetensors")
    check_equal(load_masks(tmp_path / "m.safetensors"), masks)


def test_two_masks_of_one_weight_are_refused(tmp_path: Path) -> None:
    masks = {"w_mask": torch.ones(2), "w.mask": torch.ones(2)}
    save_file(masks, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"masks 'w\.mask' and 'w_mask' are both for 'w'; keep one"):
        open_masks(tmp_path / "m.safetensors")


def test_a_file_without_tensors_holds_no_masks(tmp_path: Path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"m\.safetensors: holds no masks; give a mask file"):
        open_masks(tmp_path / "m.safetensors")


# Names: a mask, and the tensor that it is for.
WRAPPED = {
    "module.a.weight": "a.weight",
    "a.weight": "module.a.weight",
    "_orig_mod.layers.0.weight": "layers.0.weight",
    "layers.0.weight": "layers.0._orig_mod.weight",
    "module._orig_mod.a": "a",
    "base_model.model.model.layers.0.q_proj.base_layer.weight": "model.layers.0.q_proj.weight",
    "model.layers.0.q_proj.weight": "base_model.model.model.layers.0.q_proj.base_layer.weight",
    "module.b": "base_model.model.b",
    "layers.0.q_proj": "layers.0.q_proj.weight",
    "module.layers.0.q_proj": "layers.0.q_proj.weight",
}


@pytest.mark.parametrize(("mask", "tensor"), WRAPPED.items())
def test_names_that_only_wrappers_made_others_are_the_same(mask: str, tensor: str) -> None:
    assert counterparts([tensor, "other"], [mask, "none"]) == {tensor: mask}


@pytest.mark.parametrize(
    ("mask", "tensor"),
    [("a.module.w", "a.w"), ("modules.w", "w"), ("base_layers.w", "w"), ("model.w", "w"), ("w_orig", "w")],
)
def test_other_names_are_others(mask: str, tensor: str) -> None:
    assert counterparts([tensor], [mask]) == {}


def test_the_same_name_comes_first() -> None:
    tensors = ["q.weight", "q.base_layer.weight"]
    assert counterparts(tensors, ["q.weight"]) == {"q.weight": "q.weight"}
    assert counterparts(tensors, tensors) == {name: name for name in tensors}


def test_an_original_has_the_mask_of_its_weight_where_its_own_stands_beside_it() -> None:
    assert counterparts(["0.weight_orig", "0.weight_mask"], ["0.weight"]) == {"0.weight_orig": "0.weight"}
    assert counterparts(["0.weight_orig"], ["0.weight"]) == {}


@pytest.mark.parametrize(
    ("tensors", "masks", "line"),
    [
        (["w"], ["w", "module.w"], "masks 'w' and 'module.w' are both for tensor 'w'; leave one"),
        (["w"], ["_orig_mod.w", "module.w"], "masks '_orig_mod.w' and 'module.w' are both for tensor 'w'; "),
        (
            ["q.w", "q.base_layer.w"],
            ["module.q.w"],
            "mask 'module.q.w' is for both 'q.w' and 'q.base_layer.w'",
        ),
    ],
)
def test_two_names_that_fall_onto_one_are_refused(tensors: list[str], masks: list[str], line: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        counterparts(tensors, masks)
    assert str(caught.value).startswith(line)


def test_names_are_replaced_text_by_text() -> None:
    assert renamed(["h.0.w", "x"], {"h.": "layers.", "": "model.", "x": ""}) == {
        "h.0.w": "model.layers.0.w",
        "x": "model.",
    }
    assert renamed(["a.a"], {"a": "b"}) == {"a.a": "b.b"}
    assert renamed(["a"], {}) == {"a": "a"}


def test_renamed_masks_keep_what_they_are(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    save_file(masks, tmp_path / "m.safetensors")
    opened: MaskSet = renamed_masks(open_masks(tmp_path / "m.safetensors"), {"w": "x.w"})
    assert sorted(opened.masks) == ["a", "e", "s", "v", "x.w"]
    assert (opened.masks["x.w"].name, opened.masks["x.w"].stored.name) == ("x.w", "w")
    with pytest.raises(CheckpointError, match="masks 'a' and 'v' both become 'a' by --rename"):
        renamed_masks(open_masks(tmp_path / "m.safetensors"), {"v": "a"})


def test_what_a_name_speaks_of() -> None:
    names = {"a.weight_mask": "a.weight", "a.mask": "a", "__w_mma_mask": "w"}
    assert {name: masked_name(name) for name in names} == names
    assert [masked_name(name) for name in (".mask", "_mask", "a", "mask")] == [None] * 4
    assert unwrapped("module.module._orig_mod.x.base_layer.y") == "x.y"
