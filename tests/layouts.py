"""Checkpoints of published sizes as files with holes: headers, index and config take disk, tensors none.

Names, shapes, dtypes and the number of shards are those of the public configs and indices of the models.
Nothing here reads a tensor: the data are holes, so that a plan of a terabyte is tried on any disk.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparseprune.checkpoint.header import lay_out
from sparseprune.engine.dtypes import DTYPES
from sparseprune.engine.grids import prod

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, dtype, shape."""

_FP8_BLOCK = 128  # codes that share a scale, along rows and along columns


@dataclass(frozen=True)
class DeepSeek:
    """Latent attention and many experts, as DeepSeek-V3 and Kimi-K2 store them: FP8 with scales of blocks."""

    name: str
    shards: int
    vocabulary: int
    heads: int
    experts: int
    dense_layers: int
    layers: int = 61
    heads_ahead: int = 0
    hidden: int = 7168
    intermediate: int = 18432
    of_expert: int = 2048

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "first_k_dense_replace": self.dense_layers,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "kv_lora_rank": 512,
            "moe_intermediate_size": self.of_expert,
            "moe_layer_freq": 1,
            "n_group": 8 if self.experts % 8 == 0 else 1,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": self.heads_ahead,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
            },
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "torch_dtype": "bfloat16",
            "v_head_dim": 128,
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[Tensor]:
        """In the order in which they are stored."""
        words = (self.vocabulary, self.hidden)
        yield "model.embed_tokens.weight", "BF16", words
        for layer in range(self.layers):
            yield from self._layer(layer)
        for layer in range(self.layers, self.layers + self.heads_ahead):
            at = f"model.layers.{layer}."
            yield f"{at}embed_tokens.weight", "BF16", words
            yield from _norms(at, self.hidden, "enorm", "hnorm")
            yield f"{at}eh_proj.weight", "BF16", (self.hidden, 2 * self.hidden)
            yield from self._layer(layer)
            yield from _norms(f"{at}shared_head.", self.hidden, "norm")
            yield f"{at}shared_head.head.weight", "BF16", words
        yield from _norms("model.", self.hidden, "norm")
        yield "lm_head.weight", "BF16", words

    def _layer(self, layer: int) -> Iterator[Tensor]:
        at = f"model.layers.{layer}."
        yield from _norms(at, self.hidden, "input_layernorm")
        yield from self._attention(f"{at}self_attn.")
        yield from _norms(at, self.hidden, "post_attention_layernorm")
        if layer < self.dense_layers:
            yield from _mlp(f"{at}mlp.", self.hidden, self.intermediate)
            return
        yield f"{at}mlp.gate.weight", "BF16", (self.experts, self.hidden)
        yield f"{at}mlp.gate.e_score_correction_bias", "F32", (self.experts,)
        for expert in range(self.experts):
            yield from _mlp(f"{at}mlp.experts.{expert}.", self.hidden, self.of_expert)
        yield from _mlp(f"{at}mlp.shared_experts.", self.hidden, self.of_expert)

    def _attention(self, at: str) -> Iterator[Tensor]:
        yield from _codes(f"{at}q_a_proj", 1536, self.hidden)
        yield from _norms(at, 1536, "q_a_layernorm")
        yield from _codes(f"{at}q_b_proj", self.heads * (128 + 64), 1536)
        yield from _codes(f"{at}kv_a_proj_with_mqa", 512 + 64, self.hidden)
        yield from _norms(at, 512, "kv_a_layernorm")
        yield from _codes(f"{at}kv_b_proj", self.heads * (128 + 128), 512)
        yield from _codes(f"{at}o_proj", self.hidden, self.heads * 128)


@dataclass(frozen=True)
class Llama:
    """A dense decoder in bf16, as Llama 3.1 stores it."""

    name: str
    shards: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    heads_of_keys: int
    vocabulary: int = 128_256

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads_of_keys,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": self.vocabulary,
        }

    def tensors(self) -> Iterator[Tensor]:
        """In the order of the layers."""
        keys = self.hidden // self.heads * self.heads_of_keys
        matrices = {
            "self_attn.q": (self.hidden, self.hidden),
            "self_attn.k": (keys, self.hidden),
            "self_attn.v": (keys, self.hidden),
            "self_attn.o": (self.hidden, self.hidden),
            "mlp.gate": (self.intermediate, self.hidden),
            "mlp.up": (self.intermediate, self.hidden),
            "mlp.down": (self.hidden, self.intermediate),
        }
        yield "model.embed_tokens.weight", "BF16", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            yield from _norms(at, self.hidden, "input_layernorm")
            for name, shape in matrices.items():
                yield f"{at}{name}_proj.weight", "BF16", shape
            yield from _norms(at, self.hidden, "post_attention_layernorm")
        yield from _norms("model.", self.hidden, "norm")
        yield "lm_head.weight", "BF16", (self.vocabulary, self.hidden)


Layout = DeepSeek | Llama

LLAMA_405B = Llama("Llama-3.1-405B", 191, 126, 16384, 53248, 128, 8)
DEEPSEEK_V3 = DeepSeek("DeepSeek-V3", 163, 129_280, 128, 256, 3, heads_ahead=1)
KIMI_K2 = DeepSeek("Kimi-K2", 61, 163_840, 64, 384, 1)


def with_layers(layout: DeepSeek, layers: int) -> DeepSeek:
    """The same of so many layers, in shards of about the same size."""
    return replace(layout, layers=layers, shards=max(1, layout.shards * layers // layout.layers))


def nbytes_of(tensor: Tensor) -> int:
    """The bytes of its data."""
    _, dtype, shape = tensor
    return prod(shape) * DTYPES[dtype].bits // 8


def shards_of(layout: Layout) -> list[list[Tensor]]:
    """The tensors in their order, cut into the shards of the layout, as equal as whole tensors allow."""
    tensors = list(layout.tensors())
    total = sum(map(nbytes_of, tensors))
    cut: list[list[Tensor]] = [[] for _ in range(layout.shards)]
    begin = 0
    for tensor in tensors:
        size = nbytes_of(tensor)
        cut[(begin + size // 2) * layout.shards // total].append(tensor)
        begin += size
    return [shard for shard in cut if shard]


def write(layout: Layout, folder: Path) -> int:
    """Write config.json, the shards, whose data are holes, and the index; gives the bytes of all tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(layout.config()))
    cut = shards_of(layout)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(cut, 1):
        file = f"model-{number:05d}-of-{len(cut):05d}.safetensors"
        with (folder / file).open("wb") as stream:
            header = lay_out(shard, {})
            stream.write(header.raw)
            size = sum(map(nbytes_of, shard))
            stream.truncate(len(header.raw) + size)
        weight_map |= dict.fromkeys((name for name, _, _ in shard), file)
        total += size
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def on_disk(folder: Path) -> int:
    """The bytes that the files of a folder take of the disk."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir())


def _norms(at: str, size: int, *names: str) -> Iterator[Tensor]:
    for name in names:
        yield f"{at}{name}.weight", "BF16", (size,)


def _codes(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    blocks = tuple(-(-length // _FP8_BLOCK) for length in (rows, columns))
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", blocks


def _mlp(at: str, hidden: int, intermediate: int) -> Iterator[Tensor]:
    yield from _codes(f"{at}gate_proj", intermediate, hidden)
    yield from _codes(f"{at}up_proj", intermediate, hidden)
    yield from _codes(f"{at}down_proj", hidden, intermediate)
