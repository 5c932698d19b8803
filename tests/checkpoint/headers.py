"""Headers as raw bytes, and what the safetensors package and our reader say of them."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

from sparseprune.checkpoint.header import read_header
from sparseprune.errors import CheckpointError

# What our reader refuses and the safetensors package accepts; only broken writers produce it.
STRICTER = (
    "stands twice in one object",
    "does not begin with '{'",
    "is a list, wanted an object with",
    "unknown dtype {",
)


def file_of(document: object, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(
    dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1), **more: object
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


def loaded(content: bytes) -> list[tuple[str, dict[str, Any]]]:
    tensors: list[tuple[str, dict[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
    return tensors


def verdict_of_package(content: bytes) -> bool:
    try:
        loaded(content)
    except SafetensorError:
        return False
    return True


def refusal(folder: Path, content: bytes) -> str | None:
    path = folder / "m.safetensors"
    path.write_bytes(content)
    try:
        read_header(path)
    except CheckpointError as error:
        text = str(error)
    else:
        return None
    assert str(path) in text
    assert "\n" not in text
    return text
