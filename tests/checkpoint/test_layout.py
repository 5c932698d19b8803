"""Layouts: names, places and copies, all known before any data is read."""

import json
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

import pytest

from sparseprune.checkpoint import (
    Checkpoint,
    CopyRange,
    MaskFormat,
    OutputLayout,
    Place,
    lay_out,
    lay_out_apply,
    lay_out_masks,
    open_checkpoint,
)
from sparseprune.checkpoint import layout as layouts
from sparseprune.checkpoint.layout import mask_header
from sparseprune.errors import CheckpointError

TENSORS = [
    ("a", "U8", (3,)),
    ("b", "I16", (2, 5)),
    ("e", "F32", (0, 4)),
    ("s", "BF16", ()),
    ("z", "I8", (4,)),
]


def write(path: Path, names: Collection[str] = "abesz") -> Path:
    header = lay_out([tensor for tensor in TENSORS if tensor[0] in names], {"k": "v"})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.raw + bytes(header.file_size - header.data_begin))
    return path


def single_file(at: Path) -> Checkpoint:
    return open_checkpoint(write(at / "m.safetensors"))


def directory(at: Path) -> Checkpoint:
    write(at / "ckpt" / "model.safetensors")
    (at / "ckpt" / "config.json").write_text("{}")
    (at / "ckpt" / "run.sh").write_text("true")
    (at / "ckpt" / "run.sh").chmod(0o755)
    return open_checkpoint(at / "ckpt")


