"""Random checkpoints to measure with: a Llama-style decoder of a wanted size, or 50,000 small tensors.

Run by hand: `python -m tests.benchmarks.checkpoints OUT --gigabytes 2.2`. One shard is in memory at a time,
and the index is written last: a directory that has one is complete.
"""

import argparse
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
SHARD_BYTES = 500_000_000
SMALL_SHARD_BYTES = 10_000_000  # of the checkpoint of many tensors, which has 50 MB

Shaped = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder in the words of config.json; `experts` of 0 means one dense MLP a layer."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    num_hidden_layers: int = 0
    num_experts: int = 0

    def tensors(self) -> Iterator[Shaped]:
        """Every tensor with its shape, in the order of the shards."""
        hidden = self.hidden_size
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            yield from self._attention(f"model.layers.{layer}")
            yield from self._mlp(f"model.layers.{layer}.mlp")
        yield "model.norm.weight", (hidden,)
        if not self.num_experts:
            yield "lm_head.weight", (self.vocab_size, hidden)

    def config(self) -> dict[str, object]:
        """What config.json says: a Llama, or with experts a Qwen-MoE that ties its embeddings."""
        sizes = {name: value for name, value in vars(self).items() if name != "num_experts"}
        if not self.num_experts:
            return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes}
        experts = {"num_experts": self.num_experts, "moe_intermediate_size": self.intermediate_size}
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
        return {**kind, **sizes, **experts, "tie_word_embeddings": True}

    def _attention(self, prefix: str) -> Iterator[Shaped]:
        hidden = self.hidden_size
        key_value = hidden // self.num_attention_heads * self.num_key_value_heads
        for name, rows in (("q", hidden), ("k", key_value), ("v", key_value), ("o", hidden)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (hidden,)

    def _mlp(self, prefix: str) -> Iterator[Shaped]:
        hidden, intermediate = self.hidden_size, self.intermediate_size
        if self.num_experts:
            yield f"{prefix}.gate.weight", (self.num_experts, hidden)
        for expert in [f".experts.{number}" for number in range(self.num_experts)] or [""]:
            yield f"{prefix}{expert}.gate_proj.weight", (intermediate, hidden)
            yield f"{prefix}{expert}.up_proj.weight", (intermediate, hidden)
            yield f"{prefix}{expert}.down_proj.weight", (hidden, intermediate)


# The most parameters that a width serves. The embeddings, which are only copied, stay near a tenth of all.
WIDTHS = (
    (1e8, Decoder(512, 1408, 8, 2, 4000)),
    (5e8, Decoder(1024, 2816, 16, 4, 16000)),
    (2e9, Decoder(2048, 5632, 32, 4, 32000)),  # 22 layers of it are the usual decoder of 1.1e9 parameters
    (math.inf, Decoder(3072, 8192, 24, 8, 64000)),
)
MANY_TENSORS = Decoder(32, 16, 4, 2, 256, num_hidden_layers=39, num_experts=425)  # 50,000 of them


def decoder(parameters: float) -> Decoder:
    """A decoder of about so many parameters: the width that serves, and the layers that come nearest."""
    width = next(width for most, width in WIDTHS if parameters <= most)
    without, with_one = (
        sum(math.prod(shape) for _, shape in replace(width, num_hidden_layers=layers).tensors())
        for layers in (0, 1)
    )
    layers = round((parameters - without) / (with_one - without))
    return replace(width, num_hidden_layers=max(1, layers))


def shards(tensors: Iterable[Shaped], itemsize: int, most: int) -> Iterator[list[Shaped]]:
    """The tensors in order, cut where a shard would pass `most` bytes; a larger tensor is a shard alone."""
    shard: list[Shaped] = []
    size = 0
    for name, shape in tensors:
        nbytes = math.prod(shape) * itemsize
        if shard and size + nbytes > most:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += nbytes
    yield shard


def write(folder: Path, model: Decoder, dtype: torch.dtype, most: int = SHARD_BYTES) -> int:
    """Write config.json, the shards of at most `most` bytes and the index; gives the bytes of all tensors."""
    folder.mkdir(parents=True)
    config = model.config() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generator = torch.Generator().manual_seed(0)
    cut = list(shards(model.tensors(), dtype.itemsize, most))
    weight_map: dict[str, str] = {}
    size = 0
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        tensors = {name: _draw(shape, dtype, generator) for name, shape in shard}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return size


def write_hollow(folder: Path, model: Decoder, layers: Collection[int]) -> int:
    """As `write`, in bf16: these layers and what is in none; the other layers are zeros, which are holes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config() | {"torch_dtype": "bfloat16"}) + "\n")
    generator = torch.Generator().manual_seed(0)
    drawn = tuple(f"model.layers.{layer}." for layer in layers)
    cut = list(shards(model.tensors(), 2, SHARD_BYTES))
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        size = 0
        for name, shape in shard:
            end = size + 2 * math.prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [size, end]}
            size = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + size)
            for name, shape in shard:
                tensor = _draw(shape, torch.bfloat16, generator) if _is_full(name, drawn) else None
                if tensor is None:
                    stream.seek(2 * math.prod(shape), os.SEEK_CUR)
                else:
                    stream.write(tensor.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys((name for name, _ in shard), file)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index) + "\n")
    return total


def _is_full(name: str, drawn: tuple[str, ...]) -> bool:
    return name.startswith(drawn) or ".layers." not in name or "norm" in name


def _draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Ones for the vectors of norms, else a normal distribution as of fresh weights."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor.fill_(1) if len(shape) == 1 else tensor.normal_(0, 0.02, generator=generator)


def main() -> None:
    """Write what the command line asks for, and say what it was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="a directory that does not exist")
    parser.add_argument(
        "--gigabytes", type=float, default=2.2, help="of all tensors of a decoder, 10^9 bytes"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--kind", choices=("decoder", "many-tensors"), default="decoder")
    asked = parser.parse_args()
    dtype = DTYPES[asked.dtype]
    if asked.kind == "decoder":
        model, most = decoder(asked.gigabytes * 1e9 / dtype.itemsize), SHARD_BYTES
    else:
        model, most = MANY_TENSORS, SMALL_SHARD_BYTES
    size = write(asked.out, model, dtype, most)
    print(f"{asked.out}: {sum(1 for _ in model.tensors()):,} tensors, {size:,} bytes")


if __name__ == "__main__":
    main()
