"""Opening checkpoints: what is one, what is refused, and reading bytes of its tensors."""

import gc
import json
import os
import pickle
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseprune.checkpoint import TensorReader, lay_out, open_checkpoint, open_masks, read_config
from sparseprune.checkpoint.discovery import read_weight_map
from sparseprune.errors import CheckpointError, MachineError
from tests.checkpoint.files import open_files
from tests.faults import failing

Files = Mapping[str, bytes]


def weights(*names: str, numel: int = 3) -> bytes:
    """A file of U8 tensors that count up from 1."""
    header = lay_out([(name, "U8", (numel,)) for name in names], {"format": "pt"})
    return header.raw + bytes(range(1, 1 + numel * len(names)))


def index(weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def folder(at: Path, files: Files) -> Path:
    for name, content in files.items():
        (at / name).parent.mkdir(parents=True, exist_ok=True)
        (at / name).write_bytes(content)
    return at


SHARDS = {
    "model-00001-of-00002.safetensors": weights("b", "a"),
    "model-00002-of-00002.safetensors": weights("c"),
}
MAP = {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors",
}
INDEX = "model.safetensors.index.json"
SHARDED = {**SHARDS, INDEX: index(MAP)}


def test_a_tensor_pickles_small_however_long_the_header_of_its_shard_is(tmp_path: Path) -> None:
    names = [f"layers.{number}.weight" for number in range(1000)]
    path = folder(tmp_path, {"m.safetensors": weights(*names, numel=0)}) / "m.safetensors"
    stored = open_checkpoint(path).tensors["layers.7.weight"]
    text = pickle.dumps(stored)
    assert len(text) < 1000 + len(str(path))
    again = pickle.loads(text)
    assert (again, again.offset, again.shard.stamp) == (stored, stored.offset, stored.shard.stamp)


def test_a_file_is_a_checkpoint_of_one_shard(tmp_path: Path) -> None:
    path = folder(tmp_path, {"m.safetensors": weights("b", "a"), "config.json": b"{}"}) / "m.safetensors"
    checkpoint = open_checkpoint(path)
    assert (checkpoint.path, checkpoint.is_directory, checkpoint.others) == (path, False, ())
    assert [shard.name for shard in checkpoint.shards] == ["m.safetensors"]
    stored = checkpoint.tensors["a"]
    assert (stored.name, stored.dtype, stored.shape, stored.numel, stored.nbytes) == ("a", "U8", (3,), 3, 3)
    assert path.read_bytes()[stored.offset :] == bytes([4, 5, 6])


LEGAL: dict[str, tuple[Files, list[str], list[str]]] = {
    "one file": ({"model.safetensors": weights("a")}, ["a"], []),
    "one file of another name": ({"adapter_model.safetensors": weights("a"), "x.bin": b"1"}, ["a"],
        ["x.bin"]),
    "another file beside model.safetensors": (
        {"model.safetensors": weights("a"), "extra.safetensors": weights("z")}, ["a"], ["extra.safetensors"]),
    "shards": (SHARDED, ["b", "a", "c"], [INDEX]),
    "shards without an index": ({**SHARDS, "config.json": b"{}"}, ["b", "a", "c"], ["config.json"]),
    "shards without an index beside another copy": (
        {**SHARDS, "consolidated.safetensors": weights("z"), "x-00001-of-00002.safetensors": weights("y")},
        ["b", "a", "c"],
        ["x-00001-of-00002.safetensors"],
    ),
    "one shard of one": ({"x-00001-of-00001.safetensors": weights("a")}, ["a"], []),
    "shards and a file that no index lists": ({**SHARDED, "extra.safetensors": b"no header"}, ["b", "a", "c"],
        ["extra.safetensors", INDEX]),
    "shards and a second index": ({**SHARDED, "x.safetensors.index.json": b"not even read"}, ["b", "a", "c"],
        [INDEX, "x.safetensors.index.json"]),
    "a tensor that the index lacks": (
        {**SHARDS, INDEX: index({"c": "model-00002-of-00002.safetensors", "a": MAP["a"]})},
        ["b", "a", "c"],
        [INDEX],
    ),
    "a variant beside its original": (
        {"diffusion.safetensors": weights("a"), "diffusion.fp16.safetensors": weights("z")}, ["a"], []),
    "the index of a variant beside the original": (
        {
            "model.safetensors": weights("a"),
            "x.safetensors": weights("z"),
            "model.fp16.safetensors.index.json": index({"z": "x.safetensors"}),
        },
        ["a"],
        ["model.fp16.safetensors.index.json", "x.safetensors"],
    ),
    "shards of a variant alone": ({**SHARDS, "model.safetensors.index.fp16.json": index(MAP)},
        ["b", "a", "c"], ["model.safetensors.index.fp16.json"]),
    "one file beside the index of a variant": (
        {"x.safetensors": weights("a"), "x.safetensors.index.fp16.json": index({"z": "absent.safetensors"})},
        ["a"],
        ["x.safetensors.index.fp16.json"],
    ),
    "a folder that is called like weights": (
        {"x.safetensors": weights("a"), "y.safetensors/z": b"", "y.safetensors.index.json/z": b""},
        ["a"],
        ["y.safetensors.index.json/z", "y.safetensors/z"],
    ),
    "many folders in each other": ({"model.safetensors": weights("a"), "d/" * 100 + "x": b""}, ["a"],
        ["d/" * 100 + "x"]),
    "an index of other files beside model.safetensors": (
        {**SHARDS, "model.safetensors": weights("a"), "x.safetensors.index.json": index(MAP)}, ["a"], []),
    "an index that lists the single file": (
        {"model.safetensors": weights("a"), INDEX: index({"a": "model.safetensors"})}, ["a"], [INDEX]),
    "shards in a folder": (
        {"sub/x.safetensors": weights("a"), "sub/y.txt": b"", INDEX: index({"a": "./sub/x.safetensors"})},
        ["a"],
        [INDEX, "sub/y.txt"],
    ),
    "folders of other files": (
        {
            "model.safetensors": weights("a"),
            "1/b/c": b"",
            "1/a": b"",
            ".hidden": b"",
            "sub/sparseprune/x": b"",
        },
        ["a"],
        [".hidden", "1/a", "sub/sparseprune/x", "1/b/c"],
    ),
    "folders that belong to the input alone": (
        {"model.safetensors": weights("a"), "sparseprune/report.json": b"", ".git/x": b"", ".cache/x": b""},
        ["a"],
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "tensors", "others"), LEGAL.values(), ids=LEGAL)
def test_opens_a_directory(tmp_path: Path, files: Files, tensors: list[str], others: list[str]) -> None:
    checkpoint = open_checkpoint(folder(tmp_path / "ckpt", files))
    assert list(checkpoint.tensors) == tensors
    assert sorted(str(one.path) for one in checkpoint.others) == sorted(others)


REFUSED: dict[str, tuple[Files, str]] = {
    "nothing": ({}, "ckpt: holds no safetensors file; give"),
    "a pickle": ({"pytorch_model.bin": b"\x80\x02"}, r"only pytorch_model.bin; pickles can run code"),
    "components in folders": (
        {"unet/a.safetensors": weights("a"), "vae/b.safetensors": weights("a"), "readme/x": b""},
        r"at its top; give one of its folders that do: unet, vae",
    ),
    "a suffix in capitals": ({"M.SAFETENSORS": weights("a")}, r"of that spelling, only M.SAFETENSORS"),
    "a folder in place of the weights": ({"model.safetensors/x": b""}, "holds no safetensors file; give"),
    "too many folders in each other": ({"model.safetensors": weights("a"), "d/" * 101 + "x": b""},
        "ckpt: holds folders more than 100 deep"),
    "indexes of two variants": (
        {
            "model.safetensors.index.fp16.json": index(MAP),
            "model.safetensors.index.fp8.json": index(MAP),
            "x.safetensors": weights("a"),
            "y.safetensors": weights("b"),
        },
        "holds 2 safetensors files and no index",
    ),
    "shards without an index, of which some are missing": (
        {"model-00001-of-00003.safetensors": weights("a"), "model-00003-of-00003.safetensors": weights("b")},
        r"holds 2 of 3 shards model-\.\.\.\.safetensors and no index; number 2 is not there; copy",
    ),
    "one of two shards": ({"x-00002-of-00002.safetensors": weights("a")},
        r"holds 1 of 2 shards x-\.\.\.\.safetensors and no index; number 1 is not there"),
    "shards that are numbered beyond their number": (
        {**SHARDS, "model-00003-of-00002.safetensors": weights("z")},
        "holds 3 of 2 shards .*; some are numbered otherwise",
    ),
    "a tensor in two shards without an index": (
        {"m-00001-of-00002.safetensors": weights("a"), "m-00002-of-00002.safetensors": weights("a")},
        "m-00002-of-00002.safetensors: tensor 'a' is also in m-00001-of-00002.safetensors",
    ),
    "shards of two counts": ({**SHARDS, "model-00001-of-00001.safetensors": weights("z")},
        "holds 3 safetensors files and no index"),
    "shards of two names without an index": (
        {**{f"x{name}": data for name, data in SHARDS.items()}, "y-00001-of-00001.safetensors": weights("z")},
        "holds 3 safetensors files and no index",
    ),
    "another format": ({"m.gguf": b"GGUF"}, r"only m.gguf; sparseprune reads safetensors, so prune"),
    "two files without an index": ({"a.safetensors": weights("a"), "b.safetensors": weights("b")},
        "holds 2 safetensors files and no index"),
    "two indexes": (
        {**SHARDS, "x.safetensors.index.json": index(MAP), "y.safetensors.index.json": index(MAP)},
        "2 index files",
    ),
    "an index beside another model.safetensors": ({**SHARDED, "model.safetensors": weights("a")},
        "an index that does not list it"),
    "an index that is no JSON": ({INDEX: b"{"}, "index.json: cannot be read as JSON"),
    "an index that is not UTF-8": ({INDEX: b"\xff"}, "not UTF-8"),
    "an index without an end": ({INDEX: b"[" * 100_000}, "cannot be read as JSON"),
    "an index that is a list": ({INDEX: b"[]"}, r"holds \[\], wanted a JSON object"),
    "an index without tensors": ({INDEX: b"{}"}, 'under "weight_map"'),
    "an index with an empty map": ({INDEX: index({})}, 'under "weight_map"'),
    "an index with numbers": ({INDEX: index({"a": 1})}, 'under "weight_map"'),
    "an index with a tensor twice": ({INDEX: b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'},
        "'a' stands twice"),
    "an absent shard": ({INDEX: index({"a": "x.safetensors"})},
        r"names the shard 'x.safetensors', which is not"),
    "an absent tensor": ({**SHARDS, INDEX: index({**MAP, "d": MAP["c"]})},
        "names tensor 'd' in model-00002.*does not hold it"),
    "a tensor in another shard": ({**SHARDS, INDEX: index({**MAP, "a": MAP["c"]})},
        "but it is in model-00001"),
    "a tensor in two shards that the index does not list": (
        {
            "x.safetensors": weights("a", "b"),
            "y.safetensors": weights("a", "c"),
            INDEX: index({"b": "x.safetensors", "c": "y.safetensors"}),
        },
        r"y.safetensors: tensor 'a' is also in x.safetensors; .* or add an index that names the one to use",
    ),
    "a tensor in two shards of which the index means a third": (
        {
            "x.safetensors": weights("a", "b"),
            "y.safetensors": weights("a", "c"),
            "z.safetensors": weights("d"),
            INDEX: index({"b": "x.safetensors", "c": "y.safetensors", "a": "z.safetensors"}),
        },
        "names tensor 'a' in z.safetensors, but it is in x.safetensors",
    ),
    "a parent folder": ({INDEX: index({"a": "../out.safetensors"})}, "no file in its own folder"),
    "a parent further in": ({INDEX: index({"a": "x/../../out.safetensors"})}, "no file in its own folder"),
    "an absolute path": ({INDEX: index({"a": "/out.safetensors"})}, "no file in its own folder"),
    "no name": ({INDEX: index({"a": ""})}, "no file in its own folder"),
    "a name with NUL": ({INDEX: index({"a": "x\0.safetensors"})}, "no file in its own folder"),
    "a name that is too long": ({INDEX: index({"a": "x" * 5000 + ".safetensors"})}, "which is not there"),
    "a pickle shard": ({INDEX: index({"a": "x.bin"}), "x.bin": b""}, "wanted a .safetensors file"),
    "an earlier run's masks": (
        {INDEX: index({"a": "sparseprune/masks.safetensors"}), "sparseprune/masks.safetensors": weights("a")},
        "wanted a .safetensors file of the checkpoint",
    ),
    "a damaged shard": ({**SHARDED, MAP["c"]: weights("c")[:-1]}, "00002.safetensors: .*truncated: expected"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "fragment"), REFUSED.values(), ids=REFUSED)
def test_refuses_a_directory(tmp_path: Path, files: Files, fragment: str) -> None:
    (tmp_path / "ckpt").mkdir()
    folder(tmp_path, {"out.safetensors": weights("a")})
    with pytest.raises(CheckpointError, match=fragment):
        open_checkpoint(folder(tmp_path / "ckpt", files))


def test_follows_links_to_files_as_the_snapshots_of_a_download_cache_have_them(tmp_path: Path) -> None:
    blobs = folder(tmp_path / "blobs", {"1f": weights("a"), "2e": b"{}"})
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/1f")
    (snapshot / "config.json").symlink_to(blobs / "2e")
    checkpoint = open_checkpoint(snapshot)
    assert checkpoint.shards[0].name == "model.safetensors"
    assert [str(one.path) for one in checkpoint.others] == ["config.json"]
    with TensorReader() as reader:
        assert reader.read(checkpoint.tensors["a"]) == bytes([1, 2, 3])


def test_refuses_what_cannot_be_copied_as_a_file(tmp_path: Path) -> None:
    ckpt = folder(tmp_path / "ckpt", {"model.safetensors": weights("a")})
    (ckpt / "odd").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match="odd: a link to a folder"):
        open_checkpoint(ckpt)
    (ckpt / "odd").unlink()
    (ckpt / "odd").symlink_to("absent")
    with pytest.raises(CheckpointError, match="odd: a link to a file that is not there"):
        open_checkpoint(ckpt)
    (ckpt / "odd").unlink()
    os.mkfifo(ckpt / "odd")
    with pytest.raises(CheckpointError, match="odd: neither a file nor a folder"):
        open_checkpoint(ckpt)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [pipe, circle, endless])
