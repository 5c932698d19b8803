"""Small directories of Llama and Mixtral to remove from, and what has to be left of them, by plain loops."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.files import content
from tests.commands import Said, ok
from tests.samples import without_marks

Tensors = dict[str, torch.Tensor]
HIDDEN, WIDTH, VOCABULARY, EXPERTS = 8, 16, 12, 4
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05, "vocab_size": VOCABULARY,
}  # fmt: skip
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
MIXTRAL["architectures"] = ["MixtralForCausalLM"]
UP = "model.layers.0.mlp.up_proj.weight"
HALF = ("--set", "sparsity=0.5")


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype, the same ones for the same seed."""

    dtype: torch.dtype = torch.float32
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(5))

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


def attention(draw: Draw, at: str) -> Tensors:
    """The norms and the attention of a layer: 4 query heads of 2, two for each key/value head."""
    kv = HIDDEN // 2
    return {
        f"{at}.input_layernorm.weight": draw(HIDDEN),
        f"{at}.self_attn.q_proj.weight": draw(HIDDEN, HIDDEN),
        f"{at}.self_attn.k_proj.weight": draw(kv, HIDDEN),
        f"{at}.self_attn.v_proj.weight": draw(kv, HIDDEN),
        f"{at}.self_attn.o_proj.weight": draw(HIDDEN, HIDDEN),
        f"{at}.post_attention_layernorm.weight": draw(HIDDEN),
    }


def decoder(dtype: torch.dtype = torch.float32, layers: int = 2) -> Tensors:
    """As transformers names a small Llama, with tensors of no dimension and of no element beside."""
    draw = Draw(dtype)
    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= attention(draw, at) | {
            f"{at}.mlp.gate_proj.weight": draw(WIDTH, HIDDEN),
            f"{at}.mlp.up_proj.weight": draw(WIDTH, HIDDEN),
            f"{at}.mlp.down_proj.weight": draw(HIDDEN, WIDTH),
        }
    more = {
        "extra.empty": torch.zeros(0, 3),
        "extra.scalar": torch.tensor(2.5),
        "extra.flags": torch.ones(3) > 0,
    }
    return tensors | more | {"model.norm.weight": draw(HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}


def mixture(dtype: torch.dtype = torch.float32) -> Tensors:
    """As transformers stores a small Mixtral."""
    draw = Draw(dtype)
    tensors = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        tensors |= attention(draw, at)
        tensors[f"{at}.block_sparse_moe.gate.weight"] = draw(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            inside = f"{at}.block_sparse_moe.experts.{expert}"
            tensors |= {
                f"{inside}.w1.weight": draw(WIDTH, HIDDEN),
                f"{inside}.w2.weight": draw(HIDDEN, WIDTH),
                f"{inside}.w3.weight": draw(WIDTH, HIDDEN),
            }
    return tensors | {"model.norm.weight": draw(HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}


def write(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None, shards: int = 1) -> Path:
    """A directory; with several shards every one has a part of every layer."""
    folder.mkdir()
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        weight_map: dict[str, str] = {}
        for number in range(shards):
            part = {name: tensors[name] for name in names[number::shards]}
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            save_file(part, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / "model.safetensors.index.json").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@dataclass(frozen=True)
class Case:
    """A spec with options, for a model, and what becomes of its config."""

    spec: str
    options: tuple[str, ...]
    changes: Mapping[str, Any]
    mixed: bool = False

    @property
    def config(self) -> dict[str, Any]:
        return MIXTRAL if self.mixed else LLAMA

    def tensors(self, dtype: torch.dtype = torch.float32) -> Tensors:
        return mixture(dtype) if self.mixed else decoder(dtype)


CASES = {
    "channels": Case("mlp-channels", (), {"intermediate_size": 12}),
    "heads": Case("heads", HALF, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2}),
    "layers": Case("layers", HALF, {"num_hidden_layers": 1}),
    "experts": Case("experts", HALF, {"num_local_experts": 2}, mixed=True),
    "channels of experts": Case("expert-channels", (), {"intermediate_size": 12}, mixed=True),
}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def read(folder: Path) -> Tensors:
    """All tensors of a directory, as bytes of their shape and one more dimension."""
    found: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        more = load_file(path)
        assert not found.keys() & more.keys()
        found |= more
    return found


def as_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tensor.shape, bytes(flat.view(torch.uint8).numpy()) if flat.numel() else b""


def expected(dense: Tensors, masks: Mapping[str, torch.Tensor]) -> Tensors:
    """What has to be left, by plain loops over names and indices."""
    gone = {name for name, mask in masks.items() if not mask.any()}
    lists = members_of(dense)
    vanished = {
        (before, number)
        for before, numbers in lists.items()
        for number, names in numbers.items()
        if set(names) <= gone
    }
    left = {}
    for name, tensor in dense.items():
        if not any((before, number) in vanished for before, number in places(name)):
            left[renumbered(name, vanished)] = at_survivors(name, tensor, masks, vanished)
    return left


def places(name: str) -> list[tuple[str, int]]:
    """Every list that a name passes through, and its number there."""
    return [(name[: found.start()], int(found[1])) for found in re.finditer(r"\.(\d+)(?=\.)", name)]


def members_of(dense: Tensors) -> dict[str, dict[int, list[str]]]:
    lists: dict[str, dict[int, list[str]]] = {}
    for name in dense:
        for before, number in places(name):
            lists.setdefault(before, {}).setdefault(number, []).append(name)
    return lists


def renumbered(name: str, vanished: set[tuple[str, int]]) -> str:
    result = name
    for before, number in reversed(places(name)):
        lower = sum(other < number for place, other in vanished if place == before)
        result = f"{before}.{number - lower}{result[len(before) + 1 + len(str(number)) :]}"
    return result


def at_survivors(
    name: str, tensor: torch.Tensor, masks: Mapping[str, torch.Tensor], vanished: set[tuple[str, int]]
) -> torch.Tensor:
    if name.endswith("block_sparse_moe.gate.weight"):  # a row for each expert
        experts = name.removesuffix("gate.weight") + "experts"
        rows = [row for row in range(len(tensor)) if (experts, row) not in vanished]
        return rows_of(tensor, 0, rows)
    if name not in masks:
        return tensor
    mask = masks[name]
    for dim in range(mask.ndim):
        rows = [index for index in range(mask.shape[dim]) if bool(mask.select(dim, index).any())]
        tensor = rows_of(tensor, dim, rows)
    return tensor


def rows_of(tensor: torch.Tensor, dim: int, rows: list[int]) -> torch.Tensor:
    """index_select, which not every dtype has."""
    return torch.stack([tensor.select(dim, row) for row in rows], dim)


def removed(*words: object) -> Said:
    return ok("remove", *words)


def weights(folder: Path) -> dict[str, bytes]:
    """All files but the report, which tells times and names, and without what tells of the command."""
    files = {name: data for name, data in content(folder).items() if not name.endswith("report.json")}
    return without_marks(files)
