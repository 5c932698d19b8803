"""Layouts of removals: headers, places, names of shards, the index, the config, all before data is read."""

import json
import random
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseprune.checkpoint import (
    Checkpoint,
    OutputLayout,
    ResizedTensor,
    StagedOutput,
    TensorReader,
    lay_out,
    open_checkpoint,
    read_kept,
)
from sparseprune.checkpoint.resizing import lay_out_choice, lay_out_removal, open_choice
from sparseprune.engine.dtypes import DTYPES
from sparseprune.errors import CheckpointError
from tests.checkpoint.files import Tensors, content, names_in, single, write
from tests.checkpoint.headers import loaded

Cuts = Mapping[str, tuple[str, tuple[int, ...]] | None]

A, B, EMPTY, SCALAR, Z = (
    ("a", "U8", (3,)),
    ("b", "I16", (2, 5)),
    ("e", "F32", (0, 4)),
    ("s", "BF16", ()),
    ("z", "I8", (4,)),
)
ALL: Tensors = [A, B, EMPTY, SCALAR, Z]
INDEX = "model.safetensors.index.json"
ROW = tuple(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3))


def directory(at: Path, shards: Mapping[str, Tensors], index: Mapping[str, Any] | None = None) -> Checkpoint:
    """These shards with a config; with several of them, or with what an index says beside, an index."""
    for seed, (file, tensors) in enumerate(shards.items(), 1):
        write(at / "ckpt" / file, tensors, seed)
    (at / "ckpt" / "config.json").write_text('{"a":1}')
    if len(shards) > 1 or index is not None:
        weight_map = {name: file for file, tensors in shards.items() for name, _, _ in tensors}
        document = {"weight_map": weight_map, **(index or {})}
        (at / "ckpt" / INDEX).write_text(json.dumps(document))
    return open_checkpoint(at / "ckpt")


def removal(checkpoint: Checkpoint, cuts: Cuts, config: Mapping[str, Any] | None = None) -> OutputLayout:
    """Of all tensors but those that `cuts` gives a new name and shape, or None for gone."""
    tensors = {}
    for name, stored in checkpoint.tensors.items():
        now, shape = cuts.get(name, (name, stored.shape)) or (None, ())
        if now is not None:
            tensors[name] = ResizedTensor(now, shape, whole=shape == stored.shape)
    return lay_out_removal(checkpoint, None, tensors, config)


def raw(tensors: Tensors) -> bytes:
    return lay_out(tensors, {"format": "pt"}).raw


def file_of(layout: OutputLayout, name: str) -> bytes:
    (found,) = (file.begins_with for file in layout.files if str(file.path) == name)
    return found


def index_of(layout: OutputLayout) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(file_of(layout, INDEX))
    return document


def shards_of(layout: OutputLayout) -> list[str]:
    return [str(file.path) for file in layout.files if file.path.suffix == ".safetensors"]


def copies_of(layout: OutputLayout) -> list[tuple[str, int, int, int]]:
    return [
        (str(part.file), part.source_offset, part.offset, part.length)
        for part in layout.copies
        if part.file.suffix == ".safetensors"
    ]


