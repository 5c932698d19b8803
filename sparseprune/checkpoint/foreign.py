"""What a file is that is no safetensors file, and what to do about it.

Owns the looks of the usual mistakes: pickles, git-lfs pointers, saved web pages, other weight formats.
Decides nothing: header.py asks when the first bytes of a file are no safetensors header, source.py
when a folder holds no safetensors at all.
"""

from __future__ import annotations

from pathlib import PurePath

PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

_LFS = b"version https://git-lfs.github.com/spec/"
_ZIP = b"PK\x03\x04"
_PICKLE_PROTOCOLS = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))
_HTML = (b"<!doctype html", b"<html")
_OTHER_FORMATS = {b"GGUF": "a GGUF file", b"\x89HDF\r\n\x1a\n": "an HDF5 file"}


def foreign_format(name: str, head: bytes) -> str | None:
    """What a file with these first bytes (some hundred) is, with advice; None if it is nothing known.

    >>> foreign_format("m.safetensors", b"GGUF0000")
    'it is a GGUF file; sparseprune reads safetensors, so prune the model before it is converted'
    """
    if head.startswith(_LFS):
        return (
            "it is a git-lfs pointer, the weights were not downloaded; run `git lfs pull` in its repository"
        )
    if head.lstrip().lower().startswith(_HTML):
        return "it is an HTML page saved under this name; download the file itself (a `resolve` link)"
    if head.startswith((_ZIP, *_PICKLE_PROTOCOLS)) or PurePath(name).suffix.lower() in PICKLE_SUFFIXES:
        return "it looks like a pickle (torch.save); " + conversion_advice(name)
    for magic, what in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return f"it is {what}; sparseprune reads safetensors, so prune the model before it is converted"
    return None


def conversion_advice(name: str) -> str:
    """The sentence that says how to make a safetensors file out of a pickle of this name."""
    target = PurePath(name).stem + ".safetensors"
    return (
        "pickles can run code when they are opened, so convert it to safetensors once, where you trust it: "
        f"safetensors.torch.save_file({{k: t.contiguous().clone() for k, t in torch.load({name!r}, "
        f'map_location="cpu", weights_only=True).items()}}, {target!r}, metadata={{"format": "pt"}}), '
        "or save_pretrained of the loaded model"
    )
