"""Small checkpoints for tests, and what the command line said of them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparseprune.checkpoint.discovery import MARKED
from sparseprune.checkpoint.statistics import STATISTICS_KEY

TWO_OF_FOUR = """
version = 1
[scope.proj]
tensors = "{layer}.{name}.weight"
block = [1, 1]
shape = [1, 4]
nnz = 2
"""

CHANNELS = """
version = 1
[block.up]
tensors = "{layer}.up.weight"
shape = [1, -1]
[block.bias]
tensors = "{layer}.up.bias"
shape = [1]
[block.down]
tensors = "{layer}.down.weight"
shape = [-1, 1]
[block_coupling.channel]
blocks = ["up", "bias", "down"]
orders = [[0, 1], [0, 1], [1, 0]]
[scope.mlp]
block = "channel"
shape = [-1, -1]
sparsity = 0.25
"""


def mlp_tensors(layers: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Per layer an up matrix (16, 8) with its bias and a down matrix (8, 16), and one norm vector."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = {"norm": draw(8)}
    for layer in range(layers):
        tensors |= {
            f"{layer}.up.weight": draw(16, 8),
            f"{layer}.up.bias": draw(16),
            f"{layer}.down.weight": draw(8, 16),
        }
    return tensors


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """A directory with these shards, their index, a config and a tokenizer in a subfolder."""
    folder.mkdir()
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file, metadata={"format": "pt", "shard": file})
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "test"}')
    (folder / "extra").mkdir()
    (folder / "extra" / "tokenizer.txt").write_text("a b c")
    return folder


def save_statistics(
    path: Path, kind: str, tensors: Mapping[str, torch.Tensor], **weights: Mapping[str, int]
) -> None:
    """As calibrate writes them: `weights` of each tensor, with the dimension of their inputs, or its own."""
    of = {name: weights.get(name, {name: 1}) for name in tensors}
    save_file(dict(tensors), path, metadata={STATISTICS_KEY: json.dumps({"kind": kind, "weights": of})})


def write_spec(folder: Path, text: str) -> Path:
    """The text as a spec file."""
    path = folder / "spec.toml"
    path.write_text(text)
    return path


def config_of(folder: Path) -> dict[str, Any]:
    """The config.json in a folder, without the mark that outputs have."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config.pop("sparseprune", None)
    return config


def without_marks(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Files of an output but for what tells of the command: no card, no mark in config and headers."""
    left = {
        name: unmarked(data) if name.endswith(".safetensors") else data
        for name, data in files.items()
        if name != "README.md"
    }
    if "config.json" in left:
        config = json.loads(left["config.json"])
        config.pop("sparseprune", None)
        left["config.json"] = json.dumps(config).encode()
    return left


def unmarked(data: bytes) -> bytes:
    """The bytes of a safetensors file without the mark in its header and the spaces after that."""
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    metadata = {key: text for key, text in header.pop("__metadata__", {}).items() if key not in MARKED}
    first = {"__metadata__": metadata} if metadata else {}
    text = json.dumps(first | header, ensure_ascii=False, separators=(",", ":")).encode()
    return text + data[begin:]