@pytest.mark.parametrize("name", ["model.safetensors", INDEX, "config.json", "other"])
def test_nothing_but_a_file_is_waited_for_or_read(
    tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    ckpt = folder(tmp_path / "ckpt", {"model.safetensors": weights("a")})
    (ckpt / name).unlink(missing_ok=True)
    file = folder(tmp_path / "beside", {"x.safetensors": weights("a")}) / "x.safetensors"
    make(ckpt / name)
    with pytest.raises(CheckpointError, match=f"ckpt(/{name})?: "):
        open_checkpoint(ckpt)
    make(file.with_name("config.json"))
    with pytest.raises(CheckpointError, match=r"config\.json: (not a regular file|no such file: Too many)"):
        read_config(open_checkpoint(file))


def test_an_index_leads_through_no_link_to_a_folder(tmp_path: Path) -> None:
    folder(tmp_path / "elsewhere", {"in/x.safetensors": weights("a")})
    for place, link in (("sub/in/x", "sub"), ("sub/x", "sub")):
        ckpt = folder(tmp_path / place.replace("/", "-"), {INDEX: index({"a": f"{place}.safetensors"})})
        (ckpt / link).symlink_to(tmp_path / "elsewhere" / ("" if place.count("/") == 2 else "in"))
        with pytest.raises(CheckpointError, match=r"names the shard '.*', whose folder is a link"):
            read_weight_map(ckpt / INDEX)
    direct = tmp_path / "direct"
    direct.symlink_to(tmp_path / "elsewhere" / "in")
    folder(tmp_path / "elsewhere" / "in", {INDEX: index({"a": "x.safetensors"})})
    assert list(open_checkpoint(direct).tensors) == ["a"]


def test_refuses_an_absent_path(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").touch()
    for name, why in {
        "absent": "",
        "circle": ": Too many levels of symbolic links",
        "file/x": ": Not a directory",
        "x" * 300: ": File name too long",
    }.items():
        for opened in (open_checkpoint, open_masks):
            with pytest.raises(CheckpointError, match=f"{name[:200]}.*: no such file{why}$"):
                opened(tmp_path / name)


ABSENT: dict[str, str] = {
    # What is given, of which nothing is there -> what is said of it.
    "org/m-8B": "; if it is a model of the Hugging Face hub, pip install 'sparseprune[remote]' first",
    "https://huggingface.co/org/model": "; it is a URL, so download it and give the file or directory",
    "hf://org/model": "; it is a URL, so download it and give the file or directory",
    "model": "",
    "org/model.safetensors": "",
    "here/model": "",
    "a/b/c": "",
    "./model": "",
    "here/lama": "; did you mean here/llama?",
    "heer": "; did you mean here?",
    "dangling": ": it is a link to away, which is not there",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_there_is_told_with_what_it_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "llama").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to("away")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(Path(name))
    assert str(error.value) == f"{Path(name)}: no such file{ABSENT[name]}"


FOREIGN = {
    "m.onnx": (b"\x08\x07\x12\x07pytorch\x1a\x05",
        "it is an ONNX file; sparseprune reads safetensors, so prune"),
    "m.msgpack": (b"\x81\xa6params\x81\xa5", "it is a Flax file; sparseprune reads safetensors"),
    "m.tflite": (b"\x1c\0\0\0TFL3\0\0", "it is a TensorFlow Lite file; sparseprune reads safetensors"),
    INDEX: (b'{"metadata": {}',
        "it is an index, which only names the files; give the directory that it lies in"),
    "x.json": (b'{"weight_map": {}}', "it is an index, which only names the files; give the directory"),
    "config.json": (b'{"a": 12345}', "it is a JSON file; give the directory that it lies in"),
    "m.gguf": (b"GGUF\3\0\0\0\0\0", "it is a GGUF file; sparseprune reads safetensors, so prune"),
    "pytorch_model.bin": (b"PK\3\4\0\0\0\0", r"it looks like a pickle \(torch.save\); pickles can run code"),
    "m.pt": (b"\x80\2ctorch", r"it looks like a pickle \(torch.save\)"),
    "m.zip": (b"PK\3\4\0\0\0\0\0", "it is a zip archive; unpack it"),
    "m.npz": (b"PK\3\4\0\0\0\0\0", "it is a file of numpy arrays; sparseprune reads safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_formats_are_told_by_name(tmp_path: Path, name: str) -> None:
    content, line = FOREIGN[name]
    folder(tmp_path, {name: content})
    with pytest.raises(CheckpointError, match=f"{name}: not a safetensors file: {line}"):
        open_checkpoint(tmp_path / name)


FOLDERS = {
    "onnx": ({"config.json": b"{}", "model.onnx": b"1"}, ", only model.onnx; sparseprune reads safetensors"),
    "gguf": ({"m-Q4_K_M.gguf": b"1"}, ", only m-Q4_K_M.gguf; sparseprune reads safetensors, so prune"),
    "pickles": ({f"w-{n}.bin": b"1" for n in range(6)},
        ", only w-0.bin, w-1.bin, w-2.bin, w-3.bin and 2 more"),
    "adapter": ({"adapter_config.json": b"{}", "adapter_model.bin": b"1"},
        ", only an adapter; it is a LoRA adapter, so merge it into its base model first"),
    "archive": ({"model.zip": b"1"}, ", only model.zip; unpack it"),
    "pipeline": ({"model_index.json": b"{}", "unet/x.safetensors": b"1", "vae/x.safetensors": b"1"},
        " at its top, it is a pipeline of several models; give one of its folders that do: unet, vae"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_without_safetensors_are_told_by_what_they_hold(tmp_path: Path, name: str) -> None:
    content, line = FOLDERS[name]
    folder(tmp_path / "it", content)
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(tmp_path / "it")
    assert str(error.value).startswith(f"{tmp_path / 'it'}: holds no safetensors file{line}")
    assert "\n" not in str(error.value)


def test_a_model_in_a_download_cache_is_told_with_its_snapshot(tmp_path: Path) -> None:
    at = tmp_path / "models--org--name"
    for commit in ("a1", "b2"):
        folder(at / "snapshots" / commit, {"model.safetensors": weights("a")})
    with pytest.raises(CheckpointError, match=r"it is a model in a download cache; give .*/snapshots/a1$"):
        open_checkpoint(at)
    folder(at, {"refs/main": b"b2"})
    with pytest.raises(CheckpointError, match=r"it is a model in a download cache; give .*/snapshots/b2$"):
        open_checkpoint(at)


def test_what_may_not_be_read_is_the_machines_error(tmp_path: Path) -> None:
    ckpt = folder(tmp_path / "ckpt", {"model.safetensors": weights("a")})
    (ckpt / "model.safetensors").chmod(0)
    if os.access(ckpt / "model.safetensors", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(MachineError, match=r"model.safetensors: cannot be read: Permission denied"):
        open_checkpoint(ckpt)


def test_a_directory_that_fails_is_the_machines_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: object) -> None:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(os, "scandir", fail)
    ckpt = folder(tmp_path / "ckpt", {"model.safetensors": weights("a")})
    with pytest.raises(MachineError, match="ckpt: cannot be read: Input/output error"):
        open_checkpoint(ckpt)


@pytest.mark.parametrize(
    ("content", "config"),
    [(b'{"a": [1]}', {"a": [1]}), (b'{"a": 1, "a": Infinity}', {"a": float("inf")}), (None, None)],
)
def test_reads_the_config_in_a_directory_and_beside_a_file(
    tmp_path: Path, content: bytes | None, config: dict[str, Any] | None
) -> None:
    folder(
        tmp_path, {"model.safetensors": weights("a")} | ({} if content is None else {"config.json": content})
    )
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert read_config(open_checkpoint(path)) == config


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"[]", "wanted a JSON object"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"a": %s}' % (b"9" * 5000), "cannot be read as JSON"),
    ],
)
def test_refuses_a_config_that_is_no_object(tmp_path: Path, content: bytes, fragment: str) -> None:
    checkpoint = open_checkpoint(
        folder(tmp_path, {"model.safetensors": weights("a"), "config.json": content})
    )
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{fragment}"):
        read_config(checkpoint)


def test_reads_any_part_of_a_tensor_from_many_threads(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, {**SHARDS, INDEX: index(MAP)}))
    with TensorReader() as reader, ThreadPoolExecutor(8) as pool:
        for name, content in {"b": b"\1\2\3", "a": b"\4\5\6", "c": b"\1\2\3"}.items():
            stored = checkpoint.tensors[name]
            parts = [(begin, end) for begin in range(4) for end in range(begin, 4)]
            read = pool.map(lambda part, stored=stored: reader.read(stored, *part), parts * 20)
            assert list(read) == [content[begin:end] for begin, end in parts] * 20
            assert reader.read(stored, 1) == content[1:]


@pytest.mark.parametrize("part", [(-1, 2), (0, 4), (2, 1), (4, None)])
def test_refuses_to_read_outside_of_a_tensor(tmp_path: Path, part: tuple[int, int | None]) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, SHARDED))
    with TensorReader() as reader, pytest.raises(ValueError, match="which has 3"):
        reader.read(checkpoint.tensors["b"], *part)