def sharded(at: Path) -> Checkpoint:
    names = {"one.safetensors": "ab", "two.safetensors": "e", "three.safetensors": "sz"}
    weight_map = {tensor: name for name, tensors in names.items() for tensor in tensors}
    for name, tensors in names.items():
        write(at / "ckpt" / name, tensors)
    (at / "ckpt" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return open_checkpoint(at / "ckpt")


def sizes(layout: OutputLayout) -> dict[str, int]:
    return {str(file.path): file.size for file in layout.files}


def test_names_the_output_of_a_file(tmp_path: Path) -> None:
    checkpoint = single_file(tmp_path)
    layout = lay_out_apply(checkpoint, None, ["b"], "bool")
    assert (layout.target, layout.root) == (tmp_path / "m.pruned.safetensors", tmp_path)
    assert [str(file.path) for file in layout.files] == ["m.pruned.safetensors", "m.pruned.masks.safetensors"]
    assert layout.report_file == PurePosixPath("m.pruned.report.json")
    assert (layout.spec_file, layout.is_directory) == (None, False)
    layout = lay_out_masks(checkpoint, None, ["b"], "bool")
    assert layout.target == tmp_path / "m.masks.safetensors"
    assert [str(file.path) for file in layout.files] == ["m.masks.safetensors"]
    assert layout.report_file == PurePosixPath("m.masks.report.json")
    layout = lay_out_apply(checkpoint, tmp_path / "x.y", ["b"], None)
    assert [str(file.path) for file in layout.files] == ["x.y"]
    assert layout.report_file == PurePosixPath("x.y.report.json")


def test_names_the_output_of_a_directory(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path)
    layout = lay_out_apply(checkpoint, None, ["b"], "packed")
    assert layout.target == layout.root == tmp_path / "ckpt-pruned"
    assert [str(file.path) for file in layout.files] == [
        "model.safetensors",
        "config.json",
        "run.sh",
        "sparseprune/masks.safetensors",
    ]
    assert [file.path.name for file in layout.files if file.mode & 0o100] == ["run.sh"]
    assert layout.report_file == PurePosixPath("sparseprune/report.json")
    assert layout.spec_file == PurePosixPath("sparseprune/spec.toml")
    layout = lay_out_masks(checkpoint, None, ["b"], "packed")
    assert layout.target == tmp_path / "ckpt-masks"
    assert (*layout.mask_files, layout.report_file, layout.spec_file) == tuple(
        map(PurePosixPath, ("masks.safetensors", "report.json", "spec.toml"))
    )


def test_names_the_output_of_a_folder_that_is_given_as_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory(tmp_path)
    monkeypatch.chdir(tmp_path / "ckpt")
    assert lay_out_apply(open_checkpoint(Path()), None, [], None).target == tmp_path / "ckpt-pruned"
    (tmp_path / "ckpt" / "sub").mkdir()
    monkeypatch.chdir("sub")
    assert lay_out_apply(open_checkpoint(Path("..")), None, [], None).target == tmp_path / "ckpt-pruned"


def test_a_target_behind_a_link_lies_where_the_system_looks_for_it(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path)
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    target = lay_out_apply(checkpoint, tmp_path / "link" / ".." / "out", [], None).target
    assert target.parent.samefile(tmp_path / "far")


def test_an_output_beside_a_link_stands_beside_the_link(tmp_path: Path) -> None:
    directory(tmp_path / "store")
    (tmp_path / "link").symlink_to("store/ckpt")
    assert (
        lay_out_apply(open_checkpoint(tmp_path / "link"), None, [], None).target == tmp_path / "link-pruned"
    )


def test_shards_masks_like_the_weights_that_have_some(tmp_path: Path) -> None:
    layout = lay_out_apply(sharded(tmp_path), None, ["z", "a", "b"], "bool")
    masks = [
        "sparseprune/masks-00001-of-00002.safetensors",
        "sparseprune/masks-00002-of-00002.safetensors",
        "sparseprune/masks.safetensors.index.json",
    ]
    assert list(map(str, layout.mask_files)) == masks
    assert [str(layout.masks[name].file) for name in "abz"] == [masks[0], masks[0], masks[1]]
    index = json.loads(layout.files[-1].begins_with)
    assert index["weight_map"] == {"a": masks[0][12:], "b": masks[0][12:], "z": masks[1][12:]}
    assert index["metadata"] == {"total_size": 3 + 10 + 4}
    assert layout.files[-1].size == len(layout.files[-1].begins_with)


def test_a_sharded_checkpoint_without_a_masked_tensor_has_one_empty_mask_file(tmp_path: Path) -> None:
    layout = lay_out_masks(sharded(tmp_path), None, [], "bool")
    assert list(map(str, layout.mask_files)) == ["masks.safetensors"]


@pytest.mark.parametrize("make", [single_file, directory, sharded])
@pytest.mark.parametrize("masked", ["", "a", "z", "ab", "be", "s", "abesz", "az"])
def test_every_byte_of_the_weights_is_a_header_copied_or_a_masked_tensors(
    tmp_path: Path, make: Callable[[Path], Checkpoint], masked: str
) -> None:
    checkpoint = make(tmp_path)
    layout = lay_out_apply(checkpoint, None, masked, "packed")
    for shard in checkpoint.shards:
        path = shard.relative if layout.is_directory else PurePosixPath(layout.target.name)
        spans = [(0, shard.data_begin)]
        for copied in layout.copies:
            if copied.file == path:
                assert (copied.source, copied.source_offset) == (shard.path, copied.offset)
                spans.append((copied.offset, copied.offset + copied.length))
        spans += [
            (place.offset, place.offset + place.nbytes)
            for place in layout.weights.values()
            if place.file == path and place.nbytes
        ]
        spans.sort()
        assert [end for _, end in spans[:-1]] == [begin for begin, _ in spans[1:]]
        assert spans[-1][1] == shard.size == sizes(layout)[str(path)]
    assert set(layout.weights) == set(layout.masks) == set(masked)


def test_merges_neighbours_that_are_copied(tmp_path: Path) -> None:
    checkpoint = single_file(tmp_path)
    begin = checkpoint.shards[0].data_begin
    file = PurePosixPath("m.pruned.safetensors")

    def parts(masked: str) -> list[tuple[int, int]]:
        copies = lay_out_apply(checkpoint, None, masked, None).copies
        assert all(
            part == CopyRange(checkpoint.path, file, part.offset, part.offset, part.length) for part in copies
        )
        return [(part.offset - begin, part.length) for part in copies]

    assert parts("") == [(0, 29)]
    assert parts("b") == [(0, 3), (23, 6)]
    assert parts("az") == [(3, 22)]
    assert parts("abesz") == []


def test_other_files_are_copied_whole(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path)
    (config, run) = lay_out_apply(checkpoint, None, "abesz", None).copies
    assert config == CopyRange(tmp_path / "ckpt/config.json", PurePosixPath("config.json"), 0, 0, 2)
    assert run.length == 4


@pytest.mark.parametrize(
    ("mask_format", "nbytes"),
    [("bool", {"b": 10, "e": 0, "s": 1, "z": 4}), ("packed", {"b": 2, "e": 0, "s": 1, "z": 1})],
)
def test_places_masks_in_the_order_of_the_data(
    tmp_path: Path, mask_format: MaskFormat, nbytes: dict[str, int]
) -> None:
    checkpoint = single_file(tmp_path)
    layout = lay_out_masks(checkpoint, None, ["z", "s", "e", "b"], mask_format)
    header = mask_header({name: checkpoint.tensors[name].shape for name in "besz"}, mask_format)
    assert layout.files[0].begins_with == header.raw
    assert header.metadata["sparseprune.mask_format"] == mask_format
    assert header.metadata["format"] == "pt"
    offset = header.data_begin
    for name, size in nbytes.items():
        numel = checkpoint.tensors[name].numel
        assert layout.masks[name] == Place(PurePosixPath("m.masks.safetensors"), offset, size, numel)
        offset += size
    assert layout.files[0].size == offset
    if mask_format == "packed":
        shapes = json.loads(header.metadata["sparseprune.shapes"])
        assert shapes == {"b": [2, 5], "e": [0, 4], "s": [], "z": [4]}
        assert {entry.dtype for entry in header.entries} == {"U8"}
    else:
        assert [entry.shape for entry in header.entries] == [(2, 5), (0, 4), (), (4,)]
        assert {entry.dtype for entry in header.entries} == {"BOOL"}


def test_sums_up_bytes(tmp_path: Path) -> None:
    layout = lay_out_apply(directory(tmp_path), None, "b", "bool")
    assert layout.input_bytes == (tmp_path / "ckpt/model.safetensors").stat().st_size
    assert layout.output_bytes == sum(sizes(layout).values()) > layout.input_bytes + 6 + 10


def test_a_layout_without_masks_has_none(tmp_path: Path) -> None:
    layout = lay_out_apply(directory(tmp_path), None, "b", None)
    assert (layout.masks, layout.mask_files, layout.mask_format) == ({}, (), None)
    assert layout.writes_weights
    assert not lay_out_masks(layout.checkpoint, None, "b", "bool").writes_weights


def test_refuses_a_directory_with_the_name_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"out\.safetensors: the output of the directory .* is a directory"
    ):
        lay_out_apply(directory(tmp_path), tmp_path / "out.safetensors", [], None)
    assert lay_out_apply(directory(tmp_path), tmp_path / "out", [], None).target == tmp_path / "out"


def test_a_name_that_is_not_stored_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        lay_out_apply(single_file(tmp_path), None, ["absent"], None)


def test_names_that_a_mask_file_cannot_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = single_file(tmp_path)
    longest = len(mask_header({"a": (3,), "z": (4,)}, "packed").raw)
    monkeypatch.setattr(layouts, "MAX_HEADER", longest - 8)
    assert lay_out_masks(checkpoint, None, "az", "packed").mask_files
    monkeypatch.setattr(layouts, "MAX_HEADER", longest - 9)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: .* a packed mask file .*--mask-format bool"):
        lay_out_masks(checkpoint, None, "az", "packed")
    assert lay_out_masks(checkpoint, None, "az", "bool").mask_files
