"""Recognizes files of other formats and says what to do with them.

Owns signatures and advice. Called where a header or a folder is no safetensors.
"""

from __future__ import annotations

import codecs
import os
import re
from difflib import get_close_matches
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

# Formats of whole models, under any file name; and names of pickles that hold weights.
_WEIGHTS = re.compile(
    r".*\.(?:gguf|ggml|onnx(?:[._]data(?:_\d+)?)?|h5|hdf5|keras|msgpack|ot|ckpt|ckpt\.(?:index|meta)"
    r"|data-\d+-of-\d+|distcp|tflite|mlmodel|pte|nemo|engine|pdparams)"
    r"|(?:.*[._-])?(?:model|models|weights?|consolidated|checkpoint|ckpt|optim_states)(?:[._-].*)?"
    r"\.(?:bin|pt|pth|pkl|pickle|npz)"
    r"|openvino_.*model.*\.xml|saved_model\.pb",
    re.IGNORECASE,
)
# Files that trainers write beside a model to continue; none holds weights.
_TRAINING = re.compile(r"(?:optimizer|scheduler|scaler|rng_state|random_states|training_args)(?:[._-].*)?")

_LFS = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"
_PICKLE_PROTOCOLS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Possessive, so that a page of many comments is read once.
_HTML = re.compile(
    rb"(?:<\?xml[^>]*>|<!--.*?-->|\s)*+<(?:!doctype html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
CONVERTED = "sparseprune reads safetensors, so prune the model before it is converted"
UNPACK = "unpack it"
MERGE = (
    "it is a LoRA adapter, so merge it into its base model first "
    "(PeftModel.from_pretrained, merge_and_unload, save_pretrained) and prune that"
)
# Offset of a format's mark, the mark, the format, the advice.
_MARKS = (
    (0, b"GGUF", "a GGUF file", CONVERTED),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file", CONVERTED),
    (0, b"\x93NUMPY", "a numpy array", CONVERTED),
    (0, b"\x1f\x8b", "a gzip archive", UNPACK),
    (4, b"TFL3", "a TensorFlow Lite file", CONVERTED),
    (0, b"BZh", "a bzip2 archive", UNPACK),
    (0, b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (257, b"ustar", "a tar archive", UNPACK),
)
# Formats without a mark, by the ends of names.
_SUFFIXES = {
    ".onnx": "an ONNX file",
    ".msgpack": "a Flax file",
    ".ot": "a file of Rust's tch",
    ".mlmodel": "a Core ML file",
    ".pb": "a TensorFlow file",
}
_ZIPPED = {
    ".zip": ((0, _ZIP, "a zip archive", UNPACK),),
    ".npz": ((0, _ZIP, "a file of numpy arrays", CONVERTED),),
    ".keras": ((0, _ZIP, "a Keras file", CONVERTED),),
}
_ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
_ADDRESSES = ("s3://", "gs://", "az://", "hf://")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_NO_MODELS = (".safetensors", ".toml", ".json", ".txt")  # ends of names of files
READS_HUB = "pip install 'sparseprune[remote]'"
# With 8 bytes of text at the start, the length in a real header would be beyond every disk.
_TEXT = 8
_SHOWN = 60
_COMPARED, _ALIKE = 1000, 0.7  # names in a folder among which a nearest one is looked for, and how near it is
_SUFFIX = ".safetensors"
_ADAPTED = re.compile(r"[._]lora_|[._]lora[._]|\.modules_to_save\.|\.(?:hada|lokr|oft|ia3)_")


def foreign_format(name: str, head: bytes) -> str | None:
    """The format of a file with these first bytes (some hundred), with advice; None if it is unknown.

    >>> foreign_format("m.safetensors", b"GGUF0000")
    'it is a GGUF file; sparseprune reads safetensors, so prune the model before it is converted'
    """
    if head.startswith(_LFS):
        pointer = "it is a git-lfs pointer, the weights were not downloaded"
        return f"{pointer}; run `git lfs pull` in its repository"
    text, suffix = head.removeprefix(_BYTE_ORDER_MARK), PurePath(name).suffix.lower()
    if _HTML.match(text):
        return "it is an HTML page saved under this name; download the file itself (a `resolve` link)"
    for at, mark, what, advice in (*_MARKS, *_ZIPPED.get(suffix, ())):
        if head.startswith(mark, at):
            return f"it is {what}; {advice}"
    if looks_pickled(head) or suffix in PICKLE_SUFFIXES:
        return "it looks like a pickle (torch.save); " + conversion_advice(name)
    if suffix == ".json":
        is_index = b'"weight_map"' in head or ".index." in name
        what = "an index, which only names the files" if is_index else "a JSON file"
        return f"it is {what}; give the directory that it lies in"
    return f"it is {_SUFFIXES[suffix]}; {CONVERTED}" if suffix in _SUFFIXES else _as_text(text)


def missing_advice(path: str) -> str:
    """What a path without a file may be instead, and what to do; empty for an ordinary path.

    >>> missing_advice("https://models/Qwen3-8B")
    '; it is a URL, so download it and give the file or directory'
    """
    if path.startswith(_ADDRESSES):
        return ""
    if _URL.match(path):
        return "; it is a URL, so download it and give the file or directory"
    if is_hub_id(path):
        return f"; if it is a model of the Hugging Face hub, {READS_HUB} first"
    named = {name.removesuffix(_SUFFIX): name for name in _names_in(Path(path).parent)}
    close = get_close_matches(PurePath(path).name.removesuffix(_SUFFIX), named, n=1, cutoff=_ALIKE)
    return f"; did you mean {Path(path).parent / named[close[0]]}?" if close else ""


def is_hub_id(path: str) -> bool:
    """Whether a path that leads nowhere may be a model of the hub: two words, the first one no folder here.

    >>> is_hub_id("Qwen/Qwen3-8B"), is_hub_id("./Qwen3-8B"), is_hub_id("Qwen/model.safetensors")
    (True, False, False)
    """
    return (
        _HUB_ID.fullmatch(path) is not None
        and not path.endswith(_NO_MODELS)
        and not Path(path).parent.exists()
    )


def _names_in(folder: Path) -> list[str]:
    """Some names in a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return [entry.name for entry, _ in zip(found, range(_COMPARED), strict=False)]
    except OSError:
        return []


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are those of a LoRA adapter, and of nothing else.

    >>> is_adapter(["base_model.model.h.0.attn.lora_A.weight"]), is_adapter(["h.0.attn.weight"])
    (True, False)
    """
    found = [_ADAPTED.search(name) is not None for name in names]
    return bool(found) and all(found)


def is_archive(name: str) -> bool:
    """Whether a file has a name of archives, which may hold a model."""
    return name.lower().endswith(_ARCHIVES)


def names_weights(name: str) -> bool:
    """Whether a file that is no safetensors file has a name of files with a model's weights.

    >>> names_weights("pytorch_model-00001-of-00002.bin"), names_weights("training_args.bin")
    (True, False)
    """
    return _WEIGHTS.fullmatch(name) is not None


def names_training_state(name: str) -> bool:
    """Whether a file has a name of what a trainer keeps beside the weights: moments, schedules, generators.

    >>> names_training_state("optimizer.pt"), names_training_state("zero_optim_states.pt")
    (True, False)
    """
    return _TRAINING.fullmatch(name) is not None


def looks_pickled(head: bytes) -> bool:
    """Whether torch.save or pickle writes files with these first bytes."""
    return head.startswith((_ZIP, *_PICKLE_PROTOCOLS))


def _as_text(head: bytes) -> str | None:
    """A server's answer in place of a file: an error in JSON, in XML or in plain words."""
    try:
        # Incremental: the last character may be cut in two.
        words = " ".join(codecs.getincrementaldecoder("utf-8")().decode(head).split())
    except UnicodeDecodeError:
        return None
    if len(head) < _TEXT or not words.isprintable():
        return None
    found = words if len(words) <= _SHOWN else words[:_SHOWN] + "..."
    return f"it is a text that begins {found!r}, perhaps a server's answer; download the file itself again"


def conversion_advice(name: str) -> str:
    """How to make a safetensors file from a pickle of this name."""
    target = PurePath(name).stem + ".safetensors"
    return (
        "pickles can run code when they are opened, so convert it to safetensors once, where you trust it: "
        f"safetensors.torch.save_file({{k: t.contiguous().clone() for k, t in torch.load({name!r}, "
        f'map_location="cpu", weights_only=True).items()}}, {target!r}, metadata={{"format": "pt"}}), '
        "or save_pretrained of the loaded model"
    )
