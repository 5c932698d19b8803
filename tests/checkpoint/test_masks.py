"""Mask files: written in either form, read back as the same tensors, refused if they are none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from sparseprune.checkpoint import (
    MaskFormat,
    StagedOutput,
    TensorReader,
    lay_out_apply,
    lay_out_masks,
    load_masks,
    open_checkpoint,
    open_masks,
    read_kept,
)
from sparseprune.errors import CheckpointError

SHAPES = {"a": (3, 5), "e": (0, 4), "s": (), "v": (16,), "w": (2, 3, 3)}


def masks_of(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}


def write_masks(at: Path, masks: dict[str, torch.Tensor], mask_format: MaskFormat, slab: int = 8) -> Path:
    """A weight file of these shapes and its masks, written slab by slab; the path of the mask file."""
    at.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(mask.shape) for name, mask in masks.items()}, at / "m.safetensors")
    checkpoint = open_checkpoint(at / "m.safetensors")
    with StagedOutput(lay_out_masks(checkpoint, None, masks, mask_format), force=True) as output:
        for name, mask in masks.items():
            keep = mask.numpy().tobytes()
            for first in reversed(range(0, len(keep), slab)):
                output.write_mask(name, first, memoryview(keep)[first : first + slab])
        output.commit()
    return at / "m.masks.safetensors"


def check_equal(loaded: dict[str, torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
    assert loaded.keys() == masks.keys()
    for name, mask in masks.items():
        assert loaded[name].dtype == torch.bool
        assert loaded[name].shape == mask.shape
        assert torch.equal(loaded[name], mask)


@pytest.mark.parametrize("mask_format", ["bool", "packed"])
def test_reads_back_what_was_written(tmp_path: Path, mask_format: MaskFormat) -> None:
    masks = masks_of(SHAPES)
    path = write_masks(tmp_path, masks, mask_format)
    check_equal(load_masks(path), masks)
    check_equal(load_masks(str(path)), masks)


def test_bool_masks_are_what_the_package_loads(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    check_equal(load_file(write_masks(tmp_path, masks, "bool")), masks)


def test_packed_masks_are_little_endian_bits_of_the_row_major_elements(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    packed = load_file(write_masks(tmp_path, masks, "packed"))
    assert packed["s"].tolist() == [int(masks["s"])]
    for name, mask in masks.items():
        wanted = [
            sum(int(bit) << place for place, bit in enumerate(mask.flatten()[first : first + 8]))
            for first in range(0, mask.numel(), 8)
        ]
        assert packed[name].dtype == torch.uint8
        assert packed[name].tolist() == wanted


@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    shapes=st.dictionaries(
        st.text("ab.é", max_size=3), st.lists(st.integers(0, 5), max_size=3).map(tuple), max_size=3
    ),
    slab=st.sampled_from([8, 24, 1000]),
    seed=st.integers(0, 9),
)
def test_both_forms_mean_the_same(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]], slab: int, seed: int
) -> None:
    masks = masks_of(shapes, seed)
    check_equal(load_masks(write_masks(tmp_path / "b", masks, "bool", slab)), masks)
    check_equal(load_masks(write_masks(tmp_path / "p", masks, "packed", slab)), masks)


@pytest.mark.parametrize("mask_format", ["bool", "packed"])
@pytest.mark.parametrize("shards", [1, 2])
def test_finds_masks_in_an_output_its_folder_and_its_index(
    tmp_path: Path, mask_format: MaskFormat, shards: int
) -> None:
    masks = masks_of({"a": (4, 4), "b": (9,)})
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    names = dict(
        zip(masks, ["x.safetensors", "y.safetensors"] if shards == 2 else ["x.safetensors"] * 2, strict=True)
    )
    for shard in set(names.values()):
        save_file(
            {name: torch.ones(masks[name].shape) for name in masks if names[name] == shard}, ckpt / shard
        )
    if shards == 2:
        (ckpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with StagedOutput(lay_out_apply(open_checkpoint(ckpt), None, masks, mask_format), force=False) as output:
        for name, mask in masks.items():
            output.write_mask(name, 0, mask.numpy().tobytes())
        output.commit()
    places = [tmp_path / "ckpt-pruned", tmp_path / "ckpt-pruned" / "sparseprune"]
    places.append(places[1] / ("masks.safetensors.index.json" if shards == 2 else "masks.safetensors"))
    for place in places:
        check_equal(load_masks(place), masks)


def test_finds_the_masks_of_a_pruned_file(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    write_masks(tmp_path, masks, "packed")
    check_equal(load_masks(tmp_path / "m.safetensors"), masks)


def test_takes_bool_tensors_that_others_saved(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    save_file(masks, tmp_path / "mine.safetensors")
    check_equal(load_masks(tmp_path / "mine.safetensors"), masks)


def test_a_byte_that_is_no_bool_counts_as_kept(tmp_path: Path) -> None:
    path = write_masks(tmp_path, {"a": torch.tensor([True, False])}, "bool")
    path.write_bytes(path.read_bytes()[:-2] + b"\x02\x00")
    assert np.array_equal(load_masks(path)["a"].numpy().view(np.uint8), [1, 0])


def test_loaded_masks_are_writable_and_independent(tmp_path: Path) -> None:
    path = write_masks(tmp_path, {"a": torch.tensor([True, False])}, "packed")
    load_masks(path)["a"].fill_(value=False)
    assert load_masks(path)["a"].tolist() == [True, False]


@pytest.mark.parametrize(
    ("tensor", "metadata", "fragment"),
    [
        (
            torch.full((2, 3), 0.5),
            {},
            r"'a' has 0\.5 at \[0, 0\], wanted a mask of 0 and 1 alone; give",
        ),
        (torch.ones(2, dtype=torch.complex64), {}, "'a' is C64, wanted a mask of bools or of numbers"),
        (torch.ones(2), {"sparseprune.mask_format": "bool"}, "mask 'a' has dtype F32, wanted BOOL"),
        (torch.ones(2), {"sparseprune.mask_format": "sparse"}, "unknown mask format 'sparse'"),
        (torch.ones(2).byte(), {"sparseprune.mask_format": "packed"}, "has the shape None"),
        (torch.ones(2).byte(), {"sparseprune.shapes": '{"a": [9]'}, "sparseprune.shapes is not JSON"),
        (torch.ones(2).byte(), {"sparseprune.shapes": "[9]"}, "has the shape None"),
        (torch.ones(2).byte(), {"sparseprune.shapes": '{"a": [-9]}'}, r"has the shape \[-9\]"),
        (torch.ones(2).byte(), {"sparseprune.shapes": '{"a": 9}'}, "has the shape 9"),
        (torch.ones(2).byte(), {"sparseprune.shapes": '{"a": [true]}'}, r"has the shape \[True\]"),
        (torch.ones(0).byte(), {"sparseprune.shapes": '{"a": [0, 9223372036854775808]}'}, "wanted a list of"),
        # A product of a million digits, which would take minutes and cannot be shown.
        (torch.ones(2).byte(), {"sparseprune.shapes": f'{{"a": {[1 << 62] * 100_000}}}'}, "wanted a list of"),
        (torch.ones(2).byte(), {"sparseprune.shapes": f'{{"a": {[1] * 100_000}}}'}, r"\.\.\.\]$"),
        (torch.ones(2).byte(), {"sparseprune.shapes": '{"a": [17]}'}, r"is U8 \[2\], wanted U8 \[3\]"),
        (torch.ones(2, 1).byte(), {"sparseprune.shapes": '{"a": [16]}'}, r"is U8 \[2, 1\], wanted U8 \[2\]"),
        (torch.ones(2).char(), {"sparseprune.shapes": '{"a": [16]}'}, r"is I8 \[2\], wanted U8 \[2\]"),
    ],
)
def test_refuses_what_is_no_mask_file(
    tmp_path: Path, tensor: torch.Tensor, metadata: dict[str, str], fragment: str
) -> None:
    if metadata:
        metadata = {"sparseprune.mask_format": "packed", **metadata}
    save_file({"a": tensor}, tmp_path / "m.safetensors", metadata)
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: .*{fragment}"):
        load_masks(tmp_path / "m.safetensors")


def test_refuses_places_without_masks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no masks; give a mask file"):
        load_masks(tmp_path)
    with pytest.raises(CheckpointError, match="absent: no such file"):
        load_masks(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"index\.json: no such file"):
        load_masks(tmp_path / "masks.safetensors.index.json")


def test_refuses_an_index_of_files_that_are_no_masks(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, 0.25])}, tmp_path / "x.safetensors")
    index = tmp_path / "masks.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: 'a' has 0\.25 at \[1\], wanted a mask"):
        load_masks(tmp_path)


@pytest.mark.parametrize("mask_format", ["bool", "packed"])
def test_opening_tells_names_shapes_and_forms_in_the_order_of_the_file(
    tmp_path: Path, mask_format: MaskFormat
) -> None:
    path = write_masks(tmp_path, masks_of(SHAPES), mask_format)
    opened = open_masks(path)
    assert {name: mask.shape for name, mask in opened.masks.items()} == SHAPES
    assert [mask.numel for mask in opened.masks.values()] == [torch.Size(s).numel() for s in SHAPES.values()]
    assert {mask.form for mask in opened.masks.values()} == {mask_format}
    assert [shard.path for shard in opened.shards] == [path]
    assert opened.shards[0].stamp.mtime_ns == path.stat().st_mtime_ns
    assert not opened.missing


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(numel=st.integers(0, 40), data=st.data())
def test_any_elements_are_read_as_bytes_0_and_1(tmp_path: Path, numel: int, data: st.DataObject) -> None:
    masks = masks_of({"a": (3,), "w": (numel,)}, numel)
    first = data.draw(st.integers(0, numel))
    count = data.draw(st.integers(0, numel - first))
    for mask_format in ("bool", "packed"):
        opened = open_masks(write_masks(tmp_path / mask_format, masks, mask_format))
        with TensorReader() as reader:
            kept = read_kept(reader, opened.masks["w"], first, count)
            assert kept.dtype == np.uint8
            assert kept.tolist() == masks["w"][first : first + count].int().tolist()
            for outside in ((first, numel - first + 1), (-1, 1), (0, -1)):
                with pytest.raises(ValueError, match="of mask 'w', which has"):
                    read_kept(reader, opened.masks["w"], *outside)


def test_a_byte_that_is_no_bool_is_read_as_1(tmp_path: Path) -> None:
    path = write_masks(tmp_path, {"a": torch.tensor([True, False, True])}, "bool")
    path.write_bytes(path.read_bytes()[:-3] + b"\xff\x00\x02")
    with TensorReader() as reader:
        assert read_kept(reader, open_masks(path).masks["a"], 0, 3).tolist() == [1, 0, 1]


def test_a_folder_may_hold_mask_files_of_any_name_and_form_beside_other_files(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    save_file({name: masks[name] for name in "ae"}, tmp_path / "mine.safetensors")
    write_masks(tmp_path / "p", {name: masks[name] for name in "svw"}, "packed")
    (tmp_path / "p" / "m.masks.safetensors").rename(tmp_path / "packed.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    check_equal(load_masks(tmp_path), masks)


@pytest.mark.parametrize("name", ["masks.safetensors.index.json", "model.safetensors.index.json"])
def test_an_index_says_which_names_are_missing(tmp_path: Path, name: str) -> None:
    masks = masks_of(SHAPES)
    save_file({name: masks[name] for name in "ae"}, tmp_path / "x.safetensors")
    save_file({name: masks[name] for name in "sv"}, tmp_path / "y.safetensors")
    places = {"a": "x", "e": "x", "s": "y", "v": "y", "w": "y"}
    index = {"weight_map": {name: f"{place}.safetensors" for name, place in places.items()}}
    (tmp_path / name).write_text(json.dumps(index))
    opened = open_masks(tmp_path)
    assert list(opened.masks) == ["a", "e", "s", "v"]
    assert {name: str(place) for name, place in opened.missing.items()} == {"w": "y.safetensors"}
    (tmp_path / "y.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names the shard 'y\.safetensors', which is not there"):
        open_masks(tmp_path)


def test_an_index_of_weights_does_not_hide_masks(tmp_path: Path) -> None:
    masks = masks_of(SHAPES)
    save_file({"a": torch.full((2,), -1.0)}, tmp_path / "w.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "w.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"'a' has -1 at \[0\], wanted a mask of 0 and 1 alone"):
        open_masks(tmp_path)
    save_file(masks, tmp_path / "mine.safetensors")
    check_equal(load_masks(tmp_path), masks)


def test_a_mask_that_stands_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in "xy":
        save_file(masks_of(SHAPES), tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"y\.safetensors: mask 'a' is also in .*x\.safetensors; "):
        load_masks(tmp_path)
