"""Shapes and configs of small models, as published checkpoints name them, and cuts made by hand.

Sizes are unlike wherever a mix-up would go unseen. Nothing is read or written.
"""

import math
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from sparseprune.removal.slices import KeptIndices, kept_slices

Shape = tuple[int, ...]
Shapes = dict[str, Shape]
Config = dict[str, Any]
Cut = tuple[str, int | None, Collection[int]]

LLAMA: Config = {
    "model_type": "llama", "hidden_size": 24, "intermediate_size": 10, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 2, "vocab_size": 50,
}  # fmt: skip
EXPERTS: Config = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
QWEN3_MOE: Config = {**LLAMA, **EXPERTS, "model_type": "qwen3_moe", "num_hidden_layers": 2}
QWEN2_MOE: Config = {**QWEN3_MOE, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 8}
DEEPSEEK: Config = {
    "model_type": "deepseek_v3", "hidden_size": 24, "intermediate_size": 10, "moe_intermediate_size": 7,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2,
    "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1, "qk_nope_head_dim": 3, "qk_rope_head_dim": 2, "v_head_dim": 4,
    "q_lora_rank": None, "kv_lora_rank": 6,
}  # fmt: skip
MIXTRAL: Config = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
}
GPT_OSS: Config = {**MIXTRAL, "model_type": "gpt_oss"}
LLAMA4: Config = {
    **MIXTRAL,
    "model_type": "llama4_text",
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 14,
    "moe_layers": [1],
}
GPT2: Config = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 4}
BERT: Config = {
    "model_type": "bert", "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
VIT: Config = {**BERT, "model_type": "vit"}
PHI3: Config = {**LLAMA, "model_type": "phi3", "num_hidden_layers": 1, "pad_token_id": 0}
PICTURES: Config = {
    "model_type": "gemma3",
    "text_config": {**LLAMA, "model_type": "gemma3_text", "num_hidden_layers": 2},
    "vision_config": {"model_type": "siglip_vision_model", "num_hidden_layers": 2, "intermediate_size": 12},
}


def without(config: Config, *keys: str) -> Config:
    """A config that leaves keys out."""
    return {key: value for key, value in config.items() if key not in keys}


def gated(module: str, hidden: int, width: int) -> Shapes:
    return {
        f"{module}.gate_proj.weight": (width, hidden),
        f"{module}.up_proj.weight": (width, hidden),
        f"{module}.down_proj.weight": (hidden, width),
    }


def attention(module: str, config: Config) -> Shapes:
    hidden, size = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        f"{module}.q_proj.weight": (queries, hidden),
        f"{module}.k_proj.weight": (keys, hidden),
        f"{module}.v_proj.weight": (keys, hidden),
        f"{module}.o_proj.weight": (hidden, queries),
    }


def decoder(config: Config, prefix: str = "model.", layers: int | None = None) -> Shapes:
    """A decoder with gated MLPs, as llama and most others name it."""
    hidden = config["hidden_size"]
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"] if layers is None else layers):
        at = f"{prefix}layers.{layer}"
        shapes |= attention(f"{at}.self_attn", config)
        shapes |= gated(f"{at}.mlp", hidden, config["intermediate_size"])
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
    return {**shapes, f"{prefix}norm.weight": (hidden,)}


def experts(module: str, hidden: int, width: int, count: int) -> Shapes:
    shapes: Shapes = {f"{module}.gate.weight": (count, hidden)}
    for expert in range(count):
        shapes |= gated(f"{module}.experts.{expert}", hidden, width)
    return shapes


def without_mlps(config: Config, dense: Collection[int] = ()) -> Shapes:
    """A decoder of which only the `dense` layers have MLPs."""
    return {
        name: shape
        for name, shape in decoder(config).items()
        if ".mlp." not in name or int(name.split("layers.")[1].split(".")[0]) in dense
    }