def test_puts_short_reads_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:1]], offset)

    monkeypatch.setattr(os, "preadv", short)
    checkpoint = open_checkpoint(folder(tmp_path, SHARDED))
    with TensorReader() as reader:
        assert reader.read(checkpoint.tensors["a"]) == b"\4\5\6"


def test_fills_a_buffer_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:2]], offset)

    monkeypatch.setattr(os, "preadv", short)
    stored = open_checkpoint(folder(tmp_path, SHARDED)).tensors["a"]
    with TensorReader() as reader:
        array = np.full((2, 3), 9, np.uint8)
        reader.read_into(stored, 0, array[1])
        assert array.tolist() == [[9, 9, 9], [4, 5, 6]]
        reader.read_into(stored, 2, array[0, 1:2])
        assert array.tolist() == [[9, 6, 9], [4, 5, 6]]
        reader.read_into(stored, 3, bytearray())
        reader.read_into(stored, 1, np.zeros((0, 2)))
        for begin, size in ((-1, 2), (0, 4), (3, 1)):
            with pytest.raises(ValueError, match="of 'a', which has 3"):
                reader.read_into(stored, begin, bytearray(size))


def test_an_input_that_vanished_after_its_header_was_read_is_the_machines_error(tmp_path: Path) -> None:
    path = folder(tmp_path, {"m.safetensors": weights("a")}) / "m.safetensors"
    stored = open_checkpoint(path).tensors["a"]
    path.unlink()
    with (
        TensorReader() as reader,
        pytest.raises(MachineError, match=r"/m\.safetensors: cannot be read any more: No su"),
    ):
        reader.read_into(stored, 0, bytearray(3))