def test_headers_say_what_is_left_in_the_order_of_the_data(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": ALL})
    layout = removal(checkpoint, {"a": None, "b": ("b", (2, 3)), "z": ("y", (4,))})
    header = raw([("b", "I16", (2, 3)), EMPTY, SCALAR, ("y", "I8", (4,))])
    (first, *_) = layout.files
    assert (str(first.path), first.begins_with, first.size) == ("model.safetensors", header, len(header) + 18)
    described = [(name, each["dtype"], each["shape"]) for name, each in loaded(header + bytes(18))]
    assert sorted(described) == [
        ("b", "I16", [2, 3]), ("e", "F32", [0, 4]), ("s", "BF16", []), ("y", "I8", [4]),
    ]  # fmt: skip


def test_places_go_by_old_names_and_are_of_what_is_cut_alone(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": ALL})
    layout = removal(checkpoint, {"b": ("c", (2, 3)), "z": ("b", (2,))})
    (file, *_) = layout.files
    begin = len(file.begins_with)
    assert {
        name: (str(place.file), place.offset - begin, place.nbytes, place.numel)
        for name, place in layout.weights.items()
    } == {"b": ("model.safetensors", 3, 12, 6), "z": ("model.safetensors", 17, 2, 2)}
    assert (layout.masks, layout.mask_files, layout.mask_format) == ({}, (), None)
    assert layout.writes_weights


def test_neighbours_are_copied_in_one_piece_and_others_by_themselves(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": ALL})
    old = len(raw(ALL))
    # The data is a: 0 to 3, b: 3 to 23, s: 23 to 25, z: 25 to 29.
    cases: list[tuple[Cuts, list[tuple[int, int, int]]]] = [
        ({}, [(0, 0, 29)]),
        ({"z": None}, [(0, 0, 25)]),
        ({"a": None}, [(3, 0, 26)]),
        ({"a": ("x", (3,))}, [(0, 0, 29)]),
        ({"b": ("b", (2, 3))}, [(0, 0, 3), (23, 15, 6)]),
        ({"b": None}, [(0, 0, 3), (23, 3, 6)]),
        ({"a": None, "s": None}, [(3, 0, 20), (25, 20, 4)]),
        ({"s": None, "e": None}, [(0, 0, 23), (25, 23, 4)]),
    ]
    for cuts, wanted in cases:
        layout = removal(checkpoint, cuts)
        new = len(file_of(layout, "model.safetensors"))
        assert copies_of(layout) == [
            ("model.safetensors", old + source, new + offset, length) for source, offset, length in wanted
        ], cuts


def test_a_shard_of_which_nothing_changes_keeps_its_header_byte_for_byte(tmp_path: Path) -> None:
    odd = b'{"z":{"shape":[4],"dtype":"I8","data_offsets":[0,4]},"__metadata__":{"k":"v"}}   '
    checkpoint = directory(tmp_path, {"model.safetensors": [A], "odd.safetensors": [Z]})
    path = tmp_path / "ckpt" / "odd.safetensors"
    path.write_bytes(len(odd).to_bytes(8, "little") + odd + b"1234")
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    layout = removal(checkpoint, {"a": ("a", (2,))})
    assert file_of(layout, "odd.safetensors") == path.read_bytes()[:-4]
    layout = removal(checkpoint, {"z": ("y", (4,))})
    assert file_of(layout, "odd.safetensors") == lay_out([("y", "I8", (4,))], {"k": "v"}).raw


@pytest.mark.parametrize(
    ("files", "gone", "wanted"),
    [
        pytest.param(ROW, "", ROW, id="none gone"),
        pytest.param(
            [f"m-0000{number}-of-00003.safetensors" for number in (0, 1, 2)],
            "",
            [f"m-0000{number}-of-00003.safetensors" for number in (0, 1, 2)],
            id="none gone of a row that begins with 0",
        ),
        pytest.param(
            ROW, "0", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], id="the first"
        ),
        pytest.param(ROW, "02", ["model-00001-of-00001.safetensors"], id="two of them"),
        pytest.param(
            [f"in/m-{number}-of-000003.safetensors" for number in ("000001", "000002", "000003")],
            "1",
            ["in/m-000001-of-000002.safetensors", "in/m-000002-of-000002.safetensors"],
            id="in a folder, digits of another length",
        ),
        pytest.param(["x.safetensors", "y.safetensors", "z.safetensors"], "1",
            ["x.safetensors", "z.safetensors"], id="names of someone's own"),
        pytest.param([*ROW[:2], "z.safetensors"], "0", [ROW[1], "z.safetensors"], id="some of each"),
        pytest.param([*ROW[:2], "model-00005-of-00009.safetensors"], "0",
            [ROW[1], "model-00005-of-00009.safetensors"], id="of several counts"),
        pytest.param([f"m-0000{number}-of-00009.safetensors" for number in (1, 2, 3)], "0",
            ["m-00002-of-00009.safetensors", "m-00003-of-00009.safetensors"], id="a part of a row"),
        pytest.param(["a-00001-of-00003.safetensors", *ROW[1:]], "0", list(ROW[1:]), id="of several stems"),
    ],
)  # fmt: skip
def test_shards_are_counted_anew_where_one_of_a_row_is_gone(
    tmp_path: Path, files: Sequence[str], gone: str, wanted: Sequence[str]
) -> None:
    checkpoint = directory(tmp_path, {file: [each] for file, each in zip(files, (A, B, Z), strict=True)})
    cuts = {"abz"[int(number)]: None for number in gone}
    layout = removal(checkpoint, cuts)
    assert shards_of(layout) == list(wanted)
    assert list(index_of(layout)["weight_map"].values() if gone else wanted) == list(wanted)
    assert [part.file for part in layout.copies][: len(wanted)] == [PurePosixPath(name) for name in wanted]


def test_a_name_that_another_file_has_is_not_given_to_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "ckpt" / "sub" / "model-00001-of-00002.safetensors", [("other", "U8", (3,))])
    row = [f"sub/{name}" for name in ROW]
    checkpoint = directory(tmp_path, {file: [each] for file, each in zip(row, (A, B, Z), strict=True)})
    layout = removal(checkpoint, {"a": None})
    paths = [file.path for file in layout.files]
    assert len(set(paths)) == len(paths)
    assert set(row[1:]) <= set(map(str, paths))
    assert row[0] not in map(str, paths)


def test_a_shard_without_tensors_stays(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": []})
    for layout in (removal(checkpoint, {}), lay_out_removal(checkpoint, None, None, None)):
        assert file_of(layout, "model.safetensors") == raw([])


def test_the_index_keeps_its_order_and_all_that_it_says_beside(tmp_path: Path) -> None:
    more = {
        "weight_map": {
            "z": "y.safetensors",
            "b": "x.safetensors",
            "s": "x.safetensors",
            "a": "y.safetensors",
        },
        "metadata": {"by": ["me", None], "total_size": 1, "total_parameters": 2, "\u00e9": 1e-05},
        "other": {"x": 1},
    }
    checkpoint = directory(tmp_path, {"x.safetensors": [B, SCALAR], "y.safetensors": [A, Z]}, more)
    document = index_of(removal(checkpoint, {"z": ("y", (1,)), "b": ("b", (2, 4)), "a": None}))
    assert document == {
        "weight_map": {"y": "y.safetensors", "b": "x.safetensors", "s": "x.safetensors"},
        "metadata": {"by": ["me", None], "total_size": 19, "total_parameters": 10, "\u00e9": 1e-05},
        "other": {"x": 1},
    }
    assert [list(document), list(document["weight_map"]), list(document["metadata"])] == [
        ["weight_map", "metadata", "other"],
        ["y", "b", "s"],
        ["by", "total_size", "total_parameters", "\u00e9"],
    ]


@pytest.mark.parametrize("metadata", [None, 3, [1], {}, {"total_size": "many"}])
def test_an_index_gets_a_total_size_whatever_it_had(tmp_path: Path, metadata: object) -> None:
    index = {} if metadata is None else {"metadata": metadata}
    checkpoint = directory(tmp_path, {"x.safetensors": [A], "y.safetensors": [Z]}, index)
    assert index_of(removal(checkpoint, {"z": ("z", (1,))}))["metadata"] == {"total_size": 4}


def test_an_index_and_a_config_stay_as_they_are_where_nothing_goes(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"x.safetensors": [A], "y.safetensors": [Z]})
    for layout in (removal(checkpoint, {}), lay_out_removal(checkpoint, None, None, None)):
        assert (file_of(layout, INDEX), file_of(layout, "config.json")) == (b"", b"")
        copied = {str(part.file): (part.source, part.length) for part in layout.copies}
        for name in (INDEX, "config.json"):
            path = tmp_path / "ckpt" / name
            assert copied[name] == (path, path.stat().st_size)
        assert not layout.weights


def test_a_config_is_replaced_and_other_files_are_copied(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": [A, Z]})
    (tmp_path / "ckpt" / "config.json").chmod(0o755)
    (tmp_path / "ckpt" / "deep").mkdir()
    (tmp_path / "ckpt" / "deep" / "config.json").write_text("{}")
    (tmp_path / "ckpt" / "run.sh").write_text("true")
    (tmp_path / "ckpt" / "run.sh").chmod(0o755)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    layout = removal(checkpoint, {"a": None}, {"b": "\u00e9", "a": [1e-05], "\ud800": 1})
    text = file_of(layout, "config.json")
    assert text == '{\n  "b": "\u00e9",\n  "a": [\n    1e-05\n  ],\n  "\\ud800": 1\n}\n'.encode()
    assert {str(file.path): (file.size, bool(file.mode & 0o100)) for file in layout.files[1:]} == {
        "config.json": (len(text), True),
        "deep/config.json": (2, False),
        "run.sh": (4, True),
    }
    assert [str(part.file) for part in layout.copies] == ["model.safetensors", "run.sh", "deep/config.json"]
    assert all(part.source == tmp_path / "ckpt" / part.file for part in layout.copies)


def test_a_config_too_deep_to_be_written_is_refused(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": [A]})
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CheckpointError, match=r"^config.json: lists and objects lie too deep in each other$"):
        removal(checkpoint, {"a": ("a", (1,))}, {"deep": deep})


def test_a_single_file_is_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(single(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"m.safetensors: what becomes smaller is said in config.json; "
    ):
        lay_out_removal(checkpoint, None, None, None)


def test_an_output_has_a_name_of_its_own(tmp_path: Path) -> None:
    checkpoint = directory(tmp_path, {"model.safetensors": [A]})
    layout = lay_out_removal(checkpoint, None, None, None)
    assert (layout.target, layout.root, layout.is_directory) == (
        tmp_path / "ckpt-smaller",
        tmp_path / "ckpt-smaller",
        True,
    )
    assert layout.report_file == PurePosixPath("sparseprune/report.json")
    assert layout.spec_file == PurePosixPath("sparseprune/spec.toml")
    assert lay_out_removal(checkpoint, tmp_path / "x", None, None).target == tmp_path / "x"


@st.composite
def shards_and_cuts(draw: st.DrawFn) -> tuple[dict[str, Tensors], dict[str, tuple[int, ...] | None]]:
    """Shards of a few tensors, and the new shapes of some of them, None for gone."""
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    shards: dict[str, Tensors] = {}
    cuts: dict[str, tuple[int, ...] | None] = {}
    for number, count in enumerate(counts, 1):
        file = f"m-{number:05d}-of-{len(counts):05d}.safetensors"
        shards[file] = []
        for place in range(count):
            name = f"{number}.{place}"
            shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
            shards[file].append((name, draw(st.sampled_from(["U8", "BF16", "F32"])), shape))
            if draw(st.booleans()):
                cuts[name] = draw(st.none() | st.tuples(*(st.integers(0, size) for size in shape)))
    if not any(shards.values()):
        shards[file].append(A)
    return shards, cuts


Case = tuple[dict[str, Tensors], dict[str, tuple[int, ...] | None]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(case=shards_and_cuts())
def test_every_byte_of_the_output_is_written_once_and_the_package_reads_it(
    tmp_path_factory: pytest.TempPathFactory, case: Case
) -> None:
    shards, cuts = case
    checkpoint = directory(tmp_path_factory.mktemp("any"), shards)
    layout = removal(
        checkpoint, {name: None if shape is None else (f"{name}.new", shape) for name, shape in cuts.items()}
    )
    marks = {name: bytes([7 + number]) for number, name in enumerate(layout.weights)}
    found = {
        name: (file, each["dtype"], tuple(each["shape"]), bytes(each["data"]))
        for file, data in carried_out(layout, marks).items()
        for name, each in loaded(data)
    }
    assert {name: each[1:] for name, each in found.items()} == wanted_of(checkpoint, cuts, marks)
    if checkpoint.index is not None:
        document = json.loads(file_of(layout, INDEX) or (checkpoint.path / INDEX).read_bytes())
        assert document["weight_map"] == {name: each[0] for name, each in found.items()}


def carried_out(layout: OutputLayout, marks: Mapping[str, bytes]) -> dict[str, bytes]:
    """The shards of a layout whose weights are filled with such bytes; no byte is written twice or never."""
    pieces = [(str(file.path), 0, file.begins_with) for file in layout.files]
    for part in layout.copies:
        data = part.source.read_bytes()[part.source_offset :][: part.length]
        pieces.append((str(part.file), part.offset, data))
    for name, place in layout.weights.items():
        pieces.append((str(place.file), place.offset, marks[name] * place.nbytes))
    files = {}
    for file in layout.files:
        parts = sorted((offset, data) for name, offset, data in pieces if name == str(file.path))
        whole = b""
        for offset, data in parts:
            assert offset == len(whole) or not data
            whole += data
        assert len(whole) == file.size
        files[str(file.path)] = whole
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def wanted_of(
    checkpoint: Checkpoint, cuts: Mapping[str, tuple[int, ...] | None], marks: Mapping[str, bytes]
) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What is left by name: dtype, shape and bytes."""
    wanted = {}
    for shard in checkpoint.shards:
        for name, each in loaded(shard.path.read_bytes()):
            dtype, shape, data = each["dtype"], tuple(each["shape"]), bytes(each["data"])
            now = cuts.get(name, shape)
            if now is None:
                continue
            if now != shape:
                data = marks[name] * (prod(now) * DTYPES[dtype].bits // 8)
            wanted[f"{name}.new" if name in cuts else name] = dtype, now, data
    return wanted


@pytest.mark.parametrize("rebuilt", [False, True])
def test_a_choice_holds_packed_masks_and_what_is_rebuilt(tmp_path: Path, rebuilt: bool) -> None:
    checkpoint = directory(tmp_path, {"x.safetensors": [B, SCALAR], "y.safetensors": [A, EMPTY, Z]})
    reached = ["b", "z", "a", "e"]
    final = lay_out_removal(checkpoint, tmp_path / "out", None, None)
    layout = lay_out_choice(checkpoint, final, reached, rebuilt=rebuilt)
    assert (layout.target, layout.mask_format, layout.scratch) == (final.target, "packed", "choice")
    assert (layout.writes_weights, set(layout.weights)) == (rebuilt, set(reached) if rebuilt else set())
    draw = random.Random(1)
    masks = {name: bytes(draw.choices((0, 1), k=place.numel)) for name, place in layout.masks.items()}
    weights = {name: draw.randbytes(checkpoint.tensors[name].nbytes) for name in reached}
    with StagedOutput(layout) as output, TensorReader() as reader:
        assert output.partial_path == tmp_path / ".out.sparseprune-choice"
        for name in layout.masks:
            output.write_mask(name, 0, masks[name])
        for name in layout.weights:
            output.write_weight(name, 0, weights[name])
        output.flush()
        opened, found = open_choice(output)
        assert {
            mask.name: (mask.shape, bytes(read_kept(reader, mask, 0, mask.numel))) for mask in opened
        } == {name: (checkpoint.tensors[name].shape, masks[name]) for name in layout.masks}
        assert {name: (one.dtype, one.shape, bytes(reader.read(one))) for name, one in found.items()} == (
            {
                name: (checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape, weights[name])
                for name in reached
            }
            if rebuilt
            else {}
        )
        output.discard()
        assert names_in(tmp_path) == ["ckpt"]
    assert content(tmp_path).keys() == {f"ckpt/{name}" for name in names_in(tmp_path / "ckpt")}