def mixture(config: Config, dense: Collection[int] = ()) -> Shapes:
    """A decoder of which all layers but the `dense` ones have experts, as Qwen names them."""
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    shapes = without_mlps(config, dense)
    for layer in set(range(config["num_hidden_layers"])) - set(dense):
        at = f"model.layers.{layer}.mlp"
        shapes |= experts(at, hidden, width, config["num_experts"])
        if "shared_expert_intermediate_size" in config:
            shapes |= gated(f"{at}.shared_expert", hidden, config["shared_expert_intermediate_size"])
            shapes[f"{at}.shared_expert_gate.weight"] = (1, hidden)
    return shapes


def deepseek(config: Config = DEEPSEEK) -> Shapes:
    """Latent attention; experts in groups, with shared ones beside them, behind the first layers."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    wide, value = config["qk_nope_head_dim"], config["v_head_dim"]
    shapes: Shapes = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes[f"{at}.self_attn.q_proj.weight"] = (heads * (wide + config["qk_rope_head_dim"]), hidden)
        shapes[f"{at}.self_attn.kv_b_proj.weight"] = (heads * (wide + value), config["kv_lora_rank"])
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, heads * value)
        if layer < config["first_k_dense_replace"]:
            shapes |= gated(f"{at}.mlp", hidden, config["intermediate_size"])
            continue
        count, width = config["n_routed_experts"], config["moe_intermediate_size"]
        shapes |= experts(f"{at}.mlp", hidden, width, count)
        shapes |= gated(f"{at}.mlp.shared_experts", hidden, width * config["n_shared_experts"])
        shapes[f"{at}.mlp.gate.e_score_correction_bias"] = (count,)
    return shapes


def gpt_oss(config: Config = GPT_OSS) -> Shapes:
    """Experts in 3-D tensors, gate and up interleaved."""
    hidden, width, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = without_mlps(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.self_attn.sinks": (config["num_attention_heads"],),
            f"{at}.mlp.router.weight": (count, hidden),
            f"{at}.mlp.router.bias": (count,),
            f"{at}.mlp.experts.gate_up_proj": (count, hidden, 2 * width),
            f"{at}.mlp.experts.gate_up_proj_bias": (count, 2 * width),
            f"{at}.mlp.experts.down_proj": (count, width, hidden),
            f"{at}.mlp.experts.down_proj_bias": (count, hidden),
        }
    return shapes


def mixtral(config: Config = MIXTRAL) -> Shapes:
    """Experts in lists of a module that has a name of its own."""
    shapes = without_mlps(config)
    width, hidden = config["intermediate_size"], config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.block_sparse_moe"
        shapes[f"{at}.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            shapes |= {
                f"{at}.experts.{expert}.w1.weight": (width, hidden),
                f"{at}.experts.{expert}.w2.weight": (hidden, width),
                f"{at}.experts.{expert}.w3.weight": (width, hidden),
            }
    return shapes


def llama4(config: Config = LLAMA4) -> Shapes:
    """Experts in 3-D tensors with inputs first, beside a shared one; other layers have none."""
    hidden, width, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    shapes = without_mlps(config)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.feed_forward"
        if layer not in config["moe_layers"]:
            shapes |= gated(at, hidden, config["intermediate_size_mlp"])
            continue
        shapes |= gated(f"{at}.shared_expert", hidden, width)
        shapes |= {
            f"{at}.router.weight": (count, hidden),
            f"{at}.experts.gate_up_proj": (count, hidden, 2 * width),
            f"{at}.experts.down_proj": (count, width, hidden),
        }
    return shapes


def gpt2(config: Config = GPT2) -> Shapes:
    """Matrices with inputs first, queries, keys and values in one."""
    hidden = config["n_embd"]
    width = config.get("n_inner") or 4 * hidden
    shapes: Shapes = {}
    for layer in range(config["n_layer"]):
        shapes |= {
            f"h.{layer}.ln_1.weight": (hidden,),
            f"h.{layer}.attn.c_attn.weight": (hidden, 3 * hidden),
            f"h.{layer}.attn.c_attn.bias": (3 * hidden,),
            f"h.{layer}.attn.c_proj.weight": (hidden, hidden),
            f"h.{layer}.attn.c_proj.bias": (hidden,),
            f"h.{layer}.mlp.c_fc.weight": (hidden, width),
            f"h.{layer}.mlp.c_fc.bias": (width,),
            f"h.{layer}.mlp.c_proj.weight": (width, hidden),
            f"h.{layer}.mlp.c_proj.bias": (hidden,),
        }
    return shapes


def encoder(config: Config = BERT, prefix: str = "bert", names: str = "self") -> Shapes:
    """As BERT names it, or as ViT does."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    shapes: Shapes = {}
    for layer in range(config["num_hidden_layers"]):
        at = f"{prefix}.encoder.layer.{layer}"
        for name in (f"{names}.query", f"{names}.key", f"{names}.value", "output.dense"):
            shapes |= {
                f"{at}.attention.{name}.weight": (hidden, hidden),
                f"{at}.attention.{name}.bias": (hidden,),
            }
        shapes |= {
            f"{at}.intermediate.dense.weight": (width, hidden),
            f"{at}.intermediate.dense.bias": (width,),
            f"{at}.output.dense.weight": (hidden, width),
            f"{at}.output.dense.bias": (hidden,),
        }
    return shapes