def test_notices_a_file_that_changed_its_size(tmp_path: Path) -> None:
    path = folder(tmp_path, {"m.safetensors": weights("a", "b")}) / "m.safetensors"
    stored = open_checkpoint(path).tensors["b"]
    with TensorReader() as reader:
        reader.read(stored)
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(MachineError, match=r"m\.safetensors: file was truncated while it was read"):
            reader.read(stored)
        with pytest.raises(MachineError, match=r"it ends at byte \d+, had \d+"):
            reader.read_into(stored, 0, bytearray(3))
    with TensorReader() as reader:
        for _ in range(2):
            with pytest.raises(MachineError, match=r"m\.safetensors: file was truncated while it was read"):
                reader.read(stored, 0, 1)
        os.truncate(path, path.stat().st_size + 2)
        with pytest.raises(MachineError, match="file grew while it was read"):
            reader.read(stored)
        path.unlink()
        with pytest.raises(MachineError, match=r"m\.safetensors: cannot be read any more: No such file"):
            reader.read(stored)


def test_closes_what_it_opened(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, SHARDED))
    before = open_files()
    with TensorReader() as reader:
        for stored in [*checkpoint.tensors.values()] * 3:
            reader.read(stored)
        assert open_files() == before + 2
    assert open_files() == before


def test_a_config_that_fails_or_has_no_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = open_checkpoint(folder(tmp_path, {"model.safetensors": weights("a")}))
    config = tmp_path / "config.json"
    config.touch()
    os.truncate(config, 100_000_001)
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 100.00 MB"):
        read_config(checkpoint)

    os.truncate(config, 2)
    monkeypatch.setattr(Path, "read_bytes", failing(OSError, 5, "Input/output error"))
    with pytest.raises(MachineError, match=r"config\.json: cannot be read: Input/output error"):
        read_config(checkpoint)


def test_a_config_that_is_not_there_keeps_nothing_in_memory(tmp_path: Path) -> None:
    class Large:
        """What the caller has at hand."""

    checkpoint = open_checkpoint(folder(tmp_path, {"model.safetensors": weights("a")}))

    def ask() -> weakref.ref[Large]:
        large = Large()
        assert read_config(checkpoint) is None
        return weakref.ref(large)

    was_on = gc.isenabled()
    gc.disable()  # as while a plan is made
    try:
        assert ask()() is None
    finally:
        if was_on:
            gc.enable()