def picture_encoder(config: Config = VIT) -> Shapes:
    return encoder(config, "vit", "attention")


def phi3(config: Config = PHI3) -> Shapes:
    """Gate and up in one matrix, queries, keys and values in another."""
    hidden, width, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    return {
        "model.layers.0.mlp.gate_up_proj.weight": (2 * width, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, width),
        "model.layers.0.self_attn.qkv_proj.weight": (queries + 2 * keys, hidden),
        "model.layers.0.self_attn.o_proj.weight": (hidden, queries),
    }


def pictures() -> Shapes:
    """A language model beside a vision tower that has layers of such names too."""
    tower = {
        f"vision_tower.encoder.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "mlp.fc1.weight": (12, 8),
            "mlp.fc2.weight": (8, 12),
            "self_attn.q_proj.weight": (8, 8),
            "mlp.gate_proj.weight": (10, 24),
        }.items()
    }
    return {**decoder(PICTURES["text_config"], "language_model.model."), **tower}


def cut(shapes: Shapes, cuts: Iterable[Cut]) -> dict[str, KeptIndices]:
    """What masks keep that drop these indices of a dimension, by patterns of names; all where it is None."""
    flags: dict[str, list[Any]] = {}
    gone: set[str] = set()
    for pattern, dim, dropped in cuts:
        names = [name for name in shapes if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"{pattern} matches nothing")
        for name in names:
            along = flags.setdefault(name, [np.ones(size, dtype=np.bool_) for size in shapes[name]])
            if dim is None:
                gone.add(name)
                along[:] = [np.zeros_like(each) for each in along]
            else:
                along[dim][list(dropped)] = False
    return {
        name: kept_slices(along) if along else KeptIndices((), int(name not in gone))
        for name, along in flags.items()
    }


def some_elements(shape: Shape, elements: int) -> KeptIndices:
    """A mask that keeps something at every index, but no more than so many elements."""
    return KeptIndices(
        tuple(np.ones(size, dtype=np.bool_) for size in shape), min(elements, math.prod(shape))
    )


def channels(dropped: Collection[int], at: str = "*.mlp") -> list[Cut]:
    """Cuts of the channels of gated MLPs."""
    return [
        (f"{at}.gate_proj.weight", 0, dropped),
        (f"{at}.up_proj.weight", 0, dropped),
        (f"{at}.down_proj.weight", 1, dropped),
    ]


def places(units: Iterable[int], size: int) -> list[int]:
    """The indices of units of a size."""
    return [unit * size + place for unit in units for place in range(size)]


def heads(queries: Iterable[int], keys: Iterable[int], at: str = "*.self_attn", size: int = 2) -> list[Cut]:
    """Cuts of query heads and of key/value heads."""
    wide = places(queries, size)
    return [
        (f"{at}.q_proj.weight", 0, wide),
        (f"{at}.[kv]_proj.weight", 0, places(keys, size)),
        (f"{at}.o_proj.weight", 1, wide),
    ]


def whole(*patterns: str) -> list[Cut]:
    """Everything of these goes."""
    return [(pattern, None, ()) for pattern in patterns]
